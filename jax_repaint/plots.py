"""Figures: fields, ensembles and their errors; training; calibration; scales; scores against stages and settings.

Every function builds a matplotlib `Figure` of its own, without pyplot and its global state, and writes it
whole; the suffix of the path chooses the format (.png, .svg, .pdf). Land is grey and ocean without a value pale
blue; colour maps are perceptually uniform, and curves differ in marker as well as in colour. Every `draw_X` has
an `X` beside it that writes the figure to a file.
"""

import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import MatplotlibDeprecationWarning
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from jax_repaint import metrics, structures
from jax_repaint.data import staggered
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file

with warnings.catch_warnings():
    # cmocean 4.0 builds its maps with an argument that matplotlib deprecated in 3.11.
    warnings.simplefilter("ignore", MatplotlibDeprecationWarning)
    from cmocean import cm as MAPS

# Without the dark end of each map, which hides arrows.
SPEED = ListedColormap(MAPS.speed(np.linspace(0, 0.75, 256)))
DEVIATION = ListedColormap(MAPS.amp(np.linspace(0, 0.9, 256)))
LEGEND = {"framealpha": 0.8, "edgecolor": "none"}  # curves show through
LAND, OCEAN = "0.6", "#e6edf5"
FORMATS = (".png", ".svg", ".pdf")
# Colours that remain apart under colour blindness (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PINK, AMBER, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS, MARKERS, DASHES = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, "0.4"), "os^Dv<>", ("-", "--", ":", "-.")
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
ARROWS, STAMP_ARROWS = 20, 14  # along the longer side


@dataclasses.dataclass(frozen=True)
class Example:
    """One field and what was made of it, all in m/s.

    Attributes:
      name: of the observation pattern, or whatever tells the examples apart.
      truth: (y, x, 2); NaN where unknown. None if the observations are all that is known.
      observed: (y, x) bool.
      values: (y, x, 2) observed velocities, read on observed cells only.
      prior_mean: (y, x, 2) the linear estimate that the ensemble starts from.
      mean: (y, x, 2) of the ensemble.
      member: (y, x, 2) one of the ensemble.
      spread: (y, x, 2) standard deviation of each component.
      frame: number in the series, None if it has none.
      time: of the field, None if unknown.
    """

    name: str
    truth: np.ndarray | None
    observed: np.ndarray
    values: np.ndarray
    prior_mean: np.ndarray
    mean: np.ndarray
    member: np.ndarray
    spread: np.ndarray
    frame: int | None = None
    time: np.datetime64 | None = None

    @property
    def when(self) -> str:
        """Frame and time as titles say them, empty if both are unknown."""
        number = "" if self.frame is None else f"frame {self.frame}"
        return ", ".join(text for text in (number, "" if self.time is None else clock(self.time)) if text)


def clock(time: np.datetime64) -> str:
    """A time to the minute, such as 2021-10-14 18:00."""
    return np.datetime_as_string(time, "m").replace("T", " ")


