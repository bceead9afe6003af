"""The structure of currents: small scales, spectra, divergence and vorticity, eddies.

Mean errors forgive a field that is too smooth or in pieces; these scores do not. Arguments as in `metrics`: m/s,
truth (y, x, 2), members (M, y, x, 2), scored and ocean (y, x) bool.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import fft, ndimage

from jax_repaint import metrics
from jax_repaint.errors import InputError

# --- scales and gradients ------------------------------------------------------------------------------


def small_scale_energy(field: np.ndarray, scored: np.ndarray, ocean: np.ndarray, window: int = 5) -> float:
    """Mean square of the field minus its local mean over the ocean cells of a window, (m/s)^2 a component.

    Local averages that know the coast work on any grid, where a transform needs a rectangle without land.
    Judge members by it, never their mean: averaging removes just these scales.

    Args:
      field: (..., y, x, 2); averaged over leading axes, which may be members.
      scored: (y, x) bool, cells that count.
      ocean: (y, x) bool, cells that the local mean may use; the field must be finite there.
      window: odd width of the window in cells.

    Raises:
      InputError: shapes do not fit, the window is even or under 3, no ocean is scored, or the field is not finite.
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
        return metrics.quotient(self.members, self.truth)

    @classmethod
    def average(cls, frames: Sequence["Spectrum"]) -> "Spectrum":
        """Energies averaged over frames of one grid."""
        truth, members = ([getattr(f, name) for f in frames] for name in ("truth", "members"))
        return cls(frames[0].wavenumber, np.mean(truth, 0), np.mean(members, 0))


def energy_bands(field: np.ndarray, dx: float, dy: float) -> tuple[np.ndarray, np.ndarray]:
    """Kinetic energy of fields on a rectangle by bands of wavenumber, from a discrete cosine transform.

        E_ij = (U_ij^2 + V_ij^2) / (2 Y X),   k_ij = sqrt((i / Y dy)^2 + (j / X dx)^2) / 2

    with orthonormal type-II coefficients U, V, which need no periodic field. Bands are 1 / (2 L) wide, L the
    shorter side, and start at 1 / (4 L): the mean flow and what is longer than four times the shorter side stay out.

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
      InputError: the rectangle is smaller than 8 by 8 cells, a field is not finite there, a size is not positive.
    """
    metrics.require_sizes(dx, dy, np.ones((1, 1), bool))
    valid = metrics.known_cells(truth, ocean)
    metrics.on_scored(truth, members, valid)
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

    Without the terms -v tan(lat) / R and u tan(lat) / R of a sphere, which are small beside currents that turn within
    some tens of cells.

    Args:
      field: (..., y, x, 2) m/s.
      ocean: (y, x) bool.
      dx, dy: cell sizes in metres, scalar or (y, x).

    Returns:
      divergence (..., y, x), vorticity (..., y, x), both zero outside `interior`, and interior (y, x) bool:
      ocean cells whose four neighbours are ocean.

    Raises:
      InputError: cell sizes that are not positive, or not one for each cell.
    """
    u_x, u_y, v_x, v_y, interior = _gradient(field, ocean, dx, dy)
    return u_x + v_y, v_x - u_y, interior


def _gradient(
    field: np.ndarray, ocean: np.ndarray, dx: float | np.ndarray, dy: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """u_x, u_y, v_x, v_y by centred differences, 1/s, zero outside interior, and interior (y, x) bool."""
    ocean = np.asarray(ocean, bool)
    metrics.require_sizes(dx, dy, ocean)
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
      InputError: no stencil of five ocean cells is scored, shapes that do not fit, a member that is not finite where
        the truth is known, a cell size that is not positive.
    """
    valid = metrics.known_cells(truth, ocean)
    metrics.on_scored(truth, members, scored)
    metrics.on_scored(truth, members, valid)
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
    metrics.require_sizes(dx, dy, np.asarray(ocean, bool))
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
    metrics.on_scored(truth, members, scored)
    valid = metrics.known_cells(truth, ocean)
    metrics.on_scored(truth, members, valid)
    count = len(members)
    metrics.require_pairs(count, antithetic)
    if not 0 <= threshold < math.inf:
        raise InputError(f"the threshold of eddies is a number of standard deviations from 0, got {threshold}")
    of_truth, interior = okubo_weiss(truth, valid, dx, dy)
    of_members, _ = okubo_weiss(members, valid, dx, dy)
    where = interior & scored
    if not where.any():
        raise InputError("no scored cell has four ocean neighbours, so no eddy can be seen")
    limit = -threshold * of_truth[interior].std()
    t, m = (of_truth[where] < limit).astype(np.float64), (of_members[:, where] < limit).astype(np.float64)
    paired = count >= metrics.least_members(antithetic)
    pairs = metrics.ensemble_variance(m, antithetic).mean() if paired else math.nan
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
