"""Skipped and masked training steps are the same step."""

from __future__ import annotations

import copy
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0fast
from bench.counting import dispatched
from l0fast import sparsify_
from l0fast.data.sets import load
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers, gates
from l0fast.skipping.attach import stop_skipping
from l0fast.skipping.link import End, Link
from l0fast.skipping.skip import MULTIPLE, OVERHEAD, PER_WEIGHT, Skipping
from l0fast.training.models import build
from tests.helpers.draws import compact
from tests.helpers.steps import (
    DENSITIES,
    EXACT,
    MODELS,
    assert_same_step,
    chain,
    following,
    left_out,
    pair,
    prepared,
    set_density,
    step,
)
from tests.helpers.thinned import telling, thinned_product
from tests.helpers.tolerance import rounding_tolerance


@pytest.mark.parametrize("name", MODELS)
def test_the_links_that_are_found(name: str) -> None:
    model, _ = prepared(name, True)
    assert len(gates(model).skipping.links) == MODELS[name][3]


@pytest.mark.parametrize(
    ("name", "density", "multiple"), thinned_product(5, MODELS, DENSITIES, [1, MULTIPLE])
)
def test_loss_and_gradients_are_those_of_the_masked_step(
    name: str, density: float, multiple: int
) -> None:
    masked, x = prepared(name, False)
    skipped, _ = prepared(name, True)
    gates(skipped).skipping.multiple = multiple
    for model in (masked, skipped):
        set_density(model, density)
    assert_same_step(masked, skipped, x, EXACT)
    assert left_out(masked) == 0
    if multiple == 1 or density == 1:
        assert (left_out(skipped) > 0) == (density < 1)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_float32_differs_by_rounding(name: str) -> None:
    masked, x = prepared(name, False, torch.float32)
    skipped, _ = prepared(name, True, torch.float32)
    for model in (masked, skipped):
        set_density(model, 0.3)
    # Sums of up to 100 terms, in another order.
    assert_same_step(masked, skipped, x, float(100 * rounding_tolerance(torch.float32, 1.0)))


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=5),
    batch=st.integers(1, 4),
    density=st.sampled_from(DENSITIES),
    gates=st.sampled_from(["input", "output"]),
    conv=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    sizes: list[int], batch: int, density: float, gates: str, conv: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        layers[f"layer{index}"] = nn.Conv1d(inner, outer, 1) if conv else nn.Linear(inner, outer)
        layers[f"act{index}"] = nn.Tanh()
    masked = nn.Sequential(layers).double()
    x = torch.randn((batch, sizes[0], 3) if conv else (batch, sizes[0])).double()
    skipped = copy.deepcopy(masked)
    for model, skip in ((masked, False), (skipped, True)):
        sparsify_(model, gates=gates, example_inputs=x, skip=skip)
        set_density(model, density)
    assert_same_step(masked, skipped, x, EXACT)


