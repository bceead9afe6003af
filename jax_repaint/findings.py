"""The findings of the notes, what the sweeps say of each, and the page of both.

A finding claims that some ratios of mean errors lie in given ranges: below 1 (better), above 1 (worse), within one per
cent of 1 (no effect). Each ratio is over the same frames, with a paired block-bootstrap interval of 95 %
(scoring.ratio_of_means). A claim

    holds             if its whole interval is in the range
    does not hold     if none of it is
    is not decided    otherwise

and the verdict on a finding is the worst of its claims. Where a control, stated in the same way, gives the same effect
without what the notes say is its cause, the finding `holds for another reason`. Conditions without which a claim could
not be seen make it `not decided` if they do not hold.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from jax_repaint import comparison, plots, resumption, scoring
from jax_repaint.files import whole_file
from jax_repaint.resumption import Resumption

HOLDS, NOT, OPEN, OTHER = "holds", "does not hold", "not decided", "holds for another reason"
# Ends belong to their range; next to one and to a half, so that what is equal is neither below nor above.
BELOW, ABOVE = (0.0, math.nextafter(1, 0)), (math.nextafter(1, 2), math.inf)
SAME, NO_WORSE, MOST = (0.99, 1.01), (0.0, 1.01), (math.nextafter(0.5, 1), 1.0)
HALF_OF_NOTES = (0.0, 0.9)  # where the notes had 0.802 over 1.001
RANGES = {
    BELOW: "below 1", ABOVE: "above 1", SAME: "0.99 to 1.01", NO_WORSE: "not above 1.01", MOST: "more than half",
    HALF_OF_NOTES: "not above 0.9",
}  # fmt: skip
FEWEST = 8  # frames, below which an interval says nothing
ROLES = ("claim", "control", "condition", "beside")


# --- claims and verdicts --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """A number with its interval, and the range in which it should lie.

    Attributes:
      name: what over what.
      value, lo, hi: NaN where it does not exist.
      expected: ends of the range.
      role: "claim" of the notes; "control", which gives the effect without its cause; "condition", without which
        nothing can be said; "beside", shown only.
    """

    name: str
    value: float
    lo: float
    hi: float
    expected: tuple[float, float]
    role: str = "claim"

    @property
    def verdict(self) -> str:
        """HOLDS, NOT or OPEN."""
        low, high = self.expected
        if not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            return OPEN
        if low <= self.lo and self.hi <= high:
            return HOLDS
        return NOT if self.hi < low or self.lo > high else OPEN


def verdict(checks: Sequence[Check]) -> str:
    """The verdict on a finding, by the rule of the module docstring."""
    by_role = {role: [check.verdict for check in checks if check.role == role] for role in ROLES}
    if any(v != HOLDS for v in by_role["condition"]):
        return OPEN
    for worst in (NOT, OPEN):
        if worst in by_role["claim"]:
            return worst
    if not by_role["claim"]:
        return OPEN
    if by_role["control"] and all(v == HOLDS for v in by_role["control"]):
        return OTHER
    return HOLDS


def chosen(
    rows: pd.DataFrame, label: str, stage: int | None = None, members: int | None = None, pattern: str | None = None
) -> pd.DataFrame:
    """Rows of one point, by default of its last stage and its whole ensemble, in the order of time."""
    mine = rows[rows["label"] == label]
    mine = mine if pattern is None else mine[mine["pattern"] == pattern]
    mine = mine[mine["stage"] == (mine["stage"].max() if stage is None else stage)]
    mine = mine[mine["members"] == (mine["members"].max() if members is None else members)]
    return mine.sort_values(["frame", "seed"], ignore_index=True)


def paired(over: pd.DataFrame, under: pd.DataFrame, score: str = "mse_member", below: str = "") -> scoring.Ratio | None:
    """`score` of one point over `below` (by default the same score) of another, on frames where no member failed.

    None where no such frame is left.
    """
    key = ["frame", "seed", "pattern"]
    both = over.merge(under, on=key, suffixes=("", "_under"))
    both = both[(both["failed_members"] == 0) & (both["failed_members_under"] == 0)].sort_values(["frame", "seed"])
    top, base = both[score], both[f"{below or score}_under"]
    both = both[np.isfinite(top) & np.isfinite(base)]
    if both.empty:
        return None
    block = int(both["block"].max()) * both["seed"].nunique()
    return scoring.ratio_of_means(top[both.index], base[both.index], block, 0)


def check(
    name: str, over: pd.DataFrame, under: pd.DataFrame, expected: tuple[float, float], role: str = "claim",
    score: str = "mse_member",
) -> Check:  # fmt: skip
    """The ratio of two points as a Check."""
    return of_ratio(name, paired(over, under, score), expected, role)


def of_ratio(name: str, found: scoring.Ratio | None, expected: tuple[float, float], role: str = "claim") -> Check:
    """A ratio as a Check; without an interval where it is over too few frames."""
    if found is None:
        return Check(name, math.nan, math.nan, math.nan, expected, role)
    ends = (found.lo, found.hi) if found.frames >= FEWEST else (math.nan, math.nan)
    return Check(name, found.ratio, *ends, expected, role)


def against(rows: pd.DataFrame, baseline: str = "seed_gp", score: str = "mse_member") -> scoring.Ratio | None:
    """One point against a baseline on the same frames."""
    return paired(rows, rows, score, f"mse_{baseline}")


def of_frames(name: str, count: int, frames: int, expected: tuple[float, float], role: str = "claim") -> Check:
    """A share of frames with its Wilson interval, as if they were independent; without where they are too few."""
    if not frames:
        return Check(name, math.nan, math.nan, math.nan, expected, role)
    if frames < FEWEST:
        return Check(name, count / frames, math.nan, math.nan, expected, role)
    found = stats.binomtest(count, frames).proportion_ci(0.95, method="wilson")
    return Check(name, count / frames, float(found.low), float(found.high), expected, role)


def apart(name: str, over: scoring.Ratio, under: scoring.Ratio, expected: tuple[float, float]) -> Check:
    """The ratio of two ratios on different frames; its interval has the ends of theirs, and is too wide."""
    if min(over.frames, under.frames) < FEWEST:
        return Check(name, over.ratio / under.ratio, math.nan, math.nan, expected)
    return Check(name, over.ratio / under.ratio, over.lo / under.hi, over.hi / under.lo, expected)


# --- Markdown -------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], words: bool = False) -> str:
    """A table; all columns but the first are aligned to the right, unless they hold words."""
    rule = ["---", *("---" if words else "--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rule, *lines))


def number(value: float, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else scoring.DASH


def interval(value: float, lo: float, hi: float, form: str = ".3f") -> str:
    """A number with its interval in brackets."""
    ends = f" [{lo:{form}}, {hi:{form}}]" if math.isfinite(lo) and math.isfinite(hi) else ""
    return number(value, form) + ends


def _shown(check: Check) -> list[str]:
    low, high = check.expected
    range_ = RANGES.get(check.expected, f"{low:g} to {high:g}")
    role = "" if check.role == "claim" else f"{check.role}: "
    judged = "" if check.role == "beside" else check.verdict
    return [role + check.name, "" if check.role == "beside" else range_, interval(check.value, check.lo, check.hi),
            judged]  # fmt: skip


VERSUS_GP = ("", "notes, average", "average", "median", "ratio of means [95 %]", "wins [95 %]", "failed")


def versus_gp(points: Mapping[str, pd.DataFrame], notes: Mapping[str, str]) -> str:
    """One member of each point against the notes' GP, beside the notes' number of the same name."""
    lines = []
    for name, rows in points.items():
        found = against(rows)
        failed = f"{int((rows['failed_members'] > 0).sum())}/{len(rows)}"
        cells = [scoring.DASH] * 4
        if found:
            whole = rows[rows["failed_members"] == 0]
            cells = [
                number(float((whole["mse_member"] / whole["mse_seed_gp"]).mean())), number(found.median),
                interval(found.ratio, found.lo, found.hi), interval(found.wins, found.wins_lo, found.wins_hi, ".0%"),
            ]  # fmt: skip
        lines.append([name, notes.get(name, scoring.DASH), *cells, failed])
    return markdown(VERSUS_GP, lines)


# --- the findings ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything that the findings are judged by.

    Attributes:
      sweeps: rows (results.SCHEMA) by name of the sweep.
      threshold: first stage whose decayed prior variance is flat under the min-max normalisation.
      weight: mean noise weight of `adaptive` over the missing cells.
      levels: denoising errors by noise level (levels.table), by name of the model.
      visible: sigma of the last step, EOFs that stand above it, their share of the variance, EOFs in all.
      losses: held-out loss of each model and of the exact Gaussian denoiser, by name of the model.
      resumption: of the continued runs; None if they were not run.
    """

    sweeps: Mapping[str, pd.DataFrame]
    threshold: int
    weight: float
    levels: Mapping[str, pd.DataFrame]
    visible: tuple[float, int, float, int]
    losses: Mapping[str, tuple[float, float]]
    resumption: Resumption | None


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a finding comes to: its checks, our table as Markdown, and sentences."""

    checks: Sequence[Check]
    table: str
    remark: str = ""
    pictures: Mapping[str, Callable[[Path], None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding of the notes.

    Attributes:
      title: of its section.
      claim: what the notes say.
      sweep: whose rows it needs; "" for the continued runs.
      judge: what they say.
    """

    title: str
    claim: str
    sweep: str
    judge: Callable[[Evidence], Judged]


