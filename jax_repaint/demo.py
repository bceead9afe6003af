"""The main job in one command: inpaint currents from a line, a walk and scattered cells, with an ensemble.

    python -m jax_repaint.demo
    python -m jax_repaint.demo --fields=currents.nc --train_range=0:250 --test_range=275:365

Without arguments the network that comes with the package fills a held-out frame of the Ram Head twin. With a file, a
network is first trained on its training range, briefly; the linear estimate that it starts from is good from the first
step. Writes the files of an evaluation (table.csv, fields.nc, figure.png and others); of what is there it replaces what
an earlier demo or evaluation wrote, but never a network, which is in `run`: another file, range or number of steps asks
for another --out.
"""

import math
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from jax_repaint import SHIPPED, command, distributed, evaluate, inpaint, methods, model, observe, train
from jax_repaint.cases import block_length, files_of, held_out, pick
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields, Split, carve
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.prepare import split_fields
from jax_repaint.settings import default_config


def brief_config(path: str, train_range: str, validation_range: str, test_range: str) -> ConfigDict:
    """A run of a small network that takes minutes on a laptop."""
    config = default_config()
    config.data.fields = path
    config.data.train, config.data.validation, config.data.test = train_range, validation_range, test_range
    config.model.network = "tiny"
    config.model.form = "anchored"
    config.train.learning_rate = 2e-3
    config.train.ema = 0.99
    config.train.held_out = 64
    return config


def fit(path: str, fields: Fields, train_range: str, test_range: str, steps: int, workdir: Path) -> tuple[Model, Split]:
    """Trains on a range of a file's fields, over which it passes as often as `steps` batches hold it.

    The last fifth of the range is for validation.
    """
    train_range, validation_range = carve(fields, train_range)
    config = brief_config(path, train_range, validation_range, test_range)
    parts = split_fields(fields, config.data)
    # All devices share a batch evenly.
    devices = distributed.training_devices(config.model.form).size
    config.train.batch = max(min(16, parts.train.size) // devices, 1) * devices
    config.train.epochs = max(math.ceil(steps * config.train.batch / parts.train.size), 1)
    config.train.warmup_epochs = 0.1 * config.train.epochs
    try:
        trained = train.train(config, workdir, fields)
    except InputError as e:
        # What a training advises, this command has no options for.
        said, other, _ = str(e).partition("; choose another workdir")
        raise InputError(f"{said}; give another folder by --out" if other else said) from e
    if trained is None:
        raise InputError("training was stopped; the same command continues it")
    loss, linear = (trained.training[name] for name in ("held_out_loss", "held_out_loss_of_linear"))
    print(
        f"held-out loss {loss:.4g}, {linear:.4g} of the linear estimate alone; the model for other commands "
        f"(--model=) is in {workdir / 'model'}\n"
    )
    return trained, parts


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("model", "", "Folder of a model; by default the one that comes with the package.")
    flags.DEFINE_string("fields", "", "File of your own; needs --train_range and --test_range.")
    flags.DEFINE_string("train_range", "", "Frames 0:250 or dates 2002-01-01/2002-09-07 of your file to train on.")
    flags.DEFINE_string("test_range", "", "Frames or dates of your file to inpaint.")
    flags.DEFINE_integer(
        "steps", 150, "Batches of 16 frames of your file that training sees, in whole passes over it, of which what "
        "does not fill a batch is left out.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer("frames", 1, "Held-out frames to inpaint, drawn at random.", lower_bound=1)
    flags.DEFINE_list("patterns", [], "Observation patterns; by default the model's: a line, a walk, 2 % of the cells.")
    flags.DEFINE_list(
        "methods", None, f"Among {', '.join(methods.METHODS)}; by default the baselines and the default of inpaint."
    )
    flags.DEFINE_integer("members", 16, "Members of an ensemble.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and members.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("out", "demo", "Folder for what is written.")


def main(_) -> None:
    """Inpaints and says where the results are."""
    loaded = None if FLAGS.fields else model.load(FLAGS.model or SHIPPED)
    usual = inpaint.default_method(loaded) if loaded else "kalman"  # of the form that `fit` trains
    names = [*methods.BASELINES, usual] if FLAGS.methods is None else FLAGS.methods
    methods.check_methods(names, FLAGS.members)
    out = Path(FLAGS.out)
    # Before the training.
    evaluate.check_out(out, inputs=readers.files_of(FLAGS.fields) if FLAGS.fields else ())
    if FLAGS.fields:
        if FLAGS.model:
            raise InputError("--fields trains a model of its own; without it --model names one")
        if "given" in names:
            raise InputError(
                "the method given needs a model of form conditional; a brief training makes one of form anchored"
            )
        if not (FLAGS.train_range and FLAGS.test_range):
            raise InputError("--fields needs --train_range and --test_range, for instance 0:250 and 275:365")
        series = readers.read(FLAGS.fields)
        for pattern in FLAGS.patterns:
            observe.parse(pattern, series.ocean, observe.pattern_rng(FLAGS.seed, 0))
        ranges = FLAGS.train_range, FLAGS.test_range
        trained, parts = fit(FLAGS.fields, series, *ranges, FLAGS.steps, out / "run")
        numbers = pick(parts, FLAGS.frames, FLAGS.seed)
        fields, block = series.select(numbers), block_length(parts, len(numbers))
    else:
        if FLAGS.train_range or FLAGS.test_range:
            raise InputError("--train_range and --test_range go with --fields")
        if FLAGS["steps"].present:
            raise InputError("--steps is of a training, which takes --fields")
        trained = loaded
        select, parts = held_out(trained)
        numbers = pick(parts, FLAGS.frames, FLAGS.seed)
        fields, block = select(numbers), block_length(parts, len(numbers))
    patterns = FLAGS.patterns or trained.patterns
    text = evaluate.run(
        trained, fields, numbers, patterns, names, out,
        members=FLAGS.members, seed=FLAGS.seed, block=block, inputs=files_of(trained, FLAGS.fields or None),
    )  # fmt: skip
    print(text)
    if len(numbers) < 16:
        print(
            f"\n{len(numbers)} frame{'s' * (len(numbers) > 1)} a pattern: an example, not a comparison (--frames=64)."
        )
    if FLAGS.fields and not set(names) <= set(methods.BASELINES):
        print(
            "\nmembers are as sampled, too much alike where a network has seen few frames; to learn on validation "
            f"frames how far they should spread:\n  python -m jax_repaint.calibrate --model={out / 'run' / 'model'}"
        )
    print(f"\nwrote {out / 'table.csv'}, {out / 'fields.nc'} and {out / 'figure.png'}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
