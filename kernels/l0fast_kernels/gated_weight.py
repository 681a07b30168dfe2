"""Weights multiplied by their gates: one pass over the weight each way.

A gate for every weight (unstructured): the kernels sample, mask and sum the expected L0 on the
way; nothing but the result is written, and the noise is drawn again in the backward. A gate for
every row or column: the few gates come from hard_concrete, and one pass scales the weight by
them; the backward pass sums each gate's gradient on its way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.launch import ALIGNMENT, WARPS, Constants

# Elements a program: 16 a thread forward, 8 backward. Half of it costs 5 and 12 instructions an
# element more (the key schedule and the addresses are paid once a thread), twice of it spills
# over the registers that keep enough threads in flight.
FORWARD_BLOCK = 2048
BACKWARD_BLOCK = 1024
# Elements of a tile of the structured kernels, how wide it is where gates run down the rows or
# along the columns, and how many tiles a program takes along the axis over which a gate's
# gradient is summed: one partial sum for each program and gate is all that is written besides.
TILE = 2048
ROW_TILE_COLUMNS = 256
COLUMN_TILE_COLUMNS = 128
STEPS = 4


@triton.jit(do_not_specialize=["n"])
def gated_weight_kernel(
    weight_ptr,
    log_alpha_ptr,
    state_ptr,
    out_ptr,
    partial_ptr,
    n,
    inverse_temperature,
    alpha_scale,
    gamma,
    width,
    open_shift,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)
    z = clamp(s * (zeta - gamma) + gamma, 0, 1)
    out = weight * z
    partial = sum of sigmoid(log_alpha - temperature * log(-gamma / zeta)) over the block

    with u from Philox, keyed by the state's (seed, step, tensor).
    """
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.multiple_of(n - first, ALIGNMENT)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    weight = tl.load(weight_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=float("-inf"))

    bits = device_math.random_words(first, seed, step, tensor, BLOCK, VECTOR)
    u = device_math.uniform(bits, FAST)
    s = device_math.concrete(log_alpha, u, inverse_temperature, alpha_scale, FAST)
    z = device_math.stretch(s, gamma, width)
    tl.store(out_ptr + first + lane, weight * z, mask=inside)
    # Lanes outside have log_alpha = -inf: their open probability is 0.
    p = device_math.open_probability(log_alpha, open_shift)
    tl.store(partial_ptr + block, tl.sum(p, 0))


