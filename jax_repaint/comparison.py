"""The table and the pictures of a sweep, from its rows (results.SCHEMA).

One line is one point, pattern, stage and size of the ensemble, over the frames on which no member failed; of several
seeds a frame counts once, with the mean of their errors. Two comparisons stand in it, each on the same frames with a
paired block-bootstrap interval (scoring.ratio_of_means):

    member over seed_gp    one member against the Gaussian process of earlier results, which is how those were counted
    mean over best         the mean of the ensemble against the best deterministic baseline there

and the other pairings in table.csv. Where methods have ensembles of different size, the second is of the mean that as
many members as the largest has are expected to have (`mse_expected`), so that two members are no worse for being two.
An average of ratios and a ratio of averages are different numbers: the first is ruled by frames on which the baseline
is nearly perfect.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from absl import logging

from jax_repaint import metrics, plots, scoring
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file
from jax_repaint.methods import DETERMINISTIC

FILES = ("rows.parquet", "table.csv", "table.txt", "sweep.png", "seed_gp.png")
SCORES = list(scoring.FrameScores.__dataclass_fields__)
EXPECTED = "mse_expected"
SUMMARY = ("mse_member", "mse_mean", "component_rmse", "vector_rmse", "crps", "spread_skill", "coverage90",
           "small_scale", "calls", "seconds")  # fmt: skip
PAIRS = [(kind, against) for against in ("seed_gp", "best") for kind in ("member", "mean", "expected")]
STATISTICS = ("median", "average", "ratio", "lo", "hi", "wins", "wins_lo", "wins_hi", "worst")
NAMES = {
    "distance": "distance to the nearest observation",
    "coverage": "share of cells observed",
    "calls": "network calls a member",
}


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each (pattern, point, stage, members) of `rows`.

    Columns: those names, label, method, settings; frames, failed (of them, where a member failed), failed_at (the
    first); the columns of scoring.summary, whose ratio is `mean over best`; mse_expected and `whole`, the number of
    members it is of; and {member, mean, expected}_over_{seed_gp, best}_{median, average, ratio, lo, hi, wins, wins_lo,
    wins_hi, worst}. NaN where every frame failed.
    """
    order = list(dict.fromkeys(rows["pattern"]))
    whole = int(rows["members"].max())
    rows = rows.assign(**{EXPECTED: expected_mse(rows, whole)})
    lines = []
    for (pattern, point, stage, members), mine in rows.groupby(["pattern", "point", "stage", "members"], sort=True):
        mine = mine.sort_values(["frame", "seed"])
        first = mine.iloc[0]
        failed = mine["failed_members"].groupby(mine["frame"]).transform("max") > 0
        scored = ~failed | failed.all()
        best = min(DETERMINISTIC, key=lambda name, mine=mine, scored=scored: _mean_or_inf(mine[f"mse_{name}"][scored]))
        line = {
            "pattern": pattern, "point": point, "stage": stage, "members": members, "label": first["label"],
            "method": first["method"], "settings": first["settings"], "frames": mine["frame"].nunique(),
            "failed": mine["frame"][failed].nunique(), "best": best,
            "failed_at": mine["failed_at"][mine["failed_members"] > 0].iloc[0] if failed.any() else "",
            "coverage": float((mine["observed"] / mine["ocean"]).mean()), "whole": whole,
        }  # fmt: skip
        line |= {f"mse_{name}": float(mine[f"mse_{name}"][scored].mean()) for name in DETERMINISTIC}
        if not failed.all():
            line |= _scores(mine[~failed], best)
        lines.append(line)
    table = pd.DataFrame(lines)
    for name in (*SUMMARY, EXPECTED, *(f"{kind}_over_{against}_{s}" for kind, against in PAIRS for s in STATISTICS)):
        if name not in table:
            table[name] = math.nan
    return table.sort_values(
        ["pattern", "point", "stage", "members"], key=lambda c: c.map(order.index) if c.name == "pattern" else c,
        ignore_index=True,
    )  # fmt: skip


