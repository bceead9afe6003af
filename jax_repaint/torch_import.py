"""Checkpoints of PyTorch (.pt), read without PyTorch and without running anything in them.

A .pt file is a zip archive: NAME/data.pkl, a pickle of plain containers whose tensors refer to NAME/data/0, 1, ...,
the bytes of their storages. Pickles can call any function; here a class or function that is not one of the few that
make tensors becomes a dummy that does nothing, so that optimisers, schedulers and standardisers of code that nobody has
installed do not stand in the way. `torch.load(weights_only=True)` refuses such files.

    python -m jax_repaint.checkpoint import --torch=FILE.pt --network=standard_attn --out=FOLDER
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_repaint.data import fields as fields_lib
from jax_repaint.data.fields import Fields, Standardiser
from jax_repaint.errors import InputError
from jax_repaint.model import Model, make_schedule
from jax_repaint.nets import unet
from jax_repaint.nets.import_torch import TIME_TABLE, from_state_dict
from jax_repaint.prepare import fit_priors, load_fields, split_fields, time_range

LFS_POINTER = b"version https://git-lfs"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number of the format before PyTorch 1.6
GRID = (64, 128)  # of the fields these networks were trained on, padding included
SCHEDULE = {"steps": "n_steps", "min_beta": "min_beta", "max_beta": "max_beta"}
KEPT = ("epoch", "loss", "best_loss", "train_loss", "test_loss", "best_test_loss")
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
SHARED = 16  # tensors of one storage, as tied and averaged weights are, on average
# Opcodes that make a buffer of a size that the file only claims, or reach into registries of this process.
REFUSED = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID)


class Inert:
    """Stands for an object of an unknown class, whose name is `called`: takes everything, does nothing."""

    called = ""
    state: Any = None

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, _, __):
        pass

    def __call__(self, *_, **__):
        return self

    def append(self, _):
        pass

    extend = append
    add = append


class Dtype:
    """The type of a number of NumPy: its code, such as f8, and byte order."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = state[1]


def _scalar(dtype: Dtype, content: bytes) -> float:
    """A number as NumPy pickles it."""
    if dtype.code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8") or dtype.order not in ("<", ">", "=", "|"):
        raise InputError(f"a number of the type {dtype.order}{dtype.code}"[:60] + " is not known")
    (value,) = np.frombuffer(content, dtype.order + dtype.code)
    return value.item()


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as old pickles hold them."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


class Storage(NamedTuple):
    """The kind of number and the name of the file of a storage, before it is read."""

    kind: type
    key: str


class _Tensors(pickle._Unpickler):
    """Reads containers, numbers, text and tensors.

    The unpickler in Python, not the one in C: that one allocates whatever a damaged file asks for.
    """

    dispatch: ClassVar = {c: call for c, call in pickle._Unpickler.dispatch.items() if bytes([c]) not in REFUSED}

    def __init__(self, file: io.BytesIO, read_storage, most: int):
        super().__init__(file)
        self._read_storage = read_storage
        self._left = most  # bytes that tensors may take

    def find_class(self, module: str, name: str) -> Any:
        # New objects at each call: a pickle can set attributes on what it is given.
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return Storage(STORAGES[name], "")
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return self._rebuild
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return lambda dtype, content: _scalar(dtype, content)
        if (module, name) == ("numpy", "dtype"):
            return type("Dtype", (Dtype,), {})
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: _encode(text, encoding)
        return type("Inert", (Inert,), {"called": f"{module}.{name}"})

    def _rebuild(self, storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        made = _tensor(storage, offset, size, stride)
        self._left -= made.nbytes
        if self._left < 0:
            raise InputError("its tensors take far more than the file has")
        return made

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, Storage) or not isinstance(key, str):
            raise InputError(f"it refers to {str(kind)[:40]!r}, which is no storage of numbers")
        values = self._read_storage(storage._replace(key=key))
        if count != values.size:
            raise InputError(f"storage {key} has {values.size} numbers, the file says {count}")
        return values


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    """A copy of a strided view of a storage (n,), checked to lie inside it."""
    whole = isinstance(storage, np.ndarray) and storage.ndim == 1
    numbers = [offset, *size, *stride]
    if not whole or len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise InputError(f"a tensor of size {str(size)[:60]} makes no sense")
    if 0 in size:
        return np.zeros(size, storage.dtype) if max(size) <= storage.size else np.zeros(0, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # No more values than the storage has: a stride of zero would blow a small file up.
    if last >= storage.size or math.prod(size) > storage.size:
        raise InputError(f"a tensor of size {str(size)[:60]} reaches beyond its storage of {storage.size} numbers")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary that a .pt file holds, with arrays for tensors and dummies for objects of unknown classes.

    Raises:
      InputError: no such file, a Git-LFS pointer, damaged, the format before PyTorch 1.6, or no dictionary.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    if head.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git-LFS pointer, not the checkpoint itself; fetch it with `git lfs pull`")
    if head.startswith(LEGACY):
        raise InputError(f"{path} is in the format before PyTorch 1.6; load and save it once with a newer PyTorch")
    if not head.startswith(b"PK"):
        raise InputError(f"{path} is no PyTorch checkpoint: it is not a zip archive")
    try:
        content = _read_archive(path)
    except InputError as e:
        raise InputError(f"cannot read {path}: {e}") from None
    except zipfile.BadZipFile as e:
        raise InputError(f"{path} is truncated or damaged: {e}") from e
    except Exception as e:
        # Whatever a damaged pickle runs into.
        words = str(e).strip().splitlines()
        raise InputError(f"{path} is damaged: {type(e).__name__} {words[0][:200] if words else ''}".rstrip()) from e
    if type(content) not in (dict, collections.OrderedDict):
        raise InputError(f"{path} holds no dictionary")
    # The methods of an object from a file are what the file made of them.
    return dict(dict.items(content))


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise InputError("it has compressed parts, which PyTorch does not write")
        if sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
            raise InputError("its parts are larger than the file")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError("it is a zip archive without one data.pkl, not a PyTorch checkpoint")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder").strip() if f"{root}byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise InputError(f"its byte order is {order[:20]!r}")
        known: dict[Storage, np.ndarray] = {}

        def read_storage(storage: Storage) -> np.ndarray:
            if storage not in known:
                if f"{root}data/{storage.key}" not in entries:
                    raise InputError(f"storage {storage.key[:40]!r} is missing")
                values = np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.kind)
                known[storage] = values if order == b"little" else values.byteswap()
            return known[storage]

        return _Tensors(io.BytesIO(archive.read(pickles[0])), read_storage, SHARED * path.stat().st_size).load()


