"""Calibration where the best weight, spread and interval follow from the Gaussians that fields are drawn from."""

import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr
from scipy import optimize, signal, special, stats

from jax_repaint import calibrate, calibration, evaluate, guide, inpaint, methods, metrics, model, report, unfinished
from jax_repaint.calibration import NO_EVIDENCE, Calibration, Gate
from jax_repaint.cases import OBSERVATION_ERROR, hold_out, hold_out_of, make_cases, prior_of
from jax_repaint.data import readers
from jax_repaint.data.fields import Split
from jax_repaint.errors import InputError
from jax_repaint.methods import gate_evidence, run_method

SHAPE = (9, 16)
SCORED = np.indices(SHAPE)[1] != 5
# From near an observation to far from it, (m/s)^2.
VARIANCE = (0.002 * np.exp(0.12 * np.abs(np.indices(SHAPE)[1] - 5)))[..., None] ** 2 * np.array([1.0, 0.5])


def draw(
    blocks, members=8, *, error=0.5, noise=0.8, antithetic=False, uneven=0.0, each=1, skill=True, seed=0
):  # fmt: skip
    """Fields whose prior is off by e ~ N(0, v) and whose infinite ensemble is off by e' ~ N(0, error v), independent.

    Members lie N(0, noise v) around the infinite ensemble's mean. Blocks of `each` frames share a factor of all errors
    with a standard deviation of `uneven` in its logarithm. Without skill the ensemble lies around the prior.
    """
    rng = np.random.default_rng(seed)
    fields = SimpleNamespace(truth=[], prior_mean=[], prior_variance=[], members=[], scored=[], block=[])
    for block in range(blocks):
        level = np.exp(uneven * rng.normal())
        for _ in range(each):
            std = level * np.sqrt(VARIANCE)
            truth = rng.normal(size=(*SHAPE, 2))
            prior = truth + std * rng.normal(size=std.shape)
            centre = (truth if skill else prior) + math.sqrt(error) * std * rng.normal(size=std.shape)
            deviation = math.sqrt(noise) * std * rng.normal(size=(members // (1 + antithetic), *std.shape))
            if antithetic:
                deviation = np.stack([deviation, -deviation], 1).reshape(members, *std.shape)
            prior[0], ensemble = np.where(SCORED[0, :, None], prior[0], np.nan), centre + deviation
            fields.truth.append(truth)
            fields.prior_mean.append(prior)
            fields.prior_variance.append(VARIANCE)
            fields.members.append(np.where(SCORED[..., None], ensemble, np.nan).astype(np.float32))
            fields.scored.append(SCORED)
            fields.block.append(block)
    return fields


def fit(fields, antithetic=False, **settings):
    return calibration.fit(**vars(fields), **({"method": "kalman", "antithetic": antithetic} | settings))


def applied(made, fields):
    parts = zip(fields.prior_mean, fields.prior_variance, fields.members, strict=True)
    return [made.apply(*part) for part in parts]


def errors(fields, members):
    """Mean square errors of the prior and of the mean of `members`, and spread over error of the latter."""
    antithetic = np.allclose(members[0][0] + members[0][1], 2 * members[0].mean(0), atol=1e-5, equal_nan=True)
    scores = []
    for truth, prior, ensemble in zip(fields.truth, fields.prior_mean, members, strict=True):
        variance = metrics.ensemble_variance(ensemble[:, SCORED], antithetic).mean()
        mse = [metrics.mse(estimate, truth, SCORED) for estimate in (prior, ensemble.mean(0))]
        scores.append([*mse, variance])
    prior, mean, variance = np.mean(scores, 0)
    return prior, mean, metrics.spread_skill(variance, mean, len(members[0]), antithetic)


@pytest.fixture(scope="module")
def fields():
    return draw(30, each=2)


@pytest.fixture(scope="module")
def made(fields):
    return fit(fields, patterns=("line:4", "walk:9"), seed=3)


# --- the weight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("error", "noise", "members"), [(0.5, 0.8, 8), (0.2, 1.0, 4), (2.0, 3.0, 16)])
def test_the_weight_is_the_best_one(error, noise, members, antithetic):
    fields = draw(40, members, error=error, noise=noise, antithetic=antithetic)
    made = fit(fields, antithetic)
    # e d = v and d^2 = v (1 + error + noise / M) on average; pairs cancel the noise of the mean.
    best = 1 / (1 + error + (0 if antithetic else noise / members))
    np.testing.assert_allclose(made.weight, best, atol=0.04)
    prior, fused, ratio = errors(fields, applied(made, fields))
    assert fused / prior == pytest.approx(1 - best, abs=0.03)
    assert ratio == pytest.approx(1, abs=0.01)


def test_small_ensembles_are_trusted_less():
    weights = [np.mean(fit(draw(30, count, noise=2.0)).weight) for count in (2, 4, 16)]
    np.testing.assert_allclose(weights, [1 / (1.5 + 2 / count) for count in (2, 4, 16)], atol=0.02)
    assert weights[0] < weights[1] < weights[2]


def test_an_ensemble_without_skill_is_not_trusted():
    weights, ratios = [], []
    for seed in range(20):
        made = fit(draw(20, skill=False, seed=seed))
        fresh = draw(20, skill=False, seed=1000 + seed)
        prior, fused, _ = errors(fresh, applied(made, fresh))
        weights.append(made.weight)
        ratios.append(fused / prior)
    # The guard lets a 5 % quantile pass, so about one weight in twenty is not zero, and small.
    assert np.mean(np.array(weights) == 0) > 0.85
    assert np.max(weights) < 0.15
    assert np.mean(ratios) < 1.002


@pytest.mark.parametrize(("error", "noise"), [(0.5, 0.8), (3.0, 6.0), (20.0, 1.0)])
def test_no_worse_than_the_prior_on_fresh_fields(error, noise):
    made = fit(draw(20, error=error, noise=noise, uneven=0.3))
    fresh = draw(60, error=error, noise=noise, uneven=0.3, seed=1)
    prior, raw, _ = errors(fresh, fresh.members)
    _, fused, ratio = errors(fresh, applied(made, fresh))
    best = 1 - 1 / (1 + error + noise / 8)
    assert fused < min(prior, raw)
    assert fused / prior == pytest.approx(best, abs=0.02)
    assert ratio == pytest.approx(1, abs=0.1)


def test_rising_weights_are_the_isotonic_regression():
    rng = np.random.default_rng(0)
    products, squares = rng.normal(size=(50, 6)) + 1, rng.uniform(0.1, 3, (50, 6))
    expected = [
        optimize.isotonic_regression(over / under, weights=under).x
        for over, under in zip(products, squares, strict=True)
    ]
    np.testing.assert_allclose(calibration._ratio(products, squares, True), expected, rtol=1e-9)
    np.testing.assert_array_equal(calibration._ratio(products, squares, False), products / squares)


def test_weights_rise_only_where_that_helps():
    rng = np.random.default_rng(0)
    squares = np.ones((30, 6))

    def chosen(weight):
        noise = 0.3 * rng.normal(size=(200, 30, 6))
        return np.mean([calibration._rising_is_better(weight + one, squares) for one in noise])

    assert chosen(np.full(6, 0.5)) > 0.8
    assert chosen(np.linspace(0.4, 0.6, 6)) > 0.85
    assert chosen(np.linspace(0.9, 0.1, 6)) == 0


def test_the_guard_is_for_each_bin():
    noise = np.random.default_rng(0).normal(size=(30, 6))
    noise -= noise.mean(0)
    # Standard errors are 0.18 for the first two, 0.018 for the next three and 0.9 for the last.
    products = np.array([0.0, 0.1, 0.9, 1.3, -0.2, 0.9]) + noise * [1, 1, 0.1, 0.1, 0.1, 5]
    drawn = calibration._resamples(30, 0)
    assert (drawn.sum(1) == 30).all()
    weight = calibration._weights(products, np.ones((30, 6)), False, drawn)
    np.testing.assert_allclose(weight, [0, 0, 0.9, 1, 0, 0])


def test_the_guard_of_few_blocks_is_that_of_student():
    """Of six blocks a bin whose mean is 1.9 standard errors above zero is not told from none, one at 2.8 is."""
    scores = stats.norm.ppf((np.arange(6) + 0.5) / 6)
    products = 0.1 * scores[:, None] + 0.1 * scores.std() / math.sqrt(6) * np.array([1.9, 2.8])
    lower = products.mean(0) + stats.t.ppf(0.05, 5) * products.std(0, ddof=1) / math.sqrt(6)
    np.testing.assert_array_equal(lower > 0, [False, True])
    weight = calibration._weights(products, np.ones((6, 2)), False, calibration._resamples(6, 0))
    np.testing.assert_allclose(weight, [0, products[:, 1].mean()], rtol=1e-6)


# --- spread and interval ------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("narrow", [0.4, 1.0, 1.5])
def test_a_known_factor_of_the_spread_is_found(narrow, antithetic):
    # The prior knows next to nothing; truth and members / narrow are draws of the same Gaussian.
    members = 6
    fields = draw(40, members, error=0, noise=narrow**2, antithetic=antithetic)
    rng = np.random.default_rng(5)
    for i, truth in enumerate(fields.truth):
        fields.truth[i] = truth + np.sqrt(VARIANCE) * rng.normal(size=truth.shape)
        fields.prior_mean[i] = truth + 100 * np.sqrt(VARIANCE) * rng.normal(size=truth.shape)
    made = fit(fields, antithetic)
    np.testing.assert_allclose(made.weight, 1, atol=0.01)
    factor, own = (1, 0) if antithetic else ((members + 1) / members, narrow**2 / members)
    expected = math.sqrt((1 + own) / factor) / narrow
    np.testing.assert_allclose(made.spread, expected, rtol=0.06)
    if narrow == 1:
        assert expected == 1
    assert errors(fields, applied(made, fields))[2] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("antithetic", [False, True])
def test_spread_equals_error_on_fresh_fields(antithetic):
    made = fit(draw(60, antithetic=antithetic, noise=0.1), antithetic)
    fresh = draw(60, antithetic=antithetic, noise=0.1, seed=1)
    assert errors(fresh, fresh.members)[2] < 0.5
    assert errors(fresh, applied(made, fresh))[2] == pytest.approx(1, abs=0.03)
    assert made.held_out["spread_skill"] == pytest.approx(1, abs=0.03)


def test_held_out_blocks_foretell_fresh_fields():
    fields, fresh = (draw(60, uneven=0.2, noise=0.3, seed=seed) for seed in (0, 1))
    made = fit(fields)
    prior, raw, ratio = errors(fields, fields.members)
    said = made.held_out
    np.testing.assert_allclose(
        [said["mse_prior"], said["mse_raw"], said["spread_skill_raw"]], [prior, raw, ratio], 1e-5
    )
    assert said["mse_fused"] > errors(fields, applied(made, fields))[1]
    prior, fused, _ = errors(fresh, applied(made, fresh))
    assert said["mse_fused"] / said["mse_prior"] == pytest.approx(fused / prior, rel=0.05)


def test_conformal_with_one_value_a_block_is_the_usual_quantile():
    rng = np.random.default_rng(0)
    for count in (9, 19, 40, 99):
        score = rng.exponential(size=count)
        expected = np.sort(score)[math.ceil(0.9 * (count + 1) - 1e-9) - 1]
        assert calibration.conformal(score, np.arange(count)) == expected
    assert calibration.conformal(rng.exponential(size=800), np.arange(800) % 8) == math.inf


@pytest.mark.parametrize(("blocks", "each"), [(19, 3), (29, 7), (39, 3), (39, 6), (49, 7)])
def test_conformal_reaches_a_level_that_sums_only_nearly_reach(blocks, each):
    score = np.random.default_rng(blocks).permutation(blocks * each).astype(float)
    # In whole numbers: values * each^-1 >= 0.9 (blocks + 1).
    expected = -(-9 * (blocks + 1) * each // 10) - 1
    assert calibration.conformal(score, np.repeat(np.arange(blocks), each)) == expected


def test_conformal_counts_blocks_not_values():
    # Nine blocks of a thousand small scores and one of a few large ones: the large ones weigh a tenth.
    score = np.r_[np.linspace(0, 1, 9000), np.full(10, 5.0)]
    block = np.r_[np.arange(9000) % 9, np.full(10, 9)]
    assert calibration.conformal(score, block, 9.5 / 11) == 5
    assert calibration.conformal(score, block, 8.9 / 11) < 1


@pytest.mark.parametrize("uneven", [0.0, 0.5])
def test_conformal_holds_its_level_over_repeats(uneven):
    rng = np.random.default_rng(1)
    repeats, blocks, values = 2000, 39, 20
    inside = []
    for _ in range(repeats):
        score = np.abs(rng.normal(size=(blocks + 1, values))) * np.exp(uneven * rng.normal(size=(blocks + 1, 1)))
        limit = calibration.conformal(score[:-1].ravel(), np.repeat(np.arange(blocks), values))
        inside.append(np.mean(score[-1] <= limit))
    # The promise: at least 0.90; the price of the unseen block is at most 2 / (n + 1) more.
    error = np.std(inside) / math.sqrt(repeats)
    assert 0.9 - 3 * error < np.mean(inside) < 0.9 + 2 / (blocks + 1) + 3 * error


@pytest.mark.parametrize(("blocks", "noise", "uneven"), [(24, 0.1, 0.3), (48, 0.1, 0.3), (48, 2.0, 0.0)])
def test_the_interval_holds_ninety_per_cent_of_fresh_fields(blocks, noise, uneven):
    inside = []
    for seed in range(12):
        made = fit(draw(blocks, noise=noise, uneven=uneven, seed=seed))
        assert made.promised
        fresh = draw(20, noise=noise, uneven=uneven, seed=1000 + seed)
        for truth, members in zip(fresh.truth, applied(made, fresh), strict=True):
            low, high = made.interval(VARIANCE, members)
            inside.append(((low < truth) & (truth < high))[SCORED].mean(0))
    inside = np.mean(inside, -1)
    error = np.std(inside) / math.sqrt(len(inside))
    assert 0.9 - 3 * error < inside.mean() < 0.9 + 2 / (blocks + 1) + 3 * error


def test_the_scale_is_that_of_blocks_corrected_without_themselves():
    """By learning once more without each block; all maps of variance are alike, and so are the bins."""
    fields = draw(21, noise=0.3, uneven=0.8)
    scores, blocks = [], []
    for block in range(21):
        others = SimpleNamespace(**{name: part[:block] + part[block + 1 :] for name, part in vars(fields).items()})
        members = fit(others).apply(fields.prior_mean[block], VARIANCE, fields.members[block].astype(float))
        error, std = np.abs(fields.truth[block] - members.mean(0)), members.std(0, ddof=1)
        scores.append((error / std)[SCORED].ravel())
        blocks.append(np.full(scores[-1].size, block))
    expected = calibration.conformal(np.concatenate(scores), np.concatenate(blocks))
    np.testing.assert_allclose(fit(fields).scale, expected, rtol=1e-5)


def test_bins_have_scales_of_their_own_where_blocks_allow():
    few, many = (draw(blocks, noise=0.5) for blocks in (30, 50))
    for fields in (few, many):
        # Heavy tails where the prior is sure, none elsewhere: a variance alone does not tell.
        rng = np.random.default_rng(2)
        for i, truth in enumerate(fields.truth):
            near = np.sqrt(VARIANCE) < 0.004
            fields.truth[i] = np.where(near, truth + (rng.random(near.shape) < 0.05) * 0.05, truth)
    few, many = fit(few), fit(many)
    assert len(set(few.scale)) == 1
    assert many.scale[0] < 0.7 * many.scale[-1]


def test_a_bin_that_few_blocks_reach_has_the_scale_of_all():
    block = np.repeat(np.arange(40), 10)
    bins = np.where((block < 5) & (np.arange(block.size) % 2 == 0), 1, 0)
    none, edges = np.zeros(block.size), np.array([0.0, 1.0])
    values = calibration._Values(none, none, none + 1, bins, block, block, edges, none.astype(int), bins.astype(float))
    scale = calibration._scales(values, np.abs(np.random.default_rng(0).normal(size=block.size)), none + 1)
    assert np.isfinite(scale).all()
    assert scale[0] == scale[1]


def test_scales_hold_their_level_where_they_are_interpolated_too():
    """Between two bins of scores that are a hundredfold of each other; what is promised is what maps are made with."""
    rng = np.random.default_rng(0)
    block, share = np.repeat(np.arange(60), 10), rng.random(600)
    none, bins = np.zeros(600), (share > 0.5).astype(int)
    values = calibration._Values(none, none, none + 1, bins, block, block, np.arange(2.0), none.astype(int), share)
    score = np.abs(rng.normal(size=600)) * np.where(bins, 100, 1)
    scale = calibration._scales(values, score, none + 1)
    assert scale[1] > 20 * scale[0]
    assert calibration.conformal(score / np.interp(share, [0, 1], scale), block) == pytest.approx(1)


def test_too_few_blocks_promise_nothing():
    made = fit(draw(18, members=6))
    assert not made.promised
    # Student's quantile at five degrees of freedom, and the variance of a mean of six.
    np.testing.assert_allclose(made.scale, 2.015048 * math.sqrt(7 / 6), rtol=1e-6)
    assert "too few for a promise" in made.describe()
    pairs = fit(draw(18, members=6, antithetic=True), antithetic=True)
    np.testing.assert_allclose(pairs.scale, 2.353363, rtol=1e-6)


def test_nineteen_blocks_promise_one_scale_for_all_bins():
    made = fit(draw(19, members=6))
    assert made.promised
    assert len(set(made.scale)) == 1


# --- on a map -----------------------------------------------------------------------------------------------


def test_a_map_has_no_seams(made):
    variance = np.exp(np.linspace(-16, -4, 1001))[:, None, None] * np.ones((1, 1, 2))
    made = dataclasses.replace(made, weight=tuple(np.linspace(0.1, 0.9, 6)), spread=(1.0, 2.0, 1.0, 3.0, 1.0, 0.5))
    members = np.arange(8.0)[:, None, None, None] * np.ones((8, *variance.shape))
    result = made.apply(np.zeros(variance.shape), variance, members)
    assert np.abs(np.diff(result, axis=1)).max() < 0.3
    # At a centre the bin's own numbers hold, beyond the outermost ones theirs.
    for number, centre in enumerate(made.centres):
        where = np.full((1, 1, 2), math.exp(centre))
        one = made.apply(np.zeros(where.shape), where, members[:, :1])
        expected = made.weight[number] * 3.5 + made.spread[number] * (np.arange(8) - 3.5)
        np.testing.assert_allclose(one[:, 0, 0, 0], expected, atol=1e-6)
    for end in (0, -1):
        expected = made.weight[end] * 3.5 + made.spread[end] * (np.arange(8) - 3.5)
        np.testing.assert_allclose(result[:, end, 0, 1], expected, atol=1e-6)


def test_the_interval_of_pairs_is_as_wide_as_strangers_lie_apart(made):
    """At the centre of a bin, whose own scale holds there: q times the root of half their mean square distance."""
    half = np.random.default_rng(0).normal(size=(4, 1, 1, 2))
    members = np.stack([half, -half], 1).reshape(8, 1, 1, 2)
    pairs = dataclasses.replace(made, antithetic=True, scale=tuple(np.linspace(1, 2, 6)))
    low, high = pairs.interval(np.full((1, 1, 2), math.exp(made.centres[2])), members)
    strangers = [(a - b) ** 2 / 2 for i, a in enumerate(members) for j, b in enumerate(members) if i // 2 != j // 2]
    np.testing.assert_allclose((high - low) / 2, 1.4 * np.sqrt(np.mean(strangers, 0)), rtol=1e-6)
    np.testing.assert_allclose(low + high, 0, atol=1e-12)


def test_land_stays_land_and_the_mean_is_the_fused_one(made, fields):
    prior, members = fields.prior_mean[0], fields.members[0]
    result = made.apply(prior, np.where(SCORED[..., None], VARIANCE, 0), members)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(result), np.isnan(members))
    low, high = made.interval(VARIANCE, result)
    assert low.dtype == high.dtype == np.float32
    assert (low < high)[SCORED].all()
    assert np.isnan(low)[~SCORED].all()
    between = (result.mean(0) - prior) / (members.mean(0) - prior)
    np.testing.assert_allclose(between[SCORED], np.mean(made.weight), atol=0.1)
    shut = made.apply(prior, VARIANCE, members, gate=0.0)
    np.testing.assert_allclose(shut.mean(0)[SCORED], prior[SCORED], atol=1e-5)


def test_one_bin_where_the_prior_is_equally_sure_everywhere():
    fields = draw(20)
    fields.prior_variance = [np.full((*SHAPE, 2), 1e-4)] * 20
    made = fit(fields)
    assert len(made.weight) == 1
    assert errors(fields, applied(made, fields))[2] == pytest.approx(1, abs=1e-3)


# --- the gate -----------------------------------------------------------------------------------------------


def gated(seed):
    """Fields on every other of which the ensemble is far off, and what held-out observations say about it."""
    fields, evidence = draw(40, noise=0.2, seed=seed), []
    rng = np.random.default_rng(seed)
    for i in range(0, 40, 2):
        fields.members[i] = fields.members[i] + (3 * np.sqrt(VARIANCE) * rng.normal(size=VARIANCE.shape)).astype("f4")
    for truth, prior, members in zip(fields.truth, fields.prior_mean, fields.members, strict=True):
        seen = [metrics.mse(estimate, truth, SCORED) for estimate in (prior, members.mean(0))]
        evidence.append(Gate.evidence(*seen, 1.0))
    return fields, evidence


def test_a_gate_shuts_out_frames_that_the_observations_speak_against():
    fields, evidence = gated(0)
    made, without = fit(fields, evidence=evidence), fit(fields)
    assert without.gate is None
    fresh, evidence = gated(1)
    gates = special.expit(np.array(evidence) @ dataclasses.astuple(made.gate))
    assert gates[1::2].min() > 0.9 > 0.7 > gates[::2].max()
    parts = zip(fresh.prior_mean, fresh.prior_variance, fresh.members, gates, strict=True)
    _, open_, _ = errors(fresh, applied(made, fresh))
    _, shut, _ = errors(fresh, [made.apply(*part) for part in parts])
    assert shut < 0.98 * open_
    assert made.gate.of(Gate.evidence(4.0, 1.0, 1.0)) > made.gate.of(Gate.evidence(1.0, 4.0, 1.0))


def test_frames_without_evidence_keep_their_weight():
    fields, evidence = gated(0)
    some = [NO_EVIDENCE if i % 5 == 4 else one for i, one in enumerate(evidence)]
    made, whole = fit(fields, evidence=some), fit(fields, evidence=evidence)
    assert made.gate.of(NO_EVIDENCE) == 1.0
    np.testing.assert_allclose(dataclasses.astuple(made.gate), dataclasses.astuple(whole.gate), rtol=0.5)
    assert fit(fields, evidence=[NO_EVIDENCE] * 40).gate is None
    with pytest.raises(InputError, match="three finite numbers, or none, for each of 40 fields"):
        fit(fields, evidence=[*evidence[:-1], np.array([1.0, np.nan, 0.0])])


def test_a_gate_that_learns_nothing_is_none(fields):
    rng = np.random.default_rng(0)
    evidence = [Gate.evidence(*rng.exponential(size=3)) for _ in fields.truth]
    assert fit(fields, evidence=evidence).gate is None


def test_a_gate_without_evidence_shrinks_towards_trust():
    """Noise of a thousand times the spread hides that a weight of 0.9 were the best."""
    frames, spread = 20, 1e-3
    error = np.tile([0.9 * spread - 1, 0.9 * spread + 1], frames)
    none, frame = np.zeros(2 * frames, int), np.repeat(np.arange(frames), 2)
    values = calibration._Values(
        error, np.full(2 * frames, spread), np.ones(2 * frames), none, frame, frame, np.zeros(1), none,
        np.zeros(2 * frames),
    )  # fmt: skip
    gate = calibration._gate(values, np.ones(1), np.tile([1.0, 0.0, 0.0], (frames, 1)), frames)
    assert gate is not None
    assert gate.of(np.array([1.0, 0.0, 0.0])) == pytest.approx(0.95, abs=0.01)


def test_a_gate_by_hand():
    gate = Gate(0.5, 2.0, -1.0)
    assert gate.of(Gate.evidence(0.3, 0.1, 1.5)) == pytest.approx(
        1 / (1 + math.exp(-(0.5 + 2 * math.log(3) - math.log(1.5))))
    )
    assert 0 <= gate.of(Gate.evidence(0.0, 0.1, 0.0)) <= 1
    for numbers in ((-1, 1, 1), (1, math.nan, 1), (1, 1, math.inf)):
        with pytest.raises(InputError, match="numbers from 0"):
            Gate.evidence(*numbers)


# --- blocks of time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, 0.6, 0.9])
def test_blocks_are_four_integral_times_of_an_autoregression(memory):
    rng = np.random.default_rng(0)
    series = signal.lfilter([1.0], [1.0, -memory], rng.normal(size=20_000))
    length = calibration.independent_length(series)
    assert length == pytest.approx(4 * (1 + memory) / (1 - memory), rel=0.15, abs=1)
    means = series[: 20_000 // length * length].reshape(-1, length).mean(1)
    assert np.corrcoef(means[1:], means[:-1])[0, 1] < 0.12


@pytest.mark.parametrize(("frames", "seed"), [(8, 5), (24, 0), (60, 0)])
def test_a_short_record_has_the_autocorrelations_of_its_zero_padded_series(frames, seed):
    """What correlation by a transform gives, up to a quarter of the record or the first that is not positive."""
    series = signal.lfilter([1.0], [1.0, -0.8], np.random.default_rng(seed).normal(size=frames))
    anomaly = series - series.mean()
    found = signal.correlate(anomaly, anomaly)[frames - 1 :] / np.sum(anomaly**2)
    counted = found[1 : frames // 4 + 1]
    counted = counted[: np.argmax(np.append(counted, 0) <= 0)]
    assert counted.size
    assert calibration.independent_length(series) == math.ceil(4 * (1 + 2 * counted.sum()))


@pytest.mark.parametrize("memory", [0.6, 0.9])
def test_frames_without_a_number_keep_their_place_in_time(memory):
    rng = np.random.default_rng(1)
    series = signal.lfilter([1.0], [1.0, -memory], rng.normal(size=20_000))
    gappy = np.where(rng.random(series.size) < 0.5, np.nan, series)
    length = calibration.independent_length(gappy)
    assert length == pytest.approx(4 * (1 + memory) / (1 - memory), rel=0.2, abs=1)
    assert length > calibration.independent_length(gappy[np.isfinite(gappy)])


@pytest.mark.parametrize("kept", [slice(None, None, 2), slice(3, None, 7)])
def test_lags_without_a_pair_are_between_their_neighbours(kept):
    series = signal.lfilter([1.0], [1.0, -0.98], np.random.default_rng(2).normal(size=20_000))
    some = np.full(series.size, np.nan)
    some[kept] = series[kept]
    assert calibration.independent_length(some) == pytest.approx(calibration.independent_length(series), rel=0.1)


def test_a_series_that_says_nothing_about_time_is_refused():
    for series in ([1.0], np.ones(30), [1.0, np.nan, np.nan]):
        with pytest.raises(InputError, match="two frames that differ"):
            calibration.independent_length(series)
    assert calibration.independent_length(np.arange(3.0)) == 4


# --- on disk and at the door --------------------------------------------------------------------------------


def test_a_calibration_survives_json(made):
    gated_too = dataclasses.replace(made, gate=Gate(0.1, 1 / 3, -2.0))
    assert (made.promises, gated_too.promises) == (True, False)
    assert "90 % interval promised" in made.describe()
    assert "90 % interval without a promise, as a gate" in gated_too.describe()
    for one in (made, gated_too):
        assert Calibration.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert (made.members, made.antithetic, made.frames, made.blocks, made.seed) == (8, False, 60, 30, 3)
    assert made.patterns == ("line:4", "walk:9")
    text = made.describe()
    assert "60 fields in 30 blocks" in text
    assert len(text.splitlines()) == 9


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": [0.5] * 5}, "cannot be made"),
        ({"weight": [0.5] * 5 + [1.5]}, r"\[0, 1\]"),
        ({"spread": [1.0] * 5 + [0.0]}, "positive"),
        ({"scale": [1.0] * 5 + [math.inf]}, "finite"),
        ({"centres": [1.0] * 6}, "increase"),
        ({"centres": [], "weight": [], "spread": [], "scale": []}, "increase"),
        ({"centres": None}, "cannot be made"),
        ({"members": 1}, "2 members or more"),
        ({"members": 2, "antithetic": True}, "4 members or more"),
        ({"members": 7, "antithetic": True}, "pairs"),
        ({"members": 8.0}, "whole number"),
        ({"antithetic": 1}, "true or false"),
        ({"method": None}, "a name"),
        ({"held_out": {"mse_prior": 1}}, "held_out"),
        ({"held_out": [1]}, "cannot be made"),
        ({"gate": {"level": 1.0}}, "cannot be made"),
        ({"gate": 3}, "gate"),
        ({"gate": {"level": 1.0, "error": math.nan, "misfit": 0}}, "finite"),
        ({"colour": 1}, "colour"),
    ],
)
def test_nonsense_is_refused(made, changes, match):
    with pytest.raises(InputError, match=match):
        Calibration.from_json(made.to_json() | changes)


def test_missing_entries_are_named(made):
    content = made.to_json()
    del content["spread"]
    with pytest.raises(InputError, match="spread"):
        Calibration.from_json(content)
    with pytest.raises(InputError, match="named entries"):
        Calibration.from_json([1])


def test_other_ensembles_are_refused(made, fields):
    prior, members = fields.prior_mean[0], fields.members[0]
    with pytest.raises(InputError, match="of 8 members, got 7"):
        made.apply(prior, VARIANCE, members[:7])
    with pytest.raises(InputError, match="of 8 members, got 9"):
        made.interval(VARIANCE, np.r_[members, members[:1]])
    with pytest.raises(InputError, match="do not fit together"):
        made.apply(prior, VARIANCE[1:], members)
    with pytest.raises(InputError, match="different grids"):
        made.apply(prior[1:], VARIANCE, members)
    with pytest.raises(InputError, match=r"no value at \(y=2, x=3\)"):
        made.apply(prior * hole(2, 3), VARIANCE, members)
    with pytest.raises(InputError, match=r"no value at \(y=4, x=0\)"):
        made.interval(VARIANCE * hole(4, 0), members)
    with pytest.raises(InputError, match="gate of a frame"):
        made.apply(prior, VARIANCE, members, gate=1.1)


def hole(y, x):
    """One, and NaN on one cell."""
    field = np.ones((*SHAPE, 1))
    field[y, x] = np.nan
    return field


@pytest.mark.parametrize("blocks", [25, 45])
def test_members_that_agree_where_they_are_wrong_are_refused(blocks):
    """On 3 of 10 rows there is no spread, with one q for all bins and with one for each."""
    fields = draw(blocks, 4)
    for one in fields.members:
        one[:, ::3] = one[:1, ::3]
    alike = 100 * SCORED[::3].sum() / SCORED.sum()
    with pytest.raises(InputError, match=rf"members of kalman agree in {alike:.0f} % of the values and differ"):
        fit(fields)


def test_fields_that_teach_nothing_are_refused():
    def refused(match, antithetic=False, evidence=None, **changes):
        fields = draw(3, 4)
        for name, change in changes.items():
            setattr(fields, name, change(getattr(fields, name)))
        with pytest.raises(InputError, match=match):
            fit(fields, antithetic, evidence=evidence)

    refused("for each field", truth=lambda part: part[1:])
    refused("got .0, 0", **dict.fromkeys(vars(draw(1)), lambda part: []))
    refused("two blocks of time", block=lambda part: [5, 5, 5])
    refused("field 1: .*do not fit", members=lambda part: [part[0], part[1][:3], part[2]])
    refused("field 2: .*do not fit", prior_variance=lambda part: [*part[:2], part[2][1:]])
    refused("2 members or more", members=lambda part: [one[:1] for one in part])
    refused("pairs", True, members=lambda part: [one[:3] for one in part])
    refused("no spread to scale", members=lambda part: [one[:1].repeat(4, 0) for one in part])
    refused("field 1 has no scored cell", scored=lambda part: [part[0], ~part[1] & part[1], part[2]])
    refused("field 0: .*not finite", scored=lambda part: [np.ones(SHAPE, bool)] * 3)
    refused("three finite numbers", evidence=[[1.0, 2.0]] * 3)


# --- with a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return tiny.model("anchored")


@pytest.fixture(scope="module")
def data(trained):
    """Fields that the linear prior of the model draws: nothing is better than its linear estimate."""
    keys = jax.random.split(jax.random.key(3), 60)
    x = np.asarray(jax.jit(jax.vmap(guide.prior_draw, (None, 0)))(trained.gaussian, keys))
    series = tiny.fields()
    velocity = trained.standardiser.restore(x[:, : series.shape[0]])
    return dataclasses.replace(series, velocity=np.where(series.ocean[..., None], velocity, np.nan).astype(np.float32))


@pytest.fixture(scope="module")
def learnt(trained, data):
    return calibrate.learn(
        trained, data.select(np.arange(40)), np.arange(40), ["line:4", "cells:0.2"], "linear_samples",
        block=2, members=6, seed=1,
    )  # fmt: skip


def test_samples_of_the_linear_posterior_have_nothing_to_add(learnt):
    assert np.mean(learnt.weight) < 0.1
    # Their mean is not used, so its own variance is taken off the spread.
    np.testing.assert_allclose(learnt.spread, math.sqrt(6 / 7), rtol=0.15)
    assert np.mean(learnt.spread) == pytest.approx(math.sqrt(6 / 7), rel=0.05)
    assert (learnt.method, learnt.members, learnt.antithetic) == ("linear_samples", 6, False)
    assert (learnt.frames, learnt.blocks, learnt.patterns) == (80, 20, ("line:4", "cells:0.2"))
    assert learnt.promised
    assert learnt.held_out["mse_raw"] / learnt.held_out["mse_prior"] == pytest.approx(7 / 6, rel=0.1)


def identity(method, members, **changed):
    """A calibration that leaves members as they are."""
    held_out = dict.fromkeys(calibration.HELD_OUT, 1.0)
    content = {"method": method, "members": members, "antithetic": True, "centres": [0.0], "weight": [1.0],
               "spread": [1.0], "scale": [metrics.half_width(members, True)], "promised": False, "frames": 2,
               "patterns": ["line:4"], "blocks": 2, "seed": 0, "held_out": held_out}  # fmt: skip
    return Calibration.create(**content | changed)


def test_members_spread_in_observed_cells_as_the_errors_of_observations_leave_it(trained, data):
    """Of an exact denoiser, whose sampler of few levels does not, by draws of its prior."""
    exact = dataclasses.replace(trained, params=jax.tree.map(np.zeros_like, trained.params))
    some = data.select(np.arange(12))
    cases = make_cases(exact, some, np.arange(12), ["cells:0.4"], 0, 0.003)
    raw = run_method("kalman", exact, some, cases, 16)
    made = evaluate.calibrated(exact, identity("kalman", 16), some, cases, raw)
    as_sampled = [(m.mean(0) - f, m.mean(0) + f) for m, f in (
        (members, metrics.half_width(16, True) * raw.spread(i)) for i, members in enumerate(raw.members)
    )]  # fmt: skip

    def inside(intervals, where):
        return np.mean(np.concatenate([
            ((low <= case.truth) & (case.truth <= high))[where(case)].ravel()
            for case, (low, high) in zip(cases, intervals, strict=True)
        ]))  # fmt: skip

    def observed(case):
        return case.observed

    assert inside(as_sampled, observed) < 0.75
    assert 0.87 < inside(made.intervals, observed) < 0.96
    for case, before, after in zip(cases, raw.members, made.members, strict=True):
        others = some.ocean & ~case.observed
        np.testing.assert_allclose(after[:, others], before[:, others], atol=1e-6)
        np.testing.assert_allclose(after.mean(0)[some.ocean], before.mean(0)[some.ocean], atol=1e-6)


def test_observed_cells_keep_a_spread_that_is_larger_and_members_that_agree():
    members = np.array([1.0, -1.0, 2.0, -2.0])[:, None, None, None] * np.array([[1.0, 1.0], [0.01, 0.0]])[None, None]
    prior, variance, seen = np.zeros((1, 2, 2)), np.full((1, 2, 2), 0.25), np.array([[True, True]])
    made = identity("kalman", 4, spread=[1.5]).apply(prior, variance, members, observed=seen)
    std = np.sqrt(metrics.ensemble_variance(members, True))
    np.testing.assert_allclose(made[:, 0, 0], 1.5 * members[:, 0, 0])
    np.testing.assert_allclose(made[:, 0, 1, 0], members[:, 0, 1, 0] * 0.5 / std[0, 1, 0])
    assert (made[:, 0, 1, 1] == 0).all()


def test_a_calibration_learns_from_observations_with_errors(trained, data):
    """As large as methods take them to be, unless another size is given."""
    some, numbers = data.select(np.arange(8)), np.arange(8)

    def learn(**settings):
        return calibrate.learn(trained, some, numbers, ["cells:0.3"], "linear_samples", block=2, members=6, **settings)

    def expected(error):
        cases = make_cases(trained, some, numbers, ["cells:0.3"], 0, error)
        prior = [prior_of(trained, case) for case in cases]
        return calibration.fit(
            [case.truth for case in cases], [mean for mean, _ in prior], [variance for _, variance in prior],
            run_method("linear_samples", trained, some, cases, 6).members,
            [metrics.scored_cells(case.truth, some.ocean, case.observed) for case in cases], numbers // 2,
            method="linear_samples", patterns=["cells:0.3"], error=error or 0.0,
        )  # fmt: skip

    usual, large, true = learn(), learn(error=0.2), learn(error=0)
    assert usual == expected(0.005)
    assert large == expected(0.2)
    assert true == expected(None)
    assert large.held_out["mse_prior"] > 1.1 * true.held_out["mse_prior"]
    assert usual != true
    assert "cells:0.3 with errors of 0.2 m/s;" in large.describe()
    assert "cells:0.3 of true values;" in true.describe()
    older = true.to_json()
    del older["error"]
    assert Calibration.from_json(older) == true
    with pytest.raises(InputError, match="the error of a calibration's observations is a number from 0, got -1"):
        Calibration.from_json(older | {"error": -1})


def test_the_table_has_the_raw_and_the_calibrated_row(trained, data, learnt, tmp_path):
    numbers = np.arange(40, 60)
    ready = dataclasses.replace(trained, calibrations=(learnt,))

    def table(model, members=6, **settings):
        text = evaluate.run(
            model, data.select(numbers), numbers, ["line:4"], ["linear", "linear_samples"], tmp_path,
            members=members, seed=1, **settings,
        )  # fmt: skip
        return text, pd.read_csv(tmp_path / "table.csv").set_index("method")

    text, rows = table(ready)
    assert list(rows.index) == ["linear", "linear_samples", "linear_samples_calibrated"]
    raw, made = rows.loc["linear_samples"], rows.loc["linear_samples_calibrated"]
    assert raw["ratio"] > 1.02
    assert made["ratio"] == pytest.approx(1, abs=0.01)
    assert made["spread_skill"] == pytest.approx(1, abs=0.12)
    assert 0.88 < made["coverage90"] < 0.98
    assert made["crps"] < raw["crps"]
    assert "linear_samples_calibrated" in text
    with xr.open_dataset(tmp_path / "fields.nc") as written:
        assert written.attrs["method"] == "linear_samples_calibrated"
    for without in (table(ready, raw=True), table(trained)):
        pd.testing.assert_frame_equal(without[1].drop(columns="seconds"), rows.iloc[:2].drop(columns="seconds"))
    assert list(table(ready, members=5)[1].index) == ["linear", "linear_samples"]


def test_failed_members_leave_out_the_calibrated_row(trained, data, learnt, tmp_path, monkeypatch, caplog):
    """Rows and files of all methods are there, with the members that are left; the report reads them."""
    numbers, sampled = np.arange(40, 43), run_method

    def failing(*arguments):
        made = sampled(*arguments)
        if arguments[0] == "linear_samples":
            made = dataclasses.replace(made, members=[*made.members[:-1], made.members[-1][:-1]])
        return made

    monkeypatch.setattr(evaluate, "run_method", failing)
    evaluate.run(
        dataclasses.replace(trained, calibrations=(learnt,)), data.select(numbers), numbers, ["line:4"],
        ["linear", "linear_samples"], tmp_path, members=6, seed=1, kept=["linear_samples"],
    )  # fmt: skip
    assert list(pd.read_csv(tmp_path / "table.csv")["method"]) == ["linear", "linear_samples"]
    assert "there is no row linear_samples_calibrated" in caplog.text
    read = report.Ensembles.read(tmp_path / "fields.nc")
    assert read.method == "linear_samples"
    with xr.open_dataset(tmp_path / "fields_linear_samples.nc") as kept:
        assert kept.attrs["method"] == "linear_samples"
    assert [len(read.ensemble(0, frame)) for frame in range(3)] == [6, 6, 5]
    ocean = data.ocean
    np.testing.assert_allclose(read.mean[0, 2][ocean], read.members[0, 2, :5].mean(0)[ocean], rtol=1e-6)
    assert "linear_samples" in report.build(tmp_path)


def test_the_table_takes_intervals_from_the_calibration(trained, data, learnt):
    cases = make_cases(trained, data.select([50]), [50], ["line:4"])
    raw = run_method("linear_samples", trained, data, cases, 6)
    inside = []
    for scale in (1e-6, 1e6):
        wide = dataclasses.replace(learnt, scale=(scale,) * 6)
        results = {"linear_samples": raw, "calibrated": evaluate.calibrated(trained, wide, data, cases, raw)}
        (scores,) = evaluate.score(cases, results, data.ocean).values()
        inside.append([frame.coverage90 for (frame,) in scores.values()])
    assert inside[0][0] == inside[1][0]
    assert [inside[0][1], inside[1][1]] == [0, 1]


def test_validation_frames_alone_are_drawn():
    split = Split(np.arange(40), np.arange(50, 80), np.arange(90, 120))
    drawn = calibrate.pick(split, 12)
    assert set(drawn) <= set(split.validation)
    assert len(set(drawn)) == 12
    assert (np.diff(drawn) > 0).all()
    np.testing.assert_array_equal(calibrate.pick(split, 99), split.validation)
    assert (calibrate.pick(split, 12, seed=1) != drawn).any()


def test_blocks_last_as_long_as_errors_do(trained, data):
    def lasting(frames):
        return dataclasses.replace(data, velocity=np.repeat(data.velocity, frames, 0)[: len(data)])

    assert calibrate.block_length(trained, data, "line:4") < 12
    assert calibrate.block_length(trained, lasting(6), "line:4") >= 20


def test_frames_of_a_block_are_counted_in_the_series(trained, data, monkeypatch):
    """Not among those that are left of it."""
    measured = []
    monkeypatch.setattr(calibration, "independent_length", measured.append)
    numbers = np.sort(np.random.default_rng(0).choice(9 * len(data), len(data), replace=False)) + 5
    for of in (None, numbers):
        calibrate.block_length(trained, data, "line:4", numbers=of)
    assert measured[1].size == np.ptp(numbers) + 1
    np.testing.assert_array_equal(measured[1][numbers - numbers[0]], measured[0])
    assert np.isfinite(measured[1]).sum() == len(data)


def test_blocks_are_of_the_logarithm_of_errors(trained, data):
    """So that days of large errors do not decide alone: the currents grow and fade by a factor of ten here."""
    growth = np.exp(2.3 * np.sin(np.arange(len(data)) / 9))[:, None, None, None]
    uneven = dataclasses.replace(data, velocity=(data.velocity * growth).astype(np.float32))
    numbers = np.arange(len(data))
    cases = make_cases(trained, uneven, numbers, ["line:4"])
    made = run_method("linear", trained, uneven, cases, 1).members
    errors = np.array(
        [metrics.mse(x[0], case.truth, data.ocean & ~case.observed) for x, case in zip(made, cases, strict=True)]
    )
    expected = calibration.independent_length(np.log(errors))
    assert expected != calibration.independent_length(errors)
    assert calibrate.block_length(trained, uneven, "line:4") == expected


def test_every_frame_has_observations_of_its_own_held_out():
    places = np.arange(100, 300, 2)
    held = [hold_out_of(places, seed, frame) for seed in (0, 1) for frame in (4, 5)]
    assert len({tuple(sorted(some)) for some in held}) == 4
    for some in held:
        assert len(set(some)) == 10
        assert set(some) <= set(places)
    assert len(hold_out_of(places[:3], 0, 4)) == 1
    np.testing.assert_array_equal(hold_out_of(places, 1, 5), held[-1])


def test_observations_are_held_out_of_the_second_run(trained, data):
    case, *_ = make_cases(trained, data.select([5]), [5], ["cells:0.3"])
    less, held = hold_out(trained, case)
    assert held.sum() == round(0.1 * case.observed.sum()) > 0
    # A start that was made from all of them knows those that are held out.
    elsewhere = dataclasses.replace(case, offset=np.ones((7, 12, 2), np.float32))
    assert hold_out(trained, elsewhere)[0].offset is None
    np.testing.assert_array_equal(less.observed ^ held, case.observed)
    observed, _ = less.observation.on_grid(trained.padded)
    np.testing.assert_array_equal(np.asarray(observed)[:7], less.observed)
    estimates = [prior_of(trained, one)[0][held] for one in (case, less)]
    misfit = [np.abs(estimate - case.truth[held]).max() for estimate in estimates]
    assert misfit[0] < 3 * OBSERVATION_ERROR < misfit[1]
    (evidence,) = gate_evidence("linear_samples", trained, data, [case], 6)
    variance = prior_of(trained, less)[1][held]
    assert (variance > 2 * prior_of(trained, case)[1][held]).all()
    error = (estimates[1] - case.truth[held]) ** 2
    assert evidence[2] == pytest.approx(np.log(np.mean(error / (variance + OBSERVATION_ERROR**2))), rel=1e-4)
    with pytest.raises(InputError, match="too few to hold some out"):
        hold_out(trained, dataclasses.replace(case, observed=np.eye(7, 12, dtype=bool) & (np.arange(12) == 4)))


def test_a_gate_takes_a_second_run(trained, data, learnt):
    cases = make_cases(trained, data.select([50]), [50], ["cells:0.3"])
    raw = run_method("linear_samples", trained, data, cases, 6)
    open_, shut = (
        evaluate.calibrated(
            trained, dataclasses.replace(learnt, weight=(1.0,) * 6, gate=gate), data, cases, raw
        )
        for gate in (None, Gate(-50.0, 0.0, 0.0))
    )  # fmt: skip
    ocean = data.ocean
    np.testing.assert_allclose(open_.members[0].mean(0)[ocean], raw.members[0].mean(0)[ocean], atol=1e-5)
    np.testing.assert_allclose(shut.members[0].mean(0)[ocean], prior_of(trained, cases[0])[0][ocean], atol=1e-5)
    assert shut.calls == 2 * open_.calls
    calibrate.learn(
        trained, data.select([3, 30]), [3, 30], ["cells:0.3"], "linear_samples", block=9, members=3, gate=True
    )
    observed = cases[0].observed
    one = dataclasses.replace(cases[0], observed=observed & (np.cumsum(observed) == 1).reshape(observed.shape))
    few, known = gate_evidence("linear_samples", trained, data, [one, cases[0]], 6)
    assert np.isnan(few).all()
    np.testing.assert_allclose(known, gate_evidence("linear_samples", trained, data, cases, 6)[0], rtol=1e-5)


def test_fields_whose_members_failed_are_left_out(trained, data, monkeypatch, caplog):
    def failing(name, trained, fields, cases, *arguments):
        made = run(name, trained, fields, cases, *arguments)
        kept = [2 if case.frame == 50 else None for case in cases]
        return dataclasses.replace(made, members=[x[:count] for x, count in zip(made.members, kept, strict=True)])

    def learn(*frames):
        numbers = list(frames)
        chosen = data.select(numbers)
        return calibrate.learn(trained, chosen, numbers, ["line:4"], "linear_samples", block=9, members=3)

    run, expected = run_method, learn(3, 30)
    monkeypatch.setattr(methods, "run_method", failing)
    found = learn(3, 30, 50)
    assert found == expected
    assert "frame 50 with line:4 is left out" in caplog.text
    with pytest.raises(InputError, match="failed in all fields but those of one block"):
        learn(30, 50)


def test_a_stopped_calibration_goes_on_where_it_was(trained, data, tmp_path, monkeypatch):
    numbers, runs = [3, 30], []

    def learn(left=99, kept=True, seed=0):
        """`left` runs of the method before it is stopped."""
        runs.clear()

        def counted(*arguments):
            if len(runs) == left:
                raise KeyboardInterrupt
            runs.append(arguments[3])
            return run_method(*arguments)

        monkeypatch.setattr(methods, "run_method", counted)
        keeper = unfinished.Unfinished(tmp_path / "unfinished") if kept else None
        found = calibrate.learn(
            trained, data.select(numbers), numbers, ["cells:0.3"], "linear_samples", block=9, members=3, seed=seed,
            chunk=3, gate=True, unfinished=keeper,
        )  # fmt: skip
        return found, keeper

    monkeypatch.setattr(unfinished, "WORTH", 0)
    expected, _ = learn(kept=False)
    # Of each of two batches, all observations and nine tenths of them.
    assert len(runs) == 4
    with pytest.raises(KeyboardInterrupt):
        learn(3)
    assert len(list(tmp_path.rglob("*.npz"))) == 3
    found, keeper = learn()
    assert found == expected
    assert len(runs) == 1
    assert learn(seed=1)[0] != expected
    assert len(runs) == 4
    keeper.remove()
    assert len(list(tmp_path.rglob("*.npz"))) == 4


def test_a_pattern_counts_once_however_often_it_is_named(trained, data):
    once, twice = (
        calibrate.learn(trained, data.select([3, 30]), [3, 30], patterns, "linear_samples", block=9, members=3)
        for patterns in (["cells:0.3", "line:4"], ["cells:0.3", "line:4", "cells:0.3"])
    )
    assert once == twice


def test_pairs_are_calibrated_as_pairs(trained, data):
    made = calibrate.learn(trained, data.select([3, 30]), [3, 30], ["line:4"], "kalman", block=9, members=4)
    assert made.antithetic
    # Student's t at two degrees of freedom, one for each pair.
    np.testing.assert_allclose(made.scale, 2.919986, rtol=1e-6)


def test_a_calibration_is_stored_with_the_model(trained, learnt, tmp_path):
    model.save(trained, tmp_path / "model", "bfloat16")
    (tmp_path / "model" / "README.md").write_text("kept")
    assert model.load(tmp_path / "model").calibrations == ()
    weights = (tmp_path / "model" / model.WEIGHTS).read_bytes()
    before = json.loads((tmp_path / "model" / model.DESCRIPTION).read_text())
    model.store_calibration(tmp_path / "model", learnt)
    assert model.load(tmp_path / "model").calibrations == (learnt,)
    assert (tmp_path / "model" / model.WEIGHTS).read_bytes() == weights
    assert json.loads((tmp_path / "model" / model.DESCRIPTION).read_text()) == before | {
        "calibrations": [learnt.to_json()]
    }
    names = ["README.md", model.DESCRIPTION, model.WEIGHTS]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    model.save(model.load(tmp_path / "model"), tmp_path / "copy")
    assert model.load(tmp_path / "copy").calibrations == (learnt,)


def test_a_model_has_a_calibration_for_each_method_and_size(trained, learnt, tmp_path):
    model.save(trained, tmp_path / "model")

    def store(method, members, frames, default=False):
        one = dataclasses.replace(learnt, method=method, members=members, frames=frames)
        model.store_calibration(tmp_path / "model", one, default)
        return model.load(tmp_path / "model")

    def kept():
        return [(one.method, one.members, one.frames) for one in made.calibrations]

    made = store("adaptive", 6, 10)
    made = store("kalman", 8, 20)
    made = store("adaptive", 4, 30)
    assert kept() == [("adaptive", 6, 10), ("kalman", 8, 20), ("adaptive", 4, 30)]
    assert repr(made).endswith("calibrated for 4 and 6 members of adaptive, 8 of kalman)")
    # In the place of the old one, or in front.
    made = store("kalman", 8, 40)
    assert kept() == [("adaptive", 6, 10), ("kalman", 8, 40), ("adaptive", 4, 30)]
    assert inpaint.default_method(made) == "adaptive"
    made = store("kalman", 8, 50, default=True)
    assert kept() == [("kalman", 8, 50), ("adaptive", 6, 10), ("adaptive", 4, 30)]
    assert inpaint.default_method(made) == "kalman"
    assert inpaint.calibration_of(made, "adaptive", 4).frames == 30
    assert inpaint.calibration_of(made, "adaptive", 8) is None


def test_every_calibrated_method_has_its_row(trained, data, learnt, tmp_path, caplog):
    """Each with its own calibration; one of another size is said and left out."""
    numbers = np.arange(40, 44)
    wide = dataclasses.replace(learnt, method="kalman", antithetic=True, spread=(3.0,) * 6)
    large = dataclasses.replace(learnt, method="paste", members=8)
    ready = dataclasses.replace(trained, calibrations=(wide, learnt, large))
    names = ["linear", "linear_samples", "kalman", "paste"]
    evaluate.run(ready, data.select(numbers), numbers, ["line:4"], names, tmp_path, members=6, seed=1)
    rows = pd.read_csv(tmp_path / "table.csv").set_index("method")
    assert list(rows.index) == [
        "linear", "linear_samples", "linear_samples_calibrated", "kalman", "kalman_calibrated", "paste"
    ]  # fmt: skip
    spread = rows["spread_skill"]
    assert spread["kalman_calibrated"] > 2 * spread["kalman"]
    assert spread["linear_samples_calibrated"] < 1.2 * spread["linear_samples"]
    assert "the model's calibration is for 8 members of paste, not for 6" in caplog.text
    with xr.open_dataset(tmp_path / "fields.nc") as written:
        assert written.attrs["method"] == "paste"


def test_models_before_calibration_still_load(trained, learnt, tmp_path):
    model.save(trained, tmp_path / "model")
    path = tmp_path / "model" / model.DESCRIPTION
    text = json.loads(path.read_text())
    older = {name: entry for name, entry in text.items() if name != "calibrations"}
    path.write_text(json.dumps(older))
    assert model.load(tmp_path / "model").calibrations == ()
    path.write_text(json.dumps(older | {"calibration": None}))
    assert model.load(tmp_path / "model").calibrations == ()
    path.write_text(json.dumps(older | {"calibration": learnt.to_json()}))
    assert model.load(tmp_path / "model").calibrations == (learnt,)
    other = dataclasses.replace(learnt, method="adaptive")
    model.store_calibration(tmp_path / "model", other)
    assert model.load(tmp_path / "model").calibrations == (learnt, other)
    path.write_text(json.dumps(text | {"calibrations": [learnt.to_json() | {"weight": [2.0] * 6}]}))
    with pytest.raises(InputError, match="weights of a calibration"):
        model.load(tmp_path / "model")
    for broken, match in ((7, "are a list, got 7"), ([7], "named entries"), (learnt.to_json(), "are a list, got")):
        path.write_text(json.dumps(text | {"calibrations": broken}))
        with pytest.raises(InputError, match=match):
            model.load(tmp_path / "model")


def test_a_calibration_that_cannot_be_stored_leaves_the_model(trained, learnt, tmp_path, monkeypatch):
    model.save(trained, tmp_path / "model")
    with pytest.raises(InputError, match="no model that could be calibrated"):
        model.store_calibration(tmp_path, learnt)
    (tmp_path / model.DESCRIPTION).write_text("[]")
    with pytest.raises(InputError, match="no model that could be calibrated"):
        model.store_calibration(tmp_path, learnt)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        model.store_calibration(tmp_path / "model", learnt)
    assert model.load(tmp_path / "model").calibrations == ()


@pytest.mark.parametrize(
    ("name", "members", "block", "match"),
    [
        ("linear", 4, 1, "'linear' cannot be calibrated"),
        ("magic", 4, 1, "'magic' cannot be calibrated"),
        ("kalman", 5, 1, "antithetic pairs"),
        ("kalman", 2, 1, "needs 4 members"),
        ("adaptive", 1, 1, "needs 2 members"),
        ("adaptive", 4, 0, "at least one frame"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(name, members, block, match):
    with pytest.raises(InputError, match=match):
        calibrate.check(name, members, block)


def test_one_block_of_time_is_refused_before_the_work(trained, data):
    with pytest.raises(InputError, match="one block of time"):
        calibrate.learn(trained, data.select([3, 5]), [3, 5], ["line:4"], "kalman", block=9)


def test_a_calibration_gives_way_only_to_one_from_as_many_blocks(learnt):
    """`learnt` is of 20 blocks."""
    calibrate.check_replaced(None, 2)
    for blocks in (19, 20, 21):
        calibrate.check_replaced(learnt, blocks)
    with pytest.raises(InputError, match=r"more blocks of time, 6 members .* 80 fields in 20 blocks, than the 18 of"):
        calibrate.check_replaced(learnt, 18)
    assert calibrate.blocks_of([0, 1, 7, 8, 29], 4) == 4


def test_the_command_replaces_a_better_calibration_only_when_told(learnt, tmp_path, monkeypatch, caplog, capsys):
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    model.save(tiny.model(data=readers.read(tmp_path / "tiny.nc")), tmp_path / "model")
    better = dataclasses.replace(learnt, members=4)
    model.store_calibration(tmp_path / "model", better)
    flags = {"model": str(tmp_path / "model"), "fields": str(tmp_path / "tiny.nc"), "part": "validation",
             "method": "linear_samples", "members": 4, "frames": 3, "block": 1, "patterns": ["line:4"], "seed": 0,
             "chunk": None, "gate": False, "error": 0.005, "replace": False, "default": False}  # fmt: skip

    def run(**changed):
        monkeypatch.setattr(calibrate, "FLAGS", SimpleNamespace(**flags | changed))
        calibrate.main([])
        return model.load(tmp_path / "model").calibrations

    with pytest.raises(InputError, match="20 blocks, than the 3 of this one"):
        run()
    assert model.load(tmp_path / "model").calibrations == (better,)
    (made,) = run(replace=True)
    assert (made.members, made.blocks) == (4, 3)
    assert (
        "replaces the calibration for 4 members of linear_samples from 80 fields in 20 blocks by one for 4 members of "
        "linear_samples from 3 fields in 3 blocks" in caplog.text
    )
    # One that was put there meanwhile counts; what was learnt is printed.
    learn = calibrate.learn

    def slowly(*args, **options):
        model.store_calibration(tmp_path / "model", better)
        return learn(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "learn", slowly)
        capsys.readouterr()
        with pytest.raises(InputError, match="20 blocks, than the 3 of this one"):
            run()
    assert "3 fields in 3 blocks of time" in capsys.readouterr().out
    assert model.load(tmp_path / "model").calibrations == (better,)
    # Nobody else reads, or writes, what is there while one is put beside it.
    store = model.store_calibration

    def alone(folder, *what):
        handle = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        store(folder, *what)

    monkeypatch.setattr(model, "store_calibration", alone)
    # Without a method it is that of the first calibration.
    (made,) = run(replace=True, method=None)
    assert made.method == "linear_samples"
    # One of another method or size has its place beside it, and is the default only when told.
    caplog.clear()
    assert [one.method for one in run(method="kalman")] == ["linear_samples", "kalman"]
    assert "inpaint takes linear_samples by default; --default makes it kalman" in capsys.readouterr().out
    assert [(one.method, one.members) for one in run(method="kalman", members=6, default=True)] == [
        ("kalman", 6), ("linear_samples", 4), ("kalman", 4)
    ]  # fmt: skip
    assert "by default" not in capsys.readouterr().out
    assert "replaces" not in caplog.text

    def train_on(*args, **options):
        one = model.load(tmp_path / "model")
        later = jax.tree.map(lambda leaf: leaf + 1, one.params)
        model.save(dataclasses.replace(one, params=later, calibrations=()), tmp_path / "model")
        return learn(*args, **options)

    monkeypatch.setattr(calibrate, "learn", train_on)
    with pytest.raises(InputError, match="holds another model than when this began"):
        run()
    assert not model.load(tmp_path / "model").calibrations


def test_the_command_calibrates(tmp_path):
    data = tiny.fields()
    readers.write(data, tmp_path / "tiny.nc")
    model.save(tiny.model(data=readers.read(tmp_path / "tiny.nc")), tmp_path / "model")
    command = ["--model=model", "--fields=tiny.nc", "--method=linear_samples", "--members=4", "--frames=6"]
    done = subprocess.run(
        [sys.executable, "-m", "jax_repaint.calibrate", *command, "--patterns=line:4", "--block=2"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (stored,) = model.load(tmp_path / "model").calibrations
    assert stored.describe() in done.stdout
    assert (stored.method, stored.members, stored.frames) == ("linear_samples", 4, 6)
