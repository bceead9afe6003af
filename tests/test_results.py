"""Parts of a sweep are whole or found out; a folder belongs to one sweep, and to one process of it at a time."""

import concurrent.futures
import errno
import itertools
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jax_repaint import results
from jax_repaint.errors import InputError


def row(task="a", point=0, frame=3, stage=1, members=4, **changes):
    base = dict.fromkeys(results.SCHEMA.names, 0)
    base |= {"task": task, "point": point, "frame": frame, "stage": stage, "members": members, "pattern": "line:3"}
    base |= {"label": "p", "method": "plain", "settings": "{}", "antithetic": False, "failed_at": ""}
    base |= {name: float(i) / 7 for i, name in enumerate(results.SCHEMA.names) if name.startswith(("mse", "crps"))}
    base |= {f"distance_{name}": [1, 2] for name in ("edges", "cells", "mean", "linear")}
    return base | {"time": np.datetime64("2020-01-01", "ns"), "mse_gp": None} | changes


# --- parts --------------------------------------------------------------------------------------------------


def test_rows_come_back(tmp_path):
    results.write_part(tmp_path, [row("b", 1, crps=math.nan), row("b", 1, stage=2, mse_mean=1 / 3)])
    results.write_part(tmp_path, [row("a", 0, distance_edges=[0.0, math.inf])])
    table = results.read_parts(tmp_path)
    assert table["task"].tolist() == ["a", "b", "b"]
    assert table["stage"].tolist() == [1, 1, 2]
    assert table["mse_mean"][2] == 1 / 3
    assert table["mse_gp"].isna().all()
    assert list(table["distance_edges"][0]) == [0, math.inf]
    assert table["time"][0] == pd.Timestamp("2020-01-01")
    assert list(table.columns) == results.SCHEMA.names


def test_names_tell_tasks_and_content_apart(tmp_path):
    first = results.write_part(tmp_path, [row("a"), row("b")])
    assert results.write_part(tmp_path, [row("a"), row("b")]) == first
    other = results.write_part(tmp_path, [row("a"), row("b", crps=0.5)])
    assert other.name.split("-")[0] == first.name.split("-")[0]
    assert results.write_part(tmp_path, [row("a")]).name.split("-")[0] != first.name.split("-")[0]


def test_a_task_run_twice_counts_once(tmp_path):
    results.write_part(tmp_path, [row("a"), row("a", stage=2)])
    results.write_part(tmp_path, [row("a", device_seconds=2.0), row("a", stage=2), row("b", 1)])
    assert results.read_parts(tmp_path)["task"].tolist() == ["a", "a", "b"]


def test_a_part_that_another_process_has_removed_counts_as_damaged(tmp_path, monkeypatch):
    gone, whole = results.write_part(tmp_path, [row("a")]), results.write_part(tmp_path, [row("b")])
    monkeypatch.setattr(results.Path, "glob", lambda *_: [gone, whole])
    gone.unlink()
    assert results.read_parts(tmp_path)["task"].tolist() == ["b"]


def test_patterns_keep_the_order_of_the_settings():
    rows = pd.DataFrame({"pattern": list("abcab"), "frame": range(5)})
    made = results.in_order(rows, ["b", "c"])
    assert made["pattern"].tolist() == list("bbcaa")
    assert made["frame"].tolist() == [1, 4, 2, 0, 3]


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_damaged_parts_are_found_and_removed(tmp_path, caplog, harm):
    whole = results.write_part(tmp_path, [row("a")])
    rng = np.random.default_rng(0)
    for number in range(20):
        damaged = results.write_part(tmp_path, [row(f"b{number}")])
        content = bytearray(damaged.read_bytes())
        place = int(rng.integers(len(content)))
        if harm == "flip":
            content[place] ^= 1 << rng.integers(8)
        damaged.write_bytes(content if harm == "flip" else content[: place if harm == "cut" else 0])
    assert results.read_parts(tmp_path)["task"].tolist() == ["a"]
    assert caplog.text.count("is damaged") == 20
    results.read_parts(tmp_path, remove_damaged=True)
    assert list((tmp_path / "parts").iterdir()) == [whole]


