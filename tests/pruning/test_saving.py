"""Pruned models on disk: back bit for bit, or one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import _digest, load_pruned, prune, save_pruned, sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.pruning.saving import KEY
from tests import ROOT
from tests.helpers.thinned import thinned_product

IMAGE, ROW, TOKENS = torch.randn(2, 1, 28, 28), torch.randn(4, 6), torch.arange(10).view(2, 5)


class Normed(nn.Module):
    """Buffers of several dtypes, one of them not saved, and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.fc.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


CASES: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "lenet": (plain.small_lenet, "auto", IMAGE),
    "gather and scatter": (lambda: plain.HardCoded(6, 10, 30), "auto", IMAGE),
    "called twice": (plain.CalledTwice, "output", ROW),
    "tied": (plain.Tied, "output", TOKENS),
    "tied inputs": (plain.Tied, "input", TOKENS),
    "weight": (plain.small_lenet, "weight", IMAGE),
    "buffers": (Normed, "auto", IMAGE),
    "one layer": (lambda: nn.Sequential(nn.Linear(6, 5)), "input", ROW),
}


def pruned(build: Callable[[], nn.Module], gates: str, x: Tensor, dtype: Any = None) -> Any:
    model: Any = sparsify_(build(), gates=gates)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_(-1.0, 2.0)
            layer.log_alpha.view(-1)[:2] = torch.tensor([5.0, -5.0])
        for name, buffer in model.named_buffers():
            if not name.endswith(".index"):  # of a model that was pruned before
                buffer.copy_(torch.rand(buffer.shape) * 9)
    model.to(dtype or torch.float32)
    return prune(model.eval(), x.to(dtype) if dtype and x.is_floating_point() else x)


