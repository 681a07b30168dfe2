"""What cannot be trained on several processes is refused in words, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from l0fast import DensityConstraint, gates, sparsify_

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def dense() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


def sharded(model: Any, **options: Any) -> Any:
    for layer in (model[0], model):
        fully_shard(layer, **options)
    return model


def split(model: Any, name: str = "weight", mesh: Any = None) -> Any:
    """Its second layer is placed by hand, in one dimension of the mesh."""
    mesh = init_device_mesh("cpu", (1,)) if mesh is None else mesh
    value = distribute_tensor(getattr(model[2], name).data, mesh, [Shard(0)])
    setattr(model[2], name, nn.Parameter(value))
    return model


def flat(model: Any) -> Any:
    model[0].weight._fsdp_flattened = True  # as FullyShardedDataParallel does, which needs a GPU
    return model


SHARED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "ddp": (DistributedDataParallel, r"got 'a model in Dis.*; expected the model itself"),
    "fsdp2": (
        sharded,
        r"got 'one that is sharded by.*\(sparsify_ first, then fully_shard\(module, ig",
    ),
    "split": (split, r"got 'a sharded parameter 2.weight'; expected whole parameters"),
    "fsdp1": (flat, r"got 'a sharded parameter 0.weight'; expected whole parameters"),
}


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("example", [None, X])
def test_gates_come_before_sharding(way: str, example: Any) -> None:
    share, words = SHARED[way]
    model = share(dense())
    kinds = [type(one) for one in model.modules()]
    with pytest.raises(ValueError, match=f"^model: {words}"):
        sparsify_(model, example_inputs=example)
    assert [type(one) for one in model.modules()] == kinds


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gated_layer_that_is_placed_by_hand_is_refused(name: str) -> None:
    model = sparsify_(dense(), example_inputs=X)
    constraint = DensityConstraint(model, 0.4, steps=200)
    split(model, name)
    with pytest.raises(ValueError, match=r"^attach: got 'tensor parallelism of gated layers: 2'"):
        constraint.attach(torch.optim.AdamW(model.parameters()))
    assert constraint.attachment is None


def test_so_is_one_that_fsdp2_shards_further() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model = sparsify_(dense(), example_inputs=X)
    constraint = DensityConstraint(model, 0.4, steps=200)
    split(model, "weight", mesh["tensor"])
    sharded(model, mesh=mesh["data"], ignored_params=set(gates(model).parameters()))
    with pytest.raises(ValueError, match=r"^attach: got 'tensor parallelism of gated layers: 2'"):
        constraint.attach(torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("names", [("shard",), ("replicate", "shard")])
def test_fsdp2_alone_is_taken(names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    model = sparsify_(dense(), example_inputs=X)
    sharded(model, mesh=mesh, ignored_params=set(gates(model).parameters()))
    constraint = DensityConstraint(model, 0.4, steps=200)
    constraint.attach(torch.optim.AdamW(model.parameters()))
    assert constraint.attachment is not None
