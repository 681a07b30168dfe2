"""Gated layers, each by itself: what they compute, and what they share with the nn layer.

What a whole model adds (the one draw, checkpointing, compilation, DDP) is in
test_layers_in_a_model.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import autograd, functional
from l0fast.constraints.penalty import L0Penalty
from l0fast.layers.conv import L0Conv1d, L0Conv2d, L0Conv3d
from l0fast.layers.conv_transpose import L0ConvTranspose1d, L0ConvTranspose2d, L0ConvTranspose3d
from l0fast.layers.gated_types import GATED_TYPES
from l0fast.layers.linear import L0Linear
from l0fast.layers.options import GATES
from l0fast.maths.hard_concrete import HardConcrete

Case = tuple[Callable[..., nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (nn.Linear, (5, 4), {}, (3, 5)),
    "linear_no_bias": (nn.Linear, (5, 4), {"bias": False}, (3, 5)),
    "linear_square": (nn.Linear, (4, 4), {}, (4, 4)),
    "linear_3d": (nn.Linear, (5, 4), {}, (2, 3, 5)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}, (3, 4, 7)),
    "conv1d_groups": (nn.Conv1d, (4, 6, 2), {"groups": 2, "bias": False}, (3, 4, 5)),
    "conv2d": (nn.Conv2d, (3, 4, (2, 3)), {"dilation": (1, 2)}, (3, 3, 5, 6)),
    "conv2d_square": (nn.Conv2d, (4, 4, 1), {}, (4, 4, 3, 3)),
    "conv2d_groups": (nn.Conv2d, (6, 4, 3), {"groups": 2}, (2, 6, 4, 4)),
    "conv2d_depthwise": (nn.Conv2d, (3, 6, 3), {"groups": 3, "padding": "same"}, (2, 3, 4, 4)),
    "conv2d_reflect": (
        *(nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
        (2, 2, 4, 5),
    ),
    "conv2d_replicate": (
        *(nn.Conv2d, (2, 3, 3), {"padding": (1, 2), "padding_mode": "replicate", "bias": False}),
        (2, 2, 4, 4),
    ),
    "conv2d_circular": (
        *(nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}),
        (2, 2, 4, 4),
    ),
    "conv3d": (nn.Conv3d, (2, 3, 2), {"padding": 1}, (2, 2, 3, 3, 3)),
    "conv3d_groups": (nn.Conv3d, (4, 4, 2), {"groups": 4}, (2, 4, 3, 3, 3)),
    "transposed1d": (
        *(nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        (3, 4, 5),
    ),
    "transposed1d_no_bias": (nn.ConvTranspose1d, (5, 2, 2), {"bias": False}, (3, 5, 4)),
    "transposed2d": (
        *(nn.ConvTranspose2d, (3, 4, (2, 3)), {"dilation": (1, 2), "stride": (1, 2)}),
        (3, 3, 4, 5),
    ),
    "transposed2d_square": (nn.ConvTranspose2d, (4, 4, 1), {}, (4, 4, 3, 3)),
    "transposed2d_groups": (
        *(nn.ConvTranspose2d, (6, 4, 3), {"groups": 2, "stride": 2}),
        (2, 6, 3, 3),
    ),
    "transposed2d_depthwise": (nn.ConvTranspose2d, (3, 6, 2), {"groups": 3}, (2, 3, 3, 3)),
    "transposed3d": (nn.ConvTranspose3d, (2, 3, 2), {"padding": 1}, (2, 2, 3, 3, 3)),
    "transposed3d_groups": (nn.ConvTranspose3d, (4, 4, 2), {"groups": 4}, (2, 4, 2, 2, 2)),
}  # fmt: skip
KINDS: dict[str, Any] = {
    "Linear": L0Linear,
    "Conv1d": L0Conv1d,
    "Conv2d": L0Conv2d,
    "Conv3d": L0Conv3d,
    "ConvTranspose1d": L0ConvTranspose1d,
    "ConvTranspose2d": L0ConvTranspose2d,
    "ConvTranspose3d": L0ConvTranspose3d,
}


def make(name: str, gates: str, noise: str = "batch", dtype: Any = torch.float64) -> Any:
    """(dense layer, gated layer with the same parameters and mixed gates, input)."""
    dense_type, args, kwargs, shape = CASES[name]
    dense = dense_type(*args, **kwargs).to(dtype)
    layer: Any = GATED_TYPES[type(dense)].from_dense(dense, gates=gates, noise=noise)
    with torch.no_grad():  # closed, between and open in evaluation
        spread = torch.linspace(-2.5, 2.5, layer.num_gates, dtype=dtype)
        layer.log_alpha.copy_(spread.view(layer.log_alpha.shape))
    return dense, layer, torch.randn(shape, dtype=dtype)


def over_channels(dense: nn.Module, z: Tensor, t: Tensor) -> Tensor:
    """z [C] times t, whose channels come before the kernel's dimensions."""
    assert isinstance(dense.weight, Tensor)
    return t * z.view(-1, *[1] * (dense.weight.dim() - 2))


