"""What figures draw: the numbers in the artists are those that were given, scales are shared, titles say what it is."""

import dataclasses
import math
import resource

import numpy as np
import pytest
from matplotlib import image
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.quiver import Quiver

from jax_repaint import metrics, plots, structures
from jax_repaint.errors import InputError

SHAPE = (6, 11)
OCEAN = ~((np.indices(SHAPE)[0] > 3) & (np.indices(SHAPE)[1] < 4))
METRES = 50.0 * np.moveaxis(np.indices(SHAPE), 0, -1)
WHEN = np.datetime64("2021-10-14T18:00", "ns")


def field(seed, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(*SHAPE, 2))


def example(name="line:2", seed=0, scale=1.0, **more):
    truth = np.where(OCEAN[..., None], field(seed, scale), np.nan)
    observed = OCEAN & (np.indices(SHAPE)[0] == 2)
    others = [truth + field(seed + 1 + i, 0.1 * scale) for i in range(3)]
    return plots.Example(name, truth, observed, truth, *others, np.abs(field(seed + 5, 0.1 * scale)), **more)


def lengths(field):
    return np.sqrt((np.asarray(field) ** 2).sum(-1))


def colours_of(ax):
    """Values of the first mesh of a panel, NaN where it has none."""
    mesh = next(artist for artist in ax.collections if isinstance(artist, QuadMesh))
    return np.ma.filled(mesh.get_array(), np.nan).reshape(SHAPE)


def titles_of(ax):
    return ax.get_title("left"), ax.get_title("right")


def lines_of(ax):
    """(label, x, y) of the lines of an axis that have a name."""
    return {
        line.get_label(): np.array(line.get_data(), float)
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def panels(figure):
    return [ax for ax in figure.axes if ax.collections and ax.get_title("left")]


# --- fields -------------------------------------------------------------------------------------------------


def test_currents_draw_the_fields_they_are_given():
    one = example(frame=14711, time=WHEN)
    figure = plots.draw_currents([one], OCEAN, METRES, "Ram Head twin, kalman")
    shown = dict(zip([titles_of(ax)[0] for ax in panels(figure)], panels(figure), strict=True))
    assert list(shown) == list(plots.TITLES.values())
    expected = {
        "truth": one.truth,
        "prior mean": one.prior_mean,
        "ensemble mean": one.mean,
        "one member": one.member,
        "spread": one.spread,
        "error of the mean": one.mean - one.truth,
        "observations": np.where(one.observed[..., None], one.truth, np.nan),
    }
    for name, values in expected.items():
        there = np.where(OCEAN, lengths(values), np.nan)
        np.testing.assert_allclose(colours_of(shown[name]), there, rtol=1e-12, err_msg=name)
    assert titles_of(shown["observations"])[1] == f"{one.observed.sum()} of {OCEAN.sum()} cells"
    scored = OCEAN & ~one.observed
    rmse = np.sqrt(np.mean(lengths(one.mean - one.truth)[scored] ** 2))
    assert titles_of(shown["ensemble mean"])[1] == f"RMS error {rmse:.3f} m/s"
    assert titles_of(shown["spread"])[1] == f"RMS {np.sqrt(np.mean(lengths(one.spread)[scored] ** 2)):.3f} m/s"
    assert figure.get_suptitle() == "Ram Head twin, kalman: line:2, frame 14711, 2021-10-14 18:00"


def test_arrows_are_the_currents_of_their_cells():
    figure = plots.draw_currents([example()], OCEAN, METRES)
    truth = panels(figure)[0]
    (arrows,) = [artist for artist in truth.collections if isinstance(artist, Quiver)]
    rows, columns = (arrows.Y / 50).astype(int), (arrows.X / 50).astype(int)
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], -1), example().truth[rows, columns])
    assert len(rows) == OCEAN.sum()  # this grid is small enough for all of them
    assert not any(isinstance(artist, Quiver) for artist in panels(figure)[-1].collections)


