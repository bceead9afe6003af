"""The benchmarks run, count the right work, and compare like with like."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from benchmarks import anchor, gradient, measure, repaint
from benchmarks import gains as gains_benchmark
from benchmarks import train as train_benchmark
from benchmarks import unet as unet_benchmark
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.nets.unet import NETWORKS, UNetConfig

TINY = UNetConfig((8, 16), attention=(1, 2), stem_stride=2, embedding=8, dropout=0.1)


def run(monkeypatch, module, **options):
    asked = {"smoke": True, "dtype": None, "rounds": 1, "batch": ["1"], "out": None} | options
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**asked))
    module.main([])


def check_spread(spread):
    assert 0 < spread["min"] <= spread["median"] <= spread["max"] < np.inf


@pytest.mark.parametrize(("network", "expected"), [("standard_attn", 10.80), ("small", 1.165)])
def test_counts_multiply_adds(network, expected):
    work = unet_benchmark.gflop(NETWORKS[network])
    assert work["forward"] == pytest.approx(expected, rel=0.01)
    # A gradient repeats every product twice, except that of the first layer with respect to the field.
    assert 2.98 * work["forward"] < work["train"] <= 3 * work["forward"]


def test_compiler_counts_less_by_the_padding():
    graphdef, params = unet.structure(NETWORKS["small"])
    x, t = jax.ShapeDtypeStruct((1, 48, 96, 2), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    analysis = jax.jit(lambda *a: unet.apply(graphdef, *a)).lower(params, x, t).compile().cost_analysis()
    assert analysis["flops"] / 1e9 == pytest.approx(1.09, rel=0.05)
    assert 0.9 < analysis["flops"] / 1e9 / unet_benchmark.gflop(NETWORKS["small"])["forward"] < 1


def test_counts_known_programs():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))

    def looped(a, b):
        return jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((3, 5)), length=7)[0]

    assert unet_benchmark.flop(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert unet_benchmark.flop(jax.jit(looped), a, b) == 7 * 2 * 3 * 4 * 5


def test_interleaves():
    order = []
    seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == list("ababab")
    assert seconds["a"].shape == (3,)
    repeated = measure.interleaved({"a": lambda: order.append("c")}, rounds=1, at_least=1e-3)
    assert order.count("c") > 2
    assert repeated["a"][0] < 1e-3


@pytest.mark.slow
def test_unet_smoke(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(NETWORKS, "small", TINY)
    run(monkeypatch, unet_benchmark, networks=["small"], out=str(tmp_path / "unet.json"))
    results = json.loads((tmp_path / "unet.json").read_text())
    assert "small" in capsys.readouterr().out
    assert {"machine", "dtype", "grid", "rounds", "matrix_product", "rows"} <= results.keys()
    assert {"device", "jax", "torch", "cores"} <= results["machine"].keys()
    assert [r["pass"] for r in results["rows"]] == ["forward", "train"]
    for r in results["rows"]:
        assert r["parameters"] == unet.count(unet.structure(TINY)[1])
        for key in ("ms", "gflop_per_s", "share"):
            check_spread(r[key])
        # The fastest round has the highest rate, however much the rounds differ.
        assert r["ms"]["min"] * r["gflop_per_s"]["max"] == pytest.approx(1e3 * r["gflop"], rel=1e-6)
        assert bool(r["torch_ms"]) == (results["machine"]["torch"] is not None)


@pytest.mark.slow
def test_gradient_smoke(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    run(monkeypatch, gradient, networks=["tiny"], out=str(tmp_path / "gradient.json"))
    results = json.loads((tmp_path / "gradient.json").read_text())
    assert "tiny" in capsys.readouterr().out
    assert [r["form"] for r in results["rows"]] == list(gradient.FORMS)
    for r in results["rows"]:
        check_spread(r["ms"])
        # One round: the ratio of the times is the time of the ratio.
        assert r["over_outside"]["median"] == pytest.approx(r["ms"]["median"] / results["rows"][0]["ms"]["median"])


def test_gradients_of_a_loop_are_the_same(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    ours, theirs = (call() for call in gradient.calls("tiny", 1, 2, ("loop", "library")).values())
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_derivative_of_a_loop_is_that_of_differences(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    graphdef, params = measure.random_network(TINY)
    network, level = jax.jit(partial(unet.apply, graphdef, params)), jnp.array([10.0])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, *gradient.GRID, 2), np.float32))
    out, step = network(x, level), 1e-2
    slope = (network(x + step * out, level) - network(x - step * out, level)) / (2 * step)
    moved = gradient.calls("tiny", 1, 1, ("forwards",))["forwards"]() - x
    np.testing.assert_allclose(1e3 * moved, slope, atol=0.02 * float(jnp.abs(slope).max()))


def test_gains_smoke(monkeypatch, tmp_path, capsys):
    run(monkeypatch, gains_benchmark, rows=["96"], out=str(tmp_path / "gains.json"))
    results = json.loads((tmp_path / "gains.json").read_text())
    assert "over points" in capsys.readouterr().out
    few, _, many, points = results["rows"]
    assert not few["by_blocks"]
    assert many["by_blocks"]
    assert not points["by_blocks"]
    for r in results["rows"]:
        check_spread(r["seconds"])
    # 17 gains of 160 rows by blocks: 2 x 2 numbers of each row and 256 directions of its values, and one number.
    assert many["megabytes"] == pytest.approx(17 * 4 * (160 * (4 + 2 * 256) + 1) / 1e6)
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(smoke=False, rows=["5000"], rounds=1, out=None))
    with pytest.raises(InputError, match="--rows must be below"):
        gains_benchmark.main([])


@pytest.mark.slow
def test_anchor_smoke(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    run(monkeypatch, anchor, networks=["tiny"], out=str(tmp_path / "anchor.json"))
    results = json.loads((tmp_path / "anchor.json").read_text())
    assert "tiny" in capsys.readouterr().out
    assert [r["form"] for r in results["rows"]] == list(anchor.FORMS)
    for r in results["rows"]:
        check_spread(r["ms"])
        assert r["over_network"]["median"] == pytest.approx(r["ms"]["median"] / results["rows"][0]["ms"]["median"])


def test_products_with_the_directions_are_the_same(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    forms = anchor.calls("tiny", 1, 2)
    np.testing.assert_allclose(forms["anchored"](), forms["axes"](), atol=1e-5)
    assert np.abs(forms["anchored"]() - forms["network"]()).max() > 0.1


@pytest.mark.slow
def test_repaint_smoke(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    options = {"network": "tiny", "t_start": 75, "resample_steps": 5, "out": str(tmp_path / "repaint.json")}
    run(monkeypatch, repaint, **options)
    results = json.loads((tmp_path / "repaint.json").read_text())
    assert "tiny" in capsys.readouterr().out
    assert results["network_calls"] == 5
    assert [(r["batch"], r["form"]) for r in results["rows"]] == [(b, f) for b in (1, 2) for f in repaint.FORMS]
    for r in results["rows"]:
        check_spread(r["seconds_a_sample"])
        assert r["difference"] < 1e-5
        assert r["form"] != "scan" or r["over_scan"]["median"] == 1


CONFIG = """
from jax_repaint.settings import default_config

