"""Skipping as on a GPU, forced on a CPU: the same step as masked, and who reads the gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import sparsify_
from l0fast.layers.draw import Compact, OnDevice
from l0fast.layers.handle import gated_layers, gates
from l0fast.skipping import attach, skip_on_device
from l0fast.skipping.following import Following
from l0fast.skipping.link import width_of
from tests.helpers.counting import CaptureSafe
from tests.helpers.draws import compact
from tests.helpers.steps import (
    DENSITIES,
    EXACT,
    MODELS,
    assert_same_step,
    left_out,
    set_density,
    step,
)
from tests.helpers.thinned import thinned_product

UNREAD = (
    "mlp",
    "no bias, GELU",
    "tokens",
    "two readers",
    "a hidden layer without gates of its own",
)
"""Chains of linear layers with gates on inputs, and no convolution."""
READ = ("lenet", "batch norms", "mlp, output gates", "conv2d, strides")


def prepared(
    name: str, monkeypatch: pytest.MonkeyPatch, skip: bool, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor]:
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    torch.manual_seed(0)
    make, shape, options, _ = MODELS[name]
    x = torch.randn(shape, dtype=dtype)
    return sparsify_(make().to(dtype), example_inputs=x, skip=skip, **options), x


def found(model: nn.Module) -> list[Any]:
    """What the model's layers left out in the last step, where they did."""
    own = [compact(layer) for layer in gated_layers(model).values()]
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    own += [hook.compact for hook in hooks if isinstance(hook, Following)]
    return [one for one in own if one is not None]


