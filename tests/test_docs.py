"""Every command of the documentation runs, with little to do; what no test can run is listed with the reason.

Commands stand in fenced or indented blocks and in the first column of tables. Those of one page run one after the other
in one folder, as a reader types them. Of all others, also in docstrings, the options are parsed.
"""

import ast
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

import jax_repaint
from jax_repaint import methods, model
from jax_repaint.cases import held_out
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "jax_repaint" / "models").glob("*/*.md"))]
SOURCES += [path for top in ("jax_repaint", "configs", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]

# What is done to a command so that it takes seconds. Networks of every name are the one of tiny.py besides.
SMALLER = (
    (r"\bFILE\b", "currents.nc"),
    (r"jax_repaint/models/ram_head", "model"),
    (r"--frames=\d+", "--frames=2"),
    (r"\bmembers=\d+", "members=4"),
    (r"--levels=\d+", "--levels=2"),
    (r"--directions=\d+", "--directions=8"),
    (r"--fields=\S+ (--(config\.)?part=all)", r"--fields=other.nc \1"),
    (r"--steps=\d+", "--steps=2"),
    (r"--rows=\d+", "--rows=8"),
    (r"--(config\.)?(patterns?)=line:\d+\S*", r"--\1\2=line:4"),
    (r"(jax_repaint\.(evaluate|calibrate|demo)(?!.*--patterns)(?= ).*)", r"\1 --patterns=line:4"),
    # That all methods exist is asked below; they have tests of their own.
    (r"--methods=\S+", "--methods=linear,kalman"),
    (r"(jax_repaint\.evaluate (?!.*--methods).*)", r"\1 --methods=linear,kalman"),
    (r"(jax_repaint\.(evaluate|calibrate) (?!.*--members).*)", r"\1 --members=4"),
    (r"(jax_repaint\.evaluate (?!.*--frames).*)", r"\1 --frames=2"),
    (r"(jax_repaint\.calibrate .*)", r"\1 --frames=2 --block=1"),
    (r"(jax_repaint\.levels .*)", r"\1 --frames=2 --levels=2"),
    # On the grid of the model in the package its network would take its time.
    (r"jax_repaint\.demo$", "jax_repaint.demo --methods=linear,linear_samples --members=2 --patterns=line:22"),
    # The demo of one file stands for that of another.
    (r"--train_range=\S+ --test_range=\S+(.*) --out=\S+", r"--train_range=0:250 --test_range=275:365\1"),
    (r"(jax_repaint\.demo .*--fields.*)", r"\1 --frames=2 --steps=2 --methods=linear,kalman --members=4"),
    (r"(jax_repaint\.inpaint (?!.*--(model|export)).*)", r"\1 --method=linear_samples"),
    (r'(inpaint\("track.csv", .*members=4)\)', r'\1, method="linear_samples")'),
    (r"(jax_repaint\.inpaint .*--export.*)", r"\1 --model=model --members=4"),
    (r"(--config=configs/[\w/]+\.py)(?!\S)", r"\1:smoke"),
    (r"(--config=configs/sweeps/(models|start_level)\.py):\S+", r"\1:smoke"),
    (r"(jax_repaint\.sweep (?!.*--config\.model).*)", r"\1 --config.model=model"),
    (r"(jax_repaint\.sweep .*)", r"\1 --config.patterns=line:4 --config.frames=1"),
    (r" --config\.(train\.(batch|epochs|warmup_epochs|learning_rate|ema|held_out)|init_from)=\S+", ""),
    # Its network has to be that of the model it starts from, which is not the small one.
    (r"(configs/(conditional|gaps)\.py.*)", r"\1 --config.init_from="),
    # Solving for 96 rows takes a minute to compile.
    (r"(configs/conditional\.py.*)", r"\1 --config.observed.rows=8"),
    (r"(jax_repaint\.train (?!.*--config\.data\.fields).*)", r"\1 --config.data.fields=currents.nc"),
    (r"(jax_repaint\.train .*)", r"\1 --config.train.batch=64"),
)
# Blocks and commands that do not run here, and why.
BLOCKS_NOT_RUN = (
    (r"\bsbatch |launch/", "tests/test_launch.py runs it with stand-ins for sbatch and gcloud"),
    (r"--process_count=", "tests/test_distributed.py runs it as several processes"),
    (r"runs/(globcurrent|arctic)", "asks for days and hours that a small file lacks; the same are run on other data"),
)
NOT_RUN = (
    (r"(uv )?pip install ", "tests run in an environment that is installed"),
    (r"git clone |cd ", "tests run in a checkout"),
    (r"python -m pytest", "would run this test again"),
    (r"gcloud ", "needs an account"),
    (r"python -m benchmarks\.", "measures for minutes; tests/test_benchmarks.py and others run it small"),
    (r"python -m jax_repaint\.reproduce ", "takes hours; tests/test_reproduce.py runs it small"),
    (r"python -m jax_repaint\.checkpoint ", "needs a checkpoint of PyTorch; tests/test_torch_import.py runs it"),
)
# Pages that a reader follows from the start to the end. Of the others a command is not run where one of the same
# options ran before: they list the same few commands for many models and tables.
FOLLOWED = ("README", "tutorial")
# Of those too what needs nothing of its own page, and leaves nothing there that is needed.
ONCE = r"jax_repaint\.(demo|data\.twin|inpaint --obs|train .*--workdir=runs/tiny )|^(?!.*--export).*--model=model"
SHELL, PYTHON = ("sh", "bash", "shell", "console"), ("python", "py")
COMMAND = re.compile(r"(\w+=\S* )*(python3?|pip|uv|git|gcloud|sbatch|srun|bash|cd|export|ruff|wait|launch/\S+)( |$)")
PROGRAM = re.compile(r"import \w+|from [\w.]+ import ")

# One process imports everything and forks for every command, before JAX has threads.
FORKS = """
import json, os, pathlib, runpy, sys, traceback, warnings
root, cache = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import conftest, tiny
import jax_repaint.calibrate, jax_repaint.demo, jax_repaint.export, jax_repaint.levels, jax_repaint.report
import jax_repaint.sweep
from absl import app
from jax_repaint import settings
from jax_repaint.nets import unet
warnings.simplefilter("ignore")
tiny.compile_once(pathlib.Path(cache))
for name in unet.NETWORKS:
    unet.NETWORKS[name] = tiny.NETWORK
default_config, smoke = settings.default_config, settings.smoke


def brief():
    config = default_config()
    config.model.update({"rank": 8, "gp_steps": 2})
    return config


def briefer(config, arg):
    config = smoke(config, arg)
    if arg:
        config.train.update({"epochs": 1, "warmup_epochs": 0.5, "batch": 16})
    return config


settings.default_config, settings.smoke = brief, briefer
for task in json.load(sys.stdin):
    child = os.fork()
    if not child:
        code = 0
        with open(task["log"], "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            os.chdir(task["folder"])
            sys.argv = task["command"]
            if task["parse"]:
                app.run = lambda main, flags_parser: flags_parser(sys.argv)
            try:
                if len(sys.argv) == 1 and "\\n" in sys.argv[0]:
                    exec(sys.argv[0], {"__name__": "__main__"})
                else:
                    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of fenced and indented blocks, and of what stands as code in the first column of a table."""
    lines, number = text.splitlines(), 0
    while number < len(lines):
        line, before = lines[number], lines[number - 1] if number else ""
        number += 1
        if line.startswith("```"):
            end = lines.index("```", number)
            yield line[3:].strip(), "\n".join(lines[number:end]) + "\n"
            number = end + 1
        elif line.startswith("    ") and not before.strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield "", "\n".join(part[4:] for part in lines[number - 1 : end]).rstrip() + "\n"
            number = end
        elif found := re.match(r"\| `([^`]+)` \|", line):
            yield "", found[1].replace(r"\|", "|") + "\n"


def kind(language: str, content: str) -> str:
    """ "shell", "python" or "text"."""
    if language in SHELL or (not language and COMMAND.match(content)):
        return "shell"
    return "python" if language in PYTHON or (not language and PROGRAM.match(content)) else "text"


def commands(content: str) -> list[str]:
    """The commands of a block of shell, without the variables that are set for them."""
    joined = content.replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in joined.splitlines()]
    parts = [part for line in lines if line and not line.startswith("#") for part in re.split(r" (?:&&|;) ", line)]
    return [re.sub(r"^(\w+=\S* )+", "", " ".join(part.removesuffix("&").split())) for part in parts]


