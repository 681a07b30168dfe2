"""Two processes: DDP and FSDP2 take the training of one, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from l0fast import DensityConstraint, gates, prune, sparsify_
from tests.helpers.processes import run_processes

STEPS = 200
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(2))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
    return sparsify_(model.append(nn.Linear(16, 3)), example_inputs=X)  # type: ignore[return-value]


def train(model: nn.Module, inner: nn.Module, rows: slice) -> tuple[DensityConstraint, Any]:
    """Each process has its rows of the batch; all draw the same gates."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    constraint = DensityConstraint(inner, 0.4, steps=STEPS).attach(optimizer)
    for step in range(STEPS):
        torch.manual_seed(step)
        F.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return constraint, optimizer


def process(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", world_size=2, rank=rank)
    mine = slice(16 * rank, 16 * rank + 16)
    kept: dict[str, Any] = {}

    model = made()
    constraint, _ = train(DistributedDataParallel(model), model, mine)
    kept["ddp"] = {**model.state_dict(), "multiplier": constraint.multiplier}

    model = made()
    gates_of = set(gates(model).parameters())
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, ignored_params=gates_of)
    constraint, _ = train(model, model, mine)
    state = model.state_dict()
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    small: Any = prune(model, X)
    kept["fsdp"] = {**full, "multiplier": constraint.multiplier}
    with torch.no_grad():
        kept["pruned"] = small.report.density, small.eval()(X)

    mesh = init_device_mesh("cpu", (2,))
    sharded = made()
    constraint = DensityConstraint(sharded, 0.4, steps=STEPS)
    for layer in (sharded[0], sharded):
        fully_shard(layer)
    split = made()
    other = DensityConstraint(split, 0.4, steps=STEPS)
    parallelize_module(split, mesh, {"0": ColwiseParallel()})
    for key, one, term in (("sharded", sharded, constraint), ("split", split, other)):
        try:
            term.attach(torch.optim.AdamW(one.parameters()))
        except ValueError as error:
            kept[key] = str(error)
    torch.save(kept, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_training_of_one(tmp_path: Path) -> None:
    run_processes(process, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model = made()
    constraint, _ = train(model, model, slice(None))
    expected = {**model.state_dict(), "multiplier": constraint.multiplier}
    for way in ("ddp", "fsdp"):
        for name, value in expected.items():
            assert torch.equal(first[way][name], second[way][name]), (way, name)
            torch.testing.assert_close(
                first[way][name], value, rtol=1e-3, atol=1e-4, msg=f"{way} {name}"
            )
    density, y = first["pruned"]
    small: Any = prune(model, X)
    assert density == small.report.density <= 0.4
    torch.testing.assert_close(y, small.eval()(X), rtol=1e-3, atol=1e-3)
    assert "attach: got 'sharded gates: 0" in first["sharded"]
    assert "ignored_params=set(l0fast.gates(model).parameters())" in first["sharded"]
    assert "tensor parallelism of gated layers: 0" in first["split"]
