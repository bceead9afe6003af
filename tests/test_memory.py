"""Memory that is left, by the files in which Linux says it."""

from pathlib import Path

import pytest

from jax_repaint import memory

MIB = 2**20


def group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def linux(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)
    return root / "sys/fs/cgroup"


def test_groups_of_version_2_limit_with_those_above(tmp_path):
    top, names = linux(tmp_path, "0::/job/step\n"), ("memory.max", "memory.current")
    group(top / "job", names, 100 * MIB, 60 * MIB, 10 * MIB)
    group(top / "job/step", names, "max", 50 * MIB, 0)
    assert list(memory._allowed(tmp_path)) == [50 * MIB]


def test_groups_of_version_1_limit(tmp_path):
    top = linux(tmp_path, "5:cpu:/job\n4:memory:/job\n")
    group(top / "memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes"), 8 * MIB, 3 * MIB, MIB)
    assert list(memory._allowed(tmp_path)) == [6 * MIB]


def test_what_linux_counts_as_free_is_free():
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    counted = 1024 * next(int(row[1]) for row in rows if row[0] == "MemAvailable:")
    assert memory.available() <= counted * 1.1 + 100 * MIB


@pytest.mark.parametrize("text", ["0::/elsewhere\n", ""])
def test_without_files_of_groups_the_machine_counts(tmp_path, text):
    linux(tmp_path, text)
    assert not list(memory._allowed(tmp_path))
    assert 0 < memory.available() < 2**50
