"""SyncBatchNorm is pruned as BatchNorm is, and has all units in training, which needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import gates, load_pruned, prune, save_pruned, sparsify_

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def dense() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    return model.extend([nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)])


def converted(model: Any) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def made(convert: str) -> Any:
    """A model of two convolutions and their norms, converted "before" or "after", or not."""
    model = sparsify_(
        converted(dense()) if convert == "before" else dense(), example_inputs=X, skip=True
    )
    model = converted(model) if convert == "after" else model
    chance = torch.Generator().manual_seed(0)
    for log_alpha in gates(model).parameters():
        log_alpha.data.copy_(3 * torch.randn(log_alpha.shape, generator=chance))
    return model.eval()


@pytest.mark.parametrize("convert", ["before", "after"])
def test_it_is_pruned_as_batch_norm_is(convert: str, tmp_path: Path) -> None:
    model, plain = made(convert), prune(made(""), X)
    small: Any = prune(model, X)
    assert [type(one) for one in (small[1], small[4])] == 2 * [nn.SyncBatchNorm]
    assert (small[1].num_features, small[4].num_features) == (5, 4)
    y: Tensor = small(X)
    torch.testing.assert_close(y, plain(X))
    torch.testing.assert_close(y, model(X))
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: converted(dense()), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again(X), y)


def test_training_leaves_out_none_of_its_units() -> None:
    skipping = gates(made("before")).skipping
    layers = [end.layer for link in skipping.links for end in (*link.makers, *link.readers)]
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    plain = gates(made("")).skipping
    layers = [end.layer for link in plain.links for end in (*link.makers, *link.readers)]
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
