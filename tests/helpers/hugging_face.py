"""Tiny language models of Hugging Face, with weights of a size that matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def language_model(
    kind: str, tied: bool = False, layers: int = 2, layer_types: list[str] | None = None
) -> Any:
    """One of the classes `kind`ForCausalLM; of two layers, four heads and two for keys. The
    attentions of Gemma are of two kinds."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rms_norm_eps": 1e-3,
    }
    if kind == "Gemma3":
        sizes |= {"query_pre_attn_scalar": 8, "sliding_window": 4}
        sizes |= {"layer_types": layer_types or ["sliding_attention", "full_attention"]}
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(8)
    return model


def token_ids() -> Tensor:
    """An example of what they take."""
    return torch.randint(2, 40, (2, 7))
