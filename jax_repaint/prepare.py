"""Fields as a training takes them: read, split, standardised, padded, without gaps; and the priors fitted to them."""

import dataclasses
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_repaint import distributed, observe
from jax_repaint.array_types import Array
from jax_repaint.data import fields as fields_lib
from jax_repaint.data import readers, twin
from jax_repaint.data.fields import Fields, Split, Standardiser
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.observe import Observation
from jax_repaint.prior import gp, linear, ridge

SHARES = (1.0, 0.5, 0.1)  # of the training covariance in the linear prior
EXPECTED = 2048  # frames, evenly spread, at most, from which EM finds what fills gaps
FEWEST = 0.01  # what the error of the chosen directions may exceed the lowest by, where patterns are set
USUAL_ERROR = 0.01  # of observations that the prior is chosen for, in standard deviations, where no patterns are set
BLENDED = 6000  # ocean cells up to which a kernel's covariance is blended in; its root takes N^3 / 3 products


def _part(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def load_fields(path: str, frames: int, seed: int = 0) -> Fields:
    """A file, or the twin if `path` is empty."""
    return readers.read(path) if path else twin.generate(frames, twin.Twin(seed=seed))


def split_fields(fields: Fields, data: ConfigDict) -> Split:
    """The split that `config.data` describes, without frames that are nearly all gap."""
    if data.block_split:
        split = fields_lib.block_split(fields)
    else:
        parts = (_part(data[name]) for name in ("train", "validation", "test"))
        split = fields_lib.split(fields, *parts, allow_short_gap=data.allow_short_gap)
    return fields_lib.well_covered(fields, split)


# Frames (n, Y, X, 2); with gaps also which cells are present, (n, Y, X, 1) bool.
Frames = Array | tuple[Array, Array]


def arrays_of(frames: Frames) -> tuple[Array, ...]:
    """The one or two arrays of frames."""
    return frames if isinstance(frames, tuple) else (frames,)


class Prepared(NamedTuple):
    """Data as the device sees it, and the priors fitted to the training part.

    Attributes:
      train, validation: standardised and padded.
      split, standardiser, gaussian, kernel, choice, archive: see Model, prior/linear.py and prior/ridge.py.
    """

    train: Frames
    validation: Frames
    split: Split
    standardiser: Standardiser
    gaussian: PrincipalGaussian
    kernel: gp.Kernel
    choice: linear.Choice
    archive: ridge.Archive | None


def prepare(fields: Fields, config: ConfigDict) -> Prepared:
    """Splits, standardises and pads; fits the linear prior and the GP.

    Raises:
      InputError: parts, frames or a grid that do not go with the settings.
    """
    if config.train.flips and fields.lat.ndim == 2:
        raise InputError(
            f"{fields.name}: mirrored frames (train.flips) change the sign of the eastward or the northward component, "
            "which needs a grid whose rows run east; this one has latitudes and longitudes of two dimensions"
        )
    split = split_fields(fields, config.data)
    logging.info("%s", split.describe())
    if split.train.size < config.train.batch * config.train.accumulate:
        raise InputError(
            f"{split.train.size} training frames are fewer than a batch of "
            f"{config.train.batch} x {config.train.accumulate}"
        )
    standardiser = Standardiser.from_fields(fields, split.train, config.data.shared_scale)
    multiple = unet.NETWORKS[config.model.network].multiple
    parts = [fields.select(index) for index in (split.train, split.validation)]
    (train, ocean, present), (validation, _, validation_present) = (
        fields_lib.prepare_with_gaps(part, standardiser, multiple) for part in parts
    )
    if any(part.gaps for part in parts):
        shares = [100 * (1 - part.gaps) for part in parts]
        logging.info("%.3g %% of the training values and %.3g %% of the validation values are present", *shares)
    else:
        present = validation_present = None
    gaussian, kernel, choice = fit_priors(
        parts[0], train, validation, ocean, config, standardiser, present, validation_present
    )
    if present is not None:
        # The network sees all cells. A draw of the prior given the present ones leaves their joint distribution as it
        # is, where the Gaussian is right. Its mean would be too calm beside real neighbours, and tell at every noise
        # level what the present cells hold; zeros would be edges that no field has. The loss counts none of them.
        train = _filled(gaussian, train, present, 0), present[..., None]
        validation = _filled(gaussian, validation, validation_present, 1), validation_present[..., None]
    whole = (arrays_of(part)[0] for part in (train, validation))
    archive = ridge.archive(gaussian, *whole) if config.model.archive else None
    return Prepared(train, validation, split, standardiser, gaussian, kernel, choice, archive)


def _filled(gaussian: PrincipalGaussian, x: np.ndarray, present: np.ndarray, seed: int) -> np.ndarray:
    # Another machine may find the directions with other signs, which turns the draws round.
    return np.asarray(distributed.same(linear.fill(gaussian, x, present, seed)))


def _chosen_for(config: ConfigDict, ocean: np.ndarray, padded: tuple[int, int]) -> list[Observation]:
    """Observations of `model.patterns`, or of the usual ones, on the padded grid: two of each, or the one there is.

    Raises:
      InputError: a pattern that cannot be drawn.
    """
    patterns = config.model.patterns
    error = config.observed.error if patterns else USUAL_ERROR
    observations = []
    for spec in observe.patterns_of(patterns) or observe.usual(ocean):
        for draw in range(1 if spec.startswith("line") else 2):
            seen = observe.parse(spec, ocean, observe.pattern_rng(0, draw))
            observation = observe.from_cells(seen, np.zeros((*seen.shape, 2)), error, ocean)
            observations.append(observe.pad_grid(observation, seen.shape, padded))
    return observations


def fit_priors(
    fields: Fields,
    train: np.ndarray,
    validation: np.ndarray,
    ocean: np.ndarray,
    config: ConfigDict,
    standardiser: Standardiser,
    present: np.ndarray | None = None,
    validation_present: np.ndarray | None = None,
) -> tuple[PrincipalGaussian, gp.Kernel, linear.Choice]:
    """The linear prior, chosen on validation frames, and the GP by marginal likelihood of training frames.

    The linear prior is the training covariance, or a blend with the covariance of the GP where that does better from
    `model.patterns` of validation frames: few observations are best explained by few directions, many by many. Fields
    with gaps, where `present` and `validation_present` (n, Y, X) tell which cells have a value, are first filled with
    draws of the Gaussian that EM finds, whose covariance is the one that it expects.
    """
    observations = _chosen_for(config, fields.ocean, ocean.shape)
    rank, tolerance = config.model.rank, FEWEST if config.model.patterns else 0.0
    logging.info("fitting a Gaussian process")
    climatology = gp.background("climatology", fields.velocity, fields.ocean)
    kernel, _ = gp.fit("matern32", fields.velocity, fields.ocean, fields.places(), climatology, config.model.gp_steps)
    shown = np.unique(np.linspace(0, len(validation) - 1, 48).astype(int))
    frames = validation[shown]
    root = None
    if fields.ocean.sum() <= BLENDED:
        root = gp.prior_root(kernel, fields.ocean, fields.places()).rows(standardiser.std)
    seen = None
    if present is not None:
        some = np.unique(np.linspace(0, len(train) - 1, EXPECTED).astype(int))
        logging.info("filling the gaps of %d training frames", len(train))
        train = _filled(linear.fit_with_gaps(train[some], present[some], ocean, rank), train, present, 0)
        seen = validation_present[shown]
    found = []
    for share in SHARES if root is not None else (1.0,):
        logging.info("choosing a linear prior, %g of its covariance from the training frames", share)
        gaussian = linear.fit(train, ocean, rank, share=share, kernel_root=root)
        chosen, choice = linear.select(gaussian, frames, observations, present=seen, tolerance=tolerance)
        found.append((choice.error, chosen, dataclasses.replace(choice, share=share)))
    _, gaussian, choice = min(found, key=lambda candidate: candidate[0])
    logging.info(
        "linear prior: %d EOFs, %g of the covariance from the training frames; mean square error %.3g of the variance "
        "from observations of validation frames",
        choice.rank, choice.share, choice.error,
    )  # fmt: skip
    return gaussian, kernel, choice


def time_range(fields: Fields, split: Split) -> list[str]:
    """First and last time (UTC, ISO 8601) of the frames that a training sees, those it is validated on among them."""
    seen = np.concatenate([split.train, split.validation])
    return [str(fields.time[i].astype("datetime64[s]")) for i in (seen.min(), seen.max())]


def missing(fields: Fields, split: Split) -> dict[str, dict[str, float]]:
    """What a model of fields with gaps says of them: fractions of ocean values, and frames that were left out."""
    if not fields.gaps:
        return {}
    gaps = {name: fields.select(getattr(split, name)).gaps for name in ("train", "validation")}
    return {"missing": gaps | {"frames_left_out": int((fields.coverage < fields_lib.LEAST_COVERAGE).sum())}}
