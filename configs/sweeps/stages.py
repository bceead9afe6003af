"""One to ten stages, each from the output of the one before.

    python -m jax_repaint.sweep --config=configs/sweeps/stages.py --workdir=sweeps/stages

The notes, ten frames, average of MSE over that of the GP (consecutive frames, then random ones with gamma 3):

    stage          1     2     3     4     5     6     7     8     9    10
    consecutive .894  .849  .827  .801  .774  .759  .738  .744  .742  .725
    random      .808  .772  .745  .739  .734  .730  .737  .774  .808  .854

In the notes' units the decayed variance falls below the threshold of its normalisation at stage 8, on the twin at
stage 10, and the noise weight becomes 1 everywhere (sample.repaint_stages); with `normalise="prior"` it does not.
Whether that makes the turn: docs/results_samplers.md, What a decayed variance does to ten stages. 2,635 network calls
a member, and all ten stages are rows of one run. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """As the notes have it, with gamma 1 and 3, and without the turn."""
    for gamma in (1.0, 3.0):
        add(method="multistage", stages=10, gamma=gamma, label=f"gamma {gamma:g}")
    add(method="multistage", stages=10, gamma=3.0, normalise="prior", label="gamma 3, scaled by the prior")


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "stages"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x, config.curve = "stage", "label"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
    return config
