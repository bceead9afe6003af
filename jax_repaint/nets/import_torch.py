"""Weights of the PyTorch networks that this project's `standard_attn*` are equal to: names and layouts to ours.

PyTorch keeps convolutions as (out, in, y, x), transposed ones as (in, out, y, x) of the flipped kernel, linear maps
as (out, in). Here they are (y, x, in, out), (y, x, in, out) as applied to the dilated input, and (in, out).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_repaint.errors import InputError
from jax_repaint.nets.layers import sinusoids
from jax_repaint.nets.unet import UNetConfig, structure

TIME_TABLE = "time_embed_table.weight"
_PARTS = {
    "conv1": "conv1",
    "conv2": "conv2",
    "time_mlp.1": "modulate",
    "skip": "skip",
    "norm1": "norm1",
    "norm2": "norm2",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "project"}


def _names(config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Name of a PyTorch module -> path of ours."""
    names = {
        "time_mlp.0": ("embed1",),
        "time_mlp.2": ("embed2",),
        "out_norm": ("out_norm",),
        "out_conv": ("out",),
    }
    stages = [("mid", "middle")]
    for k in range(len(config.channels)):
        names[f"down{k + 1}"], names[f"up{k + 1}"] = (f"down{k}",), (f"up{k}",)
        stages += [(f"enc{k + 1}", f"encode{k}"), (f"dec{k + 1}", f"decode{k}")]
    for theirs, ours in stages:
        for i in range(config.blocks):
            for a, b in _PARTS.items():
                names[f"{theirs}.{i}.res.{a}"] = (f"{ours}_{i}", b)
            for a, b in _ATTENTION.items():
                names[f"{theirs}.{i}.attn.{a}"] = (f"{ours}_{i}_attention", b)
    return names


def _convert(path: tuple[str, ...], kind: str, value: np.ndarray) -> np.ndarray:
    if kind != "kernel":
        return value
    if value.ndim != 4:
        return value.T
    if path[-1].startswith("up"):
        return value[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    return value.transpose(2, 3, 1, 0)


def _rounding(values: np.ndarray) -> float:
    """How far numbers of up to 1 are off by their precision."""
    return float(ml_dtypes.finfo(values.dtype).eps) if jnp.issubdtype(values.dtype, jnp.floating) else 0.0


def from_state_dict(config: UNetConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Our parameters from a PyTorch state_dict given as arrays.

    Args:
      config: a network with residual blocks and a stem of stride 1.
      tensors: name -> array; names may carry the prefix `network.`.

    Raises:
      InputError: a tensor is missing, unknown, of another shape, or the time table is not the sinusoids of this
        package.
    """
    given, tensors = tensors, {name.removeprefix("network."): np.asarray(value) for name, value in tensors.items()}
    if len(tensors) < len(given):
        raise InputError("tensors have the same name with and without `network.` before it")
    table = tensors.pop(TIME_TABLE, None)
    if table is not None:
        if table.ndim != 2 or not table.size:
            raise InputError(f"the time table has shape {table.shape}, and not (steps, {config.embedding})")
        ours = sinusoids(np.arange(len(table), dtype=np.float32), table.shape[1])
        off = np.abs(table.astype(np.float32) - np.asarray(ours)).max()
        if table.shape[1] != config.embedding or off > max(1e-3, _rounding(table)):
            raise InputError(f"the time table {table.shape} is not the sinusoidal one of width {config.embedding}")
    names = _names(config)
    flat, tree = jax.tree.flatten_with_path(structure(config)[1])
    wanted = {tuple(str(k.key) for k in path): leaf.shape for path, leaf in flat}
    found = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if module not in names or kind not in ("weight", "bias"):
            raise InputError(f"tensor {name} has no place in this network")
        if not np.isfinite(value).all():
            raise InputError(f"tensor {name} holds numbers that are not finite")
        path = names[module]
        # Norms call their factor scale, everything else a kernel.
        is_norm = value.ndim == 1 and kind == "weight"
        leaf = "bias" if kind == "bias" else "scale" if is_norm else "kernel"
        value = _convert(path, leaf, value)
        if wanted.get((*path, leaf)) != value.shape:
            raise InputError(
                f"tensor {name} becomes {'.'.join((*path, leaf))} of shape {value.shape}, "
                f"but the network has {wanted.get((*path, leaf), 'no such parameter')}"
            )
        found[(*path, leaf)] = np.ascontiguousarray(value, np.float32)
    missing = sorted(".".join(path) for path in wanted.keys() - found.keys())
    if missing:
        raise InputError(f"{len(missing)} parameters are missing from the file, the first is {missing[0]}")
    return jax.tree.unflatten(tree, [found[path] for path in wanted])
