"""Verdicts follow from rows with known effects, the page has every finding, and the runner goes on where it was."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny
from absl import flags

from jax_repaint import (
    ensemble,
    findings,
    levels,
    locks,
    model,
    points,
    reproduce,
    results,
    resumption,
    scoring,
    train,
)
from jax_repaint.cases import data_of
from jax_repaint.data import readers
from jax_repaint.data.fields import Split
from jax_repaint.errors import InputError
from jax_repaint.findings import ABOVE, BELOW, HOLDS, MOST, NO_WORSE, NOT, OPEN, OTHER, SAME, Check, Evidence
from jax_repaint.optimise import Plan, State, make_steps

FRAMES = 24


# --- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "expected", "judged"),
    [
        ((0.8, 0.9), BELOW, HOLDS), ((1.1, 1.2), BELOW, NOT), ((0.9, 1.1), BELOW, OPEN),
        ((0.8, 0.9), ABOVE, NOT), ((1.1, 1.2), ABOVE, HOLDS), ((0.9, 1.1), ABOVE, OPEN),
        ((0.995, 1.005), SAME, HOLDS), ((1.02, 1.1), SAME, NOT), ((0.9, 0.98), SAME, NOT), ((0.98, 1.005), SAME, OPEN),
        ((0.8, 1.005), NO_WORSE, HOLDS), ((1.02, 1.1), NO_WORSE, NOT), ((0.9, 1.1), NO_WORSE, OPEN),
        ((0.6, 0.9), MOST, HOLDS), ((0.1, 0.4), MOST, NOT), ((np.nan, np.nan), BELOW, OPEN),
        # Of equal ones none is better, worse or in the majority.
        ((1.0, 1.0), BELOW, NOT), ((1.0, 1.0), ABOVE, NOT), ((1.0, 1.0), SAME, HOLDS), ((1.0, 1.0), NO_WORSE, HOLDS),
        ((1.0, 1.0), MOST, HOLDS), ((0.5, 0.5), MOST, NOT), ((0.9, 1.0), BELOW, OPEN), ((1.0, 1.1), BELOW, NOT),
        ((1.0, 1.1), ABOVE, OPEN), ((0.9, 1.0), ABOVE, NOT), ((0.99, 1.01), SAME, HOLDS), ((0.9, 0.99), SAME, OPEN),
    ],
)  # fmt: skip
def test_a_claim_is_judged_by_its_whole_interval(ends, expected, judged):
    assert Check("", np.mean(ends), *ends, expected).verdict == judged


def make(judged, role="claim"):
    ends = {HOLDS: (0.8, 0.9), NOT: (1.1, 1.2), OPEN: (0.9, 1.1)}[judged]
    return Check("", 1.0, *ends, BELOW, role)


@pytest.mark.parametrize(
    ("claims", "controls", "conditions", "expected"),
    [
        ([HOLDS], [], [], HOLDS), ([HOLDS, OPEN], [], [], OPEN), ([HOLDS, OPEN, NOT], [], [], NOT),
        ([HOLDS], [HOLDS], [], OTHER), ([HOLDS], [HOLDS, OPEN], [], HOLDS), ([HOLDS], [NOT], [], HOLDS),
        ([NOT], [HOLDS], [], NOT), ([HOLDS], [], [NOT], OPEN), ([NOT], [], [HOLDS], NOT),
    ],
)  # fmt: skip
def test_the_worst_claim_decides_and_controls_name_another_reason(claims, controls, conditions, expected):
    checks = [make(v) for v in claims] + [make(v, "control") for v in controls]
    checks += [make(v, "condition") for v in conditions] + [make(NOT, "beside")]
    assert findings.verdict(checks) == expected


# --- rows with known effects ----------------------------------------------------------------------------------


def make_rows(name, effects=None, noise=0.003, frames=FRAMES):
    """Rows of a sweep as its configuration has it; `effects` are factors of the GP's error by (label, stage)."""
    config = reproduce.sweep_config(name, "a", "b")
    rng = np.random.default_rng(0)
    rows = []
    gp = rng.lognormal(-5, 0.5, frames)
    for point in points.read_points(config):
        trained = dataclasses.replace(tiny.model(), training={})
        calls = points.calls_by_stage(points.make_program(point, trained))
        for stage, size in [(s, n) for s in range(1, len(calls) + 1) for n in point.sizes(config)]:
            effect = (effects or (lambda label, stage: 0.9))(point.label, stage)
            error = gp * effect * rng.lognormal(0, noise, frames)
            for frame in range(frames):
                mean = error[frame] * (0.5 + 0.5 / size)
                rows.append(
                    dict.fromkeys(results.SCHEMA.names)
                    | {"task": f"{point.label}{stage}{size}{frame}", "point": point.number, "label": point.label,
                       "method": point.method, "settings": json.dumps(point.settings), "pattern": "line:22", "seed": 0,
                       "frame": frame, "block": 2, "stage": stage, "observed": 10, "ocean": 100, "members": size,
                       "antithetic": point.paired, "cells": 90, "mse_member": error[frame], "mse_mean": mean,
                       "variance": error[frame] / 2, "crps": np.sqrt(mean), "coverage90": 0.9, "energy_member": 1.0,
                       "energy_truth": 1.0, "failed_members": 0, "failed_at": "", "mse_climatology": 2 * gp[frame],
                       "mse_seed_gp": gp[frame], "mse_gp": gp[frame], "mse_linear": 0.3 * gp[frame],
                       "calls": calls[stage - 1] * size, "device_seconds": 1.0}
                )  # fmt: skip
    return pd.DataFrame(rows)