@pytest.mark.parametrize(("name", "density"), thinned_product(3, [*UNREAD, *READ], DENSITIES))
def test_loss_and_gradients_are_those_of_the_masked_step(
    name: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, x = prepared(name, monkeypatch, False)
    skipped, _ = prepared(name, monkeypatch, True)
    for model in (masked, skipped):
        set_density(model, density)
    assert_same_step(masked, skipped, x, EXACT)
    kind = OnDevice if name in UNREAD else Compact
    assert all(isinstance(one, kind) for one in found(skipped))
    assert bool(found(skipped)) or name in READ


def test_nothing_that_is_closed_enters_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units beyond the rounded counts are left out, not multiplied by zero."""
    torch.manual_seed(0)
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    x = torch.randn(4, 8).double()
    model: Any = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 3)).double()
    sparsify_(model, example_inputs=x, skip=True)
    reader: Any = model[2]
    with torch.no_grad():
        reader.log_alpha.fill_(40.0)
        reader.log_alpha[150:] = -40.0
    order = skip_on_device.functional.compaction(torch.arange(300) < 150, (300,))[0]
    # 150 is rounded up to 192: the closed units that come last in the order are never computed.
    beyond = order.index[192:].long()
    with torch.no_grad():
        model[0].weight[beyond] = torch.nan
    hidden: list[Tensor] = []
    # No hook: somebody else's hook between the layers would see every unit.
    model[1].forward = lambda x: hidden.append(x.relu()) or hidden[-1]
    loss, _ = step(model, x)
    assert bool(torch.isfinite(loss))
    assert bool((hidden[0][:, 192:] == 0).all())
    assert bool((hidden[0][:, :150] != 0).any(0).any())


@pytest.mark.parametrize("name", UNREAD)
def test_linear_chains_are_never_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared(name, monkeypatch, True)
    set_density(model, 0.4)
    step(model, x)  # tables of segments are made once
    with CaptureSafe():
        model(x).square().mean().backward()
    assert left_out(model) > 0


@pytest.mark.parametrize("name", READ)
def test_convolutions_are_read_once_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_on_device, "MULTIPLE", 2)  # no model here is as wide as a real one
    model, x = prepared(name, monkeypatch, True)
    set_density(model, 0.4)
    asked: list[dict[int, Tensor]] = []
    sent: list[dict[int, Compact]] = []
    read_back, send = skip_on_device.read_back, skip_on_device.send

    def reading(opened: dict[int, Tensor]) -> dict[int, Tensor]:
        asked.append(opened)
        return read_back(opened)

    def sending(compacts: dict[int, Compact], device: torch.device) -> dict[int, Compact]:
        sent.append(compacts)
        return send(compacts, device)

    monkeypatch.setattr(skip_on_device, "read_back", reading)
    monkeypatch.setattr(skip_on_device, "send", sending)
    gates(model).skipping.mode = True
    step(model, x)
    assert len(asked) == len(sent) == 1
    assert len(asked[0]) == len(gated_layers(model))
    rows = [len(one.rows) for one in sent[0].values() if one.rows is not None]
    assert rows
    assert all(size % 2 == 0 for size in rows)
    for one in sent[0].values():
        assert all(index is None or not index.is_cuda for index in one)


@pytest.mark.parametrize(
    ("needed", "before", "width"),
    [
        (0, 0, 64),
        (1, 0, 64),
        (64, 0, 64),
        (65, 0, 128),
        (190, 0, 192),
        (193, 0, 200),  # all there are
        (65, 64, 128),  # up at once
        (96, 192, 192),  # 96 of them idle
        (95, 192, 128),
        (104, 200, 200),
        (103, 200, 128),
        (10, 200, 64),
        (70, 256, 128),  # of a wider model: it says nothing here
    ],
)
def test_a_width_goes_down_when_a_multiple_and_a_half_is_idle(
    needed: int, before: int, width: int
) -> None:
    assert width_of(needed, 200, 64, before) == width


def test_gates_that_flicker_do_not_change_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    model: Any = nn.Sequential(nn.Conv2d(3, 200, 1), nn.ReLU(), nn.Conv2d(200, 4, 1))
    sparsify_(model, example_inputs=x, skip=True)
    maker, widths = model[0], list[int]()
    for opened in (126, 130, 126, 100, 95, 126, 20):
        with torch.no_grad():
            maker.log_alpha.fill_(-40.0)
            maker.log_alpha[:opened] = 40.0
        hidden: list[Tensor] = []
        model[1].forward = lambda x, hidden=hidden: hidden.append(x.relu()) or hidden[-1]
        model(x).sum().backward()
        widths.append(hidden[0].shape[1])
    assert widths == [128, 192, 192, 192, 128, 128, 64]


def test_what_is_sent_is_what_was_made() -> None:
    shared = torch.tensor([1, 5])
    compacts = {1: Compact(shared, None, None), 2: Compact(None, torch.tensor([0]), shared)}
    got = skip_on_device.send(compacts, torch.device("cpu"))
    for key, one in compacts.items():
        for expected, part in zip(one, got[key], strict=True):
            assert (part is None) == (expected is None)
            assert part is None or torch.equal(part, expected)  # pyright: ignore[reportArgumentType]
    assert got[1].rows is got[2].gather


@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_between_two_links_leaves_out_on_both_sides(reverse: bool) -> None:
    ends = [(1, [2], torch.rand(5) < 0.5), (2, [3, 4], torch.rand(7) < 0.5)]
    found = skip_on_device.orders(ends[::-1] if reverse else ends)
    assert found[1].rows is found[2].cols
    assert found[2].rows is found[3].cols is found[4].cols
    assert [order and len(order.index) for order in found[2]] == [7, 5]
    assert found[1].cols is found[3].rows is None


def test_auto_masks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared("mlp", monkeypatch, "auto")  # type: ignore[arg-type]
    step(model, x)
    assert gates(model).skipping is None


def test_a_second_forward_before_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[Tensor]] = []
    for skip in (False, True):
        model, x = prepared("mlp", monkeypatch, skip)
        set_density(model, 0.4)
        torch.manual_seed(3)
        (model(x).sum() * model(-x).sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    for skip in (False, True):
        model, x = prepared("mlp", monkeypatch, skip, torch.float32)
        set_density(model, 0.4)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
