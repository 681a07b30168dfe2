"""A pruned model goes through ONNX, and onnxruntime computes what PyTorch does (extra `onnx`)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.helpers.plain_models as plain
from l0fast import prune, sparsify_
from l0fast.layers.handle import gated_layers
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

# What is left in each: fewer groups; a gather; transposed convolutions; an attention of fewer
# heads; a gather and a scatter; a tied weight with a factor.
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    name: (*ZOO[name], {}) for name in ("resnext", "lenet", "dcgan", "bert")
} | {
    "called twice": (plain.CalledTwice, lambda: torch.randn(4, 6), {"gates": "output"}),
    "tied": (plain.Tied, lambda: torch.arange(10).view(2, 5), {"gates": "output"}),
}


def pruned(build: Any, args: tuple[Any, ...], **options: Any) -> Any:
    model: nn.Module = sparsify_(build().eval(), example_inputs=args, **options)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.uniform_(-1.2, 1.4)
            layer.log_alpha.view(-1)[: layer.log_alpha.numel() // 2] = -4.0
    return prune(model, args).eval()


@pytest.mark.parametrize("name", telling(CASES, ["called twice"]))
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    build, example, options = CASES[name]
    args = example()
    args = args if isinstance(args, tuple) else (args,)
    small = pruned(build, args, **options)
    assert small.report.params[0] < small.report.params[1]
    path = tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        torch.onnx.export(small, args, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fresh = example()
    fresh = fresh if isinstance(fresh, tuple) else (fresh,)
    names = [given.name for given in session.get_inputs()]
    feed = {key: value.numpy() for key, value in zip(names, fresh, strict=True)}
    (got,) = session.run(None, feed)
    with torch.no_grad():
        expected = small(*fresh)
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        torch.from_numpy(got), expected, rtol=0.0, atol=1e-5 * float(expected.abs().max())
    )
