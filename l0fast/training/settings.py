"""The settings of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l0fast import _checks
from l0fast.constraints.defaults import SETTLE, WARMUP
from l0fast.constraints.dual import DUALS
from l0fast.constraints.schedule import POWERS
from l0fast.constraints.start import START
from l0fast.data.augment import AUGMENTS
from l0fast.layers.options import GATES
from l0fast.measures import amounts
from l0fast.measures.measure import MEASURES
from l0fast.training.precision import DTYPES

KINDS = ("classification", "regression", "multilabel")
METHODS = ("l0", "magnitude", "magnitude-one-shot")
MAX_SEED = 2**32 - 1
MOST = 2**31 - 1
"""The largest number of epochs, and of examples in a batch."""


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of a training. The defaults are l0fast's own recipe.

    Args:
        density: target of the whole model, in (0, 1] or an amount ("100k params"). Set one of
            density, layer_density and penalty; without any the training is dense.
        layer_density: layer name or pattern -> target; each is a constraint of its own.
        measure: what the targets count: "gates", "params", "macs", "memory" or "latency" (see
            `DensityConstraint`).
        method: how a density is met: "l0" (gates learn under a constraint), or a baseline:
            "magnitude" (gradual pruning) or "magnitude-one-shot" (see `MagnitudePruning`).
        gates: where gates are put, as in `sparsify_`, if the trainer puts them in.
        penalty: coefficient of the penalised method.
        penalty_per_example: `penalty` is in the unit of Louizos et al. (see `L0Penalty`).
        task: what the targets of the examples are, unless the `Trainer` has a `loss_fn`:
            "classification" (the loss is cross-entropy, the metric the error in percent),
            "regression" (both are the mean squared error) or "multilabel" (the loss is the binary
            cross-entropy of each label, the metric the percentage of wrong labels).
        epochs: passes over the training examples, >= 1.
        batch_size: examples in a step, >= 1; the last batch of an epoch may be smaller. A
            DataLoader uses its own batch size.
        seed: seed of the order of the examples. All other random numbers follow torch.manual_seed
            (and `random.seed` and `np.random.seed`, if your code draws from those).
        lr: Adam's learning rate for the weights.
        gate_lr: Adam's learning rate for the gates; None chooses it by the number of steps (see
            `param_groups`).
        dual_lr: learning rate of the multipliers; None chooses it by the lowest target, and with a
            constant target also by the number of steps (see `default_dual_lr`).
        restarts: whether dual="ascent" uses dual restarts.
        dual: how the multipliers move: "ascent", "pi" (PI control), "augmented" (Lagrangian) or
            "equality" (see `l0fast.constraints.dual`).
        dual_first: whether the multipliers move before the loss of a step is computed, rather than
            after the step.
        target_schedule: how the targets fall from the densities of the model at first: "cubic",
            "linear", or "constant" (in force from the first step).
        start: the first share of the training, in [0, 1): all gates are open, without noise (see
            `DensityConstraint`). Magnitude pruning has no such share.
        target_warmup: the share of the training after `start`, in (0, 1], in which the targets
            fall; it ends when the gates settle at the latest.
        settle: the last share of the epochs, in [0, 1): the gates are decided, and the weights
            train without noise (see `DensityConstraint.settle`). It is rounded to whole epochs, at
            least one if there are several epochs; 0 means none. Dense training and magnitude
            pruning have no such epochs.
        augment: random changes of training images: "none", "crop" (each is shifted by up to an
            eighth of its side, at least one pixel) or "crop-flip" (half of them are also mirrored).
        precision: of a training step: "fp32", or with autocast "bf16" or "fp16" (with a scaled
            loss). Weights, gates and multipliers stay in float32. The evaluation after each epoch
            uses this precision, too; the pruned model is evaluated in float32.
        accumulate: number of parts, >= 1, in which the batch of a step is computed, one after the
            other, to save memory. Each part draws its own gates; the constraint's term and the
            multipliers' step come once.
        clip_grad_norm: limit of the norm of the weights' gradient, > 0; None for no limit. The
            gradient of the gates is not clipped.
        warmup: number of epochs (2, or 0.5) over which the weights' learning rate rises from 0 to
            `lr`, before its schedule; >= 0, and less than `epochs`.
        ema: decay of an exponential moving average of the weights, in [0, 1). The average is
            evaluated and pruned in place of the weights (see the guide on the Trainer). None: no
            average.
        compile: backend of torch.compile for the forward of a step, such as "inductor"; None does
            not compile.
        weight_decay: of the weights, decoupled as in AdamW.
        schedule: of the weights' learning rate: "cosine" (it falls to 0 over the training) or
            "constant". The gates' learning rate stays constant.
        select: the epoch whose model is pruned and reported: "last", or "best", the epoch after
            settling with the lowest validation error (of equal ones the latest). Without settling,
            only epochs count whose evaluation gates meet every target. If there is none, the last
            epoch is taken.
        shrink: number of epochs. Gates whose open probability was under 1 % at the end of so many
            epochs in a row are removed for good, with their units, so the model gets smaller
            during training. None removes nothing.
        skip: whether a step leaves out closed units, as in `sparsify_`, if the trainer puts the
            gates in.
        cuda_graph: whether a step is captured as one CUDA graph and replayed: "auto" (if that is
            possible; else the summary says why not), True, or False.
    """

    density: amounts.Asked | None = None
    layer_density: Mapping[str, amounts.Asked] | None = None
    measure: str = "gates"
    method: str = "l0"
    gates: str = "auto"
    penalty: float | None = None
    penalty_per_example: bool = False
    task: str = "classification"
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
    start: float = START
    target_warmup: float = WARMUP
    settle: float = SETTLE
    augment: str = "none"
    precision: str = "fp32"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    warmup: float = 0.0
    ema: float | None = None
    compile: str | None = None
    weight_decay: float = 0.1
    schedule: str = "cosine"
    select: str = "last"
    shrink: int | None = None
    skip: str | bool = "auto"
    cuda_graph: str | bool = "auto"

    def __post_init__(self) -> None:
        self._check_words()
        self._check_what_goes_together()
        # As plain numbers: a checkpoint can hold no others.
        for name, value in {**self._checked_targets(), **self._checked_numbers()}.items():
            object.__setattr__(self, name, value)

    def _check_words(self) -> None:
        """Refuses words that are not among the choices."""
        _checks.one_of("measure", self.measure, MEASURES)
        _checks.one_of("method", self.method, METHODS)
        _checks.one_of("gates", self.gates, ("auto", *GATES))
        _checks.one_of("task", self.task, KINDS)
        _checks.one_of("precision", self.precision, tuple(DTYPES))
        if not (self.compile is None or isinstance(self.compile, str)):
            expected = "a backend of torch.compile, such as 'inductor', or None"
            _checks.refuse("compile", self.compile, expected, TypeError)
        _checks.one_of("augment", self.augment, AUGMENTS)
        _checks.one_of("dual", self.dual, tuple(DUALS))
        _checks.one_of("target_schedule", self.target_schedule, ("constant", *POWERS))
        _checks.one_of("schedule", self.schedule, ("cosine", "constant"))
        _checks.one_of("select", self.select, ("last", "best"))
        _checks.auto_or_bool("skip", self.skip)
        _checks.auto_or_bool("cuda_graph", self.cuda_graph)

    def _check_what_goes_together(self) -> None:
        """Refuses settings that contradict each other."""
        targets = ("density", "layer_density", "penalty")
        named = [name for name in targets if getattr(self, name) is not None]
        if len(named) > 1:
            _checks.refuse(named[1], getattr(self, named[1]), f"only one of {' and '.join(named)}")
        if self.density is None and self.layer_density is None:
            for name, plain in (("measure", "gates"), ("method", "l0")):
                if getattr(self, name) != plain:
                    expected = "a density or layer_density beside it"
                    _checks.refuse(name, getattr(self, name), expected)
        if self.shrink is None:
            return
        if not self.gated:
            _checks.refuse("shrink", self.shrink, "a target or penalty beside it")
        if self.measure != "gates":
            _checks.refuse("shrink", self.shrink, "measure='gates' beside it")
        if self.select == "best":
            _checks.refuse(
                "shrink", self.shrink, "select='last', as the models of earlier epochs are larger"
            )
        for name in ("ema", "compile"):
            if getattr(self, name) is not None:
                _checks.refuse(
                    "shrink", self.shrink, f"no {name}: it needs a model that keeps its size"
                )

    def _checked_targets(self) -> dict[str, Any]:
        """The targets, checked."""
        checked: dict[str, Any] = {}
        if self.density is not None:
            checked["density"] = amounts.check("density", self.density, self.measure)
        if self.layer_density is not None:
            if not isinstance(self.layer_density, Mapping):
                expected = "layer names or patterns -> densities"
                _checks.refuse("layer_density", self.layer_density, expected, TypeError)
            # Sorted, as the multipliers in a checkpoint have no names, only an order.
            checked["layer_density"] = {
                name: amounts.check(
                    f"layer_density[{name!r}]", self.layer_density[name], self.measure
                )
                for name in sorted(self.layer_density, key=str)
            }
        return checked

    def _checked_numbers(self) -> dict[str, Any]:
        """All other numbers, checked."""
        checked: dict[str, Any] = {
            "epochs": _checks.whole("epochs", self.epochs, 1, MOST),
            "batch_size": _checks.whole("batch_size", self.batch_size, 1, MOST),
            "accumulate": _checks.whole("accumulate", self.accumulate, 1, MOST),
            "seed": _checks.whole("seed", self.seed, 0, MAX_SEED),
            "shrink": None
            if self.shrink is None
            else _checks.whole("shrink", self.shrink, 1, MOST),
        }
        for name in ("lr", "gate_lr", "dual_lr", "penalty", "weight_decay"):
            value = getattr(self, name)
            if value is None and name in ("gate_lr", "dual_lr", "penalty"):
                continue
            positive = name in ("lr", "gate_lr")
            expected = "a number > 0" if positive else "a number >= 0"
            checked[name] = _checks.number(name, value, expected, low=0.0, open_low=positive)
        options: dict[str, Any] = {"low": 0.0, "high": 1.0}
        name, expected = "target_warmup", "a share of the training in (0, 1]"
        checked[name] = _checks.number(name, self.target_warmup, expected, open_low=True, **options)
        expected = "a share of the training in [0, 1)"
        for name in ("start", "settle"):
            value = getattr(self, name)
            checked[name] = _checks.number(name, value, expected, open_high=True, **options)
        expected = "a number of epochs >= 0, less than all of them"
        last: dict[str, Any] = {"low": 0.0, "high": float(self.epochs), "open_high": True}
        checked["warmup"] = _checks.number("warmup", self.warmup, expected, **last)
        if self.clip_grad_norm is not None:
            name, expected = "clip_grad_norm", "a number > 0, or None"
            clip = _checks.number(name, self.clip_grad_norm, expected, low=0.0, open_low=True)
            checked[name] = clip
        if self.ema is not None:
            expected = "a decay in [0, 1), or None"
            checked["ema"] = _checks.number("ema", self.ema, expected, open_high=True, **options)
        if self.start + self.settle >= 1:
            _checks.refuse("start + settle", self.start + self.settle, "less than 1")
        return checked

    @property
    def gated(self) -> bool:
        """Whether there is a constraint or a penalty."""
        return not (self.density is None and self.layer_density is None and self.penalty is None)

    @property
    def settles_at(self) -> int:
        """Number of epochs before the gates settle; all epochs if they do not settle."""
        if not self.gated or self.method != "l0" or self.settle == 0:
            return self.epochs
        last = max(1, round(self.settle * self.epochs))
        return max(self.epochs - last, 1)

    def may_select(self, epoch: int) -> bool:
        """Whether select="best" may choose this epoch: one after settling, if the gates settle."""
        return self.select == "best" and not epoch <= self.settles_at < self.epochs


BEFORE: dict[str, Any] = {
    "measure": "gates",
    "target_schedule": "constant",
    "start": 0.0,
    "settle": 0.0,
    "augment": "none",
    "task": "classification",
    "precision": "fp32",
    "accumulate": 1,
    "clip_grad_norm": None,
    "warmup": 0.0,
    "ema": None,
    "compile": None,
}
"""The values of settings that summaries and checkpoints of earlier versions do not have."""

WITHOUT_GATES: dict[str, Any] = {
    name: getattr(TrainerSettings, name)
    for name in ("density", "layer_density", "penalty", "measure", "method", "gates", "shrink")
}
"""The settings about gates, with the values of a dense training."""
