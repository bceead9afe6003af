"""The convolution and its written out gradient against the library's, whose gradient is derived by JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_repaint.nets import convolution, unet
from jax_repaint.nets.layers import conv, conv_up

F32 = jnp.dtype("float32")


def library(x, kernel, stride, pad, dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, (pad,) * 2, lhs_dilation=(dilation,) * 2, dimension_numbers=convolution.LAYOUT
    )


@pytest.mark.parametrize(
    ("size", "stride", "pad", "dilation", "grid"),
    [
        (1, 1, (0, 0), 1, (5, 7)),
        (3, 1, (1, 1), 1, (5, 7)),
        (4, 2, (1, 1), 1, (6, 8)),
        (4, 2, (1, 1), 1, (7, 9)),  # a last row that no output has seen
        (4, 1, (2, 2), 2, (3, 5)),
        (3, 2, (0, 2), 1, (6, 9)),
    ],
)
@pytest.mark.parametrize("looped", [False, True])
def test_gradients_are_those_of_the_library(size, stride, pad, dilation, grid, looped):
    rng = np.random.default_rng(size + 10 * stride)
    x, kernel = (jnp.asarray(rng.standard_normal(s), F32) for s in ((2, *grid, 3), (size, size, 3, 4)))
    made, pull = jax.vjp(lambda x, k: convolution.convolve(x, k, stride, pad, dilation), x, kernel)
    theirs, their_pull = jax.vjp(lambda x, k: library(x, k, stride, pad, dilation), x, kernel)
    np.testing.assert_allclose(made, theirs, atol=1e-6)
    above = jnp.asarray(rng.standard_normal(made.shape), F32)
    if looped:
        _, (of_x, of_kernel) = jax.lax.scan(lambda carry, a: (carry, pull(a)), 0, above[None])
        of_x, of_kernel = of_x[0], of_kernel[0]
    else:
        of_x, of_kernel = pull(above)
    for mine, expected in zip((of_x, of_kernel), their_pull(above), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_networks_are_differentiated_forwards_where_that_is_said():
    """<w, J v> = <J^T w, v>, J v by the library's derivatives and J^T w by those that are written out."""
    config = unet.UNetConfig((8, 8), attention=(1,), heads=1, stem_stride=2, embedding=8)
    graphdef, params = unet.create(config, 0)
    x, v, w = jax.random.normal(jax.random.key(0), (3, 1, 16, 16, 2))

    def network(x, graphdef=graphdef):
        return unet.apply(graphdef, params, x, jnp.zeros(1), None)

    @jax.jit
    def pulled(x, w):
        return jax.vjp(network, x)[1](w)[0]

    with convolution.forwards():
        moved = jax.jit(lambda x, v: jax.jvp(network, (x,), (v,))[1])(x, v)
    np.testing.assert_allclose(jnp.vdot(w, moved), jnp.vdot(pulled(x, w), v), rtol=1e-3)
    assert jnp.abs(moved).max() > 1e-3
    # Attention that only a GPU has, and that has no such derivative, is replaced.
    of_gpu, _ = unet.create(dataclasses.replace(config, attention_implementation="cudnn"), 0)
    with convolution.forwards():
        again = jax.jit(lambda x, v: jax.jvp(lambda x: network(x, of_gpu), (x,), (v,))[1])(x, v)
    np.testing.assert_allclose(again, moved, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(network, (x,), (v,))


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (6, 4)])
def test_four_phases_are_the_transposed_convolution(grid):
    """Values and both gradients, in float64."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.standard_normal(s)) for s in ((2, *grid, 3), (4, 4, 3, 5)))
        made, pull = jax.vjp(convolution.in_phases, x, kernel)
        theirs, their_pull = jax.vjp(lambda x, k: library(x, k, 1, (2, 2), 2), x, kernel)
        assert made.shape == (2, 2 * grid[0], 2 * grid[1], 5)
        np.testing.assert_allclose(made, theirs, atol=1e-12)
        above = jnp.asarray(rng.standard_normal(made.shape))
        for mine, expected in zip(pull(above), their_pull(above), strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-12)


def test_training_on_a_cpu_leaves_out_the_zeros_between_cells():
    if jax.default_backend() != "cpu":
        pytest.skip("the form that XLA needs on a CPU")
    layer = conv_up(3, 4, F32, nnx.Rngs(1))
    graphdef, state = nnx.split(layer)

    def text(fixed):
        def loss(state, x):
            layer = nnx.merge(graphdef, state)
            layer.fixed = fixed
            return jnp.sum(layer(x) ** 2)

        return jax.jit(jax.grad(loss)).lower(state, jnp.ones((1, 6, 8, 3))).compile().as_text()

    assert "lhs_dilate" in text(True)
    assert "lhs_dilate" not in text(False)


def test_layers_are_those_of_the_library():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))
    for ours, theirs in (
        (conv(3, 4, 4, 2, F32, nnx.Rngs(1)), nnx.Conv(3, 4, (4, 4), 2, padding=((1, 1),) * 2, rngs=nnx.Rngs(1))),
        (conv_up(3, 4, F32, nnx.Rngs(1)), nnx.ConvTranspose(3, 4, (4, 4), 2, padding=((2, 2),) * 2, rngs=nnx.Rngs(1))),
    ):
        ours.bias[...] = theirs.bias[...] = jnp.arange(4, dtype=F32)
        for fixed in (True, False):
            ours.fixed = fixed
            np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def test_in_a_loop_the_kernel_keeps_the_fast_layout():
    if jax.default_backend() != "cpu":
        pytest.skip("the form that XLA needs on a CPU")
    kernel, x = jnp.ones((3, 3, 4, 8)), jnp.ones((2, 6, 8, 4))

    def looped(x, kernel):
        def step(x, _):
            made, pull = jax.vjp(lambda x: convolution.convolve(x, kernel, 1, (1, 1)), x)
            return pull(made)[0], None

        return jax.lax.scan(step, x, length=3)[0]

    text = jax.jit(looped).lower(x, kernel).compile().as_text()
    assert "b01f_01io->b01f" in text
    assert "b01f_01oi->b01f" not in text


def test_training_leaves_the_kernels_free():
    graphdef, params = unet.create(unet.UNetConfig((8,), blocks=1, embedding=8), 0)
    x = jnp.ones((1, 4, 4, 2))

    def text(key):
        return str(jax.make_jaxpr(lambda params: unet.apply(graphdef, params, x, jnp.zeros(1), key))(params))

    assert "custom_vjp_call" in text(None)
    assert "name=_with_gradient" in text(None)
    # A batch made by vmap would otherwise have one gradient of a kernel a frame, which eight devices sum wrongly.
    assert "name=_with_gradient" not in text(jax.random.key(0))