@pytest.mark.parametrize("skip", telling(["auto", True], [True]))
def test_200_steps_stay_together(skip: Any) -> None:
    data = load("digits")
    weights: list[list[Tensor]] = []
    for how in (False, skip):
        torch.manual_seed(0)
        model = build("lenet5", (1, 8, 8), 10, (8, 16, 64)).double()
        x, y = data.train.inputs.double(), data.train.targets
        sparsify_(model, example_inputs=x[:1], skip=how)
        constraint = l0fast.DensityConstraint(model, 0.2, dual=l0fast.DualAscent(0.02))
        optimizer = torch.optim.SGD(l0fast.param_groups(model, 0.05, 1.0))
        for index in range(200):
            part = slice(7 * index, 7 * index + 32)
            (F.cross_entropy(model(x[part]), y[part]) + constraint()).backward()
            optimizer.step()
            optimizer.zero_grad()
            constraint.step()
        weights.append([parameter.detach() for parameter in model.parameters()])
        if how is True:
            assert left_out(model) >= 2
    for got, expected in zip(*weights, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_evaluation_and_a_layer_by_itself_are_whole() -> None:
    model, x = prepared("mlp", True)
    set_density(model, 0.3)
    model(x)
    assert left_out(model) == 3
    layer: Any = model.get_submodule("fc2")
    assert layer(torch.randn(2, 12).double()).shape == (2, 7)
    model.eval()
    whole = copy.deepcopy(model)
    stop_skipping(whole)
    assert torch.equal(model(x), whole(x))


def test_a_part_in_evaluation_is_whole() -> None:
    model, x = prepared("mlp", True)
    set_density(model, 0.3)
    model.get_submodule("fc2").eval()
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    assert_same_step(masked, model, x, EXACT)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_skip_by_themselves(how: str) -> None:
    model, x = prepared("lenet", True)
    set_density(model, 0.3)
    model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert left_out(twin) == 0
    loss, _ = step(model, x)
    before = [compact(layer) for layer in gated_layers(model).values()]
    twin_loss, _ = step(twin, x)
    assert torch.equal(loss, twin_loss)
    assert left_out(twin) > 0
    after = [compact(layer) for layer in gated_layers(model).values()]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_activation_checkpointing_leaves_out_the_same() -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        model, x = prepared("mlp", True)
        set_density(model, 0.4)
        if checkpointed:
            inner = model.forward

            def forward(y: Tensor) -> Any:
                return checkpoint(inner, y, use_reentrant=False)

            model.forward = forward
        return step(model, x)[1]

    expected, got = run(False), run(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=EXACT, atol=0)


def test_nothing_is_read_back_and_the_ops_are_few() -> None:
    model, x = prepared("lenet", True)
    set_density(model, 0.4)
    found = dispatched(lambda: step(model, x))
    assert found.items == 0


@pytest.mark.parametrize("name", ["mlp", "a hidden layer without gates of its own"])
def test_autocast(name: str) -> None:
    losses: list[float] = []
    for skip in (False, True):
        model, x = prepared(name, skip, torch.float32)
        set_density(model, 0.4)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        losses.append(float(y.float().square().mean().detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_norm_leaves_the_statistics_of_absent_channels_alone() -> None:
    model, x = prepared("batch norms", True)
    reader: Any = model.get_submodule("3")
    with torch.no_grad():
        reader.log_alpha.fill_(40.0)
        reader.log_alpha[2:4] = -40.0
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    norm: Any = model.get_submodule("1")
    for one in (masked, model):
        step(one, x)
    there = torch.tensor([0, 1, 4, 5])
    for name, buffer in masked.get_submodule("1").named_buffers():
        got = norm.get_buffer(name)
        if buffer.dim() == 0:
            assert got == buffer == 1
            continue
        torch.testing.assert_close(got[there], buffer[there], rtol=EXACT, atol=EXACT)
        assert got[2:4].tolist() == ([0, 0] if "mean" in name else [1, 1])


def test_a_layer_that_follows_is_itself_elsewhere() -> None:
    model, x = prepared("batch norms", True)
    set_density(model, 0.3)
    step(model, x)
    first = model.get_submodule("0")
    assert type(first) is nn.Conv2d
    assert first(x).shape == (4, 6, 6, 6)
    small: Any = l0fast.prune(model, x)
    assert not any(module._forward_pre_hooks for module in small.modules())
    assert following(first)
    sparsify_(model, example_inputs=x, skip=False)
    assert not first._forward_pre_hooks


# --- what is not like the example -----------------------------------------------------------------


def test_norms_that_learn_make_no_zeros() -> None:
    torch.manual_seed(0)
    model = chain(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    ).double()
    x = torch.randn(4, 3, 8, 8).double()
    sparsify_(model, gates="output", example_inputs=x)
    set_density(model, 0.3)
    nn.init.normal_(model.get_submodule("1").bias)  # type: ignore[arg-type]
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    assert_same_step(masked, model, x, EXACT)


def test_a_call_that_reads_the_hidden_units_is_masked() -> None:
    skipped, masked, x = pair()
    last: list[Tensor] = []
    for model in (skipped, masked):
        torch.manual_seed(3)
        last.append(model(x, hidden=True))
    assert torch.equal(*last)
    assert following(skipped.a).compact is None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "b", nn.Linear(32, 3).double()),
        lambda model: setattr(model, "a", nn.Sequential(model.a, nn.LayerNorm(32)).double()),
        lambda model: model.a.register_forward_hook(lambda *_: None),
        lambda model: setattr(model.a, "forward", lambda x: type(model.a).forward(model.a, x)),
    ],
)
def test_a_model_changed_since_is_masked(change: Callable[[Any], Any]) -> None:
    skipped, masked, x = pair()
    last: list[Tensor] = []
    for model in (skipped, masked):
        torch.manual_seed(4)
        change(model)
        torch.manual_seed(3)
        last.append(model(x))
    assert torch.equal(*last)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_sees_every_unit(before: bool) -> None:
    skipped, _, x = pair()
    widths: list[int] = []
    if before:
        skipped.b.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    else:
        skipped.a.register_forward_hook(lambda *args: widths.append(args[2].shape[1]))
    skipped(x)
    assert widths == [32]


def test_gates_put_in_later_work() -> None:
    skipped, _, x = pair()
    sparsify_(skipped, include="a", gates="output")
    with torch.no_grad():
        skipped.a.log_alpha.fill_(-40.0)
    assert float(skipped.a(x).abs().max().detach()) == 0


def test_a_part_that_skips_inside_a_model_that_does_not() -> None:
    inner, _, x = pair()
    outer = nn.Sequential(inner, nn.Linear(5, 4).double())
    sparsify_(outer, include="1", example_inputs=x, skip=False)
    assert inner(x).shape == (8, 5)
    assert outer(x).shape == (8, 4)


