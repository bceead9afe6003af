"""A mixture of Gaussians as the prior of a flow that has several regimes, such as phases of the tide.

Each regime is the linear prior of the training fields of one cluster; `denoise.Regimes` is their mixture.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from jax_repaint.denoise import Regimes
from jax_repaint.errors import InputError
from jax_repaint.prior import linear

CLUSTERED = 16  # leading EOFs whose amplitudes tell regimes apart


def fit(x: np.ndarray, ocean: np.ndarray, count: int, rank: int, seed: int = 0) -> Regimes:
    """Regimes of training fields by k-means on the amplitudes of the leading EOFs.

    Args:
      x: (n, y, x, c) standardised fields, zero on land.
      ocean: (y, x) bool.
      count: K.
      rank: directions of each regime.
      seed: of the clustering.

    Raises:
      InputError: fewer than two regimes, or one that is left with too few frames for its covariance.

    Source: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii, "k-means++" (2007).
    """
    if count < 2:
        raise InputError(f"a mixture has at least two regimes, got {count}")
    whole = linear.fit(x, ocean, min(CLUSTERED, rank), seed)
    amplitude = np.einsum("nyxc,ryxc->nr", x - np.asarray(whole.mean), np.asarray(whole.direction))
    _, label = kmeans2(amplitude, count, minit="++", rng=np.random.default_rng(seed))
    sizes = np.bincount(label, minlength=count)
    if sizes.min() <= rank + 1:
        raise InputError(
            f"{count} regimes of {len(x)} frames leave {sizes.min()} to one of them, too few for {rank} directions; "
            "ask for fewer of either"
        )
    each = [linear.fit(x[label == k], ocean, rank, seed) for k in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return Regimes(jnp.asarray(sizes / sizes.sum(), jnp.float32), stacked)
