"""One configurable attention UNet for fields on a grid, and the named networks of this project.

Level k of K works on the grid divided by stem_stride * 2^k; the middle on one halving more. The grid must be a
multiple of `UNetConfig.multiple`, the number of channels is free.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jax_repaint.array_types import Array, Key
from jax_repaint.errors import InputError
from jax_repaint.nets.layers import Attention, Block, GroupNorm, conv, conv_up, sinusoids


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of.

    Attributes:
      channels: channels of each level.
      attention: levels that attend, counted from 0 at the top; len(channels) is the middle.
      blocks: residual blocks a level.
      residual: whether a block adds its input.
      dropout: probability in training.
      stem_stride: 2 works on half the grid from the start (a 4x4 stem and head), 1 on the full grid.
      heads: attention heads.
      embedding: width of the noise embedding.
      inputs, outputs: channels of the field; 2 for (u, v).
      zero_output: start from an output of zero.
      dtype: of convolutions and dense layers, "float32" or "bfloat16".
      attention_implementation: "auto", which is xla, or "cudnn" (bfloat16 on a GPU, heads of a multiple of 8 channels):
        its gradients took minutes to compile, and inside of a sampler's loop it failed (docs/performance.md).
    """

    channels: tuple[int, ...]
    attention: tuple[int, ...] = ()
    blocks: int = 2
    residual: bool = True
    dropout: float = 0.0
    stem_stride: int = 1
    heads: int = 4
    embedding: int = 256
    inputs: int = 2
    outputs: int = 2
    zero_output: bool = False
    dtype: str = "float32"
    attention_implementation: str = "auto"

    def __post_init__(self):
        if not self.channels or min(self.channels) < 1 or any(c % min(8, c) for c in self.channels):
            raise InputError(f"channels must be below 8 or multiples of 8, got {self.channels}")
        if any(not 0 <= level <= len(self.channels) for level in self.attention):
            raise InputError(f"attention levels must be in 0..{len(self.channels)}, got {self.attention}")
        if any(self.channels[min(k, len(self.channels) - 1)] % self.heads for k in self.attention):
            raise InputError(f"channels {self.channels} of the attending levels must divide into {self.heads} heads")
        if self.stem_stride not in (1, 2):
            raise InputError(f"stem_stride must be 1 or 2, got {self.stem_stride}")
        if not 0 <= self.dropout < 1 or not 1 <= self.blocks <= 64 or self.embedding < 2:
            raise InputError("dropout must be in [0, 1), blocks in 1..64, embedding >= 2")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.attention_implementation not in ("auto", "xla", "cudnn"):
            raise InputError(
                f"attention_implementation must be auto, xla or cudnn, got {self.attention_implementation!r}"
            )

    @property
    def multiple(self) -> int:
        """The grid must be divisible by this."""
        return self.stem_stride * 2 ** len(self.channels)


NETWORKS: dict[str, UNetConfig] = {
    "standard_attn": UNetConfig((64, 128, 256, 256), attention=(2, 3, 4)),
    "standard_attn_mid": UNetConfig((48, 96, 192, 192), attention=(3, 4), dropout=0.1),
    "standard_attn_slim": UNetConfig((32, 64, 128, 128), attention=(4,), dropout=0.1),
    "standard": UNetConfig((64, 128, 256, 256), residual=False),
    "micro_attn": UNetConfig((16, 32, 48), attention=(2, 3), stem_stride=2, embedding=64),
    "micro": UNetConfig((16, 32, 48), residual=False, stem_stride=2, embedding=64),
    "micro_residual": UNetConfig((16, 32, 48), stem_stride=2, embedding=64),
    "micro_attn_plain": UNetConfig((16, 32, 48), attention=(2, 3), residual=False, stem_stride=2, embedding=64),
    "tiny": UNetConfig((32, 64, 96), attention=(2, 3), stem_stride=2, embedding=128, zero_output=True),
    "small": UNetConfig((48, 96, 128), attention=(2, 3), stem_stride=2, zero_output=True),
}


def suited(config: UNetConfig) -> UNetConfig:
    """What to run a trained network as here: on a CPU in float32, where bfloat16 is slower and less exact."""
    if jax.default_backend() != "cpu":
        return config
    return dataclasses.replace(config, dtype="float32", attention_implementation="auto")


