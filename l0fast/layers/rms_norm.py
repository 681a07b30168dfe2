"""RMS norms: which modules are one, the gated one, and what is left of one without some channels.

A gate on a channel of a residual stream is in all its norms, and shared by them:
    y = norm(x * (z > 0)) * z
A closed channel is zero in the norm's statistic, and in what it gives. So nothing reads the channel
from there on, and it can go. An open one is multiplied by z behind the norm, where the norm's own
weight can hold the factor.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from l0fast import _checks
from l0fast.layers.branch import CHILD
from l0fast.layers.gated import Gated
from l0fast.maths.hard_concrete import HardConcrete


class Form(NamedTuple):
    """How a class of modules computes an RMS norm.

    Equals:
        x * rsqrt(mean(x ** 2) + eps) * (weight + offset)
    """

    eps: str
    """The attribute that holds eps."""
    offset: float
    """0, or 1 as in Gemma."""


_FORMS: weakref.WeakKeyDictionary[type[nn.Module], Form] = weakref.WeakKeyDictionary()
"""Of the classes that have been tried out."""
TOLERANCE = 1e-4
"""How much a norm may differ from its form, relatively: it may compute in float32."""


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a gated norm, the one that it stands for."""
    return getattr(module, "dense_type", None) or type(module)


def _twin(module: nn.Module, weight: Tensor) -> nn.Module:
    """A norm with the same attributes, and this weight."""
    twin: nn.Module = object.__new__(own_class(module))
    for key, value in vars(module).items():
        twin.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
    twin._parameters["weight"] = nn.Parameter(weight)
    twin._parameters.pop("log_alpha", None)
    return twin


def _eps(value: float | None, dtype: torch.dtype) -> float:
    """eps of a norm; nn.RMSNorm has None for that of the dtype."""
    return torch.finfo(dtype).eps if value is None else value


