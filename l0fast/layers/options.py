"""The options of gated layers, and their ranges."""

from __future__ import annotations

from torch import Tensor

from l0fast import _checks

GATES = ("input", "output", "weight")
NOISE = ("batch", "example")


def check_options(
    gates: str, density_init: float | None, droprate_init: float | None, noise: str
) -> None:
    """Refuses options of a gated layer that are out of their range."""
    _checks.one_of("gates", gates, GATES)
    _checks.one_of("noise", noise, NOISE)
    if density_init is not None:
        _checks.density("density_init", density_init)
    if droprate_init is not None:
        _checks.number(
            "droprate_init",
            droprate_init,
            "a number in (0, 1)",
            low=0.0,
            high=1.0,
            open_low=True,
            open_high=True,
        )
        if density_init is not None:
            _checks.refuse(
                "droprate_init", droprate_init, "only one of density_init and droprate_init"
            )
    if gates == "weight" and noise == "example":
        _checks.refuse("noise", noise, "'batch' where gates='weight'")


def check_width(input: Tensor, dim: int, features: int) -> None:
    """Refuses a single input, which the gates would repeat where the dense layer raises.

    Args:
        input: of a layer.
        dim: where its features are.
        features: how many the layer takes.

    Raises:
        ValueError: there is one, and the layer takes more.
    """
    if input.shape[dim] == 1 < features:
        expected = f"{features} features in dimension {dim}"
        _checks.refuse("input", tuple(input.shape), expected)
