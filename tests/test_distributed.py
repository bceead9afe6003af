"""Devices and processes that train together have the loss curve of one; they agree, and stop and continue together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import launching
import numpy as np
import pandas as pd
import pytest

from jax_repaint import distributed, model, results, train
from jax_repaint.errors import InputError

LAUNCH = Path(__file__).parent.parent / "launch"

# Tasks of one step on this machine, each in a folder of its own.
SRUN = """#!/bin/bash
shift
worst=0 tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  mkdir -p "$FOLDER/task$task"
  (cd "$FOLDER/task$task" && SLURM_PROCID=$task SLURM_LOCALID=$task exec "$@") &
  tasks+=("$!")
done
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  echo "ended with $code"
  [[ $code -gt $worst ]] && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*"
"""


@pytest.fixture
def one_of(monkeypatch):
    """Sets the flags of a process."""

    def give(**given):
        asked = {"distributed": False, "coordinator": None, "process_index": None, "process_count": None} | given
        monkeypatch.setattr(distributed, "FLAGS", SimpleNamespace(**asked))

    return give


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"process_index": 0}, "go together"),
        ({"process_count": 2, "distributed": True}, "go together"),
        ({"process_index": 2, "process_count": 2, "coordinator": "localhost:1"}, "process 2 is not one of 2"),
        ({"process_index": -1, "process_count": 2}, "process -1 is not one of 2"),
        ({"coordinator": "localhost:1"}, "needs --process_index"),
        ({"coordinator": "localhost:1", "distributed": True}, "needs --process_index"),
        ({"coordinator": "localhost", "process_index": 0, "process_count": 2}, "must be host:port"),
        ({"process_index": 0, "process_count": 2}, "need --coordinator"),
        ({"process_index": 0, "process_count": 2, "distributed": True}, "need --coordinator"),
    ],
)
def test_half_of_the_flags_is_refused(one_of, given, words):
    one_of(**given)
    with pytest.raises(InputError, match=words):
        distributed.start()


def test_processes_that_do_not_compute_together_need_numbers_alone(one_of):
    one_of(process_index=1, process_count=2)
    distributed.start(together=False)
    one_of()
    distributed.start()
    assert jax.process_count() == 1


def test_a_batch_is_a_multiple_of_the_devices(monkeypatch):
    assert distributed.over_all_devices(7) is None
    monkeypatch.setattr(jax, "devices", lambda: list(range(6)))
    with pytest.raises(InputError, match="multiple of the number of devices, 6, got 16"):
        distributed.over_all_devices(16)


def test_who_loses_another_process_says_so_and_ends(monkeypatch, capsys, tmp_path):
    reset = "UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error: Connection reset by peer\nand a stack"
    ended, processes, errors = [], [2], [ValueError(reset), ValueError("not of the network"), ValueError(reset)]

    def lose(*_):
        raise errors.pop(0)

    monkeypatch.setattr(train, "FLAGS", SimpleNamespace(config=None, workdir=tmp_path))
    monkeypatch.setattr(train, "train", lose)
    monkeypatch.setattr(jax, "process_count", lambda: processes[0])
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit(code))
    with pytest.raises(SystemExit):
        train.main([])
    assert ended == [1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: another process of the 2 is gone (UNKNOWN: Gloo all-reduce failed")
    assert line.endswith("Connection reset by peer); the same commands continue from the last state that was saved")
    with pytest.raises(ValueError, match="not of the network"):
        train.main([])
    processes[0] = 1
    with pytest.raises(ValueError, match="Gloo"):
        train.main([])
    assert ended == [1]


CORES = """
import os
import jax
from jax_repaint import command, distributed
if "CORE" in os.environ:
    os.sched_setaffinity(0, {int(os.environ["CORE"])})
distributed.define_flags()
def main(_):
    mesh = distributed.over_all_devices(30)
    alone = distributed.training_devices("conditional").size
    print(jax.local_device_count(), 1 if mesh is None else mesh.size, alone)