class Checkpoint(NamedTuple):
    """What a model needs of a checkpoint.

    Attributes:
      tensors: by name.
      schedule: as `make_schedule` takes it.
      numbers: epoch and losses.
      network: what it calls its network; empty if it does not.
      units: mean and standard deviation (2,) of u and v in its training, m/s; None if it does not say.
    """

    tensors: dict[str, np.ndarray]
    schedule: dict[str, float]
    numbers: dict[str, float]
    network: str = ""
    units: tuple[np.ndarray, np.ndarray] | None = None


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """`model_state_dict`, `n_steps`, `min_beta`, `max_beta`, and epoch, losses and units where they are numbers.

    Raises:
      InputError: as `read`; an entry is missing or of another kind; the network predicts something else than the noise,
        or was trained with another noise or schedule.
    """
    content = read(path)
    state = content.get("model_state_dict")
    if type(state) not in (dict, collections.OrderedDict):
        listing = ", ".join(str(key)[:40] for key in list(content)[:20]) or "nothing"
        raise InputError(f"{path} has no model_state_dict; it has {listing}")
    tensors = {name: value for name, value in dict.items(state) if isinstance(value, np.ndarray)}
    if len(tensors) < len(state) or not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path}: model_state_dict holds something else than tensors by name")
    schedule = {}
    for name, key in SCHEDULE.items():
        value = _number(content.get(key))
        if value is None:
            raise InputError(f"{path} has no number {key}; the noise levels of the network would be unknown")
        schedule[name] = value
    try:
        make_schedule(schedule)
    except InputError as e:
        raise InputError(f"{path}: n_steps, min_beta and max_beta make no schedule: {e}") from e
    _check_training(content, tensors, schedule, path)
    numbers = {key: _number(content.get(key)) for key in KEPT}
    numbers = {key: value for key, value in numbers.items() if value is not None}
    network = _name_of(content.get("unet_type"))
    return Checkpoint(tensors, schedule, numbers, network, _units(content.get("standardizer_type"), path))


def _check_training(
    content: dict[str, Any], tensors: dict[str, np.ndarray], schedule: dict[str, float], path: str | os.PathLike
) -> None:
    """Refuses what is said to be no prediction of white noise of this schedule; warns of what is not known."""
    for key, known in (("prediction_target", ("eps", "epsilon", "noise")), ("beta_schedule", ("linear",))):
        said = content.get(key)
        if isinstance(said, str) and said.lower() not in known:
            raise InputError(f"{path}: {key} is {said[:40]!r}; only networks of {known[0]} can be imported")
    noise = _name_of(content.get("noise_strategy"))
    if re.search("div|curl", noise.lower()):
        raise InputError(f"{path}: it was trained with {noise}; only networks of Gaussian noise can be imported")
    if noise and "gauss" not in noise.lower():
        logging.warning("%s: noise_strategy is %s, which is not known; it is taken for Gaussian noise", path, noise)
    for name, table in tensors.items():
        if name.endswith(TIME_TABLE) and len(table) != schedule["steps"]:
            raise InputError(f"{path}: its time table has {len(table)} steps, n_steps is {schedule['steps']:g}")
    averaged = [str(key)[:40] for key in content if str(key).lower().startswith("ema")]
    if averaged:
        logging.warning("%s: model_state_dict is imported, the averaged weights in %s are not", path, averaged[0])