def plain_against_gp(evidence: Evidence) -> Judged:
    """One sample of plain RePaint against the GP."""
    rows = chosen(evidence.sweeps["ddpm_vs_gp"], "plain")
    checks = [of_ratio("plain over the GP", against(rows), ABOVE)]
    table = versus_gp({"plain": rows}, {"plain": "1.29 (ratio of means), 3 of 10 wins"})
    return Judged(checks, table, "On its eight other frames the notes had 0.928 for the same method.")


NOTES_HEAD = {"plain": "0.928", "gp_init": "0.909", "guided": "0.911", "adaptive": "0.878"}


def _head(evidence: Evidence, *methods: str) -> tuple[dict[str, pd.DataFrame], str]:
    """Rows and table of some methods of the head-to-head; labels may say more than the method."""
    rows = evidence.sweeps["head_to_head"]
    labels = [next(label for label in rows["label"].unique() if label.split()[0] == method) for method in methods]
    points = {label: chosen(rows, label) for label in labels}
    return dict(zip(methods, points.values(), strict=True)), versus_gp(points, NOTES_HEAD)


def gp_start(evidence: Evidence) -> Judged:
    """The start from the GP against the start from noise."""
    rows, table = _head(evidence, "plain", "gp_init")
    sigma, count, share, _ = evidence.visible
    checks = [check("gp_init over plain", rows["gp_init"], rows["plain"], BELOW)]
    remark = (
        f"At the last step, sigma {sigma:.2g}, {count} EOFs with {share:.0%} of the variance still stand above the "
        "noise. A start from N(0, 1) has none of them, and the steps that are left have to make them up; the start "
        "from the GP has what the observations say of them. The notes' two averages are 2 % apart; their 7 % stands in "
        "a list of gains."
    )
    return Judged(checks, table, remark)


def adaptive_noise(evidence: Evidence) -> Judged:
    """Adaptive noise against gp_init, and against even noise of the same mean weight."""
    rows, table = _head(evidence, "gp_init", "adaptive", "uniform")
    checks = [
        check("adaptive over gp_init", rows["adaptive"], rows["gp_init"], BELOW),
        check("uniform over gp_init", rows["uniform"], rows["gp_init"], BELOW, "control"),
        check("uniform over adaptive", rows["uniform"], rows["adaptive"], NO_WORSE, "control"),
    ]
    remark = (
        "The notes' reason is that noise is held back where the GP is sure. The control has one weight everywhere, "
        f"the mean of that of adaptive, which is {evidence.weight:.3f} here. Where it does as well, less noise is the "
        "reason, and the map of the GP's variance is none; a member with less noise is nearer to the mean of all."
    )
    return Judged(checks, table, remark)


