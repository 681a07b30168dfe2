"""What every launch shares: the distribution's constants, the device, the dtypes, the tables."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WARPS = 4
# A mask that ends at a multiple of this leaves 128-bit accesses whole, for every dtype above.
ALIGNMENT = 16


class Constants(NamedTuple):
    """A hard-concrete distribution as the kernels take it: arguments, so nothing is recompiled
    when a temperature is annealed."""

    noise_factor: float  # noise_scale / temperature
    slope: float  # width / temperature
    alpha_scale: float  # log2(e) / temperature
    gamma: float
    width: float  # zeta - gamma
    open_shift: float  # -temperature * log2(-gamma / zeta)


@functools.lru_cache(maxsize=64)
def constants(temperature: float, gamma: float, zeta: float, noise_scale: float = 1.0) -> Constants:
    """The kernels' constants of a distribution; logarithms and exponentials there are base 2."""
    return Constants(
        noise_factor=noise_scale / temperature,
        slope=(zeta - gamma) / temperature,
        alpha_scale=math.log2(math.e) / temperature,
        gamma=gamma,
        width=zeta - gamma,
        open_shift=-temperature * math.log2(-gamma / zeta),
    )


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before its import)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def fast() -> bool:
    """Whether the kernels are compiled for NVIDIA, whose one-instruction logarithm they use."""
    return not interpreted() and torch.version.cuda is not None


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def empty(
    like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, last: bool = False
) -> Tensor:
    """Memory for a result on the tensor's device: the one place where launchers allocate.

    With `last`, the memory format is channels last.
    """
    layout = torch.channels_last if last else torch.contiguous_format
    if shape == like.shape:  # half the host's time
        return torch.empty_like(like, dtype=dtype, memory_format=layout)
    dtype = like.dtype if dtype is None else dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


class Launch:
    """A kernel with its grid, sizes and options: the host's fast way to launch it again.

    Triton looks at every argument of every launch, which takes longer than the launch. Here that
    is done once for each device, dtypes and alignments of the tensors.

    Args:
        kernel: a Triton kernel: its arguments are tensors or None, numbers that each call names,
            `sizes` and `options`, in this order.
        grid: two numbers of programs.
        sizes: numbers.
        options: its constexprs.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], sizes: tuple[float, ...], options: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.sizes, self.options = kernel, grid, sizes, options
        self._rest = (*sizes, *options.values())
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, first: Tensor, *others: Tensor | None, numbers: tuple[float, ...] = ()
    ) -> None:
        arguments = first, *others, *numbers
        if interpreted():
            self.kernel[self.grid](*arguments, *self.sizes, **self.options)
            return
        device = first.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(first, *others, numbers=numbers)
        tensors = [t for t in others if t is not None]
        kind = (
            device,
            first.dtype,
            first.data_ptr() % 16 == 0,
            *[None if t is None else t.dtype for t in others],
            *[t.data_ptr() % 16 == 0 for t in tensors],
        )
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled(*arguments, *self._rest)
            return
        made = self.kernel[self.grid](*arguments, *self.sizes, **self.options, num_warps=WARPS)
        self._compiled[kind] = made[(*self.grid, 1)]


def channels_last(weight: Tensor) -> bool:
    """Whether a convolution's weight lies in memory with its input channels innermost."""
    last = torch.channels_last
    return (
        weight.dim() == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=last)
    )


def vector(*tensors: Tensor) -> int:
    """How many neighbouring elements one thread holds: a 128-bit access of the narrowest dtype,
    of which the kernels know two kinds."""
    return 8 if min(tensor.element_size() for tensor in tensors) < 4 else 4


@functools.cache
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def table(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [L]: where each of some tensors lies, for one launch over them all.

    Made once for tensors that stay where they are, and kept, as a captured CUDA graph reads it.
    """
    return _table(tuple([one.data_ptr() for one in tensors]), tensors[0].device)


@functools.cache
def offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [L + 1]: where each segment starts, on the device.

    Kept for good, since a captured CUDA graph goes on reading it: a model has one such table.
    """
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return torch.tensor(ends, dtype=torch.int64, device=device)
