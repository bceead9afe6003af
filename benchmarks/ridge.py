"""A regression for one pattern beside the samplers: what a simple nonlinear estimate makes of the same observations.

    python -m benchmarks.ridge --patterns=line:22,walk:90,cells:0.02 --frames=128 --members=16 --methods=kalman
    python -m benchmarks.ridge --patterns=line:22,walk:90,cells:0.02 --frames=128 --methods=kalman --error=0.005
    python -m benchmarks.ridge --patterns=line:22,walk:90 --frames=32 --methods=kalman_jvp --error=0.005 --start

The pattern is fixed: a random one is drawn once, and all frames observe the same cells. `linear` is the best linear
estimate x_lin(y) from the observed values y, `ridge` adds a kernel ridge regression of what it leaves on n training
frames,

    x(y) = x_lin(y) + k(y) (K + lambda I)^-1 R,   k(y)_j = exp(-|z(y) - z(y_j)|^2 / (2 s^2 m)),   K_ij = k(y_i)_j

with rows R_j = x_j - x_lin(y_j) on the cells not observed and z the leading principal components of the observed
values, each divided by the root of its standard deviation, m the mean of |z_j|^2. Their number, s and lambda are those
with the smallest error on validation frames of the same pattern. Of other methods the ensemble mean is compared; with
--start posterior samplers run a second time, from samples of the linear posterior that are moved by x(y) - x_lin(y).

Observed values are the true ones, of training frames too; with --error all have errors of that size, which every method
knows.

Columns: mean square error of the cells not observed over the test frames that jax_repaint.evaluate draws, (m/s)^2, and
its ratio to that of `linear` and of `ridge` on the same frames, with 95 % intervals of a paired block bootstrap; of
ensembles also the standard deviation of a member over the error of the mean.

Source: Saunders, Gammerman, Vovk, "Ridge regression learning algorithm in dual variables" (1998), eq. 11.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import tqdm
from absl import flags

from benchmarks import measure
from jax_repaint import SHIPPED, command, metrics, model, scoring
from jax_repaint.cases import (
    OBSERVATION_ERROR,
    Case,
    block_length,
    held_out,
    observation_of,
    observed_cells,
    pick,
    with_errors,
)
from jax_repaint.data.fields import Fields, Split
from jax_repaint.errors import InputError
from jax_repaint.methods import POSTERIOR, check_methods, run_method
from jax_repaint.model import Model
from jax_repaint.prior import linear
from jax_repaint.prior.ridge import Choice, kernel, solve, spaced, turning

COMPONENTS = (15, 30, 60, 120)
LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # two frames lie 1.4 apart
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
VALIDATION = 600  # frames


def turned(train: np.ndarray, others: Sequence[np.ndarray], components: int) -> list[np.ndarray]:
    """z of the rows of `train` (n, d) and of each of `others`."""
    mean, turn = turning(train, components)
    return [(rows - mean) @ turn for rows in (train, *others)]


def weights(train: np.ndarray, at: np.ndarray, length: float, penalty: float) -> np.ndarray:
    """k(at) (K + penalty I)^-1, (m, n): what the regression makes of training targets R is weights @ R.

    Args:
      train, at: (n, d) and (m, d) predictors.
    """
    return solve(kernel(train, train, length), kernel(at, train, length).T, penalty).T


def select(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    components: Sequence[int] = COMPONENTS,
    lengths: Sequence[float] = LENGTHS,
    penalties: Sequence[float] = PENALTIES,
) -> Choice:
    """The regression whose error on validation frames is smallest.

        |R' - W R|^2 = |R'|^2 - 2 <W, R' R^T> + <W, W R R^T>

    Args:
      train, validation: predictors (n, d) and targets R (n, values), R' of the validation frames.
    """
    (y, r), (y_val, r_val) = train, validation
    products, across, total = r @ r.T, r_val @ r.T, float(np.sum(r_val**2))
    best = None
    for count in components:
        z, z_val = turned(y, [y_val], count)
        for length, penalty in itertools.product(lengths, penalties):
            w = weights(z, z_val, length, penalty)
            error = 1 + float(np.sum(w * (w @ products - 2 * across))) / total
            if best is None or error < best.error:
                best = Choice(z.shape[1], length, penalty, error)
    return best


def make_cases(
    trained: Model, fields: Fields, numbers: Sequence[int], pattern: str, seed: int = 0, error: float | None = None
) -> list[Case]:
    """The cases of a pattern, all with the cells that it draws of frame 0; `error` is that of cases.make_cases.

    Raises:
      InputError: a pattern that cannot be drawn, no cell left to observe or to score.
    """
    observed = observed_cells(fields, fields.velocity[0], pattern, 0, seed)
    cases, analysis = [], None
    told = OBSERVATION_ERROR if error is None else error
    for number, velocity, when in zip(numbers, fields.velocity, fields.time, strict=True):
        noisy = None if error is None else with_errors(velocity, error, int(number), seed)
        observation = observation_of(trained, velocity if noisy is None else noisy, observed, told)
        analysis = analysis or linear.analysis(trained.gaussian, observation)
        cases.append(Case(pattern, int(number), when, velocity, observed, observation, analysis, told, noisy))
    return cases


def seen_and_left(
    trained: Model, case: Case, velocity: np.ndarray, seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of frames (n, y, x, 2) that observe the cells of a case: values (n, d), and R (n, values) in m/s; float64.

    Args:
      seen: the same frames with the errors of observations; by default without.
    """
    seen = velocity if seen is None else seen
    values = trained.standardiser.standardise(seen, trained.ocean)[:, case.observed]
    padding = ((0, 0), (0, case.observation.size - values.shape[1]), (0, 0))
    mean = linear.estimate(trained.gaussian, case.observation, np.pad(values, padding))
    scored = trained.ocean & ~case.observed
    left = (velocity - trained.to_velocity(mean))[:, scored]
    return values.reshape(len(values), -1).astype(np.float64), left.reshape(len(left), -1).astype(np.float64)


