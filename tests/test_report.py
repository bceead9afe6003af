"""The page about a folder: its numbers are those of the files, it fetches nothing, and it works in a browser."""

import base64
import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr

from jax_repaint import (
    checkpoint,
    comparison,
    evaluate,
    methods,
    metrics,
    model,
    plots,
    report,
    results,
    scoring,
    train,
)
from jax_repaint.cases import Case
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError
from jax_repaint.methods import Result

PATTERNS = ("line:4", "cells <b>&")
NUMBERS = np.array([3, 20, 41])
MEMBERS = {"linear": 1, "linear_samples": 3, "kalman": 6}


def make_fields(shape=(9, 14)):
    rng = np.random.default_rng(0)
    velocity = rng.normal(size=(len(NUMBERS), *shape, 2)).cumsum(2) / 10
    velocity[:, :3, :4] = np.nan
    when = np.datetime64("2021-05-01T00:00", "ns") + NUMBERS * np.timedelta64(1, "h")
    return Fields.create(
        velocity, 18 + 0.01 * np.arange(shape[0]), -64 + 0.01 * np.arange(shape[1]), when, name="drawn"
    )


def make_cases(fields):
    rng = np.random.default_rng(1)
    cases = []
    for pattern in PATTERNS:
        for number, truth, when in zip(NUMBERS, fields.velocity, fields.time, strict=True):
            observed = fields.ocean & (rng.uniform(size=fields.shape) < 0.2)
            cases.append(Case(pattern, int(number), when, truth, observed, None, None))
    return cases


def make_results(cases):
    rng = np.random.default_rng(2)
    results = {}
    for name, count in MEMBERS.items():
        made = [case.truth + 0.1 * rng.normal(size=(count, *case.truth.shape)) for case in cases]
        results[name] = Result(made, 1.5, 16 * count, antithetic=name == "kalman")
    return results


def write_evaluation(folder, fields, kept=tuple(MEMBERS)):
    """What `evaluate.run` writes, without running a method."""
    cases = make_cases(fields)
    results = make_results(cases)
    rows = evaluate.compare(evaluate.score(cases, results, fields.ocean), results, 1)
    scoring.write_csv(rows, folder / "table.csv")
    scoring.write_csv(evaluate.detail_rows(cases, results, fields), folder / "details.csv")
    for name in kept:
        file = "fields.nc" if name == "kalman" else f"fields_{name}.nc"
        data = evaluate.to_dataset(cases, results[name], fields, f"jax_repaint, model 12ab, method {name}, seed 0")
        readers.write_netcdf(data.assign_attrs(method=name), folder / file)
    return cases, results


@dataclasses.dataclass
class Evaluation:
    folder: object
    fields: Fields
    cases: list
    results: dict
    text: str


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    fields = make_fields()
    cases, results = write_evaluation(folder, fields)
    return Evaluation(folder, fields, cases, results, report.build(folder))


@pytest.fixture(scope="module")
def made(evaluation):
    files = sorted(evaluation.folder.glob("fields*.nc"))
    return [report.Ensembles.read(path) for path in files]


def write_training(folder, epochs=3):
    config = tiny.config()
    checkpoint.claim(folder, config.to_dict(), {"fields": "12ab", "name": "tiny <fields>"})
    log = train.Log(folder, 0, False, 0.9)
    for epoch in range(1, epochs + 1):
        losses = {"train_loss": 1 / epoch, "held_out_loss": 1.1 / epoch, "ema_held_out_loss": 1.2 / epoch}
        rates = {"learning_rate": 1e-4 * epoch, "gradient_norm": 0.5, "seconds": 60.0, "frames_per_second": 12.345678}
        log.add({"epoch": epoch, "step": 9 * epoch, **losses, **rates})


class Elements(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes), and texts of each; a tag that is not closed is an error."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in self.VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        for _, number in self.open:
            self.texts[number] += data

    def all(self, tag):
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]


def tables(text):
    """Every table as (caption, columns, rows of (attributes, text))."""
    found = []
    for part in re.findall(r"<table>.*?</table>", text, re.S):
        elements = Elements(part)
        columns = [attributes["data-column"] for attributes, _ in elements.all("button")]
        cells = elements.all("td")
        assert len(cells) % len(columns) == 0
        caption = "".join(words for _, words in elements.all("caption"))
        rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
        found.append((caption, columns, rows))
    return found


def data_of(text):
    (found,) = [words for attributes, words in Elements(text).all("script") if attributes.get("id") == "fields"]
    return json.loads(found)


def decode(field, shape):
    step, text = field
    values = np.frombuffer(base64.b64decode(text), np.int8).reshape(*shape, 2).astype(float)
    return np.where(values == -128, np.nan, step * values), step


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_fetches_nothing(evaluation):
    elements = Elements(evaluation.text)
    for attributes, _ in elements.all("img"):
        assert attributes["src"].startswith("data:image/png;base64,")
        assert base64.b64decode(attributes["src"].split(",")[1]).startswith(b"\x89PNG")
        assert attributes["alt"]
    for tag, attributes in elements.elements:
        assert not set(attributes) & {"href", "srcset", "action", "onclick"}, tag
        assert tag not in ("link", "iframe", "object", "base")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", evaluation.text)
    policy = next(a["content"] for a, _ in elements.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        attributes for attributes, _ in elements.all("meta")
    ]
    assert "$" not in re.sub(r'data:[^"]*', "", evaluation.text)