command.run(main)
"""


def count_devices(*given, **changes):
    """Devices that a command finds, that train, and that train the form conditional, where this process has no say."""
    fixed = {"XLA_FLAGS": launching.xla_flags().replace("--xla_force_host_platform_device_count=1", "")} | changes
    done = subprocess.run(
        [sys.executable, "-c", CORES, *given], capture_output=True, text=True, env=launching.environment(**fixed),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    devices, found, alone = (int(number) for number in done.stdout.split())
    # Who asked for devices hears that they are not used, and nobody else.
    assert ("takes one device" in done.stderr) == (found > 1)
    return [devices, found, alone]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores a process has")
def test_cores_are_devices_where_nobody_says_otherwise():
    cores = os.sched_getaffinity(0)
    assert count_devices() == [min(len(cores), distributed.CORES), 1, 1]
    assert count_devices(CORE=str(min(cores))) == [1, 1, 1]
    # Devices of one CPU that factorise matrices and then wait for each other never end.
    assert count_devices(JAX_NUM_CPU_DEVICES="3") == [3, 3, 1]
    assert count_devices(XLA_FLAGS=launching.xla_flags(5)) == [5, 5, 1]
    assert count_devices("--coordinator=localhost:1") == [1, 1, 1]


# One epoch's steps of a loss with known work, on all devices and on one.
STEPS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest, jax, numpy as np, optax, tiny
import jax.numpy as jnp
from jax_repaint import distributed
from jax_repaint.optimise import State, make_held_out, make_steps, plan

def loss(params, x0, key, place, training):
    keep, noise = jax.random.split(key)
    x = x0[..., 0] + place * jax.random.normal(noise, x0.shape[:2])
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(jnp.where(jax.random.bernoulli(keep, 0.9, x.shape), x - x0[..., 1], 0.0) ** 2)

made, jit = [], distributed.jit
distributed.jit = lambda function, mesh, **options: made.append(jit(function, mesh, **options)) or made[-1]
config = tiny.config("edm", batch=8, accumulate=2, dispatch=2, flips=True)
rng = np.random.default_rng(0)
data = rng.standard_normal((40, 32, 32, 2)).astype(np.float32)
weights = [rng.standard_normal((32, 32)).astype(np.float32) / 6 for _ in range(4)]
optimiser, ocean, steps = optax.adam(1e-2), jnp.ones((32, 32, 1)), plan(40, config)
results = []
for mesh in (distributed.over_all_devices(8), None):
    state = State(weights, jax.tree.map(np.copy, weights), optimiser.init(weights), 0, np.zeros(2), np.inf)
    state = jax.tree.map(lambda x: np.asarray(x, np.int32 if np.asarray(x).dtype.kind == "i" else np.float32), state)
    state = distributed.replicate(jax.tree.map(np.copy, state), mesh)
    frames = distributed.replicate(data, mesh)
    dispatch = make_steps(config, loss, optimiser, steps, ocean, mesh=mesh)
    work = made[-1].lower(state, frames, 1).compile().cost_analysis()["flops"]
    losses = []
    for _ in range(2):
        state, some = dispatch(state, frames)
        losses += some.tolist()
    held_out = make_held_out(config, loss, data[:13], mesh)(state.ema)
    leaves = jax.tree.leaves(state)
    results.append({
        "flops": work, "losses": losses, "held_out": float(held_out), "params": np.asarray(state.params[0]).tolist(),
        "devices": [len(x.sharding.device_set) for x in leaves], "whole": all(x.is_fully_replicated for x in leaves),
    })
print(json.dumps(results))
"""


