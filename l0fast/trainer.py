"""The constrained trainer: drives a model to the density asked for, then prunes it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import _checks
from l0fast._files import PARTS, write_atomically, write_text
from l0fast.checkpoint import CHECKPOINT, Checkpoint, rng_state
from l0fast.constraint import DensityConstraint, L0Penalty
from l0fast.data import Data, Split
from l0fast.density import count_macs, count_params, density
from l0fast.draw import gated_layers
from l0fast.dual import DualAscent
from l0fast.prune import prune
from l0fast.saving import save_pruned
from l0fast.settings import TrainerSettings, default_dual_lr, default_gate_lr
from l0fast.sparsify import param_groups, sparsify_
from l0fast.tensorboard import TENSORBOARD, scalar_writer

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PRUNED = "pruned.safetensors"
PLOT = "dynamics.png"
FILES = (CHECKPOINT, METRICS, SUMMARY, PRUNED, PLOT)
EVALUATION_BATCH = 1000

Row = dict[str, Any]


def _check_data(data: Data) -> None:
    """Refuses splits that no classifier could be trained or tested on."""
    for name in ("train", "validation", "test"):
        split: Split | None = getattr(data, name)
        if split is None and name == "validation":
            continue
        if not (isinstance(split, tuple) and all(isinstance(part, Tensor) for part in split)):
            _checks.refuse(f"data.{name}", split, "inputs and targets as tensors", TypeError)
        inputs, targets = split
        shape, dtype = tuple(targets.shape), targets.dtype
        if dtype != torch.int64 or len(shape) != 1 or not 0 < len(targets) == len(inputs):
            expected = f"int64 and one for each of the {len(inputs)} inputs, at least one"
            _checks.refuse(f"data.{name}.targets", f"{dtype} of shape {shape}", expected)
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= data.num_classes:
            expected = f"classes from 0 to {data.num_classes - 1}"
            _checks.refuse(f"data.{name}.targets", f"{low} to {high}", expected)
        if not bool(torch.isfinite(inputs).all()):
            _checks.refuse(f"data.{name}.inputs", "NaN or infinity", "finite numbers")


class Trainer:
    """Trains a model under its constraint, with checkpoints, and prunes it at the end.

    The data lie on the device as a whole; nothing is read back during an epoch. A checkpoint is
    written after each epoch; `fit(resume=True)` goes on from it and ends with the same weights,
    multipliers and metrics, bit for bit, as a run that was never interrupted.

    Args:
        model: any classifier; without gates and with a target or penalty, `sparsify_` gives it
            some (the defaults), in place.
        data: train, validation and test splits (see `l0fast.data`).
        settings: how to train.
        out: folder for checkpoint.pt, metrics.jsonl, summary.json, dynamics.png and
            pruned.safetensors, and where TensorBoard is installed for tensorboard/; None writes
            nothing.
        identity: facts about model and data that a checkpoint must share to be resumed, and that
            head the summary ("dataset", "model", ...).
        device: where to train; CUDA if there is one, else the CPU.

    Attributes:
        pruned: after `fit`, the smaller plain model (None after dense training).
        history: one row of metrics an epoch.

    Raises:
        ValueError, TypeError: settings, targets or data out of range, before anything is written.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainerSettings,
        *,
        out: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            _checks.refuse("model", type(model).__name__, "a torch.nn.Module", TypeError)
        _check_data(data)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.zeros((), device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            _checks.refuse("device", str(device), f"a device of this machine ({reason})")
        self.settings = settings
        try:
            self.identity: Row = json.loads(json.dumps(dict(identity or {})))
        except TypeError:
            _checks.refuse("identity", identity, "facts that JSON can hold", TypeError)
        self.out = None if out is None else Path(out)
        train, validation, test = (self._place(part) for part in data[:3])
        self.data = Data(train, validation, test, data.num_classes)
        model.to(self.device)
        if data.train.inputs.dim() == 4:
            model.to(memory_format=torch.channels_last)
        if settings.gated and not gated_layers(model):
            sparsify_(model, example_inputs=self.example_inputs, skip=settings.skip)
        self.model = model
        self.steps_per_epoch = math.ceil(len(data.train.targets) / settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        self.term = self._term()
        self.optimizer = self._optimizer()
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.history: list[Row] = []
        self.pruned: nn.Module | None = None
        self._opened = False

    @property
    def example_inputs(self) -> Tensor:
        """One training example."""
        return self.data.train.inputs[:1]

    def _place(self, split: Any) -> Any:
        if split is None:
            return None
        # Convolutions and pooling run about twice as fast on a CPU with channels last.
        images = split.inputs.dim() == 4
        layout = torch.channels_last if images else torch.contiguous_format
        inputs = split.inputs.to(self.device, memory_format=layout)
        return Split(inputs, split.targets.to(self.device))

    def _term(self) -> DensityConstraint | L0Penalty | None:
        settings = self.settings
        if settings.penalty is not None:
            examples = len(self.data.train.targets) if settings.penalty_per_example else None
            return L0Penalty(self.model, settings.penalty, examples)
        target = settings.density if settings.layer_density is None else settings.layer_density
        if target is None:
            return None
        lr = settings.dual_lr
        if lr is None:
            least = min(target.values()) if isinstance(target, Mapping) else target
            lr = default_dual_lr(self.total_steps, least)
        return DensityConstraint(
            self.model,
            target,
            measure=settings.measure,
            example_inputs=self.example_inputs,
            dual=DualAscent(lr, settings.restarts),
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        groups: Any = [{"params": list(self.model.parameters())}]
        if self.term is not None:
            gate_lr = settings.gate_lr or default_gate_lr(self.total_steps)
            decay = settings.weight_decay
            groups = param_groups(self.model, settings.lr, gate_lr, weight_decay=decay)
        return torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    # --- one epoch -----------------------------------------------------------------------------

    def _lr_factor(self) -> float:
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.step / self.total_steps))

    def _train_epoch(self) -> Row:
        """One pass over the training examples; the sums stay on the device until its end."""
        train, size = self.data.train, self.settings.batch_size
        count = len(train.targets)
        # The order depends on (seed, epoch) alone, so a resumed run sees the same.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator).to(self.device)
        loss_sum = torch.zeros((), device=self.device)
        errors = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for start in range(0, count, size):
            factor = self._lr_factor()
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
            index = order[start : start + size]
            x, y = train.inputs.index_select(0, index), train.targets.index_select(0, index)
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
            total = loss if self.term is None else loss + self.term()
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.term is not None:
                self.term.step()
            loss_sum += loss.detach() * len(index)
            errors += (logits.detach().argmax(1) != y).sum()
            self.step += 1
        return {
            "loss": float(loss_sum) / count,
            "train_error_percent": 100 * int(errors) / count,
        }

    def _error_percent(self, model: nn.Module, split: Split) -> float:
        model.eval()
        wrong = 0
        with torch.no_grad():
            for x, y in zip(
                split.inputs.split(EVALUATION_BATCH),
                split.targets.split(EVALUATION_BATCH),
                strict=True,
            ):
                wrong += int((model(x).argmax(1) != y).sum())
        return 100 * wrong / len(split.targets)

    def _row(self, trained: Row) -> Row:
        """The metrics of the epoch just trained."""
        row: Row = {"epoch": self.epoch, **trained}
        if self.data.validation is not None:
            row["validation_error_percent"] = self._error_percent(self.model, self.data.validation)
        row["test_error_percent"] = self._error_percent(self.model, self.data.test)
        if self.term is not None:
            table = density(self.model)
            row["expected_density"] = table.total.expected
            row["realised_density"] = table.total.realised
            row["layers"] = {
                layer.name: {
                    "kept": layer.open_gates,
                    "of": layer.num_gates,
                    "expected_density": layer.expected,
                }
                for layer in table.layers
            }
            row["collapsed"] = [layer.name for layer in table.layers if not layer.open_gates]
        if isinstance(self.term, DensityConstraint):
            with torch.no_grad():
                by_constraint = {
                    "density": self.term.densities(),
                    "lambda": self.term.multiplier,
                    "restarts": self.term.restarts.long(),
                }
            for key, values in by_constraint.items():
                row[key] = dict(zip(self.term.names, values.tolist(), strict=True))
            row["measure"] = self.term.measure
        return row

    # --- the whole run --------------------------------------------------------------------------

    def fit(self, *, resume: bool = False, on_epoch: Callable[[Row], None] | None = None) -> Row:
        """Trains to the end, prunes, and returns the summary (what summary.json holds).

        Args:
            resume: goes on from the checkpoint in `out`, if there is one.
            on_epoch: called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or its checkpoint does not fit; or the loss is
                not a number any more. Files of finished epochs stay as they are.
            OSError: `out` cannot be written.
        """
        if not self._opened:
            self.open(resume)
        with scalar_writer(self.out, self.history) as write_scalars:
            for _ in range(self.epoch, self.settings.epochs):
                started = time.perf_counter()
                trained = self._train_epoch()
                self._check_finite(trained["loss"])
                self.epoch += 1
                row = self._row(trained)
                self.history.append(row)
                self.seconds += time.perf_counter() - started
                self._save()
                write_scalars(row)
                if on_epoch is not None:
                    on_epoch(row)
        summary = self._summary()
        if self.out is not None:
            from l0fast.plots import plot_dynamics

            targets = None
            if isinstance(self.term, DensityConstraint):
                targets = dict(zip(self.term.names, self.term.target.tolist(), strict=True))
            figure = self.out / PLOT
            write_atomically(
                figure, lambda path: plot_dynamics(self.history, targets, summary, path)
            )
            self.write_summary(summary)
        return summary

    def _check_finite(self, loss: float) -> None:
        """Refuses to go on, before anything is written, with what is no number any more."""
        # The loss does not tell what the last step of the epoch has done.
        whole = all(bool(tensor.isfinite().all()) for tensor in self.model.parameters())
        if not (math.isfinite(loss) and whole):
            name, got = ("weights", "NaN or infinity") if math.isfinite(loss) else ("loss", loss)
            expected = "finite numbers; try a smaller lr (the epochs before are kept)"
            _checks.refuse(f"{name} (epoch {self.epoch + 1})", got, expected)

    def write_summary(self, summary: Row) -> None:
        """Puts `summary` into summary.json."""
        if self.out is not None:
            write_text(self.out / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def _summary(self) -> Row:
        last = self.history[-1]
        errors = [row["test_error_percent"] for row in self.history]
        gated = self.term is not None
        constrained = isinstance(self.term, DensityConstraint)
        summary: Row = {
            **self.identity,
            "seed": self.settings.seed,
            "epochs": self.settings.epochs,
            "target_density": self.settings.density,
            "target_layer_density": self.settings.layer_density,
            "measure": self.settings.measure,
            "penalty": self.settings.penalty,
        }
        if gated:
            example = self.example_inputs
            self.pruned = prune(self.model, example)
            report: Any = self.pruned.report
            if self.out is not None:
                save_pruned(self.pruned, self.out / PRUNED)
            params, macs = report["params"], report["macs"]
            groups = report["groups"].values()
            summary |= {
                "expected_density": last["expected_density"],
                "realised_density": report["density"],
                "forced": report["forced"],
                "collapsed": report["collapsed"],
                "architecture": report["architecture"],
                "test_error_percent": self._error_percent(self.pruned, self.data.test),
                "feasible": all(group["density"] <= group["target"] for group in groups)
                if constrained
                else None,
            }
        else:
            total = count_params(self.model)
            params = [total, total]
            macs = [count_macs(self.model, self.example_inputs)[""]] * 2
            summary |= {
                "expected_density": None,
                "architecture": None,
                "test_error_percent": errors[-1],
                "feasible": None,
            }
        summary |= {
            "best_test_error_percent": min(errors),
            "validation_error_percent": last.get("validation_error_percent"),
            "params": params[0],
            "dense_params": params[1],
            "params_fraction": params[0] / params[1],
            "macs": macs[0],
            "dense_macs": macs[1],
            "macs_fraction": macs[0] / macs[1],
            "seconds": round(self.seconds, 3),
            "settings": asdict(self.settings),
            "device": str(self.device),
            "torch": torch.__version__,
        }
        return summary

    # --- checkpoints ------------------------------------------------------------------------------

    def _identity(self) -> Row:
        """What a checkpoint must share with this run to be resumed."""
        return {**self.identity, **asdict(self.settings)}

    def open(self, resume: bool = False) -> None:
        """Makes `out` ready: a new folder, or the checkpoint to go on from (see `fit`)."""
        self._opened = True
        if self.out is None:
            return
        path = self.out / CHECKPOINT
        if self.out.exists() and not self.out.is_dir():
            _checks.refuse("out", str(self.out), "a folder")
        if resume and path.exists():
            self._load(path)
            self._save_metrics()  # the checkpoint may be an epoch ahead of them
        elif self.out.is_dir() and any(
            (self.out / name).exists() for name in (*FILES, TENSORBOARD)
        ):
            _checks.refuse("out", str(self.out), "a folder without a run in it (or resume it)")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            self._save()
        for part in self.out.glob(PARTS):
            part.unlink()  # of a process that was killed while it wrote

    def _save(self) -> None:
        if self.out is None:
            return
        checkpoint = Checkpoint(
            identity=self._identity(),
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            history=self.history,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            term=None if self.term is None else self.term.state_dict(),
            **rng_state(self.device),
        )
        checkpoint.write(self.out / CHECKPOINT)
        self._save_metrics()

    def _save_metrics(self) -> None:
        assert self.out is not None
        lines = [json.dumps(row) for row in self.history]
        write_text(self.out / METRICS, "".join(line + "\n" for line in lines))

    def _load(self, path: Path) -> None:
        checkpoint = Checkpoint.read(path, self.device)
        checkpoint.refuse_other(path, self._identity(), self.model)
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.term is not None:
            self.term.load_state_dict(checkpoint.term or {})
        self.epoch, self.step = checkpoint.epoch, checkpoint.step
        self.seconds, self.history = checkpoint.seconds, checkpoint.history
        checkpoint.restore_rng(self.device)
