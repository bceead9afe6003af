"""Denoising errors by level: the Gaussian's are those of theory, a silent network has the same."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import struct

from jax_repaint import cases, guide, levels, model, scoring
from jax_repaint.cases import pick
from jax_repaint.data.fields import Fields, Split, Standardiser, crop
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from tests import tiny

SIGMAS = np.array([0.1, 1.0, 10.0])


@pytest.fixture(scope="module")
def trained():
    """An anchored model whose network is silent."""
    made = tiny.model("anchored")
    network = dataclasses.replace(made.network, zero_output=True)
    params = jax.tree.map(np.asarray, unet.create(network, 0)[1])
    return dataclasses.replace(made, network=network, params=params)


@pytest.fixture(scope="module")
def drawn(trained):
    """120 frames of the model's own linear prior, in m/s."""
    keys = jax.random.split(jax.random.key(0), 120)
    x = jax.jit(jax.vmap(lambda key: guide.prior_draw(trained.gaussian, key)))(keys)
    velocity = trained.standardiser.restore(np.asarray(crop(x, trained.ocean.shape)))
    velocity = np.where(trained.ocean[..., None], velocity, np.nan)
    time = np.datetime64("2020-01-01", "ns") + np.arange(120) * np.timedelta64(1, "h")
    return Fields.create(velocity, trained.lat, trained.lon, time, ocean=trained.ocean, name="drawn")


@pytest.mark.parametrize("pattern", ["", "cells:0.1"])
def test_errors_are_those_of_theory(trained, drawn, pattern):
    errors = levels.denoising_errors(trained, drawn, np.arange(120), SIGMAS, pattern)
    assert errors.shape == (120, 3, 2)
    np.testing.assert_allclose(errors[..., 0], errors[..., 1], rtol=1e-4)
    expected = [float(trained.gaussian.residual_variance(jnp.float32(sigma))) for sigma in SIGMAS]
    found = errors[..., 1].mean(0)
    if not pattern:
        np.testing.assert_allclose(found, expected, rtol=0.1)
    else:
        # The more noise, the more the observations say.
        gain = found / expected
        assert gain[0] > gain[1] > gain[2]
        assert gain[2] < 0.8
    rows = levels.table(errors, SIGMAS)
    np.testing.assert_allclose(rows["ratio"], 1, rtol=1e-4)
    np.testing.assert_allclose(rows["gaussian"], found, rtol=1e-5)


def test_every_level_has_noise_of_its_own(trained, drawn):
    errors = levels.denoising_errors(trained, drawn.select(np.arange(4)), np.arange(4), np.array([1.0, 1.0]))
    assert (np.abs(errors[:, 0] - errors[:, 1]) > 1e-4).all()


def test_intervals_are_of_blocks_of_frames(trained, drawn):
    errors = levels.denoising_errors(trained, drawn, np.arange(120), SIGMAS)
    errors[..., 0] *= np.random.default_rng(0).uniform(0.5, 2, (120, 1))
    rows = levels.table(errors, SIGMAS, block=10)
    for level, row in rows.iterrows():
        found = scoring.ratio_of_means(*errors[:, level].T, block=10, seed=0)
        np.testing.assert_array_equal(row[["ratio", "lo", "hi"]], [found.ratio, found.lo, found.hi])


@struct.dataclass
class Told:
    """Knows nothing by itself; of what it is given it makes the exact estimate."""

    gaussian: PrincipalGaussian

    def __call__(self, x, sigma):
        return jnp.zeros_like(x)

    def given(self, x, sigma, evidence):
        return guide.kalman(lambda x: self.gaussian(x, sigma), x, sigma, sigma, evidence)


def test_a_network_that_takes_observations_is_given_them(trained, drawn, monkeypatch):
    monkeypatch.setattr(model.Model, "denoiser", Told(trained.gaussian))
    errors = levels.denoising_errors(trained, drawn.select([0, 1]), np.arange(2), SIGMAS, "cells:0.1")
    np.testing.assert_allclose(errors[..., 0], errors[..., 1], rtol=1e-5)
    without = levels.denoising_errors(trained, drawn.select([0, 1]), np.arange(2), SIGMAS)
    assert (without[:, 0, 0] > 2 * without[:, 0, 1]).all()