def digits(speed: float) -> str:
    """A speed (m/s) to the millimetre, or to two digits if it is less than a centimetre a second."""
    return f"{speed:.2g}" if speed < 0.01 else f"{speed:.3f}"


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure whole, in the format that the suffix names.

    Raises:
      InputError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: figures end in {', '.join(FORMATS)}")
    # Where a disk is full the writer of .pdf fails over its own cleaning up.
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], bbox_inches="tight", pad_inches=0.08)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches which belongs to no window."""
    figure = Figure((width, height), dpi=150, layout="compressed")
    FigureCanvasAgg(figure)
    return figure


# --- fields -------------------------------------------------------------------------------------------------


def draw_currents(
    examples: Sequence[Example],
    ocean: np.ndarray,
    metres: np.ndarray,
    title: str = "",
    convergence: np.ndarray | float = 0.0,
) -> Figure:
    """Truth, observations, prior mean, ensemble mean, a member, spread and error of each example.

    Speeds share one colour scale and one length of arrows. Spread and error are lengths of vectors too and
    share another, so that a calibrated spread looks as large as the error. Numbers are root mean squares of
    those lengths over unobserved ocean cells. Without a truth there is no error either.

    Args:
      examples: one or several on the same grid, all with a truth or all without.
      ocean: (y, x) bool.
      metres: (y, x, 2) positions of cells north and east, as `Fields.metres` gives them.
      title: above the figure.
      convergence: (y, x) radians by which a cell's east and north are turned there, as `Fields.convergence` gives it.

    Raises:
      InputError: no example, arrays of another grid, or no cell to compare with a truth.
    """
    ocean, metres = np.asarray(ocean, bool), np.asarray(metres, float)
    _check(examples, ocean, metres)
    extent = np.ptp(metres, axis=(0, 1))
    unit, place = ("km", metres / 1000) if extent.max() > 10_000 else ("m", metres)
    wide = extent[1] > 1.2 * extent[0]
    layout = _layout(len(examples), wide, examples[0].truth is not None)
    width = 3.5 if wide else 2.3
    height = width * np.clip(extent[0] / extent[1], 0.3, 3)
    figure = new_figure(layout.shape[1] * width + 1.2, layout.shape[0] * (height + 0.25) + 1.0)
    axes = figure.subplots(*layout.shape, squeeze=False, sharex=True, sharey=True)
    fields = [_panel_fields(example, ocean) for example in examples]
    speed = _scale([f[name] for f in fields for name in (("truth",) if "truth" in f else ("mean", "member"))], SPEED)
    deviation = _scale([f[name] for f in fields for name in DEVIATIONS if name in f], DEVIATION)
    for ax, cell in zip(axes.flat, layout.flat, strict=True):
        if cell is None:
            ax.axis("off")
            continue
        index, name = cell
        scale = deviation if name in DEVIATIONS else speed
        arrows = 0 if name in DEVIATIONS else ARROWS
        _draw_field(ax, fields[index][name], scale, ocean, place, arrows, convergence)
        _label(ax, name, examples[index], fields[index], ocean)
    _frame(axes, examples, wide, unit)
    _colour_bars(figure, axes, layout, (speed, deviation), wide)
    alone = (examples[0].name, examples[0].when) if len(examples) == 1 else ()
    figure.suptitle(": ".join(part for part in (title, ", ".join(filter(None, alone))) if part), fontsize=11)
    return figure


def currents(
    path: str | Path,
    examples: Sequence[Example],
    ocean: np.ndarray,
    metres: np.ndarray,
    title: str = "",
    convergence: np.ndarray | float = 0.0,
) -> None:
    """`draw_currents` into a file."""
    save(draw_currents(examples, ocean, metres, title, convergence), path)


def draw_stamps(
    members: np.ndarray,
    truth: np.ndarray,
    observed: np.ndarray,
    ocean: np.ndarray,
    metres: np.ndarray,
    title: str = "",
    convergence: np.ndarray | float = 0.0,
) -> Figure:
    """Truth, ensemble mean and every member as stamps; one colour scale, one length of arrows, observations dotted.

    Numbers are root mean squares of the error vector over unobserved ocean cells.

    Args:
      members: (M, y, x, 2) m/s.
      truth: (y, x, 2) m/s; NaN where unknown.
      observed: (y, x) bool.
      ocean: (y, x) bool.
      metres: (y, x, 2) positions of cells north and east, as `Fields.metres` gives them.
      title: above the figure.
      convergence: (y, x) radians by which a cell's east and north are turned there, as `Fields.convergence` gives it.

    Raises:
      InputError: arrays of another grid, no member, or no cell to compare.
    """
    members, ocean, metres = np.asarray(members), np.asarray(ocean, bool), np.asarray(metres, float)
    scored = metrics.scored_cells(truth, ocean, observed)
    if metres.shape != (*ocean.shape, 2) or members.shape[1:] != metres.shape or not len(members):
        raise InputError(f"members {members.shape}, metres {metres.shape} and ocean {ocean.shape} do not fit together")
    land = ~ocean[..., None]
    shown = {"truth": truth, "mean": members.mean(0)} | {f"member {i + 1}": m for i, m in enumerate(members)}
    extent = np.ptp(metres, axis=(0, 1))
    aspect = np.clip(extent[0] / extent[1], 0.3, 3)
    columns = int(np.clip(round(np.sqrt(len(shown) * 1.3 * aspect)), 1, 8))
    rows = -(-len(shown) // columns)
    width = 2.3 if aspect < 1 else 1.9
    figure = new_figure(columns * width + 0.9, rows * (width * aspect + 0.2) + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    scale = _scale([np.where(land, np.nan, truth)], SPEED)
    for ax, (name, field) in zip(axes.flat, shown.items(), strict=False):
        _draw_field(ax, np.where(land, np.nan, field), scale, ocean, metres, STAMP_ARROWS, convergence)
        seen = metres[np.asarray(observed, bool)]
        ax.plot(seen[:, 1], seen[:, 0], ".", color=BLUE, ms=1.6)
        ax.set(xticks=(), yticks=())
        ax.set_title(name, loc="left", fontsize=7, pad=3)
        if name != "truth":
            rmse = metrics.vector_rmse(metrics.mse(field, truth, scored))
            ax.set_title(f"RMS error {digits(rmse)} m/s", loc="right", fontsize=7, pad=3)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    bar = figure.colorbar(scale, ax=list(axes.flat), extend="max", extendfrac=0.03, aspect=15 * rows, pad=0.015)
    bar.set_label("speed (m/s)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def stamps(
    path: str | Path,
    members: np.ndarray,
    truth: np.ndarray,
    observed: np.ndarray,
    ocean: np.ndarray,
    metres: np.ndarray,
    title: str = "",
    convergence: np.ndarray | float = 0.0,
) -> None:
    """`draw_stamps` into a file."""
    save(draw_stamps(members, truth, observed, ocean, metres, title, convergence), path)


def _check(examples: Sequence[Example], ocean: np.ndarray, metres: np.ndarray) -> None:
    if not examples:
        raise InputError("a figure needs at least one example")
    if metres.shape != (*ocean.shape, 2):
        raise InputError(f"metres {metres.shape} and ocean {ocean.shape} are of different grids")
    for example in examples:
        for name in ("truth", "observed", "values", "prior_mean", "mean", "member", "spread"):
            if name == "truth" and example.truth is None:
                continue
            shape = np.shape(getattr(example, name))
            expected = ocean.shape if name == "observed" else (*ocean.shape, 2)
            if shape != expected:
                raise InputError(f"{name} of example {example.name!r} is {shape}, expected {expected}")


def _layout(count: int, wide: bool, known: bool) -> np.ndarray:
    """(example, panel) at every place of the figure; panels run down for wide domains, else across."""
    if count == 1:
        order = [PANELS[:2], PANELS[2:4], (PANELS[4], None), PANELS[5:]]
        if not known:
            order = [PANELS[1:3], PANELS[3:5], (PANELS[5], None)]
        rows = [[name and (0, name) for name in row] for row in order]
    else:
        rows = [[(index, name) for index in range(count)] for name in (PANELS if known else PANELS[1:-1])]
    layout = np.empty((len(rows), len(rows[0])), object)
    for place in np.ndindex(layout.shape):
        layout[place] = rows[place[0]][place[1]]
    return layout if wide else layout.T


def _panel_fields(example: Example, ocean: np.ndarray) -> dict[str, np.ndarray]:
    """What each panel shows, (y, x, 2) with NaN on land and where there is nothing to show."""
    seen = np.where(np.asarray(example.observed)[..., None], example.values, np.nan)
    fields = {name: getattr(example, name) for name in ("prior_mean", "mean", "member", "spread")}
    fields |= {"observations": seen}
    if example.truth is not None:
        fields |= {"truth": example.truth, "error": np.asarray(example.mean) - example.truth}
    return {name: np.where(ocean[..., None], field, np.nan) for name, field in fields.items()}


def _length(field: np.ndarray) -> np.ndarray:
    return np.sqrt((np.asarray(field, float) ** 2).sum(-1))


def top(fields: Sequence[np.ndarray]) -> float:
    """Nearly the longest vector of fields (..., 2), where their colours end."""
    return max(float(np.nanpercentile([_length(field) for field in fields], 99.5)), 1e-9)


def _scale(fields: Sequence[np.ndarray], colours: Colormap) -> ScalarMappable:
    return ScalarMappable(Normalize(0, top(fields)), colours)


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
    ax: Axes,
    field: np.ndarray,
    scale: ScalarMappable,
    ocean: np.ndarray,
    place: np.ndarray,
    arrows: int,
    convergence: np.ndarray | float,
) -> None:
    """Length of the vectors in colour, land, coast, and arrows: half the top speed reaches from one to the next."""
    y, x = _corners(place[..., 0]), _corners(place[..., 1])
    length = np.ma.masked_invalid(_length(field))
    # Cells become one picture inside vector formats, which would otherwise hold thousands of polygons.
    ax.pcolormesh(x, y, length, cmap=scale.cmap, norm=scale.norm, rasterized=True)
    ax.pcolormesh(x, y, np.ma.masked_where(ocean, ~ocean), cmap=ListedColormap([LAND]), rasterized=True)
    ax.add_collection(LineCollection(_coast(ocean, y, x), colors="0.25", linewidths=0.6), autolim=False)
    ax.set_facecolor(OCEAN)
    ax.set_aspect("equal")
    if arrows:
        stride = -(-max(ocean.shape) // arrows)
        rows, columns = _thin(~np.ma.getmaskarray(length), stride)
        spacing = stride * np.hypot(*np.ptp(place, axis=(0, 1))) / np.hypot(*ocean.shape)
        ax.quiver(
            place[rows, columns, 1],
            place[rows, columns, 0],
            *(part[rows, columns] for part in staggered.turn(field[..., 0], field[..., 1], convergence)),
            angles="xy",
            scale_units="xy",
            scale=0.5 * scale.norm.vmax / spacing,
            color="0.1",
            units="inches",
            width=0.009,
        )


def _coast(ocean: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Edges between ocean and land cells (edges, 2, 2) as (x, y) of their ends, from the cells' corners."""
    corners = np.stack([x, y], -1)
    row, column = np.nonzero(ocean[1:] != ocean[:-1])
    across = np.stack([corners[row + 1, column], corners[row + 1, column + 1]], 1)
    row, column = np.nonzero(ocean[:, 1:] != ocean[:, :-1])
    return np.concatenate([across, np.stack([corners[row, column + 1], corners[row + 1, column + 1]], 1)])


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
    if example.truth is None:
        # Where all is observed there is nothing to score, and still something to see.
        scored = ocean & ~np.asarray(example.observed, bool) & np.isfinite(fields["mean"]).all(-1)
    else:
        scored = metrics.scored_cells(example.truth, ocean, example.observed)
    if name == "observations":
        cells = f"{np.sum(example.observed)} of {np.sum(ocean)} cells"
        ax.set_title(cells, loc="right", fontsize=8, pad=3)
    elif name in ("prior_mean", "mean", "member") and example.truth is not None:
        rmse = metrics.vector_rmse(metrics.mse(fields[name], example.truth, scored))
        ax.set_title(f"RMS error {digits(rmse)} m/s", loc="right", fontsize=8, pad=3)
    elif name in DEVIATIONS and scored.any():
        rms = np.sqrt(np.mean(_length(fields[name])[scored] ** 2))
        # Too few members have no spread.
        ax.set_title(f"RMS {digits(rms)} m/s" if np.isfinite(rms) else "unknown", loc="right", fontsize=8, pad=3)


