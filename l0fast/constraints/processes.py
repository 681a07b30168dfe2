"""Training on several processes: what keeps the gates the same on all of them.

DistributedDataParallel averages the gradients of the gates as those of all parameters. FSDP2 would
shard the gates, which are few and read by every process as a whole: they are kept out of it, and
their gradients are averaged here. The multipliers and the projection are computed on each process
from the same gates, and need no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l0fast import _checks
from l0fast.graph.sharding import IGNORED, is_flat, is_sharded, is_split
from l0fast.layers.draw import several_processes
from l0fast.layers.part import PartGate
from l0fast.measures.latency import LatencyTable


def check_sharding(name: str, layers: Mapping[str, Any]) -> None:
    """Refuses the ways of sharding in which gates cannot be trained.

    Args:
        name: of what the user has called.
        layers: name -> gated layer.

    Raises:
        ValueError: gates are sharded, or weights by something other than FSDP2.
    """
    split = [key for key, one in layers.items() if is_split(one)]
    if split:
        words = f"tensor parallelism of gated layers: {', '.join(split)}"
        expected = "layers without gates there (sparsify_(model, exclude=...)), or FSDP2 or DDP"
        _checks.refuse(name, words, expected)
    sharded = [key for key, layer in layers.items() if is_sharded(layer.log_alpha)]
    if sharded:
        words = f"sharded gates: {', '.join(sharded)}"
        _checks.refuse(name, words, f"gates on every process: fully_shard(module, {IGNORED})")
    weighed = [one for one in layers.values() if not isinstance(one, PartGate)]
    if any("weight" not in one._parameters or is_flat(one.weight) for one in weighed):
        expected = f"torch.distributed.fsdp.fully_shard(module, {IGNORED})"
        _checks.refuse(name, "a model in FullyShardedDataParallel", expected)


def mesh_of(layers: Mapping[str, Any]) -> Any:
    """The mesh of the processes among which FSDP2 shards the weights of gated layers, or None."""
    if not several_processes():
        return None
    weights = (one.weight for one in layers.values() if not isinstance(one, PartGate))
    return next((weight.device_mesh for weight in weights if is_sharded(weight)), None)


def mark_partial(gates: Sequence[Tensor], layers: Mapping[str, Any]) -> list[Callable[[], None]]:
    """Makes the gradients of gates say that each process has its own, to be averaged; returns what
    undoes it. Without FSDP2 nothing is done.

    They are DTensors as those of the weights are: clipping and unscaling refuse a mixture.
    """
    mesh = mesh_of(layers)
    if mesh is None:
        return []
    from torch.distributed.tensor import DTensor, Partial

    placements = [Partial("avg")] * mesh.ndim

    def marked(grad: Tensor) -> Tensor:
        return DTensor.from_local(grad, mesh, placements, run_check=False)

    return [gate.register_hook(marked).remove for gate in gates if gate.requires_grad]


def own_part(grad: Tensor) -> Tensor:
    """What this process has of a gradient."""
    return grad.to_local() if is_sharded(grad) else grad  # type: ignore[attr-defined]


def averaged(
    grads: Sequence[Tensor | None], gates: Sequence[Tensor], layers: Mapping[str, Any]
) -> list[Tensor | None]:
    """The gradients of all gates, averaged over the processes among which FSDP2 shards the weights;
    as they are, where it shards none.

    Equals, for the gradients of the processes p of the mesh, by one all-reduce in each of its
    dimensions:
        mean_p(grads[p])
    A gate that has no gradient on this process counts with 0.

    Args:
        grads: of each gate.
        gates: as many.
        layers: name -> gated layer.
    """
    mesh = mesh_of(layers)
    if mesh is None:
        return list(grads)
    check_sharding("attach", layers)  # a forward before it had left a part of the weights whole
    places = [place for place, gate in enumerate(gates) if gate.requires_grad]
    parts = [_or_zeros(grads[place], gates[place]).flatten() for place in places]
    if not parts:
        return list(grads)
    flat = torch.cat(parts)
    for dimension in range(mesh.ndim):
        dist.all_reduce(flat, group=mesh.get_group(dimension))
    flat /= mesh.size()
    found: list[Tensor | None] = [None] * len(gates)
    for place, part in zip(places, flat.split([part.numel() for part in parts]), strict=True):
        gate = gates[place]
        found[place] = part.view(gate.shape).to(gate.dtype)
    return found


def _or_zeros(grad: Tensor | None, gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if grad is None else own_part(grad)


def same_table(measure: Any) -> Any:
    """A measure that is the same on all processes: a table of latencies is that of the first, as
    each would measure other times."""
    if not (several_processes() and isinstance(measure, LatencyTable)):
        return measure
    tables: list[Any] = [measure.as_json()]
    dist.broadcast_object_list(tables)
    return LatencyTable.from_json(tables[0])
