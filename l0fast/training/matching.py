"""Checks whether a checkpoint fits the run that goes on from it, before any entry is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.dual import EqualityAscent
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.graph.computed import copied
from l0fast.layers.handle import gated_layers
from l0fast.layers.serving import INDEX
from l0fast.layers.stages import DRAWN, OPEN, QUIET, SETTLED, STAGES
from l0fast.measures.latency import LatencyTable
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.entries import Entries
from l0fast.training.generators import check_rng
from l0fast.training.histories import Rows, best_epoch
from l0fast.training.method import rates_at
from l0fast.training.removals import check_removals
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings

NEAR = 1e-6
"""The largest difference of a learning rate from its schedule, relative to the first rate."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Run:
    """The run that a checkpoint must fit.

    Args:
        state: of the run, before anything is trained.
        settings: of the run.
        steps_per_epoch: of its data.
        validation: whether it has a validation split.
        lrs: learning rates of the optimizer's groups in the first step.
        trained: whether it also measures the metric on the training examples.
    """

    state: RunState
    settings: TrainerSettings
    steps_per_epoch: int
    validation: bool
    lrs: Sequence[float]
    trained: bool = True

    def check(self, checkpoint: Checkpoint, path: Path) -> None:
        """Refuses a checkpoint of another run, or one that this run cannot have written.

        Raises:
            ValueError: the message names the first entry that is wrong. Nothing is changed.
        """
        entries, settings = Entries(path), self.settings
        entries.whole("epoch", checkpoint.epoch, 0, settings.epochs)
        entries.equal("step", checkpoint.step, checkpoint.epoch * self.steps_per_epoch)
        entries.real("seconds", checkpoint.seconds, 0.0)
        for name in ("threads", "ranks"):
            if getattr(checkpoint, name) is not None:
                entries.whole(name, getattr(checkpoint, name), 1)
        term = self.state.term
        rows = Rows(
            settings,
            gated_layers(self.state.model),
            term.names if isinstance(term, DensityConstraint) else (),
            self.validation,
            self.state.metric,
            self.trained,
        )
        rows.check(entries, checkpoint)
        model, optimizer = self._as_removed(entries, checkpoint)
        checkpoint.refuse_other_model(path, model)
        check_model(entries, "model", checkpoint.model, model)
        self._check_stages(entries, checkpoint)
        self._check_best(entries, checkpoint, model)
        self._check_term(entries, checkpoint)
        self._check_optimizer(entries, checkpoint.optimizer, optimizer, checkpoint.step)
        self._check_average(entries, checkpoint, model)
        self._check_scaler(entries, checkpoint.scaler)
        check_rng(entries, vars(checkpoint), self.state.device)

    def check_start(self, checkpoint: Checkpoint, path: Path) -> None:
        """The same for a checkpoint to start from: its model, optimizer and generators are used."""
        entries = Entries(path, "start_from")
        model, optimizer = self.state.model, self.state.optimizer
        checkpoint.refuse_other_model(path, model)
        check_model(entries, "model", checkpoint.model, model)
        self._check_optimizer(entries, checkpoint.optimizer, optimizer, None)
        check_rng(entries, vars(checkpoint), self.state.device)

    def _as_removed(
        self, entries: Entries, checkpoint: Checkpoint
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model of the checkpoint's size, and its optimizer; copies if `shrink` has removed
        something, else the run's own."""
        model, optimizer, shrinking = self.state.model, self.state.optimizer, self.state.shrinking
        if shrinking is None:
            for name in ("removals", "idle"):
                entries.equal(name, getattr(checkpoint, name), None)
            return model, optimizer
        if checkpoint.removals is not None:
            names = {id(one): name for name, one in model.named_parameters()}
            model = copied(model)
            check_removals(entries, checkpoint.removals, model, shrinking.example)
            parts = dict(model.named_parameters())
            groups: list[Any] = [
                {**group, "params": [parts[names[id(one)]] for one in group["params"]]}
                for group in optimizer.param_groups
            ]
            optimizer = torch.optim.AdamW(groups)
        idle: Any = checkpoint.idle
        entries.names("idle", idle, ("epochs", "stuck"))
        layers = gated_layers(model)
        entries.names("idle.epochs", idle["epochs"], layers if idle["epochs"] else ())
        for name, count in idle["epochs"].items():
            like = torch.zeros(layers[name].num_gates, dtype=torch.int64)
            entries.tensor(f"idle.epochs.{name}", count, like)
            if bool((count < 0).any()) or bool((count > checkpoint.epoch).any()):
                entries.refuse(f"idle.epochs.{name}", "does not hold numbers of epochs")
        entries.kind("idle.stuck", idle["stuck"], list)
        for name in idle["stuck"]:
            entries.kind("idle.stuck, in part,", name, str)
            if name not in layers:
                entries.refuse("idle.stuck", f"has an unknown {name!r}")
        return model, optimizer

    def _settled(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.epoch > self.settings.settles_at

    def _open_left(self, checkpoint: Checkpoint) -> int:
        """The steps of the start that are left; 0 if the run began with another run's gates."""
        term, said = self.state.term, checkpoint.of_term.get("open_left", 0)
        if term is None or said == 0 or self._settled(checkpoint):
            return 0
        return max(term.open_left - checkpoint.step, 0)

    def _stage(self, checkpoint: Checkpoint) -> str:
        """The stage that its gates must have; the checkpoint says whether drawn gates are quiet."""
        if self._settled(checkpoint):
            return SETTLED
        drawn = QUIET if checkpoint.of_term.get("quiet") is True else DRAWN
        return OPEN if self._open_left(checkpoint) else drawn

    def _check_stages(self, entries: Entries, checkpoint: Checkpoint) -> None:
        wanted = self._stage(checkpoint)
        for name in gated_layers(self.state.model):
            stage = STAGES[int(checkpoint.model[f"{name}._extra_state"])]
            entries.equal(f"model.{name}._extra_state", stage, wanted)

    def _check_best(self, entries: Entries, checkpoint: Checkpoint, model: nn.Module) -> None:
        best: Any = checkpoint.best
        found = best_epoch(checkpoint.history, self.settings, self.state.metric)
        entries.equal("best.epoch", None if best is None else best["epoch"], found)
        if best is None:
            return
        check_model(entries, "best.model", best["model"], model)

    def _check_term(self, entries: Entries, checkpoint: Checkpoint) -> None:
        term, saved = self.state.term, checkpoint.term
        if term is None or saved is None:
            if (term is None) is not (saved is None):
                entries.refuse("term", "is None" if saved is None else "is not None")
            return
        own: Mapping[str, Any] = term.state_dict()
        entries.names("term", dict(saved), own)
        extra: dict[str, Any] = {
            **own["_extra_state"],
            "settled": self._settled(checkpoint),
            "open_left": self._open_left(checkpoint),
            "quiet": self._stage(checkpoint) == QUIET,
        }
        if isinstance(term, MagnitudePruning):
            extra["done"] = checkpoint.step
        got: Any = saved["_extra_state"]
        entries.names("term._extra_state", got, extra)
        if "latency" in extra:  # the table that the run went on with: see `RunFolder.latency_table`
            extra["latency"] = LatencyTable.from_json(extra["latency"]).as_json()
        for name, value in extra.items():
            entries.equal(f"term._extra_state.{name}", got[name], value)
        may_be_negative = {"violation"}
        if isinstance(term, DensityConstraint):
            may_be_negative |= {*term.dual.memory} - {"restarts"}
            if isinstance(term.dual, EqualityAscent):
                may_be_negative.add("multiplier")
        for name, value in own.items():
            if name == "_extra_state":
                continue
            low = -math.inf if name in may_be_negative else 0.0
            entries.tensor(f"term.{name}", saved[name], value, low)
            if name in ("target", "dual_lr", "coefficient"):
                entries.equal(f"term.{name}", saved[name], value)
        if "taken" in own:
            drawn = min(checkpoint.epoch, self.settings.settles_at) * self.steps_per_epoch
            wanted = max(drawn - term.open_left, 0)  # all gates are open in the first of them
            # A run that began with the gates of another run has no such steps.
            found = float(saved["taken"])
            entries.equal("term.taken", found, float(drawn if found == drawn else wanted))

    def _check_optimizer(
        self, entries: Entries, saved: Any, optimizer: torch.optim.Optimizer, step: int | None
    ) -> None:
        """`step` is None if the learning rates are those of another run."""
        own: Mapping[str, Any] = optimizer.state_dict()
        entries.names("optimizer", saved, own)
        groups, wanted = saved["param_groups"], own["param_groups"]
        entries.kind("optimizer.param_groups", groups, list)
        entries.equal("optimizer.param_groups, in number,", len(groups), len(wanted))
        for number, (group, like) in enumerate(zip(groups, wanted, strict=True)):
            place = f"optimizer.param_groups.{number}"
            entries.names(place, group, like)
            for name in sorted(like.keys() - {"lr", "capturable"}):
                entries.equal(f"{place}.{name}", group[name], like[name])
            entries.kind(f"{place}.capturable", group["capturable"], bool)
            self._check_lr(entries, place, group["lr"], number, step)
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        entries.kind("optimizer.state", saved["state"], dict)
        for number, moments in saved["state"].items():
            place = f"optimizer.state.{number}"
            if type(number) is not int or not 0 <= number < len(parameters):
                entries.refuse("optimizer.state", f"has an unknown {number!r}")
            entries.names(place, moments, ("step", *MOMENTS))
            for name, low in zip(MOMENTS, (-math.inf, 0.0), strict=True):
                entries.tensor(f"{place}.{name}", moments[name], parameters[number].data, low)
            taken: Any = moments["step"]
            entries.tensor(f"{place}.step", taken, torch.zeros(()), 0.0)
            if float(taken) != round(float(taken)):
                entries.refuse(f"{place}.step", "is not a number of steps")

    def _check_lr(
        self, entries: Entries, place: str, lr: Any, number: int, step: int | None
    ) -> None:
        """Checks that the rate is that of the schedule; another rate shows a damaged file."""
        if isinstance(lr, Tensor):  # a tensor, for a CUDA graph
            entries.tensor(f"{place}.lr", lr, torch.zeros((), dtype=lr.dtype), 0.0)
            lr = float(lr)
        entries.real(f"{place}.lr", lr, 0.0)
        if not step:  # no step yet, or a step of another run
            return
        total = self.settings.epochs * self.steps_per_epoch
        wanted = rates_at(self.lrs, self.settings, step - 1, total)[number]
        if abs(lr - wanted) > NEAR * self.lrs[number]:
            entries.refuse(f"{place}.lr", f"is {lr:g}, not {wanted:g}")

    def _check_average(self, entries: Entries, checkpoint: Checkpoint, model: nn.Module) -> None:
        average, saved = self.state.average, checkpoint.average
        if average is None or saved is None:
            entries.equal("average", saved is not None, average is not None)
            return
        like: Mapping[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
        names = average.names() if checkpoint.step else ()
        entries.names("average", saved, names)
        for name in names:
            low = 0.0 if name.endswith("running_var") else -math.inf
            entries.tensor(f"average.{name}", saved[name], like[name].detach(), low)

    def _check_scaler(self, entries: Entries, saved: Any) -> None:
        scaler = self.state.scaler
        if scaler is None or saved is None:
            entries.equal("scaler", saved is not None, scaler is not None)
            return
        own = scaler.state_dict()
        entries.names("scaler", saved, own)
        for name, value in own.items():
            if name in ("scale", "_growth_tracker"):
                entries.real(f"scaler.{name}", saved[name], 0.0)
            else:
                entries.equal(f"scaler.{name}", saved[name], value)


def check_model(entries: Entries, entry: str, saved: object, model: nn.Module) -> None:
    """Refuses a state that does not fit this model: other names, shapes or dtypes, NaN, indices of
    other units, unknown stages of gates."""
    own: Mapping[str, Any] = model.state_dict()
    entries.names(entry, dict(saved) if isinstance(saved, Mapping) else saved, own)
    assert isinstance(saved, Mapping)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stages = {f"{name}._extra_state" for name in gated_layers(model)}
    for name, value in own.items():
        place, got = f"{entry}.{name}", saved[name]
        if not isinstance(value, Tensor):
            entries.kind(place, got, type(value))
            continue
        low = 0.0 if name.endswith(("running_var", "num_batches_tracked")) else -math.inf
        entries.tensor(place, got, value, low, finite=name in parameters)
        if name.endswith(f".{INDEX}"):
            entries.equal(place, got, value)
        if name in stages and not 0 <= int(got) < len(STAGES):
            entries.refuse(place, "is not a stage of gates")
