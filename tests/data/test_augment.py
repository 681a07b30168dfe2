"""Random crops and mirror images: what is drawn, and that a training goes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from l0fast import Trainer
from l0fast.data.augment import augmented, padding
from l0fast.data.sets import Data, Split
from tests.helpers.command import refused
from tests.helpers.runs import quick, small_mlp
from tests.helpers.same_run import Stop, assert_same_run

pytestmark = pytest.mark.usefixtures("a_folder_of_its_own", "one_thread")


HEIGHT, WIDTH = 24, 17
MOST = (3, 2)


def images(number: int = 5, channels: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(number, channels, HEIGHT, WIDTH)


def crops(image: torch.Tensor) -> list[torch.Tensor]:
    """Every crop there may be of an image [C, H, W], by torch's own padding."""
    down, right = MOST
    padded = F.pad(image[None], (right, right, down, down), mode="replicate")[0]
    return [
        padded[:, i : i + HEIGHT, j : j + WIDTH]
        for i in range(2 * down + 1)
        for j in range(2 * right + 1)
    ]


def drawn(augment: str, size: int = 2000) -> tuple[list[int], torch.Tensor]:
    """Which of all crops (and then of their mirror images) each drawn example is, [size]."""
    x = images()
    index = torch.randint(len(x), (size,))
    batch = augmented(x, index, augment)
    assert batch.shape == (size, 3, HEIGHT, WIDTH)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    known = [crops(image) for image in x]
    found: list[int] = []
    for example, i in zip(batch, index.tolist(), strict=True):
        choices = torch.stack([*known[i], *(crop.flip(2) for crop in known[i])])
        same = (choices == example).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(same) == 1, "no crop of its own image"
        found += same
    return found, index


def test_an_eighth_of_a_side() -> None:
    assert [padding(size) for size in (1, 8, 15, 16, 28, 32, 224)] == [1, 1, 1, 2, 3, 4, 28]
    assert (padding(HEIGHT), padding(WIDTH)) == MOST


def test_none_takes_the_examples_as_they_are() -> None:
    x = images().contiguous(memory_format=torch.channels_last)
    index = torch.tensor([3, 0, 3])
    before = torch.get_rng_state()
    assert torch.equal(augmented(x, index, "none"), x[index])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_crop_is_as_likely() -> None:
    found, _ = drawn("crop")
    counts = torch.bincount(torch.tensor(found), minlength=70)
    assert counts[35:].sum() == 0  # no mirror images
    # 2000 draws of 35: 57 each, with a standard deviation of 7.4.
    assert counts[:35].min() > 57 - 5 * 7.4
    assert counts[:35].max() < 57 + 5 * 7.4


def test_half_are_mirrored_whatever_their_crop() -> None:
    found, _ = drawn("crop-flip")
    counts = torch.bincount(torch.tensor(found), minlength=70)
    assert counts.min() > 28.6 - 5 * 5.3
    assert abs(counts[35:].sum().item() - 1000) < 5 * 22.4


def test_examples_are_drawn_apart_and_rows_apart_from_columns() -> None:
    found = torch.tensor(drawn("crop")[0])
    pairs = torch.bincount(found[:-1] * 35 + found[1:], minlength=35 * 35)
    assert (pairs > 0).sum() > 900  # of 1225, 2000 draws leave about 240 out


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_a_training_sees_crops(augment: str, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    model = small_mlp()
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module.training else None
    )
    Trainer(model, digits, quick(density=0.5, epochs=1, augment=augment), device="cpu").fit()
    plain = {tuple(image.flatten().tolist()) for image in digits.train.inputs}
    batches = torch.cat([batch for batch in seen if len(batch) > 1])
    unmoved = sum(tuple(image.flatten().tolist()) in plain for image in batches)
    # 1 of 9 crops is not shifted, and few digits are their own mirror images.
    share = unmoved / len(batches)
    assert 0.3 / 9 < share < 2 / 9
    assert (batches.amax((1, 2, 3)) > 0).all()


def test_an_interruption_changes_nothing(digits: Data, tmp_path: Path) -> None:
    def trainer(out: Path) -> Trainer:
        settings = quick(density=0.5, epochs=4, augment="crop-flip")
        return Trainer(small_mlp(), digits, settings, out=out, device="cpu")

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Stop("stopped")

    trainer(tmp_path / "whole").fit()
    with pytest.raises(Stop, match="stopped"):
        trainer(tmp_path / "part").fit(on_epoch=stop)
    trainer(tmp_path / "part").fit(resume=True)
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_it_refuses(digits: Data, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^augment: got 'flip'; expected .*'crop-flip'"):
        quick(density=0.5, augment="flip")
    train, validation, test = (
        Split(part.inputs.flatten(1), part.targets) for part in digits[:3] if part is not None
    )
    rows = Data(train, validation, test, digits.num_classes)
    line = r"^augment: got 'crop'; expected 'none' for inputs \[\d+, 64\]: they are not"
    with pytest.raises(ValueError, match=line):
        Trainer(small_mlp(), rows, quick(density=0.5, augment="crop"), out="o", device="cpu")
    assert not Path("o").exists()
    words = "augment: got 'rotate'; expected one of 'none', 'crop', 'crop-flip'"
    assert words in refused(capsys, "train", "--density", "0.5", "--augment", "rotate")
