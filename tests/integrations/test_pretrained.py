"""Pruned models of Hugging Face go back into folders that plain `from_pretrained` loads."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import gates, prune, sparsify_
from tests.helpers.hugging_face import language_model, token_ids
from tests.helpers.thinned import telling, thinned

pytest.importorskip("transformers", reason="needs the extra transformers")

from l0fast.integrations.transformers import load_pretrained, save_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"Llama": True, "Qwen3": False, "Gemma3": True, "Mistral": False}
"""Class -> whether its embeddings are tied."""

PLAIN = """
import json, sys, torch, transformers
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    tokens = torch.load(folder / "tokens.pt")
    with torch.no_grad():
        torch.save(model(tokens).logits, folder / "logits.pt")
assert not any(name.startswith("l0fast") for name in sys.modules)
"""


def close_gates(model: Any, hidden: int = 12, heads: int = 1, units: int = 16) -> None:
    """Leaves so many gates open, each by a different amount."""
    with torch.no_grad():
        for name, layer in gates(model).layers.items():
            size = layer.log_alpha.numel()
            number = heads if name.endswith("o_proj") else units
            number = hidden if layer.gates == "output" else number
            order = torch.randperm(size)
            layer.log_alpha[order] = torch.linspace(2.0, 0.5, size)
            layer.log_alpha[order[number:]] = -6.0


def gated(kind: str, tied: bool, **options: Any) -> tuple[Any, Any]:
    model, tokens = language_model(kind, tied), token_ids()
    example = {"input_ids": tokens, "use_cache": False}
    options = {"hidden": True, "skip": False} | options
    return sparsify_(model, example_inputs=example, **options), example


@functools.cache
def pruned(kind: str) -> tuple[Any, Any, Any]:
    """A gated model, its example, and what is left of it."""
    torch.manual_seed(1)
    model, example = gated(kind, KINDS[kind])
    close_gates(model)
    return model.eval(), example, prune(model, example, uniform=True)


@pytest.fixture(params=thinned(KINDS, 2))
def pair(request: Any) -> tuple[Any, Any, Any]:
    return pruned(request.param)


def test_the_hidden_width_is_smaller_and_tokens_are_the_same(pair: Any) -> None:
    model, example, small = pair
    assert small.report.tier == "merged"
    assert small.model.embed_tokens.weight.shape == small.lm_head.weight.shape == (40, 12)
    tied = small.lm_head.weight is small.model.embed_tokens.weight
    assert tied == small.config.tie_word_embeddings
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(example["input_ids"], use_cache=True, **options)
    for cache in (True, False):
        assert torch.equal(small.generate(example["input_ids"], use_cache=cache, **options), wanted)


def test_heads_have_norms_of_their_own(pair: Any) -> None:
    model = pair[0]
    of_stream = [name for name, layer in gates(model).layers.items() if layer.gates == "output"]
    assert len(of_stream) == (9 if type(model).__name__.startswith("Gemma3") else 5)
    assert not any("q_norm" in name or "k_norm" in name for name in of_stream)


def plain_logits(folders: list[Path]) -> None:
    """Computes the logits of the models in some folders in a process without l0fast."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, *map(str, folders)]
    done = subprocess.run(
        command, check=False, cwd=folders[0], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kinds", telling(["Qwen3 Mistral", "Llama Gemma3"], ["Llama Gemma3"]))
def test_plain_from_pretrained_loads_them(kinds: str, tmp_path: Path) -> None:
    wanted: dict[Path, torch.Tensor] = {}
    for kind in kinds.split():
        _, example, small = pruned(kind)
        folder = tmp_path / kind
        assert save_pretrained(small, folder) == ""
        torch.save(example["input_ids"], folder / "tokens.pt")
        with torch.no_grad():
            wanted[folder] = small(**example).logits
        config = json.loads((folder / "config.json").read_text())
        keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        assert [config[key] for key in (*keys, "head_dim")] == [12, 16, 2, 1, 8]
    plain_logits(list(wanted))
    for folder, logits in wanted.items():
        got = torch.load(folder / "logits.pt")
        assert float((got - logits).abs().max() / logits.abs().max()) < 1e-5, folder.name


def test_other_widths_are_loaded_by_l0fast(tmp_path: Path) -> None:
    model, example = gated("Llama", True)
    close_gates(model)
    with torch.no_grad():
        gates(model).layers["model.layers.0.mlp.down_proj"].log_alpha[:] = 2.0
    small: Any = prune(model, example)
    why = save_pretrained(small, tmp_path / "own")
    assert "no configuration has the sizes of" in why
    assert why in (tmp_path / "own" / "README.md").read_text()
    loaded = load_pretrained(tmp_path / "own")
    assert torch.equal(loaded(**example).logits, small.eval()(**example).logits)
    with pytest.raises(OSError, match="own"):
        type(small).from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="folder: got"):
        load_pretrained(tmp_path)


