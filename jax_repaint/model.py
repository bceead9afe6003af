"""A trained model: a network with everything that is needed to use it, as one folder on disk.

    weights.safetensors    network parameters and the linear prior
    model.json             network, form of the denoiser, schedule, standardiser, grid, GP, calibrations, training

Loading reads numbers and text only; nothing is unpickled or run.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jax_repaint import SHIPPED, calibration, observe
from jax_repaint.calibration import Calibration
from jax_repaint.conditional import ConditionalDenoiser
from jax_repaint.data.fields import Fields, Standardiser, check_grid, crop, mesh, padded_shape
from jax_repaint.denoise import AnchoredDenoiser, Denoiser, EdmDenoiser, EpsDenoiser, PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.files import check_parent, publish, replace_folder, whole_file
from jax_repaint.nets import unet
from jax_repaint.observe import extent
from jax_repaint.prior.gp import Kernel
from jax_repaint.prior.ridge import Archive
from jax_repaint.schedule import Schedule

if TYPE_CHECKING:
    import xarray as xr

    from jax_repaint.unfinished import Unfinished

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
FORMAT = 1
INPUTS = {"eps": 2, "edm": 2, "anchored": 4, "conditional": 5}  # channels that the network of each form sees
FORMS = tuple(INPUTS)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SLACK = 1e-3  # by which a noise level may be beyond those of training


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything between m/s on a grid and samples of the field.

    Attributes:
      network: configuration of the UNet.
      form: "eps" (steps of the schedule), "edm" (continuous noise level), "anchored" (on the linear prior) or
        "conditional" (on the linear estimate from the observations, which the network is given too).
      params: float32 parameters of the network.
      standardiser: between m/s and the units of the network.
      ocean: (y, x) bool, of the grid itself.
      lat, lon: degrees, of the grid itself.
      gaussian: linear prior on the padded grid, standardised.
      kernel: fitted GP in m/s, or None.
      schedule: steps, min_beta and max_beta of the linear schedule that the RePaint family runs on.
      sigma: smallest and largest noise level of training.
      training: how it was made: data, fingerprint, configuration, steps, losses, versions.
      calibrations: each of one method's ensembles of one size; the method of the first is the default of `inpaint`.
      grid: (Y, X) that the network was trained on, where it is not the smallest that fits the network.
      anchor: linear prior that the network corrects, where `gaussian` is another (`with_prior`).
      archive: training and validation frames for methods that start from a regression on them, or None.
    """

    network: unet.UNetConfig
    form: str
    params: dict
    standardiser: Standardiser
    ocean: np.ndarray
    lat: np.ndarray
    lon: np.ndarray
    gaussian: PrincipalGaussian
    kernel: Kernel | None
    schedule: dict[str, float]
    sigma: tuple[float, float]
    training: dict[str, Any]
    calibrations: tuple[Calibration, ...] = ()
    grid: tuple[int, int] | None = None
    anchor: PrincipalGaussian | None = None
    archive: Archive | None = None

    def __repr__(self) -> str:
        """One line without the weights, whose numbers would fill thousands."""
        y, x = self.ocean.shape
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        sizes = calibration.sizes(self.calibrations)
        calibrated = f"calibrated for {sizes}" if sizes else "not calibrated"
        return (
            f"Model({self.form}, network of {count:,} parameters with channels {self.network.channels}, "
            f"{y} x {x} cells at {extent(self.lat, self.lon)}, {calibrated})"
        )

    def inpaint(
        self,
        observations: Any,
        members: int = 16,
        seed: int = 0,
        time: str | np.datetime64 | None = None,
        *,
        columns: Mapping[str, Any] | None = None,
        sigma: float = 0.005,
        step: str | datetime.timedelta | np.timedelta64 | None = None,
        method: str | None = None,
        raw: bool = False,
        leave_out: bool = False,
        chunk: int | None = None,
        progress: bool = True,
        unfinished: "Unfinished | None" = None,
    ) -> "xr.Dataset":
        """Fields from observations, one for each of their times, as `inpaint.inpaint`, which says what is in them.

        Args:
          observations: path of a CSV file or of fields, DataFrame, xarray Dataset or pair, or array; m/s.
          members: of the ensemble; even where they come in antithetic pairs.
          seed: names the members.
          time: the one time that all observations count for.
          columns: own names of "lat", "lon", "u", "v", "sigma", "time" where they are not the usual ones; numbers of
            columns where a DataFrame has no names.
          sigma: standard error in m/s of observations that bring none.
          step: times of a table are rounded to multiples of this, "1h", "30min" or a duration.
          method: sampler; by default that of the model's first calibration.
          raw: whether the calibration that came with the model is left out.
          leave_out: whether rows on land, outside the grid or without values, and cells of a field on land, are left
            out, not refused.
          chunk: members sampled at a time; what pays on the device by default.
          progress: whether to say on stderr how far things are.
          unfinished: `jax_repaint.unfinished.Unfinished(path)`, which keeps what is made before the end in a folder
            beside that path, so that the same call goes on after a stop; its `remove` removes the folder.
        """
        # That module needs this one.
        from jax_repaint import inpaint

        return inpaint.inpaint(
            self, observations, members, seed, time, columns=columns, sigma=sigma, step=step, method=method, raw=raw,
            leave_out=leave_out, chunk=chunk, progress=progress, unfinished=unfinished,
        )  # fmt: skip

    @property
    def origin(self) -> dict[str, Any]:
        """`training`, for those who need the data of it.

        Raises:
          InputError: it does not say which data that were, or how they were split.
        """
        missing = {"config", "parts", "fingerprint", "decorrelation"} - self.training.keys()
        if missing:
            raise InputError(
                f"{DESCRIPTION} does not say what the model was trained on, so that nothing is known to be held out: "
                f"its training lacks {', '.join(sorted(missing))}"
            )
        return self.training

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of observations that the linear prior was chosen for."""
        settings = self.training.get("config", {}).get("model", {})
        return observe.patterns_of(settings.get("patterns", "")) or observe.usual(self.ocean)

    @property
    def padded(self) -> tuple[int, int]:
        """(Y, X), the grid of the network."""
        return self.grid or padded_shape(self.ocean.shape, self.network.multiple)

    @property
    def steps(self) -> Schedule:
        """The variance-preserving schedule."""
        return make_schedule(self.schedule)

    @property
    def denoiser(self) -> Denoiser:
        """D(x; sigma) on the padded grid; on a CPU in float32, whatever its training ran in."""
        graphdef, _ = unet.structure(unet.suited(self.network))
        anchor = self.gaussian if self.anchor is None else self.anchor
        return make_denoiser(self.form, graphdef, self.params, anchor, self.steps)

    def with_prior(self, gaussian: PrincipalGaussian) -> "Model":
        """The same network with another linear prior for analyses, starts and gains; without calibrations.

        The network goes on to correct the prior that it was trained on. Not for `given`, whose network has the gains
        of that prior, nor for starts from the archive, which is in its directions; and not to be saved.
        """
        anchor = self.gaussian if self.anchor is None else self.anchor
        land = jnp.asarray(self.standardiser.land_value)[None, None]
        gaussian = gaussian.replace(mean=jnp.where(gaussian.ocean > 0, gaussian.mean, land))
        return dataclasses.replace(self, gaussian=gaussian, anchor=anchor, calibrations=(), archive=None)

    def to_velocity(self, x: np.ndarray | jax.Array) -> np.ndarray:
        """(..., Y, X, 2) standardised to (..., y, x, 2) m/s, float32, NaN on land."""
        velocity = self.standardiser.restore(np.asarray(crop(x, self.ocean.shape)))
        return np.where(self.ocean[..., None], velocity, np.nan).astype(np.float32)

    def knows(self, sigmas: np.ndarray) -> np.ndarray:
        """(n,) bool: which noise levels are in the range of the network's training."""
        low, high = self.sigma
        # The last of the notes' steps, 3.39804, is called 3.4, which is 6e-4 more, and in float32 the first step of a
        # schedule is off by 1e-4. Networks see log sigma, whose range of 6 to 10 grows by no more than 2e-3.
        return (np.asarray(sigmas) >= (1 - SLACK) * low) & (np.asarray(sigmas) <= (1 + SLACK) * high)

    def check_levels(self, sigmas: np.ndarray, remedy: str = "") -> None:
        """Raises InputError, which ends with `remedy`, unless all noise levels (n,) are in the range of training."""
        beyond = np.asarray(sigmas)[~self.knows(sigmas)]
        if beyond.size:
            low, high = self.sigma
            farthest = beyond[np.argmax(np.maximum(beyond / high, low / beyond))]
            raise InputError(
                f"the network was trained for noise from {low:g} to {high:g}, not for {farthest:g}"
                + (f"; {remedy}" if remedy else "")
            )

    def check_grid(self, fields: Fields) -> None:
        """Raises InputError unless the fields are on this model's grid."""
        check_same_grid(self, fields)


