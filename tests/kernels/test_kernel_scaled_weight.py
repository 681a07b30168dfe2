"""The kernels of l0fast_kernels.scaled_weight, against float64 truth and the reference."""

from __future__ import annotations

import pytest
import torch

from l0fast.maths.gated_weight import along as along_dimension
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.thinned import telling
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import DTYPES, assert_written, gate, guarded

# Per row and per column: narrower and wider than a tile, one and several tiles a program, one
# gate, gates along the middle of a convolution, nothing at all.
STRUCTURED = [
    ((20, 1, 5, 5), 0),
    ((50, 20, 5, 5), 0),
    ((50, 20, 5, 5), 1),
    ((30, 784), 0),
    ((30, 784), 1),
    ((67, 1100), 0),
    ((67, 1104), 1),
    ((3, 1, 1), 1),
    ((1, 5), 0),
    ((1, 5), 1),
    ((7, 1), 0),
    ((7,), 0),
    ((2, 3, 4), 2),
    ((0, 4), 0),
    ((0, 4), 1),
    ((4, 0), 0),
    ((4, 0), 1),
]
LARGE = [((50, 20, 5, 5), 1), ((30, 784), 0), ((30, 784), 1), ((67, 1104), 1)]
"""They are like others, and run in `make test-all`."""


@kernel_test
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"), telling(STRUCTURED, [one for one in STRUCTURED if one not in LARGE]), ids=str
)
def test_scaling_is_no_more_wrong_than_the_reference(
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import launch, scaled_weight_backward, scaled_weight_forward

    weight = torch.randn(shape, device=DEVICE).to(dtype)
    dout = torch.randn(shape, device=DEVICE).to(out_dtype)
    z = torch.rand(shape[dim], device=DEVICE)
    z[::3] = 0
    with guarded(launch, monkeypatch):
        out = scaled_weight_forward(weight, z, dim, out_dtype)
        dweight, dz = scaled_weight_backward(dout, weight, z, dim)
    assert_written(out, dweight, dz)
    assert (out.dtype, dweight.dtype, dz.dtype) == (out_dtype, dtype, torch.float32)

    weight, dout, z = weight.cpu(), dout.cpu(), z.cpu()
    along = along_dimension(z, weight, dim)
    out_true = weight.double() * along.double()
    assert_no_more_wrong(out.cpu(), gate(along, weight, out_dtype), out_true, name="out")
    dweight_true = dout.double() * along.double()
    assert_no_more_wrong(dweight.cpu(), gate(along, dout, dtype), dweight_true, name="dweight")
    # [gates, the weights of a gate]
    terms = (dout.double() * weight.double()).movedim(dim, 0)[:, None].flatten(1)
    assert_no_more_wrong(
        dz.cpu(),
        (dout.float() * weight.float()).movedim(dim, 0)[:, None].flatten(1).sum(1),
        terms.sum(1),
        magnitude=terms.abs().sum(1),
        name="dz",
    )


@kernel_test
def test_strided_input_counts_elements_not_addresses() -> None:
    from l0fast_kernels import scaled_weight_backward, scaled_weight_forward

    weight, dout = torch.randn(2, 40, 30, device=DEVICE).transpose(1, 2).unbind()
    assert not weight.is_contiguous()
    z = torch.rand(60, device=DEVICE)
    got = (
        scaled_weight_forward(weight, z[::2], 0, torch.float32),
        *scaled_weight_backward(dout, weight, z[::2], 0),
    )
    weight, dout, z = weight.contiguous(), dout.contiguous(), z[::2].contiguous()
    expected = (
        scaled_weight_forward(weight, z, 0, torch.float32),
        *scaled_weight_backward(dout, weight, z, 0),
    )
    for one, other in zip(got, expected, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)


@kernel_test
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(50, 20, 3, 3), (7, 33, 5, 1)], ids=str)
def test_channels_last_is_computed_where_it_lies(
    shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import launch, scaled_weight_backward, scaled_weight_forward

    last = torch.channels_last
    weight, dout = torch.randn(2, *shape, device=DEVICE).unbind()
    z = torch.rand(shape[dim], device=DEVICE)
    expected = (
        scaled_weight_forward(weight, z, dim, torch.float32),
        *scaled_weight_backward(dout, weight, z, dim),
    )
    weight, dout = weight.to(memory_format=last), dout.to(memory_format=last)
    with guarded(launch, monkeypatch):
        out = scaled_weight_forward(weight, z, dim, torch.float32)
        dweight, dz = scaled_weight_backward(dout, weight, z, dim)
    assert_written(out, dweight, dz)
    assert out.is_contiguous(memory_format=last)
    assert dweight.is_contiguous(memory_format=last)
    assert torch.equal(out, expected[0])
    assert torch.equal(dweight, expected[1])
    torch.testing.assert_close(dz, expected[2])  # another order of the sum
    # The gradient that arrives may lie otherwise.
    for one, other in zip(
        scaled_weight_backward(dout.contiguous(), weight, z, dim), (dweight, dz), strict=True
    ):
        assert torch.equal(one, other)


@kernel_test
@pytest.mark.parametrize("dim", [0, 1])
def test_equal_input_gives_equal_bits(dim: int) -> None:
    from l0fast_kernels import scaled_weight_backward

    weight, dout = torch.randn(2, 64, 257, device=DEVICE)
    z = torch.rand(weight.shape[dim], device=DEVICE)
    runs = [scaled_weight_backward(dout, weight, z, dim) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