class UNet(nnx.Module):
    """eps, x0 or a residual of a batch of fields, given a position that encodes the noise level."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        implementation = "xla" if config.attention_implementation == "auto" else config.attention_implementation
        width = config.embedding
        self.embed1 = nnx.Linear(width, 4 * width, param_dtype=jnp.float32, rngs=rngs)
        self.embed2 = nnx.Linear(4 * width, width, param_dtype=jnp.float32, rngs=rngs)

        def add_blocks(name: str, level: int, inputs: int, hidden: int, outputs: int) -> None:
            # Attributes by name: flax below 0.12 has no list of modules.
            for i in range(config.blocks):
                out = outputs if i == config.blocks - 1 else hidden
                block = Block(inputs, out, width, config.residual, config.dropout, dtype, rngs)
                setattr(self, f"{name}_{i}", block)
                if level in config.attention:
                    attention = Attention(out, config.heads, implementation, dtype, rngs)
                    setattr(self, f"{name}_{i}_attention", attention)
                inputs = out

        c = config.channels
        if config.stem_stride == 2:
            self.stem = conv(config.inputs, c[0], 4, 2, dtype, rngs)
        before = c[0] if config.stem_stride == 2 else config.inputs
        for k, channels in enumerate(c):
            add_blocks(f"encode{k}", k, before, channels, channels)
            setattr(self, f"down{k}", conv(channels, channels, 4, 2, dtype, rngs))
            before = channels
        add_blocks("middle", len(c), c[-1], c[-1], c[-1])
        for k in reversed(range(len(c))):
            setattr(self, f"up{k}", conv_up(c[k], c[k], dtype, rngs))
            add_blocks(f"decode{k}", k, 2 * c[k], c[k], c[max(k - 1, 0)])
        self.out_norm = GroupNorm(c[0])
        head = conv_up if config.stem_stride == 2 else lambda i, o, d, r: conv(i, o, 3, 1, d, r)
        self.out = head(c[0], config.outputs, dtype, rngs)

    def _level(self, name: str, h: Array, embedding: Array, rngs: nnx.Rngs | None) -> Array:
        for i in range(self.config.blocks):
            h = getattr(self, f"{name}_{i}")(h, embedding, rngs)
            if hasattr(self, f"{name}_{i}_attention"):
                h = getattr(self, f"{name}_{i}_attention")(h)
        return h

    def __call__(self, x: Array, position: Array, rngs: nnx.Rngs | None = None) -> Array:
        """x: (b, y, x, inputs) float32; position: (b,) or (1,); rngs: for dropout in training. Returns float32.

        Raises:
          InputError: the grid or the channels do not fit the network.
        """
        config = self.config
        if x.ndim != 4 or x.shape[-1] != config.inputs or any(n % config.multiple for n in x.shape[1:3]):
            raise InputError(
                f"a field batch of shape {x.shape} does not fit this network: expected (batch, y, x, {config.inputs}) "
                f"with y and x multiples of {config.multiple}"
            )
        h = x.astype(config.dtype)
        embedding = self.embed2(jax.nn.silu(self.embed1(sinusoids(position, config.embedding))))
        embedding = embedding.astype(config.dtype)
        if config.stem_stride == 2:
            h = self.stem(h)
        skips = []
        for k in range(len(config.channels)):
            h = self._level(f"encode{k}", h, embedding, rngs)
            skips.append(h)
            h = getattr(self, f"down{k}")(h)
        h = self._level("middle", h, embedding, rngs)
        for k in reversed(range(len(config.channels))):
            h = jnp.concatenate([skips[k], getattr(self, f"up{k}")(h)], axis=-1)
            h = self._level(f"decode{k}", h, embedding, rngs)
        return self.out(jax.nn.silu(self.out_norm(h))).astype(jnp.float32)


def create(config: UNetConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A freshly initialised network as (static graph, pure dictionary of float32 parameters).

    Kernels are normal with variance 1 / fan-in (LeCun et al. 1998, "Efficient BackProp", section 4.6), biases 0,
    norms 1. Drawn by NumPy: compiling a draw for each of a hundred shapes would take longer than all the rest.
    """
    graphdef, shapes = structure(config)
    params = {}
    for number, (name, shape) in enumerate(sorted(traverse_util.flatten_dict(shapes).items())):
        if name[-1] == "kernel" and not (config.zero_output and name[0] == "out"):
            draw = np.random.default_rng([seed, number]).standard_normal(shape.shape, np.float32)
            value = draw / np.sqrt(np.prod(shape.shape[:-1]))
        else:
            value = np.full(shape.shape, float(name[-1] == "scale"), np.float32)
        params[name] = jnp.asarray(value, jnp.float32)
    return graphdef, traverse_util.unflatten_dict(params)


@functools.cache
def structure(config: UNetConfig) -> tuple[nnx.GraphDef, dict]:
    """The static graph and the shapes of the parameters, without making any."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet(config, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def apply(graphdef: nnx.GraphDef, params: dict, x: Array, position: Array, dropout: Key | None = None) -> Array:
    """The network as a pure function of its parameters; a key, which training has, turns dropout on."""
    network = nnx.merge(graphdef, params)
    if dropout is None:
        return network(x, position)
    network.set_attributes(fixed=False)
    return network(x, position, nnx.Rngs(dropout=dropout))


def count(params: dict) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