def _name_of(thing: Any) -> str:
    """What an object, or a name of one, is called; empty if there is none."""
    return thing[:60] if isinstance(thing, str) else thing.called.rpartition(".")[2][:60] if _is_inert(thing) else ""


def _is_inert(thing: Any) -> bool:
    return isinstance(thing, Inert)


def _units(standardiser: Any, path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation of u and v that an object holds; None, with a warning, where it does not."""
    name = _name_of(standardiser)
    state = standardiser.state if _is_inert(standardiser) and type(standardiser.state) is dict else {}
    mean, std = ([_number(state.get(f"{c}_{what}")) for c in "uv"] for what in ("mean", "std"))
    if None not in (*mean, *std) and min(std) > 0:
        return np.array(mean), np.array(std)
    if name:
        logging.warning(
            "%s: standardizer_type is %s, of which no mean and standard deviation of u and v are known; those of the "
            "training part are taken", path, name,
        )  # fmt: skip
    return None


def _number(value: Any) -> float | None:
    """A finite number, also as a tensor of one value; None for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(()).astype(np.float64).item()
    fine = type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e12
    return float(value) if fine else None


def import_model(path: str | os.PathLike, config: ConfigDict, fields: Fields | None = None) -> Model:
    """A model of a checkpoint's weights, on a grid padded to 64 x 128 with land and padding at 0 m/s.

    Args:
      path: .pt file.
      config: of `default_config`, of which `model.network` names the network, `data` the currents it was
        trained on, or others of the same place, and `model.rank`, `patterns` and `gp_steps` the priors: everything
        but the network and its noise levels is fitted to the training part.
      fields: the currents; read or simulated by default.

    Raises:
      InputError: as `read_checkpoint`; weights of another network; a grid larger than 64 x 128.
    """
    name = config.model.network
    if name not in unet.NETWORKS:
        raise InputError(f"network {name!r} is not one of {', '.join(unet.NETWORKS)}")
    network = unet.NETWORKS[name]
    # Whether the weights fit shows in a moment; reading and fitting the currents takes minutes.
    checkpoint = read_checkpoint(path)
    if checkpoint.network in unet.NETWORKS and checkpoint.network != name:
        raise InputError(f"{path} holds a network {checkpoint.network}, not {name}")
    params = from_state_dict(network, checkpoint.tensors)
    if fields is None:
        fields = load_fields(config.data.fields, config.data.frames, config.data.twin_seed)
    if any(side > most for side, most in zip(fields.shape, GRID, strict=True)):
        raise InputError(f"{fields.name} has {fields.shape} cells, more than the {GRID} that the checkpoint is for")
    split = split_fields(fields, config.data)
    numbers = Standardiser.from_fields(fields, split.train)
    mean, std = numbers.mean, numbers.std
    if checkpoint.units is not None:
        _compare_units(checkpoint.units, numbers, path)
        mean, std = checkpoint.units
    standardiser = Standardiser.create(mean, std, -mean / std)
    training, ocean = fields_lib.prepare(fields.select(split.train), standardiser, GRID)
    validation, _ = fields_lib.prepare(fields.select(split.validation), standardiser, GRID)
    gaussian, kernel, choice = fit_priors(fields.select(split.train), training, validation, ocean, config, standardiser)
    land = np.where(ocean[..., None], np.asarray(gaussian.mean), standardiser.land_value)
    sigma = np.asarray(make_schedule(checkpoint.schedule).sigma)
    parts = {part: getattr(split, part) for part in ("train", "validation", "test")}
    return Model(
        network=network,
        form="eps",
        params=jax.tree.map(jnp.asarray, params),
        standardiser=standardiser,
        ocean=fields.ocean,
        lat=fields.lat,
        lon=fields.lon,
        gaussian=gaussian.replace(mean=jnp.asarray(land, jnp.float32)),
        kernel=kernel,
        schedule=checkpoint.schedule,
        sigma=(float(sigma[0]), float(sigma[-1])),
        training={
            "data": fields.name,
            "fingerprint": fields.hash(),
            "split": split.describe(),
            "parts": {part: [int(index[0]), int(index[-1]) + 1] for part, index in parts.items()},
            "decorrelation": split.decorrelation,
            "linear_prior": dataclasses.asdict(choice),
            "config": config.to_dict(),
            "time": time_range(fields, split),
            "imported": {"file": Path(path).name} | checkpoint.numbers,
        },
        grid=GRID,
    )


def _compare_units(units: tuple[np.ndarray, np.ndarray], here: Standardiser, path: str | os.PathLike) -> None:
    """Warns where the currents are not those that a checkpoint was trained on, by mean and standard deviation."""
    mean, std = (np.asarray(part, np.float64).ravel() for part in (here.mean, here.std))
    if (np.abs(units[0] - mean) > 0.1 * units[1]).any() or (np.abs(units[1] / std - 1) > 0.1).any():
        logging.warning(
            "%s: it was trained on currents of mean %.3g, %.3g and standard deviation %.3g, %.3g m/s; those of the "
            "training part are %.3g, %.3g and %.3g, %.3g", path, *units[0], *units[1], *mean, *std,
        )  # fmt: skip
