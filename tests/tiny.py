"""A small field, network and model, so that tests of whole runs take seconds."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from scipy import ndimage

from jax_repaint.data.fields import Fields, Standardiser, prepare
from jax_repaint.model import Model
from jax_repaint.nets import unet
from jax_repaint.prior import gp, linear
from jax_repaint.settings import default_config, sigma_range

NETWORK = unet.UNetConfig((8,), attention=(1,), blocks=1, heads=2, embedding=16, dropout=0.1)


def register(patch: pytest.MonkeyPatch) -> None:
    """Makes `NETWORK` known as "test"."""
    patch.setitem(unet.NETWORKS, "test", NETWORK)


def compile_once(folder: Path) -> None:
    """Keeps compiled programs in `folder` for every later run."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()


def compile_as_usual() -> None:
    """Takes `compile_once` back."""
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


def fields(frames: int = 60, seed: int = 0) -> Fields:
    """Smooth flow that forgets itself from frame to frame, on 7 x 12 cells with land in the south and south-west."""
    rng = np.random.default_rng(seed)
    velocity = ndimage.gaussian_filter(rng.standard_normal((frames, 7, 12, 2)), (0.3, 1.5, 1.5, 0))
    velocity[:, 0] = velocity[:, :3, :4] = np.nan
    time = np.datetime64("2020-01-01", "ns") + np.arange(frames) * np.timedelta64(1, "h")
    return Fields.create(velocity, 18 + 0.01 * np.arange(7), 295 + 0.01 * np.arange(12), time, name="tiny")


def config(form: str = "eps", **settings) -> ConfigDict:
    """Three epochs of nine steps, three a dispatch; `settings` of the training replace what is theirs."""
    made = default_config()
    made.model.update({"network": "test", "form": form, "rank": 8, "gp_steps": 2})
    short = {"epochs": 3, "warmup_epochs": 1.0, "batch": 4, "dispatch": 3, "learning_rate": 1e-3, "ema": 0.9}
    made.train.update(short | settings)
    return made


def model(form: str = "eps", data: Fields | None = None) -> Model:
    """An untrained model of `data`, by default `fields()`; its output is not zero."""
    settings, data = config(form), data or fields()
    standardiser = Standardiser.from_fields(data)
    network = dataclasses.replace(NETWORK, inputs=4 if form == "anchored" else 2)
    x, ocean = prepare(data, standardiser, network.multiple)
    parts = {"train": [0, 41], "validation": [42, 50], "test": [51, 60]}
    return Model(
        network=network,
        form=form,
        params=jax.tree.map(np.asarray, unet.create(network, 0)[1]),
        standardiser=standardiser,
        ocean=data.ocean,
        lat=data.lat,
        lon=data.lon,
        gaussian=linear.fit(x, ocean, 8),
        kernel=gp.seed_gp(),
        schedule={"steps": 250, "min_beta": 1e-4, "max_beta": 0.02},
        sigma=sigma_range(settings),
        training={
            "parts": parts,
            "decorrelation": 0.7,
            "fingerprint": data.hash(),
            "config": settings.to_dict(),
        },
    )
