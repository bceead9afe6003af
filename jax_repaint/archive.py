"""Puts training frames into a model, for the methods that start from a regression on them (prior/ridge.py).

    python -m jax_repaint.archive --model=runs/tiny/model

A training does so itself; this is for models of earlier ones. Of the frames it keeps the coefficients in the directions
of the linear prior, some megabytes. Samples of other methods stay as they are, and so do calibrations; but for an
evaluation, a sweep or a training that was stopped halfway it is another model, so that those come first.
"""

import numpy as np
from absl import flags

from jax_repaint import SHIPPED, command, files, locks, model
from jax_repaint.cases import data_of, held_out
from jax_repaint.data.fields import prepare_with_gaps
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.prior import linear, ridge

FLAGS = flags.FLAGS


def make(trained: Model, path: str | None = None) -> ridge.Archive:
    """The archive of a model from the frames that it was trained on; `path` is where they are now, if not there still.

    Raises:
      InputError: fields that cannot be read, are on another grid or not those of the training.
    """
    if path or trained.origin["config"]["data"]["fields"]:
        fields, split = data_of(trained, path)
        if fields.hash() != trained.origin["fingerprint"]:
            raise InputError(
                f"{fields.name} is not what the model was trained on; frames of anything else would count as held out, "
                "though the model knew them"
            )
        select = fields.select
    else:
        select, split = held_out(trained)
    parts = []
    for numbers, most in ((split.train, ridge.TRAIN), (split.validation, ridge.VALIDATION)):
        some = ridge.spaced(numbers, most)
        x, _, present = prepare_with_gaps(select(some), trained.standardiser, trained.padded)
        parts.append(linear.fill(trained.gaussian, x, present, 0, some))
    return ridge.archive(trained.gaussian, *map(np.asarray, parts))


def main(_) -> None:
    """Adds the archive."""
    trained = model.load(FLAGS.model)
    if FLAGS.model == SHIPPED:
        raise InputError(f"{SHIPPED} is the model in the package; take a copy of its folder")
    files.check_writable(f"{FLAGS.model}/{model.WEIGHTS}")
    made = make(trained, FLAGS.fields)
    with locks.in_turn(FLAGS.model):
        if model.fingerprint(model.load(FLAGS.model)) != model.fingerprint(trained):
            raise InputError(f"{FLAGS.model} holds another model than when this began; try again when that is done")
        model.store_archive(FLAGS.model, made)
    print(f"{len(made.train)} training and {len(made.validation)} validation frames are in {FLAGS.model}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Folder of a model, as training writes it.")
    flags.DEFINE_string("fields", None, "File of the training's fields, if it was moved.")
    flags.mark_flag_as_required("model")
    command.run(main)
