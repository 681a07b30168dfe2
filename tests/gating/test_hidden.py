"""Gates on the hidden width: channels of a residual stream that go, exactly."""

from __future__ import annotations

import copy
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
    prune,
    prune_state_dict,
    save_pruned,
    sparsify_,
)
from l0fast.graph.calls import Example
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.rms_models import NORMS, Decomposed, Language, tokens
from tests.helpers.thinned import thinned, thinned_product

pytestmark = pytest.mark.usefixtures("one_thread")


def gated(hidden: bool = True, **options: Any) -> Any:
    """A model with gates, open and closed by chance, and some between."""
    model: Any = sparsify_(Language(**options), example_inputs=tokens(), hidden=hidden)
    with torch.no_grad():
        for log_alpha in gates(model).parameters():
            log_alpha.normal_(0.0, 2.0)
            log_alpha[:2] = torch.tensor([-6.0, 0.5])
    return model.eval()


def width(model: Any) -> int:
    """How many channels of the stream are open."""
    return int((gates(model).layers["norm"].evaluation_gates() > 0).sum())


@pytest.mark.parametrize(("norm", "tied"), thinned_product(2, NORMS, [True, False]))
def test_closed_channels_are_gone_and_nothing_else_changes(norm: str, tied: bool) -> None:
    model = gated(norm=NORMS[norm], tied=tied, post=norm == "gemma")
    small: Any = prune(model, tokens())
    left = width(model)
    assert 0 < left < 12
    assert small.report.max_error < 1e-12  # in float64
    assert small.report.tier == "merged"
    assert small.embed.weight.shape == small.head.weight.shape == (20, left)
    assert (small.head.weight is small.embed.weight) == tied
    block = small.blocks[0]
    assert [layer.in_features for layer in (*block.qkv, block.gate, block.up)] == [left] * 5
    assert [layer.out_features for layer in (block.out, block.down)] == [left] * 2
    x = tokens(5)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    if norm == "own":
        assert small.norm.variance_epsilon == pytest.approx(1e-2 * 12 / left)


def test_with_all_gates_open_it_computes_what_it_did() -> None:
    model, x = Language().eval(), tokens()
    wanted = model(x)
    sparsify_(model, example_inputs=x, hidden=True, density_init=1.0)
    assert torch.equal(model.eval()(x), wanted)


@pytest.mark.parametrize("measure", thinned(["params", "macs", "memory"], 3))
def test_measures_are_the_pruned_models(measure: str) -> None:
    model, x = gated(blocks=2), tokens()
    with torch.no_grad():
        for log_alpha in gates(model).parameters():
            log_alpha.copy_(torch.where(log_alpha > 0, 30.0, -30.0))
    term = DensityConstraint(model, 0.9, measure=measure, example_inputs=x)
    small: Any = prune(model, x)
    left, full = getattr(small.report, measure)
    if measure == "params":
        assert [left, full] == [
            sum(p.numel() for p in one.parameters()) for one in (small, Language(blocks=2))
        ]
    assert term.densities().item() == pytest.approx(left / full, abs=1e-4)
    target = 0.4 if measure == "memory" else 0.2
    held: Any = prune(model, x, target, measure=measure)
    assert target / 2 < getattr(held.report, measure)[0] / full <= target


def test_an_undecided_channel_counts_by_its_probability() -> None:
    model = gated()
    for log_alpha in gates(model).parameters():
        with torch.no_grad():
            log_alpha.copy_(torch.randn(12) if log_alpha.numel() == 12 else torch.tensor(30.0))
    term = DensityConstraint(model, 0.9, measure="params", example_inputs=tokens())
    each = 3 + 20 + 3 * 8 + 8 + 1 + 3 * 10  # norms, embedding and head, attention, MLP
    full = sum(parameter.numel() for parameter in Language().parameters())
    probability = gates(model).layers["norm"].open_probability().detach()
    expected = full - each * float((1 - probability).sum())
    assert term.densities().item() == pytest.approx(expected / full, rel=1e-5)


def test_widths_come_in_multiples() -> None:
    model = gated()
    with torch.no_grad():  # 6 of 12: a block that is partly open goes
        gates(model).layers["norm"].log_alpha.copy_(torch.tensor([3.0, -6.0] * 6))
    small: Any = prune(model, tokens(), round_to=4)
    assert small.report.tier == "merged"
    assert small.embed.embedding_dim == 4
    # Of a first block that is partly open, what is closed goes: a norm counts no zeros.
    small = prune(model, tokens(), round_to=8)
    assert small.report.tier == "merged"
    assert small.embed.embedding_dim == 6


def test_a_pruned_model_is_saved_and_another_state_follows(tmp_path: Path) -> None:
    model, x = gated(post=True), tokens()
    small: Any = prune(model, x)
    save_pruned(small, tmp_path / "small.safetensors")
    loaded: Any = load_pruned(lambda: Language(post=True), tmp_path / "small.safetensors")
    assert torch.equal(loaded(x), small(x))
    assert loaded.head.weight is loaded.embed.weight
    again = prune_state_dict(model.state_dict(), model, small)
    assert all(torch.equal(again[key], value) for key, value in small.state_dict().items())