@pytest.mark.parametrize("count", [1, 2])
def test_without_a_truth_there_is_no_error(count):
    alone = [dataclasses.replace(example(seed=seed), truth=None) for seed in range(count)]
    figure = plots.draw_currents(alone, OCEAN, METRES)
    shown = [title for title, _ in map(titles_of, panels(figure))]
    wanted = ["observations", "prior_mean", "mean", "member", "spread"]
    assert shown == [plots.TITLES[name] for name in wanted for _ in range(count)]
    numbers = [number for title, number in map(titles_of, panels(figure)) if title != plots.TITLES["observations"]]
    rms = np.sqrt(np.mean(lengths(alone[-1].spread)[OCEAN & ~alone[-1].observed] ** 2))
    assert numbers[: 3 * count] == [""] * (3 * count)
    assert numbers[-1] == f"RMS {rms:.3f} m/s"
    assert figure.axes[-1].get_ylabel() == "spread (m/s)"
    ax = panels(figure)[2 * count]
    np.testing.assert_allclose(colours_of(ax), np.where(OCEAN, lengths(alone[0].mean), np.nan))


@pytest.mark.parametrize("draw", ["currents", "stamps"])
def test_arrows_point_where_the_water_goes_on_the_map(draw):
    """Off the middle meridian of a wide domain a cell's own north is not the map's."""
    one, turned = example(), np.random.default_rng(4).uniform(-np.pi, np.pi, SHAPE)
    if draw == "currents":
        figure = plots.draw_currents([one], OCEAN, METRES, convergence=turned)
    else:
        figure = plots.draw_stamps(one.member[None], one.truth, one.observed, OCEAN, METRES, convergence=turned)
    (arrows,) = (artist for artist in panels(figure)[0].collections if isinstance(artist, Quiver))
    cell = [int(np.linalg.norm(METRES[..., ::-1] - place, axis=-1).argmin()) for place in arrows.XY * 1.0]
    want = (one.truth @ [1, 1j] * np.exp(1j * turned)).ravel()[cell]
    np.testing.assert_allclose(arrows.U + 1j * arrows.V, want, rtol=1e-12)


def test_slow_currents_have_errors_too():
    shown = [plots.digits(speed) for speed in (0.1234, 0.01, 0.00123, 4.6e-5)]
    assert shown == ["0.123", "0.010", "0.0012", "4.6e-05"]


def test_a_field_that_is_observed_everywhere_is_drawn():
    complete = dataclasses.replace(example(), truth=None, observed=OCEAN)
    titles = dict(map(titles_of, panels(plots.draw_currents([complete], OCEAN, METRES))))
    assert titles[plots.TITLES["spread"]] == ""
    assert titles[plots.TITLES["observations"]] == f"{OCEAN.sum()} of {OCEAN.sum()} cells"


def test_a_spread_that_is_not_known_is_not_drawn_as_none():
    unknown = dataclasses.replace(example(), spread=np.full((*SHAPE, 2), np.nan))
    titles = dict(map(titles_of, panels(plots.draw_currents([unknown], OCEAN, METRES))))
    assert titles[plots.TITLES["spread"]] == "unknown"
    assert titles[plots.TITLES["error"]].startswith("RMS 0.")


def test_all_examples_share_their_scales():
    examples = [example("line:2", 0, 1.0, frame=3, time=WHEN), example("cells:0.1", 20, 5.0)]
    figure = plots.draw_currents(examples, OCEAN, METRES)
    tops = {}
    for ax in panels(figure):
        mesh = ax.collections[0]
        deviation = titles_of(ax)[0] in ("spread", "error of the mean")
        assert mesh.cmap == (plots.DEVIATION if deviation else plots.SPEED)
        tops.setdefault(deviation, set()).add(mesh.get_clim())
    assert {len(found) for found in tops.values()} == {1}
    ((low, high),) = tops[False]
    speeds = np.concatenate([lengths(one.truth)[OCEAN] for one in examples])
    assert low == 0
    assert high == pytest.approx(np.percentile(speeds, 99.5))
    written = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"line:2", "cells:0.1", "frame 3, 2021-10-14 18:00"} <= written


