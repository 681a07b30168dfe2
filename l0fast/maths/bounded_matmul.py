"""Matrix products whose sizes are known on the device alone: the reference of that kernel.

Shapes are those with every unit open. What lies beyond a rounded count is not read, and is zero in
what is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l0fast.maths.compaction import Order, below


def bounded_matmul(
    a: Tensor,
    b: Tensor,
    *,
    m: Order | None = None,
    n: Order | None = None,
    k: Order | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N] over what is open, in the dtype of `a`.

    Equals, with M', N' and K' the rounded counts:
        out = zeros(M, N)
        out[:M', :N'] = a[:M', :K'] @ b[:K', :N'] + bias[n.index][:N']

    Args:
        a, b: of one dtype.
        m, n, k: the orders that M, N and K have; None for all of them. (With `m`, what lies beyond
            is not written by the kernel: it is for gradients of weights, which are unpacked.)
        bias: [N], in the units' own order.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    inner = below(k, a.shape[1], a.device)
    # Not by a product with zero: what is not read may be NaN.
    left = torch.where(inner, a, 0.0).to(wide)
    right = torch.where(inner.unsqueeze(1), b, 0.0).to(wide)
    out = left @ right
    if bias is not None:
        out = out + (bias if n is None else bias.index_select(0, n.index))
    written = below(m, len(out), a.device).unsqueeze(1) & below(n, out.shape[1], a.device)
    return torch.where(written, out, 0.0).to(a.dtype)
