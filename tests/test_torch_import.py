"""Checkpoints of PyTorch: written by hand as PyTorch writes them, hostile ones, damaged ones, and by PyTorch itself."""

import collections
import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from test_nets import reference_state_dict

from jax_repaint import checkpoint as checkpoint_command
from jax_repaint import model, torch_import
from jax_repaint.cases import OBSERVATION_ERROR, check_unseen, data_of, known_of, make_cases
from jax_repaint.data import readers
from jax_repaint.errors import InputError
from jax_repaint.methods import levels_of, run_method
from jax_repaint.nets import import_torch, unet
from jax_repaint.nets.layers import sinusoids
from jax_repaint.posterior import evidence_for, posterior

CONFIG = unet.UNetConfig((8, 16, 16), attention=(2, 3), heads=2, embedding=16)
UNITS = {"u_mean": 0.01, "u_std": 0.22, "v_mean": -0.02, "v_std": 0.21}
SECRET = "ran_from_a_file"


class Placed:
    """Pickles as PyTorch pickles a tensor: a call of its rebuilding function on a reference to a storage."""

    def __init__(self, key, values, parameter=False, **changes):
        self.key, self.values, self.parameter, self.changes = key, values, parameter, changes

    def __reduce__(self):
        size = self.values.shape
        stride = tuple(np.array(self.values.strides) // self.values.itemsize)
        made = {"offset": 0, "size": size, "stride": tuple(map(int, stride))} | self.changes
        arguments = (Reference(self.key, self.values), made["offset"], made["size"], made["stride"], False, {})
        function = Global("torch._utils", "_rebuild_tensor_v2")
        if self.parameter:
            inner = Placed(self.key, self.values)
            return Global("torch._utils", "_rebuild_parameter"), (inner, True, {})
        return function, arguments


class Reference:
    def __init__(self, key, values, kind="storage", count=None):
        names = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage"}
        storage = Global("torch", names[values.dtype.name])
        self.pid = (kind, storage, key, "cpu", values.size if count is None else count)


class Global:
    """A name that the reader finds in its own way; callable, as pickle demands of what it reduces to."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError


class Writer(pickle._Pickler):
    """Writes `Global` as the bare name, and `Reference` as a persistent reference, whatever is installed here."""

    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Reference) else None

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, Global):
            return self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())
        return super().save(thing, save_persistent_id)


def write(path, content, storages, root="archive", **entries):
    """A .pt file of a pickled `content`, or of given bytes, and storages by key."""
    if not isinstance(content, bytes):
        file = io.BytesIO()
        Writer(file, 2).dump(content)
        content = file.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content)
        archive.writestr(f"{root}/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"{root}/data/{key}", values.tobytes())
        archive.writestr(f"{root}/version", "3\n")
        for name, text in entries.items():
            archive.writestr(f"{root}/{name}", text)
    return path


def checkpoint(tensors, **changes):
    """(content, storages) of a checkpoint as the networks that this is for were saved."""
    state = collections.OrderedDict()
    for number, (name, values) in enumerate(tensors.items()):
        name = name if name.startswith("network.") else f"network.{name}"
        state[name] = Placed(str(number), values, parameter=number % 3 == 0)
    content = {
        "epoch": 132,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": next(iter(state.values()))}}, "param_groups": [{"lr": 3e-4}]},
        "n_steps": 250,
        "min_beta": 0.0001,
        "max_beta": 0.02,
        "standardizer_type": Instance("ddpm.utils.vanished", "ZScoreStandardizer", dict(UNITS)),
        "noise_strategy": Instance("ddpm.noise", "GaussianNoise", None),
        "best_loss": 0.0093,
        "epoch_losses": [0.018, 0.0125],
    }
    content |= changes
    return content, {str(number): values for number, values in enumerate(tensors.values())}


class Instance:
    """Pickles as an object of a class that is not installed."""

    def __init__(self, module, name, state):
        self.module, self.name, self.state = module, name, state

    def __reduce__(self):
        return Global(self.module, self.name), (), self.state


def weights(config=CONFIG):
    """A PyTorch state_dict of random numbers for a network, by the names and layouts of PyTorch."""
    rng = np.random.default_rng(0)
    names = torch_names(config)
    return {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in names.items()}


def torch_names(config):
    """Name and shape of every parameter, from our own structure turned back to PyTorch's layouts."""
    shapes = traverse_util.flatten_dict(unet.structure(config)[1])
    ours = {path: name for name, path in import_torch._names(config).items()}
    found = {}
    for path, leaf in shapes.items():
        name, shape = ours[path[:-1]], leaf.shape
        if path[-1] == "kernel":
            turned = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])
            shape = (shape[2], shape[3], *shape[:2]) if path[-2].startswith("up") else turned
        found[f"{name}.{'bias' if path[-1] == 'bias' else 'weight'}"] = shape
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    content, storages = checkpoint(weights())
    return write(tmp_path_factory.mktemp("torch") / "checkpoint.pt", content, storages)


