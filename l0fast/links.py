"""From one export of a model: the links along which closed units can be skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, graph
from l0fast.draw import SKIPPING, Drawn, gated_layers
from l0fast.proof import TOLERANCE, relative_error, tensors_of
from l0fast.skip import Link, Reader, Skipping

SLACK = 100.0
"""Times the tolerance of a pruned model: how much masked and skipped may differ by rounding."""
DRAWS = 3


def _light_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _plain(model: nn.Module) -> nn.Module:
    """A copy in training with ordinary layers for the gated ones, of the same parameters."""
    twin = _light_copy(model)
    for module in list(twin.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Drawn):
                module._modules[name] = child.dense()  # type: ignore[attr-defined]
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return twin.train()


def _usable(layer: Any) -> bool:
    """Whether a layer can compute with some of its rows and columns."""
    if not isinstance(layer, Drawn) or layer.noise == "example" or layer.gates == "weight":
        return False
    return getattr(layer, "groups", 1) == 1


def find_links(model: nn.Module, args: tuple[Any, ...], views: bool = True) -> list[Link]:
    """The links between a model's gated layers, on its example.

    Args:
        model: with gates; it is not changed.
        args: what its forward takes.
        views: follow units across reshapes.

    Raises:
        Exception: whatever torch.export raises for a model that it refuses.
    """
    layers = gated_layers(model)
    plain = _plain(model)
    trace = graph.export(plain, args)
    sites: dict[str, graph.Site] = {}
    for name, dense in plain.named_modules():
        if type(dense) in graph.LAYERS:
            weight: Any = dense.weight
            outputs = weight.shape[0]
            inputs = weight.shape[1] * getattr(dense, "groups", 1)
            closed = name in layers and layers[name].gates == "output"
            reads = torch.ones(inputs, dtype=torch.bool)
            writes = torch.full((outputs,), not closed)
            sites[name] = graph.Site(name, dense, reads, writes)
    flows = graph.flows(trace, sites, views)

    work = {
        name: layers[name].weight.numel() * math.prod(graph.shape_of(node) or (0,)) // outputs
        for node, name in trace.calls.items()
        if name in layers and (outputs := len(sites[name].writes))
    }
    readers: dict[str, list[tuple[str, Tensor, bool]]] = {}
    lost: set[str] = set(flows.pinned)
    for name, reading in flows.reading.items():
        if reading is None:
            continue
        makers = reading.makers
        usable = name in layers and _usable(layers[name]) and trace.counts[name] == 1
        if len(makers) != 1 or not usable:
            lost.update(makers)
            continue
        readers.setdefault(makers[0], []).append((name, reading.labels, reading.zeros))
    links: list[Link] = []
    linked: set[str] = set()
    for maker, found in readers.items():
        whole = maker in layers and _usable(layers[maker]) and trace.counts[maker] == 1
        if maker in lost or not whole:
            continue
        ends: list[Reader] = []
        for name, labels, _ in found:
            same = torch.equal(labels, torch.arange(len(sites[maker].writes)))
            ends.append(Reader(layers[name], None if same else labels))
            linked.add(name)
        macs = work[maker] + sum(work[name] for name, *_ in found)
        links.append(Link(layers[maker], ends, all(zeros for *_, zeros in found), macs))
    for name, layer in layers.items():
        once = trace.counts.get(name) == 1
        if name not in linked and _usable(layer) and layer.gates == "input" and once:
            links.append(Link(None, [Reader(layer, None)], work=work[name]))
    return links


def _outputs(model: nn.Module, args: tuple[Any, ...], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [tensor.detach().clone() for tensor in tensors_of(model(*copy.deepcopy(args)))]


def _error(model: nn.Module, args: tuple[Any, ...], links: list[Link]) -> float:
    """The largest relative difference between masked and skipped forwards of the example."""
    twin, own = copy.deepcopy((model, links))
    twin.eval()
    worst = 0.0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for layer in gated_layers(twin).values():
            layer.training = True
        for draw in range(DRAWS):
            for layer in gated_layers(twin).values():
                layer.log_alpha.normal_(0.0, 2.0)
            twin.__dict__.pop(SKIPPING, None)
            expected = _outputs(twin, args, draw)
            twin.__dict__[SKIPPING] = Skipping(own, True)
            worst = max(worst, relative_error(_outputs(twin, args, draw), expected))
    return worst


def attach_skipping(model: nn.Module, args: tuple[Any, ...], skip: str | bool) -> None:
    """Makes the model's draw say which closed units each step leaves out.

    Tried out on the example, masked against skipped. Where that fails, "auto" skips nothing.

    Raises:
        ValueError: `skip` is True, and the model cannot skip.
    """
    model.__dict__.pop(SKIPPING, None)
    if skip is False or (skip == "auto" and any(p.is_cuda for p in model.parameters())):
        return  # on a GPU, the host would have to wait for the gates
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
            size = next((tensor.numel() for tensor in tensors_of(args)), 1)
            model.__dict__[SKIPPING] = Skipping(links, skip, max(size, 1))
            return
        failure = f"it differs by {error:.3g}" if links else "no units can be followed"
    if skip is True:
        _checks.refuse("skip", skip, f"'auto' or False for this model ({failure})")