def ridge(
    trained: Model, cases: Sequence[Case], base: np.ndarray, train: Fields, validation: Fields, seed: int = 0
) -> tuple[np.ndarray, Choice]:
    """`ridge` of cases that observe the same cells, (cases, y, x, 2) m/s, from their linear estimates `base`.

    Args:
      train, validation: frames, whose observations have errors if those of the cases have; `seed` names them.
    """
    case = cases[0]
    parts = []
    for number, part in enumerate((train, validation)):
        noisy = None if case.noisy is None else with_errors(part.velocity, case.error, number, seed)
        parts.append(seen_and_left(trained, case, part.velocity, noisy))
    (y, r), _ = parts
    choice = select(*parts)
    truth, seen = (np.stack(fields) for fields in zip(*((case.truth, case.seen) for case in cases), strict=True))
    y_test, _ = seen_and_left(trained, case, truth, seen)
    z, z_test = turned(y, [y_test], choice.components)
    found = weights(z, z_test, choice.length, choice.penalty) @ r
    made = base.copy()
    made[:, trained.ocean & ~case.observed] += found.reshape(len(cases), -1, 2).astype(np.float32)
    return made, choice


def measure_pattern(
    trained: Model,
    select: Callable[[np.ndarray], Fields],
    split: Split,
    pattern: str,
    frames: int,
    train: int,
    methods: Sequence[str],
    members: int,
    seed: int = 0,
    error: float | None = None,
    start: bool = False,
) -> dict:
    """The rows of a pattern and what was chosen for it.

    Args:
      select, split: see `held_out`.
      train: number of training frames.
      error: of the observations, as in cases.make_cases.
      start: whether posterior samplers start from the regression too, as a row of their own.

    Raises:
      InputError: frames with gaps, whose observed cells would differ.
    """
    numbers = pick(split, frames, seed)
    test, *others = (select(n) for n in (numbers, spaced(split.train, train), spaced(split.validation, VALIDATION)))
    for part in (test, *others):
        if part.gaps:
            raise InputError(f"{part.name}: {100 * part.gaps:.2g} % of the values on ocean cells are missing")
    cases = make_cases(trained, test, numbers, pattern, seed, error)
    means = {"linear": np.concatenate(run_method("linear", trained, test, cases, 1).members)}
    means["ridge"], choice = ridge(trained, cases, means["linear"], *others, seed)
    scored = test.ocean & ~cases[0].observed
    offsets = np.nan_to_num(means["ridge"] - means["linear"])
    moved = [dataclasses.replace(case, offset=offset) for case, offset in zip(cases, offsets, strict=True)]
    runs = {name: (name, cases) for name in methods}
    runs |= {f"{name} from ridge": (name, moved) for name in methods if start and name in POSTERIOR}
    spreads = {}
    for label in (bar := tqdm.tqdm(runs, unit="method", disable=None)):
        bar.set_description(f"{pattern}, {label}")
        name, own = runs[label]
        result = run_method(name, trained, test, own, members, seed)
        means[label] = np.stack([made.mean(0) for made in result.members])
        spreads[label] = float(np.mean([np.mean(result.spread(i)[scored] ** 2) for i in range(len(own))]))
    errors = {
        name: np.array([metrics.mse(one, case.truth, scored) for one, case in zip(made, cases, strict=True)])
        for name, made in means.items()
    }
    block = block_length(split, len(numbers))

    def over(name: str, base: str) -> dict[str, float]:
        ratio = scoring.ratio_of_means(errors[name], errors[base], block, seed)
        return {key: getattr(ratio, key) for key in ("ratio", "lo", "hi", "wins")}

    rows = [
        {"method": name, "mse": float(error.mean()), "linear": over(name, "linear"), "ridge": over(name, "ridge"),
         "spread": math.sqrt(spreads[name] / error.mean()) if name in spreads else None}
        for name, error in errors.items()
    ]  # fmt: skip
    return {"pattern": pattern, "observed": int(cases[0].observed.sum()), "train": len(others[0]),
            "validation": len(others[1]), "frames": len(numbers), "block": block,
            "choice": dataclasses.asdict(choice), "rows": rows}  # fmt: skip


