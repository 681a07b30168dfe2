"""The command: `l0fast train`, `l0fast prune`, `l0fast report`, `l0fast compare`."""

from __future__ import annotations

import argparse

from l0fast.commands import compare, pruning, training
from l0fast.commands.options import add_training
from l0fast.commands.shell import Parser, answer, print_all_letters
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import PRUNED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="l0fast", description="Constrained L0 sparsity for PyTorch.")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = subcommands.add_parser(
        "train",
        help="train a model to a density and prune it",
        description="Trains a model to the density asked for, prunes it, and writes into --out: "
        "summary.json, metrics.jsonl, dynamics.png, checkpoint.pt, pruned.safetensors.",
    )
    train.set_defaults(run=training.train)
    add_training(train)
    prune = subcommands.add_parser(
        "prune",
        help="write the smaller model of a checkpoint",
        description="Prunes the model of a checkpoint that `l0fast train` wrote, and writes it "
        "beside the checkpoint.",
    )
    prune.set_defaults(run=pruning.prune)
    prune.add_argument("--out", metavar="FILE", help=f"default: {PRUNED} beside CHECKPOINT")
    prune.add_argument("--force", action="store_true", help="replace the file if it is there")
    report = subcommands.add_parser(
        "report",
        help="show what is gated in a checkpoint, and what pruning would remove",
        description="Shows what is gated in the model of a checkpoint that `l0fast train` wrote, "
        "how dense each layer is, what pruning would remove, and why not more. Writes nothing.",
    )
    report.set_defaults(run=pruning.report)
    for command in (prune, report):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help=f"a run's {CHECKPOINT}")
        command.add_argument(
            "--model",
            metavar="M",
            help="the model that the checkpoint names; needed where that is "
            "package.module:callable, for its code will run",
        )
        command.add_argument(
            "--target",
            metavar="D",
            help="the most that may stay: a density, or NAME=D,...; default: what the run asked",
        )
    comparison = subcommands.add_parser(
        "compare",
        help="train by several methods, and show one table",
        description="Trains by each of --methods on the same data, epochs and seeds; each run has "
        "a folder of its own in --out, done ones are skipped and interrupted ones go on. Writes "
        "compare.md and compare.json.",
    )
    comparison.set_defaults(run=compare.compare)
    compare.add_options(comparison)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0 on success, 2 with one line on stderr for bad input."""
    print_all_letters()
    args = _parser().parse_args(argv)
    goes_on = {
        "train": "--resume goes on from the last epoch",
        "compare": "the same command goes on from the last epoch",
    }
    return answer(lambda: args.run(args), f"l0fast {args.command}", goes_on.get(args.command))