def make_resumption(loaded=1.0, decayed=0.9, falling=1.0):
    rng = np.random.default_rng(0)
    hard = rng.lognormal(0, 0.5, FRAMES)
    factors = {"before": 1.0, resumption.FIRST: 0.8, "continued": falling, "loaded": loaded,
               resumption.AVERAGED: 1.0, "mirrored": 1.4, "weights": 0.9, "decayed": decayed}  # fmt: skip
    losses = pd.DataFrame({name: hard * f * rng.lognormal(0, 0.001, FRAMES) for name, f in factors.items()})
    rows = [(name, epoch, 0.1 * f, 0.1) for name, f in factors.items() for epoch in (1, 2)]
    curves = pd.DataFrame(rows, columns=["branch", "epoch", "loss", "averaged_loss"])
    length = resumption.Length(epoch=50, before=2, after=2, held_out=FRAMES)
    return resumption.Resumption(curves, losses, length, 2, "WORKDIR holds a run of another kind")


def make_evidence(effects=None, names=tuple(reproduce.SWEEPS), found=None):
    sigmas = np.array([0.01, 1.0, 3.4])
    errors = np.random.default_rng(0).lognormal(0, 0.1, (FRAMES, 3, 2))
    return Evidence(
        sweeps={name: make_rows(name, effects) for name in names},
        threshold=10,
        weight=0.303,
        levels={name: levels.table(errors, sigmas, 2) for name in ("attention", "plain")},
        visible=(3.4, 24, 0.96, 256),
        losses={"attention": (0.04, 0.03), "plain": (0.1, 0.03)},
        resumption=found or make_resumption(),
    )


def judge(title, effects, found=None):
    finding = next(f for f in findings.FINDINGS if f.title == title)
    names = (finding.sweep,) if finding.sweep else ()
    return findings.verdict(finding.judge(make_evidence(effects, names, found)).checks)


def by_method(**factors):
    return lambda label, stage: next((f for key, f in factors.items() if label.split()[0] == key), 0.9)


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.9, HOLDS), (0.8, OTHER), (0.7, OTHER)],
)
def test_adaptive_noise_holds_for_another_reason_if_even_noise_does_as_well(uniform, expected):
    effects = by_method(gp_init=0.9, adaptive=0.8, uniform=uniform)
    assert judge("Adaptive noise improves on GP-init", effects) == expected


def test_known_effects_are_found():
    title = "Adaptive noise improves on GP-init"
    assert judge(title, by_method(gp_init=0.8, adaptive=0.9, uniform=0.8)) == NOT
    assert judge("Gradient guidance changes nothing", by_method(gp_init=0.9, guided=1.1)) == NOT
    assert judge("Starting from the GP is the big win", by_method(gp_init=0.8, plain=0.9)) == HOLDS
    assert judge("Starting from the GP is the big win", by_method(gp_init=0.9, plain=0.9)) == OPEN
    assert judge("Plain RePaint is worse than the GP", lambda label, stage: 1.3) == HOLDS
    assert judge("Averaging members reduces the error", None) == HOLDS
    second = lambda label, stage: 0.9 - 0.002 * float(label.split("t_refine=")[1]) if "refine" in label else 0.95  # noqa: E731
    assert judge("A second pass improves, the more the higher it starts", second) == HOLDS


def test_attention_is_judged_by_every_pair_of_models(monkeypatch):
    make = reproduce.sweep_config
    monkeypatch.setattr(reproduce, "sweep_config", lambda *args: make(*args, again=[("c", "d")]))
    better = lambda label, stage: 0.8 if label.startswith("attention") else 0.9  # noqa: E731
    worse = lambda label, stage: 1.0 if label == "attention 2, plain" else better(label, stage)  # noqa: E731
    assert judge("Attention helps inpainting", better) == HOLDS
    assert judge("Attention helps inpainting", worse) == NOT


def test_the_turn_is_looked_for_at_the_threshold():
    def turning(scaled):
        return lambda label, stage: 1.2 if stage == 10 and (scaled or "scaled" not in label) else 0.8

    assert judge("The turn at stage 8", turning(False)) == OTHER
    assert judge("The turn at stage 8", turning(True)) == HOLDS
    assert judge("The turn at stage 8", lambda label, stage: 0.9**stage) == NOT


@pytest.mark.parametrize("threshold", [1, 11, 25])
def test_a_threshold_that_no_stage_reaches_decides_nothing(threshold):
    """Whatever the stages do, what cannot have acted is no reason."""
    evidence = dataclasses.replace(make_evidence(names=("stages",)), threshold=threshold)
    judged = findings.turn(evidence)
    assert findings.verdict(judged.checks) == OPEN
    assert judged.checks[0].role == "condition"
    assert f"at stage {threshold} (at 8 in theirs), which is none of 2 to 10 that are run here" in judged.remark
    reached = findings.turn(dataclasses.replace(evidence, threshold=10))
    assert not [check for check in reached.checks if check.role == "condition"]
    assert "at stage 10 (at 8 in theirs), which is where the turn is looked for" in reached.remark


def test_calls_are_set_against_the_linear_estimate_where_another_baseline_is_better():
    rows = make_rows("calls")
    rows["mse_gp"] = rows["mse_linear"] / 2
    table = findings.calls_against_crps(dataclasses.replace(make_evidence(names=()), sweeps={"calls": rows})).table
    (cell,) = [line.split("|")[4] for line in table.splitlines() if line.startswith("| kalman levels=16 ")]
    kalman = findings.chosen(rows, "kalman levels=16")
    assert float(cell.split("[")[0]) == pytest.approx(kalman["mse_mean"].mean() / kalman["mse_linear"].mean(), abs=1e-3)