def reason(text: str, listed: tuple[tuple[str, str], ...], search=re.match) -> str:
    """Why it is not run; empty if it is."""
    return next((why for pattern, why in listed if search(pattern, text)), "")


def smaller(text: str) -> str:
    """The same program or command with little to do; of options that are then given twice the last one counts."""
    for pattern, replacement in SMALLER:
        text = re.sub(pattern, replacement, text)
    if "\n" in text:
        return text
    options = {part.split("=")[0]: part for part in text.split()}
    return " ".join(options.values())


def to_run(page: Path, ran: Set[frozenset[str]] = frozenset()) -> list[str]:
    """What of a page is run, in its order, each once: programs, and commands of the package.

    `ran` are the options of commands that run anyway, see `options`.
    """
    found, session = [], ""
    for language, content in blocks(page.read_text()):
        what = kind(language, content)
        if what == "python":
            # Blocks of one page are one session.
            session += content
            found.append(session)
        elif what == "shell" and not reason(content, BLOCKS_NOT_RUN, re.search):
            found += [command for command in commands(content) if not reason(command, NOT_RUN)]
    if page.stem not in FOLLOWED:
        others, found, ran = found, [], set(ran)
        for text in others:
            asked = options(smaller(text))
            if "\n" in text or asked not in ran:
                found.append(text)
            ran.add(asked)
    trained = {}
    for command in found:
        for folder in re.findall(r"jax_repaint\.train .*--workdir=(\S+)", command):
            trained[folder] = same_run(smaller(command.replace(folder, "")))
    # A model that no command here trains is the small one.
    known = [
        re.sub(
            r"(--(?:config\.)?model)=(\S+)",
            lambda m: m[0] if m[2].removesuffix("/model") in trained else f"{m[1]}=model",
            text,
        )
        for text in found
    ]
    # Trainings that are the same when small are one.
    first = {small: folder for folder, small in reversed(trained.items())}
    same = {folder: first[small] for folder, small in trained.items() if first[small] != folder}
    texts = [re.sub(r"runs/[\w/-]+?(?=/model|\s|$)", lambda m: same.get(m[0], m[0]), text) for text in known]
    once: dict[str, str] = {}
    for text in map(smaller, texts):
        once.setdefault(same_run(text), text)
    return list(once.values())


