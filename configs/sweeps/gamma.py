"""Exponent of the noise weight, .3 to 5.

    python -m jax_repaint.sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma

The notes, six stages, ten frames, average of MSE over that of the GP (consecutive frames, then random ones):

    gamma         .3     .5      1      2      3      5
    consecutive .782   .772   .759   .752   .750   .750
    random      .821   .800   .767   .741   .730    the same

One program serves all six. table.csv has every stage. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Six exponents."""
    for gamma in (0.3, 0.5, 1.0, 2.0, 3.0, 5.0):
        add(method="multistage", gamma=gamma)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "exponent of the noise weight"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x = "gamma"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
    return config
