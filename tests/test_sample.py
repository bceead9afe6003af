"""The RePaint family: methods by name, noise weights, failures, and what resampling gains with an exact denoiser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import guide, observe
from jax_repaint.errors import InputError
from jax_repaint.prior import linear
from jax_repaint.sample import (
    METHODS,
    Failure,
    Known,
    Repaint,
    doubt,
    first_failure,
    method,
    noise_weight,
    repaint,
    repaint_stages,
    static_part,
)
from jax_repaint.schedule import Schedule

SHAPE = (6, 8)
SCHEDULE = Schedule.linear(20, 1e-3, 0.2)


@pytest.fixture
def known():
    """Every fourth cell is observed; the prior variance has a range of 1e-5."""
    rng = np.random.default_rng(0)
    missing = np.indices(SHAPE).sum(0)[..., None] % 4 > 0
    field = (*SHAPE, 2)
    value = np.where(missing, 0, rng.normal(size=field))
    variance = 1e-5 * rng.uniform(0, 0.9, field)
    variance[1, 1], variance[1, 2] = 0.2e-6, 9.2e-6
    assert missing[1, 1:3].all()
    arrays = (value, rng.normal(size=field), variance)
    value, mean, variance = (jnp.asarray(a, jnp.float32) for a in arrays)
    return Known(value, jnp.asarray(missing), mean, variance)


# --- methods ------------------------------------------------------------------------------------------------


def numbers(stage):
    names = ("noise_floor", "gamma", "anneal", "blend", "guidance_scale")
    return tuple(round(float(getattr(stage, name)), 6) for name in names)


@pytest.mark.parametrize(
    ("name", "t_start", "expected", "calls"),
    [
        ("plain", [249], (1, 1, 0, 0, 0), 1246),
        ("gp_init", [75], (1, 1, 0, 0, 0), 376),
        ("adaptive", [75], (0.2, 3, 0, 0, 0), 376),
        ("guided", [75], (1, 1, 0, 0, 1e-3), 376),
        ("x0_blend", [75], (1, 1, 0, 1, 0), 376),
        ("blend_adaptive", [75], (0.2, 3, 0, 1, 0), 376),
        ("anneal", [75], (0.2, 3, 1, 0, 0), 376),
        ("uniform", [75], (0.47, 1, 0, 0, 0), 376),
        ("two_stage", [75, 50], (0.2, 3, 0, 0, 0), 627),
        ("multistage", [75] + [50] * 5, (0.2, 3, 0, 0, 0), 1631),
    ],
)
def test_methods_are_those_of_the_notes(name, t_start, expected, calls):
    stages = method(name)
    assert [stage.t_start for stage in stages] == t_start
    assert numbers(stages[0]) == expected
    for stage in stages[1:]:
        assert numbers(stage) == (0.3, *expected[1:])
    assert all(stage.start == ("noise" if name == "plain" else "prior") for stage in stages)
    assert stages[0].guided == (name == "guided")
    assert sum(stage.calls for stage in stages) == calls


def test_every_method_is_tested():
    names = test_methods_are_those_of_the_notes.pytestmark[0].args[1]
    assert [name for name, *_ in names] == list(METHODS)


def test_settings_can_be_changed():
    assert [s.t_start for s in method("two_stage", t_refine=10)] == [75, 10]
    assert len(method("multistage", stages=10)) == 10
    assert len(method("multistage", stages=1)) == 1
    stages = method("multistage", noise_floor=0.1, refine_floor=0.4, gamma=2, resample_steps=3, normalise="prior")
    assert [round(float(s.noise_floor), 6) for s in stages] == [0.1] + [0.4] * 5
    assert {(float(s.gamma), s.resample_steps, s.normalise) for s in stages} == {(2.0, 3, "prior")}
    assert method("plain", 1000)[0].t_start == 999


def test_static_part_leaves_numbers_out():
    parts = [static_part(method("adaptive", gamma=gamma)) for gamma in (1, 5)]
    assert parts[0] == parts[1] == static_part(method("gp_init"))
    others = [method("adaptive", resample_steps=2), method("uniform"), method("guided"), method("two_stage")]
    assert len({parts[0], *map(static_part, others)}) == 5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("repaint", {}, "method 'repaint' is not one of plain, "),
        ("adaptive", {"stages": 3}, "method adaptive has no setting 'stages'"),
        ("gp_init", {"floor": 0.1}, "no setting 'floor'"),
        ("adaptive", {"t_start": 250}, r"t_start 250 is not a step of the schedule, which has steps 0\.\.249"),
        ("adaptive", {"t_start": -1}, "t_start -1 is not a step"),
        ("adaptive", {"t_start": 7.5}, "t_start must be a whole number, at least 0, got 7.5"),
        ("adaptive", {"t_start": "75"}, "t_start must be a number, got '75'"),
        ("two_stage", {"t_refine": None}, "t_start must be a number, got None"),
        ("multistage", {"stages": float("nan")}, "stages must be a whole number, at least 1, got nan"),
        ("multistage", {"stages": float("inf")}, "stages must be a whole number, at least 1, got inf"),
        ("multistage", {"stages": True}, "stages must be a whole number, at least 1, got True"),
        ("gp_init", {"resample_steps": float("nan")}, "resample_steps must be a whole number, at least 1, got nan"),
        ("gp_init", {"resample_steps": [2]}, "resample_steps must be a whole number"),
        ("anneal", {"anneal": 5.0}, "anneal must be 0 or 1, got 5.0"),
        ("anneal", {"anneal": "yes"}, "anneal must be 0 or 1, got 'yes'"),
        ("adaptive", {"gamma": "3"}, "gamma must be a number, got '3'"),
        ("adaptive", {"noise_floor": "0.2"}, "noise_floor must be a number, got '0.2'"),
        ("two_stage", {"t_refine": 250}, "t_start 250 is not a step"),
        ("multistage", {"stages": 0}, "stages must be a whole number, at least 1, got 0"),
        ("multistage", {"stages": 2.5}, "stages must be a whole number"),
        ("adaptive", {"gamma": 0}, "gamma must be positive, got 0"),
        ("adaptive", {"gamma": float("nan")}, "gamma must be positive"),
        ("adaptive", {"noise_floor": -0.1}, r"noise_floor must be in \[0, 1\], got -0.1"),
        ("multistage", {"refine_floor": 1.1}, r"noise_floor must be in \[0, 1\], got 1.1"),
        ("x0_blend", {"blend": 2}, r"blend must be in \[0, 1\]"),
        ("x0_blend", {"confidence_floor": float("nan")}, r"confidence_floor must be in \[0, 1\]"),
        ("guided", {"guidance_scale": -1}, "guidance_scale must be a number, not negative"),
        ("guided", {"guidance_scale": float("inf")}, "guidance_scale must be a number"),
        ("gp_init", {"resample_steps": 0}, "resample_steps must be a whole number, at least 1, got 0"),
        ("gp_init", {"start": "gp"}, "start must be prior or noise, got 'gp'"),
        ("gp_init", {"normalise": "max"}, "normalise must be minmax, prior or flat, got 'max'"),
    ],
)
def test_mistaken_methods_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        method(name, **changes)


def test_mistakes_are_refused_before_the_denoiser_is_called(known):
    def never(x, sigma):
        raise AssertionError

    def refused(known, *stages):
        repaint_stages(jax.random.key(0), never, known, SCHEDULE, stages)

    with pytest.raises(InputError, match="at least one stage"):
        refused(known)
    with pytest.raises(InputError, match=r"t_start 20 is not a step of the schedule, which has steps 0\.\.19"):
        refused(known, Repaint.create(5), Repaint.create(20))
    for name in ("missing", "prior_mean", "prior_variance"):
        narrow = known._replace(**{name: getattr(known, name)[:, 1:]})
        with pytest.raises(InputError, match=rf"{name} must be on the grid of the field, \(\.\.\., 6, 8, [12]\)"):
            refused(narrow, Repaint.create(5))
    with pytest.raises(InputError, match="missing must be True or False"):
        refused(known._replace(missing=known.missing.astype(jnp.float32)), Repaint.create(5))
    with pytest.raises(InputError, match="the values of a field are floating numbers, got int32"):
        refused(known._replace(value=known.value.astype(jnp.int32)), Repaint.create(5))


# --- noise weight -------------------------------------------------------------------------------------------


def revealing(x, sigma):
    """Says zero until the last step, and there returns the noisy field."""
    return jnp.where(jnp.abs(sigma / SCHEDULE.sigma[0] - 1) < 1e-4, x, 0.0)


@partial(jax.jit, static_argnames="denoiser")
def run(known, stages, var_decay=0.1, key=0, denoiser=revealing):
    """Every stage's output of one member."""
    return repaint_stages(jax.random.key(key), denoiser, known, SCHEDULE, stages, var_decay)


