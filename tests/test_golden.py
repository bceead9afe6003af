"""The RePaint family against outputs of the original PyTorch system with its noise held fixed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint.sample import Known, Repaint, method, repaint, repaint_stages
from jax_repaint.schedule import Schedule

CASES = [
    "repaint-zero-r1",
    "gp_init-zero-t75-r5",
    "adaptive-zero-t75-r5-f0.2-g3.0-a0",
    "guided-zero-t75-r5-f0.2-s0.001",
    "x0blend-zero-t75-r5-f0.2",
    "repaint-pattern-r1",
    "gp_init-pattern-t50-r2",
    "adaptive-pattern-t50-r5-f0.3-g1.0-a0",
    "adaptive-pattern-t75-r2-f0.2-g0.5-a1",
    "guided-pattern-t50-r2-f0.2-s0.01",
    "x0blend-pattern-t50-r2-f0.3",
]
STAGES = ["multistage-zero-stage1", "multistage-zero-stage2", "multistage-zero-stage3"]


def last(array):
    return jnp.asarray(np.moveaxis(array, 0, -1), jnp.float32)


@pytest.fixture
def golden(shared):
    with np.load(shared / "golden" / "samplers.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def schedule(golden):
    schedule = Schedule.linear()
    np.testing.assert_allclose(schedule.beta, golden["betas"], rtol=1e-5)
    np.testing.assert_allclose(schedule.alpha_bar, golden["alpha_bars"], rtol=1e-5)
    return schedule


@pytest.fixture
def known(golden):
    missing = jnp.asarray(golden["missing"])[..., None]
    return Known(last(golden["observed"]), missing, last(golden["prior_mean"]), last(golden["prior_var"]))


def analytic_network(schedule):
    """The network of the reference outputs, as a denoiser."""

    def denoiser(x, sigma):
        x = x / jnp.sqrt(1 + sigma**2)
        eps = 0.6 * jnp.tanh(x) + 0.25 * jnp.roll(x, 1, axis=1)
        eps = eps - 0.1 * (jnp.round(schedule.step_of(sigma)) / 250) * jnp.roll(x, 1, axis=0)
        eps = eps + 0.1 * jnp.flip(x, axis=-1)
        return jnp.sqrt(1 + sigma**2) * x - sigma * eps

    return denoiser


def noise_source(golden, kind):
    pattern = last(golden["pattern"])

    def draw(key, shape, dtype):
        assert shape == pattern.shape
        return jnp.zeros(shape, dtype) if kind == "zero" else pattern.astype(dtype)

    return draw


def hyperparameters(meta):
    if meta["method"] == "repaint":
        return Repaint.create(249, start="noise", resample_steps=meta["resample_steps"])
    floor = meta.get("noise_floor", 1.0)
    adaptive = {"noise_floor": floor, "gamma": meta["gamma"]} if meta["method"] == "adaptive" else {}
    return Repaint.create(
        meta["t_start"],
        resample_steps=meta["resample_steps"],
        anneal=meta.get("anneal_floor", False),
        blend=1.0 if meta["method"] == "x0_blend" else 0.0,
        guidance_scale=meta.get("guidance_scale", 0.0),
        confidence_floor=floor,
        **adaptive,
    )


def close(ours, golden_field):
    theirs = np.moveaxis(golden_field, 0, -1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_family_equals_reference(golden, schedule, known, case):
    meta = json.loads(str(golden[f"meta/{case}"]))
    draw = noise_source(golden, meta["noise"])
    run = jax.jit(lambda key: repaint(key, analytic_network(schedule), known, schedule, hyperparameters(meta), draw))
    outcome = run(jax.random.key(0))
    assert outcome.failed == -1
    close(outcome.x, golden[f"out/{case}"])


def test_every_reference_case_is_here(golden):
    cases = [name.removeprefix("out/") for name in golden if name.startswith("out/")]
    assert sorted(cases) == sorted(CASES + STAGES)


def test_chained_stages_equal_reference(golden, schedule, known):
    metas = [json.loads(str(golden[f"meta/{case}"])) for case in STAGES]
    (decay,) = {meta["var_decay"] for meta in metas}
    stages = method("multistage", stages=3)
    for stage, meta in zip(stages, metas, strict=True):
        later = meta["stage"] > 1
        numbers = [meta["t_start"][later], meta["noise_floor"][later], meta["gamma"], meta["resample_steps"]]
        np.testing.assert_allclose([stage.t_start, stage.noise_floor, stage.gamma, stage.resample_steps], numbers)
    draw = noise_source(golden, "zero")
    out = repaint_stages(jax.random.key(0), analytic_network(schedule), known, schedule, stages, decay, draw)
    for case, x in zip(STAGES, out.x, strict=True):
        close(x, golden[f"out/{case}"])
