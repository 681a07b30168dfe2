"""Constrained L0 sparsity for PyTorch: name a density, train once, get a smaller model."""

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
