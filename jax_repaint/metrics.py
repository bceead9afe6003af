"""How good an ensemble of currents is: errors, fair scores, spread, small scales, eddies, paired comparisons.

Everything is in m/s on scored cells: ocean cells that were not observed. One frame has

    truth (y, x, 2),   members (M, y, x, 2),   scored (y, x) bool,

and component averages run over scored cells, u and v. `score` turns one frame into plain numbers, `summary`
the numbers of many frames into one row of a table. Averages over frames are taken before any root or
quotient.

Antithetic ensembles hold partners at 2j and 2j + 1, drawn with opposite noise. Partners are not independent,
so pairs of partners are left out wherever two members stand for two independent draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import scoringrules
from scipy import fft, ndimage, stats

from jax_repaint.errors import InputError
from jax_repaint.files import whole_file

DASH = "–"
TIE = 1e-5  # share of an error by which single precision can differ


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


def _values(truth: np.ndarray, members: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth (cells, 2) and members (M, cells, 2) on scored cells in float64."""
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


def _known(truth: np.ndarray, ocean: np.ndarray) -> np.ndarray:
    """Ocean cells with a finite truth, (y, x) bool."""
    truth, ocean = np.asarray(truth), np.asarray(ocean, bool)
    if truth.shape != (*ocean.shape, 2):
        raise InputError(f"truth {truth.shape} and ocean {ocean.shape} are of different grids")
    return ocean & np.isfinite(truth).all(-1)


def least_members(antithetic: bool) -> int:
    """Fewest members that have a spread: two, or two antithetic pairs."""
    return 4 if antithetic else 2


def _require_pairs(count: int, antithetic: bool) -> None:
    if antithetic and count % 2:
        raise InputError(f"antithetic members come in pairs, got {count} members")


def _require_spread(count: int, antithetic: bool) -> None:
    _require_pairs(count, antithetic)
    if count < least_members(antithetic):
        needed = "two antithetic pairs" if antithetic else "two members"
        raise InputError(f"a spread needs at least {needed}, got {count} member{'s' * (count > 1)}")


def _require_sizes(dx: float | np.ndarray, dy: float | np.ndarray, where: np.ndarray) -> None:
    for name, size in (("dx", np.asarray(dx)), ("dy", np.asarray(dy))):
        if size.shape not in ((), where.shape):
            raise InputError(f"{name} {size.shape} is neither one number nor one for each of the cells {where.shape}")
        sizes = np.broadcast_to(size, where.shape)[where]
        if not ((sizes > 0) & (sizes < math.inf)).all():
            raise InputError(f"cell sizes are positive numbers of metres, got {name}={size}")


def _quotient(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(np.shape(under), np.nan), where=under > 0)


# --- errors --------------------------------------------------------------------------------------------


def mse(estimate: np.ndarray, truth: np.ndarray, scored: np.ndarray) -> float:
    """Mean squared error of one field (y, x, 2) over scored cells and both components, (m/s)^2."""
    truth, estimate = _values(truth, np.asarray(estimate)[None], scored)
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
    truth, estimate = _values(truth, np.asarray(estimate)[None], scored)
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
        return _quotient(self.mean, self.baseline)

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
        return cls(frames[0].edges, total, *(_quotient(one, total) for one in sums))


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
    _require_sizes(dx, dy, np.True_)
    squares = []
    for field in (mean, baseline):
        t, estimate = _values(truth, np.asarray(field)[None], scored)
        squares.append(((estimate[0] - t) ** 2).mean(-1))
    distance = ndimage.distance_transform_edt(~observed, sampling=(dy, dx))[scored]
    bins = np.digitize(distance, edges)
    counts, *sums = (np.bincount(bins, weight, edges.size + 1)[1:-1] for weight in (np.ones_like(distance), *squares))
    return DistanceErrors(edges, counts.astype(int), *(_quotient(one, counts) for one in sums))


# --- ensemble scores -----------------------------------------------------------------------------------