@pytest.mark.parametrize(("case", "dtype"), thinned_product(2, CASES, [None, torch.bfloat16]))
def test_back_bit_for_bit(case: str, dtype: Any, tmp_path: Path) -> None:
    build, gates, x = CASES[case]
    small = pruned(build, gates, x, dtype)
    path = tmp_path / "small.safetensors"
    save_pruned(small, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.safetensors"]
    noise = torch.get_rng_state()
    again: Any = load_pruned(build, path)
    torch.set_rng_state(noise)
    assert again.report == small.report
    assert str(again) == str(small)
    state = again.state_dict()
    assert list(state) == list(small.state_dict())
    for name, tensor in small.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    frozen = {name: p.requires_grad for name, p in small.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == frozen
    again.eval()
    if dtype is None:
        with torch.no_grad():
            assert torch.equal(again(x), small(x))
    if "tied" in case:
        tied = [id(p) for _, p in again.named_parameters(remove_duplicate=False)]
        assert len(set(tied)) == len(tied) - 1


def test_one_file_holds_tensors_and_the_recipe(tmp_path: Path) -> None:
    small = pruned(plain.small_lenet, "auto", IMAGE)
    path = tmp_path / "small.safetensors"
    save_pruned(small, str(path))
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()[KEY])
        names = set(file.keys())
    assert recipe["format"] == 2
    assert recipe["layers"] == small.report.layers
    assert recipe["report"]["architecture"] == small.report.architecture
    assert names == set(small.state_dict())
    conv2 = next(entry for entry in recipe["layers"] if entry["name"] == "conv2")
    assert conv2["out"] == [small.conv2.out_channels, 10]
    assert len(conv2["outputs"]) == conv2["out"][0]


def test_trained_further_and_pruned_again(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small = pruned(plain.small_lenet, "auto", IMAGE)
    with torch.no_grad():
        small.fc2.weight.add_(1.0)
    save_pruned(small, path)
    assert torch.equal(
        load_pruned(plain.small_lenet, path).get_parameter("fc2.weight"), small.fc2.weight
    )

    def build() -> nn.Module:
        return small

    smaller = pruned(build, "auto", IMAGE)
    assert sum(p.numel() for p in smaller.parameters()) < small.report.params[0]
    save_pruned(smaller, path)
    again: Any = load_pruned(plain.small_lenet, path).eval()  # from the dense model, through both
    assert torch.equal(again(IMAGE), smaller(IMAGE))


def test_an_older_file_survives_a_failure(tmp_path: Path, monkeypatch: Any) -> None:
    small = pruned(*CASES["one layer"])
    path = tmp_path / "small.safetensors"
    save_pruned(small, path)
    before = path.read_bytes()

    def broken(tensors: Any, name: Any, metadata: Any) -> None:
        Path(name).write_bytes(before[:40])
        raise OSError("no space left on device")

    monkeypatch.setattr("l0fast.pruning.saving.save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        save_pruned(small, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_leaves_the_older_file(tmp_path: Path) -> None:
    small = pruned(*CASES["one layer"])
    path = tmp_path / "small.safetensors"
    save_pruned(small, path)
    before = path.read_bytes()
    torch.save(small, tmp_path / "small.pt")
    code = """
import os, sys, torch
import l0fast, l0fast._files
os.replace = lambda *names: os._exit(9)
l0fast.save_pruned(torch.load(sys.argv[1], weights_only=False), sys.argv[2])
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    arguments = [sys.executable, "-c", code, str(tmp_path / "small.pt"), str(path)]
    assert subprocess.run(arguments, env=env, check=False).returncode == 9
    assert path.read_bytes() == before


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small: got 'LeNet'; expected a model that prune return"):
        save_pruned(plain.LeNet(), tmp_path / "a.safetensors")
    small = pruned(*CASES["one layer"])
    with pytest.raises(ValueError, match=r"path: got '.*b.safetensors'; expected a file in a fold"):
        save_pruned(small, tmp_path / "none" / "b.safetensors")
    with pytest.raises(ValueError, match=r"path: got '.*'; expected a file, not a folder"):
        save_pruned(small, tmp_path)

    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"no": "tensor"}

        def set_extra_state(self, state: Any) -> None:
            pass

    small.add_module("odd", Odd(1, 1))
    with pytest.raises(ValueError, match=r"small: got 'odd._extra_state'; expected only"):
        save_pruned(small, tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, change: Callable[[Any], Any]) -> Path:
    """The file with its recipe changed, and a digest that fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = json.loads(metadata[KEY])
    changed = change(recipe)
    recipe = recipe if changed is None else changed
    if isinstance(recipe, dict) and _digest.KEY in recipe:
        recipe[_digest.KEY] = _digest.of_json(recipe, tensors)
    other = path.with_name("other.safetensors")
    save_file(tensors, other, metadata | {KEY: json.dumps(recipe)})
    return other


def test_files_that_are_not_ours_or_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_pruned(pruned(plain.small_lenet, "auto", IMAGE), path)
    whole = path.read_bytes()

    def refused(file: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_pruned(plain.small_lenet, file)
        message = str(caught.value)
        assert message.startswith(f"path: got {str(file)!r}; expected a file that save_pruned wrot")
        assert "\n" not in message

    refused(tmp_path / "none.safetensors", "there is no such file")
    refused(tmp_path, "there is no such file")
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "it cannot be read")
    path.write_bytes(b"PK\x03\x04" + b"not a safetensors file" * 9)
    refused(path, "it cannot be read")
    save_file({"fc1.weight": torch.zeros(1)}, path)
    refused(path, "no recipe in its metadata")
    save_file({"fc1.weight": torch.zeros(1)}, path, {KEY: "{"})
    refused(path, "its recipe is damaged")
    path.write_bytes(whole)
    refused(rewritten(path, lambda recipe: recipe | {"format": 3}), "it has format 3, this version")
    refused(rewritten(path, lambda recipe: []), "its recipe is damaged")
    refused(rewritten(path, lambda recipe: recipe.pop("aliases") and None), "its recipe is damaged")
    changes: list[tuple[str, Any]] = [
        ("in", [1, 6]),
        ("outputs", [0, 0]),
        ("outputs", [-1, 2]),
        ("outputs", [999]),
        ("outputs", "abc"),
        ("gather", [[0, 1], 6]),
        ("scale", "both"),
        ("name", None),
    ]
    for key, value in changes:
        other = rewritten(path, lambda r, k=key, v=value: r["layers"][1].update({k: v}))
        refused(other, "its recipe is damaged")
    refused(rewritten(path, lambda r: r["aliases"].update(a="b")), "its recipe is damaged")
    refused(rewritten(path, lambda r: r["attributes"].append({})), "its recipe is damaged")


def test_a_recipe_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_pruned(pruned(plain.small_lenet, "auto", IMAGE), path)

    def refused(build: Callable[[], Any], match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_pruned(build, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(plain.CalledTwice, r"build_fn: got 'CalledTwice'; expected the model of .* 'conv1'")
    refused(lambda: plain.LeNet(7), r"its 'conv1' has \(1, 6\) inputs and outputs, not \(1, 7\)")

    def deeper() -> nn.Module:
        model = plain.small_lenet()
        model.add_module("extra", nn.Linear(1, 1))
        return model

    refused(deeper, "it has no 'extra.bias'")

    def poorer() -> nn.Module:
        model = plain.small_lenet()
        model.fc2 = nn.Linear(30, 10, bias=False)
        return model

    refused(poorer, "it has 'fc2.bias'")

    def wider() -> nn.Module:
        model = plain.small_lenet()
        model.conv1 = nn.Conv2d(1, 6, 3)
        return model

    refused(wider, r"its 'conv1.weight' has shape \(\d+, 1, 5, 5\), not \(\d+, 1, 3, 3\)")

    def other_kind() -> nn.Module:
        model: Any = plain.small_lenet()
        model.conv1 = nn.Conv1d(1, 6, 5)
        return model

    refused(other_kind, "its 'conv1' is a Conv2d, not a Conv1d")

    hard = tmp_path / "hard.safetensors"
    save_pruned(pruned(lambda: plain.HardCoded(6, 10, 30), "auto", IMAGE), hard)
    with pytest.raises(ValueError, match="its 'root' is a HardCoded with second=10"):
        load_pruned(plain.small_lenet, hard)  # the same layers, but another forward
    entry = {"name": "no.such", "kind": "LeNet", "attribute": "second", "value": [3, 10]}
    path = rewritten(path, lambda r: r["attributes"].append(entry))
    refused(plain.small_lenet, "it has a module 'no.such'")
    with pytest.raises(TypeError, match=r"build_fn: got 'int'; expected a torch.nn.Module"):
        load_pruned(lambda: 3, path)  # type: ignore[arg-type, return-value]


def damaged(path: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    """The file with one tensor changed, and a digest that fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name])
    recipe = json.loads(metadata[KEY])
    recipe[_digest.KEY] = _digest.of_json(recipe, tensors)
    other = path.with_name("other.safetensors")
    save_file(tensors, other, {KEY: json.dumps(recipe)})
    return other


def test_what_would_build_another_model_is_refused(tmp_path: Path) -> None:
    """Indices, sizes and shapes that a recipe or a tensor could smuggle in."""
    build, gates, x = CASES["gather and scatter"]
    path = tmp_path / "small.safetensors"
    small = pruned(build, gates, x)
    save_pruned(small, path)
    index = next(name for name in small.state_dict() if name.endswith("gather.index"))
    for change in (lambda t: t + 10**9, lambda t: t.flip(0)):
        with pytest.raises(ValueError, match=f"its '{index}' moves other units"):
            load_pruned(build, damaged(path, index, change))
    with pytest.raises(ValueError, match=r"its 'fc2.bias' is torch.int64, not torch.float32"):
        load_pruned(build, damaged(path, "fc2.bias", lambda t: t.long()))

    calls: list[int] = []

    def never() -> nn.Module:
        calls.append(1)
        return build()

    def huge(recipe: Any) -> None:
        entry = next(entry for entry in recipe["layers"] if entry["scatter"] or entry["gather"])
        key = "scatter" if entry["scatter"] else "gather"
        entry[key][1] = 10**9

    with pytest.raises(ValueError, match=r"recipe is damaged: ValueError: 1000000000 units of a l"):
        load_pruned(never, rewritten(path, huge))
    with pytest.raises(ValueError, match=r"recipe is damaged: TypeError: params is a str"):
        load_pruned(never, rewritten(path, lambda r: r["report"].update(params="many")))
    deep = "[" * 100_000 + "]" * 100_000
    save_file({"a": torch.zeros(1)}, path, {KEY: deep})
    with pytest.raises(ValueError, match=r"its recipe is damaged: RecursionError|cannot be read"):
        load_pruned(never, path)
    assert not calls  # refused before anything is built


def test_an_alias_of_another_shape_is_refused(tmp_path: Path) -> None:
    build, gates, x = CASES["tied"]
    path = tmp_path / "small.safetensors"
    small = pruned(build, gates, x)
    save_pruned(small, path)
    vector = next(name for name, value in small.state_dict().items() if value.dim() == 1)

    def elsewhere(recipe: Any) -> None:
        (alias,) = recipe["aliases"]
        recipe["aliases"][alias] = vector

    with pytest.raises(ValueError, match=r"its '[\w.]+' has shape \(\d+,\), not \(11, \d+\)"):
        load_pruned(build, rewritten(path, elsewhere))


def test_a_file_of_the_version_before_is_read_without_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small = pruned(plain.small_lenet, "auto", IMAGE)
    save_pruned(small, path)
    sealed = rewritten(path, lambda recipe: recipe | {"format": 1})
    with pytest.raises(ValueError, match="format 1 and its digest do not go together"):
        load_pruned(plain.small_lenet, sealed)
    old = rewritten(
        path, lambda r: {k: v for k, v in r.items() if k != _digest.KEY} | {"format": 1}
    )
    again: Any = load_pruned(plain.small_lenet, old)
    assert torch.equal(again.fc2.weight, small.fc2.weight)


@pytest.mark.skipif(os.name == "nt", reason="no umask here")
def test_the_file_has_the_mode_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        save_pruned(pruned(*CASES["one layer"]), tmp_path / "small.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "small.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_disk_that_fails_is_an_oserror(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise SafetensorError("I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("l0fast.pruning.saving.save_file", broken)
    with pytest.raises(OSError, match=r"small.safetensors: cannot be written .*os error 5"):
        save_pruned(pruned(*CASES["one layer"]), tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []
