"""What the Gaussian denoiser that a network is anchored on costs beside it, in a loop over noise levels.

    python -m benchmarks.anchor --networks=micro_attn --batch=16 --out=anchor.json

`network` is the bare network, `anchored` the denoiser built on it and on a Gaussian of rank 256 (denoise.py), whose
directions are multiplied as a matrix; `axes` is the same with the directions multiplied as arrays (r, y, x, c).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from benchmarks import measure
from jax_repaint import command
from jax_repaint.array_types import Array, Field, Float
from jax_repaint.denoise import AnchoredDenoiser, PrincipalGaussian
from jax_repaint.nets import unet
from jax_repaint.nets.unet import NETWORKS

GRID = (48, 96)
FORMS = ("network", "anchored", "axes")


@struct.dataclass
class ByAxes(PrincipalGaussian):
    """The Gaussian with its products over several axes."""

    def project(self, field: Field) -> Float[Array, " r"]:
        """<e_i, field>."""
        return jnp.einsum("ryxc,yxc->r", self.direction, field, precision=jax.lax.Precision.HIGHEST)

    def combine(self, amplitude: Float[Array, " r"]) -> Field:
        """sum_i a_i e_i."""
        return jnp.einsum("r,ryxc->yxc", amplitude, self.direction, precision=jax.lax.Precision.HIGHEST)


def calls(name: str, batch: int, levels: int) -> dict[str, Callable[[], Array]]:
    """Compiled calls of each form, which wait for their result."""
    graphdef, params = measure.random_network(unet.UNetConfig(**{**vars(NETWORKS[name]), "inputs": 4}))
    gaussian = measure.gaussian(GRID)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *GRID, 2)), jnp.float32)
    sigmas = jnp.geomspace(10.0, 0.1, levels)

    def network(x: Field, sigma: Array) -> Field:
        return unet.apply(graphdef, params, jnp.concatenate([x, x], -1)[None], sigma[None])[0]

    def looped(x: Array, denoiser: Callable[[Field, Array], Field] | None) -> Array:
        one = denoiser or network

        # Each level starts from the last one's result, as samplers do.
        def step(x: Array, sigma: Array) -> tuple[Array, None]:
            return 0.9 * x + 0.1 * jax.vmap(lambda x: one(x, sigma))(x), None

        return jax.lax.scan(step, x, sigmas)[0]

    denoisers = {
        "network": None,
        "anchored": AnchoredDenoiser(params, gaussian, graphdef),
        "axes": AnchoredDenoiser(params, ByAxes(**vars(gaussian)), graphdef),
    }
    made = {form: measure.compiled(looped, x, denoisers[form])[0] for form in FORMS}
    return {form: lambda form=form: made[form](x, denoisers[form]).block_until_ready() for form in FORMS}


def measure_anchors(networks: Sequence[str], batch: int, levels: int, rounds: int) -> dict:
    """Milliseconds of a call for one sample in each form, and their ratios to `network`.

    Args:
      networks: names in NETWORKS.
      batch: samples a call.
      levels: of a loop.
      rounds: see `measure.interleaved`.
    """
    rows = []
    for name in networks:
        forms = calls(name, batch, levels)
        for call in forms.values():
            call()
        seconds = measure.interleaved(forms, rounds)
        rows += [
            {
                "network": name,
                "form": form,
                "ms": measure.spread(1e3 * seconds[form] / batch / levels),
                "over_network": measure.spread(seconds[form] / seconds["network"]),
            }
            for form in FORMS
        ]
    return {"machine": measure.machine(), "dtype": "float32", "batch": batch, "levels": levels, "rows": rows}


def report(results: dict) -> str:
    """The results as a table."""
    rows = [[r["network"], r["form"], measure.text(r["ms"]), measure.text(r["over_network"])] for r in results["rows"]]
    return "\n".join(
        [
            measure.banner(results),
            f"grid {GRID[0]} x {GRID[1]}, {results['batch']} samples a call, {results['levels']} levels in a loop",
            measure.table(["network", "form", "ms a call", "over network"], rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    measure.run_loops(measure_anchors, report)


if __name__ == "__main__":
    measure.define_loop_flags("micro_attn", batch=16)
    command.run(main)