def fair_crps(truth: np.ndarray, members: np.ndarray, scored: np.ndarray, antithetic: bool = False) -> float:
    """Fair continuous ranked probability score, m/s: unbiased for the ensemble's distribution at any size.

        mean_m |x_m - t| - 1/2 mean_{m, n independent} |x_m - x_n|

    The second mean runs over all pairs m < n, without pairs of partners if antithetic.

    Raises:
      InputError: fewer than two members (two pairs if antithetic), shapes that do not fit.

    Source: Ferro, "Fair scores for ensemble forecasts" (2014).
    """
    truth, members = _values(truth, members, scored)
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
    truth, members = _values(truth, members, scored)
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


def member_range_level(members: int, level: float = 0.9, antithetic: bool = False) -> float:
    """What `coverage` by order statistics gives M exchangeable members: `level`, less for few members.

    min(level, (M - 1) / (M + 1)),   M halved for antithetic members
    """
    count = members // 2 if antithetic else members
    return min(level, (count - 1) / (count + 1))


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
    halves of the ensemble one by one. The
    member range of a small ensemble covers less than `level`: `member_range_level` says how much.

    Raises:
      InputError: fewer than two members (two pairs if antithetic), level not in (0, 1), shapes that
        do not fit.
    """
    truth, members = _values(truth, members, scored)
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
    truth, members = _values(truth, members, scored)
    _require_pairs(len(members), antithetic)
    halves = (members[0::2], members[1::2]) if antithetic else (members,)
    counts = np.zeros(len(halves[0]) + 1, int)
    for half in halves:
        ties = (half == truth).sum(0)
        rank = (half < truth).sum(0) + rng.integers(0, ties + 1)
        counts += np.bincount(rank.reshape(-1), minlength=len(counts))
    return counts


# --- small scales --------------------------------------------------------------------------------------


def small_scale_energy(field: np.ndarray, scored: np.ndarray, ocean: np.ndarray, window: int = 5) -> float:
    """Mean square of the field minus its local mean over the ocean cells of a window, (m/s)^2 a component.

    Local averages that know the coast work on any grid, where a transform needs a rectangle without land.
    Judge members by it, never their mean: averaging removes just these scales.

    Args:
      field: (..., y, x, 2); averaged over leading axes, which may be members.
      scored: (y, x) bool, cells that count.
      ocean: (y, x) bool, cells that the local mean may use; the field must be finite there.
      window: odd width of the window in cells.
    """
    field, scored, ocean = np.asarray(field, np.float64), np.asarray(scored, bool), np.asarray(ocean, bool)
    if field.shape[-3:] != (*ocean.shape, 2) or scored.shape != ocean.shape:
        raise InputError(f"field {field.shape}, scored {scored.shape} and ocean {ocean.shape} do not fit together")
    if window < 3 or window % 2 == 0:
        raise InputError(f"window must be odd and at least 3 cells, got {window}")
    if not scored.any() or (scored & ~ocean).any():
        raise InputError("scored cells must be ocean, at least one of them")
    if not np.isfinite(field[..., ocean, :]).all():
        raise InputError("the field is not finite on every ocean cell that a local mean uses")
    inside = np.where(ocean[..., None], field, 0)
    total = ndimage.uniform_filter(inside, window, axes=(-3, -2), mode="constant")
    share = ndimage.uniform_filter(ocean.astype(np.float64), window, mode="constant")
    residual = inside[..., scored, :] - total[..., scored, :] / share[scored][:, None]
    return float(np.mean(residual**2))


def ocean_rectangle(ocean: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the largest rectangle without land (the first one found among equals)."""
    ocean = np.asarray(ocean, bool)
    best, rectangle = 0, (slice(0, 0), slice(0, 0))
    height = np.zeros(ocean.shape[1], int)
    for y, row in enumerate(ocean):
        height = np.where(row, height + 1, 0)
        # Columns to the left that are not lower than the current one, as (first column, height), rising.
        open_: list[tuple[int, int]] = []
        for x, h in enumerate([*height.tolist(), 0]):
            start = x
            while open_ and open_[-1][1] >= h:
                start, tall = open_.pop()
                if tall * (x - start) > best:
                    best, rectangle = tall * (x - start), (slice(y + 1 - tall, y + 1), slice(start, x))
            open_.append((start, h))
    return rectangle


