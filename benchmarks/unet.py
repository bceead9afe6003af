"""Speed of the networks: forward pass and training step, beside a matrix product and PyTorch in the same run.

    python -m benchmarks.unet --networks=small,standard_attn --batch=1,16 --out=unet.json

A training step is loss, gradient and AdamW. FLOP are 2 per multiply-add of convolutions, linear maps and attention,
counted in the traced program: a transposed convolution without the zeros it inserts, zero padding at the edges
included. `share` is the rate of the network over that of a matrix product of the same dtype in the same round. PyTorch
runs eagerly, in three forms: `plain` is float32, channels first, and one sample a call in the forward pass;
`channels_last` is float32 in batches; `bfloat16` adds autocast to that.
"""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import measure
from jax_repaint import command
from jax_repaint.array_types import Array
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.nets.unet import NETWORKS, UNetConfig

GRID = (48, 96)
PASSES = ("forward", "train")
TORCH_FORMS = ("plain", "channels_last", "bfloat16")
OPTIMIZER = optax.adamw(1e-4)


def flop(function: Callable, *args: object) -> float:
    """2 x multiply-adds of all convolutions and matrix products in the trace of `function`."""

    def of(jaxpr) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            shapes = [v.aval.shape for v in equation.invars[:2]]
            out = equation.outvars[0].aval.size if equation.outvars else 0
            p = equation.params
            if equation.primitive.name == "conv_general_dilated":
                _, inputs, *window = (shapes[1][k] for k in p["dimension_numbers"].rhs_spec)
                # Three of four products of a transposed convolution are with inserted zeros.
                total += 2 * out * inputs * np.prod(window) / np.prod(p["lhs_dilation"])
            elif equation.primitive.name == "dot_general":
                contracted = p["dimension_numbers"][0][0]
                total += 2 * out * np.prod([shapes[0][k] for k in contracted])
            else:
                inner = [leaf for leaf in jax.tree.leaves(list(p.values())) if hasattr(leaf, "eqns")]
                # Of branches one runs.
                each = [of(j) for j in inner]
                total += p.get("length", 1) * (max(each) if equation.primitive.name == "cond" else sum(each))
        return total

    return float(of(jax.make_jaxpr(function)(*args)))


def _train(graphdef, params: dict, state: optax.OptState, x: Array, t: Array, y: Array, key: Array):
    def loss(params: dict) -> Array:
        return jnp.mean((unet.apply(graphdef, params, x, t, key) - y) ** 2)

    # optax itself mixes whole and real numbers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def gflop(config: UNetConfig) -> dict[str, float]:
    """GFLOP a sample of both passes, of the float32 program: fused attention would hide its products."""
    graphdef, params = unet.structure(dataclasses.replace(config, dtype="float32", attention_implementation="xla"))
    x = jax.ShapeDtypeStruct((1, *GRID, config.inputs), jnp.float32)
    y = jax.ShapeDtypeStruct((1, *GRID, config.outputs), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    state = jax.eval_shape(OPTIMIZER.init, params)
    return {
        "forward": flop(lambda *a: unet.apply(graphdef, *a), params, x, t) / 1e9,
        "train": flop(lambda *a: _train(graphdef, *a, jax.random.key(0)), params, state, x, t, y) / 1e9,
    }


def _inputs(config: UNetConfig, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, *GRID, config.inputs), np.float32)
    y = random.standard_normal((batch, *GRID, config.outputs), np.float32)
    return x, random.integers(0, 250, batch), y


def _jax_calls(config: UNetConfig, batch: int) -> tuple[dict[str, Callable], dict[str, float]]:
    """Both passes as calls that wait for their result, and the seconds that each took to compile."""
    graphdef, params = measure.random_network(config)
    x, t, y = _inputs(config, batch)
    x, t, y, key = jnp.asarray(x), jnp.asarray(t, jnp.float32), jnp.asarray(y), jax.random.key(0)
    forward, forward_s = measure.compiled(lambda *a: unet.apply(graphdef, *a), params, x, t)
    # A copy, because the step consumes the state it is given.
    state = jax.tree.map(jnp.copy, params), OPTIMIZER.init(params)
    step, step_s = measure.compiled(lambda p, s, *a: _train(graphdef, p, s, *a), *state, x, t, y, key, donate=(0, 1))

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(step(*state, x, t, y, key))

    calls = {"forward": lambda: forward(params, x, t).block_until_ready(), "train": train}
    return calls, {"forward": forward_s, "train": step_s}


def _torch_calls(config: UNetConfig, batch: int) -> tuple[dict[str, Callable], int]:
    """Calls named pass/form that wait for their result, and the number of parameters."""
    import torch

    from benchmarks.torch_unet import TorchUNet

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    arrays = _inputs(config, batch)
    t = torch.from_numpy(arrays[1]).to(device)
    network = TorchUNet(config).to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def calls_of(form: str) -> tuple[Callable, Callable]:
        layout = torch.contiguous_format if form == "plain" else torch.channels_last
        x, y = (
            torch.from_numpy(a).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout) for a in arrays[::2]
        )
        model = copy.deepcopy(network).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=form != "plain")
        cast = torch.autocast(device, dtype=torch.bfloat16, enabled=form == "bfloat16")
        asked = 1 if form == "plain" else batch

        def forward() -> None:
            model.eval()
            with torch.inference_mode(), cast:
                model(x[:asked], t[:asked])
            wait()

        def train() -> None:
            model.train()
            optimizer.zero_grad()
            with cast:
                loss = torch.nn.functional.mse_loss(model(x, t).float(), y)
            loss.backward()
            optimizer.step()
            wait()

        return forward, train

    calls = {f"{name}/{form}": call for form in TORCH_FORMS for name, call in zip(PASSES, calls_of(form), strict=True)}
    return calls, network.count()