def test_tables_hold_the_numbers_of_table_csv(evaluation):
    table, details = (pd.read_csv(evaluation.folder / name) for name in ("table.csv", "details.csv"))
    found = tables(evaluation.text)
    assert [caption for caption, _, _ in found] == [PATTERNS[0], "", PATTERNS[1], ""]
    ends = [end for pair in report.INTERVALS.values() for end in pair]
    for place, (_, columns, rows) in enumerate(found):
        source, pattern = (details if place % 2 else table), PATTERNS[place // 2]
        theirs = source[source["pattern"] == pattern].drop(columns="pattern").dropna(axis=1, how="all")
        assert sorted(columns) == sorted(theirs.columns.difference(ends))
        assert columns[:3] == ["method", "ratio", "wins"] or place % 2
        assert len(rows) == len(theirs)
        for (_, expected), cells in zip(theirs.iterrows(), rows, strict=True):
            for column, (attributes, words) in zip(columns, cells, strict=True):
                if isinstance(expected[column], str):
                    assert words == expected[column]
                elif np.isnan(expected[column]):
                    assert (attributes["data-value"], words) == ("", "–")
                else:
                    assert float(attributes["data-value"]) == expected[column]
                    shown = float(words.split(" [")[0].replace(",", ""))
                    assert shown == pytest.approx(expected[column], rel=1e-3)
                for end, name in zip(report.INTERVALS.get(column, ()), ("data-lo", "data-hi"), strict=False):
                    there = expected.get(end, np.nan)
                    assert float(attributes.get(name, "nan")) == pytest.approx(there, rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("value", "whole", "words"),
    [
        (0.0123456, False, "0.01235"), (1.0, False, "1.000"), (123456.0, False, "1.235e+05"), (1234.4, False, "1234"),
        (12345.0, True, "12,345"), (float("nan"), False, "–"), (float("inf"), True, "inf"), (-0.5, False, "-0.5000"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(value, whole, words):
    assert report.number(value, whole) == words


def test_words_from_files_are_not_html(evaluation, tmp_path):
    assert "cells &lt;b&gt;&amp;" in evaluation.text
    assert "cells <b>" not in evaluation.text
    evil = tmp_path / "<script>alert(1)<"
    evil.mkdir()
    write_training(evil, epochs=1)
    text = report.build(evil)
    assert "<script>alert" not in text
    assert "tiny &lt;fields&gt;" in text
    Elements(text)


# --- fields -------------------------------------------------------------------------------------------------


def test_the_viewer_holds_the_fields_of_the_files(evaluation):
    data, fields = data_of(evaluation.text), evaluation.fields
    shape = tuple(data["shape"])
    assert shape == fields.shape
    ocean = np.frombuffer(base64.b64decode(data["ocean"]), np.int8).reshape(shape)
    np.testing.assert_array_equal(ocean, fields.ocean)
    assert data["methods"] == ["kalman", "linear", "linear_samples"]
    assert data["patterns"] == list(PATTERNS)
    assert data["frames"] == ["frame 3, 2021-05-01 03:00", "frame 20, 2021-05-01 20:00", "frame 41, 2021-05-02 17:00"]
    for frame, text in enumerate(data["truth"]):
        drawn, step = decode(text, shape)
        # Meridians meet in the north, so rows and columns of the grid are turned by up to 1e-4.
        np.testing.assert_allclose(drawn, fields.velocity[frame], atol=0.51 * step + 1e-3)
    for number, method in enumerate(data["methods"]):
        result = evaluation.results[method]
        for place, case in enumerate(evaluation.cases):
            pattern, frame = divmod(place, len(NUMBERS))
            seen = np.frombuffer(base64.b64decode(data["observed"][pattern][frame]), np.int8).reshape(shape)
            np.testing.assert_array_equal(seen, case.observed)
            assert data["counts"][pattern][frame] == case.observed.sum()
            one, members = data["estimates"][number][pattern][frame], result.members[place]
            estimates = [members.mean(0), *(members if len(members) > 1 else [])]
            assert len(one["errors"]) == len(one["rms"]) == len(estimates)
            scored = metrics.scored_cells(case.truth, fields.ocean, case.observed)
            for text, rms, estimate in zip(one["errors"], one["rms"], estimates, strict=True):
                drawn, step = decode(text, shape)
                assert step < 0.1 * 5 / 127
                np.testing.assert_allclose(drawn, estimate - case.truth, atol=0.51 * step + 1e-4)
                assert rms == pytest.approx(np.sqrt(((estimate - case.truth)[scored] ** 2).sum(-1).mean()), rel=1e-5)
            if len(members) == 1:
                assert one["spread"] is one["spread_rms"] is None
                continue
            drawn, step = decode(one["spread"], shape)
            there = np.where(fields.ocean[..., None], result.spread(place), np.nan)
            np.testing.assert_allclose(drawn, there, atol=0.51 * step)
            assert one["spread_rms"] == pytest.approx(np.sqrt((there[scored] ** 2).sum(-1).mean()), rel=1e-5)


def test_colours_end_where_figures_end_them(evaluation):
    data, fields = data_of(evaluation.text), evaluation.fields
    speeds = np.sqrt((fields.velocity[:, fields.ocean] ** 2).sum(-1))
    assert data["top"]["speed"] == pytest.approx(np.percentile(speeds, 99.5), rel=1e-5)
    assert data["colours"]["speed"][0] == report._hex_colours(plots.SPEED)[0]
    assert data["colours"]["speed"] != data["colours"]["deviation"]


def test_what_is_left_out_is_said(evaluation, made, monkeypatch):
    assert "To keep the page small" not in evaluation.text
    monkeypatch.setattr(report, "LARGEST", 7)
    text = "\n".join(report.viewer_html(made, 2, 4))
    data = data_of(text)
    assert data["shape"] == [5, 7]
    assert data["frames"] == [data_of(evaluation.text)["frames"][i] for i in (0, 2)]
    assert {len(case["errors"]) for row in data["estimates"][0] for case in row} == {5}
    drawn, step = decode(data["truth"][1], (5, 7))
    np.testing.assert_allclose(drawn, evaluation.fields.velocity[2, ::2, ::2], atol=0.51 * step + 1e-3)
    assert "it shows 2 of 3 frames, 4 of 6 members, 35 of 126 cells; means and scores are of all" in text
    full = data_of(evaluation.text)["estimates"][0][0][2]
    assert data["estimates"][0][0][1]["rms"] == full["rms"][:5]


def test_bytes_keep_half_a_step():
    field = np.random.default_rng(0).normal(size=(6, 7, 2))
    field[2, 3] = np.nan
    drawn, step = decode(report.quantise(field), (6, 7))
    assert step == pytest.approx(np.nanmax(np.abs(field)) / 127)
    np.testing.assert_allclose(drawn, field, atol=0.5 * step * (1 + 1e-9))
    nothing, step = decode(report.quantise(np.zeros((2, 2, 2))), (2, 2))
    assert (nothing == 0).all()
    assert step == 1


# --- curves -------------------------------------------------------------------------------------------------


def test_files_are_read_as_they_were_made(evaluation, made):
    assert [one.method for one in made] == ["kalman", "linear", "linear_samples"]
    assert [one.antithetic for one in made] == [True, False, False]
    assert [one.is_ensemble for one in made] == [True, False, True]
    for one in made:
        members = np.stack(evaluation.results[one.method].members)
        np.testing.assert_allclose(one.members.reshape(members.shape), members, rtol=1e-6)
        np.testing.assert_allclose(one.spacing, evaluation.fields.spacing)


def test_errors_by_distance_are_against_the_single_estimate(evaluation, made):
    errors, baseline = report.distance_errors(made, 1)
    assert baseline == "linear"
    assert list(errors) == ["kalman", "linear_samples"]
    expected = []
    for place in range(3, 6):
        case = evaluation.cases[place]
        scored = metrics.scored_cells(case.truth, evaluation.fields.ocean, case.observed)
        mean, linear = (evaluation.results[name].members[place].mean(0) for name in ("kalman", "linear"))
        expected.append(
            metrics.error_by_distance(mean, linear, case.truth, scored, case.observed, (*report.EDGES, math.inf))
        )
        assert expected[-1].counts.sum() == scored.sum()  # none is too far
    together = metrics.DistanceErrors.average(expected)
    for name in ("edges", "counts", "mean", "baseline"):
        np.testing.assert_allclose(getattr(errors["kalman"], name), getattr(together, name), rtol=1e-5)
    _, baseline = report.distance_errors(made[:1], 0)
    assert baseline == "no current"


def test_a_field_whose_members_failed_has_no_spread_and_the_others_have(tmp_path):
    """One pair that is left tells no spread; curves are of as many members as every field has."""
    fields = make_fields()
    cases = make_cases(fields)
    results = make_results(cases)
    results["kalman"].members[1] = results["kalman"].members[1][:2]
    for name, file in (("kalman", "fields.nc"), ("linear_samples", "fields_linear_samples.nc")):
        data = evaluate.to_dataset(cases, results[name], fields, f"jax_repaint, model 12ab, method {name}, seed 0")
        readers.write_netcdf(data.assign_attrs(method=name), tmp_path / file)
    text = report.build(tmp_path)
    (kalman, *others), *_ = data_of(text)["estimates"][0]
    assert [len(field["errors"]) for field in (kalman, *others)] == [7, 3, 7]
    assert [field["spread"] is None for field in (kalman, *others)] == [False, True, False]
    assert [field["spread_rms"] is None for field in (kalman, *others)] == [False, True, False]
    assert "rank histogram of linear_samples" in text
    assert "rank histogram of kalman" not in text


@pytest.mark.parametrize("degrees", [0, 40, 85])
def test_pictures_have_the_shape_of_the_grid_however_it_lies(made, degrees):
    one = made[0]
    y, x = np.meshgrid(np.arange(9) - 4.0, np.arange(14) - 6.5, indexing="ij")
    turn = 0.01 * np.exp(1j * np.radians(degrees)) * (x + 1j * y)
    cells = np.zeros((2, 9, 14, 2), np.float32)
    grid = Fields.create(cells, turn.imag, turn.real, make_fields().time[:2], constant=True)
    turned = dataclasses.replace(one, spacing=grid.spacing)
    assert one.ocean.shape == (9, 14)
    assert report.viewer_data([turned], 1, 0)["aspect"] == pytest.approx(9 / 14, rel=1e-3)


@pytest.mark.parametrize("row", range(4))
def test_no_observed_line_is_lost_where_cells_are_left_out(row):
    seen = np.zeros((7, 10), bool)
    seen[row] = True
    assert report._in_blocks(seen, 3).tolist() == [[int(i == row // 3)] * 4 for i in range(3)]
    np.testing.assert_array_equal(report._in_blocks(seen, 1), seen)


def test_an_estimate_is_shown_where_the_truth_is_not_known(made):
    gappy = made[0].truth.copy()
    gappy[:, :, 4, 5] = np.nan
    one = dataclasses.replace(made[0], truth=gappy)
    field = report.viewer_data([one], 1, 0)["estimates"][0][0][0]
    drawn, step = decode(field["errors"][0], one.ocean.shape)
    np.testing.assert_allclose(drawn[4, 5], one.mean[0, 0, 4, 5], atol=0.51 * step + 1e-3)
    np.testing.assert_allclose(drawn[2, 3], (one.mean - one.truth)[0, 0, 2, 3], atol=0.51 * step + 1e-3)


def test_coverage_and_ranks_know_about_partners(evaluation, made):
    kalman = made[0]
    inside, counts = report.mean_coverage(kalman, 0), report.rank_counts(kalman, 0)
    scores = []
    for place in range(3):
        case = evaluation.cases[place]
        scored = metrics.scored_cells(case.truth, evaluation.fields.ocean, case.observed)
        members = evaluation.results["kalman"].members[place].astype(np.float32)
        scores.append([metrics.coverage(case.truth, members, scored, p, antithetic=True) for p in report.LEVELS])
    np.testing.assert_allclose(inside, np.mean(scores, 0))
    assert len(counts) == 3 + 1
    assert counts.sum() == 2 * 2 * sum(kalman.scored(0, frame).sum() for frame in range(3))


def test_every_pattern_has_its_curves(evaluation):
    alts = [attributes["alt"] for attributes, _ in Elements(evaluation.text).all("img")]
    for pattern in PATTERNS:
        for words in (
            f"error against distance to the nearest observation, {pattern}",
            f"spectra of kinetic energy, {pattern}",
            f"coverage of intervals, {pattern}",
            f"rank histogram of kalman, {pattern}",
            f"rank histogram of linear_samples, {pattern}",
        ):
            assert alts.count(words) == 1
    assert f"rank histogram of linear, {PATTERNS[0]}" not in alts


# --- training -----------------------------------------------------------------------------------------------


def test_a_training_run_shows_its_log_and_settings(tmp_path):
    write_training(tmp_path)
    model.save(tiny.model(), tmp_path / "model")
    text = report.build(tmp_path)
    elements = Elements(text)
    ((_, columns, rows),) = tables(text)
    log = pd.read_csv(tmp_path / "log.csv")
    assert columns == list(log.columns)
    shown = [[float(attributes["data-value"]) for attributes, _ in row] for row in rows]
    np.testing.assert_array_equal(shown, log.to_numpy())
    names = [words for _, words in elements.all("dt")]
    values = dict(zip(names, [words for _, words in elements.all("dd")], strict=True))
    assert values["data"] == "tiny <fields>"
    assert (values["network"], values["form"], values["epochs"]) == ("test", "eps", "3")
    assert values["time"] == "3.0 minutes"
    flat = checkpoint.flatten(tiny.config().to_dict())
    assert {name.split(".", 1)[-1] for name in flat} <= set(names)
    assert values["learning_rate"] == "0.001"
    assert [a["alt"] for a, _ in elements.all("img")] == ["loss and learning rate against epochs"]


@pytest.mark.parametrize(("value", "drawn"), [(0.9, 0.9), (None, None), ("0.9", None), (float("nan"), None)])
def test_the_loss_to_beat_is_that_of_the_model(tmp_path, monkeypatch, value, drawn):
    write_training(tmp_path)
    (tmp_path / "model").mkdir()
    training = {} if value is None else {"held_out_loss_of_linear": value}
    (tmp_path / "model" / "model.json").write_text(json.dumps({"training": training}))
    seen, draw = [], plots.draw_loss
    monkeypatch.setattr(plots, "draw_loss", lambda *args, linear: seen.append(linear) or draw(*args, linear=linear))
    report.build(tmp_path)
    assert seen == [drawn]


def test_a_long_log_is_thinned_and_a_new_one_is_empty(tmp_path, monkeypatch):
    checkpoint.claim(tmp_path, {"train": {}}, {"name": "tiny"})
    assert "No epoch is finished yet." in report.build(tmp_path)
    write = dict.fromkeys(("train_loss", "held_out_loss", "ema_held_out_loss", "learning_rate", "seconds"), 0.5)
    pd.DataFrame([{"epoch": i, **write} for i in range(1, 31)]).to_csv(tmp_path / "log.csv", index=False)
    monkeypatch.setattr(report, "ROWS", 10)
    text = report.build(tmp_path)
    ((_, _, rows),) = tables(text)
    epochs = [int(row[0][0]["data-value"]) for row in rows]
    assert (len(epochs), epochs[0], epochs[-1]) == (10, 1, 30)
    assert "10 of 30 epochs, evenly spaced." in text


def test_denoising_errors_are_shown_where_they_were_measured(tmp_path):
    checkpoint.claim(tmp_path, {}, {})
    levels = pd.DataFrame({"sigma": [0.1, 1.0], "network": [0.008, 0.3], "gaussian": [0.009, 0.31]})
    levels = levels.assign(ratio=levels["network"] / levels["gaussian"], lo=0.8, hi=1.0)
    levels.to_csv(tmp_path / "levels.csv", index=False)
    text = report.build(tmp_path)
    ((_, columns, rows),) = tables(text)
    assert columns == ["sigma", "network", "gaussian", "ratio"]
    shown = [[float(attributes["data-value"]) for attributes, _ in row] for row in rows]
    np.testing.assert_array_equal(shown, pd.read_csv(tmp_path / "levels.csv")[columns])
    assert [a["alt"] for a, _ in Elements(text).all("img")] == ["denoising error by noise level"]


def test_denoising_errors_of_several_models_are_a_figure_each(tmp_path, monkeypatch):
    checkpoint.claim(tmp_path, {}, {})
    drawn = []
    draw = plots.draw_denoising
    monkeypatch.setattr(plots, "draw_denoising", lambda *parts: (drawn.append(parts), draw(*parts))[1])
    one = pd.DataFrame({"sigma": [0.1, 1.0], "network": [0.008, 0.3], "gaussian": [0.009, 0.31], "model": "runs/a"})
    other = one.assign(network=[0.007, 0.2], model="runs/b")
    pd.concat([one, other]).to_csv(tmp_path / "levels.csv", index=False)
    text = report.build(tmp_path)
    assert [a["alt"] for a, _ in Elements(text).all("img")] == [
        f"denoising error by noise level, runs/{name}" for name in "ab"
    ]
    for (sigma, networks, gaussian), expected in zip(drawn, (one, other), strict=True):
        np.testing.assert_array_equal(sigma, expected["sigma"])
        np.testing.assert_array_equal(networks[expected["model"][0]], expected["network"])
        np.testing.assert_array_equal(gaussian, expected["gaussian"])


# --- sweeps -------------------------------------------------------------------------------------------------


def make_rows(points=2, stages=(1, 2), frames=6, failed=()):
    """Rows of a sweep over two patterns, with numbers drawn at random; `failed` points fail on frame 0."""
    rng = np.random.default_rng(0)
    start = np.datetime64("2021-05-01", "us").item()
    rows = []
    for pattern in ("line:4", "walk:9"):
        for point in range(points):
            for frame in range(frames):
                for stage in stages:
                    scores = dict(zip(comparison.SCORES, [4, False, 50, *rng.uniform(0.5, 1, 7)], strict=True))
                    bases = {f"mse_{name}": rng.uniform(1, 2) for name in methods.DETERMINISTIC}
                    rows.append(
                        {
                            "task": f"{pattern} {point} {frame}", "point": point, "label": f"gamma={point}",
                            "method": "adaptive", "settings": json.dumps({"gamma": point}), "pattern": pattern,
                            "seed": 0, "frame": frame, "time": start, "block": 1, "stage": stage, "observed": 10,
                            "ocean": 60, "failed_members": int(point in failed and frame == 0),
                            "failed_at": "stage 1, step 7" if point in failed and frame == 0 else "",
                            "distance_edges": [0.0, 2.0, 8.0], "distance_cells": [20, 30], "calls": 8 * stage,
                            "distance_mean": list(rng.uniform(size=2)), "distance_linear": [1.0, 2.0],
                            "device_seconds": 0.1, "compile_seconds": 1.0, **scores, **bases,
                        }
                    )  # fmt: skip
    return rows


@pytest.mark.parametrize("finished", [False, True])
def test_a_sweep_shows_its_table_and_curves(tmp_path, finished):
    results.claim(tmp_path, {"config": {"frames": 6, "points": {"p000": {"gamma": 0}}}, "models": {"": "12ab"}})
    for row in (rows := make_rows(failed=(1,))):
        results.write_part(tmp_path, [row])
    table = comparison.compare(results.read_parts(tmp_path))
    if finished:
        comparison.write(results.read_parts(tmp_path), tmp_path)
    text = report.build(tmp_path)
    found = [part for part in tables(text) if "label" in part[1]]
    assert [caption for caption, _, _ in found] == list(table["pattern"].unique())
    assert len(rows) == 2 * 2 * 6 * 2
    for pattern, columns, lines in found:
        theirs = table[table["pattern"] == pattern]
        assert {"mean_over_best_ratio", "member_over_seed_gp_ratio", "crps", "stage", "failed"} <= set(columns)
        for name in columns:
            cells = [line[columns.index(name)] for line in lines]
            if "data-value" in cells[0][0]:
                np.testing.assert_array_equal([float(a["data-value"]) for a, _ in cells], theirs[name])
            else:
                assert [words for _, words in cells] == list(theirs[name])
        ratio = [line[columns.index("mean_over_best_ratio")][0] for line in lines]
        np.testing.assert_array_equal([float(a["data-lo"]) for a in ratio], theirs["mean_over_best_lo"])
    images = {attributes["alt"]: attributes["src"] for attributes, _ in Elements(text).all("img")}
    assert {"MSE of the mean / best baseline by stage, line:4", "MSE of a member / seed_gp"} <= set(images)
    assert "error against distance to the nearest observation, walk:9" in images
    assert "gamma=1, line:4: first failed in stage 1, step 7" in text
    content = base64.b64decode(images["MSE of the mean / best baseline"].split(",")[1])
    assert (content == (tmp_path / "sweep.png").read_bytes()) if finished else content.startswith(b"\x89PNG")
    assert "evaluation" not in text.lower()


def test_a_sweep_of_ensembles_of_unlike_size_compares_what_its_text_does(tmp_path):
    results.claim(tmp_path, {"config": {"patterns": "walk:9, line:4"}})
    rows = make_rows(stages=(1,))
    for row in rows:
        row["members"] = 4 if row["point"] else 2
    results.write_part(tmp_path, rows[:-1])
    text = report.build(tmp_path)
    table = comparison.compare(results.read_parts(tmp_path))
    found = [part for part in tables(text) if "label" in part[1]]
    # In the order of the settings, where files have that of the alphabet.
    assert [caption for caption, _, _ in found] == ["walk:9", "line:4"]
    for pattern, columns, lines in found:
        assert not [name for name in columns if name.startswith("mean_over")]
        ratio = [line[columns.index("expected_over_best_ratio")][0] for line in lines]
        theirs = table[table["pattern"] == pattern]
        np.testing.assert_array_equal([float(a["data-value"]) for a in ratio], theirs["expected_over_best_ratio"])
        np.testing.assert_array_equal([float(a["data-lo"]) for a in ratio], theirs["expected_over_best_lo"])
    assert "compared is the mean of 4, as expected" in text
    assert "Points are over different frames" in text


@pytest.mark.parametrize("with_parts", [True, False])
def test_a_sweep_that_has_just_begun_says_so(tmp_path, with_parts):
    results.claim(tmp_path, {"config": {}} if with_parts else {"config": {}, results.ROWS_VERSION: 1})
    if with_parts:
        (tmp_path / results.PARTS).mkdir()
    page = report.build(tmp_path)
    assert "No task is finished yet." in page
    assert "Training" not in page


# --- what cannot be reported --------------------------------------------------------------------------------


def broken(folder, what):
    if what == "nowhere":
        return folder / "nowhere"
    if what == "no json":
        (folder / "config.json").write_text("{")
    elif what == "a list":
        (folder / "config.json").write_text("[1]")
    elif what == "log of something else":
        checkpoint.claim(folder, {}, {})
        (folder / "log.csv").write_text("a,b\n1,2\n")
    elif what == "table of something else":
        (folder / "table.csv").write_text("a,b\n1,2\n")
    elif what == "log of words":
        checkpoint.claim(folder, {}, {})
        columns = "epoch,train_loss,held_out_loss,ema_held_out_loss,learning_rate,seconds"
        (folder / "log.csv").write_text(columns + "\n1,low,1,1,1,1\n")
    elif what == "ratios in words":
        (folder / "table.csv").write_text(
            "pattern,method,ratio,lo,hi\nline:4,gp,2,1,3\nline:4,seed_gp,,,\nline:4,linear,good,1,1\n"
        )
    elif what == "ratios without intervals":
        (folder / "table.csv").write_text("pattern,method,ratio\nline:4,linear,1\n")
    elif what == "bytes for a table":
        (folder / "table.csv").write_bytes(b"\xff\xfe\x00method,pattern")
    elif what == "bytes for fields":
        (folder / "fields.nc").write_bytes(b"CDF\x01 and nothing more")
    elif what == "text for fields":
        (folder / "fields.nc").write_text("u v")
    elif what == "fields cut short":
        write_evaluation(folder, make_fields(), kept=("kalman",))
        (folder / "fields.nc").write_bytes((folder / "fields.nc").read_bytes()[:4000])
    elif what == "fields of something else":
        readers.write(tiny.fields(3), folder / "fields.nc")
    elif what == "other frames":
        fields = make_fields()
        write_evaluation(folder, fields, kept=("kalman",))
        fields.time[:] += np.timedelta64(1, "h")
        other = folder / "other"
        other.mkdir()
        write_evaluation(other, fields, kept=("linear",))
        shutil.move(other / "fields_linear.nc", folder)
        (folder / "fields.nc").rename(folder / "fields_kalman.nc")
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nowhere", "nowhere is no folder"),
        ("nothing", "holds no training run"),
        ("no json", "config.json cannot be read"),
        ("a list", "holds no settings"),
        ("log of something else", "log.csv has no column 'epoch'"),
        ("log of words", "log.csv: column 'train_loss' holds 'low', which is no number"),
        ("table of something else", "table.csv has no column 'pattern'"),
        ("ratios in words", "table.csv: column 'ratio' holds 'good', which is no number"),
        ("ratios without intervals", "table.csv has no column 'lo'"),
        ("bytes for a table", "table.csv is no table"),
        ("bytes for fields", "cannot read .*fields.nc"),
        ("text for fields", "fields.nc is no NetCDF file"),
        ("fields cut short", "cannot read .*fields.nc"),
        ("fields of something else", "fields.nc is no file of fields"),
        ("other frames", "of different frames or patterns"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path, what, words):
    with pytest.raises(InputError, match=words) as e:
        report.build(broken(tmp_path, what))
    assert "\n" not in str(e.value)


def test_files_of_an_older_run_are_left_out(evaluation, tmp_path, caplog):
    shutil.copytree(evaluation.folder, tmp_path / "again")
    fresh = report.build(tmp_path / "again")
    with xr.open_dataset(evaluation.folder / "fields.nc") as data:
        data = data.load()
    history = data.attrs["history"]
    for path, changes in (
        ("fields_old.nc", {"history": history.replace("model 12ab", "model 34cd")}),
        ("fields_other.nc", {"history": history.replace("seed 0", "seed 1")}),
        ("fields_adaptive.nc", {"method": "adaptive", "evaluation": "56ef"}),
    ):
        readers.write_netcdf(data.assign_attrs({"method": "old"} | changes), tmp_path / "again" / path)
    assert report.build(tmp_path / "again") == fresh
    assert caplog.text.count("is of another evaluation (model, seed, members or calibration) than fields.nc, and") == 3


def test_files_of_other_data_and_of_methods_without_a_row_are_left_out(evaluation, tmp_path, caplog):
    """As an evaluation of the same model and seed leaves them in the folder of the next."""
    shutil.copytree(evaluation.folder, tmp_path / "again")
    fresh = report.build(tmp_path / "again")
    with xr.open_dataset(evaluation.folder / "fields.nc") as data:
        data = data.load()
    truth = {name: data[name] + 0.01 for name in data.data_vars if str(name).endswith("_truth")}
    assert len(truth) == 2
    readers.write_netcdf(data.assign(truth), tmp_path / "again" / "fields_kalman.nc")
    readers.write_netcdf(data.assign_attrs(method="dps"), tmp_path / "again" / "fields_dps.nc")
    assert report.build(tmp_path / "again") == fresh
    assert "fields_kalman.nc is of other frames, patterns or data than fields.nc, and is left out" in caplog.text
    assert "fields_dps.nc is of dps, which table.csv does not have, and is left out" in caplog.text


@pytest.mark.slow
def test_the_command_writes_the_page_whole(evaluation, tmp_path):
    command = [sys.executable, "-m", "jax_repaint.report", str(evaluation.folder), "--out=page.html", "--frames=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"wrote page.html, \d\.\d MB\n", done.stdout)
    assert len(data_of((tmp_path / "page.html").read_text())["frames"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `browser`)")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('browser')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture
def opened(browser, evaluation):
    """The page on a desktop screen, just loaded."""
    path = evaluation.folder / "report.html"
    path.write_text(evaluation.text, encoding="utf-8")
    set_screen(browser, 1280, 900)
    browser.get("about:blank")
    browser.get(path.as_uri())
    yield browser
    # A test that reads pixels is told that it is slow.
    assert [line for line in browser.get_log("browser") if line["source"] != "rendering"] == []


def set_screen(browser, width, height):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def state(browser):
    script = "return Array.from(document.querySelectorAll('#viewer select'), s => s.options[s.selectedIndex].text)"
    return browser.execute_script(script)


def pixel(browser, panel, y, x, shape):
    """Colour of a canvas at the middle of a cell."""
    script = """
      const canvas = document.querySelector(`[data-panel=${arguments[0]}] canvas`);
      const [x, y] = [arguments[1] * canvas.width, arguments[2] * canvas.height].map(Math.floor);
      return Array.from(canvas.getContext("2d").getImageData(x, y, 1, 1).data);
    """
    return browser.execute_script(script, panel, (x + 0.5) / shape[1], 1 - (y + 0.5) / shape[0])[:3]


def expected_colour(data, kind, length):
    colours = data["colours"][kind]
    level = min(len(colours) - 1, int(length / data["top"][kind] * len(colours)))
    return [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours[max(level - 1, 0) : level + 2]]


def test_a_click_on_a_header_sorts(opened):
    table = opened.find_element("css selector", "table")
    table.find_element("css selector", "[data-column=crps]").click()

    def column(name):
        script = """
          const table = arguments[0], header = table.querySelector(`[data-column=${arguments[1]}]`).closest("th");
          return [header.getAttribute("aria-sort"), Array.from(table.tBodies[0].rows,
                  row => row.cells[header.cellIndex].dataset.value ?? row.cells[header.cellIndex].textContent)];
        """
        return opened.execute_script(script, table, name)

    order, values = column("crps")
    assert order == "ascending"
    assert [float(v) for v in values] == sorted(float(v) for v in values)
    table.find_element("css selector", "[data-column=crps]").click()
    order, values = column("crps")
    assert order == "descending"
    assert [float(v) for v in values] == sorted((float(v) for v in values), reverse=True)
    table.find_element("css selector", "[data-column=method]").click()
    assert column("method") == ["ascending", sorted(MEMBERS)]
    assert column("crps")[0] is None
    # Where a number does not exist, the row stays last.
    for _ in range(2):
        table.find_element("css selector", "[data-column=coverage90]").click()
        assert column("coverage90")[1][-1] == ""


def test_keys_flip_frames_members_patterns_and_methods(opened):
    from selenium.webdriver.common.keys import Keys

    first = ["frame 3, 2021-05-01 03:00", PATTERNS[0], "kalman", "mean"]
    assert state(opened) == first
    press(opened, Keys.ARROW_RIGHT)
    assert state(opened)[0] == "frame 20, 2021-05-01 20:00"
    press(opened, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert state(opened)[0] == "frame 41, 2021-05-02 17:00"
    press(opened, "p", "m", "m")
    assert state(opened)[1:] == [PATTERNS[1], "linear_samples", "mean"]
    # Up and down scroll the page until the viewer is clicked.
    press(opened, Keys.ARROW_DOWN)
    assert state(opened)[3] == "mean"
    opened.find_element("css selector", "#viewer h2").click()
    press(opened, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert state(opened)[3] == "member 3"
    press(opened, Keys.ARROW_DOWN)
    assert state(opened)[3] == "mean"
    press(opened, Keys.ARROW_UP, "M")
    assert state(opened)[2:] == ["linear", "mean"]
    assert not opened.find_element("css selector", "[data-for=member]").is_displayed()


def test_clicks_and_addresses_choose_too(opened, evaluation):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import Select

    opened.find_element("css selector", "[data-step='frame:1']").click()
    assert state(opened)[0].startswith("frame 20")
    Select(opened.find_element("css selector", "select[name=method]")).select_by_visible_text("linear_samples")
    canvas = opened.find_element("css selector", "[data-panel=truth] canvas")
    ActionChains(opened).move_to_element_with_offset(canvas, canvas.size["width"] // 4, 0).click().perform()
    assert state(opened) == ["frame 41, 2021-05-02 17:00", PATTERNS[0], "linear_samples", "mean"]
    ActionChains(opened).move_to_element_with_offset(canvas, -(canvas.size["width"] // 4), 0).click().perform()
    assert state(opened)[0].startswith("frame 20")
    address = opened.current_url
    assert address.endswith("#frame=1&pattern=0&method=2&member=0")
    opened.get("about:blank")
    opened.get(address.replace("pattern=0", "pattern=1").replace("member=0", "member=2").replace("frame=1", "frame=99"))
    assert state(opened) == ["frame 41, 2021-05-02 17:00", PATTERNS[1], "linear_samples", "member 2"]


def test_pictures_show_the_numbers(opened, evaluation):
    data, fields = data_of(evaluation.text), evaluation.fields
    press(opened, "p")
    place = 3  # first frame, second pattern
    members = evaluation.results["kalman"].members[place]
    error = np.hypot(*np.moveaxis(members.mean(0) - evaluation.cases[place].truth, -1, 0))
    spread = np.hypot(*np.moveaxis(evaluation.results["kalman"].spread(place), -1, 0))
    for y, x in ((8, 0), (8, 13), (0, 13), (4, 6), (6, 9)):
        assert pixel(opened, "error", y, x, fields.shape) in expected_colour(data, "deviation", error[y, x])
        assert pixel(opened, "spread", y, x, fields.shape) in expected_colour(data, "deviation", spread[y, x])
    assert pixel(opened, "error", 0, 0, fields.shape) == [153, 153, 153]
    y, x = np.argwhere(evaluation.cases[place].observed)[0]
    assert pixel(opened, "truth", y, x, fields.shape) == [0, 114, 178]
    captions = opened.find_elements("css selector", "#viewer figcaption")
    scored = metrics.scored_cells(evaluation.cases[place].truth, fields.ocean, evaluation.cases[place].observed)
    rms = np.sqrt((error[scored] ** 2).mean())
    assert captions[1].text.split("\n") == ["kalman, mean", f"RMS error {rms:.3f} m/s"]


@pytest.mark.parametrize("width", [360, 1280])
def test_no_sideways_scrolling_and_no_requests(opened, tmp_path, width):
    set_screen(opened, width, 800)
    opened.refresh()
    sizes = opened.execute_script(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return [document.documentElement.scrollWidth, window.innerWidth, performance.getEntriesByType('resource')"
        ".filter(e => !e.name.startsWith('data:')).length]"
    )
    assert sizes[0] <= sizes[1] == width
    assert sizes[2] == 0
    opened.save_screenshot(str(tmp_path / "screen.png"))
    from matplotlib import image

    assert np.ptp(image.imread(tmp_path / "screen.png")[..., :3], axis=(0, 1)).min() > 0.5


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_scheme_of_the_system_is_followed(opened, scheme, dark):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in opened.execute_script(script))
    assert (paper < ink) == dark
    assert abs(paper - ink) > 400
