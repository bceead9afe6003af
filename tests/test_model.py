"""Models on disk: what is written is what is read, and nothing else is taken for a model."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jax_repaint import model
from jax_repaint.cases import held_out
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError


@pytest.fixture(scope="module")
def trained():
    return tiny.model("anchored")


@pytest.fixture
def folder(trained, tmp_path):
    model.save(trained, tmp_path / "model")
    return tmp_path / "model"


def describe(folder, **changes):
    path = folder / model.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("form", model.FORMS)
def test_a_model_survives_the_disk(form, tmp_path):
    made = tiny.model(form)
    model.save(made, tmp_path / "a" / "model")
    read = model.load(tmp_path / "a" / "model")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]
    jax.tree.map(np.testing.assert_array_equal, (read.params, read.gaussian), (made.params, made.gaussian))
    for name in ("network", "form", "schedule", "sigma", "training", "padded"):
        assert getattr(read, name) == getattr(made, name), name
    for name in ("ocean", "lat", "lon"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert read.standardiser.to_json() == made.standardiser.to_json()
    assert read.kernel.to_json() == made.kernel.to_json()
    assert model.fingerprint(read) == model.fingerprint(made)
    read.check_grid(tiny.fields())


def test_a_model_is_shown_in_a_line_without_its_weights(trained):
    shown = repr(trained)
    assert shown.startswith("Model(anchored, network of ")
    assert shown.endswith(
        "channels (8,), 7 x 12 cells at lat 18.0000..18.0600, lon 295.0000..295.1100, not calibrated)"
    )


def test_half_the_size_is_nearly_the_same_denoiser(trained, tmp_path):
    x, sigma = jax.random.normal(jax.random.key(0), (8, 12, 2)), jnp.float32(0.7)
    call = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
    results, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        model.save(trained, tmp_path / dtype, dtype)
        results[dtype] = call(model.load(tmp_path / dtype).denoiser, x, sigma)
        sizes[dtype] = sum(tensor.nbytes for tensor in load_file(tmp_path / dtype / model.WEIGHTS).values())
    exact = call(trained.denoiser, x, sigma)
    np.testing.assert_array_equal(results["float32"], exact)
    with pytest.raises(InputError, match="weights are kept as float32 or bfloat16, not as 'float16'"):
        model.save(trained, tmp_path / "float16", "float16")
    np.testing.assert_allclose(results["bfloat16"], exact, atol=0.05)
    assert np.abs(results["bfloat16"] - exact).max() > 0
    assert sizes["bfloat16"] < 0.6 * sizes["float32"]


def test_a_model_of_a_gpu_runs_in_float32_on_a_cpu(trained):
    of_a_gpu = dataclasses.replace(trained.network, dtype="bfloat16", attention_implementation="cudnn")
    x, sigma = jax.random.normal(jax.random.key(0), (8, 12, 2)), jnp.float32(0.7)
    moved = dataclasses.replace(trained, network=of_a_gpu)
    np.testing.assert_array_equal(moved.denoiser(x, sigma), trained.denoiser(x, sigma))


def test_an_older_model_is_replaced_whole(trained, folder):
    (folder / "figure.png").write_bytes(b"of the older model")
    model.save(dataclasses.replace(trained, kernel=None, training={"step": 7}), folder)
    assert sorted(path.name for path in folder.iterdir()) == [model.DESCRIPTION, model.WEIGHTS]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (model.load(folder).kernel, model.load(folder).training) == (None, {"step": 7})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left (os error)")])
def test_a_model_that_cannot_be_written_leaves_the_older_one(trained, folder, monkeypatch, error):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        model.save(trained, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    model.load(folder)


def test_a_model_that_cannot_take_its_place_leaves_the_older_one(trained, folder, monkeypatch):
    replace = os.replace

    def failing(source, target):
        if target == folder and source.name == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match="Input/output error"):
        model.save(dataclasses.replace(trained, training={"step": 7}), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert model.load(folder).training != {"step": 7}


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no model"):
        model.save(trained, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        model.save(trained, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_model_and_half_a_model(folder, tmp_path):
    with pytest.raises(InputError, match=r"no model in .*nowhere"):
        model.load(tmp_path / "nowhere")
    weights = folder / model.WEIGHTS
    content = weights.read_bytes()
    for count in (len(content) - 1, 100, 4, 0):
        weights.write_bytes(content[:count])
        with pytest.raises(InputError, match="cannot be read"):
            model.load(folder)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        model.load(folder)
    (folder / model.DESCRIPTION).write_text('{"format": 1,')
    with pytest.raises(InputError, match="cannot be read"):
        model.load(folder)


def test_a_newer_format_is_named(folder):
    describe(folder, format=2)
    with pytest.raises(InputError, match="format 2; this version reads 1"):
        model.load(folder)


def test_weights_of_another_network_are_refused(trained, folder):
    describe(folder, network=dataclasses.asdict(dataclasses.replace(trained.network, channels=(16,))))
    with pytest.raises(InputError, match=r"weight .* is of shape"):
        model.load(folder)
    describe(folder, network=dataclasses.asdict(dataclasses.replace(trained.network, blocks=2)))
    with pytest.raises(InputError, match=r"weight .* is missing"):
        model.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"channels": [8], "wings": 2}},
        {"network": [8]},
        {"standardiser": {"mean": [0, 0]}},
        {"sigma": None},
        {"sigma": [0.01]},
        {"sigma": [130.0, 0.01]},
        {"sigma": "ab"},
        {"training": None},
        {"form": "v"},
        {"kernel": {"name": "unknown"}},
        {"schedule": {"steps": 250}},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(folder, changes):
    describe(folder, **changes)
    with pytest.raises(InputError):
        model.load(folder)


def test_a_description_that_is_no_object_is_refused(folder):
    (folder / model.DESCRIPTION).write_text("[1]")
    with pytest.raises(InputError, match="not complete"):
        model.load(folder)


def first(number):
    def change(tensor):
        changed = tensor.copy()
        changed.flat[0] = number
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lat", lambda lat: lat[:-1], "do not fit a grid"),
        ("lon", lambda lon: lon[::-1].copy(), "longitude must increase"),
        ("lat", first(np.nan), "missing in some cells"),
        ("gaussian/variance", lambda variance: variance[:-1], "directions"),
        ("gaussian/direction", first(np.nan), "direction holds numbers that are not finite"),
        ("gaussian/variance", first(-1.0), "is negative"),
        ("gaussian/rest", first(np.nan), "rest holds numbers that are not finite"),
        ("params", first(np.inf), "not finite"),
    ],
)
def test_tensors_that_no_model_has_are_refused(folder, name, change, message):
    tensors = load_file(folder / model.WEIGHTS)
    name = next(key for key in tensors if key.startswith(name))
    save_file(tensors | {name: change(tensors[name])}, folder / model.WEIGHTS)
    with pytest.raises(InputError, match=message):
        model.load(folder)


def test_who_needs_the_data_of_a_model_is_told_that_it_names_none(trained):
    bare = dataclasses.replace(trained, training={"step": 7})
    with pytest.raises(InputError, match="lacks config, decorrelation, fingerprint, parts"):
        held_out(bare)
    with pytest.raises(InputError, match="lacks config"):
        model.same_parts(trained, bare)


@pytest.mark.parametrize("name", ["ocean", "gaussian/mean", "gaussian/direction", "gaussian/rest", "lat"])
def test_a_missing_tensor_is_named(folder, name):
    tensors = load_file(folder / model.WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / model.WEIGHTS)
    with pytest.raises(InputError, match=name):
        model.load(folder)


def test_levels_beyond_training_are_not_known_but_for_rounding():
    eps = tiny.model()
    # The schedule of the notes ends at 3.398, which everybody writes as 3.4.
    assert eps.knows([0.0099, 0.01, 0.7, 3.398, 3.4, 3.41]).tolist() == [False, True, True, True, True, False]
    assert eps.knows(np.asarray(eps.steps.sigma)).all()
    for sigmas, wrong in (([5000.0, 1.0, 1e-4], "5000"), ([1.0, 1e-4], "0.0001"), ([1.0, np.nan], "nan")):
        with pytest.raises(InputError, match=rf"noise from 0.010\d* to 3.398\d*, not for {wrong}; take others$"):
            eps.check_levels(np.array(sigmas), "take others")


def test_fields_on_another_grid_are_refused(trained):
    data = tiny.fields()
    velocity = data.velocity.copy()
    velocity[:, 4, 4] = np.nan
    others = [
        Fields.create(data.velocity[:, :, 1:], data.lat, data.lon[1:], data.time),
        Fields.create(data.velocity, data.lat + 1, data.lon, data.time),
        Fields.create(data.velocity, data.lat, data.lon + 0.001, data.time),
        Fields.create(velocity, data.lat, data.lon, data.time),
        Fields.create(data.velocity, *np.meshgrid(data.lat, data.lon, indexing="ij"), data.time),
    ]
    trained.check_grid(data)
    for other in others[:-1]:
        with pytest.raises(InputError, match="another grid"):
            trained.check_grid(other)
    # The same places written as a curvilinear grid, and from 0 to 360.
    trained.check_grid(others[-1])
    trained.check_grid(Fields.create(data.velocity, data.lat, data.lon + 360, data.time))
    with pytest.raises(InputError, match="another grid"):
        trained.check_grid(Fields.create(data.velocity, data.lat, data.lon + 359.999, data.time))


def test_the_fingerprint_names_all_that_samples_depend_on(trained):
    kernel = dataclasses.replace(trained.kernel, noise=2 * trained.kernel.noise)
    params = jax.tree.map(lambda leaf: leaf + 1, trained.params)
    schedule = {**trained.schedule, "steps": 1000}
    others = [
        dataclasses.replace(trained, **change)
        for change in ({"params": params}, {"schedule": schedule}, {"sigma": (0.01, 20.0)}, {"kernel": kernel},
                       {"kernel": None})
    ]  # fmt: skip
    names = [model.fingerprint(one) for one in (trained, *others)]
    assert len(set(names)) == len(names)
    assert len(names[0]) == 16
    # What does not change a sample does not change the name.
    assert model.fingerprint(dataclasses.replace(trained, training={"step": 7})) == names[0]
