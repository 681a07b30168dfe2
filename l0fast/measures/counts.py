"""What a plain model has, and does in one forward: parameters, MACs, activations, widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from l0fast.graph.calls import Example
from l0fast.graph.exporting import quietly
from l0fast.measures.flops import Ops, count_ops, count_params
from l0fast.measures.groups import Group


def element_size(model: nn.Module) -> int:
    """Bytes of one of the floating numbers that a model computes with."""
    return next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)


SMALL_WORK = 2**27
"""Parameters times numbers of the example. Below it, a real forward is faster than one for the
shapes alone."""


def _is_small(model: nn.Module, example: Example) -> bool:
    """Whether a forward on the CPU takes less time than one for the shapes alone."""
    params, given = list(model.parameters()), example.tensors()
    if any(tensor.device.type != "cpu" for tensor in (*params, *given)):
        return False
    return sum(p.numel() for p in params) * sum(x.numel() for x in given) < SMALL_WORK


def _without_numbers(model: nn.Module, example: Example) -> Ops:
    """The ops of a forward for the shapes alone, where the model runs so."""
    if any(isinstance(p, FakeTensor) for p in (*model.parameters(), *example.tensors())):
        return count_ops(model, example)
    if _is_small(model, example):
        with torch.random.fork_rng(devices=[]):
            return count_ops(model, example.copy())  # a forward may write into it
    try:
        with quietly(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            return count_ops(model, example.map(fake.from_tensor))
    except Exception:  # its forward asks for values
        return count_ops(model, example)


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
    outputs: list[tuple[torch.Size, torch.dtype]]
    """Shape and dtype of each tensor that the model gives."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Example,
        size: int,
        widths: dict[str, tuple[int, int]],
    ) -> Counts:
        """Counts a model.

        Args:
            model: to run on the example.
            example: what its forward takes.
            size: bytes of a number, which is not that of `model` where it was widened.
            widths: its own.
        """
        ops = _without_numbers(model, example)
        params = {name: count_params(module) for name, module in model.named_modules()}
        for name in widths.keys() - params.keys():  # no layers, but tensors that modules hold
            own: Any = model.get_submodule(name.rpartition(".")[0])
            tensor = own._parameters.get(name.rpartition(".")[2])
            params[name] = 0 if tensor is None else tensor.numel()
        return cls(
            params=params,
            macs=ops.macs,
            memory={name: size * number for name, number in ops.elements.items()},
            widths=widths,
            outputs=ops.outputs,
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
