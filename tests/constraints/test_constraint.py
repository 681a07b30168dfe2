"""The constraint and the penalty: the term, its gradient, its state, and what they refuse."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    DualAscent,
    HardConcrete,
    L0Penalty,
    PIControl,
    TargetSchedule,
    param_groups,
    prune,
    sparsify_,
)
from l0fast.constraints.dual import Dual
from l0fast.layers import handle
from l0fast.layers.handle import gated_layers
from l0fast.measures.density import density
from tests.helpers.counting import Counting
from tests.helpers.gated import gated_mlp

SHIFT = 2 / 3 * math.log(11)  # P(open) = sigmoid(log_alpha + SHIFT), from the paper's constants


def mlp(**options: Any) -> nn.Sequential:
    """8-6-4 with gates on the inputs of "0" (8 gates of 6 weights) and "2" (6 gates of 4)."""
    return gated_mlp(8, 6, 4, mean=0, **options)


def gates(model: nn.Module, name: int | str) -> nn.Parameter:
    """log_alpha of one layer."""
    return gated_layers(model)[str(name)].log_alpha


def expected(model: nn.Sequential, *names: str) -> Tensor:
    """The density of some layers of `mlp`, gated on inputs or weights, written out."""
    weights = {"0": 48, "2": 24}
    p = {name: torch.sigmoid(gates(model, name).detach() + SHIFT).mean() for name in names}
    return torch.stack([weights[name] * p[name] for name in names]).sum() / sum(
        weights[name] for name in names
    )


# --- the value -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        (0.4, {"model": ("0", "2")}),
        ({"0": 0.3, "2": 0.6}, {"0": ("0",), "2": ("2",)}),
        ({"2": 0.6}, {"2": ("2",)}),
        ({"*": 0.5}, {"*": ("0", "2")}),
        ({"2": 0.6, "0*": 0.3}, {"2": ("2",), "0*": ("0",)}),
    ],
)
@pytest.mark.parametrize("after_forward", [False, True])
def test_the_term(target: Any, groups: dict[str, tuple[str, ...]], after_forward: bool) -> None:
    """multiplier * (density - target), summed over the constraints, in the keys' order."""
    model = mlp()
    constraint = DensityConstraint(model, target)
    assert constraint.names == tuple(groups)
    assert float(constraint().detach()) == 0  # every multiplier starts at 0
    constraint.multiplier.copy_(torch.arange(1.0, 1 + len(groups)))
    if after_forward:
        model(torch.randn(5, 8))
    targets = list(target.values()) if isinstance(target, dict) else [target]
    violation = torch.stack([expected(model, *names) for names in groups.values()])
    violation -= torch.tensor(targets)
    value = constraint()
    torch.testing.assert_close(value.detach(), (constraint.multiplier * violation).sum())
    torch.testing.assert_close(constraint.violation, violation)
    assert not constraint.violation.requires_grad


def test_it_agrees_with_the_table() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4)
    value = float(constraint.densities().detach())
    assert value == pytest.approx(density(model).total.expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["auto", "output", "weight"])
def test_the_count_of_the_draw_is_used_once(kind: str) -> None:
    """The first call after a forward costs no sigmoid; a second one computes the same anew."""
    model = mlp(gates=kind)
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(2.0)
    model(torch.randn(5, 8))
    gates_of = [layer.log_alpha for layer in gated_layers(model).values()]
    values: list[Tensor] = []
    sigmoids: list[int] = []
    for _ in range(2):
        with Counting() as counting:
            values.append(constraint())
        sigmoids.append(counting.calls["sigmoid"])
    assert sigmoids == [0, len(gates_of)]
    gradients = [torch.autograd.grad(value, gates_of, retain_graph=True) for value in values]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    # d/dlog_alpha of 2 * sum(size * p) / total is 2 * size / total * p * (1 - p).
    weights = sum(layer.weight.numel() for layer in gated_layers(model).values())
    biases = sum(layer.bias.numel() for layer in gated_layers(model).values())
    total = weights + biases if kind == "output" else weights
    for layer, gradient in zip(gated_layers(model).values(), gradients[0], strict=True):
        p = torch.sigmoid(layer.log_alpha.detach() + SHIFT)
        size = layer.weight.numel() // p.numel() + (kind == "output")
        torch.testing.assert_close(gradient, 2 * size / total * p * (1 - p))


