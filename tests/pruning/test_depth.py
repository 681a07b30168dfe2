"""Pruning in depth: closed branches are gone, and what is left is what was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    gates,
    load_pruned,
    measure_latency,
    prune,
    prune_optimizer,
    prune_state_dict,
    save_pruned,
    sparsify_,
)
from l0fast.measures.flops import count_macs, count_params
from tests.helpers.branches import ResNet, Transformer, branches, close, with_norms_that_counted
from tests.helpers.thinned import thinned

ROWS = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def deep(build: Callable[[], nn.Module], x: Any, closed: Callable[[str], bool]) -> nn.Module:
    """A model in float64 and in evaluation, with some branches closed, and half of its units."""
    torch.manual_seed(0)
    model = with_norms_that_counted(build()).double().eval()
    sparsify_(model, example_inputs=x, depth=True)
    close(model, [name for name in branches(model) if closed(name)])
    return model


def expected(model: nn.Module, x: Any, measure: str) -> float:
    """What a measure reckons of the gates as they are in evaluation."""
    constraint = DensityConstraint(model, 0.9, measure=measure, example_inputs=x)
    gates(model).set_stage("settled")
    measured: Any = constraint._measure
    found = constraint.densities().double().item() * measured.totals[0]
    gates(model).set_stage("drawn")
    gates(model).forget_constraints()
    return found


@pytest.mark.parametrize(
    ("build", "x", "closed", "left"),
    thinned(
        [
            (Transformer, ROWS, lambda name: "blocks.1" in name or "0.attn" in name, ["0", "1"]),
            (Transformer, ROWS, lambda name: "mlp" in name, ["0", "1", "2"]),
            (Transformer, ROWS, lambda name: True, []),
            (ResNet, IMAGES, lambda name: "blocks.0" in name, ["0", "1", "2"]),
        ],
        3,
    ),
)
def test_what_is_left(
    build: Callable[[], nn.Module], x: Tensor, closed: Any, left: list[str], tmp_path: Path
) -> None:
    """The pruned model computes the same, has what the measures say, and can be saved."""
    model = deep(build, x, closed)
    wanted = {measure: expected(model, x, measure) for measure in ("params", "macs", "memory")}
    small = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    report: Any = small.report
    assert [name for name, _ in small.get_submodule("blocks").named_children()] == left
    assert report.params == [count_params(small), count_params(build())]
    assert report.macs[0] == count_macs(small, x)[""]
    for measure, value in wanted.items():
        assert getattr(report, measure)[0] == pytest.approx(value, abs=0.5), measure
    gone = {name.removesuffix(".branch") for name in branches(model) if closed(name)}
    assert set(report.cuts[0]["branches"]) == gone
    assert "removed branches" in str(report)
    assert not any("l0fast" in type(module).__module__ for module in small.modules())
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(lambda: build().double().eval(), tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    assert loaded.report == report


def test_what_is_held_beside_the_model() -> None:
    """Its optimizer and other states of it are made as small."""
    model = deep(Transformer, ROWS, lambda name: "blocks.0" in name or "1.mlp" in name)
    optimizer = torch.optim.AdamW(model.parameters())
    model(ROWS).square().sum().backward()
    optimizer.step()
    small = prune(model, ROWS)
    state = prune_state_dict(model.state_dict(), model, small)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    after = prune_optimizer(optimizer, model, small)
    weight: Any = small.get_submodule("blocks.0.attn.qkv").weight
    before = optimizer.state[model.get_submodule("blocks.1.attn.qkv").weight]  # type: ignore[index]
    assert after.state[weight]["exp_avg"].shape == weight.shape
    assert set(after.state[weight]["exp_avg"].flatten().tolist()) <= set(
        before["exp_avg"].flatten().tolist()
    )
    assert {id(p) for p in after.param_groups[0]["params"]} == {id(p) for p in small.parameters()}


def test_a_model_pruned_twice(tmp_path: Path) -> None:
    model = deep(lambda: Transformer(3), ROWS, lambda name: "blocks.1" in name)
    first = prune(model, ROWS)
    again = sparsify_(first, example_inputs=ROWS, depth=True)
    close(again, [name for name in branches(again) if "blocks.1" in name])
    small = prune(again, ROWS)
    assert [cut["dropped"] for cut in small.report.cuts] == [{"blocks": [1]}] * 2  # type: ignore[union-attr]
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(lambda: Transformer(3).double().eval(), tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(ROWS), small(ROWS), rtol=0, atol=0)


def test_latency() -> None:
    """A closed branch has the seconds of none of its layers."""
    model = deep(Transformer, ROWS, lambda name: False)
    table = measure_latency(model, ROWS)
    reckoned = expected(model, ROWS, table)  # type: ignore[arg-type]
    close(model, branches(model))
    without = expected(model, ROWS, table)  # type: ignore[arg-type]
    held: Any = prune(model, ROWS, target=1.0, measure=table).report
    assert without < reckoned
    assert held.groups["model"]["kept"] == pytest.approx(without)


def test_a_part_of_the_model() -> None:
    """A target of a part counts the branches in it alone."""
    model = deep(Transformer, ROWS, lambda name: "blocks.1" in name)
    constraint = DensityConstraint(
        model.get_submodule("blocks.1"),
        0.5,
        measure="params",
        example_inputs=torch.randn(4, 8, 16).double(),
    )
    small = prune(model, ROWS)
    assert small.report.groups["blocks.1 (params)"]["kept"] == 0  # type: ignore[union-attr]
    del constraint


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    y = (x[:, :10] + x[:, 10:20]).argmax(1)
    for step in steps:
        torch.manual_seed(step)
        rows = torch.randint(256, (32,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(target: float, steps: int) -> tuple[nn.Module, Any, DensityConstraint]:
    torch.manual_seed(0)
    x = ROWS.float()
    model = sparsify_(Transformer(), example_inputs=x, depth=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    constraint = DensityConstraint(
        model, target, measure="params", example_inputs=x, steps=steps
    ).attach(optimizer)
    return model, optimizer, constraint


@pytest.mark.usefixtures("one_thread")
def test_a_target_that_only_depth_reaches() -> None:
    target, x = 0.12, ROWS.float()
    plain = sparsify_(Transformer(), example_inputs=x)
    with pytest.raises(ValueError, match="expected a density in"):
        DensityConstraint(plain, target, measure="params", example_inputs=x)
    model, optimizer, constraint = started(target, 200)
    train(model, optimizer, range(200))
    share = float(constraint.densities())
    small: Any = prune(model, x)
    after, before = small.report.params
    assert share == pytest.approx(after / before, abs=1e-6)
    assert 0.7 * target < after / before <= target
    assert small.report.forced == 0
    assert small.report.cuts


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:attach. .* steps are few")
def test_resumed() -> None:
    """A training that is resumed goes on bit-equal, with its gates on branches."""
    model, optimizer, _ = started(0.3, 100)
    train(model, optimizer, range(40))
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, again, _ = started(0.3, 100)
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for one, by in ((model, optimizer), (other, again)):
        train(one, by, range(40, 55))
    for (name, one), two in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "closed", thinned(["0.self_attn", "layers.0.", "1.self_attn", "layers"], 4)
)
def test_a_decoder_generates_the_same(closed: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    ids = {"input_ids": torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))}

    def build() -> nn.Module:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=3)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.5)
        return model

    model: Any = deep(build, ids, lambda name: closed in name)
    small: Any = prune(model, ids)
    assert small.config.num_hidden_layers == len(small.model.layers)
    many = {**ids, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**many, use_cache=False)
    for cache in (True, False):
        assert small.generate(**many, use_cache=cache).equal(tokens)


@pytest.mark.exhaustive
def test_a_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 16, 16).double()

    def build() -> nn.Module:
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
        return timm.models.vision_transformer.VisionTransformer(**sizes, depth=3, num_classes=5)

    model = deep(build, x, lambda name: "blocks.1" in name or "0.attn" in name)
    wanted = expected(model, x, "params")
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.report.params[0] == wanted
    assert len(small.blocks) == 2
