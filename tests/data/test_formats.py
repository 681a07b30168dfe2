"""torchvision's files: tiny ones in each format are read as they are, damaged ones are named."""

from __future__ import annotations

import gzip
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l0fast.data import formats, imagefolder, sets
from tests.helpers.images import idx, tiny_imagefolder

CIFAR = {
    "cifar10": (
        "cifar-10-batches-py",
        "labels",
        [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
    ),
    "cifar100": ("cifar-100-python", "fine_labels", ["train", "test"]),
}


def tiny_cifar(root: Path, dataset: str, count: int = 3) -> dict[str, Any]:
    """A data root in CIFAR's layout; file -> its batch."""
    folder, key, names = CIFAR[dataset]
    (root / folder).mkdir(parents=True)
    batches: dict[str, Any] = {}
    generator = np.random.default_rng(0)
    for name in names:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        batches[name] = {"data": pixels, key: generator.integers(0, 10, count).tolist()}
        (root / folder / name).write_bytes(pickle.dumps(batches[name], protocol=2))
    return batches


def normalised(pixels: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    scale = [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std)]
    return (pixels.double() / 255 - scale[0]) / scale[1]


def test_fashionmnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    targets = torch.tensor([1, 9, 0, 3, 3], dtype=torch.uint8)
    for part in ("train", "t10k"):
        for kind, values in zip(formats.MNIST_KINDS, (images, targets), strict=True):
            (raw / f"{part}-{kind}.gz").write_bytes(gzip.compress(idx(values)))
    loaded = sets.load("fashionmnist", str(tmp_path))
    assert (loaded.num_classes, tuple(loaded.train.inputs.shape)) == (10, (5, 1, 28, 28))
    wanted = normalised(images[:, None], (0.2860,), (0.3530,))
    torch.testing.assert_close(loaded.train.inputs.double(), wanted, rtol=1e-6, atol=1e-6)
    assert loaded.test.targets.tolist() == [1, 9, 0, 3, 3]


@pytest.mark.parametrize(
    ("dataset", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_cifar(tmp_path: Path, dataset: str, mean: Any, std: Any) -> None:
    batches = tiny_cifar(tmp_path, dataset)
    _, key, names = CIFAR[dataset]
    before = sorted(tmp_path.rglob("*"))
    loaded = sets.load(dataset, str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert loaded.num_classes == int(dataset.removeprefix("cifar"))
    for split, part in ((loaded.train, names[:-1]), (loaded.test, names[-1:])):
        assert split.targets.tolist() == [t for name in part for t in batches[name][key]]
        pixels = np.concatenate([batches[name]["data"] for name in part]).reshape(-1, 3, 32, 32)
        wanted = normalised(torch.from_numpy(pixels), mean, std)
        torch.testing.assert_close(split.inputs.double(), wanted, rtol=1e-6, atol=1e-6)
        assert split.inputs.dtype == torch.float32


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_batch_may_have_been_pickled_by_any_python(tmp_path: Path, protocol: int) -> None:
    batch: dict[str, Any] = {
        "data": np.arange(3072, dtype=np.int64).astype(np.uint8)[None],
        "labels": [7],
    }
    path = tmp_path / "batch"
    content = pickle.dumps(batch, protocol=protocol)
    path.write_bytes(content)
    images, targets = formats._cifar_batch(path)
    assert images.flatten().tolist() == batch["data"].flatten().tolist()
    assert targets.tolist() == [7]
    # The published files name NumPy's modules as they were called before NumPy 2.
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    if protocol == 2:
        assert torch.equal(formats._cifar_batch(path)[0], images)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("import sys; sys.l0fast_was_here = True",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Evil(), "labels": [1]}),
        b"",
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [1, 2]}),
    ],
    ids=["code", "empty", "html", "list", "no targets", "lengths", "pixels"],
)
def test_a_damaged_batch_is_named(tmp_path: Path, content: bytes) -> None:
    tiny_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data_root: .* a whole batch of CIFAR") as caught:
        sets.load("cifar10", str(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(sys, "l0fast_was_here")


@pytest.mark.parametrize("held", ["val", "test", "valid", "validation"])
def test_imagefolder(tmp_path: Path, held: str) -> None:
    tiny_imagefolder(tmp_path, held)
    loaded = sets.load("imagefolder", str(tmp_path))
    assert loaded.num_classes == 2
    assert loaded.validation is None
    for loader, first in ((loaded.train, 0), (loaded.test, 4)):
        (batch,) = loader
        inputs, targets = batch
        assert inputs.shape == (4, 3, 6, 8)
        order = targets * 2 + (inputs[:, 2, 0, 0] > inputs[:, 2, 0, 0].mean())
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        pixels = torch.tensor([[30 * (first + int(i)), 255, int(i) % 2] for i in order])
        wanted = normalised(pixels[:, :, None, None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        torch.testing.assert_close(
            inputs.double(), wanted.expand(-1, -1, 6, 8), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", imagefolder.VALIDATIONS)
def test_a_folder_with_a_validation_of_its_own(tmp_path: Path, name: str) -> None:
    root = str(tmp_path)
    tiny_imagefolder(tmp_path, "test")
    before = imagefolder.digest(root)
    assert not imagefolder.has_validation(root)
    for number, kind in enumerate(("cat", "dog")):
        (tmp_path / name / kind).mkdir(parents=True)
        Image.new("RGB", (8, 6), (200, 10 * number, 0)).save(tmp_path / name / kind / "0.png")
    assert imagefolder.has_validation(root)
    loaded = sets.load("imagefolder", root)
    found = [sum(len(y) for _, y in part) for part in loaded[:3]]
    assert found == [4, 2, 4]
    ((inputs, targets),) = loaded.validation
    assert targets.tolist() == [0, 1]
    assert inputs[0, 1, 0, 0] < inputs[1, 1, 0, 0]
    with pytest.raises(ValueError, match=rf"^validation_fraction: got 0.25; expected 0: .*{name} "):
        sets.load("imagefolder", root, 0.25)
    with_it = imagefolder.digest(root)
    Image.new("RGB", (80, 60), (1, 2, 3)).save(tmp_path / name / "cat" / "0.png")
    changed = imagefolder.digest(root)
    (tmp_path / name / "cat" / "0.png").rename(tmp_path / name / "cat" / "1.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    renamed = imagefolder.digest(root)
    assert len({before, with_it, changed, renamed}) == 4
    tmp_path.rename(tmp_path.with_name("moved"))
    assert imagefolder.digest(str(tmp_path.with_name("moved"))) == renamed
    tmp_path.with_name("moved").rename(tmp_path)


def test_a_folder_of_classes_is_divided(tmp_path: Path) -> None:
    """A fifth is the test, the same for every seed; of the rest a share is held out."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(10):
            colour = (10 * number, 100 if name == "cat" else 0, 0)
            Image.new("RGB", (4, 4), colour).save(tmp_path / name / f"{number}.png")

    def images(loader: Any) -> set[tuple[float, ...]]:
        return {tuple(x[:, 0, 0].tolist()) for inputs, _ in loader for x in inputs}

    first, second = (
        sets.load("imagefolder", str(tmp_path), 0.25, seed, imagefolder.Loading(batch_size=3))
        for seed in (0, 1)
    )
    parts = [images(first[place]) for place in range(3)]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert len(set.union(*parts)) == 20
    assert images(second.test) == parts[2]
    assert images(second.validation) != parts[1]


def test_few_images_are_divided(tmp_path: Path) -> None:
    """A fifth of two would be none to test on."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    loaded = sets.load("imagefolder", str(tmp_path))
    assert (len(loaded.train.dataset), len(loaded.test.dataset)) == (1, 1)
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b").rmdir()
    with pytest.raises(ValueError, match=r"^data_root: got .*; expected two images or more, to tr"):
        sets.load("imagefolder", str(tmp_path))


def test_augmented_images_of_a_folder(tmp_path: Path) -> None:
    """Training images change from epoch to epoch, test images do not; a crop repeats the border."""
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None], (16, 16, 3))
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / part / "a" / "0.png")

    def rows(split: Any) -> set[tuple[int, ...]]:
        """The first rows of pixels seen in some epochs."""
        seen: set[tuple[int, ...]] = set()
        for _ in range(40):
            ((x, _),) = split
            pixels = (x[0, 0] * 0.229 + 0.485) * 255
            assert x.shape == (1, 3, 16, 16)
            seen.add(tuple(pixels[0].round().int().tolist()))
        return seen

    plain = tuple(range(16))
    shifts = {tuple(min(max(i + s, 0), 15) for i in range(16)) for s in (-2, -1, 0, 1, 2)}
    for augment in imagefolder.IMAGE_AUGMENTS:
        loading = imagefolder.Loading(image_size=16, augment=augment)
        loaded = sets.load("imagefolder", str(tmp_path), loading=loading)
        assert rows(loaded.test) == {plain}
        seen = rows(loaded.train)
        if augment == "none":
            assert seen == {plain}
        elif augment == "crop":
            assert seen == shifts
        elif augment == "crop-flip":
            assert seen == shifts | {row[::-1] for row in shifts}
        else:
            assert len(seen) > 20
    with pytest.raises(ValueError, match=r"^augment: got 'resized-crop-flip'; expected an image_s"):
        sets.load(
            "imagefolder", str(tmp_path), loading=imagefolder.Loading(augment="resized-crop-flip")
        )


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    tiny_imagefolder(tmp_path, sizes=((8, 6), (5, 9)))
    with pytest.raises(
        ValueError, match=r"^image_size: got None; expected a number, as the images have "
    ):
        list(sets.load("imagefolder", str(tmp_path)).train)
    loading = imagefolder.Loading(image_size=4)
    ((inputs, _),) = sets.load("imagefolder", str(tmp_path), loading=loading).train
    assert inputs.shape == (4, 3, 4, 4)


def add_a_class(root: Path) -> None:
    (root / "val" / "cow").mkdir()
    Image.new("RGB", (8, 6)).save(root / "val" / "cow" / "0.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "val").rename(r / "held"), "expected a folder with train/ and val/"),
        (lambda r: (r / "valid").mkdir(), "expected only one of val/ and valid/"),
        (lambda r: (r / "train").rename(r / "training"), "expected a folder with train/ and val/"),
        (lambda r: (r / "val" / "dog").rename(r / "dog"), "train ('dog' is in one only)"),
        (add_a_class, "('cow' is in one only)"),
        (lambda r: (r / "train" / "cat" / "1.png").write_bytes(b"\x89PNG"), "expected an image"),
        (lambda r: [p.unlink() for p in (r / "val" / "dog").iterdir()], "expected a folder with"),
    ],
    ids=["val", "valid", "train", "class", "surplus", "image", "empty"],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    tiny_imagefolder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"^data_root: got .*; expected") as caught:
        list(sets.load("imagefolder", str(tmp_path)).train)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dataset", ["fashionmnist", "cifar10", "cifar100"])
def test_an_empty_root_without_a_network(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(ValueError, match=r"^data_root: .*could not be downloaded: ") as caught:
        sets.load(dataset, str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", sets.DATASETS[1:])
def test_no_root(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(formats.DATA_ROOT_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"^data_root: got None; expected a .*--data-root or L0F"):
        sets.load(dataset)
    with pytest.raises(ValueError, match=r"^data_root: got 'no'; expected .*no such folder$"):
        sets.load(dataset, "no")


def test_only_an_imagefolder_has_an_image_size() -> None:
    with pytest.raises(ValueError, match=r"^image_size: got 16; expected none: the images of"):
        sets.load("digits", loading=imagefolder.Loading(image_size=16))
    with pytest.raises(ValueError, match=r"^image_size: got 0; expected a whole number >= 1"):
        sets.load("imagefolder", loading=imagefolder.Loading(image_size=0))


def test_in_colour() -> None:
    grey: Any = sets.load("digits", validation_fraction=0.1)
    colour: Any = sets.in_colour(grey)
    for one, three in zip(grey[:3], colour[:3], strict=True):
        assert three.inputs.shape == (len(one.inputs), 3, 8, 8)
        for channel in range(3):
            assert torch.equal(three.inputs[:, channel], one.inputs[:, 0])
        assert torch.equal(three.targets, one.targets)
    assert sets.in_colour(sets.load("digits")).validation is None
