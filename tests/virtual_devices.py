"""Prints small ensembles on 1, 2 and 8 virtual CPU devices; run by test_ensemble.py with XLA_FLAGS set."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jax_repaint import guide, observe
from jax_repaint.ensemble import (
    in_chunks,
    member_keys,
    over_devices,
    posterior_ensemble,
    posterior_frames,
    repaint_ensemble,
    stack_analyses,
    stack_evidence,
)
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.sample import Known, method
from jax_repaint.schedule import Schedule

SHAPE = (6, 8)
OCEAN = np.ones(SHAPE, bool)


@struct.dataclass
class Smooth:
    """A denoiser with a convolution, as networks have."""

    kernel: jax.Array

    def __call__(self, x, sigma):
        made = jax.lax.conv_general_dilated(
            x[None], self.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return made[0]


def check_shared(evidence, gaussian, analysis, hyper) -> None:
    """Every device samples its own members of the frames of a batch, and asks no other for theirs."""
    mesh = over_devices(8)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("members"), PartitionSpec()))
    mine = np.zeros(8, np.int32), (member_keys(0, range(8), range(3)), np.ones(8, np.float32))
    shared = (
        Smooth(jnp.full((3, 3, 2, 2), 0.05)), stack_evidence([evidence] * 3), gaussian, stack_analyses([analysis] * 3),
        hyper,
    )  # fmt: skip
    text = posterior_frames.lower(*jax.device_put(mine, split), *jax.device_put(shared, whole)).compile().as_text()
    assert "convolution" in text
    assert "all-gather" not in text


def main() -> None:
    rng = np.random.default_rng(0)
    fields = np.cumsum(rng.standard_normal((40, *SHAPE, 2)), axis=1).astype(np.float32)
    gaussian = linear.fit(fields, OCEAN, 6)
    truth = np.asarray(guide.prior_draw(gaussian, jax.random.key(3)))
    seen = observe.from_cells(observe.line(OCEAN, 2), truth, 0.1, OCEAN)
    observed, value = seen.on_grid(SHAPE)
    analysis = linear.analysis(gaussian, seen)
    known = Known(value, ~observed[..., None], analysis.mean(seen.values), analysis.variance)
    known = jax.tree.map(lambda leaf: leaf[None], known)
    stages = method("multistage", 20, t_start=8, t_refine=5, resample_steps=2, stages=2)
    hyper = Posterior.create(10.0, 0.02, 6)
    evidence = evidence_for(hyper, gaussian.ocean, seen, gaussian)
    check_shared(evidence, gaussian, analysis, hyper)
    results = {}
    for count in (1, 2, 8):
        devices = jax.devices()[:count]
        used, rows = set(), set()

        def run(row, x, used=used, rows=rows):
            used |= x.sharding.device_set
            rows.add(len(row))
            return row[:, None] * jnp.sin(x)

        same = in_chunks(run, np.arange(13), np.ones((13, 2), np.float32), 5, devices=devices)
        np.testing.assert_allclose(same, np.arange(13)[:, None] * np.full((1, 2), np.sin(1)), rtol=1e-6)
        options = {"chunk": 5, "devices": devices}
        schedule = Schedule.linear(20, 1e-3, 0.2)
        family = repaint_ensemble(gaussian, known, schedule, stages, frames=[4], members=7, **options)
        pairs = posterior_ensemble(
            gaussian, [evidence] * 3, gaussian, [analysis] * 3, hyper,
            frames=[4, 5, 6], members=6, chunk=12, devices=devices,
        )  # fmt: skip
        one_by_one = posterior_ensemble(
            gaussian, [evidence], gaussian, [analysis], hyper, frames=[5], members=6, chunk=5, devices=devices
        )
        np.testing.assert_allclose(one_by_one[0], pairs[1], atol=1e-5)
        (size,) = rows
        results[count] = {
            "devices": len(used), "rows": size, "repaint": family.x.tolist(), "posterior": pairs.tolist()
        }  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
