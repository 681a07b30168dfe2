"""The gates of a mixture's experts: a router that never picks a closed one.

While the mixture runs, its router gives -inf for closed experts, and what the last weights of each
expert give is multiplied by its gate. A mixture that has lost its closed experts gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from l0fast.layers.draw import Drawn
from l0fast.layers.hooks import OwnHook, remove_hooks
from l0fast.layers.part import PartGate
from l0fast.maths.hard_concrete import HardConcrete

CHILD = "expert_gate"
"""The name that the gates of a mixture have in the module around its router and experts."""
_NOW, _MODE = "_expert_now", "_expert_mode"
"""Attributes that a router, or an expert, has while its mixture runs."""


@dataclass(frozen=True)
class Mixture:
    """A router, and experts of which it picks some for each token."""

    name: str
    """Of the module around both."""
    router: str
    """The path in it to the module that gives a number for each expert."""
    experts: str
    """The path in it to the list of experts, or to the module whose weights have an expert at each
    place of their first dimension; "" for itself."""
    last: str | None
    """Of a list: the path in each expert to its last layer; None for weights together."""
    number: int
    """Of experts."""
    least: int
    """How many each token needs."""
    every: bool
    """Whether each expert computes all tokens, whatever the router picks."""

    def as_json(self) -> dict[str, Any]:
        """A dict that makes the same mixture."""
        return asdict(self)

    def path(self, relative: str) -> str:
        """The name of a module of the mixture in the model."""
        return ".".join(part for part in (self.name, relative) if part)

    def expert(self, place: object) -> str:
        """The name of one expert of a list."""
        return self.path(f"{self.experts}.{place}")

    @property
    def is_list(self) -> bool:
        """Whether each expert is a module."""
        return self.last is not None

    def hosts(self, around: nn.Module) -> Iterator[tuple[nn.Module, int | None]]:
        """The modules whose last weights are multiplied by gates, with the place of an expert, or
        None for all of them; `around` is the module of this name."""
        if self.last is None:
            yield around.get_submodule(self.experts), None
            return
        for place, expert in enumerate(around.get_submodule(self.experts).children()):
            yield expert.get_submodule(self.last), place


class ExpertGate(PartGate):
    """One hard-concrete gate for each expert of a mixture.

    Where z is 0 the router gives -inf, so that it never picks the expert; the `least` likeliest
    ones can be picked in any case. It is a child of the module around the router and the experts.

    Args:
        mixture: what it is on.
        like, group_size, density_init, distribution: as in `PartGate`.
    """

    gates = "expert"

    def __init__(
        self,
        mixture: Mixture,
        like: Tensor,
        group_size: int,
        density_init: float,
        distribution: HardConcrete | None = None,
    ) -> None:
        super().__init__(mixture.number, like, group_size, density_init, distribution)
        self.mixture, self.least = mixture, mixture.least

    def forward(self) -> tuple[Tensor, Tensor]:
        """z [experts] of this call, and bool [experts]: those that the router must not pick."""
        z = self._drawn()
        order = self.log_alpha.detach().argsort(descending=True, stable=True)
        return z, (z == 0).index_fill(0, order[: self.least], False)

    def extra_repr(self) -> str:
        return f"on {self.mixture.number} experts"


def last_weights(module: nn.Module, number: int) -> list[str]:
    """Of weights of several experts together, the names of the last one, and of its biases."""
    own = {key: one for key, one in module._parameters.items() if one is not None}
    sized = [key for key, one in own.items() if one.dim() > 1 and one.shape[0] == number]
    last = max(place for place, key in enumerate(sized) if own[key].dim() == 3)
    return sized[last:]


def scaled(value: Tensor, z: Tensor) -> Tensor:
    """Weights of several experts, each multiplied by its gate."""
    return value * z.to(value).view(-1, *[1] * (value.dim() - 1))


class _Hook(OwnHook):
    """Of a mixture."""


class _Begin(_Hook):
    """Pre-hook of the module around: hands the gates of this call out."""

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        gate = module._modules[CHILD]
        if isinstance(gate, ExpertGate):  # else there are no gates for a while
            z, shut = gate()
            vars(module.get_submodule(gate.mixture.router))[_NOW] = shut
            for host, place in gate.mixture.hosts(module):
                vars(host)[_NOW] = z if place is None else z[place]


class _End(_Hook):
    """Hook of the module around: the call is over."""

    def __call__(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        gate = module._modules[CHILD]
        if isinstance(gate, ExpertGate):
            vars(module.get_submodule(gate.mixture.router)).pop(_NOW, None)
            for host, _ in gate.mixture.hosts(module):
                vars(host).pop(_NOW, None)


class _Mask(_Hook):
    """Hook of a router that is a Linear: -inf for closed experts."""

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        shut = vars(module).get(_NOW)
        return None if shut is None else output.masked_fill(shut, -torch.inf)


_PRODUCTS = (
    *(torch.nn.functional.linear, torch.matmul, torch.mm, torch.addmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm),
)


class _Masking(TorchFunctionMode):
    """Products that give a number for each expert give -inf for the closed ones."""

    def __init__(self, shut: Tensor) -> None:
        super().__init__()
        self.shut = shut

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and given.shape[-1] == len(self.shut):
            return given.masked_fill(self.shut, -torch.inf)
        return given


class _Enter(_Hook):
    """Pre-hook of a router with a forward of its own: its logits, and what it adds to them in order
    to pick experts, are -inf for closed ones."""

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        shut = vars(module).get(_NOW)
        if shut is None:
            return
        for key, value in {**module._parameters, **module._buffers}.items():
            if value is not None and value.shape == shut.shape and key != "bias":
                vars(module)[key] = value.masked_fill(shut, -torch.inf)
        mode = vars(module)[_MODE] = _Masking(shut)
        mode.__enter__()


class _Leave(_Hook):
    """Hook of such a router: it is as it was."""

    def __call__(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        mode = vars(module).pop(_MODE, None)
        if mode is not None:
            mode.__exit__(None, None, None)
            _uncover(module)


class _Scale(_Hook):
    """Hook of an expert's last layer: multiplies what it gives."""

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        z = vars(module).get(_NOW)
        return None if z is None else output * z.to(output)


