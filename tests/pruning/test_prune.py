"""prune: the pruned model computes what the gated one does, is smaller, and is plain PyTorch."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import DensityConstraint, L0Linear, prune, sparsify_
from l0fast.graph import capture, channels
from l0fast.graph.compare import relative_error
from l0fast.layers.handle import gated_layers
from l0fast.measures.groups import Group
from l0fast.measures.measure import GateMeasure
from l0fast.pruning.choose import Budget, choose
from l0fast.pruning.edits import Edit, edited, gather, scatter
from l0fast.pruning.report import Report
from l0fast.training.models import mlp
from tests import ROOT
from tests.helpers.thinned import thinned_product


def with_gates(model: Any, mean: float = -1.0, std: float = 1.5, **options: Any) -> Any:
    """The model with gates of every kind in each layer: closed, open and between."""
    model = sparsify_(model.double(), **options)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_(mean, std)
            layer.log_alpha.view(-1)[:2] = torch.tensor([5.0, -5.0])
    return model.eval()


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.evaluation_gates() for name, layer in gated_layers(model).items()}


def with_top_gates(model: nn.Module, small: Any) -> nn.Module:
    """The gated model with only the likeliest `gates_open` gates of each layer left open."""
    model = copy.deepcopy(model)
    layers = gated_layers(model)
    for site in small.report.sites:
        if site["gates"] is not None:
            log_alpha = layers[site["name"]].log_alpha.data.view(-1)
            order = log_alpha.argsort(descending=True, stable=True)
            log_alpha[order[site["gates_open"] :]] = -1e4
    return model


def assert_same(small: nn.Module, model: nn.Module, *inputs: Any) -> None:
    """Equal to 1e-10 of the largest output, in float64."""
    with torch.no_grad():
        got, expected = small(*inputs), model(*inputs)
    assert expected.dtype == torch.float64
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of the layer, or of the one that a gather or scatter stands around."""
    if isinstance(layer, nn.Sequential):
        layer = layer.get_submodule("layer")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def budget(name: str, of: tuple[str, ...], target: float, layers: dict[str, Any]) -> Budget:
    return Budget(name, of, target, GateMeasure(layers, [Group(of)]))


def site(small: Any, name: str) -> dict[str, Any]:
    return next(row for row in small.report.sites if row["name"] == name)


# --- the two published models ---------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 0.33, 0.05])
def test_mlp(target: float | None) -> None:
    model = with_gates(mlp(784, 10))
    x = torch.randn(5, 784, dtype=torch.float64)
    small: Any = prune(model, x, target)
    reference = with_top_gates(model, small)
    z = gates_of(reference)
    left = {name: int((gate > 0).sum()) for name, gate in z.items()}
    if target is None:
        assert all(bool(((gate > 0) & (gate < 1)).any()) for gate in z.values())  # fractional ones
    assert all(0 < left[name] < len(z[name]) for name in z)
    assert_same(small, reference, x)
    assert sizes(small.fc1) == (left["fc2"], left["fc1"])
    assert sizes(small.fc2) == (left["fc3"], left["fc2"])
    assert sizes(small.fc3) == (10, left["fc3"])
    assert isinstance(small.fc1, nn.Sequential)  # the pixels are gathered; nothing else is
    assert [type(small.fc2), type(small.fc3)] == [nn.Linear, nn.Linear]
    assert small.report.architecture == f"{left['fc1']}-{left['fc2']}-{left['fc3']}"
    assert small.report.tier == "merged"
    assert small.report.notes == []
    assert [s["status"] for s in small.report.sites] == ["compacted", "removed", "removed"]
    dense = sum((left[a] + 1) * b for a, b in (("fc1", left["fc2"]), ("fc2", left["fc3"])))
    dense += (left["fc3"] + 1) * 10
    assert small.report.params == [dense, 266610]
    assert sum(p.numel() for p in small.parameters()) == dense
    products = left["fc1"] * left["fc2"] + left["fc2"] * left["fc3"] + left["fc3"] * 10
    assert small.report.macs == [5 * products, 5 * 266200]


@pytest.mark.parametrize("target", [None, 0.1])
def test_lenet(target: float | None) -> None:
    model = with_gates(plain.LeNet())
    with torch.no_grad():
        model.fc1.log_alpha[16 * 7 : 16 * 9] = -9.0  # channels 7 and 8: open, and read by nobody
        model.conv2.log_alpha[7:9] = 9.0
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    small: Any = prune(model, x, target)
    reference = with_top_gates(model, small)
    z = {name: gate > 0 for name, gate in gates_of(reference).items()}
    assert_same(small, reference, x)
    read = z["fc1"].view(50, 16).any(1)
    conv2 = z["conv2"] & read
    assert 0 < int(conv2.sum()) < int(z["conv2"].sum())
    fc1 = int((z["fc1"].view(50, 16) & z["conv2"][:, None]).sum())
    conv1, fc2 = int(z["conv1"].sum()), int(z["fc2"].sum())
    assert sizes(small.conv1) == (conv1, 1)
    assert sizes(small.conv2) == (int(conv2.sum()), conv1)
    assert sizes(small.fc1) == (fc2, fc1)
    assert sizes(small.fc2) == (10, fc2)
    assert small.report.architecture == f"{conv1}-{int(conv2.sum())}-{fc1}-{fc2}"
    assert [type(small.conv1), type(small.conv2), type(small.fc2)] == [
        nn.Conv2d,
        nn.Conv2d,
        nn.Linear,
    ]
    assert small.fc1.gather.index.numel() == fc1
    # Of a channel that is there, positions may be closed; of one that is not, none arrives.
    assert int(small.fc1.gather.index.max()) < 16 * int(conv2.sum())


