"""No more wrong than PyTorch: how a result is compared with its reference and with the truth.

A fixed tolerance says nothing about who is right. Here the result under test and the reference are
both compared with the same computation in float64, and the result may err no more than the
reference did, plus what rounding alone can add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A reference that errs by more than this part of the magnitude is not a rounded truth but another
# function, and would excuse anything.
REFERENCE_MAY_ERR = 1 / 16


def rounding_tolerance(
    dtype: torch.dtype, magnitude: Tensor | float, *, roundings: float = 4
) -> Tensor:
    """What some roundings in `dtype` can add to a result whose terms are as large as `magnitude`.

    Equals:
        roundings * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny

    The last term admits a subnormal that was flushed to zero.
    """
    if not (math.isfinite(roundings) and roundings >= 0):
        raise ValueError(f"roundings: got {roundings}; expected a finite number >= 0")
    size = torch.as_tensor(magnitude).detach().double().cpu()
    if not bool((torch.isfinite(size) & (size >= 0)).all()):
        raise ValueError("magnitude: got a negative or non-finite value; expected finite and >= 0")
    info = torch.finfo(dtype)
    return roundings * info.eps * size + info.tiny


def assert_no_more_wrong(
    got: Tensor,
    reference: Tensor,
    truth: Tensor,
    *,
    magnitude: Tensor | float | None = None,
    roundings: float = 4,
    name: str = "got",
) -> None:
    """Fails where `got` is further from `truth` than `reference` is, plus a few roundings.

    Equals, for every element:
        |got - truth| <= |reference - truth| + roundings * eps * magnitude + tiny

    Args:
        got: the result under test.
        reference: the same computation by plain PyTorch, of the same shape and dtype.
        truth: the same computation in float64, from the same (already rounded) inputs.
        magnitude: the size of the largest term that enters an element, a number or a tensor that
            broadcasts to it. Needed where terms cancel: a gate is 1.2 s - 0.1, so its terms are of
            size 1 however small it is. Default: |truth|, the size of the element itself.
        roundings: how many roundings of that size `got` may have made beyond the reference's.
        name: what the message calls `got`.

    Raises:
        AssertionError: also for any NaN or infinity, another shape or dtype, and for a comparison
            that could not fail: `got` shares memory with `reference`, or `reference` is wrong.
    """
    if truth.dtype != torch.float64:
        raise AssertionError(f"truth: got {truth.dtype}; expected torch.float64")
    dtype = reference.dtype
    if not dtype.is_floating_point or got.dtype != dtype:
        raise AssertionError(f"{name}: got {got.dtype}; expected {dtype}, a floating-point dtype")
    if not got.shape == reference.shape == truth.shape:
        raise AssertionError(
            f"{name}: got shape {tuple(got.shape)}; expected the reference's "
            f"{tuple(reference.shape)}, which must be the truth's {tuple(truth.shape)}"
        )
    if got.numel() and got.data_ptr() == reference.data_ptr():
        raise AssertionError(f"{name}: shares its memory with the reference, so they cannot differ")

    got, reference, truth = (tensor.detach().double().cpu() for tensor in (got, reference, truth))
    for label, tensor in ((name, got), ("reference", reference), ("truth", truth)):
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise AssertionError(
                f"{label}: {int(bad.sum())} of {tensor.numel()} elements are NaN or infinite, "
                f"the first at {_first(bad)}"
            )
    if not got.numel():
        return

    size = truth.abs() if magnitude is None else torch.as_tensor(magnitude).detach().double().cpu()
    size = size.expand_as(truth)
    tolerance = rounding_tolerance(dtype, size, roundings=roundings)
    error, reference_error = (got - truth).abs(), (reference - truth).abs()

    worst_reference = float(reference_error.max())
    limit = REFERENCE_MAY_ERR * float(size.max()) + torch.finfo(dtype).tiny
    if worst_reference > limit:
        raise AssertionError(
            f"reference: errs by {worst_reference:.3g}; expected at most {limit:.3g}: it does not "
            "compute what the truth does"
        )
    more_wrong = error > reference_error + tolerance
    if bool(more_wrong.any()):
        excess = (error - reference_error - tolerance).flatten()
        at = int(excess.argmax())
        values = (float(tensor.flatten()[at]) for tensor in (got, reference, truth, tolerance))
        raise AssertionError(
            "{}: more wrong than the reference in {} of {} elements, most at {}: got {:.9g}, "
            "reference {:.9g}, truth {:.9g}, tolerance {:.3g}".format(
                name,
                int(more_wrong.sum()),
                got.numel(),
                _place(at, truth.shape),
                *values,
            )
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return _place(int(mask.flatten().int().argmax()), mask.shape)


def _place(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