@pytest.mark.parametrize("gated", ["b", "*"])
def test_the_gradient_of_the_input_may_be_in_the_loss(gated: str) -> None:
    found: list[dict[str, Tensor]] = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            OrderedDict(a=nn.Linear(6, 32), act=nn.Tanh(), b=nn.Linear(32, 5))
        ).double()
        x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
        sparsify_(model, include=gated, gates="input", example_inputs=x.detach(), skip=skip)
        set_density(model, 0.3)
        torch.manual_seed(3)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert (left_out(model) > 0) == skip
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    masked, skipped = found
    assert bool((masked["b.weight"] != 0).any())
    for name, gradient in masked.items():
        torch.testing.assert_close(skipped[name], gradient, rtol=EXACT, atol=EXACT)


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    skipped, masked, x = pair()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("stopped")

    handle = nn.Module.register_forward_hook(skipped.b, stop)
    gates(skipped).skipping.holds = lambda *_: True  # the hook alone would make it masked
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        skipped(x)
    handle.remove()
    assert torch.equal(skipped.eval()(x), masked.eval()(x))


def test_evaluation_is_the_same_bits_after_a_skipped_step() -> None:
    model, x = prepared("mlp", True)
    set_density(model, 0.5)
    before = model.eval()(x)
    step(model.train(), x)
    assert left_out(model) > 0
    assert torch.equal(model.eval()(x), before)


def test_two_checkpointed_forwards_before_a_backward_are_refused() -> None:
    skipped, _, x = pair()

    def forward(y: Tensor) -> Any:
        return skipped.b(checkpoint(skipped.a, y, use_reentrant=False).relu())

    skipped.forward = forward
    with pytest.raises(RuntimeError, match="several forward passes"):
        (skipped(x).sum() + skipped(-x).sum()).backward()


def test_the_default_dtype_does_not_matter() -> None:
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        model, x = prepared("lenet", True)
        set_density(model, 0.3)
        step(model, x)
        assert left_out(model) > 0
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.parametrize("training", [True, False])
def test_a_replica_is_refused(training: bool) -> None:
    """nn.DataParallel calls shallow copies, which are not told what a step leaves out."""
    skipped, masked, x = pair()
    replica: Any = skipped.train(training)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"^skip: got a replica made by nn.DataParallel; exp"):
        replica(x)
    skipped(x)
    masked._replicate_for_data_parallel()(x)


@pytest.mark.parametrize("name", telling(["mlp", "lenet", "batch norms"], ["mlp", "batch norms"]))
def test_a_second_backward_after_a_change_in_place(name: str) -> None:
    """As in PyTorch: it is refused, or gives the gradients of the forward that there was."""
    raised = 0
    for changed in dict(prepared(name, True)[0].named_parameters()):
        model, x = prepared(name, True)
        set_density(model, 0.4)
        torch.manual_seed(1)
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with torch.no_grad():
            model.get_parameter(changed).add_(1.0)
        try:
            loss.backward()
        except RuntimeError as error:
            words = str(error)
        else:
            words = ""
        if words:
            assert "modified by an inplace operation" in words, changed
            raised += 1
            continue
        for other, gradient in first.items():
            got = model.get_parameter(other).grad
            torch.testing.assert_close(got, gradient, rtol=EXACT, atol=EXACT, msg=changed)
    assert raised > 0


# --- auto -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolved", [True, False])
def test_what_a_convolution_computes_is_rounded_up(convolved: bool) -> None:
    torch.manual_seed(0)
    maker: nn.Module = nn.Linear(5, 30)
    last: nn.Module = nn.Linear(30, 3)
    x = torch.randn(4, 5).double()
    if convolved:
        maker, last, x = nn.Conv1d(5, 30, 1), nn.Conv1d(30, 3, 1), x.unsqueeze(2)
    model = nn.Sequential(maker, nn.Tanh(), last).double()
    sparsify_(model, gates="input", exclude="0", example_inputs=x, skip=True)
    reader: Any = model.get_submodule("2")
    for kept, rounded in ((0, 4), (1, 4), (4, 4), (5, 8), (26, 28), (28, 28), (29, 30)):
        computed = rounded if convolved else max(kept, 1)
        with torch.no_grad():
            reader.log_alpha.fill_(-40.0)
            reader.log_alpha[torch.randperm(30)[:kept]] = 40.0
        step(model, x)
        columns = torch.arange(30) if compact(reader) is None else compact(reader).cols
        assert len(columns) == len(columns.unique()) == computed
        assert bool(torch.isin((reader.log_alpha > 0).nonzero().flatten(), columns).all())


