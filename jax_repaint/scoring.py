"""Scores of many frames as tables: one frame as plain numbers, a method against a baseline, rows and their text.

`score` turns one frame into numbers, `summary` the numbers of many frames into one row of a table. Averages over frames
are taken before any root or quotient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from jax_repaint import metrics, structures
from jax_repaint.checks import whole_number
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file

DASH = "–"
TIE = 1e-5  # share of an error by which single precision can differ
IN_TAIL = 20  # resamples beyond an end of an interval: the ends are then good to a few percent of its width
FEWEST = 4  # frames, below which a bootstrap has too few to draw
LEAST_RESAMPLES, MOST_RESAMPLES = 2000, 200_000


@dataclass(frozen=True)
class Ratio:
    """A method against a baseline on the same frames; below 1 the method is better.

    Attributes:
      ratio: mean MSE of the method over mean MSE of the baseline.
      lo, hi: its interval; NaN where fewer than two blocks fit, or of fewer than four frames.
      wins: fraction of frames where the method's MSE is smaller, by more than TIE of the baseline's.
      wins_lo, wins_hi: Wilson interval of that fraction.
      worst, median: largest and median ratio of a single frame.
      frames: number of frames.
    """

    ratio: float
    lo: float
    hi: float
    wins: float
    wins_lo: float
    wins_hi: float
    worst: float
    median: float
    frames: int


def ratio_of_means(
    method_mse: np.ndarray,
    baseline_mse: np.ndarray,
    block: int,
    seed: int,
    level: float = 0.95,
    resamples: int = LEAST_RESAMPLES,
) -> Ratio:
    """Ratio of mean errors on the same frames, with a paired moving-block bootstrap interval.

    Neighbouring frames are alike, so blocks of them are drawn, and both methods always on the same blocks. A
    mean of per-frame ratios would be ruled by frames on which the baseline happens to be nearly perfect. Where
    the difference m - ratio b, which the interval is of, has a memory tau = 1 + 2 sum r_l (up to the first
    r_l < 2 / sqrt(n)), a block is 2 tau long, if that is more than `block`, and at most a quarter of the frames.
    Percentiles of the B = n / block blocks are taken further out, at Phi(sqrt(B / (B - 1)) t_{B - 1}),
    because plain ones are too narrow for few blocks.

    Args:
      method_mse, baseline_mse: (n,) one number a frame, in the order of time.
      block: frames in a block, at least.
      seed: of the resampling.
      resamples: at least; of few blocks, whose percentiles lie far out, more are made.
      level: of both intervals. The Wilson interval takes frames as independent.

    Raises:
      InputError: lengths differ, an error is negative or not finite, the baseline has none on a frame,
        block < 1.

    Sources: Kunsch, "The jackknife and the bootstrap for general stationary observations" (1989); Hesterberg,
    "What teachers should know about the bootstrap" (2015), expanded percentiles; Wilson, "Probable inference,
    the law of succession, and statistical inference" (1927).
    """
    method, baseline = np.asarray(method_mse, np.float64), np.asarray(baseline_mse, np.float64)
    if method.ndim != 1 or method.shape != baseline.shape or not method.size:
        raise InputError(f"paired errors need one number a frame for both, got {method.shape} and {baseline.shape}")
    bad = ~(np.isfinite(method) & np.isfinite(baseline) & (method >= 0) & (baseline > 0))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise InputError(f"frame {i} cannot be compared: MSE {method[i]} against {baseline[i]}")
    block = whole_number("block", block, 1)
    n = method.size
    block = max(block, min(_block(method - method.mean() / baseline.mean() * baseline), n // 4))
    lo = hi = math.nan
    if n >= max(2 * block, FEWEST):
        rng = np.random.default_rng(seed)
        blocks = n / block
        tail = stats.norm.cdf(math.sqrt(blocks / (blocks - 1)) * stats.t.ppf((1 - level) / 2, blocks - 1))
        if tail * resamples < IN_TAIL:
            resamples = MOST_RESAMPLES if tail * MOST_RESAMPLES < IN_TAIL else math.ceil(IN_TAIL / tail)
        start = rng.integers(0, n - block + 1, (resamples, -(-n // block)))
        # The last block is cut where all frames are drawn.
        end = start + np.minimum(block, n - block * np.arange(start.shape[1]))
        sums = [np.concatenate([[0.0], np.cumsum(errors)]) for errors in (method, baseline)]
        ours, theirs = ((total[end] - total[start]).sum(1) for total in sums)
        ratios = ours / theirs
        lo, hi = np.quantile(ratios, (tail, 1 - tail)).tolist()
    wins = int((method < baseline * (1 - TIE)).sum())
    wilson = stats.binomtest(wins, n).proportion_ci(level, method="wilson")
    single = method / baseline
    return Ratio(
        ratio=float(method.mean() / baseline.mean()),
        lo=lo,
        hi=hi,
        wins=wins / n,
        wins_lo=float(wilson.low),
        wins_hi=float(wilson.high),
        worst=float(single.max()),
        median=float(np.median(single)),
        frames=n,
    )


def _block(x: np.ndarray) -> int:
    """2 tau of a series of mean zero, tau = 1 + 2 sum_l r_l over lags before its autocorrelation is gone; 1 if none."""
    square, found = float(x @ x), 0.0
    for lag in range(1, x.size // 4):
        r = float(x[lag:] @ x[:-lag]) / square if square > 0 else 0.0
        if r < 2 / math.sqrt(x.size):
            break
        found += r
    return math.ceil(2 * (1 + 2 * found)) if found else 1


# --- tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameScores:
    """The scores of one method on one frame; plain numbers, so a table of them can be stored and read back.

    Attributes:
      members: M; 1 for a deterministic estimate.
      antithetic: True if members 2j and 2j + 1 are partners.
      cells: number of scored cells.
      mse_member: mean over members of each one's MSE, (m/s)^2.
      mse_mean: MSE of the mean of the members.
      variance: mean ensemble variance; 0 for one member, NaN for a single antithetic pair.
      crps: fair CRPS in m/s; mean absolute error for one member, NaN for a single antithetic pair.
      coverage90: share of values inside the central 90 % interval; NaN where there is no spread.
      energy_member, energy_truth: small-scale energy, (m/s)^2.
    """

    members: int
    antithetic: bool
    cells: int
    mse_member: float
    mse_mean: float
    variance: float
    crps: float
    coverage90: float
    energy_member: float
    energy_truth: float


def score(
    truth: np.ndarray, members: np.ndarray, scored: np.ndarray, ocean: np.ndarray, antithetic: bool = False
) -> FrameScores:
    """Scores of one method on one frame.

    Args:
      truth: (y, x, 2) m/s; NaN where unknown.
      members: (M, y, x, 2) m/s; a deterministic estimate is one member.
      scored: (y, x) bool, as `scored_cells` gives them.
      ocean: (y, x) bool.
      antithetic: True if members 2j and 2j + 1 are partners.

    Raises:
      InputError: shapes do not fit, a value is not finite, an odd number of antithetic members.
    """
    t, m = metrics.on_scored(truth, members, scored)
    count = len(m)
    metrics.require_pairs(count, antithetic)
    valid = metrics.known_cells(truth, ocean)
    if count == 1:
        variance, crps, covered = 0.0, float(np.abs(m[0] - t).mean()), math.nan
    elif antithetic and count == 2:
        variance = crps = covered = math.nan
    else:
        variance = float(metrics.ensemble_variance(m, antithetic).mean())
        crps = metrics.fair_crps(truth, members, scored, antithetic)
        covered = metrics.coverage(truth, members, scored, 0.9, antithetic=antithetic)
    return FrameScores(
        members=count,
        antithetic=antithetic,
        cells=int(np.sum(scored)),
        mse_member=float(np.mean((m - t) ** 2)),
        mse_mean=float(np.mean((m.mean(0) - t) ** 2)),
        variance=variance,
        crps=crps,
        coverage90=covered,
        energy_member=structures.small_scale_energy(members, scored, valid),
        energy_truth=structures.small_scale_energy(truth, scored, valid),
    )


def summary(
    method: str,
    frames: Sequence[FrameScores],
    calls: float,
    seconds: float,
    *,
    baseline: tuple[str, Sequence[FrameScores]] | None = None,
    block: int = 1,
    seed: int = 0,
) -> dict[str, object]:
    """One row of a table: one method over all frames.

    Args:
      method: its name.
      frames: one `FrameScores` a frame, in the order of time.
      calls: network calls a field (all its members); 0 without a network.
      seconds: wall time a field (all its members).
      baseline: name and scores, on the same frames, of what `ratio` compares with: ensemble mean against
        ensemble mean, and a deterministic estimate is its own mean.
      block, seed: of `ratio_of_means`; a block of 1 takes frames as independent.

    Returns:
      method, frames, members, mse_member, mse_mean, component_rmse and vector_rmse (of the mean), crps,
      spread_skill, coverage90, small_scale (energy of members over that of the truth), calls, seconds,
      baseline, ratio, lo, hi, wins, wins_lo, wins_hi, worst, median. NaN where a number does not exist;
      without a baseline that is None and all after it NaN.

    Raises:
      InputError: no frames, frames of ensembles of different size, a baseline on another number of frames.
    """
    kinds = {(f.members, f.antithetic) for f in frames}
    if len(kinds) != 1:
        raise InputError(f"{method}: a row needs frames of one kind of ensemble, got {sorted(kinds) or 'none'}")
    ((members, antithetic),) = kinds
    table = pd.DataFrame([vars(f) for f in frames])
    mean = table.mean(numeric_only=True)
    energy = mean["energy_truth"]
    row = {
        "method": method,
        "frames": len(frames),
        "members": members,
        "mse_member": float(mean["mse_member"]),
        "mse_mean": float(mean["mse_mean"]),
        "component_rmse": metrics.component_rmse(table["mse_mean"]),
        "vector_rmse": metrics.vector_rmse(table["mse_mean"]),
        "crps": float(mean["crps"]),
        "spread_skill": math.nan
        if members == 1
        else metrics.spread_skill(table["variance"], table["mse_mean"], members, antithetic),
        "coverage90": float(mean["coverage90"]),
        "small_scale": float(mean["energy_member"] / energy) if energy > 0 else math.nan,
        "calls": calls,
        "seconds": seconds,
        "baseline": None,
        **dict.fromkeys(("ratio", "lo", "hi", "wins", "wins_lo", "wins_hi", "worst", "median"), math.nan),
    }
    if baseline is not None:
        name, others = baseline
        result = ratio_of_means(table["mse_mean"], [f.mse_mean for f in others], block, seed)
        row |= {"baseline": name, **vars(result)}
    return row


def _fixed(rows: Sequence[Mapping[str, object]], key: str) -> list[str]:
    """A column with one number of decimals: three digits of its smallest value."""
    values = [float(row[key]) for row in rows]
    sizes = [abs(v) for v in values if math.isfinite(v) and v != 0]
    decimals = min(8, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 0
    return [f"{v:.{decimals}f}" if math.isfinite(v) else DASH for v in values]


def _plain(rows: Sequence[Mapping[str, object]], key: str, form: str) -> list[str]:
    return [f"{row[key]:{form}}" if math.isfinite(row[key]) else DASH for row in rows]


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of `summary` as aligned plain text; a dash where a number does not exist, no column of dashes.

    Raises:
      InputError: there is no row.
    """
    if not rows:
        raise InputError("a table needs at least one row")

    def interval(value: str, low: str, high: str, form: str) -> list[str]:
        cells = zip(*(_plain(rows, key, form) for key in (value, low, high)), strict=True)
        return [v if lo == DASH else f"{v} [{lo}, {hi}]" for v, lo, hi in cells]

    columns = {
        "method": [str(row["method"]) for row in rows],
        "members": _plain(rows, "members", "d"),
        "MSE member": _fixed(rows, "mse_member"),
        "MSE mean": _fixed(rows, "mse_mean"),
        "CRPS": _fixed(rows, "crps"),
        "spread/skill": _plain(rows, "spread_skill", ".2f"),
        "in 90 %": _plain(rows, "coverage90", ".3f"),
        "small scales": _plain(rows, "small_scale", ".2f"),
        "calls": _plain(rows, "calls", ".0f"),
        "seconds": _plain(rows, "seconds", ".3g"),
        "ratio [95 %]": interval("ratio", "lo", "hi", ".3f"),
        "wins [95 %]": interval("wins", "wins_lo", "wins_hi", ".0%"),
        "worst": _plain(rows, "worst", ".2f"),
        "baseline": [row["baseline"] or DASH for row in rows],
    }
    lines = [""] * (len(rows) + 1)
    for title, cells in columns.items():
        if any(cell != DASH for cell in cells):
            width = max(map(len, (title, *cells)))
            align = str.ljust if title in ("method", "baseline") else str.rjust
            lines = [
                line + "  " * bool(line) + align(cell, width) for line, cell in zip(lines, (title, *cells), strict=True)
            ]
    frames = sorted({int(row["frames"]) for row in rows})
    lines.append(
        f"{' or '.join(map(str, frames))} frame{'s' * (frames != [1])}; unobserved ocean cells; MSE in m2/s2 a "
        "component, CRPS in m/s; calls of the network and seconds a field."
    )
    return "\n".join(line.rstrip() for line in lines)


def write_csv(rows: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Rows of a table as a CSV file, written whole; numbers that do not exist are empty."""
    with whole_file(path) as temporary:
        pd.DataFrame(list(rows)).to_csv(temporary, index=False)
