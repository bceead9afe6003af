"""Layers of the UNet, channels last, with a batch axis.

Convolutions and dense layers run in `dtype`; parameters, group statistics and XLA's attention stay float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_repaint.array_types import Array
from jax_repaint.nets.convolution import FORWARDS, Conv, ConvTranspose


class GroupNorm(nnx.Module):
    """y = (x - mean_g) / sqrt(var_g + 1e-5) * scale + bias over (y, x, channels of group g), one field at a time.

    Statistics are taken in two passes of float32 (a single pass of E[x^2] - E[x]^2 cancels when the mean is large).
    Wu and He 2018, "Group Normalization", eq. 1-5.
    """

    def __init__(self, channels: int, groups: int = 8):
        self.groups = min(groups, channels)
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        """x: (b, y, x, c); scale, shift: (b, c) of AdaGN, applied as (1 + scale) y + shift. Same dtype as x."""
        channels = x.shape[-1]
        h = x.astype(jnp.float32)

        def of_groups(per_channel: Array) -> Array:
            grouped = per_channel.reshape(-1, self.groups, channels // self.groups).mean(-1)
            return jnp.repeat(grouped, channels // self.groups, axis=-1)[:, None, None, :]

        centred = h - of_groups(h.mean((1, 2)))
        factor = jax.lax.rsqrt(of_groups((centred**2).mean((1, 2))) + 1e-5) * self.scale[...][None, None, None]
        offset = self.bias[...][None, None, None]
        if scale is not None:
            gain = 1 + scale[:, None, None].astype(jnp.float32)
            factor, offset = factor * gain, offset * gain + shift[:, None, None].astype(jnp.float32)
        return (centred * factor + offset).astype(x.dtype)


def conv(inputs: int, outputs: int, size: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> Conv:
    """size x size convolution; zero padding that keeps (stride 1) or divides (stride 2) the grid."""
    pad = (size - stride + 1) // 2
    return Conv(
        inputs, outputs, (size, size), strides=stride, padding=((pad, pad), (pad, pad)),
        dtype=dtype, param_dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip


def conv_up(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> ConvTranspose:
    """Transposed 4x4 convolution of stride 2: doubles the grid exactly."""
    return ConvTranspose(
        inputs, outputs, (4, 4), strides=2, padding=((2, 2), (2, 2)),
        dtype=dtype, param_dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip


class Block(nnx.Module):
    """GroupNorm, SiLU, 3x3; AdaGN of the noise embedding, SiLU, dropout, 3x3; plus the input where `residual`.

    He et al. 2016, "Identity Mappings"; Dhariwal and Nichol 2021, "Diffusion Models Beat GANs", section 3.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        residual: bool,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(inputs)
        self.conv1 = conv(inputs, outputs, 3, 1, dtype, rngs)
        self.norm2 = GroupNorm(outputs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = conv(outputs, outputs, 3, 1, dtype, rngs)
        self.modulate = nnx.Linear(embedding, 2 * outputs, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.residual = residual
        if residual and inputs != outputs:
            self.skip = conv(inputs, outputs, 1, 1, dtype, rngs)

    def __call__(self, x: Array, embedding: Array, rngs: nnx.Rngs | None) -> Array:
        """x: (b, y, x, inputs); embedding: (b, e); rngs: drops features if given."""
        scale, shift = jnp.split(self.modulate(jax.nn.silu(embedding)), 2, axis=-1)
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = jax.nn.silu(self.norm2(h, scale, shift))
        h = self.dropout(h, deterministic=rngs is None, rngs=rngs)
        h = self.conv2(h)
        if not self.residual:
            return h
        return h + (self.skip(x) if hasattr(self, "skip") else x)


class Attention(nnx.Module):
    """x + W softmax(Q K^T / sqrt(d)) V over all cells, after a GroupNorm (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, channels: int, heads: int, implementation: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.implementation = implementation
        self.norm = GroupNorm(channels)
        self.qkv = conv(channels, 3 * channels, 1, 1, dtype, rngs)
        self.project = conv(channels, channels, 1, 1, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """x: (b, y, x, c), c divisible by the number of heads."""
        b, ny, nx, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, ny * nx, 3, self.heads, c // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # That of cuDNN has a gradient of its own, and no derivative forwards.
        implementation = "xla" if FORWARDS.get() else self.implementation
        if implementation == "xla":
            # Of bfloat16 with float32 logits, the gradient would be products of mixed types, an error under strict
            # promotion.
            q, k, v = (z.astype(jnp.float32) for z in (q, k, v))
        h = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return x + self.project(h.astype(qkv.dtype).reshape(b, ny, nx, c))


def sinusoids(position: Array, width: int) -> Array:
    """Embedding of a real position (b,) -> (b, width): column j has frequency 10000^(-2j/width), sine if j is even.

    Each column has a frequency of its own (Vaswani et al. 2017, section 3.5, pairs them); this is the table that the
    first networks of this family were trained with.
    """
    column = jnp.arange(width, dtype=jnp.float32)
    angle = position.astype(jnp.float32)[:, None] * jnp.exp(column * (-2.0 * jnp.log(10000.0) / width))[None]
    return jnp.where(column[None] % 2 == 0, jnp.sin(angle), jnp.cos(angle))