def guidance(evidence: Evidence) -> Judged:
    """Gradient guidance at the notes' scale."""
    rows, table = _head(evidence, "gp_init", "guided")
    return Judged([check("guided over gp_init", rows["guided"], rows["gp_init"], SAME)], table)


NOTES_SCALE = {1e-5: "0.895", 1e-4: "0.895", 1e-3: "0.896", 0.01: "0.917", 0.05: "0.959", 0.5: "0.992", 1.0: "0.995"}


def guidance_curve(evidence: Evidence) -> Judged:
    """The scale of the guidance, up to where members fail."""
    rows = evidence.sweeps["guidance_scale"]
    scales = {
        json.loads(text)["guidance_scale"]: label for label, text in zip(rows["label"], rows["settings"], strict=True)
    }
    points = {scale: chosen(rows, scales[scale]) for scale in sorted(scales)}
    checks = [
        check(f"scale {scale:g} over {low:g}", points[scale], points[low], SAME if scale <= 1e-4 else ABOVE)
        for low, scale in itertools.pairwise(points)
        if scale <= 1
    ]
    for scale, mine in points.items():
        if scale >= 5:
            failed = int((mine["failed_members"] > 0).sum())
            checks.append(of_frames(f"share of frames where a member fails, scale {scale:g}", failed, len(mine), MOST))
    table = versus_gp(
        {f"{scale:g}": mine for scale, mine in points.items()},
        {f"{scale:g}": NOTES_SCALE.get(scale, "NaN") for scale in points},
    )
    remark = (
        "The step lacks the factor sigma^2 of its source, so what a scale does depends on units, on the network and on "
        "its gradient; only the shape of the curve can be compared."
    )
    return Judged(
        checks, table, remark, {"guidance_scale.png": _curves(rows, "guidance_scale", "scale of the guidance")}
    )


def x0_blend(evidence: Evidence) -> Judged:
    """Blending the estimate of x0 with the GP."""
    rows = evidence.sweeps["x0_blend"]
    checks = [
        check("x0_blend over gp_init", chosen(rows, "x0_blend"), chosen(rows, "gp_init"), SAME),
        check(
            "blend_adaptive over adaptive", chosen(rows, "blend_adaptive"), chosen(rows, "adaptive"), BELOW, "beside"
        ),
    ]
    table = versus_gp({label: chosen(rows, label) for label in rows["label"].unique()}, {})
    return Judged(
        checks, table, "Blending together with adaptive noise was an idea of the notes that nobody had tried."
    )


NOTES_TWO = {10: "0.883", 20: "0.875", 30: "0.869", 40: "0.864", 50: "0.860"}


def two_stage(evidence: Evidence) -> Judged:
    """A second pass from t 10 to 50."""
    rows = evidence.sweeps["two_stage"]
    one = chosen(rows, next(label for label in rows["label"].unique() if label.startswith("adaptive")))
    passes = {
        t: chosen(rows, label) for t in NOTES_TWO for label in rows["label"].unique() if label.endswith(f"t_refine={t}")
    }
    checks = [check(f"second pass from t {min(passes)} over one pass", passes[min(passes)], one, BELOW)]
    checks += [check(f"from t {high} over t {low}", passes[high], passes[low], BELOW)
               for low, high in itertools.pairwise(passes)]  # fmt: skip
    checks.append(check(f"from t {max(passes)} over one pass", passes[max(passes)], one, BELOW))
    table = versus_gp(
        {"one pass": one} | {f"t {t}": mine for t, mine in passes.items()},
        {"one pass": "0.894"} | {f"t {t}": text for t, text in NOTES_TWO.items()},
    )
    return Judged(checks, table)


NOTES_STAGES = ["0.894", "0.849", "0.827", "0.801", "0.774", "0.759", "0.738", "0.744", "0.742", "0.725"]
NOTES_RANDOM = ["0.808", "0.772", "0.745", "0.739", "0.734", "0.730", "0.737", "0.774", "0.808", "0.854"]
SCALED = "gamma 3, scaled by the prior"


def _stages(evidence: Evidence) -> tuple[pd.DataFrame, str, dict[str, Callable[[Path], None]]]:
    rows = evidence.sweeps["stages"]
    labels = list(rows["label"].unique())
    lines = []
    for stage in sorted(rows["stage"].unique()):
        found = [against(chosen(rows, label, stage)) for label in labels]
        ours = [interval(one.ratio, one.lo, one.hi) if one else scoring.DASH for one in found]
        lines.append([f"S{stage}", NOTES_STAGES[stage - 1], NOTES_RANDOM[stage - 1], *ours])
    head = ("stage", "notes, gamma 1, frames in a row", "notes, gamma 3, random frames", *labels)
    return rows, markdown(head, lines), {"stages.png": _curves(rows, "stage", "", "label")}


def ten_stages(evidence: Evidence) -> Judged:
    """Stages after the first."""
    rows, table, pictures = _stages(evidence)
    first = chosen(rows, "gamma 1", 1)
    checks = [check(f"S{s} over S1, gamma 1", chosen(rows, "gamma 1", s), first, BELOW) for s in (2, 6, 10)]
    best = against(chosen(rows, "gamma 1", 6), "linear")
    remark = ""
    if best:
        remark = (
            f"The best linear estimate is another matter: six stages have {interval(best.ratio, best.lo, best.hi)} "
            "times its error."
        )
    return Judged(checks, table, remark, pictures)