def same_run(text: str) -> str:
    """Equal for commands that differ in the order of their options."""
    return text if "\n" in text else " ".join(sorted(text.split()))


def options(text: str) -> frozenset[str]:
    """Of a command, its module and the names of its options."""
    return frozenset(part.split("=")[0] for part in text.split())


def options_of(path: Path) -> list[str]:
    """Whole commands of a page or of the docstring of a source, wherever they stand."""
    text = path.read_text()
    if path.suffix == ".py":
        text = text.split('"""')[1] if text.startswith('"""') else ""
    found = [
        match[0]
        for match in re.finditer(r"python -m (jax_repaint|benchmarks)\.[\w.]+( +(\\\n +)?[\w-][^\s`|]*)*", text)
    ]
    return [
        " ".join(command.replace("\\\n", " ").split()) for command in found if " -" in command and "..." not in command
    ]


def all_runs() -> list[tuple[Path, str]]:
    """What is run of all pages; of what ONCE names, the first of those that have the same options."""
    runs, ran = [], set()
    for page in sorted(PAGES, key=lambda page: page.stem not in FOLLOWED):
        for text in to_run(page, ran):
            if not (re.search(ONCE, text) and options(text) in ran):
                runs.append((page, text))
            ran.add(options(text))
    return runs


RUNS = all_runs()


def named(value: object) -> str:
    return value.stem if isinstance(value, Path) else str(value).split("\n")[0][:60].replace("python -m ", "")


def argv(command: str) -> list[str]:
    """What `FORKS` takes: a program as it is, or the module and its arguments."""
    if "\n" in command:
        return [command]
    python, option, *rest = shlex.split(command)
    assert (python, option) == ("python", "-m"), f"{command!r} is neither run nor listed"
    return rest


def fork(tasks: list[dict], cache: Path) -> list[int]:
    """Exit codes."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(ROOT), str(cache)], input=json.dumps(tasks), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


TABLE = "lat,lon,u,v,sigma,time\n18.3,-64.7,0.12,-0.05,0.02,2021-09-17T18:00\n"


def furnish(folder: Path, page: Path) -> None:
    """What a reader has: a checkout, a file of currents round Ram Head, observations as the page has them, a model."""
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    flow = tiny.fields(365)
    lat, lon = 18.29 + 0.005 * (flow.lat - 18) / 0.01, -64.72 + 0.004 * (flow.lon - 295) / 0.01
    data = Fields.create(flow.velocity, lat, lon, flow.time, name="currents.nc")
    readers.write(data, folder / "currents.nc")
    other = tiny.fields(40, seed=1).velocity
    readers.write(Fields.create(other, lat, lon, flow.time[:40], name="other.nc"), folder / "other.nc")
    tables = [content for _, content in blocks(page.read_text()) if content.startswith("lat,lon,")]
    (folder / "track.csv").write_text(tables[0] if tables else TABLE)
    trained = tiny.model("anchored", data)
    trained.training["config"]["data"]["fields"] = "currents.nc"
    trained.training["config"]["data"]["allow_short_gap"] = True
    model.save(trained, folder / "model")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(exit code, log) of every program and command that is run."""
    top = tmp_path_factory.mktemp("docs")
    for page in {page for page, _ in RUNS}:
        furnish(top / page.stem, page)
    tasks = [
        {"command": argv(command), "folder": str(top / page.stem), "log": str(top / f"{number}.log"), "parse": False}
        for number, (page, command) in enumerate(RUNS)
    ]
    codes = fork(tasks, top / "cache")
    return {run: (code, Path(task["log"]).read_text()) for run, code, task in zip(RUNS, codes, tasks, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), RUNS, ids=named)
