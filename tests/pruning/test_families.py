"""What some families of Hugging Face do in their own way, with gates on all their axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import DensityConstraint, gates, prune, sparsify_
from l0fast.graph.exporting import as_linears
from tests.helpers.branches import branches, close
from tests.helpers.thinned import thinned

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "Falcon": {"num_kv_heads": 4},
    "Bloom": {"n_layer": 3, "n_head": 4},
    "ModernBert": {"cls_token_id": 0, "sep_token_id": 1},
    "Mixtral": {"num_local_experts": 4, "experts_implementation": "batched_mm"},
    "T5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
MODELS = {"T5": "T5ForConditionalGeneration", "ModernBert": "ModernBertForMaskedLM"}


def family(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model in float64, and what it takes."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    known = {*config().to_dict(), *config.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    build = getattr(transformers, MODELS.get(kind, f"{kind}ForCausalLM"))
    model = build(config(**(sizes | OPTIONS.get(kind, {})))).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    example = {"input_ids": torch.randint(2, 40, (2, 9))}
    return model, example | ({"decoder_input_ids": example["input_ids"]} if kind == "T5" else {})


def pruned(kind: str, closed: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """A model without the branches of some modules: gated, its example, what is left of it."""
    model, example = family(kind)
    sparsify_(model, example_inputs=example, depth=True, density_init=1.0, skip=False)
    found = [name for name in branches(model) if any(one in name for one in closed)]
    assert len(found) >= len(closed)
    close(model, found)
    return model.eval(), example, prune(model, example)


def same(model: Any, small: Any, example: dict[str, Any]) -> None:
    other = {name: one[:1, :5].flip(1) for name, one in example.items()}
    for given in (example, other):
        with torch.no_grad():
            torch.testing.assert_close(small(**given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("kind", "closed", "left"),
    thinned(
        [
            # Its Linears have a forward of their own; one norm is read by both branches of a block.
            ("Falcon", ("h.1.self_attention", "h.1.mlp"), 2),
            # Blocks know their kind by themselves, and no sliding attention is left.
            ("ModernBert", ("layers.1.", "layers.2.attn"), 2),
            # An attention hands the bias of the first one on to the next.
            ("T5", ("decoder.block.1.layer.0", "encoder.block.1.layer.0"), 3),
        ],
        3,
    ),
)
def test_depth(kind: str, closed: tuple[str, ...], left: int) -> None:
    model, example, small = pruned(kind, closed)
    same(model, small, example)
    assert small.config.num_hidden_layers == left
    before, after = (
        {n for n in one.state_dict() if "log_alpha" not in n} for one in (model, small)
    )
    assert len(after) < len(before)


@pytest.mark.parametrize("kind", thinned(["Bloom", "T5"], 2))
def test_parameters_are_reckoned(kind: str) -> None:
    """BLOOM's norms are outside of their MLPs, which add the branch; a layer of T5 reads the last
    of its list."""
    model, example = family(kind)
    sparsify_(model, example_inputs=example, depth=True, density_init=1.0, skip=False)
    constraint = DensityConstraint(model, 1.0, measure="params", example_inputs=example)
    close(model, branches(model)[::2])
    expected = constraint.realised()["model"]
    del constraint
    small: Any = prune(model.eval(), example)
    after, before = small.report.params
    assert sum(p.numel() for p in small.parameters()) == after
    assert after / before == pytest.approx(expected, abs=1e-12)


def test_experts_of_a_model_in_float64() -> None:
    """The router's softmax is in float32 all the same."""
    model, example = family("Mixtral")
    sparsify_(model, example_inputs=example, experts=True, density_init=1.0, skip=False)
    found = [layer for layer in gates(model).layers.values() if layer.gates == "expert"]
    assert len(found) == 3
    for layer in found:
        layer.log_alpha.data[1] = -5.0
    small: Any = prune(model.eval(), example)
    assert small.config.num_local_experts == 3
    with torch.no_grad():
        torch.testing.assert_close(small(**example).logits, model(**example).logits)


@pytest.mark.parametrize("kind", thinned(["Phi3", "Falcon"], 2))
def test_a_folder(kind: str, tmp_path: Path) -> None:
    """One layer is queries, keys and values; the hidden units have a name of their own."""
    from l0fast.integrations.transformers import save_pretrained

    model, example = family(kind)
    hidden = kind == "Phi3"
    sparsify_(model, example_inputs=example, hidden=hidden, density_init=1.0, skip=False)
    with torch.no_grad():
        for layer in gates(model).layers.values():
            layer.log_alpha[: layer.log_alpha.numel() // 2] = -5.0
    small: Any = prune(model.eval(), example, uniform=True)
    assert save_pretrained(small, tmp_path) == ""
    loaded = type(small).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**example).logits, small(**example).logits)


def test_what_is_no_longer_alone_is_told() -> None:
    """The first attention of T5 computes the bias of all; that of BLOOM adds the branch itself."""
    reasons = {}
    for kind in ("T5", "Bloom"):
        model, example = family(kind)
        table = sparsify_(model, example_inputs=example, depth=True, dry_run=True)
        reasons[kind] = {
            row.reason for row in table.layers if row.kind == "Branch" and not row.gates
        }
    assert any("is read outside of the branch" in reason for reason in reasons["T5"])
    assert not any("is read outside of the branch" in reason for reason in reasons["Bloom"])
    assert any("is written out in the forward of" in reason for reason in reasons["Bloom"])


def test_a_forward_that_a_module_was_given_stays_its_own() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    model = torch.nn.Sequential(falcon.FalconLinear(3, 3), falcon.FalconLinear(3, 3))

    def own(x: Any) -> Any:
        return x

    model[0].forward = own
    with as_linears(model):
        assert model[0].forward is own
        assert "forward" in vars(model[1])
    assert model[0].forward is own
    assert "forward" not in vars(model[1])
