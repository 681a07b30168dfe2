"""The hooks by which the gates of a mixture's experts act on its router and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from l0fast.layers.draw import Drawn
from l0fast.layers.experts import CHILD, ExpertGate, last_weights, scaled
from l0fast.layers.hooks import OwnHook, remove_hooks

_NOW, _MODE = "_expert_now", "_expert_mode"
"""Attributes that a router, or an expert, has while its mixture runs."""
_AGAIN = "_expert_again"
"""What it has after that, for activation checkpointing, which runs it again in the backward."""


class _Hook(OwnHook):
    """Of a mixture."""


class _Handed:
    """What a router, or an expert, has of the gates of one call of its mixture. No copy has it."""

    def __init__(self, gate: ExpertGate | None = None, value: Tensor | None = None) -> None:
        self.gate, self.value = gate, value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handed, ()

    def get(self) -> Tensor | None:
        """It, where its draw allows that this is run now."""
        if self.gate is not None and self.gate.training and not torch.compiler.is_compiling():
            self.gate._given()
        return self.value


def _handed(module: nn.Module) -> Tensor | None:
    """What a module has of its mixture's gates in this call, or in the one that is run again."""
    found: _Handed | None = vars(module).get(_NOW)
    compiling = torch.compiler.is_compiling()
    if found is None and not compiling and torch._C._current_graph_task_id() != -1:
        found = vars(module).get(_AGAIN)
    return None if found is None else found.get()


class _Begin(_Hook):
    """Pre-hook of the module around: hands the gates of this call out."""

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        gate = module._modules[CHILD]
        if isinstance(gate, ExpertGate):  # else there are no gates for a while
            z, shut = gate()
            vars(module.get_submodule(gate.mixture.router))[_NOW] = _Handed(gate, shut)
            for host, place in gate.mixture.hosts(module):
                vars(host)[_NOW] = _Handed(gate, z if place is None else z[place])


class _End(_Hook):
    """Hook of the module around: the call is over."""

    def __call__(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        gate = module._modules[CHILD]
        if not isinstance(gate, ExpertGate):
            return
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        hosts = [host for host, _ in gate.mixture.hosts(module)]
        for host in (module.get_submodule(gate.mixture.router), *hosts):
            handed = vars(host).pop(_NOW, None)
            if again and handed is not None:
                vars(host)[_AGAIN] = handed


class _Mask(_Hook):
    """Hook of a router that is a Linear: -inf for closed experts."""

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        shut = _handed(module)
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
        shut = _handed(module)
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
        z = _handed(module)
        return None if z is None else output * z.to(output)


class _Cover(_Hook):
    """Pre-hook of weights of several experts together: the last one is multiplied."""

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        z = _handed(module)
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
        vars(module).pop(_AGAIN, None)


def multiplies(layer: nn.Module) -> bool:
    """Whether what a layer gives is multiplied by the gate of an expert."""
    return any(isinstance(hook, _Scale) for hook in layer._forward_hooks.values())