def test_auto_skips_where_it_pays() -> None:
    link = Link([], [], work=10_000_000)
    plan = Skipping(nn.Identity(), [], "auto", Example.of(torch.zeros(1)))
    most = round(1000 * (1 - OVERHEAD / 10_000_000))
    assert plan.pays(link, most - 1, 1000, 1.0)
    assert not plan.pays(link, most + 1, 1000, 1.0)
    assert plan.pays(link, most + 1, 1000, 1.1)  # more examples
    assert not plan.pays(link, 1, 1000, 0.1)
    always = Skipping(nn.Identity(), [], True, Example.of(torch.zeros(1)))
    assert always.pays(link, 999, 1000, 1e-9)
    assert not always.pays(link, 1000, 1000, 1.0)


def test_auto_reckons_with_the_weights_it_picks() -> None:
    readers = [End(nn.Linear(1000, 100), None), End(nn.BatchNorm1d(1000), None)]
    link = Link([End(nn.Linear(2, 1000), None)], readers, 1000, work=100_000_000)
    assert link.weights == 102_000
    plan = Skipping(nn.Identity(), [], "auto", Example.of(torch.zeros(1)))
    # Where 100 M * (1 - kept) = OVERHEAD + PER_WEIGHT * 102,000 * kept.
    most = round(1000 * (1e8 - OVERHEAD) / (1e8 + PER_WEIGHT * 102_000))
    assert plan.pays(link, most - 1, 1000, 1.0)
    assert not plan.pays(link, most + 1, 1000, 1.0)


def test_auto_knows_how_much_work_a_layer_does() -> None:
    model, x = prepared("lenet", "auto")
    found = [link.work for link in gates(model).skipping.links]
    conv1, conv2 = 8 * 8 * 8 * 5 * 9, 8 * 4 * 4 * 6 * 5 * 9
    fc1, fc2 = 8 * 9 * 24, 8 * 5 * 9
    assert found == [conv1 + conv2, conv2 + fc1, fc1 + fc2]
    seen: list[float] = []
    gates(model).skipping.pays = lambda _l, _k, _o, examples: bool(seen.append(examples))
    model(torch.cat([x, x, x]))
    assert seen == [3.0] * 3


def test_what_is_left_out_does_not_depend_on_the_steps_before() -> None:
    def compacted(history: list[int]) -> list[bool]:
        model, x = prepared("mlp", "auto")
        set_density(model, 0.3)
        gates(model).skipping.size = 1  # so that it just pays for the whole batch
        for link in gates(model).skipping.links:
            link.work = round(OVERHEAD / 50)
        for examples in history:
            model(x[:examples])
        step(model, x)
        return [compact(layer) is not None for layer in gated_layers(model).values()]

    fresh = compacted([])
    assert any(fresh)
    assert compacted([1, 8, 2]) == fresh


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_auto_takes_the_masked_step_where_nothing_pays(name: str) -> None:
    masked, x = prepared(name, False)
    auto, _ = prepared(name, "auto")
    for model in (masked, auto):
        set_density(model, 0.3)
    loss, expected = step(masked, x)
    got_loss, got = step(auto, x)
    assert left_out(auto) == 0
    assert torch.equal(loss, got_loss)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "gates"),
    [
        (lambda: chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)), "weight"),
        # A closed unit arrives as log 2, which its reader needs.
        (lambda: chain(nn.Linear(6, 9), nn.Softplus(), nn.Linear(9, 5)), "output"),
        (lambda: chain(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 5)), "output"),
    ],
)
def test_a_model_that_cannot_skip(make: Callable[[], nn.Module], gates: str) -> None:
    x = torch.randn(2, 6)
    assert l0fast.gates(sparsify_(make(), gates=gates, example_inputs=x)).skipping is None
    with pytest.raises(ValueError, match=r"^skip: got True; expected 'auto' or False for this mod"):
        sparsify_(make(), gates=gates, example_inputs=x, skip=True)


class ReadsItsWidth(nn.Module):
    """What it computes depends on how many units arrive: nothing raises, the values differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h) * h.shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_would_compute_something_else(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, dtype=dtype)
    same = chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)).to(dtype)
    assert gates(sparsify_(same, example_inputs=x, skip=True)).skipping is not None
    assert gates(sparsify_(ReadsItsWidth().to(dtype), example_inputs=x)).skipping is None
    with pytest.raises(ValueError, match=r"expected 'auto' or False .*\(it differs by"):
        sparsify_(ReadsItsWidth().to(dtype), example_inputs=x, skip=True)


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_bad_values(value: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=rf"^skip: got {value!r}; expected 'auto', True or False$"):
        sparsify_(model, example_inputs=torch.randn(1, 4), skip=value)
    assert not gated_layers(model)


def test_without_an_example_nothing_can_be_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^skip: got True; expected 'auto' or False without exam"):
        sparsify_(model, skip=True)
    assert not gated_layers(model)