KINDS_OF_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def shallow(kind: str, closed: tuple[str, ...], units: int) -> tuple[Any, Any]:
    """A decoder of three layers without some branches, and in one layer without some units."""
    model, tokens = language_model(kind, layers=3, layer_types=KINDS_OF_LAYERS), token_ids()
    example = {"input_ids": tokens}
    sparsify_(model, example_inputs=example, depth=True, density_init=1.0, skip=False)
    for name, layer in gates(model).layers.items():
        if layer.gates == "branch" and any(one in name for one in closed):
            layer.log_alpha.data.fill_(-5.0)
    gates(model).layers["model.layers.0.mlp.down_proj"].log_alpha.data[:units] = -5.0
    return prune(model, example), example


@pytest.mark.parametrize("kind", thinned(["Llama", "Gemma3"], 2))
def test_after_depth_and_with_other_widths_they_come_back(kind: str, tmp_path: Path) -> None:
    closed = ("layers.1.", "layers.2.self_attn", "layers.2.post_att")
    small, example = shallow(kind, closed, 7)
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    assert "it has other parts than" in save_pretrained(small, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.to_dict() == small.config.to_dict()
    with torch.no_grad():
        assert torch.equal(loaded(**example).logits, small.eval()(**example).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    for cache in (True, False):
        texts = [m.generate(**example, use_cache=cache, **options) for m in (loaded, small)]
        assert torch.equal(*texts)


@pytest.mark.parametrize("kind", thinned(["Gemma3", "Llama"], 2))
def test_whole_blocks_less_are_a_plain_folder(kind: str, tmp_path: Path) -> None:
    small, example = shallow(kind, ("layers.1.",), 0)
    assert save_pretrained(small, tmp_path) == ""
    loaded = type(small).from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(**example).logits, small.eval()(**example).logits)


def test_a_size_that_transformers_refuses_is_told(tmp_path: Path) -> None:
    model, example = gated("Llama", False)
    close_gates(model, hidden=11, heads=2)
    why = save_pretrained(prune(model, example, uniform=True), tmp_path)
    assert "LlamaConfig refuses its sizes" in why
    assert "not a multiple of the number of attention heads" in why


def test_what_is_no_pruned_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="small: got 'Linear'; expected a pruned PreTrainedModel"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="small: got 'LlamaForCausalLM'"):
        save_pretrained(language_model("Llama"), tmp_path)


@pytest.mark.exhaustive
def test_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    _, example, small = pruned("Llama")
    save_pretrained(small, tmp_path)
    plain = load_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        torch.onnx.export(
            plain, (), tmp_path / "small.onnx", kwargs=example, dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(
        tmp_path / "small.onnx", providers=["CPUExecutionProvider"]
    )
    (name,) = (given.name for given in session.get_inputs())
    got = session.run(None, {name: example["input_ids"].numpy()})[0]
    with torch.no_grad():
        wanted = plain(**example).logits
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-3, atol=1e-4)
