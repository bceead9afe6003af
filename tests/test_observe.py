"""Observations against scipy's interpolation and dot products; patterns by what defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator

from jax_repaint import observe
from jax_repaint.data import twin
from jax_repaint.errors import InputError

LAT, LON = np.linspace(18.1, 18.6, 9), np.linspace(-65.0, -64.4, 13)
SHAPE = LAT.size, LON.size
EVERYWHERE = np.ones(SHAPE, bool)
RNG = np.random.default_rng(0)
FIELD = RNG.normal(size=(*SHAPE, 2)).astype(np.float32)


def points(lat, lon, ocean=EVERYWHERE, velocity=None, sigma=0.1, size=None):
    velocity = np.zeros((np.size(lat), 2)) if velocity is None else velocity
    return observe.from_points(lat, lon, velocity, sigma, LAT, LON, ocean, size)


def scattered(count, ocean=EVERYWHERE, size=None):
    """Points within the hull of the cell centres."""
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(LAT[0], LAT[-1], 9 * count), rng.uniform(LON[0], LON[-1], 9 * count)
    near = ocean[
        np.rint((lat - LAT[0]) / (LAT[1] - LAT[0])).astype(int), np.rint((lon - LON[0]) / (LON[1] - LON[0])).astype(int)
    ]
    return lat[near][:count], lon[near][:count]


# --- operator -----------------------------------------------------------------------------------------------


def test_adjoint_is_the_transpose():
    ocean = EVERYWHERE.copy()
    ocean[:3, 8:] = False
    observation = points(*scattered(20, ocean), ocean)
    assert observation.size == 32
    v = jax.random.normal(jax.random.key(0), (32, 2))
    left = float((observation.apply(jnp.asarray(FIELD)) * v).sum())
    field = observation.adjoint(v, SHAPE)
    assert field.shape == FIELD.shape
    np.testing.assert_allclose(left, float((jnp.asarray(FIELD) * field).sum()), rtol=1e-5)
    assert not np.asarray(field)[~ocean].any()


def test_bilinear_weights_match_scipy():
    lat, lon = scattered(25)
    seen = points(lat, lon).of(jnp.asarray(FIELD))
    expected = RegularGridInterpolator((LAT, LON), FIELD.astype(float))(np.stack([lat, lon], -1))
    np.testing.assert_allclose(seen.values[:25], expected, atol=1e-5)
    assert not seen.values[25:].any()


def test_points_on_cells_and_on_the_last_row_and_column():
    y, x = np.array([0, 8, 8, 3]), np.array([0, 12, 5, 12])
    seen = points(LAT[y], LON[x]).apply(jnp.asarray(FIELD))
    np.testing.assert_allclose(seen[:4], FIELD[y, x], atol=1e-5)


def test_points_within_half_a_cell_of_the_grid_see_its_edge():
    step = LAT[1] - LAT[0]
    lat = np.array([LAT[0] - 0.49 * step, LAT[-1] + 0.49 * step])
    seen = points(lat, LON[[2, 7]]).apply(jnp.asarray(FIELD))
    np.testing.assert_allclose(seen[:2], FIELD[[0, 8], [2, 7]], atol=1e-5)
    with pytest.raises(InputError, match=r"observation 1 at lat .* lies outside the domain"):
        points(lat + np.array([0, 0.02 * step]), LON[[2, 7]])


def test_points_exactly_half_a_cell_outside_still_count():
    ocean = np.ones((5, 4), bool)
    lat, lon = np.array([-0.5, 4.5, 2.0, 2.0]), np.array([1.0, 1.0, -0.5, 3.5])
    seen = observe.from_points(lat, lon, np.zeros((4, 2)), 0.1, np.arange(5.0), np.arange(4.0), ocean)
    cells = np.take_along_axis(np.asarray(seen.cells), np.asarray(seen.weights).argmax(-1)[:, None], -1)[:4, 0]
    np.testing.assert_array_equal(cells, [1, 17, 8, 11])


def test_points_on_an_irregular_axis():
    lat = np.array([0.0, 1.0, 3.0, 3.5])
    observation = observe.from_points([2.0], [0.25], [[0, 0]], 0.1, lat, np.arange(3.0), np.ones((4, 3), bool))
    weights = np.zeros(12)
    np.add.at(weights, np.asarray(observation.cells[0]), np.asarray(observation.weights[0]))
    expected = np.zeros((4, 3))
    expected[1:3, :2] = 0.5 * np.array([0.75, 0.25])
    np.testing.assert_allclose(weights.reshape(4, 3), expected, atol=1e-6)


def test_weights_at_the_coast_are_those_of_the_ocean_corners():
    ocean = EVERYWHERE.copy()
    ocean[4, 6] = ocean[3, 6] = False
    lat, lon = LAT[3] + 0.7 * (LAT[4] - LAT[3]), LON[5] + 0.4 * (LON[6] - LON[5])
    observation = points(lat, lon, ocean)
    used = dict(
        zip(np.asarray(observation.cells[0]).tolist(), np.asarray(observation.weights[0]).tolist(), strict=True)
    )
    assert used[3 * 13 + 6] == used[4 * 13 + 6] == 0
    np.testing.assert_allclose([used[3 * 13 + 5], used[4 * 13 + 5]], [0.3, 0.7], atol=1e-5)
    # A field that is not defined on land is seen all the same where land is zero.
    flat = np.where(ocean[..., None], 2.5, 0).astype(np.float32)
    np.testing.assert_allclose(observation.apply(jnp.asarray(flat))[0], 2.5, rtol=1e-6)


def test_cells_are_seen_exactly():
    observed = observe.cells(EVERYWHERE, 0.1, np.random.default_rng(3))
    observation = observe.from_cells(observed, FIELD, 0.1, EVERYWHERE)
    np.testing.assert_array_equal(observation.values[:12], FIELD[observed])
    np.testing.assert_array_equal(observation.apply(jnp.asarray(FIELD)), observation.values)
    again, value = observation.on_grid(SHAPE)
    np.testing.assert_array_equal(again, observed)
    np.testing.assert_array_equal(value, np.where(observed[..., None], FIELD, 0))


def test_on_grid_averages_points_of_one_cell():
    lat, lon = LAT[4] + np.array([0, 0.1, 0.1]) * (LAT[1] - LAT[0]), LON[[6, 6, 9]]
    observed, value = points(lat, lon, velocity=np.array([[1, 2], [3, 6], [5, 5]])).on_grid(SHAPE)
    assert np.argwhere(observed).tolist() == [[4, 6], [4, 9]]
    np.testing.assert_allclose(value[4, 6], [2, 4])
    np.testing.assert_allclose(value[4, 9], [5, 5])


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"), [(1, 16), (16, 16), (17, 32), (97, 128), (4096, 4096), (4097, 8192), (8193, 12288)]
)
def test_bucket_holds_the_count(count, size):
    assert observe.bucket(count) == size


def test_padding_has_no_weight_and_unit_error():
    observation = points(*scattered(5), sigma=0.1, size=9)
    assert observation.size == 9
    np.testing.assert_array_equal(observation.valid, np.arange(9) < 5)
    np.testing.assert_allclose(observation.weights.sum(-1), np.arange(9) < 5, atol=1e-6)
    np.testing.assert_allclose(observation.sigma[:, 0], [0.1] * 5 + [1.0] * 4)
    with pytest.raises(InputError, match="5 observations do not fit into 4 rows"):
        points(*scattered(5), size=4)


def test_pad_grid_sees_the_same_cells():
    padded = 12, 16
    field = np.zeros((*padded, 2), np.float32)
    field[: SHAPE[0], : SHAPE[1]] = FIELD
    observation = points(*scattered(20))
    wide = observe.pad_grid(observation, SHAPE, padded)
    np.testing.assert_allclose(wide.apply(jnp.asarray(field)), observation.apply(jnp.asarray(FIELD)), atol=1e-6)
    assert not np.asarray(wide.adjoint(observation.sigma, padded))[SHAPE[0] :].any()


# --- mistakes -----------------------------------------------------------------------------------------------


def test_points_on_land_are_refused():
    ocean = EVERYWHERE.copy()
    ocean[4, 6] = False
    with pytest.raises(InputError, match=r"observation 1 at lat .* lies on land"):
        points(LAT[[2, 4]], LON[[2, 6]], ocean)
    with pytest.raises(
        InputError, match=r"observation 0 at lat 17.* lies outside .*; observations 1 .*, 2 .* lie on land"
    ):
        points([17.0, LAT[4], LAT[4]], LON[[2, 6, 6]], ocean)
    with pytest.raises(InputError, match=r"cell \(y=4, x=6\) is observed but lies on land"):
        observe.from_cells(EVERYWHERE, FIELD, 0.1, ocean)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [[0.1, 0.1], [0.1, np.nan]]])
def test_errors_must_be_positive(sigma):
    with pytest.raises(InputError, match="sigma must be positive and finite"):
        points(LAT[:2], LON[:2], sigma=sigma)


def test_errors_of_both_components():
    np.testing.assert_allclose(points(LAT[:3], LON[:3], sigma=[0.1, 0.2], size=3).sigma, [[0.1, 0.2]] * 3)


@pytest.mark.parametrize("sigma", [[0.1, 0.2, 0.3], np.ones((3, 3)), np.ones((3, 1))])
def test_errors_must_be_one_or_one_a_component(sigma):
    with pytest.raises(InputError, match=r"sigma must be one number or \(3, 2\)"):
        points(LAT[:3], LON[:3], sigma=sigma)


def test_values_must_be_finite():
    velocity = np.array([[0.1, 0.2], [np.nan, 0.1]])
    with pytest.raises(InputError, match=r"observation 1 is not finite \(u, v = nan, 0.1\)"):
        points(LAT[:2], LON[:2], velocity=velocity)
    with pytest.raises(InputError, match="observation 0 is not finite"):
        observe.from_cells(EVERYWHERE, np.full_like(FIELD, np.nan), 0.1, EVERYWHERE)
    with pytest.raises(InputError, match="observation 0 at lat nan"):
        points(np.array([np.nan]), LON[:1])


def test_nothing_observed_is_refused():
    with pytest.raises(InputError, match="no observation"):
        observe.from_cells(~EVERYWHERE, FIELD, 0.1, EVERYWHERE)
    with pytest.raises(InputError, match="no observation"):
        points(np.zeros(0), np.zeros(0))


def test_shapes_must_agree():
    with pytest.raises(InputError, match="different grids"):
        observe.from_cells(EVERYWHERE[:-1], FIELD, 0.1, EVERYWHERE)
    with pytest.raises(InputError, match="2 latitudes, 3 longitudes and 2 velocities"):
        points(LAT[:2], LON[:3])
    with pytest.raises(InputError, match=r"velocities must be \(m, 2\)"):
        points(LAT[:3], LON[:3], velocity=np.zeros((2, 3)))


# --- patterns -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocean():
    return twin.grid()[0]


def test_line_is_the_ocean_of_a_row(ocean):
    observed = observe.parse("line:22", ocean, RNG)
    np.testing.assert_array_equal(observed[22], ocean[22])
    assert observed.sum() == ocean[22].sum()


@pytest.mark.parametrize("seed", range(4))
def test_walk_is_connected_and_of_distinct_cells(ocean, seed):
    observed = observe.parse("walk:90", ocean, np.random.default_rng(seed))
    assert observed.sum() == 90
    assert not (observed & ~ocean).any()
    assert ndimage.label(observed)[1] == 1
    np.testing.assert_array_equal(observed, observe.walk(ocean, 90, np.random.default_rng(seed)))
    assert (observed != observe.walk(ocean, 90, np.random.default_rng(seed + 100))).any()


def test_walk_stays_in_the_largest_piece_and_can_fill_it():
    ocean = np.zeros((7, 9), bool)
    ocean[:3, :4] = ocean[5:, 5:] = True
    np.testing.assert_array_equal(observe.walk(ocean, 12, np.random.default_rng(0))[:3, :4], True)
    with pytest.raises(InputError, match="a walk of 13 cells does not fit"):
        observe.walk(ocean, 13, np.random.default_rng(0))
    assert observe.walk(ocean, 1, np.random.default_rng(0)).sum() == 1
    with pytest.raises(InputError, match="at least one cell"):
        observe.walk(ocean, 0, np.random.default_rng(0))


def test_walk_keeps_its_heading():
    track = observe.walk(np.ones((200, 200), bool), 40, np.random.default_rng(4), turn=0.0)
    assert 1 in (track.any(0).sum(), track.any(1).sum())


@pytest.mark.parametrize(("draw", "straight"), [(0.21, True), (0.19, False)])
def test_walk_turns_at_every_fifth_step_unless_told_otherwise(draw, straight):
    class Fixed(np.random.Generator):
        def random(self):
            return draw

    track = observe.parse("walk:30", np.ones((200, 200), bool), Fixed(np.random.PCG64(4)))
    assert (1 in (track.any(0).sum(), track.any(1).sum())) == straight


@pytest.mark.parametrize(("fraction", "count"), [("0.02", 0.02), ("1", 1.0), ("1e-9", 0.0)])
def test_cells_are_a_fraction_of_the_ocean(ocean, fraction, count):
    observed = observe.parse(f"cells:{fraction}", ocean, np.random.default_rng(0))
    assert observed.sum() == max(round(count * ocean.sum()), 1)
    assert not (observed & ~ocean).any()


@pytest.mark.parametrize("width", [1, 3, 6])
def test_swath_is_a_band_of_its_width(width):
    ocean = np.ones((60, 80), bool)
    for seed in range(5):
        observed = observe.swath(ocean, width, np.random.default_rng(seed))
        angle = np.linspace(0, np.pi, 2000)
        across = np.argwhere(observed) @ np.stack([np.cos(angle), -np.sin(angle)])
        # Seen along the band, cell centres lie within it and come close to both of its edges.
        assert width - 1 <= np.ptp(across, axis=0).min() < width + 0.05
        assert ndimage.label(observed, np.ones((3, 3)))[1] == 1
        assert observed[[0, -1]].any() or observed[:, [0, -1]].any()


def test_swaths_run_in_every_direction():
    """Counted by the main axis of their cells, in eighths of a turn."""
    counts = np.zeros(4, int)
    for seed in range(80):
        y, x = np.nonzero(observe.swath(np.ones((60, 60), bool), 1, np.random.default_rng(seed)))
        angle = np.angle(np.sum(((x - x.mean()) + 1j * (y - y.mean())) ** 2)) / 2 % np.pi
        counts[int(angle / np.pi * 4) % 4] += 1
    assert counts.min() > 8


def test_swath_is_on_the_ocean(ocean):
    observed = observe.parse("swath:3", ocean, np.random.default_rng(1))
    assert observed.any()
    assert not (observed & ~ocean).any()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_gaps_hide_a_fraction_of_the_ocean_in_patches(ocean, fraction):
    sizes = []
    for seed in range(5):
        observed = observe.parse(f"gaps:{fraction}", ocean, np.random.default_rng(seed))
        assert not (observed & ~ocean).any()
        hidden = ocean & ~observed
        assert hidden.sum() == round(fraction * ocean.sum())
        # Neighbours of a hidden cell are hidden too, far more often than of one drawn alone.
        east = ocean[:, 1:] & ocean[:, :-1]
        assert hidden[:, 1:][east & hidden[:, :-1]].mean() > (1 + fraction) / 2
        sizes.append(ndimage.label(hidden)[1])
    assert np.mean(sizes) < 30


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gaps:0", r"hidden cells must be in \(0, 1\), got 0"),
        ("gaps:1", r"hidden cells must be in \(0, 1\), got 1"),
        ("gaps:nan", r"hidden cells must be in \(0, 1\)"),
        ("gaps:1e-9", "leave nothing to observe or to fill"),
        ("gaps", "'gaps' is not one of"),
        ("line:44", "row 44 is outside the grid, which has rows 0..43"),
        ("line:-1", "row -1 is outside"),
        ("line:x", "'line:x' is not one of line:ROW"),
        ("line", "'line' is not one of"),
        ("walk:2.5", "'walk:2.5' is not one of"),
        ("walk:99999", "does not fit"),
        ("cells:0", r"must be in \(0, 1\]"),
        ("cells:1.5", r"must be in \(0, 1\]"),
        ("cells:nan", r"must be in \(0, 1\]"),
        ("swath:0", "at least one cell"),
        ("spiral:3", "'spiral:3' is not one of"),
        ("", "'' is not one of"),
    ],
)
def test_unreadable_patterns_are_refused(ocean, spec, message):
    with pytest.raises(InputError, match=message):
        observe.parse(spec, ocean, RNG)


@pytest.mark.parametrize("spec", ["line:0", "walk:1", "cells:0.5", "swath:2"])
def test_patterns_need_ocean(spec):
    with pytest.raises(InputError, match=r"no ocean cell"):
        observe.parse(spec, np.zeros((4, 5), bool), RNG)


def test_generators_of_patterns_differ_by_seed_and_frame():
    drawn = {observe.pattern_rng(seed, frame).integers(1 << 60) for seed in range(5) for frame in range(20)}
    assert len(drawn) == 100
    assert observe.pattern_rng(3, 7).integers(1 << 60) == observe.pattern_rng(3, 7).integers(1 << 60)


def test_patterns_of_a_setting():
    assert observe.patterns_of(" line:22,walk:90 ,, line:22") == ("line:22", "walk:90")
    assert observe.patterns_of("") == ()


def test_usual_patterns_of_the_twin(ocean):
    assert observe.usual(ocean) == ("line:22", "walk:90", "cells:0.02")
