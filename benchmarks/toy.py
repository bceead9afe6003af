"""Samplers where the posterior is known: a mixture of flow regimes, its exact denoiser and its exact posterior.

    python -m benchmarks.toy --pattern=line --cases=16 --members=16 --out=toy.json

On 16 x 24 cells the prior has four regimes of equal weight, each a Gaussian: streamfunction and potential with
Matern-5/2 covariance, 16 % of the energy in the divergent part, own lengths and direction, and an own mean flow. Both
the denoiser and the posterior of a mixture of Gaussians are mixtures again, so nothing that a sampler gets wrong is the
network's fault. The GP (the best linear estimate) has the mixture's mean and covariance. The schedule is the linear
one of 250 steps, where sigma ends at 3.4; observations have errors of .01.

Columns, averages over the cases, of the values not observed:

    calls      denoiser calls of a member, without those of gradients
    single     mean square error of a member over that of the exact posterior mean (ideal 2)
    mean       the same of the mean of M members (ideal 1 + 1 / M)
    m_inf      mean - V / M: of infinitely many (ideal 1)
    V          variance of the members over that of the posterior (ideal 1)
    SSR        spread-skill ratio, sqrt((M + 1) / M V / mean) (ideal 1)
    cover      truths within the range of the members (ideal (M - 1) / (M + 1))
    CRPS       fair, over that of the exact posterior (ideal 1; of a single estimate the mean absolute error)
    small      energy along the trailing EOFs that hold 5 % of the variance, over the posterior's (ideal 1)

Errors are expectations over the posterior; CRPS and cover are means over draws of it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from benchmarks import measure
from jax_repaint import command, metrics, observe
from jax_repaint.array_types import Array, Field, Float
from jax_repaint.denoise import PrincipalGaussian, Regimes
from jax_repaint.ensemble import member_keys, posterior_ensemble, repaint_ensemble
from jax_repaint.errors import InputError
from jax_repaint.guide import prior_draw
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.prior.analysis import Analysis
from jax_repaint.sample import Known, Repaint, doubt, method, noise_weight
from jax_repaint.schedule import Schedule

SHAPE = (16, 24)
OCEAN = np.ones(SHAPE, bool)
SIZE = 2 * OCEAN.size
# Lengths along and across in cells, angle of the first, direction of the mean flow, variance.
REGIMES = (
    ((16, 9), 0.0, 0.0, 1.0),
    ((14, 8), np.pi / 2, np.pi / 2, 0.7),
    ((8, 6), np.pi / 4, np.pi, 1.4),
    ((18, 12), -np.pi / 4, -np.pi / 2, 0.5),
)
MEAN_FLOW = 0.95
DIVERGENT = 0.16
RANK = 192
NOISE = 0.01
PATTERNS = {"line": "line:8", "walk": "walk:26"}
DRAWS = 48  # truths of each case for CRPS and coverage
REFERENCE_DRAWS = 256  # exact samples that CRPS and small scales are compared with


def velocity_covariance(lengths: tuple[float, float], angle: float, divergent: float = DIVERGENT) -> np.ndarray:
    """Covariance (768, 768) of velocity of variance 1, values ordered (y, x, c).

        (u, v) = sqrt(1 - f) (-psi_y, psi_x) + sqrt(f) (phi_x, phi_y),   psi, phi: Matern 5/2, lengths in cells

    The gradient of such a field has covariance 5/3 exp(-s) ((1 + s) M - 5 M d (M d)^T), s^2 = 5 d^T M d.
    """
    y, x = np.indices(SHAPE).reshape(2, -1)
    apart = np.stack([x[:, None] - x, y[:, None] - y], -1).astype(float)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    metric = turn.T @ np.diag(1 / np.square(lengths, dtype=float)) @ turn
    along = apart @ metric
    s = np.sqrt(5 * (apart * along).sum(-1))[..., None, None]
    gradient = 5 / 3 * np.exp(-s) * ((1 + s) * metric - 5 * along[..., :, None] * along[..., None, :])
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    covariance = (1 - divergent) * quarter @ gradient @ quarter.T + divergent * gradient
    covariance /= np.trace(covariance[0, 0]) / 2
    return covariance.transpose(0, 2, 1, 3).reshape(SIZE, SIZE)


def _principal(mean: np.ndarray, variance: np.ndarray, direction: np.ndarray, rest: float) -> PrincipalGaussian:
    """From directions (768, r) in columns."""
    arrays = mean.reshape(*SHAPE, 2), direction.T.reshape(-1, *SHAPE, 2), variance, rest, OCEAN[..., None]
    return PrincipalGaussian(*(jnp.asarray(a, jnp.float32) for a in arrays))


@dataclasses.dataclass(frozen=True)
class Toy:
    """The prior: exact denoiser, the Gaussian of its mean and covariance, its regimes in float64.

    Attributes:
      denoiser: of the mixture.
      gaussian: same mean and covariance.
      mean: (k, 768).
      covariance: (k, 768, 768).
      root: (k, 768, 768), a square root of each covariance.
      small: (768, n) trailing EOFs of the mixture that hold 5 % of its variance.
    """

    denoiser: Regimes
    gaussian: PrincipalGaussian
    mean: np.ndarray
    covariance: np.ndarray
    root: np.ndarray
    small: np.ndarray

    def sample(self, rng: np.random.Generator, regime: np.ndarray) -> np.ndarray:
        """Fields (n, 768) of the regimes (n,)."""
        x = rng.standard_normal((len(regime), SIZE))
        for k in np.unique(regime):
            x[regime == k] = self.mean[k] + x[regime == k] @ self.root[k].T
        return x


def make_toy() -> Toy:
    """The mixture, scaled to mean variance 1 and centred."""
    means, parts = [], []
    for lengths, angle, towards, size in REGIMES:
        variance, direction = np.linalg.eigh(size * velocity_covariance(lengths, angle))
        variance, direction = variance[::-1], direction[:, ::-1]
        parts.append((variance[:RANK], direction[:, :RANK], variance[RANK:].mean()))
        means.append(np.tile(MEAN_FLOW * np.array([np.cos(towards), np.sin(towards)]), OCEAN.size))
    mean = np.stack(means) - np.mean(means, axis=0)
    covariance = np.stack([(e * (v - rest)) @ e.T + rest * np.eye(SIZE) for v, e, rest in parts])
    total = covariance.mean(0) + mean.T @ mean / len(mean)
    scale = np.trace(total) / SIZE
    mean, covariance, total = mean / np.sqrt(scale), covariance / scale, total / scale
    regimes = [_principal(m, v / scale, e, rest / scale) for m, (v, e, rest) in zip(mean, parts, strict=True)]
    variance, direction = np.linalg.eigh(total)
    small = direction[:, np.cumsum(variance) <= 0.05 * SIZE]
    return Toy(
        Regimes(jnp.full(len(mean), 1 / len(mean)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *regimes)),
        _principal(np.zeros(SIZE), variance[::-1], direction[:, ::-1], variance[0]),
        mean, covariance, np.linalg.cholesky(covariance), small,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Exact:
    """The posterior of one case: a mixture again.

    Attributes:
      seen: (m,) places of the values in a flat field.
      values: (m,) observed.
      weight: (k,).
      gain: (k, 768, m), Sigma_k A^T (A Sigma_k A^T + R)^-1.
      mean, variance: (k, 768).
    """

    toy: Toy
    seen: np.ndarray
    values: np.ndarray
    weight: np.ndarray
    gain: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, toy: Toy, seen: np.ndarray, values: np.ndarray) -> "Exact":
        """Given values (m,) at the places `seen` (m,) of a flat field, with errors of NOISE."""
        logs, gains, means, variances = [], [], [], []
        for mean, covariance in zip(toy.mean, toy.covariance, strict=True):
            s = covariance[np.ix_(seen, seen)] + NOISE**2 * np.eye(len(seen))
            gain = np.linalg.solve(s, covariance[seen]).T
            misfit = values - mean[seen]
            logs.append(-0.5 * (misfit @ np.linalg.solve(s, misfit) + np.linalg.slogdet(s)[1]))
            gains.append(gain)
            means.append(mean + gain @ misfit)
            variances.append(np.diag(covariance) - (gain * covariance[:, seen]).sum(1))
        weight = np.exp(np.array(logs) - np.max(logs))
        return cls(toy, seen, values, weight / weight.sum(), *map(np.stack, (gains, means, variances)))

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """(count, 768), each by Matheron's rule in a regime drawn by its weight."""
        regime = rng.choice(len(self.weight), count, p=self.weight)
        x = self.toy.sample(rng, regime)
        misfit = self.values + NOISE * rng.standard_normal((count, len(self.seen))) - x[:, self.seen]
        for k in np.unique(regime):
            x[regime == k] += misfit[regime == k] @ self.gain[k].T
        return x

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (768,)."""
        mean = self.weight @ self.mean
        return mean, self.weight @ (self.variance + (self.mean - mean) ** 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A field of the prior, seen at a pattern.

    Attributes:
      number: names it in random keys.
      observed: (y, x) bool.
      observation, analysis: what the samplers get, the GP's analysis included.
      exact: posterior.
      truths, reference: (n, 768) draws of it, to score against and to compare scores with.
    """

    number: int
    observed: np.ndarray
    observation: observe.Observation
    analysis: Analysis
    exact: Exact
    truths: np.ndarray
    reference: np.ndarray


