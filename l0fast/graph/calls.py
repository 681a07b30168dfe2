"""How a user's model is called: out of its wrappers, on an example, in evaluation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from l0fast import _checks
from l0fast.graph.compare import tensors_of


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True, eq=False)
class Example:
    """What a model's forward is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any, model: nn.Module | None = None) -> Example:
        """The call that a user's `example_inputs` stands for.

        A mapping (a dict, or a batch of Hugging Face's) has keyword arguments, a tuple has
        positional ones, and anything else, a NamedTuple too, is the only argument. A list has
        positional arguments, unless the model takes it only as the one argument that it is, as
        detection models do.

        Args:
            example_inputs: of the user.
            model: whose forward takes it; asked about a list, and may be run on it.
        """
        if isinstance(example_inputs, Mapping):
            return cls(kwargs=dict(example_inputs))
        if type(example_inputs) is tuple:
            return cls(example_inputs)
        alone = cls((example_inputs,))
        if not isinstance(example_inputs, list):
            return alone
        several = cls(tuple(example_inputs))
        return alone if model is not None and _takes_alone(model, several, alone) else several

    def call(self, model: nn.Module) -> Any:
        """What a model gives."""
        return model(*self.args, **self.kwargs)

    def try_on(self, model: nn.Module) -> Any:
        """The same, for the first call of a user's model.

        Raises:
            ValueError: the model does not take the example.
        """
        try:
            return self.call(model)
        except Exception as error:
            self.refuse(error)

    def refuse(self, error: Exception) -> NoReturn:
        """Says that a model, which has raised `error`, does not take the example."""
        given = {name: _shape(value) for name, value in self.kwargs.items()}
        problem = f"what the model's forward takes ({_checks.one_line(error)})"
        try:
            _checks.refuse(
                "example_inputs", given or [_shape(value) for value in self.args], problem
            )
        except ValueError as refused:
            raise refused from error

    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return tensors_of([*self.args, *self.kwargs.values()])

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same call with other tensors; where one is given twice, so is what it is changed
        to."""
        changed: dict[int, Tensor] = {}

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in changed:
                changed[id(leaf)] = change(leaf)
            return changed[id(leaf)]

        args, kwargs = tree_map(one, (self.args, dict(self.kwargs)))
        return Example(args, kwargs)

    def copy(self) -> Example:
        """A call of its own: a model may write into its input."""
        memo: dict[int, Any] = {id(one): one.detach().clone() for one in self.tensors()}
        return Example(*copy.deepcopy((self.args, dict(self.kwargs)), memo))


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "_LightningModuleWrapperBase": "_forward_module",
    "_FabricModule": "_forward_module",
}
"""Classes that stand around a user's model -> where they keep it."""


def _runs(model: nn.Module, example: Example) -> bool:
    try:
        with own_randomness(model), evaluating(model):
            example.copy().call(model)
    except Exception:
        return False
    return True


def _takes_alone(model: nn.Module, several: Example, alone: Example) -> bool:
    """Whether a model takes a list as one argument, and not its elements as several."""
    try:
        inspect.signature(model.forward).bind(*several.args)
    except TypeError:
        return True
    return not _runs(model, several) and _runs(model, alone)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, out of what torch.compile, data parallelism and trainers put around
    it."""
    while True:
        kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _WRAPPERS]
        if not kinds:
            return model
        model = model.get_submodule(_WRAPPERS[kinds[0]])


def _wraps_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that wraps that of its class, as mixed precision
    of accelerate does; what moves inputs between devices is no such wrapper."""
    inner = vars(module).get("forward")
    if inner is None or "_hf_hook" in vars(module):
        return False
    own = type(module).forward
    while True:
        inner = getattr(inner, "__func__", inner)
        if inner is own:
            return True
        inner = getattr(inner, "__wrapped__", None)
        if inner is None:
            return False


def strip_forwards(model: nn.Module) -> None:
    """Gives a model, and all in it, the forward of its class back, where a wrapper is around it."""
    for module in model.modules():
        if _wraps_own_forward(module):
            for key in ("forward", "_original_forward"):
                vars(module).pop(key, None)


@contextmanager
def own_buffers(model: nn.Module, dtype: torch.dtype | None = None) -> Generator[None]:
    """Gives a model copies of its buffers, so that a forward cannot change its own; those of
    floating dtypes in `dtype`, if one is named."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for owned, buffers in before:
            for key, value in buffers.items():
                if value is None:
                    continue
                if id(value) not in copies:
                    wide = dtype is not None and value.is_floating_point()
                    copies[id(value)] = value.to(dtype, copy=True) if wide else value.clone()
                owned[key] = copies[id(value)]
        yield
    finally:
        for owned, buffers in before:
            owned.update(buffers)


@contextmanager
def own_randomness(model: nn.Module, seed: int | None = None) -> Generator[None]:
    """Takes no random numbers from the user's generators: after it they are where they were.

    Args:
        model: says which devices have a generator.
        seed: for the same random numbers every time.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        if seed is not None:
            torch.manual_seed(seed)
        yield


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _contents(module: nn.Module) -> dict[str, Any]:
    """What the lists, dicts and sets that a module keeps hold now."""
    return {
        key: copy.copy(value)
        for key, value in vars(module).items()
        if key not in MODULE_ATTRIBUTES and type(value) in (list, dict, set)
    }


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Puts the model into evaluation, without autograd and without wrappers around its forward, and
    every module back after it.

    Back are also buffers, attributes that a forward has set, and the contents of lists, dicts and
    sets that a module keeps, such as a cache.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        model.eval()
        strip_forwards(model)
        with torch.no_grad(), own_buffers(model):
            yield
    finally:
        for module, attributes, contents in before:
            now = vars(module)
            for key in [key for key in now if key not in attributes]:
                del now[key]
            now.update(attributes)
            for key, content in contents.items():
                now[key].clear()
                (now[key].extend if isinstance(content, list) else now[key].update)(content)