@jax.jit
def spread(known, stage, largest):
    """Standard deviation of 200 members."""
    keys = jax.random.split(jax.random.key(0), 200)
    return jax.vmap(lambda key: repaint(key, revealing, known, SCHEDULE, stage, largest_variance=largest).x)(keys).std(
        0
    )


def weights(known, stage, largest=0.0):
    """Noise weight of the missing cells, as the spread of the members relative to that of members of weight 1."""
    missing = np.asarray(known.missing)[..., 0]
    full = spread(known, stage.replace(noise_floor=jnp.ones_like(stage.noise_floor)), largest)
    return np.asarray(spread(known, stage, largest))[missing] / np.asarray(full)[missing]


def test_uniform_noise_has_one_weight(known):
    np.testing.assert_allclose(weights(known, *method("uniform", 20, t_start=5, noise_floor=0.3)), 0.3, rtol=1e-3)


@pytest.mark.parametrize(("normalise", "factor"), [("minmax", 1), ("minmax", 0.1), ("prior", 1), ("prior", 0.1)])
def test_noise_weight_is_the_formula(known, normalise, factor):
    (stage,) = method("adaptive", 20, t_start=5, normalise=normalise)
    missing = np.asarray(known.missing)[..., 0]
    v = np.asarray(known.prior_variance, float)[missing]
    v = (v - v.min()) / (v.max() - v.min()) if normalise == "minmax" else factor * v / v.max()
    scaled = known._replace(prior_variance=jnp.float32(factor) * known.prior_variance)
    largest = jnp.max(jnp.where(known.missing, known.prior_variance, 0.0))
    found = weights(scaled, stage, largest)
    np.testing.assert_allclose(found, 0.2 + 0.8 * v**3, rtol=2e-3)


