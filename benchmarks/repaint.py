"""Speed of the sampling loop: seconds a sample, batched against single, one scan against a loop in Python.

    python -m benchmarks.repaint --network=small --batch=1,16 --out=repaint.json

The run is method "adaptive" (t 75, 5 resamples: 376 network calls) with random weights; a batch holds members of one
frame. `scan` is the package's own sampler, one program; `steps` is the same update as one compiled step called from
Python; `eager` compiles only the network and leaves the update around it to single operations. All three
are fed the same keys and must return the same field.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measure
from jax_repaint import command, transition
from jax_repaint.array_types import Array, Field, Key
from jax_repaint.denoise import Denoiser, EpsDenoiser
from jax_repaint.errors import InputError
from jax_repaint.nets.unet import NETWORKS
from jax_repaint.sample import Known, Repaint, doubt, method, noise_weight, repaint
from jax_repaint.schedule import Schedule

GRID = (48, 96)
FORMS = ("scan", "steps", "eager")


def frame(seed: int = 0, grid: tuple[int, int] = GRID) -> Known:
    """A made-up frame: a tenth of the cells observed, a rough prior for the rest."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (*grid, 2)
    missing = jax.random.uniform(keys[0], (*grid, 1)) > 0.1
    value = jnp.where(missing, 0.0, jax.random.normal(keys[1], shape))
    return Known(value, missing, jnp.zeros(shape), jax.random.uniform(keys[2], shape))


def _noise(key: Key, number: int | Array, purpose: int, known: Known) -> Field:
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, number), purpose), known.value.shape)


def _weight(known: Known, stage: Repaint) -> Field:
    return noise_weight(doubt(known.prior_variance, known.missing), known.missing, stage.noise_floor, stage.gamma)


def first(key: Key, known: Known, schedule: Schedule, stage: Repaint) -> Field:
    """x_t at t_start: prior mean and observations, diffused."""
    start = jnp.where(known.missing, known.prior_mean, known.value)
    n = _noise(key, stage.calls, 3, known)
    return transition.diffuse(start, _weight(known, stage) * n, schedule.alpha_bar[stage.t_start])


def step(
    x_t: Field, key: Key, t: Array, number: Array, again: Array,
    denoiser: Denoiser, known: Known, schedule: Schedule, stage: Repaint,
) -> Field:  # fmt: skip
    """One step of `sample.repaint` without blend and guidance, with the same noise."""
    x0 = denoiser(x_t / jnp.sqrt(schedule.alpha_bar[t]), schedule.sigma[t])
    mu = transition.ancestral_mean(x_t, x0, schedule.beta[t], schedule.alpha_bar[t], schedule.alpha_bar_prev[t])
    w = _weight(known, stage)
    x_s = mu + w * jnp.sqrt(schedule.posterior_variance[t]) * _noise(key, number, 0, known)
    pasted = transition.diffuse(known.value, _noise(key, number, 1, known), schedule.alpha_bar_prev[t])
    x_s = jnp.where(known.missing, x_s, pasted)
    return jnp.where(again, transition.renoise(x_s, w * _noise(key, number, 2, known), schedule.beta[t]), x_s)


