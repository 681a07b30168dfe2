"""The three-way rule passes what is rounded and fails what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.tolerance import assert_no_more_wrong, rounding_tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triple(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(got, reference, truth) of x * x, each computed by itself."""
    x = torch.randn(4, 250).to(dtype)
    return x * x, x.square(), x.double() * x.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_alike_passes(dtype: torch.dtype) -> None:
    assert_no_more_wrong(*triple(dtype), roundings=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_roundings_pass_and_a_few_more_fail(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    truth = torch.ones(3, dtype=torch.float64)
    reference = torch.ones(3, dtype=dtype)
    assert_no_more_wrong((truth + 4 * eps).to(dtype), reference, truth)
    with pytest.raises(AssertionError, match="more wrong than the reference in 3 of 3"):
        assert_no_more_wrong((truth + 6 * eps).to(dtype), reference, truth)


def test_may_err_as_much_as_the_reference() -> None:
    truth = torch.ones(2, dtype=torch.float64)
    reference = torch.tensor([1.01, 1.0])
    assert_no_more_wrong(torch.tensor([0.99, 1.0]), reference, truth)
    # The reference's error excuses the same element only.
    with pytest.raises(AssertionError, match=r"in 1 of 2 elements, most at \(1,\): got 1.00999"):
        assert_no_more_wrong(torch.tensor([1.0, 1.01]), reference, truth)


def test_a_flipped_sign_fails() -> None:
    got, reference, truth = triple()
    with pytest.raises(AssertionError, match="more wrong than the reference in 1000 of 1000"):
        assert_no_more_wrong(-got, reference, truth)


def test_one_wrong_element_is_named() -> None:
    got, reference, truth = triple()
    got[2, 17] += 1e-3
    with pytest.raises(AssertionError, match=r"dw: more wrong .* in 1 of 1000 .* at \(2, 17\)"):
        assert_no_more_wrong(got, reference, truth, name="dw")


def test_a_wrong_reference_excuses_nothing() -> None:
    got, reference, truth = triple()
    with pytest.raises(AssertionError, match=r"reference: errs by .* does not compute"):
        assert_no_more_wrong(-got, -reference, truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_never_pass(which: int, value: float) -> None:
    tensors = triple()
    tensors[which][1, 3] = value
    label = ("got", "reference", "truth")[which]
    with pytest.raises(AssertionError, match=rf"{label}: 1 of 1000 elements .* at \(1, 3\)"):
        assert_no_more_wrong(*tensors)


def test_nan_in_all_three_fails() -> None:
    got, reference, truth = triple()
    for tensor in (got, reference, truth):
        tensor.fill_(float("nan"))
    with pytest.raises(AssertionError, match="got: 1000 of 1000"):
        assert_no_more_wrong(got, reference, truth)


def test_magnitude_is_for_terms_that_cancel() -> None:
    s = torch.full((100,), 0.1 / 1.2) + torch.arange(100) * 1e-7
    truth = s.double() * 1.2 - 0.1
    reference = s * 1.2 - 0.1
    got = reference + 1e-7
    with pytest.raises(AssertionError, match="more wrong"):
        assert_no_more_wrong(got, reference, truth)
    assert_no_more_wrong(got, reference, truth, magnitude=1.0)
    assert_no_more_wrong(got, reference, truth, magnitude=torch.ones(1))
    with pytest.raises(AssertionError, match="more wrong"):
        assert_no_more_wrong(got + 1e-6, reference, truth, magnitude=1.0)


def test_shape_and_dtype_are_part_of_the_result() -> None:
    got, reference, truth = triple()
    with pytest.raises(AssertionError, match=r"got shape \(1000,\); expected .* \(4, 250\)"):
        assert_no_more_wrong(got.flatten(), reference, truth)
    with pytest.raises(AssertionError, match=r"truth's \(4, 1\)"):
        assert_no_more_wrong(got, reference, truth[:, :1])
    with pytest.raises(AssertionError, match=r"got torch\.bfloat16; expected torch\.float32"):
        assert_no_more_wrong(got.bfloat16(), reference, truth)
    with pytest.raises(AssertionError, match=r"truth: got torch\.float32"):
        assert_no_more_wrong(got, reference, truth.float())
    with pytest.raises(AssertionError, match="floating-point"):
        assert_no_more_wrong(got.long(), reference.long(), truth)


def test_a_tensor_is_not_compared_with_itself() -> None:
    got, _, truth = triple()
    with pytest.raises(AssertionError, match="shares its memory"):
        assert_no_more_wrong(got, got.view_as(got), truth)


def test_nothing_is_compared_in_an_empty_tensor_but_its_shape() -> None:
    empty = torch.zeros(0, 3)
    assert_no_more_wrong(empty, empty.clone(), empty.double())
    with pytest.raises(AssertionError, match="got shape"):
        assert_no_more_wrong(empty, torch.zeros(0, 2), empty.double())


def test_rounding_tolerance() -> None:
    info = torch.finfo(torch.bfloat16)
    expected = torch.tensor(3 * info.eps * 2.0 + info.tiny, dtype=torch.float64)
    torch.testing.assert_close(
        rounding_tolerance(torch.bfloat16, 2.0, roundings=3), expected, rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("roundings", [-1, float("nan"), float("inf")])
def test_a_tolerance_that_admits_everything_is_refused(roundings: float) -> None:
    with pytest.raises(ValueError, match="roundings: got"):
        rounding_tolerance(torch.float32, 1.0, roundings=roundings)


@pytest.mark.parametrize("magnitude", [-1.0, float("nan"), float("inf")])
def test_a_magnitude_is_finite(magnitude: float) -> None:
    with pytest.raises(ValueError, match="magnitude: got"):
        assert_no_more_wrong(*triple(), magnitude=magnitude)
