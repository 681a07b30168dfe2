"""The data sets: what they hold, how they are split, and what is refused."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast.data import formats, sets
from tests.helpers.images import idx

NAMES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in formats.MNIST_KINDS]
COUNTS = {"train": 6, "t10k": 4}


def tiny_mnist(root: Path, packed: bool = True) -> dict[str, torch.Tensor]:
    """A data root in MNIST's layout, with 6 and 4 images."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name in NAMES:
        count = COUNTS[name.split("-")[0]]
        shape = (count, 28, 28) if "images" in name else (count,)
        tensors[name] = torch.randint(256 if "images" in name else 10, shape, dtype=torch.uint8)
        content = idx(tensors[name])
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    return tensors


def test_digits() -> None:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    loaded = sets.load("digits")
    assert loaded.validation is None
    assert loaded.num_classes == 10
    for split, place in ((loaded.train, slice(0, 1437)), (loaded.test, slice(1437, 1797))):
        inputs, targets = split
        assert inputs.shape == (place.stop - place.start, 1, 8, 8)
        assert inputs.dtype == torch.float32
        assert targets.tolist() == bunch.target[place].tolist()
        # Normalised by the training examples alone: affine in the pixels.
        pixels = torch.tensor(bunch.images, dtype=torch.float32)
        mean, std = pixels[:1437].mean(), pixels[:1437].std()
        torch.testing.assert_close(inputs[:, 0], (pixels[place] - mean) / std)


@pytest.mark.parametrize("fraction", [0.0, 1 / 12, 0.5])
def test_the_validation_split_is_disjoint_and_of_the_training_examples(fraction: float) -> None:
    whole = sets.load("digits")
    loaded = sets.load("digits", validation_fraction=fraction, seed=3)
    assert torch.equal(loaded.test.inputs, whole.test.inputs)
    held = round(fraction * 1437)
    assert len(loaded.train.targets) == len(loaded.train.inputs) == 1437 - held
    if not held:
        assert loaded.validation is None
        return
    assert loaded.validation is not None
    assert len(loaded.validation.targets) == held

    def key(split: sets.Split) -> list[tuple[float, ...]]:
        rows = zip(split.inputs.flatten(1).tolist(), split.targets.tolist(), strict=True)
        return [(*row, target) for row, target in rows]

    train, validation = key(loaded.train), key(loaded.validation)
    assert len(set(key(whole.train))) == 1437  # no two are equal, so that a key names an example
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(key(whole.train))
    again = sets.load("digits", validation_fraction=fraction, seed=3)
    other = sets.load("digits", validation_fraction=fraction, seed=4)
    assert again.validation is not None
    assert other.validation is not None
    assert torch.equal(again.validation.inputs, loaded.validation.inputs)
    assert not torch.equal(other.validation.inputs, loaded.validation.inputs)


def test_the_split_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    sets.load("digits", validation_fraction=0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("by_variable", [True, False])
def test_mnist_is_read_without_writing(
    tmp_path: Path, packed: bool, by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tiny_mnist(tmp_path, packed)
    before = sorted(tmp_path.rglob("*"))
    if by_variable:
        monkeypatch.setenv(formats.DATA_ROOT_VARIABLE, str(tmp_path))
    else:
        monkeypatch.setenv(formats.DATA_ROOT_VARIABLE, "/nowhere")
    loaded = sets.load("mnist", None if by_variable else str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    for split, part in ((loaded.train, "train"), (loaded.test, "t10k")):
        images = tensors[f"{part}-images-idx3-ubyte"]
        assert split.inputs.shape == (COUNTS[part], 1, 28, 28)
        wanted = (images.double() / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(split.inputs[:, 0].double(), wanted, rtol=1e-6, atol=1e-6)
        assert split.targets.tolist() == tensors[f"{part}-labels-idx1-ubyte"].tolist()
        assert split.targets.dtype == torch.int64


def test_real_mnist(mnist_root: Path) -> None:
    loaded = sets.load("mnist", str(mnist_root), validation_fraction=1 / 12)
    assert loaded.validation is not None
    sizes = [len(split.targets) for split in (loaded.train, loaded.validation, loaded.test)]
    assert sizes == [55_000, 5_000, 10_000]
    assert loaded.train.inputs.shape == (55_000, 1, 28, 28)
    # The published normalisation.
    assert float(loaded.train.inputs.mean()) == pytest.approx(0, abs=0.01)
    assert float(loaded.train.inputs.std()) == pytest.approx(1, abs=0.01)
    assert loaded.test.targets.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.write_bytes(b"\0\0\x08\x03\0\0"),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
    ],
    ids=["truncated", "empty", "html", "header", "longer"],
)
def test_a_damaged_file_is_named(tmp_path: Path, packed: bool, damage: Any) -> None:
    tiny_mnist(tmp_path, packed)
    path = tmp_path / "MNIST" / "raw" / (NAMES[2] + (".gz" if packed else ""))
    damage(path)
    with pytest.raises(ValueError, match=r"^data_root: got .*; expected a whole idx") as caught:
        sets.load("mnist", str(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_and_targets_must_fit(tmp_path: Path) -> None:
    tiny_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    shutil.copyfile(raw / f"{NAMES[3]}.gz", raw / f"{NAMES[1]}.gz")
    with pytest.raises(ValueError, match=r"not images \(6, 28, 28\) and targets \(4,\)$"):
        sets.load("mnist", str(tmp_path))


@pytest.mark.usefixtures("no_network")
def test_an_empty_root_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data_root: .*could not be downloaded: ") as caught:
        sets.load("mnist", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cifar",), ValueError, "dataset: got 'cifar'; expected one of 'digits', 'mnist'"),
        ((None,), ValueError, "dataset: got None; expected one of"),
        (("mnist", None), ValueError, "data_root: got None; expected a torchvision data folder"),
        (("mnist", "/nowhere"), ValueError, "data_root: got '/nowhere'; expected a torchvision"),
        (("digits", None, 1.0), ValueError, "validation_fraction: got 1.0; expected a number in"),
        (("digits", None, -0.1), ValueError, "validation_fraction: got -0.1; expected"),
        (("digits", None, math.nan), ValueError, "validation_fraction: got nan; expected"),
        (("digits", None, "abc"), TypeError, "validation_fraction: got 'abc'; expected"),
        (("digits", None, 0.9999), ValueError, "validation_fraction: got 0.9999; expected less"),
    ],
)
def test_bad_arguments(
    arguments: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(formats.DATA_ROOT_VARIABLE, raising=False)
    with pytest.raises(error) as caught:
        sets.load(*arguments)
    assert str(caught.value).startswith(message)
