"""The fused ops as functions without state, with checked arguments and defaults."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks, autograd
from l0fast.maths import philox
from l0fast.maths.compaction import Order
from l0fast.maths.hard_concrete import HardConcrete

BACKENDS = ("auto", "triton", "torch")


class Gates(NamedTuple):
    """One draw: the gates, and how many are expected to be open in each segment."""

    z: Tensor
    expected_open: Tensor


class GatedWeight(NamedTuple):
    """A masked weight, and how many of its gates are expected to be open."""

    weight: Tensor
    expected_open: Tensor


_DEFAULT = HardConcrete()


def checked_distribution(value: HardConcrete | None) -> HardConcrete:
    """The default distribution for None; anything but a HardConcrete is refused."""
    if value is None:
        return _DEFAULT
    if not isinstance(value, HardConcrete):
        _checks.refuse("distribution", type(value).__name__, "a HardConcrete", TypeError)
    return value


Word = int | Tensor


def _word(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_floating_point() or value.is_complex():
            _checks.refuse(name, f"{value.dtype} {tuple(value.shape)}", "one integer")
    elif not isinstance(value, int) or isinstance(value, bool):
        _checks.refuse(name, type(value).__name__, "an int or a tensor of one", TypeError)


def _named(seed: object, step: object, tensor: object) -> None:
    if seed is not None:
        for name, value in (("seed", seed), ("step", step), ("tensor", tensor)):
            _word(name, value)


def fresh_state(device: torch.device) -> Tensor:
    """What the kernels name the noise of a new draw by, from torch's generator."""
    return torch.randint(2**63 - 1, (3,), device=device)


def _state(device: torch.device, seed: Word | None, step: Word, tensor: Word) -> Tensor:
    """What the kernels name their noise by: drawn from torch's generator without a seed."""
    if seed is None:
        return fresh_state(device)
    return philox.state(seed, step, tensor, device)


def _noise(
    log_alpha: Tensor, distribution: HardConcrete, seed: Word | None, step: Word, tensor: Word
) -> Tensor:
    """Logistic noise for every gate: torch's generator, or Philox where a seed is named."""
    if seed is None:
        uniform = torch.rand_like(log_alpha, memory_format=torch.contiguous_format)
        return distribution.logistic_noise(uniform)
    state = philox.state(seed, step, tensor, log_alpha.device)
    uniform = philox.uniform(log_alpha.numel(), state[0], state[1], state[2])
    return distribution.logistic_noise(uniform.view(log_alpha.shape).to(log_alpha.dtype))


