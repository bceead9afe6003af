"""Commands started as processes of their own, with the small network of tiny.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import tiny

from jax_repaint.data import readers

TESTS = Path(__file__).parent
STEPS = 15

# With STOP_AFTER=n, process 1, or the only one, gets SIGTERM after its n-th dispatch.
TRAIN = """
import os
import pathlib
import signal
import sys
sys.path.insert(0, {tests!r})
import conftest
import tiny
from jax_repaint.nets import unet

tiny.compile_once(pathlib.Path({cache!r}))
unet.NETWORKS["test"] = tiny.NETWORK
command = sys.modules["__main__"]
if "STOP_AFTER" in os.environ and os.environ.get("SLURM_PROCID", "1") == "1":
    make_steps = command.make_steps

    def stopped(*args):
        dispatch, left = make_steps(*args), iter(range(int(os.environ["STOP_AFTER"])))

        def run(state, data):
            if next(left, None) is None:
                signal.raise_signal(signal.SIGTERM)
            return dispatch(state, data)

        return run

    command.make_steps = stopped

def get_config(arg=""):
    config = tiny.config(batch=8, epochs=3, dispatch=1)
    config.data.fields = {fields!r}
    return config
"""
SWEEP = """
import pathlib
import sys
sys.path.insert(0, {tests!r})
import tiny
from jax_repaint.points import default_config, smoke

tiny.compile_once(pathlib.Path({cache!r}))

def sweep(add):
    add(method="gp_init", t_start=3)
    add(method="kalman", levels=2)

def get_config(arg=""):
    config = default_config(sweep)
    config.frames, config.members, config.resample_steps = 2, 2, 1
    config.patterns = "line:3"
    config.x = "method"
    return smoke(config, arg)
"""


def write_configs(folder: Path) -> None:
    """tiny.nc, train.py (three epochs of five steps) and sweep.py (two points, two cases) in `folder`."""
    readers.write(tiny.fields(), folder / "tiny.nc")
    fields = {"tests": str(TESTS), "cache": str(folder / "cache"), "fields": str(folder / "tiny.nc")}
    (folder / "train.py").write_text(TRAIN.format(**fields))
    (folder / "sweep.py").write_text(SWEEP.format(**fields))


def xla_flags(devices: int = 1) -> str:
    """Those of this process, for one with `devices` virtual devices."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])


def environment(**changes: str) -> dict[str, str]:
    """Of a process on CPUs in which `python` is this one, and Slurm is not."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ours |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return ours | changes


def bash(text: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess:
    """Runs text under bash."""
    return subprocess.run(["bash", "-c", text], cwd=cwd, env=environment(**changes), capture_output=True, text=True)


def blocks(name: str) -> list[str]:
    """The command blocks of a tutorial in docs/."""
    parts = (TESTS.parent / "docs" / name).read_text().split("```")
    return [part.removeprefix("sh\n") for part in parts[1::2]]


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