def test_failures_are_counted_and_left_out_of_ratios():
    rows = make_rows("guidance_scale")
    large = rows["label"].isin([f"guided guidance_scale={s:g}" for s in (5, 50, 500)])
    rows.loc[large, "failed_members"] = 1
    rows.loc[large, ["mse_member", "mse_mean", "crps"]] = np.nan
    evidence = dataclasses.replace(make_evidence(names=()), sweeps={"guidance_scale": rows})
    judged = findings.guidance_curve(evidence)
    assert judged.checks[-1].verdict == HOLDS
    assert judged.checks[-1].value == 1
    assert f"| 500 | NaN | – | – | – | – | {FRAMES}/{FRAMES} |" in judged.table


def test_means_of_members_stand_in_their_table():
    """Over the linear estimate, with a third of the error of a member, of which a mean of M has (1 + 1 / M) / 2."""
    table = findings.averaging(make_evidence(names=("ensemble_size",))).table.splitlines()
    sizes = [int(cell) for cell in table[0].split("|")[2:-1]]
    assert len(sizes) > 3
    for line in table[2:]:
        for size, cell in zip(sizes, line.split("|")[2:-1], strict=True):
            if cell.strip() != scoring.DASH:
                assert float(cell) == pytest.approx(3 * (0.5 + 0.5 / size), rel=0.01)


def test_a_few_frames_decide_nothing_of_shares_and_of_two_ratios():
    for frames, judged in ((4, OPEN), (20, HOLDS)):
        assert findings.of_frames("wins", frames, frames, findings.MOST).verdict == judged
        better, worse = (scoring.Ratio(r, r - 0.01, r + 0.01, *[1.0] * 5, frames) for r in (0.5, 0.8))
        assert findings.apart("row over random", better, worse, findings.BELOW).verdict == judged


def test_a_few_frames_decide_nothing():
    rows = make_rows("head_to_head", by_method(gp_init=0.5, plain=0.9), frames=4)
    gp_init, plain = (findings.chosen(rows, label) for label in ("gp_init", "plain"))
    assert findings.paired(gp_init, plain).hi < 1
    assert findings.check("", gp_init, plain, BELOW).verdict == OPEN


@pytest.mark.parametrize(("loaded", "expected"), [(1.3, HOLDS), (0.99, NOT)])
def test_damage_of_a_resumed_run(loaded, expected):
    title = "Loading Adam's state into AdamW damages the network"
    assert judge(title, None, make_resumption(loaded=loaded)) == expected


def test_damage_is_told_from_what_passes():
    """Mirrored epochs that a branch recovers from are in its worst epoch and not at its end."""
    found = make_resumption()
    curves, losses = found.curves.copy(), found.losses.assign(before=1.0, mirrored=1.02)
    curves.loc[curves["branch"] == "mirrored", ["loss", "averaged_loss"]] = [[1.3, 1.01], [1.02, 1.05]]
    judged = findings.resume_damage(
        dataclasses.replace(make_evidence(), resumption=dataclasses.replace(found, curves=curves, losses=losses))
    )
    (row,) = [line.split("|") for line in judged.table.splitlines() if line.startswith("| mirrored")]
    assert [cell.strip() for cell in row[2:5]] == ["1.02", "1.020", "1.300"]
    assert [cell.strip() for cell in row[5:7]] == ["1.010", "1.050"]
    for told in ("Mirrored epochs take the loss to 1.30 times what it was, those without that follow them to 1.02.",
                 "goes from 1.010 times that loss after the first epoch to 1.050 after the last"):  # fmt: skip
        assert told in judged.remark
    assert "2 epochs of 50 steps at a constant rate, then 2 of each branch" in findings.plateau(make_evidence()).remark


@pytest.mark.parametrize("branch", ["mirrored", "loaded"])
def test_a_branch_that_diverged_has_no_ratio_and_keeps_the_page(branch):
    found = make_resumption(loaded=0.99)
    losses = found.losses.assign(**{branch: np.nan})
    curves = found.curves.copy()
    curves.loc[(curves["branch"] == branch) & (curves["epoch"] > 1), ["loss", "averaged_loss"]] = np.nan
    found = dataclasses.replace(found, curves=curves, losses=losses)
    judged = findings.resume_damage(dataclasses.replace(make_evidence(), resumption=found))
    assert findings.verdict(judged.checks) == (OPEN if branch == "loaded" else NOT)
    assert [one.name for one in judged.checks if np.isnan(one.value)] == [
        one.name for one in judged.checks if branch in one.name.split(" over ")
    ]
    assert "nan" not in judged.remark
    assert (f"follow them to {scoring.DASH}." in judged.remark) == (branch == "mirrored")


def test_mirrored_epochs_are_the_first_two_of_their_branch():
    found = make_resumption()
    curves = found.curves[found.curves["branch"] != "mirrored"]
    later = [("mirrored", epoch + 1, loss, 1.0) for epoch, loss in enumerate((1.0, 1.0, 1.4, 2.0))]
    curves = pd.concat([curves, pd.DataFrame(later, columns=curves.columns)])
    found = dataclasses.replace(found, curves=curves, losses=found.losses.assign(before=1.0, mirrored=2.0))
    remark = findings.resume_damage(dataclasses.replace(make_evidence(), resumption=found)).remark
    assert "Mirrored epochs take the loss to 1.00 times what it was, those without that follow them to 2.00." in remark


def test_no_plateau_no_verdict_on_it():
    title = "Training reaches a plateau that Adam cannot leave"
    assert judge(title, None, make_resumption(falling=0.8)) == OPEN
    assert judge(title, None, make_resumption()) == OTHER
    # A rate that falls without any gain is no other way to the same effect.
    assert judge(title, None, make_resumption(decayed=1.0)) == HOLDS
    assert judge(title, None, make_resumption(decayed=1.1)) == HOLDS


