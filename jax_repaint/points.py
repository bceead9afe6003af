"""The points of a sweep: what a configuration asks for, checked, and sorted by the program that each needs.

A configuration file holds `sweep(add)`, which calls `add` once a point with the settings that are its own, and
`get_config(arg)`, which makes the rest of it:

    def sweep(add):
        for gamma in (0.3, 1.0, 3.0):
            add(method="multistage", gamma=gamma)

    def get_config(arg=""):
        return smoke(default_config(sweep), arg)

A point may say `label`, `method`, `model`, `prior`, `consecutive` and `members` (default_config has what it does not
say) and every setting of its method: those of sample.method and `var_decay`, or `levels`, `sigma_max`, `sigma_min`
and the others of posterior.Posterior.create.
"""

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_repaint import methods, sample
from jax_repaint.checks import check_number, whole_number
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.posterior import CG_STEPS, Posterior
from jax_repaint.sample import Repaint

PRIORS = ("linear", "seed_gp", "gp")
METHODS = (*methods.REPAINT, *methods.POSTERIOR, "linear_samples")
OWN = ("label", "method", "model", "prior", "consecutive")
MEMBERS = "members"  # of one point; in its rows and its tasks by the sizes of its ensembles
_LEVELS = {"levels": "count", "sigma_max": "sigma_max", "sigma_min": "sigma_min"} | {
    name: name for name in ("eta", "dps_step", "cg_steps", "second_order", "stop_sigma")
}

# Settings of some posterior samplers alone, and the corrections that have them.
_OF_SOME = {"dps_step": ("dps",), "cg_steps": tuple(CG_STEPS)}


def default_config(sweep: Callable[[Callable[..., None]], None]) -> ConfigDict:
    """Every setting with its default, and the points that `sweep(add)` adds."""
    points: list[dict[str, Any]] = []
    sweep(lambda **settings: points.append(settings))
    return ConfigDict(
        {
            "model": "",  # folder; empty for the model that comes with the package
            "fields": "",  # file; empty for the data of the model's training
            # What frames come from; tune on "validation". "all": of `fields`, none of which had a part in training.
            "part": "test",
            "frames": 32,
            "consecutive": False,  # frames that follow each other, from a random one, instead of random ones
            "stretches": 1,  # of consecutive frames, spread over the part; each has its share of them
            "patterns": "",  # such as "line:22,walk:90,cells:0.02"; empty for the three usual ones
            "error": 0.0,  # standard error of observations in m/s, which have errors of that size; 0: the true values
            "seeds": (0,),  # of patterns, errors and members; the first one draws the frames
            "members": 8,
            "sizes": (),  # the first members of each ensemble are scored as smaller ensembles too; pairs, if even
            "prior": "linear",  # what the RePaint family starts from: linear, gp or seed_gp
            "resample_steps": 5,  # of the RePaint family
            "levels": 16,  # of posterior samplers
            "points": {f"p{number:03d}": settings for number, settings in enumerate(points)},
            # What the picture shows: a setting of the points, or "stage", "calls", "members", "coverage", "pattern",
            # "distance"; one line for each value of `curve`.
            "x": "label",
            "curve": "",
            "every_stage": False,  # the table shows what every stage gave, not the last one alone
            "title": "",
            "batch": 0,  # members a call of the device; 0: as many as pay and fit
            "memory_gb": 0.0,  # of one device; 0: most of what is free on it
        }
    )


FREE = ("batch", "memory_gb", "title", "x", "curve", "every_stage")  # settings that change no row


