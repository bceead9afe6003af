"""One HTML page about a folder of results: settings, tables that sort, curves, and a viewer of the fields.

    python -m jax_repaint.report runs/small
    python -m jax_repaint.report results --out=results.html

The page holds everything it shows and fetches nothing, so it can be opened offline, mailed or kept. It knows

    training      config.json, log.csv and model/, as `jax_repaint.train` writes them, and levels.csv, where
                  `jax_repaint.levels --out=` was told to put it
    evaluation    table.csv, details.csv and fields*.nc, as `jax_repaint.evaluate` and `jax_repaint.demo` write them
    sweep         config.json and parts/, as `jax_repaint.sweep` writes them, finished or not

Fields are thinned to stay small: evenly spaced frames, the first members, every n-th cell of large grids, and
components in 255 steps of each field's range. The page says what was left out. Scores are of the full fields.
"""

import base64
import dataclasses
import html
import io
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from absl import flags, logging
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure

from jax_repaint import command, comparison, metrics, observe, plots, results, scoring, structures
from jax_repaint.data.cf import opened
from jax_repaint.data.fields import Fields
from jax_repaint.data.probe import check_hdf5
from jax_repaint.data.source import door
from jax_repaint.errors import InputError
from jax_repaint.files import check_numbers, check_writable, read_table, whole_file

TEMPLATE = Path(__file__).with_name("report.html")
NOTHING = -128  # byte of a cell without a value
LARGEST = 160  # cells along a side of what the viewer shows
ROWS = 500  # of a table
DIMENSIONS = ("frame", "pattern", "method", "member")
PANELS = ("truth", "estimate", "error", "spread")
LEVELS = np.round(np.arange(0.1, 0.95, 0.1), 1)
EDGES = (0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5)  # cells from an observation
INTERVALS = {
    "ratio": ("lo", "hi"),
    "wins": ("wins_lo", "wins_hi"),
    "mean_over_best_ratio": ("mean_over_best_lo", "mean_over_best_hi"),
    "expected_over_best_ratio": ("expected_over_best_lo", "expected_over_best_hi"),
    "member_over_seed_gp_ratio": ("member_over_seed_gp_lo", "member_over_seed_gp_hi"),
}
HEADINGS = {
    "ratio": ("ratio [95 %]", "mean squared error over that of the baseline"),
    "wins": ("wins [95 %]", "share of frames where the method beats the baseline"),
    "crps": ("CRPS", "fair continuous ranked probability score, m/s"),
    "spread_skill": ("spread/skill", "spread over error of the mean; 1 is calibrated"),
    "coverage90": ("in 90 %", "share of values inside the central 90 % interval"),
    "mse_mean": ("MSE mean", "mean squared error of the ensemble mean, m²/s² a component"),
    "mse_member": ("MSE member", "mean squared error of single members, m²/s² a component"),
    "small_scale": ("small scales", "small-scale energy of members over that of the truth"),
    "calls": ("calls", "network calls a field"),
    "seconds": ("seconds", "wall time a field"),
    "worst": ("worst", "largest ratio of a single frame"),
    "median": ("median", "median ratio of a single frame"),
    "component_rmse": ("RMSE u, v", "root mean squared error of the mean's components, m/s"),
    "vector_rmse": ("RMSE vector", "root mean squared length of the mean's error, m/s"),
    "energy_score": ("energy score", "fair energy score of the current of a cell, m/s"),
    "direction_error": ("direction error", "mean angle between mean and truth where the truth is fast, degrees"),
    "divergence_rmse": ("divergence RMSE", "of members, 1/s"),
    "divergence_ratio": ("divergence ratio", "RMS of members over that of the truth"),
    "vorticity_rmse": ("vorticity RMSE", "of members, 1/s"),
    "vorticity_ratio": ("vorticity ratio", "RMS of members over that of the truth"),
    "short_waves": ("short waves", "energy of members over the truth's at the highest third of wavenumbers"),
    "best": ("baseline", "the best deterministic baseline there"),
    "mean_over_best_ratio": ("mean / best [95 %]", "MSE of the ensemble mean over that of the best baseline"),
    "mean_over_best_wins": ("wins", "share of frames where the mean beats the best baseline"),
    "mean_over_best_worst": ("worst", "largest ratio of a single frame"),
    "expected_over_best_ratio": (
        "expected / best [95 %]",
        "MSE that the mean of as many members as the largest ensemble has is expected to have, "
        "over that of the best baseline",
    ),
    "expected_over_best_wins": ("wins", "share of frames where that beats the best baseline"),
    "expected_over_best_worst": ("worst", "largest ratio of a single frame"),
    "member_over_seed_gp_ratio": ("member / seed GP [95 %]", "MSE of a member over that of the GP of earlier results"),
    "member_over_seed_gp_wins": ("wins", "share of frames where a member beats the GP of earlier results"),
    "member_over_seed_gp_worst": ("worst", "largest ratio of a single frame"),
    "failed": ("failed", "frames on which a member is not finite"),
    "train_loss": ("training loss", ""),
    "held_out_loss": ("held-out loss", "on validation frames"),
    "ema_held_out_loss": ("held-out loss, EMA", "on validation frames, with averaged weights"),
    "frames_per_second": ("frames/s", ""),
}