def test_what_a_killed_process_was_writing_is_ignored_and_removed(tmp_path):
    whole = results.write_part(tmp_path, [row("a")])
    (tmp_path / "parts" / ".b-0.xyz.parquet").write_bytes(b"PAR1")
    assert results.read_parts(tmp_path)["task"].tolist() == ["a"]
    results.remove_unfinished(tmp_path)
    assert list((tmp_path / "parts").iterdir()) == [whole]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    results.write_part(tmp_path, [row("a")])

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        results.write_part(tmp_path, [row("b")])
    monkeypatch.undo()
    assert results.read_parts(tmp_path)["task"].tolist() == ["a"]
    assert len(list((tmp_path / "parts").iterdir())) == 1


# --- whose folder -------------------------------------------------------------------------------------------


def test_a_changed_sweep_is_refused_with_what_differs(tmp_path):
    sweep = {"config": {"frames": 4, "points": {"p0": {"gamma": 0.1}}}, "models": {"": "abc"}}
    results.claim(tmp_path, sweep)
    results.claim(tmp_path, {**sweep})
    changed = {"config": {"frames": 5, "points": {"p0": {"gamma": 0.1}, "p1": {"gamma": 3}}}, "models": {"": "abc"}}
    with pytest.raises(InputError, match=r"frames: 4 there, 5 here; config.points.p1.gamma: None there, 3 here"):
        results.claim(tmp_path, changed)


def test_a_sweep_that_has_finished_nothing_gives_way_to_the_corrected_one(tmp_path):
    first, second = {"config": {"frames": 4}}, {"config": {"frames": 5}}
    results.claim(tmp_path, first)
    (tmp_path / "environment.1.json").write_text("[]")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".b-0.xyz.parquet").write_bytes(b"PAR1")
    # Another of several processes may be about to finish something.
    with pytest.raises(InputError, match="frames: 4 there, 5 here"):
        results.claim(tmp_path, second)
    results.claim(tmp_path, second, alone=True)
    assert json.loads((tmp_path / "config.json").read_text()) == second
    (tmp_path / "table.csv").write_text("of parts that were removed")
    with pytest.raises(InputError, match="frames: 5 there, 4 here"):
        results.claim(tmp_path, first, alone=True)
    (tmp_path / "table.csv").unlink()
    results.write_part(tmp_path, [row("a")])
    with pytest.raises(InputError, match="frames: 5 there, 4 here"):
        results.claim(tmp_path, first, alone=True)


def test_processes_that_start_together_share_a_folder(tmp_path):
    """One of them makes config.json while another looks into the folder."""
    sweep = {"config": {"frames": 4}}

    def start(folder, barrier):
        barrier.wait()
        results.claim(folder, sweep)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number in range(50):
            folder, barrier = tmp_path / str(number), threading.Barrier(4)
            folder.mkdir()
            for started in [pool.submit(start, folder, barrier) for _ in range(4)]:
                started.result()
            assert json.loads((folder / "config.json").read_text()) == sweep


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty and holds no sweep"):
        results.claim(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        results.claim(tmp_path, {})
    training = '{"config": {"train": {"epochs": 3}}, "data": {}}'
    (tmp_path / "config.json").write_text(training)
    with pytest.raises(InputError, match="holds something else, such as a training, and no sweep"):
        results.claim(tmp_path, {"config": {"frames": 4}, results.ROWS_VERSION: results.VERSION})
    assert (tmp_path / "config.json").read_text() == training


def test_digests_do_not_depend_on_order():
    contents = [{"a": 1, "b": [2.5]}, {"a": 1, "b": [2.0]}, {"a": 1}, {"a": "1", "b": [2.5]}]
    assert results.digest(contents[0]) == results.digest(dict(reversed(contents[0].items())))
    assert all(results.digest(one) != results.digest(other) for one, other in itertools.combinations(contents, 2))
