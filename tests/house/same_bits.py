"""Short trainings that cover the method, and the checksums of what they end with.

A change that shall not change any training must leave these checksums as they are. They are
written by one explicit command, and by nothing else:

    python -m tests.house.same_bits --write

Only the public door of l0fast is used here, so that its inside can be rebuilt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0fast
from l0fast.data import sets
from l0fast.data.sets import Data, Split

PATH = Path(__file__).with_name("same_bits.json")
BATCH, STEPS = 32, 60
SETTLED_AT = 54
"""The gates are decided after this many of the steps: 90 %."""


# --- data ----------------------------------------------------------------------------------------


def digits() -> Data:
    """A few of the digits: to train on, none to select by, and to test on."""
    whole = sets.load("digits")
    train, test = whole.train, whole.test
    few = Split(train.inputs[:256], train.targets[:256])
    return Data(few, None, Split(test.inputs[:64], test.targets[:64]), whole.num_classes)


def tokens() -> Split:
    """Sequences of noise, each with the place of its largest mean as its class."""
    x = torch.randn(256, 5, 16, generator=torch.Generator().manual_seed(1))
    return Split(x, x.mean(-1).argmax(1))


# --- models --------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def lenet() -> nn.Module:
    """Convolutions without a norm: gates on their outputs."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Stream(nn.Module):
    """A residual stream of convolutions with batch norms, whose readers share their gates."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.first = nn.ModuleList(nn.Conv2d(width, inner, 3, padding=1) for _ in range(2))
        self.first_norm = nn.ModuleList(nn.BatchNorm2d(inner) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(inner, width, 3, padding=1) for _ in range(2))
        self.second_norm = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        blocks = zip(self.first, self.first_norm, self.second, self.second_norm, strict=True)
        for first, first_norm, second, second_norm in blocks:
            y = torch.relu(first_norm(first(x)))
            x = torch.relu(x + second_norm(second(y)))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """PyTorch's own encoder layer and a head that reads the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def by_hand() -> nn.Module:
    """Gated layers without `sparsify_`: each draws its own gates."""
    return nn.Sequential(
        l0fast.L0Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        l0fast.L0Linear(128, 32), nn.ReLU(), l0fast.L0Linear(32, 10, gates="weight"),
    )  # fmt: skip


# --- what a training ends with -------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What is left of a training."""

    model: nn.Module
    terms: list[Any]
    """Of its loss."""
    pruned: nn.Module
    losses: list[float]
    multipliers: list[float]
    """Their means over the training: when the gates settle, they are set to 0."""


def checksum(named: Iterable[tuple[str, Any]]) -> str:
    """Of the bits of named tensors, in the order of their names; of nothing else."""
    found = hashlib.sha256()
    for name, value in sorted(named, key=lambda item: item[0]):
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _bits_of_training(outcome: Outcome) -> str:
    named = list(outcome.model.state_dict().items())
    for place, term in enumerate(outcome.terms):
        if isinstance(term, l0fast.DensityConstraint):
            for name in ("multiplier", "target", "violation", "restarts", "dual_lr"):
                named.append((f"term {place} {name}", getattr(term, name)))
    return checksum(named)


def described(outcome: Outcome) -> dict[str, Any]:
    """An outcome in checksums and in plain numbers."""
    state = outcome.model.state_dict()
    gates = torch.cat([v.flatten() for name, v in state.items() if name.endswith("log_alpha")])
    pruned = outcome.pruned.state_dict()
    parameters = [p.detach().double() for p in outcome.pruned.parameters()]
    return {
        "bits": {"training": _bits_of_training(outcome), "pruned": checksum(pruned.items())},
        "architecture": " ".join(
            "x".join(map(str, value.shape)) for value in pruned.values() if value.dim() > 1
        ),
        "numbers": {
            "mean_loss": sum(outcome.losses) / len(outcome.losses),
            "last_loss": outcome.losses[-1],
            "mean_log_alpha": float(gates.double().mean()),
            "expected_density": l0fast.density(outcome.model).total.expected,
            "multipliers": outcome.multipliers,
            "pruned_parameters": sum(p.numel() for p in parameters),
            "pruned_norm": sum(float(p.square().sum()) for p in parameters) ** 0.5,
        },
    }


# --- trainings -----------------------------------------------------------------------------------


