"""`python -m bench.poster`: reproduces the table and the figure of the 2021 paper.

Trains the MLP and LeNet of the 2021 paper, penalised and constrained, with the published settings
and this project's; on shifted images too; and again with targets of parameters and MACs. Each run
has a folder of its own in --out. Finished runs are skipped and interrupted runs go on. Writes
poster.md, poster.json and poster.png. Several processes may share --out, each with its own --only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.poster import earlier, tables
from bench.poster.plan import plan
from l0fast import _checks
from l0fast._files import locked
from l0fast.commands import runs, values
from l0fast.commands.shell import Parser, answer, print_all_letters

NAME = "python -m bench.poster"
EPOCHS = 200


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=NAME, description=__doc__)
    add = parser.add_argument
    add("--data-root", metavar="DIR", help="torchvision data; default: as in `l0fast train`")
    add("--dataset", default="mnist", help="mnist (the default), or another for a rehearsal")
    add("--out", default="runs/poster", metavar="DIR", help="a folder for each run goes into it")
    add("--seeds", default="0-4", metavar="A-B", help="default: 0-4")
    add("--epochs", default=EPOCHS, metavar="N", help=f"default: {EPOCHS}; fewer for a rehearsal")
    add("--only", metavar="A,B", help="patterns of runs to train, such as 'lenet5-*-seed-0'")
    add(
        "--have",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with summaries of finished runs, which are not trained again (may be given "
        "several times)",
    )
    add("--list", action="store_true", help="train nothing: list what is done, write the tables")
    add("--skip", default="auto", help="as in `l0fast train`")
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def reproduce(args: argparse.Namespace) -> int:
    """Trains the runs that are not done yet; writes tables and figure of all finished runs."""
    shared = {
        name: getattr(args, name) for name in ("data_root", "dataset", "skip", "threads", "device")
    }
    epochs = _checks.whole("epochs", values.number("epochs", args.epochs, int))
    every = plan(runs.seeds(args.seeds), shared | {"epochs": epochs})
    values.check(every[0].args)
    chosen = runs.select(every, args.only)
    out = Path(args.out)
    elsewhere = earlier.summaries_in(args.have)
    done = earlier.finished(every, out, elsewhere)

    def write() -> None:
        with locked(out):  # other processes may train and write other runs of these tables
            done.update(earlier.finished(every, out, elsewhere))
            tables.write(every, done, out, epochs)

    out.mkdir(parents=True, exist_ok=True)
    if args.list:
        for run in chosen:
            print(f"{'done' if run.name in done else 'to do':<6} {run.name}")
    else:
        runs.train_all(chosen, out, done, args.quiet, write)
    write()
    print(tables.as_text(every, done))
    names = (tables.TABLE, tables.NUMBERS, tables.FIGURE)
    written = ", ".join(str(out / name) for name in names if (out / name).exists())
    print(f"\n{len(done)} of {len(every)} runs are done; {written}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 on success, 2 for bad input and 130 for Ctrl-C, with one line on stderr."""
    print_all_letters()
    args = _parser().parse_args(argv)
    return answer(
        lambda: reproduce(args),
        name=NAME,
        goes_on="the same command goes on from the last epoch",
    )


if __name__ == "__main__":
    sys.exit(main())