def test_levels_beyond_training_are_refused(trained, drawn):
    with pytest.raises(InputError, match=r"trained for noise from 0.01 to 130, not for 200"):
        levels.denoising_errors(trained, drawn, np.arange(120), np.array([1.0, 200.0]))


def test_noise_is_the_same_on_another_padded_grid(trained, drawn):
    """Sixteen columns of land more change nothing of errors on the ocean, where the Gaussian alone is asked."""
    assert trained.padded[1] < 32
    add = ((0, 0), (0, 32 - trained.padded[1]), (0, 0))

    def wider(field):
        return jnp.pad(field, ((0, 0),) * (field.ndim - 3) + add)

    gaussian = trained.gaussian.replace(
        **{name: wider(getattr(trained.gaussian, name)) for name in ("mean", "direction", "ocean")}
    )
    other = dataclasses.replace(trained, gaussian=gaussian, grid=(trained.padded[0], 32))
    frames = drawn.select(np.arange(3))
    expected = levels.denoising_errors(trained, frames, np.arange(3), SIGMAS)
    found = levels.denoising_errors(other, frames, np.arange(3), SIGMAS, drawn=trained.padded)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    back = levels.denoising_errors(other, frames, np.arange(3), SIGMAS)
    assert np.abs(back / expected - 1).max() > 0.01
    again = levels.denoising_errors(trained, frames, np.arange(3), SIGMAS, drawn=other.padded)
    np.testing.assert_allclose(again, back, rtol=1e-4)


def test_models_are_compared_with_the_first_on_the_same_noise(trained, drawn):
    # Half of the linear estimate is worse by what it leaves out; the same model again is neither better nor worse.
    half = dataclasses.replace(trained.gaussian, mean=trained.gaussian.mean + 0.5)
    worse = dataclasses.replace(trained, gaussian=half)
    errors = {
        name: levels.denoising_errors(one, drawn, np.arange(120), SIGMAS)
        for name, one in {"first": trained, "again": trained, "shifted": worse}.items()
    }
    rows = levels.compare(errors, SIGMAS).set_index(["model", "sigma"])
    for name in ("first", "again"):
        np.testing.assert_array_equal(rows.loc[name][list(levels.OVER_FIRST)], 1)
    for level, sigma in enumerate(SIGMAS):
        row, basis = rows.loc["shifted", sigma], rows.loc["first", sigma]
        np.testing.assert_allclose(row.over_first, row.network / basis.network, rtol=1e-6)
        # A mean that is wrong by d is wrong by d times what the Gaussian takes from it: the error grows by its square.
        kept = np.array(trained.gaussian(jnp.zeros_like(trained.gaussian.mean), jnp.float32(sigma)))
        moved = np.array(half(jnp.zeros_like(half.mean), jnp.float32(sigma)))
        ocean = np.asarray(trained.gaussian.ocean)[..., 0] > 0
        expected = basis.network + np.mean((moved - kept)[ocean] ** 2)
        np.testing.assert_allclose(row.network, expected, rtol=0.1)
        assert row.first_lo <= row.over_first <= row.first_hi
        assert errors["first"][0, level, 1] == errors["again"][0, level, 1]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_frames_come_from_the_part_that_is_asked_for(trained, drawn, tmp_path, monkeypatch, capsys, part):
    parts = {"train": np.arange(60), "validation": np.arange(70, 90), "test": np.arange(100, 120)}
    monkeypatch.setattr(levels, "load_together", lambda folders, _: {folders[0]: trained})
    monkeypatch.setattr(cases, "load_fields", lambda *_: drawn)
    monkeypatch.setattr(cases, "split_fields", lambda *_: Split(**parts, decorrelation=0.7))
    asked = {"model": ["one"], "fields": None, "frames": 8, "part": part, "levels": 2, "pattern": "", "seed": 3}
    monkeypatch.setattr(levels, "FLAGS", SimpleNamespace(**asked, out=str(tmp_path / "out.csv")))
    levels.main([])
    numbers = pick(Split(**(parts | {"test": parts[part]})), 8, 3)
    expected = levels.denoising_errors(trained, drawn.select(numbers), numbers, np.array([0.01, 130.0]), seed=3)
    written = pd.read_csv(tmp_path / "out.csv")
    np.testing.assert_allclose(written["network"], expected[..., 0].mean(0), rtol=1e-5)
    assert "ratio" in capsys.readouterr().out


