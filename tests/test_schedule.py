"""Noise schedules and one-step updates against conditioning of Gaussians, and conversions against their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import schedule, transition
from jax_repaint.errors import InputError
from jax_repaint.schedule import Schedule


def step_given_both_ends(beta, alpha_bar, before):
    """Weights of x0 and of x_t in E[x_s | x_t, x0], and its variance, from the joint Gaussian of x_s and x_t."""
    alpha = 1 - beta
    mean = np.sqrt([before, alpha_bar])  # times x0
    joint = np.array([[1 - before, np.sqrt(alpha) * (1 - before)], [0, 1 - alpha_bar]])
    gain = joint[0, 1] / joint[1, 1]
    return mean[0] - gain * mean[1], gain, joint[0, 0] - gain * joint[0, 1]


def test_the_default_schedule_ends_where_it_says():
    steps = Schedule.linear()
    assert steps.steps == 250
    np.testing.assert_allclose([steps.beta[0], steps.beta[-1]], [1e-4, 0.02], rtol=1e-6)
    np.testing.assert_allclose(np.diff(steps.beta), (0.02 - 1e-4) / 249, rtol=1e-3)
    assert float(steps.alpha_bar[-1]) == pytest.approx(0.0797, abs=5e-5)
    assert float(steps.sigma[-1]) == pytest.approx(3.40, abs=5e-3)


def test_steps_are_those_of_conditioned_gaussians():
    steps = Schedule.linear(12, 1e-3, 0.3)
    bar = np.cumprod(1 - np.linspace(1e-3, 0.3, 12))
    np.testing.assert_allclose(steps.alpha_bar, bar, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(steps.sigma) ** 2, 1 / bar - 1, rtol=1e-3)
    for t in range(12):
        beta, before = float(steps.beta[t]), bar[t - 1] if t else 1.0
        of_x0, of_x_t, variance = step_given_both_ends(beta, bar[t], before)
        levels = (jnp.float32(a) for a in (beta, bar[t], before))
        made = transition.ancestral_mean(jnp.float32(0.7), jnp.float32(-0.4), *levels)
        np.testing.assert_allclose(made, -0.4 * of_x0 + 0.7 * of_x_t, atol=2e-4)
        np.testing.assert_allclose(steps.posterior_variance[t], variance, atol=2e-5)


def test_a_step_back_up_is_the_noise_that_was_taken_away():
    """Signal and noise of x_s, renoised, are those of x_t."""
    steps = Schedule.linear(12, 1e-3, 0.3)
    one, none = jnp.float32(1), jnp.float32(0)
    for t in range(1, 12):
        lower, upper = steps.alpha_bar[t - 1], steps.alpha_bar[t]
        signal = transition.renoise(transition.diffuse(one, none, lower), none, steps.beta[t])
        old = transition.renoise(transition.diffuse(none, one, lower), none, steps.beta[t])
        new = transition.renoise(none, one, steps.beta[t])
        np.testing.assert_allclose(signal, transition.diffuse(one, none, upper), rtol=1e-5)
        np.testing.assert_allclose(old**2 + new**2, transition.diffuse(none, one, upper) ** 2, rtol=1e-4)


def test_the_step_of_a_level_is_even_in_its_logarithm():
    steps = Schedule.linear(12, 1e-3, 0.3)
    np.testing.assert_allclose(jax.vmap(steps.step_of)(steps.sigma), np.arange(12), atol=1e-4)
    between = jnp.sqrt(steps.sigma[:-1] * steps.sigma[1:])
    np.testing.assert_allclose(jax.vmap(steps.step_of)(between), np.arange(11) + 0.5, atol=1e-4)
    np.testing.assert_array_equal(jax.vmap(steps.step_of)(jnp.array([1e-5, 1e5])), [0, 11])


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_levels_are_even_in_their_root(rho):
    made = schedule.levels(9, 0.01, 80.0, rho)
    np.testing.assert_allclose(made[[0, -1]], [80, 0.01], rtol=1e-10)
    roots = np.diff(made ** (1 / rho))
    np.testing.assert_allclose(roots, roots[0], rtol=1e-8)
    assert roots[0] < 0


@pytest.mark.parametrize("ends", [(0.05, 2.0), (0.01, 3.4), (0.1, 130.0), (0.02, 8.0), (0.3, 0.7)])
def test_the_ends_of_levels_are_those_asked_for(ends):
    for count in range(2, 40):
        made = schedule.levels(count, *ends)
        assert (made[-1], made[0]) == ends


def test_levels_have_the_root_of_their_source_by_default():
    """Karras et al. 2022, table 1: rho = 7."""
    np.testing.assert_allclose(schedule.levels(3, 1.0, 128.0)[1], 1.5**7, rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.create(np.array([0.1, 1.0])), "numbers between 0 and 1"),
        (lambda: Schedule.create(np.full(3, 1e-9)), "loses the noise of the first step"),
        (lambda: Schedule.create(np.full(100, 0.5)), "the signal of the last one"),
        (lambda: Schedule.linear(1), "steps >= 2"),
        (lambda: Schedule.linear(10, 0.2, 0.1), "min_beta <= max_beta"),
        (lambda: schedule.levels(1, 0.1, 1.0), "at least 2, got 1"),
        (lambda: schedule.levels(4, 1.0, 1.0), "sigma_min < sigma_max"),
    ],
)
def test_schedules_that_cannot_work_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