@triton.jit(do_not_specialize=["n"])
def gated_weight_backward_kernel(
    dout_ptr,
    dopen_ptr,
    weight_ptr,
    log_alpha_ptr,
    state_ptr,
    dweight_ptr,
    dlog_alpha_ptr,
    n,
    inverse_temperature,
    alpha_scale,
    gamma,
    width,
    open_shift,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """dweight = dout * z
    dlog_alpha = dout * weight * [0 < z < 1] * (zeta - gamma) / temperature * s * (1 - s)
               + dopen * p * (1 - p)

    with s, z and u as in the forward (the noise is drawn again) and p the open probability.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.multiple_of(n - first, ALIGNMENT)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    dout = tl.load(dout_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=0.0)

    bits = device_math.random_words(first, seed, step, tensor, BLOCK, VECTOR)
    u = device_math.uniform(bits, FAST)
    s = device_math.concrete(log_alpha, u, inverse_temperature, alpha_scale, FAST)
    z = device_math.stretch(s, gamma, width)
    slope = width * inverse_temperature
    dlog_alpha = device_math.stretch_backward(dout * weight, s, z, slope)
    if dopen_ptr is not None:
        p = device_math.open_probability(log_alpha, open_shift)
        dlog_alpha += device_math.open_probability_backward(tl.load(dopen_ptr), p)
    tl.store(dweight_ptr + first + lane, dout * z, mask=inside)
    tl.store(dlog_alpha_ptr + first + lane, dlog_alpha, mask=inside)


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


def gated_weight_forward(
    weight: Tensor, log_alpha: Tensor, state: Tensor, c: Constants, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mask a weight by a freshly drawn gate for each element, and sum the open probabilities.

    Args:
        weight: float32, bfloat16 or float16, any shape.
        log_alpha: float32, of the weight's shape.
        state: int64 [3] on the same device: seed, step, tensor.
        c: the distribution.
        dtype: of the result; under autocast this pass is also the cast.

    Returns:
        weight * z (contiguous), and expected_open float32, 0-d.
    """
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = launch.empty(weight, weight.shape, dtype)
    n = weight.numel()
    blocks = triton.cdiv(n, FORWARD_BLOCK)
    partial = launch.empty(log_alpha, (blocks,))
    if n:
        with launch.on(weight):
            gated_weight_kernel[(blocks,)](
                weight,
                log_alpha,
                state,
                out,
                partial,
                n,
                *c,
                BLOCK=FORWARD_BLOCK,
                VECTOR=launch.vector(weight, out),
                ALIGNMENT=ALIGNMENT if n % ALIGNMENT == 0 else 1,
                FAST=launch.fast(),
                num_warps=WARPS,
            )
    return out, partial.sum()


def gated_weight_backward(
    dout: Tensor,
    dopen: Tensor | None,
    weight: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    c: Constants,
) -> tuple[Tensor, Tensor]:
    """dweight (the weight's dtype) and dlog_alpha (float32), in one pass, of the gradients of
    both results; a dopen that is None counts as zero. The rest as in the forward."""
    weight, log_alpha, dout = weight.contiguous(), log_alpha.contiguous(), dout.contiguous()
    dweight = launch.empty(weight, weight.shape)
    dlog_alpha = launch.empty(log_alpha, weight.shape)
    n = weight.numel()
    if n:
        with launch.on(weight):
            gated_weight_backward_kernel[(triton.cdiv(n, BACKWARD_BLOCK),)](
                dout,
                dopen,
                weight,
                log_alpha,
                state,
                dweight,
                dlog_alpha,
                n,
                *c,
                BLOCK=BACKWARD_BLOCK,
                VECTOR=launch.vector(dout, weight),
                ALIGNMENT=ALIGNMENT if n % ALIGNMENT == 0 else 1,
                FAST=launch.fast(),
                num_warps=WARPS,
            )
    return dweight, dlog_alpha


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
        widest = ROW_TILE_COLUMNS if self.by_row else COLUMN_TILE_COLUMNS
        tile_columns = min(widest, max(ALIGNMENT, triton.next_power_of_2(self.columns)))
        tile_rows = TILE // tile_columns
        steps = 1 if self.by_row and self.columns <= tile_columns else STEPS
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

    @property
    def parts(self) -> int:
        """How many partial sums a gate's gradient comes in: one for every program along the
        summed axis, and for every repetition of the gates."""
        return self.grid[1] * (self.rows // self.gates) if self.by_row else self.grid[0]


def scaled_weight_forward(weight: Tensor, z: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """weight * z, with the gates z float32 [weight.shape[dim]] along dimension ``dim`` >= 0.

    In the dtype asked for: under autocast this pass is also the cast.
    """
    weight = weight.contiguous()
    out = launch.empty(weight, weight.shape, dtype)
    if weight.numel():
        tiling = Tiling(weight.shape, dim)
        with launch.on(weight):
            scaled_weight_kernel[tiling.grid](
                weight,
                z,
                out,
                tiling.rows,
                tiling.columns,
                tiling.gates,
                **tiling.options,
                num_warps=WARPS,
            )
    return out


def scaled_weight_backward(
    dout: Tensor, weight: Tensor, z: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """dweight (the weight's dtype) and dz (float32 [weight.shape[dim]]), in one pass."""
    weight, dout = weight.contiguous(), dout.contiguous()
    dweight = launch.empty(weight, weight.shape)
    if not weight.numel():
        return dweight, torch.zeros_like(z)
    tiling = Tiling(weight.shape, dim)
    partial = launch.empty(z, (tiling.parts, tiling.gates))
    with launch.on(weight):
        scaled_weight_backward_kernel[tiling.grid](
            dout,
            weight,
            z,
            dweight,
            partial,
            tiling.rows,
            tiling.columns,
            tiling.gates,
            **tiling.options,
            num_warps=WARPS,
        )
    return dweight, partial.view(-1) if tiling.parts == 1 else partial.sum(0)
