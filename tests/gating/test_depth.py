"""Gates on branches: where sparsify_ puts them, what they do, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast import DensityConstraint, L0Penalty, density, gates, sparsify_
from tests.helpers.branches import ResNet, Transformer, branches, close, with_norms_that_counted

ROWS = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def test_open_gates_change_nothing() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    before = model(ROWS)
    sparsify_(model, example_inputs=ROWS, depth=True, density_init=1.0)
    assert len(branches(model)) == 6
    torch.testing.assert_close(model(ROWS), before, rtol=0, atol=0)


def test_a_gate_multiplies_what_its_branch_adds() -> None:
    torch.manual_seed(0)
    model = with_norms_that_counted(ResNet()).eval()
    x = torch.randn(2, 3, 6, 6)
    sparsify_(model, example_inputs=x, depth=True, density_init=1.0)
    gate = gates(model).layers["blocks.0.bn2.branch"]
    gate.log_alpha.data.fill_(0.3)
    z = gate.evaluation_gates().item()
    assert 0.0 < z < 1.0
    block: Any = model.get_submodule("blocks.0")
    inner = torch.randn(2, 8, 6, 6).relu()
    branch = block.conv2(block.relu(block.bn1(block.conv1(inner))))
    norm = block.bn2
    normed = (branch - norm.running_mean.view(-1, 1, 1)) / (
        norm.running_var.view(-1, 1, 1) + norm.eps
    ).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(inner), (inner + z * normed).relu())


def test_they_are_drawn_with_all_others() -> None:
    model = sparsify_(Transformer(), example_inputs=ROWS, depth=True, skip=False)
    close(model, [], share=0.0)
    draws: list[list[float]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model(ROWS)
        handle = gates(model)
        places = [list(handle.layers).index(name) for name in branches(model)]
        draws.append([handle.board.latest.z[place].item() for place in places])  # type: ignore[union-attr]
    assert draws[0] == draws[1] != draws[2]


def test_the_table_has_them() -> None:
    table = sparsify_(Transformer(1), example_inputs=ROWS, depth=True, dry_run=True)
    rows = {row.name: row for row in table.layers if row.kind == "Branch"}
    assert list(rows) == ["blocks.0.attn.proj.branch", "blocks.0.mlp.2.branch"]
    row = rows["blocks.0.mlp.2.branch"]
    own: Any = Transformer(1).blocks[0]
    assert row.units == sum(p.numel() for part in (own.norm2, own.mlp) for p in part.parameters())
    assert "blocks.0.mlp" in row.reason


def test_layers_that_are_left_out_have_no_branch() -> None:
    model = sparsify_(Transformer(1), example_inputs=ROWS, depth=True, exclude="*.attn.*")
    assert branches(model) == ["blocks.0.mlp.2.branch"]


def test_a_dense_state_loads() -> None:
    model = sparsify_(Transformer(), example_inputs=ROWS, depth=True)
    close(model, branches(model)[:1])
    before = gates(model).layers[branches(model)[0]].log_alpha.clone()
    model.load_state_dict(Transformer().state_dict())
    assert gates(model).layers[branches(model)[0]].log_alpha.equal(before)
    other = sparsify_(Transformer(), example_inputs=ROWS, depth=True)
    other.load_state_dict(model.state_dict())
    assert gates(other).layers[branches(model)[0]].log_alpha.equal(before)


def test_the_papers_density_counts_their_parameters() -> None:
    model = sparsify_(Transformer(1), example_inputs=ROWS, depth=True)
    row = next(row for row in density(model).layers if row.name.endswith("attn.proj.branch"))
    own: Any = Transformer(1).blocks[0]
    assert row.params == sum(p.numel() for m in (own.norm1, own.attn) for p in m.parameters())
    constraint = DensityConstraint(model, 0.5)
    L0Penalty(model, 0.1)
    assert 0.5 < constraint.densities().item() < 1.0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Transformer, {"example_inputs": None}, "depth: got True; expected False without"),
        (Transformer, {"gates": "input"}, "gates: got 'input'; expected 'auto' where depth=True"),
        (Transformer, {"noise": "example"}, "noise: got 'example'; expected 'batch'"),
        (Transformer, {"depth": 2}, "depth: got 2; expected True or False"),
        (lambda: nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2)), {}, "no residual branch"),
    ],
)
def test_refused(model: Any, options: dict[str, Any], message: str) -> None:
    arguments: Any = {"example_inputs": ROWS, "depth": True, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify_(model(), **arguments)