def test_eight_devices_share_the_work_of_a_batch():
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(launching.TESTS)], capture_output=True, text=True,
        env=launching.environment(XLA_FLAGS=launching.xla_flags(8)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    eight, one = json.loads(done.stdout)
    assert (set(eight["devices"]), set(one["devices"]), eight["whole"]) == ({8}, {1}, True)
    assert 1 / 8 <= eight["flops"] / one["flops"] < 1 / 4
    for name in ("losses", "held_out", "params"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-6)
    assert one["losses"][0] != one["losses"][1]


AGREE = """
import sys, time
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np
from jax_repaint import distributed
from jax_repaint.errors import InputError
index, together = int(sys.argv[2]), sys.argv[3] == "together"
distributed.FLAGS = SimpleNamespace(distributed=False, coordinator=sys.argv[1], process_index=index, process_count=2)
distributed.start(together)
assert (jax.process_index(), jax.process_count(), jax.local_device_count()) == (index, 2, 1)
if not together:
    # The first one is long gone when the other one ends.
    time.sleep(2 * index)
    print(jax.jit(lambda x: x.sum())(jnp.arange(4 + index)))
    sys.exit()

def fail():
    raise InputError("a disk: “full”")

def fail_at_second():
    return index and fail()

refused = []
for call in (
    lambda: distributed.at_first(fail),
    lambda: distributed.at_all(fail_at_second),
    lambda: distributed.check_same(f"data {index}", "data"),
):
    try:
        call()
    except InputError as e:
        refused.append(str(e))
distributed.check_same("data", "data")
try:
    distributed.over_all_devices(3)
except InputError as e:
    refused.append(str(e))
mesh = distributed.over_all_devices(4)
rows = distributed.replicate(np.arange(4, dtype=np.float32), mesh)
total = distributed.jit(lambda x: distributed.split(x, mesh).sum(), mesh)(rows)
print([
    distributed.at_first(lambda: "result"), distributed.at_all(lambda: index),
    distributed.same_text("first" * (1 - index)), distributed.same_text(""),
    distributed.same({"a": np.full(3, index, np.float32)})["a"].tolist(), distributed.any_of(index == 1, False),
    float(total), refused,
])
"""


def agree(how):
    address = f"localhost:{launching.free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, address, str(index), how], env=launching.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    texts = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    return [out.splitlines()[-1] for out, _ in texts]


def test_two_processes_agree():
    other = ["data must be the same in all 2 processes"]
    other.append("train.batch must be a multiple of the number of devices, 2, got 3")
    for index, line in enumerate(agree("together")):
        result = None if index else "result"
        errors = ["a disk: “full”", "a disk: “full”" if index else "another process cannot go on; it says why", *other]
        assert line == str([result, index, "first", "", [0.0, 0.0, 0.0], (True, False), 6.0, errors])


def test_processes_that_part_do_not_wait_for_each_other():
    assert agree("apart") == ["6", "10"]


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launching.write_configs(folder)
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The run of one device."""
    done = launching.bash("python -m jax_repaint.train --config=train.py --workdir=one", folder)
    assert done.returncode == 0, done.stderr
    return folder / "one"


def check_same_curve(workdir, one):
    logs = [pd.read_csv(run / "log.csv").drop(columns=["seconds", "frames_per_second"]) for run in (workdir, one)]
    assert logs[0]["step"].tolist() == [5, 10, 15]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4)
    ours, theirs = (model.load(run / "model") for run in (workdir, one))
    assert ours.training["step"] == theirs.training["step"]
    # Adam makes whole steps of the rounding errors of gradients that are 0, such as of biases before a normalisation.
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(one.params)]) for one in (ours, theirs))
    assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


@pytest.mark.slow
def test_eight_devices_have_the_curve_of_one(folder, one):
    eight = {"XLA_FLAGS": launching.xla_flags(8)}
    done = launching.bash("python -m jax_repaint.train --config=train.py --workdir=eight", folder, **eight)
    assert done.returncode == 0, done.stderr
    check_same_curve(folder / "eight", one)


@pytest.mark.slow
def test_two_processes_are_stopped_queued_again_and_have_the_curve_of_one(folder, one):
    # Under Slurm first, until one process alone is told to stop; then with a coordinator, as the tutorial has it.
    job = {
        "SLURM_JOB_ID": "3107", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
        "FOLDER": str(folder), "STOP_AFTER": "7",
    }  # fmt: skip
    path = f"{folder / 'bin'}:{launching.environment()['PATH']}"
    text = f"bash {LAUNCH / 'slurm.sh'} train --config={folder / 'train.py'} --workdir=run"
    done = launching.bash(text, folder, PATH=path, **job)
    assert done.returncode == 143, done.stderr
    assert done.stdout.count("ended with 143") == 2
    assert done.stdout.count("stopped; the same command continues") == 1
    assert "scontrol requeue 3107" in done.stdout
    # Process 0 alone writes.
    assert not (folder / "task1" / "run").exists()
    (folder / "task0" / "run").rename(folder / "run")
    steps = [int(path.name) for path in (folder / "run" / "checkpoints" / "last").iterdir()]
    assert max(steps) == 8
    train, sweep = launching.blocks("slurm.md")[-2:]
    small = {"4321": str(launching.free_port()), "configs/tiny.py": "train.py", "runs/tiny": "run", "wait": "wait $!",
             "configs/sweeps/gamma.py": "sweep.py --config.model=run/model", "sweeps/gamma": "sweep"}  # fmt: skip
    for name, there in small.items():
        train, sweep = (text.replace(name, there) for text in (train, sweep))
    done = launching.bash("set -e\n" + train, folder)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("process . of 2, with 1 of 2 devices", done.stderr)) == 2
    assert done.stdout.count("lowest held-out loss") == 1
    check_same_curve(folder / "run", one)
    done = launching.bash("set -e\n" + sweep, folder)
    assert done.returncode == 0, done.stderr
    rows = results.read_parts(folder / "sweep")
    assert rows.groupby("method")["frame"].nunique().to_dict() == {"gp_init": 2, "kalman": 2}
    assert (folder / "sweep" / "table.txt").exists()


DEMO = """
import runpy, sys
sys.path.insert(0, {tests!r})
import conftest, tiny
from jax_repaint.nets import unet
tiny.compile_once({cache!r})
unet.NETWORKS["tiny"] = tiny.NETWORK
ranges = ["--train_range=0:30", "--test_range=40:60", "--methods=linear,kalman"]
sys.argv = ["demo", "--fields=tiny.nc", *ranges, "--steps=2", "--members=2", "--patterns=line:3", "--out=demo"]
runpy.run_module("jax_repaint.demo", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_demo_trains_on_any_number_of_devices(folder):
    text = DEMO.format(tests=str(launching.TESTS), cache=str(folder / "cache"))
    three = launching.environment(XLA_FLAGS=launching.xla_flags(3))
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=three, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = model.load(folder / "demo" / "run" / "model")
    assert trained.training["config"]["train"]["batch"] == 15
    assert (folder / "demo" / "table.csv").exists()
    assert f"python -m jax_repaint.calibrate --model={Path('demo', 'run', 'model')}" in done.stdout
