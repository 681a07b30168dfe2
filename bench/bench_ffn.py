"""Ways to leave closed hidden units out of a large feed-forward block, side by side on a GPU.

Each computes y = gelu(x W^T + b) (V z) + c and all its gradients, by hand, from the same weights:
W [H, D] and V [H, D] (the second layer's, stored by rows, so that open rows lie whole). The gates
z are given; whatever a way does to find the open units, to pack them and to put the gradients back
is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cuda
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Effort, rotating
from l0fast import functional
from l0fast.maths.compaction import Order

FFN = (4096, 16384, 8192)
"""Width, hidden units, tokens."""
QUICK_FFN = (1024, 4096, 2048)
DENSITIES = (0.5, 0.3, 0.1)
SETS = 2
BUCKET = 256
"""A prefix has a multiple of so many units: few shapes, which cuBLAS likes."""
STEP = 16
"""A count on the device is rounded up to a multiple of this: rows of 32 bytes in bfloat16."""
MARGIN = 4.0
"""Standard deviations of the number of open gates that a prefix has room for."""
MOST_MIB = 24_000
"""What all of a case may take; more is refused, so that it runs on a card of 80 GB."""


class Block(NamedTuple):
    """The weights: W and V [H, D], b [H], c [D]."""

    weight: Tensor
    bias: Tensor
    second: Tensor
    second_bias: Tensor


class Results(NamedTuple):
    """The output [T, D] and the gradients of x and of the block's parts; z's [H] where z > 0."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dsecond: Tensor
    dsecond_bias: Tensor
    dz: Tensor


Way = Callable[[Block, Tensor, Tensor, Tensor], Results]
"""Takes the block, x and dy [T, D], and z [H]."""


def masked(block: Block, x: Tensor, dy: Tensor, z: Tensor | None) -> Results:
    """The whole block, with V multiplied by z; if z is None, the dense block."""
    weight, bias, second, second_bias = block
    h = F.linear(x, weight, bias)
    activated = F.gelu(h)
    scaled = second if z is None else second * z.unsqueeze(1)
    y = torch.addmm(second_bias, activated, scaled)
    dscaled = activated.t().mm(dy)
    dz = dsecond = dscaled
    if z is not None:
        dz, dsecond = (dscaled * second).sum(1), dscaled * z.unsqueeze(1)
    dh = torch.ops.aten.gelu_backward(dy.mm(scaled.t()), h)
    return Results(y, dh.mm(weight), dh.t().mm(x), dh.sum(0), dsecond, dy.sum(0), dz)


def _packed(block: Block, z: Tensor, units: Tensor) -> tuple[Block, Tensor]:
    """The part of the block that belongs to some units, and their gates."""
    weight, bias, second = [one.index_select(0, units) for one in block[:3]]
    return Block(weight, bias, second, block.second_bias), z.index_select(0, units)


def order_of(z: Tensor) -> Order:
    """The order of the units, with the open ones first, computed on the device."""
    (order,) = functional.compaction(z > 0, (len(z),))
    return order


def bucket_of(last: int, hidden: int) -> int:
    """The number of units that a step has room for, from the number that the last step had open."""
    share = last / hidden
    room = last + MARGIN * math.sqrt(hidden * share * (1 - share))
    return min(hidden, BUCKET * math.ceil(room / BUCKET))


def prefix(room: int) -> Way:
    """cuBLAS on the first `room` units of an order with the open ones first.

    Exact as long as no more are open: see `overflows`, which a training reads after the step, and
    then takes it again `masked`.
    """

    def way(block: Block, x: Tensor, dy: Tensor, z: Tensor) -> Results:
        units = order_of(z).index[:room].long()
        part, gates = _packed(block, z, units)
        found = masked(part, x, dy, gates)

        def placed(gradient: Tensor) -> Tensor:
            shape = len(z), *gradient.shape[1:]
            return gradient.new_zeros(shape).index_copy_(0, units, gradient)

        names = "dweight", "dbias", "dsecond", "dz"
        return found._replace(**{name: placed(getattr(found, name)) for name in names})

    return way


def overflows(z: Tensor, room: int) -> Tensor:
    """0-d bool: whether more units are open than a prefix has room for."""
    return (z > 0).sum() > room


def prefix_or_masked(room: int) -> Way:
    """`prefix`, taken again where it overflows: the host reads whether it does."""

    def way(block: Block, x: Tensor, dy: Tensor, z: Tensor) -> Results:
        found = prefix(room)(block, x, dy, z)
        return masked(block, x, dy, z) if bool(overflows(z, room)) else found

    return way


def kernels(block: Block, x: Tensor, dy: Tensor, z: Tensor) -> Results:
    """l0fast's own kernels, which read the count on the device."""
    weight, bias, second, second_bias = block
    order = order_of(z)
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias, second.t(), z)]
    last = second_bias.detach().requires_grad_()
    h = functional.skipping_linear(*leaves[:3], rows=order)
    y = functional.skipping_linear(F.gelu(h), leaves[3], last, leaves[4], cols=order)
    dx, dweight, dbias, dsecond, dz, dlast = torch.autograd.grad(y, (*leaves, last), dy)
    return Results(y.detach(), dx, dweight, dbias, dsecond.t(), dlast, dz)


