"""Models of many kinds: sparsified, gates closed at random, pruned, and the same function."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, load_pruned, param_groups, prune, save_pruned, sparsify_
from l0fast.graph import capture
from l0fast.layers.handle import gated_layers
from tests.helpers.thinned import telling, thinned
from tests.helpers.zoo import ZOO


def wide(value: Any) -> tuple[Any, ...]:
    """An example as arguments, its floating tensors in float64."""
    parts = value if isinstance(value, tuple) else (value,)
    return tuple(part.double() if part.is_floating_point() else part for part in parts)


def untrained(model: nn.Module) -> nn.Module:
    """No zeros and ones where training would have left numbers: in norms, biases and heads."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()) or bool((parameter == 1).all()):
                parameter.normal_(std=0.5)
    return model


@functools.cache
def gated(name: str) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """The model with gates, its example, and what it gave before it had gates."""
    torch.manual_seed(0)
    build, example = ZOO[name]
    model, args = untrained(build()).double().eval(), wide(example())
    with torch.no_grad():
        before = model(*args)
    return sparsify_(model, example_inputs=args, density_init=1.0), args, before


@functools.cache
def pruned(name: str, how: str) -> tuple[nn.Module, Any, tuple[Any, ...]]:
    """The gated model with its gates closed, what prune makes of it, and the example."""
    model, args, _ = gated(name)
    model = copy.deepcopy(model)
    torch.manual_seed(1 if how == "random" else 2)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            if how != "open":
                layer.log_alpha.normal_(-0.5, 2.0)
                layer.log_alpha.view(-1)[0] = -9.0
            if how == "one":
                layer.log_alpha.fill_(-9.0)
                layer.log_alpha[torch.randint(len(layer.log_alpha), ())] = 1.0
    return model, prune(model, args), args


TELLING = [
    "mlp ReLU",
    "lenet",
    "vgg",
    "channelwise",
    "unet",
    "dcgan",
    "inception",
    "vit",
    "gpt2 with attributes",
    "bert",
    "llama",
]
"""Each passes units on in another way; the other kinds are larger or nearly the same."""


@pytest.mark.parametrize("name", telling(ZOO, ["vgg", "gpt2 with attributes"]))
def test_gates_leave_a_pretrained_model_as_it_was(name: str) -> None:
    model, args, before = gated(name)
    assert before.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(model(*args), before, rtol=1e-12, atol=1e-12)


NOTHING_CLOSED = ["mlp GELU", "vgg", "resnext", "channelwise", "gpt2", "llama"]
"""One of each kind: with all gates open nothing is planned, whatever the model."""


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *telling([(name, "random") for name in ZOO], [(name, "random") for name in TELLING]),
        *telling([(name, "one") for name in ZOO], [("channelwise", "one"), ("llama", "one")]),
        *thinned([(name, "open") for name in NOTHING_CLOSED], 3),
    ],
)
def test_pruned_it_is_the_same_function_and_smaller(name: str, how: str) -> None:
    model, small, args = pruned(name, how)
    with torch.no_grad():
        got, expected = small(*args), model(*args)
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    for module in small.modules():
        assert not type(module).__module__.startswith("l0fast")
    report = small.report
    if how == "open":
        assert report.layers == []
        assert report.params[0] == report.params[1]
        return
    assert report.params[0] < report.params[1]
    assert report.macs[0] < report.macs[1]
    # All that has closed gates is smaller now, and where it is not merged it says why.
    for row in report.sites:
        if row["gates"] is not None and row["gates_open"] < row["gates_total"]:
            assert row["status"] != "kept"
        if row["status"] != "removed":
            assert row["reason"]
    for note in report.notes:
        assert name == "gpt2"
        assert note.startswith("merged: undone, ")


GATHERS = {
    # Pixels, and positions of a flattened channel, have a gate each.
    "lenet": {"fc1"},
    **{f"mlp {name}": {"0"} for name in ("ReLU", "GELU", "Sigmoid", "Tanh", "Softplus")},
}


@pytest.mark.parametrize("name", telling(ZOO, TELLING))
def test_neighbours_agree_without_gathers_and_scatters(name: str) -> None:
    _, small, _ = pruned(name, "random")
    found = {row["name"] for row in small.report.sites if row["status"] == "compacted"}
    assert found == GATHERS.get(name, set()), str(small.report)
    assert small.report.tier == "merged"


