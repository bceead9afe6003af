"""Figures: fields with their observations, estimates and errors; training curves; rank histograms.

Every function builds a matplotlib `Figure` of its own, without pyplot and its global state, and writes it
whole; the suffix of the path chooses the format (.png, .svg, .pdf). Land is grey and ocean without a value pale
blue; colour maps are perceptually uniform.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import MatplotlibDeprecationWarning
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from jax_repaint import metrics
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file

with warnings.catch_warnings():
    # cmocean 4.0 builds its maps with an argument that matplotlib deprecated in 3.11.
    warnings.simplefilter("ignore", MatplotlibDeprecationWarning)
    import cmocean

LAND, OCEAN = "0.6", "#e6edf5"
FORMATS = (".png", ".svg", ".pdf")
# Blue, orange and green that remain apart under colour blindness (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
PANELS = ("truth", "observations", "prior_mean", "mean", "member", "spread", "error")
TITLES = {
    "truth": "truth",
    "observations": "observations",
    "prior_mean": "prior mean",
    "mean": "ensemble mean",
    "member": "one member",
    "spread": "spread",
    "error": "error of the mean",
}
DEVIATIONS = ("spread", "error")
ARROWS = 20  # along the longer side


@dataclasses.dataclass(frozen=True)
class Example:
    """One field and what was made of it, all in m/s.

    Attributes:
      name: of the observation pattern, or whatever tells the examples apart.
      truth: (y, x, 2); NaN where unknown.
      observed: (y, x) bool.
      values: (y, x, 2) observed velocities, read on observed cells only.
      prior_mean: (y, x, 2) the linear estimate that the ensemble starts from.
      mean: (y, x, 2) of the ensemble.
      member: (y, x, 2) one of the ensemble.
      spread: (y, x, 2) standard deviation of each component.
    """

    name: str
    truth: np.ndarray
    observed: np.ndarray
    values: np.ndarray
    prior_mean: np.ndarray
    mean: np.ndarray
    member: np.ndarray
    spread: np.ndarray


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure whole, in the format that the suffix names.

    Raises:
      InputError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: figures end in {', '.join(FORMATS)}")
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), dpi=150, layout="compressed")
    FigureCanvasAgg(figure)
    return figure


# --- fields -------------------------------------------------------------------------------------------------


def draw_currents(examples: Sequence[Example], ocean: np.ndarray, metres: np.ndarray, title: str = "") -> Figure:
    """Truth, observations, prior mean, ensemble mean, a member, spread and error of each example.

    Speeds share one colour scale and one length of arrows. Spread and error are lengths of vectors too and
    share another, so that a calibrated spread looks as large as the error. Numbers are root mean squares of
    those lengths over unobserved ocean cells.

    Args:
      examples: one or several on the same grid.
      ocean: (y, x) bool.
      metres: (y, x, 2) positions of cells north and east, as `Fields.metres` gives them.
      title: above the figure.

    Raises:
      InputError: no example, arrays of another grid, or no cell to compare.
    """
    ocean, metres = np.asarray(ocean, bool), np.asarray(metres, float)
    _check(examples, ocean, metres)
    extent = np.ptp(metres, axis=(0, 1))
    unit, place = ("km", metres / 1000) if extent.max() > 10_000 else ("m", metres)
    wide = extent[1] > 1.2 * extent[0]
    layout = _layout(len(examples), wide)
    width = 3.5 if wide else 2.3
    height = width * np.clip(extent[0] / extent[1], 0.3, 3)
    figure = _new_figure(layout.shape[1] * width + 1.2, layout.shape[0] * (height + 0.25) + 1.0)
    axes = figure.subplots(*layout.shape, squeeze=False, sharex=True, sharey=True)
    fields = [_panel_fields(example, ocean) for example in examples]
    speed = _scale([f["truth"] for f in fields], cmocean.cm.speed, 0.75)
    deviation = _scale([f[name] for f in fields for name in ("spread", "error")], cmocean.cm.amp, 0.9)
    for ax, cell in zip(axes.flat, layout.flat, strict=True):
        if cell is None:
            ax.axis("off")
            continue
        index, name = cell
        scale = deviation if name in DEVIATIONS else speed
        _draw_field(ax, fields[index][name], scale, ocean, place, arrows=name not in DEVIATIONS)
        _label(ax, name, examples[index], fields[index], ocean)
    _frame(figure, axes, examples, wide, unit)
    _colour_bars(figure, axes, layout, (speed, deviation), wide)
    alone = examples[0].name if len(examples) == 1 else ""
    figure.suptitle(": ".join(text for text in (title, alone) if text), fontsize=11)
    return figure


def currents(
    path: str | Path, examples: Sequence[Example], ocean: np.ndarray, metres: np.ndarray, title: str = ""
) -> None:
    """`draw_currents` into a file."""
    save(draw_currents(examples, ocean, metres, title), path)


def _check(examples: Sequence[Example], ocean: np.ndarray, metres: np.ndarray) -> None:
    if not examples:
        raise InputError("a figure needs at least one example")
    if metres.shape != (*ocean.shape, 2):
        raise InputError(f"metres {metres.shape} and ocean {ocean.shape} are of different grids")
    for example in examples:
        for field in dataclasses.fields(Example)[1:]:
            shape = np.shape(getattr(example, field.name))
            expected = ocean.shape if field.name == "observed" else (*ocean.shape, 2)
            if shape != expected:
                raise InputError(f"{field.name} of example {example.name!r} is {shape}, expected {expected}")


def _layout(count: int, wide: bool) -> np.ndarray:
    """(example, panel) at every place of the figure; panels run down for wide domains, else across."""
    if count == 1:
        order = [PANELS[:2], PANELS[2:4], (PANELS[4], None), PANELS[5:]]
        rows = [[name and (0, name) for name in row] for row in order]
    else:
        rows = [[(index, name) for index in range(count)] for name in PANELS]
    layout = np.empty((len(rows), len(rows[0])), object)
    for place in np.ndindex(layout.shape):
        layout[place] = rows[place[0]][place[1]]
    return layout if wide else layout.T


def _panel_fields(example: Example, ocean: np.ndarray) -> dict[str, np.ndarray]:
    """What each panel shows, (y, x, 2) with NaN on land and where there is nothing to show."""
    seen = np.where(np.asarray(example.observed)[..., None], example.values, np.nan)
    fields = {name: getattr(example, name) for name in PANELS if hasattr(example, name)}
    fields |= {"observations": seen, "error": np.asarray(example.mean) - example.truth}
    return {name: np.where(ocean[..., None], field, np.nan) for name, field in fields.items()}


def _length(field: np.ndarray) -> np.ndarray:
    return np.sqrt((np.asarray(field, float) ** 2).sum(-1))


def _scale(fields: Sequence[np.ndarray], colours: Colormap, keep: float) -> ScalarMappable:
    """Colours from 0 to nearly the longest vector, without the dark end of the map, which hides arrows."""
    top = np.nanpercentile([_length(field) for field in fields], 99.5)
    kept = ListedColormap(colours(np.linspace(0, keep, 256)))
    return ScalarMappable(Normalize(0, max(float(top), 1e-9)), kept)


def _corners(centres: np.ndarray) -> np.ndarray:
    """Corners (y + 1, x + 1) of cells with these centres (y, x), continued linearly at the rim."""
    for axis in (0, 1):
        before, after = np.take(centres, [0, 1], axis), np.take(centres, [-2, -1], axis)
        first = 2 * np.take(before, [0], axis) - np.take(before, [1], axis)
        last = 2 * np.take(after, [1], axis) - np.take(after, [0], axis)
        grown = np.concatenate([first, centres, last], axis)
        centres = (np.delete(grown, 0, axis) + np.delete(grown, -1, axis)) / 2
    return centres


def _draw_field(
    ax: Axes, field: np.ndarray, scale: ScalarMappable, ocean: np.ndarray, place: np.ndarray, arrows: bool
) -> None:
    """Length of the vectors in colour, land, and arrows: half the top speed reaches from one to the next."""
    y, x = _corners(place[..., 0]), _corners(place[..., 1])
    length = np.ma.masked_invalid(_length(field))
    # Cells become one picture inside vector formats, which would otherwise hold thousands of polygons.
    ax.pcolormesh(x, y, length, cmap=scale.cmap, norm=scale.norm, rasterized=True)
    ax.pcolormesh(x, y, np.ma.masked_where(ocean, ~ocean), cmap=ListedColormap([LAND]), rasterized=True)
    ax.set_facecolor(OCEAN)
    ax.set_aspect("equal")
    if arrows:
        stride = -(-max(ocean.shape) // ARROWS)
        rows, columns = _thin(~np.ma.getmaskarray(length), stride)
        spacing = stride * np.hypot(*np.ptp(place, axis=(0, 1))) / np.hypot(*ocean.shape)
        ax.quiver(
            place[rows, columns, 1],
            place[rows, columns, 0],
            *field[rows, columns].T,
            angles="xy",
            scale_units="xy",
            scale=0.5 * scale.norm.vmax / spacing,
            color="0.1",
            width=0.0028,
        )


def _thin(present: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of one present cell in every block of stride cells, the nearest to its middle."""
    rows, columns = np.nonzero(present)
    middle = (stride - 1) / 2
    order = np.argsort((rows % stride - middle) ** 2 + (columns % stride - middle) ** 2, kind="stable")
    rows, columns = rows[order], columns[order]
    _, first = np.unique(np.stack([rows // stride, columns // stride]), axis=1, return_index=True)
    return rows[first], columns[first]


def _label(ax: Axes, name: str, example: Example, fields: dict[str, np.ndarray], ocean: np.ndarray) -> None:
    ax.set_title(TITLES[name], loc="left", fontsize=8, pad=3)
    scored = metrics.scored_cells(example.truth, ocean, example.observed)
    if name == "observations":
        cells = f"{np.sum(example.observed)} of {np.sum(ocean)} cells"
        ax.set_title(cells, loc="right", fontsize=8, pad=3)
    elif name in ("prior_mean", "mean", "member"):
        rmse = metrics.vector_rmse(metrics.mse(fields[name], example.truth, scored))
        ax.set_title(f"RMS error {rmse:.3f} m/s", loc="right", fontsize=8, pad=3)
    elif name in DEVIATIONS:
        rms = np.sqrt(np.mean(_length(fields[name])[scored] ** 2))
        ax.set_title(f"RMS {rms:.3f} m/s", loc="right", fontsize=8, pad=3)


def _frame(figure: Figure, axes: np.ndarray, examples: Sequence[Example], wide: bool, unit: str) -> None:
    """Coordinates on the outer axes, and the examples' names where there are several."""
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.label_outer()
    figure.supxlabel(f"east ({unit})", fontsize=8)
    figure.supylabel(f"north ({unit})", fontsize=8)
    if len(examples) == 1:
        return
    for example, ax in zip(examples, axes[0] if wide else axes[:, 0], strict=True):
        ax.annotate(
            example.name,
            (0.5, 1) if wide else (0, 0.5),
            (0, 18) if wide else (-36, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=10,
            weight="bold",
            ha="center" if wide else "right",
            va="bottom" if wide else "center",
            rotation=0 if wide else 90,
        )


def _colour_bars(
    figure: Figure,
    axes: np.ndarray,
    layout: np.ndarray,
    scales: tuple[ScalarMappable, ScalarMappable],
    wide: bool,
) -> None:
    """One bar beside the speeds and one beside spread and error, equally thick."""
    is_deviation = np.array([cell is not None and cell[1] in DEVIATIONS for cell in layout.flat])
    labels = ("speed (m/s)", "spread, error (m/s)")
    for scale, chosen, label in zip(scales, (~is_deviation, is_deviation), labels, strict=True):
        along = np.unique(np.argwhere(chosen.reshape(layout.shape))[:, 0 if wide else 1]).size
        bar = figure.colorbar(
            scale,
            ax=list(axes.flat[chosen]),
            location="right" if wide else "bottom",
            extend="max",
            extendfrac=0.05 / along,
            aspect=15 * along,
            pad=0.02,
        )
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)


# --- training -----------------------------------------------------------------------------------------------


def draw_loss(
    epoch: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    ema_test: np.ndarray,
    learning_rate: np.ndarray,
    title: str = "",
) -> Figure:
    """Training and test loss, and test loss of averaged (EMA) weights, against epochs; learning rate below.

    Args:
      epoch: (n,); the other arrays are (n,) too, NaN where a loss was not evaluated.

    Raises:
      InputError: lengths differ, nothing was evaluated, or a loss is not positive.
    """
    epoch = np.asarray(epoch, float)
    figure = _new_figure(7.5, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    curves = (("training", train, "0.6"), ("test", test, BLUE), ("test, EMA weights", ema_test, ORANGE))
    for name, loss, colour in curves:
        loss = np.asarray(loss, float)
        if loss.shape != epoch.shape:
            raise InputError(f"{name} loss {loss.shape} and epoch {epoch.shape} differ in length")
        known = np.isfinite(loss)
        if not known.any() or (loss[known] <= 0).any():
            raise InputError(f"{name} loss has no positive value for every epoch it was evaluated at")
        best = np.flatnonzero(known)[np.argmin(loss[known])]
        label = f"{name}, lowest {loss[best]:.4g} at epoch {epoch[best]:g}" if colour == ORANGE else name
        above.plot(epoch[known], loss[known], color=colour, lw=1.4, label=label)
        if colour == ORANGE:
            above.plot(epoch[best], loss[best], "o", color=colour, ms=5)
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    above.grid(which="both", color="0.9", lw=0.6)
    below.plot(epoch, np.asarray(learning_rate, float), color=GREEN, lw=1.4)
    below.set_ylim(bottom=0)
    below.set_ylabel("learning\nrate")
    below.set_xlabel("epoch")
    below.grid(color="0.9", lw=0.6)
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.suptitle(title, fontsize=11)
    return figure


def loss_curve(
    path: str | Path,
    epoch: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    ema_test: np.ndarray,
    learning_rate: np.ndarray,
    title: str = "",
) -> None:
    """`draw_loss` into a file."""
    save(draw_loss(epoch, train, test, ema_test, learning_rate, title), path)


# --- calibration --------------------------------------------------------------------------------------------


def draw_rank_histogram(counts: np.ndarray, title: str = "") -> Figure:
    """How often the truth took each rank among M members, relative to a flat histogram.

    Args:
      counts: (M + 1,) from `metrics.rank_histogram`, summed over frames.

    Raises:
      InputError: fewer than two bins, or no counts.
    """
    counts = np.asarray(counts, float)
    if counts.ndim != 1 or len(counts) < 2 or not counts.sum() > 0:
        raise InputError(f"a rank histogram needs counts in at least two bins, got {counts.tolist()}")
    figure = _new_figure(5.5, 3)
    ax = figure.subplots()
    ax.bar(np.arange(len(counts)), counts / counts.mean(), width=0.9, color=BLUE)
    ax.axhline(1, color="0.1", lw=1, ls="--")
    ax.set_xlabel("rank of the truth among the members")
    ax.set_ylabel("frequency / flat")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=11)
    return figure


def rank_histogram(path: str | Path, counts: np.ndarray, title: str = "") -> None:
    """`draw_rank_histogram` into a file."""
    save(draw_rank_histogram(counts, title), path)