def test_open_gates_change_nothing() -> None:
    model = sparsify_(plain.LeNet(), density_init=1.0).eval()
    x = torch.randn(2, 1, 28, 28)
    small: Any = prune(model, x)
    assert small.report.architecture == "20-50-800-500"
    assert small.report.layers == []
    assert {s["status"] for s in small.report.sites} == {"kept"}
    assert {s["reason"] for s in small.report.sites} == {"all gates are open"}
    dense = plain.LeNet().eval()
    dense.load_state_dict(small.state_dict())
    assert str(dense) == str(small)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert torch.equal(dense(x), model(x))


def test_a_closed_layer_keeps_its_likeliest_unit() -> None:
    model = with_gates(mlp(784, 10))
    with torch.no_grad():
        model.fc2.log_alpha.fill_(-5.0)
        model.fc2.log_alpha[17] = -4.0
    x = torch.randn(2, 784, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert sizes(small.fc1)[0] == sizes(small.fc2)[1] == 1
    assert site(small, "fc2")["gates_open"] == 1
    assert site(small, "fc2")["forced"] == 0
    assert small.report.layers[0]["outputs"] == [17]
    assert not small.fc2.weight.any()
    assert small.report.collapsed == ["fc2"]


@pytest.mark.parametrize("gates", ["input", "output", "weight"])
def test_collapsed_layers_are_named(gates: str) -> None:
    """Also one of a single unit, whose gate is kept and closed; not one with a gate left open."""
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 1), nn.Linear(1, 2)]
    model: Any = nn.Sequential(*layers)
    model = sparsify_(model.double(), gates=gates, exclude="4").eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    whole: Any = prune(model, x)
    assert whole.report.collapsed == []
    assert "collapsed" not in str(whole.report)
    with torch.no_grad():
        for index in (2, 3):
            model[index].log_alpha.fill_(-9.0)
        model[0].log_alpha.view(-1)[1:] = -9.0
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.collapsed == ["2", "3"]
    for row in small.report.sites:
        collapsed = "collapsed: all its gates are closed" in row["reason"]
        assert collapsed is (row["name"] in ("2", "3"))
        assert ("one unit of zeros stays" in row["reason"]) is (collapsed and gates != "weight")
        assert "all gates are open" not in row["reason"]
    line = "collapsed: all gates of 2, 3 are closed, nothing passes through"
    assert line in str(small.report).splitlines()


def test_a_closed_conv_keeps_one_channel_of_zeros() -> None:
    model = with_gates(plain.small_lenet())
    with torch.no_grad():
        model.conv2.log_alpha.fill_(-5.0)
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert sizes(small.conv2)[0] == 1
    assert sizes(small.fc1)[1] >= 1


def test_a_layer_whose_open_units_nobody_reads_keeps_one() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    sparsify_(model.double(), include="0", gates="output")
    sparsify_(model, include="2", gates="input")
    with torch.no_grad():
        model[0].log_alpha.copy_(torch.tensor([9.0, 9, 9, -9, -9, -9]))
        model[2].log_alpha.copy_(torch.tensor([-9.0, -9, -9, 9, 9, 9]))
    x = torch.randn(7, 4, dtype=torch.float64)
    small: Any = prune(model.eval(), x)
    assert_same(small, model, x)
    assert sizes(small[0]) == (1, 4)
    assert sizes(small[2]) == (3, 1)


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "total", "most"), [(0.29, 100, 29), (0.1, 30, 3), (0.3, 10, 3), (1.0, 7, 7)]
)
def test_decimal_targets_are_met_to_the_unit(target: float, total: int, most: int) -> None:
    """target * total in floats would be off by one either way: 0.29 * 100 < 29, 0.1 * 30 > 3."""
    model = sparsify_(nn.Sequential(nn.Linear(total, 1)), density_init=1.0)
    layers = gated_layers(model)
    assert int(choose(layers, [budget("all", ("0",), target, layers)])["0"].sum()) == most


@settings(max_examples=60)
@given(st.data())
def test_budgets_hold_and_are_used(data: st.DataObject) -> None:
    gates = data.draw(st.sampled_from(["input", "output", "weight"]))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    sparsify_(model, gates=gates)
    layers = gated_layers(model)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    for layer in layers.values():
        with torch.no_grad():
            # Coarse numbers, so that some are equal.
            layer.log_alpha.normal_(data.draw(st.integers(-3, 3)), 2.0).round_()
    names = tuple(layers)
    least = 0 if gates == "weight" else sum(layer.group_size for layer in layers.values())
    total = sum(layer.num_gates * layer.group_size for layer in layers.values())
    target = data.draw(st.floats(max(least / total, 0.01), 1.0))
    budgets = [budget("all", names, target, layers)]
    if gates == "weight" and data.draw(st.booleans()):  # and another that overlaps it
        budgets.append(budget("first", names[:1], data.draw(st.floats(0.01, 1.0)), layers))
    kept = choose(layers, budgets)

    for one in budgets:
        assert one.share(kept) <= one.target
    for name, layer in layers.items():
        is_open = layer.evaluation_gates() > 0
        wanted = kept[name] & is_open
        assert gates == "weight" or int(kept[name].sum()) >= 1
        if not bool((kept[name] == wanted).all()):  # only the one unit that a layer must keep
            assert gates != "weight"
            assert int(kept[name].sum()) == 1
        left, out = layer.log_alpha[kept[name]], layer.log_alpha[~kept[name] & is_open]
        assert not len(out) or not len(left) or left.min() >= out.max()
        if len(out):  # what was forced closed did not fit
            fits = [
                (one.measure.spent(kept)[0] + layer.group_size) / one.measure.totals[0]
                <= one.target
                for one in budgets
                if name in one.layers
            ]
            assert not all(fits)