def check_same_grid(trained: Model | Fields, fields: Fields) -> None:
    """Raises InputError unless the fields are on the grid of a model, or of the fields that one is to be trained on."""
    same = fields.ocean.shape == trained.ocean.shape and (fields.ocean == trained.ocean).all()
    if same:
        lat, lon = mesh(fields.lat, fields.lon) - mesh(trained.lat, trained.lon)
        # The same meridian may be written as -65 or 295. Ten metres: coordinates in float32 are off by less.
        apart = np.abs([lat, (lon + 180) % 360 - 180])
        same = bool((apart <= 1e-4).all())
    if not same:
        was = "was trained" if isinstance(trained, Model) else "is to be trained"
        raise InputError(
            f"the model {was} on another grid: {trained.ocean.shape} with {trained.ocean.sum()} ocean cells from "
            f"{trained.lat.min():.4f} N {trained.lon.min():.4f} E; {fields.name} is {fields.ocean.shape} with "
            f"{fields.ocean.sum()} ocean cells from {fields.lat.min():.4f} N {fields.lon.min():.4f} E"
        )


def same_parts(one: Model, other: Model) -> bool:
    """Whether both were trained on the same frames of the same data, and the same ones were held out."""
    first, second = one.origin, other.origin
    blocks = [text["config"]["data"].get("block_split", False) for text in (first, second)]
    return all(first[key] == second[key] for key in ("fingerprint", "parts")) and blocks[0] == blocks[1]