@pytest.mark.parametrize("change", ["optimizer", "in place", "state"])
@pytest.mark.parametrize("kind", ["auto", "weight"])
def test_the_count_is_stale_when_the_gates_have_moved(kind: str, change: str) -> None:
    model = mlp(gates=kind)
    constraint = DensityConstraint(model, 0.4)
    before = expected(model, "0", "2")
    y = model(torch.randn(5, 8))
    if change == "optimizer":
        y.square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=50.0).step()
    elif change == "in place":
        with torch.no_grad():
            gates(model, 2).sub_(1.0)
    else:
        model.load_state_dict(mlp(gates=kind).state_dict())
    after = expected(model, "0", "2")
    assert abs(float(before - after)) > 1e-3
    assert float(constraint.densities().detach()) == pytest.approx(float(after), rel=1e-6)


@pytest.mark.parametrize("kind", ["auto", "weight"])
def test_the_term_may_have_its_own_backward(kind: str) -> None:
    """A trainer that hides the loss: the data term's backward first, then the constraint's."""
    x, y = torch.randn(5, 8), torch.randint(4, (5,))
    gradients: list[list[Tensor]] = []
    model = mlp(gates=kind)
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(1.5)
    for separate in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if separate:
            loss.backward()
            constraint().backward()
        else:
            (loss + constraint()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradients_accumulate() -> None:
    """Two half batches with half the term each give the gradient of the whole."""
    model = mlp(noise="batch")
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(30.0)  # every draw is 1, so that the halves see the same gates
            layer.log_alpha[0] = -1.5
            layer.weight[:, 0] = 0
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(3.0)
    x, y = torch.randn(8, 8), torch.randint(4, (8,))
    (F.cross_entropy(model(x), y) + constraint()).backward()
    log_alpha = gates(model, 0)
    assert log_alpha.grad is not None
    whole = log_alpha.grad.clone()
    model.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(model(x[part]), y[part]) / 2 + constraint() / 2).backward()
    constraint.step()
    torch.testing.assert_close(log_alpha.grad, whole)
    assert float(whole[0]) > 1e-3
    assert float(constraint.multiplier) == pytest.approx(3 + 1e-3 * float(constraint.violation))


def test_autocast_does_not_round_the_density() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(1.0)
    plain = constraint()
    with torch.autocast("cpu", torch.bfloat16), Counting() as counting:
        model(torch.randn(5, 8))
        counting.calls.clear()
        value = constraint()
    assert value.dtype == constraint.violation.dtype == torch.float32
    torch.testing.assert_close(value, plain)
    # On CUDA autocast rounds any product of matrices, this one included.
    assert not counting.calls.keys() & {"mv", "mm", "matmul", "addmv", "bmm", "linear"}


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.4, {"0": 0.3, "2": 0.6}])
def test_a_step_reads_nothing_back_and_records_no_graph(target: Any) -> None:
    model = mlp()
    constraint = DensityConstraint(model, target)
    model(torch.randn(5, 8))
    with Counting() as counting:
        term = constraint()
        constraint.step()
    assert counting.calls["addcmul_"] >= 1  # it has counted what there was
    assert counting.calls["_local_scalar_dense"] == 0
    assert counting.calls["_to_copy"] == 0
    assert term.requires_grad
    for name, buffer in constraint.named_buffers():
        assert not buffer.requires_grad, name
    assert not list(constraint.parameters())


@pytest.mark.parametrize("kind", ["constraint", "penalty"])
def test_a_step_keeps_log_alpha_within_its_bounds(kind: str) -> None:
    model = mlp(distribution=HardConcrete(bound=3.0))
    term = DensityConstraint(model, 0.4) if kind == "constraint" else L0Penalty(model, 0.1)
    with torch.no_grad():
        gates(model, 0).copy_(torch.linspace(-8, 8, 8))
    term()
    term.step()
    assert [float(v) for v in gates(model, 0).detach().aminmax()] == [-3.0, 3.0]