def turn(evidence: Evidence) -> Judged:
    """The rise after stage 7, and whether var_decay is its reason."""
    rows, _, _ = _stages(evidence)
    last = int(rows["stage"].max())
    reached = 2 <= evidence.threshold <= last
    at = evidence.threshold if reached else min(8, last)

    def step(label: str, stage: int, expected: tuple[float, float], role: str) -> Check:
        name = f"S{stage} over S{stage - 1}, {label}"
        return check(name, chosen(rows, label, stage), chosen(rows, label, stage - 1), expected, role)

    checks = [step("gamma 1", at, ABOVE, "claim"), step("gamma 3", at, ABOVE, "claim"),
              step(SCALED, at, NO_WORSE, "control")]  # fmt: skip
    checks += [step("gamma 3", stage, NO_WORSE, "beside") for stage in range(at - 2, min(at + 2, last + 1))
               if stage != at and stage >= 2]  # fmt: skip
    if not reached:
        checks.insert(0, Check(f"stage {evidence.threshold} is among those run", *3 * [math.nan], ABOVE, "condition"))
    there = "which is where the turn is looked for" if reached else f"which is none of 2 to {last} that are run here"
    remark = (
        "The notes suspect that a variance decayed to nearly nothing misleads the network. But their normalisation "
        "of each map to 0..1 cancels every factor, so that all stages have the same map, until its range falls "
        f"below 1e-12 and the noise weight is 1 everywhere. In the units here that is at stage {evidence.threshold} "
        f"(at 8 in theirs), {there}. Scaled by the prior instead, the variance does decay, and there is no threshold."
    )
    return Judged(checks, _lines_of(rows, at), remark)


def _lines_of(rows: pd.DataFrame, at: int) -> str:
    lines = []
    for label in rows["label"].unique():
        around = range(max(at - 2, 1), min(at + 2, int(rows["stage"].max())) + 1)
        found = [(stage, against(chosen(rows, label, stage))) for stage in around]
        lines.append([label, *(f"S{s}: {number(one.ratio) if one else scoring.DASH}" for s, one in found)])
    return markdown(["", *("" for _ in lines[0][1:])], lines)


def annealed_floor(evidence: Evidence) -> Judged:
    """A noise floor that rises to 1."""
    rows = evidence.sweeps["anneal_floor"]
    last = int(rows["stage"].max())
    checks, points = [], {}
    for stage in (1, last):
        constant, annealed = (chosen(rows, label, stage) for label in ("constant", "annealed"))
        checks.append(check(f"annealed over constant, S{stage}", annealed, constant, ABOVE))
        points |= {f"constant, S{stage}": constant, f"annealed, S{stage}": annealed}
    notes = {"constant, S1": "0.894", "annealed, S1": "0.906", "constant, S6": "0.759", "annealed, S6": "0.789"}
    return Judged(checks, versus_gp(points, notes))


NOTES_GAMMA = {0.3: "0.782, 0.821", 0.5: "0.772, 0.800", 1.0: "0.759, 0.767", 2.0: "0.752, 0.741", 3.0: "0.750, 0.730",
               5.0: "0.750"}  # fmt: skip


def gamma(evidence: Evidence) -> Judged:
    """The exponent of the noise weight."""
    rows = evidence.sweeps["gamma"]
    points = {g: chosen(rows, f"multistage gamma={g:g}") for g in NOTES_GAMMA}
    checks = [
        check(f"gamma {high:g} over {low:g}", points[high], points[low], BELOW if high <= 3 else SAME)
        for low, high in itertools.pairwise(points)
    ]
    table = versus_gp(
        {f"{g:g}": mine for g, mine in points.items()}, {f"{g:g}": text for g, text in NOTES_GAMMA.items()}
    )
    remark = (
        "The variance that gamma is the power of is scaled to 0..1, so that a larger gamma holds back more noise, most "
        "of it in cells of middling doubt; the notes read it as the opposite. What less noise in all brings, adaptive "
        "noise brings too (see there)."
    )
    return Judged(checks, table, remark, {"gamma.png": _curves(rows, "gamma", "gamma")})


def averaging(evidence: Evidence) -> Judged:
    """Means of several members."""
    rows = evidence.sweeps["ensemble_size"]
    sizes = sorted(rows["members"].unique())
    labels = list(rows["label"].unique())
    lines = []
    for label in labels:
        own = sorted(rows[rows["label"] == label]["members"].unique())
        found = {n: against(chosen(rows, label, members=n), "linear", "mse_mean") for n in own}
        lines.append([label, *(number(found[n].ratio) if found.get(n) else scoring.DASH for n in sizes)])

    def gained(label: str, n: int, role: str = "claim") -> Check:
        # Over the average member: over one of them alone, chance in that one would blur what averaging does.
        mine = chosen(rows, label, members=n)
        found = paired(mine, mine, "mse_mean", "mse_member")
        return of_ratio(f"mean of {n} over a member, {label}", found, BELOW, role)

    checks = [gained("adaptive", n) for n in (4, max(sizes))] + [gained("gp_init", max(sizes), "beside")]
    table = markdown(("MSE of the mean over the best linear estimate's, members:", *sizes), lines)
    remark = (
        "The mean of M members has the error of the mean of all plus 1/M of the variance among them. Methods that hold "
        "noise back have little of it left to average away."
    )
    return Judged(checks, table, remark, {"ensemble_size.png": _curves(rows, "members", "members", "method", "mean")})


def bulk(evidence: Evidence) -> Judged:
    """The notes' best configuration on many frames."""
    rows = evidence.sweeps["bulk"]
    random, row = (chosen(rows, label) for label in ("random", "consecutive"))
    checks = []
    for name, mine in (("random", random), ("consecutive", row)):
        found = against(mine)
        checks.append(of_ratio(f"six stages over the GP, {name}", found, BELOW))
        if name == "random":
            wins = round(found.wins * found.frames) if found else 0
            checks.append(of_frames(f"share of frames better than the GP, {name}", wins, len(mine), MOST))
        else:
            # Frames of one row are about one frame, which a Wilson interval of all would count many times.
            single = ratios_of_rows(mine)
            wins = sum(ratio < 1 for ratio in single)
            checks.append(of_frames("share of rows better than the GP", wins, len(single), MOST))
    linear = "six stages over the best linear estimate, random"
    checks.append(of_ratio(linear, against(random, "linear"), BELOW, "beside"))
    notes = {"random": "1.001, median 0.825, 80 % wins", "consecutive": "0.802, median 0.809, 94 % wins"}
    return Judged(checks, versus_gp({"random": random, "consecutive": row}, notes))


