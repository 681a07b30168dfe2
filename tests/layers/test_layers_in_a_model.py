"""Gated layers inside a model: one draw for all, and whatever else runs a model's forward."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from l0fast import functional
from l0fast.constraints.constraint import DensityConstraint
from l0fast.gating.param_groups import param_groups
from l0fast.gating.sparsify import sparsify_
from l0fast.layers import handle
from l0fast.layers.expected import expected_open
from l0fast.layers.handle import gated_layers
from l0fast.layers.linear import L0Linear
from l0fast.layers.sampling import attach_draw, detach
from l0fast.maths.hard_concrete import HardConcrete
from tests.helpers.processes import run_processes
from tests.helpers.thinned import thinned_product


def net() -> nn.Sequential:
    """[N, 2, 6, 6] -> [N, 3]: gates on 6 channels, 96 inputs and 8 inputs."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 6, 3),
            relu1=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(96, 8),
            relu2=nn.ReLU(),
            fc2=nn.Linear(8, 3),
        )
    )


def gated(model: nn.Module | None = None, **options: Any) -> Any:
    """A model with gates, half of them closed at a time."""
    options.setdefault("density_init", 0.5)
    return sparsify_(model or net(), **options)


def example() -> Tensor:
    return torch.randn(5, 2, 6, 6)


def seeded(model: Callable[..., Tensor], x: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of gates of each draw."""
    calls: list[int] = []
    original = functional.draw  # hard_concrete goes through it too

    def counted(log_alpha: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(log_alpha.numel())
        return original(log_alpha, *args, **kwargs)

    monkeypatch.setattr(functional, "draw", counted)
    return calls


class Count(TorchDispatchMode):
    """The names of the operations dispatched, but for views and the profiler's marks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "record_function" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# --- one draw ----------------------------------------------------------------------------------


def test_one_draw_serves_the_model(draws: list[int]) -> None:
    model, x = gated(), example()
    constraint = DensityConstraint(model, 0.5)
    (model(x).sum() + constraint()).backward()
    assert draws == [6 + 96 + 8]
    model.eval()(x)
    assert len(draws) == 1
    model.train()
    model.conv.eval()
    model(x)
    assert draws[1:] == [96 + 8]


def test_the_draw_is_cut_in_the_models_order() -> None:
    model, x = gated(), example()
    y = seeded(model, x)
    log_alphas = [layer.log_alpha for layer in gated_layers(model).values()]
    torch.manual_seed(1)
    z = functional.hard_concrete(torch.cat(log_alphas)).z.split([6, 96, 8])
    h = F.conv2d(x, model.conv.weight, model.conv.bias) * z[0][:, None, None]
    h = F.linear(F.relu(h).flatten(1) * z[1], model.fc1.weight, model.fc1.bias)
    expected = F.linear(F.relu(h) * z[2], model.fc2.weight, model.fc2.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    parameters = tuple(model.parameters())
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, parameters, dy)
    for got, want in zip(torch.autograd.grad(y, parameters, dy), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_distributions_and_dtypes_are_drawn_apart(draws: list[int]) -> None:
    model = gated(include="conv", distribution=HardConcrete(temperature=0.5))
    sparsify_(model)
    model.fc2.double()
    model.fc2.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    seeded(model, example()).sum().backward()
    assert sorted(draws) == [6, 8, 96]


def test_a_layer_outside_the_models_forward_draws_by_itself(draws: list[int]) -> None:
    model = gated()
    h = torch.ones(1, 96)
    model(example())
    assert not torch.equal(model.fc1(h), model.fc1(h))
    assert draws == [110, 96, 96]


class Repeats(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x), self.layer(x)])


def test_a_layer_called_twice_in_a_forward_has_one_set_of_gates(draws: list[int]) -> None:
    model, x = gated(Repeats(nn.Linear(30, 4))), torch.ones(1, 30)
    first, second = model(x)
    assert torch.equal(first, second)
    assert draws == [30]
    (first + second).sum().backward()
    assert not torch.equal(model(x)[0], first)


