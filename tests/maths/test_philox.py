"""The noise: Random123's known answers, the map to uniforms, and the gates' statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, expected.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
SEED = 0x299F31D0_A4093822


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox.philox4x32(counter, key) == expected
    c0, c1, c2, c3 = (scalar(word) for word in counter)
    k0, k1 = (scalar(word) for word in key)
    words = philox.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in words) == expected


def test_an_element_has_word_i_mod_4_of_counter_i_div_4() -> None:
    # The counter (PI[0], PI[1], PI[2], PI[3]): an offset of 64 bits, the step and the tensor.
    start = 4 * (PI[0] + (PI[1] << 32)) % 2**63  # element indices are int64
    expected = philox.philox4x32(((start // 4) % 2**32, start // 4 >> 32, *PI[2:]), (PI[0], PI[1]))
    words = philox.words(4, PI[0] + (PI[1] << 32), PI[2], PI[3], start=start)
    assert words.tolist() == list(expected)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 63, 1023])
@pytest.mark.parametrize("start", [0, 1, 4, 6, 2**34 - 2])
def test_any_piece_equals_that_piece_of_the_whole(n: int, start: int) -> None:
    whole = philox.words(n + 8, SEED, 3, 5, start=start // 4 * 4)
    torch.testing.assert_close(
        philox.words(n, SEED, 3, 5, start=start), whole[start % 4 :][:n], rtol=0, atol=0
    )


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -1, -(2**63)])
def test_seed_step_and_tensor_may_be_tensors(seed: int) -> None:
    expected = philox.uniform(10, seed, 7, 11)
    for shape in ((), (1,)):
        names = [scalar(word).reshape(shape) for word in (seed, 7, 11)]
        got = philox.uniform(10, names[0], names[1], names[2])
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert philox.state(names[0], 7, names[2]).tolist() == [seed, 7, 11]
    assert philox.state(seed + 2**64, 7, 11).tolist() == [seed, 7, 11]


def test_each_part_of_the_name_changes_the_noise() -> None:
    names = [(1, 0, 0), (2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1)]
    draws = [philox.words(64, *name) for name in names]
    for one, other in itertools.combinations(draws, 2):
        assert not bool((one == other).any())


def test_uniforms_are_a_fused_multiply_add_strictly_inside() -> None:
    edges = torch.tensor([0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1], dtype=torch.int64)
    u = philox.uniform_from_words(edges)
    assert u.dtype == torch.float32
    assert (u.double() * 2**24)[[0, 1, -2, -1]].tolist() == [18, 18, 2**24 - 18, 2**24 - 18]
    assert float(u.min()) > 1e-6
    assert float(u.max()) < 1 - 1e-6
    # Symmetric about 1/2, to the rounding of the multiply-add.
    torch.testing.assert_close(
        u.double(), 1 - philox.uniform_from_words(2**32 - 1 - edges).double(), rtol=0, atol=2**-24
    )
    # The multiplicands are exact in float32, and each uniform is its exact value, rounded once.
    assert torch.tensor(philox.SCALE).item() == philox.SCALE
    assert torch.tensor(philox.SHIFT).item() == philox.SHIFT


def test_uniforms_do_not_read_the_device_back() -> None:
    n, state = 16, torch.zeros(3, dtype=torch.int64, device="meta")
    assert philox.uniform(n, state[:1], state[1], state[2]).device.type == "meta"


class Draws:
    """10^7 gates: two steps of two tensors of 2.5 * 10^6."""

    def __init__(self, log_alpha: float) -> None:
        distribution = HardConcrete()
        self.n = 2_500_000
        location = torch.full((), log_alpha)
        self.z = {
            (step, tensor): distribution.gate(
                location, distribution.logistic_noise(philox.uniform(self.n, SEED, step, tensor))
            )
            for step in (0, 1)
            for tensor in (0, 1)
        }


@pytest.fixture(scope="module")
def draws() -> Draws:
    return Draws(-0.5)


def z_of(u: Tensor, log_alpha: float) -> Tensor:
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / (2 / 3))
    return (1.2 * s - 0.1).clamp(0, 1)


@pytest.mark.parametrize("what", ["closed", "fully open", "mean"])
def test_ten_million_gates_have_the_distribution_of_theory(draws: Draws, what: str) -> None:
    z = torch.cat(list(draws.z.values()))
    assert len(z) == 10**7
    if what == "mean":
        n = 10**6
        theory = z_of((torch.arange(n, dtype=torch.float64) + 0.5) / n, -0.5)
        expected, deviation = float(theory.mean()), float(theory.std())
        got = float(z.double().mean())
    else:
        # P(z <= x) = sigmoid(beta * (log(x - gamma) - log(zeta - x)) - log_alpha)
        cumulative = [
            1 / (1 + math.exp(-(2 / 3 * math.log((x + 0.1) / (1.1 - x)) + 0.5))) for x in (0, 1)
        ]
        expected = cumulative[0] if what == "closed" else 1 - cumulative[1]
        deviation = math.sqrt(expected * (1 - expected))
        got = float(((z == 0) if what == "closed" else (z == 1)).double().mean())
    assert abs(got - expected) < 4 * deviation / math.sqrt(len(z))


def correlation(one: Tensor, other: Tensor) -> float:
    """The sample correlation in units of its deviation under independence."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    r = float((one @ other) / (one.norm() * other.norm()))
    return r * math.sqrt(len(one))


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_neighbouring_gates_are_uncorrelated(draws: Draws, distance: int) -> None:
    pairs = [(z[:-distance], z[distance:]) for z in draws.z.values()]
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert abs(correlation(one, other)) < 4


@pytest.mark.parametrize("across", ["tensors", "steps"])
def test_tensors_and_steps_are_uncorrelated(draws: Draws, across: str) -> None:
    z = draws.z
    second = ((0, 1), (1, 0)) if across == "tensors" else ((1, 0), (0, 1))
    one = torch.cat([z[0, 0], z[1, 1]])
    other = torch.cat([z[name] for name in second])
    assert abs(correlation(one, other)) < 4
