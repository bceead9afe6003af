"""Convolutions of fields whose gradient with respect to the field is as fast inside of a loop as outside.

On a CPU XLA brings convolutions into the form of its fast kernels in the outermost computation only. The gradient's
convolution, with the kernel turned around and its channels exchanged, stays in a slow form inside of `lax.scan`, where
all samplers are: three to seven times slower for a whole network (benchmarks/gradient.py). Here that form is written
out.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jax_repaint.array_types import Array

Pair = tuple[int, int]
LAYOUT = ("NHWC", "HWIO", "NHWC")


# Seen while a network is traced; what jax.jit has traced before stays as it was.
FORWARDS: ContextVar[bool] = ContextVar("forwards", default=False)


@contextlib.contextmanager
def forwards() -> Iterator[None]:
    """Networks traced inside may be differentiated forwards (jax.jvp) and have JAX's own gradient; others may not."""
    before = FORWARDS.set(True)
    try:
        yield
    finally:
        FORWARDS.reset(before)


def convolve(x: Array, kernel: Array, stride: int = 1, pad: Pair = (0, 0), dilation: int = 1) -> Array:
    """The convolution of `x` (b, y, x, i), with `dilation` - 1 zeros between its cells, and `kernel` (k, k, i, o).

    Args:
      pad: zeros before and after, in y and in x.
    """
    # JAX differentiates what has a gradient of its own in that direction alone.
    return (_plain if FORWARDS.get() else _with_gradient)(x, kernel, stride, pad, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _with_gradient(x: Array, kernel: Array, stride: int, pad: Pair, dilation: int) -> Array:
    return _plain(x, kernel, stride, pad, dilation)


def _plain(x: Array, kernel: Array, stride: int, pad: Pair, dilation: int) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), lhs_dilation=(dilation, dilation), dimension_numbers=LAYOUT
    )


def _forward(x: Array, kernel: Array, stride: int, pad: Pair, dilation: int) -> tuple[Array, tuple[Array, Array]]:
    return _with_gradient(x, kernel, stride, pad, dilation), (x, kernel)


def _backward(stride: int, pad: Pair, dilation: int, kept: tuple[Array, Array], above: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def of_field(above: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: _plain(x, kernel, stride, pad, dilation), x)(above)[0]

    def of_field_in_a_loop(above: Array, kernel: Array) -> Array:
        turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        size, before = kernel.shape[0], kernel.shape[0] - 1 - pad[0]
        pads = []
        for wide, made in zip(x.shape[1:3], above.shape[1:3], strict=True):
            after = (wide - 1) * dilation + size - ((made - 1) * stride + 1) - before
            pads.append((before, after))
        return jax.lax.conv_general_dilated(
            above, turned, (dilation, dilation), pads, lhs_dilation=(stride, stride), dimension_numbers=LAYOUT
        )

    to_field = jax.lax.platform_dependent(above, kernel, cpu=of_field_in_a_loop, default=of_field)
    to_kernel = jax.linear_transpose(lambda kernel: _plain(x, kernel, stride, pad, dilation), kernel)(above)[0]
    return to_field, to_kernel


_with_gradient.defvjp(_forward, _backward)


def in_phases(x: Array, kernel: Array) -> Array:
    """The convolution of a field with zeros between its cells, in four of 2 x 2 that leave the zeros out.

    y[2 q + a] = sum over j = 0, 1 of  kernel[a + 2 j] x[q + a + j - 1],   a = 0, 1,   in y and in x

    is convolve(x, kernel, 1, (2, 2), 2) for x (b, y, x, i) and a kernel (4, 4, i, o). With respect to the kernel the
    gradient of that is ten to twenty times slower on a CPU than the gradients of these.
    """
    rows = []
    for a in (0, 1):
        row = [
            jax.lax.conv_general_dilated(
                x, kernel[a::2, b::2], (1, 1), ((1 - a, a), (1 - b, b)), dimension_numbers=LAYOUT
            )
            for b in (0, 1)
        ]
        rows.append(jnp.stack(row, 3))
    phases = jnp.stack(rows, 2)
    many, high, _, wide, _, outputs = phases.shape
    return phases.reshape(many, 2 * high, 2 * wide, outputs)


class Conv(nnx.Conv):
    """nnx.Conv of square kernels and strides.

    Attributes:
      fixed: whether the kernel is, so that gradients are with respect to fields (`convolve`). In training it is not:
        a batch made by vmap would be summed one kernel's gradient at a time.
    """

    fixed = True

    def __call__(self, x: Array) -> Array:
        """(b, y, x, inputs) to (b, y', x', outputs)."""
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        run = convolve if self.fixed else _plain
        return run(x, kernel, self.strides, self.padding[0], 1) + bias[None, None, None]


class ConvTranspose(nnx.ConvTranspose):
    """nnx.ConvTranspose that doubles the grid, with a kernel of 4 x 4; `fixed` as in Conv."""

    fixed = True

    def __call__(self, x: Array) -> Array:
        """(b, y, x, inputs) to (b, 2 y, 2 x, outputs)."""
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        if self.fixed:
            made = convolve(x, kernel, 1, self.padding[0], self.strides)
        else:
            made = jax.lax.platform_dependent(
                x, kernel, cpu=in_phases, default=lambda x, kernel: _plain(x, kernel, 1, self.padding[0], self.strides)
            )
        return made + bias[None, None, None]
