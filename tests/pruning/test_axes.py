"""Heads, units, hidden width and depth of one decoder, together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import DensityConstraint, gates, load_pruned, prune, save_pruned, sparsify_
from tests.helpers.thinned import telling

transformers = pytest.importorskip("transformers")


def decoder() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


def test_they_are_reckoned_removed_and_saved_together(tmp_path: Path) -> None:
    example = {"input_ids": torch.randint(64, (2, 12))}
    model: Any = decoder()
    sparsify_(model, example_inputs=example, depth=True, hidden=True)
    constraint = DensityConstraint(model, 0.5, measure="params", example_inputs=example)
    layers = gates(model).layers
    for name in layers:
        one = layers[name].log_alpha.data
        one.copy_(torch.where(torch.rand_like(one) < 0.4, -5.0, 3.0))
    for name, value in (("1.mlp.down_proj", -5.0), ("0.mlp.down_proj", 3.0)):
        layers[f"model.layers.{name}.branch"].log_alpha.data.fill_(value)
    expected = constraint.realised()["model"]
    del constraint
    model.eval()
    small: Any = prune(model, example).eval()
    after, before = small.report.params
    assert sum(p.numel() for p in small.parameters()) == after
    assert after / before == pytest.approx(expected, abs=1e-12)
    assert small.model.embed_tokens.embedding_dim < 32
    assert "model.layers.1.mlp.down_proj" in str(small.report)
    prompt = torch.randint(64, (2, 5))
    for cache in (True, False):
        written = [
            one.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache)
            for one in (model, small)
        ]
        assert torch.equal(*written)
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(decoder, tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**example).logits, small(**example).logits)


@pytest.mark.parametrize("cache", telling(["dynamic", "static", "none"], []))
def test_a_text_is_continued_without_a_layer_in_the_middle(cache: str) -> None:
    """The layers behind it have other places in the cache, and no place is left over."""
    example = {"input_ids": torch.randint(64, (2, 12))}
    model: Any = decoder()
    sparsify_(model, example_inputs=example, depth=True, density_init=1.0)
    layers = gates(model).layers
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layers[f"model.layers.1.{name}.branch"].log_alpha.data.fill_(-5.0)
    small: Any = prune(model.eval(), example).eval()
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    options: dict[str, Any] = {"use_cache": cache != "none"}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    prompt = torch.randint(64, (2, 5))
    expected, written = (
        one.generate(
            prompt,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for one in (model, small)
    )
    assert torch.equal(written.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(written.logits), torch.stack(expected.logits))
    if cache != "none":
        held = [layer.keys for layer in written.past_key_values.layers]
        assert len(held) == 2
        assert all(bool(keys.any()) for keys in held)
