"""What a plain model has, and does in one forward: parameters, MACs, activations, widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from l0fast.measures.density import Group, count_activations, count_macs, count_params
from l0fast.removal.plan import Plan


def element_size(model: nn.Module) -> int:
    """Bytes of one of the floating numbers that a model computes with."""
    return next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)


def widths_left(plan: Plan) -> dict[str, tuple[int, int]]:
    """Layer -> (inputs, outputs) that it computes with, as a plan leaves it."""
    return {
        name: (int(extent.columns.sum()), int(extent.rows.sum()))
        for name, extent in plan.extents.items()
    }


@dataclass(frozen=True)
class Counts:
    """A plain model, counted; each by module name ("" is all)."""

    params: dict[str, int]
    """Each tensor once in a module."""
    macs: dict[str, int]
    memory: dict[str, int]
    """Bytes of what its layers give."""
    widths: dict[str, tuple[int, int]]
    """(inputs, outputs) of each layer that a plan may make smaller."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        size: int,
        widths: dict[str, tuple[int, int]],
    ) -> Counts:
        """Counts a model.

        Args:
            model: to run on `args`.
            args: what its forward takes.
            size: bytes of a number, which is not that of `model` where it was widened.
            widths: its own.
        """
        elements = count_activations(model, args)
        return cls(
            params={name: count_params(module) for name, module in model.named_modules()},
            macs=count_macs(model, args),
            memory={name: size * number for name, number in elements.items()},
            widths=widths,
        )

    def whole(self) -> dict[str, int]:
        """Measure -> what the model as a whole has."""
        return {"params": self.params[""], "macs": self.macs[""], "memory": self.memory[""]}

    def group(self, group: Group) -> int:
        """What a group has, by its measure: "params", "macs" or "memory"."""
        counts: dict[str, int] = getattr(self, str(group.measure))
        if group.whole is not None:
            return counts[group.whole]
        return sum(counts[name] for name in group.layers)