def expected_mse(rows: pd.DataFrame, members: int) -> np.ndarray:
    """MSE that the mean of `members` members is expected to have, of each row with M of them.

        mse_mean + (1 / members - 1 / M) variance,   not below 0

    NaN for fewer members than tell their variance, and for fewer antithetic pairs, whose means have another variance.
    """
    more = rows["members"] != members
    told = ~more | (~rows["antithetic"] & (rows["members"] > 1))
    gained = np.where(more, (1 / members - 1 / rows["members"]) * rows["variance"], 0)
    return np.where(told, np.maximum(rows["mse_mean"] + gained, 0), np.nan)


def _mean_or_inf(values: pd.Series) -> float:
    return math.inf if values.isna().any() else float(values.mean())


def _scores(mine: pd.DataFrame, best: str) -> dict[str, Any]:
    """Scores and comparisons of one line."""
    block = int(mine["block"].iloc[0])
    by_frame = mine.groupby("frame").mean(numeric_only=True)
    frames = [scoring.FrameScores(**row) for row in mine[SCORES].to_dict("records")]
    calls, seconds = float(mine["calls"].mean()), float(mine["device_seconds"].mean())
    line = scoring.summary(str(mine["method"].iloc[0]), frames, calls, seconds)
    line = {key: line[key] for key in SUMMARY} | {EXPECTED: float(mine[EXPECTED].mean(skipna=False))}
    for kind, against in PAIRS:
        if mine[f"mse_{kind}"].isna().any():
            continue
        base = best if against == "best" else "seed_gp"
        ours, theirs = by_frame[f"mse_{kind}"].to_numpy(), by_frame[f"mse_{base}"].to_numpy()
        found = scoring.ratio_of_means(ours, theirs, block, 0)
        numbers = SimpleNamespace(**vars(found), average=float(np.mean(ours / theirs)))
        line |= {f"{kind}_over_{against}_{name}": getattr(numbers, name) for name in STATISTICS}
    return line


def comparable_mean(table: pd.DataFrame) -> str:
    """Which of PAIRS compares means of all points: those of ensembles of different size are no match."""
    return "expected" if table.groupby("point")["members"].max().nunique() > 1 else "mean"


def name_of_mean(table: pd.DataFrame) -> str:
    """What `comparable_mean` stands for, in words."""
    return "the mean" if comparable_mean(table) == "mean" else f"the mean of {table['whole'].iloc[0]}, as expected"


def _interval(value: float, lo: float, hi: float, form: str = ".3f") -> str:
    if not math.isfinite(value):
        return scoring.DASH
    return f"{value:{form}}" if not math.isfinite(lo) else f"{value:{form}} [{lo:{form}}, {hi:{form}}]"


def format_lines(table: pd.DataFrame, every_stage: bool = False) -> str:
    """The table as text: for each pattern the scores, and the two comparisons of the module docstring.

    Args:
      table: of `compare`.
      every_stage: whether all stages are shown, or the last one of each point.
    """
    last = table.groupby(["pattern", "point"])["stage"].transform("max")
    if every_stage:
        # Of one stage there is nothing to tell apart.
        named = table["label"].where(last == 1, table["label"] + " S" + table["stage"].astype(str))
        table = table.assign(label=named)
    else:
        table = table[table["stage"] == last]

    mean = comparable_mean(table)
    unlike = mean == "expected"

    def number(value: float, form: str) -> str:
        return f"{value:{form}}" if math.isfinite(value) else scoring.DASH

    parts = []
    for pattern, mine in table.groupby("pattern", sort=False):
        names = list(mine["label"])
        width = max(map(len, names))
        best = ", ".join(dict.fromkeys(mine["best"]))
        bases = _bases(mine)
        the_mean = f"mean of {mine['whole'].iloc[0]}, as expected," if unlike else "mean"
        scores, ratios = [], []
        for name, (_, line) in zip(names, mine.iterrows(), strict=True):
            failed = f"{line['failed']}/{line['frames']}" if line["failed"] else scoring.DASH
            scores.append(
                {"point": name.ljust(width), "members": line["members"], "failed": failed}
                | {title: number(line[key], form) for title, key, form in (
                    ("MSE member", "mse_member", ".3g"), ("MSE mean", "mse_mean", ".3g"),
                    *([(f"MSE of {line['whole']}", EXPECTED, ".3g")] if unlike else []), ("CRPS", "crps", ".3g"),
                    ("spread/skill", "spread_skill", ".2f"), ("in 90 %", "coverage90", ".3f"),
                    ("small scales", "small_scale", ".2f"), ("calls", "calls", ".0f"), ("s", "seconds", ".3g"),
                )}
            )  # fmt: skip
            row = {"point": name.ljust(width)}
            for kind, of, against in (("member", "member", "seed_gp"), ("mean", mean, "best")):
                prefix = f"{of}_over_{against}"
                row |= {
                    f"median {kind}": number(line[f"{prefix}_median"], ".3f"),
                    f"average {kind}": number(line[f"{prefix}_average"], ".3f"),
                    f"ratio {kind}": _interval(*(line[f"{prefix}_{part}"] for part in ("ratio", "lo", "hi"))),
                    f"wins {kind}": _interval(*(line[f"{prefix}_wins{part}"] for part in ("", "_lo", "_hi")), ".0%"),
                    f"worst {kind}": number(line[f"{prefix}_worst"], ".2f"),
                }
            ratios.append(row)
        parts.append(
            f"{pattern}, {mine['frames'].max()} frames; MSE of the baselines: {bases}\n"
            f"{_columns(scores)}\n"
            f"one member over seed_gp (left), {the_mean} over the best baseline, {best} (right)\n{_columns(ratios)}"
        )
    where = table[table["failed"] > 0]
    notes = [f"{line['label']}: first failed in {line['failed_at']}" for _, line in where.iterrows()]
    parts.append("\n".join([*dict.fromkeys(notes), "ratios over the frames without a failed member; 95 % intervals"]))
    return "\n\n".join(parts)


