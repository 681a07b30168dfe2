"""bench.finetune on digits: pretrained, gated, constrained, pruned and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import finetune
from bench.finetune import Epochs
from l0fast import load_pruned
from l0fast.data import sets
from l0fast.measures.flops import count_macs


@pytest.mark.exhaustive
def test_a_pretrained_net_is_brought_to_a_share_of_its_macs() -> None:
    torch.manual_seed(0)
    digits = sets.load("digits")
    outcome, small = finetune.finetune(
        digits, 0.3, 8, Epochs(dense=10, constrained=20, pruned=10), lambda _: None
    )
    assert outcome.change_by_gates == 0.0
    assert outcome.dense_error < 40.0
    assert 0.2 < outcome.pruned_macs <= 0.3
    assert outcome.expected_macs < 0.5  # by training: pruning alone would have closed the rest
    assert outcome.max_error <= 1e-5
    assert outcome.final_error < min(outcome.pruned_error, 40.0)
    x = digits.train.inputs[:2]
    dense = count_macs(finetune.net(1, 8, 10), x)[""]
    assert count_macs(small, x)[""] == round(outcome.pruned_macs * dense)


@pytest.mark.filterwarnings("ignore:settle. the expected density")
@pytest.mark.usefixtures("a_folder_of_its_own")
def test_the_command_writes_what_loads_again(tmp_path: Path) -> None:
    words = ["--dataset", "digits", "--width", "4", "--target", "0.5", "--out", str(tmp_path)]
    for part in ("dense", "constrained", "pruned"):
        words += [f"--{part}-epochs", "1"]
    assert finetune.main(words) == 0
    written = json.loads((tmp_path / "finetune.json").read_text())
    assert 0.0 < written["pruned_macs"] <= written["target"] == 0.5
    assert "--constrained-epochs 1" in written["about"]["command"]
    again = load_pruned(lambda: finetune.net(1, 4, 10), tmp_path / "small.safetensors")
    assert again.report.macs[0] / again.report.macs[1] == written["pruned_macs"]  # type: ignore[index]
