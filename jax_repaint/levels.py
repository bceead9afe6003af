"""What a network has learnt beyond a covariance: its denoising error by noise level beside the Gaussian denoiser's.

    python -m jax_repaint.levels --model=runs/small/model --frames=64
    python -m jax_repaint.levels --model=runs/conditional/model --pattern=walk:90
    python -m jax_repaint.levels --model=runs/small/model,runs/other/model

For held-out frames x0 and x = x0 + sigma n it prints, at every level, the mean square of D(x; sigma) - x0 over ocean
cells that have a value, the same of the exact Gaussian denoiser of the training covariance, and the ratio of the two.
Where that is not below 1 the network has learnt nothing that the covariance does not say. With a pattern both are given
observations: the Gaussian by a Kalman analysis, a conditional network as it was trained, others by the sampler's
correction `kalman`. Of several models the errors over those of the first are printed too, on the same frames and noise;
so recipes compare whose losses weigh levels differently. A ratio that is lower with --part=train than on held-out
frames is what the network knows by heart.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags

from jax_repaint import command, files, gains, guide, model, scoring
from jax_repaint.array_types import Array, Field, Float, Key, Level
from jax_repaint.cases import block_length, check_unseen, data_of, make_cases, pick
from jax_repaint.data.fields import Fields, prepare_with_gaps
from jax_repaint.denoise import Denoiser, PrincipalGaussian
from jax_repaint.ensemble import member_keys
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.prior import linear

DENOISING = 7  # names the noise of this module among the members of a frame
SAME_UNIT = 0.01  # of a standard deviation
COLUMNS = ("sigma", "network", "gaussian", "ratio", "lo", "hi")
OVER_FIRST = ("over_first", "first_lo", "first_hi")


def _noise(key: Key, shape: tuple[int, ...], drawn: tuple[int, int]) -> Field:
    """White noise of a shape, alike in what it has in common with a grid `drawn`, of that grid's draw."""
    noise = jax.random.normal(key, (*drawn, shape[-1]))
    if drawn == shape[:2]:
        return noise
    wider = jax.random.normal(jax.random.fold_in(key, 0), shape)
    y, x = (min(ours, theirs) for ours, theirs in zip(shape, drawn, strict=False))
    return wider.at[:y, :x].set(noise[:y, :x])


@partial(jax.jit, static_argnames="drawn")
def _errors(
    denoiser: Denoiser,
    gaussian: PrincipalGaussian,
    sigmas: Float[Array, " n"],
    x0: Field,
    scored: Float[Array, "y x 1"],
    evidence: guide.Evidence,
    key: Key,
    drawn: tuple[int, int],
) -> Float[Array, "n 2"]:
    """Mean square errors of network and Gaussian on one frame at every level, over the cells where `scored` is 1."""
    count = scored.sum() * x0.shape[-1]

    def one(now: tuple[Level, Array, gains.Gain | None]) -> Float[Array, "2"]:
        sigma, number, gain = now
        x = x0 + sigma * _noise(jax.random.fold_in(key, number), x0.shape, drawn)
        estimates = denoiser(x, sigma), gaussian(x, sigma)
        if evidence.observation is not None:
            here = evidence.replace(gain=gain)
            informed = hasattr(denoiser, "given")
            estimates = tuple(guide.kalman(lambda x, e=e: e, x, sigma, sigma, here) for e in estimates)
            if informed:
                estimates = denoiser.given(x, sigma, here), estimates[1]
        return jnp.stack([jnp.sum(scored * (e - x0) ** 2) / count for e in estimates])

    return jax.lax.map(one, (sigmas, jnp.arange(len(sigmas), dtype=jnp.int32), evidence.gain))


def denoising_errors(
    trained: Model,
    fields: Fields,
    numbers: np.ndarray,
    sigmas: np.ndarray,
    pattern: str = "",
    seed: int = 0,
    drawn: tuple[int, int] | None = None,
) -> Float[np.ndarray, "frames n 2"]:
    """Mean square errors of the network and of the exact Gaussian denoiser, standardised units.

    Args:
      fields: held-out frames, `numbers` theirs in the series.
      sigmas: (n,) noise levels.
      pattern: of observations that both are given; none if empty.
      drawn: padded grid that the noise is drawn on, so that it is the same for models of different ones; by default
        that of the model.

    Raises:
      InputError: a level outside of the network's training, another grid.
    """
    trained.check_levels(sigmas)
    trained.check_grid(fields)
    cases = make_cases(trained, fields, numbers, [pattern], seed) if pattern else [None] * len(fields)
    keys = member_keys(seed, numbers, [DENOISING])[:, 0]
    frames, _, present = prepare_with_gaps(fields, trained.standardiser, trained.padded)
    frames = linear.fill(trained.gaussian, frames, present, seed, numbers)
    rows = []
    for case, key, x0, scored in zip(cases, keys, frames, present[..., None], strict=True):
        evidence = guide.Evidence(trained.gaussian.ocean)
        if pattern:
            evidence = guide.Evidence(
                evidence.ocean, case.observation, gains.noise_covariance(case.observation), trained.gaussian,
                gains.kalman_gains(trained.gaussian, case.observation, sigmas),
            )  # fmt: skip
        levels = jnp.asarray(sigmas, jnp.float32)
        parts = jnp.asarray(x0), jnp.asarray(scored, jnp.float32), evidence, key
        rows.append(np.asarray(_errors(trained.denoiser, trained.gaussian, levels, *parts, drawn or trained.padded)))
    return np.stack(rows)


