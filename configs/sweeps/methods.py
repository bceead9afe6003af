"""Every method on the three usual patterns: the table by which one is chosen.

    python -m jax_repaint.sweep --config=configs/sweeps/methods.py --workdir=sweeps/methods
    python -m jax_repaint.sweep --config=configs/sweeps/methods.py:full --workdir=sweeps/methods_full

All but `plain` start from the best linear estimate. Every stage of `multistage` is a row of its own: its S1 is what
`adaptive` gives, its S2 `two_stage`, so that these two are not run again. The RePaint family takes up to a hundred
times the network calls of a posterior sampler, so of its ensembles two members are drawn, from which follows what the
mean of sixteen would be; `full` draws sixteen of every method. `:smoke` tries it in a few minutes on two cores.
"""

from jax_repaint import methods
from jax_repaint.points import default_config, smoke

DRAWN = 2  # members of the RePaint family
# Mean noise weight of `adaptive` from the linear estimate of the twin; `uniform` has it in every missing cell.
MEAN_WEIGHT = 0.21
STAGES = ("adaptive", "two_stage")  # what the first stages of `multistage` are


def get_config(arg: str = ""):
    """`arg`: empty, `smoke`, or `full`."""

    def sweep(add):
        add(method="linear_samples")
        for method in methods.REPAINT:
            if method not in STAGES:
                own = {} if arg == "full" else {"members": DRAWN}
                add(method=method, **own | ({"noise_floor": MEAN_WEIGHT} if method == "uniform" else {}))
        for method in methods.CORRECTIONS:
            # It takes a network that is given the observations.
            if method != "given":
                add(method=method)

    config = default_config(sweep)
    config.title = "every method"
    config.frames = 128
    config.members = 16
    config.every_stage = True
    return smoke(config, "" if arg == "full" else arg)