def _trained(
    build: Callable[[], nn.Module],
    term_of: Callable[[nn.Module, Tensor], Any],
    *,
    settles: bool = True,
    split: Split | None = None,
    by_sparsify: bool = True,
    lr: float = 1e-2,
    **options: Any,
) -> Outcome:
    """The loop of the README: sparsify, constrain, train, settle, prune."""
    torch.manual_seed(0)
    if split is None:
        split = cast("Split", digits().train)
    example = split.inputs[:4]
    model = build()
    if by_sparsify:
        model = l0fast.sparsify_(model, example_inputs=example, **options)
    term = term_of(model, example)
    groups = l0fast.param_groups(model, lr=lr, steps=STEPS, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    losses: list[float] = []
    pressure: list[list[float]] = []
    terms = list(term.constraints) if isinstance(term, l0fast.Constraints) else [term]
    for step in range(STEPS):
        if settles and step == SETTLED_AT:
            term.settle(optimizer)
        start = step * BATCH % len(split.targets)
        x, y = split.inputs[start : start + BATCH], split.targets[start : start + BATCH]
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        (loss + term()).backward()
        optimizer.step()
        optimizer.zero_grad()
        term.step()
        constraints = [one for one in terms if isinstance(one, l0fast.DensityConstraint)]
        pressure.append([value for one in constraints for value in one.multiplier.tolist()])
    multipliers = [sum(values) / STEPS for values in zip(*pressure, strict=True)]
    return Outcome(model, terms, l0fast.prune(model, example), losses, multipliers)


def _fitted(build: Callable[[], nn.Module], **settings: Any) -> Outcome:
    """A run of the trainer."""
    torch.manual_seed(0)
    quick: dict[str, Any] = {"epochs": 6, "batch_size": BATCH, "lr": 1e-2, "settle": 0.2} | settings
    trainer = l0fast.Trainer(build(), digits(), l0fast.TrainerSettings(**quick), device="cpu")
    trainer.fit()
    assert trainer.pruned is not None
    losses = [row["loss"] for row in trainer.history]
    pressure = [list(row.get("lambda", {}).values()) for row in trainer.history]
    multipliers = [sum(values) / len(pressure) for values in zip(*pressure, strict=True)]
    return Outcome(trainer.model, [trainer.term], trainer.pruned, losses, multipliers)


def _at_most(target: Any, **options: Any) -> Callable[[nn.Module, Tensor], Any]:
    """A constraint with the defaults of `steps=`."""
    return lambda model, example: l0fast.DensityConstraint(
        model, target, steps=STEPS, example_inputs=example, **options
    )


def _of_both(model: nn.Module, example: Tensor) -> l0fast.Constraints:
    """A target of gates for two layers, and one of parameters for the whole model."""
    by_layer = l0fast.DensityConstraint(model, {"1": 0.6, "3": 0.5}, steps=STEPS)
    params = _at_most(0.6, measure="params")(model, example)
    return l0fast.Constraints([by_layer, params])


def _penalty(model: nn.Module, example: Tensor) -> l0fast.L0Penalty:
    return l0fast.L0Penalty(model, 1.0)


TRAININGS: dict[str, Callable[[], Outcome]] = {
    "mlp, defaults": lambda: _trained(mlp, _at_most(0.5)),
    "mlp, skipped": lambda: _trained(mlp, _at_most(0.5), skip=True),
    "mlp, masked": lambda: _trained(mlp, _at_most(0.5), skip=False),
    "mlp, several constraints": lambda: _trained(mlp, _of_both),
    "mlp, penalty": lambda: _trained(mlp, _penalty, settles=False),
    "mlp, gates on weights": lambda: _trained(mlp, _at_most(0.2), gates="weight"),
    "mlp, noise of each example": lambda: _trained(mlp, _at_most(0.5), noise="example"),
    "lenet, params": lambda: _trained(lenet, _at_most(0.6, measure="params")),
    "lenet, MACs": lambda: _trained(lenet, _at_most("20k MACs", measure="macs"), skip=True),
    "stream, skipped": lambda: _trained(Stream, _at_most(0.5), skip=True),
    "stream, masked": lambda: _trained(Stream, _at_most(0.5, measure="params"), skip=False),
    "encoder": lambda: _trained(Encoder, _at_most(0.5, measure="params"), split=tokens()),
    "by hand": lambda: _trained(by_hand, _at_most(0.3), by_sparsify=False),
    "trainer, shrunk": lambda: _fitted(lenet, density=0.5, shrink=1, skip=True),
    "trainer, PI": lambda: _fitted(mlp, density=0.5, dual="pi"),
    "trainer, augmented": lambda: _fitted(mlp, density=0.5, dual="augmented", dual_first=True),
    "trainer, equality": lambda: _fitted(mlp, layer_density={"1": 0.5, "3": 0.6}, dual="equality"),
    "trainer, magnitude": lambda: _fitted(mlp, density=0.5, method="magnitude"),
}


def canary() -> str:
    """The checksum of the same models, trained without l0fast, and of the ops that gates use.

    Where it differs from the one that was written, this machine rounds otherwise.
    """
    torch.manual_seed(0)
    found: list[tuple[str, Tensor]] = []
    images = digits().train
    kinds: list[tuple[Callable[[], nn.Module], Split]] = [
        (mlp, images),
        (lenet, images),
        (Stream, images),
        (Encoder, tokens()),
    ]
    for build, split in kinds:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(5):
            F.cross_entropy(model(split.inputs[:BATCH]), split.targets[:BATCH]).backward()
            optimizer.step()
            optimizer.zero_grad()
        found += [(f"{build.__name__} {name}", v) for name, v in model.state_dict().items()]
    u = torch.rand(1000)
    found += [("log", u.log()), ("sigmoid", u.logit().sigmoid()), ("sum", u.sum())]
    return checksum([*found, ("dot", torch.dot(u, u)), ("matrix", u[:, None] @ u[None])])


def measured(names: Iterable[str] = TRAININGS) -> dict[str, Any]:
    """What this machine finds of some trainings, as same_bits.json holds it of all."""
    torch.set_num_threads(1)
    trainings = {name: described(TRAININGS[name]()) for name in names}
    return {"canary": canary(), "torch": torch.__version__, "trainings": trainings}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.house.same_bits", description=__doc__)
    parser.add_argument("names", nargs="*", help="of the trainings to print; all by default")
    parser.add_argument("--write", action="store_true", help=f"all into {PATH.name}; else print")
    arguments = parser.parse_args()
    if arguments.write and arguments.names:
        parser.error("--write takes no names")
    text = json.dumps(measured(arguments.names or TRAININGS), indent=1) + "\n"
    if arguments.write:
        PATH.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