def test_a_curve_that_turns_back_is_not_monotone():
    for title, name, turned in (
        ("A larger gamma is better, up to 3", "gamma", {0.3: 1.05, 0.5: 1.1, 1: 1.0, 2: 1.2, 3: 0.9, 5: 0.9}),
        ("More guidance is worse, up to NaN", "guidance_scale", {0.01: 1.4, 0.05: 1.3, 0.5: 1.2, 1: 1.1}),
    ):
        by_label = {label: value for key, value in turned.items() for label in (f"{name}={key:g}",)}

        def shape(label, stage, by_label=by_label):
            return next((0.5 * v for key, v in by_label.items() if label.endswith(key)), 0.5)

        assert judge(title, shape) == NOT


def test_the_numbers_of_the_notes_hold():
    """Rows whose errors are exactly the notes' ratios to the GP, without noise."""
    guided = dict(
        zip((1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.5, 1.0), (0.895, 0.895, 0.896, 0.917, 0.959, 0.992, 0.995), strict=True)
    )
    rows = make_rows("guidance_scale", lambda label, stage: guided.get(float(label.split("=")[1]), 2.0), noise=0)
    rows.loc[rows["label"].str.endswith(("=5", "=50", "=500")), "failed_members"] = 1
    gammas = dict(zip((0.3, 0.5, 1.0, 2.0, 3.0, 5.0), (0.821, 0.800, 0.767, 0.741, 0.730, 0.730), strict=True))
    steps = make_rows("gamma", lambda label, stage: gammas[float(label.split("=")[1])], noise=0)
    none = make_evidence(names=())
    for judge_, name, mine in ((findings.guidance_curve, "guidance_scale", rows), (findings.gamma, "gamma", steps)):
        checks = judge_(dataclasses.replace(none, sweeps={name: mine})).checks
        assert [check.verdict for check in checks] == [HOLDS] * len(checks)
    # What two per cent more error at .001 would be, a step that the notes saw as well.
    rows.loc[rows["label"].str.endswith("=0.001"), "mse_member"] *= 1.02
    checks = findings.guidance_curve(dataclasses.replace(none, sweeps={"guidance_scale": rows})).checks
    assert [check.verdict for check in checks] == [HOLDS] * len(checks)


def test_rows_are_told_from_each_other():
    """Ten rows of twelve frames that are as hard as random ones on the whole, from half to once and a half as hard."""
    frames = np.concatenate([100 * number + np.arange(12) for number in range(10)])
    hard = np.repeat(np.linspace(0.5, 1.5, 10), 12)
    rows = make_rows("consecutive", lambda label, stage: 0.8, noise=0.001, frames=120)
    in_row = rows["label"].str.endswith("row")
    rows["block"] = 12
    rows.loc[in_row, "frame"] = frames[rows.loc[in_row, "frame"].astype(int)]
    for _, mine in rows[in_row].groupby(["label", "stage"]):
        rows.loc[mine.sort_values("frame").index, "mse_seed_gp"] = 0.01
        rows.loc[mine.sort_values("frame").index, "mse_member"] = 0.008 * hard
    evidence = dataclasses.replace(make_evidence(names=()), sweeps={"consecutive": rows})
    checks = {check.name: check for check in findings.row_of_frames(evidence).checks}
    assert checks["adaptive: ratio in rows over ratio at random"].value == pytest.approx(1, rel=0.01)
    for method in ("adaptive", "multistage"):
        for which, value in (("lowest", 0.4), ("highest", 1.2)):
            assert checks[f"{method}: {which} ratio of one row among 10"].value == pytest.approx(value)
    # A frame that failed is in no row, and does not cut one in two.
    row = findings.chosen(rows, "adaptive, row")
    row.loc[5, ["failed_members", "mse_member"]] = 1, np.nan
    np.testing.assert_allclose(findings.ratios_of_rows(row), 0.8 * np.linspace(0.5, 1.5, 10))