def test_a_sure_cell_has_the_floor_for_any_gamma(known):
    sure, floor = jnp.zeros_like(known.prior_variance), jnp.float32(0.2)
    found = noise_weight(sure, known.missing, floor, jnp.float32(0.02))
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(known.missing)[..., 0]], floor)
    slope = jax.grad(lambda gamma: noise_weight(sure, known.missing, floor, gamma).sum())(jnp.float32(0.02))
    assert slope == 0


@pytest.mark.parametrize("min_beta", [1e-4, 1e-6])
def test_the_last_step_returns_the_estimate_itself(known, min_beta):
    """A denoiser that always gives the same field, whatever the schedule makes of 1 - alpha_bar_0 in float32."""
    field = known.prior_mean + 1.0
    schedule = Schedule.linear(20, min_beta, 0.2)
    (stage,) = method("gp_init", 20, t_start=5)
    found = repaint(jax.random.key(0), lambda x, sigma: field, known, schedule, stage).x
    np.testing.assert_array_equal(found, jnp.where(known.missing, field, known.value))


@pytest.mark.parametrize(("factor", "switch"), [(1, 8), (10, 9)])
def test_var_decay_does_nothing_until_it_switches_adaptive_noise_off(known, factor, switch):
    """The range of the variance, 9e-6 or 9e-5, falls below 1e-12 at stage 8 or 9 of decay .1."""
    known = known._replace(prior_variance=jnp.float32(factor) * known.prior_variance)
    stages = method("multistage", 20, t_start=5, t_refine=4, resample_steps=2, stages=10)
    decayed, constant = (run(known, stages, decay).x for decay in (0.1, 1.0))
    np.testing.assert_allclose(decayed[: switch - 1], constant[: switch - 1], atol=1e-5)
    assert np.abs(decayed[switch - 1] - constant[switch - 1]).max() > 0.01
    # From there on it is gp_init: noise of weight 1.
    plain = (*stages[: switch - 1], *(s.replace(noise_floor=jnp.float32(1)) for s in stages[switch - 1 :]))
    np.testing.assert_allclose(decayed, run(known, plain, 1.0).x, atol=1e-5)
    v = jnp.float32(0.1 ** (switch - 1)) * known.prior_variance
    assert (doubt(v, known.missing) == 1).all()
    assert (noise_weight(doubt(v, known.missing), known.missing, 0.2, 3.0) == 1).all()


