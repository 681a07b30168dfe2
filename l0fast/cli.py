"""The command's words: `l0fast train`, `l0fast prune`, `l0fast report`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from l0fast import commands, data
from l0fast.checkpoint import CHECKPOINT
from l0fast.formats import DATA_ROOT_VARIABLE
from l0fast.settings import TrainerSettings
from l0fast.trainer import PRUNED

DEFAULTS = TrainerSettings()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="l0fast", description="Constrained L0 sparsity for PyTorch.")
    commands_ = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands_.add_parser(
        "train",
        help="train a model to a density and prune it",
        description="Trains a model to the density asked for, prunes it, and writes into --out: "
        "summary.json, metrics.jsonl, dynamics.png, checkpoint.pt, pruned.safetensors.",
    )
    train.set_defaults(run=commands.train)
    add = train.add_argument
    add("--dataset", default="digits", help=f"{', '.join(data.DATASETS)}; default: digits")
    add(
        "--model",
        default="mlp",
        help="mlp (the default), lenet5, a torchvision model such as resnet18, or "
        "package.module:callable, which builds one",
    )
    add("--widths", metavar="N-N-...", help="hidden sizes, such as 300-100 (mlp) or 20-50-500")
    add(
        "--pretrained",
        metavar="FILE",
        help="start from the state dict in a .safetensors file, or in one of torch.save's",
    )
    add("--density", metavar="D", help="target density of the whole model, in (0, 1]")
    add(
        "--layer-density",
        metavar="NAME=D,...",
        help="a target for each layer (or pattern), such as 'conv*=0.5,fc1=0.1'; "
        "a single number stands for each layer",
    )
    add(
        "--measure",
        default=DEFAULTS.measure,
        help="what densities are shares of: gates (the "
        "default), or params or macs of the pruned model",
    )
    add("--penalty", metavar="C", help="coefficient of the penalised method instead of a target")
    add(
        "--penalty-per-example",
        action="store_true",
        help="--penalty in the unit of Louizos et al.: C / examples x expected L0",
    )
    add("--dense", action="store_true", help="no gates: train the dense baseline")
    add("--epochs", metavar="N", help="default: 100 for digits, else 30")
    add("--seed", default=DEFAULTS.seed, metavar="N")
    add("--batch-size", metavar="N", help="default: 64 for digits, else 128")
    add("--lr", metavar="LR", help="learning rate of the weights")
    add("--gate-lr", metavar="LR", help="learning rate of the gates")
    add("--dual-lr", metavar="LR", help="learning rate of the multipliers; default: by the steps")
    add("--weight-decay", metavar="W", help="decoupled, of the weights")
    add("--no-restarts", action="store_true", help="no dual restarts")
    add(
        "--recipe",
        default="default",
        help="default, or published: the settings of the 2021 paper (constant learning rates, "
        "droprate initialisation, log_alpha within log(100), no validation split)",
    )
    add("--validation-fraction", metavar="F", help="held out from the training examples")
    add(
        "--data-root",
        metavar="DIR",
        help="torchvision data, or an imagefolder with train/ and val/ (or test/); default: "
        f"{DATA_ROOT_VARIABLE}",
    )
    add(
        "--image-size",
        metavar="N",
        help="resize and crop the images of an imagefolder to N x N; default: as they are",
    )
    add("--out", metavar="DIR", help="folder of this run; default: runs/DATASET-MODEL-...-SEED")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--compare-dense", action="store_true", help="also train the dense model, into OUT/dense")
    add(
        "--skip",
        default="auto",
        help="leave closed units out of a training step: auto (where it pays), on or off",
    )
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")
    prune = commands_.add_parser(
        "prune",
        help="write the smaller model of a checkpoint",
        description="Prunes the model of a checkpoint that `l0fast train` wrote, and writes it "
        "beside the checkpoint.",
    )
    prune.set_defaults(run=commands.prune)
    prune.add_argument("--out", metavar="FILE", help=f"default: {PRUNED} beside CHECKPOINT")
    prune.add_argument("--force", action="store_true", help="replace the file if it is there")
    report = commands_.add_parser(
        "report",
        help="show what is gated in a checkpoint, and what pruning would remove",
        description="Shows what is gated in the model of a checkpoint that `l0fast train` wrote, "
        "how dense each layer is, what pruning would remove, and why not more. Writes nothing.",
    )
    report.set_defaults(run=commands.report)
    for command in (prune, report):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help=f"a run's {CHECKPOINT}")
        command.add_argument(
            "--target",
            metavar="D",
            help="the most that may stay: a density, or NAME=D,...; default: what the run asked",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0 on success, 2 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"l0fast {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("l0fast: interrupted; --resume goes on from the last epoch", file=sys.stderr)
        return 130
