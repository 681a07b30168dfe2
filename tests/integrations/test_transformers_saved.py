"""What Hugging Face's Trainer saves of a model with gates is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import DensityConstraint, gates, prune, sparsify_

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402

from l0fast.integrations.transformers import L0Callback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
STEPS = 20


def images() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(16, 3, 16, 16, generator=chance)}


def prepared() -> Any:
    """A ResNet: what reads a stream of its has the same gates."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
    config = transformers.ResNetConfig(layer_type="basic", num_labels=3, **sizes)
    model = transformers.ResNetForImageClassification(config)
    return sparsify_(model, example_inputs=images())


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**images()).logits


def test_with_shared_gates_there_and_back(tmp_path: Path) -> None:
    model = prepared()
    handle = gates(model)
    assert len(handle.parameters()) < len(handle.layers)
    rows = [
        {"pixel_values": image, "labels": row % 3}
        for row, image in enumerate(images()["pixel_values"])
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=STEPS, save_strategy="no", report_to=[], use_cpu=True
    )
    made = L0Callback(target=0.5, measure="params", example_inputs=images())
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[made])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    state = load_file(tmp_path / "saved" / "model.safetensors")
    again = prepared()
    again.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert len(gates(again).parameters()) == len(handle.parameters())
    assert torch.equal(outputs(again), outputs(model))
    constraint = DensityConstraint(again, 0.5, measure="params", example_inputs=images())
    again.load_state_dict(state)  # settled, as it was
    small: Any = prune(model, images())
    other: Any = prune(again, images(), target=constraint)
    assert small.report.params == other.report.params
    assert torch.equal(outputs(small), outputs(other))
