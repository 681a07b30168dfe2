"""What a proof runs the two models on: the user's example, noise, other sizes, other constants."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example
from l0fast.graph.capture import NORMS, is_carrier, is_site

SEED = 0
LONG, MEDIUM = 64, 512
"""Sequences up to so long are tried four times, and twice as long."""


@dataclass(frozen=True, eq=False)
class Probe:
    """An input on which two models are compared."""

    title: str
    example: Example
    perturbed: bool = False
    """Whether constant parameters are made others, see `perturbed`."""


def _noise(example: Example) -> Example:
    """The same with noise in the floating tensors."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return example.map(draw)


def _repeated(value: Tensor, dim: int, size: int) -> Tensor:
    """A tensor with another size along one dimension: cut, or repeated."""
    index = torch.arange(size, device=value.device) % value.shape[dim]
    return value.index_select(dim, index)


def _other_batch(example: Example) -> Iterator[tuple[str, Example]]:
    """The example with another number of examples in the batch, where all its tensors have one."""
    sizes = {tensor.shape[0] for tensor in example.tensors() if tensor.dim()}
    if len(sizes) == 1 and (size := sizes.pop()):
        other = 3 if size == 2 else 2
        resized = example.map(lambda one: _repeated(one, 0, other) if one.dim() else one)
        yield f"a batch of {other}", resized


def _other_images(example: Example, image: torch.Size) -> Iterator[tuple[str, Example]]:
    """The example with images of half the size; small ones also of twice the size."""
    height, width = image[-2:]

    def resized(tall: int, wide: int) -> tuple[str, Example]:
        def change(value: Tensor) -> Tensor:
            if value.dim() < 3 or value.shape[-2:] != image[-2:]:
                return value
            return _repeated(_repeated(value, -2, tall), -1, wide)

        return f"images of {tall} x {wide}", example.map(change)

    if min(height, width) > 1:
        yield resized(height // 2, width // 2)
    if max(height, width) <= LONG:
        yield resized(2 * height, 2 * width)


def _other_lengths(example: Example, length: int, dim: int) -> Iterator[tuple[str, Example]]:
    """The example with longer and shorter sequences, which lie along one dimension; a mask has
    them along several."""

    def change(value: Tensor, other: int) -> Tensor:
        dims = {dim % value.dim()} if value.dim() > dim else set[int]()
        if not value.is_floating_point() or value.dim() > 3:
            dims |= set(range(1, value.dim()))
        for one in dims:
            if value.shape[one] == length:
                value = _repeated(value, one, other)
        return value

    factors = [4] if length <= LONG else [2] if length <= MEDIUM else []
    for other in [factor * length for factor in factors] + [length // 2]:
        if 0 < other != length:
            yield f"a length of {other}", example.map(lambda one, n=other: change(one, n))


def _other_sizes(example: Example) -> Iterator[tuple[str, Example]]:
    """The example with images or sequences of another size, the best first; a model may take none
    of them."""
    tensors = example.tensors()
    for image in (one for one in tensors if one.dim() > 3 and one.is_floating_point()):
        yield from _other_images(example, image.shape)
        return
    tokens = [one for one in tensors if one.dim() == 2 and not one.is_floating_point()]
    vectors = [one for one in tensors if one.dim() == 3 and one.is_floating_point()]
    for one in [*tokens, *vectors][:1]:
        for dim in range(1, one.dim()):
            yield from _other_lengths(example, one.shape[dim], dim)


def groups_of_probes(
    model: nn.Module, example: Example, added: Collection[str] = ()
) -> list[list[Probe]]:
    """Probes for a model beside the example: of each list, the first that the model takes.

    Args:
        model: to run on them.
        example: of what it takes.
        added: see `perturbed`.
    """
    floating = any(tensor.is_floating_point() for tensor in example.tensors())
    noise, said = (_noise(example), "noise") if floating else (example, "the example")
    first = [
        Probe(f"{name} in {size}", other)
        for name, source in {said: noise, "the example": example}.items()
        for size, other in _other_batch(source)
    ]
    if floating:
        first.append(Probe("noise", noise))
    second = [Probe(f"{said} with {size}", other) for size, other in _other_sizes(noise)]
    if any(True for _ in _constants(model, added)):
        also = ", constant parameters made others"
        changed = [Probe(one.title + also, one.example, True) for one in second]
        same = [
            Probe(said + also, one, True) for one in ([noise, example] if floating else [noise])
        ]
        second = [*changed, *same, *second]
    return [first, second]


# --- parameters that hide what is in front of them ----------------------------------------------


def _constants(model: nn.Module, added: Collection[str]) -> Iterator[nn.Parameter]:
    """The floating parameters that hold one value everywhere, but for gates, for those of `added`,
    and for what is part of the constants that a closed unit leaves behind a batch norm or a
    convolution in groups."""
    held: set[int] = set()
    for module in model.modules():
        if is_site(module) and is_carrier(module):
            held.add(id(module._parameters.get("bias")))
            if isinstance(module, NORMS) and bool(module._buffers["running_mean"].any()):  # type: ignore[union-attr]
                held.add(id(module._parameters.get("weight")))
    for name, parameter in model.named_parameters():
        gates = name.rpartition(".")[2] == "log_alpha"
        if gates or name in added or id(parameter) in held or not parameter.is_floating_point():
            continue
        values = parameter.detach()
        if values.numel() and bool((values == values.flatten()[0]).all()):
            yield parameter


@contextmanager
def perturbed(model: nn.Module, added: Collection[str] = ()) -> Generator[None]:
    """Gives other values to the parameters that hold one value everywhere: a head of zeros, a tiny
    scale, or a norm as it was made would hide, or pass, what is wrong in front of it.

    Constants near 0 become U(-1, 1), over the root of the fan-in where they are matrices; others
    are multiplied by U(0.7, 1.3).

    Args:
        model: with gates or without.
        added: parameters that may be in the constants that closed units leave: they stay.
    """
    generator = torch.Generator().manual_seed(SEED)
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter in list(_constants(model, added)):
            own = parameter.data
            uniform = 2 * torch.rand(own.shape, generator=generator, dtype=torch.float64) - 1
            value = float(own.flatten()[0])
            fan_in = math.prod(own.shape[1:])
            other = value * (1 + 0.3 * uniform) if abs(value) > 0.01 else uniform / fan_in**0.5
            before.append((parameter, own))
            parameter.data = other.to(own)
        yield
    finally:
        for parameter, own in before:
            parameter.data = own
