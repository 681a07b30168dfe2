"""Skipping: the closed units of a step are left out of its computation, which stays the same.

A gate that is drawn closed contributes nothing, and gives its weights and its log_alpha exactly
zero gradient from the loss. Where the channels that one layer makes are followed to the layers
that read them, the maker leaves out those that nobody reads in this step, and the readers get the
others compact: no zeros are put in and taken out again between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l0fast.graph.compare import tensors_of
from l0fast.layers.draw import Compact, Draw, Drawn, OnDevice
from l0fast.layers.hooks import foreign_hooks, seen_backward
from l0fast.skipping import skip_on_device
from l0fast.skipping.following import Following, can_follow, follow
from l0fast.skipping.link import Link

OVERHEAD = 5_000_000
"""Multiply-accumulates of one pass that take as long as leaving channels out of a link at all (on a
CPU: listing them, and some ten ops)."""

PER_WEIGHT = 60
"""The same for each weight that is kept: picking it, masking it, putting its gradient back."""


MULTIPLE = 4
"""How many units are computed is rounded up to it where a convolution computes them: those of few
different, even widths run faster (Linears do not). The units added are closed, and so masked."""


def _tensor_form(leaf: object) -> tuple[torch.dtype, int] | None:
    return (leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else None


def form_of(args: tuple[Any, ...], options: dict[str, Any]) -> list[object]:
    """How a forward is called: its tensors' dtypes and ranks, and everything else as it is."""
    leaves, structure = tree_flatten((tuple(args), options))
    forms = [_tensor_form(leaf) or repr(leaf) for leaf in leaves]
    return [str(structure), *forms]


def _opened(draw: Draw) -> dict[int, Tensor]:
    """Id of a layer that a draw has gates for -> bool, which units these leave open."""
    opened: dict[int, Tensor] = {}
    for z, sizes, sharing in draw.parts:
        for layers, part in zip(sharing, (z > 0).split(sizes), strict=True):
            for layer in layers:
                opened[id(layer)] = layer.spread(part)
    return opened


