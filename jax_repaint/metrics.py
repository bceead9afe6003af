"""How good an ensemble of currents is: errors, fair scores, spread.

Everything is in m/s on scored cells: ocean cells that were not observed. One frame has

    truth (y, x, 2),   members (M, y, x, 2),   scored (y, x) bool,

and component averages run over scored cells, u and v.

Antithetic ensembles hold partners at 2j and 2j + 1, drawn with opposite noise. Partners are not independent,
so pairs of partners are left out wherever two members stand for two independent draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scoringrules
from scipy import ndimage, stats

from jax_repaint.errors import InputError


def scored_cells(truth: np.ndarray, ocean: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Cells that count: ocean, not observed, with a finite truth. (y, x) bool.

    Raises:
      InputError: the grids differ, or no cell is left.
    """
    truth, ocean, observed = np.asarray(truth), np.asarray(ocean, bool), np.asarray(observed, bool)
    if truth.shape != (*ocean.shape, 2) or observed.shape != ocean.shape:
        raise InputError(
            f"truth {truth.shape}, ocean {ocean.shape} and observed {observed.shape} are of different grids; "
            "expected (y, x, 2), (y, x) and (y, x)"
        )
    scored = ocean & ~observed & np.isfinite(truth).all(-1)
    if not scored.any():
        raise InputError("no cell to score: every ocean cell is observed or has no truth")
    return scored