@dataclass(frozen=True)
class Spectrum:
    """Kinetic energy by bands of wavenumber.

    Attributes:
      wavenumber: (bands,) middle of each band, cycles per metre; 1 / wavenumber is a wavelength.
      truth: (bands,) energy of the truth, (m/s)^2.
      members: (bands,) mean energy of the members, (m/s)^2.
    """

    wavenumber: np.ndarray
    truth: np.ndarray
    members: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Members over truth, (bands,); NaN in a band where the truth has no energy."""
        return _quotient(self.members, self.truth)

    @classmethod
    def average(cls, frames: Sequence["Spectrum"]) -> "Spectrum":
        """Energies averaged over frames of one grid."""
        truth, members = ([getattr(f, name) for f in frames] for name in ("truth", "members"))
        return cls(frames[0].wavenumber, np.mean(truth, 0), np.mean(members, 0))


def energy_bands(field: np.ndarray, dx: float, dy: float) -> tuple[np.ndarray, np.ndarray]:
    """Kinetic energy of fields on a rectangle by bands of wavenumber, from a discrete cosine transform.

        E_ij = (U_ij^2 + V_ij^2) / (2 Y X),   k_ij = sqrt((i / Y dy)^2 + (j / X dx)^2) / 2

    with orthonormal type-II coefficients U, V, which need no periodic field. Bands are 1 / (2 L) wide, L the
    shorter side, and start at 1 / (4 L): the mean flow and what is longer than the shorter side stay out.

    Args:
      field: (..., y, x, 2) in m/s, finite.
      dx, dy: cell sizes in metres.

    Returns:
      wavenumber (bands,) in cycles per metre, energy (..., bands) in (m/s)^2.

    Source: Denis, Cote, Laprise, "Spectral decomposition of two-dimensional atmospheric fields on
    limited-area domains using the discrete cosine transform" (2002).
    """
    field = np.asarray(field, np.float64)
    ny, nx = field.shape[-3:-1]
    energy = (fft.dctn(field, axes=(-3, -2), norm="ortho") ** 2).sum(-1) / (2 * ny * nx)
    k = np.hypot(np.arange(ny)[:, None] / (2 * ny * dy), np.arange(nx) / (2 * nx * dx))
    width = 1 / (2 * min(ny * dy, nx * dx))
    band = np.rint(k / width).astype(int).reshape(-1)
    totals = [np.bincount(band, one.reshape(-1))[1:] for one in energy.reshape(-1, ny, nx)]
    return width * np.arange(1, band.max() + 1), np.reshape(totals, (*energy.shape[:-2], band.max()))


def spectrum(truth: np.ndarray, members: np.ndarray, ocean: np.ndarray, dx: float, dy: float) -> Spectrum:
    """Kinetic-energy spectra of truth and members (M, y, x, 2) on the largest rectangle without land.

    Observed cells inside the rectangle take part: a transform has no holes.

    Raises:
      InputError: the rectangle is smaller than 8 by 8 cells, or a field is not finite there.
    """
    valid = _known(truth, ocean)
    _values(truth, members, valid)
    rows, columns = ocean_rectangle(valid)
    ny, nx = rows.stop - rows.start, columns.stop - columns.start
    if min(ny, nx) < 8:
        raise InputError(f"a spectrum needs 8 by 8 cells without land, the largest rectangle has {ny} by {nx}")
    wavenumber, energy = energy_bands(truth[rows, columns], dx, dy)
    return Spectrum(wavenumber, energy, energy_bands(members[:, rows, columns], dx, dy)[1].mean(0))


def divergence_vorticity(
    field: np.ndarray, ocean: np.ndarray, dx: float | np.ndarray, dy: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divergence u_x + v_y and vorticity v_x - u_y by centred differences, 1/s, where the stencil is ocean.

    Args:
      field: (..., y, x, 2) m/s.
      ocean: (y, x) bool.
      dx, dy: cell sizes in metres, scalar or (y, x).

    Returns:
      divergence (..., y, x), vorticity (..., y, x), both zero outside `interior`, and interior (y, x) bool:
      ocean cells whose four neighbours are ocean.
    """
    u_x, u_y, v_x, v_y, interior = _gradient(field, ocean, dx, dy)
    return u_x + v_y, v_x - u_y, interior


