"""What a file of currents holds, as `readers.read` understands it, with a split to train on and a picture.

    python -m jax_repaint.data.describe currents.nc
    python -m jax_repaint.data.describe U_*.nc --v_file=V_*.nc --depth=15 --out=picture.png

Prints the pair, its level, points and directions; grid, times, land and gaps; decorrelation time and the split that
it allows. The picture shows the mean current on the mean speed, the standard deviation, and where values are missing.
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

from jax_repaint import command, plots
from jax_repaint.data import readers, staggered
from jax_repaint.data.fields import LEAST_COVERAGE, Fields, split
from jax_repaint.data.source import Choice, Source
from jax_repaint.errors import InputError
from jax_repaint.files import check_writable

ARROWS = 20  # along the longer side
TOPICS = {"files": "files", "pair": "pair", "depth": "level", "grid": "points", "components": "components"}


def describe(fields: Fields, source: Source) -> dict[str, str]:
    """Topic to one line of text, in the order to read them."""
    lines = {title: source.facts[topic] for topic, title in TOPICS.items() if topic in source.facts}
    (y, x), (north, east) = fields.shape, fields.spacing
    lon = np.unwrap(fields.lon, period=360)
    lon = np.unwrap(lon, axis=0, period=360)  # the date line is no seam
    kind = "regular" if fields.lat.ndim == 1 else "curvilinear"
    lines["grid"] = (
        f"{y} x {x} cells, {kind}, {_kilometres(north)} by {_kilometres(east)}; latitude "
        f"{fields.lat.min():.6g} to {fields.lat.max():.6g}, longitude {lon.min():.6g} to {lon.max():.6g}"
    )
    lines["time"] = _time(fields) + (f"; {source.facts['time']}" if "time" in source.facts else "")
    lines["land"] = f"{100 * (1 - fields.ocean.mean()):.3g} % of the cells, or never observed"
    missing = np.isnan(fields.u)[:, fields.ocean]
    whole = f"{int((~missing.any(1)).sum())} of {len(fields)} frames and {100 * (~missing.any(0)).mean():.3g} % of the"
    share = f"{100 * fields.gaps:.2g} % of the values on ocean cells are missing; {whole} ocean cells are complete"
    sparse = int((fields.coverage < LEAST_COVERAGE).sum())
    if sparse:
        share += f"; {sparse} frames have less than {100 * LEAST_COVERAGE:g} % of them, and training leaves those out"
    lines["gaps"] = share if fields.gaps else "none"
    speed = np.hypot(fields.u, fields.v)
    mean = [float(np.nanmean(c, dtype=float)) for c in (fields.u, fields.v)]
    lines["speed"] = (
        f"mean {np.nanmean(speed, dtype=float):.3g} m/s, largest {np.nanmax(speed):.3g} m/s; "
        f"mean current {mean[0]:.3g} m/s east, {mean[1]:.3g} m/s north"
    )
    return lines | _memory(fields)


def _kilometres(metres: float) -> str:
    return f"{metres / 1000:.3g} km" if metres >= 1000 else f"{metres:.3g} m"


def _duration(nanoseconds: float) -> str:
    hours = nanoseconds / 3.6e12
    return f"{hours / 24:.4g} d" if hours >= 48 else f"{hours:.4g} h"


def _time(fields: Fields) -> str:
    first, last = (np.datetime_as_string(fields.time[i], "s") for i in (0, -1))
    if len(fields) == 1:
        return f"one frame, {first}"
    steps = np.diff(fields.time).astype(float)
    step = float(np.median(steps))
    uneven = f", the longest {_duration(steps.max())}" if steps.max() > 1.01 * step else ""
    return f"{len(fields)} frames from {first} to {last}, step {_duration(step)}{uneven}"


def _memory(fields: Fields) -> dict[str, str]:
    """Decorrelation time and the split it allows, or why there is none."""
    try:
        parts = split(fields)
    except InputError as e:
        return {"split": f"none: {e}"}
    step = fields.step / np.timedelta64(1, "ns")
    frames = {name: getattr(parts, name) for name in ("train", "validation", "test")}
    ranges = (f"--config.data.{name}={part[0]}:{part[-1] + 1}" for name, part in frames.items())
    return {
        "memory": f"decorrelation time {parts.decorrelation:.4g} frames, {_duration(parts.decorrelation * step)}",
        "split": f"{' '.join(ranges)}, with gaps of {parts.gap:.4g} frames",
    }


def draw(fields: Fields, title: str = "") -> Figure:
    """Mean current on mean speed, standard deviation of the vector, and the share of frames without a value."""
    mean = _mean(fields.velocity)
    panels = [
        ("mean current on mean speed (m/s)", _mean(np.hypot(fields.u, fields.v)), plots.MAPS.speed),
        (
            "standard deviation (m/s)",
            np.sqrt(_mean(((fields.velocity - mean) ** 2).sum(-1))),
            plots.MAPS.amp,
        ),
    ]
    if fields.gaps:
        missing = np.isnan(fields.u).mean(0)
        panels.append(("share of frames without a value", np.where(fields.ocean, missing, np.nan), plots.MAPS.tempo))
    place = fields.metres() / 1000
    extent = np.ptp(place, axis=(0, 1))
    aspect = float(np.clip(extent[0] / extent[1], 0.3, 3))
    width = 4.5 if aspect < 1.5 else 3
    figure = plots.new_figure(len(panels) * width, width * aspect + 1)
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (label, values, colours) in zip(axes, panels, strict=True):
        _panel(figure, ax, values, fields.ocean, place, colours, label)
    drawn = np.stack(staggered.turn(mean[..., 0], mean[..., 1], fields.convergence()), -1)
    _arrows(axes[0], drawn, fields.ocean, place)
    axes[0].set_ylabel("north (km)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the frames with a value, NaN where there is none."""
    present = ~np.isnan(values)
    count = present.sum(0)
    return np.where(count > 0, np.where(present, values, 0).sum(0, dtype=float) / np.maximum(count, 1), np.nan)