def test_a_row_of_frames_counts_once_in_the_share_that_is_better():
    """Of ten rows, four are worse than the GP, in every one of their frames."""
    rows = make_rows("bulk", lambda label, stage: 0.8, noise=0, frames=120)
    in_row = rows["label"] == "consecutive"
    number = rows.loc[in_row, "frame"].astype(int)
    rows.loc[in_row, "frame"] = number + 100 * (number // 12)
    rows.loc[in_row, "mse_member"] *= np.where(number // 12 < 4, 1.5, 1)
    evidence = dataclasses.replace(make_evidence(names=()), sweeps={"bulk": rows})
    (share,) = [check for check in findings.bulk(evidence).checks if check.name == "share of rows better than the GP"]
    expected = findings.of_frames("", 6, 10, findings.MOST)
    assert (share.value, share.lo, share.hi) == (expected.value, expected.lo, expected.hi)


@pytest.mark.parametrize(("row", "expected"), [(0.6, HOLDS), (0.72, OPEN), (0.8, NOT)])
def test_rows_that_flatter_by_half_of_the_notes_difference(row, expected):
    effects = lambda label, stage: row if label.endswith("row") else 0.8  # noqa: E731
    assert judge("Frames in a row flatter the method", effects) == expected


def test_seeds_of_a_frame_stay_in_one_block(monkeypatch):
    rows = make_rows("head_to_head", by_method(gp_init=0.8), noise=0.3)
    again = make_rows("head_to_head", by_method(gp_init=0.8), noise=0.2).assign(seed=1)
    both = pd.concat([rows, again])
    over, under = (
        findings.chosen(both, next(x for x in both["label"].unique() if x.startswith(m))) for m in ("gp_init", "plain")
    )
    errors = [one.sort_values(["frame", "seed"])["mse_member"].to_numpy() for one in (over, under)]
    monkeypatch.setattr(scoring, "_block", lambda difference: 1)
    found = findings.paired(over, under)
    assert found == scoring.ratio_of_means(*errors, block=4, seed=0)
    assert found.lo != scoring.ratio_of_means(*errors, block=2, seed=0).lo


def test_frames_on_which_either_failed_do_not_count():
    rows = make_rows("head_to_head", by_method(gp_init=0.8))
    over, under = (
        findings.chosen(rows, next(x for x in rows["label"].unique() if x.startswith(m))) for m in ("gp_init", "plain")
    )
    for one, frame in ((over, 3), (under, 5)):
        one.loc[one["frame"] == frame, ["failed_members", "mse_member"]] = 1, 1e6
    found = findings.paired(over, under)
    assert found.frames == FRAMES - 2
    assert found.ratio == pytest.approx(0.8 / 0.9, rel=0.02)


def test_the_ratio_of_two_ratios_spans_all_that_their_intervals_allow():
    over, under = (scoring.Ratio(r, r - d, r + d, *[1.0] * 5, 20) for r, d in ((0.9, 0.3), (0.7, 0.1)))
    found = findings.apart("", over, under, BELOW)
    ratios = np.divide.outer(np.linspace(over.lo, over.hi, 9), np.linspace(under.lo, under.hi, 9))
    np.testing.assert_allclose((found.value, found.lo, found.hi), (0.9 / 0.7, ratios.min(), ratios.max()))


def test_no_claims_hold_nothing():
    assert findings.verdict([]) == OPEN


def test_the_page_has_every_finding_and_question(tmp_path):
    verdicts = findings.write(make_evidence(), tmp_path / "page.md", ["how it was made"])
    text = (tmp_path / "page.md").read_text()
    assert list(verdicts) == [f.title for f in findings.FINDINGS]
    for finding in findings.FINDINGS:
        assert f"### {finding.title}\n\nThe notes: {finding.claim}" in text
        assert f"(#{findings._anchor(finding.title)})" in text
    for title, *_ in findings.QUESTIONS:
        assert f"### {title}\n" in text
    assert "Not run" not in text
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) >= 6
    assert all(f"]({path.name})" in text and path.stat().st_size < 150_000 for path in pictures)
    # Every line of a table has as many cells as its head.
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table[0]


def test_what_was_not_run_is_named(tmp_path):
    evidence = dataclasses.replace(make_evidence(names=("head_to_head",)), resumption=None, levels={})
    verdicts = findings.write(evidence, tmp_path / "page.md", [])
    text = (tmp_path / "page.md").read_text()
    assert set(verdicts) == {f.title for f in findings.FINDINGS if f.sweep == "head_to_head"}
    assert "Not run: Training reaches a plateau that Adam cannot leave; " in text


# --- the runner -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    readers.write(tiny.fields(), folder / "tiny.nc")
    made = tiny.model(data=readers.read(folder / "tiny.nc"))
    text = {"data": "tiny", "step": 1, "held_out_loss": 0.5, "held_out_loss_of_linear": 0.4}
    model.save(dataclasses.replace(made, training=made.training | text), folder / "model")
    tiny.compile_once(folder / "cache")
    yield folder
    tiny.compile_as_usual()


def changes(folder):
    return {"fields": str(folder / "tiny.nc"), "patterns": "line:3", "resample_steps": 1}


def test_another_season_stands_in_for_the_test_part(folder, tmp_path, monkeypatch):
    """All of it is held out; what is trained goes on with the data of the training."""
    season = tiny.fields(30, seed=8)
    readers.write(season, tmp_path / "season.nc")
    one = model.load(folder / "model")
    settings = one.training["config"]
    settings = settings | {"data": settings["data"] | {"fields": str(folder / "tiny.nc")}}
    model.save(dataclasses.replace(one, training=one.training | {"config": settings}), tmp_path / "model")
    trained = str(tmp_path / "model")
    changed = {"fields": str(tmp_path / "season.nc"), "part": "all", "patterns": "line:3"}
    study = reproduce.open_study(reproduce.sweep_config("head_to_head", trained, trained, **changed))
    np.testing.assert_array_equal(study.numbers, np.arange(30))
    seen = {}
    monkeypatch.setattr(reproduce, "errors_by_level", lambda models, fields, *_: seen.update(levels=fields) or {})
    monkeypatch.setattr(reproduce.resumption, "run", lambda _, fields, *__: seen.update(resume=fields))
    reproduce.gather(tmp_path, trained, trained, (reproduce.LEVELS, reproduce.RESUME), changes=changed)
    np.testing.assert_array_equal(seen["levels"].velocity, season.velocity)
    np.testing.assert_array_equal(seen["resume"].velocity, tiny.fields().velocity)
    sentence, *_ = reproduce.about(trained, trained, "the command", fields="season.nc")
    assert "held-out frames of `season.nc`, which had no part in training; a loss" in sentence


def test_the_command_says_how_long_continued_runs_were_before(tmp_path, monkeypatch):
    own, asked, lines = flags.FlagValues(), {}, []
    kinds = ("DEFINE_string", "DEFINE_list", "DEFINE_integer", "DEFINE_enum", "mark_flag_as_required")
    defining = {kind: functools.partial(getattr(flags, kind), flag_values=own) for kind in kinds}
    monkeypatch.setattr(reproduce, "flags", SimpleNamespace(**defining))
    reproduce._define_flags()
    own(["reproduce", f"--workdir={tmp_path}", "--only=resume", "--resume_epochs=7"])
    monkeypatch.setattr(reproduce, "FLAGS", own)
    monkeypatch.setattr(reproduce, "models_of", lambda *_: [("attention", "plain")])
    monkeypatch.setattr(reproduce, "run_sweeps", lambda *_, **__: None)
    monkeypatch.setattr(reproduce, "gather", lambda *_, **options: asked.update(options))
    monkeypatch.setattr(reproduce, "about", lambda _, __, line, *___: lines.append(line))
    monkeypatch.setattr(reproduce.findings, "write", lambda _, out, __: lines.append(out.name) or {})
    reproduce.main([])
    assert asked["length"] == resumption.Length(before=7)
    # The page of all parts, which may be there, is another one.
    assert lines.pop() == "reproduction_resume.md"
    own(["reproduce", "--only="])
    reproduce.main([])
    assert lines.pop() == "reproduction.md"
    assert lines.pop() == "python -m jax_repaint.reproduce --workdir=WORKDIR --resume_epochs=7"
    assert lines == ["python -m jax_repaint.reproduce --workdir=WORKDIR --resume_epochs=7 --only=resume"]


NAMES = ("head_to_head", "equal_weight")
LOSSES = ("held_out_loss", "held_out_loss_of_linear")


@pytest.fixture(scope="module")
def finished(folder):
    one = str(folder / "model")
    reproduce.run_sweeps(folder / "work", one, one, NAMES, frames=2, changes=changes(folder))
    return folder / "work"


@pytest.mark.slow
def test_sweeps_run_once_and_become_a_page(folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "repaint_sweep", None)
    one = str(folder / "model")
    reproduce.run_sweeps(finished, one, one, NAMES, frames=2, changes=changes(folder))
    evidence = reproduce.gather(finished, one, one, NAMES, frames=2, changes=changes(folder))
    rows = evidence.sweeps["head_to_head"]
    assert len(rows) == 5 * 2
    assert set(rows["members"]) == {1}
    assert np.isfinite(rows["mse_member"]).all()
    assert set(evidence.sweeps["equal_weight"]["members"]) == {8}
    assert 0.2 < evidence.weight < 1
    imported = model.load(folder / "model")
    bare = {key: imported.training[key] for key in imported.training if key not in ("step", *LOSSES)}
    model.save(dataclasses.replace(imported, training=bare), tmp_path / "imported")
    about = reproduce.about(one, str(tmp_path / "imported"), "the command")
    assert about[-1].splitlines()[-1].split(" | ")[5:8] == ["–"] * 3
    findings.write(evidence, tmp_path / "page.md", reproduce.about(one, one, "the command"))
    text = (tmp_path / "page.md").read_text()
    assert "| attention | `test` |" in text
    assert "`head_to_head`: 2 frames, 1 member, line:3" in text


def test_stages_have_the_same_noise_until_the_variance_is_flat(folder):
    """The threshold stage is the first one whose weight is 1 everywhere in the sampler's own arithmetic."""
    from jax_repaint import sample
    from jax_repaint.study import Cases, open_study

    one = str(folder / "model")
    study = open_study(reproduce.sweep_config("head_to_head", one, one, frames=2, **changes(folder)))
    weight, threshold = reproduce.variance_facts(study)
    (case,) = Cases(study, study.models[one], "seed_gp").make(study.cases[False][:1])
    missing = np.broadcast_to(case.known.missing, case.known.prior_variance.shape)
    variance = case.known.prior_variance
    for stage in range(1, threshold + 1):
        doubt = np.asarray(sample.doubt(variance, case.known.missing))[missing]
        assert (doubt.min() == 1) == (stage == threshold)
        if stage == 1:
            assert weight == pytest.approx((0.2 + 0.8 * doubt.astype(float) ** 3).mean(), rel=1e-5)
        variance = variance * np.float32(0.1)


def test_sizes_and_models_of_the_sweeps():
    for name, size in reproduce.SWEEPS.items():
        config = reproduce.sweep_config(name, "a", "b")
        assert (config.frames, config.members) == (size.frames, size.members)
        assert points.read_points(config)
        full = reproduce.sweep_config(name, "a", "b", "full")
        assert full.frames == 128
        assert reproduce.sweep_config(name, "a", "b", frames=3).frames == 3
    for file in (reproduce.CONFIGS / "sweeps").glob("*.py"):
        # Eight ask what this page does not.
        others = {"coverage", "distance", "methods", "models", "start_level", "even_gamma", "var_decay", "cg_steps"}
        assert file.stem in {size.file or name for name, size in reproduce.SWEEPS.items()} | others
    pairs = points.read_points(reproduce.sweep_config("attention", "a", "b", again=[("c", "d")]))
    assert [point.model for point in pairs] == list("aabbccdd")
    assert [pairs[n].label for n in (0, 2, 4, 7)] == ["attention, plain", "standard, plain", "attention 2, plain",
                                                      "standard 2, adaptive"]  # fmt: skip
    uniform = reproduce.sweep_config("equal_weight", "a", "b")
    assert [point.method for point in points.read_points(uniform)] == ["gp_init", "adaptive", "uniform"]


def test_levels_of_models_of_different_ranges(folder):
    """Each is asked within its range, and all at the last step of the schedule."""
    fields = readers.read(folder / "tiny.nc")
    models = {form: tiny.model(form, fields) for form in ("eps", "anchored")}
    split = data_of(models["eps"], str(folder / "tiny.nc"))[1]
    found = reproduce.errors_by_level(models, fields, split, 4, 4)
    last = float(models["eps"].steps.sigma[-1])
    for form, largest in (("eps", last), ("anchored", 130)):
        assert found[form]["sigma"].max() == pytest.approx(largest)
        assert last in found[form]["sigma"].to_numpy()
    text = findings.by_level(dataclasses.replace(make_evidence(names=()), levels=found)).table
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")][1:4:2] == ["130", "–"]


def test_blocks_of_continued_runs_are_of_the_frames_that_there_are(tmp_path, monkeypatch):
    """Of 47 validation frames where 256 are asked for, in blocks of a quarter at most."""
    made = make_resumption()
    monkeypatch.setattr(resumption, "_train", lambda *_: (made.curves, made.losses))
    split = Split(np.arange(8000), np.arange(8020, 8067), np.arange(8100, 8150), decorrelation=12)
    found = resumption.run(tiny.model(), tiny.fields(), split, tiny.config(), tmp_path, resumption.Length(held_out=256))
    assert found.block == 11
    assert f"loss on {FRAMES} frames of the validation part" in findings._length(found)


def test_an_epoch_of_continued_runs_has_no_more_steps_than_batches(tmp_path, monkeypatch):
    """As those beyond would all be of the last batch."""
    made, lengths = make_resumption(), []
    monkeypatch.setattr(resumption, "_train", lambda *given: lengths.append(given[-1]) or (made.curves, made.losses))
    split, config = Split(np.arange(190), np.arange(203, 250), np.arange(275, 365), decorrelation=12), tiny.config()
    config.train.batch = 16
    found = resumption.run(tiny.model(), tiny.fields(), split, config, tmp_path / "a", resumption.Length(dispatch=4))
    assert [length.epoch for length in lengths] == [found.length.epoch] == [8]
    config.train.batch = 64
    with pytest.raises(InputError, match="continued runs need 4 batches of training frames, there are 2"):
        resumption.run(tiny.model(), tiny.fields(), split, config, tmp_path / "b", resumption.Length(dispatch=4))
    steps = make_steps(tiny.config(batch=4, dispatch=1), None, None, Plan(20, 1, 20), jnp.ones((8, 12, 1)))
    with pytest.raises(ValueError, match="41 frames are fewer than 20 batches of 4 x 1"):
        steps(State(*(jnp.zeros(()) for _ in State._fields))._replace(step=jnp.int32(0)), jnp.zeros((41, 8, 12, 2)))


def test_continued_runs_in_one_folder_exclude_each_other(tmp_path, monkeypatch):
    made = make_resumption()
    monkeypatch.setattr(resumption, "_train", lambda *_: (made.curves, made.losses))
    split = Split(np.arange(800), np.arange(820, 867), np.arange(900, 950), decorrelation=12)
    arguments = tiny.model(), tiny.fields(), split, tiny.config(), tmp_path
    with locks.locked(tmp_path), pytest.raises(InputError, match=r"another training is running in .* \(process "):
        resumption.run(*arguments)
    resumption.run(*arguments)


@pytest.mark.slow
def test_continued_runs_are_trained_once(folder, tmp_path, monkeypatch):
    tiny.register(monkeypatch)
    trained, fields = tiny.model(), tiny.fields()
    split = Split(**{k: np.arange(*v) for k, v in trained.training["parts"].items()}, decorrelation=0.7)
    length = resumption.Length(epoch=6, before=3, after=2, held_out=6, dispatch=3)
    arguments = trained, fields, split, tiny.config()
    found = resumption.run(*arguments, tmp_path, length)
    last = found.curves.groupby("branch")["loss"].last()
    for name in ("before", *resumption.BRANCHES):
        assert found.losses[name].mean() == pytest.approx(last[name], rel=1e-5)
    assert (np.diff(found.curves[found.curves["branch"].isin(["before", "continued"])]["loss"]) < 0).all()
    # 12 steps of an average with decay .9999 are a thousandth of the way.
    assert found.losses[resumption.AVERAGED].mean() == pytest.approx(last["before"], rel=1e-3)
    # From the same moments AdamW goes where Adam goes, but for a decay of 1e-4.
    assert last["loaded"] == pytest.approx(last["continued"], rel=0.05)
    assert "train.weight_decay: 0.0001 there, 0.001 here" in found.refusal
    # Stopped in the second epoch of `loaded`, it goes on after the first; a file that is damaged is made again.
    stopped, steps, put = tmp_path / "stopped", [], resumption._Kept.put

    def stopping(kept, branch, state, losses):
        if (branch, len(losses)) == ("loaded", 2):
            raise KeyboardInterrupt
        put(kept, branch, state, losses)

    def counting(*given, **options):
        dispatch = make_steps(*given, **options)
        return lambda *now: steps.append(now) or dispatch(*now)

    with monkeypatch.context() as patch:
        patch.setattr(resumption._Kept, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            resumption.run(*arguments, stopped, length)
    with pytest.raises(InputError, match=rf"{stopped} holds another experiment"):
        resumption.run(*arguments, stopped, dataclasses.replace(length, after=3))
    (stopped / "unfinished" / "continued.npz").write_bytes(b"no states")
    monkeypatch.setattr(resumption, "make_steps", counting)
    resumed = resumption.run(*arguments, stopped, length)
    assert len(steps) == 2 * (2 + 1 + 3 * 2)
    pd.testing.assert_frame_equal(resumed.curves, found.curves, check_exact=True)
    pd.testing.assert_frame_equal(resumed.losses, found.losses, check_exact=True)
    assert sorted(path.name for path in stopped.iterdir()) == [
        "curves.csv", "lock", "lock.0", "losses.csv", "settings.json"
    ]  # fmt: skip
    monkeypatch.setattr(resumption, "_train", None)
    again = resumption.run(*arguments, tmp_path, length)
    pd.testing.assert_frame_equal(again.curves, found.curves)
    pd.testing.assert_frame_equal(again.losses, found.losses)
    with pytest.raises(InputError, match="holds another experiment"):
        resumption.run(*arguments, tmp_path, dataclasses.replace(length, after=3))
    for name, words in (("losses.csv", "has no column 'before'"), ("settings.json", "its folder moved away")):
        (tmp_path / name).write_text("half,a")
        with pytest.raises(InputError, match=rf"{name} .*{words}"):
            resumption.run(*arguments, tmp_path, length)


def test_rates_of_the_branches():
    length = resumption.Length(before=15, after=6)
    rates = resumption.rates(1.0, length)
    assert rates["continued"](5.0) == 1
    # Fast-forwarded to a quarter of its way, and the same for a whole epoch.
    assert 0.8 < rates["loaded"](0.0) < 0.9
    assert rates["loaded"](0.9) == rates["loaded"](0.0) > rates["loaded"](1.0)
    assert rates["weights"](0.0) == pytest.approx(1e-3)
    assert rates["weights"](1.0) == 1
    assert rates["decayed"](0.0) == 1
    assert rates["decayed"](6.0) == pytest.approx(0, abs=1e-12) == rates["weights"](6.0)


def test_models_are_trained_once(folder, tmp_path, monkeypatch):
    tiny.register(monkeypatch)
    path = tmp_path / "tiny_run.py"
    path.write_text("import tiny\n\ndef get_config(arg=''):\n    return tiny.config()\n")
    calls, seeds = [], []

    def trained(config, workdir):
        calls.append(workdir)
        seeds.append(config.train.seed)
        made = model.load(folder / "model")
        shutil.copytree(folder / "model", workdir / "model", dirs_exist_ok=True)
        (workdir / "log.csv").write_text("epoch,step\n1,5\n3,15\n")
        (workdir / "checkpoints" / "last" / "15").mkdir(parents=True, exist_ok=True)
        return made

    monkeypatch.setattr(train, "train", trained)
    for _ in range(2):
        assert reproduce.trained_model(path, tmp_path / "run") == str(tmp_path / "run" / "model")
    assert calls == [tmp_path / "run"]
    # The log has the last epoch before its state is written: killed in between, the training goes on.
    (tmp_path / "run" / "checkpoints" / "last" / "15").rmdir()
    reproduce.trained_model(path, tmp_path / "run")
    assert calls == 2 * [tmp_path / "run"]
    configs = ("configs/micro.py", str(path))
    given, made = str(folder / "model"), str(tmp_path / "models" / "tiny_run" / "model")
    assert reproduce.models_of(tmp_path, ([given], []), configs, 2) == [(given, made)]
    again = str(tmp_path / "models" / "tiny_run_1" / "model")
    assert reproduce.models_of(tmp_path, ([given, given], []), configs) == [(given, made), (given, again)]
    assert seeds[-2:] == [0, 1]
    monkeypatch.setattr(train, "train", lambda *_: None)
    with pytest.raises(reproduce.Interrupted):
        reproduce.trained_model(path, tmp_path / "stopped")

    def diverge(*_):
        raise train.Diverged("the loss is not finite")

    # Which commands say in one line.
    monkeypatch.setattr(train, "train", diverge)
    with pytest.raises(InputError, match="the loss is not finite"):
        reproduce.trained_model(path, tmp_path / "diverged")


def test_fields_that_do_not_go_with_a_training_are_refused_before_it(folder, tmp_path, monkeypatch):
    tiny.register(monkeypatch)
    path = tmp_path / "own.py"
    path.write_text(
        "import tiny\n\ndef get_config(arg=''):\n    config = tiny.config()\n"
        f"    config.data.fields = {str(folder / 'tiny.nc')!r}\n    return config\n"
    )
    trained = []
    monkeypatch.setattr(reproduce, "trained_model", lambda path, workdir, again: trained.append(path) or str(path))
    given = [str(folder / "model")]
    other = tiny.fields(20, seed=8)
    own, other_file, moved = folder / "tiny.nc", tmp_path / "other.nc", tmp_path / "moved.nc"
    readers.write(other, other_file)
    readers.write(dataclasses.replace(other, lat=other.lat + 1), moved)

    def models_of(named, configs, fields):
        return reproduce.models_of(tmp_path, named, configs, 1, str(fields))

    twin_and_own = ("configs/micro.py", str(path))
    for named, fields, message in (
        (([], given), other_file, r"is to be trained on another grid: \(44, 94\)"),
        ((given, []), moved, r"the model was trained on another grid"),
        ((given, given), own, r"tiny\.nc is what a model was trained on"),
    ):
        with pytest.raises(InputError, match=message):
            models_of(named, twin_and_own, fields)
    with pytest.raises(InputError, match=r"tiny\.nc is what a model is to be trained on"):
        models_of(([], []), (str(path), "configs/micro.py"), own)
    assert not trained
    assert models_of((given, []), twin_and_own, other_file) == [(given[0], str(path))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: reproduce.check_names(["gamma", "magic"]), "'magic' is not one of head_to_head, "),
        (lambda path: reproduce.models_of(path, ([str(path)], [str(path)]), ("a.py", "b.py")), "no model in"),
        (lambda path: reproduce.models_of(path, ([], []), ("a.py", "b.py")), "a.py is missing"),
        (
            lambda path: reproduce.models_of(path, (["a", "b"], ["c"]), ("a.py", "b.py")),
            "in pairs, but 2 and 1 are named",
        ),
        (lambda path: reproduce.models_of(path, ([], []), ("a.py",)), "configs are two files"),
        (lambda path: reproduce.models_of(path, ([], []), ("a/micro.py", "b/micro.py")), "configs are two files"),
    ],
)
def test_mistakes_are_named(tmp_path, call, message):
    with pytest.raises(InputError, match=message):
        call(tmp_path)
