"""The benchmarks of ensembles and sweeps run, and their numbers follow from each other."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from absl import flags

from benchmarks import ensemble, measure, repaint
from benchmarks import sweep as sweep_benchmark
from jax_repaint import model
from jax_repaint.data import readers
from jax_repaint.denoise import EpsDenoiser
from jax_repaint.errors import InputError
from jax_repaint.nets.unet import NETWORKS, UNetConfig
from jax_repaint.sample import Known, method
from jax_repaint.schedule import Schedule

TINY = UNetConfig((8,), attention=(1,), blocks=1, stem_stride=2, embedding=8)


def run(monkeypatch, module, **options):
    asked = {"smoke": True, "dtype": None, "rounds": 1, "batch": ["1"], "out": None, "shorten": None, "figure": None}
    asked |= options
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**asked))
    module.main([])


def test_calls_are_those_of_the_methods():
    assert sum(stage.calls for stage in method("adaptive")) == ensemble.CALLS["S1"]
    assert sum(stage.calls for stage in method("multistage")) == ensemble.CALLS["S6"]
    assert [stage.t_start for stage in ensemble.shortened(method("multistage"), 25)] == [3, 2, 2, 2, 2, 2]


def test_the_loop_returns_what_the_sampler_does(monkeypatch):
    """The loop's step on the larger grid, against the package's scan there."""
    grid = (16, 16)
    monkeypatch.setattr(ensemble, "LOOP_GRID", grid)
    schedule, stages = Schedule.linear(), ensemble.shortened(method("adaptive"), 25)
    graphdef, params = measure.random_network(TINY)
    denoiser = EpsDenoiser(params, schedule, graphdef)
    seen = []
    monkeypatch.setattr(repaint, "step", lambda *a, step=repaint.step: seen.append(a[0].shape) or step(*a))
    loop = ensemble._loop(denoiser, schedule, stages)
    expected = jax.jit(repaint.repaint)(jax.random.key(1), denoiser, repaint.frame(grid=grid), schedule, stages[0])
    np.testing.assert_allclose(loop.call(), expected.x, atol=1e-4)
    assert seen == [(*grid, 2)]
    assert loop.calls == 16
    assert isinstance(repaint.frame(), Known)


@pytest.mark.slow
def test_ensemble_smoke(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    monkeypatch.setattr(measure, "gaussian", lambda grid, full=measure.gaussian: full(grid, 4))
    paths = {name: str(tmp_path / f"ensemble.{name}") for name in ("json", "png")}
    run(monkeypatch, ensemble, network="tiny", out=paths["json"], figure=paths["png"])
    assert (tmp_path / "ensemble.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "ensemble.json").read_text())
    assert "kalman-16" in capsys.readouterr().out
    names = [(r["sampler"], r["batch"]) for r in found["rows"]]
    assert names[:2] == [("S1, loop", 1), ("S6, loop", 1)]
    assert names[2:] == [(name, batch) for batch in (1, 2) for name in ensemble.CALLS]
    for r in found["rows"]:
        name = r["sampler"].split(",")[0]
        # The fastest round has the highest rate.
        best = 1e3 / r["fields_per_s"]["max"] / ensemble.CALLS[name]
        assert best == pytest.approx(r["ms_a_call"]["min"], rel=1e-6)
        assert (r["gb"] is None) == (r["over_network"] is None) == ("loop" in r["sampler"])
        calls = ensemble.MEMBERS * ensemble.CALLS[name] * r["ms_a_call"]["min"] / 1e3
        if name == "kalman-16":
            assert r["ensemble_s"]["min"] >= calls + found["gains_s"]["min"]
        else:
            assert r["ensemble_s"]["min"] == pytest.approx(calls, rel=1e-6)
            ratio = r["ensemble_over_loop"]["median"] / r["call_over_loop"]["median"]
            assert ratio == pytest.approx(ensemble.CALLS["S6"] / ensemble.CALLS[name], rel=1e-6)
    loop = found["rows"][1]
    assert loop["call_over_loop"]["median"] == loop["ensemble_over_loop"]["median"] == 1


@pytest.mark.slow
def test_sweep_smoke(monkeypatch, tmp_path, capsys):
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    model.save(tiny.model(data=readers.read(tmp_path / "tiny.nc")), tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "fields": str(tmp_path / "tiny.nc"), "patterns": "line:3"}
    counts = {"frames": 1, "members": 2, "points": 2, "t_start": 2}
    run(monkeypatch, sweep_benchmark, **options, **counts, out=str(tmp_path / "sweep.json"))
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert "overhead" in capsys.readouterr().out
    assert (found["tasks"], found["network_calls"]) == (2, 2 * 2 * 11)
    assert set(found["compile_s"]) == {"no cache", "empty cache", "from the cache"}
    assert all(seconds > 0 for seconds in found["compile_s"].values())
    assert all(0 < spread["min"] <= spread["max"] for spread in found["seconds"].values())
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"network": "large"}, "large"), ({"network": "small", "batch": ["none"]}, "batch")],
)
def test_mistakes_are_named(monkeypatch, options, message):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, ensemble, **options)