def test_the_coast_runs_between_land_and_ocean():
    figure = plots.draw_currents([example()], OCEAN, METRES)
    (coast,) = [artist for artist in panels(figure)[0].collections if isinstance(artist, LineCollection)]
    edges = np.stack(coast.get_segments())
    middle = edges.mean(1)
    # Land is the block of the two northern rows and the four western columns, with cells 50 m wide.
    assert len(edges) == 4 + 2
    np.testing.assert_allclose(np.unique(middle[:4, 1]), 175)
    np.testing.assert_allclose(np.sort(middle[:4, 0]), [0, 50, 100, 150])
    np.testing.assert_allclose(middle[4:], [[175, 200], [175, 250]])
    np.testing.assert_allclose(lengths(edges[:, 1] - edges[:, 0]), 50)


def test_stamps_show_every_member_with_its_error():
    truth = example().truth
    members = np.stack([truth + field(10 + i, 0.2) for i in range(5)])
    observed = example().observed
    figure = plots.draw_stamps(members, truth, observed, OCEAN, METRES, "kalman, line:2")
    shown = panels(figure)
    assert [titles_of(ax)[0] for ax in shown] == ["truth", "mean", *(f"member {i + 1}" for i in range(5))]
    for ax, values in zip(shown, [truth, members.mean(0), *members], strict=True):
        np.testing.assert_allclose(colours_of(ax), np.where(OCEAN, lengths(values), np.nan), rtol=1e-12)
        dots = ax.get_lines()[0].get_xydata()
        np.testing.assert_allclose(dots, METRES[observed][:, ::-1])
    assert len({ax.collections[0].get_clim() for ax in shown}) == 1
    scored = OCEAN & ~observed
    for ax, values in zip(shown[1:], [members.mean(0), *members], strict=True):
        rmse = np.sqrt(np.mean(lengths(values - truth)[scored] ** 2))
        assert titles_of(ax)[1] == f"RMS error {rmse:.3f} m/s"
    assert figure.get_suptitle() == "kalman, line:2"


@pytest.mark.parametrize("turned", [False, True])
def test_titles_of_stamps_do_not_overlap(turned, tmp_path):
    def turn(values):
        return np.moveaxis(values, -2, -3) if turned else values

    truth = example().truth
    members = np.stack([truth + field(i, 0.2) for i in range(12)])
    ocean, observed = (mask.T if turned else mask for mask in (OCEAN, example().observed))
    metres = turn(METRES)[..., ::-1] if turned else METRES
    figure = plots.draw_stamps(turn(members), turn(truth), observed, ocean, metres)
    figure.draw_without_rendering()
    for ax in panels(figure)[1:]:
        left, right = ax._left_title.get_window_extent(), ax._right_title.get_window_extent()
        assert left.x1 < right.x0


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.draw_currents([], OCEAN, METRES), "at least one example"),
        (lambda: plots.draw_currents([example()], OCEAN, METRES[:3]), "different grids"),
        (lambda: plots.draw_currents([example()], OCEAN[:, :5], METRES[:, :5]), r"truth of example 'line:2' is"),
        (lambda: plots.draw_stamps(field(0)[None, :3], field(0), ~OCEAN, OCEAN, METRES), "do not fit together"),
        (lambda: plots.draw_stamps(np.zeros((0, *SHAPE, 2)), field(0), ~OCEAN, OCEAN, METRES), "do not fit together"),
        (lambda: plots.draw_stamps(field(0)[None], field(0), OCEAN, OCEAN, METRES), "no cell to score"),
    ],
)
def test_fields_that_do_not_fit_are_refused(draw, words):
    with pytest.raises(InputError, match=words):
        draw()


# --- training -----------------------------------------------------------------------------------------------


