"""Progressive compaction: smaller in place, the same function, counted against the first size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, Trainer, density, load_pruned, param_groups, prune, sparsify_
from l0fast.data.sets import Data
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning import shrink
from l0fast.pruning.shrink import Idle, Removal, plan_removal, remove_
from l0fast.training.folder import PRUNED, SUMMARY
from tests.helpers.plain_models import Noisy
from tests.helpers.runs import evaluate, quick, small_lenet5, small_mlp, trainer
from tests.helpers.same_run import Stop, assert_same_run
from tests.helpers.thinned import thinned

pytestmark = pytest.mark.usefixtures("one_thread")


BUILD = {"mlp": small_mlp, "lenet": small_lenet5, "own": Noisy}


def prepared(kind: str) -> tuple[nn.Module, tuple[Tensor], dict[str, Tensor]]:
    """A gated model, its example, and half of its gates to drop, which hardly open."""
    torch.manual_seed(1)
    args = (torch.randn(5, 1, 8, 8),)
    model = sparsify_(BUILD[kind](), example_inputs=args, density_init=0.8)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in gated_layers(model).items():
            layer.log_alpha.normal_(1.0, 0.5)
            kept[name] = torch.rand(layer.log_alpha.shape) > 0.5
            kept[name][0] = True
            layer.log_alpha[~kept[name]] = -7.0
    return model.eval(), args, kept


@pytest.mark.parametrize("kind", BUILD)
def test_the_model_gets_smaller_and_computes_the_same(kind: str) -> None:
    model, args, kept = prepared(kind)
    wanted = model(*args)
    before = sum(p.numel() for p in model.parameters())
    layers = gated_layers(model)
    removal, _ = plan_removal(model, Example.of(args), kept)
    assert removal is not None
    assert Removal.from_json(json.loads(json.dumps(removal.as_json()))) == removal
    remove_(model, removal, Example.of(args), False)
    torch.testing.assert_close(model(*args), wanted)
    assert gated_layers(model) == layers  # the same objects
    assert sum(p.numel() for p in model.parameters()) < before
    for name, stay in removal.gates.items():
        assert layers[name].num_gates == len(stay) < len(kept[name])
    model.train()
    model(*args).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", BUILD)
def test_targets_count_against_the_first_size(kind: str) -> None:
    model, args, kept = prepared(kind)
    term = DensityConstraint(model, 0.6)
    before, table = term.densities().item(), density(model)
    small: Any = prune(model, args)
    removal, _ = plan_removal(model, Example.of(args), kept)
    assert removal is not None
    remove_(model, removal, Example.of(args), False)
    again: Any = prune(model, args)
    # What is gone opened with a probability of 0.45 %, or is not read by anybody.
    assert before - 0.2 < term.densities().item() < before
    assert density(model).total.expected == pytest.approx(term.densities().item(), rel=1e-5)
    assert density(model).total.params == table.total.params
    assert again.report.groups["model"]["total"] == small.report.groups["model"]["total"]
    assert again.report.density <= 0.6
    for size in ("params", "macs"):
        assert getattr(again.report, size)[1] == getattr(small.report, size)[1]
        assert getattr(again.report, size)[0] <= getattr(small.report, size)[0]
    torch.testing.assert_close(again.eval()(*args), small.eval()(*args))


def test_the_optimizer_goes_on() -> None:
    """Moments are those of the weights that are left, and the next step is the same for them."""
    model, args, kept = prepared("mlp")
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 1e-2))
    for _ in range(2):
        model(*args).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.get_submodule("fc2")
    old: Any = layer.weight
    moments = optimizer.state[old]["exp_avg"].clone()
    weight = old.detach().clone()
    removal, _ = plan_removal(model, Example.of(args), kept)
    assert removal is not None
    remove_(model, removal, Example.of(args), False, optimizer)
    new: Any = layer.weight
    edit = next(edit for edit in removal.edits if edit.name == "fc2")
    assert edit.inputs is not None
    assert edit.outputs is not None
    rows, columns = torch.tensor(edit.outputs), torch.tensor(edit.inputs)
    assert torch.equal(new, weight[rows][:, columns])
    assert torch.equal(optimizer.state[new]["exp_avg"], moments[rows][:, columns])
    assert old not in optimizer.state
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model(*args).square().mean().backward()
    optimizer.step()


def test_only_what_has_seldom_been_open_for_long_goes() -> None:
    model, _, _ = prepared("mlp")
    idle = Idle(3)
    layers = gated_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.log_alpha.fill_(1.0)
        layers["fc2"].log_alpha[:5] = -7.0
        layers["fc3"].log_alpha.fill_(-7.0)
        layers["fc3"].log_alpha[2] = -6.5
    assert all(bool(mask.all()) for _ in range(2) for mask in idle.count(model).values())
    with torch.no_grad():
        layers["fc2"].log_alpha[1] = 0.0  # once more often: it starts again
    kept = idle.count(model)
    assert (~kept["fc2"]).nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert kept["fc3"].nonzero().flatten().tolist() == [2]  # the likeliest stays
    assert bool(kept["fc1"].all())
    with torch.no_grad():
        layers["fc2"].log_alpha[1] = -7.0
    assert idle.count(model)["fc2"][1]


class Cosine(nn.Module):
    """Closed units of the convolution leave a constant that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cos(self.conv(x)).flatten(1))


