"""Skipping: the closed units of a step are left out of its computation, which stays the same.

A gate that is drawn closed contributes nothing, and gives its weights and its log_alpha exactly
zero gradient from the loss. Where the channels that one layer makes are followed to the layers
that read them, the maker leaves out those that nobody reads in this step, and the readers get the
others compact: no zeros are put in and taken out again between them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l0fast.graph.branches import branch_of
from l0fast.graph.calls import Example
from l0fast.graph.capture import NORMS
from l0fast.layers.branch import branch_gates
from l0fast.layers.draw import Compact, Draw, Drawn, OnDevice
from l0fast.layers.handle import gated_layers
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


FORMS = 8
"""So many forms of calls beside the example's are tried out."""

Form = tuple[Any, ...]


def _form(value: object) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if type(value) not in (tuple, list, dict):
        return repr(value)
    leaves, structure = tree_flatten(value)
    return str(structure), *map(_form, leaves)


def form_of(example: Example) -> Form:
    """How a forward is called: its tensors' dtypes and ranks, and everything else as it is."""
    named = sorted(example.kwargs.items()) if len(example.kwargs) > 1 else example.kwargs.items()
    return tuple(map(_form, example.args)), tuple((name, _form(value)) for name, value in named)


def size_of(example: Example) -> int:
    """Elements of the first tensor of a call, whatever the order of its keyword arguments."""
    args, kwargs = example.args, example.kwargs
    if args and isinstance(args[0], Tensor):
        return max(args[0].numel(), 1)
    found = Example((*args, *(kwargs[name] for name in sorted(kwargs)))).tensors()
    return max(found[0].numel(), 1) if found else 1


def _opened(draw: Draw) -> dict[int, Tensor]:
    """Id of a layer that a draw has gates for -> bool, which units these leave open."""
    opened: dict[int, Tensor] = {}
    for z, sizes, sharing in draw.parts:
        for layers, part in zip(sharing, (z > 0).split(sizes), strict=True):
            for layer in layers:
                opened[id(layer)] = layer.spread(part)
    return opened


def _in_branches(model: nn.Module) -> list[tuple[int, list[int]]]:
    """Ids of the gates on branches, and of the gated layers inside each.

    Not of branches with batch norms: these count what they are given.
    """
    layers, found = gated_layers(model), list[tuple[int, list[int]]]()
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    for key, gate in branch_gates(layers).items():
        branch = branch_of(key, gate)
        if not any(map(branch.holds, norms)):
            inside = [id(layer) for name, layer in layers.items() if branch.holds(name)]
            found.append((id(gate), inside))
    return found


def _crossed(model: nn.Module, links: list[Link]) -> list[nn.Module]:
    """The modules that compact channels may enter or leave: those inside the innermost module
    around a link."""
    names = {id(module): name for name, module in model.named_modules()}
    around: set[str] = set()
    for link in links:
        if link.makers:
            paths = [names[id(layer)].split(".")[:-1] for layer in link.layers()]
            shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
            around.add("".join(f"{parts[0]}." for parts in shared))
    return [
        module
        for name, module in model.named_modules()
        if name and any(name.startswith(prefix) for prefix in around)
    ]


