"""Details of an ensemble: a perfect one, a rotated one and a smoothed one are told apart."""

import numpy as np
import pytest
from scipy import ndimage

from jax_repaint import details, metrics, structures
from jax_repaint.data.fields import Fields

SHAPE = (20, 26)


@pytest.fixture(scope="module")
def fields():
    rng = np.random.default_rng(0)
    velocity = ndimage.gaussian_filter(rng.standard_normal((3, *SHAPE, 2)), (0, 1.5, 1.5, 0))
    velocity[:, :4, :6] = np.nan
    time = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "h")
    return Fields.create(velocity, 18 + 0.01 * np.arange(20), 295 + 0.01 * np.arange(26), time, name="made")


def rows(fields, change, count=6):
    rng = np.random.default_rng(1)
    made = []
    for velocity in fields.velocity:
        scored = metrics.scored_cells(velocity, fields.ocean, np.zeros(SHAPE, bool))
        members = np.stack([change(np.nan_to_num(velocity), rng) for _ in range(count)])
        made.append(details.of_frame(velocity, members, scored, fields))
    return details.summary(made)


def test_the_truth_itself_is_perfect(fields):
    row = rows(fields, lambda v, rng: v)
    for name in ("energy_score", "direction_error", "divergence_rmse", "vorticity_rmse", "eddy_brier"):
        assert row[name] == pytest.approx(0, abs=1e-6)
    for name in ("divergence_ratio", "vorticity_ratio", "eddy_hit_rate", "short_waves"):
        assert row[name] == pytest.approx(1, abs=1e-6)


def test_a_turned_field_has_that_direction_error(fields):
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    row = rows(fields, lambda v, rng: v @ turn.T)
    assert row["direction_error"] == pytest.approx(90, abs=1e-3)
    # A quarter turn of the vectors makes vorticity of divergence.
    assert row["short_waves"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("degrees", "swapped"), [(30, False), (90, False), (200, False), (0, True), (200, True)])
def test_derivatives_and_eddies_do_not_depend_on_the_direction_of_the_grid(degrees, swapped):
    """The same water on a grid at the equator and on one that is turned with it, or has its axes in the other order."""
    rng, angle = np.random.default_rng(3), np.radians(degrees)
    i, j = np.arange(26) - 12.5, np.arange(20)[:, None] - 9.5
    along = ndimage.gaussian_filter(rng.standard_normal((5, *SHAPE, 2)), (0, 1.5, 1.5, 0))
    found = []
    for turn in (0.0, angle):
        lon, lat = (0.01 * (i * a + j * b) for a, b in ((np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))))
        here = along @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        time = np.datetime64("2020-01-01", "ns") + np.arange(5) * np.timedelta64(1, "h")
        want = along
        if swapped and found:
            here, lat, lon, want = here.swapaxes(1, 2), lat.T, lon.T, along.swapaxes(1, 2)[..., ::-1]
        fields = Fields.create(here, lat, lon, time, name="turned")
        np.testing.assert_allclose(fields.along_grid(here), want, atol=1e-5)
        scored = np.ones(fields.shape, bool)
        found.append(details.of_frame(fields.velocity[0], fields.velocity[1:], scored, fields))
    assert found[0].keys() == found[1].keys() >= {"divergence_error", "vorticity_error", "eddy_hits"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-3), name


def test_noise_and_smoothing_show_at_short_waves(fields):
    noisy = rows(fields, lambda v, rng: v + 0.1 * rng.standard_normal(v.shape))
    smooth = rows(fields, lambda v, rng: ndimage.gaussian_filter(v, (1, 1, 0)))
    assert noisy["short_waves"] > 2
    assert smooth["short_waves"] < 0.5
    assert noisy["vorticity_ratio"] > 1 > smooth["vorticity_ratio"]


def test_one_frame_against_sums_over_its_cells_and_waves(fields):
    rng, truth = np.random.default_rng(2), fields.velocity[0]
    members = np.nan_to_num(truth) + 0.3 * rng.standard_normal((4, *truth.shape))
    scored = metrics.scored_cells(truth, fields.ocean, np.zeros(SHAPE, bool))
    row = details.of_frame(truth, members, scored, fields)
    t, m = truth[scored], members.mean(0)[scored]
    fast = np.hypot(*t.T) > np.sqrt((t**2).sum(-1).mean()) / 3
    assert 0.1 < fast.mean() < 0.95
    apart = np.angle(np.exp(1j * (np.angle(m @ [1, 1j]) - np.angle(t @ [1, 1j]))))
    assert row["direction_error"] == pytest.approx(np.degrees(np.abs(apart[fast])).mean(), rel=1e-6)
    spacing = (float(np.median(size)) for size in fields.cell_sizes())
    spectrum = structures.spectrum(truth, members, fields.ocean, *spacing)
    last = -(-len(spectrum.wavenumber) // 3)
    assert row["short_truth"] == pytest.approx(spectrum.truth[-last:].sum(), rel=1e-6)
    assert row["short_members"] == pytest.approx(spectrum.members[-last:].sum(), rel=1e-6)


def test_sizes_of_cells_are_those_of_the_sphere(fields):
    dx, dy = fields.cell_sizes()
    metres = np.radians(0.01) * 6_371_000
    np.testing.assert_allclose(dy, metres, rtol=2e-3)
    np.testing.assert_allclose(dx, (metres * np.cos(np.radians(fields.lat)))[:, None] * np.ones(SHAPE), rtol=2e-3)


def test_columns_that_a_coast_does_not_allow_are_left_out():
    velocity = np.random.default_rng(0).standard_normal((1, 2, 9, 2))
    time = np.array(["2020-01-01"], "datetime64[ns]")
    narrow = Fields.create(velocity, 18 + 0.01 * np.arange(2), 295 + 0.01 * np.arange(9), time, name="canal")
    scored = np.ones((2, 9), bool)
    row = details.summary([details.of_frame(velocity[0], velocity[0][None], scored, narrow)])
    assert set(row) == {"energy_score", "direction_error"}
    assert np.isnan(row["energy_score"])
    assert row["direction_error"] == pytest.approx(0, abs=1e-6)