def table(errors: np.ndarray, sigmas: np.ndarray, block: int = 1) -> pd.DataFrame:
    """One row a level: mean errors, their ratio and its paired bootstrap interval (scoring.ratio_of_means)."""
    rows = []
    for level, sigma in enumerate(sigmas):
        network, gaussian = errors[:, level].T
        found = scoring.ratio_of_means(network, gaussian, block, seed=0)
        rows.append((sigma, network.mean(), gaussian.mean(), found.ratio, found.lo, found.hi))
    return pd.DataFrame(rows, columns=COLUMNS)


def compare(errors: Mapping[str, np.ndarray], sigmas: np.ndarray, block: int = 1) -> pd.DataFrame:
    """`table` of each model, one below the other, with the ratio of its errors to those of the first model."""
    basis, parts = next(iter(errors.values()))[..., 0], []
    for name, own in errors.items():
        part = table(own, sigmas, block)
        over = [scoring.ratio_of_means(own[:, n, 0], basis[:, n], block, seed=0) for n in range(len(sigmas))]
        for column, of in zip(OVER_FIRST, ("ratio", "lo", "hi"), strict=True):
            part[column] = [getattr(found, of) for found in over]
        part.insert(0, "model", name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def load_together(folders: Sequence[str], part: str = "test") -> dict[str, Model]:
    """The models by their folders.

    Raises:
      InputError: none, one twice, one that cannot be read, models of different data unless `part` is "all", or models
        whose units differ.
    """
    if not folders or len(set(folders)) < len(folders):
        raise InputError(f"one or more different models are needed, got {', '.join(folders) or 'none'}")
    models = {folder: model.load(folder) for folder in folders}
    first = next(iter(models.values()))
    for folder, other in models.items():
        if part != "all" and not model.same_parts(first, other):
            raise InputError(f"{folder} was trained on other frames than {folders[0]}: their errors do not compare")
    _check_units(models)
    return models


def _check_units(models: Mapping[str, Model]) -> None:
    """Refuses models whose errors, and noise, are in units of other standard deviations."""
    (name, first), *others = models.items()
    for folder, other in others:
        a, b = np.asarray(first.standardiser.std), np.asarray(other.standardiser.std)
        if not np.allclose(a, b, rtol=SAME_UNIT):
            raise InputError(
                f"{folder} has noise and errors in units of {b[0]:.3g} and {b[1]:.3g} m/s, {name} of {a[0]:.3g} and "
                f"{a[1]:.3g}: they do not compare; ask for one after the other"
            )


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_list(
        "model", None, "Folders of a model, as training writes it, or of several to compare with the first."
    )
    flags.DEFINE_string("fields", None, "File of fields; by default those that the model was trained on.")
    flags.DEFINE_integer("frames", 64, "Frames, drawn at random.", lower_bound=1)
    flags.DEFINE_enum(
        "part", "test", ("train", "validation", "test", "all"), "Part of the split that they come "
        "from; all: of --fields, a file of which no frame had a part in training."
    )  # fmt: skip
    flags.DEFINE_integer("levels", 13, "Noise levels over the range of all models, evenly in log sigma.", lower_bound=2)
    flags.DEFINE_string("pattern", "", "Observations that both denoisers are given, such as line:22; none if empty.")
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("out", "", "CSV file for the table; none if empty.")
    flags.mark_flag_as_required("model")


def main(_) -> None:
    """Prints the table."""
    if FLAGS.out:
        files.check_writable(FLAGS.out, (".csv",))
    models = load_together(FLAGS.model, FLAGS.part)
    first = models[FLAGS.model[0]]
    fields, split = data_of(first, FLAGS.fields, FLAGS.part)
    if FLAGS.part == "all":
        check_unseen(models.values(), fields)
    numbers = pick(split, FLAGS.frames, FLAGS.seed)
    chosen, block = fields.select(numbers), block_length(split, len(numbers))
    low, high = max(one.sigma[0] for one in models.values()), min(one.sigma[1] for one in models.values())
    sigmas = np.geomspace(low, high, FLAGS.levels)
    errors = {
        folder: denoising_errors(one, chosen, numbers, sigmas, FLAGS.pattern, FLAGS.seed, first.padded)
        for folder, one in models.items()
    }
    rows = compare(errors, sigmas, block) if len(models) > 1 else table(errors[FLAGS.model[0]], sigmas, block)
    print(rows.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if FLAGS.out:
        with files.whole_file(Path(FLAGS.out)) as temporary:
            rows.to_csv(temporary, index=False)


if __name__ == "__main__":
    _define_flags()
    command.run(main)