def test_loss_curves_hold_the_log_and_mark_the_lowest():
    epoch = np.arange(1, 6)
    train, test, ema = 1 / epoch, np.array([0.9, np.nan, 0.8, 0.7, 0.75]), np.array([0.9, 0.6, 0.5, 0.55, 0.7])
    figure = plots.draw_loss(epoch, train, test, ema, 1e-3 * epoch, "runs/small", linear=0.8)
    above, below = figure.axes
    lines = lines_of(above)
    np.testing.assert_allclose(lines["training"], [epoch, train])
    np.testing.assert_allclose(lines["exact Gaussian denoiser, held out, 0.8"][1], 0.8)
    np.testing.assert_allclose(lines["held out"], [[1, 3, 4, 5], [0.9, 0.8, 0.7, 0.75]])
    np.testing.assert_allclose(lines["held out, EMA weights, lowest 0.5 at epoch 3"], [epoch, ema])
    np.testing.assert_allclose(below.get_lines()[0].get_ydata(), 1e-3 * epoch)
    marked = [line for line in above.get_lines() if line.get_marker() == "o"]
    assert [tuple(np.ravel(line.get_data())) for line in marked] == [(3, 0.5)]
    with pytest.raises(InputError, match="differ in length"):
        plots.draw_loss(epoch, train[:2], test, ema, epoch)
    with pytest.raises(InputError, match="no positive value"):
        plots.draw_loss(epoch, -train, test, ema, epoch)


def test_denoising_errors_stand_beside_the_gaussian_denoiser():
    sigma = np.geomspace(0.01, 100, 9)
    gaussian = sigma**2 / (1 + sigma**2)
    networks = {"small": 0.9 * gaussian, "attn": 0.7 * gaussian}
    above, below = plots.draw_denoising(sigma, networks, gaussian, "validation frames").axes
    lines = lines_of(above)
    np.testing.assert_allclose(lines["Gaussian denoiser"], [sigma, gaussian])
    for name, ratio in (("small", 0.9), ("attn", 0.7)):
        np.testing.assert_allclose(lines[name], [sigma, ratio * gaussian])
    ratios = [line.get_ydata() for line in below.get_lines()[1:]]
    np.testing.assert_allclose(ratios, [np.full(9, 0.9), np.full(9, 0.7)])
    assert above.get_xscale() == above.get_yscale() == "log"
    for bad in ({}, {"small": gaussian[:3]}, {"small": np.zeros(9)}):
        with pytest.raises(InputError):
            plots.draw_denoising(sigma, bad, gaussian)


# --- calibration --------------------------------------------------------------------------------------------


def test_rank_histogram_is_relative_to_a_flat_one():
    figure = plots.draw_rank_histogram(np.array([1, 3, 2]), "kalman, walk:90")
    (ax,) = figure.axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, 1.5, 1.0])
    assert ax.get_title() == "kalman, walk:90"
    for counts in ([4], [0, 0, 0]):
        with pytest.raises(InputError, match="at least two bins"):
            plots.draw_rank_histogram(np.array(counts))


def test_reliability_is_observed_against_nominal_coverage():
    rng = np.random.default_rng(0)
    truth, members = rng.normal(size=(6, 7, 2)), rng.normal(size=(30, 6, 7, 2))
    scored = np.ones((6, 7), bool)
    levels = np.array([0.2, 0.5, 0.9])
    inside = np.array([metrics.coverage(truth, members, scored, level) for level in levels])
    figure = plots.draw_reliability(levels, {"kalman": inside, "narrow": inside / 2}, "walk:90")
    (ax,) = figure.axes
    lines = lines_of(ax)
    np.testing.assert_allclose(lines["kalman"], [levels, inside])
    np.testing.assert_allclose(lines["narrow"], [levels, inside / 2])
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"kalman", "narrow"}
    for bad in ({}, {"kalman": inside[:2]}, {"kalman": inside + 1}):
        with pytest.raises(InputError):
            plots.draw_reliability(levels, bad)


# --- scales and distances -----------------------------------------------------------------------------------


