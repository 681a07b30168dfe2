"""The callback for Lightning's Trainer takes the plain loop's training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.digits import (
    BATCH,
    STEPS,
    TARGET,
    Seeded,
    assert_same_training,
    assert_within,
    digits,
    plain,
    prepared,
)
from tests.helpers.thinned import thinned

lightning = pytest.importorskip("lightning")

from l0fast.integrations.lightning import L0Callback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


class Module(lightning.LightningModule):
    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.net = prepared()
        self.seeded = Seeded(self.net, parts)

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        return self.seeded(*batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 1e-3, weight_decay=0.0)


def fit(
    module: Module,
    out: Path,
    parts: int = 1,
    ckpt: Any = None,
    epochs: int = 1,
    made: L0Callback | None = None,
    **options: Any,
) -> Any:
    x, y, _, _ = digits()
    x, y = x[: len(x) // epochs], y[: len(y) // epochs]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=BATCH // parts
    )
    example = {"x": torch.zeros(2, 64)}
    made = made or L0Callback(target=TARGET, measure="params", example_inputs=example)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=str(out),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=parts,
        max_epochs=epochs,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        callbacks=[made, *options.pop("callbacks", [])],
        **options,
    )
    trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer, made


@pytest.fixture(scope="module")
def expected() -> tuple[nn.Module, Any]:
    torch.set_num_threads(1)
    return plain()


@pytest.mark.parametrize("parts", thinned([4, 1], 2))
def test_it_takes_the_plain_loops_training(
    parts: int, tmp_path: Path, expected: tuple[nn.Module, Any]
) -> None:
    module = Module(parts)
    trainer, made = fit(module, tmp_path, parts)
    assert trainer.global_step == STEPS
    assert_same_training(module.net, expected[0])
    torch.testing.assert_close(made.constraint.multiplier, expected[1].multiplier)
    assert made.constraint.attachment is None
    assert_within(module.net)
    assert trainer.callback_metrics["l0_density/model"] <= TARGET


@pytest.mark.parametrize("stop", thinned([10, 3, 19], 3))
def test_killed_and_resumed_it_ends_bit_equal(stop: int, tmp_path: Path) -> None:
    """Epochs of ten steps; killed at the start of one, resumed from the end of the one before."""

    class Kill(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, *_args: Any) -> None:
            if trainer.current_epoch == stop:
                raise RuntimeError("killed")

    def saving() -> Any:
        return lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    whole, killed, resumed = Module(), Module(), Module()
    fit(whole, tmp_path, epochs=20)
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, tmp_path, epochs=20, callbacks=[saving(), Kill()], enable_checkpointing=True)
    resumed.seeded.count = stop * 10
    fit(resumed, tmp_path, epochs=20, ckpt=tmp_path / f"epoch={stop - 1}.ckpt")
    mine = resumed.net.state_dict()
    for name, one in whole.net.state_dict().items():
        assert torch.equal(one, mine[name]), name
    assert_within(resumed.net)


def test_bf16_and_clipping_stay_within_the_target(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert_within(module.net)


class Watched(Module):
    """What is monitored is the best at first."""

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        self.log("later", float(self.global_step), on_step=False, on_epoch=True)
        return super().training_step(batch, _index)


def test_the_best_model_is_one_within_the_target(tmp_path: Path) -> None:
    saving: Any = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="later")
    fit(Watched(), tmp_path, epochs=20, callbacks=[saving], enable_checkpointing=True)
    assert Path(saving.best_model_path).name == "epoch=13.ckpt"  # its last step settles


@pytest.mark.exhaustive
def test_a_callback_serves_a_second_training_after_an_interrupted_one(tmp_path: Path) -> None:
    class Kill(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
            if trainer.global_step == 30:
                raise RuntimeError("killed")

    example = {"x": torch.zeros(2, 64)}
    made = L0Callback(target=TARGET, measure="params", example_inputs=example)
    with pytest.raises(RuntimeError, match="killed"):
        fit(Module(), tmp_path, made=made, callbacks=[Kill()])
    module = Module()
    fit(module, tmp_path, made=made)
    assert_within(module.net)


def test_it_takes_the_package_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning")
    name = "l0fast.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    other = importlib.import_module(name)
    assert other.L0Callback.__base__.__module__ == "pytorch_lightning.callbacks.callback"
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, name)
    words = (
        r'install Lightning: pip install "l0fast\[lightning\]", or pip install pytorch-lightning'
    )
    with pytest.raises(ModuleNotFoundError, match=words):
        importlib.import_module(name)
