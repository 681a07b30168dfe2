"""A skipping linear layer on the kernels, against float64 truth and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import functional, sparsify_
from l0fast.layers.draw import OnDevice
from l0fast.layers.handle import gated_layers
from l0fast.maths.compaction import Order, bound
from l0fast.skipping import attach
from tests.helpers.draws import compact
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.thinned import telling, thinned_product
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import assert_written, guarded

# Tokens, outputs, inputs, and how much of outputs and inputs is open: whole tiles and parts of
# them, one unit, counts in the middle of a step, nothing and everything open.
CASES = [
    (64, 128, 192, 0.3, 0.5),
    (70, 130, 90, 0.5, 0.2),
    (64, 64, 64, 1.0, 1.0),
    (33, 200, 70, 0.0, 0.7),
    (33, 70, 200, 0.7, 0.0),
    (1, 1, 1, 1.0, 1.0),
    (5, 3, 7, None, 0.5),
    (5, 200, 7, 0.4, None),
    (130, 20, 30, None, None),
    (256, 512, 384, 0.5, 0.3),
]
# tl.dot of bfloat16 is wrong in the interpreter: it is compiled ahead of time by the budgets.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def order_of(size: int, part: float | None) -> Order | None:
    if part is None:
        return None
    return functional.compaction(torch.rand(size) < part, (size,))[0]


def there(order: Order | None, size: int) -> Tensor:
    """bool [size], by unit."""
    if order is None:
        return torch.ones(size, dtype=torch.bool)
    return order.place < order.count


def run(
    tensors: dict[str, Tensor], dy: Tensor, orders: tuple[Order | None, Order | None], backend: str
) -> dict[str, Tensor]:
    """The layer's result and gradients."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    rows, cols = orders
    y = functional.skipping_linear(**leaves, rows=rows, cols=cols, backend=backend)
    y.backward(dy)
    found: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **found}


def move(value: Any, to: Callable[[Tensor], Tensor]) -> Any:
    return None if value is None else Order(*(to(part) for part in value))