class Skipping:
    """The links of a model, and whether closed units are skipped on them.

    What is left out depends on the gates and on the size of the input alone, so that a training
    that is resumed takes the very steps of one that was not interrupted (on a GPU where a link is
    convolved it depends on the step before, too: see `width_of`). The first call of another
    form than the example's (with labels, or by keyword) is tried out like the example; such calls,
    where skipping may change something, and a model that has been changed since, are computed
    masked.

    Args:
        model: the model that draws.
        links: of its layers; each layer makes, and reads, at most one link's channels.
        mode: "auto": a link where it pays, on a CPU; True: every link.
        on_gpu: with gates drawn on a GPU; then chains of linear layers are computed with no read by
            the host, if no convolution needs one.
        example: of the calls.
        multiple: of how many units are computed, on a CPU where a link is convolved.
        views: whether units are followed across ops that may have sizes written out.
    """

    def __init__(
        self,
        model: nn.Module,
        links: list[Link],
        mode: str | bool,
        example: Example,
        multiple: int = MULTIPLE,
        on_gpu: bool = False,
        views: bool = True,
    ) -> None:
        self._rounded = [on_gpu or link.convolved for link in links]
        self.on_gpu = on_gpu
        convolved = any(link.convolved for link in links)
        self.unread = on_gpu and not convolved and any(link.linear for link in links)
        self.links, self.mode, self.multiple = links, mode, multiple
        self.views = views
        self.form, self.size = form_of(example), float(size_of(example))
        self._widths = [dict[int, int]() if on_gpu else None for _ in links]
        """Of the makers of each link, in the step before."""
        self._others: dict[Form, float | None] = {}
        """Other forms -> the size that takes as long as the example; None: they are masked."""
        found = {id(layer): layer for link in links for layer in link.layers()}
        self._layers = list(found.values())
        self._following: list[tuple[nn.Module, Following]] = [
            (layer, follow(layer)) for layer in self._layers if not isinstance(layer, Drawn)
        ]
        self._crossed = _crossed(model, links)
        self._inside = _in_branches(model)
        # The model as it was: of each module its children.
        parts = [module._modules for module in model.modules() if module._modules]
        self._children = [(children, list(children.values())) for children in parts]

    def clear(self) -> None:
        """Makes every layer compute with all units."""
        for _, following in self._following:
            following.compact = None

    def _examples(self, call: Example, try_out: Callable[[], float | None]) -> float | None:
        """How many times the example's work a call is; None: it is computed masked."""
        form = form_of(call)
        size = self.size if form == self.form else self._others.get(form)
        if form != self.form and form not in self._others:
            capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
            if len(self._others) == FORMS or capturing:
                return None
            self._others[form] = size = try_out()
        return None if size is None else size_of(call) / size

    def holds(self) -> bool:
        """Whether the model is as it was."""
        return (
            all(list(children.values()) == known for children, known in self._children)
            and not seen_backward()
            and not any(foreign_hooks(module) for module in self._crossed)
            and not any(foreign_hooks(layer) for layer in self._layers)
            and not any("forward" in layer.__dict__ for layer in self._layers)
            and all(
                can_follow(layer) and following in layer._forward_pre_hooks.values()
                for layer, following in self._following
            )
        )

    def assign(self, draw: Draw, call: Example, try_out: Callable[[], float | None]) -> None:
        """Tells each layer what it leaves out in this step.

        Args:
            draw: the model's, in force as long as this forward is.
            call: of the model's forward.
            try_out: says what is noted of the form of this call, if it is a new one.
        """
        if self.mode == "auto" and any(z.is_cuda for z, _, _ in draw.parts):
            return  # the host would have to wait for the gates
        examples = self._examples(call, try_out) if self.holds() else None
        if examples is None:
            return
        opened = _opened(draw)
        self._close_branches(opened)
        if self.unread:
            draw.compacts.update(self._unread(opened))
        elif self.on_gpu:
            device = next(iter(opened.values())).device
            seen = skip_on_device.read_back(opened)
            draw.compacts.update(skip_on_device.send(self._compacts(seen, examples), device))
        else:
            draw.compacts.update(self._compacts(opened, examples))
        for layer, following in self._following:
            following.compact, following.draw = draw.compacts.get(id(layer)), draw

    def _close_branches(self, opened: dict[int, Tensor]) -> None:
        """Closes all units in the branches that this draw has closed: what they give is multiplied
        by 0, and their gradients are 0."""
        for gate, layers in self._inside:
            if gate not in opened:
                continue
            of = {one: opened[one] for one in layers if one in opened}
            # Layers that share their gates must go on to have the same tensor.
            closed = {id(units): units & opened[gate] for units in of.values()}
            opened.update((one, closed[id(units)]) for one, units in of.items())

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

    def _compacts(self, opened: dict[int, Tensor], examples: float) -> dict[int, Compact]:
        """What each layer leaves out, where the host can see the gates."""
        rows: dict[int, Tensor] = {}
        cols: dict[int, tuple[Tensor, Tensor | None]] = {}
        all_links = zip(self.links, self._rounded, self._widths, strict=True)
        for link, rounded, widths in all_links:
            if not self._drawn(link, opened):
                continue
            alive = link.alive(opened)
            if not self.pays(link, 1, len(alive), examples):
                continue  # whatever is open: it need not be listed
            found = link.computed(alive, self.multiple if rounded else 1, widths)
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