def test_nested_models_share_the_outer_draw(draws: list[int]) -> None:
    inner = gated(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    model = gated(nn.Sequential(nn.Linear(7, 6), Repeats(inner)))
    first, second = model(torch.ones(1, 7))
    assert draws == [7 + 6 + 5]
    assert torch.equal(first, second)
    inner(torch.ones(1, 6))  # by itself it draws its own gates
    assert draws[1:] == [6 + 5]
    model(torch.ones(1, 7)).sum().backward()
    assert draws[2:] == [7 + 6 + 5]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_forward_leaves_no_draw_behind(
    error: type[BaseException], draws: list[int]
) -> None:
    model, x = gated(), example()

    def stop(*_: Any) -> None:
        raise error("stop")

    handle = model.fc2.register_forward_pre_hook(stop)
    with pytest.raises(error, match="stop"):
        model(x)
    handle.remove()
    if error is ValueError:  # torch runs no hooks after a KeyboardInterrupt
        assert not torch.equal(*(model.fc1(torch.ones(1, 96)) for _ in range(2)))
        assert draws == [110, 96, 96]
        del draws[1:]
    first = model(x)
    assert draws == [110, 110]
    first.sum().backward()
    model(x).sum().backward()
    model.fc1(torch.ones(1, 96))
    assert draws[2:] == [110, 96]


def test_attaching_twice_draws_once_and_detaching_undoes_it(draws: list[int]) -> None:
    model, x = gated(), example()
    attach_draw(model)
    model(x)
    assert draws == [110]
    detach(nn.Sequential(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    model(x)
    assert draws[1:] == [6, 96, 8]


def test_evaluation_is_deterministic_and_draws_nothing(draws: list[int]) -> None:
    model, x = gated().eval(), example()
    assert torch.equal(seeded(model, x, 1), seeded(model, x, 2))
    assert draws == []


# --- the count that comes with the draw --------------------------------------------------------

MOMENTS: dict[str, Callable[[Any, Tensor], object]] = {
    "after a forward": lambda model, x: model(x),
    "without a forward": lambda model, x: None,
    "in evaluation": lambda model, x: model.eval()(x),
    "after a forward without gradients": lambda model, x: torch.no_grad()(model)(x),
    "after the gates have moved": lambda model, x: (
        model(x),
        torch.no_grad()(model.fc1.log_alpha.add_)(1),
    ),
    "after a layer alone": lambda model, x: (model(x), model.fc1(torch.ones(1, 96))),
    "after the backward": lambda model, x: model(x).sum().backward(),
    "a second time": lambda model, x: (
        model(x),
        expected_open(list(gated_layers(model).values())).sum().backward(),
    ),
}


@pytest.mark.parametrize(
    ("noise", "gates"), [("batch", "auto"), ("batch", "weight"), ("example", "auto")]
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_expected_open_is_right_at_any_moment(moment: str, noise: str, gates: str) -> None:
    model, x = gated(gates=gates, noise=noise), example()
    MOMENTS[moment](model, x)
    layers = list(gated_layers(model).values())
    model.zero_grad()
    counts = expected_open(layers)
    parts = [torch.sigmoid(layer.log_alpha.detach() + 1.5986) for layer in layers]
    torch.testing.assert_close(
        counts.detach(), torch.stack([part.sum() for part in parts]), rtol=1e-4, atol=1e-3
    )
    (counts @ torch.tensor([1.0, 2.0, 3.0])).backward()
    for weight, part, layer in zip((1, 2, 3), parts, layers, strict=True):
        torch.testing.assert_close(
            layer.log_alpha.grad, weight * part * (1 - part), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("some", [slice(1, None), slice(None, None, -1), slice(0, 2)])
def test_expected_open_of_some_layers_in_any_order(some: slice) -> None:
    model = gated()
    for name, value in (("conv", -1.0), ("fc1", 0.0), ("fc2", 1.0)):
        model.get_submodule(name).log_alpha.data.fill_(value)
    model(example())
    layers = list(gated_layers(model).values())[some]
    expected = [layer.open_probability().sum().item() for layer in layers]
    assert expected_open(layers).tolist() == pytest.approx(expected)


def test_expected_open_of_layers_of_two_models() -> None:
    one, other = gated(density_init=0.25), gated(density_init=0.75)
    one(example())
    other(example())
    got = expected_open([one.conv, other.fc1, one.fc2])
    assert got.tolist() == pytest.approx([6 * 0.25, 96 * 0.75, 8 * 0.25])


def test_expected_open_of_layers_on_several_devices() -> None:
    with FakeTensorMode():  # which has devices that are not there
        model = nn.Sequential(nn.Linear(4, 6, device="cuda:0"), nn.Linear(6, 5, device="cuda:1"))
        got = expected_open(list(gated_layers(sparsify_(model)).values()))
    assert (got.shape, got.device) == ((2,), torch.device("cuda:0"))


@pytest.mark.parametrize("gates", ["auto", "weight"])
def test_the_count_of_a_step_is_not_computed_again(gates: str) -> None:
    model = gated(gates=gates)
    layers = list(gated_layers(model).values())
    model(example())
    alone = L0Linear(6, 4)
    handle.gates(alone)  # as a constraint on it does
    alone(torch.ones(1, 6))
    for group in (layers, [alone]):
        with Count() as count:
            expected_open(group)
        assert "aten::sigmoid" not in count.names
        with Count() as count:
            expected_open(group)
        assert "aten::sigmoid" in count.names


def test_a_loss_and_a_constraint_may_go_backward_apart() -> None:
    model, x = gated(), example()
    constraint = DensityConstraint(model, 0.5)
    constraint.multiplier.fill_(2.0)

    def gradients(together: bool) -> list[Tensor]:
        model.zero_grad()
        loss = seeded(model, x).square().sum()
        if together:
            (loss + constraint()).backward()
        else:
            loss.backward()
            constraint().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)


def test_a_draw_does_not_keep_its_model_alive() -> None:
    model = gated()
    model(example()).sum().backward()
    conv, enabled = weakref.ref(model.conv), gc.isenabled()
    gc.disable()  # a cycle would hold the parameters until the next collection
    try:
        del model
        assert conv() is None
    finally:
        if enabled:
            gc.enable()


@pytest.mark.parametrize(("skip", "most"), [(False, 68), (True, 99)])
def test_a_training_step_dispatches_few_operations_and_reads_nothing_back(
    skip: bool, most: int
) -> None:
    mlp = nn.Sequential(
        *(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    )
    x, y = torch.randn(16, 784), torch.randint(10, (16,))
    model = sparsify_(mlp, density_init=0.33, example_inputs=x, skip=skip)
    constraint = DensityConstraint(model, 0.33)
    constraint.multiplier.fill_(0.1)
    optimizer = torch.optim.Adam(param_groups(model, 7e-4), fused=True)

    def step() -> None:
        (F.cross_entropy(model(x), y) + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()

    step()
    with Count() as count:
        step()
    assert "aten::_local_scalar_dense" not in count.names
    assert count.names.count("aten::_fused_adam_") == 2
    assert len(count.names) <= most, (len(count.names), sorted(count.names))


# --- what else runs a model's forward ----------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_draw_for_themselves(
    clone: Callable[[Any], Any], draws: list[int]
) -> None:
    model, x = gated(), example()
    model(x).sum().backward()
    model(x)
    twin = clone(model)
    y = seeded(model, x)
    assert torch.equal(seeded(twin, x), y)
    assert draws[2:] == [110, 110]
    with torch.no_grad():
        twin.fc2.log_alpha.fill_(-1e4)
    assert torch.equal(seeded(model, x), y)
    assert torch.equal(twin(x), twin.fc2.bias.expand(5, 3))


def test_state_dicts_go_from_and_into_the_dense_model() -> None:
    dense, model = net(), gated(gates="weight")
    kept = model.fc1.log_alpha.detach().clone()
    assert model.load_state_dict(dense.state_dict()) == ([], [])
    assert torch.equal(model.fc1.weight, dense.fc1.weight)  # type: ignore[arg-type]
    assert torch.equal(model.fc1.log_alpha, kept)
    with torch.no_grad():
        model.fc1.weight.add_(1)
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    names = [(name, of) for name in ("conv", "fc1", "fc2") for of in ("_extra_state", "log_alpha")]
    assert unexpected == [f"{name}.{of}" for name, of in names]
    assert torch.equal(model.fc1.weight, dense.fc1.weight)  # type: ignore[arg-type]


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False) if self.on else self.net(x)


@pytest.mark.parametrize(
    ("noise", "gates"),
    [("batch", "auto"), ("batch", "output"), ("batch", "weight"), ("example", "auto")],
)
def test_activation_checkpointing_replays_the_same_gates(noise: str, gates: str) -> None:
    model = gated(Checkpointed(net()), gates=gates, noise=noise)
    constraint = DensityConstraint(model, 0.5)
    constraint.multiplier.fill_(1.0)
    x = example()
    results = []
    for model.on in (False, True):
        model.zero_grad()
        loss = seeded(model, x).square().sum() + constraint()
        torch.rand(7)  # what happens between does not matter
        model.net.fc2(torch.ones(1, 8))
        loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused_in_words() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.one, self.two):
                x = checkpoint(layer, x.relu(), use_reentrant=True)
            return x

    model = sparsify_(Reentrant(), example_inputs=torch.randn(4, 8))
    with torch.no_grad():
        model(torch.randn(4, 8))  # a forward without autograd is no fault
    loss = model(torch.randn(4, 8, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="got use_reentrant=True; expected use_reentrant=False"):
        loss.backward()


def test_a_checkpointed_model_draws_again_what_it_drew() -> None:
    model, x = gated(), example()
    results = []
    for wrapped in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        seeded(wrapped, x).square().sum().backward()  # type: ignore[arg-type]
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


def test_checkpoints_of_two_forwards_are_refused_rather_than_confused() -> None:
    model = gated(Checkpointed(net()))
    model(example())  # thrown away: it waits for no backward
    model(example()).sum().backward()
    model(example()).sum().backward()
    loss = model(example()).sum() + model(example()).sum()
    with pytest.raises(RuntimeError, match="activation checkpointing: got several forward passes"):
        loss.backward()
    del loss
    model(example()).sum().backward()


def test_autocast_with_a_constraint() -> None:
    model, x = gated(), example()
    constraint = DensityConstraint(model, 0.4)
    constraint.multiplier.fill_(1.0)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = seeded(model, x)
            term = constraint()
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert term.dtype == torch.float32
        (y.float().square().sum() + term).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert (half - exact).norm() < 0.05 * exact.norm()


# torch.compile looks at the draw's tensors, and hides this warning only where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("gates", "training"), thinned_product(2, ["auto", "weight"], [True, False])
)
def test_compile_traces_a_model_once_for_all_steps(gates: str, training: bool) -> None:
    model = gated(gates=gates).train(training)
    constraint = DensityConstraint(model, 0.5)
    constraint.multiplier.fill_(1.0)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(param_groups(model, 0.1))
    x = example()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            y = seeded(compiled, x, seed)
            got = torch.autograd.grad(y.square().sum() + constraint(), list(model.parameters()))
            expected = seeded(model, x, seed)
            torch.testing.assert_close(y, expected)
            wanted = torch.autograd.grad(
                expected.square().sum() + constraint(), list(model.parameters())
            )
            for parameter, gradient, want in zip(model.parameters(), got, wanted, strict=True):
                torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
                parameter.grad = gradient
            optimizer.step()
            constraint.step()


# torch.compile looks at the draw's tensors, and hides this warning only where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loss_and_a_constraint_may_go_backward_apart() -> None:
    model, x = gated(), example()
    constraint = DensityConstraint(model, 0.5)
    constraint.multiplier.fill_(1.0)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        seeded(run, x).square().sum().backward()
        constraint().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, one in zip(*gradients, strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-4, atol=1e-5)


def test_a_layer_compiled_by_itself() -> None:
    layer, x = L0Linear(6, 4, droprate_init=0.5), torch.randn(3, 6)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            assert torch.equal(seeded(compiled, x, seed), seeded(layer, x, seed))


def train_in_parallel(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = gated()
    constraint = DensityConstraint(model, 0.3)
    constraint.multiplier.fill_(1.0)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.1))
    torch.manual_seed(rank)  # other data and other gates
    for _ in range(3):
        (parallel(example()).square().mean() + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    torch.save((model.state_dict(), constraint.multiplier), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_trains_gates_that_agree(tmp_path: Any) -> None:
    run_processes(train_in_parallel, 2, str(tmp_path / "store"), str(tmp_path))
    (state, multiplier), (other, other_multiplier) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    torch.manual_seed(0)
    start = gated().state_dict()
    assert torch.equal(multiplier, other_multiplier)
    for name, value in state.items():
        assert torch.equal(value, other[name])
        assert torch.equal(value, start[name]) == name.endswith("._extra_state")
