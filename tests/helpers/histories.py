"""Metrics such as the trainer's, of made-up runs."""

from __future__ import annotations

from typing import Any

LAYERS = {"conv1": 20, "conv2": 50, "fc1": 800, "fc2": 500}


def history(epochs: int, kind: str, layers: dict[str, int] = LAYERS) -> list[dict[str, Any]]:
    """Metrics such as the trainer's, of a made-up run."""
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        fraction = max(0.3, 1 - epoch / 20)
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": 1 / epoch,
            "train_error_percent": 20 / epoch + 0.5,
            "validation_error_percent": 15 / epoch + 1,
            "test_error_percent": 16 / epoch + 1,
        }
        if kind != "dense":
            row["expected_density"] = fraction
            row["realised_density"] = fraction - 0.01
            row["layers"] = {
                name: {
                    "kept": int(fraction * size),
                    "of": size,
                    "expected_density": fraction + 0.02 * i,
                }
                for i, (name, size) in enumerate(layers.items())
            }
        if kind in ("model", "layers", "params"):
            names = list(layers) if kind == "layers" else ["model"]
            row["density"] = {name: fraction + 0.02 * i for i, name in enumerate(names)}
            row["lambda"] = {name: (epoch % 7) * (1 + i) / 9 for i, name in enumerate(names)}
            row["restarts"] = dict.fromkeys(names, epoch // 7)
        rows.append(row)
    return rows
