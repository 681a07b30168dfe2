"""The hard-concrete distribution: the maths of one gate, and the reference of every kernel.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
ICLR 2018, equations 10-12 and 24-25.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l0fast import _checks

UNIFORM_EPS = 1e-6
"""Uniform draws are kept inside (UNIFORM_EPS, 1 - UNIFORM_EPS)."""

MEAN_POINTS = 128


@dataclass(frozen=True)
class HardConcrete:
    """A stretched and clamped binary-concrete distribution over gates z in [0, 1].

    Equals:
        s = sigmoid((noise_scale * (log(u) - log(1 - u)) + log_alpha) / temperature)
        z = clamp(s * (zeta - gamma) + gamma, 0, 1)
        P(z > 0) = sigmoid(log_alpha - temperature * log(-gamma / zeta))

    The open probability is always that of noise_scale=1. With less noise, the true probability
    would have a gradient only near its threshold; this one has a gradient everywhere.

    Every method is elementwise, on any shape, floating dtype and device.

    Args:
        temperature: beta > 0. The smaller it is, the nearer are the gates to 0 or 1.
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end of the stretched interval, > 1.
        bound: the step of a constraint or penalty keeps log_alpha in [-bound, bound].
        noise_scale: factor of the logistic noise, > 0; 1 is the published distribution.

    Raises:
        ValueError, TypeError: an argument is not a number in its range.

    Source: Louizos et al., 2018, eqs. 10-12 (sample), 24 (open probability), 25 (evaluation).

    >>> distribution = l0fast.HardConcrete()
    >>> distribution.open_probability(torch.tensor(0.0))
    tensor(0.8318)
    >>> distribution.median(torch.tensor([-3.0, 0.0, 3.0]))  # the gates in evaluation
    tensor([0.0000, 0.5000, 1.0000])
    """

    temperature: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    bound: float = 10.0
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.number("temperature", self.temperature, "a number > 0", low=0.0, open_low=True)
        _checks.number("gamma", self.gamma, "a number < 0", high=0.0, open_high=True)
        _checks.number("zeta", self.zeta, "a number > 1", low=1.0, open_low=True)
        _checks.number("bound", self.bound, "a number > 0", low=0.0, open_low=True)
        _checks.number("noise_scale", self.noise_scale, "a number > 0", low=0.0, open_low=True)

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """What a draw depends on: temperature, gamma, zeta, noise_scale."""
        return self.temperature, self.gamma, self.zeta, self.noise_scale

    @property
    def shift(self) -> float:
        """P(z > 0) = sigmoid(log_alpha + shift); 1.5986 with the defaults."""
        return -self.temperature * math.log(-self.gamma / self.zeta)

    def logistic_noise(self, uniform: Tensor) -> Tensor:
        """log(u) - log(1 - u) of `uniform` draws in [0, 1), kept finite."""
        if uniform.dtype in (torch.float16, torch.bfloat16):  # in these 1 - eps is 1
            return torch.logit(uniform.float(), eps=UNIFORM_EPS).to(uniform.dtype)
        return torch.logit(uniform, eps=UNIFORM_EPS)

    def concrete(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        """s in [0, 1], from log_alpha and logistic noise of the same (or broadcast) shape."""
        return (
            torch.add(log_alpha, noise, alpha=self.noise_scale)
            .mul_(1 / self.temperature)
            .sigmoid_()
        )

    def stretched(self, s: Tensor) -> Tensor:
        """z, of s: clamp(s * (zeta - gamma) + gamma, 0, 1)."""
        # Not in place: the torch.compile of 2.11 loses the gradient of an autograd Function's
        # output that was written in place and then saved.
        return torch.rsub(s, self.gamma, alpha=self.gamma - self.zeta).clamp(0.0, 1.0)

    def gate(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        """z, from log_alpha and logistic noise of the same (or broadcast) shape."""
        return self.stretched(self.concrete(log_alpha, noise))

    def backward(
        self,
        dz: Tensor | None,
        z: Tensor,
        s: Tensor,
        dprobability: Tensor | None,
        probability: Tensor,
    ) -> Tensor | None:
        """The gradient of log_alpha, from those of z and of its open probability (None: absent).

        Equals:
            dz * [0 < z < 1] * (zeta - gamma) / temperature * s * (1 - s)
            + dprobability * probability * (1 - probability)
        What comes through z is exactly 0 where z is 0 or 1.
        """
        slope = (self.zeta - self.gamma) / self.temperature
        through_z = through_probability = None
        if dz is not None:
            inside = torch.ops.aten.hardtanh_backward(dz, z, 0.0, 1.0)
            through_z = torch.ops.aten.sigmoid_backward(inside, s)
        if dprobability is not None:
            through_probability = torch.ops.aten.sigmoid_backward(dprobability, probability)
        if through_z is None:
            return through_probability
        if through_probability is None:
            return through_z.mul_(slope)
        return through_probability.add_(through_z, alpha=slope)

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0 given log_alpha), under all of the noise."""
        return torch.sigmoid(log_alpha + self.shift)

    def median(self, log_alpha: Tensor) -> Tensor:
        """The evaluation gate: the median of z, 0 exactly where P(z > 0) <= 1/2.

        Equals: clamp(sigmoid(log_alpha / temperature) * (zeta - gamma) + gamma, 0, 1)
        """
        s = torch.sigmoid(log_alpha / self.temperature)
        return torch.clamp(s * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)

    def mean(self, log_alpha: Tensor) -> Tensor:
        """E[z] under noise, by a midpoint rule of MEAN_POINTS points.

        It errs by less than 1e-5, and by less than 1e-4 with a tenth of the noise.

        Equals: the integral of P(z > t) over t from 0 to 1, with
            P(z > t) = sigmoid((log_alpha - temperature * logit((t - gamma) / (zeta - gamma)))
                               / noise_scale)
        """
        total = torch.zeros_like(log_alpha)
        for point in range(MEAN_POINTS):
            s = ((point + 0.5) / MEAN_POINTS - self.gamma) / (self.zeta - self.gamma)
            threshold = self.temperature * math.log(s / (1 - s))
            total += torch.sigmoid((log_alpha - threshold) / self.noise_scale)
        return total / MEAN_POINTS

    def location(self, z: Tensor) -> Tensor:
        """The log_alpha whose median is `z`, in [0, 1]."""
        return self.temperature * torch.logit((z - self.gamma) / (self.zeta - self.gamma))

    def log_alpha(self, density: float) -> float:
        """The log_alpha whose open probability is `density`, within the bound.

        Raises:
            ValueError, TypeError: `density` is not in (0, 1].
        """
        density = _checks.density("density", density)
        if density == 1.0:
            return self.bound
        return max(-self.bound, min(self.bound, math.log(density / (1 - density)) - self.shift))

    @property
    def lowest_density(self) -> float:
        """The open probability at the lower bound of log_alpha; no target below can be met."""
        return 1.0 / (1.0 + math.exp(self.bound - self.shift))
