"""Layers that read the same units share their gates: drawn once, kept or closed together."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    L0Linear,
    L0Penalty,
    density,
    functional,
    param_groups,
    prune,
    sparsify_,
)
from l0fast.layers.expected import expected_open
from l0fast.layers.handle import gate_owners, gated_layers, own_gates
from tests.helpers.plain_models import READERS, NormedStream
from tests.helpers.thinned import thinned, thinned_product
from tests.helpers.zoo import ZOO


def example() -> Tensor:
    return torch.randn(16, 5, dtype=torch.float64)


def stream(skip: Any = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model = NormedStream().double()
    return sparsify_(
        model, example_inputs=example(), exclude="stem.0", skip=skip, density_init=0.6, **options
    )


def test_the_readers_of_a_stream_have_the_same_parameter() -> None:
    model = stream()
    layers = gated_layers(model)
    assert gate_owners(layers) == dict.fromkeys(READERS, READERS[0]) | {
        "blocks.0.2": "blocks.0.2",
        "blocks.1.2": "blocks.1.2",
    }
    assert own_gates(layers) == ["blocks.0.0", "blocks.0.2", "blocks.1.2"]
    weights, gates = param_groups(model, lr=1.0)
    assert len(gates["params"]) == 3
    assert len({id(p) for p in gates["params"] + weights["params"]}) == len(
        list(model.parameters())
    )


def test_one_draw_serves_all_and_every_reader_adds_to_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = stream()
    drawn: list[Tensor] = []
    draw = functional.draw

    def noted(*args: Any) -> Any:
        z, totals = draw(*args)
        drawn.append(z)
        z.retain_grad()
        return z, totals

    monkeypatch.setattr(functional, "draw", noted)
    model(example()).square().sum().backward()
    (z,) = drawn
    assert len(z) == 8 + 6 + 6
    layers = gated_layers(model)
    # What each reader alone gives, by the product rule: W . dW / z.
    given = [(layers[name].weight * layers[name].weight.grad).sum(0) for name in READERS]
    assert z.grad is not None
    opened = z[:8] > 0
    assert opened.sum() > 0
    torch.testing.assert_close(z.grad[:8][opened], (sum(given) / z[:8])[opened])


def test_densities_count_the_weights_of_every_reader() -> None:
    model = stream()
    layers = gated_layers(model)
    chances = {name: layer.open_probability().detach() for name, layer in layers.items()}
    expected = sum(float(chances[name].sum()) * layers[name].group_size for name in layers)
    total = sum(layer.weight.numel() for layer in layers.values())
    assert float(DensityConstraint(model, 0.5).densities().detach()) == pytest.approx(
        expected / total
    )
    assert float(L0Penalty(model, 1.0)().detach()) == pytest.approx(expected / total)
    assert density(model).total.expected == pytest.approx(expected / total)
    # The counts of a step's own draw say the same, and in any order.
    model.train()(example())
    counts = expected_open([layers[name] for name in reversed(layers)])
    wanted = [float(chances[name].sum()) for name in reversed(layers)]
    assert counts.tolist() == pytest.approx(wanted)
    assert counts.requires_grad
    counts[0].backward()
    assert layers["head"].log_alpha.grad is not None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.float()]
)
def test_copies_and_conversions_go_on_sharing(copied: Callable[[Any], Any]) -> None:
    model = copied(stream())
    assert len(own_gates(gated_layers(model))) == 3


def test_states_load() -> None:
    model, other = stream(), stream()
    with torch.no_grad():
        model.head.log_alpha.normal_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.blocks[0][0].log_alpha, model.head.log_alpha)
    assert other.blocks[0][0].log_alpha is other.head.log_alpha
    model.load_state_dict(NormedStream().double().state_dict())  # of the dense model


@pytest.mark.parametrize(
    ("how", "inside"),
    thinned_product(2, ["assign", "load_model", "load_file", "one name"], [False, True]),
)
def test_loading_keeps_the_ties(how: str, inside: bool, tmp_path: Path) -> None:
    model, other = stream(), copy.deepcopy(stream())
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_()
    gated = other
    if inside:
        model, other = nn.Sequential(model), nn.Sequential(other)
    own = len(own_gates(gated_layers(other)))
    if how == "assign":
        other.load_state_dict(model.state_dict(), assign=True)
    elif how == "load_model":
        save_model(model, str(tmp_path / "model.safetensors"))
        load_model(other, tmp_path / "model.safetensors")
    else:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        state = load_file(tmp_path / "model.safetensors")
        if how == "load_file":
            other.load_state_dict(state)
        else:
            alone = {name for name, _ in model.named_parameters()}  # each tensor once
            state = {name: value for name, value in state.items() if name in alone}
            assert len(state) < len(model.state_dict())
            with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*log_alpha"):
                other.load_state_dict(state)  # as PyTorch does for other tied parameters
            other.load_state_dict(state, strict=False, assign=True)
    assert len(own_gates(gated_layers(other))) == own
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert not any("sharing" in name for name in vars(gated))
    loss = other(example()).square().mean()
    loss.backward()
    assert gated.head.log_alpha.grad is not None
    small = prune(gated, example())
    assert not small._load_state_dict_post_hooks
    assert not small._load_state_dict_pre_hooks
    assert not small._state_dict_hooks


def test_a_saved_state_has_a_copy_for_each_layer() -> None:
    model = stream()
    whole = nn.Sequential(model)
    names = [f"{name}.log_alpha" for name in READERS]
    for state in (model.state_dict(), {n[2:]: v for n, v in whole.state_dict().items()}):
        found = [state[name] for name in names]
        assert len({one.data_ptr() for one in found}) == len(names)
        assert all(torch.equal(one, model.head.log_alpha) for one in found)
        assert found[0].data_ptr() == model.head.log_alpha.data_ptr()
        alone = state["blocks.0.2.log_alpha"]
        assert alone.data_ptr() == model.blocks[0][2].log_alpha.data_ptr()
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is model.head.log_alpha for name in names)


@pytest.mark.parametrize(("target", "round_to"), [(0.3, 1), (0.6, 1), (0.7, 4)])
def test_they_are_kept_or_closed_together(target: float, round_to: int) -> None:
    model = stream().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name in own_gates(gated_layers(model)):
            gated_layers(model)[name].log_alpha.normal_(1.0, 2.0)
    small: Any = prune(model, example(), target=target, round_to=round_to)
    assert small.report.density <= target
    width = small.stem[0].out_features
    assert width < 8
    assert width % round_to == 0
    assert [small.head.in_features, small.stem[1].num_features] == [width, width]
    for block in small.blocks:
        assert block[0].in_features == block[2].out_features == block[3].num_features == width
    assert small.report.tier == "merged"
    rows = {row["name"]: row for row in small.report.sites}
    assert {rows[name]["gates_open"] for name in READERS} == {width}
    # Each gate that is forced closed counts once.
    layers = gated_layers(model)
    forced = sum(rows[name]["forced"] for name in own_gates(layers))
    assert small.report.forced == forced > 0
    assert [group["forced"] for group in small.report.groups.values()] == [forced]


@pytest.mark.parametrize("name", thinned(["residual", "efficientnet", "inception", "mobilenet"], 4))
def test_sizes_are_the_pruned_models(name: str) -> None:
    torch.manual_seed(0)
    build, draw = ZOO[name]
    model, x = build().double().eval(), draw().double()
    sparsify_(model, example_inputs=x, skip=False)
    constraints = {
        measure: DensityConstraint(model, target=0.9, measure=measure, example_inputs=x)
        for measure in ("params", "macs")
    }
    layers = gated_layers(model)
    with torch.no_grad():
        for owner in own_gates(layers):
            gates = layers[owner].log_alpha
            gates.copy_(torch.where(torch.rand(gates.shape) < 0.5, 60.0, -60.0))
            gates[0] = 60.0
    small: Any = prune(model, x)
    assert small.report.forced == 0
    for measure, constraint in constraints.items():
        after, before = getattr(small.report, measure)
        assert after < before
        assert float(constraint.densities().detach()) == pytest.approx(after / before, rel=1e-9)


def test_a_skipped_step_is_the_masked_one() -> None:
    masked, skipped = stream(skip=False), stream(skip=True)
    for model in (masked, skipped):
        with torch.no_grad():
            for name in own_gates(gated_layers(model)):
                gated_layers(model)[name].log_alpha.sub_(2.0)
    x = example()
    for _ in range(3):
        losses: list[Tensor] = []
        for model in (masked, skipped):
            torch.manual_seed(1)
            model.zero_grad()
            losses.append(model(x).square().mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        for one, other in zip(masked.parameters(), skipped.parameters(), strict=True):
            assert one.grad is not None
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-12)


def test_from_dense_shares_and_says_what_does_not_fit() -> None:
    first = L0Linear.from_dense(nn.Linear(8, 3))
    second = L0Linear.from_dense(nn.Linear(16, 3), units=2, shared=first)
    assert second.log_alpha is first.log_alpha
    with pytest.raises(ValueError, match="shared: got '8 gates on its inputs'; expected a layer w"):
        L0Linear.from_dense(nn.Linear(6, 3), shared=first)
    with pytest.raises(ValueError, match="shared: got '3 gates on its outputs'"):
        L0Linear.from_dense(
            nn.Linear(3, 8), shared=L0Linear.from_dense(nn.Linear(8, 3), gates="output")
        )
