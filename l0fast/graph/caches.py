"""The places that the attentions of a decoder have in its cache, when some of them are gone.

A decoder asks the first place of a kind of layer how long the text is so far, and its configuration
says the kind of each place and of each block by one list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

INDEX = "layer_idx"
"""The attribute by which a decoder's attention knows its place in a cache."""
KINDS = "layer_types"
"""What a configuration says of the kinds of its layers."""
KIND = "attention_type"
"""The attribute by which some blocks know their kind."""
_OF_ATTENTIONS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))


def configurations(model: nn.Module, holder: str) -> list[Any]:
    """The configurations of the modules around one."""
    parts = holder.split(".")
    around = (".".join(parts[:size]) for size in range(len(parts)))
    found = (getattr(model.get_submodule(name), "config", None) for name in around)
    return list({id(one): one for one in found if one is not None}.values())


def other_caches(model: nn.Module) -> bool:
    """Whether a decoder's layers have caches of different kinds, and not all are attentions."""
    configs = (getattr(module, "config", None) for module in model.modules())
    kinds = (getattr(config, KINDS, None) for config in configs)
    lists = (set(some) for some in kinds if isinstance(some, (list, tuple)))
    return any(len(some) > 1 and not some <= _OF_ATTENTIONS for some in lists)


def with_index(model: nn.Module) -> list[nn.Module]:
    """The modules that have a place in a cache: the innermost."""
    found = [m for m in model.modules() if type(vars(m).get(INDEX)) is int]
    outer = {id(m) for m in found for inner in m.modules() if inner is not m and inner in found}
    return [module for module in found if id(module) not in outer]


def renumber_(model: nn.Module, indexed: Iterable[nn.Module]) -> None:
    """Gives the attentions that are left of a model their places in a cache.

    Where all layers are of one kind these are the first places. Else each has that of its block;
    but the first place of each kind is never empty.

    Args:
        model: it has lost attentions or blocks already, and `layer_types` has lost its blocks.
        indexed: the attentions that it had.
    """
    left = {id(module) for module in model.modules()}
    stay: Any = [module for module in indexed if id(module) in left]
    holders = list(_of_kinds(model))
    for config, blocks in holders:
        _of_blocks_(config, blocks, stay)
    places = {value: new for new, value in enumerate(sorted({m.layer_idx for m in stay}))}
    if holders or len(stay) == len(list(indexed)):
        return
    for module in model.modules():
        if vars(module).get(INDEX) in places:
            setattr(module, INDEX, places[vars(module)[INDEX]])


def _of_kinds(model: nn.Module) -> Iterator[tuple[Any, list[nn.Module]]]:
    """(configuration, blocks) of the stacks whose attentions are of different kinds."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for config in configurations(model, name):
                kinds = getattr(config, KINDS, None)
                if kinds is not None and len(kinds) == len(module) and len(set(kinds)) > 1:
                    yield config, list(module)


def _of_blocks_(config: Any, blocks: Sequence[nn.Module], indexed: Sequence[nn.Module]) -> None:
    own = {id(one) for one in indexed}
    full = [i for i, one in enumerate(blocks) if any(id(m) in own for m in one.modules())]
    if not full:
        return
    before = getattr(config, KINDS)
    kinds, places = in_places(before, full)
    setattr(config, KINDS, kinds)
    for block, old, kind in zip(blocks, before, kinds, strict=True):
        if kind != old and vars(block).get(KIND) == old:
            setattr(block, KIND, kind)
    for place, block in enumerate(blocks):
        for module in block.modules():
            if type(vars(module).get(INDEX)) is int:
                setattr(module, INDEX, places.get(place, place))


def in_places(kinds: Sequence[str], full: Sequence[int]) -> tuple[list[str], dict[int, int]]:
    """The kinds of places in a cache, and the place of each block that has an attention.

    Args:
        kinds: of the blocks; that of a block without attention may change.
        full: the blocks that have an attention, at least one.
    """
    used = {kinds[block] for block in full}
    found = [kind if kind in used else kinds[full[0]] for kind in kinds]
    places = {block: block for block in full}
    for kind in used:
        first = found.index(kind)
        if first not in places:
            places[next(block for block in full if kinds[block] == kind)] = first
    return found, places