class _Cover(_Hook):
    """Pre-hook of weights of several experts together: the last one is multiplied."""

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        z = vars(module).get(_NOW)
        if z is not None:
            for key in last_weights(module, len(z)):
                vars(module)[key] = scaled(module._parameters[key], z)  # type: ignore[arg-type]


class _Uncover(_Hook):
    """Hook of the same: its weights are its own."""

    def __call__(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        _uncover(module)


def _uncover(module: nn.Module) -> None:
    for key in (*module._parameters, *module._buffers):
        vars(module).pop(key, None)


def is_plain(router: nn.Module) -> bool:
    """Whether a router gives its logits as a Linear does, gated or not."""
    return isinstance(router, Drawn) or type(router).forward is nn.Linear.forward


def put_experts(model: nn.Module, gate: ExpertGate) -> None:
    """Puts gates on a mixture of a model, in place."""
    mixture = gate.mixture
    around = model.get_submodule(mixture.name)
    around.add_module(CHILD, gate.train(around.training))
    around.register_forward_pre_hook(_Begin())
    router = around.get_submodule(mixture.router)
    if is_plain(router):
        router.register_forward_hook(_Mask())
    else:
        router.register_forward_pre_hook(_Enter())
        router.register_forward_hook(_Leave(), always_call=True)
    for host, place in mixture.hosts(around):
        if place is not None:
            host.register_forward_hook(_Scale())
        else:
            host.register_forward_pre_hook(_Cover())
            host.register_forward_hook(_Uncover(), always_call=True)
    around.register_forward_hook(_End(), always_call=True)


def take_experts(model: nn.Module) -> None:
    """Takes the gates of experts, or what stands in their place, off a model."""
    for module in list(model.modules()):
        if any(isinstance(hook, _Begin) for hook in module._forward_pre_hooks.values()):
            del module._modules[CHILD]
        remove_hooks(module, lambda hook: isinstance(hook, _Hook))


def multiplies(layer: nn.Module) -> bool:
    """Whether what a layer gives is multiplied by the gate of an expert."""
    return any(isinstance(hook, _Scale) for hook in layer._forward_hooks.values())


def expert_gates(layers: Any) -> dict[str, ExpertGate]:
    """Those of some layers with gates that are gates of experts, by name."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, ExpertGate)}