def test_tensors_and_numbers_come_out_as_they_went_in(file):
    read = torch_import.read_checkpoint(file)
    expected = weights()
    assert read.tensors.keys() == {f"network.{name}" for name in expected}
    for name, values in expected.items():
        np.testing.assert_array_equal(read.tensors[f"network.{name}"], values)
    assert read.schedule == {"steps": 250, "min_beta": 1e-4, "max_beta": 0.02}
    assert read.numbers == {"epoch": 132, "best_loss": 0.0093}


def test_unknown_objects_are_inert(file, tmp_path):
    content = torch_import.read(file)
    for key in ("standardizer_type", "noise_strategy"):
        assert isinstance(content[key], torch_import.Inert)
    assert vars(content["standardizer_type"]) == {"state": UNITS}
    assert content["noise_strategy"].called == "ddpm.noise.GaussianNoise"
    # Nor can a method that the file gives to a container be called.
    trap = write(tmp_path / "trap.pt", {"x": 1}, {})
    content = collections.OrderedDict(x=1)
    content.__dict__["keys"] = 5
    assert torch_import.read(write(trap, content, {})) == {"x": 1}


def test_views_of_one_storage(tmp_path):
    values = np.arange(24, dtype=np.float64)
    rows = Placed("0", values, offset=2, size=(3, 4), stride=(6, 1))
    turned = Placed("0", values, size=(4, 6), stride=(1, 4))
    single = Placed("0", values, offset=7, size=(), stride=())
    path = write(tmp_path / "a.pt", {"rows": rows, "turned": turned, "single": single}, {"0": values}, root="any name")
    read = torch_import.read(path)
    np.testing.assert_array_equal(read["rows"], values.reshape(4, 6)[:3, 2:])
    np.testing.assert_array_equal(read["turned"], values.reshape(6, 4).T)
    assert read["single"] == 7


def hostile(*lines):
    return b"\x80\x02" + b"".join(lines) + b"."


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words.encode()