def _panel(
    figure: Figure, ax: Axes, values: np.ndarray, ocean: np.ndarray, place: np.ndarray, colours: Colormap, label: str
) -> None:
    north, east = place[..., 0], place[..., 1]
    kept = ListedColormap(colours(np.linspace(0, 0.8, 256)))
    shown = np.ma.masked_invalid(np.where(ocean, values, np.nan))
    image = ax.pcolormesh(east, north, shown, cmap=kept, vmin=0, shading="nearest", rasterized=True)
    land = np.ma.masked_where(ocean, np.ones(ocean.shape))
    ax.pcolormesh(east, north, land, cmap=ListedColormap([plots.LAND]), shading="nearest", rasterized=True)
    ax.set_facecolor(plots.OCEAN)
    ax.set_aspect("equal")
    ax.tick_params(labelsize=7)
    ax.set_xlabel("east (km)", fontsize=8)
    ax.set_title(label, loc="left", fontsize=8)
    figure.colorbar(image, ax=ax, location="bottom", aspect=30, pad=0.02).ax.tick_params(labelsize=7)


def _arrows(ax: Axes, mean: np.ndarray, ocean: np.ndarray, place: np.ndarray) -> None:
    """Every k-th vector; all but the longest twentieth reach no further than to the next."""
    stride = -(-max(ocean.shape) // ARROWS)
    shown = np.zeros(ocean.shape, bool)
    shown[stride // 2 :: stride, stride // 2 :: stride] = True
    shown &= ocean & ~np.isnan(mean).any(-1)
    if not shown.any():
        return
    longest = max(float(np.nanpercentile(np.hypot(*mean.T), 95)), 1e-9)
    spacing = stride * np.hypot(*np.ptp(place, axis=(0, 1))) / np.hypot(*ocean.shape)
    ax.quiver(
        *place[shown][:, ::-1].T, *mean[shown].T, angles="xy", scale_units="xy", scale=longest / spacing,
        color="0.1", units="inches", width=0.009,
    )  # fmt: skip


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_multi_string("file", [], "What to describe; the same as naming it without --file=.")
    flags.DEFINE_multi_string("v_file", [], "File or pattern with v, where the first holds u only.")
    flags.DEFINE_string("u", None, "Name of the variable u, where there are several pairs.")
    # absl's own --v means --verbosity, which stays.
    delattr(FLAGS, "v")
    flags.DEFINE_string("v", None, "Name of the variable v.")
    flags.DEFINE_string("grid", None, "File with lat_rho, lon_rho, angle and masks of a C-grid.")
    flags.DEFINE_float("depth", None, "Metres below the surface.", lower_bound=0)
    flags.DEFINE_integer("level", None, "Number of a level from 0 on.", lower_bound=0)
    flags.DEFINE_string("time", None, "Date of a file without times, or from which its times count.")
    flags.DEFINE_enum("directions", None, ["grid", "east"], "What components on a curvilinear grid run along.")
    flags.DEFINE_string("out", "", "Picture to write: .png, .svg or .pdf.")


def name_files(argv: Sequence[str]) -> list[str]:
    """The command line with --file= before what stands alone: the command that takes files as they are."""
    out = []
    for i, word in enumerate(argv):
        # A word after an option without "=" may be its value.
        value = i and argv[i - 1].startswith("--") and "=" not in argv[i - 1]
        out.append(word if word.startswith("-") or value else f"--file={word}")
    return out


def main(_) -> None:
    """Prints what was understood and writes the picture."""
    if not FLAGS.file:
        raise InputError("name a file: python -m jax_repaint.data.describe FILE")
    if FLAGS.out:
        check_writable(FLAGS.out, plots.FORMATS)
    choice = Choice(FLAGS.u, FLAGS.v, FLAGS.grid, FLAGS.depth, FLAGS.level, FLAGS.time, FLAGS.directions)
    path = FLAGS.file[0] if len(FLAGS.file) == 1 else FLAGS.file
    fields, source = readers.understand(path, choice, FLAGS.v_file or None)
    print(fields.name)
    for topic, text in describe(fields, source).items():
        print(f"  {topic:<11} {text}")
    if FLAGS.out:
        plots.save(draw(fields, fields.name), FLAGS.out)
        print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
    _define_flags()
    sys.argv[1:] = name_files(sys.argv[1:])
    command.run(main)