def test_var_decay_acts_under_normalise_prior(known):
    settings = {"t_start": 5, "t_refine": 4, "resample_steps": 2, "stages": 4, "normalise": "prior", "gamma": 1.0}
    stages = method("multistage", 20, **settings)
    decayed, constant = (run(known, stages, decay).x for decay in (1e-3, 1.0))
    np.testing.assert_array_equal(decayed[0], constant[0])
    assert (np.abs(decayed - constant)[1:].max((1, 2, 3)) > 0.01).all()
    # What is left of the doubt at stage 4, 1e-9, is below rounding: noise of one weight, the floor.
    flat = (*stages[:-1], *method("uniform", 20, t_start=4, resample_steps=2, noise_floor=0.3))
    np.testing.assert_allclose(decayed, run(known, flat, 1e-3).x, atol=1e-5)


def test_the_doubt_is_relative_to_missing_cells_alone(known):
    """Whatever variance observed cells have."""
    settings = {"t_start": 5, "t_refine": 4, "resample_steps": 2, "normalise": "prior"}
    stages = method("two_stage", 20, **settings)
    other = known._replace(prior_variance=jnp.where(known.missing, known.prior_variance, 1.0))
    np.testing.assert_array_equal(run(other, stages).x, run(known, stages).x)


def by_the_formulas(key, mixing, known, stage, t_start, passes, from_noise):
    """The head of sample.py in NumPy, for D(x; sigma) = mixing x / (1 + sigma^2) and its gradient by hand."""
    y, missing, prior, variance = (np.asarray(part, bool if part.dtype == bool else float) for part in known)
    beta = np.linspace(1e-3, 0.2, 20)
    alpha_bar = np.cumprod(1 - beta)
    low, high = (end(variance[missing[..., 0]]) for end in (np.min, np.max))
    unsure = np.clip((variance - low) / (high - low), 0, 1)
    trust = np.where(missing, (1 - stage["confidence_floor"]) * (1 - unsure), 0)

    def noise(number, purpose):
        made = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, number), purpose), y.shape)
        return np.asarray(made, float)

    def weight(t):
        floor = stage["noise_floor"] + (1 - stage["noise_floor"]) * (1 - t / t_start)
        return np.where(missing, floor + (1 - floor) * unsure ** stage["gamma"], 1)

    steps = [t for t in range(t_start, 0, -1) for _ in range(passes)] + [0]
    x = noise(len(steps), 3)
    if not from_noise:
        scale = np.sqrt(alpha_bar[t_start]), np.sqrt(1 - alpha_bar[t_start])
        x = scale[0] * np.where(missing, prior, y) + scale[1] * weight(t_start) * x
    for number, t in enumerate(steps):
        at, before = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        gain = mixing / (1 + (1 - at) / at) / np.sqrt(at)
        x0 = (gain @ x.ravel()).reshape(y.shape)
        slope = 2 * (gain.T @ (trust**2 * (x0 - prior)).ravel()).reshape(y.shape)
        x0 = x0 + stage["blend"] * trust * (prior - x0)
        # Of the product of N(x; sqrt(alpha) x_s, beta) and N(x_s; sqrt(before) x0, 1 - before).
        spread = 1 / ((1 - beta[t]) / beta[t] + 1 / (1 - before)) if t else 0.0
        mean = spread * (np.sqrt(1 - beta[t]) / beta[t] * x + np.sqrt(before) / (1 - before) * x0) if t else x0
        mean = mean - stage["guidance_scale"] * slope * (t > 0)
        below = np.where(
            missing,
            mean + weight(t) * np.sqrt(spread) * noise(number, 0),
            np.sqrt(before) * y + np.sqrt(1 - before) * noise(number, 1),
        )
        back = np.sqrt(1 - beta[t]) * below + np.sqrt(beta[t]) * weight(t) * noise(number, 2)
        x = back if t and steps[number + 1] == t else below
    return x


