"""Skipping: the closed units of a step are left out of its computation, which stays the same.

A gate that is drawn closed contributes nothing, and gives its weights and its log_alpha exactly
zero gradient from the loss. Where the channels that one layer makes are followed to the layers
that read them, the maker leaves out those that nobody reads in this step, and the readers get the
others compact: no zeros are put in and taken out again between them.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l0fast.graph.capture import NORMS
from l0fast.graph.proof import tensors_of
from l0fast.layers.draw import Compact, Draw, Drawn, OnDevice
from l0fast.skipping import skip_on_device
from l0fast.skipping.following import Following, can_follow

OVERHEAD = 5_000_000
"""Multiply-accumulates of one pass that take as long as leaving channels out of a link (on a CPU:
picking weights, putting gradients back)."""


MULTIPLE = 4
"""How many units are computed is rounded up to it: convolutions of few different, even widths run
faster. The units added are closed, and so masked."""


@dataclass
class Reader:
    """A layer at the end of a link, or a norm on the way, which reads whatever arrives."""

    layer: Any
    labels: Tensor | None
    """[inputs]: the maker's channel at each of its inputs; None where they are the channels."""

    @property
    def by_gates(self) -> bool:
        """Whether it does not read all that arrives."""
        return isinstance(self.layer, Drawn) and self.layer.gates == "input"


@dataclass
class Link:
    """Channels on their way from the layer that makes them to the layers that read them."""

    maker: Any | None
    """None: what arrives is full, and each reader picks what it needs."""
    readers: list[Reader]
    zeros: bool = False
    """Whether a channel that its maker closes arrives as zeros everywhere."""
    work: int = 0
    """Multiply-accumulates of its layers for the example."""

    def layers(self) -> list[Any]:
        """The maker and the readers."""
        return [*(reader.layer for reader in self.readers), *([self.maker] if self.maker else [])]

    @property
    def linear(self) -> bool:
        """Whether kernels can follow it: from a linear layer to others that have gates for it."""
        return (
            isinstance(self.maker, nn.Linear)
            and not (isinstance(self.maker, Drawn) and self.maker.gates == "output")
            and all(
                isinstance(reader.layer, nn.Linear) and reader.by_gates and reader.labels is None
                for reader in self.readers
            )
        )

    @property
    def own(self) -> bool:
        """Whether a channel is left out when its maker closes it."""
        return self.zeros and isinstance(self.maker, Drawn) and self.maker.gates == "output"


