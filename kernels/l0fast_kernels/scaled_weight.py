"""Weights scaled by a gate for every row or column: one pass over the weight each way.

The few gates come from hard_concrete; the backward pass sums each gate's gradient on its way. A
convolution's weight keeps its memory format: with channels last it is a [O, k, k, I] one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.launch import ALIGNMENT

# Elements of a tile, how wide it is where gates run down the rows or
# along the columns, and how many tiles a program takes along the axis over which a gate's
# gradient is summed: one partial sum for each program and gate is all that is written besides.
# Where up to MOST_STEPS reach along that whole axis there is one program, and so no second sum;
# along columns, of narrower tiles, which are as many more.
TILE = 2048
ROW_TILE_COLUMNS = 256
COLUMN_TILE_COLUMNS = 128
NARROW_TILE_COLUMNS = 32
STEPS = 4
MOST_STEPS = 8


@triton.jit
def _gate_of_tile(z_ptr, row, column, rows, gates, BY_ROW: tl.constexpr):
    """The gates of a tile, as [ROWS, 1] or [1, COLUMNS]."""
    if BY_ROW:
        return tl.load(z_ptr + row % gates, mask=row < rows, other=0.0)[:, None]
    else:
        return tl.load(z_ptr + column, mask=column < gates, other=0.0)[None, :]


@triton.jit(do_not_specialize=["rows", "columns", "gates"])
def scaled_weight_kernel(
    weight_ptr,
    z_ptr,
    out_ptr,
    rows,
    columns,
    gates,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """out[r, c] = weight[r, c] * z[g], with gate g = r mod gates by row, and g = c by column."""
    row_0 = tl.program_id(0).to(tl.int64) * (ROWS if BY_ROW else ROWS * STEPS)
    column_0 = tl.program_id(1).to(tl.int64) * (COLUMNS * STEPS if BY_ROW else COLUMNS)
    row = row_0 + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    z = _gate_of_tile(z_ptr, row, column_0 + lane, rows, gates, BY_ROW)
    for _ in range(STEPS):
        end = tl.multiple_of(columns - column_0, ALIGNMENT)
        inside = (row < rows)[:, None] & (lane < end)[None, :]
        start = tl.multiple_of(row * columns, ALIGNMENT) + column_0
        offset = start[:, None] + lane[None, :]
        weight = tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, weight * z, mask=inside)
        if BY_ROW:
            column_0 += COLUMNS
        else:
            row += ROWS


@triton.jit(do_not_specialize=["rows", "columns", "gates"])
def scaled_weight_backward_kernel(
    dout_ptr,
    weight_ptr,
    z_ptr,
    dweight_ptr,
    partial_ptr,
    rows,
    columns,
    gates,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """dweight[r, c] = dout[r, c] * z[g]
    partial[g] = sum of dout[r, c] * weight[r, c] over this program's part of gate g's weights
    """
    row_0 = tl.program_id(0).to(tl.int64) * (ROWS if BY_ROW else ROWS * STEPS)
    column_0 = tl.program_id(1).to(tl.int64) * (COLUMNS * STEPS if BY_ROW else COLUMNS)
    row = row_0 + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    z = _gate_of_tile(z_ptr, row, column_0 + lane, rows, gates, BY_ROW)
    dz = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(STEPS):
        end = tl.multiple_of(columns - column_0, ALIGNMENT)
        inside = (row < rows)[:, None] & (lane < end)[None, :]
        start = tl.multiple_of(row * columns, ALIGNMENT) + column_0
        offset = start[:, None] + lane[None, :]
        dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight_ptr + offset, dout * z, mask=inside)
        dz += dout * weight
        if BY_ROW:
            column_0 += COLUMNS
        else:
            row += ROWS
    if BY_ROW:
        part = tl.program_id(1).to(tl.int64) * rows
        tl.store(partial_ptr + part + row, tl.sum(dz, 1), mask=row < rows)
    else:
        part = tl.program_id(0).to(tl.int64) * columns
        column = column_0 + lane
        tl.store(partial_ptr + part + column, tl.sum(dz, 0), mask=column < columns)


class Tiling:
    """A weight seen as [rows, columns], its gates running down the rows or along the columns.

    By row the gates repeat: dimension 1 of a [O, I, k, k] weight is O times I rows of k * k.
    """

    def __init__(self, shape: torch.Size, dim: int) -> None:
        inner = shape[dim + 1 :].numel()
        self.gates = shape[dim]
        self.by_row = inner > 1
        self.columns = inner if self.by_row else self.gates
        self.rows = shape.numel() // self.columns
        summed = self.columns if self.by_row else self.rows
        widest = ROW_TILE_COLUMNS if self.by_row else COLUMN_TILE_COLUMNS
        if not self.by_row and summed <= MOST_STEPS * (TILE // NARROW_TILE_COLUMNS):
            widest = NARROW_TILE_COLUMNS
        tile_columns = min(widest, max(ALIGNMENT, triton.next_power_of_2(self.columns)))
        tile_rows = TILE // tile_columns
        needed = triton.cdiv(summed, tile_columns if self.by_row else tile_rows)
        steps = triton.next_power_of_2(needed) if needed <= MOST_STEPS else STEPS
        self.options = {
            "BY_ROW": self.by_row,
            "ROWS": tile_rows,
            "COLUMNS": tile_columns,
            "STEPS": steps,
            "ALIGNMENT": ALIGNMENT if self.columns % ALIGNMENT == 0 else 1,
        }
        row_steps, column_steps = (1, steps) if self.by_row else (steps, 1)
        self.grid = (
            triton.cdiv(self.rows, tile_rows * row_steps),
            triton.cdiv(self.columns, tile_columns * column_steps),
        )
        # How many partial sums a gate's gradient comes in: one for every program along the summed
        # axis, and for every repetition of the gates.
        repeated = self.rows // self.gates if self.by_row else 1
        self.parts = repeated * self.grid[1 if self.by_row else 0]
        rest = self.grid, (self.rows, self.columns, self.gates), self.options
        self.forward = launch.Launch(scaled_weight_kernel, *rest)
        self.backward = launch.Launch(scaled_weight_backward_kernel, *rest)


# With channels last a [O, I, k, k] weight lies in memory as [O, k, k, I].
TO_LAST, LAST_DIM = (0, 2, 3, 1), (0, 3, 1, 2)


@functools.lru_cache(maxsize=1024)
def tiling_of(shape: torch.Size, dim: int, last: bool) -> Tiling:
    """A layer has one for good: making it takes the host as long as a launch."""
    if last:
        return Tiling(torch.Size(shape[d] for d in TO_LAST), LAST_DIM[dim])
    return Tiling(shape, dim)


def scaled_weight_forward(weight: Tensor, z: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """weight * z, with the gates z float32 [weight.shape[dim]] along dimension ``dim`` >= 0.

    In the dtype asked for, and the weight's memory format: under autocast this pass is also the
    cast.
    """
    last = launch.channels_last(weight)
    if not last:
        weight = weight.contiguous()
    out = launch.empty(weight, weight.shape, dtype, last)
    if weight.numel():
        tiling_of(weight.shape, dim, last).forward(weight, z.contiguous(), out)
    return out


def scaled_weight_backward(
    dout: Tensor, weight: Tensor, z: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """dweight (the weight's dtype and memory format) and dz (float32 [weight.shape[dim]]), in one
    pass."""
    last = launch.channels_last(weight)
    if last:
        dout = dout.contiguous(memory_format=torch.channels_last)
    else:
        weight, dout = weight.contiguous(), dout.contiguous()
    dweight = launch.empty(weight, weight.shape, weight.dtype, last)
    if not weight.numel():
        return dweight, torch.zeros_like(z)
    tiling = tiling_of(weight.shape, dim, last)
    partial = launch.empty(z, (tiling.parts, *z.shape) if tiling.parts > 1 else z.shape)
    tiling.backward(dout, weight, z.contiguous(), dweight, partial)
    return dweight, partial if tiling.parts == 1 else partial.sum(0)
