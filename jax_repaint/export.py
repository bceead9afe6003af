"""One program that inpaints, for a vehicle or a server that has JAX but not this package.

    python -m jax_repaint.inpaint --export=FOLDER --rows=64 --members=16

    FOLDER/inpaint.jaxexport    StableHLO with the weights inside, as jax.export reads it
    FOLDER/grid.npz             lat, lon (degrees) and ocean of the model's grid
    FOLDER/program.json         inputs, outputs, model, seed and versions

The program takes a fixed number of rows, the rest of which are padded, and solves for their gains itself:

    cells     (rows, 4) int32      flat index y X + x of up to four cells that a position lies between
    weights   (rows, 4) float32    of these cells, with sum 1; 0 in unused corners and rows
    values    (rows, 2) float32    u, v in m/s
    sigma     (rows, 2) float32    their standard error in m/s, > 0, also in unused rows; what is below
                              a thousandth of the standard deviation of the currents counts as that
    valid     (rows,) bool         whether a row is used
    seed      () int32             of the members
    ->        members (M, y, x, 2), mean, standard deviation, 5 % and 95 % (y, x, 2) in m/s, NaN on land

It is the sampler `kalman`, `kalman_cg` or `kalman_jvp`, or `given` for networks that take observations, with the
model's calibration for that sampler and number of members if there is one, unless --raw is given; program.json says
which. On a CPU with jax 0.7 jax.numpy.linalg.qr(jax.numpy.eye(2)) has to come before its first call: that loads LAPACK,
without which the process ends.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jax_repaint import ensemble, gains, guide, inpaint, metrics, observe, provenance
from jax_repaint import model as models
from jax_repaint.array_types import Array, Field, Float, Values
from jax_repaint.calibration import Calibration, at_least, correct
from jax_repaint.cases import LEAST_POINT_SIGMA, OBSERVATION_ERROR
from jax_repaint.data.fields import crop
from jax_repaint.data.observations import UNKNOWN, Observed
from jax_repaint.errors import InputError
from jax_repaint.files import check_writable, whole_file
from jax_repaint.methods import correction_of, levels_of
from jax_repaint.model import Model
from jax_repaint.observe import Observation
from jax_repaint.prior.analysis import PrincipalAnalysis

PROGRAM, GRID, DESCRIPTION = FILES = "inpaint.jaxexport", "grid.npz", "program.json"
PLATFORMS = ("cpu", "cuda")
METHODS = ("kalman", "kalman_cg", "kalman_jvp", "given")


def linear_variance(evidence: guide.Evidence) -> Field:
    """Posterior variance diag(C - G A C) of the gain of sigma = inf, in the units of the observation; zero on land."""
    gaussian, observation = evidence.gaussian, evidence.observation
    excess = gaussian.variance - gaussian.rest

    def learnt(unit: Values) -> Field:
        seen = evidence.spread(unit)
        covariance = gaussian.combine(excess * gaussian.project(seen))
        gained = gains.increment(gaussian, observation, evidence.gain, unit, jnp.inf)
        return gained * (gaussian.rest * seen + covariance)

    size = observation.values.size
    units = jnp.eye(size).reshape(size, *observation.values.shape)
    squares = jnp.square(gaussian.direction)
    prior = jnp.einsum("r,ryxc->yxc", excess, squares, precision=gains.HIGHEST) + gaussian.rest
    return gaussian.ocean * jnp.maximum(prior - jax.vmap(learnt)(units).sum(0), 0.0)


def program(
    trained: Model, members: int, method: str = "kalman", calibration: Calibration | None = None
) -> Callable[..., tuple[Array, ...]]:
    """The function of the module docstring, for any number of rows, with or without a calibration.

    The gains are found in float32 by a QR decomposition (gains.kalman_gain), where `evaluate` solves in float64.

    Raises:
      InputError: fewer than four members, an odd number of them, or another method than METHODS.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} cannot be exported; {', '.join(METHODS)} can")
    if members < metrics.least_members(antithetic=True) or members % 2:
        raise InputError(f"the program makes antithetic pairs, two of them at least; got {members} members")
    # Kernels of one platform cannot be part of a program for several.
    network = dataclasses.replace(trained.network, attention_implementation="xla")
    trained = dataclasses.replace(trained, network=network)
    hyper = levels_of(trained, method)
    gaussian, denoiser, standardiser = trained.gaussian, trained.denoiser, trained.standardiser
    mean, std = jnp.asarray(standardiser.mean)[None], jnp.asarray(standardiser.std)[None]
    ocean = jnp.asarray(trained.ocean)[..., None]
    number = np.arange(members)
    signs = jnp.asarray(np.where(number % 2 == 1, -1, 1), jnp.float32)

    def run(cells: Array, weights: Array, values: Array, sigma: Array, valid: Array, seed: Array):
        used = valid[:, None]
        observation = Observation(
            cells=cells,
            weights=jnp.where(used, weights, 0.0),
            values=jnp.where(used, (values - mean) / std, 0.0),
            sigma=jnp.where(used, jnp.maximum(sigma / std, LEAST_POINT_SIGMA), 1.0),
            valid=valid,
        )
        observed, _ = observation.on_grid(trained.ocean.shape)
        observation = observe.pad_grid(observation, trained.ocean.shape, trained.padded)
        noise = gains.noise_covariance(observation)

        def gain(level: Float[Array, ""]) -> gains.Gain:
            return gains.kalman_gain(gaussian, observation, noise, level)

        evidence = guide.Evidence(gaussian.ocean, observation, noise, gaussian, jax.lax.map(gain, hyper.sigma))
        linear = evidence.replace(gain=gain(jnp.float32(jnp.inf)))
        analysis = PrincipalAnalysis(linear, linear_variance(linear))
        keys = ensemble.member_keys(seed, [0], range(members))[0][number // 2]
        x = ensemble.posterior_rows(jnp.asarray(number), (keys, signs), denoiser, evidence, gaussian, analysis, hyper)
        made = jnp.where(ocean[None], standardiser.restore(crop(x, trained.ocean.shape)), jnp.nan)
        scale = jnp.full(made.shape[1:], metrics.half_width(members, antithetic=True), made.dtype)
        if calibration is not None:
            prior = standardiser.restore(crop(analysis.mean(observation.values), trained.ocean.shape))
            variance = standardiser.restore_variance(crop(analysis.variance, trained.ocean.shape))
            weight, spread, scale = _corrections(calibration, variance)
            spread = at_least(spread, variance, jnp.square(_spread(made)), observed)
            made = correct(prior, made, weight, spread)
        centre, half = made.mean(0), scale * _spread(made)
        return made, centre, _spread(made), centre - half, centre + half

    return run


def _corrections(calibration: Calibration, variance: Field) -> list[Field]:
    """w, c and q (calibration.py) on every cell, from the variance of the linear estimate, (m/s)^2."""
    place = jnp.log(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
    centres = jnp.asarray(calibration.centres, variance.dtype)
    return [
        jnp.interp(place, centres, jnp.asarray(values, variance.dtype))
        for values in (calibration.weight, calibration.spread, calibration.scale)
    ]


def _spread(members: Float[Array, "m y x c"]) -> Float[Array, "y x c"]:
    """Standard deviation of a member, from partners 2j, 2j + 1 (metrics.ensemble_variance)."""
    count = len(members)
    partners = jnp.sum(jnp.square(members[0::2] - members[1::2]), 0)
    variance = (count**2 * jnp.var(members, 0) - partners) / (count * (count - 2))
    return jnp.sqrt(jnp.maximum(variance, 0.0))


def shapes(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the inputs, in order."""
    kinds = (((rows, 4), jnp.int32), ((rows, 4), jnp.float32), ((rows, 2), jnp.float32), ((rows, 2), jnp.float32),
             ((rows,), jnp.bool_), ((), jnp.int32))  # fmt: skip
    return tuple(jax.ShapeDtypeStruct(*kind) for kind in kinds)


def export(
    trained: Model,
    folder: Path,
    rows: int = 64,
    members: int = 16,
    method: str | None = None,
    raw: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> str:
    """Writes the program, runs it once, and returns what it is like as text.

    Args:
      rows: most observations that the program takes.
      method: sampler; by default `inpaint.default_method`, or what that corrects by if it starts from a regression,
        which takes training frames.
      raw: whether a calibration that came with the model is left out.
      platforms: of jax.export that the program runs on.

    Raises:
      InputError: a folder that cannot be written or holds other files of these names, flatbuffers is not installed,
        members as for `program`, a calibration with a gate.
    """
    method = method or correction_of(inpaint.default_method(trained))
    calibration = None if raw else inpaint.calibration_of(trained, method, members)
    if calibration is not None and calibration.gate is not None:
        raise InputError(
            "the calibration of this model weighs every field by a second run, which a program of one run cannot do; "
            "calibrate without --gate, or export with --raw"
        )
    run = jax.jit(program(trained, members, method, calibration))
    _check_folder(folder)
    try:
        content = bytes(jax_export.export(run, platforms=tuple(platforms))(*shapes(rows)).serialize())
    except ImportError as e:
        raise InputError("exporting needs flatbuffers: pip install 'jax-repaint[export]'") from e
    description = {
        "inputs": {name: [list(shape.shape), shape.dtype.name] for name, shape in zip(
            ("cells", "weights", "values", "sigma", "valid", "seed"), shapes(rows), strict=True)},
        "outputs": {
            "members": [members, *trained.ocean.shape, 2],
            "mean": [*trained.ocean.shape, 2],
            "standard_deviation": [*trained.ocean.shape, 2],
            "low": [*trained.ocean.shape, 2],
            "high": [*trained.ocean.shape, 2],
        },
        "units": "m s-1",
        "sampler": method,
        "calibrated": calibration is not None,
        **inpaint.words_on(calibration),
        "before": "jax.numpy.linalg.qr(jax.numpy.eye(2)) once, which loads LAPACK under older JAX",
        "model_fingerprint": models.fingerprint(trained),
        "platforms": list(platforms),
        "versions": provenance.versions("jax", "flax"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        # They arrive together, the program last, when all three are whole.
        to_program, to_grid, to_text = (stack.enter_context(whole_file(folder / name)) for name in FILES)
        to_program.write_bytes(content)
        np.savez(to_grid, lat=trained.lat, lon=trained.lon, ocean=trained.ocean)
        to_text.write_text(json.dumps(description, indent=1) + "\n")
    compiling, latency, members_off, mean_off = measure(trained, folder / PROGRAM, rows, members, method, calibration)
    state = "raw" if calibration is None else "calibrated"
    return (
        f"wrote {folder}: {len(content) / 2**20:.1f} MiB, up to {rows} observations, {members} {state} members\n"
        f"on this machine {compiling:.1f} s to load and compile, then {latency:.2f} s a field; gains in float32 move "
        f"members by {1000 * members_off:.2g} mm/s and the mean by {1000 * mean_off:.2g} mm/s at most"
    )


def _check_folder(folder: Path) -> None:
    """Raises InputError if what is in the way of the files is not an earlier export."""
    for name in FILES:
        check_writable(folder / name)
    others = [name for name in (GRID, DESCRIPTION) if (folder / name).exists()]
    if others and not (folder / PROGRAM).exists():
        raise InputError(
            f"cannot write a program to {folder}: {others[0]} is there, and is not of an earlier one, of which "
            f"{PROGRAM} would be there too"
        )


def load(path: Path) -> Callable[..., Any]:
    """The program of a file, compiled at its first call."""
    return jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)


def measure(
    trained: Model, path: Path, rows: int, members: int, method: str, calibration: Calibration | None
) -> tuple[float, float, float, float]:
    """Seconds of the first call and of a later one; largest differences of members and mean from float64 gains, m/s.

    The observations are scattered cells of one draw of the linear prior.
    """
    rng = np.random.default_rng(0)
    wet = np.flatnonzero(trained.ocean)
    observed = np.zeros(trained.ocean.size, bool)
    observed[rng.choice(wet, min(rows, wet.size), replace=False)] = True
    draw = np.asarray(crop(guide.prior_draw(trained.gaussian, jax.random.key(0)), trained.ocean.shape))
    field = trained.standardiser.restore(draw)
    observation = observe.from_cells(
        observed.reshape(trained.ocean.shape), field, OBSERVATION_ERROR, trained.ocean, rows
    )
    inputs = (observation.cells, observation.weights, observation.values, observation.sigma, observation.valid)
    began = time.monotonic()
    run = load(path)
    jax.block_until_ready(run(*inputs, jnp.int32(0)))
    compiled = time.monotonic()
    made, mean, *_ = jax.block_until_ready(run(*inputs, jnp.int32(0)))
    done = time.monotonic()
    frame = Observed(UNKNOWN, int(observed.sum()), observation)
    exact = inpaint.estimate(trained, [frame], members, 0, method, calibration)[0].members
    off = np.nanmax(np.abs(np.asarray(made) - exact)), np.nanmax(np.abs(np.asarray(mean) - exact.mean(0)))
    return compiled - began, done - compiled, float(off[0]), float(off[1])
