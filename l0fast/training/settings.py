"""How to train: the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l0fast import _checks
from l0fast.constraints.defaults import WARMUP
from l0fast.constraints.dual import DUALS
from l0fast.constraints.schedule import POWERS
from l0fast.data.augment import AUGMENTS
from l0fast.layers.gated import GATES
from l0fast.measures import amounts
from l0fast.measures.measure import MEASURES

METHODS = ("l0", "magnitude", "magnitude-one-shot")
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class TrainerSettings:
    """How to train. The defaults are this project's own recipe.

    Args:
        density: target of the whole model, in (0, 1] or an amount ("100k params"); or
        layer_density: layer name or pattern -> target, each its own constraint; or
        measure: what these targets are shares or amounts of: "gates", "params", "macs",
            "memory" or "latency" (see `DensityConstraint`).
        method: how a density is met: "l0" (gates are learned under a constraint), or by the
            baselines "magnitude" (gradually) and "magnitude-one-shot" (see `MagnitudePruning`).
        gates: where they sit, as in `sparsify_`; for models that the trainer gives them.
        penalty: coefficient of the penalised method; with none of the three the model is
            trained as it is, dense.
        penalty_per_example: `penalty` in the unit of Louizos et al. (see `L0Penalty`).
        epochs: passes over the training examples, >= 1.
        batch_size: examples a step, >= 1; the last batch of an epoch may be smaller.
        seed: of the order of the examples. (torch.manual_seed governs all else that is drawn.)
        lr: learning rate of Adam for the weights.
        gate_lr: of the gates; None: by the number of steps (see `param_groups`).
        dual_lr: dual learning rate; None: by the least target, and with a constant target by the
            number of steps (see `default_dual_lr`).
        restarts: dual restarts, of dual="ascent".
        dual: how the multipliers move: "ascent", "pi" (PI control), "augmented" (Lagrangian) or
            "equality" (see `l0fast.constraints.dual`).
        dual_first: whether they move before each step's loss is formed, rather than after it.
        target_schedule: how targets come down to what is asked: "cubic", "linear", or "constant"
            (in force from the start).
        target_warmup: the share of the training that this takes, in (0, 1].
        settle: the share of the epochs at the end, in [0, 1), in which the gates are decided and
            the noise is gone (see `DensityConstraint.settle`): rounded to whole epochs, at least
            one of several; 0 for none. Not of a dense training, nor of magnitude pruning.
        augment: what is done to training images at random: "none", "crop" (each is shifted by up
            to an eighth of its side, a pixel at least) or "crop-flip" (and half of them mirrored).
        weight_decay: decoupled, of the weights.
        schedule: "cosine" (both learning rates fall to 0 over the training) or "constant".
        select: the epoch whose model is pruned and reported: "last", or "best": of those whose
            gates have settled (without `settle`, whose evaluation gates meet every target), the one
            of least validation error (the latest of equals); the last where there is none.
        shrink: gates that have seldom been open (less than 1 %) at the end of so many epochs on end
            are removed for good, with their units: the model that is trained gets smaller. None
            removes nothing. See `shrink`.
        skip: whether a step leaves closed units out of its computation, see `sparsify_`; for
            models that the trainer gives their gates.
        cuda_graph: whether a step is captured as one CUDA graph and replayed: "auto" where that can
            be (the summary says why not), True, or False.
    """

    density: amounts.Asked | None = None
    layer_density: Mapping[str, amounts.Asked] | None = None
    measure: str = "gates"
    method: str = "l0"
    gates: str = "auto"
    penalty: float | None = None
    penalty_per_example: bool = False
    epochs: int = 20
    batch_size: int = 128
    seed: int = 0
    lr: float = 1e-3
    gate_lr: float | None = None
    dual_lr: float | None = None
    restarts: bool = True
    dual: str = "ascent"
    dual_first: bool = False
    target_schedule: str = "cubic"
    target_warmup: float = WARMUP
    settle: float = 0.1
    augment: str = "none"
    weight_decay: float = 0.1
    schedule: str = "cosine"
    select: str = "last"
    shrink: int | None = None
    skip: str | bool = "auto"
    cuda_graph: str | bool = "auto"

    def __post_init__(self) -> None:
        named = [
            name
            for name in ("density", "layer_density", "penalty")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            _checks.refuse(named[1], getattr(self, named[1]), f"only one of {' and '.join(named)}")
        _checks.one_of("measure", self.measure, MEASURES)
        if self.measure != "gates" and self.density is None and self.layer_density is None:
            _checks.refuse("measure", self.measure, "a density or layer_density beside it")
        _checks.one_of("method", self.method, METHODS)
        if self.method != "l0" and self.density is None and self.layer_density is None:
            _checks.refuse("method", self.method, "a density or layer_density beside it")
        _checks.one_of("gates", self.gates, ("auto", *GATES))
        checked: dict[str, Any] = {}  # as plain numbers: a checkpoint holds no others
        if self.density is not None:
            checked["density"] = amounts.check("density", self.density, self.measure)
        if self.layer_density is not None:
            if not isinstance(self.layer_density, Mapping):
                expected = "layer names or patterns -> densities"
                _checks.refuse("layer_density", self.layer_density, expected, TypeError)
            # In one order, whichever the caller's: a checkpoint's multipliers have no names.
            checked["layer_density"] = {
                name: amounts.check(
                    f"layer_density[{name!r}]", self.layer_density[name], self.measure
                )
                for name in sorted(self.layer_density, key=str)
            }
        for name in ("epochs", "batch_size"):
            checked[name] = _checks.whole(name, getattr(self, name))
        checked["seed"] = _checks.whole("seed", self.seed, 0, MAX_SEED)
        for name in ("lr", "gate_lr"):
            value = getattr(self, name)
            if value is not None or name == "lr":
                checked[name] = _checks.number(name, value, "a number > 0", low=0.0, open_low=True)
        for name in ("dual_lr", "penalty", "weight_decay"):
            value = getattr(self, name)
            if value is not None or name == "weight_decay":
                checked[name] = _checks.number(name, value, "a number >= 0", low=0.0)
        name, expected = "target_warmup", "a share of the training in (0, 1]"
        value = getattr(self, name)
        checked[name] = _checks.number(name, value, expected, low=0.0, high=1.0, open_low=True)
        name, expected = "settle", "a share of the training in [0, 1)"
        value = getattr(self, name)
        checked[name] = _checks.number(name, value, expected, low=0.0, high=1.0, open_high=True)
        _checks.one_of("augment", self.augment, AUGMENTS)
        _checks.one_of("dual", self.dual, tuple(DUALS))
        _checks.one_of("target_schedule", self.target_schedule, ("constant", *POWERS))
        if self.shrink is not None:
            checked["shrink"] = _checks.whole("shrink", self.shrink)
            if not self.gated:
                _checks.refuse("shrink", self.shrink, "a target or penalty beside it")
            if self.measure != "gates":
                _checks.refuse("shrink", self.shrink, "measure='gates' beside it")
            if self.select == "best":
                _checks.refuse("shrink", self.shrink, "select='last': earlier models are larger")
        _checks.one_of("schedule", self.schedule, ("cosine", "constant"))
        _checks.one_of("select", self.select, ("last", "best"))
        _checks.auto_or_bool("skip", self.skip)
        _checks.auto_or_bool("cuda_graph", self.cuda_graph)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def gated(self) -> bool:
        """Whether there is a constraint or a penalty."""
        return not (self.density is None and self.layer_density is None and self.penalty is None)

    @property
    def settles_at(self) -> int:
        """How many epochs there are before the gates settle; all of them where they do not."""
        if not self.gated or self.method != "l0" or self.settle == 0:
            return self.epochs
        last = max(1, round(self.settle * self.epochs))
        return max(self.epochs - last, 1)


BEFORE: dict[str, Any] = {
    "measure": "gates",
    "target_schedule": "constant",
    "settle": 0.0,
    "augment": "none",
}
"""How versions trained whose summaries and checkpoints do not say so."""

WITHOUT_GATES: dict[str, Any] = {
    name: getattr(TrainerSettings, name)
    for name in ("density", "layer_density", "penalty", "measure", "method", "gates", "shrink")
}
"""What a dense training has in place of all that speaks of gates."""
