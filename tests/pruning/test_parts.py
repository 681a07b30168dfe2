"""A model that torch.export refuses as a whole: its parts are followed, each for itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, gates, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.graph.structure import Structure
from tests.helpers import plain_models as plain
from tests.helpers.half_closed import assert_same, half_closed


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, after, 1)
    )


class Detector(nn.Module):
    """A backbone, a head that is called twice, and a choice that depends on what they give."""

    def __init__(self, reuse: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.reuse = block(3, 6), block(6, 4), reuse
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, images: list[Tensor]) -> Tensor:
        found = []
        for size in (8, 4):
            x = torch.stack([image[..., :size, :size] for image in images])
            found.append(self.head(self.backbone(x) * self.gamma).flatten(2).mean(2))
        scores = torch.cat(found)
        if self.reuse:  # a layer of a part, past the part's own forward
            scores = scores + self.head[3](torch.ones(1, 12, 1, 1).to(scores)).mean((2, 3))
        if bool((scores > 1e9).any()):
            return scores[scores > 1e9]
        return scores


def images() -> list[Tensor]:
    return [torch.randn(3, 8, 8, dtype=torch.float64) for _ in range(2)]


def test_they_are_merged_inside() -> None:
    torch.manual_seed(0)
    x = images()
    table = sparsify_(Detector().double().eval(), example_inputs=x, dry_run=True)
    assert "only inside 'backbone', 'head': torch.export refuses the whole" in table.note
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = half_closed(Detector(), (x,))
    assert list(gates(model).layers) == ["backbone.3", "head.3"]
    constraint = DensityConstraint(model, 0.6, measure="params", example_inputs=(x,))
    small: Any = prune(model, (x,))
    assert small.report.tier == "merged"
    assert "only inside 'backbone', 'head'" in small.report.notes[0]
    assert small.backbone[0].out_channels == small.backbone[3].in_channels == 6
    assert small.backbone[3].out_channels == small.head[0].in_channels == 6
    assert {site["status"] for site in small.report.sites} == {"removed"}
    with torch.no_grad():
        torch.testing.assert_close(small(images_ := images()), model(images_), rtol=0, atol=1e-12)
    within: Any = prune(model, (x,), constraint)
    assert within.report.groups


def test_a_part_whose_layer_runs_outside_of_it_is_left_out() -> None:
    x = images()
    trace = Structure.of(Detector(reuse=True).double().eval(), Example((x,))).trace
    assert trace is not None
    assert trace.parts == ("backbone",)


def test_without_parts_there_is_a_warning_that_says_what_helps() -> None:
    x = torch.rand(4, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"refuses the model.*Call sparsify_ on the part"):
        model = half_closed(plain.DataDependent(), x)
    assert_same(prune(model, x), model, x)