def _bases(lines: pd.DataFrame) -> str:
    """Errors of the baselines of most lines, and below them those of points with other frames or another model."""
    texts = [", ".join(f"{name} {line[f'mse_{name}']:.3g}" for name in DETERMINISTIC) for _, line in lines.iterrows()]
    named: dict[str, list[str]] = {}
    for text, label in zip(texts, lines["label"], strict=True):
        named.setdefault(text, []).append(label)
    usual = max(named, key=lambda text: len(named[text]))
    others = [f"\n  of {', '.join(who)}: {text}" for text, who in named.items() if text != usual]
    return usual + "".join(others)


def _columns(lines: Sequence[dict[str, Any]]) -> str:
    """Lines under the first word of their columns' names, aligned."""
    head = [
        key if key.split()[-1] not in ("member", "mean") or key.startswith("MSE") else key.split()[0]
        for key in lines[0]
    ]
    cells = [head, *([str(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = ["  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]  # fmt: skip
    return "\n".join(text.rstrip() for text in texts)


# --- pictures -------------------------------------------------------------------------------------------------


def curves(table: pd.DataFrame, x: str, curve: str, comparison: str) -> list[plots.Curve]:
    """One curve for each pattern and value of the setting `curve`.

    Args:
      table: of `compare`.
      x: a setting of the points, or label, stage, calls, members, coverage, pattern.
      comparison: such as member_over_seed_gp.

    Raises:
      InputError: no point has that setting.
    """
    settings = pd.DataFrame(table["settings"].map(json.loads).to_list(), index=table.index)
    table = table.assign(
        calls=table["calls"] / table["members"], **{n: settings[n] for n in settings if n not in table}
    )
    if x != "stage":
        table = table[table["stage"] == table.groupby(["pattern", "point"])["stage"].transform("max")]
    if x != "members":
        table = table[table["members"] == table.groupby("point")["members"].transform("max")]
    for name in (x, curve):
        if name and name not in table:
            raise InputError(f"the points of this sweep have no setting {name!r} to draw")
    table = table[table[x].notna()]
    several = table["pattern"].nunique() > 1 and x not in ("coverage", "pattern")
    named = pd.Series("", index=table.index)
    if curve:
        # A point without the setting is its own curve.
        named = table[curve].map(str).where(table[curve].notna(), table["label"])
    if several:
        named = named.str.cat(table["pattern"], sep=", ").str.strip(", ")
    if not several and not curve:
        named = table["method"]
    made = []
    for name, line in table.groupby(named, sort=False):
        line = line.sort_values(x) if line[x].dtype.kind in "if" else line
        value, lo, hi = (line[f"{comparison}_{part}"].to_numpy() for part in ("ratio", "lo", "hi"))
        places = line[x].to_numpy() if line[x].dtype.kind in "if" else line[x].astype(str).to_numpy(str)
        made.append(plots.Curve(str(name), places, value, lo, hi))
    return made


def distances(rows: pd.DataFrame) -> dict[str, metrics.DistanceErrors]:
    """Errors by distance of the whole ensembles' means after the last stage, by point (and pattern of several).

    Over the frames without a failed member; a point whose last stage failed on all of them is left out.
    """
    last = rows.groupby("point")[["stage", "members"]].transform("max")
    rows = rows[(rows["stage"] == last["stage"]) & (rows["members"] == last["members"])]
    rows = rows[rows["failed_members"] == 0]
    several = rows["pattern"].nunique() > 1
    made = {}
    for (pattern, label), mine in rows.groupby(["pattern", "label"], sort=False):
        frames = [
            metrics.DistanceErrors(
                *(np.asarray(row[f"distance_{part}"]) for part in ("edges", "cells", "mean", "linear"))
            )
            for row in mine.to_dict("records")
        ]
        made[f"{label}, {pattern}" if several else label] = metrics.DistanceErrors.average(frames)
    return made


def write(
    rows: pd.DataFrame,
    folder: Path,
    x: str = "label",
    curve: str = "",
    title: str = "",
    every_stage: bool = False,
    note: str = "",
) -> str:
    """Writes FILES into `folder` and returns the table as text.

    Args:
      rows: of a whole sweep.
      x, curve, title: of the pictures (points.default_config).
      every_stage: whether the table shows all stages; it does where `x` is the stage.
      note: that the text ends with.
    """
    table = compare(rows)
    with whole_file(folder / "rows.parquet") as temporary:
        rows.to_parquet(temporary, index=False)
    scoring.write_csv(table.to_dict("records"), folder / "table.csv")
    text = format_lines(table, every_stage or x == "stage")
    if x == "distance" and (rows["failed_members"] == 0).any():
        text += "\n\n" + _format_distances(distances(rows))
    text += note
    with whole_file(folder / "table.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    mean = comparable_mean(table)
    score = f"MSE of {name_of_mean(table)} over that of the best baseline"
    _draw(folder / "sweep.png", rows, table, x, curve, f"{mean}_over_best", score, title)
    # Errors by distance are of the mean, and have one picture.
    other = "label" if x == "distance" else x
    score = "MSE of a member over that of seed_gp"
    _draw(folder / "seed_gp.png", rows, table, other, curve, "member_over_seed_gp", score, title)
    for label in _without(table, other):
        logging.warning("%s has no setting %s, and is in the table but not in the picture", label, other)
    return text


def _without(table: pd.DataFrame, x: str) -> list[str]:
    """Labels of the points that `curves` leaves out, as they have no such setting."""
    if x in table:
        return []
    missing = [x not in json.loads(settings) for settings in table["settings"]]
    return list(dict.fromkeys(table["label"][missing]))


def _draw(
    path: Path, rows: pd.DataFrame, table: pd.DataFrame, x: str, curve: str, comparison: str, score: str, title: str
) -> None:
    if not np.isfinite(table[f"{comparison}_ratio"]).any():
        return
    if x == "distance":
        # Curves of different patterns are over different cells.
        chosen = rows[rows["pattern"] == rows["pattern"].iloc[0]]
        errors = distances(chosen)
        if errors:
            plots.distance(path, errors, "linear", title=f"{title}, {chosen['pattern'].iloc[0]}".strip(", "))
        return
    lines, reference = curves(table, x, curve, comparison), ("baseline", 1.0)
    if x == "stage":
        plots.stages(path, lines, score, title, reference)
    else:
        plots.sweep(path, lines, NAMES.get(x, x), score, title, reference)


def _format_distances(errors: dict[str, metrics.DistanceErrors]) -> str:
    """Vector RMSE by distance, m/s."""
    lines = []
    for name, one in errors.items():
        bins = [f"{lo:g}..{hi:g}" for lo, hi in zip(one.edges[:-1], one.edges[1:], strict=True)]
        for who, values in ((name, one.mean), ("  linear there", one.baseline)):
            lines.append(
                {"RMS error (m/s) by distance (cells)": who}
                | dict(zip(bins, (f"{math.sqrt(2 * v):.4f}" for v in values), strict=True))
            )
    return _columns(lines)