def make_cases(toy: Toy, pattern: str, count: int, seed: int = 0) -> list[Case]:
    """Cases 0..count-1 of a pattern in PATTERNS; a walk is drawn anew for each."""
    cases, analyses = [], {}
    for number in range(count):
        rng = np.random.default_rng([seed, number, 0x70])
        truth = toy.sample(rng, rng.integers(len(toy.mean), size=1))[0]
        observed = observe.parse(PATTERNS[pattern], OCEAN, observe.pattern_rng(seed, number))
        values = (truth + NOISE * rng.standard_normal(SIZE)).astype(np.float32)
        observation = observe.from_cells(observed, values.reshape(*SHAPE, 2), NOISE, OCEAN)
        seen = np.flatnonzero(np.repeat(observed.reshape(-1), 2))
        exact = Exact.of(toy, seen, values[seen].astype(float))
        if observed.tobytes() not in analyses:
            analyses[observed.tobytes()] = linear.analysis(toy.gaussian, observation)
        draws = exact.sample(rng, DRAWS), exact.sample(rng, REFERENCE_DRAWS)
        cases.append(Case(number, observed, observation, analyses[observed.tobytes()], exact, *draws))
    return cases


def known_of(cases: Sequence[Case]) -> Known:
    """What the RePaint family pastes and starts from, the GP's mean and variance; leaves (n, ...)."""

    def one(case: Case) -> Known:
        observed, value = case.observation.on_grid(SHAPE)
        mean = case.analysis.mean(case.observation.values)
        return Known(value, ~observed[..., None], mean, case.analysis.variance)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, cases))