def naive(dense: Any, gates: str, z: Tensor, x: Tensor) -> Tensor:
    """The definition: gate the input, the output, or each weight of the nn layer."""
    if gates == "input":
        return dense(over_channels(dense, z, x))
    if gates == "output":
        return over_channels(dense, z, dense(x))
    return torch.func.functional_call(dense, {"weight": dense.weight * z}, (x,))


SITES = [("batch", gates) for gates in GATES] + [("example", "input"), ("example", "output")]


@pytest.mark.parametrize(("noise", "gates"), SITES)
@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_definition(name: str, noise: str, gates: str) -> None:
    dense, layer, x = make(name, gates, noise)
    x.requires_grad_()
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    if noise == "batch":
        expected = naive(dense, gates, functional.hard_concrete(layer.log_alpha).z, x)
    else:
        z = functional.hard_concrete(layer.log_alpha.expand(len(x), -1)).z
        rows = [naive(dense, gates, z[i], x[i : i + 1]) for i in range(len(x))]
        expected = torch.cat(rows)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)

    dy = torch.randn_like(y)
    inputs = (x, *layer.parameters())
    wanted = torch.autograd.grad(expected, inputs, dy, retain_graph=True)
    for got, want in zip(torch.autograd.grad(y, inputs, dy), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("noise", "gates"), SITES)
@pytest.mark.parametrize("name", CASES)
def test_evaluation_uses_the_median_and_can_be_folded(name: str, noise: str, gates: str) -> None:
    dense, layer, x = make(name, gates, noise)
    layer.eval()
    z = HardConcrete().median(layer.log_alpha)
    assert (z == 0).any()
    y = layer(x)
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(y, naive(dense, gates, z, x), rtol=1e-10, atol=1e-12)
    # In evaluation the gates are differentiable too (fine-tuning, saliency).
    assert torch.autograd.grad(y.sum(), layer.log_alpha)[0].isfinite().all()

    folded = layer.folded(layer.evaluation_gates())
    assert type(folded) is type(dense)
    assert repr(folded) == repr(dense)
    assert set(folded.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(folded(x), y, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        folded.weight.zero_()
    assert bool((layer.weight != 0).any())  # nothing is shared


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("noise", "gates"), SITES)
@pytest.mark.parametrize("name", CASES)
def test_open_gates_change_no_bit(name: str, noise: str, gates: str, training: bool) -> None:
    dense, layer, x = make(name, gates, noise, torch.float32)
    layer.train(training)
    with torch.no_grad():
        layer.log_alpha.fill_(1e4)
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ["conv1d", "conv2d_groups", "conv3d", "linear", "transposed2d"])
def test_unbatched_inputs(name: str, gates: str) -> None:
    _, layer, x = make(name, gates)
    layer.eval()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    if gates != "weight":
        layer.train()
        layer.noise = "example"
        torch.manual_seed(1)
        y = layer(x[0])
        torch.manual_seed(1)
        torch.testing.assert_close(y, layer(x[:1])[0])


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_a_transposed_layer_takes_the_size_of_its_output(training: bool, gates: str) -> None:
    dense, layer, x = make("transposed1d", gates)
    layer.train(training)
    with torch.no_grad():
        layer.log_alpha.fill_(1e4)
    sizes = [9, 10]
    assert [layer(x, [size]).shape[-1] for size in sizes] == sizes
    for size in ([9], (3, 6, 10)):
        assert torch.equal(layer(x, output_size=size), dense(x, output_size=size))
    with pytest.raises(ValueError, match="valid sizes"):
        layer(x, [11])