def make_schedule(numbers: dict[str, float]) -> Schedule:
    """The linear schedule of {"steps", "min_beta", "max_beta"}.

    Raises:
      InputError: numbers that make none, or steps by the million, as only damaged files have.
    """
    steps = float(numbers["steps"])
    if not 2 <= steps <= 1e6:
        raise InputError(f"a schedule has 2 to 1,000,000 steps, got {steps:g}")
    return Schedule.linear(int(steps), float(numbers["min_beta"]), float(numbers["max_beta"]))


def make_denoiser(form: str, graphdef: Any, params: dict, gaussian: PrincipalGaussian, schedule: Schedule) -> Denoiser:
    """The denoiser of a form; the linear prior gives it the ocean, and those built on it more than that."""
    if form == "eps":
        return EpsDenoiser(params, schedule, graphdef)
    if form == "edm":
        return EdmDenoiser(params, gaussian.ocean, graphdef)
    built_on_linear = {"anchored": AnchoredDenoiser, "conditional": ConditionalDenoiser}
    return built_on_linear[form](params, gaussian, graphdef)


def check_free(folder: Path) -> None:
    """Raises InputError if a folder holds something else than a model, or is none, or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write a model to {folder}: it is a file")
    if folder.exists() and any(folder.iterdir()) and not (folder / DESCRIPTION).exists():
        raise InputError(f"cannot write a model to {folder}: it is not empty and holds no model")
    check_parent(folder)


def save(model: Model, folder: str | os.PathLike, dtype: str = "float32") -> None:
    """Writes a model, whole or not at all; an older model in `folder` is replaced.

    Args:
      dtype: of network weights and EOFs on disk: "float32", or "bfloat16" for half the size.

    Raises:
      InputError: `folder` holds something else, or cannot be written; a model `with_prior`; another dtype.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise InputError(f"weights are kept as {' or '.join(DTYPES)}, not as {dtype!r}")
    if model.anchor is not None:
        raise InputError("a model with another linear prior than that of its network cannot be stored")
    check_free(folder)
    kept = DTYPES[dtype]
    tensors = {
        "/".join(("params", *name)): np.asarray(leaf, kept)
        for name, leaf in traverse_util.flatten_dict(model.params).items()
    }
    wet = np.asarray(model.gaussian.ocean)[..., 0] > 0
    tensors["gaussian/direction"] = np.asarray(np.asarray(model.gaussian.direction)[:, wet], kept)
    tensors["gaussian/mean"] = np.asarray(model.gaussian.mean)[wet]
    tensors["gaussian/variance"] = np.asarray(model.gaussian.variance)
    tensors["gaussian/rest"] = np.asarray(model.gaussian.rest).reshape(1)
    tensors |= _archived(model.archive)
    tensors["ocean"] = model.ocean.astype(np.uint8)
    tensors["lat"], tensors["lon"] = np.asarray(model.lat, np.float64), np.asarray(model.lon, np.float64)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    description = {
        "format": FORMAT,
        "network": dataclasses.asdict(model.network),
        "form": model.form,
        "standardiser": model.standardiser.to_json(),
        "kernel": model.kernel and model.kernel.to_json(),
        "schedule": model.schedule,
        "sigma": list(model.sigma),
        "training": model.training,
        "calibrations": [one.to_json() for one in model.calibrations],
        "grid": model.grid,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            new = private / "new"
            new.mkdir()
            save_file(tensors, new / WEIGHTS)
            publish(new / WEIGHTS)
            (new / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
            publish(new)
            replace_folder(new, folder, private / "old")
        finally:
            shutil.rmtree(private, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write the model to {folder}: {getattr(e, 'strerror', None) or e}") from e


def _archived(archive: Archive | None) -> dict[str, np.ndarray]:
    parts = {} if archive is None else vars(archive)
    return {f"archive/{name}": part.astype(np.float16) for name, part in parts.items()}


def store_archive(folder: str | os.PathLike, archive: Archive) -> None:
    """Puts an archive into the model in `folder`, in place of an older one; nothing else changes.

    Raises:
      InputError: no model there, or it cannot be written; it then stays as it was.
    """
    path = Path(folder) / WEIGHTS
    try:
        tensors = load_file(path) | _archived(archive)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"no model that an archive could be added to in {folder}: {e}") from e
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as e:
            raise InputError(f"cannot write {path}: {e}") from e


def store_calibration(folder: str | os.PathLike, learnt: Calibration, default: bool = False) -> None:
    """Puts a calibration into the model in `folder`, in place of one of its method and size; nothing else changes.

    Args:
      default: whether its method becomes the default of `inpaint`, as that of a model's first calibration is.

    Raises:
      InputError: no model there, or it cannot be written; it then stays as it was.
    """
    path = Path(folder) / DESCRIPTION
    try:
        text = json.loads(path.read_text())
        made = calibration.added(_calibrations(text), learnt, default)
        text.pop("calibration", None)
        text["calibrations"] = [one.to_json() for one in made]
    except (AttributeError, OSError, TypeError, ValueError) as e:
        raise InputError(f"no model that could be calibrated in {folder}: {e}") from e
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(text, indent=1) + "\n")


def load(folder: str | os.PathLike) -> Model:
    """Reads what `save` wrote.

    Args:
      folder: path; the text "ram_head" names the model in the package, and a folder called so here is "./ram_head".

    Raises:
      InputError: no path, no model there, of a newer format, truncated, weights that do not fit its description, or
        numbers that no model has.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"a model is loaded from the path of its folder, or as {SHIPPED!r}; got {folder!r}")
    folder = Path(__file__).with_name("models") / SHIPPED if folder == SHIPPED else Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"no model in {folder}: {DESCRIPTION} is missing")
    try:
        text = json.loads((folder / DESCRIPTION).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        raise InputError(f"the model in {folder} cannot be read ({e}); is it truncated?") from e
    try:
        if text["format"] != FORMAT:
            raise InputError(f"the model in {folder} has format {text['format']}; this version reads {FORMAT}")
        network = unet.UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in text["network"].items()})
        if text["form"] not in FORMS:
            raise InputError(f"the model in {folder} has form {text['form']!r}; this version knows {', '.join(FORMS)}")
        make_schedule(text["schedule"])
        params = _params(network, tensors, folder)
        ocean = tensors["ocean"].astype(bool)
        check_grid(tensors["lat"], tensors["lon"], ocean.shape, f"the model in {folder}")
        low, high = map(float, text["sigma"])
        if not 0 < low < high < math.inf:
            raise ValueError(f"noise from {low} to {high}")
        if not isinstance(text["training"], dict):
            raise TypeError("its training is no table")
        standardiser = Standardiser.from_json(text["standardiser"])
        # Older models have no grid of their own.
        grid = text.get("grid") and _grid(text["grid"], ocean.shape, network.multiple, folder)
        return Model(
            network=network,
            form=text["form"],
            params=params,
            standardiser=standardiser,
            ocean=ocean,
            lat=tensors["lat"],
            lon=tensors["lon"],
            gaussian=_gaussian(tensors, ocean, grid or padded_shape(ocean.shape, network.multiple), standardiser),
            kernel=text["kernel"] and Kernel.from_json(text["kernel"]),
            schedule=text["schedule"],
            sigma=(low, high),
            training=text["training"],
            calibrations=_calibrations(text),
            grid=grid,
            archive=_archive(tensors),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, IndexError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"the model in {folder} is not complete: {type(e).__name__} {e}") from e


def _calibrations(text: dict[str, Any]) -> tuple[Calibration, ...]:
    # Older models have one or none.
    older = [text["calibration"]] if text.get("calibration") is not None else []
    made = text.get("calibrations", older)
    if not isinstance(made, list):
        raise InputError(f"the calibrations of a model are a list, got {made!r}")
    return tuple(map(Calibration.from_json, made))


def _params(network: unet.UNetConfig, tensors: dict[str, np.ndarray], folder: Path) -> dict:
    expected = traverse_util.flatten_dict(unet.structure(network)[1])
    params = {}
    for name, shape in expected.items():
        tensor = tensors.get("/".join(("params", *map(str, name))))
        if tensor is None or tensor.shape != shape.shape:
            found = "missing" if tensor is None else f"of shape {tensor.shape}"
            raise InputError(f"{folder}: weight {'/'.join(map(str, name))} of {shape.shape} is {found}")
        params[name] = jnp.asarray(_finite(tensor, "/".join(map(str, name))))
    return traverse_util.unflatten_dict(params)


def _finite(tensor: np.ndarray, name: str) -> np.ndarray:
    """In float32; raises ValueError where a number is not finite."""
    values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return values


def _grid(grid: list[int], shape: tuple[int, int], multiple: int, folder: Path) -> tuple[int, int]:
    y, x = grid
    if not (type(y) is type(x) is int and y >= shape[0] and x >= shape[1] and y % multiple == x % multiple == 0):
        raise InputError(f"the model in {folder} has grid {grid}; expected multiples of {multiple}, {shape} or more")
    return y, x


def _gaussian(
    tensors: dict[str, np.ndarray], ocean: np.ndarray, shape: tuple[int, int], standardiser: Standardiser
) -> PrincipalGaussian:
    wet = np.pad(ocean, [(0, to - side) for side, to in zip(ocean.shape, shape, strict=True)])
    mean, direction, variance, rest = (
        _finite(tensors[f"gaussian/{name}"], name) for name in ("mean", "direction", "variance", "rest")
    )
    if mean.shape != (ocean.sum(), 2) or direction.shape != (*variance.shape, *mean.shape) or variance.ndim != 1:
        raise ValueError(f"a prior of mean {mean.shape}, directions {direction.shape} and variances {variance.shape}")
    if not ((variance >= 0).all() and (rest >= 0).all()):
        raise ValueError("a variance of the prior is negative")

    def on_grid(values: np.ndarray) -> jax.Array:
        field = np.zeros((*values.shape[:-2], *shape, values.shape[-1]), np.float32)
        field[..., wet, :] = values
        return jnp.asarray(field)

    land = jnp.asarray(standardiser.land_value)[None, None]
    return PrincipalGaussian(
        jnp.where(wet[..., None], on_grid(mean), land),
        on_grid(direction),
        jnp.asarray(variance),
        jnp.asarray(rest[0]),
        jnp.asarray(wet[..., None], jnp.float32),
    )


def _archive(tensors: dict[str, np.ndarray]) -> Archive | None:
    if "archive/train" not in tensors:
        return None
    train, validation = (_finite(tensors[f"archive/{name}"], f"archive/{name}") for name in ("train", "validation"))
    rank = len(tensors["gaussian/variance"])
    for part in (train, validation):
        if part.ndim != 2 or not len(part) or part.shape[1] != rank:
            raise ValueError(f"an archive of {train.shape} and {validation.shape} beside {rank} directions")
    return Archive(train, validation)


def fingerprint(model: Model) -> str:
    """16 hex digits that name these weights and all of the description that samples and baselines depend on."""
    digest = hashlib.blake2b(digest_size=8)
    archive = None if model.archive is None else tuple(vars(model.archive).values())
    for leaf in jax.tree.leaves((model.params, model.gaussian, model.anchor, archive)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    parts = [
        model.form, model.standardiser.to_json(), dataclasses.asdict(model.network), model.schedule,
        list(model.sigma), model.kernel and model.kernel.to_json(), model.padded,
    ]  # fmt: skip
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()
