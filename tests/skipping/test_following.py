"""Layers without gates that leave out what their neighbours do: a hook on them, and no more."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from l0fast import sparsify_
from l0fast.graph.calls import Example
from l0fast.graph.sites import find_sites
from l0fast.layers.handle import gates
from l0fast.skipping import attach
from l0fast.skipping.attach import stop_skipping
from l0fast.skipping.following import Following, follow
from l0fast.skipping.links import find_links
from tests.helpers import plain_models as plain
from tests.helpers.steps import (
    EXACT,
    assert_same_step,
    chain,
    following,
    left_out,
    pair,
    prepared,
    set_density,
    step,
)


def watched(model: nn.Module) -> list[int]:
    """How many rows of a weight each product of matrices has from now on."""
    rows: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear and all(isinstance(one, Tensor) for one in args[:2]):
                rows.append(len(args[1]))
            return func(*args, **(kwargs or {}))

    inner = model.forward

    def forward(*args: Any) -> Any:
        with Watch():
            return inner(*args)

    model.forward = forward
    return rows


# --- what is left on the user's layers ------------------------------------------------------------


def test_a_hook_is_all_that_is_left_on_a_users_layer() -> None:
    torch.manual_seed(0)
    model = chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
    plain = {"0", "1", "2"}

    def found() -> list[tuple[Any, ...]]:
        return [
            (name, *(list(vars(module)[key].items()) for key in ("_parameters", "_buffers")))
            for name, module in model.named_modules()
            if name in plain
        ]

    attributes = {name: set(vars(model.get_submodule(name))) for name in plain}
    before = found()
    x = torch.randn(4, 3, 8, 8)
    sparsify_(model, include="3", gates="input", example_inputs=x, skip=True)
    set_density(model, 0.3)
    for _ in range(2):
        for name in plain:
            module = model.get_submodule(name)
            assert set(vars(module)) == attributes[name]
            hooks = list(module._forward_pre_hooks.values())
            assert [type(hook) for hook in hooks] == [Following] * (name != "2")
            assert not module._forward_hooks
        assert str(found()) == str(before)
        with torch.no_grad():
            model.eval()(x)
            model.train()
    step(model, x)
    assert left_out(model) == 1
    for name in plain:
        assert set(vars(model.get_submodule(name))) == attributes[name]
    stop_skipping(model)
    for name in plain:
        module = model.get_submodule(name)
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_a_layer_changes_nothing(error: type[BaseException]) -> None:
    skipped, masked, x = pair()
    before = {name: value.clone() for name, value in skipped.state_dict().items()}
    held = dict(skipped.a._parameters)

    class Stop(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear and isinstance(args[0], Tensor) and len(args[1]) < 32:
                raise error("stopped")  # in the midst of computing less
            return func(*args, **(kwargs or {}))

    with pytest.raises(error, match="stopped"), Stop():
        skipped(x)
    assert all(skipped.a._parameters[name] is value for name, value in held.items())
    after = skipped.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert skipped.a(x).shape == (8, 32) or error is KeyboardInterrupt
    assert_same_step(masked, skipped, x, EXACT)
    assert following(skipped.a).compact is not None


class ReadsAWeight(nn.Module):
    """Besides the call of the layer whose weight it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(input=x).relu()  # by keyword
        self.shapes.append(tuple(self.a.weight.shape))
        if h.requires_grad:
            h.register_hook(lambda _: self.shapes.append(tuple(self.a.weight.shape)))
        return self.b(h) + self.a.weight.square().mean()


def test_code_around_a_layer_sees_its_whole_weight() -> None:
    torch.manual_seed(0)
    masked, x = ReadsAWeight().double(), torch.randn(8, 6).double()
    skipped = copy.deepcopy(masked)
    for model, skip in ((masked, False), (skipped, True)):
        sparsify_(model, include="b", gates="input", example_inputs=x, skip=skip)
        set_density(model, 0.3)
    skipped.shapes.clear()
    rows = watched(skipped)
    assert_same_step(masked, skipped, x, EXACT)
    assert rows[0] < 32
    assert skipped.shapes == [(32, 6), (32, 6)]


# --- whose hooks they are -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # that of a penalty
@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.a.register_forward_pre_hook(lambda *_: None),
        lambda model: model.a.register_forward_hook(lambda *_: None),
        lambda model: model.a.register_full_backward_hook(lambda *_: None),
        lambda model: model.b.register_full_backward_pre_hook(lambda *_: None),
        lambda _: register_module_full_backward_hook(lambda *_: None),
    ],
)
def test_where_others_have_hooks_nothing_is_left_out(register: Callable[[Any], Any]) -> None:
    skipped, masked, x = pair()
    x.requires_grad_()
    rows = watched(skipped)
    handle = register(skipped)
    try:
        assert_same_step(masked, skipped, x, 0.0)
    finally:
        handle.remove()
    assert rows[0] == 32
    step(skipped, x)
    assert rows[2] < 32


@pytest.mark.parametrize("name", ["0", "0.1", "1", "1.1"])
def test_a_hook_on_a_block_sees_every_unit(name: str) -> None:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(6, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 9), nn.ReLU()),
    ]
    model = nn.Sequential(*blocks, nn.Linear(9, 4)).double()
    x = torch.randn(8, 6).double()
    sparsify_(model, include="1.0", gates="input", example_inputs=x, skip=True)
    set_density(model, 0.3)
    rows = watched(model)
    model(x)
    assert rows[0] < 32
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *called: seen.append(called[2]))
    model(x)
    handle.remove()
    assert seen[0].shape == (8, 32 if name.startswith("0") else 9)
    assert rows[2] == 32
    model(x)
    assert rows[4] < 32


