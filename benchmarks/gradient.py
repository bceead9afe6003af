"""The gradient of a network with respect to its field, outside of a loop and inside, as samplers take it.

    python -m benchmarks.gradient --networks=tiny --batch=2 --out=gradient.json

`outside` is one call; `loop` is a call of several noise levels in one `lax.scan`, with the convolutions' gradient
written out (jax_repaint/nets/convolution.py); `library` is the same loop with the gradient that JAX derives. `forwards`
is the loop with a derivative along a field, J v, in the place of the gradient J^T v.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure
from jax_repaint import command
from jax_repaint.array_types import Array
from jax_repaint.nets import convolution
from jax_repaint.nets.unet import NETWORKS

GRID = (48, 96)
FORMS = ("outside", "loop", "library", "forwards")


def calls(name: str, batch: int, levels: int, forms: Sequence[str] = FORMS) -> dict[str, Callable[[], Array]]:
    """Compiled calls of some forms, which wait for their result."""
    config = NETWORKS[name]
    graphdef, params = measure.random_network(config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *GRID, config.inputs), np.float32))
    positions = jnp.linspace(10.0, 240.0, levels)

    def gradient(params: dict, x: Array, position: Array, fixed: bool = True) -> Array:
        network = nnx.merge(graphdef, params)
        network.set_attributes(fixed=fixed)
        out, pull = jax.vjp(lambda x: network(x, position[None]), x)
        return pull(out)[0]

    def derivative(params: dict, x: Array, position: Array) -> Array:
        network = nnx.merge(graphdef, params)
        with convolution.forwards():
            out, push = jax.linearize(lambda x: network(x, position[None]), x)
        return push(out)

    def looped(params: dict, x: Array, derived: Callable[..., Array]) -> Array:
        # Each level starts from the last one's result, as samplers do.
        def step(x: Array, position: Array) -> tuple[Array, None]:
            return x + 1e-3 * derived(params, x, position), None

        return jax.lax.scan(step, x, positions)[0]

    programs = {
        "outside": lambda params, x: gradient(params, x, positions[0]),
        "loop": lambda params, x: looped(params, x, gradient),
        "library": lambda params, x: looped(params, x, partial(gradient, fixed=False)),
        "forwards": lambda params, x: looped(params, x, derivative),
    }
    made = {form: measure.compiled(programs[form], params, x)[0] for form in forms}
    return {form: lambda run=run: run(params, x).block_until_ready() for form, run in made.items()}


def measure_gradients(networks: Sequence[str], batch: int, levels: int, rounds: int) -> dict:
    """Milliseconds of a gradient of one sample in each form, and their ratios to `outside`.

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
        each = {form: seconds[form] / batch / (1 if form == "outside" else levels) for form in FORMS}
        rows += [
            {
                "network": name,
                "form": form,
                "ms": measure.spread(1e3 * each[form]),
                "over_outside": measure.spread(each[form] / each["outside"]),
            }
            for form in FORMS
        ]
    return {"machine": measure.machine(), "dtype": "float32", "batch": batch, "levels": levels, "rows": rows}


def report(results: dict) -> str:
    """The results as a table."""
    rows = [[r["network"], r["form"], measure.text(r["ms"]), measure.text(r["over_outside"])] for r in results["rows"]]
    head = ["network", "form", "ms a gradient", "over outside"]
    return "\n".join(
        [
            measure.banner(results),
            f"grid {GRID[0]} x {GRID[1]}, {results['batch']} samples a call, {results['levels']} levels in a loop",
            measure.table(head, rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    measure.run_loops(measure_gradients, report)


if __name__ == "__main__":
    measure.define_loop_flags("tiny", batch=2)
    command.run(main)