def smoke(config: ConfigDict, arg: str) -> ConfigDict:
    """The same sweep in about a minute on two cores for `smoke`; unchanged for an empty `arg`.

    Raises:
      InputError: another `arg`.
    """
    if arg == "smoke":
        config.frames = min(config.frames, 2)
        config.members = min(config.members, 2)
        config.sizes = tuple(size for size in config.sizes if size < config.members)
        config.stretches = 1
        config.resample_steps = 1
        config.levels = 4
    elif arg:
        raise InputError(f"the argument of a configuration is smoke or nothing, got {arg!r}")
    return config


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
      number: its place in the sweep.
      label: names it in tables.
      method, model, prior, consecutive, members: see default_config.
      hyper: hyperparameters of the method that it sets, with the sweep's defaults.
    """

    number: int
    label: str
    method: str
    model: str
    prior: str
    consecutive: bool
    members: int
    hyper: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as one flat dictionary."""
        return {name: getattr(self, name) for name in OWN} | self.hyper

    @property
    def paired(self) -> bool:
        """Whether members come in antithetic pairs."""
        return self.method in methods.PAIRED

    def sizes(self, config: ConfigDict) -> tuple[int, ...]:
        """Sizes of the ensembles that are scored; the last one is the whole."""
        return (*(n for n in config.sizes if n < self.members and not (self.paired and n % 2)), self.members)

    @property
    def var_decay(self) -> float:
        """Of the RePaint family."""
        return self.hyper.get("var_decay", sample.VAR_DECAY)

    @property
    def repaint(self) -> bool:
        """Whether it belongs to the RePaint family."""
        return self.method in methods.REPAINT


def plain(config: ConfigDict) -> ConfigDict:
    """The same with Python's own numbers for those of NumPy, as from `np.linspace`, which JSON does not know."""

    def own(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, dict):
            return {key: own(one) for key, one in value.items()}
        return type(value)(map(own, value)) if isinstance(value, list | tuple) else value

    return ConfigDict(own(config.to_dict()))


def read_points(config: ConfigDict) -> list[Point]:
    """The points of a configuration.

    Raises:
      InputError: no points, an unknown method or setting, members that do not come in the pairs of a method.
    """
    if not config.points:
        raise InputError("the sweep has no points")
    points, asked = [], sorted(config.points.to_dict().items())
    for number, (name, own) in enumerate(asked):
        method = own.get("method", "adaptive")
        if method not in METHODS:
            raise InputError(f"{name}: method {method!r} is not one of {', '.join(METHODS)}")
        hyper = {key: value for key, value in own.items() if key not in (*OWN, MEMBERS)}
        known = _settings(method)
        unknown = [key for key in hyper if key not in known]
        if unknown:
            raise InputError(
                f"{name}: method {method} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        defaults = {key: config[key] for key in ("resample_steps", "levels") if key in known}
        # What all points of a method have in common says nothing.
        alike = [one for _, one in asked if one.get("method", "adaptive") == method]
        said = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in hyper.items()
            if len(alike) == 1 or any(one.get(key) != value for one in alike)
        ]
        common = {key: own.get(key, config[key]) for key in ("model", "prior", "consecutive", MEMBERS)}
        common[MEMBERS] = whole_number(f"{name}: members", common[MEMBERS], 1)
        label = str(own.get("label", " ".join([method, *said])))
        point = Point(number, label, method, hyper=defaults | hyper, **common)
        if own.get("prior", "linear") != "linear" and not point.repaint:
            raise InputError(f"{name}: prior has no effect on method {method}, which starts from the linear prior")
        if point.prior not in PRIORS:
            raise InputError(f"{name}: prior {point.prior!r} is not one of {', '.join(PRIORS)}")
        if point.paired and point.members % 2:
            raise InputError(f"{name}: the members of {method} come in antithetic pairs: {point.members} is odd")
        points.append(point)
    labels = [point.label for point in points]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"two points of the sweep are called {twice[0]!r}; give them labels")
    return points


def _settings(method: str) -> set[str]:
    """Names of the settings of a method."""
    if method in methods.REPAINT:
        return {*inspect.signature(Repaint.create).parameters, *sample.METHODS[method], "var_decay"}
    others = {name for name, owners in _OF_SOME.items() if methods.correction_of(method) not in owners}
    return set(_LEVELS) - others if method in methods.POSTERIOR else set()


