"""Commands as a user types them: a mistake is one line that begins with `error:`, exit code 2, and nothing written."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from jax_repaint import command, methods, model
from jax_repaint.data import readers
from jax_repaint.errors import InputError

# Importing JAX takes seconds: one process imports everything and forks for every command, before JAX has threads.
FORKS = """
import contextlib, json, os, runpy, sys, traceback, warnings
import jax_repaint.calibrate, jax_repaint.demo, jax_repaint.evaluate, jax_repaint.report, jax_repaint.sweep
import jax_repaint.train
warnings.simplefilter("ignore")
for number, command in enumerate(json.load(open("commands.json"))):
    child = os.fork()
    if not child:
        code = 0
        with open(f"{number}.out", "w") as out, open(f"{number}.err", "w") as err:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv = [command[0], *command[1:]]
            try:
                runpy.run_module("jax_repaint." + command[0], run_name="__main__", alter_sys=True)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SMOKE = ["train", "--config=CONFIG:smoke", "--workdir=new"]
EVALUATE = ["evaluate", "--model=model", "--fields=tiny.nc", "--frames=2", "--out=new"]
OWN = ["demo", "--fields=tiny.nc", "--out=new"]
MISTAKES = {
    "unknown setting": ([*SMOKE, "--config.train.nonsense=1"], "no setting 'nonsense'"),
    "misspelt setting": ([*SMOKE, "--config.train.epoch=1"], "epochs"),
    "wrong type": ([*SMOKE, "--config.train.epochs=many"], "'many' is no whole number"),
    "fraction for a whole number": ([*SMOKE, "--config.train.epochs=1.5"], "'1.5' is no whole number"),
    "word for a number": ([*SMOKE, "--config.train.ema=much"], "'much' is no number"),
    "word for a choice": ([*SMOKE, "--config.train.flips=perhaps"], "'perhaps' is neither true nor false"),
    "no number": ([*SMOKE, "--config.data.fields=tiny.nc", "--config.data.train=nan"], "must be positive and add up"),
    "impossible value": ([*SMOKE, "--config.train.batch=0"], "train.batch must be at least 1"),
    "unknown network": ([*SMOKE, "--config.model.network=unet"], "standard_attn"),
    "unknown option": ([*SMOKE, "--wrkdir=x"], "wrkdir"),
    "no configuration": (["train", "--workdir=new"], "config"),
    "no workdir": (SMOKE[:2], "workdir"),
    "missing configuration": (["train", "--config=nowhere.py", "--workdir=new"], "No such file or directory: 'nowh"),
    "folder for a configuration": (["train", "--config=model", "--workdir=new"], "error: --config: Is a directory: 'm"),
    "configuration that fails": (["train", "--config=fails.py", "--workdir=new"], "fails.py, line 2: division by zero"),
    "training from the configuration of a sweep": (
        ["train", "--config=gamma.py", "--workdir=new"], "not one of a training: it has no data.allow_short_gap and "
    ),
    "sweep from the configuration of a training": (
        ["sweep", "--config=CONFIG:smoke", "--workdir=new"], "not one of a sweep: it has no batch and "
    ),
    "configuration that is text": (
        ["train", "--config=text.py", "--workdir=new"], "text.py, line 2, is not Python (invalid syntax)"
    ),
    "configuration without its function": (["train", "--config=empty.py", "--workdir=new"], "has no get_config"),
    "configuration that is a dictionary": (
        ["train", "--config=dict.py", "--workdir=new"], "must return a ConfigDict, not dict"
    ),
    "unknown kind of configuration": (["train", "--config=CONFIG:tiny", "--workdir=new"], "error: the argument of"),
    "missing fields": ([*SMOKE, "--config.data.fields=nowhere.nc"], "nowhere.nc"),
    "too few frames": ([*SMOKE, "--config.data.fields=tiny.nc", "--config.train.batch=64"], "fewer than a batch"),
    "parts that overlap": (
        [*SMOKE, "--config.data.fields=tiny.nc", "--config.data.train=0:40", "--config.data.validation=30:45",
         "--config.data.test=48:60"],
        "overlap",
    ),
    "no such model to start from": (
        [*SMOKE, "--config.data.fields=tiny.nc", "--config.init_from=nowhere"], "no model in nowhere"
    ),
    "workdir of another run": (
        ["train", "--config=CONFIG:smoke", "--workdir=other", "--config.data.fields=tiny.nc"],
        "config.train.epochs: 7 there, 2 here",
    ),
    "workdir of something else": (
        ["train", "--config=CONFIG:smoke", "--workdir=model", "--config.data.fields=tiny.nc"], "holds no run"
    ),
    "positional argument": ([*SMOKE, "again"], "unexpected argument 'again'"),
    "fields without ranges": (OWN, "--train_range and --test_range"),
    "ranges without fields": (["demo", "--train_range=0:10", "--out=new"], "go with --fields"),
    "steps without fields": (["demo", "--steps=10", "--out=new"], "--steps is of a training, which takes --fields"),
    "range that is none": ([*OWN, "--train_range=first", "--test_range=50:60"], "first"),
    "range beyond the file": ([*OWN, "--train_range=0:40", "--test_range=60:90"], "60:90"),
    "demo with an unknown method": (["demo", "--methods=magic", "--out=new"], "'magic' is not one of"),
    "demo with half a pair": (["demo", "--members=3", "--out=new"], "antithetic pairs"),
    "demo on a line outside": ([*OWN, "--train_range=0:40", "--test_range=50:60", "--patterns=line:7"], "rows 0..6"),
    "demo with a network that it does not train": (
        [*OWN, "--train_range=0:40", "--test_range=50:60", "--methods=given"], "a model of form conditional"
    ),
    "evaluating what the network does not take": ([*EVALUATE, "--methods=linear,given"], "a model of form conditional"),
    "demo without the model": (["demo", "--model=nowhere", "--out=new"], "no model in nowhere"),
    "members below one": (["demo", "--members=0", "--out=new"], "members"),
    "missing model": (["evaluate", "--model=nowhere", "--out=new"], "no model in nowhere"),
    "no model": (["evaluate", "--out=new"], "model"),
    "model of another grid": ([*EVALUATE[:2], "--fields=shifted.nc", "--out=new"], "another grid"),
    "unknown method": ([*EVALUATE, "--methods=linear,magic"], "'magic' is not one of"),
    "no method": ([*EVALUATE, "--methods="], "at least one method"),
    "odd members of pairs": ([*EVALUATE, "--methods=kalman", "--members=3"], "antithetic pairs"),
    "unknown pattern": ([*EVALUATE, "--patterns=circle:3"], "'circle:3' is not one of"),
    "pattern without a number": ([*EVALUATE, "--patterns=line:middle"], "'line:middle' is not one of"),
    "line outside": ([*EVALUATE, "--patterns=line:7"], "rows 0..6"),
    "line on land": ([*EVALUATE, "--patterns=line:0"], "row 0 has no ocean cell"),
    "walk too long": ([*EVALUATE, "--patterns=walk:200"], "does not fit"),
    "fraction above one": ([*EVALUATE, "--patterns=cells:2"], "(0, 1]"),
    "calibrating no model": (["calibrate", "--model=nowhere"], "no model in nowhere"),
    "calibrating what has no ensemble": (["calibrate", "--model=model", "--method=gp"], "'gp' cannot be calibrated"),
    "calibrating on one block": (
        ["calibrate", "--model=model", "--fields=tiny.nc", "--frames=4", "--block=99"], "one block of time"
    ),
    "report without a folder": (["report"], "the folder to report on is missing"),
    "report on nothing": (["report", "model", "--out=new.html"], "model holds no training run"),
    "report in the place of a file": (["report", "mine", "--out=mine/fields.nc"], "must be one of .html"),
    "report on no folder": (["report", "nowhere"], "nowhere is no folder"),
    "report on two folders": (["report", "model", "other"], "unexpected argument 'other'"),
    "output folder is a file": ([*EVALUATE[:-1], "--out=tiny.nc", "--methods=linear"], "cannot write"),
    "results in the place of the fields": (
        ["evaluate", "--model=model", "--fields=mine/fields.nc", "--frames=2", "--out=mine", "--methods=linear"],
        "mine/fields.nc is a file that this command reads, and would be lost",
    ),
    "demo in the place of the fields": (
        ["demo", "--fields=mine/fields.nc", "--train_range=0:40", "--test_range=50:60", "--out=mine"],
        "mine/fields.nc is a file that this command reads, and would be lost",
    ),
    "results in the place of other tables": (
        ["evaluate", "--model=model", "--fields=tiny.nc", "--frames=2", "--out=tables", "--methods=linear"],
        "cannot write an evaluation to tables: table.csv is there, and is not of an earlier one",
    ),
    "demo in the place of other tables": (
        ["demo", "--fields=tiny.nc", "--train_range=0:40", "--test_range=50:60", "--out=tables"],
        "cannot write an evaluation to tables: table.csv is there, and is not of an earlier one",
    ),
    "a demo of two models": (["demo", "--fields=tiny.nc", "--model=model"], "--fields trains a model of its own"),
    "calibrating the package": (["calibrate", "--model=ram_head"], "calibrate a copy of its folder"),
    "a negative seed of the twin": (
        ["train", "--config=CONFIG", "--workdir=new", "--config.data.twin_seed=-1"], "data.twin_seed must be"
    ),
    "results in a model": ([*EVALUATE[:-1], "--out=model"], "to model: it is the folder of a model"),
    "nothing observed": (["inpaint", "--out=new.nc"], "--observations=FILE and --out=FILE.nc or FILE.zarr are needed"),
    "missing observations": (["inpaint", "--model=model", "--observations=nowhere.csv", "--out=new.nc"], "nowhere.csv"),
    "fields to no NetCDF": (["inpaint", "--model=model", "--observations=tiny.nc", "--out=new.csv"], "one of .nc"),
    "no subcommand": (["checkpoint", "--torch=nowhere.pt", "--out=new"], "say what to do"),
    "missing checkpoint": (["checkpoint", "import", "--torch=nowhere.pt", "--out=new"], "cannot read nowhere.pt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    data = tiny.fields()
    readers.write(data, folder / "tiny.nc")
    (folder / "mine").mkdir()
    readers.write(data, folder / "mine" / "fields.nc")
    (folder / "tables").mkdir()
    (folder / "tables" / "table.csv").write_text("x")
    data.lon[:] += 1
    readers.write(data, folder / "shifted.nc")
    model.save(tiny.model(data=readers.read(folder / "tiny.nc")), folder / "model")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder, request):
    """(exit code, stdout, stderr, new entries of the folder) of every mistake."""
    config = request.config.rootpath / "configs" / "small.py"
    commands = [[part.replace("CONFIG", str(config)) for part in command] for command, _ in MISTAKES.values()]
    shutil.copy(request.config.rootpath / "configs" / "sweeps" / "gamma.py", folder)
    (folder / "text.py").write_text("\nconfigurations of trainings\n")
    (folder / "empty.py").write_text("")
    (folder / "fails.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    (folder / "dict.py").write_text("def get_config(arg=''):\n    return {'train': {'epochs': 3}}\n")
    (folder / "other" / "checkpoints" / "last" / "9").mkdir(parents=True)
    (folder / "other" / "config.json").write_text('{"config": {"train": {"epochs": 7}}, "data": {}}')
    (folder / "commands.json").write_text(json.dumps(commands))
    before = {str(path) for path in folder.rglob("*")}
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {str(path) for path in folder.rglob("*") if path.suffix not in (".out", ".err")}
    texts = [[(folder / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in range(len(commands))]
    return dict(zip(MISTAKES, zip(map(int, done.stdout.split()), texts, strict=True), strict=True)), after - before


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(outcomes, mistake):
    code, (out, err) = outcomes[0][mistake]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    assert (code, len(errors)) == (2, 1), err
    assert MISTAKES[mistake][1] in errors[0]
    assert err.rstrip().endswith(errors[0])
    assert not out


def test_mistakes_write_nothing(outcomes):
    assert not outcomes[1]


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_help_on_checkpoints_names_what_the_command_does(option):
    command = [sys.executable, "-m", "jax_repaint.checkpoint", option]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m jax_repaint.checkpoint import --torch=FILE.pt" in done.stdout
    assert "--torch: Checkpoint of PyTorch (.pt) to import." in done.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_the_variables_of_currents_alone(option):
    done = subprocess.run([sys.executable, "-m", "jax_repaint.inpaint", option], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--lat_name: Name of the column that is lat.\n" in done.stdout
    assert "--u_name: Name of the column or variable that is u.\n" in done.stdout


def test_evaluate_compares_and_writes(folder, tmp_path):
    command = [*EVALUATE[:-1], f"--out={tmp_path}", "--patterns=line:3,line:3,cells:0.1"]
    command += ["--methods=climatology,seed_gp,linear,linear_samples", "--members=4"]
    done = subprocess.run([sys.executable, "-m", f"jax_repaint.{command[0]}", *command[1:]], cwd=folder,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = ["details.csv", "fields.nc", "figure.png", "frames.csv", "table.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 4
    for name in ("line:3", "cells:0.1", "linear_samples"):
        assert name in done.stdout
    assert f"wrote {tmp_path / 'table.csv'}" in done.stdout


INTERRUPTED = """
import sys
from jax_repaint import command
def main(_):
    raise KeyboardInterrupt
sys.argv = ["test"]
command.run(main)
"""


def test_an_interrupted_command_says_so_in_a_word():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_log_gets_lines_and_of_what_is_quick_none(monkeypatch, capsys):
    with command.bar(4, "kalman", "field") as bar:
        bar.update(4)
    monkeypatch.setattr(command, "SECONDS_A_LINE", 0.0)
    for shown in (False, True):
        with command.bar(4, "kalman", "field", shown, initial=1) as bar:
            bar.set_postfix_str("group 1 of 2")
            bar.update(2)
    out, err = capsys.readouterr()
    lines = [re.sub(r"after [\d:]+, [\d:?]+ left", "so far", line) for line in err.splitlines()]
    assert (out, lines[0]) == ("", "kalman: 1 of 4 fields so far")
    assert lines[-1] == "kalman: 3 of 4 fields so far, group 1 of 2"
    assert lines.count(lines[-1]) == 1
    assert "\r" not in err


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with command.bar(4, "kalman", "field") as bar:
        bar.update(4)
    assert "\rkalman: 100%|" in terminal.getvalue()


@pytest.mark.parametrize("names", [[], ["magic"], ["linear", "kalman"]])
def test_methods_are_checked_before_anything_is_read(names):
    with pytest.raises(InputError):
        methods.check_methods(names, 3)
    methods.check_methods(["linear", "linear_samples", "adaptive"], 3)
    methods.check_methods(["kalman"], 4)
    assert np.all([name in methods.METHODS for name in methods.PAIRED])
