"""Models that several processes share: what is sharded, and the full tensors of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l0fast import _checks

P = ParamSpec("P")
R = TypeVar("R")

IGNORED = "ignored_params=set(l0fast.gates(model).parameters())"
"""Keeps gates out of FSDP2's sharding."""
_FSDP = "torch.distributed.fsdp"
_STATES = "__composable_api"
"""What attributes by which PyTorch keeps the state of sharding on a module begin with."""
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)


def is_sharded(value: object) -> bool:
    """Whether a tensor is a DTensor."""
    # Where nothing has imported them, there are none; importing them takes time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_split(layer: nn.Module) -> bool:
    """Whether something other than FSDP2, such as tensor parallelism, shards a layer's weights."""
    # parallelize_module leaves the first mark, fully_shard the second. FSDP2 alone shards a weight
    # in one dimension of the mesh.
    if hasattr(layer, "_distribute_module_applied"):
        return True
    own: dict[str, Any] = dict(layer.named_parameters(recurse=False))
    sharded = [one for name, one in own.items() if name != "log_alpha" and is_sharded(one)]
    if sharded and not hasattr(layer, "_is_fsdp_managed_module"):
        return True
    return any(sum(not place.is_replicate() for place in one.placements) > 1 for one in sharded)


def is_flat(value: object) -> bool:
    """Whether a parameter is one of FullyShardedDataParallel's."""
    return hasattr(value, "_fsdp_flattened")


def refuse_shared(model: nn.Module) -> None:
    """Refuses to put gates on a model that several processes share already: sharded parameters are
    not a layer's weights, and DistributedDataParallel does not average what comes later."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            words = "a model in DistributedDataParallel"
            _checks.refuse("model", words, "the model itself (sparsify_ first, then wrap it)")
        if _is_fully_sharded(module):
            expected = f"whole parameters (sparsify_ first, then fully_shard(module, {IGNORED}))"
            _checks.refuse("model", "one that is sharded by fully_shard", expected)
    for name, value in model.named_parameters():
        if is_sharded(value) or is_flat(value):
            expected = "whole parameters (sparsify_ first, then shard)"
            _checks.refuse("model", f"a sharded parameter {name}", expected)


def full(value: Tensor) -> Tensor:
    """The whole of a tensor, on every process; all processes must call it if it is sharded."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def _is_fully_sharded(module: nn.Module) -> bool:
    fsdp: Any = sys.modules.get(_FSDP)
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _of_sharding(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)
    return str(getattr(inner, "__module__", "")).startswith(_FSDP)


def _make_plain(module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
    """Gives a module its own class, its full parameters, and no hooks of sharding."""
    kind: Any = type(module)
    if _is_fully_sharded(module):
        module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
    own = vars(module)
    for key in [key for key in own if key.startswith(_STATES)]:
        del own[key]
    for name in _HOOKS:
        kept = {key: hook for key, hook in own[name].items() if not _of_sharding(hook)}
        own[name] = type(own[name])(kept)
    own["_parameters"] = parameters = dict(module._parameters)
    for name, value in parameters.items():
        if value is not None and is_sharded(value):
            if id(value) not in copies:
                copies[id(value)] = nn.Parameter(full(value.detach()), value.requires_grad)
            parameters[name] = copies[id(value)]


@contextmanager
def with_full_weights(model: nn.Module) -> Generator[None]:
    """Makes a model that FSDP2 shards the plain one of the full weights, and sharded after it.

    All processes must enter it; each gathers all weights. Other models stay as they are.
    """
    modules = list(model.modules())
    sharded: list[Any] = [module for module in modules if _is_fully_sharded(module)]
    if not sharded:
        yield
        return
    for module in sharded:
        module.reshard()  # what a forward has left whole is a copy, perhaps in another dtype
    before = [(module, type(module), dict(vars(module))) for module in modules]
    try:
        copies: dict[int, nn.Parameter] = {}
        for module in modules:
            _make_plain(module, copies)
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).update(attributes)


def on_full_weights(
    call: Callable[Concatenate[nn.Module, P], R],
) -> Callable[Concatenate[nn.Module, P], R]:
    """A function of a model that is given it with its full weights (see `with_full_weights`)."""

    @functools.wraps(call)
    def gathered(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        with with_full_weights(_checks.module("model", model)):
            return call(model, *args, **kwargs)

    return gathered
