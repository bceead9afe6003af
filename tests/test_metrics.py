"""Scores against closed forms, scoringrules, scipy and the known behaviour of exchangeable draws."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scoringrules
from scipy import stats

from jax_repaint import metrics, scoring, structures
from jax_repaint.errors import InputError

SHAPE = (24, 40)


def gaussian_case(members: int, spread: float = 1.0, seed: int = 0, shape: tuple[int, int] = SHAPE):
    """Truth and members around one common field, the members' deviation `spread` times that of the truth."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(*shape, 2))
    truth = centre + rng.normal(size=centre.shape)
    ensemble = centre + spread * rng.normal(size=(members, *centre.shape))
    return truth, ensemble, np.ones(shape, bool)


def antithetic_case(pairs: int, seed: int = 0, shape: tuple[int, int] = (60, 60), spread: float = 1.0):
    truth, noise, scored = gaussian_case(pairs, spread, seed, shape)
    centre = np.random.default_rng(seed).normal(size=truth.shape)
    return truth, np.stack([noise, 2 * centre - noise], 1).reshape(2 * pairs, *truth.shape), scored


def coast(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Ocean with a ragged coast in the north, a headland and two islands."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    ocean = y < shape[0] - 3 - 2 * np.sin(x / 4)
    ocean &= ~((abs(x - 12) < 3) & (y > 12))
    ocean[5, 30] = ocean[8:10, 20:22] = False
    return ocean


def smooth_field(rng: np.random.Generator, scale: float, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(rng.normal(size=(*shape, 2)), (scale, scale, 0), mode="wrap") * 3


# --- cells and errors ---------------------------------------------------------------------------------------


def test_scored_cells_are_ocean_unobserved_and_known():
    ocean = np.array([[True, True, False], [True, True, True]])
    observed = np.array([[True, False, False], [False, False, False]])
    truth = np.zeros((2, 3, 2), np.float32)
    truth[1, 1, 1] = np.nan
    expected = [[False, True, False], [True, False, True]]
    np.testing.assert_array_equal(metrics.scored_cells(truth, ocean, observed), expected)
    with pytest.raises(InputError, match="no cell to score"):
        metrics.scored_cells(truth, ocean, ocean)
    with pytest.raises(InputError, match="different grids"):
        metrics.scored_cells(truth, ocean.T, observed)


def test_errors_by_hand():
    # Errors of (3, 4) on one cell and (0, 0) on the other; a third cell is far off but not scored.
    truth = np.zeros((1, 3, 2))
    estimate = np.array([[[3.0, 4.0], [0.0, 0.0], [99.0, 99.0]]])
    scored = np.array([[True, True, False]])
    mse = metrics.mse(estimate, truth, scored)
    assert mse == 25 / 4
    assert metrics.component_rmse(mse) == 2.5
    # Length of the error vector: sqrt of the mean of 25 and 0.
    assert metrics.vector_rmse(mse) == pytest.approx(math.sqrt(12.5))
    # Means come before the root.
    assert metrics.component_rmse(np.array([1.0, 7.0])) == 2.0


def test_member_error_is_mean_error_plus_variance():
    truth, members, scored = gaussian_case(8)
    scores = scoring.score(truth, members, scored, scored)
    assert scores.mse_member == pytest.approx(scores.mse_mean + members.var(0).mean())


@pytest.mark.parametrize("function", [metrics.fair_crps, metrics.energy_score, metrics.coverage])
def test_input_that_cannot_be_scored_is_named(function):
    truth, members, scored = gaussian_case(4)
    with pytest.raises(InputError, match="two members, got 1 member"):
        function(truth, members[:1], scored)
    with pytest.raises(InputError, match="come in pairs, got 3"):
        function(truth, members[:3], scored, antithetic=True)
    with pytest.raises(InputError, match="two antithetic pairs, got 2"):
        function(truth, members[:2], scored, antithetic=True)
    with pytest.raises(InputError, match="do not fit together"):
        function(truth, members[:, :-1], scored)
    with pytest.raises(InputError, match="do not fit together"):
        function(truth, members[0], scored)
    with pytest.raises(InputError, match="do not fit together"):
        function(truth, members, scored.astype(float))
    members[2, 3, 5, 1] = np.nan
    with pytest.raises(InputError, match=r"a member is not finite at the scored cell \(y=3, x=5\)"):
        function(truth, members, scored)
    scored[3, 5] = False
    assert np.isfinite(function(truth, members, scored))


@pytest.mark.parametrize("degrees", [30, -30, 170])
def test_direction_error_of_turned_vectors(degrees):
    truth, _, scored = gaussian_case(1)
    turn = np.exp(1j * np.radians(degrees))
    turned = (truth[..., 0] + 1j * truth[..., 1]) * turn * np.random.default_rng(1).uniform(0.1, 9, SHAPE)
    estimate = np.stack([turned.real, turned.imag], -1)
    assert metrics.direction_error(estimate, truth, scored, 0.0) == pytest.approx(abs(degrees), rel=1e-12)


def test_direction_error_of_fast_water_by_hand():
    # Speeds 2, 3, 0.5, 1 and 4: off by 90, at rest, slow, on the threshold, not scored.
    truth = np.array([[[2.0, 0], [0, 3], [0.5, 0], [1, 0], [4, 0]]])
    estimate = np.array([[[0.0, -1], [0, 0], [-1, 0], [-1, 0], [-1, 0]]])
    scored = np.array([[True, True, True, True, False]])
    assert metrics.direction_error(estimate, truth, scored, 1.0) == pytest.approx(90)
    assert metrics.direction_error(estimate, truth, scored, 0.9) == pytest.approx((90 + 90 + 180) / 3)
    assert metrics.direction_error(estimate, truth, scored, 2.5) == 90
    assert math.isnan(metrics.direction_error(estimate, truth, scored, 3.0))
    assert metrics.direction_error(truth, truth, scored, 0.0) == 0
    with pytest.raises(InputError, match=r"number of m/s from 0, got -1.0"):
        metrics.direction_error(estimate, truth, scored, -1.0)
    with pytest.raises(InputError, match="do not fit together"):
        metrics.direction_error(estimate[:, 1:], truth, scored, 0.0)


def test_errors_by_distance_by_hand():
    # Columns are 50 m apart and rows 100 m; distances from the observed corner: 50 100 / 100 112 141.
    truth = np.zeros((2, 3, 2))
    mean, baseline = np.zeros((2, 2, 3, 2))
    mean[..., 0] = [[99, 1, 2], [3, 4, 5]]
    baseline[..., 1] = 2
    observed = np.array([[True, False, False], [False, False, False]])
    scored = ~observed
    arguments = (mean, baseline, truth, scored, observed)
    result = metrics.error_by_distance(*arguments, [60, 100, 110, 120, 1000], 50.0, 100.0)
    np.testing.assert_array_equal(result.edges, [60, 100, 110, 120, 1000])
    np.testing.assert_array_equal(result.counts, [0, 2, 1, 1])
    np.testing.assert_array_equal(result.mean, [np.nan, (4 + 9) / 4, 8, 12.5])
    np.testing.assert_array_equal(result.baseline, [np.nan, 2, 2, 2])
    np.testing.assert_array_equal(result.ratio, [np.nan, 13 / 8, 4, 6.25])
    # In cells: 1 and 1, the diagonal, 2 and sqrt 5.
    result = metrics.error_by_distance(*arguments, [0, 1.2, 2, np.inf])
    np.testing.assert_array_equal(result.counts, [2, 1, 2])
    np.testing.assert_array_equal(result.mean, [(1 + 9) / 4, 8, (4 + 25) / 4])


def test_errors_by_distance_from_all_pairs_of_cells():
    rng = np.random.default_rng(0)
    ocean, truth = coast(), rng.normal(size=(*SHAPE, 2))
    truth[~ocean] = np.nan
    mean, baseline = truth + rng.normal(size=(2, *truth.shape))
    edges = np.array([0.0, 70, 130, 300, np.inf])
    frames, pooled = [], []
    for share in (0.05, 0.01):
        observed = ocean & (rng.random(SHAPE) < share)
        scored = metrics.scored_cells(truth, ocean, observed)
        frames.append(metrics.error_by_distance(mean, baseline, truth, scored, observed, edges, 50.0, 80.0))
        gaps = (np.argwhere(scored)[:, None] - np.argwhere(observed)) * [80.0, 50.0]
        squares = [((field - truth)[scored] ** 2).mean(-1) for field in (mean, baseline)]
        pooled.append(np.stack([np.sqrt((gaps**2).sum(-1)).min(1), *squares], 1))
    whole = metrics.DistanceErrors.average(frames)
    distance, *squares = np.concatenate(pooled).T
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (distance >= low) & (distance < high)
        assert whole.counts[i] == inside.sum() > 0
        assert (whole.mean[i], whole.baseline[i]) == pytest.approx([s[inside].mean() for s in squares], rel=1e-12)
    assert whole.counts.sum() == sum(len(p) for p in pooled)
    with pytest.raises(InputError, match="same edges"):
        metrics.DistanceErrors.average([])


def test_errors_by_distance_rejects_what_has_no_distance():
    truth, members, scored = gaussian_case(2)
    observed = np.zeros(SHAPE, bool)
    observed[3, 4] = True
    arguments = (*members, truth, scored)
    with pytest.raises(InputError, match="edges of distance must rise"):
        metrics.error_by_distance(*arguments, observed, [0, 5, 5])
    with pytest.raises(InputError, match="without an observed cell"):
        metrics.error_by_distance(*arguments, ~scored, [0, 5])
    with pytest.raises(InputError, match="positive numbers of metres, got dx=0"):
        metrics.error_by_distance(*arguments, observed, [0, 5], dx=0.0)
    with pytest.raises(InputError, match=r"dy \(24, 40\) is neither one number"):
        metrics.error_by_distance(*arguments, observed, [0, 5], dy=np.ones(SHAPE))
    with pytest.raises(InputError, match="do not fit together"):
        metrics.error_by_distance(members[0], members[1, 1:], truth, scored, observed, [0, 5])


# --- CRPS ---------------------------------------------------------------------------------------------------


def test_crps_equals_all_pairs():
    truth, members, scored = gaussian_case(6)
    scored[::2] = False
    t, m = truth[scored], members[:, scored]
    pairs = np.abs(m[:, None] - m[None]).mean((2, 3))
    independent = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.abs(m - t).mean() - np.mean([pairs[p] for p in independent]) / 2
    assert metrics.fair_crps(truth, members, scored) == pytest.approx(expected, rel=1e-12)
    fair = scoringrules.crps_ensemble(t, m, m_axis=0, estimator="fair", backend="numpy").mean()
    assert metrics.fair_crps(truth, members, scored) == pytest.approx(fair, rel=1e-12)
    strangers = [(i, j) for i, j in independent if i // 2 != j // 2]
    expected = np.abs(m - t).mean() - np.mean([pairs[p] for p in strangers]) / 2
    assert metrics.fair_crps(truth, members, scored, antithetic=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_crps_of_few_draws_is_that_of_their_distribution(members):
    rng = np.random.default_rng(members)
    truth = np.full((200, 200, 2), 0.7)
    ensemble = 0.2 + 1.3 * rng.normal(size=(members, *truth.shape))
    expected = scoringrules.crps_normal(0.7, 0.2, 1.3, backend="numpy")
    error = 5 * 1.3 / np.sqrt(truth.size)
    assert metrics.fair_crps(truth, ensemble, np.ones((200, 200), bool)) == pytest.approx(expected, abs=error)


def test_crps_of_antithetic_draws_needs_partners_left_out():
    rng = np.random.default_rng(1)
    truth = np.full((200, 200, 2), 0.7)
    half = 1.3 * rng.normal(size=(2, *truth.shape))
    ensemble = 0.2 + np.stack([half, -half], 1).reshape(4, *truth.shape)
    expected = scoringrules.crps_normal(0.7, 0.2, 1.3, backend="numpy")
    scored = np.ones((200, 200), bool)
    assert metrics.fair_crps(truth, ensemble, scored, antithetic=True) == pytest.approx(expected, abs=0.01)
    # Partners lie further apart than strangers, which flatters the score.
    assert metrics.fair_crps(truth, ensemble, scored) < expected - 0.05


def brute_energy_score(truth: np.ndarray, members: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    """Energy score of one vector from the definition, over the given ordered pairs of members."""
    apart = [math.dist(members[i], members[j]) for i, j in pairs]
    return np.mean([math.dist(m, truth) for m in members]) - np.mean(apart) / 2


@pytest.mark.parametrize("antithetic", [False, True])
def test_energy_score_by_brute_force(antithetic):
    truth, members, scored = gaussian_case(6, shape=(5, 7))
    scored[::2] = False
    t, m = truth[scored], members[:, scored]
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and not (antithetic and i // 2 == j // 2)]
    cells = [brute_energy_score(t[c], m[:, c], pairs) for c in range(len(t))]
    score = metrics.energy_score(truth, members, scored, antithetic)
    assert score == pytest.approx(np.mean(cells), rel=1e-12)
    whole = brute_energy_score(t.reshape(-1), m.reshape(6, -1), pairs) / math.sqrt(len(t))
    score = metrics.energy_score(truth, members, scored, antithetic, vector="field")
    assert score == pytest.approx(whole, rel=1e-12)


def test_energy_score_of_many_members_on_few_cells():
    truth, members, scored = gaussian_case(260, shape=(2, 3))
    t, m = truth.reshape(-1), members.reshape(260, -1)
    apart = np.linalg.norm(m[:, None] - m, axis=-1).sum() / (260 * 259)
    expected = (np.linalg.norm(m - t, axis=-1).mean() - apart / 2) / math.sqrt(6)
    assert metrics.energy_score(truth, members, scored, vector="field") == pytest.approx(expected, rel=1e-12)


def test_energy_score_of_one_component_is_the_crps():
    truth, members, scored = gaussian_case(5)
    truth[..., 1] = members[..., 1] = 0.3
    assert metrics.energy_score(truth, members, scored) == pytest.approx(2 * metrics.fair_crps(truth, members, scored))


def test_energy_score_of_antithetic_draws_is_that_of_independent_ones():
    truth, members, scored = gaussian_case(8, shape=(60, 60))
    independent = metrics.energy_score(truth, members, scored)
    truth, members, scored = antithetic_case(4)
    assert metrics.energy_score(truth, members, scored, antithetic=True) == pytest.approx(independent, rel=0.02)
    assert metrics.energy_score(truth, members, scored) < 0.97 * independent


def test_energy_score_of_the_field_sees_how_cells_vary_together():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(4, 5, 2))
    truths, members = rng.normal(size=(60, 1, 1, 1)) * pattern, rng.normal(size=(60, 8, 1, 1, 1)) * pattern
    # Shuffling members cell by cell keeps every margin and tears the pattern apart.
    torn = np.stack([rng.permuted(np.broadcast_to(m, (8, 4, 5, 2)), axis=0) for m in members])
    scored = np.ones((4, 5), bool)
    gain = []
    for truth, whole, mixed in zip(truths, members, torn, strict=True):
        gain.append([metrics.energy_score(truth, m, scored, vector="field") for m in (whole, mixed)])
        assert metrics.fair_crps(truth, whole, scored) == pytest.approx(metrics.fair_crps(truth, mixed, scored))
    whole, mixed = np.mean(gain, 0)
    assert whole < 0.97 * mixed


def test_energy_score_rejects_another_vector():
    with pytest.raises(InputError, match="cell or field, got 'frame'"):
        metrics.energy_score(*gaussian_case(4), vector="frame")


# --- spread -------------------------------------------------------------------------------------------------


def test_variance_of_antithetic_draws_is_unbiased():
    _, members, _ = antithetic_case(2, spread=1.5)
    assert metrics.ensemble_variance(members, antithetic=True).mean() == pytest.approx(2.25, rel=0.03)
    assert metrics.ensemble_variance(members).mean() == pytest.approx(2.25 * 4 / 3, rel=0.03)
    independent = gaussian_case(3, 1.5, shape=(60, 60))[1]
    assert metrics.ensemble_variance(independent).mean() == pytest.approx(2.25, rel=0.03)


@pytest.mark.parametrize("members", [2, 5, 16])
def test_spread_skill_of_exchangeable_members_is_one(members):
    scores = [scoring.score(*gaussian_case(members, seed=s), np.ones(SHAPE, bool)) for s in range(8)]
    table = pd.DataFrame([vars(s) for s in scores])
    assert metrics.spread_skill(table.variance, table.mse_mean, members) == pytest.approx(1, abs=0.03)


def test_spread_skill_of_antithetic_members_is_one():
    scores = [scoring.score(*antithetic_case(3, s), np.ones((60, 60), bool), True) for s in range(4)]
    table = pd.DataFrame([vars(s) for s in scores])
    assert metrics.spread_skill(table.variance, table.mse_mean, 6, antithetic=True) == pytest.approx(1, abs=0.03)


def test_spread_skill_averages_before_the_root():
    assert metrics.spread_skill([1.0, 3.0], [2.0, 14.0], 3) == pytest.approx(math.sqrt(4 / 3 * 2 / 8))
    assert metrics.spread_skill(0.0, 2.0, 1) == 0.0
    assert math.isnan(metrics.spread_skill(0.0, 0.0, 1))


# --- coverage and ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 4, 9, 40])
def test_gaussian_interval_covers_its_level_at_any_size(members):
    covered = [metrics.coverage(*gaussian_case(members, seed=s)) for s in range(10)]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("pairs", [2, 8])
def test_gaussian_interval_covers_its_level_with_antithetic_members(pairs):
    covered = [metrics.coverage(*antithetic_case(pairs, s), antithetic=True) for s in range(4)]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("ratio", [0.43, 0.85])
def test_coverage_of_too_little_spread(ratio):
    expected = 2 * stats.norm.cdf(1.6449 * ratio) - 1
    covered = metrics.coverage(*gaussian_case(200, ratio))
    assert covered == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("members", "expected"), [(2, 1 / 3), (5, 4 / 6), (19, 0.9), (39, 0.9), (100, 0.9)])
def test_order_statistics_cover_what_they_promise(members, expected):
    covered = [metrics.coverage(*gaussian_case(members, seed=s), interval="order") for s in range(10)]
    assert np.mean(covered) == pytest.approx(expected, abs=0.012)


def test_order_statistics_of_antithetic_members():
    case = antithetic_case(4)
    assert metrics.coverage(*case, interval="order", antithetic=True) == pytest.approx(3 / 5, abs=0.02)


def test_coverage_rejects_a_level_in_per_cent():
    with pytest.raises(InputError, match="between 0 and 1, got 90"):
        metrics.coverage(*gaussian_case(4), level=90)


def test_rank_histogram_of_exchangeable_members_is_flat():
    truth, members, scored = gaussian_case(6, shape=(100, 100))
    counts = metrics.rank_histogram(truth, members, scored, np.random.default_rng(0))
    assert counts.sum() == truth.size
    assert stats.chisquare(counts).pvalue > 0.001
    narrow = metrics.rank_histogram(*gaussian_case(6, 0.5, shape=(100, 100)), np.random.default_rng(0))
    assert narrow[0] > 1.5 * narrow[3]
    assert narrow[-1] > 1.5 * narrow[3]


def test_rank_histogram_breaks_ties_at_random():
    truth, members, scored = gaussian_case(4, shape=(100, 100))
    counts = metrics.rank_histogram(np.round(truth), np.round(members), scored, np.random.default_rng(0))
    assert stats.chisquare(counts).pvalue > 0.001
    equal = metrics.rank_histogram(truth, np.stack([truth] * 4), scored, np.random.default_rng(0))
    assert stats.chisquare(equal).pvalue > 0.001


def test_rank_histogram_counts_halves_of_antithetic_members():
    counts = metrics.rank_histogram(*antithetic_case(4), np.random.default_rng(0), antithetic=True)
    assert counts.shape == (5,)
    assert counts.sum() == 2 * 60 * 60 * 2
    # Both halves see one truth, so the counts scatter by up to twice the variance of independent ones.
    assert np.all(np.abs(counts - counts.mean()) < 5 * np.sqrt(2 * counts.mean()))
    naive = metrics.rank_histogram(*antithetic_case(4), np.random.default_rng(0))
    assert naive[0] < 0.95 * naive.mean()


# --- small scales -------------------------------------------------------------------------------------------


def test_small_scale_energy_by_loops():
    rng = np.random.default_rng(0)
    ocean, field = coast(), rng.normal(size=(*SHAPE, 2))
    scored = ocean & (rng.random(SHAPE) < 0.7)
    squares = []
    for y, x in np.argwhere(scored):
        window = np.s_[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        squares.append((field[y, x] - field[window][ocean[window]].mean(0)) ** 2)
    dry = np.where(ocean[..., None], field, np.nan)
    assert structures.small_scale_energy(dry, scored, ocean) == pytest.approx(np.mean(squares), rel=1e-10)


def test_small_scale_energy_sees_smoothing_and_nothing_else():
    rng = np.random.default_rng(0)
    ocean = coast()
    truth = smooth_field(rng, 1.5)
    members = np.stack([smooth_field(rng, 1.5) for _ in range(16)])
    full = structures.small_scale_energy(truth, ocean, ocean)
    assert structures.small_scale_energy(truth[None] + 0.3, ocean, ocean) == pytest.approx(full)
    assert structures.small_scale_energy(members, ocean, ocean) == pytest.approx(full, rel=0.2)
    assert structures.small_scale_energy(members.mean(0), ocean, ocean) < 0.2 * full
    assert structures.small_scale_energy(2 * truth, ocean, ocean) == pytest.approx(4 * full)


def test_small_scale_energy_rejects_what_it_cannot_average():
    ocean, field = coast(), np.ones((*SHAPE, 2))
    with pytest.raises(InputError, match="odd and at least 3"):
        structures.small_scale_energy(field, ocean, ocean, window=4)
    with pytest.raises(InputError, match="not finite"):
        structures.small_scale_energy(field * np.nan, ocean, ocean)


def brute_rectangle(ocean: np.ndarray) -> int:
    ny, nx = ocean.shape
    spans = ((a, b) for a in range(ny) for b in range(a + 1, ny + 1))
    areas = [0]
    for a, b in spans:
        free = ocean[a:b].all(0)
        areas += [
            (b - a) * (d - c) for c in range(nx) for d in range(c + 1, nx + 1) if free[c:d].all()
        ]  # fmt: skip
    return max(areas)


@pytest.mark.parametrize("seed", range(8))
def test_largest_rectangle_is_the_largest(seed):
    ocean = np.random.default_rng(seed).random((9, 11)) < 0.8
    rows, columns = structures.ocean_rectangle(ocean)
    assert ocean[rows, columns].all()
    assert ocean[rows, columns].size == brute_rectangle(ocean)


def test_energy_bands_keep_all_energy_and_find_a_wave():
    rng = np.random.default_rng(0)
    field = rng.normal(size=(3, 20, 32, 2))
    field -= field.mean((1, 2), keepdims=True)
    dx, dy = 50.0, 80.0
    wavenumber, energy = structures.energy_bands(field, dx, dy)
    # Parseval, less the gravest modes of the longer side that have no band: here both sides are 1600 m.
    np.testing.assert_allclose(energy.sum(-1), (field**2).sum(-1).mean((1, 2)) / 2, rtol=1e-12)
    x = (np.arange(32) + 0.5) * dx
    wave = np.zeros((20, 32, 2))
    wave[..., 1] = np.cos(2 * np.pi * x / 400.0)
    _, energy = structures.energy_bands(wave, dx, dy)
    assert wavenumber[np.argmax(energy)] == pytest.approx(1 / 400.0)
    assert energy.max() == pytest.approx(0.25)


def test_spectra_of_frames_are_averaged_before_their_ratio():
    parts = np.random.default_rng(0).lognormal(size=(2, 5, 7))
    found = structures.Spectrum.average([structures.Spectrum(np.arange(7.0), *one) for one in parts.swapaxes(0, 1)])
    truth, members = parts.sum(1) / 5
    np.testing.assert_allclose(found.truth, truth)
    np.testing.assert_allclose(found.members, members)
    np.testing.assert_allclose(found.ratio, members / truth)


def test_spectrum_ratio_of_a_smoothed_member_falls_with_wavenumber():
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    ocean, truth = coast(), rng.normal(size=(*SHAPE, 2))
    truth[~ocean] = np.nan
    frames = []
    for seed in range(30):
        truth[ocean] = np.random.default_rng(seed).normal(size=(ocean.sum(), 2))
        rows, columns = structures.ocean_rectangle(ocean)
        window = np.nan_to_num(truth)
        window[rows, columns] = gaussian_filter(window[rows, columns], (1, 1, 0), mode="reflect")
        frames.append(structures.spectrum(truth, np.stack([window, 2 * window]), ocean, 50.0, 50.0))
    mean = structures.Spectrum.average(frames)
    # A Gaussian filter of one cell multiplies the amplitude at wavenumber k by exp(-(2 pi k 50)^2 / 2).
    expected = 2.5 * np.exp(-((2 * np.pi * mean.wavenumber * 50) ** 2))
    low = mean.wavenumber < 1 / 200
    np.testing.assert_allclose(mean.ratio[low], expected[low], rtol=0.15)
    with pytest.raises(InputError, match="8 by 8"):
        structures.spectrum(truth[:6], np.stack([window])[:, :6], ocean[:6], 50.0, 50.0)


def test_derivatives_of_rotation_and_strain_are_exact():
    ocean = coast()
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] * np.array([80.0, 50.0])[:, None, None]
    rotation = np.where(ocean[..., None], 3e-4 * np.stack([-y, x], -1), np.nan)
    divergence, vorticity, interior = structures.divergence_vorticity(rotation, ocean, 50.0, 80.0)
    np.testing.assert_allclose(vorticity[interior], 6e-4, rtol=1e-10)
    np.testing.assert_allclose(divergence, 0, atol=1e-16)
    strain = np.stack([1e-4 * x, 3e-4 * y], -1)
    divergence, vorticity, _ = structures.divergence_vorticity(strain, ocean, np.full(SHAPE, 50.0), 80.0)
    np.testing.assert_allclose(divergence[interior], 4e-4, rtol=1e-10)
    np.testing.assert_allclose(vorticity, 0, atol=1e-16)
    for row, column in np.argwhere(interior):
        assert ocean[row, column]
        assert ocean[[row - 1, row + 1, row, row], [column, column, column - 1, column + 1]].all()
    assert not interior[0].any()
    assert not interior[:, -1].any()
    assert interior.sum() > 300


def test_derivatives_on_a_stretched_grid_are_exact():
    """Each cell by its own size: a rotation and a strain on rows and columns that lie ever further apart."""
    y, x = np.meshgrid(40 * np.arange(SHAPE[0]) ** 1.3, 30 * np.arange(SHAPE[1]) ** 1.2, indexing="ij")
    dy, dx = np.gradient(y, axis=0), np.gradient(x, axis=1)
    flow = np.stack([2e-4 * x - 3e-4 * y, 1e-4 * y + 4e-4 * x], -1)
    divergence, vorticity, interior = structures.divergence_vorticity(flow, coast(), dx, dy)
    np.testing.assert_allclose(divergence[interior], 3e-4, rtol=1e-10)
    np.testing.assert_allclose(vorticity[interior], 7e-4, rtol=1e-10)


def test_ocean_without_a_truth_is_as_land():
    """Differences and transforms across a gap of the truth would be NaN, with which no eddy is seen anywhere."""
    ocean, truth, gap = coast(), vortex(5, 11), np.zeros(SHAPE, bool)
    gap[6, 3:6] = True
    known, members = ocean & ~gap, np.stack([truth, vortex(6, 11)])
    gappy = np.where(gap[..., None], np.nan, truth)
    assert gap.sum() == (gap & ocean).sum()
    for score in (structures.derivative_scores, structures.eddy_scores):
        found = score(gappy, members, known, ocean, 50.0, 50.0)
        assert found == score(truth, members, known, known, 50.0, 50.0)
        assert all(np.isfinite(list(found.values())))
    found, expected = (structures.spectrum(t, members, o, 50.0, 50.0) for t, o in ((gappy, ocean), (truth, known)))
    np.testing.assert_array_equal(found.ratio, expected.ratio)
    assert np.isfinite(found.ratio).all()


def test_derivative_scores_of_a_rotation_too_fast():
    ocean = coast()
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] * 50.0
    rotation = 1e-4 * np.stack([-y, x], -1)
    members = np.stack([1.5 * rotation, 0.5 * rotation])
    frame = structures.derivative_scores(rotation, members, ocean, ocean, 50.0, 50.0)
    row = structures.derivative_summary([frame, frame])
    assert row["vorticity_rmse"] == pytest.approx(1e-4)
    assert row["vorticity_ratio"] == pytest.approx(math.sqrt(1.25))
    assert row["divergence_rmse"] == pytest.approx(0, abs=1e-15)
    # Squares are averaged over frames, not their roots.
    still = dict.fromkeys(frame, 0.0) | {"vorticity_truth": 3 * frame["vorticity_truth"]}
    row = structures.derivative_summary([frame, still])
    assert row["vorticity_rmse"] == pytest.approx(1e-4 / math.sqrt(2))
    assert row["vorticity_ratio"] == pytest.approx(math.sqrt(1.25 / 4))
    lonely = np.zeros(SHAPE, bool)
    lonely[0, 0] = True
    with pytest.raises(InputError, match="four ocean neighbours"):
        structures.derivative_scores(rotation, members, lonely, ocean, 50.0, 50.0)
    for size in (-2.0, 0.0, np.nan):
        for sizes in ((size, 50.0), (50.0, np.full(SHAPE, size))):
            with pytest.raises(InputError, match="cell sizes are positive numbers of metres"):
                structures.derivative_scores(rotation, members, ocean, ocean, *sizes)
        with pytest.raises(InputError, match="cell sizes are positive numbers of metres"):
            structures.spectrum(rotation, members, np.ones(SHAPE, bool), 50.0, size)
    # Beside the one scored cell, where its derivative needs it.
    y, x = np.argwhere(structures.divergence_vorticity(rotation, ocean, 50.0, 50.0)[2])[0]
    lonely[0, 0], lonely[y, x] = False, True
    members[1, y, x + 1] = np.nan
    with pytest.raises(InputError, match="a member is not finite"):
        structures.derivative_scores(rotation, members, lonely, ocean, 50.0, 50.0)


def test_waves_up_to_four_times_the_shorter_side_are_in_the_first_band():
    """Along a channel of three sides, a wave of three sides, and half a wave of six, which is what is too long."""
    side, cells = 16, np.arange(48) + 0.5
    for half_waves, inside in ((2, True), (1, False)):
        field = np.zeros((side, 48, 2))
        field[..., 0] = np.cos(np.pi * half_waves * cells / 48)
        wavenumber, energy = structures.energy_bands(field, 50.0, 50.0)
        np.testing.assert_allclose(wavenumber[0], 1 / (2 * side * 50))
        np.testing.assert_allclose(energy[0], 0.25 if inside else 0, atol=1e-12)


# --- eddies -------------------------------------------------------------------------------------------------


def vortex(row: float, column: float, radius: float = 300.0) -> np.ndarray:
    """Currents of the stream function exp(-r^2 / (2 radius^2)) round a cell of a grid of 50 m."""
    y, x = (np.mgrid[: SHAPE[0], : SHAPE[1]] - np.array([row, column])[:, None, None]) * 50.0
    psi = 100 * np.exp(-(x**2 + y**2) / (2 * radius**2))
    return np.stack([y * psi, -x * psi], -1) / radius**2


def test_okubo_weiss_of_rotation_and_strain_is_exact():
    ocean = coast()
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] * np.array([80.0, 50.0])[:, None, None]
    flows = {"rotation": (-y, x), "stretching": (x, -y), "shearing": (y, x), "shear": (y, 0 * x), "spreading": (x, y)}
    # s_n, s_s and vorticity in units of the rate: a shear rotates as much as it strains.
    expected = {"rotation": -4, "stretching": 4, "shearing": 4, "shear": 0, "spreading": 0}
    fields = 1e-4 * np.stack([np.stack(flows[name], -1) for name in expected])
    fields[:, ~ocean] = np.nan
    w, interior = structures.okubo_weiss(fields, ocean, 50.0, np.where(ocean, 80.0, np.nan))
    for name, one in zip(expected, w, strict=True):
        np.testing.assert_allclose(one[interior], expected[name] * 1e-8, rtol=1e-10, atol=1e-18, err_msg=name)
    assert not w[:, ~interior].any()
    np.testing.assert_array_equal(interior, structures.divergence_vorticity(fields[0], ocean, 50.0, 80.0)[2])


def test_okubo_weiss_of_a_vortex_changes_sign_at_its_radius():
    w, interior = structures.okubo_weiss(vortex(12, 20), np.ones(SHAPE, bool), 50.0, 50.0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    r = np.hypot(y - 12, x - 20) * 50
    psi = 100 * np.exp(-(r**2) / (2 * 300**2))
    exact = -4 * (psi / 300**2) ** 2 * (1 - (r / 300) ** 2)
    np.testing.assert_allclose(w[interior], exact[interior], atol=0.06 * abs(exact).max())
    assert (w[r < 280] < 0).all()
    assert (w[interior & (r > 320)] > 0).all()


def test_eddy_scores_of_a_vortex_that_is_there_gone_or_elsewhere():
    everywhere = np.ones(SHAPE, bool)
    # Far enough apart, five radii, to leave each other's cores alone.
    truth, elsewhere = vortex(12, 10, 200.0), vortex(12, 30, 200.0)
    members = np.stack([truth, 0 * truth, elsewhere, truth + elsewhere])
    frame = structures.eddy_scores(truth, members, everywhere, everywhere, 50.0, 50.0)
    f = frame["truth"]
    # The core, out to less than one radius of 4 cells, of 22 by 38 cells.
    assert 0.5 < f * 22 * 38 / (np.pi * 4**2) < 1
    # Half of the members see the vortex, and half see one where none is.
    assert frame["hits"] == pytest.approx(f / 2)
    assert frame["members"] == pytest.approx(f, rel=0.05)
    assert frame["brier"] == pytest.approx(f / 2, rel=0.05)
    # Two of four: mean |o_m - o| is 1/2 and half the mean square of pairs 1/3, in each of the two vortices.
    assert frame["brier_fair"] == pytest.approx(2 * f * (1 / 2 - 1 / 3), rel=0.05)
    row = structures.eddy_summary([frame, frame])
    assert row["hit_rate"] == pytest.approx(0.5)
    assert row["false_alarm_ratio"] == pytest.approx(0.5, abs=0.03)
    assert row["frequency"] == pytest.approx(f)
    # Partners {seen, not}, {elsewhere, both}: strangers differ in half of their pairs in each vortex.
    paired = structures.eddy_scores(truth, members, everywhere, everywhere, 50.0, 50.0, antithetic=True)
    seen, other = 1 / 2 - 1 / 4, 1 / 2 - 1 / 2
    assert paired["brier_fair"] == pytest.approx(f * (seen + other), rel=0.06)
    assert paired["brier"] == frame["brier"]


def test_eddy_scores_of_certain_members():
    everywhere, truth = np.ones(SHAPE, bool), vortex(12, 11)
    right = structures.eddy_scores(truth, truth[None], everywhere, everywhere, 50.0, 50.0)
    assert right["brier"] == 0
    assert math.isnan(right["brier_fair"])
    assert structures.eddy_summary([right])["hit_rate"] == 1
    assert structures.eddy_summary([right])["false_alarm_ratio"] == 0
    rest = structures.eddy_scores(truth, 0 * truth[None], everywhere, everywhere, 50.0, 50.0)
    # Never saying yes has the frequency as its Brier score.
    assert rest["brier"] == rest["truth"] == right["truth"] > 0
    assert structures.eddy_summary([rest])["hit_rate"] == 0
    assert math.isnan(structures.eddy_summary([rest])["false_alarm_ratio"])
    # A hit on one frame in three, the other frames without eddies of the truth or the members.
    calm = structures.eddy_scores(0 * truth, truth[None], everywhere, everywhere, 50.0, 50.0)
    row = structures.eddy_summary([right, rest, calm])
    assert row["hit_rate"] == pytest.approx(0.5)
    assert calm["members"] > right["members"]
    assert row["false_alarm_ratio"] == pytest.approx(calm["members"] / (calm["members"] + right["truth"]))


def test_fair_brier_score_of_exchangeable_members_does_not_depend_on_their_number():
    rng = np.random.default_rng(0)
    everywhere, scores = np.ones(SHAPE, bool), {2: [], 16: []}
    for _ in range(30):
        fields = np.stack([smooth_field(rng, 2.0) for _ in range(17)])
        for count in scores:
            scores[count].append(
                structures.eddy_scores(fields[0], fields[1 : count + 1], everywhere, everywhere, 50.0, 50.0)
            )
    few, many = (structures.eddy_summary(scores[count]) for count in (2, 16))
    assert few["brier_fair"] == pytest.approx(many["brier_fair"], rel=0.05)
    assert few["brier"] > 1.2 * many["brier"]
    # Independent of the truth: what is right is right by chance.
    assert many["hit_rate"] == pytest.approx(many["frequency"], rel=0.15)
    assert many["brier_fair"] == pytest.approx(many["frequency"] * (1 - many["frequency"]), rel=0.05)


def test_eddy_scores_count_scored_stencils_only():
    ocean, truth = coast(), vortex(5, 11)
    members = np.stack([truth, vortex(14, 33)])
    scored = ocean & (np.arange(SHAPE[1]) < 25)
    frame = structures.eddy_scores(truth, members, scored, ocean, 50.0, 50.0)
    w, interior = structures.okubo_weiss(np.stack([truth, *members]), ocean, 50.0, 50.0)
    t, *m = (w < -0.2 * w[0, interior].std())[:, interior & scored]
    assert frame["truth"] == t.mean() > 0.03
    assert frame["members"] == pytest.approx((m[0].mean() + m[1].mean()) / 2)
    assert frame["brier"] == pytest.approx(np.mean(((m[0] * 1.0 + m[1]) / 2 - t) ** 2))
    deep = structures.eddy_scores(truth, members, scored, ocean, 50.0, 50.0, threshold=1.0)
    assert deep["truth"] < frame["truth"]


def test_eddies_reject_what_they_cannot_see():
    ocean, truth = coast(), vortex(5, 11)
    arguments = (truth, truth[None], ocean, ocean)
    lonely = np.zeros(SHAPE, bool)
    lonely[0, 0] = True
    with pytest.raises(InputError, match="no eddy can be seen"):
        structures.eddy_scores(truth, truth[None], lonely, ocean, 50.0, 50.0)
    with pytest.raises(InputError, match="come in pairs, got 1"):
        structures.eddy_scores(*arguments, 50.0, 50.0, antithetic=True)
    with pytest.raises(InputError, match=r"standard deviations from 0, got -0.2"):
        structures.eddy_scores(*arguments, 50.0, 50.0, threshold=-0.2)
    with pytest.raises(InputError, match="positive numbers of metres"):
        structures.eddy_scores(*arguments, 50.0, -50.0)
    with pytest.raises(InputError, match="got dx=nan"):
        structures.eddy_scores(*arguments, math.nan, 50.0)
    with pytest.raises(InputError, match="different grids"):
        structures.eddy_scores(truth, truth[None], ocean, ocean[1:], 50.0, 50.0)
    with pytest.raises(InputError, match="different grids"):
        structures.okubo_weiss(truth, ocean.T, 50.0, 50.0)
    with pytest.raises(InputError, match="at least one frame"):
        structures.eddy_summary([])
    # A hole beside a scored cell would make a stencil of NaN, which no comparison notices.
    scored, holed = ocean.copy(), truth.copy()
    scored[5, 11], holed[5, 11] = False, np.nan
    with pytest.raises(InputError, match="a member is not finite"):
        structures.eddy_scores(truth, holed[None], scored, ocean, 50.0, 50.0)


# --- comparison ---------------------------------------------------------------------------------------------


def test_ratio_by_hand():
    result = scoring.ratio_of_means([1.0, 2.0, 9.0, 4.0], [2.0, 4.0, 3.0, 5.0], block=1, seed=0)
    assert result.ratio == 16 / 14
    assert result.wins == 0.75
    assert result.worst == 3.0
    assert result.median == pytest.approx(0.65)
    assert result.frames == 4
    assert result.lo < result.ratio < result.hi
    assert result.lo >= 0.5
    assert result.hi <= 3.0


@pytest.mark.parametrize("given", [{}, {"level": 0.68}])
def test_wilson_interval_by_its_formula(given):
    n, wins, z = 100, 80, stats.norm.ppf(0.5 + given.get("level", 0.95) / 2)
    method = np.r_[np.full(wins, 0.5), np.full(n - wins, 2.0)]
    result = scoring.ratio_of_means(method, np.ones(n), block=5, seed=0, **given)
    p = wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (result.wins_lo, result.wins_hi) == pytest.approx((centre - half, centre + half), rel=1e-12)


def test_bootstrap_is_paired():
    # Errors vary a hundredfold between frames, but always by the same factor between methods.
    baseline = np.exp(np.random.default_rng(0).normal(size=60) * 2)
    result = scoring.ratio_of_means(0.8 * baseline, baseline, block=3, seed=0)
    assert (result.lo, result.ratio, result.hi) == pytest.approx((0.8, 0.8, 0.8))
    again = scoring.ratio_of_means(baseline**0.9, baseline, block=3, seed=7)
    assert again == scoring.ratio_of_means(baseline**0.9, baseline, block=3, seed=7)


def correlated_errors(rng: np.random.Generator, n: int, memory: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors of two methods with autocorrelation; their means have the ratio exp(0.02)."""
    states = []
    for noise in rng.normal(size=(2, n)) * math.sqrt(1 - memory**2):
        state = np.empty(n)
        state[0] = rng.normal()
        for i in range(1, n):
            state[i] = memory * state[i - 1] + noise[i]
        states.append(state)
    common, own = states
    return np.exp(0.5 * common + 0.2 * own), np.exp(0.5 * common)


def test_bootstrap_interval_covers_the_ratio_of_correlated_frames():
    rng = np.random.default_rng(0)
    truth = math.exp(0.02)
    hits = {1: 0, 3: 0, 20: 0}
    for _ in range(250):
        method, baseline = correlated_errors(rng, 150, 0.7)
        for block in hits:
            result = scoring.ratio_of_means(method, baseline, block, seed=1, resamples=400)
            hits[block] += result.lo <= truth <= result.hi
    # However short the blocks that are asked for, e-folding times (3) among them, they are made long enough.
    assert all(0.86 <= count / 250 <= 0.98 for count in hits.values()), hits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_block", lambda x: 1)
        alone = [scoring.ratio_of_means(*correlated_errors(rng, 150, 0.7), 1, 1, resamples=400) for _ in range(250)]
    assert sum(one.lo <= truth <= one.hi for one in alone) / 250 < 0.75


def test_blocks_are_a_quarter_of_the_frames_at_most(monkeypatch):
    """However long errors last: of fewer than four blocks an interval says little."""
    slow = np.linspace(1, 2, 40) ** 3
    assert scoring._block(slow - slow.mean()) > 20
    found = scoring.ratio_of_means(slow, np.ones(40), 1, 0)
    monkeypatch.setattr(scoring, "_block", lambda x: 1)
    assert found == scoring.ratio_of_means(slow, np.ones(40), 10, 0)


def test_blocks_are_no_longer_where_nothing_is_remembered():
    """Frames whose errors are independent keep the block that is asked for, in nearly every draw."""
    rng = np.random.default_rng(0)
    longer = sum(scoring._block(rng.standard_normal(128)) > 1 for _ in range(1000))
    assert longer < 50
    memory = np.exp(-1 / 6)
    slow = [correlated_errors(rng, 4000, memory)[0] for _ in range(20)]
    # 2 tau of an autoregression: tau = (1 + r) / (1 - r).
    expected = 2 * (1 + memory) / (1 - memory)
    assert np.mean([scoring._block(np.log(one) - np.log(one).mean()) for one in slow]) == pytest.approx(
        expected, rel=0.1
    )


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_interval_of_few_frames_is_as_wide_as_that_of_student(level):
    """Against a baseline that is always 1 the ratio is a mean, of ten numbers that a normal distribution might give."""
    # In an order of their own, as sorted they would remember each other.
    order = np.random.default_rng(0).permutation(10)
    method = 1 + 0.1 * stats.norm.ppf((order + 0.5) / 10)
    found = scoring.ratio_of_means(method, np.ones(10), 1, 0, level, resamples=200_000)
    half = stats.t.ppf((1 + level) / 2, 9) * method.std(ddof=1) / math.sqrt(10)
    np.testing.assert_allclose((found.lo - 1, found.hi - 1), (-half, half), rtol=0.025)


def test_interval_of_four_blocks_is_that_of_all_resamples():
    """Of 40 frames in blocks of ten there are 31**4, whose percentiles are exact; they lie 1e-4 from the ends."""
    method, baseline = np.random.default_rng(2).lognormal(0, 1, (2, 40))
    sums = [np.lib.stride_tricks.sliding_window_view(errors, 10).sum(1) for errors in (method, baseline)]
    ours, theirs = (np.add.outer(np.add.outer(one, one), np.add.outer(one, one)).ravel() for one in sums)
    tail = stats.norm.cdf(math.sqrt(4 / 3) * stats.t.ppf(0.025, 3))
    lo, hi = np.quantile(ours / theirs, (tail, 1 - tail))
    for seed in range(3):
        found = scoring.ratio_of_means(method, baseline, 10, seed)
        np.testing.assert_allclose((found.lo, found.hi), (lo, hi), atol=0.03 * (hi - lo))


@pytest.mark.parametrize(("frames", "block", "known"), [(19, 10, False), (20, 10, True), (3, 1, False), (4, 1, True)])
def test_an_interval_takes_two_whole_blocks_and_four_frames(frames, block, known):
    errors = np.random.default_rng(0).uniform(1, 2, (2, frames))
    found = scoring.ratio_of_means(*errors, block=block, seed=0)
    assert np.isfinite([found.lo, found.hi]).all() == known


def test_every_frame_can_be_drawn():
    baseline = np.ones(12)
    for last in (0, 11):
        method = np.where(np.arange(12) == last, 100.0, 1.0)
        assert scoring.ratio_of_means(method, baseline, block=3, seed=0).hi > 1


def test_errors_that_differ_by_rounding_are_no_win():
    baseline = np.linspace(1, 2, 20)
    assert scoring.ratio_of_means(baseline * (1 - 1e-6), baseline, block=1, seed=0).wins == 0
    assert scoring.ratio_of_means(baseline * (1 - 1e-4), baseline, block=1, seed=0).wins == 1


def test_ratio_rejects_what_cannot_be_paired():
    with pytest.raises(InputError, match="one number a frame"):
        scoring.ratio_of_means([1.0, 2.0], [1.0], block=1, seed=0)
    with pytest.raises(InputError, match=r"frame 1 cannot be compared: MSE 1.0 against 0.0"):
        scoring.ratio_of_means([1.0, 1.0], [1.0, 0.0], block=1, seed=0)
    with pytest.raises(InputError, match="frame 0"):
        scoring.ratio_of_means([math.nan, 1.0], [1.0, 1.0], block=1, seed=0)
    for block in (0, 2.5):
        with pytest.raises(InputError, match=f"block must be a whole number, at least 1, got {block}"):
            scoring.ratio_of_means([1.0], [1.0], block=block, seed=0)
    short = scoring.ratio_of_means([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], block=2, seed=0)
    assert math.isnan(short.lo)
    assert short.ratio == 1.0


# --- tables -------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    ocean = coast()
    ensemble, single, pair = [], [], []
    for _ in range(12):
        centre = smooth_field(rng, 2.0)
        truth = centre + 0.3 * smooth_field(rng, 1.0)
        members = np.stack([centre + 0.3 * smooth_field(rng, 1.0) for _ in range(8)])
        blurred = centre * 0.5
        scored = metrics.scored_cells(truth, ocean, rng.random(SHAPE) < 0.05)
        ensemble.append(scoring.score(truth, members, scored, ocean))
        single.append(scoring.score(truth, blurred[None], scored, ocean))
        pair.append(scoring.score(truth, members[:2], scored, ocean, antithetic=True))
    against = {"baseline": ("linear", single), "block": 2}
    return [
        scoring.summary("linear", single, 0, 0.02),
        scoring.summary("ensemble", ensemble, 256, 1.25, **against),
        scoring.summary("pair", pair, 32, 0.2, **against),
    ]


def test_summary_of_an_ensemble(rows):
    linear, ensemble, pair = rows
    assert ensemble["members"] == 8
    assert ensemble["frames"] == 12
    assert ensemble["mse_member"] > 1.5 * ensemble["mse_mean"]
    assert ensemble["vector_rmse"] == pytest.approx(math.sqrt(2) * ensemble["component_rmse"])
    assert ensemble["component_rmse"] == pytest.approx(math.sqrt(ensemble["mse_mean"]))
    assert ensemble["spread_skill"] == pytest.approx(1, abs=0.05)
    assert ensemble["coverage90"] == pytest.approx(0.9, abs=0.02)
    assert ensemble["small_scale"] == pytest.approx(1, abs=0.05)
    assert ensemble["ratio"] == pytest.approx(ensemble["mse_mean"] / linear["mse_mean"])
    assert ensemble["lo"] < ensemble["ratio"] < ensemble["hi"]
    assert ensemble["wins"] == 1.0
    assert ensemble["worst"] < 1
    # One pair has a mean, but no two independent members to tell a spread from.
    assert math.isnan(pair["crps"])
    assert math.isnan(pair["spread_skill"])
    assert pair["mse_mean"] > ensemble["mse_mean"]


@pytest.mark.parametrize(("block", "seed"), [(1, 0), (12, 0), (12, 5)])
def test_summary_has_the_interval_of_its_blocks(block, seed):
    rng = np.random.default_rng(3)
    ours, theirs = np.exp(rng.normal(size=(2, 60)))
    frames, others = (
        [scoring.FrameScores(4, False, 10, mse, mse, 1.0, 1.0, 0.9, 1.0, 1.0) for mse in errors]
        for errors in (ours, theirs)
    )
    row = scoring.summary("ours", frames, 1, 1, baseline=("theirs", others), block=block, seed=seed)
    expected = scoring.ratio_of_means(ours, theirs, block, seed)
    assert (row["lo"], row["hi"]) == (expected.lo, expected.hi)


def test_small_scales_of_members_and_truth_are_those_of_the_same_cells():
    ocean = np.ones((9, 9), bool)
    truth = np.random.default_rng(0).normal(size=(9, 9, 2))
    truth[4, 4] = np.nan
    scored = metrics.scored_cells(truth, ocean, np.zeros((9, 9), bool))
    # A member that is the truth where that is known, and anything in its gap.
    member = np.nan_to_num(truth, nan=5.0)
    found = scoring.score(truth, member[None], scored, ocean)
    assert found.energy_member == found.energy_truth


def test_scores_of_pairs_are_those_of_pairs():
    """Exchangeable with the truth, of one variance; taken for independent, pairs flatter all of these."""
    frames = [scoring.score(*antithetic_case(2, seed), np.ones((60, 60), bool), antithetic=True) for seed in range(4)]
    row = scoring.summary("pairs", frames, 1, 1.0)
    assert row["crps"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.02)
    assert row["spread_skill"] == pytest.approx(1, abs=0.03)
    assert row["coverage90"] == np.mean([metrics.coverage(*antithetic_case(2, s), antithetic=True) for s in range(4)])


def test_summary_averages_before_it_divides():
    def frames(*numbers):
        return [scoring.FrameScores(4, False, 10, 9.0, mean, 1.0, 1.0, 0.9, *energies) for mean, *energies in numbers]

    ours, theirs = frames((1.0, 3.0, 4.0), (4.0, 5.0, 1.0)), frames((2.0, 1.0, 1.0), (6.0, 1.0, 1.0))
    row = scoring.summary("ours", ours, 1, 1.0, baseline=("theirs", theirs))
    assert row["small_scale"] == 8 / 5
    # The mean of the baseline's members, not one of them.
    assert row["ratio"] == 5 / 8


def test_summary_of_a_single_field(rows):
    linear = rows[0]
    assert linear["mse_member"] == linear["mse_mean"]
    assert math.isnan(linear["spread_skill"])
    assert math.isnan(linear["coverage90"])
    assert math.isnan(linear["ratio"])
    assert linear["small_scale"] < 0.8
    truth, members, scored = gaussian_case(1)
    assert scoring.score(truth, members, scored, scored).crps == np.abs(members[0] - truth).mean()


def test_summary_names_frames_that_do_not_belong_together(rows):
    truth, members, scored = gaussian_case(4)
    frames = [scoring.score(truth, members[:count], scored, scored) for count in (2, 4)]
    with pytest.raises(InputError, match="one kind of ensemble"):
        scoring.summary("mixed", frames, 1, 1.0)
    with pytest.raises(InputError, match="one number a frame"):
        scoring.summary("short", frames[:1], 1, 1.0, baseline=("linear", [frames[0]] * 2))
    with pytest.raises(InputError, match="got none"):
        scoring.summary("empty", [], 1, 1.0)


def test_table_is_aligned_and_dashes_what_does_not_exist(rows):
    text = scoring.format_table(rows)
    head, linear, ensemble, pair, note = text.splitlines()
    # Every right-aligned column ends where its title ends.
    for title in (
        "members",
        "MSE member",
        "MSE mean",
        "CRPS",
        "spread/skill",
        "in 90 %",
        "small scales",
        "calls",
    ):
        end = head.index(title) + len(title)
        for line in (linear, ensemble, pair):
            assert line[end - 1] != " "
            assert line[end : end + 1] in (" ", "")
    assert linear.split()[-4:] == [scoring.DASH] * 4
    assert f"{rows[1]['ratio']:.3f} [{rows[1]['lo']:.3f}, {rows[1]['hi']:.3f}]" in ensemble
    assert "100% [76%, 100%]" in ensemble
    assert note.startswith("12 frames")
    alone = scoring.format_table(rows[:1])
    assert "ratio" not in alone
    assert "wins" not in alone
    with pytest.raises(InputError, match="at least one row"):
        scoring.format_table([])


def test_csv_reads_back(rows, tmp_path):
    scoring.write_csv(rows, tmp_path / "results" / "table.csv")
    back = pd.read_csv(tmp_path / "results" / "table.csv")
    pd.testing.assert_frame_equal(back, pd.DataFrame(rows), check_dtype=False)
