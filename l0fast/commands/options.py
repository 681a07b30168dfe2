"""The options of a training, by theme. `values` reads what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from l0fast.data import sets
from l0fast.data.formats import DATA_ROOT_VARIABLE
from l0fast.training.settings import TrainerSettings

DEFAULTS = TrainerSettings()
Add = Callable[..., argparse.Action]
"""`add_argument` of a group of options."""


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training, in groups by theme."""
    _add_data(parser.add_argument_group("data").add_argument)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_sparsity(parser.add_argument_group("sparsity").add_argument)
    _add_constraint(parser.add_argument_group("how the target is met").add_argument)
    _add_optimisation(parser.add_argument_group("optimisation").add_argument)
    _add_running(parser.add_argument_group("running").add_argument)


def _add_data(add: Add) -> None:
    add(
        "--dataset",
        default="digits",
        help=f"{', '.join(sets.DATASETS)}; or the path of a folder of images, or of a .npz or .pt "
        "with arrays inputs and targets (or train_inputs, train_targets, test_inputs, "
        "test_targets); default: digits",
    )
    add(
        "--task",
        help="classification, regression or multilabel; default: by the kind of the targets (whole "
        "numbers, floating numbers, booleans)",
    )
    add(
        "--data-root",
        metavar="DIR",
        help="folder of torchvision's data sets, or an imagefolder: train/ and val/ (or test/, or "
        f"both), or a folder for each class; default: {DATA_ROOT_VARIABLE}",
    )
    add(
        "--image-size",
        metavar="N",
        help="resize and crop the images of an imagefolder to N x N; default: as they are",
    )
    add(
        "--workers",
        metavar="N",
        help="processes that load the images of an imagefolder; default: one for each CPU core; 0: "
        "the training process loads them",
    )
    add(
        "--augment",
        default=DEFAULTS.augment,
        help="random changes of training images: none (the default), crop (shifts by up to an "
        "eighth of a side), crop-flip (shifts and mirror images), or for an imagefolder "
        "resized-crop-flip (a random part of the image, at --image-size, and mirror images)",
    )
    add(
        "--validation-fraction",
        metavar="F",
        help="the share of the training examples that is held out; default: 1/12, or 0 with "
        "--recipe published and where an imagefolder has test/ and val/",
    )


def _add_model(add: Add) -> None:
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
        help="start from the state dict in a .safetensors file, or in a file of torch.save",
    )
    add(
        "--gates",
        default=DEFAULTS.gates,
        help="where gates sit: auto (the default), input, output, or weight for single weights",
    )


def _add_sparsity(add: Add) -> None:
    add(
        "--density",
        metavar="D",
        help="target of the whole model: a density in (0, 1], or an amount, such as '100k params'; "
        "D,D,... trains to several falling targets, one after the other",
    )
    add(
        "--layer-density",
        metavar="NAME=D,...",
        help="a target for each layer (or pattern), such as 'conv*=0.5,fc1=0.1'; "
        "a single number is the target of every layer",
    )
    add(
        "--measure",
        default=DEFAULTS.measure,
        help="what a target counts: gates (the default), or the params, macs, memory (of "
        "activations) or latency (on this device) of the pruned model",
    )
    add(
        "--latency-table",
        metavar="FILE",
        help="a table of latencies of this model, measured earlier, on this or another device; "
        "default: measure them now; a resumed run uses the table it began with",
    )
    add("--penalty", metavar="C", help="coefficient of the penalised method instead of a target")
    add(
        "--penalty-per-example",
        action="store_true",
        help="--penalty in the unit of Louizos et al.: C / examples x expected L0",
    )
    add("--dense", action="store_true", help="no gates: train the dense baseline")
    add("--compare-dense", action="store_true", help="also train the dense model, into OUT/dense")


def _add_constraint(add: Add) -> None:
    add(
        "--method",
        default=DEFAULTS.method,
        help="l0 (the default), or a baseline: magnitude, which prunes gradually, or "
        "magnitude-one-shot",
    )
    add(
        "--dual",
        default=DEFAULTS.dual,
        help="how the multipliers move: ascent (the default), pi, augmented or equality",
    )
    add("--dual-lr", metavar="LR", help="learning rate of the multipliers; default: by the steps")
    add(
        "--dual-first",
        action="store_true",
        help="move the multipliers before the loss, not after the step",
    )
    add("--no-restarts", action="store_true", help="no dual restarts")
    add(
        "--target-schedule",
        help="how the target falls to what you ask for: cubic (the default), linear, or constant "
        "(in force from the start, as in the published recipe)",
    )
    add(
        "--start",
        metavar="F",
        help="the first share of the training: all gates are open, and at its end they are set by "
        f"the magnitudes of their units; default: {DEFAULTS.start:g}; 0: no such share",
    )
    add(
        "--target-warmup",
        metavar="F",
        help="the share of the training after --start in which the target falls; default: "
        f"{DEFAULTS.target_warmup:g}",
    )
    add(
        "--settle",
        metavar="F",
        help="the last share of the epochs: the gates are decided, and the weights train without "
        f"noise; default: {DEFAULTS.settle:g}; 0: no such share",
    )
    add(
        "--shrink",
        metavar="N",
        help="during training, remove gates for good that have seldom been open for N epochs",
    )


def _add_optimisation(add: Add) -> None:
    add("--epochs", metavar="N", help="default: 100 for digits, else 30")
    add("--batch-size", metavar="N", help="default: 64 for digits, else 128")
    add("--lr", metavar="LR", help="learning rate of the weights")
    add("--gate-lr", metavar="LR", help="learning rate of the gates")
    add(
        "--warmup",
        metavar="E",
        help="number of epochs, such as 2 or 0.5, over which the weights' learning rate rises",
    )
    add("--precision", default=DEFAULTS.precision, help="fp32 (the default), bf16 or fp16")
    add(
        "--accumulate",
        metavar="N",
        help="compute the batch of a step in N parts, one after the other, to save memory",
    )
    add("--clip-grad-norm", metavar="G", help="limit the norm of the weights' gradient to G")
    add("--ema", metavar="D", help="prune a moving average of the weights, with this decay")
    add(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the forward of a step with torch.compile; default backend: inductor",
    )
    add("--weight-decay", metavar="W", help="weight decay of the weights, decoupled as in AdamW")
    add("--seed", default=DEFAULTS.seed, metavar="N")
    add(
        "--recipe",
        default="default",
        help="default, or published: the settings of the 2021 paper (constant learning rates, "
        "droprate initialisation, log_alpha within log(100), no validation split)",
    )
    add(
        "--select",
        default=DEFAULTS.select,
        help="the epoch whose model is pruned: last, or best (lowest validation error after the "
        "gates have settled; with --settle 0, among epochs whose evaluation gates meet the target)",
    )


def _add_running(add: Add) -> None:
    add("--out", metavar="DIR", help="folder of this run; default: runs/DATASET-MODEL-...-SEED")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add(
        "--skip",
        default="auto",
        help="leave closed units out of a training step: auto (where it saves time), on or off",
    )
    add(
        "--cuda-graph",
        default="auto",
        help="run a step as one CUDA graph: auto (where that is possible), on or off",
    )
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")
