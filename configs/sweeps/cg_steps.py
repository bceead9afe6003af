"""How many conjugate-gradient steps of the network's own covariance pay, with and without a preconditioner.

    python -m jax_repaint.sweep --config=configs/sweeps/cg_steps.py --workdir=sweeps/cg_steps

On validation frames, as it is to choose by. `kalman` and `cov_pigdm` take the linear prior's covariance instead.
"""

from jax_repaint.points import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty or `smoke`."""

    def sweep(add):
        add(method="kalman")
        add(method="cov_pigdm")
        # Every number of steps is a program of its own.
        for steps in (1, 2) if arg else (1, 2, 3):
            add(method="kalman_cg", cg_steps=steps)
            add(method="kalman_jvp", cg_steps=steps)
        for steps in (1,) if arg else (1, 2, 3, 4):
            add(method="mmps", cg_steps=steps)

    config = default_config(sweep)
    config.title = "steps of conjugate gradients"
    config.part = "validation"
    config.frames, config.members = 16, 8
    config.x, config.curve = "cg_steps", "method"
    return smoke(config, arg)
