"""Accelerate, timm and PEFT need nothing but `attach`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0fast import DensityConstraint, gates, prune, sparsify_
from l0fast.constraints.defaults import SETTLE
from l0fast.constraints.start import START, start_steps
from tests.helpers.digits import (
    BATCH,
    STEPS,
    Seeded,
    assert_same_training,
    assert_within,
    constrained,
    digits,
    plain,
    prepared,
)
from tests.helpers.thinned import thinned

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("parts", "precision"), thinned([(4, "no"), (1, "no"), (1, "bf16")], 3))
def test_accelerate(parts: int, precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision
    )
    x, y, _, _ = digits()
    net = prepared()
    model, optimizer = accelerator.prepare(
        Seeded(net, parts), torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0)
    )
    constraint = constrained(net).attach(optimizer)
    size = BATCH // parts
    for part in range(STEPS * parts):
        with accelerator.accumulate(model):
            rows = slice(part * size, (part + 1) * size)
            accelerator.backward(model(x[rows], y[rows])["loss"])
            optimizer.step()
            optimizer.zero_grad()
    if precision == "no":
        expected, other = plain()
        assert_same_training(net, expected)
        torch.testing.assert_close(constraint.multiplier, other.multiplier)
    assert int(constraint.taken) == STEPS - start_steps(START, STEPS) - round(SETTLE * STEPS)
    assert_within(net)


def test_timms_optimizers() -> None:
    optim = pytest.importorskip("timm.optim")
    x, y, _, _ = digits()
    net = prepared()
    optimizer = optim.create_optimizer_v2(net, opt="lamb", lr=1e-2, weight_decay=0.05)
    constrained(net).attach(optimizer)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        net(x[rows], y[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_within(net)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(F.relu(self.q_proj(x)))


@pytest.mark.parametrize("trainable", [False, True])
def test_adapters_on_gated_layers_are_refused(trainable: bool) -> None:
    peft = pytest.importorskip("peft")
    model = sparsify_(Attention(), example_inputs=torch.randn(2, 8))
    constraint = DensityConstraint(model, 0.5, steps=200)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
    for log_alpha in constraint.handle.parameters():
        log_alpha.requires_grad_(trainable)
    optimizer = torch.optim.AdamW(adapted.parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"attach: got 'an adapter on the gated layer o_proj'"):
        constraint.attach(optimizer)
    assert constraint.attachment is None
    with pytest.raises(ValueError, match=r"prune: got 'an adapter on the gated layer o_proj'"):
        prune(adapted.base_model.model, torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"DensityConstraint: got 'an adapter on the gated layer"):
        DensityConstraint(adapted, 0.5, steps=200)


def test_gates_that_an_adapter_has_frozen_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = sparsify_(Attention(), exclude="q_proj", example_inputs=torch.randn(2, 8))
    constraint = DensityConstraint(model, 0.5, steps=200)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    frozen: Any = torch.optim.AdamW(adapted.parameters(), 1e-3)
    assert not gates(model).parameters()[0].requires_grad
    with pytest.raises(ValueError, match=r"gates that do not require grad: .*o_proj"):
        constraint.attach(frozen)
