"""A second pass from t 10..50 that starts from the output of the first.

    python -m jax_repaint.sweep --config=configs/sweeps/two_stage.py --workdir=sweeps/two_stage

The notes, ten frames, average of MSE over that of the GP:

    t of the second pass    none     10     20     30     40     50
    ratio                   .894   .883   .875   .869   .864   .860      (10 of 10 wins each)

gamma is 1, as it was then. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """One pass, and five second passes."""
    add(method="adaptive", gamma=1.0)
    for t in (10, 20, 30, 40, 50):
        add(method="two_stage", gamma=1.0, t_refine=t)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "a second pass"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x = "t_refine"
    return smoke(config, arg)
