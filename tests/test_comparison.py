"""The table of a sweep against the same numbers worked out by hand, and its pictures."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from jax_repaint import comparison, methods, metrics, scoring
from jax_repaint.cases import note_on
from jax_repaint.errors import InputError

FRAMES = 6


def make_rows():
    """Two points with two stages on two patterns, two seeds; the second point fails on one frame."""
    rng = np.random.default_rng(0)
    rows = []
    for point, pattern, frame in np.ndindex(2, 2, FRAMES):
        scale = 1 + 0.3 * frame
        baselines = {
            f"mse_{name}": scale * size
            for name, size in zip(methods.DETERMINISTIC, (0.4, 0.2 if pattern else 0.05, 0.3, 0.1), strict=True)
        }
        for seed, stage in np.ndindex(2, 2):
            failed = point == 1 and frame == 2
            scores = dict.fromkeys(comparison.SCORES, math.nan) | {"members": 4, "antithetic": False, "cells": 10}
            if not failed:
                scores |= {name: rng.uniform(0.5, 1) for name in comparison.SCORES if scores[name] != scores[name]}
                scores |= {"mse_mean": 0.05 * scale * rng.uniform(0.8, 1.2), "mse_member": 0.08 * scale}
            rows.append(
                {"task": f"{point}{pattern}{frame}{seed}", "point": point, "label": f"p{point}", "method": "adaptive",
                 "settings": json.dumps({"gamma": 10.0 ** point, "method": "adaptive", "prior": "linear"}),
                 "pattern": ("line:3", "cells:0.1")[pattern], "seed": seed, "frame": 10 * frame, "block": 1,
                 "stage": stage + 1, "observed": 5 + 5 * pattern, "ocean": 100,
                 "failed_members": 4 * failed, "failed_at": "stage 1, iteration 7, t 3" if failed else "",
                 "calls": 4 * (stage + 1) * 10, "device_seconds": 0.5, "compile_seconds": 1.0,
                 "distance_edges": [1.0, 2.0, math.inf], "distance_cells": [2, 4],
                 "distance_mean": [0.1 * scale, 0.2], "distance_linear": [0.3, math.nan]}
                | baselines | scores
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def table(rows):
    return comparison.compare(rows)


def test_lines_are_in_the_order_of_points(table):
    assert len(table) == 2 * 2 * 2
    assert table["pattern"].tolist() == ["line:3"] * 4 + ["cells:0.1"] * 4
    assert table["point"].tolist() == [0, 0, 1, 1] * 2
    assert table["best"].tolist() == ["seed_gp"] * 4 + ["linear"] * 4


def test_the_best_baseline_is_that_of_all_frames_together(rows):
    """Not of the first frame, nor of most of them."""
    lucky = rows.query("point == 0").copy()
    lucky.loc[lucky["frame"] < 40, "mse_climatology"] = 1e-3
    assert comparison.compare(lucky)["best"].tolist() == ["seed_gp"] * 2 + ["linear"] * 2


def test_ratios_are_those_of_the_frames(rows, table):
    for line in table.to_dict("records"):
        mine = rows[(rows["point"] == line["point"]) & (rows["pattern"] == line["pattern"])]
        mine = mine[(mine["stage"] == line["stage"]) & (mine["failed_members"] == 0)]
        assert (line["frames"], line["failed"]) == (FRAMES, line["point"])
        # A frame counts once, with the mean over its two seeds.
        by_frame = mine.groupby("frame").mean(numeric_only=True)
        for kind, against in comparison.PAIRS:
            base = by_frame["mse_seed_gp" if against == "seed_gp" else f"mse_{line['best']}"].to_numpy()
            # All ensembles here are of the same size.
            ours = by_frame["mse_mean" if kind == "expected" else f"mse_{kind}"].to_numpy()
            name = f"{kind}_over_{against}"
            assert line[f"{name}_average"] == pytest.approx(np.mean(ours / base))
            assert line[f"{name}_median"] == pytest.approx(np.median(ours / base))
            assert line[f"{name}_ratio"] == pytest.approx(ours.mean() / base.mean())
            assert line[f"{name}_worst"] == pytest.approx(np.max(ours / base))
            assert line[f"{name}_wins"] == pytest.approx(np.mean(ours < base))
            expected = scoring.ratio_of_means(ours, base, 1, 0)
            assert (line[f"{name}_lo"], line[f"{name}_hi"]) == (expected.lo, expected.hi)
            assert (line[f"{name}_wins_lo"], line[f"{name}_wins_hi"]) == (expected.wins_lo, expected.wins_hi)
        assert line["mse_mean"] == pytest.approx(mine["mse_mean"].mean())
        assert line["mse_linear"] == pytest.approx(mine["mse_linear"].mean())
        assert line["spread_skill"] == pytest.approx(metrics.spread_skill(mine["variance"], mine["mse_mean"], 4))


def test_intervals_are_those_of_blocks_of_frames(rows):
    slow = rows.query("point == 0").assign(block=3)
    for _, line in comparison.compare(slow).iterrows():
        mine = slow[(slow["pattern"] == line["pattern"]) & (slow["stage"] == line["stage"])]
        frames = mine.groupby("frame").mean(numeric_only=True)
        best = frames[f"mse_{line['best']}"].to_numpy()
        expected = scoring.ratio_of_means(frames["mse_mean"].to_numpy(), best, block=3, seed=0)
        assert (line["mean_over_best_lo"], line["mean_over_best_hi"]) == (expected.lo, expected.hi)
        assert expected.lo != scoring.ratio_of_means(frames["mse_mean"].to_numpy(), best, block=1, seed=0).lo


def test_a_frame_that_failed_with_one_seed_counts_with_none(rows):
    some = rows.query("point == 0").copy()
    failed = (some["frame"] == 20) & (some["seed"] == 1)
    some.loc[failed, ["failed_members", "mse_mean", "mse_member"]] = 1, 9.0, 9.0
    some.loc[failed, "failed_at"] = "stage 1, iteration 7, t 3"
    for _, line in comparison.compare(some).iterrows():
        whole = some[(some["pattern"] == line["pattern"]) & (some["stage"] == line["stage"]) & (some["frame"] != 20)]
        assert line["failed"] == 1
        assert line["mse_mean"] == pytest.approx(whole["mse_mean"].mean())


def test_a_frame_that_failed_chooses_no_baseline(rows):
    some = rows.query("point == 0").copy()
    some.loc[some["frame"] == 20, ["failed_members", "mse_mean", "mse_member"]] = 1, 9.0, 9.0
    some.loc[some["frame"] == 20, "failed_at"] = "stage 1, iteration 7, t 3"
    expected = comparison.compare(some)
    some.loc[some["frame"] == 20, "mse_climatology"] = -1e6
    found = comparison.compare(some)
    assert found["best"].tolist() == expected["best"].tolist()
    assert found["mean_over_best_ratio"].tolist() == expected["mean_over_best_ratio"].tolist()


def test_mean_of_more_members_is_that_of_drawn_ones():
    """Two of sixteen independent members tell, on average, the error of the mean of sixteen."""
    rng, cells, frames = np.random.default_rng(1), 400, 300
    ocean, truth = np.ones((cells, 1), bool), np.zeros((cells, 1, 2))
    rows = []
    for _ in range(frames):
        # Members with a common error and a spread that is not its size.
        members = 0.3 * rng.normal(size=(1, cells, 1, 2)) + 0.8 * rng.normal(size=(16, cells, 1, 2))
        rows += [vars(scoring.score(truth, members[:n], ocean, ocean)) for n in (1, 2, 4, 16)]
    rows = pd.DataFrame(rows)
    made = rows.assign(expected=comparison.expected_mse(rows, 16)).groupby("members")["expected"]
    assert made.get_group(16).mean() == pytest.approx(rows[rows["members"] == 16]["mse_mean"].mean(), rel=1e-12)
    for few in (2, 4):
        assert made.get_group(few).mean() == pytest.approx(made.get_group(16).mean(), rel=0.03)
        assert rows[rows["members"] == few]["mse_mean"].mean() > 1.5 * made.get_group(16).mean()
    assert made.get_group(1).isna().all()
    pairs = rows.assign(antithetic=True)
    told = np.isfinite(comparison.expected_mse(pairs, 16))
    np.testing.assert_array_equal(told, rows["members"] == 16)


def test_text_compares_means_of_as_many_members():
    rows = make_rows()
    rows.loc[rows["point"] == 0, "members"] = 2
    table = comparison.compare(rows)
    text = comparison.format_lines(table)
    assert "mean of 4, as expected, over the best baseline" in text
    line = table[(table["pattern"] == "line:3") & (table["stage"] == 2)].iloc[0]
    mine = rows[(rows["point"] == 0) & (rows["pattern"] == "line:3") & (rows["stage"] == 2)]
    expected = (mine["mse_mean"] - mine["variance"] / 4).clip(lower=0)
    assert line["mse_expected"] == pytest.approx(expected.mean())
    assert line["expected_over_best_ratio"] == pytest.approx(expected.mean() / mine["mse_seed_gp"].mean())
    assert f"{line['expected_over_best_ratio']:.3f} [" in text
    # The picture has the points of smaller ensembles too.
    places = {p for curve in comparison.curves(table, "label", "", "expected_over_best") for p in curve.x}
    assert places == {"p0", "p1"}
    assert "as expected" not in comparison.format_lines(comparison.compare(make_rows()))


def test_points_that_always_fail_have_no_numbers(rows):
    failed = rows.assign(
        failed_members=4, failed_at="stage 1, iteration 0, t 3", **dict.fromkeys(("mse_mean", "crps"), math.nan)
    )
    table = comparison.compare(failed)
    assert table[[f"{kind}_over_{b}_ratio" for kind, b in comparison.PAIRS]].isna().all(axis=None)
    text = comparison.format_lines(table)
    assert "6/6" in text
    assert "p0: first failed in stage 1, iteration 0, t 3" in text


def test_text_shows_the_last_stage_or_all(table):
    text = comparison.format_lines(table)
    assert text.count("p0 ") == 4
    assert "p1: first failed in stage 1, iteration 7, t 3" in text
    assert "best baseline, seed_gp" in text
    assert "climatology 0.7" in text
    assert "1/6" in text
    # What the baselines have on the five frames without a failed member stands apart.
    frames = {point: [n for n in range(FRAMES) if point == 0 or n != 2] for point in (0, 1)}
    linear = {point: np.mean([0.1 * (1 + 0.3 * n) for n in of]) for point, of in frames.items()}
    assert f"linear {linear[0]:.3g}\n  of p1: climatology" in text
    assert f"linear {linear[1]:.3g}\npoint" in text
    every = comparison.format_lines(table, every_stage=True)
    assert every.count("p0 S1") == every.count("p0 S2") == 4
    # A point of one stage has none to tell apart.
    one = comparison.format_lines(comparison.compare(make_rows().query("point == 1 or stage == 1")), every_stage=True)
    assert (one.count("p0 "), one.count("p0 S"), one.count("p1 S1 "), one.count("p1 S2 ")) == (4, 0, 4, 4)
    line = table[(table["pattern"] == "line:3") & (table["stage"] == 2)].iloc[0]
    assert f"{line['member_over_seed_gp_average']:.3f}" in text
    assert f"{line['mean_over_best_ratio']:.3f} [{line['mean_over_best_lo']:.3f}, " in text


@pytest.mark.parametrize(
    ("x", "curve", "names", "places"),
    [
        ("gamma", "", ["line:3", "cells:0.1"], [1, 10]),
        ("coverage", "label", ["p0", "p1"], [0.05, 0.1]),
        ("pattern", "label", ["p0", "p1"], ["line:3", "cells:0.1"]),
        ("calls", "method", ["adaptive, line:3", "adaptive, cells:0.1"], [20, 20]),
        ("stage", "label", ["p0, line:3", "p1, line:3", "p0, cells:0.1", "p1, cells:0.1"], [1, 2]),
        ("label", "", ["line:3", "cells:0.1"], ["p0", "p1"]),
    ],
)
def test_curves(table, x, curve, names, places):
    made = comparison.curves(table, x, curve, "mean_over_best")
    assert [one.name for one in made] == names
    assert made[0].x.tolist() == (pytest.approx(places) if x == "coverage" else places)
    shown = table if x == "stage" else table[table["stage"] == 2]
    drawn = sorted(np.concatenate([one.value for one in made]))
    np.testing.assert_array_equal(drawn, sorted(shown["mean_over_best_ratio"]))


def test_only_whole_ensembles_are_drawn_but_by_size():
    rows = pd.concat([make_rows(), make_rows().assign(members=2)])
    table = comparison.compare(rows)
    assert sorted(table["members"].unique()) == [2, 4]
    for curve in comparison.curves(table, "label", "", "mean_over_best"):
        assert curve.x.tolist() == ["p0", "p1"]
    sizes = comparison.curves(table[table["pattern"] == "line:3"], "members", "label", "mean_over_best")
    assert [curve.x.tolist() for curve in sizes] == [[2, 4], [2, 4]]


def test_points_without_the_setting_are_their_own_curves():
    rows = make_rows().query("pattern == 'line:3'").copy()
    rows.loc[rows["point"] == 1, ["label", "settings"]] = "kalman", "{}"
    made = comparison.curves(comparison.compare(rows), "stage", "gamma", "mean_over_best")
    assert [one.name for one in made] == ["1.0", "kalman"]


def test_points_that_a_picture_leaves_out_are_named(tmp_path, caplog):
    rows = make_rows()
    rows.loc[rows["point"] == 1, ["label", "settings"]] = "kalman", "{}"
    comparison.write(rows, tmp_path, "gamma")
    assert "kalman has no setting gamma" in caplog.text
    assert caplog.text.count("no setting") == 1


def test_a_last_stage_that_failed_is_not_replaced_by_the_one_before(rows, tmp_path):
    failed = rows.copy()
    gone = (failed["point"] == 1) & (failed["stage"] == 2)
    failed.loc[gone, "failed_members"] = 4
    assert list(comparison.distances(failed)) == ["p0, line:3", "p0, cells:0.1"]
    text = comparison.write(failed, tmp_path, "distance")
    assert "p1" not in text[text.index("RMS error (m/s) by distance") :]
    assert comparison.distances(failed[failed["point"] == 1]) == {}


def test_settings_that_no_point_has_are_named(table):
    with pytest.raises(InputError, match="no setting 'temperature'"):
        comparison.curves(table, "temperature", "", "mean_over_best")


def test_distances_are_averages_over_cells(rows):
    made = comparison.distances(rows)
    assert list(made) == ["p0, line:3", "p0, cells:0.1", "p1, line:3", "p1, cells:0.1"]
    scale = 1 + 0.3 * np.delete(np.arange(FRAMES), 2)
    np.testing.assert_allclose(made["p1, line:3"].mean, [0.1 * scale.mean(), 0.2])
    assert made["p1, line:3"].counts.tolist() == [2 * 2 * 5, 4 * 2 * 5]


def test_text_has_the_length_of_the_error_vector_by_distance(rows, tmp_path):
    """sqrt(2 MSE) of components: 0.175 and 0.2 m2/s2 of the mean, 0.3 of the linear estimate."""
    text = comparison.write(rows, tmp_path, "distance")
    lines = text[text.index("RMS error") :].splitlines()
    where = next(n for n, line in enumerate(lines) if line.startswith("p0, line:3"))
    assert lines[where].split()[-2:] == ["0.5916", "0.6325"]
    assert lines[where + 1].split()[-2] == "0.7746"


@pytest.mark.parametrize(("x", "curve"), [("gamma", ""), ("stage", "label"), ("distance", "")])
def test_files_are_written(rows, tmp_path, x, curve):
    text = comparison.write(rows, tmp_path, x, curve, "title", note=note_on(0.02))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(comparison.FILES)
    assert (tmp_path / "table.txt").read_text() == text + "\n"
    assert text.endswith("\n\nobserved with errors of 0.02 m/s")
    assert note_on(None) == note_on(0.0) == ""
    assert len(pd.read_csv(tmp_path / "table.csv")) == 8
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == len(rows)
    assert ("RMS error (m/s) by distance" in text) == (x == "distance")
    pictures = [(tmp_path / name).read_bytes() for name in ("sweep.png", "seed_gp.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]