@pytest.mark.parametrize("gates", ["input", "output"])
@pytest.mark.parametrize("name", ["linear_3d", "conv2d"])
def test_each_example_has_its_own_gates(name: str, gates: str) -> None:
    _, layer, x = make(name, gates, "example")
    x = x[:1].expand(4, *x.shape[1:])
    with torch.no_grad():
        layer.log_alpha.zero_()
    y = layer(x)
    assert all(not torch.equal(y[0], y[i]) for i in range(1, 4))
    layer.noise = "batch"
    y = layer(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", CASES)
def test_group_size_counts_what_a_closed_gate_silences(name: str, gates: str) -> None:
    dense, layer, _ = make(name, gates)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.uniform_(1, 2)
    for k in range(layer.num_gates):
        z = torch.ones(layer.num_gates, dtype=torch.float64)
        z[k] = 0
        folded = layer.folded(z.view(layer.log_alpha.shape))
        zeros = sum(int((parameter == 0).sum()) for parameter in folded.parameters())
        assert zeros == layer.group_size


def test_a_closed_filter_has_no_bias_left() -> None:
    for training in (True, False):
        layer = L0Conv2d(2, 3, 3).train(training)
        with torch.no_grad():
            layer.log_alpha[1] = -1e4
        y = layer(torch.randn(1, 2, 5, 5))
        assert (y[:, 1] == 0).all()
        assert y.any()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_closed_gates_give_exactly_zero_gradients(kind: str, gates: str) -> None:
    args, shape = ((40, 30), (8, 40)) if kind == "Linear" else ((20, 30, 1), (4, 20, 2, 2))
    layer = KINDS[kind](*args, gates=gates, droprate_init=0.5)
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(5)
    layer(x).sum().backward()
    torch.manual_seed(5)
    z = functional.hard_concrete(layer.log_alpha.detach()).z
    inside = (z > 0) & (z < 1)
    assert (z == 0).any()
    assert (z == 1).any()
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert layer.log_alpha.grad is not None
    assert (layer.log_alpha.grad[~inside] == 0).all()
    assert (layer.log_alpha.grad[inside] != 0).all()
    dim = {"weight": None, "output": 0, "input": 1}[gates]
    axis = layer.weight.grad if dim is None else layer.weight.grad.transpose(0, dim)
    assert (axis[z == 0] == 0).all()
    assert (axis[z > 0] != 0).all()
    if gates == "output":
        assert torch.equal(layer.bias.grad == 0, z == 0)
    if gates == "input":
        assert x.grad is not None
        assert (x.grad.transpose(0, 1)[z == 0] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_gated_linear_gradcheck(lead: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    z = torch.tensor([0.2, 1.0, 0.7, 0.05], dtype=torch.float64, requires_grad=True)
    inputs: Any = (x, weight, b, z)
    assert torch.autograd.gradcheck(autograd.gated_linear, inputs)


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "z"])
def test_gated_linear_gives_each_gradient_alone(needs: str) -> None:
    tensors = {
        "x": torch.randn(3, 4),
        "weight": torch.randn(5, 4),
        "bias": torch.randn(5),
        "z": torch.tensor([0.0, 0.5, 1.0, 1e-8]),
    }
    tensors[needs].requires_grad_()
    y = autograd.gated_linear(*tensors.values())
    x, weight, bias, z = tensors.values()
    expected = nn.functional.linear(x * z, weight, bias)
    assert torch.equal(y, expected)
    dy = torch.randn(3, 5)
    (got,) = torch.autograd.grad(y, tensors[needs], dy)
    (wanted,) = torch.autograd.grad(expected, tensors[needs], dy)
    if needs == "z":
        assert got[0] == 0  # where z is clamped its gradient is not asked for: it is zero
        got, wanted = got[1:], wanted[1:]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("arrives", ["all", "open"])
@pytest.mark.parametrize("cols", [None, [0, 2, 3]])
@pytest.mark.parametrize("rows", [None, [1, 4]])
def test_gated_linear_of_what_is_open(
    rows: list[int] | None, cols: list[int] | None, arrives: str, slope: bool
) -> None:
    """Equal to the whole layer's, and with its gradients, zero for what is left out."""
    kept = None if cols is None else torch.tensor(cols)
    index = slice(None) if rows is None else torch.tensor(rows)
    x = torch.randn(2, 3, 4).double().requires_grad_(slope)
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    z = torch.tensor([0.2, 0.0 if cols else 1.0, 0.7, 0.05]).double()
    needed = [tensor.requires_grad_() for tensor in (weight, bias, z)] + [x] * slope
    seen = x if arrives == "all" or kept is None else x[..., kept]
    gather = kept if arrives == "all" else None
    y = autograd.gated_linear(
        seen, weight, bias, z, None if rows is None else torch.tensor(rows), kept, gather
    )
    expected = nn.functional.linear(x * z, weight, bias)[..., index]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, needed, dy)
    for one, other in zip(got, torch.autograd.grad(expected, needed, dy), strict=True):
        if one.shape == z.shape:  # where z is clamped its gradient is not asked for
            other = other * (z > 0)
        torch.testing.assert_close(one, other)


