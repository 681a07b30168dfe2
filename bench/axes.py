"""`python -m bench.axes`: a small decoder brought to half of its parameters, along which axes.

A LLaMA of bytes is trained on the docstrings of SciPy and scikit-learn. From there each method has
as many steps to bring it to the target: the gates of all axes (depth, hidden width, heads, FFN),
those of heads and FFN, magnitude pruning of heads and FFN, and the gates of all but the hidden
width. What comes out is the loss on held-out files, and the latency, measured in turn.
`results.json` in `--out` has a row for each that is done; what is there is not done again.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib.util
import json
import math
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0fast
from bench import ROOT, report
from bench.timing import Effort, cpu_sample, interleaved, paired_ratios, quartiles
from l0fast._files import write_text
from l0fast.constraints.magnitude import MagnitudePruning

PACKAGES = ("scipy", "sklearn")
LEAST = 200
"""Characters of a docstring that is taken."""
HELD_OUT = 20
"""One file in so many is for the test."""
LENGTH, BATCH = 64, 16
LR, FINE = 2e-3, 1e-3
"""Learning rates of the dense training, and of what follows."""
DENSE, ALL, UNITS, MAGNITUDE = "dense", "all axes", "heads and FFN", "magnitude"
DEPTH = "depth, heads and FFN"
METHODS = (DENSE, ALL, UNITS, MAGNITUDE, DEPTH)
TITLE = {
    DENSE: "dense, before",
    ALL: "gates: depth, hidden, heads, FFN",
    UNITS: "gates: heads, FFN",
    MAGNITUDE: "magnitude: heads, FFN",
    DEPTH: "gates: depth, heads, FFN",
}
LARGE = (512, 6)
"""Width and layers of the decoder of 19 M parameters, of which a step is timed, too."""
EXAMPLE = {"input_ids": torch.arange(2 * 32).view(2, 32)}
LATENCY_LENGTH = 128
TEST_BATCHES = 60


def decoder(size: int, layers: int) -> nn.Module:
    """A LLaMA of 256 tokens, with four heads."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=size,
        intermediate_size=size * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def docstrings(packages: Sequence[str]) -> tuple[Tensor, Tensor]:
    """uint8: the docstrings of packages, one after another, to train on and to test on."""
    parts: tuple[list[str], list[str]] = [], []
    number = 0
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"axes: no package {package}; expected pip install l0fast[dev]")
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            found = [] if "tests" in path.parts else _of_file(path)
            number += bool(found)
            parts[number % HELD_OUT == 0 and bool(found)].extend(found)
    both = (bytearray("\n\n".join(some).encode()) for some in parts)
    train, test = (torch.frombuffer(one, dtype=torch.uint8) for one in both)
    return train, test


def _of_file(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= LEAST]


