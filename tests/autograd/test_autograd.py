"""The binding: torch.library ops, their tracing, their gradients, and the choice of backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast import functional
from l0fast.autograd import triton_gated_weight, triton_hard_concrete
from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete
from tests import ROOT
from tests.helpers.interpreter import DEVICE, RUNS_HERE, kernel_test
from tests.helpers.thinned import thinned

DISTRIBUTION = HardConcrete()
NUMBERS = DISTRIBUTION.numbers
SIZES = (5, 0, 11)
SEED = 7
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def state() -> Tensor:
    return philox.state(SEED, 1, 2, DEVICE)


def op_inputs() -> dict[str, tuple[Any, ...]]:
    ops = torch.ops.l0fast
    weight, log_alpha, z = leaf(4, 6), leaf(4, 6), torch.rand(6, device=DEVICE).requires_grad_()
    flat, dopen = leaf(16), torch.randn(3, device=DEVICE)
    return {
        "hard_concrete": (ops.hard_concrete, flat, state(), SIZES, *NUMBERS),
        "hard_concrete_backward": (
            *(ops.hard_concrete_backward, torch.randn(16, device=DEVICE), dopen),
            *(flat.detach(), state(), SIZES, *NUMBERS),
        ),
        "gated_weight": (ops.gated_weight, weight, log_alpha, state(), torch.float32, *NUMBERS),
        "gated_weight_half": (
            ops.gated_weight,
            leaf(3, 5, dtype=torch.bfloat16),
            leaf(3, 5),
            state(),
            torch.bfloat16,
            *NUMBERS,
        ),
        "gated_weight_backward": (
            *(ops.gated_weight_backward, torch.randn(4, 6, device=DEVICE), dopen[0]),
            *(weight.detach(), log_alpha.detach(), state(), *NUMBERS),
        ),
        "scaled_weight": (ops.scaled_weight, weight, z, 1, torch.float32),
        "scaled_weight_backward": (
            *(ops.scaled_weight_backward, torch.randn(4, 6, device=DEVICE)),
            *(weight.detach(), z.detach(), 1),
        ),
        "strided": (ops.gated_weight, leaf(6, 4).t(), log_alpha, state(), torch.float32, *NUMBERS),
    }


# opcheck looks at the gradients of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(name: str) -> None:
    op, *arguments = op_inputs()[name]
    torch.library.opcheck(op.default, tuple(arguments))


def through_ops(log_alpha: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    flat = log_alpha.view(-1)
    sizes = (5, 0, flat.numel() - 5)
    gates = triton_hard_concrete(flat, state(), sizes, DISTRIBUTION)
    masked = triton_gated_weight(weight, log_alpha, state(), None, DISTRIBUTION)
    scaled = triton_gated_weight(weight, rows, state(), 0, DISTRIBUTION)
    return *gates, *masked, *scaled


def through_torch(log_alpha: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    flat = log_alpha.view(-1)
    sizes = (5, 0, flat.numel() - 5)
    named: dict[str, Any] = {"seed": SEED, "step": 1, "tensor": 2, "backend": "torch"}
    gates = functional.hard_concrete(flat, sizes, **named)
    masked = functional.gated_weight(weight, log_alpha, **named)
    scaled = functional.gated_weight(weight, rows, dim=0, **named)
    return *gates, *masked, *scaled


def results_and_gradients(
    through: Callable[..., tuple[Tensor, ...]], keep: tuple[int, ...]
) -> list[Tensor]:
    """All results, and the gradients of some of them by a fixed cotangent."""
    torch.manual_seed(0)
    inputs = leaf(8, 16), leaf(8, 16), leaf(8)
    results = through(*inputs)
    cotangents = [torch.randn_like(result) for result in results]
    torch.autograd.backward([results[i] for i in keep], [cotangents[i] for i in keep])
    zero = torch.zeros((), device=DEVICE)
    return [*results, *(zero if tensor.grad is None else tensor.grad for tensor in inputs)]


# All results; each alone, so that every other gradient is absent.
KEPT = [(0, 1, 2, 3, 4, 5), *((i,) for i in range(6))]


@pytest.mark.parametrize("keep", KEPT, ids=str)
def test_ops_and_reference_agree_on_the_same_noise(keep: tuple[int, ...]) -> None:
    got = results_and_gradients(through_ops, keep)
    expected = results_and_gradients(through_torch, keep)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@kernel_test
@pytest.mark.parametrize("keep", KEPT, ids=str)
def test_kernels_and_reference_agree_on_the_same_noise(keep: tuple[int, ...]) -> None:
    named: dict[str, Any] = {"seed": SEED, "step": 1, "tensor": 2, "backend": "triton"}

    def through_kernels(log_alpha: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        flat = log_alpha.view(-1)
        gates = functional.hard_concrete(flat, (5, 0, flat.numel() - 5), **named)
        masked = functional.gated_weight(weight, log_alpha, **named)
        scaled = functional.gated_weight(weight, rows, dim=-2, **named)
        return *gates, *masked, *scaled

    got = results_and_gradients(through_kernels, keep)
    assert "l0fast_kernels" in sys.modules
    expected = results_and_gradients(through_torch, keep)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@kernel_test
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_autocast_gives_the_compute_dtype_and_keeps_the_gradients(dim: int | None) -> None:
    weight = leaf(8, 16)
    log_alpha = leaf(8, 16) if dim is None else leaf(weight.shape[dim])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        masked, expected_open = functional.gated_weight(
            weight, log_alpha, dim=dim, seed=SEED, backend="triton"
        )
    assert masked.dtype == torch.bfloat16
    assert expected_open.dtype == torch.float32
    expected = functional.gated_weight(weight, log_alpha, dim=dim, seed=SEED, backend="torch")
    torch.testing.assert_close(masked.float(), expected.weight, rtol=2**-7, atol=1e-5)
    masked.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert log_alpha.grad is not None


@kernel_test
def test_without_a_seed_the_torch_generator_governs() -> None:
    log_alpha = leaf(64)
    draws: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(functional.hard_concrete(log_alpha, backend="triton").z)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    again = functional.hard_concrete(log_alpha, backend="triton").z
    assert not torch.equal(draws[2], again)


@kernel_test
def test_a_checkpoint_replays_the_same_gates() -> None:
    from torch.utils.checkpoint import checkpoint

    log_alpha = leaf(64)
    seen: list[Tensor] = []

    def block(log_alpha: Tensor) -> Tensor:
        z = functional.hard_concrete(log_alpha, backend="triton").z
        seen.append(z.detach())
        return (z * z).sum()

    total: Any = checkpoint(block, log_alpha, use_reentrant=False)
    total.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("through", [through_ops, through_torch])
def test_a_second_derivative_is_refused(through: Callable[..., tuple[Tensor, ...]]) -> None:
    for result in range(6):
        inputs = leaf(8, 16), leaf(8, 16), leaf(8)
        output = through(*inputs)[result]
        gradients = torch.autograd.grad(
            output.square().sum(), inputs, create_graph=True, allow_unused=True
        )
        total = torch.stack([g.sum() for g in gradients if g is not None]).sum()
        with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
            total.backward()


class Compiled:
    """A function under torch.compile(fullgraph=True), which counts how often it was traced."""

    def __init__(self, function: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        self.traced = 0

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            from torch._dynamo.backends.debugging import aot_eager

            self.traced += 1
            return aot_eager(graph, inputs)

        self.function = torch.compile(function, backend=backend, fullgraph=True)


def functional_step(log_alpha: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    gates = functional.hard_concrete(log_alpha.view(-1), (28, 100))
    masked = functional.gated_weight(weight, log_alpha)
    scaled = functional.gated_weight(weight, rows, dim=0)
    parts = (*gates, *masked, *scaled)
    return torch.stack([part.sum() for part in parts]).sum()


def named_step(
    log_alpha: Tensor, weight: Tensor, rows: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    gates = functional.hard_concrete(log_alpha.view(-1), (28, 100), seed=seed, step=step)
    masked = functional.gated_weight(weight, log_alpha, seed=seed, step=step, tensor=1)
    scaled = functional.gated_weight(weight, rows, dim=0, seed=seed, step=step, tensor=2)
    return torch.stack([part.sum() for part in (*gates, *masked, *scaled)]).sum()


def ops_step(log_alpha: Tensor, weight: Tensor, rows: Tensor, named: Tensor) -> Tensor:
    flat = log_alpha.view(-1)
    gates = triton_hard_concrete(flat, named, (28, 100), DISTRIBUTION)
    masked = triton_gated_weight(weight, log_alpha, named, None, DISTRIBUTION)
    scaled = triton_gated_weight(weight, rows, named, 0, DISTRIBUTION)
    return torch.stack([part.sum() for part in (*gates, *masked, *scaled)]).sum()


@pytest.mark.parametrize("kind", ["functional", "named", "ops"])
def test_compile_traces_once_for_all_steps(kind: str) -> None:
    step = {"functional": functional_step, "named": named_step, "ops": ops_step}[kind]
    compiled = Compiled(step)
    inputs = leaf(8, 16), leaf(8, 16), leaf(8)
    values: list[float] = []
    for i in range(4):
        names: tuple[Tensor, ...] = ()
        if kind == "named":
            names = torch.tensor(SEED, device=DEVICE), torch.tensor(i, device=DEVICE)
        elif kind == "ops":
            names = (philox.state(SEED, i, 0, DEVICE),)
        value = compiled.function(*inputs, *names)
        gradients = torch.autograd.grad(value, inputs)
        values.append(value.item())
        if names:
            expected = step(*inputs, *names)
            torch.testing.assert_close(value, expected)
            for one, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
                torch.testing.assert_close(one, other)
    assert compiled.traced == 1
    assert len(set(values)) == 4


def test_vmap_maps_states_and_locations() -> None:
    batch = 3
    log_alpha, weight = leaf(batch, 4, 6), leaf(4, 6)
    states = torch.stack([philox.state(SEED, i, 0, DEVICE) for i in range(batch)])
    z = torch.rand(batch, 4, device=DEVICE)
    ops: Any = torch.ops.l0fast

    def one(log_alpha: Tensor, named: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        masked, expected_open = ops.gated_weight(weight, log_alpha, named, weight.dtype, *NUMBERS)
        gates, opened = ops.hard_concrete(log_alpha[0], named, (2, 4), *NUMBERS)
        return masked, expected_open, gates, opened, ops.scaled_weight(weight, z, 0, weight.dtype)

    mapped = torch.vmap(one)(log_alpha, states, z)
    each = [one(log_alpha[i], states[i], z[i]) for i in range(batch)]
    for got, expected in zip(mapped, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0)


@NO_GPU
@pytest.mark.skipif(RUNS_HERE, reason="kernels run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_without_a_gpu_is_refused_in_one_line(dtype: torch.dtype) -> None:
    log_alpha = torch.zeros(4, dtype=dtype)
    line = "^backend: got 'triton'; expected a machine with a GPU .this one has none., or 'torch'$"
    with pytest.raises(ValueError, match=line):
        functional.hard_concrete(log_alpha, backend="triton")
    with pytest.raises(ValueError, match=line):
        functional.gated_weight(log_alpha, log_alpha, backend="triton")


def is_an_op(tensor: Tensor) -> bool:
    """Whether a torch.library op of this package made the tensor, views aside."""
    node: Any = tensor.grad_fn
    while node is not None and "View" in type(node).__name__:
        ((node, _),) = node.next_functions
    return "l0fast" in type(node).__name__.lower()


def test_an_op_is_seen_through_a_view() -> None:
    log_alpha = leaf(2, 3)
    flat, named = log_alpha.view(-1), philox.state(SEED, 0, 0, DEVICE)
    z = triton_hard_concrete(flat, named, (6,), DISTRIBUTION)[0]
    assert is_an_op(z)
    assert is_an_op(z.view(2, 3))
    assert not is_an_op(functional.hard_concrete(log_alpha, backend="torch").z)


@pytest.mark.gpu
def test_auto_is_triton_where_kernels_exist_and_torch_elsewhere() -> None:
    for dtype, kernels in ((torch.float32, True), (torch.float64, False)):
        log_alpha = torch.zeros(4, dtype=dtype, device="cuda", requires_grad=True)
        assert is_an_op(functional.hard_concrete(log_alpha).z) == kernels
        assert not is_an_op(functional.hard_concrete(log_alpha.detach().cpu().requires_grad_()).z)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"seed": 1.5}, "^seed: got 'float'; expected an int or a tensor of one$"),
        ({"seed": 1, "step": "a"}, "^step: got 'str'; expected an int or a tensor of one$"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "^seed: got .*; expected one integer$"),
        ({"seed": 1, "tensor": torch.zeros(())}, "^tensor: got .*; expected one integer$"),
    ],
)
def test_a_bad_name_of_noise_is_refused(words: dict[str, Any], line: str) -> None:
    with pytest.raises((ValueError, TypeError), match=line):
        functional.hard_concrete(torch.zeros(4), **words)


@pytest.mark.parametrize(
    "call", thinned(["l0fast.functional.hard_concrete(torch.zeros(4)).z", ""], 2)
)
def test_neither_import_nor_the_cpu_path_loads_triton(call: str) -> None:
    code = f"import sys, torch, l0fast, l0fast.functional; {call}\nprint('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
