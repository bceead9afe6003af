"""What is held out: a part of the fields of a training, or the whole of a file that had no part in it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jax_repaint import calibrate, cases, evaluate, levels, model
from jax_repaint.cases import data_of, pick
from jax_repaint.data import readers
from jax_repaint.data.fields import Split, decorrelation_time, prepare
from jax_repaint.errors import InputError
from jax_repaint.prepare import time_range
from jax_repaint.prior import linear
from tests import tiny

COMMANDS = {
    evaluate: {"methods": ["linear"], "out": "out", "keep": [], "raw": False, "directions": None, "error": None},
    calibrate: {
        "method": "linear_samples",
        "block": 1,
        "gate": False,
        "error": 0.005,
        "replace": False,
        "default": False,
    },
    levels: {"levels": 2, "pattern": "", "out": ""},
}
TAKERS = {evaluate: "run", calibrate: "learn", levels: "denoising_errors"}
PARTS = {evaluate: "test", calibrate: "validation", levels: "train"}


@pytest.fixture(scope="module")
def trained():
    return tiny.model("anchored")


@pytest.fixture
def folder(tmp_path, trained):
    """The model, its own fields, and those of another season."""
    model.save(trained, tmp_path / "model")
    readers.write(tiny.fields(), tmp_path / "own.nc")
    readers.write(later(), tmp_path / "later.nc")
    return tmp_path


def later(frames=40):
    fields = tiny.fields(frames, seed=9)
    return dataclasses.replace(fields, time=fields.time + np.timedelta64(500, "D"), name="later")


def numbers_of(command, folder, monkeypatch, said=None, **given):
    """Frame numbers that a command takes, the fields of them, and the model that it takes them for.

    Args:
      said: a list that gets the options that they are taken with.
    """
    asked = {"model": str(folder / "model"), "fields": str(folder / "own.nc"), "part": PARTS[command], "frames": 6,
             "members": 4, "patterns": ["line:4"], "seed": 3, "chunk": None}  # fmt: skip
    if command is levels:
        asked["model"] = [asked["model"]]
    taken = []

    class Taken(Exception):
        pass

    def take(trained, fields, numbers, *_, **options):
        taken.append((numbers, fields, trained))
        if said is not None:
            said.append(options)
        raise Taken

    monkeypatch.setattr(command, "FLAGS", SimpleNamespace(**asked | COMMANDS[command] | given))
    monkeypatch.setattr(command, TAKERS[command], take)
    with pytest.raises(Taken):
        command.main([])
    return taken[0]


def test_methods_are_chosen_on_validation_frames_as_sampled(folder, trained, monkeypatch):
    """A calibration was learnt on them: its row there would say too much."""
    said = []
    for part in ("validation", "test"):
        run = numbers_of(evaluate, folder, monkeypatch, part=part, said=said)
        split = data_of(trained, str(folder / "own.nc"))[1]
        assert np.isin(run[0], getattr(split, part)).all()
    assert [options["raw"] for options in said] == [True, False]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_command_takes_frames_of_its_part_or_of_all_of_a_file(command, folder, trained, monkeypatch):
    own, _, _ = numbers_of(command, folder, monkeypatch)
    split = data_of(trained, str(folder / "own.nc"), PARTS[command])[1]
    assert np.isin(own, getattr(split, PARTS[command])).all()
    numbers, fields, _ = numbers_of(command, folder, monkeypatch, fields=str(folder / "later.nc"), part="all")
    assert numbers.size == np.unique(numbers).size == 6
    np.testing.assert_array_equal(fields.velocity, later().velocity[numbers])
    everything, _, _ = numbers_of(
        command, folder, monkeypatch, fields=str(folder / "later.nc"), part="all", frames=1000
    )
    np.testing.assert_array_equal(everything, np.arange(40))


def test_an_evaluation_says_which_model_and_how_many_directions(folder, trained, monkeypatch):
    said = []
    for given in ({}, {"directions": 5}):
        numbers_of(evaluate, folder, monkeypatch, said=said, **given)
    plain = model.fingerprint(model.load(folder / "model"))
    assert [options["named"] for options in said] == [
        plain, f"{plain} with a linear prior of 5 directions fitted anew"
    ]  # fmt: skip


def test_directions_are_those_of_the_training_and_not_of_what_is_held_out(folder, trained, monkeypatch):
    path = str(folder / "own.nc")
    own = dataclasses.replace(trained, training=trained.training | {"config": with_fields(trained, path)})
    model.save(own, folder / "own")
    given = {"model": str(folder / "own"), "directions": 5, "fields": str(folder / "later.nc"), "part": "all"}
    _, _, with_five = numbers_of(evaluate, folder, monkeypatch, **given)
    fields, split = data_of(own, None)
    x, _ = prepare(fields.select(split.train), trained.standardiser, trained.network.multiple)
    expected = linear.fit(x, np.asarray(trained.gaussian.ocean)[..., 0] > 0, 5)
    np.testing.assert_allclose(np.abs(with_five.gaussian.direction), np.abs(expected.direction), atol=1e-5)
    # Nor those of the part of another file that has the numbers of the training frames.
    _, _, of_part = numbers_of(evaluate, folder, monkeypatch, **given | {"part": "test"})
    np.testing.assert_allclose(of_part.gaussian.variance, expected.variance, rtol=1e-5)


def with_fields(trained, path):
    settings = trained.training["config"]
    return settings | {"data": settings["data"] | {"fields": path}}


def test_who_names_other_fields_is_told_of_the_whole_of_them(folder, trained, caplog):
    _, split = data_of(trained, str(folder / "later.nc"))
    assert split.test.size < 40
    assert "later.nc is not the data that the model was trained on" in caplog.text
    assert "the part all takes every one" in caplog.text


def test_frames_of_the_twin_are_of_the_part_that_is_asked_for(trained):
    """Of which no more than these are simulated: a calibration is not learnt from the test frames."""
    for part in ("train", "validation", "test"):
        _, split = cases.held_out(trained, part=part)
        np.testing.assert_array_equal(split.test, np.arange(*trained.training["parts"][part]))


def test_a_twin_of_another_rounding_is_the_twin(trained, monkeypatch, caplog):
    """Machines round differently; a file that differs is another file."""
    made = tiny.fields()
    other = dataclasses.replace(made, velocity=np.nextafter(made.velocity, np.float32(1)))
    monkeypatch.setattr(cases, "load_fields", lambda *_: other)
    for path, warned in ((None, False), ("own.nc", True)):
        caplog.clear()
        data_of(trained, path)
        assert ("is not the data that the model was trained on" in caplog.text) is warned


def test_all_of_a_file_needs_a_file_that_no_model_was_trained_on(folder, trained):
    with pytest.raises(InputError, match="only of a file"):
        data_of(trained, None, "all")
    with pytest.raises(InputError, match=r"own\.nc is what a model was trained on"):
        data_of(trained, str(folder / "own.nc"), "all")
    season = later()
    here = np.zeros(season.velocity.shape, bool)
    here[:, 5, 5:8] = True
    empty = dataclasses.replace(season, velocity=np.where(here, season.velocity, np.nan))
    readers.write(empty, folder / "empty.nc")
    with pytest.raises(InputError, match=r"no frame has values in 10% of the ocean cells"):
        data_of(trained, str(folder / "empty.nc"), "all")


def test_frames_of_the_time_of_the_training_are_counted(folder, trained, caplog):
    """A file that begins before the end of what a training saw; none in a model that does not say when that was."""
    own = tiny.fields()
    split = Split(np.arange(41), np.arange(42, 50), np.arange(51, 60))
    dated = dataclasses.replace(trained, training=trained.training | {"time": time_range(own, split)})
    assert dated.training["time"] == ["2020-01-01T00:00:00", "2020-01-03T01:00:00"]
    season = dataclasses.replace(later(), time=own.time[49] + (np.arange(40) - 12) * own.step)
    readers.write(season, folder / "season.nc")
    for one in (trained, dated):
        data_of(one, str(folder / "later.nc"), "all")
    data_of(trained, str(folder / "season.nc"), "all")
    assert "are of the time" not in caplog.text
    data_of(dated, str(folder / "season.nc"), "all")
    assert "13 of 40 frames of season.nc are of the time that a model was trained on, from 2020-01-01T00" in caplog.text


def test_a_model_that_names_no_data_can_be_tried_on_a_file(folder, trained):
    silent = dataclasses.replace(trained, training={})
    with pytest.raises(InputError, match="nothing is known to be held out"):
        data_of(silent, str(folder / "later.nc"))
    fields, split = data_of(silent, str(folder / "later.nc"), "all")
    np.testing.assert_array_equal(split.test, np.arange(len(fields)))
    assert not split.train.size


@pytest.mark.parametrize("frames", [7, 40])
def test_blocks_are_as_long_as_fields_were_alike_in_training(folder, trained, frames):
    """A model that does not say that has it measured; seven frames tell nothing of it, forty that they soon forget."""
    slow = dataclasses.replace(trained, training=trained.training | {"decorrelation": 5.0})
    path = str(folder / "some.nc")
    readers.write(later(frames), path)
    split = data_of(slow, path, "all")[1]
    assert split.decorrelation == 5
    assert cases.block_length(split, 40) == (5 if frames == 40 else 10)
    measured = data_of(dataclasses.replace(trained, training={}), path, "all")[1].decorrelation
    assert measured == (7 if frames == 7 else decorrelation_time(later(40)))
    assert measured != 5


@pytest.mark.parametrize(("hours", "expected"), [(1, 120), (24, 5), (48, 2.5)])
def test_blocks_are_as_long_in_days_whatever_the_step_of_the_file(folder, trained, hours, expected):
    """Of a model of daily frames that were alike for five days."""
    parts = {"train": [0, 50], "validation": [60, 80], "test": [90, 100]}
    told = {"decorrelation": 5.0, "parts": parts, "time": ["2020-01-01T00:00:00", "2020-03-20T00:00:00"]}
    daily = dataclasses.replace(trained, training=trained.training | told)
    path = str(folder / "steps.nc")
    fields = later(40)
    time = np.datetime64("2022-01-01", "ns") + np.arange(40) * np.timedelta64(hours, "h")
    readers.write(dataclasses.replace(fields, time=time), path)
    assert data_of(daily, path, "all")[1].decorrelation == pytest.approx(expected)


def test_models_of_other_frames_are_compared_on_a_file_that_none_saw(folder, trained, monkeypatch):
    other = dataclasses.replace(trained, training=trained.training | {"fingerprint": later().hash()})
    model.save(other, folder / "other")
    both = [str(folder / "model"), str(folder / "other")]
    with pytest.raises(InputError, match="was trained on other frames"):
        levels.load_together(both)
    readers.write(tiny.fields(30, seed=5), folder / "third.nc")
    numbers, _, _ = numbers_of(levels, folder, monkeypatch, model=both, fields=str(folder / "third.nc"), part="all")
    assert numbers.size == 6
    with pytest.raises(InputError, match=r"later\.nc is what a model was trained on"):
        numbers_of(levels, folder, monkeypatch, model=both, fields=str(folder / "later.nc"), part="all")


def test_pick_draws_other_frames_of_a_file_for_other_seeds(folder, trained):
    _, split = data_of(trained, str(folder / "later.nc"), "all")
    assert (pick(split, 6, 1) != pick(split, 6, 2)).any()


def test_blocks_are_of_the_pattern_whose_errors_last_longest(folder, monkeypatch):
    """Frames of all patterns are learnt from, whichever is named first."""
    lasting, blocks = {"line:4": 3, "walk:12": 5, "cells:0.1": 2}, []

    def length(trained, fields, pattern, seed, numbers):
        assert len(fields) == len(numbers)
        return lasting[pattern]

    monkeypatch.setattr(calibrate, "block_length", length)

    def learn(*_, block, **__):
        blocks.append(block)
        raise RuntimeError

    flags = {"model": str(folder / "model"), "fields": str(folder / "own.nc"), "part": "validation", "frames": 6,
             "members": 4, "patterns": list(lasting), "seed": 3, "chunk": None}  # fmt: skip
    monkeypatch.setattr(calibrate, "FLAGS", SimpleNamespace(**flags | COMMANDS[calibrate] | {"block": None}))
    monkeypatch.setattr(calibrate, "learn", learn)
    with pytest.raises(RuntimeError):
        calibrate.main([])
    assert blocks == [5]