@kernel_test
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*thinned_product(2, CASES[:-1], DTYPES), *telling([(CASES[-1], one) for one in DTYPES], [])],
    ids=str,
)
def test_no_more_wrong_than_the_reference(
    case: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import launch

    tokens, n, k, open_rows, open_cols = case
    rows, cols = order_of(n, open_rows), order_of(k, open_cols)
    z = torch.rand(k) * there(cols, k)
    tensors = {
        "x": torch.randn(tokens, k).to(dtype),
        "weight": torch.randn(n, k).to(dtype),
        "bias": torch.randn(n).to(dtype),
        "z": z,
    }
    dy = torch.randn(tokens, n).to(dtype)
    if rows is not None:
        # Beyond the counts lie what elementwise ops make of zeros, and of what is closed: never
        # read by a layer, so it may be anything but where a count was rounded up.
        dy[:, int(bound(rows.count, n)) :] = torch.nan
        dy[:, int(rows.count) : int(bound(rows.count, n))] = 0
    if cols is not None:
        tensors["x"][:, int(bound(cols.count, k)) :] = torch.nan
    orders = rows, cols
    on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    moved = tuple(move(order, lambda part: part.to(DEVICE)) for order in orders)
    with guarded(launch, monkeypatch):
        got = run(on_device, dy.to(DEVICE), moved, "triton")  # type: ignore[arg-type]
    assert_written(got["y"], got["weight"], got["bias"], got["z"])
    reference = run(tensors, dy, orders, "torch")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = run(wide, dy.double(), orders, "torch")
    size = {name: tensor.double().abs().nan_to_num() for name, tensor in tensors.items()}
    magnitude = run(size, dy.double().abs(), orders, "torch")
    beyond = slice(None) if cols is None else slice(int(bound(cols.count, k)))
    for name, expected in truth.items():
        one, other = got[name].cpu(), reference[name]
        assert one.dtype == other.dtype == tensors.get(name, tensors["x"]).dtype
        if name == "x":
            assert bool((one[:, beyond.stop :] == 0).all()) or beyond.stop is None
            one, other, expected = one[:, beyond], other[:, beyond], expected[:, beyond]
        terms = magnitude[name][:, beyond] if name == "x" else magnitude[name]
        # Both round the packed weight; a sum in another order errs by a few more. A gate's gradient
        # is a sum of what was rounded to the weight's dtype, which may have gone the other way.
        coarse = torch.finfo(dtype).eps / torch.finfo(one.dtype).eps
        roundings = 8 * max(coarse / 8, 1)
        assert_no_more_wrong(one, other, expected, magnitude=terms, roundings=roundings, name=name)


@kernel_test
def test_the_closed_get_exactly_zero_gradient() -> None:
    rows, cols = order_of(70, 0.4), order_of(90, 0.3)
    assert rows is not None
    assert cols is not None
    closed = ~(there(rows, 70)[:, None] & there(cols, 90)[None, :])
    moved = tuple(move(order, lambda part: part.to(DEVICE)) for order in (rows, cols))
    tensors = {
        "x": torch.randn(20, 90),
        "weight": torch.randn(70, 90),
        "bias": torch.randn(70),
        "z": torch.rand(90) * there(cols, 90),
    }
    on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    got = run(on_device, torch.randn(20, 70, device=DEVICE), moved, "triton")  # type: ignore[arg-type]
    assert bool((got["weight"].cpu()[closed] == 0).all())
    assert bool((got["bias"].cpu()[~there(rows, 70)] == 0).all())
    assert bool((got["z"].cpu()[~there(cols, 90)] == 0).all())
    assert bool((got["weight"].cpu()[~closed] != 0).all())


@kernel_test
def test_equal_input_gives_equal_bits() -> None:
    rows, cols = order_of(70, 0.4), order_of(90, 0.3)
    moved = tuple(move(order, lambda part: part.to(DEVICE)) for order in (rows, cols))
    tensors = {
        "x": torch.randn(20, 90, device=DEVICE),
        "weight": torch.randn(70, 90, device=DEVICE),
        "bias": torch.randn(70, device=DEVICE),
        "z": torch.rand(90, device=DEVICE),
    }
    dy = torch.randn(20, 70, device=DEVICE)
    runs = [run(tensors, dy, moved, "triton") for _ in range(2)]  # type: ignore[arg-type]
    for one, other in zip(runs[0].values(), runs[1].values(), strict=True):
        assert torch.equal(one, other)


@kernel_test
@pytest.mark.parametrize("part", telling([0.0, 0.3, 1.0], [0.3]))
def test_a_training_step_is_the_masked_step(part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the draw to the gradients, all on kernels."""
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    monkeypatch.setattr(functional.autograd, "runs_on_triton", lambda *of: True)
    x = torch.randn(9, 12, device=DEVICE)
    steps: list[dict[str, Tensor]] = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(12, 150), nn.GELU(), nn.Linear(150, 70), nn.Tanh(), nn.Linear(70, 3)
        ).to(DEVICE)
        sparsify_(model, example_inputs=x, skip=skip)
        layers = gated_layers(model)
        with torch.no_grad():
            for layer in layers.values():
                layer.log_alpha.copy_(
                    torch.where(torch.rand(layer.log_alpha.shape) < part, 40.0, -40.0)
                )
        torch.manual_seed(1)
        y = model(x)
        assert isinstance(compact(layers["2"]), OnDevice) == skip
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        steps.append({"y": y.detach(), **gradients})
    masked, skipped = steps
    assert masked.keys() == skipped.keys()
    for name, expected in masked.items():
        # Three layers deep, sums of up to 150 terms in another order.
        size = float(expected.abs().max())
        tolerance = 150 * torch.finfo(torch.float32).eps * size
        assert float((skipped[name] - expected).abs().max()) <= tolerance, name
