"""The gated linear layer whose weight is [in, out]: for the Conv1D of transformers (GPT-2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l0fast.layers.dense_types import is_in_out, kind_of
from l0fast.layers.gated import Gated
from l0fast.layers.options import check_width
from l0fast.maths.gated_weight import mask


class L0InOut(Gated, nn.Module):
    """A linear layer of `nx` inputs and `nf` outputs with hard-concrete gates; see `L0Linear`.

    Equals (gates="input", the default):
        (x * z) @ weight + bias                        # z [nx], weight [nx, nf]
    With gates="output":
        x @ (weight * z) + bias * z                    # z [nf]
    With gates="weight":
        x @ (weight * z) + bias                        # z [nx, nf]

    It is made of a dense layer by `from_dense`, and is always computed whole: no training step
    skips its closed units.

    Source: Louizos et al., 2018.
    """

    default_gates = "input"
    nx: int
    nf: int
    bias: nn.Parameter

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Any:
        self = super().from_dense(layer, **options)
        self.dense_type = kind_of(layer)
        return self

    @classmethod
    def _stands_for(cls, layer: nn.Module) -> bool:
        return is_in_out(layer)

    @classmethod
    def _expected(cls) -> str:
        return "a Conv1D of transformers"

    def _num_inputs(self) -> int:
        return self.nx

    def _gate_shape(self) -> tuple[int, ...]:
        shapes = {
            "input": (self.nx // self.units,),
            "output": (self.nf,),
            "weight": tuple(self.weight.shape),
        }
        return shapes[self.gates]

    def _mask_inputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return mask(weight, z, 0)

    def _mask_outputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return mask(weight, z, 1)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., nx] -> [..., nf]."""
        check_width(input, -1, self.nx)
        weight, bias = self.weight, self.bias  # it always has one
        each = self.noise == "example" and self.training
        if not each:
            weight, bias = self._masked()
            assert bias is not None
        elif self.gates == "input":
            input = input * self._example_z(input, -1)
        y = torch.addmm(bias, input.reshape(-1, self.nx), weight)
        y = y.view(*input.shape[:-1], self.nf)
        return y * self._example_z(y, -1) if each and self.gates == "output" else y