def test_forced_gates_are_counted() -> None:
    model = with_gates(mlp(784, 10))
    was_open = {name: int((z > 0).sum()) for name, z in gates_of(model).items()}
    x = torch.randn(1, 784, dtype=torch.float64)
    free: Any = prune(model, x)
    assert free.report.forced == 0
    report: Any = prune(model, x, 0.2).report
    for row in report.sites:
        assert row["forced"] == was_open[row["name"]] - row["gates_open"] > 0
    assert report.forced == sum(row["forced"] for row in report.sites)
    kept = sum(
        row["gates_open"] * size for row, size in zip(report.sites, (300, 100, 10), strict=True)
    )
    assert report.density == kept / 266200 <= 0.2
    assert report.groups["model"]["kept"] == kept
    assert kept > 0.2 * 266200 - 10  # nothing more fits


def test_targets_come_from_the_constraint() -> None:
    model = with_gates(mlp(784, 10))
    x = torch.randn(1, 784, dtype=torch.float64)
    free: Any = prune(model, x)
    assert free.report.groups == {}
    _held = DensityConstraint(model, {"fc1": 0.1, "fc[23]": 0.5})
    report: Any = prune(model, x).report
    assert sorted(group["target"] for group in report.groups.values()) == [0.1, 0.5]
    for group in report.groups.values():
        assert group["target"] - 0.01 < group["density"] <= group["target"]
    override: Any = prune(model, x, {"fc1": 0.3}).report
    assert override.groups["fc1"]["layers"] == ["fc1"]
    assert 0.29 < override.groups["fc1"]["density"] <= 0.3
    assert override.sites[1]["forced"] == 0
    _beside = DensityConstraint(model, 0.05)  # beside the other two
    again: Any = prune(model, x)
    report = again.report
    assert len(report.groups) == 3
    assert all(group["density"] <= group["target"] for group in report.groups.values())
    assert report.density <= 0.05


def test_targets_of_a_part_and_of_a_wrapper_hold() -> None:
    x = torch.randn(1, 784, dtype=torch.float64)
    inner = with_gates(mlp(784, 10))
    _held = DensityConstraint(inner, 0.1)
    outer = nn.Sequential(OrderedDict(net=inner, end=nn.Tanh())).eval()
    small: Any = prune(outer, x)
    assert small.report.density <= 0.1
    assert not any("l0fast" in key for module in small.modules() for key in vars(module))
    wrapped: Any = torch.compile(with_gates(mlp(784, 10)), backend="eager")
    _beside = DensityConstraint(wrapped, 0.1)
    inside: Any = prune(wrapped, x)
    assert inside.__class__ is nn.Sequential
    assert inside.report.density <= 0.1


# --- the result is plain --------------------------------------------------------------------------