def test_a_command_of_the_documentation_runs(outcomes, page, command):
    code, log = outcomes[page, command]
    assert code == 0, f"{command}\n{log[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_run_or_listed(page):
    for language, content in blocks(page.read_text()):
        what = kind(language, content)
        if what == "text":
            # Output, formulas and tables; no line of them is a command.
            assert not [line for line in content.splitlines() if COMMAND.match(line)], content
        if what == "shell" and not reason(content, BLOCKS_NOT_RUN, re.search):
            for command in commands(content):
                assert reason(command, NOT_RUN) or argv(command), command


def test_the_options_of_all_other_commands_exist(tmp_path):
    texts = dict.fromkeys(command for path in [*PAGES, *SOURCES] for command in options_of(path))
    tasks = [
        {"command": argv(text), "folder": str(ROOT), "log": str(tmp_path / f"{number}.log"), "parse": True}
        for number, text in enumerate(texts)
    ]
    logs = [
        (text, Path(task["log"]).read_text())
        for text, task, code in zip(texts, tasks, fork(tasks, tmp_path), strict=True)
        if code
    ]
    # A sentence may name one option of a command that needs others.
    assert [log for log in logs if "must have a value other than None" not in log[1]] == []
    assert len(texts) > 30


def test_the_methods_that_the_documentation_names_exist():
    named = {
        name
        for page in PAGES
        for given in re.findall(r"--methods=([\w,]+)", page.read_text())
        for name in given.split(",")
    }
    assert named
    assert named <= set(methods.METHODS)


def test_the_domain_of_the_model_in_the_package_is_the_one_that_its_page_says():
    shipped = jax_repaint.load()
    south, north, west, east = (f(at) for at in (shipped.lat, shipped.lon) for f in (np.min, np.max))
    said = f"| domain | latitude {south:.4f} to {north:.4f}, longitude {west:.4f} to {east:.4f} |"
    assert said in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_the_track_of_the_tutorial_has_values_of_a_held_out_hour_of_the_twin():
    page = (ROOT / "docs" / "tutorial.md").read_text()
    (track,) = (pd.read_csv(io.StringIO(text)) for _, text in blocks(page) if text.startswith("lat,lon,"))
    shipped = jax_repaint.load()
    (hour,) = pd.to_datetime(track.time).dt.round("1h").unique()
    select, parts = held_out(shipped)
    start = select(parts.test[:1]).time[0]
    number = parts.test[0] + int((hour.to_datetime64() - start) / np.timedelta64(1, "h"))
    assert number in parts.test
    (velocity,) = select([number]).velocity
    y, x = (
        np.abs(axis[:, None] - track[name].to_numpy()).argmin(0)
        for axis, name in ((shipped.lat, "lat"), (shipped.lon, "lon"))
    )
    np.testing.assert_allclose(velocity[y, x], track[["u", "v"]], atol=0.005)


def test_a_block_that_is_neither_run_nor_listed_is_found():
    text = "```sh\nA=1 make all\n```\n\n    python -m x --a=1 \\\n      --b && pip install y\n\nwords\n\n"
    text += "    u,v\n    1,2\n"
    found = list(blocks(text))
    assert found == [
        ("sh", "A=1 make all\n"),
        ("", "python -m x --a=1 \\\n  --b && pip install y\n"),
        ("", "u,v\n1,2\n"),
    ]
    assert [kind(*block) for block in found] == ["shell", "shell", "text"]
    assert commands(found[1][1]) == ["python -m x --a=1 --b", "pip install y"]
    with pytest.raises(AssertionError, match="'make all' is neither run nor listed"):
        argv(commands(found[0][1])[0])


def test_modules_import_from_the_rows_above_theirs():
    """As CONTRIBUTING.md draws the package; what a function imports when it is called does not count."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("only from its own row")[1].split("\n## ")[0]
    rows = [re.findall(r"`([\w/.]+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    row_of = {name: number for number, names in enumerate(rows) for name in names}

    def row(path):
        """Of a file, by its own name or that of its folder."""
        return row_of.get(path, row_of.get(path.split("/")[0] + "/"))

    package = ROOT / "jax_repaint"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")} - {"__init__.py"}
    assert {path for path in files if row(path) is None} == set()
    for path in sorted(files):
        for node in ast.parse((package / path).read_text()).body:
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax_repaint")):
                continue
            parts = node.module.split(".")[1:]
            for name in ["/".join([*parts, alias.name]) + ".py" for alias in node.names] + ["/".join(parts) + ".py"]:
                assert name not in files or row(name) <= row(path), f"{path} imports {name}"