def test_spectra_are_drawn_by_wavelength():
    rng = np.random.default_rng(1)
    truth, members = rng.normal(size=(12, 16, 2)), rng.normal(size=(3, 12, 16, 2))
    ocean = np.ones((12, 16), bool)
    made = {name: structures.spectrum(truth, k * members, ocean, 40.0, 50.0) for name, k in (("a", 1), ("b", 0.5))}
    figure = plots.draw_spectra(made, "walk:90")
    above, below = figure.axes
    lines = lines_of(above)
    wavelength = 1 / made["a"].wavenumber
    np.testing.assert_allclose(lines["truth"], [wavelength, made["a"].truth])
    for number, name in enumerate(made):
        np.testing.assert_allclose(lines[name], [wavelength, made[name].members])
        np.testing.assert_allclose(below.get_lines()[1 + number].get_ydata(), made[name].ratio)
    np.testing.assert_allclose(lines["b"][1], lines["a"][1] / 4)
    assert above.xaxis.get_inverted()
    assert below.get_xlabel() == "wavelength (m)"
    other = structures.spectrum(2 * truth, members, ocean, 40.0, 50.0)
    with pytest.raises(InputError, match="the spectrum of b is of another truth"):
        plots.draw_spectra({"a": made["a"], "b": other})
    with pytest.raises(InputError, match="at least one"):
        plots.draw_spectra({})


def test_errors_against_distance_are_lengths_in_their_bins():
    edges = np.array([0.0, 2.0, 5.0, np.inf])
    made = metrics.DistanceErrors(edges, np.array([10, 30, 5]), np.array([1e-4, 4e-4, np.nan]), np.full(3, 9e-4))
    better = metrics.DistanceErrors(edges, made.counts, made.mean / 2, made.baseline)
    above, below = plots.draw_distance({"kalman": made, "better": better}, "linear", "cells").axes
    lines = lines_of(above)
    np.testing.assert_allclose(lines["kalman"][0], [1, 3.5, 6.5])
    np.testing.assert_allclose(lines["kalman"][1], np.sqrt([2e-4, 8e-4, np.nan]))
    np.testing.assert_allclose(lines["better"][1], np.sqrt([1e-4, 4e-4, np.nan]))
    np.testing.assert_allclose(lines["linear"][1], np.sqrt(np.full(3, 18e-4)))
    counts, drawn, _ = below.patches[0].get_data()
    np.testing.assert_allclose(counts, made.counts)
    np.testing.assert_allclose(drawn, [0, 2, 5, 8])
    assert below.get_xlabel() == "distance to the nearest observation (cells)"
    fewer = metrics.DistanceErrors(edges, made.counts - 5, made.mean, made.baseline / 4)
    lines = lines_of(plots.draw_distance({"kalman": made, "plain": fewer}, "linear").axes[0])
    np.testing.assert_allclose(lines["linear"][1], np.sqrt(np.full(3, 18e-4)))
    np.testing.assert_allclose(lines["linear, cells of plain"][1], np.sqrt(np.full(3, 4.5e-4)))
    other = metrics.DistanceErrors(edges + 1, made.counts, made.mean, made.baseline)
    with pytest.raises(InputError, match="the errors of other are of other distances"):
        plots.draw_distance({"kalman": made, "other": other}, "linear")
    with pytest.raises(InputError, match="at least one method"):
        plots.draw_distance({}, "linear")


# --- stages and settings ------------------------------------------------------------------------------------


def curve(name="guided", x=(0.01, 1.0, 100.0), value=(1.2, 0.9, np.nan), **more):
    return plots.Curve(name, np.array(x), np.array(value), **more)


def test_sweeps_draw_values_intervals_and_failures():
    value = np.array([1.2, 0.9, np.nan])
    made = curve(lo=value - 0.1, hi=value + 0.2)
    reference = ("linear", 1.0)
    figure = plots.draw_sweep([made, curve("plain", value=(1, 2, 3))], "guidance scale", "MSE ratio", "S1", reference)
    (ax,) = figure.axes
    lines = lines_of(ax)
    np.testing.assert_allclose(lines["guided"], [made.x, value])
    np.testing.assert_allclose(lines["plain"], [made.x, [1, 2, 3]])
    np.testing.assert_allclose(lines["linear"][1], 1)
    (band,) = [artist for artist in ax.collections if isinstance(artist, PolyCollection)]
    corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices.round(9)}
    assert {(0.01, 1.1), (0.01, 1.4), (1.0, 0.8), (1.0, 1.1)} <= corners
    (failed,) = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert failed.get_xdata() == [100.0]
    assert ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel(), figure.get_suptitle()) == ("guidance scale", "MSE ratio", "S1")