def get_config(arg=""):
    config = default_config()
    config.model.network, config.model.form, config.model.rank = "tiny", "anchored", 4
    config.train.accumulate = 2
    return config
"""


@pytest.mark.slow
def test_train_smoke(monkeypatch, tmp_path, capsys):
    network = UNetConfig((8,), attention=(1,), blocks=1, stem_stride=2, embedding=8)
    monkeypatch.setitem(NETWORKS, "tiny", network)
    (tmp_path / "config.py").write_text(CONFIG)
    made = []
    monkeypatch.setattr(
        train_benchmark, "prepare", lambda *a, prepare=train_benchmark.prepare: made.append(prepare(*a)) or made[0]
    )
    run(monkeypatch, train_benchmark, configs=[str(tmp_path / "config.py")], out=str(tmp_path / "train.json"))
    found = json.loads((tmp_path / "train.json").read_text())
    assert "300 x 9,180 frames" in capsys.readouterr().out
    (r,) = found["rows"]
    assert (r["network"], r["form"], r["batch"], made[0].frames) == ("tiny", "anchored", 2, 4)
    # The input has the linear estimate beside x.
    seen = dataclasses.replace(network, inputs=4)
    assert r["parameters"] == unet.count(unet.structure(seen)[1])
    assert r["gflop_a_frame"] == unet_benchmark.gflop(seen)["train"]
    assert r["frames_per_s"]["max"] * r["ms_a_step"]["min"] == pytest.approx(4e3, rel=1e-6)
    assert r["frames_per_s"]["max"] * r["run_s"]["min"] == pytest.approx(300 * 9180, rel=1e-6)
    for key in ("frames_per_s", "share"):
        check_spread(r[key])
    # Parameters, their average, two moments and the series lie on the device.
    assert r["gb"] * 1e9 > 4 * (4 * r["parameters"] + 4 * 48 * 96 * 2)


def test_full_run_is_the_method(monkeypatch):
    asked = {}
    monkeypatch.setattr(repaint, "measure_sampler", lambda *a: asked.update(stage=a[2]))
    monkeypatch.setattr(repaint, "report", lambda results: "")
    run(monkeypatch, repaint, smoke=False, network="small", t_start=75, resample_steps=5)
    assert asked["stage"].calls == 376


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (unet_benchmark, {"networks": ["large"]}, "large"),
        (unet_benchmark, {"networks": ["small"], "batch": ["0"]}, "batch"),
        (train_benchmark, {"configs": ["nowhere.py"]}, "no configuration 'nowhere.py'"),
        (repaint, {"network": "large", "t_start": 75, "resample_steps": 5}, "large"),
        (repaint, {"network": "small", "t_start": 250, "resample_steps": 5, "smoke": False}, "250"),
    ],
)
def test_mistakes_are_named(monkeypatch, module, options, message):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, module, **options)


@pytest.mark.parametrize("changes", [{}, {"stem_stride": 1}, {"residual": False}])
def test_equals_torch(changes):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_unet import TorchUNet

    config = dataclasses.replace(TINY, **changes)
    graphdef, params = measure.random_network(config)
    twin = TorchUNet(config).eval().copy_weights(params)
    assert twin.count() == unet.count(params)
    x, t = np.random.default_rng(0).standard_normal((2, 16, 32, 2), np.float32), np.array([3, 200])
    ours = jax.jit(lambda *a: unet.apply(graphdef, *a))(params, jnp.asarray(x), jnp.asarray(t, jnp.float32))
    with torch.no_grad():
        theirs = twin(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max()
