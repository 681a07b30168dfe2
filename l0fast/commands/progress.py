"""Shows the progress of a training while it runs."""

from __future__ import annotations

import sys
from typing import Any

from l0fast._metrics import held_key, in_words
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.training.settings import TrainerSettings
from l0fast.training.trainer import Trainer


def _progress(settings: TrainerSettings, done: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=settings.epochs, initial=done, disable=quiet, unit="epoch", dynamic_ncols=True
    )


def collapse(layers: list[str], trainer: Trainer) -> str:
    """A message: nothing passes through these layers; and what may help."""
    remedy = "a smaller --penalty"
    if isinstance(trainer.term, MagnitudePruning):
        remedy = "a higher density"
    elif isinstance(trainer.term, DensityConstraint):
        rate = f"{float(trainer.term.dual_lr):.3g}"
        remedy = f"a higher density, a smaller --dual-lr (it is {rate}) or more --epochs"
    names = ", ".join(layers)
    return f"collapsed: all gates of {names} are closed, nothing passes through; try {remedy}"


def run(trainer: Trainer, quiet: bool) -> dict[str, Any]:
    """Trains an open trainer to its end, and returns its summary; shows a bar unless `quiet`."""
    told: set[str] = set()  # each message is shown once
    with _progress(trainer.settings, trainer.epoch, quiet) as bar:

        def tell(row: dict[str, Any], what: str, words: str) -> None:
            if what not in told:
                bar.write(f"epoch {row['epoch']}: {words}", file=sys.stderr)
                told.add(what)

        def on_epoch(row: dict[str, Any]) -> None:
            if row.get("collapsed"):
                tell(row, "a collapse", collapse(row["collapsed"], trainer))
            for name, words in row.get("stalls", {}).items():
                tell(row, f"a stall of {name}", words)
            metric = trainer.task.metric
            tested = in_words(metric, row[held_key(metric)]).replace(" %", "%")
            words = [f"loss {row['loss']:.4f}", f"test {tested}"]
            if "expected_density" in row:
                words.append(f"density {row['expected_density']:.4f}")
            if "lambda" in row:
                lambdas = " ".join(f"{value:.3g}" for value in row["lambda"].values())
                words.append(f"lambda {lambdas}")
            bar.set_postfix_str(", ".join(words), refresh=False)
            bar.update()

        return trainer.fit(on_epoch=on_epoch)