@pytest.mark.parametrize("start", ["prior", "noise"])
@pytest.mark.parametrize("guidance_scale", [0.0, 0.3])
def test_the_loop_is_the_formulas(known, start, guidance_scale):
    cells = 2 * SHAPE[0] * SHAPE[1]
    mixing = np.eye(cells) + 0.3 * np.random.default_rng(1).normal(size=(cells, cells)) / np.sqrt(cells)
    numbers = {
        "noise_floor": 0.3, "gamma": 2.0, "blend": 0.4, "guidance_scale": guidance_scale, "confidence_floor": 0.1,
    }  # fmt: skip

    def denoiser(x, sigma):
        return (jnp.asarray(mixing, jnp.float32) @ x.ravel()).reshape(x.shape) / (1 + sigma**2)

    stage, key = Repaint.create(12, anneal=True, resample_steps=3, start=start, **numbers), jax.random.key(5)
    found = jax.jit(repaint, static_argnums=1)(key, denoiser, known, SCHEDULE, stage)
    expected = by_the_formulas(key, mixing, known, numbers, 12, 3, start == "noise")
    np.testing.assert_allclose(found.x, expected, atol=1e-4)
    assert np.abs(expected).max() < 10


def test_annealing_ends_at_full_noise(known):
    """With floor 0 and no doubt the first steps have no noise at all, the last ones nearly all."""
    (stage,) = method("anneal", 20, t_start=10, noise_floor=0.0, normalise="flat", resample_steps=1)
    found = weights(known, stage)
    # The noise of t = 1, weight 1 - 1/10, is the last that is added.
    kept = run(known, [stage.replace(anneal=jnp.float32(0))]).x[0]
    again = run(known, [stage.replace(anneal=jnp.float32(0))], key=1).x[0]
    missing = np.asarray(known.missing)[..., 0]
    np.testing.assert_array_equal(kept[missing], again[missing])
    assert (found > 0.75).all()
    assert (found < 0.95).all()


# --- stages and failures ------------------------------------------------------------------------------------


def test_blend_adaptive_is_both(known):
    """Where the prior is fully trusted x0 is its mean, whatever the network says; the noise is that of adaptive."""
    sure = known._replace(prior_variance=jnp.zeros_like(known.prior_variance).at[1, 1, 0].set(1.0))
    (stage,) = method("blend_adaptive", 20, t_start=5, confidence_floor=0.0)
    x = repaint(jax.random.key(0), lambda x, sigma: x + 100.0, sure, SCHEDULE, stage).x
    trusted = np.array(known.missing & jnp.ones((1, 1, 2), bool))
    trusted[1, 1, 0] = False
    np.testing.assert_allclose(x[trusted], np.asarray(known.prior_mean)[trusted], rtol=5e-5)
    assert abs(float(x[1, 1, 0] - known.prior_mean[1, 1, 0])) > 1
    (adaptive,) = method("adaptive", 20, t_start=5)
    np.testing.assert_allclose(weights(sure, stage.replace(blend=jnp.float32(0))), weights(sure, adaptive), rtol=1e-5)


def test_no_two_draws_share_a_key(known):
    """Three of every pass and one to start from, in every stage."""
    keys = []

    def draw(key, shape, dtype):
        jax.debug.callback(lambda data: keys.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return jax.random.normal(key, shape, dtype)

    stages = method("two_stage", 20, t_start=4, t_refine=3, resample_steps=2)
    repaint_stages(jax.random.key(0), revealing, known, SCHEDULE, stages, draw=draw)
    jax.effects_barrier()
    assert len(keys) == sum(3 * stage.calls + 1 for stage in stages)
    assert len(set(keys)) == len(keys)


def test_stages_of_two_programs_are_their_own_runs(known):
    """Stage by stage: the last output is the next prior mean, keys are folded from the stage's number."""
    stages = (
        *method("two_stage", 20, t_start=6, t_refine=3, resample_steps=2),
        *method("gp_init", 20, t_start=3, resample_steps=2),
        *method("guided", 20, t_start=3, resample_steps=2),
    )

    def denoiser(x, sigma):
        return 0.7 * jnp.roll(x, 1, axis=0)

    out = run(known, stages, 0.5, denoiser=denoiser)
    now = known
    for number, stage in enumerate(stages):
        now = now._replace(prior_variance=now.prior_variance * jnp.float32(0.5 if number else 1))
        x = repaint(jax.random.fold_in(jax.random.key(0), number), denoiser, now, SCHEDULE, stage).x
        np.testing.assert_allclose(out.x[number], x, atol=2e-5)
        now = now._replace(prior_mean=x)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, 3e38])
