"""Philox4x32-10 in torch integer ops: the noise of the Triton kernels, anywhere torch runs.

A counter-based generator has no state: word ``i % 4`` of counter ``i // 4`` belongs to element
``i``, whatever computes it. So a kernel can draw its noise again in the backward pass instead of
storing it, and this module can say, on any device, exactly which noise the kernel drew:

    counter = (offset_lo, offset_hi, step, tensor)      offset = i // 4
    key     = (seed_lo, seed_hi)

``step`` separates the draws of successive training steps, ``tensor`` those of different tensors
within a step. With ``step == tensor == 0`` the words are those of Triton's ``tl.randint4x``.

This is for checking and replaying, not for speed: on a CPU ``torch.rand`` is about ten times
faster, and is what the default path uses there.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10

# u = (1 + k / 2^23) * SCALE + SHIFT for the 23 high bits k of a word. Both constants are exact in
# float32, and chosen so that u runs from 18 / 2^24 to 1 - 18 / 2^24, symmetrically about 1/2 and
# strictly inside (1e-6, 1 - 1e-6): neither logarithm of the logistic noise can be infinite.
SCALE = 1 - 34 / 2**24
SHIFT = 52 / 2**24 - 1

Word = int | Tensor


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Return the four 32-bit words of Philox4x32-10 for a counter and a key.

    Equals: ten rounds of

        c0, c1, c2, c3 = hi(M1 * c2) ^ c1 ^ k0, lo(M1 * c2), hi(M0 * c0) ^ c3 ^ k1, lo(M0 * c0)
        k0, k1         = k0 + W0, k1 + W1                                            (mod 2^32)

    Args:
        counter: four words, each an int or an int64 tensor holding values in [0, 2^32).
        key: two words, likewise.

    Returns:
        Four words in [0, 2^32), of the operands' broadcast shape.

    Source: Salmon et al. 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps, which leaves all 64 bits of the unsigned product in place.
        product_0 = c0 * MULTIPLIER_0
        product_1 = c2 * MULTIPLIER_1
        c0 = ((product_1 >> 32) & MASK) ^ c1 ^ k0
        c1 = product_1 & MASK
        c2 = ((product_0 >> 32) & MASK) ^ c3 ^ k1
        c3 = product_0 & MASK
        k0 = (k0 + WEYL_0) & MASK
        k1 = (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def words(
    n: int,
    seed: Word,
    step: Word = 0,
    tensor: Word = 0,
    device: torch.device | str | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Return the random words of elements ``start`` to ``start + n``, int64 in [0, 2^32), [n].

    Args:
        n: how many elements.
        seed: 64 bits; an int, or a tensor of one int64 (then nothing is read back to the host).
        step: which training step, an int or a tensor of one int64; its low 32 bits count.
        tensor: which tensor of the step, likewise.
        device: where to compute; by default the seed's device if it is a tensor, else the CPU.
        start: the first element's index.

    Returns:
        Word ``i % 4`` of counter ``i // 4`` for every element ``i``.
    """
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    seed, step, tensor = (_scalar(word, device) for word in (seed, step, tensor))
    first, last = start // 4, -(-(start + n) // 4)
    offset = torch.arange(first, max(first, last), dtype=torch.int64, device=device)
    four = philox4x32(
        (offset & MASK, (offset >> 32) & MASK, step & MASK, tensor & MASK),
        (seed & MASK, (seed >> 32) & MASK),
    )
    in_order = torch.stack([_as_tensor(word, offset) for word in four], dim=1).reshape(-1)
    return in_order[start - 4 * first :][:n]


def uniform_from_words(bits: Tensor) -> Tensor:
    """Map 32-bit words to float32 uniforms strictly inside (1e-6, 1 - 1e-6).

    Equals ``fma(as_float(bits >> 9 | 0x3f800000), SCALE, SHIFT)``: the word's 23 high bits become
    the mantissa of a number in [1, 2), and one fused multiply-add moves that into place.

    The float64 expression below is exact (24 bits times 24 bits), so that its one rounding is the
    rounding of the kernel's fused multiply-add.
    """
    mantissa = 1 + (bits >> 9).to(torch.float64) / 2**23
    return (mantissa * SCALE + SHIFT).to(torch.float32)


def uniform(
    n: int,
    seed: Word,
    step: Word = 0,
    tensor: Word = 0,
    device: torch.device | str | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Return the uniforms of elements ``start`` to ``start + n``, float32, [n].

    Equals ``uniform_from_words(words(n, seed, step, tensor, device, start=start))``: bit for bit
    what the Triton kernels draw for the same seed, step and tensor. All values lie strictly
    inside (1e-6, 1 - 1e-6). Arguments as for ``words``.
    """
    return uniform_from_words(words(n, seed, step, tensor, device, start=start))


def state(
    seed: Word, step: Word = 0, tensor: Word = 0, device: torch.device | str | None = None
) -> Tensor:
    """Return what the kernels read their noise's name from: int64 [3], (seed, step, tensor).

    Ints are copied to the device; of tensors of one integer nothing is read back.
    """
    name = (seed, step, tensor)
    ints = [_signed(word) for word in name if not isinstance(word, Tensor)]
    if len(ints) == len(name):
        return torch.tensor(ints, dtype=torch.int64, device=device)
    return torch.stack([_on_device(word, device) for word in name])


def _on_device(word: Word, device: torch.device | str | None) -> Tensor:
    if isinstance(word, Tensor):
        return word.reshape(()).to(device=device, dtype=torch.int64)
    return torch.full((), _signed(word), dtype=torch.int64, device=device)


def _signed(word: int) -> int:
    """The int64 with the word's low 64 bits."""
    if -(2**63) <= word < 2**63:
        return word
    return (word + 2**63) % 2**64 - 2**63


def _scalar(word: Word, device: torch.device | str | None) -> Word:
    """Make a tensor of one element 0-d (so that it broadcasts) and move it to the device."""
    return word.reshape(()).to(device=device) if isinstance(word, Tensor) else word


def _as_tensor(word: Word, like: Tensor) -> Tensor:
    return word if isinstance(word, Tensor) else torch.full_like(like, word)