def _tried(module: nn.Module) -> Form | None:
    """The form of a module, by trial: its eps is a float among its attributes."""
    generator = torch.Generator().manual_seed(0)
    size = module._parameters["weight"].numel()  # type: ignore[union-attr]
    weight = 0.5 + torch.rand(size, generator=generator)
    twin = _twin(module, weight)
    found = {key: value for key, value in vars(module).items() if type(value) is float}
    if isinstance(module, nn.RMSNorm):
        found["eps"] = _eps(module.eps, torch.float32)
    for key, eps in found.items():
        if not 0 < eps < 1:
            continue
        # Of the size of eps, so that eps matters.
        x = torch.randn(2, 3, size, generator=generator) * (2 * eps**0.5)
        try:
            given = twin.forward(x.clone())  # without hooks, such as that of a branch's gate
        except Exception:  # it takes something else
            return None
        if not isinstance(given, Tensor) or given.shape != x.shape:
            return None
        plain = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        for offset in (0.0, 1.0):
            expected = plain * (weight + offset)
            if float((given - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
                return Form(key, offset)
    return None


def form_of(module: nn.Module) -> Form | None:
    """How a module computes an RMS norm with one weight for each channel; None if it does not."""
    kind = own_class(module)
    if kind in _FORMS:
        return _FORMS[kind]
    own = {key for key, value in module._parameters.items() if value is not None}
    weight = module._parameters.get("weight")
    if weight is None or own - {"log_alpha"} != {"weight"} or weight.dim() != 1:
        return None
    if weight.numel() < 2 or module._modules.keys() - {CHILD} or module._buffers:
        return None
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        form = _tried(module)
    if form is not None:
        _FORMS[kind] = form
    return form


def weight_left(norm: nn.Module, weight: Tensor, channels: Tensor) -> Tensor:
    """What the weight of a norm becomes without the other channels, see `without_channels_`."""
    form = form_of(norm)
    assert form is not None
    kept = weight.index_select(0, channels.to(weight.device))
    scaled = (kept.double() + form.offset) * (weight.numel() / channels.numel()) ** 0.5
    return (scaled - form.offset).to(weight.dtype)


def without_channels_(norm: Any, channels: Tensor) -> None:
    """Leaves a norm some of its channels, in place; where the others are zero it gives the same.

    Equals, of d channels that become n:
        weight = weight[channels] * sqrt(d / n);  eps = eps * d / n
    for the mean over n of what is not zero is d / n times that over d.
    """
    form = form_of(norm)
    assert form is not None
    old: Any = norm._parameters["weight"]
    size, number = old.numel(), channels.numel()
    left = weight_left(norm, old.detach(), channels)
    norm._parameters["weight"] = nn.Parameter(left, old.requires_grad)
    setattr(norm, form.eps, _eps(getattr(norm, form.eps), old.dtype) * size / number)
    for key, value in list(vars(norm).items()):  # what says its size
        if key == "controls":
            continue
        if type(value) is int and value == size:
            setattr(norm, key, number)
        elif isinstance(value, (tuple, list)) and list(value) == [size]:
            setattr(norm, key, type(value)([number]))


class StandIn(nn.Module):
    """Stands for a gated norm while its model is exported: whatever its code, one op in the graph.

    Args:
        weight: of the norm, the very parameter.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return F.rms_norm(input, list(self.weight.shape), self.weight, 1e-6)


class GatedRMSNorm(Gated):
    """An RMS norm of any class with a gate on each channel of what it reads.

    Equals:
        norm(x * (z > 0)) * z                          # z [channels]

    Attributes:
        controls: how many parameters each gate counts for, see `group_size`.
    """

    default_gates = "output"
    controls: int = 1

    def _gate_shape(self) -> tuple[int, ...]:
        return (self.weight.numel(),)

    def _num_inputs(self) -> int:
        return self.weight.numel()

    @property
    def group_size(self) -> int:
        """How many parameters one gate counts for: its share of those of a channel."""
        return self.controls if self._full is None else self._full[1]

    def _mask_outputs(self, weight: Tensor, z: Tensor) -> Tensor:
        form = form_of(self)  # type: ignore[arg-type]
        assert form is not None
        return (weight + form.offset) * z - form.offset if form.offset else weight * z

    def factors(self) -> Tensor:
        """What each channel is multiplied with, without gates."""
        form = form_of(self)  # type: ignore[arg-type]
        assert form is not None
        return self.weight.detach() + form.offset

    def dense(self) -> nn.Module:
        """The ordinary norm of the very parameters (and hooks) of this one, without gates."""
        norm = super().dense()
        norm.__dict__.pop("controls", None)
        return norm

    def folded(self, z: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
        """The ordinary norm with `z` multiplied into its weight; see `Gated.folded`."""
        norm: Any = self.dense()
        weight = self._mask_outputs(
            self.weight.detach().to(dtype or self.weight.dtype),
            z.detach().to(dtype or self.weight.dtype),
        )
        norm._parameters["weight"] = nn.Parameter(weight, self.weight.requires_grad)
        return norm

    def stand_in(self) -> StandIn:
        """What stands for it while its model is exported."""
        return StandIn(self.weight)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z = self._z()
        given = super().forward(input * (z > 0).to(input.dtype), *args, **kwargs)  # type: ignore[misc]
        return given * z.to(given.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made where it is needed, so that pickle does not find it by its name.
        return _rebuilt, (self.dense_type,), self.__getstate__()


@functools.cache
def gated_type(kind: type[nn.Module]) -> type[GatedRMSNorm]:
    """The gated class that stands for a class of RMS norms."""
    return type(f"L0{kind.__name__}", (GatedRMSNorm, kind), {"dense_type": kind})


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    gated: Any = gated_type(kind)
    return gated.__new__(gated)


def gated_norm(
    norm: nn.Module,
    controls: int = 1,
    shared: GatedRMSNorm | None = None,
    density_init: float | None = None,
    droprate_init: float | None = None,
    distribution: HardConcrete | None = None,
) -> GatedRMSNorm:
    """A gated norm that shares the very parameter (and hooks) of an ordinary one.

    Args:
        norm: a module with a `Form`.
        controls: see `GatedRMSNorm`.
        shared: another gated norm of the same stream, whose gates are this one's too.
        density_init, droprate_init, distribution: see `Gated`.

    Raises:
        TypeError: `norm` is no RMS norm.
    """
    form = form_of(norm)
    if form is None or isinstance(norm, Gated):
        expected = "an RMS norm with one weight for each channel"
        _checks.refuse("norm", type(norm).__name__, expected, TypeError)
    gated: Any = _rebuilt(type(norm))
    for key, value in vars(norm).items():
        gated.__dict__[key] = copy.copy(value) if isinstance(value, (dict, set)) else value
    # What None stands for depends on the dtype, which the proof changes.
    setattr(gated, form.eps, _eps(getattr(gated, form.eps), gated.weight.dtype))
    gated.controls = controls
    start = density_init, droprate_init, distribution
    gated._init_gates("output", *start, "batch", 1, shared)
    return gated