# --- pieces of a page ---------------------------------------------------------------------------------------


def number(value: float, whole: bool = False) -> str:
    """A number as people read it, four digits long or `whole`; a dash for none."""
    if not math.isfinite(value):
        return scoring.DASH if math.isnan(value) else str(value)
    return f"{value:,.0f}" if whole else f"{value:#.4g}".rstrip(".")


def table_html(table: pd.DataFrame, caption: str = "") -> str:
    """A table whose headers sort it; cells carry their exact number as `data-value`, empty for none.

    Columns without any value are left out; ends of intervals stand beside their value.
    """
    table = table.dropna(axis=1, how="all")
    ends = {end for name, pair in INTERVALS.items() if name in table for end in pair}
    columns = [name for name in table.columns if name not in ends]
    words = {name for name in columns if not pd.api.types.is_numeric_dtype(table[name])}
    whole = {name for name in columns if name not in words and (table[name].dropna() % 1 == 0).all()}
    # Such as a ratio of 1, alone in its column.
    whole -= INTERVALS.keys()
    head = []
    for name in columns:
        title, meaning = HEADINGS.get(name, (str(name).replace("_", " "), ""))
        kind = ' class="text"' if name in words else ""
        head.append(
            f'<th scope="col"{kind}><button title="{html.escape(meaning)}" data-column="{html.escape(str(name))}">'
            f"{html.escape(title)}</button></th>"
        )
    rows = []
    for row in table.to_dict("records"):
        cells = [
            f'<td class="text">{html.escape(_word(row[name]))}</td>'
            if name in words
            else _number_cell(name, row, name in whole)
            for name in columns
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _word(value: object) -> str:
    return scoring.DASH if value is None or value != value else str(value)


def _number_cell(name: str, row: Mapping[str, object], whole: bool) -> str:
    """A cell with its exact number, and its interval if it has one."""
    exact, text = ("" if math.isnan(row[name]) else repr(_plain(row[name]))), number(row[name], whole)
    extra = ""
    if name in INTERVALS and all(end in row and math.isfinite(row[end]) for end in INTERVALS[name]):
        lo, hi = (row[end] for end in INTERVALS[name])
        extra = f' data-lo="{_plain(lo)!r}" data-hi="{_plain(hi)!r}"'
        text += f" <small>[{number(lo)}, {number(hi)}]</small>"
    return f'<td data-value="{exact}"{extra}>{text}</td>'


def _plain(value: object) -> int | float:
    """The number as Python has it, whose text reads back the same."""
    return int(value) if isinstance(value, int | np.integer) else float(value)


def facts_html(facts: Mapping[str, object]) -> str:
    """Names and values side by side; empty values are left out."""
    items = [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
    return "<dl>" + "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd>" for n, v in items) + "</dl>"


def settings_html(config: Mapping[str, object]) -> str:
    """A nested configuration, one fold a group."""
    groups = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    alone = {name: value for name, value in config.items() if name not in groups}
    parts = [facts_html({name: json.dumps(value) for name, value in alone.items()})]
    for name, group in groups.items():
        flat = pd.json_normalize(dict(group), sep=".").to_dict("records")[0] if group else {}
        words = {key: value if value and isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
        parts.append(f"<details><summary>{html.escape(name)}</summary>{facts_html(words)}</details>")
    return "\n".join(parts)


def picture_html(content: bytes, description: str) -> str:
    """A PNG picture of curves inside the page."""
    text = base64.b64encode(content).decode()
    return f'<figure><img class="curve" alt="{html.escape(description)}" src="data:image/png;base64,{text}"></figure>'


def figure_html(figure: Figure, description: str) -> str:
    """A figure of curves inside the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, bbox_inches="tight", pad_inches=0.05, transparent=True)
    return picture_html(stream.getvalue(), description)


def page(title: str, body: Sequence[str], footer: str = "") -> str:
    """The whole page."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body="\n".join(body), footer=html.escape(footer))


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{html.escape(text)}</p>'


# --- training -----------------------------------------------------------------------------------------------


def training_body(workdir: Path) -> list[str]:
    """What a training run did: its data, loss, epochs and settings.

    Raises:
      InputError: a file of the run cannot be read.
    """
    run = _read_json(workdir / "config.json")
    config = _inside(run, "config")
    facts = {"data": _inside(run, "data").get("name"), **_model_facts(workdir / "model" / "model.json")}
    columns = ("epoch", "train_loss", "held_out_loss", "ema_held_out_loss", "learning_rate")
    path = workdir / "log.csv"
    log = read_table(path, numbers=(*columns, "seconds")) if path.exists() else pd.DataFrame()
    body = ["<h2>Training</h2>"]
    if log.empty:
        body += [facts_html(facts), note("No epoch is finished yet.")]
    else:
        facts |= {"epochs": number(log["epoch"].iloc[-1], whole=True)}
        facts |= {"time": f"{log['seconds'].sum() / 60:.1f} minutes"}
        figure = plots.draw_loss(*(log[name].to_numpy(float) for name in columns), linear=_linear_loss(workdir))
        body += [facts_html(facts), figure_html(figure, "loss and learning rate against epochs"), "<h2>Epochs</h2>"]
        shown = log.iloc[_spread(len(log), ROWS)]
        body += [table_html(shown)]
        if len(shown) < len(log):
            body += [note(f"{len(shown)} of {len(log)} epochs, evenly spaced.")]
    if (workdir / "levels.csv").exists():
        body += _denoising(workdir / "levels.csv")
    return [*body, "<h2>Settings</h2>", settings_html(config)]


def _linear_loss(workdir: Path) -> float | None:
    """Held-out loss of the exact Gaussian denoiser, which the model of a run knows."""
    path = workdir / "model" / "model.json"
    value = _inside(_read_json(path), "training").get("held_out_loss_of_linear") if path.exists() else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _denoising(path: Path) -> list[str]:
    """Errors of the network by noise level beside the Gaussian denoiser's."""
    levels = read_table(path, numbers=("sigma", "network", "gaussian"))
    body = ["<h2>Denoising</h2>"]
    # Models may stand on priors of their own.
    models = "model" in levels
    for name, part in levels.groupby("model", sort=False) if models else [("network", levels)]:
        sigma, network, gaussian = (part[column].to_numpy(float) for column in ("sigma", "network", "gaussian"))
        figure = plots.draw_denoising(sigma, {str(name): network}, gaussian)
        body.append(figure_html(figure, "denoising error by noise level" + f", {name}" * models))
    return [*body, table_html(levels)]


def _model_facts(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    model = _read_json(path)
    training = _inside(model, "training")
    missing = _inside(training, "missing")

    def told(name: str, whole: bool = False) -> str | None:
        value = training.get(name)
        return number(value, whole) if isinstance(value, int | float) else None

    return {
        "split": training.get("split"),
        "ocean values missing": "; ".join(
            f"{100 * missing[name]:.2g} % of {name}"
            for name in ("train", "validation")
            if isinstance(missing.get(name), int | float)
        )
        or None,
        "network": _inside(training, "config", "model").get("network"),
        "form": model.get("form"),
        "lowest held-out loss": told("held_out_loss"),
        "of the exact Gaussian denoiser": told("held_out_loss_of_linear"),
        "steps until then": told("step", whole=True),
        "versions": ", ".join(f"{name} {version}" for name, version in _inside(training, "versions").items()),
    }


def _inside(tree: Mapping, *names: str) -> Mapping:
    """A branch of nested settings, empty if there is none."""
    for name in names:
        found = tree.get(name)
        tree = found if isinstance(found, Mapping) else {}
    return tree


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` numbers of `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


# --- evaluation ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ensembles:
    """One method's fields of an evaluation, m/s, NaN on land.

    Attributes:
      method: its name.
      antithetic: True if members 2j and 2j + 1 are partners.
      patterns: their names.
      when: frame and time of each field.
      members: (pattern, time, M, y, x, 2).
      spread, truth: (pattern, time, y, x, 2).
      observed: (pattern, time, y, x) bool.
      ocean: (y, x) bool.
      along_grid: as `Fields.along_grid`.
      spacing: metres between neighbours to the north and east.
      about: title and history of the file.
    """

    method: str
    antithetic: bool
    patterns: list[str]
    when: list[str]
    members: np.ndarray
    spread: np.ndarray
    truth: np.ndarray
    observed: np.ndarray
    ocean: np.ndarray
    along_grid: Callable[[np.ndarray], np.ndarray]
    spacing: tuple[float, float]
    about: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Ensembles":
        """From a file that `jax_repaint.evaluate` wrote.

        Raises:
          InputError: it cannot be read or is another kind of file.
        """
        with door(path), path.open("rb") as file:
            if not file.read(4).startswith((b"CDF", b"\x89HDF")):
                raise InputError(f"{path} is no NetCDF file")
        check_hdf5(path)
        try:
            with opened(path) as data:
                return cls._of(xr.decode_cf(data), path)
        except InputError:
            raise
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as e:
            # Whatever libraries raise on damaged files.
            words = " ".join(str(e).split())[:200]
            raise InputError(f"{path} is no file of fields that an evaluation wrote ({words})") from e

    @classmethod
    def _of(cls, data: xr.Dataset, path: Path) -> "Ensembles":
        grid = data["ocean"].dims

        def vectors(kind: str, *dims: str) -> np.ndarray:
            names = [f"{direction}_sea_water_velocity{kind}" for direction in ("eastward", "northward")]
            return np.stack([data[name].transpose("pattern", "time", *dims, *grid).values for name in names], -1)

        truth, ocean = vectors("_truth"), data["ocean"].values > 0
        times = data["time"].values
        fields = Fields(truth[0], ocean, data["lat"].values, data["lon"].values, times)
        numbers = [f"frame {n}, " for n in data["frame"].values] if "frame" in data else [""] * len(times)
        return cls(
            method=str(data.attrs.get("method", path.stem)),
            antithetic=bool(data.attrs.get("antithetic", 0)),
            patterns=[str(name) for name in data["pattern"].values],
            when=[n + plots.clock(time) for n, time in zip(numbers, times, strict=True)],
            members=vectors("", "realization"),
            spread=vectors("_spread"),
            truth=truth,
            observed=data["observed"].transpose("pattern", "time", *grid).values > 0,
            ocean=ocean,
            along_grid=fields.along_grid,
            spacing=fields.spacing,
            about={name: str(data.attrs.get(name, "")) for name in ("title", "history", "evaluation")},
        )

    @property
    def run(self) -> tuple[str, str]:
        """What all files of an evaluation share: model and seed, as its history has them, and its digits."""
        return re.sub("method [^,]*, ", "", self.about["history"]), self.about["evaluation"]

    def ensemble(self, pattern: int, frame: int) -> np.ndarray:
        """The members (M, y, x, 2) that did not fail; the file has gaps in the place of the others."""
        members = self.members[pattern, frame]
        whole = np.isfinite(members[:, self.ocean]).all((1, 2))
        return members[whole] if whole.any() else members

    @property
    def mean(self) -> np.ndarray:
        """(pattern, time, y, x, 2)."""
        patterns, times = self.members.shape[:2]
        return np.stack([np.stack([self.ensemble(p, t).mean(0) for t in range(times)]) for p in range(patterns)])

    @property
    def is_ensemble(self) -> bool:
        """Whether every field has members enough to tell a spread, apart from those that failed."""
        patterns, times = self.members.shape[:2]
        fewest = min(len(self.ensemble(p, t)) for p in range(patterns) for t in range(times))
        return fewest >= metrics.least_members(self.antithetic)

    def scored(self, pattern: int, frame: int) -> np.ndarray:
        """Cells that count, (y, x) bool."""
        return metrics.scored_cells(self.truth[pattern, frame], self.ocean, self.observed[pattern, frame])

    def cases(self, pattern: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Number, and (truth, members, scored), of every frame; of as many members as every frame has, as in tables."""
        ensembles = [self.ensemble(pattern, frame) for frame in range(len(self.when))]
        size = min(map(len, ensembles))
        for frame, members in enumerate(ensembles):
            yield frame, (self.truth[pattern, frame], members[:size], self.scored(pattern, frame))


def evaluation_body(workdir: Path, frames: int, members: int) -> list[str]:
    """What an evaluation found: tables, the fields, and curves of every pattern.

    Raises:
      InputError: a file cannot be read, or files are of different frames.
    """
    body = ["<h2>Evaluation</h2>"]
    found = {path: Ensembles.read(path) for path in sorted(workdir.glob("fields*.nc"))}
    last = found.get(workdir / "fields.nc")
    scored = set(read_table(workdir / "table.csv").get("method", [])) if (workdir / "table.csv").exists() else None
    for path, one in list(found.items() if last is not None else ()):
        if one.run != last.run:
            logging.warning(
                "%s is of another evaluation (model, seed, members or calibration) than fields.nc, and is left out",
                path,
            )
        elif not _alike(one, last):
            logging.warning("%s is of other frames, patterns or data than fields.nc, and is left out", path)
        elif scored and one.method not in scored:
            logging.warning("%s is of %s, which table.csv does not have, and is left out", path, one.method)
        else:
            continue
        del found[path]
    files, made = list(found), list(found.values())
    if made:
        _check_alike(made, files)
        body.append(facts_html(_evaluation_facts(made)))
    if (workdir / "table.csv").exists():
        body += _score_tables(workdir / "table.csv")
    if made:
        body += viewer_html(made, frames, members)
        body.append("<h2>Curves</h2>")
        if any(one.method.endswith("_calibrated") for one in made):
            words = (
                "Reliability is that of Student intervals, from which calibrated ones, in the table, differ a little."
            )
            body.append(note(words))
        with command.bar(len(made[0].patterns), "curves", "pattern") as bar:
            for index, pattern in enumerate(made[0].patterns):
                figures = "".join(_pattern_figures(made, index))
                state = " open" if index == 0 else ""
                body.append(
                    f"<details{state}><summary>{html.escape(pattern)}</summary>"
                    f'<div class="figures">{figures}</div></details>'
                )
                bar.update()
    return body


def _alike(one: Ensembles, other: Ensembles) -> bool:
    same = one.patterns == other.patterns and one.when == other.when and np.array_equal(one.observed, other.observed)
    return same and np.array_equal(one.truth, other.truth, equal_nan=True)


def _check_alike(made: Sequence[Ensembles], files: Sequence[Path]) -> None:
    for other, path in zip(made, files, strict=True):
        if not _alike(made[0], other):
            raise InputError(f"{path} and {files[0]} are of different frames or patterns; keep them in two folders")


def _evaluation_facts(made: Sequence[Ensembles]) -> dict[str, object]:
    first = made[0]
    ny, nx = first.ocean.shape
    counts = ", ".join(f"{one.method} {one.members.shape[2]}" for one in made)
    return {
        "fields": first.about["title"],
        "written by": "; ".join(
            dict.fromkeys(one.about["history"].replace(f", method {one.method}", "") for one in made)
        ),
        "patterns": ", ".join(first.patterns),
        "frames": f"{len(first.when)}, {first.when[0]} to {first.when[-1]}",
        "members": counts,
        "grid": f"{ny} × {nx} cells, {first.spacing[0]:.4g} × {first.spacing[1]:.4g} m, {first.ocean.sum()} of ocean",
    }


def _score_tables(path: Path) -> list[str]:
    """Tables of every pattern, and the ratios of all of them as a picture."""
    named, more = ("pattern", "method"), path.with_name("details.csv")
    table = read_table(path, named)
    if "ratio" in table:
        check_numbers(table, ("ratio", "lo", "hi"), path)
    details = read_table(more, named) if more.exists() else pd.DataFrame(columns=named)
    body, curves = [], []
    for pattern, rows in table.groupby("pattern", sort=False):
        first = [name for name in HEADINGS if name in rows]
        order = ["method", *first, *rows.columns.difference(["pattern", "method", *first], sort=False)]
        body.append(table_html(rows[order], str(pattern)))
        theirs = details[details["pattern"] == pattern].drop(columns="pattern")
        if len(theirs):
            body.append(f"<details><summary>vectors, derivatives, eddies</summary>{table_html(theirs)}</details>")
        if "ratio" in rows and np.isfinite(rows["ratio"]).any():
            ends = rows["lo"].to_numpy(float), rows["hi"].to_numpy(float)
            words = rows["method"].to_numpy(str)
            curves.append(plots.Curve(str(pattern), words, rows["ratio"].to_numpy(float), *ends))
    body.append(note("MSE of the mean against the best deterministic baseline; the full numbers are in table.csv."))
    if curves:
        figure = plots.draw_sweep(curves, "", "MSE / MSE of the baseline", reference=("baseline", 1.0))
        body.append(f'<div class="figures">{figure_html(figure, "ratio of errors, by method and pattern")}</div>')
    return body


def _pattern_figures(made: Sequence[Ensembles], pattern: int) -> Iterator[str]:
    """Error against distance, spectra, reliability and rank histograms of one pattern, over all frames."""
    name, count = made[0].patterns[pattern], len(made[0].when)
    words = f"{name}, {count} frame{'s' * (count > 1)}"
    errors, baseline = distance_errors(made, pattern)
    if errors:
        figure = plots.draw_distance(errors, baseline, "cells", words)
        yield figure_html(figure, f"error against distance to the nearest observation, {name}")
    rows, columns = structures.ocean_rectangle(made[0].ocean & np.isfinite(made[0].truth[pattern]).all((0, -1)))
    if min(rows.stop - rows.start, columns.stop - columns.start) >= 8:
        spectra = {one.method: mean_spectrum(one, pattern) for one in made}
        yield figure_html(plots.draw_spectra(spectra, words), f"spectra of kinetic energy, {name}")
    ensembles = [one for one in made if one.is_ensemble]
    if ensembles:
        inside = {one.method: mean_coverage(one, pattern) for one in ensembles}
        yield figure_html(plots.draw_reliability(LEVELS, inside, words), f"coverage of intervals, {name}")
    for one in ensembles:
        figure = plots.draw_rank_histogram(rank_counts(one, pattern), f"{one.method}, {words}")
        yield figure_html(figure, f"rank histogram of {one.method}, {name}")


def distance_errors(made: Sequence[Ensembles], pattern: int) -> tuple[dict[str, metrics.DistanceErrors], str]:
    """Errors of every method's mean against distance, and the name of the baseline beside them.

    The baseline is the first single estimate among the methods, else no current at all.
    """
    single = next((one for one in made if one.members.shape[2] == 1), None)
    others = [one for one in made if one is not single]
    edges = [*EDGES, math.inf]
    errors = {}
    for one in others:
        frames = []
        for frame, (truth, members, scored) in one.cases(pattern):
            baseline = np.zeros_like(truth) if single is None else single.members[pattern, frame, 0]
            observed = one.observed[pattern, frame]
            frames.append(metrics.error_by_distance(members.mean(0), baseline, truth, scored, observed, edges))
        errors[one.method] = metrics.DistanceErrors.average(frames)
    return errors, "no current" if single is None else single.method


def mean_spectrum(one: Ensembles, pattern: int) -> structures.Spectrum:
    """Spectra of truth and members, averaged over frames."""
    dy, dx = one.spacing
    known = one.ocean & np.isfinite(one.truth[pattern]).all((0, -1))
    frames = [structures.spectrum(truth, members, known, dx, dy) for _, (truth, members, _) in one.cases(pattern)]
    return structures.Spectrum.average(frames)


def mean_coverage(one: Ensembles, pattern: int) -> np.ndarray:
    """Share of values inside the central interval of each of LEVELS, averaged over frames."""
    frames = [
        [metrics.coverage(*case, level, antithetic=one.antithetic) for level in LEVELS]
        for _, case in one.cases(pattern)
    ]
    return np.mean(frames, 0)


def rank_counts(one: Ensembles, pattern: int) -> np.ndarray:
    """Counts of `metrics.rank_histogram`, summed over frames."""
    cases = one.cases(pattern)
    return sum(
        metrics.rank_histogram(*case, np.random.default_rng([frame, pattern]), one.antithetic) for frame, case in cases
    )


# --- sweep --------------------------------------------------------------------------------------------------

SHOWN = (
    "label", "stage", "members", "{mean}_over_best_ratio", "{mean}_over_best_wins", "{mean}_over_best_worst", "best",
    "member_over_seed_gp_ratio", "member_over_seed_gp_wins", "member_over_seed_gp_worst", "crps", "spread_skill",
    "coverage90", "mse_mean", "mse_member", "small_scale", "calls", "seconds", "frames", "failed", "method",
)  # fmt: skip


def sweep_body(workdir: Path) -> list[str]:
    """What a sweep found, as far as it is: a table and curves of every pattern, and its settings.

    Raises:
      InputError: a file cannot be read.
    """
    config = _read_json(workdir / results.CONFIG) if (workdir / results.CONFIG).exists() else {}
    rows = results.read_parts(workdir)
    rows = results.in_order(rows, _patterns(config, rows))
    body = ["<h2>Sweep</h2>"]
    if rows.empty:
        return [*body, note("No task is finished yet."), "<h2>Settings</h2>", settings_html(config)]
    table = comparison.compare(rows)
    facts = {
        "points": table["point"].nunique(),
        "patterns": ", ".join(table["pattern"].unique()),
        "frames": rows["frame"].nunique(),
        "members": ", ".join(map(str, sorted(table["members"].unique()))),
        "finished": f"{rows['task'].nunique()} tasks, one point on one frame with one pattern and one seed",
    }
    body.append(facts_html(facts))
    shown = [name.format(mean=comparison.comparable_mean(table)) for name in SHOWN]
    ends = [end for name in shown for end in INTERVALS.get(name, ())]
    for pattern, mine in table.groupby("pattern", sort=False):
        body.append(table_html(mine[[*shown, *ends]], str(pattern)))
    body.append(note("Ratios are over the frames without a failed member; more columns are in table.csv."))
    if comparison.comparable_mean(table) == "expected":
        body.append(note(f"Ensembles differ in size: compared is {comparison.name_of_mean(table)}."))
    if (table.groupby("pattern")["frames"].nunique() > 1).any():
        body.append(note("Points are over different frames; `sweep --so_far` compares them where all are finished."))
    for line in table[table["failed"] > 0].to_dict("records"):
        body.append(note(f"{line['label']}, {line['pattern']}: first failed in {line['failed_at']}"))
    body += ["<h2>Curves</h2>", f'<div class="figures">{"".join(_sweep_figures(workdir, rows, table))}</div>']
    return [*body, "<h2>Settings</h2>", settings_html(config)]


def _patterns(config: Mapping, rows: pd.DataFrame) -> list[str]:
    """The patterns of a sweep in its own order; the usual ones, which no setting names, in that of observe.usual."""
    given = observe.patterns_of(config.get("config", {}).get("patterns", ""))
    return list(given) or sorted(
        rows["pattern"].unique(), key=lambda name: "line walk cells".find(name.partition(":")[0])
    )


def _sweep_figures(workdir: Path, rows: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    """The sweep's own pictures if it is finished, and scores by stage, by ensemble size and by distance."""
    pairs = (
        (
            "sweep.png",
            f"{comparison.comparable_mean(table)}_over_best",
            f"MSE of {comparison.name_of_mean(table)} / best baseline",
        ),
        ("seed_gp.png", "member_over_seed_gp", "MSE of a member / seed_gp"),
    )
    for name, pair, score in pairs:
        if (workdir / name).exists():
            yield picture_html((workdir / name).read_bytes(), score)
        elif np.isfinite(table[f"{pair}_ratio"]).any():
            lines = comparison.curves(table, "label", "", pair)
            yield figure_html(plots.draw_sweep(lines, "", score, reference=("baseline", 1.0)), score)
    pair, score = "mean_over_best", "MSE of the mean / best baseline"
    # Points differ in stages and sizes; a line of a single one says nothing.
    for x, draw in (("stage", plots.draw_stages), ("members", _draw_sizes)):
        if table[x].nunique() > 1 and np.isfinite(table[f"{pair}_ratio"]).any():
            several = table[table.groupby(["pattern", "point"])[x].transform("nunique") > 1]
            for pattern, mine in several.groupby("pattern", sort=False):
                lines = comparison.curves(mine, x, "label", pair)
                figure = draw(lines, score, str(pattern), reference=("best baseline", 1.0))
                yield figure_html(figure, f"{score} by {x}, {pattern}")
    for pattern, mine in rows.groupby("pattern", sort=False):
        errors = comparison.distances(mine)
        if not errors:
            continue
        figure = plots.draw_distance(errors, "linear", title=str(pattern))
        yield figure_html(figure, f"error against distance to the nearest observation, {pattern}")


def _draw_sizes(curves: Sequence[plots.Curve], score: str, title: str, reference: tuple[str, float]) -> Figure:
    return plots.draw_sweep(curves, "members", score, title, reference)


# --- viewer -------------------------------------------------------------------------------------------------


def viewer_html(made: Sequence[Ensembles], frames: int, members: int) -> list[str]:
    """Controls, pictures and data of the viewer."""
    data = viewer_data(made, frames, members)
    options = {"frame": data["frames"], "pattern": data["patterns"], "method": data["methods"], "member": ["mean"]}
    controls = "".join(_control(name, options[name]) for name in DIMENSIONS)
    inside = '<figcaption><b></b><span></span></figcaption><canvas role="img"></canvas>'
    panels = "".join(f'<figure data-panel="{name}">{inside}</figure>' for name in PANELS)
    bars = _bar("speed", plots.SPEED, data["top"]["speed"])
    bars += _bar("error, spread", plots.DEVIATION, data["top"]["deviation"])
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    left_out = _left_out(made, data)
    return [
        '<section id="viewer" tabindex="0" aria-label="viewer of fields"><h2>Fields</h2>',
        note(
            "Keys: ← → frame, P pattern, M method; ↑ ↓ member, once the viewer is clicked. A click on the right or "
            "left half of a picture: next or previous frame. Blue dots are observed cells."
        ),
        f'<div class="controls">{controls}</div><div class="panels">{panels}</div><div class="bars">{bars}</div>',
        *([note(left_out)] if left_out else []),
        "</section>",
        f'<script type="application/json" id="fields">{text}</script>',
    ]


def _control(name: str, options: Sequence[str]) -> str:
    choices = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    hidden = " hidden" if len(options) < 2 else ""
    return (
        f'<div data-for="{name}"{hidden}><label for="choose-{name}">{name}</label>'
        f'<button data-step="{name}:-1" aria-label="previous {name}">‹</button>'
        f'<select id="choose-{name}" name="{name}">{choices}</select>'
        f'<button data-step="{name}:1" aria-label="next {name}">›</button></div>'
    )


def _bar(name: str, colours: Colormap, top: float) -> str:
    stops = ", ".join(_hex_colours(colours, 9))
    return (
        f'<div><i style="background: linear-gradient(to right, {stops})"></i>'
        f"<p><span>0</span><span>{name}</span><span>{top:.2g} m/s</span></p></div>"
    )


def _hex_colours(colours: Colormap, count: int = 64) -> list[str]:
    return [to_hex(colour) for colour in colours(np.linspace(0, 1, count))]


def _left_out(made: Sequence[Ensembles], data: Mapping) -> str:
    """What the viewer does not show, as a sentence; empty if it shows everything."""
    most = max(one.members.shape[2] for one in made)
    shown = max(len(case["errors"]) for method in data["estimates"] for pattern in method for case in pattern)
    parts = [
        (len(data["frames"]), len(made[0].when), "frames"),
        (max(shown - 1, 1), most, "members"),
        (data["shape"][0] * data["shape"][1], made[0].ocean.size, "cells"),
    ]
    words = [f"{some} of {all_} {name}" for some, all_, name in parts if some < all_]
    return f"To keep the page small it shows {', '.join(words)}; means and scores are of all." if words else ""


def viewer_data(made: Sequence[Ensembles], frames: int, members: int) -> dict:
    """What the viewer draws, as JSON holds it.

    A field is [step, text]: u and v of every cell, south to north, as multiples of the step, in bytes written in
    base64; -128 is no value. Members and means are kept as their difference from the truth, so that a small error is
    not lost in the steps of a large current, and from 0 where the truth is not known. On curvilinear grids u and v are
    turned to the grid's own directions.
    """
    first = made[0]
    chosen = _spread(len(first.when), frames)
    stride = -(-max(first.ocean.shape) // LARGEST)
    thin = (slice(None, None, stride), slice(None, None, stride))
    ocean = first.ocean[thin]

    def pack(field: np.ndarray) -> list:
        return quantise(np.where(first.ocean[..., None], first.along_grid(field), np.nan)[thin])

    def case(one: Ensembles, pattern: int, frame: int) -> dict:
        truth, scored = one.truth[pattern, frame], one.scored(pattern, frame)
        ensemble = one.ensemble(pattern, frame)
        alone = [] if len(ensemble) == 1 else list(ensemble[:members])
        estimates, known = [ensemble.mean(0), *alone], np.nan_to_num(truth)
        spread = one.spread[pattern, frame]
        spread = spread if np.isfinite(spread[one.ocean]).all() else None
        return {
            "errors": [pack(estimate - known) for estimate in estimates],
            "rms": [metrics.vector_rmse(metrics.mse(estimate, truth, scored)) for estimate in estimates],
            "spread": None if spread is None else quantise(np.where(ocean[..., None], spread[thin], np.nan)),
            "spread_rms": None if spread is None else float(np.sqrt((spread[scored] ** 2).sum(-1).mean())),
        }

    deviations = [one.mean[:, chosen] - one.truth[:, chosen] for one in made]
    deviations += [one.spread[:, chosen] for one in made if one.is_ensemble]
    (height, width), (dy, dx) = first.ocean.shape, first.spacing
    return {
        "shape": list(ocean.shape),
        # Pictures are of rows and columns, however the grid lies.
        "aspect": float(np.clip(height * dy / (width * dx), 0.2, 3)),
        "ocean": _text(ocean.astype(np.int8)),
        "top": {"speed": plots.top(first.truth[0, chosen]), "deviation": _longest(deviations, first.ocean)},
        "colours": {"speed": _hex_colours(plots.SPEED), "deviation": _hex_colours(plots.DEVIATION)},
        "frames": [first.when[frame] for frame in chosen],
        "patterns": first.patterns,
        "methods": [one.method for one in made],
        "observed": [[_text(_in_blocks(seen, stride)) for seen in row[chosen]] for row in first.observed],
        "counts": first.observed.sum((-2, -1))[:, chosen].tolist(),
        "truth": [pack(field) for field in first.truth[0, chosen]],
        "estimates": [
            [[case(one, pattern, frame) for frame in chosen] for pattern in range(len(first.patterns))] for one in made
        ],
    }


def _longest(fields: Sequence[np.ndarray], ocean: np.ndarray) -> float:
    return plots.top([np.concatenate([field[..., ocean, :].reshape(-1, 2) for field in fields])])


def _in_blocks(seen: np.ndarray, stride: int) -> np.ndarray:
    """Whether a cell of each block of stride x stride is seen, int8: every stride-th alone would lose whole lines."""
    height, width = (-(-side // stride) * stride for side in seen.shape)
    padded = np.zeros((height, width), np.int8)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return padded.reshape(height // stride, stride, width // stride, stride).max((1, 3))


def quantise(field: np.ndarray) -> list:
    """A field (y, x, 2) as [step, text]; see viewer_data."""
    known = np.isfinite(field)
    step = float(np.abs(field[known]).max(initial=0)) / 127 or 1.0
    steps = np.where(known, np.rint(np.where(known, field, 0) / step), NOTHING)
    return [step, _text(steps.astype(np.int8))]


def _text(steps: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(steps, np.int8).tobytes()).decode()


# --- files --------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e})") from e
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no settings: a {type(found).__name__} instead of an object")
    return found


def build(workdir: Path, frames: int = 8, members: int = 8) -> str:
    """The page about a folder.

    Args:
      frames, members: most of them that the viewer holds.

    Raises:
      InputError: nothing in the folder is known, or a file cannot be used.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"{workdir} is no folder")
    body = []
    if results.is_sweep(workdir):
        body += sweep_body(workdir)
    else:
        if (workdir / "config.json").exists():
            body += training_body(workdir)
        if (workdir / "table.csv").exists() or any(workdir.glob("fields*.nc")):
            body += evaluation_body(workdir, frames, members)
    if not body:
        raise InputError(
            f"{workdir} holds no training run (config.json, log.csv), no evaluation (table.csv, fields.nc) and no "
            "sweep (config.json, parts)"
        )
    return page(workdir.resolve().name, body, "Written by jax_repaint.report; nothing in it comes from a network.")


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("out", "", "The page; by default WORKDIR/report.html.")
    flags.DEFINE_integer("frames", 8, "Most frames in the viewer.", lower_bound=1)
    flags.DEFINE_integer("members", 8, "Most members of an ensemble in the viewer.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    if len(argv) < 2:
        raise InputError("the folder to report on is missing: python -m jax_repaint.report WORKDIR")
    workdir = Path(argv[1])
    out = Path(FLAGS.out) if FLAGS.out else workdir / "report.html"
    if FLAGS.out:
        # With another suffix it might be a file of the run.
        check_writable(out, (".html", ".htm"))
    text = build(workdir, FLAGS.frames, FLAGS.members)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {out}, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    _define_flags()
    command.run(main, positional=1)