def mean_weight(known: Known, stage: Repaint) -> float:
    """Mean noise weight of a stage over the missing cells of all fields."""

    def one(field: Known) -> Array:
        w = noise_weight(doubt(field.prior_variance, field.missing), field.missing, stage.noise_floor, stage.gamma)
        return jnp.mean(w, where=field.missing)

    return float(jnp.mean(jax.vmap(one)(known)))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of the table: denoiser calls of a member, and the function that makes members (n, M, y, x, 2)."""

    calls: int
    make: Callable[[], np.ndarray]


@jax.jit
def _gp_samples(gaussian: PrincipalGaussian, case: Analysis, values: Array, keys: Array) -> Float[Array, "k y x c"]:
    def one(key: Array) -> Field:
        draw, noise = jax.random.split(key)
        return case.sample(noise, prior_draw(gaussian, draw), values)

    return jax.vmap(one)(keys)


def samplers(toy: Toy, cases: Sequence[Case], members: int, seed: int = 0, short: bool = False) -> dict[str, Sampler]:
    """All rows by name; `short` runs few steps, which checks that they run."""
    known, schedule = known_of(cases), Schedule.linear()
    frames = [case.number for case in cases]

    def family(name: str, **changes: float | str) -> Sampler:
        if short:
            changes |= {"t_start": 2} | ({"t_refine": 1} if name == "multistage" else {})
        stages = method(name, **changes)

        def make() -> np.ndarray:
            return repaint_ensemble(
                toy.denoiser, known, schedule, stages, frames=frames, members=members, seed=seed, chunk=256
            ).x[:, :, -1]

        return Sampler(sum(stage.calls for stage in stages), make)

    def guided(correction: str, count: int, **changes: float) -> Sampler:
        hyper = Posterior.create(
            float(schedule.sigma[-1]), float(schedule.sigma[0]), 3 if short else count, correction=correction, **changes
        )

        prior = toy.denoiser if correction == "regimes" else toy.gaussian

        def make() -> np.ndarray:
            return posterior_ensemble(
                toy.denoiser,
                [evidence_for(hyper, toy.gaussian.ocean, case.observation, prior) for case in cases],
                toy.gaussian, [case.analysis for case in cases], hyper,
                frames=[case.number for case in cases], members=members, seed=seed, antithetic=False,
            )  # fmt: skip

        return Sampler(hyper.calls, make)

    def gp_samples(case: Case) -> np.ndarray:
        keys = member_keys(seed, [case.number], range(members))[0]
        return np.asarray(_gp_samples(toy.gaussian, case.analysis, case.observation.values, keys))

    def exact_samples(case: Case) -> np.ndarray:
        rng = np.random.default_rng([seed, case.number, 0xE5])
        return case.exact.sample(rng, members).reshape(members, *SHAPE, 2)

    equal = mean_weight(known, method("adaptive")[0])
    return {
        "exact samples": Sampler(0, lambda: np.stack(list(map(exact_samples, cases)))),
        "GP mean": Sampler(0, lambda: np.asarray(known.prior_mean)[:, None]),
        "GP samples": Sampler(0, lambda: np.stack(list(map(gp_samples, cases)))),
        "plain, 1 resample": family("plain", resample_steps=1),
        "plain": family("plain"),
        "gp_init": family("gp_init"),
        "adaptive S1": family("adaptive"),
        "adaptive S1, gamma 1": family("adaptive", gamma=1.0),
        "uniform .47 S1": family("uniform"),
        f"uniform {equal:.2f} S1, adaptive's mean": family("uniform", noise_floor=equal),
        "adaptive S6": family("multistage"),
        "adaptive S6, gamma 1": family("multistage", gamma=1.0),
        "uniform .3 S6": family("multistage", noise_floor=0.3, refine_floor=0.3, normalise="flat"),
        "w 1 S6": family("multistage", noise_floor=1.0, refine_floor=1.0),
        "paste 58": guided("paste", 58),
        "pigdm 58": guided("pigdm", 58),
        "cov_pigdm 58": guided("cov_pigdm", 58),
        "mmps 58": guided("mmps", 58),
        "dps 250": guided("dps", 250),
        "regimes 31": guided("regimes", 31),
        "kalman 31": guided("kalman", 31),
        "kalman 16": guided("kalman", 16),
        "kalman 8": guided("kalman", 8),
        "kalman_cg 16": guided("kalman_cg", 16),
        "kalman_jvp 16": guided("kalman_jvp", 16),
    }


def score(toy: Toy, case: Case, members: np.ndarray) -> dict[str, float]:
    """Numbers of one case (module docstring) for members (M, y, x, 2), each relative to the exact posterior."""
    truths, reference = case.truths, case.reference
    flat = members.reshape(len(members), -1).astype(float)
    hidden = ~np.repeat(case.observed.reshape(-1), 2)
    mean, variance = (moment[hidden] for moment in case.exact.moments())
    least, count = variance.sum(), len(flat)

    def error(x: np.ndarray) -> np.ndarray:
        return 1 + ((x[..., hidden] - mean) ** 2).sum(-1) / least

    spread, cover = 0.0, 0.0
    if count > 1:
        spread = flat[:, hidden].var(0, ddof=1).sum() / least
        # All truths at once, one below the other.
        scored, tiled = np.tile(~case.observed, (DRAWS, 1)), np.tile(members, (1, DRAWS, 1, 1))
        crps = metrics.fair_crps(truths.reshape(-1, SHAPE[1], 2), tiled, scored)
        low, high = flat[:, hidden].min(0), flat[:, hidden].max(0)
        cover = float(np.mean((low <= truths[:, hidden]) & (truths[:, hidden] <= high)))
    else:
        crps = float(np.abs(truths - flat)[:, hidden].mean())
    # E|X - X'| / 2, from draws in two halves.
    half = REFERENCE_DRAWS // 2
    best = np.abs(reference[:half] - reference[half:])[:, hidden].mean() / 2

    def small(x: np.ndarray) -> float:
        return float(((x @ toy.small) ** 2).sum(-1).mean())

    return {
        "single": float(error(flat).mean()), "mean": float(error(flat.mean(0))), "V": float(spread),
        "cover": cover, "CRPS": float(crps / best), "small": small(flat) / small(reference),
    }  # fmt: skip


def combine(scores: Sequence[dict[str, float]], members: int) -> dict[str, float]:
    """The row of a method from its cases."""
    row = {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
    row["m_inf"] = row["mean"] - row["V"] / members
    row["SSR"] = float(np.sqrt((members + 1) / members * row["V"] / row["mean"]))
    row["CRPS_error"] = float(np.std([s["CRPS"] for s in scores]) / np.sqrt(len(scores)))
    return row


def run(pattern: str, cases: int, members: int, seed: int = 0, names: Sequence[str] = (), short: bool = False) -> dict:
    """The table of a pattern.

    Args:
      names: of the rows, or what the names of several begin with; all by default.

    Raises:
      InputError: an unknown pattern or row, fewer than two members.
    """
    if pattern not in PATTERNS:
        raise InputError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    if cases < 1 or members < 2:
        raise InputError(f"the table needs a case and two members, got {cases} and {members}")
    toy = make_toy()
    chosen = make_cases(toy, pattern, cases, seed)
    every = samplers(toy, chosen, members, seed, short)
    for name in names:
        if not any(row.startswith(name) for row in every):
            raise InputError(f"method {name!r} is not one of {'; '.join(every)}")
    rows = []
    begins = tuple(name for name in names if name not in every)
    picked = [row for row in every if not names or row in names or row.startswith(begins)]
    for name in (bar := tqdm.tqdm(picked, unit="method", disable=None)):
        bar.set_description(name)
        made = every[name].make()
        scores = [score(toy, case, x) for case, x in zip(chosen, made, strict=True)]
        rows.append({"method": name, "calls": every[name].calls} | combine(scores, made.shape[1]))
    return {"machine": measure.machine(), "dtype": "float32", "pattern": pattern, "cases": cases, "members": members,
            "seed": seed, "rows": rows}  # fmt: skip


def report(results: dict) -> str:
    """The results as a table."""
    columns = ("single", "mean", "m_inf", "V", "SSR", "cover", "CRPS", "small")
    rows = [
        [r["method"], str(r["calls"]), *(f"{r[c]:.{3 if c in ('cover', 'CRPS') else 2}f}" for c in columns)]
        for r in results["rows"]
    ]
    return "\n".join(
        [
            measure.banner(results),
            f"{results['pattern']}, {results['cases']} cases, {results['members']} members",
            measure.table(["method", "calls", *columns], rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    cases, members = (2, 4) if f.smoke else (f.cases, f.members)
    results = run(f.pattern, cases, members, f.seed, f.methods, f.smoke)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_enum("pattern", "line", list(PATTERNS), "What is observed: a row of the grid, or a random walk.")
    flags.DEFINE_integer("cases", 16, "Fields of the prior.", lower_bound=1)
    flags.DEFINE_integer("members", 16, "Members of an ensemble.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of cases and members.", lower_bound=0)
    flags.DEFINE_list("methods", [], "Rows of the table, or what their names begin with; all by default.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "Few steps, two cases and four members, whatever else is asked.")
    command.run(main)