def test_the_step_uses_the_violation_of_the_last_call() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4, dual=DualAscent(0.5, restarts=False))
    constraint()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(9.0)
    constraint()
    constraint.step()
    p = 1 / (1 + math.exp(-9.0 - SHIFT))
    assert float(constraint.multiplier) == pytest.approx(0.5 * (p - 0.4), rel=1e-5)


# --- where it lives ------------------------------------------------------------------------------


def test_it_moves_with_the_model() -> None:
    model = mlp()
    constraint = DensityConstraint(model, {"0": 0.3, "2": 0.6})
    model.to("meta")
    assert constraint().device.type == "meta"
    assert {buffer.device.type for buffer in constraint.buffers()} == {"meta"}
    constraint.step()


@pytest.mark.gpu
def test_it_moves_to_a_gpu_with_the_model() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(2.0)
    value = float(constraint().detach())
    model.cuda()
    model(torch.randn(5, 8, device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        assert float(constraint().detach()) == pytest.approx(value, rel=1e-5)
    constraint.step()
    assert constraint.multiplier.is_cuda


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_follows_the_dtype(dtype: torch.dtype) -> None:
    """Built on a model of another dtype, or before the model is converted."""
    early = mlp()
    late = copy.deepcopy(early).to(dtype)
    constraints = [DensityConstraint(model, 0.4) for model in (early, late)]
    early.to(dtype)
    for model, constraint in zip((early, late), constraints, strict=True):
        constraint.multiplier.fill_(1.0)
        loss = model(torch.randn(5, 8, dtype=dtype)).sum() + constraint()
        loss.backward()
        constraint.step()
        log_alpha = gates(model, 0)
        assert log_alpha.grad is not None
        assert log_alpha.grad.dtype == log_alpha.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float64 else 5e-3
        wanted = density(model).total.expected - 0.4
        assert float(constraint.violation) == pytest.approx(wanted, abs=tolerance)
    assert constraints[0].multiplier.dtype == torch.float32
    assert constraints[1].multiplier.dtype == torch.promote_types(dtype, torch.float32)


def test_a_copy_of_model_and_constraint_is_whole_and_apart() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(2.0)
    model(torch.randn(5, 8))  # a count waits in the layers
    twin, other = copy.deepcopy((model, constraint))
    torch.testing.assert_close(other(), constraint())
    with torch.no_grad():
        gates(twin, 0).fill_(-9.0)
    assert float(other.densities().detach()) < float(constraint.densities().detach())
    other.step()
    assert float(constraint.multiplier) == 2.0
    assert other.layers["0"] is twin[0]


def test_pickles() -> None:
    model = mlp()
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(2.0)
    stream = io.BytesIO()
    torch.save((model, constraint), stream)
    stream.seek(0)
    twin, other = torch.load(stream, weights_only=False)
    torch.testing.assert_close(other(), constraint())
    assert other.layers["2"] is twin[2]


# --- its state -----------------------------------------------------------------------------------


def test_the_state_goes_round() -> None:
    model = mlp()
    target = {"0": 0.3, "2": 0.6}
    first, second = DensityConstraint(model, target), DensityConstraint(model, target)
    for _ in range(5):
        first()
        first.step()
    first.restarts.copy_(torch.tensor([3.0, 1.0]))
    first.dual_lr.fill_(0.5)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    assert set(first.state_dict()) == set(second.state_dict())
    for name, buffer in first.named_buffers():
        torch.testing.assert_close(second.get_buffer(name), buffer, rtol=0, atol=0)
    for constraint in (first, second):
        constraint()
        constraint.step()
    torch.testing.assert_close(second.multiplier, first.multiplier, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (0.4, {"0": 0.3, "2": 0.6}),
        ({"0": 0.3, "2": 0.6}, 0.4),
        ({"0": 0.3, "2": 0.6}, {"2": 0.6, "0": 0.3}),  # their multipliers are in another order
        ({"0": 0.3}, {"2": 0.3}),
        ("params", 0.4),
    ],
)
def test_the_state_of_other_constraints_is_refused(ours: Any, theirs: Any) -> None:
    model = mlp()
    if ours == "params":
        one = DensityConstraint(model, 0.4, measure="params", example_inputs=torch.randn(1, 8))
    else:
        one = DensityConstraint(model, ours)
    other = DensityConstraint(model, theirs)
    other.multiplier.fill_(7.0)
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(
        ValueError, match=r"^state_dict: got 'constraints on .*'; expected constraints on "
    ) as e:
        one.load_state_dict(other.state_dict())
    assert "\n" not in str(e.value)
    for name, value in one.state_dict().items():
        assert value == before[name] if name == "_extra_state" else torch.equal(value, before[name])


def test_a_loaded_target_is_the_one_that_prune_holds() -> None:
    model = mlp()
    saved = DensityConstraint(mlp(), 0.3).state_dict()
    constraint = DensityConstraint(model, 0.9)
    constraint.load_state_dict(saved)
    assert float(constraint.target) == pytest.approx(0.3)
    assert repr(constraint) == "DensityConstraint(model <= 0.3)"
    report: Any = prune(model, torch.randn(1, 8)).report
    assert report.groups["model"]["target"] == 0.3
    assert report.density <= 0.3


def test_a_wrapper_is_looked_through() -> None:
    model = mlp()
    parallel = nn.DataParallel(model)
    constraint = DensityConstraint(parallel, {"0": 0.3, "2": 0.6})
    assert list(constraint.layers) == ["0", "2"]
    assert constraint.state_dict()["_extra_state"]["groups"] == [["0", ["0"]], ["2", ["2"]]]
    same = DensityConstraint(model, {"0": 0.3, "2": 0.6})
    same.load_state_dict(constraint.state_dict())
    assert list(L0Penalty(parallel, 0.1).layers) == ["0", "2"]
    device = next(model.parameters()).device  # DataParallel moves a model to a GPU
    x = torch.randn(1, 8, device=device)
    for pruned in (prune(model, x), prune(parallel, x)):
        report: Any = pruned.report
        assert {name: g["target"] for name, g in report.groups.items()} == {"0": 0.3, "2": 0.6}


def test_the_targets_stay_on_the_model_for_prune() -> None:
    model = mlp()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(9.0)  # all open
    first = DensityConstraint(model, {"0": 0.5, "2": 0.7})
    report: Any = prune(copy.deepcopy(model), torch.randn(1, 8)).report
    kept = {site["name"]: site["gates_open"] for site in report.sites}
    assert kept == {"0": 4, "2": 4}  # 0.5 of 8, and the most of 6 within 0.7
    second = DensityConstraint(model, {"0": 0.25})  # the last word on these layers
    report = prune(model, torch.randn(1, 8)).report
    assert {site["name"]: site["gates_open"] for site in report.sites} == {"0": 2, "2": 4}
    del first, second
    report = prune(model, torch.randn(1, 8)).report
    assert {site["name"]: site["gates_open"] for site in report.sites} == {"0": 8, "2": 6}


def test_it_prints_its_targets() -> None:
    text = repr(DensityConstraint(mlp(), {"0": 0.25, "2": 0.5}))
    assert "0 <= 0.25, 2 <= 0.5)" in text
    own = DensityConstraint(mlp(), 0.5, measure="macs", example_inputs=torch.randn(1, 8))
    assert repr(own) == "DensityConstraint(model <= 0.5 by macs)"


# --- what is refused -----------------------------------------------------------------------------

# One unit each of "0" and "2": (6 + 4) of 8 * 6 + 6 * 4 parameters.
LOWEST = (6 + 4) / (48 + 24)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("abc", ValueError, "target: got 'abc'; expected a density in (0, 1]"),
        (None, TypeError, "target: got None; expected a density in (0, 1]"),
        (True, TypeError, "target: got True; expected a density in (0, 1]"),
        (0, ValueError, "target: got 0; expected a density in (0, 1]"),
        (0.0, ValueError, "target: got 0.0; expected a density in (0, 1]"),
        (-0.1, ValueError, "target: got -0.1; expected a density in (0, 1]"),
        (1.5, ValueError, "target: got 1.5; expected a density in (0, 1]"),
        (math.nan, ValueError, "target: got nan; expected a density in (0, 1]"),
        (math.inf, ValueError, "target: got inf; expected a density in (0, 1]"),
        (1e-9, ValueError, f"target: got 1e-09; expected a density in [{LOWEST:.6g}, 1]"),
        ({}, ValueError, "target: got {}; expected at least one layer or pattern"),
        ({"3": 0.5}, ValueError, "target: got '3'; expected a pattern that matches one of"),
        ({"0": 0.5, "x*": 0.5}, ValueError, "target: got 'x*'; expected a pattern that matches"),
        ({1: 0.5}, TypeError, "target: got 1; expected layer names or patterns as keys"),
        ({"0": 0.5, "*": 0.5}, ValueError, "got '*'; expected layers of one group only ('0' is in"),
        ({"0": "abc"}, ValueError, "target['0']: got 'abc'; expected a density in (0, 1]"),
        ({"0": 0.5, "2": 1.5}, ValueError, "target['2']: got 1.5; expected a density in (0, 1]"),
        ({"0": 0.5, "2": 0.1}, ValueError, "target['2']: got 0.1; expected a density in [0.166667"),
    ],
)
def test_bad_targets(target: Any, error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error) as caught:
        DensityConstraint(model, target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert handle.gates(model).constraints == ()  # nothing was changed


def test_the_lowest_target_is_one_unit_in_each_layer() -> None:
    model = mlp()
    _held = DensityConstraint(model, LOWEST)
    report: Any = prune(model, torch.randn(1, 8)).report
    assert report.architecture == "1-1"
    with pytest.raises(ValueError, match="expected a density in"):
        DensityConstraint(model, LOWEST * (1 - 1e-6))


@pytest.mark.parametrize(("bound", "lowest"), [(math.log(100), 0.0471), (10.0, 2.245e-4)])
def test_the_lowest_target_that_the_bound_of_log_alpha_allows(bound: float, lowest: float) -> None:
    """Published code stops at log(100), and so can meet no target under 4.71 %."""
    model = nn.Sequential(nn.Linear(10_000, 2), nn.ReLU(), nn.Linear(2, 2))
    sparsify_(model, exclude="2", distribution=HardConcrete(bound=bound))
    with pytest.raises(ValueError, match=r"expected a density in \[") as caught:
        DensityConstraint(model, 2e-4)
    assert float(str(caught.value).split("[")[-1].split(",")[0]) == pytest.approx(lowest, rel=1e-3)
    constraint = DensityConstraint(model, lowest * 1.001)
    with torch.no_grad():
        gates(model, 0).fill_(-1e4)
    constraint()
    constraint.step()  # back into the bounds, where the target is met
    assert float(constraint.densities().detach()) <= lowest * 1.001


@pytest.mark.parametrize("build", [lambda m: DensityConstraint(m, 0.5), lambda m: L0Penalty(m, 1)])
def test_a_model_without_gates_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"^model: got 'Sequential'; expected a model with gates"):
        build(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_a_size_of_the_pruned_model_needs_an_example(measure: str) -> None:
    with pytest.raises(ValueError, match=r"^example_inputs: got None; ") as caught:
        DensityConstraint(mlp(), 0.5, measure=measure)
    expected = f"expected what the model's forward takes, for measure={measure!r}"
    assert str(caught.value).endswith(expected)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^measure: got 'flops'; expected one of 'gates'"):
        DensityConstraint(mlp(), 0.5, measure="flops")


# --- the penalty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after_forward", [False, True])
def test_the_penalty_in_both_units(after_forward: bool) -> None:
    """coefficient * density, or coefficient / N * expected L0."""
    model = mlp()
    if after_forward:
        model(torch.randn(5, 8))
    value = expected(model, "0", "2")
    torch.testing.assert_close(L0Penalty(model, 0.3)().detach(), 0.3 * value)
    torch.testing.assert_close(L0Penalty(model, 0.3, 1000)().detach(), 0.3 / 1000 * 72 * value)


def test_the_units_on_the_published_mlp() -> None:
    """266,200 gated parameters and 60,000 examples: 0.1 in one unit is 0.4437 in the other."""
    model = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    sparsify_(model)
    penalty = L0Penalty(model, 0.1, num_examples=60_000)
    assert float(penalty.coefficient) == pytest.approx(0.1 * 266_200 / 60_000, rel=1e-6)
    assert round(float(penalty.coefficient), 4) == 0.4437
    torch.testing.assert_close(penalty(), L0Penalty(model, 0.1 * 266_200 / 60_000)())


def test_the_penalty_drives_the_density_down_and_has_a_state() -> None:
    model = mlp()
    penalty = L0Penalty(model, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    start = float(penalty.densities().detach())
    for _ in range(20):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
        penalty.step()
    assert float(penalty.densities().detach()) < start - 0.1
    other = L0Penalty(model, 0.5)
    other.load_state_dict(penalty.state_dict())
    assert float(other.coefficient) == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-0.1,), ValueError, "coefficient: got -0.1; expected a number >= 0"),
        ((math.nan,), ValueError, "coefficient: got nan; expected a number >= 0"),
        (("abc",), TypeError, "coefficient: got 'abc'; expected a number >= 0"),
        ((True,), TypeError, "coefficient: got True; expected a number >= 0"),
        ((0.1, 0), ValueError, "num_examples: got 0; expected a whole number >= 1"),
        ((0.1, 1.5), ValueError, "num_examples: got 1.5; expected a whole number >= 1"),
        ((0.1, "60000"), TypeError, "num_examples: got '60000'; expected a whole number >= 1"),
    ],
)
def test_bad_penalties(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        L0Penalty(mlp(), *arguments)
    assert str(caught.value) == message


# --- the defaults --------------------------------------------------------------------------------


def test_with_steps_it_needs_no_tuning() -> None:
    plain = DensityConstraint(mlp(), 0.4)
    assert plain.dual == DualAscent(1e-3)
    assert plain.schedule is None
    one = DensityConstraint(mlp(), {"0": 0.5, "2": 0.2}, steps=101)
    assert one.dual == DualAscent(5.0)
    assert one.schedule == TargetSchedule(46, "cubic")
    assert float(one.dual_lr) == 5.0
    named = DensityConstraint(mlp(), 0.4, steps=100, dual=PIControl(0.1))
    assert named.dual == PIControl(0.1)
    assert named.schedule == TargetSchedule(45)
    named = DensityConstraint(mlp(), 0.4, steps=100, schedule=TargetSchedule(7, "linear"))
    assert named.dual == DualAscent(2.5)
    assert named.schedule == TargetSchedule(7, "linear")


def test_the_dual_of_an_amount_goes_by_its_share() -> None:
    """The gated parameters are 72."""
    assert DensityConstraint(mlp(), "18 gates", steps=10).dual == DualAscent(4.0)
    seen: list[float] = []

    def dual(least: float) -> Dual:
        seen.append(least)
        return PIControl(least)

    one = DensityConstraint(mlp(), {"0": "36 gates", "2": 0.25}, dual=dual)
    assert seen == [0.25]
    assert one.dual == PIControl(0.25)
    assert one.schedule is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"^steps: got 0; expected a whole number >= 1"),
        ({"steps": 1.5}, ValueError, r"^steps: got 1\.5; expected a whole number"),
        ({"dual": 0.1}, TypeError, r"^dual: got 0\.1; expected a Dual, such as"),
        ({"dual": PIControl}, TypeError, r"^dual: got <class .*PIControl'>; expected a Dual, such"),
        ({"dual": lambda least: least}, TypeError, r"^dual: got 0\.4; expected a function that"),
        ({"schedule": 50}, TypeError, r"^schedule: got 50; expected a TargetSchedule or None"),
    ],
)
def test_what_they_refuse(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        DensityConstraint(model, 0.4, **options)
    assert handle.gates(model).constraints == ()


def test_a_loop_of_ones_own_reaches_its_target() -> None:
    """200 steps; without `steps` hardly a gate has closed by then."""
    ends: list[float] = []
    for steps in (200, None):
        torch.manual_seed(0)
        model = sparsify_(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)))
        constraint = DensityConstraint(model, 0.3, steps=steps)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-3, steps=steps))
        x, y = torch.randn(256, 8), torch.randint(4, (256,))
        for _ in range(200):
            (F.cross_entropy(model(x), y) + constraint()).backward()
            optimizer.step()
            optimizer.zero_grad()
            constraint.step()
        ends.append(constraint.densities().item())
    assert ends[0] < 0.33
    assert ends[1] > 0.8