def test_channels_go_during_training() -> None:
    model, x = gated(), tokens()
    kept = {
        name: (layer.evaluation_gates() > 0).cpu() for name, layer in gates(model).layers.items()
    }
    for name, layer in gates(model).layers.items():
        with torch.no_grad():
            layer.log_alpha[kept[name]] = 9.0
            if name.endswith("norm"):  # closed now, and may open again
                kept[name][0], layer.log_alpha[0] = True, -3.0
    wanted, left = model(x), width(model) + 1
    removal, stuck = plan_removal(model, Example.of(x), kept)
    assert removal is not None
    assert not stuck
    optimizer = torch.optim.Adam(model.parameters())
    remove_(model, removal, Example.of(x), False, optimizer)
    torch.testing.assert_close(model(x), wanted)
    assert model.embed.embedding_dim == gates(model).layers["norm"].num_gates == left
    assert model.head.weight is model.embed.weight
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert all(id(one) in held for one in model.parameters())


def trained(model: Any, steps: range, saved: Any = None) -> Any:
    """(model, state) after some steps of one training of 8."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constraint = DensityConstraint(
        model, 0.6, measure="params", example_inputs=tokens(), steps=8
    ).attach(optimizer)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    model.train()
    for step in steps:
        torch.manual_seed(step)
        x = tokens(4)
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return constraint, copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # it is a short training
def test_a_training_ends_at_its_target_and_resumes() -> None:
    whole = sparsify_(Language(), example_inputs=tokens(), hidden=True)
    start = copy.deepcopy(whole)
    constraint, (wanted, _) = trained(whole, range(8))
    small: Any = prune(whole, tokens(), constraint)
    assert small.report.params[0] / small.report.params[1] <= 0.6
    assert small.embed.embedding_dim < 12
    first = copy.deepcopy(start)
    _, saved = trained(first, range(5))
    _, (resumed, _) = trained(start, range(5, 8), saved)
    assert wanted.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in wanted.items())


CASES: dict[str, tuple[Any, str]] = {
    "a layer norm": (lambda: Language(nn.LayerNorm), "takes the mean of all channels"),
    "one layer norm": (lambda: Language(head=nn.LayerNorm(12)), "only go together"),
    "a tied head behind another layer": (
        lambda: Language(head=nn.Sequential(Decomposed(12), nn.Linear(12, 12))),
        "'head' reads the same stream",
    ),
    "no last norm": (lambda: Language(head=nn.Identity()), "'head' reads the same stream"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_that_cannot_lose_channels_is_left_alone(case: str) -> None:
    build, reason = CASES[case]
    with pytest.raises(ValueError, match=f"hidden: got True; expected False .*{reason}"):
        sparsify_(build(), example_inputs=tokens(), hidden=True)


def test_options_that_do_not_go_with_it_are_refused() -> None:
    for options, words in (
        ({}, "example_inputs: got None"),
        ({"example_inputs": tokens(), "gates": "input"}, "gates: got 'input'"),
        ({"example_inputs": tokens(), "noise": "example"}, "noise: got 'example'"),
    ):
        with pytest.raises(ValueError, match=words):
            sparsify_(Language(Decomposed), hidden=True, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="hidden: got 1; expected True or False"):
        sparsify_(Language(), hidden=1)  # type: ignore[arg-type]
    table = sparsify_(Language(), example_inputs=tokens(), hidden=True, dry_run=True)
    rows = {row.name: row for row in table.layers}
    assert rows["blocks.0.norm"].num_gates == rows["norm"].num_gates == 12
    assert "'blocks.0.norm', which reads the same stream" in rows["norm"].reason
    model = sparsify_(Language(), example_inputs=tokens(), hidden=True)
    each = {gates(model).layers[name].group_size for name in ("norm", "blocks.0.norm")}
    assert each == {1 + (20 + 3 * 8 + 8 + 1 + 3 * 10) // 3}  # a channel's parameters, by norm
    assert rows["head"].reason == "what it reads has gates, in the norms"


class Added(nn.Module):
    """A parameter is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.place = Language(), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        stream = inner.blocks[0](inner.embed(x) + self.place)
        return inner.head(inner.norm(stream))


def test_a_parameter_that_is_added_gets_smaller_too() -> None:
    model: Any = sparsify_(Added(), example_inputs=tokens(), hidden=True)
    with torch.no_grad():
        gates(model).layers["inner.norm"].log_alpha.copy_(torch.tensor([3.0, -6.0] * 6))
    small: Any = prune(model.eval(), tokens())
    assert small.report.max_error < 1e-12
    assert small.place.shape == (6,)
    assert small.inner.embed.embedding_dim == 6