def on_scored(truth: np.ndarray, members: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth (cells, 2) and members (M, cells, 2) on scored cells in float64.

    Raises:
      InputError: shapes do not fit, there is no member or no scored cell, or something scored is not finite.
    """
    truth, members, scored = np.asarray(truth), np.asarray(members), np.asarray(scored)
    grid = scored.shape
    if scored.dtype != bool or truth.shape != (*grid, 2) or members.ndim != 4 or members.shape[1:] != (*grid, 2):
        raise InputError(
            f"truth {truth.shape}, members {members.shape} and scored {grid} ({scored.dtype}) do not fit "
            "together; expected (y, x, 2), (M, y, x, 2) and (y, x) of bool"
        )
    if not (len(members) and scored.any()):
        raise InputError(f"nothing to score: {len(members)} members, {scored.sum()} scored cells")
    truth, members = truth[scored].astype(np.float64), members[:, scored].astype(np.float64)
    for what, bad in (
        ("truth", ~np.isfinite(truth).all(-1)),
        ("a member", ~np.isfinite(members).all((0, -1))),
    ):
        if bad.any():
            y, x = np.argwhere(scored)[np.flatnonzero(bad)[0]]
            raise InputError(f"{what} is not finite at the scored cell (y={y}, x={x})")
    return truth, members


def known_cells(truth: np.ndarray, ocean: np.ndarray) -> np.ndarray:
    """Ocean cells with a finite truth, (y, x) bool.

    Raises:
      InputError: they are of different grids.
    """
    truth, ocean = np.asarray(truth), np.asarray(ocean, bool)
    if truth.shape != (*ocean.shape, 2):
        raise InputError(f"truth {truth.shape} and ocean {ocean.shape} are of different grids")
    return ocean & np.isfinite(truth).all(-1)


def least_members(antithetic: bool) -> int:
    """Fewest members that have a spread: two, or two antithetic pairs."""
    return 4 if antithetic else 2


def require_pairs(count: int, antithetic: bool) -> None:
    """Raises InputError at antithetic members that are no pairs."""
    if antithetic and count % 2:
        raise InputError(f"antithetic members come in pairs, got {count} members")


def _require_spread(count: int, antithetic: bool) -> None:
    require_pairs(count, antithetic)
    if count < least_members(antithetic):
        needed = "two antithetic pairs" if antithetic else "two members"
        raise InputError(f"a spread needs at least {needed}, got {count} member{'s' * (count > 1)}")


def require_sizes(dx: float | np.ndarray, dy: float | np.ndarray, where: np.ndarray) -> None:
    """Raises InputError unless the metres of the cells `where` (y, x) are one number, or one for each, and positive."""
    for name, size in (("dx", np.asarray(dx)), ("dy", np.asarray(dy))):
        if size.shape not in ((), where.shape):
            raise InputError(f"{name} {size.shape} is neither one number nor one for each of the cells {where.shape}")
        sizes = np.broadcast_to(size, where.shape)[where]
        if not ((sizes > 0) & (sizes < math.inf)).all():
            raise InputError(f"cell sizes are positive numbers of metres, got {name}={size}")


def quotient(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under of one shape, NaN where `under` is not positive."""
    return np.divide(over, under, out=np.full(np.shape(under), np.nan), where=under > 0)


# --- errors --------------------------------------------------------------------------------------------


def mse(estimate: np.ndarray, truth: np.ndarray, scored: np.ndarray) -> float:
    """Mean squared error of one field (y, x, 2) over scored cells and both components, (m/s)^2."""
    truth, estimate = on_scored(truth, np.asarray(estimate)[None], scored)
    return float(np.mean((estimate - truth) ** 2))


def component_rmse(mse: float | np.ndarray) -> float:
    """sqrt(mean mse), m/s: the error of one component; `mse` of one frame or of several."""
    return float(np.sqrt(np.mean(mse)))


def vector_rmse(mse: float | np.ndarray) -> float:
    """sqrt(2 mean mse), m/s: the length of the error vector, always sqrt 2 times the component RMSE."""
    return float(np.sqrt(2 * np.mean(mse)))


def direction_error(estimate: np.ndarray, truth: np.ndarray, scored: np.ndarray, speed: float) -> float:
    """Mean absolute angle between estimate and truth (y, x, 2) where the truth is faster than `speed`, degrees.

        mean |atan2(t x e, t . e)|,   0 for parallel vectors, 180 for opposite ones

    Slow water has no direction worth the name, hence the threshold in m/s. An estimate at rest counts as 90,
    what a random direction has on average. NaN where no scored cell is that fast.

    Raises:
      InputError: speed is negative or not finite, shapes that do not fit.
    """
    if not 0 <= speed < math.inf:
        raise InputError(f"the speed above which directions count is a number of m/s from 0, got {speed}")
    truth, estimate = on_scored(truth, np.asarray(estimate)[None], scored)
    fast = np.hypot(*truth.T) > speed
    (tu, tv), (eu, ev) = truth[fast].T, estimate[0, fast].T
    angle = np.abs(np.arctan2(tu * ev - tv * eu, tu * eu + tv * ev))
    return float(np.degrees(np.where((eu == 0) & (ev == 0), np.pi / 2, angle).mean())) if fast.any() else math.nan


@dataclass(frozen=True)
class DistanceErrors:
    """Error against distance to the nearest observation.

    Attributes:
      edges: (bins + 1,) bin i holds edges[i] <= distance < edges[i + 1], in the unit of the cell sizes.
      counts: (bins,) scored cells.
      mean, baseline: (bins,) MSE of the ensemble mean and of a baseline, (m/s)^2 a component; NaN if empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean: np.ndarray
    baseline: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Mean over baseline, (bins,); NaN in an empty bin or where the baseline has no error."""
        return quotient(self.mean, self.baseline)

    @classmethod
    def average(cls, frames: Sequence["DistanceErrors"]) -> "DistanceErrors":
        """Errors over the cells of all frames together; counts are summed.

        Raises:
          InputError: no frames, or frames with different edges.
        """
        if not frames or any(not np.array_equal(f.edges, frames[0].edges) for f in frames):
            raise InputError(f"an average needs frames with the same edges, got {len(frames)} frames")
        counts = np.stack([f.counts for f in frames])
        total = counts.sum(0)
        sums = [np.nansum(counts * [getattr(f, name) for f in frames], 0) for name in ("mean", "baseline")]
        return cls(frames[0].edges, total, *(quotient(one, total) for one in sums))


def error_by_distance(
    mean: np.ndarray,
    baseline: np.ndarray,
    truth: np.ndarray,
    scored: np.ndarray,
    observed: np.ndarray,
    edges: Sequence[float] | np.ndarray,
    dx: float = 1.0,
    dy: float = 1.0,
) -> DistanceErrors:
    """MSE of two estimates (y, x, 2) of one frame in bins of the distance to the nearest observed cell.

    Distances run straight from cell centre to cell centre, over land if need be.

    Args:
      mean, baseline: the mean of an ensemble and what it is compared with, m/s.
      truth: (y, x, 2) m/s.
      scored: (y, x) bool, as `scored_cells` gives them.
      observed: (y, x) bool.
      edges: (bins + 1,) rising; the last may be infinite. Scored cells outside are left out.
      dx, dy: cell sizes in metres; 1 for distances in cells.

    Raises:
      InputError: no cell is observed, edges do not rise, a cell size is not positive, shapes that do not fit.
    """
    edges, observed = np.asarray(edges, np.float64), np.asarray(observed, bool)
    if edges.ndim != 1 or edges.size < 2 or not (edges[1:] > edges[:-1]).all():
        raise InputError(f"edges of distance must rise, at least two of them, got {edges.tolist()}")
    if observed.shape != np.shape(scored) or not observed.any():
        raise InputError(
            f"no distance without an observed cell on the grid of scored: {observed.sum()} observed "
            f"cells of {observed.shape}, scored is {np.shape(scored)}"
        )
    require_sizes(dx, dy, np.True_)
    squares = []
    for field in (mean, baseline):
        t, estimate = on_scored(truth, np.asarray(field)[None], scored)
        squares.append(((estimate[0] - t) ** 2).mean(-1))
    distance = ndimage.distance_transform_edt(~observed, sampling=(dy, dx))[scored]
    bins = np.digitize(distance, edges)
    counts, *sums = (np.bincount(bins, weight, edges.size + 1)[1:-1] for weight in (np.ones_like(distance), *squares))
    return DistanceErrors(edges, counts.astype(int), *(quotient(one, counts) for one in sums))


# --- ensemble scores -----------------------------------------------------------------------------------


def fair_crps(truth: np.ndarray, members: np.ndarray, scored: np.ndarray, antithetic: bool = False) -> float:
    """Fair continuous ranked probability score, m/s: unbiased for the ensemble's distribution at any size.

        mean_m |x_m - t| - 1/2 mean_{m, n independent} |x_m - x_n|

    The second mean runs over all pairs m < n, without pairs of partners if antithetic.

    Raises:
      InputError: fewer than two members (two pairs if antithetic), shapes that do not fit.

    Source: Ferro, "Fair scores for ensemble forecasts" (2014).
    """
    truth, members = on_scored(truth, members, scored)
    count = len(members)
    _require_spread(count, antithetic)
    # The estimator by probability-weighted moments is the fair one, from a sort instead of all pairs.
    crps = scoringrules.crps_ensemble(truth, members, m_axis=0, estimator="pwm", backend="numpy").mean()
    if antithetic:
        distance, partners = np.abs(members - truth).mean(), np.abs(members[0::2] - members[1::2]).sum(0).mean()
        crps = _without_partners(crps, distance, partners, count)
    return float(crps)


def _without_partners(fair: float, distance: float, partners: float, count: int) -> float:
    """A fair score from all pairs of M members made one from pairs of strangers.

    `distance` is the mean distance of members to the truth, `partners` the sum of distances in pairs of partners.
    """
    all_pairs = (distance - fair) * count * (count - 1)
    return distance - (all_pairs - partners) / (count * (count - 2))


def energy_score(
    truth: np.ndarray,
    members: np.ndarray,
    scored: np.ndarray,
    antithetic: bool = False,
    vector: Literal["cell", "field"] = "cell",
) -> float:
    """Fair energy score, m/s: the CRPS of vectors, which also judges how components vary together.

        mean_m |x_m - t| - 1/2 mean_{m, n independent} |x_m - x_n|

    The second mean runs over all pairs m < n, without pairs of partners if antithetic. Vectors and lengths are

        cell    the current (u, v) of one cell and its speed; the score is averaged over cells
        field   all scored values of the frame and sqrt(mean over cells u^2 + v^2)

    Raises:
      InputError: fewer than two members (two pairs if antithetic), an unknown vector, shapes that do not fit.

    Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation" (2007), eq. 22.
    """
    truth, members = on_scored(truth, members, scored)
    count, cells = members.shape[:2]
    _require_spread(count, antithetic)
    if vector not in ("cell", "field"):
        raise InputError(f"the vector of an energy score is cell or field, got {vector!r}")
    errors = np.moveaxis(members - truth, 0, -2)
    if vector == "field":
        # Rotating M error vectors into the space they span keeps all lengths and leaves M numbers of each.
        errors = np.linalg.qr(errors.transpose(0, 2, 1).reshape(-1, count) / math.sqrt(cells), mode="r").T[None]
    # All pairs at all cells at once would take gigabytes.
    parts = np.array_split(errors, -(-errors.size * count // 2**23))
    fair = sum(
        scoringrules.es_ensemble(np.zeros_like(part[:, 0]), part, estimator="fair", backend="numpy").sum()
        for part in parts
    ) / len(errors)
    if antithetic:
        distance = np.linalg.norm(errors, axis=-1).mean()
        partners = np.linalg.norm(errors[:, 0::2] - errors[:, 1::2], axis=-1).sum(-1).mean()
        fair = _without_partners(fair, distance, partners, count)
    return float(fair)


def ensemble_variance(members: np.ndarray, antithetic: bool = False) -> np.ndarray:
    """Unbiased variance of one member, elementwise over (M, ...).

        1/2 mean_{m, n independent} (x_m - x_n)^2

    which is sum_m (x_m - mean)^2 / (M - 1) where all members are independent.

    Raises:
      InputError: fewer than two members, two pairs if antithetic.
    """
    members = np.asarray(members, np.float64)
    count = len(members)
    _require_spread(count, antithetic)
    if not antithetic:
        return members.var(0, ddof=1)
    partners = ((members[0::2] - members[1::2]) ** 2).sum(0)
    return (count**2 * members.var(0) - partners) / (count * (count - 2))


def spread_skill(
    variance: float | np.ndarray, mse_mean: float | np.ndarray, members: int, antithetic: bool = False
) -> float:
    """Spread over error of the ensemble mean, 1 if truth and members are exchangeable; NaN without any error.

        sqrt((M + 1) / M  mean variance / mean mse_mean)

    The factor is the share of the finite mean's own variance; antithetic partners cancel it, so they drop it.

    Args:
      variance, mse_mean: mean ensemble variance and MSE of the ensemble mean, one number a frame.
      members: M.

    Source: Fortin et al., "Why should ensemble spread match the RMSE of the ensemble mean?" (2014).
    """
    error = np.mean(mse_mean)
    factor = 1 if antithetic else (members + 1) / members
    return float(np.sqrt(factor * np.mean(variance) / error)) if error > 0 else math.nan


def half_width(members: int, antithetic: bool = False, level: float = 0.9) -> float:
    """Half the width of a central interval of M Gaussian members, in their standard deviations.

    q sqrt((M + 1) / M),   q the Student quantile at M - 1 degrees of freedom

    For antithetic pairs one degree of freedom a pair, and no (M + 1) / M.
    """
    freedom, factor = (members / 2, 1) if antithetic else (members - 1, (members + 1) / members)
    return float(stats.t.ppf((1 + level) / 2, freedom) * math.sqrt(factor))


def coverage(
    truth: np.ndarray,
    members: np.ndarray,
    scored: np.ndarray,
    level: float = 0.9,
    interval: Literal["gaussian", "order"] = "gaussian",
    antithetic: bool = False,
) -> float:
    """Fraction of scored values inside the central interval of their ensemble.

        gaussian   mean +- half_width std
        order      between order statistics (M + 1)(1 -+ level) / 2, interpolated, at most the member range

    Few members do not know their std, which is why q is not the Gaussian quantile (1.645 for 90 %) it tends
    to: with it a perfect ensemble of any size covers `level`. For antithetic pairs the second takes the two
    halves of the ensemble one by one. Of M exchangeable members (M in a half) the order statistics cover
    min(level, (M - 1) / (M + 1)).

    Raises:
      InputError: fewer than two members (two pairs if antithetic), level not in (0, 1), shapes that
        do not fit.
    """
    truth, members = on_scored(truth, members, scored)
    count = len(members)
    _require_spread(count, antithetic)
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1, got {level}")
    if interval == "gaussian":
        half = half_width(count, antithetic, level) * np.sqrt(ensemble_variance(members, antithetic))
        return float(np.mean(np.abs(truth - members.mean(0)) <= half))
    halves = (members[0::2], members[1::2]) if antithetic else (members,)
    inside = []
    for half in halves:
        low, high = np.quantile(half, ((1 - level) / 2, (1 + level) / 2), axis=0, method="weibull")
        inside.append(np.mean((low <= truth) & (truth <= high)))
    return float(np.mean(inside))


def rank_histogram(
    truth: np.ndarray,
    members: np.ndarray,
    scored: np.ndarray,
    rng: np.random.Generator,
    antithetic: bool = False,
) -> np.ndarray:
    """How often the truth has each rank among M members, ties broken at random. (M + 1,) counts.

    The truth is not exchangeable with a pair of partners, so the two halves of an antithetic ensemble are
    counted one by one: (M / 2 + 1,) counts, every value twice.

    Source: Hamill, "Interpretation of rank histograms for verifying ensemble forecasts" (2001).
    """
    truth, members = on_scored(truth, members, scored)
    require_pairs(len(members), antithetic)
    halves = (members[0::2], members[1::2]) if antithetic else (members,)
    counts = np.zeros(len(halves[0]) + 1, int)
    for half in halves:
        ties = (half == truth).sum(0)
        rank = (half < truth).sum(0) + rng.integers(0, ties + 1)
        counts += np.bincount(rank.reshape(-1), minlength=len(counts))
    return counts
