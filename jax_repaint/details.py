"""What a table of errors leaves out: how vectors, directions, derivatives, eddies and scales of an ensemble fare.

One row a pattern and method, averaged over frames: fair energy score of (u, v) at a cell, angle between mean and truth
where the truth is faster than a third of its rms speed, divergence and vorticity of members against the truth's, eddies
by the Okubo-Weiss parameter, and the energy of members over the truth's at the highest third of wavenumbers. A column
that a method or a coast does not allow is empty.
"""

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from jax_repaint import metrics, structures
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError


def of_frame(
    truth: np.ndarray, members: np.ndarray, scored: np.ndarray, fields: Fields, antithetic: bool = False
) -> dict[str, float]:
    """The numbers of one frame that `summary` averages.

    Args:
      truth: (y, x, 2) m/s.
      members: (M, y, x, 2) m/s.
      scored: (y, x) bool.
      fields: of the frame's grid.
      antithetic: True if members 2j and 2j + 1 are partners.
    """
    dx, dy = fields.cell_sizes()
    fast = math.sqrt(np.mean(np.sum(truth[scored] ** 2, -1))) / 3
    row = {"direction_error": metrics.direction_error(members.mean(0), truth, scored, fast)}
    if len(members) >= metrics.least_members(antithetic):
        row["energy_score"] = metrics.energy_score(truth, members, scored, antithetic)
    # Derivatives are along x and y.
    truth, members = fields.along_grid(truth), fields.along_grid(members)
    # Among coasts no cell may have four ocean neighbours, and no rectangle of 8 by 8 cells be without land.
    with contextlib.suppress(InputError):
        eddies = structures.eddy_scores(truth, members, scored, fields.ocean, dx, dy, antithetic)
        row |= structures.derivative_scores(truth, members, scored, fields.ocean, dx, dy)
        row |= {f"eddy_{name}": value for name, value in eddies.items()}
    with contextlib.suppress(InputError):
        bands = structures.spectrum(truth, members, fields.ocean, float(np.median(dx)), float(np.median(dy)))
        short = slice(2 * bands.wavenumber.size // 3, None)
        row |= {"short_members": float(bands.members[short].sum()), "short_truth": float(bands.truth[short].sum())}
    return row


def summary(frames: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row of many frames of `of_frame`; averages are taken before any root or quotient."""
    mean = pd.DataFrame(list(frames)).mean()
    row = {"energy_score": mean.get("energy_score", math.nan), "direction_error": mean["direction_error"]}
    if "divergence_error" in mean:
        row |= structures.derivative_summary(frames)
        eddies = [{k.removeprefix("eddy_"): v for k, v in f.items() if k.startswith("eddy_")} for f in frames]
        row |= {f"eddy_{name}": value for name, value in structures.eddy_summary(eddies).items()}
    if mean.get("short_truth", 0) > 0:
        row["short_waves"] = mean["short_members"] / mean["short_truth"]
    return {name: float(value) for name, value in row.items()}