def test_what_would_need_more_than_leaving_out_stays() -> None:
    torch.manual_seed(1)
    args = (torch.randn(5, 1, 8, 8),)
    model = sparsify_(Cosine(), gates="output", include="conv", example_inputs=args)
    kept = {"conv": torch.tensor([True, False, True, False, True, True])}
    assert plan_removal(model, Example.of(args), kept) == (None, {"conv"})
    mlp, args, kept = prepared("mlp")
    for name in ("fc2", "fc3"):
        kept[name].fill_(True)
    # The inputs of the first layer arrive in full: it would have to gather.
    assert plan_removal(mlp, Example.of(args), kept) == (None, {"fc1"})
    idle = Idle(1, stuck={"fc1"})
    assert bool(idle.count(mlp)["fc1"].all())  # it is not tried again


@pytest.mark.parametrize(
    ("model", "stops"),
    thinned([("own", (2,)), ("own", (5,)), ("mlp", (1, 2, 3, 4, 5)), ("lenet", (2, 5))], 4),
)
def test_a_training_that_shrinks(
    digits: Data,
    model: str,
    stops: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after some of its epochs, it ends the same; and what it saves loads."""
    monkeypatch.setattr(shrink, "SELDOM", 0.3)

    def one(out: str) -> Trainer:
        torch.manual_seed(5)
        settings = quick(density=0.3, epochs=6, shrink=2, gate_lr=0.1, dual_lr=0.5)
        return Trainer(BUILD[model](), digits, settings, out=tmp_path / out, device="cpu")

    first = one("undisturbed")
    summary = first.fit()
    sizes = [row["params"] for row in first.history]
    assert sizes[0] > sizes[-1] >= summary["params"]
    assert sizes == sorted(sizes, reverse=True)
    assert summary["feasible"] is True
    assert summary["realised_density"] <= 0.3
    dense = BUILD[model]()
    assert summary["dense_params"] == sum(p.numel() for p in dense.parameters())
    small = load_pruned(BUILD[model], tmp_path / "undisturbed" / PRUNED)
    assert sum(p.numel() for p in small.parameters()) == summary["params"]
    assert evaluate(small, digits.test) == summary["test_error_percent"]
    for epoch in stops:

        def stop(row: dict[str, Any], epoch: int = epoch) -> None:
            if row["epoch"] == epoch:
                raise Stop("stopped")

        with pytest.raises(Stop, match="stopped"):
            one("out").fit(resume=True, on_epoch=stop)
    one("out").fit(resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")
    assert (tmp_path / "out" / SUMMARY).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shrink": 0, "density": 0.5},
            "shrink: got 0; expected a whole number >= 1 and <= 2147483647",
        ),
        (
            {"shrink": 1.5, "density": 0.5},
            "shrink: got 1.5; expected a whole number >= 1 and <= 2147483647",
        ),
        ({"shrink": 2}, "shrink: got 2; expected a target or penalty beside it"),
        (
            {"shrink": 2, "density": 0.5, "measure": "macs"},
            "shrink: got 2; expected measure='gates' beside it",
        ),
        (
            {"shrink": 2, "density": 0.5, "select": "best"},
            "shrink: got 2; expected select='last', as the models of earlier epochs are larger",
        ),
    ],
)
def test_bad_settings(digits: Data, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^shrink") as caught:
        trainer(digits, **options)
    assert str(caught.value) == message
