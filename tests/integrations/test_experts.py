"""Mixtures of transformers without some of their experts: exact, saved, and writing the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import (
    DensityConstraint,
    gates,
    load_pruned,
    param_groups,
    prune,
    save_pruned,
    sparsify_,
)
from tests.helpers.thinned import thinned

transformers = pytest.importorskip("transformers")

from l0fast.integrations.transformers import load_pretrained, save_pretrained  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
EXAMPLE = {"input_ids": torch.arange(24).view(2, 12)}
GATES = [1.0, -5.0, 0.3, -5.0, 2.0, -0.5]
KEPT = [0, 2, 4, 5]


def mixtral() -> Any:
    config = transformers.MixtralConfig(num_local_experts=6, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen2() -> Any:
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    config = transformers.Qwen2MoeConfig(num_experts=6, **sizes, **SIZES)
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3() -> Any:
    config = transformers.Qwen3MoeConfig(
        num_experts=6, moe_intermediate_size=24, head_dim=8, **SIZES
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek() -> Any:
    """Its router adds a number to each score in order to pick."""
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        n_routed_experts=6,
        num_local_experts=6,
        moe_intermediate_size=24,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        qk_nope_head_dim=8,
        **sizes,
        **{**SIZES, "num_key_value_heads": 4},
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.uniform_(0.0, 0.5)
    return model


def gpt_oss() -> Any:
    """Its experts have biases."""
    config = transformers.GptOssConfig(num_local_experts=6, head_dim=8, **SIZES)
    return transformers.GptOssForCausalLM(config)


def gated(build: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return sparsify_(build(), example_inputs=EXAMPLE, experts=True, **options)


def close(model: Any) -> None:
    for layer in gates(model).layers.values():
        values = torch.tensor(GATES) if layer.gates == "expert" else torch.tensor(1.0)
        layer.log_alpha.data.copy_(values)


def same_text(one: Any, other: Any) -> None:
    prompt = torch.arange(10).view(2, 5)
    for cache in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache}
        assert torch.equal(one.generate(prompt, **options), other.generate(prompt, **options))


@pytest.mark.parametrize("build", thinned([mixtral, qwen2, qwen3, deepseek, gpt_oss], 5))
def test_closed_experts_are_gone_exactly(build: Any, tmp_path: Path) -> None:
    model = gated(build)
    close(model)
    model.eval()
    small: Any = prune(model, EXAMPLE).eval()
    # In float64; but DeepSeek's router computes in float32, whatever its input.
    assert small.report.max_error < (1e-6 if build is deepseek else 1e-14)
    mixture = small.model.layers[1].mlp
    router = getattr(mixture, "gate", None) or mixture.router
    assert router.num_experts == mixture.experts.num_experts == 4
    assert len(router.weight) == len(mixture.experts.down_proj) == 4
    before = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(mixture.experts.gate_up_proj, before[KEPT])
    with torch.no_grad():
        torch.testing.assert_close(small(**EXAMPLE).logits, model(**EXAMPLE).logits)
    same_text(small, model)
    assert save_pretrained(small, tmp_path) == ""
    plain = type(small).from_pretrained(tmp_path).eval()  # without l0fast
    assert 4 in (getattr(plain.config, key, 0) for key in ("num_experts", "num_local_experts"))
    same_text(plain, small)


@pytest.mark.parametrize("build", thinned([qwen2, mixtral], 2))
def test_what_is_left_is_reckoned(build: Any) -> None:
    model = gated(build)
    close(model)
    expected: dict[str, float] = {}
    for measure in ("params", "macs", "memory"):
        constraint = DensityConstraint(model, 1.0, measure=measure, example_inputs=EXAMPLE)
        expected[measure] = constraint.realised()["model"]
        del constraint
    small: Any = prune(model, EXAMPLE)
    for measure, share in expected.items():
        after, before = getattr(small.report, measure)
        assert after / before == pytest.approx(share, abs=1e-12), measure
    after, before = small.report.macs
    assert before - after == 2 * 24 * 32 * 2  # closed experts in two layers, tokens, inputs


def test_products_of_experts_count() -> None:
    from l0fast.measures.flops import count_macs

    macs = count_macs(mixtral(), EXAMPLE)
    assert macs["model.layers.0.mlp.experts"] == 24 * 2 * 3 * 32 * 48  # two experts a token


@pytest.mark.filterwarnings("ignore:attach. .* steps are few")
@pytest.mark.parametrize("options", thinned([{"uniform": True}, {}], 2))
def test_a_training_a_state_and_other_axes(options: Any, tmp_path: Path) -> None:
    model, steps = gated(mixtral, depth=True, **options), 60
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, steps=steps))
    constraint = DensityConstraint(
        model, 0.5, measure="params", example_inputs=EXAMPLE, steps=steps
    ).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**EXAMPLE, labels=EXAMPLE["input_ids"]).loss.backward()
        optimizer.step()
    assert gates(model).settled
    assert constraint.realised()["model"] <= 0.5
    twin = gated(mixtral, depth=True, **options)
    twin.load_state_dict(model.state_dict())
    small: Any = prune(twin.eval(), EXAMPLE).eval()
    after, before = small.report.params
    assert after <= 0.5 * before
    same_text(small, model.eval())
    numbers = {layer.mlp.experts.num_experts for layer in small.model.layers}
    assert len(numbers) == 1 or not options
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(mixtral, tmp_path / "small.safetensors").eval()
    same_text(loaded, small)
    folder = tmp_path / "folder"
    save_pretrained(small, folder)
    same_text(load_pretrained(folder).eval(), small)
