"""`python -m bench.finetune`: a pretrained convolutional net, fine-tuned to a share of its MACs.

As a user would: train dense, put gates on without changing what is computed, train on under a
constraint, prune, and go on training the smaller model with the optimizer's state carried over.
What comes out is printed, and written to `finetune.json` in `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0fast
from bench import ROOT, report
from l0fast.data.formats import Split
from l0fast.data.sets import Data, load

BATCH = 128
LR = 1e-3
GATE_LR = 0.1
"""For gates that all start open, in so short a training, the most of the default's range."""
SETTLED = 0.1
"""The share of the constrained training whose gates are decided."""


def net(channels: int, width: int, classes: int) -> nn.Sequential:
    """Four convolutions with batch norm, two of them with stride 2, and a Linear on 2x2 pixels."""
    layers: list[nn.Module] = []
    for outputs, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2)):
        convolution = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)
    )


@dataclass(frozen=True)
class Epochs:
    """How long each part takes."""

    dense: int = 2
    constrained: int = 6
    pruned: int = 1


@dataclass
class Outcome:
    """What came out; errors are of the test set, in percent."""

    target: float
    dense_error: float = math.nan
    change_by_gates: float = math.nan
    """The largest difference of an output that putting on the gates made."""
    gated_error: float = math.nan
    expected_macs: float = math.nan
    """Expected share of the MACs at the end of the constrained training."""
    pruned_error: float = math.nan
    pruned_macs: float = math.nan
    """Share of the dense model's MACs that the pruned model has, <= target."""
    pruned_params: float = math.nan
    forced: int = 0
    """Gates that the target closed at pruning."""
    architecture: str = ""
    max_error: float = math.nan
    """Largest relative difference between the gated and the pruned model, of `prune`'s proof."""
    final_error: float = math.nan
    """After training on, with the moments of Adam carried over."""
    seconds: float = 0.0


def _steps(data: Split) -> int:
    """Of an epoch."""
    return math.ceil(len(data.targets) / BATCH)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    epochs: int,
    constraint: l0fast.DensityConstraint | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Trains; the weights' learning rate falls to 0 along a cosine, the gates' stays."""
    steps = epochs * _steps(data)
    settle_at = steps - math.ceil(SETTLED * steps)
    falls = [lambda step: (1 + math.cos(math.pi * step / steps)) / 2, lambda _: 1.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falls[: len(optimizer.param_groups)])
    model.train()
    step = 0
    for epoch in range(epochs):
        for batch in torch.randperm(len(data.targets)).split(BATCH):
            if constraint is not None and step == settle_at:
                constraint.settle(optimizer)
            step += 1
            loss = F.cross_entropy(model(data.inputs[batch]), data.targets[batch])
            if constraint is not None:
                loss = loss + constraint()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if constraint is not None:
                constraint.step()
        if constraint is not None:
            share = float(constraint.densities().detach())
            say(f"  epoch {epoch + 1}: {share:.1%} of the MACs expected")
    model.eval()


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(1000)])


def _error(model: nn.Module, data: Split) -> float:
    wrong = _logits(model, data.inputs).argmax(1) != data.targets
    return 100.0 * float(wrong.double().mean())


def finetune(
    data: Data,
    target: float,
    width: int = 16,
    epochs: Epochs | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Outcome, nn.Module]:
    """The whole way, from random weights to a smaller model that has been trained on.

    Args:
        data: to train and test on.
        target: the share of the dense model's MACs that the pruned one may have.
        width: channels of the first layers.
        epochs: of each part.
        say: takes a line of progress.
    """
    begin = time.perf_counter()
    epochs = epochs or Epochs()
    outcome = Outcome(target)
    example = data.train.inputs[:2]
    assert data.num_classes is not None
    model = net(example.shape[1], width, data.num_classes)
    _train(model, torch.optim.Adam(model.parameters(), LR), data.train, epochs.dense)
    outcome.dense_error = _error(model, data.test)
    say(f"dense: {outcome.dense_error:.2f} % error")

    before = _logits(model, data.test.inputs)
    l0fast.sparsify_(model, example_inputs=example, density_init=1.0)
    outcome.change_by_gates = float((_logits(model, data.test.inputs) - before).abs().max())
    say(f"with gates, all open: outputs changed by {outcome.change_by_gates:g}")
    steps = epochs.constrained * _steps(data.train)
    constraint = l0fast.DensityConstraint(
        model, target, measure="macs", example_inputs=example, steps=steps
    )
    optimizer = torch.optim.Adam(l0fast.param_groups(model, LR, GATE_LR))
    _train(model, optimizer, data.train, epochs.constrained, constraint, say)
    outcome.gated_error = _error(model, data.test)
    outcome.expected_macs = float(constraint.densities().detach())

    small: Any = l0fast.prune(model, example)
    after, dense = small.report.macs
    outcome.pruned_macs = after / dense
    outcome.pruned_params = small.report.params[0] / small.report.params[1]
    outcome.forced, outcome.architecture = small.report.forced, small.report.architecture
    outcome.max_error = small.report.max_error
    outcome.pruned_error = _error(small, data.test)
    say(
        f"pruned: {outcome.pruned_error:.2f} % error with {outcome.pruned_macs:.2%} of the MACs, "
        f"{outcome.architecture} channels"
    )

    carried = l0fast.prune_optimizer(optimizer, model, small)
    for group in carried.param_groups:
        group["lr"] = group["initial_lr"] = LR
    _train(small, carried, data.train, epochs.pruned)
    outcome.final_error = _error(small, data.test)
    outcome.seconds = time.perf_counter() - begin
    say(f"trained on: {outcome.final_error:.2f} % error")
    return outcome, small


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    parser.add_argument("--dataset", default="mnist", help="digits or mnist (the default)")
    parser.add_argument("--data-root", help="torchvision's folder; L0FAST_DATA_ROOT by default")
    parser.add_argument("--target", type=float, default=0.1, help="share of the MACs")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "finetune")
    for name, number in asdict(Epochs()).items():
        parser.add_argument(f"--{name}-epochs", type=int, default=number)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    words = ["python", "-m", "bench.finetune", "--dataset", arguments.dataset]
    words += ["--data-root", "DIR"] if arguments.dataset != "digits" else []
    for name in ("target", "width", "seed", *(f"{name}_epochs" for name in asdict(Epochs()))):
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    about = report.facts(shlex.join(words), arguments.threads, tested=False)
    data = load(arguments.dataset, arguments.data_root)
    lengths = (arguments.dense_epochs, arguments.constrained_epochs, arguments.pruned_epochs)
    outcome, small = finetune(data, arguments.target, arguments.width, Epochs(*lengths))
    arguments.out.mkdir(parents=True, exist_ok=True)
    l0fast.save_pruned(small, arguments.out / "small.safetensors")
    text = json.dumps({"about": about, **asdict(outcome)}, indent=1)
    (arguments.out / "finetune.json").write_text(text + "\n", encoding="utf-8")
    print(f"finetune.json and small.safetensors in {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