# --- what is shared with the nn layer ----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["linear", "conv1d_groups", "conv2d_circular", "conv3d", "transposed1d"]
)
def test_from_dense_keeps_parameters_mode_and_hooks(name: str) -> None:
    dense_type, args, kwargs, _ = CASES[name]
    dense: Any = dense_type(*args, **kwargs).eval()
    dense.weight.requires_grad_(False)
    calls: list[str] = []
    dense.register_forward_hook(lambda *_: calls.append("hook"))
    before = dict(vars(dense))
    kept = {key: copy.copy(value) for key, value in before.items()}
    layer: Any = GATED_TYPES[type(dense)].from_dense(dense)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert isinstance(layer, type(dense))
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.gates == ("input" if name == "linear" else "output")
    assert repr(layer) == f"L0{repr(dense)[:-1]}, gates={layer.gates!r})"
    layer(torch.randn(CASES[name][3]))
    assert calls == ["hook"]
    layer.register_forward_hook(lambda *_: None)
    assert vars(dense).keys() == kept.keys()
    for key, value in kept.items():
        assert vars(dense)[key] is before[key]
        assert vars(dense)[key] == value or isinstance(value, Tensor)


BLOCKS: dict[str, tuple[nn.Module, Tensor]] = {
    "Linear": (nn.Linear(6, 4), torch.randn(3, 6)),
    "Conv2d": (nn.Conv2d(6, 4, 2), torch.randn(3, 6, 4, 4)),
    "Conv2d in groups": (nn.Conv2d(6, 4, 2, groups=2), torch.randn(3, 6, 4, 4)),
    "ConvTranspose1d": (nn.ConvTranspose1d(6, 4, 2, groups=2), torch.randn(3, 6, 4)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_a_gate_may_serve_a_block_of_inputs(name: str, noise: str) -> None:
    dense, x = copy.deepcopy(BLOCKS[name][0]).double(), BLOCKS[name][1].double()
    kind: Any = GATED_TYPES[type(dense)]
    layer = kind.from_dense(dense, gates="input", units=3, noise=noise)
    assert layer.log_alpha.shape == (2,)
    assert layer.num_gates * layer.group_size == layer.weight.numel()
    assert "units=3" in repr(layer)
    with torch.no_grad():
        layer.log_alpha.copy_(torch.tensor([0.3, -9.0]))
    place = [1, -1] + [1] * (x.dim() - 2)

    def gated(z: Tensor) -> Tensor:
        return dense(x * z.repeat_interleave(3).view(place))

    layer.eval()
    expected = gated(layer.evaluation_gates())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.folded(layer.evaluation_gates())(x), expected)
    assert not hasattr(layer.folded(layer.evaluation_gates()), "units")
    layer.train()
    torch.manual_seed(3)
    out = layer(x)
    if noise == "batch":
        torch.manual_seed(3)
        z = functional.hard_concrete(layer.log_alpha).z
        torch.testing.assert_close(out, gated(z))
    (gradient,) = torch.autograd.grad(out.sum(), layer.log_alpha)
    assert gradient.shape == (2,)
    assert gradient[1] == 0.0  # a closed block
    again = pickle.loads(pickle.dumps(layer)).eval()
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"units": 4}, "units: got 4; expected a divisor of its 6 inputs"),
        ({"units": 0}, "units: got 0; expected a whole number >= 1"),
        ({"units": 2, "gates": "output"}, "units: got 2; expected 1 where gates='output'"),
        ({"units": 2, "gates": "weight"}, "units: got 2; expected 1 where gates='weight'"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        L0Linear.from_dense(nn.Linear(6, 3), **options)


def test_from_dense_leaves_a_layers_own_compilation_behind() -> None:
    dense = nn.Linear(3, 2)
    dense.compile(backend="eager")
    layer = L0Linear.from_dense(dense)
    with torch.no_grad():
        layer.log_alpha.fill_(-1e4)
    assert not (layer(torch.randn(1, 3)) - layer.bias).any()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    "name", ["linear_no_bias", "conv1d", "conv2d_depthwise", "conv3d", "transposed2d"]
)
def test_state_dicts_go_from_and_into_the_dense_layer(name: str, gates: str) -> None:
    dense, layer, _ = make(name, gates)
    other: Any = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    kept = layer.log_alpha.detach().clone()
    state = other.state_dict()
    assert layer.load_state_dict(state) == ([], [])
    assert "log_alpha" not in state
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.log_alpha, kept)

    result = dense.load_state_dict(layer.state_dict(), strict=False)
    assert result == ([], ["_extra_state", "log_alpha"])

    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        fresh.log_alpha.zero_()
    assert fresh.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(fresh.log_alpha, kept)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"log_alpha": kept})


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_after_a_training_step(clone: Callable[[Any], Any], gates: str) -> None:
    layer = L0Conv2d(2, 3, 3, gates=gates, noise="batch", distribution=HardConcrete(bound=3.0))
    x = torch.randn(2, 2, 4, 4)
    layer(x).sum().backward()
    layer(x)  # a draw whose graph is alive
    twin = clone(layer)
    assert twin.distribution == layer.distribution
    assert twin.log_alpha.data_ptr() != layer.log_alpha.data_ptr()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.log_alpha.fill_(-1e4)
    assert layer(x).any()


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_equals_from_dense(kind: str) -> None:
    args: tuple[Any, ...] = (4, 3) if kind == "Linear" else (4, 3, 2)
    torch.manual_seed(0)
    layer = KINDS[kind](*args, bias=False, dtype=torch.float64)
    torch.manual_seed(0)
    dense = getattr(nn, kind)(*args, bias=False, dtype=torch.float64)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.bias is None
    assert layer.log_alpha.dtype == torch.float64
    default = KINDS[kind].from_dense(dense)
    assert torch.equal(layer.log_alpha, default.log_alpha)
    assert layer.open_probability().mean().item() == pytest.approx(0.9)