TOUCH, WRITE = text(f"touch {SECRET}"), text(f"open('{SECRET}', 'w').close()")
HOSTILE = {
    "os.system by reduce": hostile(b"cos\nsystem\n", TOUCH, b"\x85R"),
    "builtins.exec": hostile(b"c__builtin__\nexec\n", WRITE, b"\x85R"),
    "a class by newobj": hostile(b"csubprocess\nPopen\n", b"]", text("true"), b"a\x85\x81"),
    "inst": hostile(b"(", TOUCH, b"ios\nsystem\n"),
    "obj": hostile(b"(cos\nsystem\n", TOUCH, b"o"),
    "attributes of what is rebuilt": hostile(b"ctorch._utils\n_rebuild_tensor_v2\n}", text("__code__"), b"NsN\x86b"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_byte_of_a_file_is_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = []
    for module, name in ((os, "system"), (subprocess, "Popen"), (os, "popen")):
        monkeypatch.setattr(module, name, lambda *a, name=name: called.append(name))
    path = write(tmp_path / "hostile.pt", HOSTILE[kind], {})
    with pytest.raises(InputError, match=r"hostile\.pt"):
        torch_import.read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.pt"]
    assert not called
    # The same bytes do run where they are trusted.
    if kind == "os.system by reduce":
        pickle.loads(HOSTILE[kind])
        assert called == ["system"]


def test_a_hostile_object_beside_good_weights_is_inert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, storages = checkpoint(weights())

    class Bomb:
        def __reduce__(self):
            return Global("os", "system"), (f"touch {SECRET}",)

    read = torch_import.read_checkpoint(write(tmp_path / "bomb.pt", content | {"scheduler": Bomb()}, storages))
    assert len(read.tensors) == len(weights())
    assert not (tmp_path / SECRET).exists()


def put(path, content):
    path.write_bytes(content)
    return path


def test_other_files_are_named_for_what_they_are(file, tmp_path):
    content = file.read_bytes()
    with pytest.raises(InputError, match=r"pointer\.pt is a Git-LFS pointer"):
        torch_import.read(put(tmp_path / "pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"))
    with pytest.raises(InputError, match=r"cut\.pt is truncated"):
        torch_import.read(put(tmp_path / "cut.pt", content[: len(content) // 2]))
    with pytest.raises(InputError, match=r"before PyTorch 1\.6"):
        torch_import.read(put(tmp_path / "old.pt", pickle.dumps(0x1950A86A20F9469CFC6C, 2)))
    with pytest.raises(InputError, match="not a zip archive"):
        torch_import.read(put(tmp_path / "empty.pt", b""))
    with pytest.raises(InputError, match="No such file"):
        torch_import.read(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="holds no dictionary"):
        torch_import.read(write(tmp_path / "list.pt", [1, 2], {}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(InputError, match=r"without one data\.pkl"):
        torch_import.read(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 10**6)
    with pytest.raises(InputError, match="compressed"):
        torch_import.read(tmp_path / "packed.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (10**6, 10**6), "stride": (0, 0)}, "beyond its storage"),
        ({"size": (25,), "stride": (1,)}, "beyond its storage"),
        ({"offset": 1, "size": (24,), "stride": (1,)}, "beyond its storage"),
        ({"offset": -1, "size": (2,), "stride": (1,)}, "makes no sense"),
        ({"size": (2,), "stride": (-1,)}, "makes no sense"),
        ({"size": (2, 2), "stride": (1,)}, "makes no sense"),
        ({"size": (2.0,), "stride": (1,)}, "makes no sense"),
    ],
)
def test_a_tensor_stays_inside_its_storage(changes, message, tmp_path):
    values = np.arange(24, dtype=np.float64)
    with pytest.raises(InputError, match=message):
        torch_import.read(write(tmp_path / "a.pt", {"x": Placed("0", values, **changes)}, {"0": values}))


def test_a_missing_storage_and_a_wrong_size_are_named(tmp_path):
    values = np.arange(24, dtype=np.float64)
    with pytest.raises(InputError, match="storage '0' is missing"):
        torch_import.read(write(tmp_path / "a.pt", {"x": Placed("0", values)}, {"1": values}))
    with pytest.raises(InputError, match="has 23 numbers, the file says 24"):
        torch_import.read(write(tmp_path / "b.pt", {"x": Placed("0", values)}, {"0": values[:23]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_state_dict": None}, "has no model_state_dict; it has epoch, model_state_dict"),
        ({"model_state_dict": {"network.a": 3}}, "something else than tensors"),
        ({"min_beta": "small"}, "no number min_beta"),
        ({"n_steps": float("nan")}, "no number n_steps"),
        ({"max_beta": 2.0}, "make no schedule"),
        ({"n_steps": 1}, "make no schedule"),
        ({"n_steps": 10**10}, "make no schedule"),
        ({"prediction_target": "x0"}, "prediction_target is 'x0'; only networks of eps can be imported"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'; only networks of linear can be imported"),
        ({"noise_strategy": Instance("a", "DivergenceFreeNoise", None)}, "it was trained with DivergenceFreeNoise"),
        ({"noise_strategy": "hh_divergence_free"}, "it was trained with hh_divergence_free"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(changes, message, tmp_path):
    content, storages = checkpoint({"out_conv.bias": np.zeros(2, np.float32)}, **changes)
    with pytest.raises(InputError, match=message):
        torch_import.read_checkpoint(write(tmp_path / "a.pt", content, storages))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"prediction_target": "eps", "noise_strategy": "gaussian", "beta_schedule": "linear"}, []),
        ({"noise_strategy": Instance("a", "Perlin", None)}, ["noise_strategy is Perlin, which is not known"]),
        ({"ema_state": {"decay": 0.999}}, ["the averaged weights in ema_state are not"]),
        (
            {"standardizer_type": Instance("a", "UnitVector", {"u_mean": 0.0})},
            ["standardizer_type is UnitVector, of which no mean and standard deviation"],
        ),
        (
            {"standardizer_type": Instance("a", "ZScoreStandardizer", dict(UNITS, v_std=0.0))},
            ["ZScoreStandardizer, of"],
        ),
        ({"standardizer_type": None}, []),
    ],
)
def test_what_a_checkpoint_says_of_its_training_is_heeded(changes, said, tmp_path, caplog):
    content, storages = checkpoint({"out_conv.bias": np.zeros(2, np.float32)}, **changes)
    read = torch_import.read_checkpoint(write(tmp_path / "a.pt", content, storages))
    assert len(caplog.messages) == len(said)
    for message, part in zip(caplog.messages, said, strict=True):
        assert part in message
    if "standardizer_type" in changes:
        assert read.units is None
    else:
        np.testing.assert_array_equal(read.units, [[0.01, -0.02], [0.22, 0.21]])


def test_a_time_table_of_other_steps_is_refused(tmp_path):
    table = sinusoids(np.arange(1000, dtype=np.float32), CONFIG.embedding)
    tensors = {"time_embed_table.weight": np.asarray(table), **weights()}
    with pytest.raises(InputError, match="its time table has 1000 steps, n_steps is 250"):
        torch_import.read_checkpoint(write(tmp_path / "a.pt", *checkpoint(tensors)))
    read = torch_import.read_checkpoint(write(tmp_path / "b.pt", *checkpoint(tensors, n_steps=1000)))
    import_torch.from_state_dict(CONFIG, read.tensors)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_time_table_may_be_rounded_as_its_weights_are(kind):
    table = jnp.asarray(sinusoids(np.arange(250, dtype=np.float32), CONFIG.embedding)).astype(kind)
    import_torch.from_state_dict(CONFIG, weights() | {"time_embed_table.weight": np.asarray(table)})
    with pytest.raises(InputError, match="is not the sinusoidal one"):
        import_torch.from_state_dict(CONFIG, weights() | {"time_embed_table.weight": np.asarray(-table)})


def test_tensors_beside_weights_are_not_taken_for_them():
    """Masks of a pruned network and averages have the shape of weights."""
    for kind in ("weight_mask", "weight_orig", "weight_ema", "running_mean"):
        more = {f"out_conv.{kind}": np.zeros_like(weights()["out_conv.weight"])}
        with pytest.raises(InputError, match=rf"tensor out_conv\.{kind} has no place in this network"):
            import_torch.from_state_dict(CONFIG, weights() | more)
    twice = {"network.out_conv.weight": np.zeros_like(weights()["out_conv.weight"])}
    with pytest.raises(InputError, match=r"the same name with and without `network\."):
        import_torch.from_state_dict(CONFIG, weights() | twice)


def test_tensors_that_blow_a_file_up_are_refused(tmp_path):
    """A hundred views of one storage are a hundred copies."""
    values = np.zeros(10_000, np.float32)
    few, many = ({f"x{i}": Placed("0", values) for i in range(count)} for count in (12, 100))
    assert len(torch_import.read(write(tmp_path / "few.pt", few, {"0": values}))) == 12
    with pytest.raises(InputError, match="its tensors take far more than the file has"):
        torch_import.read(write(tmp_path / "many.pt", many, {"0": values}))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", [np.float64(0.25), np.float32(0.25), np.int64(3), np.float16(-2)])
def test_numbers_of_numpy_are_numbers(value, protocol, tmp_path):
    content = pickle.dumps({"best_loss": value}, protocol)
    assert torch_import.read(write(tmp_path / "a.pt", content, {})) == {"best_loss": value.item()}


def test_a_network_equals_the_reference_outputs_through_a_file(shared, tmp_path):
    name = "standard_attn_slim"
    with np.load(shared / "golden" / f"unet_{name}.npz") as arrays:
        content, storages = checkpoint(reference_state_dict(arrays))
        x, t, y = jnp.moveaxis(jnp.asarray(arrays["x"]), 1, -1), jnp.asarray(arrays["t"], jnp.float32), arrays["y"]
    read = torch_import.read_checkpoint(write(tmp_path / "slim.pt", content, storages))
    params = torch_import.from_state_dict(unet.NETWORKS[name], read.tensors)
    graphdef, _ = unet.structure(unet.NETWORKS[name])
    ours = jax.jit(unet.apply, static_argnums=0)(graphdef, params, x[:1], t[:1])
    np.testing.assert_allclose(jnp.moveaxis(ours, -1, 1), y[:1], atol=1e-4 * np.abs(y).max())


def import_config(network="imported"):
    config = tiny.config()
    config.model.network = network
    return config


@pytest.fixture(scope="module")
def imported(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.NETWORKS, "imported", CONFIG)
        yield torch_import.import_model(file, import_config(), tiny.fields())


def test_land_and_padding_are_still_water_as_in_the_training_of_these_networks(imported):
    standardiser = imported.standardiser
    np.testing.assert_allclose(standardiser.restore(standardiser.land_value), 0, atol=1e-7)
    assert imported.padded == (64, 128)
    mean = np.asarray(imported.gaussian.mean)
    ocean = np.asarray(imported.gaussian.ocean)[..., 0] > 0
    assert ocean.sum() == imported.ocean.sum()
    np.testing.assert_array_equal(mean[~ocean], np.broadcast_to(standardiser.land_value, mean[~ocean].shape))
    velocity = tiny.fields().velocity[imported.training["parts"]["train"][0] : imported.training["parts"]["train"][1]]
    climatology = standardiser.restore(mean)[: imported.ocean.shape[0], : imported.ocean.shape[1]][imported.ocean]
    np.testing.assert_allclose(climatology, velocity[:, imported.ocean].mean(0), atol=1e-6)


def test_samplers_keep_land_and_padding_at_zero_metres_a_second(imported):
    data = tiny.fields().select(slice(55, 56))
    case = make_cases(imported, data, [55], ["cells:0.2"])[0]
    land = ~(np.asarray(imported.gaussian.ocean)[..., 0] > 0)
    # The RePaint family pastes it at every level.
    known = known_of(imported, case)
    np.testing.assert_allclose(imported.standardiser.restore(np.asarray(known.value))[land], 0, atol=1e-7)
    assert not np.asarray(known.missing)[land].any()
    # Posterior samplers keep what stands there at the start, beside the noise of every level.
    seen = []

    def denoise(x, sigma):
        jax.debug.callback(lambda x: seen.append(x), x)
        return x + 1

    def silent(key, shape, dtype):
        return jnp.zeros(shape, dtype)

    hyper = levels_of(imported, "kalman", 4)
    evidence = evidence_for(hyper, imported.gaussian.ocean, case.observation, imported.gaussian)
    start = case.analysis.mean(case.observation.values)
    made = posterior(jax.random.key(0), denoise, evidence, hyper, start, draw=silent)
    assert len(seen) == 4
    for x in (*seen, np.asarray(made)):
        np.testing.assert_allclose(imported.standardiser.restore(x)[land], 0, atol=1e-6)


def test_an_imported_model_survives_the_disk_and_inpaints(imported, tmp_path):
    model.save(imported, tmp_path / "model")
    read = model.load(tmp_path / "model")
    assert read.padded == (64, 128)
    jax.tree.map(np.testing.assert_array_equal, (read.params, read.gaussian), (imported.params, imported.gaussian))
    assert model.fingerprint(read) == model.fingerprint(imported)
    data = tiny.fields().select(slice(55, 56))
    case = make_cases(read, data, [55], ["cells:0.2"])
    members = run_method("kalman", read, data, case, 2, count=2).members[0]
    assert np.abs(members - data.velocity[0])[:, case[0].observed].max() < 5 * OBSERVATION_ERROR


def test_a_grid_that_does_not_fit_the_network_is_refused(imported, tmp_path):
    model.save(imported, tmp_path / "model")
    path = tmp_path / "model" / model.DESCRIPTION
    for grid in ([64, 100], [6, 128], [64], "large", [64, 128.0]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"grid": grid}))
        with pytest.raises(InputError):
            model.load(tmp_path / "model")


def test_the_command_imports_a_file(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(unet.NETWORKS, "imported", CONFIG)
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    chosen = {"torch": str(file), "network": "imported", "fields": str(tmp_path / "tiny.nc"), "frames": 16, "rank": 4,
              "patterns": "cells:0.1,line:4", "train": "0:40", "validation": "42:50", "test": "52:60",
              "allow_short_gap": False, "block_split": False}  # fmt: skip
    monkeypatch.setattr(checkpoint_command, "FLAGS", SimpleNamespace(**chosen, out=str(tmp_path / "model")))
    checkpoint_command.main([])
    assert f"wrote {tmp_path / 'model'}: imported, 40 training" in capsys.readouterr().out
    read = model.load(tmp_path / "model")
    assert read.training["parts"] == {"train": [0, 40], "validation": [42, 50], "test": [52, 60]}
    assert read.training["imported"] == {"file": "checkpoint.pt", "epoch": 132, "best_loss": 0.0093}
    assert read.schedule == {"steps": 250, "min_beta": 1e-4, "max_beta": 0.02}
    assert read.patterns == ("cells:0.1", "line:4")
    # What evaluation asks a model for: its data and their split.
    fields, split = data_of(read, None)
    assert (len(fields), split.test.tolist()) == (60, list(range(52, 60)))


@pytest.mark.parametrize(("out", "message"), [(".", "not empty and holds no model"), ("mine", "it is a file")])
def test_a_place_that_is_taken_is_refused_before_the_work(file, tmp_path, monkeypatch, out, message):
    (tmp_path / "mine").write_text("")
    chosen = {"torch": str(file), "network": "unet", "fields": "", "frames": 16, "rank": 4, "train": "0.7",
              "patterns": "", "out": str(tmp_path / out), "validation": "0.15", "test": "0.15",
              "allow_short_gap": False, "block_split": False}  # fmt: skip
    monkeypatch.setattr(checkpoint_command, "FLAGS", SimpleNamespace(**chosen))
    monkeypatch.setattr(torch_import, "import_model", None)
    with pytest.raises(InputError, match=message):
        checkpoint_command.main([])


@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_command_splits_as_it_is_told(file, monkeypatch, by_blocks):
    def stop(path, config):
        assert config.data.block_split == by_blocks
        raise InputError("enough seen")

    chosen = {"torch": str(file), "network": "unet", "fields": "", "frames": 16, "rank": 4, "train": "0.7",
              "patterns": "", "out": "model", "validation": "0.15", "test": "0.15", "allow_short_gap": False,
              "block_split": by_blocks}  # fmt: skip
    monkeypatch.setattr(checkpoint_command, "FLAGS", SimpleNamespace(**chosen))
    monkeypatch.setattr(torch_import, "import_model", stop)
    with pytest.raises(InputError, match="enough seen"):
        checkpoint_command.main([])


def test_units_and_times_of_an_imported_model(imported, tmp_path, caplog):
    """Those of its training, whatever the fields here; times, so that fields of that time are known again."""
    np.testing.assert_allclose(imported.standardiser.mean, [0.01, -0.02], rtol=1e-6)
    np.testing.assert_allclose(imported.standardiser.std, [0.22, 0.21], rtol=1e-6)
    fields = tiny.fields()
    parts = imported.training["parts"]
    seen = [str(fields.time[i].astype("datetime64[s]")) for i in (parts["train"][0], parts["validation"][1] - 1)]
    assert imported.training["time"] == seen
    check_unseen([imported], dataclasses.replace(fields, velocity=fields.velocity + np.float32(1e-4)))
    assert f"{parts['validation'][1]} of {len(fields)} frames" in caplog.messages[-1]


def test_weights_of_another_network_are_refused(file, tmp_path):
    other = write(tmp_path / "other.pt", *checkpoint(weights(), unet_type="standard_attn_mid"))
    with pytest.raises(InputError, match="holds a network standard_attn_mid, not standard_attn"):
        torch_import.import_model(other, import_config("standard_attn"), tiny.fields())
    with pytest.raises(InputError, match="standard_attn"):
        torch_import.import_model(file, import_config("unet"), tiny.fields())
    with pytest.raises(InputError, match="the network has"):
        torch_import.import_model(file, import_config("standard_attn"), tiny.fields())


def test_what_torch_itself_writes(tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"network.{name}": torch.from_numpy(values) for name, values in weights().items()}
    state["network.enc1.0.res.conv1.weight"] = torch.nn.Parameter(state["network.enc1.0.res.conv1.weight"])
    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    content = {
        "model_state_dict": collections.OrderedDict(state), "n_steps": 1000, "min_beta": 1e-4, "max_beta": 0.02,
        "epoch": 3, "half": half, "whole": torch.arange(4), "best_loss": torch.tensor(0.5),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    read = torch_import.read_checkpoint(tmp_path / "a.pt")
    for name, values in weights().items():
        np.testing.assert_array_equal(read.tensors[f"network.{name}"], values)
    assert read.schedule == {"steps": 1000, "min_beta": 1e-4, "max_beta": 0.02}
    assert read.numbers == {"epoch": 3, "best_loss": 0.5}
    everything = torch_import.read(tmp_path / "a.pt")
    np.testing.assert_array_equal(everything["half"].astype(np.float32), half.float().numpy())
    np.testing.assert_array_equal(everything["whole"], np.arange(4))


def damaged(content, rng):
    """The bytes with their end cut off, some bits turned, or a stretch repeated."""
    kind = rng.integers(3)
    if kind == 0:
        return content[: rng.integers(len(content))]
    damaged = bytearray(content)
    for at in rng.integers(len(content), size=1 + rng.integers(8)):
        damaged[at] ^= 1 << rng.integers(8)
    if kind == 2:
        start, end = np.sort(rng.integers(len(content), size=2))
        damaged[start:end] = damaged[start:end][::-1]
    return bytes(damaged)


def refusal(path):
    try:
        torch_import.read_checkpoint(path)
        return ""
    except InputError as e:
        return str(e)


def test_damaged_files_are_refused_in_a_sentence(tmp_path):
    """Bits turned anywhere in the file, and in the pickle alone, where checksums do not help."""
    content, storages = checkpoint({"out_conv.bias": np.arange(2, dtype=np.float32)})
    whole = write(tmp_path / "whole.pt", content, storages)
    with zipfile.ZipFile(whole) as archive:
        inner = archive.read("archive/data.pkl")
    refused = 0
    for number in range(70):
        rng = np.random.default_rng(number)
        path = tmp_path / "damaged.pt"
        if number % 2:
            path.write_bytes(damaged(whole.read_bytes(), rng))
        else:
            write(path, damaged(inner, rng), storages)
        sentence = refusal(path)
        refused += bool(sentence)
        assert not sentence or "damaged.pt" in sentence
        assert "\n" not in sentence
    assert refused > 40
