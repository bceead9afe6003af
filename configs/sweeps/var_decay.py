"""What turns the tenth of ten stages: factors on the variance that bring the threshold of its normalisation earlier.

    python -m jax_repaint.sweep --config=configs/sweeps/var_decay.py --workdir=sweeps/var_decay

The variance of the notes' Gaussian process ranges over 6.7e-4 of the data's under line:22 on the twin; times var_decay
a stage it falls below 1e-12, where the noise weight becomes 1 everywhere (sample.repaint_stages), at stage 10 with 0.1,
6 with 0.01, 4 with 0.001, and never with 1. Were a small variance itself to blame, the stages before would differ too.
`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Ten stages with each factor."""
    for var_decay in (1.0, 0.1, 0.01, 0.001):
        add(method="multistage", stages=10, gamma=3.0, var_decay=var_decay)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "decay of the variance"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.frames = 48
    config.members = 1
    config.x, config.curve = "stage", "var_decay"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
    return config