def grouped(block: Block, x: Tensor, dy: Tensor, z: Tensor) -> Results:
    """By PyTorch's grouped products with one group, whose end is read on the device.

    What lies beyond the end is not written, and nobody reads it but elementwise.
    """
    product: Any = F.grouped_mm
    order = order_of(z)
    # Its end must be before the end of all; closed units that are among these have z = 0.
    end = (order.count + (STEP - 1)) // STEP * STEP
    end = end.to(torch.int32).clamp(max=len(z) - 1).view(1)
    units = order.index.long()
    (weight, bias, second, second_bias), gates = _packed(block, z, units)
    scaled = second * gates.unsqueeze(1)

    def of_columns(a: Tensor, b: Tensor) -> Tensor:
        return product(a.unsqueeze(0), b, offs=end)

    def of_sum(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b, offs=end).squeeze(0)

    def of_rows(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b.unsqueeze(0), offs=end)

    h = of_columns(x, weight.t()) + bias
    activated = F.gelu(h)
    y = of_sum(activated, scaled) + second_bias
    dscaled = of_rows(activated.t(), dy)
    dh = torch.ops.aten.gelu_backward(of_columns(dy, scaled.t()), h)
    dx, dweight = of_sum(dh, weight), of_rows(dh.t(), x)
    alive = z > 0
    place = order.place.long()

    def placed(gradient: Tensor) -> Tensor:
        back = gradient.index_select(0, place)
        return back.where(alive.view(-1, *[1] * (back.dim() - 1)), 0.0)

    of_gates = (dscaled * second).sum(1)
    dsecond = placed(dscaled * gates.unsqueeze(1))
    found = y, dx, placed(dweight), placed(dh.sum(0)), dsecond, dy.sum(0), placed(of_gates)
    return Results(*found)


def block_of(sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> Block:
    """Weights as a new Linear has them."""
    width, hidden, _ = sizes

    def tensor(*shape: int, fan: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).uniform_(-(fan**-0.5), fan**-0.5)

    first = tensor(hidden, width, fan=width), tensor(hidden, fan=width)
    return Block(*first, tensor(hidden, width, fan=hidden), tensor(width, fan=hidden))


def gates_of(hidden: int, density: float, device: str, dtype: torch.dtype) -> Tensor:
    """z of so many units, each open by chance."""
    z = torch.rand(hidden, device=device).clamp_min(0.05)
    return (z * (torch.rand(hidden, device=device) < density)).to(dtype)


def peak_mib(sizes: tuple[int, int, int], variants: int) -> float:
    """About the most that a case takes: each variant's graph keeps what it computes."""
    width, hidden, tokens = sizes
    weights, wide, narrow = hidden * width, hidden * tokens, width * tokens
    return variants * SETS * 2 * (8 * weights + 4 * wide + 3 * narrow) / 2**20


def ffn(
    name: str, sizes: tuple[int, int, int], density: float, effort: Effort, device: str = "cuda"
) -> list[Row]:
    """Forward and backward of the block, by every way."""
    width, hidden, tokens = sizes
    dtype, graph = torch.bfloat16, device == "cuda"
    if (needed := peak_mib(sizes, 5)) > MOST_MIB:
        raise RuntimeError(f"bench_ffn: about {needed:.0f} MiB; expected {MOST_MIB} at most")
    block = block_of(sizes, device, dtype)

    def tensor() -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=dtype)

    inputs = [(tensor(), tensor(), gates_of(hidden, density, device, dtype)) for _ in range(SETS)]
    room = bucket_of(int((inputs[-1][2] > 0).sum()), hidden)

    def variant(title: str, way: Any, note: str = "") -> Variant:
        def make() -> Callable[[], Any]:
            def step(x: Tensor, dy: Tensor, z: Tensor) -> None:
                way(block, x, dy, z)

            call = rotating(step, inputs)
            return cuda.graphed(call, SETS) if graph else call

        return Variant(title, make, calls=SETS if graph else 1, graphed=graph, note=note)

    variants = [
        variant("dense", lambda block, x, dy, z: masked(block, x, dy, None)),
        variant("masked", masked),
        variant("own kernels", kernels),
        variant("prefix", prefix(room), f"{room} of {hidden} units"),
    ]
    if hasattr(F, "grouped_mm"):
        variants.append(variant("grouped_mm", grouped))
    ways = [one.name for one in variants[2:]]
    goals = [Goal(one, 1.0, "<= masked", "masked") for one in ways]
    return measure(
        name, device, variants, effort, baseline="dense", goals=goals, count_launches=True
    )


def cases(quick: bool) -> list[Case]:
    """The block at three densities (quick: smaller, at one), on a GPU."""
    sizes = QUICK_FFN if quick else FFN
    found: list[Case] = []
    for density in (0.3,) if quick else DENSITIES:
        name = f"ffn/cuda/density-{density:g}"
        found.append(Case(name, "cuda", functools.partial(ffn, name, sizes, density)))
    return found