@pytest.mark.parametrize(("highest", "scale"), [(20.0, "linear"), (40.0, "log")])
def test_axes_are_logarithmic_where_values_span_much(highest, scale):
    figure = plots.draw_sweep([curve(x=(1, 2, 3), value=(1, 2, highest))], "gamma", "MSE ratio")
    assert figure.axes[0].get_yscale() == scale
    assert figure.axes[0].get_xscale() == "linear"


def test_places_at_zero_leave_the_others_room():
    (ax,) = plots.draw_sweep([curve(x=(0, 16, 1425), value=(1, 2, 3))], "network calls", "CRPS").axes
    zero, few, many = ax.transData.transform([(0, 1), (16, 1), (1425, 1)])[:, 0]
    assert ax.get_xscale() == "symlog"
    assert zero < few
    assert few - zero < many - few < 5 * (few - zero)
    (ax,) = plots.draw_sweep([curve(x=(2, 4, 8))], "members", "ratio").axes
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_points_without_neighbours_show_their_interval():
    value = np.array([1.0, np.nan, 2.0, 3.0])
    made = curve(x=(1, 2, 3, 4), value=value, lo=value - 0.5, hi=value + 0.5)
    (ax,) = plots.draw_sweep(
        [made, curve("single", (2,), (1.5,), lo=np.array([1.4]), hi=np.array([1.6]))], "t", ""
    ).axes
    bars = [artist.get_segments() for artist in ax.collections if isinstance(artist, LineCollection)]
    np.testing.assert_allclose(bars, [[[[1, 0.5], [1, 1.5]]], [[[2, 1.4], [2, 1.6]]]])


def test_words_stand_side_by_side():
    patterns = ["line:22", "walk:90", "cells:0.02"]
    first = curve("a", patterns, (1, 2, 3), lo=np.array([0.5, 1.5, 2.5]), hi=np.array([1.5, 2.5, np.nan]))
    second = curve("b", patterns[1:], (4, 5))
    (ax,) = plots.draw_sweep([first, second], "pattern", "ratio").axes
    assert [text.get_text() for text in ax.get_xticklabels()] == patterns
    lines = lines_of(ax)
    np.testing.assert_allclose(lines["a"], [[-0.1, 0.9, 1.9], [1, 2, 3]])
    np.testing.assert_allclose(lines["b"], [[1.1, 2.1], [4, 5]])
    (bars,) = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
    np.testing.assert_allclose(bars.get_segments()[:2], [[[-0.1, 0.5], [-0.1, 1.5]], [[0.9, 1.5], [0.9, 2.5]]])
    assert all(line.get_linestyle() == "None" for line in ax.get_lines())