def _gradient(
    field: np.ndarray, ocean: np.ndarray, dx: float | np.ndarray, dy: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """u_x, u_y, v_x, v_y by centred differences, 1/s, zero outside interior, and interior (y, x) bool."""
    ocean = np.asarray(ocean, bool)
    field = np.where(ocean[..., None], np.asarray(field, np.float64), 0)
    interior = np.zeros_like(ocean)
    interior[1:-1, 1:-1] = ocean[1:-1, 1:-1] & ocean[:-2, 1:-1] & ocean[2:, 1:-1] & ocean[1:-1, :-2] & ocean[1:-1, 2:]
    by_y, by_x = np.zeros_like(field), np.zeros_like(field)
    by_y[..., 1:-1, :, :] = (field[..., 2:, :, :] - field[..., :-2, :, :]) / 2
    by_x[..., 1:-1, :] = (field[..., 2:, :] - field[..., :-2, :]) / 2
    u_x, v_x = (np.where(interior, by_x[..., i] / dx, 0) for i in (0, 1))
    u_y, v_y = (np.where(interior, by_y[..., i] / dy, 0) for i in (0, 1))
    return u_x, u_y, v_x, v_y, interior


def derivative_scores(
    truth: np.ndarray,
    members: np.ndarray,
    scored: np.ndarray,
    ocean: np.ndarray,
    dx: float | np.ndarray,
    dy: float | np.ndarray,
) -> dict[str, float]:
    """Mean squares of divergence and vorticity of one frame over scored interior stencils, 1/s^2.

    Keys: {divergence, vorticity}_{error, member, truth}; error and member are averaged over members.

    Raises:
      InputError: no stencil of five ocean cells is scored, shapes that do not fit.
    """
    _values(truth, members, scored)
    valid = _known(truth, ocean)
    *of_truth, interior = divergence_vorticity(truth, valid, dx, dy)
    of_members = divergence_vorticity(members, valid, dx, dy)[:2]
    where = interior & scored
    if not where.any():
        raise InputError("no scored cell has four ocean neighbours, so no derivative can be compared")
    scores = {}
    for name, t, m in zip(("divergence", "vorticity"), of_truth, of_members, strict=True):
        scores[f"{name}_error"] = float(np.mean((m - t)[:, where] ** 2))
        scores[f"{name}_member"] = float(np.mean(m[:, where] ** 2))
        scores[f"{name}_truth"] = float(np.mean(t[where] ** 2))
    return scores


def derivative_summary(frames: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """RMS errors (1/s) and RMS ratios member / truth of divergence and vorticity over frames.

    Keys: {divergence, vorticity}_{rmse, ratio}.
    """
    mean = pd.DataFrame(list(frames)).mean()
    row = {}
    for name in ("divergence", "vorticity"):
        row[f"{name}_rmse"] = float(np.sqrt(mean[f"{name}_error"]))
        row[f"{name}_ratio"] = _root_ratio(mean[f"{name}_member"], mean[f"{name}_truth"])
    return row


def _root_ratio(over: float, under: float) -> float:
    return float(np.sqrt(over / under)) if under > 0 else math.nan


# --- eddies --------------------------------------------------------------------------------------------


def okubo_weiss(
    field: np.ndarray, ocean: np.ndarray, dx: float | np.ndarray, dy: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Okubo-Weiss parameter, 1/s^2: negative where rotation, positive where strain prevails.

        W = (u_x - v_y)^2 + (v_x + u_y)^2 - (v_x - u_y)^2

    Args:
      field: (..., y, x, 2) m/s.
      ocean: (y, x) bool.
      dx, dy: cell sizes in metres, scalar or (y, x).

    Returns:
      W (..., y, x), zero outside interior, and interior (y, x) bool as `divergence_vorticity` has it.

    Raises:
      InputError: field and ocean are of different grids, a cell size is unknown or not positive on the ocean.

    Sources: Okubo, "Horizontal dispersion of floatable particles in the vicinity of velocity singularities such
    as convergences" (1970); Weiss, "The dynamics of enstrophy transfer in two-dimensional hydrodynamics" (1991).
    """
    if np.shape(field)[-3:] != (*np.shape(ocean), 2):
        raise InputError(f"field {np.shape(field)} and ocean {np.shape(ocean)} are of different grids")
    _require_sizes(dx, dy, np.asarray(ocean, bool))
    u_x, u_y, v_x, v_y, interior = _gradient(field, ocean, dx, dy)
    return (u_x - v_y) ** 2 + (v_x + u_y) ** 2 - (v_x - u_y) ** 2, interior


def eddy_scores(
    truth: np.ndarray,
    members: np.ndarray,
    scored: np.ndarray,
    ocean: np.ndarray,
    dx: float | np.ndarray,
    dy: float | np.ndarray,
    antithetic: bool = False,
    threshold: float = 0.2,
) -> dict[str, float]:
    """Eddies of members against those of the truth in one frame, over scored interior stencils.

    A cell is in an eddy where W < -threshold std(W of the truth), the std over all interior stencils. With o
    the truth's indicator, o_m a member's and p = mean_m o_m,

        brier        mean (p - o)^2
        brier_fair   mean_m |o_m - o| - 1/2 mean_{m, n independent} (o_m - o_n)^2, averaged over cells
        hits         share of cells in an eddy of truth and member, averaged over members
        truth        share of cells in an eddy of the truth
        members      the same of a member, averaged over members

    Partners of antithetic members are left out of the pairs. The plain Brier score holds an ensemble's size
    against it, the fair one does not; it is NaN where no two members are independent.

    Raises:
      InputError: no stencil of five ocean cells is scored, a member is not finite on a known ocean cell, an
        odd number of antithetic members, threshold negative, a cell size not positive, shapes that do not fit.

    Sources: Isern-Fontanet, Garcia-Ladona, Font, "Identification of marine eddies from altimetric maps"
    (2003), the threshold; Ferro, "Fair scores for ensemble forecasts" (2014), the fair Brier score.
    """
    _values(truth, members, scored)
    valid = _known(truth, ocean)
    _values(truth, members, valid)
    count = len(members)
    _require_pairs(count, antithetic)
    if not 0 <= threshold < math.inf:
        raise InputError(f"the threshold of eddies is a number of standard deviations from 0, got {threshold}")
    of_truth, interior = okubo_weiss(truth, valid, dx, dy)
    of_members, _ = okubo_weiss(members, valid, dx, dy)
    where = interior & scored
    if not where.any():
        raise InputError("no scored cell has four ocean neighbours, so no eddy can be seen")
    limit = -threshold * of_truth[interior].std()
    t, m = (of_truth[where] < limit).astype(np.float64), (of_members[:, where] < limit).astype(np.float64)
    paired = count >= least_members(antithetic)
    pairs = ensemble_variance(m, antithetic).mean() if paired else math.nan
    return {
        "brier": float(np.mean((m.mean(0) - t) ** 2)),
        "brier_fair": float(np.abs(m - t).mean() - pairs),
        "hits": float((m * t).mean()),
        "truth": float(t.mean()),
        "members": float(m.mean()),
    }


def eddy_summary(frames: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Scores of eddies over frames of `eddy_scores`.

        brier, brier_fair   means over frames
        frequency           f, share of cells in an eddy of the truth; always saying f has the Brier score f (1 - f)
        hit_rate            share of the truth's eddy cells that a member has: hits / truth
        false_alarm_ratio   share of a member's eddy cells that the truth has not: 1 - hits / members

    NaN where nothing is divided by: no eddies in the truth, or none in the members.

    Raises:
      InputError: no frames.
    """
    if not frames:
        raise InputError("a summary of eddies needs at least one frame")
    mean = pd.DataFrame(list(frames)).mean()
    hits, truth, members = (float(mean[name]) for name in ("hits", "truth", "members"))
    return {
        "brier": float(mean["brier"]),
        "brier_fair": float(mean["brier_fair"]),
        "frequency": truth,
        "hit_rate": hits / truth if truth > 0 else math.nan,
        "false_alarm_ratio": 1 - hits / members if members > 0 else math.nan,
    }


# --- comparison ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A method against a baseline on the same frames; below 1 the method is better.

    Attributes:
      ratio: mean MSE of the method over mean MSE of the baseline.
      lo, hi: its interval; NaN where fewer than two blocks fit.
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
    resamples: int = 2000,
) -> Ratio:
    """Ratio of mean errors on the same frames, with a paired moving-block bootstrap interval.

    Neighbouring frames are alike, so blocks of them are drawn, and both methods always on the same blocks. A
    mean of per-frame ratios would be ruled by frames on which the baseline happens to be nearly perfect.
    Percentiles of the B = n / block blocks are taken further out, at Phi(sqrt(B / (B - 1)) t_{B - 1}),
    because plain ones are too narrow for few blocks.

    Args:
      method_mse, baseline_mse: (n,) one number a frame, in the order of time.
      block: frames in a block, at least as many as stay correlated.
      seed: of the resampling.
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
    if block < 1:
        raise InputError(f"a block has at least one frame, got {block}")
    n = method.size
    lo = hi = math.nan
    if n >= 2 * block:
        rng = np.random.default_rng(seed)
        start = rng.integers(0, n - block + 1, (resamples, -(-n // block), 1))
        drawn = (start + np.arange(block)).reshape(resamples, -1)[:, :n]
        ratios = method[drawn].mean(1) / baseline[drawn].mean(1)
        blocks = n / block
        tail = stats.norm.cdf(math.sqrt(blocks / (blocks - 1)) * stats.t.ppf((1 - level) / 2, blocks - 1))
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
    t, m = _values(truth, members, scored)
    count = len(m)
    _require_pairs(count, antithetic)
    valid = _known(truth, ocean)
    if count == 1:
        variance, crps, covered = 0.0, float(np.abs(m[0] - t).mean()), math.nan
    elif antithetic and count == 2:
        variance = crps = covered = math.nan
    else:
        variance = float(ensemble_variance(m, antithetic).mean())
        crps = fair_crps(truth, members, scored, antithetic)
        covered = coverage(truth, members, scored, 0.9, antithetic=antithetic)
    return FrameScores(
        members=count,
        antithetic=antithetic,
        cells=int(np.sum(scored)),
        mse_member=float(np.mean((m - t) ** 2)),
        mse_mean=float(np.mean((m.mean(0) - t) ** 2)),
        variance=variance,
        crps=crps,
        coverage90=covered,
        energy_member=small_scale_energy(members, scored, valid),
        energy_truth=small_scale_energy(truth, scored, valid),
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
        "component_rmse": component_rmse(table["mse_mean"]),
        "vector_rmse": vector_rmse(table["mse_mean"]),
        "crps": float(mean["crps"]),
        "spread_skill": math.nan
        if members == 1
        else spread_skill(table["variance"], table["mse_mean"], members, antithetic),
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
    """Rows of `summary` as aligned plain text; a dash where a number does not exist, no column of dashes."""
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
