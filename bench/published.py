"""The baselines: L0 gates as published, written from the formulas, and a plain tidy step.

Louizos, Welling, Kingma, 2018, eqs. 10-12 and 24, one gate sample a batch; Gallego-Posada, Ramirez,
Erraqabi, 2021, eqs. 4-6. Every layer draws its own gates, op by op, and autograd differentiates
each op: what anyone would write first, and what l0fast is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EPS = 1e-6
BOUND = math.log(100)
INITIAL_DENSITY = 0.9


def gate(log_alpha: Tensor) -> Tensor:
    """z of every log_alpha, sampled."""
    u = torch.empty_like(log_alpha).uniform_(EPS, 1 - EPS)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, min_val=0.0, max_val=1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of every log_alpha."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def gated_weight(weight: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(weight * z, expected number of open gates), a gate for each weight."""
    return weight * gate(log_alpha).to(weight.dtype), open_probability(log_alpha).sum()


def hard_concrete(log_alphas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(z, expected number of open gates) of each layer, layer by layer."""
    return [gate(one) for one in log_alphas], [open_probability(one).sum() for one in log_alphas]


class GatedLayer(nn.Module):
    """A Linear or Conv2d with gates on inputs, outputs or single weights; it masks by itself."""

    def __init__(self, dense: nn.Linear | nn.Conv2d, gates: str) -> None:
        super().__init__()
        self.dense = dense
        self.gates = gates
        weight = dense.weight
        dim = {"output": 0, "input": 1}.get(gates)
        shape = [1] * weight.dim() if dim is not None else list(weight.shape)
        if dim is not None:
            shape[dim] = weight.shape[dim]
        start = math.log(INITIAL_DENSITY / (1 - INITIAL_DENSITY)) + BETA * math.log(-GAMMA / ZETA)
        self.log_alpha = nn.Parameter(torch.full(shape, start, device=weight.device))
        self.group_size = weight.numel() // self.log_alpha.numel() + (gates == "output")

    def expected_l0(self) -> Tensor:
        """Expected number of open parameters."""
        return self.group_size * open_probability(self.log_alpha).sum()

    def forward(self, x: Tensor) -> Tensor:
        dense, z = self.dense, gate(self.log_alpha)
        weight, bias = dense.weight * z, dense.bias
        if self.gates == "output":
            bias = None if dense.bias is None else dense.bias * z.flatten()
        if isinstance(dense, nn.Conv2d):
            return F.conv2d(x, weight, bias, dense.stride, dense.padding)
        return F.linear(x, weight, bias)


def publish_(model: nn.Module, gates: str) -> nn.Module:
    """Gates on every Linear and Conv2d, in place: "structured" (conv outputs, Linear inputs) or
    "unstructured" (single weights)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, nn.Conv2d)) and not isinstance(module, GatedLayer):
                kind = "input" if isinstance(child, nn.Linear) else "output"
                layer = GatedLayer(child, kind if gates == "structured" else "weight")
                module._modules[name] = layer
    return model


def gated(model: nn.Module) -> list[GatedLayer]:
    """The model's gated layers."""
    return [layer for layer in model.modules() if isinstance(layer, GatedLayer)]


def density(model: nn.Module) -> Tensor:
    """Expected L0 over the number of gated parameters, added up layer by layer."""
    layers = gated(model)
    total = sum(layer.group_size * layer.log_alpha.numel() for layer in layers)
    return torch.stack([layer.expected_l0() for layer in layers]).sum() / total


Step = Callable[[Tensor, Tensor], None]


def published_step(model: nn.Module, target: float) -> Step:
    """A constrained step as in the released code: Adam as it comes, an optimizer for the
    multiplier, a restart decided on the host, the loss logged in every step."""
    device = next(model.parameters()).device
    multiplier = nn.Parameter(torch.zeros((), device=device))
    primal = torch.optim.Adam(model.parameters(), lr=7e-4)
    dual = torch.optim.SGD([multiplier], lr=1e-4)
    logged: list[float] = []

    def step(x: Tensor, y: Tensor) -> None:
        primal.zero_grad()
        dual.zero_grad()
        loss = F.cross_entropy(model(x), y)
        violation = density(model) - target
        (loss + multiplier * violation).backward()
        primal.step()
        assert multiplier.grad is not None
        multiplier.grad.neg_()  # ascent
        dual.step()
        with torch.no_grad():
            multiplier.clamp_(min=0.0)
            if violation.item() < 0:
                multiplier.zero_()
            for layer in gated(model):
                layer.log_alpha.clamp_(-BOUND, BOUND)
        logged[:] = [loss.item()]

    return step


def plain_step(model: nn.Module, target: float, compiled: bool = False) -> Step:
    """The same step written tidily: fused Adam, the multiplier a tensor, nothing read back.

    Args:
        model: with published gates.
        target: its density.
        compiled: torch.compile of the forward and the loss, and with them of the backward.
    """
    device = next(model.parameters()).device
    multiplier = torch.zeros((), device=device)
    adam = torch.optim.Adam(model.parameters(), lr=7e-4, fused=True)

    def losses(x: Tensor, y: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        violation = density(model) - target
        return F.cross_entropy(model(x), y) + multiplier * violation, violation.detach()

    forward = torch.compile(losses) if compiled else losses
    layers = gated(model)

    def step(x: Tensor, y: Tensor) -> None:
        loss, violation = forward(x, y, multiplier)
        loss.backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            multiplier.add_(violation, alpha=1e-4).clamp_(min=0.0).masked_fill_(violation < 0, 0.0)
            for layer in layers:
                layer.log_alpha.clamp_(-BOUND, BOUND)

    return step