def _frame(axes: np.ndarray, examples: Sequence[Example], wide: bool, unit: str) -> None:
    """Coordinates on the outer axes, and the examples' names where there are several."""
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel(f"east ({unit})", fontsize=8)
        ax.set_ylabel(f"north ({unit})", fontsize=8)
        ax.label_outer()
    if len(examples) == 1:
        return
    for example, ax in zip(examples, axes[0] if wide else axes[:, 0], strict=True):
        for text, near, far, font in (
            (example.name, 29, -62, {"fontsize": 10, "weight": "bold"}),
            (example.when, 17, -50, {"fontsize": 8}),
        ):
            ax.annotate(
                text,
                (0.5, 1) if wide else (0, 0.5),
                (0, near) if wide else (far, 0),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center" if wide else "right",
                va="bottom" if wide else "center",
                rotation=0 if wide else 90,
                **font,
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
    shown = [name for name in DEVIATIONS if any(cell is not None and cell[1] == name for cell in layout.flat)]
    labels = ("speed (m/s)", f"{', '.join(shown)} (m/s)")
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
    held_out: np.ndarray,
    ema_held_out: np.ndarray,
    learning_rate: np.ndarray,
    title: str = "",
    linear: float | None = None,
) -> Figure:
    """Training and held-out loss, and held-out loss of averaged (EMA) weights, against epochs; learning rate below.

    Args:
      epoch: (n,); the other arrays are (n,) too, NaN where a loss was not evaluated.
      linear: held-out loss of the exact Gaussian denoiser, which a network has to beat.

    Raises:
      InputError: lengths differ, nothing was evaluated, or a loss is not positive.
    """
    epoch = np.asarray(epoch, float)
    figure = new_figure(7.5, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    curves = (("training", train, "0.6"), ("held out", held_out, BLUE), ("held out, EMA weights", ema_held_out, ORANGE))
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
    if linear is not None:
        above.axhline(linear, color="0.1", lw=1, ls="--", label=f"exact Gaussian denoiser, held out, {linear:.4g}")
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("")
    above.set_ylabel("loss")
    above.legend(**LEGEND)
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
    held_out: np.ndarray,
    ema_held_out: np.ndarray,
    learning_rate: np.ndarray,
    title: str = "",
    linear: float | None = None,
) -> None:
    """`draw_loss` into a file."""
    save(draw_loss(epoch, train, held_out, ema_held_out, learning_rate, title, linear), path)


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
    figure = new_figure(5.5, 3)
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


