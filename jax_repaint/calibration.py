"""What held-out frames teach about an ensemble: how far to trust its mean, its spread, and an interval.

    fused    = prior + w (mean - prior)             w in [0, 1], stacking with the linear estimate
    member  <- fused + c (member - mean)            c > 0, spread factor
    interval = fused -+ q c std                     q > 0, conformal scale, 5 to 95 %

w, c and q are functions of the prior's posterior variance v: one number for each of six bins of it, linear in ln v
between the bins' centres and constant beyond them, so that maps have no seams where one bin meets the next. M members
have

    mean = mean_m x_m,    std^2 = `metrics.ensemble_variance`

Everything is in m/s, on ocean cells that were not observed. In observed cells, of which nothing is learnt, c is at
least v^(1/2) / std: a sampler of few levels loses most of its spread where an observation is precise, and v is the
variance that the error of the observation leaves. What is learnt holds in expectation for frames that are
exchangeable with the calibration frames: no worse than the prior, spread equal to error, 90 % inside. A single frame is
promised nothing. A gate moves the mean alone: c and q are those of g = 1, and with one nothing is promised of spread
and interval.

Sources: Breiman, "Stacked regressions" (1996), the weight; Papadopoulos, Proedrou, Vovk, Gammerman, "Inductive
confidence machines for regression" (2002), the scale; Vovk, Gammerman, Shafer, "Algorithmic learning in a random world"
(2005), scales by category ("Mondrian").
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, signal, special, stats

from jax_repaint import metrics
from jax_repaint.errors import InputError

LEVEL = 0.9
BINS = 6
RESAMPLES = 2000
GUARD = 0.05
LEAST_ERROR = 1e-8  # (m/s)^2, so that a perfect guess at the held-out observations has a logarithm
# With n blocks, 1 / (n + 1) of the promise is spent on the block that was never seen: of the 10 % that may lie outside,
# half with 19 blocks, a quarter with 39.
BLOCKS_TO_PROMISE, BLOCKS_FOR_BINS = 19, 39


NO_EVIDENCE = np.full(3, np.nan)  # of a frame with too few observations to hold some out


@dataclasses.dataclass(frozen=True)
class Gate:
    """A weight for a single frame, from observations that were held out of a second run.

        g = 1 / (1 + exp(-(level + error ln(e_prior / e_mean) + misfit ln chi2)))

    w becomes g w. What the observations cannot tell leaves g where the other frames put it: it is shrunk towards 0.95.
    A frame of which nothing can be held out has g = 1.

    Attributes:
      level, error, misfit: the three coefficients.
    """

    level: float
    error: float
    misfit: float

    def of(self, evidence: np.ndarray) -> float:
        """g in [0, 1] for what `evidence` made of a frame, 1 for NO_EVIDENCE."""
        return float(special.expit(evidence @ dataclasses.astuple(self))) if np.isfinite(evidence).all() else 1.0

    @staticmethod
    def evidence(error_prior: float, error_mean: float, chi2: float) -> np.ndarray:
        """(1, ln(e_prior / e_mean), ln chi2).

        Args:
          error_prior, error_mean: mean squared errors of prior and ensemble mean at held-out observations, (m/s)^2.
          chi2: mean over the same of (observed - prior)^2 / (v + sigma^2), about 1 for a prior that knows its error.

        Raises:
          InputError: an error or chi2 is negative or not finite.
        """
        numbers = np.array([error_prior, error_mean, chi2], np.float64)
        if not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise InputError(f"errors and chi2 of held-out observations are numbers from 0, got {numbers.tolist()}")
        prior, mean, misfit = np.log(np.maximum(numbers, LEAST_ERROR))
        return np.array([1.0, prior - mean, misfit])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How the ensembles of one method are corrected; `fit` learns it.

    It is for ensembles of the size it was learnt with. Fewer members have a noisier mean, which deserves less weight,
    and know their spread less well, which takes a wider interval; neither correction is known without learning again.

    Attributes:
      method: name of the method.
      members: M, of the ensembles it was learnt with and is for.
      antithetic: True if members 2j and 2j + 1 are partners.
      centres: (bins,) mean of ln v in each bin, v in (m/s)^2; increasing.
      weight: (bins,) w.
      spread: (bins,) c.
      scale: (bins,) q.
      promised: True if q is conformal; with fewer than 19 blocks it is the quantile for Gaussian members instead.
      frames: number of fields it was learnt from; a frame counts once for each pattern.
      patterns: of the observations.
      blocks: number of time blocks, which stand for independent frames.
      seed: of frames, patterns and members.
      held_out: from blocks that took no part in learning: mean square errors of the prior, of the mean and of the
        fused mean (mse_prior, mse_raw, mse_fused), spread over error before and after (spread_skill_raw,
        spread_skill).
      gate: for frames with a second run, or None. Spread and scale are those without it.
      error: standard error of the observations that it was learnt from, m/s; 0 if those were true values.
    """

    method: str
    members: int
    antithetic: bool
    centres: tuple[float, ...]
    weight: tuple[float, ...]
    spread: tuple[float, ...]
    scale: tuple[float, ...]
    promised: bool
    frames: int
    patterns: tuple[str, ...]
    blocks: int
    seed: int
    held_out: Mapping[str, float]
    gate: Gate | None = None
    error: float = 0.0

    @property
    def promises(self) -> bool:
        """Whether the interval is conformal for what is made of ensembles, which a gate moves after it was learnt."""
        return self.promised and self.gate is None

    @classmethod
    def create(cls, **content: Any) -> "Calibration":
        """A calibration of given numbers; sequences become tuples.

        Raises:
          InputError: an entry is missing, unknown or of the wrong kind, or a number that makes no sense.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        content.setdefault("gate", None)
        content.setdefault("error", 0.0)
        if content.keys() != names:
            odd = sorted(content.keys() ^ names)
            raise InputError(f"a calibration has the entries {', '.join(sorted(names))}; missing or unknown: {odd}")
        try:
            for name in ("centres", "weight", "spread", "scale"):
                content[name] = tuple(float(value) for value in content[name])
            content["error"] = float(content["error"])
            content["patterns"] = tuple(str(pattern) for pattern in content["patterns"])
            content["held_out"] = {str(name): float(value) for name, value in content["held_out"].items()}
            if isinstance(content["gate"], Mapping):
                content["gate"] = Gate(**{name: float(value) for name, value in content["gate"].items()})
            made = cls(**content)
            _check(made)
        except (AttributeError, TypeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"a calibration cannot be made of {content}: {e}") from e
        return made

    def apply(
        self,
        prior_mean: np.ndarray,
        prior_variance: np.ndarray,
        members: np.ndarray,
        gate: float = 1.0,
        observed: np.ndarray | None = None,
    ) -> np.ndarray:
        """Corrected members: fused + c (members - mean), fused = prior + gate w (mean - prior).

        Args:
          prior_mean, prior_variance: (y, x, 2) m/s and (m/s)^2, of the linear estimate.
          members: (M, y, x, 2) m/s; where they are NaN (land) the result is.
          gate: of this frame, from `Gate.of`.
          observed: (y, x) bool, cells where members spread at least as the linear estimate says.

        Returns:
          (M, y, x, 2), in the precision of `members`; partners stay partners.

        Raises:
          InputError: another number of members than it was learnt with, shapes that do not fit, a cell with
            members and without a prior, a gate outside [0, 1].
        """
        if not 0 <= gate <= 1:
            raise InputError(f"the gate of a frame lies in [0, 1], got {gate}")
        members, (weight, spread, _) = self._door(prior_variance, members)
        prior_mean = np.asarray(prior_mean)
        if prior_mean.shape != members.shape[1:]:
            raise InputError(f"prior mean {prior_mean.shape} and members {members.shape} are of different grids")
        _require_prior(prior_mean, members)
        if observed is not None:
            spread = at_least(spread, np.asarray(prior_variance), _variance(members, self.antithetic), observed)
        return correct(prior_mean, members, gate * weight, spread).astype(members.dtype)

    def interval(self, prior_variance: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds (low, high) of the central 90 % interval, each (y, x, 2) m/s: mean -+ q std.

        If `promises`, it holds 90 % of the values on unobserved cells or more, in expectation over
        exchangeable frames.

        Args:
          prior_variance: (y, x, 2) (m/s)^2, of the linear estimate.
          members: (M, y, x, 2) m/s, as `apply` returns them.

        Raises:
          InputError: as for `apply`.
        """
        members, (_, _, scale) = self._door(prior_variance, members)
        mean, half = members.mean(0), scale * np.sqrt(_variance(members, self.antithetic))
        return (mean - half).astype(members.dtype), (mean + half).astype(members.dtype)

    def _door(self, prior_variance: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Checked members, and w, c and q on every cell."""
        members, variance = np.asarray(members), np.asarray(prior_variance)
        if members.ndim != 4 or members.shape[-1] != 2 or variance.shape != members.shape[1:]:
            raise InputError(
                f"prior variance {variance.shape} and members {members.shape} do not fit together; "
                "expected (y, x, 2) and (M, y, x, 2)"
            )
        if len(members) != self.members:
            raise InputError(
                f"this calibration is for ensembles of {self.members} members, got {len(members)}; "
                "use as many, calibrate again with these, or go without calibration"
            )
        _require_prior(variance, members)
        place = _log(variance)
        return members, [np.interp(place, self.centres, values) for values in (self.weight, self.spread, self.scale)]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, text and lists that `from_json` reads back exactly."""
        content = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Calibration":
        """The calibration that `to_json` wrote.

        Raises:
          InputError: as for `create`.
        """
        if not isinstance(content, Mapping):
            raise InputError(f"a calibration is an object of named entries, got {content!r}")
        return cls.create(**content)

    def describe(self) -> str:
        """A table of the bins, and what held-out blocks say, as text."""
        lines = ["std of the estimate, m/s  weight  spread  interval"]
        for place, weight, spread, scale in zip(self.centres, self.weight, self.spread, self.scale, strict=True):
            lines.append(f"{math.exp(place / 2):24.4f}  {weight:6.3f}  {spread:6.3f}  {scale:8.3f}")
        score = self.held_out
        ratios = [score[name] / score["mse_prior"] for name in ("mse_raw", "mse_fused")]
        of = f"with errors of {self.error:g} m/s" if self.error else "of true values"
        what = "promised" if self.promised else f"Gaussian, as {self.blocks} blocks are too few for a promise"
        if self.gate is not None:
            what = "without a promise, as a gate weighs every field after a second run"
        lines += [
            f"{self.method}, {self.members} members; {self.frames} fields in {self.blocks} blocks of time; "
            f"{', '.join(self.patterns)} {of}; 90 % interval {what}",
            f"held-out blocks: error of the mean over that of the linear estimate {ratios[0]:.3f} raw, "
            f"{ratios[1]:.3f} calibrated; spread over error {score['spread_skill_raw']:.2f} raw, "
            f"{score['spread_skill']:.2f} calibrated",
        ]
        return "\n".join(lines)


def find(made: Iterable[Calibration], method: str, members: int) -> Calibration | None:
    """The calibration for ensembles of `members` members of `method`; None if there is none."""
    return next((one for one in made if (one.method, one.members) == (method, members)), None)


def added(made: Iterable[Calibration], learnt: Calibration, first: bool = False) -> tuple[Calibration, ...]:
    """`made` with `learnt` in place of the one of its method and size, or else at the end; where `first`, in front."""
    made = list(made)
    old = find(made, learnt.method, learnt.members)
    place = len(made) if old is None else made.index(old)
    made[place : place + 1] = [] if first else [learnt]
    return (learnt, *made) if first else tuple(made)


def sizes(made: Iterable[Calibration]) -> str:
    """Such as "8 and 16 members of kalman, 16 of mmps"; empty for none."""
    counts: dict[str, list[int]] = {}
    for one in made:
        counts.setdefault(one.method, []).append(one.members)
    words = []
    for method, members in counts.items():
        *some, last = map(str, sorted(members))
        number = f"{', '.join(some)} and {last}" if some else last
        words.append(f"{number} {'' if words else 'members '}of {method}")
    return ", ".join(words)


def correct(prior_mean: np.ndarray, members: np.ndarray, weight: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """fused + c (members - mean), fused = prior + w (mean - prior), of arrays of NumPy or of JAX.

    Args:
      prior_mean, weight, spread: (y, x, 2).
      members: (M, y, x, 2).
    """
    mean = members.mean(0)
    fused = prior_mean + weight * (mean - prior_mean)
    return fused[None] + spread[None] * (members - mean[None])


def at_least(spread: np.ndarray, least: np.ndarray, variance: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """c, in observed cells at least what gives members the variance `least`; of arrays of NumPy or of JAX.

    Args:
      spread, least, variance: (y, x, 2), c, and variances of a member: the one wanted and the one before.
      observed: (y, x) bool.
    """
    xp = variance.__array_namespace__()
    # Members that agree cannot be spread.
    needed = xp.sqrt(least / xp.where(variance > 0, variance, xp.inf))
    return xp.where(observed[..., None], xp.maximum(spread, needed), spread)


HELD_OUT = ("mse_prior", "mse_raw", "mse_fused", "spread_skill_raw", "spread_skill")


def _check(made: Calibration) -> None:
    """Raises InputError at the first number that makes no sense."""
    counts = {name: getattr(made, name) for name in ("members", "frames", "blocks", "seed")}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < (name != "seed"):
            raise InputError(f"{name} of a calibration must be a whole number, got {count!r}")
    for name in ("antithetic", "promised"):
        if not isinstance(getattr(made, name), bool):
            raise InputError(f"{name} of a calibration is true or false, got {getattr(made, name)!r}")
    if not isinstance(made.method, str):
        raise InputError(f"method of a calibration is a name, got {made.method!r}")
    _require_spread(made.members, made.antithetic)
    columns = np.array([made.centres, made.weight, made.spread, made.scale])
    if not columns.size or not np.isfinite(columns).all() or (np.diff(columns[0]) <= 0).any():
        raise InputError(f"centres of a calibration must increase and its bins hold finite numbers, got {columns}")
    if ((columns[1] < 0) | (columns[1] > 1)).any():
        raise InputError(f"weights of a calibration lie in [0, 1], got {made.weight}")
    if (columns[2:] <= 0).any():
        raise InputError(f"spread and scale of a calibration are positive, got {made.spread} and {made.scale}")
    if made.held_out.keys() != set(HELD_OUT) or not np.isfinite(list(made.held_out.values())).all():
        raise InputError(f"held_out of a calibration has the numbers {', '.join(HELD_OUT)}, got {made.held_out}")
    if not 0 <= made.error < math.inf:
        raise InputError(f"the error of a calibration's observations is a number from 0, got {made.error}")
    if made.gate is not None and not np.isfinite(dataclasses.astuple(made.gate)).all():
        raise InputError(f"the gate of a calibration has three finite numbers, got {made.gate}")


def _require_spread(members: int, antithetic: bool) -> None:
    if antithetic and members % 2:
        raise InputError(f"antithetic members come in pairs, got {members} members")
    least = metrics.least_members(antithetic)
    if members < least:
        raise InputError(f"a calibration needs ensembles with a spread, {least} members or more, got {members}")


def _require_prior(prior: np.ndarray, members: np.ndarray) -> None:
    lost = np.isfinite(members).all(0) & ~np.isfinite(prior)
    if lost.any():
        y, x, _ = np.argwhere(lost)[0]
        raise InputError(f"the linear estimate has no value at (y={y}, x={x}), where the members have one")


def _log(variance: np.ndarray) -> np.ndarray:
    # Land has variance zero, and rounding can leave less than that; both belong to the first bin.
    return np.log(np.maximum(variance, np.finfo(np.float32).tiny, dtype=np.float64))


def _variance(members: np.ndarray, antithetic: bool) -> np.ndarray:
    # A difference of sums: rounding can take it below zero where members agree.
    return np.maximum(metrics.ensemble_variance(members, antithetic), 0)


# --- learning -----------------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """All scored values (n,) of all frames, and where each lies among bins and blocks.

    Attributes:
      error, step: truth and ensemble mean, less the prior mean, m/s.
      variance: of one member, (m/s)^2.
      bin, block, frame: numbers from 0.
      centres: (bins,) mean of ln v.
      below, share: ln v = (1 - share) centres[below] + share centres[below + 1], between the outermost centres.
    """

    error: np.ndarray
    step: np.ndarray
    variance: np.ndarray
    bin: np.ndarray
    block: np.ndarray
    frame: np.ndarray
    centres: np.ndarray
    below: np.ndarray
    share: np.ndarray

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) values between the bins' numbers (bins,), as np.interp would have them, only faster."""
        numbers = np.append(numbers, numbers[-1])
        return numbers[self.below] * (1 - self.share) + numbers[self.below + 1] * self.share

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(blocks, bins)"""
        bins = self.centres.size
        blocks = int(self.block.max()) + 1
        return np.bincount(self.block * bins + self.bin, values, blocks * bins).reshape(blocks, bins)


def fit(
    truth: Sequence[np.ndarray],
    prior_mean: Sequence[np.ndarray],
    prior_variance: Sequence[np.ndarray],
    members: Sequence[np.ndarray],
    scored: Sequence[np.ndarray],
    block: Sequence[int],
    *,
    method: str,
    antithetic: bool = False,
    patterns: Sequence[str] = (),
    seed: int = 0,
    error: float = 0.0,
    evidence: Sequence[np.ndarray] | None = None,
) -> Calibration:
    """Learns a calibration from fields whose truth is known; sums run over the scored values of one bin.

        w = sum d e / sum d^2,   d = mean - prior,   e = truth - prior,   clipped to [0, 1]
        c = sqrt(sum (truth - fused)^2 / (k sum std^2)),   k = (M + 1) / M, for antithetic members 1
        q: the smallest with  sum_blocks (share of the block with |truth - fused| <= q c std) >= 0.9 (n + 1),  n blocks

    Bins are six quantiles of v. The variance of a finite mean is inside sum d^2, so w is less for fewer members. w is
    made to rise with v if that lowers the error of blocks left out one by one: neighbouring bins then share what is
    noise in each, but a method may also be better where the prior is surer. The rising w is the isotonic regression
    with weights sum d^2, which is the least-squares fit under that condition. It is 0 where the 5 % quantile of its
    bootstrap over blocks is below 0.

    q is one number a bin with 39 blocks or more, one for all with 19 or more; both then times one factor that restores
    the sum over all bins after interpolation. Scores of a block come from w and c learnt without it. The promise is
    exact when the block changes neither; twelve numbers from thousands of values hardly change. It is for all values of
    all patterns together, not for each pattern. A quantile within each frame followed by one over frames would promise
    90 % of the values in 90 % of the frames, which covers more than 90 % wherever frames differ.

    Args:
      truth, prior_mean, prior_variance: (y, x, 2) each, m/s and (m/s)^2.
      members: (M, y, x, 2) each, m/s.
      scored: (y, x) bool each, as `metrics.scored_cells` gives them.
      block: number of the block of time of each; blocks are taken as independent.
      method, antithetic, patterns, seed, error: see Calibration; the seed also draws the bootstrap.
      evidence: `Gate.evidence` or NO_EVIDENCE of each, or None. A gate is kept if it lowers the error of blocks left
        out one by one.

    Raises:
      InputError: no fields, lists of different length, fewer than two blocks, shapes that do not fit, members without
        a spread in a whole bin or in too many of its values, a scored value that is not finite.

    Sources: see above; Carlstein, "The use of subseries values for estimating the variance of a general statistic from
    a stationary sequence" (1986), blocks that do not overlap; Lee, Barber, Willett, "Distribution-free inference with
    hierarchical data" (2023), q from blocks of many values; Barber, Candes, Ramdas, Tibshirani, "Predictive inference
    with the jackknife+" (2021), leaving one out.
    """
    values = _gather(truth, prior_mean, prior_variance, members, scored, block, antithetic)
    count = len(members[0])
    factor = 1 if antithetic else (count + 1) / count
    products, squares = values.sums(values.error * values.step), values.sums(values.step**2)
    spreads = factor * values.sums(values.variance)
    if not (spreads.sum(0) > 0).all():
        raise InputError(f"the members of {method} agree everywhere in a bin of variance: there is no spread to scale")
    blocks = len(products)
    rising = _rising_is_better(products, squares)
    drawn = {number: _resamples(number, seed) for number in (blocks, blocks - 1)}

    def learn(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weight = _weights(products[kept], squares[kept], rising, drawn[int(kept.sum())])
        residual = values.error - values.at(weight) * values.step
        misfit = values.sums(residual**2)[kept].sum(0)
        return weight, np.sqrt(misfit / np.maximum(spreads[kept].sum(0), 1e-300)), residual

    weight, spread, _ = learn(np.ones(blocks, bool))
    residual, std = np.empty_like(values.error), np.empty_like(values.error)
    for left_out in range(blocks):
        _, without, errors = learn(np.arange(blocks) != left_out)
        there = values.block == left_out
        residual[there] = errors[there]
        std[there] = (values.at(without) * np.sqrt(values.variance))[there]
    with np.errstate(invalid="ignore"):
        scale = _scales(values, np.abs(residual), std)
    promised = scale is not None
    if promised and not np.isfinite(scale).all():
        alike = 100 * np.mean((std == 0) & (residual != 0))
        raise InputError(
            f"the members of {method} agree in {alike:.0f} % of the values and differ from the truth there: no "
            f"factor of their spread covers {100 * LEVEL:.0f} %"
        )
    if scale is None:
        scale = np.full(spread.shape, metrics.half_width(count, antithetic, LEVEL))
    return Calibration.create(
        method=method,
        members=count,
        antithetic=antithetic,
        centres=values.centres,
        weight=weight,
        spread=spread,
        scale=scale,
        promised=promised,
        frames=len(truth),
        patterns=patterns,
        blocks=blocks,
        seed=seed,
        error=float(error),
        held_out=_held_out(values, residual, std, factor),
        gate=None if evidence is None else _gate(values, weight, np.asarray(evidence, np.float64), len(truth)),
    )


def _gather(truth, prior_mean, prior_variance, members, scored, block, antithetic: bool) -> _Values:
    lengths = [len(part) for part in (truth, prior_mean, prior_variance, members, scored, block)]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise InputError(f"a calibration needs one truth, prior, ensemble and block for each field, got {lengths}")
    _, block = np.unique(np.asarray(block), return_inverse=True)
    if block.max() < 1:
        raise InputError("a calibration needs frames from at least two blocks of time, got one")
    columns, blocks, frames = [], [], []
    for i, (t, mean, variance, ensemble, where) in enumerate(
        zip(truth, prior_mean, prior_variance, members, scored, strict=True)
    ):
        t, mean, variance, ensemble = map(np.asarray, (t, mean, variance, ensemble))
        where = np.asarray(where, bool)
        grid = (*where.shape, 2)
        if any(part.shape != grid for part in (t, mean, variance)) or ensemble.shape != (len(members[0]), *grid):
            raise InputError(
                f"field {i}: truth {t.shape}, prior {mean.shape} and {variance.shape}, members {ensemble.shape} and "
                f"scored {where.shape} do not fit together; expected (y, x, 2), (M, y, x, 2) and (y, x)"
            )
        if not where.any():
            raise InputError(f"field {i} has no scored cell")
        _require_spread(len(ensemble), antithetic)
        t, mean, variance = (part[where].astype(np.float64) for part in (t, mean, variance))
        ensemble = ensemble[:, where].astype(np.float64)
        columns.append([t - mean, ensemble.mean(0) - mean, _variance(ensemble, antithetic), _log(variance)])
        if not np.isfinite(columns[-1]).all():
            raise InputError(f"field {i}: truth, prior or a member is not finite on a scored cell")
        blocks.append(np.full(t.size, block[i]))
        frames.append(np.full(t.size, i))
    error, step, spread, place = (np.concatenate([column[k].ravel() for column in columns]) for k in range(4))
    edges = np.quantile(place, np.linspace(0, 1, BINS + 1)[1:-1])
    # Ties leave bins empty.
    _, label = np.unique(np.searchsorted(edges, place, side="right"), return_inverse=True)
    centres = np.bincount(label, place) / np.bincount(label)
    below = np.clip(np.searchsorted(centres, place, side="right") - 1, 0, max(centres.size - 2, 0))
    widths = np.append(np.diff(centres), 1.0)
    share = np.clip((place - centres[below]) / widths[below], 0, 1)
    return _Values(error, step, spread, label, np.concatenate(blocks), np.concatenate(frames), centres, below, share)


def _ratio(products: np.ndarray, squares: np.ndarray, rising: bool) -> np.ndarray:
    """Least-squares weights (..., bins), unclipped; nothing to learn from gives 0.

    Rising ones by the max-min formula, w_b = max_{i <= b} min_{j >= b} sum_i^j products / sum_i^j squares
    (Robertson, Wright, Dykstra, "Order restricted statistical inference", 1988), which takes all resamples at once.
    """
    if not rising:
        return np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    over, under = (np.insert(np.cumsum(part, -1), 0, 0, -1) for part in (products, squares))
    over, under = (part[..., None, 1:] - part[..., :-1, None] for part in (over, under))
    first, last = np.indices(over.shape[-2:])
    means = np.where(last >= first, np.divide(over, under, out=np.zeros_like(over), where=under > 0), np.inf)
    least = np.minimum.accumulate(means[..., ::-1], -1)[..., ::-1]
    return np.where(last >= first, least, -np.inf).max(-2)


def _rising_is_better(products: np.ndarray, squares: np.ndarray) -> bool:
    """Whether rising weights have no more error than free ones on blocks (blocks, bins) left out one by one."""
    errors = []
    for rising in (True, False):
        weight = np.clip(_ratio(products.sum(0) - products, squares.sum(0) - squares, rising), 0, 1)
        errors.append(np.sum(squares * weight**2 - 2 * products * weight))
    return bool(errors[0] <= errors[1])


def _resamples(blocks: int, seed: int) -> np.ndarray:
    """How often each block is drawn, (RESAMPLES, blocks)."""
    rng = np.random.default_rng([seed, 0xCA])
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES).astype(np.float64)


def _weights(products: np.ndarray, squares: np.ndarray, rising: bool, drawn: np.ndarray) -> np.ndarray:
    """(bins,) in [0, 1] from sums (blocks, bins); 0 where the bootstrap cannot exclude less."""
    blocks = len(products)
    weight = np.clip(_ratio(products.sum(0), squares.sum(0), rising), 0, 1)
    if blocks < 2:
        return np.zeros_like(weight)
    # Percentiles of few blocks are too narrow (Hesterberg 2015, expanded percentiles), as in `ratio_of_means`.
    tail = stats.norm.cdf(math.sqrt(blocks / (blocks - 1)) * stats.t.ppf(GUARD, blocks - 1))
    # Products this small lose far more to waiting threads than they take (einsum has one).
    sums = (np.einsum("rk,kb->rb", drawn, part) for part in (products, squares))
    low = np.quantile(_ratio(*sums, rising), tail, axis=0)
    return np.where(low < 0, 0.0, weight)


def _scales(values: _Values, error: np.ndarray, std: np.ndarray) -> np.ndarray | None:
    """(bins,) q; None with too few blocks for a promise."""
    blocks = int(values.block.max()) + 1
    if blocks < BLOCKS_TO_PROMISE:
        return None
    score = np.divide(error, std, out=np.where(error > 0, np.inf, 0.0), where=std > 0)
    scale = np.ones(values.centres.size)
    seen = (values.sums(np.ones_like(score)) > 0).sum(0)
    if (seen >= BLOCKS_FOR_BINS).all():
        for number in range(scale.size):
            there = values.bin == number
            scale[number] = conformal(score[there], values.block[there])
    return scale * conformal(score / values.at(scale), values.block)


def conformal(score: np.ndarray, block: np.ndarray, level: float = LEVEL) -> float:
    """The smallest q that holds a value of a new block with probability `level`, if all blocks are exchangeable.

        sum_blocks (share of the block's scores <= q) >= level (n + 1)

    Infinite if n blocks are too few, n < level / (1 - level). With one score a block it is the usual quantile of split
    conformal prediction, the ceil(level (n + 1))-th of n.

    Args:
      score, block: (values,) score and block number of each.

    Source: Lee, Barber, Willett, "Distribution-free inference with hierarchical data" (2023), HCP.
    """
    _, block, counts = np.unique(block, return_inverse=True, return_counts=True)
    order = np.argsort(score)
    reached = np.cumsum(1 / counts[block[order]])
    # Sums of reciprocals come out a rounding error below whole numbers.
    place = int(np.searchsorted(reached, level * (counts.size + 1) * (1 - 1e-12)))
    return float(score[order[place]]) if place < order.size else math.inf


def independent_length(series: np.ndarray) -> int:
    """Frames in blocks of time that can pass for independent, from one number (n,) a frame, in the order of time.

        4 tau,   tau = 1 + 2 sum_l r(l),   r(l) = (1 - l / n) <a(t) a(t + l)> / <a^2>

    Means are over the frames, or pairs of them, that have a number; others hold NaN, and a lag without a pair has the r
    between those of its neighbours. The sum ends before the first autocorrelation r that is not positive, at a quarter
    of the record or the longest lag of a pair at the latest. Where r falls exponentially, the means of neighbouring
    blocks then correlate by about 1 / 16; under tides and seasons, which come back, by more.

    Raises:
      InputError: fewer than two frames, or the same number in all of them.
    """
    series = np.asarray(series, np.float64)
    present = np.isfinite(series)
    anomaly = np.where(present, series - series[present].sum() / max(present.sum(), 1), 0.0)
    if present.sum() < 2 or not anomaly.any():
        raise InputError(f"blocks of time need at least two frames that differ, got {present.sum()}")
    lags = np.arange(max(series.size // 4, 1) + 1)
    both, products = (_lagged(part)[: lags.size] for part in (present.astype(np.float64), anomaly))
    paired = np.flatnonzero(both > 0.5)
    lags = lags[: paired[-1] + 1]
    covariance = (1 - lags / series.size) * np.interp(lags, paired, products[paired] / both[paired])
    correlation = covariance[1:] / covariance[0]
    falling = correlation[: int(np.argmax(correlation <= 0))] if (correlation <= 0).any() else correlation
    return math.ceil(4 * (1 + 2 * falling.sum()))


def _lagged(series: np.ndarray) -> np.ndarray:
    """sum_t a(t) a(t + l) for every lag l of 0 and more."""
    return signal.correlate(series, series, method="fft")[series.size - 1 :]


def _held_out(values: _Values, residual: np.ndarray, std: np.ndarray, factor: float) -> dict[str, float]:
    raw, fused = np.mean((values.error - values.step) ** 2), np.mean(residual**2)
    return {
        "mse_prior": np.mean(values.error**2),
        "mse_raw": raw,
        "mse_fused": fused,
        "spread_skill_raw": np.sqrt(factor * np.mean(values.variance) / raw),
        "spread_skill": np.sqrt(factor * np.mean(std**2) / fused),
    }


def _gate(values: _Values, weight: np.ndarray, evidence: np.ndarray, frames: int) -> Gate | None:
    """The gate with the least error of prior + g w step, if it helps where it was not learnt."""
    if evidence.shape != (frames, 3) or (np.isfinite(evidence).any(-1) != np.isfinite(evidence).all(-1)).any():
        raise InputError(
            f"a gate needs three finite numbers, or none, for each of {frames} fields, got {evidence.shape}"
        )
    known = np.isfinite(evidence).all(-1)
    if not known.any():
        return None
    step = values.at(weight) * values.step
    products, squares, errors = (
        np.bincount(values.frame, part, frames) for part in (step * values.error, step**2, values.error**2)
    )
    block = values.block[np.searchsorted(values.frame, np.arange(frames))]
    start = np.array([3.0, 0.0, 0.0])

    def loss(gate: np.ndarray, kept: np.ndarray) -> float:
        g = np.where(known[kept], special.expit(np.nan_to_num(evidence[kept]) @ gate), 1.0)
        return float(np.sum(squares[kept] * g**2 - 2 * products[kept] * g) / errors[kept].sum())

    def learn(kept: np.ndarray) -> np.ndarray:
        # A unit of a coefficient must be worth a thousandth of the prior's error.
        return optimize.minimize(lambda gate: loss(gate, kept) + 1e-3 * np.sum((gate - start) ** 2), start).x

    change = 0.0
    for left_out in range(int(block.max()) + 1):
        there = block == left_out
        gated = loss(learn(~there), there)
        open_ = np.sum(squares[there] - 2 * products[there]) / errors[there].sum()
        change += (gated - open_) * errors[there].sum()
    return Gate(*learn(np.ones(frames, bool)).tolist()) if change < 0 else None
