"""Two processes: what training loops do beside forward, backward and step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from l0fast import DensityConstraint, DualAscent, gates, prune, sparsify_
from tests.helpers.processes import run_processes

STEPS = 40
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(2))
CLIP = 0.05


def made(skip: bool = False) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
    return sparsify_(model.append(nn.Linear(16, 3)), example_inputs=X, skip=skip)


def sharded(model: Any, **options: Any) -> Any:
    kept = set(gates(model).parameters())
    for layer in (model[0], model[2], model):
        fully_shard(layer, ignored_params=kept, **options)
    return model


class Run:
    """A model in training, on its rows of the batch."""

    def __init__(self, model: Any, rows: slice, own: Any = None, measure: str = "gates") -> None:
        self.model, self.own, self.rows = model, own or model, rows
        dual = DualAscent(5.0, restarts=False)
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        self.constraint = DensityConstraint(
            self.own, 0.4, measure=measure, example_inputs=X, steps=STEPS, dual=dual
        )
        self.constraint.attach(self.optimizer)

    def train(
        self, first: int, last: int, parts: int = 1, clip: bool = False, seed: int = 0
    ) -> Any:
        for step in range(first, last):
            rows = range(32)[self.rows]
            for part in range(parts):
                torch.manual_seed(1000 * seed + step)
                mine = list(rows[part::parts])
                if isinstance(self.model, DistributedDataParallel):
                    self.model.require_backward_grad_sync = part == parts - 1  # as no_sync does
                elif hasattr(self.model, "set_requires_gradient_sync"):
                    self.model.set_requires_gradient_sync(part == parts - 1)
                (F.cross_entropy(self.model(X[mine]).float(), Y[mine]) / parts).backward()
            if clip:
                clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Tensor]:
        found = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            for name, value in self.own.state_dict().items()
        }
        return {**found, "multiplier": self.constraint.multiplier.clone()}


def trainings(mine: slice, rank: int) -> dict[str, Any]:
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    ddp, skipped = made(), made(skip=True)
    wrapped = DistributedDataParallel(ddp)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "ddp, accumulated": Run(wrapped, mine, ddp).train(0, STEPS, parts=2).state(),
        "ddp, skipped": Run(DistributedDataParallel(skipped), mine, skipped)
        .train(0, STEPS)
        .state(),
        "fsdp, accumulated": Run(sharded(made()), mine).train(0, STEPS, parts=2).state(),
        "fsdp, skipped": Run(sharded(made(skip=True)), mine).train(0, STEPS).state(),
        "fsdp, clipped": Run(sharded(made()), mine).train(0, STEPS, clip=True).state(),
        "hsdp": Run(sharded(made(), mesh=hybrid), mine, measure="params").train(0, STEPS).state(),
        "own noise": Run(sharded(made()), mine).train(0, STEPS, seed=1 + rank).state(),
        "bf16": Run(sharded(made(), mp_policy=half), mine).train(0, STEPS).state(),
    }


def fresh(way: str, mine: slice) -> Run:
    model = made()
    if way == "ddp":
        return Run(DistributedDataParallel(model), mine, model)
    return Run(sharded(model), mine)


def resumed(way: str, mine: slice, stop: int, out: str) -> bool:
    """Whether a training that stops, and goes on from a checkpoint, ends bit-equal."""
    run = fresh(way, mine).train(0, stop)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    path = f"{out}/{way}-{stop}"
    dcp.save({**parts, "constraint": run.constraint.attachment}, checkpoint_id=path)  # pyright: ignore[reportPrivateImportUsage]
    expected = run.train(stop, STEPS).state()
    again = fresh(way, mine)
    parts = dict(
        zip(("model", "optimizer"), get_state_dict(again.model, again.optimizer), strict=True)
    )
    assert again.constraint.attachment is not None
    assert again.constraint.attachment.taken == 0  # asking for a state is no step of the training
    dcp.load({**parts, "constraint": again.constraint.attachment}, checkpoint_id=path)  # pyright: ignore[reportPrivateImportUsage]
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
    )
    assert again.constraint.attachment.taken == stop
    got = again.train(stop, STEPS).state()
    return all(torch.equal(got[name], value) for name, value in expected.items())


def pruned_and_trained_on(mine: slice) -> dict[str, Any]:
    run = Run(sharded(made()), mine).train(0, STEPS - 2)
    small: Any = prune(run.model, X)
    full = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
    whole = made()
    whole.load_state_dict(copy.deepcopy(full))
    kinds = {type(run.model).__name__, type(run.model[0]).__name__, type(small).__name__}
    with torch.no_grad():
        run.model.eval()
        same = float((small.eval()(X) - run.model(X)).abs().max())
        run.model.train()
    from_full: Any = prune(whole, X, target=run.constraint)
    run.train(STEPS - 2, STEPS)
    return {
        "kinds": kinds,
        "error": same,
        "densities": [one.report.density for one in (small, from_full)],
        "state": run.state(),
    }


def explicit() -> str:
    constraint = DensityConstraint(sharded(made()), 0.4, steps=STEPS)
    try:
        constraint()
    except RuntimeError as error:
        return str(error)
    return ""


def process(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="attach: 40 steps are few")
    warnings.filterwarnings("error", message="attach: the optimizer's state")
    dist.init_process_group("gloo", f"file://{out}/store", world_size=2, rank=rank)
    mine = slice(rank, None, 2)
    kept = {
        "trainings": trainings(mine, rank),
        "resumed": {
            (way, stop): resumed(way, mine, stop, out)
            for way in ("ddp", "fsdp")
            for stop in (4, 20, 38)
        },
        "pruned": pruned_and_trained_on(mine),
        "explicit": explicit(),
    }
    torch.save(kept, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process."""
    out = str(tmp_path_factory.mktemp("processes"))
    run_processes(process, out)
    return [torch.load(f"{out}/{rank}.pt", weights_only=False) for rank in range(2)]