def draw_reliability(nominal: np.ndarray, observed: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Share of values inside central intervals against what the intervals promise; above the diagonal is too wide.

    Args:
      nominal: (n,) levels between 0 and 1, rising.
      observed: (n,) coverage of each method, by name, as `metrics.coverage` gives it.

    Raises:
      InputError: no method, lengths differ, or a share is not between 0 and 1.
    """
    nominal = np.asarray(nominal, float)
    _check_lines(nominal, observed)
    values = np.stack([nominal, *map(np.asarray, observed.values())])
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("levels and coverages are shares between 0 and 1")
    figure = new_figure(4.6, 4.6)
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="0.1", lw=1, ls="--")
    for number, (name, coverage) in enumerate(observed.items()):
        ax.plot(nominal, np.asarray(coverage, float), label=name, **_look(number))
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage")
    _finish(figure, [ax], title)
    return figure


def reliability(path: str | Path, nominal: np.ndarray, observed: Mapping[str, np.ndarray], title: str = "") -> None:
    """`draw_reliability` into a file."""
    save(draw_reliability(nominal, observed, title), path)


def _look(number: int) -> dict:
    """Colour, marker and dashes of the curve with this number."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "ls": DASHES[number // len(COLOURS) % len(DASHES)], "lw": 1.4, "ms": 4}


def _check_lines(x: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    if not lines or x.ndim != 1 or not x.size:
        raise InputError("a figure of curves needs at least one curve and one point")
    for name, line in lines.items():
        if np.shape(line) != x.shape:
            raise InputError(f"{name} has {np.shape(line)} numbers, the axis {x.shape}")


def _finish(figure: Figure, axes: Sequence[Axes], title: str) -> None:
    """Grid, free sides, a legend in the first axes, and the title."""
    for ax in axes:
        ax.grid(color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9, **LEGEND)
    if len(axes) > 1:
        figure.align_ylabels()
    figure.suptitle(title, fontsize=11)


# --- scales and distances -----------------------------------------------------------------------------------


def draw_spectra(spectra: Mapping[str, structures.Spectrum], title: str = "") -> Figure:
    """Kinetic energy by wavelength of the truth and of each method's members, and their ratio below.

    Args:
      spectra: by name of the method, all of the same truth on one grid.

    Raises:
      InputError: no spectrum, or spectra of different truths.
    """
    if not spectra:
        raise InputError("a figure of spectra needs at least one of them")
    first = next(iter(spectra.values()))
    for name, one in spectra.items():
        if not (np.array_equal(one.wavenumber, first.wavenumber) and np.array_equal(one.truth, first.truth)):
            raise InputError(f"the spectrum of {name} is of another truth")
    wavelength = 1 / first.wavenumber
    unit, size = ("km", 1000) if wavelength.max() > 10_000 else ("m", 1)
    figure = new_figure(6, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(wavelength / size, first.truth, color="0.1", lw=2, label="truth")
    below.axhline(1, color="0.1", lw=1, ls="--")
    for number, (name, one) in enumerate(spectra.items()):
        above.plot(wavelength / size, one.members, label=name, **_look(number))
        below.plot(wavelength / size, one.ratio, **_look(number))
    above.set(xscale="log", yscale="log")
    above.set_ylabel("kinetic energy (m²/s²)")
    below.set_ylabel("members /\ntruth")
    # Where the truth has next to no energy, the ratio would leave no room for the rest.
    low, high = below.get_ylim()
    below.set(yscale="log", ylim=(max(low, 0.05), min(max(high, 1.2), 20)))
    below.yaxis.set_major_formatter("{x:g}")
    below.set_xlabel(f"wavelength ({unit})")
    below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.xaxis.set_major_formatter("{x:g}")
    below.xaxis.set_minor_formatter("")
    above.invert_xaxis()
    _finish(figure, [above, below], title)
    return figure


def spectra(path: str | Path, spectra: Mapping[str, structures.Spectrum], title: str = "") -> None:
    """`draw_spectra` into a file."""
    save(draw_spectra(spectra, title), path)


def draw_distance(
    errors: Mapping[str, metrics.DistanceErrors], baseline: str, unit: str = "cells", title: str = ""
) -> Figure:
    """Error of ensemble means against the distance to the nearest observation, beside the baseline's; cells below.

    Errors are vector RMSE, sqrt(2 MSE). An infinite last edge is drawn as wide as the bin before it. A method over
    other cells than the first one's, because it failed on a frame, gets the baseline's errors there beside its own.

    Args:
      errors: by name of the method.
      baseline: name of what they are compared with.
      unit: of the edges.

    Raises:
      InputError: no method, or methods with other edges.
    """
    if not errors:
        raise InputError("a figure of errors against distance needs at least one method")
    first = next(iter(errors.values()))
    for name, one in errors.items():
        if not np.array_equal(one.edges, first.edges):
            raise InputError(f"the errors of {name} are of other distances")
    edges = np.array(first.edges, float)
    if np.isinf(edges[-1]):
        edges[-1] = edges[-2] + (edges[-2] - edges[-3] if len(edges) > 2 else 1)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = new_figure(6, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot(middle, np.sqrt(2 * first.baseline), color="0.1", lw=1.4, ls="--", label=baseline)
    for number, (name, one) in enumerate(errors.items()):
        look = _look(number)
        above.plot(middle, np.sqrt(2 * one.mean), label=name, **look)
        if not np.allclose(one.baseline, first.baseline, equal_nan=True):
            there = f"{baseline}, cells of {name}"
            above.plot(middle, np.sqrt(2 * one.baseline), color=look["color"], lw=1, ls="--", label=there)
    above.set_ylim(bottom=0)
    above.set_ylabel("RMS error (m/s)")
    below.stairs(first.counts, edges, fill=True, color="0.7")
    below.set_ylabel("cells")
    below.set_xlabel(f"distance to the nearest observation ({unit})")
    if first.counts.any():
        below.set_xlim(edges[0], edges[np.flatnonzero(first.counts)[-1] + 1])
    _finish(figure, [above, below], title)
    return figure


def distance(
    path: str | Path,
    errors: Mapping[str, metrics.DistanceErrors],
    baseline: str,
    unit: str = "cells",
    title: str = "",
) -> None:
    """`draw_distance` into a file."""
    save(draw_distance(errors, baseline, unit, title), path)


def draw_denoising(
    sigma: np.ndarray, networks: Mapping[str, np.ndarray], gaussian: np.ndarray, title: str = ""
) -> Figure:
    """Error of denoisers by noise level: networks beside the exact Gaussian denoiser, and their ratio to it below.

    Where the ratio reaches 1, a network has learnt nothing beyond the covariance.

    Args:
      sigma: (n,) noise levels, positive.
      networks: (n,) mean squared error of each, by name, standardised.
      gaussian: (n,) of the exact denoiser of the training covariance.

    Raises:
      InputError: no network, lengths differ, or a number is not positive.
    """
    sigma, gaussian = np.asarray(sigma, float), np.asarray(gaussian, float)
    _check_lines(sigma, networks)
    _check_lines(sigma, {"the Gaussian denoiser": gaussian})
    values = np.stack([sigma, gaussian, *map(np.asarray, networks.values())])
    if not ((values > 0) & np.isfinite(values)).all():
        raise InputError("noise levels and errors of denoisers are positive numbers")
    figure = new_figure(6, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(sigma, gaussian, color="0.1", lw=1.4, ls="--", label="Gaussian denoiser")
    below.axhline(1, color="0.1", lw=1, ls="--")
    for number, (name, error) in enumerate(networks.items()):
        above.plot(sigma, np.asarray(error, float), label=name, **_look(number))
        below.plot(sigma, np.asarray(error, float) / gaussian, **_look(number))
    above.set(xscale="log", yscale="log")
    above.set_ylabel("mean squared error")
    below.set_ylabel("network /\nGaussian")
    below.set_xlabel("noise level σ")
    _finish(figure, [above, below], title)
    return figure


def denoising(
    path: str | Path, sigma: np.ndarray, networks: Mapping[str, np.ndarray], gaussian: np.ndarray, title: str = ""
) -> None:
    """`draw_denoising` into a file."""
    save(draw_denoising(sigma, networks, gaussian, title), path)


# --- scores against stages and settings ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """A score against stages or a setting.

    Attributes:
      name: of the method.
      x: (n,) numbers, or words such as names of patterns.
      value: (n,) not finite where a point failed.
      lo, hi: (n,) interval of each value, NaN where it has none; None for no intervals.
    """

    name: str
    x: np.ndarray
    value: np.ndarray
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None


def draw_sweep(
    curves: Sequence[Curve], setting: str, score: str, title: str = "", reference: tuple[str, float] | None = None
) -> Figure:
    """A score against a setting, with intervals; crosses at the bottom stand where a point failed.

    Axes are logarithmic where their values are positive and span a factor of thirty; that of the setting may have
    zeros, which stand at its left end.

    Args:
      setting, score: names of the axes, with units.
      reference: name and score of something that does not depend on the setting.

    Raises:
      InputError: no curve, no finite value, lengths differ, numbers and words on one axis.
    """
    figure, ax, _ = _draw_curves(curves, setting, score, reference)
    x = np.concatenate([np.asarray(curve.x) for curve in curves])
    if x.dtype.kind in "if":
        _set_scale(ax, x)
    _finish(figure, [ax], title)
    return figure


def sweep(
    path: str | Path,
    curves: Sequence[Curve],
    setting: str,
    score: str,
    title: str = "",
    reference: tuple[str, float] | None = None,
) -> None:
    """`draw_sweep` into a file."""
    save(draw_sweep(curves, setting, score, title, reference), path)


def draw_stages(
    curves: Sequence[Curve], score: str, title: str = "", reference: tuple[str, float] | None = None
) -> Figure:
    """A score after each stage of multi-stage samplers, with intervals; the best stage of each is filled.

    Args:
      curves: x holds numbers of stages, counted from 1.
      score, reference: see draw_sweep; the lowest score is the best.

    Raises:
      InputError: as draw_sweep, or stages that are not numbers from 1.
    """
    for curve in curves:
        x = np.asarray(curve.x)
        if x.dtype.kind not in "if" or (x != np.rint(x)).any() or (x < 1).any():
            raise InputError(f"stages of {curve.name} are counted from 1, got {x.tolist()}")
    figure, ax, lines = _draw_curves(curves, "stage", score, reference)
    for curve, line in zip(curves, lines, strict=True):
        line.set_markerfacecolor("white")
        value = np.asarray(curve.value, float)
        if np.isfinite(value).any():
            best = int(np.nanargmin(np.where(np.isfinite(value), value, np.nan)))
            ax.plot(curve.x[best], value[best], color=line.get_color(), marker=line.get_marker(), ms=6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, [ax], title)
    return figure


def stages(
    path: str | Path,
    curves: Sequence[Curve],
    score: str,
    title: str = "",
    reference: tuple[str, float] | None = None,
) -> None:
    """`draw_stages` into a file."""
    save(draw_stages(curves, score, title, reference), path)


def _set_scale(ax: Axes, x: np.ndarray) -> None:
    """Logarithmic where positive numbers call for it, linear below the smallest of them if some are 0."""
    positive = x[x > 0]
    if (x >= 0).all() and positive.size and _spans(positive):
        if positive.size == x.size:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=positive.min(), linscale=0.5)
            ax.set_xlim(-0.3 * positive.min(), 1.5 * positive.max())
        ax.xaxis.set_major_formatter("{x:g}")
    elif x.dtype.kind == "i":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spans(values: np.ndarray) -> bool:
    """Whether numbers call for a logarithmic axis."""
    values = values[np.isfinite(values)]
    return bool((values > 0).all() and values.max() >= 30 * values.min())


def _draw_curves(
    curves: Sequence[Curve], setting: str, score: str, reference: tuple[str, float] | None
) -> tuple[Figure, Axes, list[Line2D]]:
    _check_curves(curves)
    words = list(dict.fromkeys(x for curve in curves for x in np.asarray(curve.x).tolist() if isinstance(x, str)))
    figure = new_figure(6, 4)
    ax = figure.subplots()
    lines = []
    for number, curve in enumerate(curves):
        look = _look(number)
        x, value = np.asarray(curve.x), np.asarray(curve.value, float)
        finite = np.isfinite(value)
        if words:
            # Words have no order that a line could follow; curves stand side by side.
            look["ls"] = ""
            x = np.array([words.index(word) for word in x]) + 0.4 * ((number + 0.5) / len(curves) - 0.5)
        lines += ax.plot(x, np.where(finite, value, np.nan), label=curve.name, **look)
        if curve.lo is not None:
            lo, hi = (np.asarray(end, float) for end in (curve.lo, curve.hi))
            drawn = np.full(x.shape, True)
            if not words:
                ax.fill_between(x, lo, hi, color=look["color"], alpha=0.2, lw=0)
                # A band has no width where a point has no neighbour.
                beside = np.pad(finite, 1)
                drawn = ~(beside[:-2] | beside[2:])
            ax.vlines(x[drawn], lo[drawn], hi[drawn], color=look["color"], lw=1.4)
        if not finite.all():
            ax.plot(
                x[~finite], np.zeros((~finite).sum()), "x", color=look["color"], ms=7, clip_on=False,
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip
    if reference is not None:
        ax.axhline(reference[1], color="0.1", lw=1, ls="--", label=reference[0])
    if words:
        crowded = len(words) > 5
        ax.set_xticks(range(len(words)), words, rotation=30 * crowded, ha="right" if crowded else "center")
    values = np.concatenate([np.asarray(curve.value, float) for curve in curves])
    if _spans(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(setting)
    ax.set_ylabel(score)
    return figure, ax, lines


def _check_curves(curves: Sequence[Curve]) -> None:
    if not curves:
        raise InputError("a figure of curves needs at least one curve")
    kinds = {np.asarray(curve.x).dtype.kind for curve in curves}
    if not (kinds <= set("if") or kinds <= {"U"}):
        raise InputError("the x of curves are numbers, or words, of all alike")
    for curve in curves:
        shape = np.shape(curve.x)
        others = {"value": curve.value} | ({} if curve.lo is None else {"lo": curve.lo, "hi": curve.hi})
        for name, numbers in others.items():
            if np.shape(numbers) != shape or len(shape) != 1 or not shape[0]:
                raise InputError(f"{curve.name}: {name} {np.shape(numbers)} and x {shape} differ or are empty")
    if not any(np.isfinite(np.asarray(curve.value, float)).any() for curve in curves):
        raise InputError(f"no point of {', '.join(curve.name for curve in curves)} has a finite score")
