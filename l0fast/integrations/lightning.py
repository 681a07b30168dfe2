"""A callback for the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from l0fast.integrations.recipe import Recipe, given

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        words = (
            'install Lightning: pip install "l0fast[lightning]", or pip install pytorch-lightning'
        )
        raise ModuleNotFoundError(f"l0fast.integrations.lightning: {words}") from error


class L0Callback(Callback):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Trains a model's gates under a constraint, inside the Trainer's own steps.

    Equals:
        constraint = DensityConstraint(module, target, steps=...)
        constraint.attach(trainer.optimizers)
    when the fit starts, and `detach()` at its end. Gradient accumulation, clipping, mixed precision
    and schedules stay the Trainer's. The checkpoint has the constraint's state in the optimizer's:
    `fit(ckpt_path=...)` continues exactly where the training was. Each `ModelCheckpoint` with a
    `monitor` chooses the best model among those after the gates have settled.

    Args:
        constraint: a constraint on the model; None to make one from the arguments below.
        target, measure, example_inputs: as of `DensityConstraint`, for the LightningModule.
        settle, start, gate_lr: as of `attach`.

    Attributes:
        constraint: the constraint, once the fit has started.

    Raises:
        ValueError, TypeError: there is neither a constraint nor a target, or both.
    """

    def __init__(
        self,
        constraint: Any = None,
        *,
        target: Any = None,
        measure: Any = None,
        example_inputs: Any = None,
        settle: float | None = None,
        start: float | None = None,
        gate_lr: float | None = None,
    ) -> None:
        options = given(target=target, measure=measure, example_inputs=example_inputs)
        self._recipe = Recipe(
            constraint, options, given(settle=settle, start=start, gate_lr=gate_lr)
        )
        self._settled = False

    @property
    def constraint(self) -> Any:
        """The constraint, once the fit has started."""
        return self._recipe.constraint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the constraint, before Lightning loads the states of the optimizers."""
        steps = int(trainer.estimated_stepping_batches)
        self._recipe.begin(pl_module, trainer.optimizers, steps)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes whether the gates of a loaded checkpoint have settled."""
        self._settled = self.constraint.settled

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Forgets the best models from before settling: they are larger than the target."""
        if self.constraint.settled and not self._settled:
            self._settled = True
            for checkpoint in trainer.checkpoint_callbacks:
                if getattr(checkpoint, "monitor", None) is not None:
                    checkpoint.best_k_models.clear()
                    checkpoint.best_model_path, checkpoint.best_model_score = "", None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs densities and multipliers."""
        pl_module.log_dict(self._recipe.metrics())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detaches the constraint, which stays on the model for `prune`."""
        self._recipe.end()