Program = tuple[Repaint, ...] | Posterior | None


def make_program(point: Point, trained: Model) -> Program:
    """Stages of the RePaint family, levels of a posterior sampler, or None for samples of the linear prior.

    Raises:
      InputError: a number is outside its range, or a noise level outside that of the network's training; with the
        name of the point.
    """
    program: Program = None
    try:
        if point.repaint:
            stages = {key: value for key, value in point.hyper.items() if key != "var_decay"}
            program = sample.method(point.method, trained.steps.steps, **stages)
            check_number("var_decay", point.var_decay)
            if not 0 <= point.var_decay <= 1:
                raise InputError(f"var_decay must be in [0, 1], got {point.var_decay}")
            _check_effect(point, program)
        elif point.method in methods.POSTERIOR:
            hyper = {_LEVELS[key]: value for key, value in point.hyper.items()}
            usual = methods.levels_of(trained, point.method).sigma
            ends = {"sigma_max": float(usual[0]), "sigma_min": float(usual[-1])}
            program = Posterior.create(**(ends | hyper), correction=methods.correction_of(point.method))
        if program is not None:
            methods.check_levels(trained, program)
    except InputError as e:
        raise InputError(f"{point.label}: {e}") from e
    return program


def _check_effect(point: Point, stages: Sequence[Repaint]) -> None:
    """Raises InputError at a setting without any effect, which would look like one that has been tried."""
    even = all(stage.noise_floor == 1 for stage in stages)
    trusting = any(stage.blend > 0 or stage.guided for stage in stages)
    idle = {
        "gamma": ("noise_floor below 1 and a normalise other than flat",
                  even or all(stage.normalise == "flat" for stage in stages)),
        "anneal": ("noise_floor below 1", even),
        "normalise": ("noise_floor below 1, blend or guidance", even and not trusting),
        "confidence_floor": ("blend or guidance", not trusting),
        "var_decay": ("more than one stage, and a normalise other than flat",
                      len(stages) == 1 or all(stage.normalise == "flat" for stage in stages)),
        "t_refine": ("more than one stage", len(stages) == 1),
        "refine_floor": ("more than one stage", len(stages) == 1),
    }  # fmt: skip
    for name in point.hyper:
        needs, nothing = idle.get(name, ("", False))
        if nothing:
            raise InputError(f"{name} has no effect without {needs}")


def describe(point: Point, program: Program) -> dict[str, Any]:
    """Every number of a program, those that nobody set too, as it is written in JSON.

    To six digits, which last bits of another machine do not change.
    """

    def rounded(value: Any) -> Any:
        if isinstance(value, (str, bool, int)):
            return value
        return [float(f"{number:.6g}") for number in np.ravel(value)]

    parts = () if program is None else program if isinstance(program, tuple) else (program,)
    numbers: dict[str, Any] = {
        str(place): {field.name: rounded(getattr(part, field.name)) for field in dataclasses.fields(part)}
        for place, part in enumerate(parts, start=1)
    }
    return numbers | ({"var_decay": point.var_decay} if point.repaint else {})


def same_program(point: Point, program: Program) -> Hashable:
    """Equal for points that one compiled program serves, which differ in numbers only, on the same cases."""
    static = jax.tree.structure(program), tuple(leaf.shape for leaf in jax.tree.leaves(program))
    return (
        point.model,
        point.method if program is None else type(program).__name__,
        point.method in methods.FROM_RIDGE,
        point.prior,
        point.consecutive,
        point.members,
        static,
    )


def calls_by_stage(program: Program) -> list[int]:
    """Network calls of one member up to the end of each stage."""
    if program is None:
        return [0]
    if isinstance(program, Posterior):
        return [program.calls]
    total, calls = 0, []
    for stage in program:
        total += stage.calls
        calls.append(total)
    return calls