def test_stages_are_whole_numbers_and_the_best_is_filled():
    one = curve("multistage", (1, 2, 3, 4), (1.4, 1.0, np.nan, 1.2))
    (ax,) = plots.draw_stages([one], "MSE ratio", "S10", ("linear", 1.0)).axes
    np.testing.assert_allclose(lines_of(ax)["multistage"], [[1, 2, 3, 4], [1.4, 1.0, np.nan, 1.2]])
    filled = [line for line in ax.get_lines() if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    assert [tuple(np.ravel(line.get_data())) for line in filled] == [(2, 1.0)]
    assert ax.get_xlabel() == "stage"
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    for x in ((0, 1, 2), (1, 1.5, 2), ("one", "two", "three")):
        with pytest.raises(InputError, match="counted from 1"):
            plots.draw_stages([curve(x=x)], "MSE ratio")


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        ([], "at least one curve"),
        ([curve(value=(1, 2))], r"guided: value \(2,\) and x \(3,\)"),
        ([curve(x=(), value=())], "are empty"),
        ([curve(lo=np.zeros(3), hi=np.zeros(2))], r"hi \(2,\)"),
        ([curve(), curve(x=("a", "b", "c"))], "numbers, or words"),
        ([curve(value=(np.nan, np.inf, np.nan))], "no point of guided has a finite score"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(curves, words):
    with pytest.raises(InputError, match=words):
        plots.draw_sweep(curves, "gamma", "ratio")


# --- colours and files --------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency"
# (2009), severity 1: protanopia, deuteranopia, tritanopia, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def to_lab(rgb):
    """CIE L*a*b* (D65) of linear RGB."""
    xyz = rgb @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def linear(colours):
    srgb = np.array([[int(to_hex(c)[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_colours_remain_apart_under_colour_blindness(kind):
    matrix = np.array(DEFICIENCIES[kind])
    lab = to_lab(np.clip(linear(plots.COLOURS) @ matrix.T, 0, 1))
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert apart[~np.eye(len(lab), dtype=bool)].min() > 6
    # The first three are those that most figures need.
    assert apart[:3, :3][~np.eye(3, dtype=bool)].min() > 15


@pytest.mark.parametrize("kind", DEFICIENCIES)
@pytest.mark.parametrize("name", ["SPEED", "DEVIATION"])
def test_colour_maps_darken_steadily(kind, name):
    colours = getattr(plots, name)(np.linspace(0, 1, 64))
    lightness = to_lab(np.clip(linear(colours) @ np.array(DEFICIENCIES[kind]).T, 0, 1))[:, 0]
    assert (np.diff(lightness) < 0.3).all()
    assert lightness[0] - lightness[-1] > 40


def test_curves_of_any_number_look_different():
    looks = {(look["color"], look["marker"], look["ls"]) for look in map(plots._look, range(28))}
    assert len(looks) == 28


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_suffix_chooses_the_format(tmp_path, suffix):
    path = tmp_path / f"figure{suffix}"
    plots.sweep(path, [curve()], "gamma", "ratio", "title")
    start = path.read_bytes()[:64]
    assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="figures end in"):
        plots.sweep(tmp_path / "figure.bmp", [curve()], "gamma", "ratio")


def test_every_figure_has_a_function_that_writes_it(tmp_path):
    levels, sigma = np.array([0.5, 0.9]), np.array([0.1, 1.0])
    spectrum = structures.Spectrum(np.array([0.001, 0.01]), np.ones(2), np.ones(2))
    errors = metrics.DistanceErrors(np.arange(3.0), np.array([3, 1]), np.ones(2), np.ones(2))
    calls = {
        "currents": ([example()], OCEAN, METRES),
        "stamps": (field(0)[None], field(1), ~OCEAN, OCEAN, METRES),
        "loss_curve": (levels, levels, levels, levels, levels),
        "denoising": (sigma, {"small": sigma}, sigma),
        "rank_histogram": (np.array([1, 2]),),
        "reliability": (levels, {"kalman": levels}),
        "spectra": ({"kalman": spectrum},),
        "distance": ({"kalman": errors}, "linear"),
        "sweep": ([curve()], "gamma", "ratio"),
        "stages": ([curve(x=(1, 2, 3))], "ratio"),
    }
    drawing = {name.removeprefix("draw_") for name in dir(plots) if name.startswith("draw_")}
    assert {"loss_curve" if name == "loss" else name for name in drawing} == set(calls)
    for name, arguments in calls.items():
        getattr(plots, name)(tmp_path / f"{name}.png", *arguments, title="a title")
        pixels = image.imread(tmp_path / f"{name}.png")
        assert math.prod(pixels.shape[:2]) > 1e5
        # Nothing is cut off: the outermost pixels are blank.
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge[..., :3] == 1).all(), name


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_disk_that_fills_up_leaves_no_picture(tmp_path, suffix):
    figure = plots.draw_reliability(np.linspace(0, 1, 9), {"kalman": np.linspace(0, 1, 9)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*: File too large"):
            plots.save(figure, tmp_path / f"figure{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