def report(results: dict) -> str:
    """The results as tables."""

    def text(over: dict[str, float]) -> str:
        return "{ratio:.3f} [{lo:.3f}, {hi:.3f}]".format(**over)

    parts = [measure.banner(results)]
    for p in results["patterns"]:
        c = p["choice"]
        exact = "" if results["error"] is None else f" with errors of {results['error']:g} m/s"
        parts.append(
            f"{p['pattern']}, {p['observed']} cells observed{exact} in all of {p['frames']} frames; ridge of "
            f"{p['train']} frames: {c['components']} components, length {c['length']:g}, penalty {c['penalty']:g}"
        )
        rows = []
        for r in p["rows"]:
            spread = "" if r["spread"] is None else f"{r['spread']:.2f}"
            rows.append([r["method"], f"{r['mse']:.3g}", text(r["linear"]), text(r["ridge"]), spread])
        parts.append(measure.table(["method", "MSE", "over linear [95 %]", "over ridge [95 %]", "spread/error"], rows))
    return "\n".join(parts)


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    frames, train, members = (2, 40, 4) if f.smoke else (f.frames, f.train, f.members)
    if not f.patterns:
        raise InputError("at least one pattern is needed")
    methods = [name for name in dict.fromkeys(f.methods) if name not in ("linear", "ridge")]
    check_methods(methods or ["linear"], members)
    trained = model.load(f.model)
    select, split = held_out(trained, f.fields)
    results = {"machine": measure.machine(), "dtype": "float32", "members": members, "seed": f.seed}
    results |= {"error": f.error, "patterns": []}
    for pattern in dict.fromkeys(f.patterns):
        found = measure_pattern(
            trained, select, split, pattern, frames, train, methods, members, f.seed, f.error,
            f.start,
        )  # fmt: skip
        results["patterns"].append(found)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_string("model", SHIPPED, "Folder of a model; by default the one that comes with the package.")
    flags.DEFINE_string("fields", None, "File of fields; by default those that the model was trained on.")
    flags.DEFINE_list("patterns", ["line:22", "walk:90", "cells:0.02"], "Observation patterns, each drawn once.")
    flags.DEFINE_integer("frames", 128, "Test frames.", lower_bound=1)
    flags.DEFINE_integer("train", 3000, "Training frames of the regression.", lower_bound=2)
    flags.DEFINE_integer("members", 16, "Members of an ensemble.", lower_bound=1)
    flags.DEFINE_list("methods", ["kalman"], "Of jax_repaint.evaluate, beside linear and ridge.")
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and members.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_float("error", None, "Standard error of the observations, m/s; by default they are the true values.")
    flags.DEFINE_boolean("start", False, "Whether posterior samplers start from the regression too.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "Two test and forty training frames, four members, whatever else is asked.")
    command.run(main)
