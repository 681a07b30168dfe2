"""`python -m bench.attach`: many optimizers and schedules, none of whose settings is the gates'.

Each trains the MLP 64-300-100-10 on digits, dense, and with a constraint attached that leaves a
quarter of the parameters. It writes attach.md: accuracies on 397 images that were not trained on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import l0fast
from bench import ROOT

Optimizer = torch.optim.Optimizer
TARGET, BATCH = 0.25, 64


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around SGD with momentum (Foret et al., 2021)."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr, momentum=0.9)
        self.param_groups = self.inner.param_groups
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
        before = [p.clone() for p in held]
        for p in held:
            p.addcdiv_(p.grad, norm, value=self.rho)
        evaluate()
        for p, old in zip(held, before, strict=True):
            p.copy_(old)
        self.inner.step()
        return loss


def proper(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The groups of `param_groups`, where there are gates."""
    if any("log_alpha" in name for name, _ in model.named_parameters()):
        return l0fast.param_groups(model, lr)
    return [{"params": list(model.parameters()), "lr": lr}]


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for matrices, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, 1e-2), torch.optim.AdamW(others, 1e-3)]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer | list[Optimizer]]] = {
    "AdamW, proper groups": lambda model: torch.optim.AdamW(proper(model, 1e-3)),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), 1e-2),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), 2e-2),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), 1e-3),
    "Muon + AdamW": muon,
    "SAM": lambda model: SAM(model.parameters(), 0.1),
    "LBFGS": lambda model: torch.optim.LBFGS(
        model.parameters(), 0.5, max_iter=4, line_search_fn="strong_wolfe"
    ),
}
CLOSURES = ("SAM", "LBFGS")


def constant(_optimizer: Optimizer, _steps: int) -> None:
    """No schedule."""


def cosine(optimizer: Optimizer, steps: int) -> Any:
    """A tenth of the steps to warm up, then a cosine to 0."""
    warm = max(steps // 10, 1)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warm)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [warm])


def one_cycle(optimizer: Optimizer, steps: int) -> Any:
    """One learning rate for all groups, whatever they had."""
    most = 1.5 * optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=most, total_steps=steps, cycle_momentum=False
    )


SCHEDULES = {"constant": constant, "warm-up, cosine": cosine, "one cycle": one_cycle}


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits: 1,400 images to train on, 397 to test."""
    digits: Any = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return (x[train], y[train]), (x[test], y[test])


def batches(x: Tensor, y: Tensor, steps: int, size: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Random batches, the same for each seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (size,), generator=generator)
        yield x[rows], y[rows]


def train(name: str, schedule: str, steps: int, seed: int, sparse: bool) -> float:
    """Accuracy on the test images: of the pruned model, or of a dense one."""
    (x, y), (test_x, test_y) = data()
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    if sparse:
        l0fast.sparsify_(model, example_inputs=x[:8])
    made = OPTIMIZERS[name](model)
    optimizers = made if isinstance(made, list) else [made]
    if sparse:
        constraint = l0fast.DensityConstraint(
            model, TARGET, measure="params", example_inputs=x[:8], steps=steps
        )
        constraint.attach(optimizers)
    schedules = [SCHEDULES[schedule](one, steps) for one in optimizers]
    size = 256 if name == "LBFGS" else BATCH
    for inputs, targets in batches(x, y, steps, size, seed):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        if name in CLOSURES:
            step: Any = optimizers[0].step
            step(closure)
        else:
            closure()
            for one in optimizers:
                one.step()
        for one in schedules:
            if one is not None:
                one.step()
    final = l0fast.prune(model, x[:8]) if sparse else model
    with torch.no_grad():
        return float((final.eval()(test_x).argmax(1) == test_y).double().mean())


def main() -> None:
    """Trains all, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.attach", description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/attach")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"Accuracy in % after {args.steps} steps, means of {args.seeds} seeds, dense / pruned to "
        f"{TARGET:.0%} of the parameters (torch {torch.__version__.split('+')[0]}, one thread; "
        f"`python -m bench.attach --steps {args.steps} --seeds {args.seeds}`).",
        "",
        "| optimizer | " + " | ".join(SCHEDULES) + " |",
        "| --- " * (1 + len(SCHEDULES)) + "|",
    ]
    for name in OPTIMIZERS:
        cells: list[str] = []
        for schedule in SCHEDULES:
            begun = time.perf_counter()
            dense, pruned = (
                100
                * statistics.mean(
                    train(name, schedule, args.steps, seed, sparse) for seed in range(args.seeds)
                )
                for sparse in (False, True)
            )
            cells.append(f"{dense:.1f} / {pruned:.1f}")
            print(name, schedule, cells[-1], f"{time.perf_counter() - begun:.0f} s", flush=True)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "attach.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