def test_a_failed_run_says_where_and_shows_no_number(known, bad):
    """One cell breaks at t = 4 of the first stage, which it reaches after twice t = 6 and 5."""

    def breaks(x, sigma):
        at = jnp.abs(sigma / SCHEDULE.sigma[4] - 1) < 1e-4
        # 3e38 is a number; its double is not.
        return jnp.where(at, x.at[1, 1, 0].set(2 * jnp.float32(bad)), 0.5 * x)

    stages = method("two_stage", 20, t_start=6, t_refine=3, resample_steps=2)
    out = run(known, stages, denoiser=breaks)
    np.testing.assert_array_equal(out.failed, [4, 0])
    assert first_failure(stages, out.failed) == Failure(stage=1, iteration=4, t=4)
    assert str(first_failure(stages, out.failed)) == "stage 1, iteration 4, t 4"
    np.testing.assert_array_equal(np.isnan(out.x), np.broadcast_to(known.missing, out.x.shape))
    seen = ~np.asarray(known.missing)[..., 0]
    np.testing.assert_allclose(out.x[:, seen], np.stack([np.asarray(known.value)[seen]] * 2), rtol=1e-6)


def test_a_failure_of_the_last_step_counts(known):
    stages = method("two_stage", 20, t_start=2, t_refine=1, resample_steps=3)

    def breaks(x, sigma):
        return jnp.where(jnp.abs(sigma / SCHEDULE.sigma[0] - 1) < 1e-4, jnp.nan, x)

    out = run(known, stages, denoiser=breaks)
    assert first_failure(stages, out.failed) == Failure(1, 6, 0)
    assert first_failure(stages, np.array([-1, 0])) == Failure(2, 0, 1)
    assert first_failure(stages, np.array([-1, -1])) is None


# --- resampling ---------------------------------------------------------------------------------------------


def test_resampling_improves_the_mean():
    """Plain RePaint of an exact Gaussian denoiser, started from noise with sigma 3.5 at the most.

    Its mean is wrong by more than the posterior's standard deviation at one pass a step and by a third of it at
    sixteen; it is never exact.
    """
    rng = np.random.default_rng(0)
    y, x = np.indices(SHAPE)
    wave = rng.normal(size=(400, 2, 1, 1)) * 0.5
    waves = np.cos(wave[:, 0] * y + wave[:, 1] * x + rng.uniform(0, 2 * np.pi, (400, 1, 1)))[..., None]
    fields = 1.4 * waves * rng.normal(size=(400, 1, 1, 2)) + 0.1 * rng.normal(size=(400, *SHAPE, 2))
    ocean = np.ones(SHAPE, bool)
    gaussian = linear.fit((fields / fields.std()).astype(np.float32), ocean, 20)
    truth = np.asarray(guide.prior_draw(gaussian, jax.random.key(4)))
    seen = observe.from_cells(observe.cells(ocean, 0.2, np.random.default_rng(1)), truth, 0.01, ocean)
    exact = linear.analysis(gaussian, seen)
    observed, value = seen.on_grid(SHAPE)
    known = Known(value, ~observed[..., None], jnp.zeros_like(value), exact.variance)
    missing, mean = ~np.asarray(observed), np.asarray(exact.mean(seen.values))
    schedule = Schedule.linear(50, 5e-4, 0.1)

    def bias(passes):
        (stage,) = method("plain", 50, resample_steps=passes)
        keys = jax.random.split(jax.random.key(0), 128)
        x = jax.jit(jax.vmap(lambda key: repaint(key, gaussian, known, schedule, stage).x))(keys)
        wrong = (np.asarray(x).mean(0) - mean)[missing]
        return np.sqrt(np.mean(wrong**2) / np.mean(np.asarray(exact.variance)[missing]))

    few, some, many = bias(1), bias(4), bias(16)
    assert few > 1.1
    assert many < some < 0.7 * few
    assert many < 0.5