UNPICKLE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("l0fast", "l0fast_kernels"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
for path in sys.argv[1:]:
    small, x, y = torch.load(path, weights_only=False)
    assert torch.equal(small(x), y), path
try:
    import l0fast
except ImportError:
    print("loaded", len(sys.argv) - 1, "without l0fast")
"""


@pytest.fixture(scope="module")
def everything() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """Pruned models with every kind of part: gather, scatter, scale, plain."""
    image, row = torch.randn(2, 1, 28, 28).double(), torch.randn(4, 6).double()
    tokens = torch.arange(10).view(2, 5)
    models = {
        "mlp": (with_gates(mlp(784, 10)), (torch.randn(3, 784).double(),)),
        "lenet": (with_gates(plain.small_lenet()), (image,)),
        "twice": (with_gates(plain.CalledTwice(), gates="output"), (row,)),
        "tied": (with_gates(plain.Tied(), gates="output"), (tokens,)),
        "weight": (with_gates(plain.small_lenet(), gates="weight"), (image,)),
    }
    return {name: (prune(model, x), x) for name, (model, x) in models.items()}


def test_nothing_of_ours_is_inside(everything: Any, tmp_path: Path) -> None:
    paths: list[str] = []
    for name, (small, inputs) in everything.items():
        for module in small.modules():
            assert not type(module).__module__.startswith("l0fast"), name
            if type(module) in capture.LAYERS:
                fresh = nn.Linear(1, 1) if type(module) is nn.Linear else nn.Conv2d(1, 1, 1)
                assert set(vars(module)) == set(vars(fresh))
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                assert not hooks
        path = tmp_path / f"{name}.pt"
        with torch.no_grad():
            torch.save((small, inputs[0], small(*inputs)), path)
        assert b"l0fast" not in path.read_bytes()
        paths.append(str(path))
    code = [sys.executable, "-W", "error", "-c", UNPICKLE, *paths]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"loaded {len(paths)} without l0fast", done.stderr


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "export", "compile"])
def test_the_result_copies_compiles_and_exports(how: str, everything: Any) -> None:
    named = everything if how in ("deepcopy", "pickle") else ("lenet", "twice")
    for name in named:
        small, inputs = everything[name]
        again: Any
        if how == "deepcopy":
            again = copy.deepcopy(small)
        elif how == "pickle":
            again = pickle.loads(pickle.dumps(small))
        elif how == "export":
            again = torch.export.export(small, inputs, strict=True).module()
        else:
            torch._dynamo.reset()
            again = torch.compile(small, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(again(*inputs), small(*inputs), rtol=1e-12, atol=1e-12)
        if how in ("deepcopy", "pickle"):
            assert again.report == small.report, name
            assert again.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_gather_and_scatter_take_any_batch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(gather(torch.tensor([1, 3]), -1)(x), x[..., [1, 3]])
    y = scatter(torch.tensor([0, 2, 3, 6]), 8, -1)(x)
    assert torch.equal(y[..., [0, 2, 3, 6]], x)
    assert not y[..., [1, 4, 5, 7]].any()


def test_gather_and_scatter_along_channels() -> None:
    for x in (torch.randn(2, 3, 5, 4), torch.randn(3, 5, 4)):
        assert torch.equal(gather(torch.tensor([2]), -3)(x), x[..., 2:, :, :])
        y = scatter(torch.tensor([1, 2, 4]), 6, -3)(x)
        assert torch.equal(y[..., [1, 2, 4], :, :], x)
        assert not y[..., [0, 3, 5], :, :].any()


def test_an_edit_leaves_its_layer_and_keeps_the_layout() -> None:
    layer: Any = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    before = copy.deepcopy(layer.state_dict())
    small: Any = edited(layer, Edit("conv", "Conv2d", (8, 6), (0, 3, 5), (1, 2)))
    assert small.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small.weight, layer.weight[[1, 2]][:, [0, 3, 5]])
    assert torch.equal(small.bias, layer.bias[[1, 2]])
    assert (small.in_channels, small.out_channels) == (3, 2)
    assert (layer.in_channels, layer.out_channels) == (8, 6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    plain_layout: Any = edited(nn.Conv2d(8, 6, 3), Edit("conv", "Conv2d", (8, 6), (0, 3, 5)))
    assert plain_layout.weight.is_contiguous()


def test_training_goes_on_after_pruning() -> None:
    model = with_gates(plain.small_lenet())
    model.fc2.weight.requires_grad_(False)
    model.conv2.bias.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    small: Any = prune(model.train(), torch.randn(2, 1, 28, 28, dtype=torch.float64))
    assert all(module.training for module in small.modules())
    assert not small.fc2.weight.requires_grad
    assert not small.conv2.bias.requires_grad
    assert small.conv2.weight.requires_grad
    assert all(p.grad is None for p in small.parameters())
    small(torch.randn(2, 1, 28, 28, dtype=torch.float64)).sum().backward()
    assert small.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_and_mode_are_the_users(dtype: torch.dtype) -> None:
    model = with_gates(plain.small_lenet())
    model.to(dtype).train()
    model.fc1.eval()
    x = torch.randn(2, 1, 28, 28, dtype=dtype)
    small: Any = prune(model, x)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small.training
    assert not small.fc1.training
    assert not small.fc1.layer.training
    assert small.report.tolerance == 1e-10  # proven in float64 all the same
    expected = model.eval()(x).double()
    error = (small.eval()(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_the_model_is_not_touched() -> None:
    model = with_gates(plain.small_lenet()).train()
    _held = DensityConstraint(model, 0.2)
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    model(x).sum().backward()
    hooks = dict(model._forward_pre_hooks), dict(model._forward_hooks)
    ids = {name: (id(p), p._version, id(p.grad)) for name, p in model.named_parameters()}
    modules = {name: (id(m), m.training, set(vars(m))) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    example, noise = x.clone(), torch.get_rng_state()
    prune(model, x)
    prune(model, x, 0.05)
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch.equal(x, example)
    assert (dict(model._forward_pre_hooks), dict(model._forward_hooks)) == hooks
    assert {n: (id(p), p._version, id(p.grad)) for n, p in model.named_parameters()} == ids
    assert {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()} == modules
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- other models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "gates"),
    thinned_product(2, [nn.Sigmoid(), nn.Softplus(), nn.ReLU(), nn.GELU()], ["input", "output"]),
)
def test_activations(activation: nn.Module, gates: str) -> None:
    model = with_gates(
        nn.Sequential(nn.Linear(5, 16), activation, nn.Linear(16, 12), nn.Linear(12, 3)),
        gates=gates,
        include=["0", "2", "3"],
    )
    x = torch.randn(6, 5, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    opened = int((gates_of(model)["2" if gates == "input" else "0"] > 0).sum())
    assert opened < 16
    assert sizes(small[0])[0] == opened
    assert sizes(small[2])[1] == opened
    # A closed unit is f(0) where it is read.
    constant = gates == "output" and bool(float(activation(torch.zeros(()))))
    assert small.report.folded == (["2"] if constant else [])
    assert ("its bias holds what" in site(small, "2")["reason"]) == constant


def conv_case(dims: int, **options: Any) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    return nn.Sequential(
        conv(3, 12, 3, **options),
        nn.ReLU(),
        pool(2, padding=1),
        conv(12, 10, 2, bias=False),
        nn.LeakyReLU(0.1, inplace=True),
        average(2),
        nn.Flatten(),
        nn.Linear(10 * 2**dims, 4),
    )


@pytest.mark.parametrize(
    ("case", "gates"),
    thinned_product(
        2,
        [
            (1, {}),
            (2, {}),
            (3, {}),
            (2, {"padding": 1, "stride": 2}),
            (1, {"padding": "same"}),
            (2, {"padding": 2, "padding_mode": "circular"}),
            (3, {"padding": 1, "padding_mode": "replicate", "dilation": 2}),
        ],
        ["auto", "input"],
    ),
)
def test_convolutions(case: tuple[int, dict[str, Any]], gates: str) -> None:
    dims, options = case
    model = with_gates(conv_case(dims, **options), gates=gates)
    x = torch.randn(2, 3, *[8] * dims, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.tier == "merged"
    z = {name: gate > 0 for name, gate in gates_of(model).items()}
    if gates == "input":
        assert sizes(small[0]) == (int(z["3"].sum()), int(z["0"].sum()))
    else:
        assert sizes(small[0]) == (int(z["0"].sum()), 3)
        assert sizes(small[3])[1] == int(z["0"].sum())


@pytest.mark.parametrize("gates", ["input", "output"])
def test_an_unbatched_convolution(gates: str) -> None:
    model = with_gates(
        nn.Sequential(nn.Conv2d(3, 9, 3), nn.Tanh(), nn.Conv2d(9, 4, 3)), gates=gates
    )
    x = torch.randn(3, 8, 8, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert_same(small, model, x[None])
    assert sizes(small[0])[0] < 9


@pytest.mark.parametrize("gates", ["input", "output"])
@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_convolutions_lose_whole_groups(gates: str, groups: int) -> None:
    model = with_gates(
        nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.Conv2d(6, 12, 3, groups=groups), nn.ReLU(), nn.Conv2d(12, 3, 3)
        ),
        include="[13]",
        gates=gates,
    )
    with torch.no_grad():  # the last group is closed behind the convolution, or in it
        layer = model[3] if gates == "input" else model[1]
        layer.log_alpha[-12 // groups :] = -9.0
    x = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    z = (layer.evaluation_gates() > 0).view(groups, -1).any(1)
    left = int(z.sum())
    assert small[1].groups == left < groups
    assert sizes(small[1]) == (12 // groups * left, 6 // groups)
    assert sizes(small[0])[0] == small[1].in_channels == 6 // groups * left
    assert site(small, "1")["status"] == "removed"
    assert f"{groups} groups" in site(small, "1")["reason"]


def test_without_a_graph_a_grouped_convolution_is_kept() -> None:
    class Secret(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum().item() > 0 else x

    model = with_gates(Secret())
    x = torch.rand(2, 4, 3, 3, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert site(small, "conv")["status"] == "kept"
    assert "2 groups" in site(small, "conv")["reason"]


def test_a_norm_shrinks_with_its_channels() -> None:
    model: Any = with_gates(
        nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 3, 3), nn.BatchNorm2d(3, affine=False),
        ),
        include="3",
        gates="input",
    )  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.num_batches_tracked.fill_(7)
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    kept = (gates_of(model)["3"] > 0).nonzero().flatten()
    assert sizes(small[0]) == (len(kept), 2)
    assert small[1].num_features == len(kept) < 8
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(small[1], name), getattr(model[1], name)[kept])
    assert small[1].num_batches_tracked == 7
    assert small[4].num_features == 3
    row = site(small, "1")
    assert (row["kind"], row["gates"], row["status"]) == ("BatchNorm2d", None, "removed")


@pytest.mark.parametrize(
    ("last", "folds"),
    [
        ({}, True),
        ({"padding": 1}, False),  # a constant is none at the borders
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
        ({"padding": "valid"}, True),
        ({"bias": False}, False),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_norm_makes_of_zeros_goes_into_the_next_bias(
    last: Any, folds: bool, inplace: bool
) -> None:
    layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.Conv2d(8, 3, 3, **last)
    model: Any = with_gates(nn.Sequential(*layers), include="0", gates="output")
    model[1].running_mean[:4] = -1.0  # closed channels: 1 / sqrt(1 + eps) here, 0 there
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.notes == []
    z = gates_of(model)["0"] > 0
    assert 0 < z[:4].sum() < 4
    if folds:
        assert small[1].num_features == small[0].out_channels == int(z.sum())
        assert small.report.folded == ["3"]
        assert small[3].bias is not model[3].bias
    else:
        assert small[1].num_features == 4 + int(z[4:].sum())
        assert small.report.folded == []


def test_what_folds_is_reckoned_as_gone() -> None:
    layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Sigmoid()
    model: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    nn.init.normal_(model[1].bias)
    model = with_gates(model, include=["0", "3"], gates="output")
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    constraint = DensityConstraint(model, target=0.9, measure="params", example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.copy_(torch.where(layer.log_alpha > 0, 60.0, -60.0))
    small: Any = prune(model, x)
    assert small.report.folded == ["3", "7"]
    after, before = small.report.params
    assert float(constraint.densities().detach()) == pytest.approx(after / before, rel=1e-12)


class NormAct(nn.BatchNorm2d):
    """A batch norm that brings its activation along (as in timm)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.1, self.eps)
        return F.silu(x)