TRAININGS: dict[str, dict[str, Any] | None] = {
    "ddp, accumulated": {"parts": 2},
    "ddp, skipped": {},
    "fsdp, accumulated": {"parts": 2},
    "fsdp, skipped": {},
    "fsdp, clipped": {"clip": True},
    "hsdp": {"measure": "params"},
    "own noise": None,
    "bf16": None,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:attach. 40 steps are few", "ignore:settle")
@pytest.mark.parametrize("name", TRAININGS)
def test_it_is_the_training_of_one_process(name: str, results: list[dict[str, Any]]) -> None:
    first, second = (result["trainings"][name] for result in results)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    options = TRAININGS[name]
    if options is None:
        return
    measure = options.get("measure", "gates")
    steps = {key: value for key, value in options.items() if key != "measure"}
    expected = Run(made(), slice(None), measure=measure).train(0, STEPS, **steps).state()
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_distributed_checkpoint_goes_on_bit_equal(
    way: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        found = {stop: same for (kind, stop), same in result["resumed"].items() if kind == way}
        assert found == {4: True, 20: True, 38: True}


@pytest.mark.slow
def test_prune_leaves_the_sharded_model_as_it_was(results: list[dict[str, Any]]) -> None:
    one, other = (result["pruned"] for result in results)
    assert one["kinds"] == {"FSDPSequential", "FSDPL0Linear", "Sequential"}
    assert one["error"] < 1e-5
    assert set(one["densities"]) == set(other["densities"]) == {one["densities"][0]}
    assert one["densities"][0] <= 0.4
    for key, value in one["state"].items():
        assert torch.equal(value, other["state"][key]), key


@pytest.mark.slow
def test_a_term_in_the_loss_is_refused_where_gates_are_not_averaged(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        expected = "sharded by FSDP2, so its term cannot be in the loss. Call attach(optimizer)"
        assert expected in result["explicit"]


def test_flat_parameters_are_refused() -> None:
    model = made()
    model[2].weight._fsdp_flattened = True  # as FullyShardedDataParallel does, which needs a GPU
    with pytest.raises(ValueError, match=r"got 'a model in FullyShardedDataParallel'; expected"):
        DensityConstraint(model, 0.4)