def row_of_frames(evidence: Evidence) -> Judged:
    """Frames in a row against random ones: rows all over the season, and how far one of them is from the others."""
    rows = evidence.sweeps["consecutive"]
    points = {label: chosen(rows, label) for label in rows["label"].unique()}
    checks = []
    for method in ("adaptive", "multistage"):
        over, under = (against(points[f"{method}, {kind}"]) for kind in ("row", "random"))
        name = f"{method}: ratio in rows over ratio at random"
        found = apart(name, over, under, HALF_OF_NOTES) if over and under else of_ratio(name, None, HALF_OF_NOTES)
        checks.append(found)
    for method in ("adaptive", "multistage"):
        single = ratios_of_rows(points[f"{method}, row"])
        for which, value in (("lowest", min(single)), ("highest", max(single))) if len(single) > 1 else ():
            name = f"{method}: {which} ratio of one row among {len(single)}"
            checks.append(Check(name, value, math.nan, math.nan, BELOW, "beside"))
    remark = (
        "A row of a dozen frames is far shorter than one decorrelation time: it is about one frame. Rows all over the "
        "season are as hard as random frames, unless each flatters; the claim is of half the notes' difference, not "
        "of any, which so few rows could not tell. What "
        "one row may show by chance is the range from the lowest to the highest."
    )
    notes = {"multistage, row": "0.802", "multistage, random": "1.001"}
    return Judged(checks, versus_gp(points, notes), remark)


def ratios_of_rows(rows: pd.DataFrame) -> list[float]:
    """One member's error over that of the notes' GP, of each stretch of frames that follow each other."""
    whole = rows[rows["failed_members"] == 0]
    stretch = (rows["frame"].diff() > 1).cumsum()[whole.index]
    errors = whole.groupby(stretch)[["mse_member", "mse_seed_gp"]].mean()
    return (errors["mse_member"] / errors["mse_seed_gp"]).tolist()


def attention(evidence: Evidence) -> Judged:
    """The network with attention against the plain one."""
    rows = evidence.sweeps["attention"]
    points = {label: chosen(rows, label) for label in rows["label"].unique()}
    checks = [
        check(f"attention over plain network, {label.split(', ')[1]}{pair and f', seed{pair}'}", mine,
              points[label.replace("attention", "standard")], BELOW)
        for method in ("adaptive", "plain")
        for label, mine in points.items()
        if label.startswith("attention") and label.endswith(method)
        for pair in [label.split(",")[0].removeprefix("attention")]
    ]  # fmt: skip
    losses = ", ".join(
        f"{name} {number(loss, '.3g')} (exact Gaussian denoiser {number(linear, '.3g')})"
        for name, (loss, linear) in evidence.losses.items()
    )
    remark = (
        f"Held-out losses: {losses}. The two networks differ in residual paths as well as in attention, as the "
        "notes' do, so that this is the effect of both. "
        "[results_training.md](results_training.md#recipes-form-and-architecture) takes the two apart: of "
        "networks of 0.6 million parameters the residual paths alone do nearly all of it."
    )
    return Judged(checks, versus_gp(points, {}), remark)


def _losses(found: Resumption, over: str, under: str, expected: tuple[float, float], role: str = "claim") -> Check:
    both = found.losses[[over, under]].dropna()
    # A branch that diverged has no loss to compare.
    whole = len(both) == len(found.losses)
    ratio = scoring.ratio_of_means(both[over], both[under], found.block, 0) if whole else None
    return of_ratio(f"{over} over {under}", ratio, expected, role)


def resume_damage(evidence: Evidence) -> Judged:
    """The regression of the notes' third run, on purpose."""
    found = evidence.resumption
    checks = [
        _losses(found, "loaded", "before", ABOVE),
        _losses(found, "loaded", "continued", ABOVE),
        _losses(found, resumption.AVERAGED, "before", ABOVE, "beside"),
        _losses(found, "mirrored", "continued", ABOVE, "beside"),
        _losses(found, "weights", "continued", NO_WORSE, "beside"),
    ]
    before = found.losses["before"].mean()
    row = found.losses[resumption.FIRST].mean() / before
    branches = found.curves[found.curves["branch"] != "before"].groupby("branch")
    highest = branches["loss"].max() / before
    first, last = (getattr(branches["averaged_loss"], end)() / before for end in ("first", "last"))
    table = markdown(
        ("branch", "held-out loss at its end", "over `before`", "at its worst epoch", "averaged weights, first epoch",
         "last epoch"),
        [
            [name, f"{loss:.4g}", number(loss / before),
             *(number(values.get(name, math.nan)) for values in (highest, first, last))]
            for name, loss in found.losses.mean(skipna=False).items()
        ],
    )  # fmt: skip
    mirrored = found.curves[found.curves["branch"] == "mirrored"].sort_values("epoch")["loss"] / before
    jump, end = mirrored.head(resumption.MIRRORED).max(), found.losses["mirrored"].mean(skipna=False) / before
    jumps = jump > end > 1
    rises = last["mirrored"] > max(first["mirrored"], 1)
    halves = ": of the two curves here one jumps and comes down, the other rises" if jumps and rises else ""
    remark = (
        "AdamW takes the same step from the same moments and moves each weight by another 1e-4 of the rate of "
        "itself; a cosine that is fast-forwarded has a rate a little below the constant one. What else changed in "
        "the notes' third run is that two epochs were mirrored and that the test loss was taken over all frames "
        f"instead of the first 320: the same weights have {row:.2f} times their loss on the first frames in a "
        f"row. Mirrored epochs take the loss to {number(jump, '.2f')} times what it was, those without that "
        f"follow them to {number(end, '.2f')}. The average of that branch's weights, which "
        f"the notes' third run kept too, goes from {number(first['mirrored'])} times that loss after the first epoch "
        f"to {number(last['mirrored'])} after the last. The notes' loss jumped after the mirrored epochs and then "
        f"rose, for 46 epochs{halves}.\n\n"
        "`train` does not continue such a run in any case. It says: "
        f'"{found.refusal or "nothing"}"'
    )
    return Judged(checks, table, remark, {"resume.png": _loss_curves(found)})


