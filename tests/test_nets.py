"""The networks against the original PyTorch ones, and properties that hold for any weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.nets.import_torch import from_state_dict
from jax_repaint.nets.layers import GroupNorm


def reference_state_dict(file):
    """The made-up weights of the reference outputs, by their stated formula."""
    tensors = {}
    for k, (name, shape) in enumerate(json.loads(str(file["names"]))):
        if name == "time_embed_table.weight":
            tensors[name] = file["time_table"]
            continue
        i = np.arange(np.prod(shape), dtype=np.float64)
        base = np.sin(0.7 * k + 0.013 * i * (1 + 0.1 * (k % 7)))
        if name.endswith("weight"):
            value = 1.2 * base / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * base
        else:
            value = 0.05 * base
        tensors[f"network.{name}"] = value.reshape(shape).astype(np.float32)
    return tensors


@pytest.mark.parametrize(("asked", "used"), [("auto", "xla"), ("xla", "xla"), ("cudnn", "cudnn")])
def test_attention_is_that_of_xla_unless_cudnn_is_asked_for(asked, used):
    config = dataclasses.replace(unet.NETWORKS["micro_attn"], dtype="bfloat16", attention_implementation=asked)
    network = nnx.eval_shape(lambda: unet.UNet(config, nnx.Rngs(0)))
    assert network.middle_0_attention.implementation == used


@pytest.mark.parametrize(("name", "parameters"), [("standard_attn", 23_144_902), ("standard_attn_slim", 6_112_486)])
def test_equals_reference(shared, name, parameters):
    config = unet.NETWORKS[name]
    with np.load(shared / "golden" / f"unet_{name}.npz") as file:
        params = from_state_dict(config, reference_state_dict(file))
        x, t, y = jnp.moveaxis(jnp.asarray(file["x"]), 1, -1), jnp.asarray(file["t"], jnp.float32), file["y"]
    assert unet.count(params) == parameters
    graphdef, _ = unet.structure(config)
    ours = apply(graphdef, params, x, t)
    np.testing.assert_allclose(jnp.moveaxis(ours, -1, 1), y, atol=1e-4 * np.abs(y).max())


def test_four_micro_networks_are_attention_with_and_without_by_residual_paths_with_and_without():
    def leaves(name):
        return traverse_util.flatten_dict(unet.structure(unet.NETWORKS[name])[1])

    both, residual, attention, neither = map(leaves, ("micro_attn", "micro_residual", "micro_attn_plain", "micro"))
    assert neither.keys() < residual.keys() < both.keys()
    assert both.keys() - residual.keys() == attention.keys() - neither.keys()
    # Query, key, value and the way out are 4 c^2 + 4 c, the norm before them 2 c; the last block has 32 channels.
    added = sum(np.prod(both[name].shape) for name in both.keys() - residual.keys())
    assert added == 5 * (4 * 48**2 + 6 * 48) + 4 * 32**2 + 6 * 32
    for name in attention:
        assert attention[name].shape == both[name].shape


apply = jax.jit(unet.apply, static_argnums=0)
TINY = unet.UNetConfig((8, 16), attention=(1, 2), blocks=1, heads=2, embedding=16)


@functools.cache
def weights(config, seed=0):
    """Random weights everywhere, so that a branch that starts at zero takes part."""
    graphdef, params = unet.create(config, seed)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, "f4"), params)


def test_import_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="no place"):
        from_state_dict(TINY, {"enc9.0.res.conv1.weight": np.zeros((8, 2, 3, 3))})
    with pytest.raises(InputError, match=r"shape \(3, 3, 3, 8\)"):
        from_state_dict(TINY, {"enc1.0.res.conv1.weight": np.zeros((8, 3, 3, 3))})
    with pytest.raises(InputError, match="missing"):
        from_state_dict(TINY, {"enc1.0.res.conv1.weight": np.zeros((8, 2, 3, 3))})
    with pytest.raises(InputError, match="time table"):
        from_state_dict(TINY, {"time_embed_table.weight": np.zeros((250, 16))})
    for shape in ((5,), (), (0, 16)):
        with pytest.raises(InputError, match="the time table has shape"):
            from_state_dict(TINY, {"time_embed_table.weight": np.zeros(shape)})
    for shape in ((2, 8, 3), ()):
        with pytest.raises(InputError, match=r"out_conv.weight becomes out\.kernel of shape"):
            from_state_dict(TINY, {"out_conv.weight": np.zeros(shape)})
    with pytest.raises(InputError, match=r"enc1\.0\.res\.conv1\.weight holds numbers that are not finite"):
        from_state_dict(TINY, {"enc1.0.res.conv1.weight": np.full((8, 2, 3, 3), np.nan)})


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_fields_of_a_batch_do_not_meet(stem_stride):
    graphdef, params = weights(dataclasses.replace(TINY, stem_stride=stem_stride))
    x = jax.random.normal(jax.random.key(1), (3, 16, 24, 2))
    t = jnp.array([0.0, 17.0, 249.0])
    batched = apply(graphdef, params, x, t)
    alone = jax.vmap(lambda x, t: apply(graphdef, params, x[None], t[None])[0])(x, t)
    np.testing.assert_allclose(batched, alone, atol=1e-5)
    later = apply(graphdef, params, x, t.at[0].set(17.0))
    assert np.abs(batched[0] - later[0]).max() > 1e-3
    np.testing.assert_allclose(batched[1:], later[1:], atol=1e-5)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters_and_outputs():
    graphdef, params = weights(TINY)
    half, _ = unet.structure(dataclasses.replace(TINY, dtype="bfloat16"))
    x, t = jax.random.normal(jax.random.key(1), (2, 16, 24, 2)), jnp.array([3.0, 200.0])
    exact, rough = apply(graphdef, params, x, t), apply(half, params, x, t)
    assert rough.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_the_gradient_in_bfloat16_stays_near_that_in_float32():
    graphdef, params = weights(TINY)
    half, _ = unet.structure(dataclasses.replace(TINY, dtype="bfloat16"))
    x, t = jax.random.normal(jax.random.key(1), (2, 16, 24, 2)), jnp.array([3.0, 200.0])
    pull = jax.random.normal(jax.random.key(2), x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(graphdef, params):
        return jax.grad(lambda params: (apply(graphdef, params, x, t) * pull).sum())(params)

    exact, rough = gradient(graphdef, params), gradient(half, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    attending = [name for name in exact if name.endswith("attention")]
    assert attending
    for chosen in (list(exact), *([name] for name in attending)):
        a, b = (
            np.concatenate([np.ravel(leaf) for name in chosen for leaf in jax.tree.leaves(g[name])])
            for g in (exact, rough)
        )
        assert 0 < np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a), chosen


def test_dropout_only_with_a_key():
    graphdef, params = weights(dataclasses.replace(TINY, dropout=0.5))
    x, t = jax.random.normal(jax.random.key(1), (2, 16, 24, 2)), jnp.array([3.0, 200.0])
    still = apply(graphdef, params, x, t)
    np.testing.assert_array_equal(still, apply(graphdef, params, x, t))
    np.testing.assert_allclose(still, apply(weights(TINY)[0], params, x, t), atol=1e-6)
    first, second = (apply(graphdef, params, x, t, jax.random.key(k)) for k in (0, 1))
    assert np.abs(first - still).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_group_norm_standardises_each_group_even_far_from_zero():
    x = 1000.0 + jax.random.normal(jax.random.key(0), (2, 6, 5, 16)) * jnp.arange(1.0, 17.0)[None, None, None]
    y = np.asarray(jax.jit(GroupNorm(16))(x), np.float64).reshape(2, 30, 8, 2)
    reference = np.asarray(x, np.float64).reshape(2, 30, 8, 2)
    centred = reference - reference.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_bad_configurations_and_grids_are_refused():
    graphdef, params = weights(TINY)
    with pytest.raises(InputError, match="multiples of 4"):
        unet.apply(graphdef, params, jnp.zeros((1, 18, 24, 2)), jnp.zeros((1,)))
    for bad in ({"channels": (12,)}, {"attention": (5,)}, {"stem_stride": 3}, {"dropout": 1.0}, {"dtype": "float16"}):
        with pytest.raises(InputError):
            unet.UNetConfig(**({"channels": (8, 16)} | bad))
