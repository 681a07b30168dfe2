"""Steps that are called by keyword, or with more than the example has, skip and are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import sparsify_
from l0fast.layers.handle import gates
from l0fast.skipping import attach, skip
from l0fast.skipping.attach import stop_skipping
from tests.helpers.plain_models import ByKeyword
from tests.helpers.steps import EXACT, following, left_out, pair, set_density

X = torch.randn(8, 6, dtype=torch.float64)
MASK = torch.ones(8, dtype=torch.int64)
LABELS = torch.arange(8) % 5


def both(example: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """(skipped, masked) of the same model, with a third of the gates open."""
    torch.manual_seed(0)
    skipped = sparsify_(ByKeyword().double(), example_inputs=example, skip=True)
    set_density(skipped, 0.3)
    masked = copy.deepcopy(skipped)
    stop_skipping(masked)
    return skipped, masked


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    given = model(**batch)
    loss = given["loss"] if "loss" in given else given["y"].square().mean()
    if "hidden" in given:
        loss = loss + given["hidden"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(masked: nn.Module, skipped: nn.Module, batch: dict[str, Any]) -> None:
    loss, expected = step(masked, batch)
    state = torch.get_rng_state()
    got_loss, got = step(skipped, batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got_loss, loss, rtol=EXACT, atol=EXACT)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "mask": MASK},
        {"mask": MASK, "x": X},
        {"x": X, "mask": MASK, "labels": LABELS},
        {"labels": LABELS, "x": X},
        {"x": X, "labels": None, "hidden": False},
        {"x": X, "times": 2, "activation": "tanh"},
        {"x": X[:3], "mask": MASK[:3]},
    ],
)
def test_a_step_by_keyword_is_skipped_and_the_same(batch: dict[str, Any]) -> None:
    skipped, masked = both({"x": X, "mask": MASK})
    for _ in range(2):
        assert_same(masked, skipped, batch)
        assert left_out(skipped) == 3
    assert left_out(masked) == 0


def test_what_reads_hidden_units_is_masked_and_the_next_step_is_not() -> None:
    skipped, masked = both({"x": X})
    for hidden in (False, True, False):
        batch = {"x": X, "labels": LABELS, "hidden": hidden}
        assert_same(masked, skipped, batch)
        # What reads only the model's own input goes on.
        assert (left_out(skipped) == 3) == (not hidden)


def test_by_keyword_where_the_example_was_not() -> None:
    skipped, masked, x = pair()
    last: list[Tensor] = []
    for model in (skipped, masked):
        torch.manual_seed(3)
        last.append(model(x=x))
    assert following(skipped.a).compact is not None
    torch.testing.assert_close(*last, rtol=EXACT, atol=EXACT)


def test_a_form_is_tried_out_once_and_only_so_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    original = attach.training_trace

    def noted(model: nn.Module, example: Any) -> Any:
        tried.append(example)
        return original(model, example)

    skipped, masked = both({"x": X})
    monkeypatch.setattr(attach, "training_trace", noted)
    for size in (8, 5, 3):
        assert_same(masked, skipped, {"x": X[:size], "labels": LABELS[:size]})
    assert len(tried) == 1
    for times in range(2, 2 + skip.FORMS):
        assert_same(masked, skipped, {"x": X, "times": times})
    assert len(tried) == skip.FORMS
    assert left_out(skipped) == 0


def test_a_call_that_cannot_be_tried_out_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped, masked = both({"x": X})

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no graph")

    monkeypatch.setattr(attach, "training_trace", refuse)
    assert_same(masked, skipped, {"x": X, "labels": LABELS})
    assert left_out(skipped) == 0


def test_a_call_whose_skipping_differs_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped, masked = both({"x": X})
    monkeypatch.setattr(attach, "_error", lambda *_: 1.0)
    assert_same(masked, skipped, {"x": X, "labels": LABELS})
    assert left_out(skipped) == 0


def test_the_work_of_a_call_does_not_depend_on_the_order_of_its_names() -> None:
    skipped, _ = both({"x": X})
    seen: list[float] = []
    skipping = gates(skipped).skipping
    skipping.pays = lambda _link, _kept, _of, examples: bool(seen.append(examples))
    for batch in (
        {"x": X[:4]},
        {"labels": LABELS[:2], "x": X[:2]},
        {"x": X, "labels": LABELS},
    ):
        skipped(**batch)
    assert seen == [0.5] * 3 + [0.25] * 3 + [1.0] * 3


def test_a_tiny_transformer_with_labels() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    tokens = torch.randint(0, 50, (2, 7))
    batch = transformers.BatchEncoding(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    )
    skipped: Any = transformers.LlamaForCausalLM(config).double()
    sparsify_(skipped, example_inputs=batch, skip=True)
    set_density(skipped, 0.4)
    masked = copy.deepcopy(skipped)
    stop_skipping(masked)
    for more in ({}, {"labels": tokens}, {"labels": tokens, "num_items_in_batch": torch.tensor(9)}):
        losses: list[Tensor] = []
        for model in (masked, skipped):
            torch.manual_seed(1)
            model.zero_grad()
            given = model(**batch, **more)
            losses.append(given.loss if more else given.logits.square().mean())
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=EXACT, atol=EXACT)
        for one, other in zip(masked.parameters(), skipped.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
        assert left_out(skipped) > 0
