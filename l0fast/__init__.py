"""Constrained L0 sparsity for PyTorch: name a density, train once, get a smaller model."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from l0fast import functional
    from l0fast.constraints.constraint import DensityConstraint
    from l0fast.constraints.dual import AugmentedLagrangian, DualAscent, EqualityAscent, PIControl
    from l0fast.constraints.penalty import L0Penalty
    from l0fast.constraints.schedule import TargetSchedule
    from l0fast.constraints.several import Constraints
    from l0fast.gating.param_groups import param_groups
    from l0fast.gating.sparsify import sparsify_
    from l0fast.layers.conv import L0Conv1d, L0Conv2d, L0Conv3d
    from l0fast.layers.conv_transpose import L0ConvTranspose1d, L0ConvTranspose2d, L0ConvTranspose3d
    from l0fast.layers.handle import gates
    from l0fast.layers.linear import L0Linear
    from l0fast.maths.hard_concrete import HardConcrete
    from l0fast.measures.density import density
    from l0fast.measures.latency import LatencyTable
    from l0fast.pruning.carry import prune_optimizer, prune_state_dict
    from l0fast.pruning.prune import prune
    from l0fast.pruning.saving import load_pruned, save_pruned
    from l0fast.pruning.timing import measure_latency
    from l0fast.training.frontier import frontier
    from l0fast.training.settings import TrainerSettings
    from l0fast.training.trainer import Trainer

__version__ = "0.2.0"

__all__ = [
    "AugmentedLagrangian",
    "Constraints",
    "DensityConstraint",
    "DualAscent",
    "EqualityAscent",
    "HardConcrete",
    "L0Conv1d",
    "L0Conv2d",
    "L0Conv3d",
    "L0ConvTranspose1d",
    "L0ConvTranspose2d",
    "L0ConvTranspose3d",
    "L0Linear",
    "L0Penalty",
    "LatencyTable",
    "PIControl",
    "TargetSchedule",
    "Trainer",
    "TrainerSettings",
    "__version__",
    "density",
    "frontier",
    "functional",
    "gates",
    "load_pruned",
    "measure_latency",
    "param_groups",
    "prune",
    "prune_optimizer",
    "prune_state_dict",
    "save_pruned",
    "sparsify_",
]

_HOMES = {
    "AugmentedLagrangian": "l0fast.constraints.dual",
    "Constraints": "l0fast.constraints.several",
    "DensityConstraint": "l0fast.constraints.constraint",
    "DualAscent": "l0fast.constraints.dual",
    "EqualityAscent": "l0fast.constraints.dual",
    "HardConcrete": "l0fast.maths.hard_concrete",
    "L0Conv1d": "l0fast.layers.conv",
    "L0Conv2d": "l0fast.layers.conv",
    "L0Conv3d": "l0fast.layers.conv",
    "L0ConvTranspose1d": "l0fast.layers.conv_transpose",
    "L0ConvTranspose2d": "l0fast.layers.conv_transpose",
    "L0ConvTranspose3d": "l0fast.layers.conv_transpose",
    "L0Linear": "l0fast.layers.linear",
    "L0Penalty": "l0fast.constraints.penalty",
    "LatencyTable": "l0fast.measures.latency",
    "PIControl": "l0fast.constraints.dual",
    "TargetSchedule": "l0fast.constraints.schedule",
    "Trainer": "l0fast.training.trainer",
    "TrainerSettings": "l0fast.training.settings",
    "density": "l0fast.measures.density",
    "frontier": "l0fast.training.frontier",
    "functional": "l0fast.functional",
    "gates": "l0fast.layers.handle",
    "load_pruned": "l0fast.pruning.saving",
    "measure_latency": "l0fast.pruning.timing",
    "param_groups": "l0fast.gating.param_groups",
    "prune": "l0fast.pruning.prune",
    "prune_optimizer": "l0fast.pruning.carry",
    "prune_state_dict": "l0fast.pruning.carry",
    "save_pruned": "l0fast.pruning.saving",
    "sparsify_": "l0fast.gating.sparsify",
}
"""The module of each name. It is loaded with the first use of the name, and PyTorch with it: the
command must start before that, to answer Ctrl-C while PyTorch is loaded."""


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name == "functional" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