def plateau(evidence: Evidence) -> Judged:
    """The plateau under a constant rate."""
    found = evidence.resumption
    checks = [
        _losses(found, "continued", "before", SAME, "condition"),
        _losses(found, "weights", "continued", BELOW),
        _losses(found, "decayed", "continued", BELOW, "control"),
        _losses(found, "decayed", "weights", NO_WORSE, "control"),
    ]
    curve = found.curves[found.curves["branch"].isin(["before", "continued"])]
    lines = [[int(row["epoch"]), f"{row['loss']:.4g}"] for _, row in curve.iloc[:: max(len(curve) // 7, 1)].iterrows()]
    remark = (
        "The notes say that the moments of Adam could not leave a basin, and that a warm-up and a cosine from "
        "scratch would. The control keeps the moments and lets the rate fall: where that is enough, the plateau was "
        "the noise of a constant rate. Where the loss still falls at a constant rate, there is no plateau yet to "
        "say anything of.\n\n" + _length(found)
    )
    return Judged(checks, markdown(("epoch at a constant rate", "held-out loss"), lines), remark)


def _length(found: Resumption) -> str:
    length = found.length
    return (
        f"One network from one seed: {length.before} epochs of {length.epoch} steps at a constant rate, then "
        f"{length.after} of each branch; loss on {len(found.losses)} frames of the validation part."
    )


FINDINGS = (
    Finding(
        "Training reaches a plateau that Adam cannot leave",
        "Test loss .0093 at epoch 57 and .0095 at 86, at a constant rate of 3e-4: a plateau of the optimiser, to be "
        "left by a warm-up with a cosine.",
        "", plateau,
    ),
    Finding(
        "Loading Adam's state into AdamW damages the network",
        "Resumed at epoch 125 with AdamW, its state loaded and the cosine fast-forwarded: test loss .010, then .0136 "
        "rising to .0142. Take the weights only, or start anew.",
        "", resume_damage,
    ),
    Finding(
        "Plain RePaint is worse than the GP",
        "Ratio of mean errors 1.29, 3 wins in 10, one sample a frame.",
        "ddpm_vs_gp", plain_against_gp,
    ),
    Finding(
        "Starting from the GP is the big win",
        "GP-init improves on plain RePaint by 7 % (.909 against .928 of the GP's error, 8 frames).",
        "head_to_head", gp_start,
    ),
    Finding(
        "Adaptive noise improves on GP-init",
        "By 3 % (.878 against .909), on 8 of 8 frames, because it keeps what the GP is sure of.",
        "head_to_head", adaptive_noise,
    ),
    Finding(
        "Gradient guidance changes nothing",
        "Indistinguishable from GP-init at scale .001 (.911 against .909).",
        "head_to_head", guidance,
    ),
    Finding(
        "More guidance is worse, up to NaN",
        "No effect up to .0001, worse with every larger scale, NaN from 5.",
        "guidance_scale", guidance_curve,
    ),
    Finding(
        "Blending x0 changes nothing",
        "The noise washes it out: .998 of GP-init.",
        "x0_blend", x0_blend,
    ),
    Finding(
        "A second pass improves, the more the higher it starts",
        ".894 in one pass, .883 to .860 with a second one from t 10 to 50, 10 of 10 wins each.",
        "two_stage", two_stage,
    ),
    Finding(
        "Ten stages improve on one",
        "From .894 to .725 of the GP's error, 17 points off one stage.",
        "stages", ten_stages,
    ),
    Finding(
        "The turn at stage 8",
        "Stage 8 is worse than 7; perhaps the decay of the variance is too fast and misleads the network.",
        "stages", turn,
    ),
    Finding(
        "An annealed floor is worse",
        "By 1.2 % after one stage and 3 % after six.",
        "anneal_floor", annealed_floor,
    ),
    Finding(
        "A larger gamma is better, up to 3",
        "Monotone from .3 to 3, the same at 5; six stages, frames in a row and random ones.",
        "gamma", gamma,
    ),
    Finding(
        "Averaging members reduces the error",
        "An idea: the variance goes down by 1/N, even 3 to 5 members could help.",
        "ensemble_size", averaging,
    ),
    Finding(
        "The best configuration beats the GP on a hundred frames",
        "Six stages, gamma 3: .802 and 94 wins of 100 in a row; later, on random frames, 1.001 and 80.",
        "bulk", bulk,
    ),
    Finding(
        "Frames in a row flatter the method",
        "All tuning was on frames that follow each other; on random ones the average went from .802 to 1.001.",
        "consecutive", row_of_frames,
    ),
    Finding(
        "Attention helps inpainting",
        "Left open: losses alike, \"modest benefit\", no comparison on the same frames.",
        "attention", attention,
    ),
)  # fmt: skip


# --- pictures -------------------------------------------------------------------------------------------------


def _curves(rows: pd.DataFrame, x: str, setting: str, curve: str = "", kind: str = "member") -> Callable[[Path], None]:
    score = {"member": "MSE of a member over that of seed_gp", "mean": "MSE of the mean over the best baseline's"}[kind]
    against_ = {"member": "member_over_seed_gp", "mean": "mean_over_best"}[kind]

    def draw(path: Path) -> None:
        lines = comparison.curves(comparison.compare(rows), x, curve, against_)
        if x == "stage":
            plots.stages(path, lines, score, reference=("baseline", 1.0))
        else:
            plots.sweep(path, lines, setting, score, reference=("baseline", 1.0))

    return draw


def _loss_curves(found: Resumption) -> Callable[[Path], None]:
    def draw(path: Path) -> None:
        lines = [
            plots.Curve(str(name), mine["epoch"].to_numpy(float), mine["loss"].to_numpy(float))
            for name, mine in found.curves.groupby("branch", sort=False)
        ]
        plots.sweep(path, lines, "epoch", "held-out loss")

    return draw


# --- what the notes could not ask -----------------------------------------------------------------------------


def by_level(evidence: Evidence) -> Judged:
    """Errors of the networks by noise level beside the exact Gaussian denoiser's."""
    gaussian = pd.concat([t.set_index("sigma")["gaussian"] for t in evidence.levels.values()])
    gaussian = gaussian[~gaussian.index.duplicated()].sort_index()
    lines, checks = [], []
    tables = {name: table.set_index("sigma") for name, table in evidence.levels.items()}
    for level, error in gaussian.items():
        found = [table.loc[level] if level in table.index else None for table in tables.values()]
        shown = [scoring.DASH if one is None else interval(one["ratio"], one["lo"], one["hi"]) for one in found]
        lines.append([f"{level:.3g}", f"{error:.3g}", *shown])
    for name, table in tables.items():
        for level in (table.index[0], table.index[-1]):
            title = f"{name} over the Gaussian denoiser, sigma {level:.2g}"
            checks.append(Check(title, *table.loc[level, ["ratio", "lo", "hi"]], BELOW, "beside"))
    sigma, count, share, total = evidence.visible
    remark = (
        f"At sigma {sigma:.2g}, the last of the notes' steps, {count} of {total} EOFs, with {share:.0%} of the "
        "variance, still stand above the noise: a network that is trained no further is given the large scale at every "
        "level, and never learns to find it."
    )
    if "head_to_head" in evidence.sweeps:
        plain = against(chosen(evidence.sweeps["head_to_head"], "plain"), "climatology")
        if plain:
            shown = interval(plain.ratio, plain.lo, plain.hi)
            remark += f" Plain RePaint starts there from pure noise: a member has {shown} times climatology's error."

    def draw(path: Path) -> None:
        common = [level for level in gaussian.index if all(level in table.index for table in tables.values())]
        errors = {name: table.loc[common, "network"].to_numpy() for name, table in tables.items()}
        plots.denoising(path, np.array(common), errors, gaussian[common].to_numpy())

    table = markdown(("sigma", "error of the Gaussian denoiser", *tables), lines)
    return Judged(checks, table, remark, {"levels.png": draw})


def removed_variance(evidence: Evidence) -> Judged:
    """Adaptive noise against even noise of the same mean weight: members, means, spread."""
    rows = evidence.sweeps["equal_weight"]
    table = comparison.compare(rows)
    lines = [
        [line["label"], f"{line['mse_member']:.3g}", f"{line['mse_mean']:.3g}", f"{line['crps']:.3g}",
         number(line["spread_skill"], ".2f"), number(line["coverage90"], ".2f")]
        for _, line in table.iterrows()
    ]  # fmt: skip
    even = next(label for label in rows["label"].unique() if label.startswith("uniform"))
    checks = [
        check(f"adaptive over {other}, {what}", chosen(rows, "adaptive"), chosen(rows, other), SAME, "beside", score)
        for other in (even, "gp_init")
        for what, score in (("one member", "mse_member"), ("mean of the members", "mse_mean"), ("CRPS", "crps"))
    ]
    head = ("", "MSE of a member", "MSE of the mean", "CRPS", "spread/skill", "in 90 %")
    remark = (
        "If adaptive noise knew more than how much noise to leave out, it would beat even noise of the same mean "
        "weight in the mean and in CRPS by more than one per cent, not only gp_init in one member. The same mean "
        "weight is not the same spread: where the weight varies, members differ more."
    )
    return Judged(checks, markdown(head, lines), remark)


def against_linear(evidence: Evidence) -> Judged:
    """Every method of the sweeps against the best linear estimate: one member, and the mean of its ensemble."""
    lines = []
    for name in ("head_to_head", "bulk", "equal_weight", "ensemble_size", "patterns"):
        if name not in evidence.sweeps:
            continue
        rows = evidence.sweeps[name]
        for pattern, label in dict.fromkeys(zip(rows["pattern"], rows["label"], strict=True)):
            mine = chosen(rows, label, pattern=pattern)
            found = [against(mine, "linear", score) for score in ("mse_member", "mse_mean")]
            shown = [interval(one.ratio, one.lo, one.hi) if one else scoring.DASH for one in found]
            wins = number(found[1].wins, ".0%") if found[1] else scoring.DASH
            lines.append([name, pattern, label, len(mine), int(mine["members"].iloc[0]), *shown, wins])
    head = ("sweep", "pattern", "method", "frames", "members", "a member", "mean of the members", "wins of the mean")
    remark = (
        "A sample cannot be expected to beat a mean: even an exact sample of the posterior has about twice its error. "
        "The mean of the members is what compares. These sweeps start from the notes' GP; `patterns`, "
        "`ensemble_size` and `calls` start from the linear estimate."
    )
    return Judged([], markdown(head, lines), remark)


def calls_against_crps(evidence: Evidence) -> Judged:
    """CRPS of every sampler against its number of network calls."""
    rows = evidence.sweeps["calls"]
    table = comparison.compare(rows)
    table = table[table["stage"] == table.groupby("point")["stage"].transform("max")].copy()
    table["each"] = table["calls"] / table["members"]
    linear = float(table.loc[table["method"] == "linear_samples", "crps"].iloc[0])
    usual = chosen(rows, "kalman levels=16")
    lines = []
    for _, line in table.sort_values("crps").iterrows():
        found = paired(chosen(rows, line["label"]), usual, "crps")
        crps = interval(found.ratio, found.lo, found.hi) if found else scoring.DASH
        found = against(chosen(rows, line["label"]), "linear", "mse_mean")
        mean = interval(found.ratio, found.lo, found.hi) if found else scoring.DASH
        spread = number(line["spread_skill"], ".2f")
        lines.append([line["label"], f"{line['each']:.0f}", crps, mean, spread, int(line["failed"])])
    head = ("sampler", "calls a member", "CRPS over that of kalman, 16 levels", "mean over the best linear estimate",
            "spread/skill", "failed frames")  # fmt: skip

    def draw(path: Path) -> None:
        shown = ("plain", "gp_init", "adaptive", "multistage", "kalman", "paste", "mmps", "dps")
        lines = [
            plots.Curve(name, mine["each"].to_numpy(float), mine["crps"].to_numpy(float))
            for name in shown
            for mine in [table[table["method"] == name].sort_values("each")]
            if np.isfinite(mine["crps"]).any()
        ]
        plots.sweep(path, lines, "network calls a member", "CRPS (m/s)", reference=("linear samples", linear))

    remark = (
        "Linear samples are independent, the members of kalman come in pairs whose mean has next to no sampling error. "
        "Calls through which a gradient is taken count as one here and cost more. `uniform` has its default "
        "weight of 0.47 here, about twice the mean weight of `adaptive`."
    )
    return Judged([], markdown(head, lines), remark, {"calls.png": draw})


QUESTIONS = (
    ("What has a network learnt that never saw noise above sigma 3.4?", "levels", by_level),
    ("Is adaptive noise more than removed variance?", "equal_weight", removed_variance),
    ("How does each method fare against the best linear estimate?", "head_to_head", against_linear),
    ("How much does a network call bring?", "calls", calls_against_crps),
)


# --- the page -------------------------------------------------------------------------------------------------


RULE = f"""\
A claim says in which range a ratio of mean errors over the same frames lies; a finding is judged by the worst of its
claims:

- it **holds** if the whole 95 % interval of each ratio lies in its range, **does not hold** if none of one does, and is
  **not decided** otherwise;
- it **holds for another reason** if its controls hold too: they have the effect without the cause that the notes name.
  Where a control is not decided, `holds` leaves the reason open.

In the tables of checks:

- a `condition` has to hold before a claim can be judged at all; what is `beside` is shown and does not count;
- "no effect" is a ratio within one per cent of 1;
- intervals are of a paired moving-block bootstrap, in blocks of one decorrelation time (longer ones where errors are
  alike for longer), at most of a quarter of the frames; over fewer than {FEWEST} frames they decide nothing. Those of
  wins are Wilson's, as if frames were independent.

`average` is the notes' number: the average over frames of the ratio of one member's error to that of the notes'
Gaussian process. Frames on which that is nearly right rule it, so that verdicts are on ratios of means. S1 to S10 are
stages of `multistage`, t is one of the 250 steps of the notes' schedule, EOFs are the principal components of the
training frames, and `line:22` is a transect along row 22; docs/samplers.md and docs/reading_tables.md have the rest."""


def has(evidence: Evidence, needed: str) -> bool:
    """Whether there is what a finding or a question is judged by."""
    return {"": evidence.resumption is not None, "levels": bool(evidence.levels)}.get(needed, needed in evidence.sweeps)


def write(evidence: Evidence, out: Path, about: Sequence[str]) -> dict[str, str]:
    """Writes the page and, beside it, its pictures; returns the verdict on each finding that could be judged.

    Args:
      about: lines on how the page was made.
    """
    summary, sections, verdicts, missing = [], [], {}, []
    for finding in FINDINGS:
        if not has(evidence, finding.sweep):
            missing.append(finding.title)
            continue
        judged = finding.judge(evidence)
        verdicts[finding.title] = verdict(judged.checks)
        main = next(check for check in judged.checks if check.role == "claim")
        ours = f"{main.name}: {interval(main.value, main.lo, main.hi)}"
        title = f"[{finding.title}](#{_anchor(finding.title)})"
        summary.append([title, finding.claim, ours, f"**{verdicts[finding.title]}**"])
        body = [f"The notes: {finding.claim}", _size(evidence, finding.sweep)]
        sections.append(_section(finding.title, body, judged, out, f"Verdict: **{verdicts[finding.title]}**."))
    asked = []
    for title, needed, answer in QUESTIONS:
        if has(evidence, needed):
            asked.append(_section(title, [_size(evidence, needed)], answer(evidence), out))
        else:
            missing.append(title)
    parts = ["# The experiments of the notes, done again", *about, "## Verdicts", RULE,
             markdown(("finding", "the notes", "here, first claim", "verdict"), summary, words=True)]  # fmt: skip
    parts += ["## Findings", *sections] + (["## What the notes could not ask", *asked] if asked else [])
    if missing:
        parts.append("Not run: " + "; ".join(missing) + ".")
    with whole_file(out) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return verdicts


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _size(evidence: Evidence, sweep: str) -> str:
    rows = evidence.sweeps.get(sweep)
    if rows is None:
        return ""
    members, patterns = int(rows["members"].max()), ", ".join(rows["pattern"].unique())
    frames, block = rows.groupby("label")["frame"].nunique().max(), int(rows["block"].max())
    return f"`{sweep}`: {frames} frames, {members} member{'s' * (members > 1)}, {patterns}; {block} frames in a block."


def _section(title: str, body: Sequence[str], judged: Judged, out: Path, judgement: str = "") -> str:
    parts = [f"### {title}", *body, judged.table]
    if judged.checks:
        parts.append(markdown(("", "expected", "ratio [95 %]", ""), [_shown(check) for check in judged.checks]))
    parts += [judgement, judged.remark]
    for name, draw in judged.pictures.items():
        draw(out.with_name(f"{out.stem}_{name}"))
        parts.append(f"![{title}]({out.stem}_{name})")
    return "\n\n".join(part for part in parts if part)