class Unusual(nn.Module):
    """Transpositions and casts by their other names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), NormAct(8)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).mean((2, 3)).type_as(x)
        return self.two(torch.sigmoid(self.one(y)).unsqueeze(-1).mT.swapaxes(1, 2).squeeze(-1))


def test_norms_with_activations_and_ops_by_other_names() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model: Any = Unusual()
    model.norm.running_mean.normal_()
    nn.init.normal_(model.norm.bias)
    model = with_gates(model, example_inputs=x)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.notes == []
    assert small.one.in_features == small.norm.num_features == small.conv.out_channels < 8
    assert small.two.in_features == small.one.out_features < 6
    assert type(small.norm) is NormAct


class Stale(nn.Module):
    """A constant that is overwritten in place while another view of it is still read."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        other = h.view(-1, 8) if self.view else h
        return self.one(torch.sigmoid_(h)) + self.two(other)


@pytest.mark.parametrize("view", [True, False])
def test_a_constant_that_is_overwritten_is_not_what_it_was(view: bool) -> None:
    model: Any = with_gates(Stale(view), include="first", gates="output")
    x = torch.randn(6, 4, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.notes == []  # nothing had to be undone


def test_pooled_constants_reach_the_last_bias() -> None:
    layers = nn.Conv2d(2, 8, 3), nn.Sigmoid(), nn.MaxPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1)
    model: Any = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    model = with_gates(model, include="0", gates="output")
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.folded == ["5"]
    assert small[5].in_features == small[0].out_channels < 8
    # With zeros around it, an average is no constant.
    layers = nn.Conv2d(2, 8, 3), nn.Sigmoid(), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    small = prune(with_gates(model, include="0", gates="output"), x)
    assert small.report.folded == []