# --- initialisation, precision -----------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.25, 1.0])
def test_density_init_is_the_density(density: float) -> None:
    layer = L0Linear(200, 3, density_init=density)
    assert layer.open_probability().tolist() == pytest.approx([density] * 200, rel=1e-4)


@pytest.mark.parametrize(("droprate", "mean"), [(0.5, 0.0), (0.2, 1.3863)])
def test_droprate_init_is_the_published_one(droprate: float, mean: float) -> None:
    layer = L0Linear(10_000, 1, droprate_init=droprate)
    assert layer.log_alpha.mean().item() == pytest.approx(mean, abs=5e-4)
    assert layer.log_alpha.std().item() == pytest.approx(0.01, rel=0.05)
    if droprate == 0.5:
        assert layer.open_probability().mean().item() == pytest.approx(0.832, abs=5e-4)


def test_project_puts_gates_back_into_the_bound() -> None:
    layer = L0Linear(3, 2, distribution=HardConcrete(bound=2.0))
    with torch.no_grad():
        layer.log_alpha.copy_(torch.tensor([-3.0, 1.0, 7.0]))
    L0Penalty(layer, 0.0).step()
    assert layer.log_alpha.tolist() == [-2, 1, 2]


@pytest.mark.parametrize(("noise", "gates"), SITES)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_autocast(kind: str, noise: str, gates: str) -> None:
    args, shape = ((32, 16), (8, 32)) if kind == "Linear" else ((8, 6, 3), (4, 8, 6, 6))
    layer: Any = KINDS[kind](*args, gates=gates, noise=noise, density_init=0.7)
    x = torch.randn(shape, requires_grad=True)

    def gradients(enabled: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        return torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))

    for got, exact in zip(gradients(True), gradients(False), strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_keep_their_gates_in_float32(dtype: torch.dtype, gates: str) -> None:
    layer = L0Linear(6, 4, gates=gates, dtype=dtype)
    assert layer.log_alpha.dtype == torch.float32
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    for moved in (layer, copy.deepcopy(layer).to(dtype)):  # .to() casts the gates too
        y = moved(x)
        y.float().sum().backward()
        assert y.dtype == dtype
        assert moved.log_alpha.grad is not None
        assert moved.log_alpha.grad.isfinite().all()
        assert moved.eval()(x).dtype == dtype


def test_channels_last_gates() -> None:
    layer: Any = L0Conv2d(4, 6, 3, gates="weight").to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer).to(memory_format=torch.contiguous_format)
    x = torch.randn(2, 4, 5, 5)
    for moved in (layer, twin):
        torch.manual_seed(1)
        moved(x.to(memory_format=torch.channels_last)).sum().backward()
    torch.testing.assert_close(layer.log_alpha.grad, twin.log_alpha.grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("noise", ["batch", "example"])
@pytest.mark.parametrize("training", [True, False])
def test_a_single_input_is_refused_and_not_repeated(name: str, noise: str, training: bool) -> None:
    dense, args, options, shape = CASES[name]
    layer = KINDS[dense.__name__](*args, **options, gates="input", noise=noise)
    channels = 1 if name == "conv2d" else -1
    x = torch.randn(shape).narrow(channels, 0, 1)
    with pytest.raises((ValueError, RuntimeError), match=r"expected (input|\d+ features)|expected"):
        layer.train(training)(x)