def draw(
    log_alpha: Tensor,
    sizes: tuple[int, ...],
    distribution: HardConcrete,
    seed: Word | None = None,
    step: Word = 0,
    tensor: Word = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`hard_concrete` for callers whose arguments are known to be right: (z, expected_open).

    `log_alpha` is flat, float32 or float64.
    """
    if autograd.runs_on_triton(backend, log_alpha):
        state = _state(log_alpha.device, seed, step, tensor)
        return autograd.triton_hard_concrete(log_alpha, state, sizes, distribution)
    noise = _noise(log_alpha, distribution, seed, step, tensor)
    return autograd.hard_concrete(log_alpha, noise, sizes, distribution)


def hard_concrete(
    log_alpha: Tensor,
    sizes: tuple[int, ...] | None = None,
    *,
    distribution: HardConcrete | None = None,
    seed: Word | None = None,
    step: Word = 0,
    tensor: Word = 0,
    backend: str = "auto",
) -> Gates:
    """Samples gates and counts how many are expected to be open, in one pass each way.

    Equals:
        u = torch.rand_like(log_alpha)
        z = distribution.gate(log_alpha, torch.logit(u, eps=1e-6))
        p = distribution.open_probability(log_alpha)
        expected_open = torch.stack([part.sum() for part in p.split(sizes)])

    Args:
        log_alpha: the gates' locations, any shape without `sizes`, [N] with them; floating.
        sizes: lengths of consecutive segments (for example one per layer), with sum N; without
            it the whole is one segment.
        distribution: the gates' distribution; HardConcrete() by default.
        seed: without it the noise comes from torch's generator; with it, from Philox keyed by
            (seed, step, tensor), equal on every backend and device. An int, or a tensor of one:
            then nothing is copied to the device or compiled again when it changes, and a CUDA
            graph reads it anew in each replay.
        step: counts the draws of a seed; likewise.
        tensor: tells apart the tensors drawn in one step; likewise.
        backend: "torch" (the reference), "triton" (the kernel), or "auto": the kernel on CUDA.

    Returns:
        Gates(z of log_alpha's shape and dtype, expected_open [L], at least float32).

    Raises:
        ValueError, TypeError: an argument of a wrong type, shape or value.

    Source: Louizos et al., 2018, eqs. 10-12 and 24.

    >>> l0fast.functional.hard_concrete(torch.tensor([-9.0, 9.0])).z
    tensor([0., 1.])
    """
    log_alpha = _checks.floating("log_alpha", log_alpha)
    _checks.one_of("backend", backend, BACKENDS)
    _named(seed, step, tensor)
    if sizes is None:
        sizes = (log_alpha.numel(),)
    else:
        _checks.segments(log_alpha, sizes)
    distribution = checked_distribution(distribution)
    flat = log_alpha.reshape(-1)
    work = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    z, expected_open = draw(work, sizes, distribution, seed, step, tensor, backend)
    return Gates(z.to(log_alpha.dtype).view(log_alpha.shape), expected_open)


def gated_weight(
    weight: Tensor,
    log_alpha: Tensor,
    *,
    dim: int | None = None,
    distribution: HardConcrete | None = None,
    seed: Word | None = None,
    step: Word = 0,
    tensor: Word = 0,
    backend: str = "auto",
) -> GatedWeight:
    """Samples a weight's gates, masks it and counts the open ones, in one pass each way.

    Equals:
        z, expected_open = hard_concrete(log_alpha, ...)
        masked = weight * z                            # z over dimension `dim`, if one is named

    Args:
        weight: any shape; floating.
        log_alpha: of the weight's shape (a gate for each weight), or [weight.shape[dim]].
        dim: the dimension of `weight` along which the gates run.
        distribution, seed, step, tensor, backend: as in `hard_concrete`.

    Returns:
        GatedWeight(weight of the weight's shape and dtype, expected_open 0-d). Under autocast
        the kernel writes autocast's dtype, and so replaces its cast.

    Raises:
        ValueError, TypeError: an argument of a wrong type, shape or value.

    Source: Louizos et al., 2018, eqs. 10-12 and 24.
    """
    weight = _checks.floating("weight", weight)
    log_alpha = _checks.floating("log_alpha", log_alpha)
    _checks.one_of("backend", backend, BACKENDS)
    _named(seed, step, tensor)
    if dim is None:
        expected = tuple(weight.shape)
    elif type(dim) is not int:
        _checks.refuse("dim", dim, "a whole number or None", TypeError)
    elif -weight.dim() <= dim < weight.dim():
        dim %= weight.dim()
        expected = (weight.shape[dim],)
    else:
        _checks.refuse("dim", dim, f"a dimension of weight {tuple(weight.shape)}")
    if tuple(log_alpha.shape) != expected:
        _checks.refuse("log_alpha", tuple(log_alpha.shape), f"the shape {expected}")
    if log_alpha.device != weight.device:
        _checks.refuse("log_alpha", str(log_alpha.device), f"the device {weight.device}")
    distribution = checked_distribution(distribution)
    half = log_alpha.dtype in (torch.float16, torch.bfloat16)
    work = log_alpha.float() if half else log_alpha
    if autograd.runs_on_triton(backend, work, weight):
        state = _state(work.device, seed, step, tensor)
        return GatedWeight(*autograd.triton_gated_weight(weight, work, state, dim, distribution))
    noise = _noise(work, distribution, seed, step, tensor)
    return GatedWeight(*autograd.gated_weight(weight, work, noise, dim, distribution))


def compaction(alive: Tensor, sizes: tuple[int, ...], backend: str = "auto") -> list[Order]:
    """Which units of each segment are alive, as lists that stay on the device.

    Equals:
        open, closed = alive.nonzero().flatten(), (~alive).nonzero().flatten()
        index = torch.cat([open, closed.flip(0)])      # and place, its inverse
        count = len(open)
    for each segment, but with no wait for the device.

    Args:
        alive: bool [N], the segments end to end.
        sizes: the segments' lengths, with sum N.
        backend: as in `hard_concrete`.

    Raises:
        ValueError, TypeError: not bool [N], sizes of another sum, or a backend that cannot run.
    """
    if not isinstance(alive, Tensor) or alive.dtype != torch.bool:
        _checks.refuse("alive", getattr(alive, "dtype", alive), "a bool tensor", TypeError)
    _checks.segments(alive, sizes)
    _checks.one_of("backend", backend, BACKENDS)
    triton = autograd.runs_on_triton(backend, alive)
    return autograd.compaction(alive.contiguous(), sizes, triton)


def skipping_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    rows: Order | None = None,
    cols: Order | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer that computes the units which are open, where only the device knows which.

    Equals, with M and N the counts of `rows` and `cols` rounded up:
        W = (weight * z)[rows.index][:, cols.index]
        y = torch.zeros(*x.shape[:-1], len(weight))
        y[..., :M] = F.linear(x[..., :N], W[:M, :N], bias[rows.index[:M]])
    The host never learns a count: shapes are those with every unit open, and a captured CUDA graph
    goes on with other gates. A layer with `rows`, anything elementwise, and a layer with these
    orders as `cols` are what they are masked, provided that the latter's z is 0 for what is closed.
    What is closed of the weight gets exactly zero gradient.

    Args:
        x: [..., K]; with `cols`, its open units come first.
        weight: [N, K].
        bias: [N], or None.
        z: [K], gates of the columns, or None.
        rows: which of its outputs are wanted (see `maths.compaction`); None for all.
        cols: which of its inputs are there; None for all.
        backend: as in `hard_concrete`.

    Returns:
        y [..., N], in the dtype of `x`, or autocast's.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    _checks.one_of("backend", backend, BACKENDS)
    x, weight = _checks.floating("x", x), _checks.floating("weight", weight)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        _checks.refuse("x", tuple(x.shape), f"[..., K] for a weight [N, K] {tuple(weight.shape)}")
    sizes: dict[str, tuple[Tensor | None, int]] = {
        "bias": (bias, len(weight)),
        "z": (z, weight.shape[1]),
        "rows": (None if rows is None else rows.index, len(weight)),
        "cols": (None if cols is None else cols.index, weight.shape[1]),
    }
    for name, (values, size) in sizes.items():
        if values is not None and tuple(values.shape) != (size,):
            _checks.refuse(name, tuple(values.shape), f"the shape ({size},)")
    device = weight.device.type
    triton = autograd.runs_on_triton(backend, weight, weight)
    if not torch.is_autocast_enabled(device):
        return autograd.skipping_linear(x, weight, bias, z, rows, cols, triton)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return autograd.skipping_linear(x, weight, bias, z, rows, cols, triton)
