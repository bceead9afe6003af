"""What a new pattern costs before the first network call: its linear analysis, and the gains of 16 levels.

    python -m benchmarks.gains --rows=96,384,1024 --out=gains.json

`cells` are whole cells, whose gains are by blocks where they are more than half the directions of the prior
(gains.rows_of); `points` are as many that lie between cells and share some, whose gains are
whole matrices. On the host.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from benchmarks import measure
from jax_repaint import command, gains, observe
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.methods import LEVELS, START
from jax_repaint.prior import linear
from jax_repaint.schedule import levels

GRID = (48, 96)
KINDS = ("cells", "points")


def pattern(kind: str, rows: int) -> observe.Observation:
    """Rows scattered over the grid: whole cells, or points half-way to the next cell in the east."""
    drawn = np.random.default_rng(0).choice(GRID[0] * GRID[1] - 1, rows, replace=False)
    values, error = np.zeros((rows, 2)), 0.05
    if kind == "cells":
        return observe.from_weights(drawn[:, None], np.ones((rows, 1)), values, error, rows)
    # One cell that two of them share makes the difference.
    drawn[1] = drawn[0] + 1
    return observe.from_weights(np.stack([drawn, drawn + 1], 1), np.full((rows, 2), 0.5), values, error, rows)


def prepared(prior: PrincipalGaussian, observation: observe.Observation) -> tuple[Callable[[], object], int]:
    """A call that makes analysis and gains, and the bytes of its results."""
    sigma = levels(LEVELS, 0.01, START)

    def call() -> object:
        made = linear.analysis(prior, observation), gains.kalman_gains(prior, observation, sigma)
        return jax.block_until_ready(made)

    analysis, gain = call()
    own = jax.tree.leaves(gain)
    own += jax.tree.leaves(analysis.evidence.gain if hasattr(analysis, "evidence") else analysis.gain)
    return call, sum(leaf.nbytes for leaf in own)


def measure_gains(rows: Sequence[int], rounds: int) -> dict:
    """Seconds and bytes of each kind and number of rows.

    Raises:
      InputError: more rows than the grid has cells.
    """
    if max(rows) >= GRID[0] * GRID[1]:
        raise InputError(f"--rows must be below the {GRID[0] * GRID[1]} cells of the grid, got {max(rows)}")
    prior, found = measure.gaussian(GRID), []
    for count in rows:
        made = {kind: prepared(prior, pattern(kind, count)) for kind in KINDS}
        seconds = measure.interleaved({kind: call for kind, (call, _) in made.items()}, rounds)
        found += [
            {
                "rows": count,
                "kind": kind,
                "by_blocks": gains.rows_of(prior, pattern(kind, count)).by_blocks,
                "seconds": measure.spread(seconds[kind]),
                "over_points": measure.spread(seconds[kind] / seconds["points"]),
                "megabytes": made[kind][1] / 1e6,
            }
            for kind in KINDS
        ]
    return {"machine": measure.machine(), "dtype": "float64", "levels": LEVELS, "rows": found}


def report(results: dict) -> str:
    """The results as a table."""
    rows = [
        [
            str(r["rows"]), r["kind"], "blocks" if r["by_blocks"] else "whole", measure.text(r["seconds"]),
            measure.text(r["over_points"]), f"{r['megabytes']:.3g}",
        ]
        for r in results["rows"]
    ]  # fmt: skip
    head = ["rows", "kind", "gains", "seconds", "over points", "MB"]
    return "\n".join([measure.banner(results), f"{results['levels']} levels", measure.table(head, rows)])


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    rows, rounds = ([8, 160], 1) if f.smoke else (measure.whole_numbers("rows", f.rows), f.rounds)
    results = measure_gains(rows, rounds)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_list("rows", ["96", "384", "1024"], "Numbers of observed positions.")
    flags.DEFINE_integer("rounds", 3, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "A few rows and one round, whatever else is asked.")
    command.run(main)
