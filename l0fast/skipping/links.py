"""From one export of a model: the links along which closed units can be skipped."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.graph import capture
from l0fast.graph.calls import evaluating
from l0fast.graph.channels import RIGID
from l0fast.graph.nodes import op_name, shape_of
from l0fast.graph.proof import TOLERANCE, relative_error, tensors_of
from l0fast.graph.sites import find_sites, light_copy, replace
from l0fast.graph.units import STAYS
from l0fast.graph.walk import Walk
from l0fast.layers.draw import SKIPPING, detach_draw, gated_layers, own_gates
from l0fast.layers.drawn import Drawn
from l0fast.layers.substitute import with_log_alpha
from l0fast.skipping import skip_on_device
from l0fast.skipping.following import can_follow, passes_on, stop_following
from l0fast.skipping.link import End, Link
from l0fast.skipping.skip import MULTIPLE, Skipping

SLACK = 100.0
"""Times the tolerance of a pruned model: how much masked and skipped may differ by rounding."""
DRAWS = 6


def _plain(model: nn.Module) -> nn.Module:
    """A copy in training with ordinary layers for the gated ones, of the same parameters."""
    twin = light_copy(model)
    replace(twin, {id(layer): layer.dense() for layer in gated_layers(twin).values()})
    stop_following(twin)
    detach_draw(twin)
    twin.train()
    for module in twin.modules():
        if isinstance(module, capture.NORMS):
            module.eval()  # one example may be too few for it; and its counting is no known op
    return twin


def _usable(layer: Any) -> bool:
    """Whether a layer can compute with some of its rows and columns."""
    if not isinstance(layer, Drawn) or layer.noise == "example" or layer.gates == "weight":
        return False
    return getattr(layer, "groups", 1) == 1


class _Finder:
    """The links of a model, from a walk along its graph.

    Args:
        model: with gates.
        plain: the same without.
        trace: its export.
        views: follow units across ops that may have sizes written out.
    """

    def __init__(
        self, model: nn.Module, plain: nn.Module, trace: capture.Trace, views: bool
    ) -> None:
        layers, modules = gated_layers(model), dict(model.named_modules())
        # Weights are read where they are: ties, and who else reads them, do not matter here.
        found = find_sites(plain, None, {}, {})
        sites = {
            # A maker of zeros: then it shows where those arrive.
            name: dataclasses.replace(site, writes=torch.zeros_like(site.writes))
            if name in layers and layers[name].gates == "output"
            else site
            for name, site in found.items()
        }
        self.layers: dict[str, Any] = {}
        """The layers that can leave something out: gated, or those that follow them."""
        for name, site in sites.items():
            layer = layers.get(name, modules[name])
            usable = _usable(layer) if name in layers else can_follow(layer)
            if usable and not site.fixed and trace.counts[name] == 1:
                self.layers[name] = layer
        self.trace, self.walk = trace, Walk(trace, sites.values())
        self.needed = self._needed(views)

    def _needed(self, views: bool) -> Tensor:
        """bool, by class of units: whether they must be there, or cannot be left out."""
        walk = self.walk
        needed = torch.zeros(len(walk.classes), dtype=torch.bool)
        needed[walk.classes[STAYS]] = True
        others = [labels for name, labels in walk.made.items() if name not in self.layers]
        for name, units in walk.inputs.items():
            if name not in self.layers and units is not None:
                others.append(units.labels)
        several = walk.classes.bincount(minlength=len(walk.classes))[walk.classes] > 1
        for node in self.trace.graph.nodes:
            if op_name(node) in RIGID:
                for source in node.all_input_nodes:
                    found = [units.labels.flatten().unique() for units in walk.units(source)]
                    # A width that is written out mostly is that of a single tensor: a stream does
                    # not try.
                    others += [labels[several[labels]] if views else labels for labels in found]
        for labels in others:
            needed[walk.classes[labels]] = True
        return needed

    def _work(self, name: str) -> int:
        """Multiply-accumulates of a layer for the example."""
        weight = self.layers[name].weight
        if type(self.layers[name]) in capture.NORMS:
            return 0
        nodes = (node for node, called in self.trace.calls.items() if called == name)
        places = (math.prod(shape_of(node) or (0,)) for node in nodes)
        return weight.numel() * sum(places) // max(weight.shape[0], 1)

    def _groups(self, vectors: list[Tensor]) -> Tensor:
        """Class of units -> the least class among all those that layers make or read with it."""
        group = torch.arange(len(self.walk.classes))
        while True:
            before = group.clone()
            for vector in vectors:
                group[vector] = group[vector].min()
            group = group[group]
            if torch.equal(before, group):
                return group

    def links(self) -> list[Link]:
        walk, layers = self.walk, self.layers
        made = {name: walk.classes[walk.made[name]] for name in layers if name in walk.made}
        read = {
            name: walk.classes[units.labels]
            for name in layers
            if (units := walk.inputs.get(name)) is not None
        }
        group = self._groups([*made.values(), *read.values()])
        kept = set(group[self.needed].tolist())
        makers: dict[int, list[str]] = {}
        readers: dict[int, list[str]] = {}
        for vectors, found in ((made, makers), (read, readers)):
            for name, vector in vectors.items():
                found.setdefault(int(group[vector[0]]), []).append(name)
        links: list[Link] = []
        linked: set[str] = set()
        for key, names in makers.items():
            if key in kept or all(passes_on(layers[n]) for n in readers.get(key, [])):
                continue
            link = self._link({n: made[n] for n in names}, {n: read[n] for n in readers[key]})
            reads_all = not all(end.by_gates or end.passes_on for end in link.readers)
            if link.channels > 1 and (link.own or not reads_all):
                links.append(link)
                linked.update(readers[key])
        for name, layer in layers.items():
            end = End(layer, None)
            if name not in linked and end.by_gates and name in walk.inputs:
                links.append(Link([], [end], work=self._work(name)))
        return links

    def _link(self, makers: dict[str, Tensor], readers: dict[str, Tensor]) -> Link:
        """The link of some layers, given the classes of units that they make and read."""
        walk, layers = self.walk, self.layers
        channels = torch.tensor(list(dict.fromkeys(torch.cat([*makers.values()]).tolist())))
        place = torch.full((len(walk.classes),), -1)
        place[channels] = torch.arange(len(channels))

        def end(name: str, vector: Tensor) -> End:
            whole = torch.equal(vector, channels)
            return End(layers[name], None if whole else place[vector])

        inputs = [units for name in readers if (units := walk.inputs[name]) is not None]
        # What a norm (or a bias on the way) makes of zeros changes with its parameters.
        zeros = (
            len(makers) == 1
            and not any(passes_on(layers[name]) for name in readers)
            and not any(bool(walk.tainted[walk.made[name]].any()) for name in makers)
            and all(bool((units.constant == 0).all()) for units in inputs)
        )
        macs = sum(self._work(name) for name in (*makers, *readers))
        ends = [end(*item) for item in makers.items()]
        return Link(ends, [end(*item) for item in readers.items()], len(channels), zeros, macs)


def find_links(model: nn.Module, args: tuple[Any, ...], views: bool = True) -> list[Link]:
    """The links between a model's gated layers, on its example.

    Args:
        model: with gates; it is not changed.
        args: what its forward takes.
        views: follow units across ops that may have sizes written out.

    Raises:
        Exception: whatever torch.export raises for a model that it refuses.
    """
    plain = _plain(model)
    return _Finder(model, plain, capture.export(plain, args), views).links()


def _outputs(model: nn.Module, args: tuple[Any, ...], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [tensor.detach().clone() for tensor in tensors_of(model(*copy.deepcopy(args)))]


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _error(model: nn.Module, args: tuple[Any, ...], links: list[Link]) -> float:
    """The largest relative difference between masked and skipped forwards of the example.

    It is the model itself that runs, with other gates; afterwards all is as it was.
    """
    layers, worst = gated_layers(model), 0.0
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=list(devices)), evaluating(model):
        for layer in layers.values():
            layer.training = True
        try:
            skipping = Skipping(model, links, True, args, 1, _on_gpu(model))
            for draw in range(DRAWS):
                torch.manual_seed(draw)
                values = {
                    name: torch.empty_like(layers[name].log_alpha).normal_(0.0, 2.0)
                    for name in own_gates(layers)
                }
                with with_log_alpha(layers, values):
                    expected = _outputs(model, args, draw)
                    model.__dict__[SKIPPING] = skipping
                    worst = max(worst, relative_error(_outputs(model, args, draw), expected))
                    del model.__dict__[SKIPPING]
        finally:
            stop_following(model)
            for buffer, before in buffers:  # a model may count its calls
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    return worst


def attach_skipping(model: nn.Module, args: tuple[Any, ...], skip: str | bool) -> None:
    """Makes the model's draw say which closed units each step leaves out.

    Tried out on the example, masked against skipped. Where that fails, "auto" skips nothing.

    Raises:
        ValueError: `skip` is True, and the model cannot skip.
    """
    on_gpu = _on_gpu(model)
    if skip is False or (skip == "auto" and on_gpu):
        return  # what it saves there has not been measured
    dtypes = {parameter.dtype for parameter in model.parameters()}
    allowed = SLACK * max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in dtypes)
    failure = ""
    for views in (True, False):  # a model may reshape to sizes that it has written out
        try:
            links = find_links(model, args, views)
            error = _error(model, args, links)
        except Exception as problem:
            reason = str(problem).strip().splitlines() or [""]
            failure = f"{type(problem).__name__}: {reason[0][:200]}"
            continue
        if links and error <= allowed:
            multiple = skip_on_device.MULTIPLE if on_gpu else MULTIPLE
            model.__dict__[SKIPPING] = Skipping(model, links, skip, args, multiple, on_gpu)
            return
        failure = f"it differs by {error:.3g}" if links else "no units can be followed"
    if skip is True:
        _checks.refuse("skip", skip, f"'auto' or False for this model ({failure})")
