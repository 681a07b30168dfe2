"""Decoders without some attentions: the caches of those that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast import gates, load_pruned, prune, save_pruned, sparsify_
from l0fast.graph.caches import in_places
from tests.helpers.thinned import thinned

transformers = pytest.importorskip("transformers")

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = [SLIDING, FULL, SLIDING]
TOKENS = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))
WINDOW = 3


@pytest.mark.parametrize(
    ("kinds", "full", "expected", "places"),
    [
        ("sfsf", [0, 1, 2, 3], "sfsf", [0, 1, 2, 3]),
        ("sfsf", [1, 2, 3], "sfsf", [1, 0, 3]),
        ("sfsf", [0, 2, 3], "sfsf", [0, 2, 1]),
        ("sfff", [2, 3], "ffff", [0, 3]),
        ("fssf", [3], "ffff", [0]),
    ],
)
def test_the_first_place_of_each_kind_is_full(
    kinds: str, full: list[int], expected: str, places: list[int]
) -> None:
    found = in_places(list(kinds), full)
    assert "".join(found[0]) == expected
    assert [found[1][block] for block in full] == places
    assert all(found[0][place] == kinds[block] for block, place in found[1].items())


def build() -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        **sizes,
        num_hidden_layers=len(KINDS),
        num_attention_heads=2,
        num_key_value_heads=1,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=KINDS,
        eos_token_id=None,
    )
    model = transformers.Gemma3ForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model


def closed_in(*closed: str) -> Any:
    """A decoder with norms at the ends of its branches, some of which are closed."""
    torch.manual_seed(0)
    example = {"input_ids": TOKENS}
    model = sparsify_(build(), example_inputs=example, depth=True, skip=False)
    for name, layer in gates(model).layers.items():
        if layer.gates == "branch":
            shut = any(one in name for one in closed)
            layer.log_alpha.data.fill_(-5.0 if shut else 0.5)
    return model.eval()


@torch.no_grad()
def one_by_one(model: Any) -> Tensor:
    """The logits where each token finds those before it in the cache."""
    found, options = [], {}
    for token in TOKENS.split(1, dim=1):
        given = model(input_ids=token, use_cache=True, **options)
        options = {"past_key_values": given.past_key_values}
        found.append(given.logits)
    return torch.cat(found, 1)


CLOSED = thinned(["0.post_att", "1.post_att 0.post_att", "0. 2.post_att", "1."], 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("closed", CLOSED)
def test_a_text_with_a_cache_is_that_without(closed: str, tmp_path: Path) -> None:
    """Nothing but the model itself says what is right: no proof of pruning runs with a cache."""
    names = [f"layers.{one}" for one in closed.split()]
    model = closed_in(*names)
    small: Any = prune(model, {"input_ids": TOKENS}).eval()
    left = [name for name, _ in small.named_modules() if name.endswith("o_proj")]
    assert len(left) == len(KINDS) - len(names)
    with torch.no_grad():
        expected = small(TOKENS, use_cache=False).logits
    torch.testing.assert_close(one_by_one(small), expected)
    wanted = model(TOKENS).logits  # the norms compute in float32
    torch.testing.assert_close(expected, wanted, rtol=1e-4, atol=1e-5)
    # A norm that counts for 1 + weight, with a gate between 0 and 1 behind it.
    norm = "model.layers.2.post_feedforward_layernorm"
    z = gates(model).layers[f"{norm}.branch"].evaluation_gates().detach()
    before = model.get_submodule(norm).weight
    after = small.model.layers[-1].post_feedforward_layernorm.weight
    assert 0.1 < float(z) < 0.9
    torch.testing.assert_close(1 + after, (1 + before) * z)
    save_pruned(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(
        one_by_one(load_pruned(build, tmp_path / "small.safetensors")), expected
    )
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = small.generate(TOKENS, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        again = {"disable_compile": True, "cache_implementation": cache}
        assert torch.equal(small.generate(TOKENS, **options, **again), text)