def measure_networks(
    networks: Sequence[str], batches: Sequence[int], dtype: str, rounds: int, at_least: float, matrix: int
) -> dict:
    """Times of all networks at all batch sizes.

    Args:
      networks: names in NETWORKS.
      batches: samples a call.
      dtype: of ours and of the matrix product.
      rounds, at_least: see `measure.interleaved`.
      matrix: size of the matrix product.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    product, product_gflop = measure.matrix_product(matrix, dtype)
    rows = []
    for name in networks:
        config = dataclasses.replace(NETWORKS[name], dtype=dtype)
        work, parameters = gflop(config), unet.count(unet.structure(config)[1])
        for batch in batches:
            calls, compile_s = _jax_calls(config, batch)
            if has_torch:
                torch_calls, torch_parameters = _torch_calls(config, batch)
                assert torch_parameters == parameters, f"{name}: {torch_parameters} in PyTorch, {parameters} here"
                calls |= torch_calls
            calls["product"] = product
            for call in calls.values():
                call()
            seconds = measure.interleaved(calls, rounds, at_least)
            for what in PASSES:
                samples = {form: 1 if (what, form) == ("forward", "plain") else batch for form in TORCH_FORMS}
                each = seconds[what] / batch
                theirs = {f: seconds[f"{what}/{f}"] / samples[f] for f in TORCH_FORMS} if has_torch else {}
                rate = work[what] / each
                rows.append(
                    {
                        "network": name,
                        "batch": batch,
                        "pass": what,
                        "parameters": parameters,
                        "torch_parameters": torch_parameters if has_torch else None,
                        "gflop": work[what],
                        "ms": measure.spread(1e3 * each),
                        "gflop_per_s": measure.spread(rate),
                        "share": measure.spread(rate / (product_gflop / seconds["product"])),
                        "compile_s": compile_s[what],
                        "torch_ms": {f: measure.spread(1e3 * s) for f, s in theirs.items()},
                        "torch_over_jax": {f: measure.spread(s / each) for f, s in theirs.items()},
                    }
                )
    seconds = measure.interleaved({"product": product}, rounds, at_least)["product"]
    return {
        "machine": measure.machine(),
        "dtype": dtype,
        "grid": GRID,
        "rounds": rounds,
        "matrix_product": {"size": matrix, "gflop_per_s": measure.spread(product_gflop / seconds)},
        "rows": rows,
    }


def report(results: dict) -> str:
    """The results as a table; times are ms a sample, PyTorch's with their ratio to ours in brackets."""
    head = ["network", "batch", "pass", "parameters", "GFLOP", "ms a sample", "GFLOP/s", "share", "compile s"]
    head += [f"torch {form}" for form in TORCH_FORMS]
    rows = []
    for r in results["rows"]:
        theirs = [
            f"{r['torch_ms'][f]['median']:.3g} [{r['torch_over_jax'][f]['median']:.2f}]" if r["torch_ms"] else "-"
            for f in TORCH_FORMS
        ]
        rows.append(
            [
                r["network"], str(r["batch"]), r["pass"], f"{r['parameters']:,}", f"{r['gflop']:.2f}",
                measure.text(r["ms"]), f"{r['gflop_per_s']['median']:.0f}", measure.text(r["share"], 2),
                f"{r['compile_s']:.1f}", *theirs,
            ]
        )  # fmt: skip
    product = results["matrix_product"]
    return "\n".join(
        [
            measure.banner(results),
            f"grid {GRID[0]} x {GRID[1]}; matrix product of size {product['size']}: "
            f"{measure.text(product['gflop_per_s'])} GFLOP/s; median (min..max) of {results['rounds']} rounds; "
            "in brackets PyTorch's time over ours",
            measure.table(head, rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    networks, batches = f.networks, measure.whole_numbers("batch", f.batch)
    unknown = [n for n in networks if n not in NETWORKS]
    if unknown:
        raise InputError(f"network {unknown[0]!r} is not one of {', '.join(NETWORKS)}")
    dtype = f.dtype or measure.compute_dtype()
    matrix = measure.matrix_size()
    if f.smoke:
        networks, batches, rounds, at_least, matrix = ["small"], [2], 2, 0.0, 512
    else:
        rounds, at_least = f.rounds, 0.2
    results = measure_networks(networks, batches, dtype, rounds, at_least, matrix)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_list("networks", list(NETWORKS), "Networks to measure.")
    flags.DEFINE_list("batch", ["1", "16"], "Samples a call.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of ours; bfloat16 by default, float32 on a CPU.")
    flags.DEFINE_integer("rounds", 7, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "Network small, batch 2, two rounds, whatever else is asked.")
    command.run(main)