def test_a_hook_on_the_model_or_beside_its_links_changes_nothing() -> None:
    x = torch.randn(8, 6).double()
    model = nn.Sequential(plain.Pair(), nn.Sequential(nn.ReLU(), nn.Linear(5, 5))).double()
    sparsify_(model, include="0.b", gates="input", example_inputs=x, skip=True)
    set_density(model, 0.3)
    rows = watched(model)
    for module in (model, model[0], model[1]):
        module.register_forward_hook(lambda *_: None)
    model(x)
    assert rows[0] < 32


def test_a_layer_whose_hook_is_gone_has_every_unit() -> None:
    skipped, masked, x = pair()
    skipped.a._forward_pre_hooks.clear()
    assert_same_step(masked, skipped, x, 0.0)


def test_sites_have_hooks_by_others_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    for name in ("0", "2"):
        follow(model.get_submodule(name))
    assert [site.fixed for site in find_sites(model, None, {}, {}).values()] == ["", ""]
    model.get_submodule("2").register_full_backward_hook(lambda *_: None)
    fixed = {name: site.fixed for name, site in find_sites(model, None, {}, {}).items()}
    assert fixed == {"0": "", "2": "it has hooks"}


# --- copies, replays, compilers -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_hooks_of_a_copy_are_its_own(how: str) -> None:
    model, _, x = pair()
    step(model, x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert following(twin.a).compact is None
    assert following(twin.a).draw is None
    with torch.no_grad():
        twin.a.weight.mul_(-2.0)
    masked = copy.deepcopy(twin)
    stop_skipping(masked)
    of_the_first = following(model.a).compact
    assert_same_step(masked, twin, x, EXACT)
    assert following(twin.a).compact is not None
    assert following(model.a).compact is of_the_first


@pytest.mark.parametrize("name", ["a hidden layer without gates of its own", "batch norms"])
def test_activation_checkpointing_replays_what_was_left_out(name: str) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model, x = prepared(name, True)
        set_density(model, 0.4)
        if checkpointed:
            inner = model.forward

            def forward(y: Tensor, inner: Any = inner) -> Any:
                return checkpoint(inner, y, use_reentrant=False)

            model.forward = forward
        found.append(step(model, x)[1])
        assert left_out(model) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=EXACT, atol=0)


def test_a_model_is_compiled_whole_with_every_unit() -> None:
    torch.manual_seed(0)
    model, x = prepared("batch norms", True, torch.float32)
    set_density(model, 0.3)
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    step(model, x)  # leaves something out, which must not be compiled in
    model.load_state_dict(masked.state_dict())
    graphs: list[Tensor] = []
    for one in (masked, model):
        torch._dynamo.reset()
        compiled: Any = torch.compile(one, backend="eager", fullgraph=True)
        torch.manual_seed(1)
        graphs.append(compiled(x))
    assert torch.equal(*graphs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler asks for it
@pytest.mark.parametrize("name", ["batch norms", "a circular convolution without gates"])
def test_a_layer_that_is_compiled_by_itself_leaves_out_the_same(name: str) -> None:
    torch._dynamo.reset()
    eager, x = prepared(name, True)
    set_density(eager, 0.3)
    compiled = copy.deepcopy(eager)
    layers = [one for one in compiled.modules() if one._forward_pre_hooks and one is not compiled]
    for layer in layers:
        layer.compile(backend="eager", fullgraph=True)
    assert layers
    assert_same_step(eager, compiled, x, EXACT)
    assert left_out(compiled) > 0


# --- the trial ------------------------------------------------------------------------------------


class Counted(nn.Module):
    """It counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return self.b(self.drop(self.norm(self.a(x)).relu()))


@pytest.mark.parametrize("failing", [-1, 4, 5])  # none, one that skips, one that does not
def test_the_trial_leaves_the_model_as_it_was(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6).double()
    model: Any = sparsify_(Counted().double(), include="b", gates="input", example_inputs=x)
    stop_skipping(model)
    model(x)
    model.norm.eval()
    found = find_links(model, attach.training_trace(model, Example.of(x)))
    called: list[bool] = []

    def outputs(*args: Any) -> list[Tensor]:
        given = _outputs(*args)
        called.append(gates(model).skipping is not None)
        if len(called) == failing:
            raise ValueError("failing")
        return given

    _outputs = attach._outputs
    monkeypatch.setattr(attach, "_outputs", outputs)

    def state() -> list[Any]:
        modules = [
            [type(module), module.training, id(module), *vars(module)] for module in model.modules()
        ]
        hooks = [
            (list(module._forward_pre_hooks.items()), list(module._forward_hooks.items()))
            for module in model.modules()
        ]
        tensors = [(name, id(one)) for name, one in model.named_parameters()]
        return [modules, hooks, tensors, x.tolist(), torch.get_rng_state().tolist()]

    before = state(), {name: value.clone() for name, value in model.state_dict().items()}
    if failing > 0:
        with pytest.raises(ValueError, match="failing"):
            attach._error(model, Example.of(x), found)
    else:
        assert attach._error(model, Example.of(x), found) <= EXACT
    assert any(called)
    assert state() == before[0]
    assert gates(model).skipping is None
    after = model.state_dict()
    assert after.keys() == before[1].keys()
    assert all(torch.equal(after[name], value) for name, value in before[1].items())


def test_the_trial_takes_no_copy_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6).double()
    model: Any = sparsify_(Counted().double(), include="b", gates="input", example_inputs=x)
    found = find_links(model, attach.training_trace(model, Example.of(x)))
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", None)
    assert attach._error(model, Example.of(x), found) <= EXACT