@pytest.mark.parametrize(
    "name",
    telling(
        ["mobilenet", "resnext", "channelwise", "dcgan", "gpt2", "gpt2 with attributes", "bert"],
        ["channelwise", "gpt2 with attributes", "bert"],
    ),
)
def test_saved_and_loaded_into_a_dense_model(name: str, tmp_path: Path) -> None:
    _, small, args = pruned(name, "random")
    path = tmp_path / "small.safetensors"
    save_pruned(small, path)
    again: Any = load_pruned(ZOO[name][0], path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(*args), small(*args), rtol=1e-12, atol=1e-12)
    states = again.state_dict(), small.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert again.report == small.report
    assert str(again) == str(small)


@pytest.mark.parametrize(
    "name",
    telling(
        ["mobilenet", "vgg", "channelwise", "llama", "autoencoder", "gpt2 with attributes", "bert"],
        ["llama"],
    ),
)
def test_it_is_an_ordinary_model(name: str) -> None:
    """It copies, pickles, compiles without a break and exports, norms and heads included."""
    _, small, args = pruned(name, "random")
    torch._dynamo.reset()
    ways: dict[str, Any] = {
        "deepcopy": copy.deepcopy(small),
        "pickle": pickle.loads(pickle.dumps(small)),
        "export": torch.export.export(small, args, strict=True).module(),
        "compile": torch.compile(small, fullgraph=True, backend="aot_eager"),
    }
    with torch.no_grad():
        expected = small(*args)
        for how, again in ways.items():
            torch.testing.assert_close(again(*args), expected, rtol=1e-10, atol=1e-10, msg=how)
    assert ways["pickle"].report == small.report
    assert type(small) is type(ZOO[name][0]())


@pytest.mark.exhaustive
def test_what_shrinks_in_images() -> None:
    """The parts that make the closed units go with them, whatever is between."""
    mobile: Any = pruned("mobilenet", "random")[1].features[3].conv
    width = mobile[0][0].out_channels
    assert width < 24
    assert mobile[0][1].num_features == mobile[1][1].num_features == width
    assert (mobile[1][0].in_channels, mobile[1][0].groups) == (width, width)
    assert mobile[2].in_channels == width

    block: Any = pruned("resnext", "random")[1].layer4[0]
    assert block.conv2.groups < 4
    assert block.conv1.out_channels == block.conv2.in_channels == block.conv2.groups * 64

    vgg: Any = pruned("vgg", "one")[1]
    assert vgg.classifier[0].in_features == 4  # the four places of one channel
    assert capture.is_carrier(vgg.features[1])
    assert vgg.features[1].num_features == 1


def test_what_shrinks_between_layers() -> None:
    layers: Any = pruned("channelwise", "one")[1]
    assert (layers[1].num_groups, layers[1].num_channels, layers[1].weight.numel()) == (1, 4, 4)
    assert (layers[4].num_groups, layers[4].num_channels) == (1, 3)
    assert (layers[7].num_features, layers[7].weight.numel()) == (1, 1)
    assert layers[10].num_features == layers[13].num_features == 1
    assert layers[13].running_mean.numel() == 1
    assert (layers[16].num_parameters, layers[16].weight.numel()) == (1, 1)


def test_what_shrinks_in_attention() -> None:
    llama: Any = pruned("llama", "one")[1]
    assert [llama.q_proj.out_features, llama.k_proj.out_features] == [8, 4]
    assert [llama.v_proj.out_features, llama.o_proj.in_features] == [4, 8]
    assert llama.gate_proj.out_features == llama.up_proj.out_features == 1


@pytest.mark.exhaustive
def test_what_shrinks_in_attention_with_attributes() -> None:
    bert: Any = pruned("bert", "one")[1].attention
    assert (bert.num_attention_heads, bert.all_head_size) == (1, 4)
    assert bert.attention_head_size == 4  # as large as there were heads, and not one of them
    assert bert.query.out_features == bert.dense.in_features == 4

    timm: Any = pruned("gpt2 with attributes", "one")[1]
    assert timm.h[0].attn.num_heads == 1
    assert timm.h[0].attn.qkv.out_features == 12
    assert timm.lm_head.weight is timm.wte.weight

    nano: Any = pruned("gpt2", "one")[1]
    assert nano.h[0].attn.c_attn.out_features == 12
    assert nano.lm_head.weight is nano.wte.weight


@pytest.mark.parametrize("name", telling(["llama", "vgg", "resnext", "channelwise"], ["llama"]))
def test_a_target_is_met_by_gates_that_serve_blocks(name: str) -> None:
    model, args, _ = gated(name)
    model = copy.deepcopy(model).train()
    constraint = DensityConstraint(model, target=0.4)
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, gate_lr=0.3))
    for _ in range(12):
        loss = model(*args).square().mean() + constraint()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    small: Any = prune(model.eval(), args)
    assert small.report.density <= 0.4
    assert small.report.params[0] < small.report.params[1]
    assert small.report.tier == "merged"
