"""What is said of code and machine, against git itself and the libraries."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_repaint import provenance
from jax_repaint.errors import InputError

GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    return subprocess.run([*GIT, "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def copy(tmp_path):
    """A working copy with a package in it."""
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("1")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    provenance.revision.cache_clear()
    yield package
    provenance.revision.cache_clear()


def test_the_revision_is_that_of_the_working_copy(copy):
    head = git(copy, "rev-parse", "HEAD")
    assert provenance.revision(copy) == head[:12]
    (copy / "new.py").write_text("3")
    provenance.revision.cache_clear()
    assert provenance.revision(copy) == head[:12]
    (copy / "code.py").write_text("2")
    provenance.revision.cache_clear()
    assert provenance.revision(copy) == head[:12] + ".dirty"


def test_a_package_inside_of_another_project_has_no_revision(copy, tmp_path, monkeypatch):
    installed = copy / "environment" / "package"
    installed.mkdir(parents=True)
    assert provenance.revision(installed) == ""
    assert provenance.revision(tmp_path / "nowhere") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance.revision.cache_clear()
    assert provenance.revision(copy) == ""


def test_versions_are_those_that_are_installed(copy, monkeypatch):
    ours = importlib.metadata.version("jax_repaint")
    monkeypatch.setattr(provenance, "revision", lambda: "")
    assert provenance.versions("jax") == {"jax_repaint": ours, "jax": jax.__version__}
    monkeypatch.setattr(provenance, "revision", lambda: "0123abc.dirty")
    assert provenance.versions() == {"jax_repaint": f"{ours}+g0123abc.dirty"}


def test_every_start_is_noted(tmp_path):
    for index in (0, 2, 0):
        provenance.note_start(tmp_path, index)
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "environment.2.json"}
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["started"] <= second["started"]
    assert second["versions"]["jax"] == jax.__version__
    assert second["python"] == ".".join(map(str, sys.version_info[:3]))
    assert second["devices"].startswith(f"{jax.local_device_count()} x ")
    assert Path(second["command"].split()[0]).name.startswith("python")


def test_a_list_that_is_none_is_not_replaced(tmp_path):
    path = tmp_path / "environment.json"
    for text, message in (("mine", "cannot be read"), ("{}", "holds no list of starts")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            provenance.note_start(tmp_path)
        assert path.read_text() == text