def test_nested_modules() -> None:
    block = nn.Sequential(OrderedDict(up=nn.Linear(8, 32), act=nn.GELU(), down=nn.Linear(32, 8)))
    model = with_gates(nn.Sequential(OrderedDict(a=block, b=nn.Sequential(copy.deepcopy(block)))))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    z = gates_of(model)
    assert sizes(small.b[0].up)[0] == sizes(small.b[0].down)[1] == int((z["b.0.down"] > 0).sum())
    assert type(small.a.down) is type(small.b[0].down) is nn.Linear
    assert sizes(small.a.down)[0] == int((z["b.0.up"] > 0).sum())


class WrittenOut(plain.LeNet):
    """The flattened size is written in the forward, and nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv2(x)), 2)
        return self.fc2(nn.functional.relu(self.fc1(x.view(-1, 160))))


def test_a_size_written_out_stops_at_the_view() -> None:
    model = with_gates(WrittenOut(6, 10, 30))
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.tier == "merged except across reshapes"
    anew, undone = small.report.notes
    assert anew.startswith("the forward of the model itself cannot be written again")
    assert undone.startswith("merged: undone")
    z = {name: int((gate > 0).sum()) for name, gate in gates_of(model).items()}
    assert type(small.conv1) is nn.Conv2d
    rows = int((gates_of(model)["conv2"] > 0).logical_and(
        (gates_of(model)["fc1"] > 0).view(10, 16).any(1)).sum())  # fmt: skip
    assert sizes(small.conv2) == (rows, z["conv1"])
    assert "aten::view" in site(small, "conv2")["reason"]
    assert site(small, "conv2")["status"] == "compacted"
    assert site(small, "conv1")["status"] == "removed"
    assert small.report.attributes == []


def test_an_attribute_follows_its_size() -> None:
    model = with_gates(plain.HardCoded(6, 10, 30))
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.tier == "merged"
    assert small.report.notes == []
    left = sizes(small.conv2)[0]
    assert small.second == left < model.second == 10
    patch = {"name": "", "kind": "HardCoded", "attribute": "second", "value": [left, 10]}
    assert small.report.attributes == [patch]
    assert f"second: {left} instead of 10" in str(small.report)


@pytest.mark.parametrize("gates", ["input", "output"])
def test_a_layer_called_twice(gates: str) -> None:
    model = with_gates(plain.CalledTwice(), gates=gates)
    x = torch.randn(4, 6, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.tier == "merged"
    # What it makes it reads again: units go from all three layers where all agree.
    row = site(small, "shared")
    assert row["in"][0] < 12
    assert row["out"][0] < 12
    assert site(small, "first")["out"][0] < 12


@pytest.mark.parametrize("gates", ["input", "output"])
def test_a_layer_under_two_names(gates: str) -> None:
    layer = nn.Linear(5, 5)
    model = with_gates(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(5, 2)), gates=gates)
    x = torch.randn(4, 5, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small[0] is small[2]


@pytest.mark.parametrize("gates", ["input", "output"])
def test_a_layer_that_is_not_called(gates: str) -> None:
    model = with_gates(plain.Branches(), gates=gates)
    x = torch.randn(4, 6, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert "does not run" in site(small, "extra")["reason"]
    # The other path was not followed, so nothing is proven there but each layer by itself.


@pytest.mark.parametrize("gates", ["input", "output"])
def test_a_model_that_export_refuses(gates: str) -> None:
    model = with_gates(plain.DataDependent(), gates=gates)
    x = torch.rand(4, 6, dtype=torch.float64)
    small: Any = prune(model, x)
    for example in (x, -x):
        assert_same(small, model, example)
    assert small.report.tier == "each layer by itself"
    assert "torch.export refuses" in small.report.notes[0]
    z = {name: int((gate > 0).sum()) for name, gate in gates_of(model).items()}
    assert sizes(small.first)[gates == "input"] == z["first"]
    assert sizes(small.last)[gates == "input"] == z["last"]


@pytest.mark.parametrize("gates", ["input", "output", "weight"])
def test_tied_weights(gates: str) -> None:
    model = with_gates(plain.Tied(), gates=gates)
    tokens = torch.randint(0, 11, (3, 5))
    small: Any = prune(model, tokens)
    assert_same(small, model, tokens)
    reason = site(small, "head")["reason"]
    assert "'embedding'" in reason
    if gates == "weight":  # the gates make it another tensor, and the report says so
        assert "own copy" in reason
    else:
        head: Any = small.head.layer if isinstance(small.head, nn.Sequential) else small.head
        assert head.weight is small.embedding.weight
        assert torch.equal(head.weight, model.embedding.weight)
        assert small.report.params[0] <= small.report.params[1]


def test_a_weight_read_outside_of_its_layer() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(nn.functional.linear(x, self.first.weight)))

    model: Any = with_gates(Outside())
    x = torch.randn(4, 6, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)  # the gates of `first` were never applied
    assert "read outside" in site(small, "first")["reason"]
    assert torch.equal(small.first.weight, model.first.weight)


def test_a_forward_that_looks_at_its_layer() -> None:
    model = with_gates(plain.ReadsItsLayer())
    x = torch.randn(4, 6, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert sizes(small.last)[1] == int((gates_of(model)["last"] > 0).sum()) < 12
    assert site(small, "first")["in"] == [6, 6]
    assert "AttributeError" in site(small, "first")["reason"]


def test_hooks_of_the_users_stay() -> None:
    model = with_gates(mlp(784, 10))
    seen: list[int] = []
    model.fc2.register_forward_hook(lambda *args: seen.append(args[1][0].shape[-1]))
    x = torch.randn(2, 784, dtype=torch.float64)
    small: Any = prune(model, x)
    seen.clear()
    assert_same(small, model, x)
    assert seen == [300, 300]
    assert "hooks" in site(small, "fc2")["reason"]


def test_an_addition_ties_what_it_adds() -> None:
    model = with_gates(plain.Residual())
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():  # only where both are zero is the sum
        model.stem.log_alpha.copy_(torch.tensor([9.0, 9, -9, -9, -9, 9]))
        model.branch.log_alpha.copy_(torch.tensor([9.0, -9, 9, -9, -9, 9]))
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert sizes(small.head)[1] == 4
    for name in ("stem", "branch"):  # three channels each, and a zero for the other's
        assert sizes(small.get_submodule(name))[0] == 3
        assert small.get_submodule(f"{name}.scatter").index.numel() == 4
        assert "aten::add" in site(small, name)["reason"]


def test_weight_gates() -> None:
    model = with_gates(plain.small_lenet(), gates="weight")
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    small: Any = prune(model, x, 0.1)
    assert_same(small, with_top_gates(model, small), x)
    for name, row in ((row["name"], row) for row in small.report.sites):
        weight = small.get_submodule(name).weight
        assert weight.shape == model.get_submodule(name).weight.shape
        assert int((weight != 0).sum()) == row["gates_open"] < row["gates_total"]
        assert row["status"] == "kept"
        assert "single weights" in row["reason"]
    assert small.report.density <= 0.1
    assert small.report.params[0] == small.report.params[1]
    assert small.report.collapsed == []
    with torch.no_grad():
        model.fc1.log_alpha.clamp_max_(0.5)  # open, and the first that the target closes
    forced: Any = prune(model, x, 0.02)
    assert forced.report.collapsed == ["fc1"]
    assert site(forced, "fc1")["forced"] > 0


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | int]:
            hidden = torch.relu(self.a(x))
            return {"out": self.b(hidden) + y, "sum": self.b(hidden).sum(), "n": 3}

    model = with_gates(Two(), include="b")
    inputs = torch.randn(3, 5).double(), torch.randn(3, 2).double()
    small: Any = prune(model, inputs)
    got, expected = small(*inputs), model(*inputs)
    for key in ("out", "sum"):
        torch.testing.assert_close(got[key], expected[key], rtol=1e-10, atol=1e-12)


def test_a_gated_layer_alone() -> None:
    layer = L0Linear(9, 4).double().eval()
    with torch.no_grad():
        layer.log_alpha.normal_(0, 2)
    x = torch.randn(2, 9, dtype=torch.float64)
    small: Any = prune(layer, x)
    assert_same(small, layer, x)
    assert sizes(small) == (4, int((layer.evaluation_gates() > 0).sum()))


# --- proof and rollback ---------------------------------------------------------------------------


def test_a_wrong_rule_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Softmax over the channels is not elementwise: who believes it is gets another function.
    monkeypatch.setitem(channels.RULES, "aten::softmax", channels.elementwise)
    model = with_gates(nn.Sequential(nn.Linear(5, 9), nn.Softmax(-1), nn.Linear(9, 3)))
    x = torch.randn(4, 5, dtype=torch.float64)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert "differs" in small.report.notes[0]
    assert small.report.tier == "each layer by itself"
    assert small.report.max_error <= small.report.tolerance == 1e-10


def test_a_blank_example_proves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # On zeros every bias-free model is 0: the noise beside the example sees the difference.
    monkeypatch.setitem(channels.RULES, "aten::softmax", channels.elementwise)
    model = nn.Sequential(nn.Linear(5, 9, bias=False), nn.Softmax(-1), nn.Linear(9, 3, bias=False))
    model = with_gates(model, include="2")
    with torch.no_grad():
        model[2].weight.sub_(model[2].weight.mean(1, keepdim=True))
        model[2].log_alpha.fill_(9.0)
        model[2].log_alpha[:2] = -9.0
        model[2].weight[:, 2:].sub_(model[2].weight[:, 2:].mean(1, keepdim=True))
    blank = torch.zeros(4, 5, dtype=torch.float64)
    small: Any = prune(model, blank)
    assert_same(small, model, torch.randn(4, 5, dtype=torch.float64))


def test_relative_error_sees_every_difference() -> None:
    one = torch.tensor([1.0, 2.0])
    assert relative_error([one], [one.clone()]) == 0
    assert relative_error([one + torch.tensor([0.0, 0.5])], [one]) == 0.25
    assert relative_error([one], [one, one]) == torch.inf
    assert relative_error([one[:1]], [one]) == torch.inf
    assert relative_error([one.double()], [one]) == torch.inf
    assert relative_error([torch.tensor([1.0, torch.nan])], [one]) == torch.inf
    assert relative_error([one], [torch.tensor([1.0, torch.nan])]) == torch.inf
    assert relative_error([torch.tensor([torch.inf])], [torch.tensor([-torch.inf])]) == torch.inf
    assert relative_error([torch.tensor([torch.inf])], [torch.tensor([torch.inf])]) == 0
    assert relative_error([torch.tensor([1])], [torch.tensor([2])]) == torch.inf
    assert relative_error([torch.tensor([1e-30])], [torch.tensor([0.0])]) == torch.inf


def test_a_model_that_does_not_run_in_float64() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 30), nn.Linear(30, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("float32, please")
            return self.b(torch.relu(self.a(x)))

    model = with_gates(Single()).float()
    small: Any = prune(model, torch.randn(5, 6))
    assert small.report.tolerance == 1e-5
    assert small.report.max_error <= 1e-5


# --- the report -----------------------------------------------------------------------------------


def test_the_report_is_plain_and_readable(everything: Any) -> None:
    for small, _ in everything.values():
        report = small.report
        assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report
        text = str(report)
        assert all(row["name"] in text for row in report.sites)
        assert report.architecture in text
        assert f"{report.params[0]:,}" in text
        assert all(row["reason"] for row in report.sites if row["status"] == "kept")


def test_an_ungated_layer_that_changed_is_reported() -> None:
    model = with_gates(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)), include="2")
    small: Any = prune(model, torch.randn(2, 5, dtype=torch.float64))
    row = site(small, "0")
    assert row["gates"] is None
    assert row["out"] == [int((gates_of(model)["2"] > 0).sum()), 9]
    assert row["status"] == "removed"
    assert small.report.architecture == str(row["out"][0])


# --- refusals -------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = with_gates(mlp(784, 10))
    x = torch.randn(2, 784, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"model: got 'Sequential'; expected a model with gates"):
        prune(mlp(784, 10), x)
    with pytest.raises(ValueError, match=r"target: got 1.5; expected a density in"):
        prune(model, x, 1.5)
    with pytest.raises(ValueError, match=r"target: got 'abc'; expected a density"):
        prune(model, x, "abc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target: got 'fc9'; expected a pattern that matches"):
        prune(model, x, {"fc9": 0.5})
    with pytest.raises(ValueError, match=r"target: got 0.001; expected a density of at"):
        prune(model, x, 0.001)
    with pytest.raises(
        ValueError, match=r"example_inputs: got \[\(2, 7\)\]; expected what the mod"
    ):
        prune(model, x[:, :7])
    holder = nn.Sequential(model)
    holder.add_module("term", DensityConstraint(model, 0.5))
    with pytest.raises(ValueError, match=r"model: got 'DensityConstraint'; expected a model with"):
        prune(holder, x)
    with torch.no_grad():
        model.fc2.log_alpha[0] = torch.nan
    with pytest.raises(ValueError, match=r"log_alpha: got nan; expected numbers in every gate of"):
        prune(model, x)


def test_a_target_left_by_a_constraint_that_holds_no_unit_each_is_refused() -> None:
    model = with_gates(mlp(784, 10))
    term = DensityConstraint(model, {"fc[12]": 0.5})
    term.set_extra_state({**term.get_extra_state(), "targets": [1e-4]})
    with pytest.raises(ValueError, match=r"target\['fc1, fc2'\]: got 0.0001; expected a density"):
        prune(model, torch.randn(1, 784, dtype=torch.float64))


def test_a_constraint_on_a_layer_that_is_gone_is_refused() -> None:
    model = with_gates(mlp(784, 10))
    _held = DensityConstraint(model, 0.5)
    model.fc3 = nn.Linear(100, 10).double()
    with pytest.raises(ValueError, match="the model's constraint names 'fc3', which has no gates"):
        prune(model, torch.randn(1, 784, dtype=torch.float64))


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.mul_(2)).relu())


def test_the_example_is_not_written_into() -> None:
    model = sparsify_(WritesIntoItsInput(), example_inputs=torch.ones(2, 6))
    x = torch.ones(2, 6)
    prune(model, x)
    assert torch.equal(x, torch.ones(2, 6))