def test_the_command_compares_models_at_levels_of_both_and_by_blocks(trained, drawn, tmp_path, monkeypatch):
    ranges = (0.02, 40.0), (0.01, 9.0)
    models = {name: dataclasses.replace(trained, sigma=one) for name, one in zip(("one", "two"), ranges, strict=True)}
    errors = dict(zip(ranges, np.random.default_rng(0).gamma(3, size=(2, 60, 3, 2)), strict=True))
    asked = []

    def found(one, fields, numbers, sigmas, *_):
        asked.append(sigmas)
        return errors[one.sigma]

    monkeypatch.setattr(levels, "load_together", lambda *_: models)
    monkeypatch.setattr(cases, "load_fields", lambda *_: drawn)
    monkeypatch.setattr(cases, "split_fields", lambda *_: Split(*[np.arange(60)] * 3, decorrelation=9.0))
    monkeypatch.setattr(levels, "denoising_errors", found)
    given = {"model": list(models), "fields": None, "frames": 60, "part": "test", "levels": 3, "pattern": "", "seed": 0}
    monkeypatch.setattr(levels, "FLAGS", SimpleNamespace(**given, out=str(tmp_path / "out.csv")))
    levels.main([])
    np.testing.assert_allclose(asked, [np.geomspace(0.02, 9.0, 3)] * 2)
    rows = pd.read_csv(tmp_path / "out.csv").set_index("model").loc["two"]
    one, two = errors.values()
    for level in range(3):
        for basis, names in ((two[..., 1], ["ratio", "lo", "hi"]), (one[..., 0], list(levels.OVER_FIRST))):
            expected = scoring.ratio_of_means(two[:, level, 0], basis[:, level], block=9, seed=0)
            np.testing.assert_allclose(
                rows.iloc[level][names].astype(float), [expected.ratio, expected.lo, expected.hi], rtol=1e-6
            )


def test_models_in_other_units_are_not_compared(trained, tmp_path, monkeypatch):
    """As those of other data, of which the part `all` of a third file may be asked."""
    scale = trained.standardiser
    twice = dataclasses.replace(trained, standardiser=Standardiser.create(scale.mean, 2 * scale.std))
    alike = dataclasses.replace(trained, standardiser=Standardiser.create(scale.mean + 1, 1.005 * scale.std))
    for name, one in (("one", trained), ("other", alike), ("twice", twice)):
        model.save(one, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert list(levels.load_together(["one", "other"], "all")) == ["one", "other"]
    with pytest.raises(InputError, match=r"twice has noise and errors in units of .* m/s, one of .*: they do not"):
        levels.load_together(["one", "twice"], "all")


@pytest.mark.parametrize("changes", [{"fingerprint": "b"}, {"parts": {"train": [0, 10], "test": [20, 30]}}])
def test_only_models_of_the_same_frames_are_compared(trained, tmp_path, changes):
    made = dataclasses.replace(trained, training=trained.training | {"fingerprint": "a"})
    other = dataclasses.replace(made, training=made.training | changes)
    folders = [str(tmp_path / name) for name in ("one", "two", "three")]
    for folder, one in zip(folders, (made, made, other), strict=True):
        model.save(one, folder)
    assert list(levels.load_together(folders[:2])) == folders[:2]
    with pytest.raises(InputError, match=r"three was trained on other frames than .*one: their errors do not compare"):
        levels.load_together(folders)
    for wrong, said in (([], "none"), ([folders[0]] * 2, "one, .*one")):
        with pytest.raises(InputError, match=rf"different models are needed, got .*{said}"):
            levels.load_together(wrong)
