"""Layers whose weights something computes have no gates; the model around them gets smaller."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks

from l0fast import DensityConstraint, prune, prune_state_dict, sparsify_
from l0fast.layers.handle import gated_layers


def old(name: str) -> Callable[[nn.Module], nn.Module]:
    """weight_norm or spectral_norm as a hook, which PyTorch advises against."""

    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(nn.utils, name)(layer)

    return apply


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Double())


def assigned(layer: Any) -> nn.Module:
    """Its weight is an attribute, which a hypernetwork would set."""
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


REMOVE = "torch.nn.utils.parametrize.remove_parametrizations"
COMPUTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm hook": (
        old("weight_norm"),
        "its weight is computed by weight_norm; call torch.nn.utils.remove_weight_norm first",
    ),
    "spectral_norm hook": (
        old("spectral_norm"),
        "its weight is computed by spectral_norm; call torch.nn.utils.remove_spectral_norm first",
    ),
    "weight_norm": (
        parametrizations.weight_norm,
        f"its weight is computed by weight_norm; call {REMOVE} first",
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        f"its weight is computed by spectral_norm; call {REMOVE} first",
    ),
    "own": (doubled, f"its weight is computed by Double; call {REMOVE} first"),
    "mask": (
        lambda layer: masks.l1_unstructured(layer, "weight", 0.3),
        "its weight is computed by a mask of torch.nn.utils.prune; "
        "call torch.nn.utils.prune.remove first",
    ),
    "mask of the bias": (
        lambda layer: masks.random_unstructured(layer, "bias", 0.3),
        "its bias is computed by a mask of torch.nn.utils.prune; "
        "call torch.nn.utils.prune.remove first",
    ),
    "attribute": (assigned, "its weight is not a parameter"),
}


def net(name: str) -> Any:
    torch.manual_seed(0)
    layer = COMPUTED[name][0](nn.Conv1d(6, 8, 3, padding=1))
    return nn.Sequential(
        nn.Conv1d(3, 10, 3), nn.ReLU(), nn.Conv1d(10, 6, 1), nn.ReLU(),
        layer, nn.ReLU(), nn.Conv1d(8, 12, 1), nn.ReLU(), nn.Conv1d(12, 2, 1),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("given", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("name", COMPUTED)
def test_the_table_says_why_it_has_no_gates(name: str, given: bool) -> None:
    model, x = net(name), torch.randn(2, 3, 9) if given else None
    rows = {row.name: row for row in sparsify_(model, example_inputs=x, dry_run=True).layers}
    assert set(rows) == {"0", "2", "4", "6", "8"}
    assert rows["0"].gates == rows["6"].gates == "output"
    assert (rows["4"].kind, rows["4"].gates) == ("Conv1d", "")
    assert rows["4"].reason == COMPUTED[name][1]
    sparsify_(model, example_inputs=x)
    assert {"0", "6"} <= set(gated_layers(model)) <= {"0", "2", "6", "8"}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_pattern_for_it_alone_is_refused(name: str) -> None:
    model = net(name)
    for include in ("4", ["0", "[4-5]"]):
        with pytest.raises(
            ValueError, match=r"include: got .* expected layers that can"
        ) as refused:
            sparsify_(model, include=include)
        assert str(refused.value).endswith(f"('4': {COMPUTED[name][1]})")
    with pytest.raises(ValueError, match="expected a model with a Linear or conv") as refused:
        sparsify_(model, include=lambda name, _: name == "4")
    assert str(refused.value).endswith(f"('4': {COMPUTED[name][1]})")
    assert not gated_layers(model)
    assert list(gated_layers(sparsify_(model, include="[04]", exclude=["4"]))) == ["0"]


@pytest.mark.parametrize("name", COMPUTED)
def test_the_model_around_it_is_pruned(name: str) -> None:
    model, x = net(name), torch.randn(2, 3, 9)
    before = model(x)
    sparsify_(model, example_inputs=x, exclude="4", density_init=1.0)
    torch.testing.assert_close(model(x), before)
    constraint = DensityConstraint(model, 0.75, measure="macs", example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha[::2] = -9.0
    small: Any = prune(model, x)
    del constraint
    assert small.report.tier == "merged"
    assert small.report.notes == []
    assert (small[0].out_channels, small[2].out_channels) == (5, 6)
    assert (small[6].in_channels, small[6].out_channels) == (8, 6)
    assert type(small[4]) is type(model[4])
    again = prune_state_dict(model.state_dict(), model, small)
    assert small.load_state_dict(again).missing_keys == []
    torch.testing.assert_close(small(x), model(x))
    assert model[4]._parameters.keys() == net(name)[4]._parameters.keys()


@pytest.mark.parametrize("part", ["in_proj_weight", "weight"])
def test_fused_attention_with_a_computed_weight_stays(part: str) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    attention: Any = model.get_submodule("0.self_attn")
    masks.l1_unstructured(attention.out_proj if part == "weight" else attention, part, 0.3)
    table = sparsify_(model.eval(), example_inputs=torch.randn(2, 3, 8), dry_run=True)
    reasons = {row.name: row.reason for row in table.layers}
    assert reasons["0.self_attn"].startswith(f"its {part} is computed by a mask of torch.nn.utils")