class Skipping:
    """The links of a model, and whether closed units are skipped on them.

    What is left out depends on the gates and on the size of the input alone, so that a training
    that is resumed takes the very steps of one that was not interrupted. A call of another form
    than the example's, and a model that has been changed since, are computed masked.

    Args:
        model: the model that draws.
        links: of its layers; each layer makes, and reads, at most one link's channels.
        mode: "auto": a link where it pays, on a CPU; True: every link.
        on_gpu: with gates drawn on a GPU; then chains of linear layers are computed with no read by
            the host, if no convolution needs one.
        args: the example.
        multiple: of how many units are computed, on a CPU where a link is convolved.
    """

    def __init__(
        self,
        model: nn.Module,
        links: list[Link],
        mode: str | bool,
        args: tuple[Any, ...],
        multiple: int = MULTIPLE,
        on_gpu: bool = False,
    ) -> None:
        self._rounded = [on_gpu or link.convolved for link in links]
        self.on_gpu = on_gpu
        convolved = any(link.convolved for link in links)
        self.unread = on_gpu and not convolved and any(link.linear for link in links)
        self.links, self.mode, self.multiple = links, mode, multiple
        self.form = form_of(args, {})
        self._tensors = [_tensor_form(one) for one in args]
        self.size = max(next((tensor.numel() for tensor in tensors_of(args)), 1), 1)
        found = {id(layer): layer for link in links for layer in link.layers()}
        self._layers = list(found.values())
        self._following: list[tuple[nn.Module, Following]] = [
            (layer, follow(layer)) for layer in self._layers if not isinstance(layer, Drawn)
        ]
        # The model as it was: of each module its children.
        parts = [module._modules for module in model.modules() if module._modules]
        self._children = [(children, list(children.values())) for children in parts]

    def clear(self) -> None:
        """Makes every layer compute with all units."""
        for _, following in self._following:
            following.compact = None

    def _like_the_example(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if options or None in self._tensors:
            return form_of(args, options) == self.form
        return [_tensor_form(one) for one in args] == self._tensors  # a tenth of the time

    def holds(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether this is a call like the example, of the model as it was."""
        return (
            self._like_the_example(args, options)
            and all(list(children.values()) == known for children, known in self._children)
            and not seen_backward()
            and not any(foreign_hooks(layer) for layer in self._layers)
            and not any("forward" in layer.__dict__ for layer in self._layers)
            and all(
                can_follow(layer) and following in layer._forward_pre_hooks.values()
                for layer, following in self._following
            )
        )

    def assign(self, draw: Draw, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Tells each layer what it leaves out in this step.

        Args:
            draw: the model's, in force as long as this forward is.
            inputs, options: of the model's forward.
        """
        if self.mode == "auto" and any(z.is_cuda for z, _, _ in draw.parts):
            return  # the host would have to wait for the gates
        if not self.holds(inputs, options):
            return
        opened = _opened(draw)
        if self.unread:
            draw.compacts.update(self._unread(opened))
        elif self.on_gpu:
            device = next(iter(opened.values())).device
            seen = skip_on_device.read_back(opened)
            draw.compacts.update(skip_on_device.send(self._compacts(seen, inputs), device))
        else:
            draw.compacts.update(self._compacts(opened, inputs))
        for layer, following in self._following:
            following.compact, following.draw = draw.compacts.get(id(layer)), draw

    def _unread(self, opened: dict[int, Tensor]) -> dict[int, OnDevice]:
        """What each layer leaves out, as lists that stay on the device."""
        ends = [
            (
                id(link.makers[0].layer),
                [id(one.layer) for one in link.readers],
                link.alive(opened),
            )
            for link in self.links
            if link.linear and self._drawn(link, opened)
        ]
        return skip_on_device.orders(ends)

    @staticmethod
    def _drawn(link: Link, opened: dict[int, Tensor]) -> bool:
        """Whether this step has drawn all the gates of a link's layers."""
        return all(id(layer) in opened for layer in link.layers() if isinstance(layer, Drawn))

    def _compacts(self, opened: dict[int, Tensor], inputs: tuple[Any, ...]) -> dict[int, Compact]:
        """What each layer leaves out, where the host can see the gates."""
        first = inputs[0] if inputs else None
        if not isinstance(first, Tensor):
            first = next(iter(tensors_of(inputs)), None)
        examples = 1.0 if first is None else first.numel() / self.size
        rows: dict[int, Tensor] = {}
        cols: dict[int, tuple[Tensor, Tensor | None]] = {}
        for link, rounded in zip(self.links, self._rounded, strict=True):
            if not self._drawn(link, opened):
                continue
            alive = link.alive(opened)
            if not self.pays(link, 1, len(alive), examples):
                continue  # whatever is open: it need not be listed
            found = link.computed(alive, self.multiple if rounded else 1)
            if not self.pays(link, len(found), len(alive), examples):
                continue
            if not link.makers:
                cols[id(link.readers[0].layer)] = found, found
                continue
            wanted = {id(opened[id(r.layer)]) for r in link.readers if r.by_gates}
            alike = len(wanted) == 1 and all(r.by_gates or r.passes_on for r in link.readers)
            there = None if alike and link.whole else torch.zeros_like(alive)
            if there is not None:
                there[found] = True
            for maker in link.makers:
                rows[id(maker.layer)] = maker.made(there, found)
            for reader in link.readers:
                cols[id(reader.layer)] = reader.columns(there, found, opened, alike)
        return {
            id(layer): Compact(rows.get(id(layer)), *cols.get(id(layer), (None, None)))
            for layer in self._layers
            if id(layer) in rows or id(layer) in cols
        }

    def pays(self, link: Link, kept: int, of: int, examples: float) -> bool:
        """Whether leaving out the other channels saves more time than it costs."""
        if kept == of or self.mode is True:
            return kept < of
        cost = OVERHEAD * max(len(link.makers), 1) + PER_WEIGHT * link.weights * kept / of
        return link.work * examples * (of - kept) / of > cost