def _calls(
    members: int, denoiser: EpsDenoiser, known: Known, schedule: Schedule, stage: Repaint
) -> tuple[dict[str, Callable[[], Array]], dict[str, float]]:
    """The three forms for a number of members, and the seconds that compiling took."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(members))
    fixed = denoiser, known, schedule, stage
    passes = [(t, r) for t in range(stage.t_start, 0, -1) for r in range(stage.resample_steps)]
    steps = [(t, i, r < stage.resample_steps - 1) for i, (t, r) in enumerate(passes)] + [(0, len(passes), False)]
    # On the device beforehand, as they are in the scan.
    steps = [(jnp.asarray(t), jnp.asarray(i), jnp.asarray(again)) for t, i, again in steps]

    def all_members(denoiser: Denoiser, known: Known, schedule: Schedule, stage: Repaint) -> Callable[..., Array]:
        def one(x: Field, key: Key, *now: Array) -> Field:
            return step(x, key, *now, denoiser, known, schedule, stage)

        return jax.vmap(one, in_axes=(0, 0, None, None, None))

    start = jax.jit(jax.vmap(lambda key: first(key, known, schedule, stage)))
    sampler, sampler_s = measure.compiled(lambda keys, *a: jax.vmap(lambda key: repaint(key, *a).x)(keys), keys, *fixed)
    advance, advance_s = measure.compiled(
        lambda x, keys, now, a: all_members(*a)(x, keys, *now), start(keys), keys, steps[0], fixed
    )
    network = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
    eager = all_members(lambda x, sigma: network(denoiser, x, sigma), known, schedule, stage)

    def loop(advance: Callable[..., Array]) -> Array:
        x = start(keys)
        for now in steps:
            x = advance(x, now)
        return x.block_until_ready()

    calls = {
        "scan": lambda: sampler(keys, *fixed).block_until_ready(),
        "steps": lambda: loop(lambda x, now: advance(x, keys, now, fixed)),
        "eager": lambda: loop(lambda x, now: eager(x, keys, *now)),
    }
    return calls, {"scan": sampler_s, "steps": advance_s}


def measure_sampler(network: str, batches: Sequence[int], stage: Repaint, dtype: str, rounds: int) -> dict:
    """Seconds a sample for all batch sizes and forms, and the ratios between them.

    Args:
      network: name in NETWORKS.
      batches: members a call.
      stage: without blend and guidance.
      dtype: of the network.
      rounds: interleaved rounds, after one that only warms up and compares the forms.
    """
    graphdef, params = measure.random_network(dataclasses.replace(NETWORKS[network], dtype=dtype))
    schedule = Schedule.linear()
    known = frame()
    denoiser = EpsDenoiser(params, schedule, graphdef)
    calls, compile_s, difference = {}, {}, {}
    for batch in batches:
        forms, compile_s[batch] = _calls(batch, denoiser, known, schedule, stage)
        results = {form: np.asarray(call()) for form, call in forms.items()}
        difference[batch] = max(
            float(np.abs(x - results["scan"]).max() / np.abs(results["scan"]).max()) for x in results.values()
        )
        calls |= {(batch, form): call for form, call in forms.items()}
    seconds = measure.interleaved(calls, rounds)
    each = {key: s / key[0] for key, s in seconds.items()}
    rows = [
        {
            "batch": batch,
            "form": form,
            "seconds_a_sample": measure.spread(each[batch, form]),
            "over_scan": measure.spread(each[batch, form] / each[batch, "scan"]),
            "single_over_batch": measure.spread(each[batches[0], form] / each[batch, form]),
            "compile_s": compile_s[batch].get(form),
            "difference": difference[batch],
        }
        for batch in batches
        for form in FORMS
    ]
    return {
        "machine": measure.machine(),
        "network": network,
        "dtype": dtype,
        "grid": GRID,
        "t_start": stage.t_start,
        "resample_steps": stage.resample_steps,
        "network_calls": stage.calls,
        "rounds": rounds,
        "rows": rows,
    }


def report(results: dict) -> str:
    """The results as a table."""
    first = results["rows"][0]["batch"]
    head = ["batch", "form", "time over scan", f"speed-up over batch {first}", "s a sample", "compile s", "difference"]
    rows = [
        [
            str(r["batch"]), r["form"], measure.text(r["over_scan"]), measure.text(r["single_over_batch"]),
            measure.text(r["seconds_a_sample"]), f"{r['compile_s']:.1f}" if r["compile_s"] else "-",
            f"{r['difference']:.0e}",
        ]
        for r in results["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            measure.banner(results),
            f"{results['network']}, grid {GRID[0]} x {GRID[1]}, t_start {results['t_start']}, "
            f"{results['resample_steps']} resamples: {results['network_calls']} network calls a sample; "
            f"median (min..max) of {results['rounds']} rounds",
            measure.table(head, rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    batches, rounds = measure.whole_numbers("batch", f.batch), f.rounds
    changes = {"t_start": f.t_start, "resample_steps": f.resample_steps}
    if f.network not in NETWORKS:
        raise InputError(f"network {f.network!r} is not one of {', '.join(NETWORKS)}")
    if f.smoke:
        batches, rounds, changes = [1, 2], 2, {"t_start": 2, "resample_steps": 2}
    (stage,) = method("adaptive", **changes)
    results = measure_sampler(f.network, batches, stage, f.dtype or measure.compute_dtype(), rounds)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_string("network", "small", "Network to sample with.")
    flags.DEFINE_list("batch", ["1", "16"], "Members a call; the first is what the others are compared with.")
    flags.DEFINE_integer("t_start", 75, "First step.")
    flags.DEFINE_integer("resample_steps", 5, "Passes over each step.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the network; bfloat16 by default, float32 on a CPU.")
    flags.DEFINE_integer("rounds", 3, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "t_start 2, 2 resamples, batch 1 and 2, two rounds, whatever else is asked.")
    command.run(main)