def _loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _batch(text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)].long()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: int, seed: int
) -> float:
    """Trains, with a rate that rises for a twentieth and falls along a cosine; returns the
    seconds of CPU."""
    warm, start = max(steps // 20, 1), time.process_time()
    generator = torch.Generator().manual_seed(seed)

    def rate(step: int) -> float:
        rest = max(step - warm, 0) / max(steps - warm, 1)
        return min((step + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * rest)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(steps):
        loss = _loss(model, _batch(text, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: {loss.item():.3f}", flush=True)
    model.eval()
    return time.process_time() - start


def seconds_of_a_step(size: int, layers: int, text: Tensor, steps: int = 5) -> float:
    """Median seconds of CPU that a dense training step takes."""
    model = decoder(size, layers)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return statistics.median(train(model, optimizer, text, 1, seed) for seed in range(steps))


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor) -> float:
    """The mean loss on the same pieces of the test text, in nats per byte."""
    generator = torch.Generator().manual_seed(0)
    batches = (_batch(text, generator) for _ in range(TEST_BATCHES))
    return sum(float(_loss(model, batch)) for batch in batches) / TEST_BATCHES


def fine_tuned(
    method: str, model: nn.Module, target: float, text: Tensor, steps: int, seed: int
) -> tuple[nn.Module, float]:
    """(pruned model, seconds of CPU) of a dense model after `steps` more steps by a method."""
    axes: Any = {"depth": method in (ALL, DEPTH), "hidden": method == ALL}
    l0fast.sparsify_(model, example_inputs=EXAMPLE, density_init=1.0, **axes)
    kind: Any = MagnitudePruning if method == MAGNITUDE else l0fast.DensityConstraint
    constraint = kind(model, target, measure="params", example_inputs=EXAMPLE, steps=steps)
    optimizer = torch.optim.AdamW(l0fast.param_groups(model, FINE, steps=steps))
    constraint.attach(optimizer)
    seconds = train(model, optimizer, text, steps, seed)
    return l0fast.prune(model, EXAMPLE), seconds


def latency(models: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward of one text, and the median ratio to the dense model's in
    the same round."""
    tokens = torch.arange(LATENCY_LENGTH)[None]

    def call(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens)

    calls = {name: functools.partial(call, model) for name, model in models.items()}
    samples, failures = interleaved(calls, cpu_sample, Effort(40, 3, 30.0))
    if failures:
        raise RuntimeError(str(failures))
    return {
        name: {"ms": quartiles(times).p50, "ratio": paired_ratios(times, samples[DENSE]).p50}
        for name, times in samples.items()
    }


def table(rows: Sequence[dict[str, Any]], about: report.Facts) -> str:
    """The results as a page of Markdown."""
    lines = [
        "| seed | method | parameters | loss | attentions | MLPs | heads | FFN | hidden | ms | "
        "of dense | s a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("attentions", "mlps", "heads", "ffn", "hidden")
    for row in rows:
        left = " | ".join(str(row[key]) for key in keys)
        lines.append(
            f"| {row['seed']} | {TITLE[row['method']]} | {row['params']:,} | {row['loss']:.4f} | "
            f"{left} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['seconds'] / row['steps']:.2f} |"
        )
    facts = ", ".join(f"{key}: {value}" for key, value in about.items())
    return "\n".join([*lines, "", facts, ""])


def left(model: Any) -> dict[str, int]:
    """What a decoder has along each axis; heads and FFN units of all layers together."""
    heads, units = (
        [one for name, one in model.named_modules() if name.endswith(kind)]
        for kind in ("o_proj", "down_proj")
    )
    return {
        "attentions": len(heads),
        "mlps": len(units),
        "heads": sum(one.in_features for one in heads) // model.config.head_dim,
        "ffn": sum(one.in_features for one in units),
        "hidden": model.model.embed_tokens.embedding_dim,
    }


def run(arguments: argparse.Namespace, about: report.Facts) -> list[dict[str, Any]]:
    """Trains what is not done yet; writes each row as soon as it is finished."""
    out, results = arguments.out, arguments.out / "results.json"
    out.mkdir(parents=True, exist_ok=True)
    text, test = docstrings(arguments.packages)
    before = json.loads(results.read_text()) if results.is_file() else {}
    rows = before.get("rows", [])
    about = before.get("about") or {
        **about,
        "bytes": len(text),
        "held-out bytes": len(test),
        "seconds of a step of 19 M": round(seconds_of_a_step(*LARGE, text), 2),
    }
    build = functools.partial(decoder, arguments.size, arguments.layers)

    def write() -> None:
        write_text(results, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")

    for seed in range(arguments.seeds):
        start = out / f"start-{seed}.pt"
        torch.manual_seed(seed)
        model = build()
        if not start.is_file():
            print(f"seed {seed}, dense, {arguments.dense_steps} steps", flush=True)
            optimizer = torch.optim.AdamW(model.parameters(), LR)
            seconds = train(model, optimizer, text, arguments.dense_steps, seed)
            torch.save({"model": model.state_dict(), "seconds": seconds}, start)
        saved, models = torch.load(start), dict[str, nn.Module]()
        model.load_state_dict(saved["model"])
        for method in METHODS:
            path = out / f"{method.replace(' ', '-')}-{seed}.safetensors"
            if not any((row["method"], row["seed"]) == (method, seed) for row in rows):
                print(f"seed {seed}, {method}, {arguments.steps} steps", flush=True)
                torch.manual_seed(seed)
                small, steps, seconds = model, arguments.dense_steps, saved["seconds"]
                if method != DENSE:
                    steps, twin = arguments.steps, copy.deepcopy(model)
                    given = method, twin, arguments.target, text, steps, seed + 1000
                    small, seconds = fine_tuned(*given)
                    l0fast.save_pruned(small, path)
                row = {"method": method, "seed": seed, "steps": steps, "seconds": seconds}
                params = sum(one.numel() for one in small.parameters())
                row |= {"params": params, "loss": held_out(small.eval(), test), **left(small)}
                rows.append(row)
                print(rows[-1], flush=True)
                write()
            models[method] = model if method == DENSE else l0fast.load_pruned(build, path)
        times = latency({name: one.eval() for name, one in models.items()})
        for row in (row for row in rows if row["seed"] == seed):
            row.update(times[row["method"]])
        write()
    write_text(out / "README.md", f"# Axes of a decoder\n\n{table(rows, about)}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.axes", description=__doc__)
    parser.add_argument("--size", type=int, default=192, help="the hidden width")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--target", type=float, default=0.5, help="share of the parameters")
    parser.add_argument("--dense-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=600, help="of each method")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "axes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    words = ["python", "-m", "bench.axes"]
    for name in ("size", "layers", "target", "dense_steps", "steps", "seeds"):
        if getattr(arguments, name) != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    about = report.facts(shlex.join(words), arguments.threads, tested=False)
    print(table(run(arguments, about), about))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
