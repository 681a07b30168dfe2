"""Branches whose gates are drawn closed are left out of a training step, which stays the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from l0fast import gates, sparsify_
from tests.helpers.branches import ResNet, Transformer, branches, close


def step(model: torch.nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    """What a model gives in training, and all gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    grads = (p.grad for p in model.parameters())
    return [y.detach(), *(one for one in grads if one is not None)]


def test_a_closed_branch_is_left_out() -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(4, 64).double(), Transformer(2).double()
    masked, skipping = (
        sparsify_(copy.deepcopy(dense), example_inputs=x, depth=True, skip=skip).train()
        for skip in (False, True)
    )
    closed = branches(masked)[:2]
    assert closed == ["blocks.0.attn.proj.branch", "blocks.0.mlp.2.branch"]
    for model in (masked, skipping):
        close(model, closed, share=0.0)
        for name in closed:  # in any draw
            gates(model).layers[name].log_alpha.data.fill_(-30.0)
    for seed in range(3):
        for one, other in zip(step(masked, x, seed), step(skipping, x, seed), strict=True):
            torch.testing.assert_close(one, other)
        layers, compacts = gates(skipping).layers, gates(skipping).board.latest.compacts
        read = compacts[id(layers["blocks.0.mlp.2"])].cols
        assert read is not None
        assert len(read) == 1  # of 32


def test_a_branch_with_a_batch_norm_is_not() -> None:
    """It counts what it is given, closed or not."""
    torch.manual_seed(0)
    x, dense = torch.randn(4, 3, 6, 6).double(), ResNet().double()
    masked, skipping = (
        sparsify_(copy.deepcopy(dense), example_inputs=x, depth=True, skip=skip).train()
        for skip in (False, True)
    )
    for model in (masked, skipping):
        close(model, [], share=0.0)
        gates(model).layers["blocks.0.bn2.branch"].log_alpha.data.fill_(-30.0)
        for layer in gates(model).layers.values():
            if layer.gates != "branch":
                layer.log_alpha.data.fill_(30.0)
        step(model, x, 0)
    for (name, one), other in zip(masked.named_buffers(), skipping.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("skip", [True, False])
def test_a_closed_branch_gets_no_gradient(skip: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = sparsify_(Transformer(2), example_inputs=x, depth=True, skip=skip).train()
    layers = gates(model).layers
    close(model, [], share=0.0)
    layers["blocks.1.attn.proj.branch"].log_alpha.data.fill_(-30.0)
    step(model, x, 0)
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.1.attn", "blocks.1.norm1")) and parameter.grad is not None:
            assert not parameter.grad.any(), name