def _rounded_up(mask: Tensor, multiple: int) -> Tensor:
    """Positions where `mask` is set, and as many others as make their number a multiple.

    At least one: an empty layer does not run.
    """
    found = mask.nonzero().flatten()
    wanted = min(-(-max(len(found), 1) // multiple) * multiple, len(mask))
    if len(found) < wanted:
        others = (~mask).nonzero().flatten()[: wanted - len(found)]
        found = torch.cat([found, others]).sort().values
    return found


def form_of(args: tuple[Any, ...], options: dict[str, Any]) -> list[object]:
    """How a forward is called: its tensors' dtypes and ranks, and everything else as it is."""
    leaves, structure = tree_flatten((tuple(args), options))
    forms = [
        (leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    ]
    return [str(structure), *forms]


class Skipping:
    """The links of a model, and whether closed units are skipped on them.

    What is left out depends on the gates and on the size of the input alone, so that a training
    that is resumed takes the very steps of one that was not interrupted. A call of another form
    than the example's, and a model that has been changed since, are computed masked.

    Args:
        model: the model that draws.
        links: of its layers; each layer makes, and reads, at most one.
        mode: "auto": a link where it pays, on a CPU; True: every link.
        on_gpu: with gates drawn on a GPU; then chains of linear layers are computed with no read by
            the host, if no convolution needs one.
        args: the example.
        multiple: of how many units are computed.
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
        convolved = any(not isinstance(layer, nn.Linear) for one in links for layer in one.layers())
        self.on_gpu = on_gpu
        self.unread = on_gpu and not convolved and any(link.linear for link in links)
        self.links, self.mode, self.multiple = links, mode, multiple
        self.form = form_of(args, {})
        self.size = max(next((tensor.numel() for tensor in tensors_of(args)), 1), 1)
        found = {id(layer): layer for link in links for layer in link.layers()}
        self._layers = list(found.values())
        self._following = [
            Following(layer) for layer in self._layers if not isinstance(layer, Drawn)
        ]
        for following in self._following:
            following.layer.__dict__["forward"] = following
        self._modules = list(model.modules())

    def clear(self) -> None:
        """Makes every layer compute with all units."""
        for layer in self._layers:
            if isinstance(layer, Drawn):
                layer.__dict__["_compact"] = None
        for following in self._following:
            following.compact = None

    def holds(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether this is a call like the example, of the model as it was."""
        modules = list(model.modules())
        return (
            form_of(args, options) == self.form
            and len(modules) == len(self._modules)
            and all(map(operator.is_, modules, self._modules))
            and all(f.layer.__dict__.get("forward") is f for f in self._following)
            and all(can_follow(f.layer) for f in self._following)
            and not any(one._forward_hooks or one._forward_pre_hooks for one in self._layers)
        )

    def assign(
        self,
        model: nn.Module,
        opened: dict[int, Tensor],
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        draw: Draw,
    ) -> None:
        """Tells each layer what it leaves out in this step.

        Args:
            model: the model that draws.
            opened: id of a layer drawn in this step -> bool, which units its gates leave open.
            inputs, options: of the model's forward.
            draw: the model's, in force as long as this forward is.
        """
        if self.mode == "auto" and skip_on_device.on_gpu(opened):
            return  # the host would have to wait for the gates
        if not self.holds(model, inputs, options):
            return
        if self.unread:
            compacts = self._unread(opened)
        elif self.on_gpu:
            device = next(iter(opened.values())).device
            seen = skip_on_device.read_back(opened)
            compacts = skip_on_device.send(self._compacts(seen, inputs), device)
        else:
            compacts = self._compacts(opened, inputs)
        for layer in self._layers:
            if isinstance(layer, Drawn):
                layer.__dict__["_compact"] = compacts.get(id(layer))
        for following in self._following:
            following.compact, following.draw = compacts.get(id(following.layer)), draw

    def _unread(self, opened: dict[int, Tensor]) -> dict[int, OnDevice]:
        """What each layer leaves out, as lists that stay on the device."""
        ends = [
            (id(link.maker), [id(one.layer) for one in link.readers], self._alive(link, opened))
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
        first = next(iter(tensors_of(inputs)), None)
        examples = 1.0 if first is None else first.numel() / self.size
        rows: dict[int, Tensor] = {}
        cols: dict[int, tuple[Tensor, Tensor | None]] = {}
        for link in self.links:
            if not self._drawn(link, opened):
                continue
            if link.maker is None:
                (reader,) = link.readers
                found = _rounded_up(opened[id(reader.layer)], self.multiple)
                if self.pays(link, len(found), len(opened[id(reader.layer)]), examples):
                    cols[id(reader.layer)] = found, found
                continue
            alive = self._alive(link, opened)
            found = _rounded_up(alive, self.multiple)
            if not self.pays(link, len(found), len(alive), examples):
                continue
            rows[id(link.maker)] = found
            alone = sum(not isinstance(reader.layer, NORMS) for reader in link.readers) == 1
            for reader in link.readers:
                cols[id(reader.layer)] = self._columns(reader, alive, found, opened, alone)
        return {
            id(layer): Compact(rows.get(id(layer)), *cols.get(id(layer), (None, None)))
            for layer in self._layers
            if id(layer) in rows or id(layer) in cols
        }

    def pays(self, link: Link, kept: int, of: int, examples: float) -> bool:
        """Whether leaving out the other channels saves more time than it costs."""
        if kept == of or self.mode is True:
            return kept < of
        return link.work * examples * (of - kept) / of > OVERHEAD

    @staticmethod
    def _alive(link: Link, opened: dict[int, Tensor]) -> Tensor:
        """bool [channels]: those that somebody reads, and that are not zeros."""
        assert link.maker is not None
        size = link.maker.weight.shape[0]
        needed: list[Tensor] = []
        for reader in link.readers:
            if reader.by_gates:
                need = opened[id(reader.layer)]
                if reader.labels is not None:
                    counts = torch.zeros(size, dtype=torch.float32, device=need.device)
                    need = counts.index_add_(0, reader.labels.to(need.device), need.float()) > 0
                needed.append(need)
            elif not isinstance(reader.layer, NORMS):
                device = next(iter(opened.values())).device
                needed = [torch.ones(size, dtype=torch.bool, device=device)]
                break
        alive = functools.reduce(torch.logical_or, needed)
        if link.own:
            alive = alive & opened[id(link.maker)]
        return alive

    @staticmethod
    def _columns(
        reader: Reader, alive: Tensor, found: Tensor, opened: dict[int, Tensor], alone: bool
    ) -> tuple[Tensor, Tensor | None]:
        """([C] columns to compute with, their positions among the inputs that arrive)."""
        if reader.labels is None and (alone or not reader.by_gates):
            return found, None  # what arrives is what it wants
        there = torch.zeros_like(alive)
        there[found] = True
        arrives = there if reader.labels is None else there[reader.labels.to(there.device)]
        wanted = arrives & opened[id(reader.layer)] if reader.by_gates else arrives
        positions, arriving = wanted.nonzero().flatten(), arrives.nonzero().flatten()
        if not len(positions):
            positions = arriving[:1]
        if len(positions) == len(arriving):
            return positions, None
        return positions, torch.searchsorted(arriving, positions)
