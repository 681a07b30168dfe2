"""The open rows and columns of a weight, moved into one corner, and their gradient moved back.

The pass that packs is also the one that masks, and under autocast the cast. It leaves a product
operands that lie together: loads by 128 bits, whatever was open.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.launch import WARPS

# What a program moves; the backward sums a gate's gradient over STEPS tiles down the rows.
ROWS = 16
COLUMNS = 128
STEPS = 4


@triton.jit
def rounded(count_ptr, size, MULTIPLE: tl.constexpr):
    """The count rounded up to MULTIPLE, at most `size`; `size` without a count."""
    if count_ptr is None:
        return size
    else:
        return tl.minimum(tl.cdiv(tl.load(count_ptr), MULTIPLE) * MULTIPLE, size)


@triton.jit
def pack_kernel(
    weight_ptr,
    z_ptr,
    row_index_ptr,
    row_count_ptr,
    column_index_ptr,
    column_count_ptr,
    out_ptr,
    rows,
    columns,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[r, c] = weight[row_index[r], column_index[c]] * z[column_index[c]]

    for r and c before the rounded counts.
    """
    row_0 = tl.program_id(0) * ROWS
    column_0 = tl.program_id(1) * COLUMNS
    row_stop = rounded(row_count_ptr, rows, MULTIPLE)
    column_stop = rounded(column_count_ptr, columns, MULTIPLE)
    if (row_0 >= row_stop) | (column_0 >= column_stop):
        return
    row = row_0 + tl.arange(0, ROWS)
    column = column_0 + tl.arange(0, COLUMNS)
    row_inside = row < row_stop
    column_inside = column < column_stop
    inside = row_inside[:, None] & column_inside[None, :]
    source_row = row
    if row_index_ptr is not None:
        source_row = tl.load(row_index_ptr + row, mask=row_inside, other=0)
    source_column = column
    if column_index_ptr is not None:
        source_column = tl.load(column_index_ptr + column, mask=column_inside, other=0)
    source = source_row.to(tl.int64)[:, None] * columns + source_column[None, :]
    value = tl.load(weight_ptr + source, mask=inside, other=0.0)
    if z_ptr is not None:
        z = tl.load(z_ptr + source_column, mask=column_inside, other=0.0)
        value = value.to(tl.float32) * z[None, :]
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_ptr + target, value, mask=inside)


@triton.jit
def unpack_kernel(
    dpacked_ptr,
    weight_ptr,
    z_ptr,
    row_place_ptr,
    row_count_ptr,
    column_place_ptr,
    column_count_ptr,
    dweight_ptr,
    partial_ptr,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dmasked[i, j] = dpacked[row_place[i], column_place[j]] where both are open, else 0
    dweight = dmasked * z
    partial[j] = sum of dmasked[i, j] * weight[i, j] over this program's rows
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < columns
    column_open = column_inside
    source_column = column
    if column_place_ptr is not None:
        source_column = tl.load(column_place_ptr + column, mask=column_inside, other=0)
        column_open = column_inside & (source_column < tl.load(column_count_ptr))
    z = 1.0
    dz = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + column, mask=column_inside, other=0.0)[None, :]
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row_inside = row < rows
        row_open = row_inside
        source_row = row
        if row_place_ptr is not None:
            source_row = tl.load(row_place_ptr + row, mask=row_inside, other=0)
            row_open = row_inside & (source_row < tl.load(row_count_ptr))
        is_open = row_open[:, None] & column_open[None, :]
        source = source_row.to(tl.int64)[:, None] * columns + source_column[None, :]
        target = row.to(tl.int64)[:, None] * columns + column[None, :]
        dmasked = tl.load(dpacked_ptr + source, mask=is_open, other=0.0).to(tl.float32)
        inside = row_inside[:, None] & column_inside[None, :]
        if z_ptr is not None:
            # Closed weights are not even read.
            weight = tl.load(weight_ptr + target, mask=is_open, other=0.0).to(tl.float32)
            dz += dmasked * weight
            dmasked = dmasked * z
        tl.store(dweight_ptr + target, dmasked, mask=inside)
    if z_ptr is not None:
        part = tl.program_id(0).to(tl.int64) * columns
        tl.store(partial_ptr + part + column, tl.sum(dz, 0), mask=column_inside)


Places = tuple[Tensor, Tensor] | None
"""int32 [N] index or place, and int32 [1] count; None for all of them."""


def pack(
    weight: Tensor,
    z: Tensor | None,
    rows: Places,
    columns: Places,
    multiple: int,
    dtype: torch.dtype,
) -> Tensor:
    """The masked weight [N, K] with its open rows and columns first; nothing beyond the counts.

    Args:
        weight: contiguous [N, K].
        z: [K], or None.
        rows, columns: (index, count), or None.
        multiple: what the counts are rounded up to.
        dtype: of the result.
    """
    out = launch.empty(weight, weight.shape, dtype)
    n, k = weight.shape
    if weight.numel():
        with launch.on(weight):
            pack_kernel[(triton.cdiv(n, ROWS), triton.cdiv(k, COLUMNS))](
                weight,
                z,
                *(rows or (None, None)),
                *(columns or (None, None)),
                out,
                n,
                k,
                MULTIPLE=multiple,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=WARPS,
            )
    return out


def unpack(
    dpacked: Tensor, weight: Tensor, z: Tensor | None, rows: Places, columns: Places
) -> tuple[Tensor, Tensor | None]:
    """dweight (the weight's dtype, [N, K]) and dz (float32 [K]), of the packed gradient.

    Args:
        dpacked: contiguous [N, K].
        weight, z: as for `pack`.
        rows, columns: (place, count), or None.
    """
    dweight = launch.empty(weight, weight.shape)
    n, k = weight.shape
    grid = triton.cdiv(n, ROWS * STEPS), triton.cdiv(k, COLUMNS)
    partial = None if z is None else launch.empty(z, (grid[0], k), torch.float32)
    if weight.numel():
        with launch.on(weight):
            unpack_kernel[grid](
                dpacked,
                weight,
                z,
                *(rows or (None, None)),
                *(columns or (None, None)),
                dweight,
                partial,
                n,
                k,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                STEPS=STEPS,
                num_warps=WARPS,
            )
    return dweight, None if partial is None else partial.sum(0)
