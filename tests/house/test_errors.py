"""Every refusal is one line, `name: got X; expected Y`, raised before anything is changed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l0fast
from l0fast import functional
from l0fast.gating.param_groups import param_groups
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.conv import L0Conv1d, L0Conv2d, L0Conv3d
from l0fast.layers.gated_types import GATED_TYPES
from l0fast.layers.linear import L0Linear
from l0fast.maths.hard_concrete import HardConcrete
from l0fast.measures.density import density
from l0fast.measures.flops import count_macs

Refusal = tuple[type[Exception], Callable[[], Any]]

ONE_LINE = re.compile(r"[\w\[\]'.*]+: got [^\n]+; expected [^\n]+")
NAN, INF = float("nan"), float("inf")
Z = torch.zeros


# What a caller without a type checker may pass.
HC: Any = HardConcrete
draw: Any = functional.hard_concrete
masked: Any = functional.gated_weight
order: Any = functional.compaction
skipping: Any = functional.skipping_linear
anything: Any = sparsify_


def dense() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def gates(**options: Any) -> Callable[[], Any]:
    return lambda: draw(Z(4), **options)


def mask(weight: Any, log_alpha: Any, **options: Any) -> Callable[[], Any]:
    return lambda: masked(weight, log_alpha, **options)


def linear(**options: Any) -> Callable[[], Any]:
    return lambda: L0Linear(4, 3, **options)


def from_dense(gated: Any, layer: Any, **options: Any) -> Any:
    return gated.from_dense(layer, **options)


def sparse(**options: Any) -> Callable[[], Any]:
    return lambda: sparsify_(dense(), **options)


def groups(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: param_groups(sparsify_(dense()), *args, **options)


HARD_CONCRETE: dict[str, Refusal] = {
    "temperature: got 0; expected a number > 0": (ValueError, lambda: HC(0)),
    "temperature: got '1'": (TypeError, lambda: HC("1")),
    "temperature: got nan": (ValueError, lambda: HC(NAN)),
    "temperature: got True": (TypeError, lambda: HC(True)),
    "gamma: got 0.0; expected a number < 0": (ValueError, lambda: HC(gamma=0.0)),
    "zeta: got 1; expected a number > 1": (ValueError, lambda: HC(zeta=1)),
    "zeta: got inf": (ValueError, lambda: HC(zeta=INF)),
    "bound: got -1; expected a number > 0": (ValueError, lambda: HC(bound=-1)),
    "density: got 0; expected a density in (0, 1]": (
        ValueError,
        lambda: HC().log_alpha(0),
    ),
    "density: got 1.5": (ValueError, lambda: HC().log_alpha(1.5)),
    "density: got 'abc'": (TypeError, lambda: HC().log_alpha("abc")),
}

FUNCTIONAL: dict[str, Refusal] = {
    "log_alpha: got 'list'; expected a tensor": (
        TypeError,
        lambda: draw([1.0]),
    ),
    "log_alpha: got 'torch.int32'; expected a floating dtype": (
        TypeError,
        lambda: draw(Z(3).int()),
    ),
    "log_alpha: got 'torch.complex64'": (
        TypeError,
        lambda: draw(Z(3, dtype=torch.complex64)),
    ),
    "backend: got 'cuda'; expected one of 'auto', 'triton', 'torch'": (
        ValueError,
        gates(backend="cuda"),
    ),
    "sizes: got (1, 2); expected one or more lengths >= 0 with the sum of (4,)": (
        ValueError,
        gates(sizes=(1, 2)),
    ),
    "sizes: got (); expected one or more": (ValueError, lambda: draw(Z(0), ())),
    "sizes: got (-1, 5)": (ValueError, gates(sizes=(-1, 5))),
    "sizes: got (2.0, 2.0)": (TypeError, gates(sizes=(2.0, 2.0))),
    "sizes: got 'ab'": (TypeError, gates(sizes="ab")),
    "sizes: got (2, 2)": (ValueError, lambda: draw(Z(2, 2), (2, 2))),
    "alive: got torch.float32; expected a bool tensor": (TypeError, lambda: order(Z(3), (3,))),
    "alive: got 3; expected a bool tensor": (TypeError, lambda: order(3, (3,))),
    "sizes: got (2,)": (ValueError, lambda: order(Z(3) > 0, (2,))),
    "x: got 'str'; expected a tensor": (TypeError, lambda: skipping("x", Z(3, 4))),
    "x: got (2, 3); expected [..., K] for a weight [N, K] (3, 4)": (
        ValueError,
        lambda: skipping(Z(2, 3), Z(3, 4)),
    ),
    "z: got (3,); expected the shape (4,)": (
        ValueError,
        lambda: skipping(Z(2, 4), Z(3, 4), z=Z(3)),
    ),
    "rows: got (4,); expected the shape (3,)": (
        ValueError,
        lambda: skipping(Z(2, 4), Z(3, 4), rows=order(Z(4) > 0, (4,))[0]),
    ),
    "distribution: got 'str'; expected a HardConcrete": (TypeError, gates(distribution="hard")),
    "seed: got 'float'": (TypeError, gates(seed=1.5)),
    "step: got 'str'": (TypeError, gates(seed=1, step="a")),
    "weight: got 'int'; expected a tensor": (TypeError, mask(3, Z(3))),
    "weight: got 'torch.int64'": (TypeError, mask(Z(3).long(), Z(3))),
    "log_alpha: got 'NoneType'; expected a tensor": (TypeError, mask(Z(2, 3), None)),
    "log_alpha: got (3, 2); expected the shape (2, 3)": (ValueError, mask(Z(2, 3), Z(3, 2))),
    "log_alpha: got (2,); expected the shape (3,)": (ValueError, mask(Z(2, 3), Z(2), dim=1)),
    "log_alpha: got (3,); expected the shape (2, 3)": (ValueError, mask(Z(2, 3), Z(3))),
    "dim: got 2; expected a dimension of weight (2, 3)": (ValueError, mask(Z(2, 3), Z(2), dim=2)),
    "dim: got -3": (ValueError, mask(Z(2, 3), Z(2), dim=-3)),
    "dim: got 0.0; expected a whole number or None": (TypeError, mask(Z(2, 3), Z(2), dim=0.0)),
    "dim: got False": (TypeError, mask(Z(2, 3), Z(2), dim=False)),
    "log_alpha: got 'meta'; expected the device cpu": (
        ValueError,
        mask(Z(2, 3), Z(2, 3, device="meta")),
    ),
    "distribution: got 'int'": (TypeError, mask(Z(3), Z(3), distribution=2)),
    "backend: got None": (ValueError, mask(Z(3), Z(3), backend=None)),
}

LAYERS: dict[str, Refusal] = {
    "gates: got 'inputs'; expected one of 'input', 'output', 'weight'": (
        ValueError,
        linear(gates="inputs"),
    ),
    "gates: got 'auto'": (ValueError, linear(gates="auto")),
    "noise: got 'layer'; expected one of 'batch', 'example'": (ValueError, linear(noise="layer")),
    "noise: got 'example'; expected 'batch' where gates='weight'": (
        ValueError,
        linear(noise="example", gates="weight"),
    ),
    "density_init: got 0; expected a density in (0, 1]": (ValueError, linear(density_init=0)),
    "density_init: got 'half'": (TypeError, linear(density_init="half")),
    "droprate_init: got 0.0; expected a number in (0, 1)": (ValueError, linear(droprate_init=0.0)),
    "droprate_init: got 1": (ValueError, linear(droprate_init=1)),
    "droprate_init: got 0.5; expected only one of": (
        ValueError,
        linear(droprate_init=0.5, density_init=0.5),
    ),
    "distribution: got 'float'": (TypeError, linear(distribution=1.0)),
    "gates: got 'filter'": (ValueError, lambda: L0Conv2d(1, 1, 1, gates="filter")),
    "layer: got 'Conv1d'; expected a torch.nn.Linear": (
        TypeError,
        lambda: from_dense(L0Linear, nn.Conv1d(1, 1, 1)),
    ),
    "layer: got 'L0Conv1d'; expected a torch.nn.Conv1d": (
        TypeError,
        lambda: from_dense(L0Conv1d, L0Conv1d(1, 1, 1)),
    ),
    "layer: got 'NoneType'": (TypeError, lambda: from_dense(L0Conv3d, None)),
    "density_init: got 2": (
        ValueError,
        lambda: from_dense(L0Linear, nn.Linear(1, 1), density_init=2),
    ),
}

SPARSIFY: dict[str, Refusal] = {
    "model: got 'str'; expected a torch.nn.Module": (TypeError, lambda: anything("net")),
    "model: got 'Sequential'; expected a model with a Linear or conv layer": (
        ValueError,
        lambda: anything(nn.Sequential(nn.ReLU())),
    ),
    "model: got 'a single Linear'; expected a model that contains layers": (
        ValueError,
        lambda: anything(nn.Linear(2, 2)),
    ),
    "gates: got 'units'; expected one of 'auto', 'input', 'output', 'weight'": (
        ValueError,
        sparse(gates="units"),
    ),
    "include: got 'fc*'; expected a pattern that matches one of ['0', '2']": (
        ValueError,
        sparse(include="fc*"),
    ),
    "exclude: got '1'": (ValueError, sparse(exclude=["0", "1"])),
    "include: got 0; expected glob patterns or a function": (TypeError, sparse(include=0)),
    "exclude: got 0": (TypeError, sparse(exclude=[0])),
    "density_init: got '1'": (ValueError, sparse(density_init={"1": 0.5})),
    "density_init: got 0": (TypeError, sparse(density_init={0: 0.5})),
    "density_init: got 0.0; expected a density in (0, 1]": (
        ValueError,
        sparse(density_init={"0": 0.0}),
    ),
    "density_init: got 'a'": (TypeError, sparse(density_init={"0": "a"})),
    "droprate_init: got 2": (ValueError, sparse(droprate_init={"2": 2})),
    "droprate_init: got 0.4; expected only one of": (
        ValueError,
        sparse(droprate_init=0.4, density_init={"0": 0.5}),
    ),
    "noise: got None": (ValueError, sparse(noise=None)),
    "lr: got 0; expected a number > 0": (ValueError, groups(0)),
    "lr: got '1e-3'": (TypeError, groups("1e-3")),
    "gate_lr: got -1.0; expected a number > 0": (ValueError, groups(1e-3, -1.0)),
    "weight_decay: got -0.1; expected a number >= 0": (ValueError, groups(1e-3, weight_decay=-0.1)),
    "model: got 'Sequential'; expected a model with gates": (
        ValueError,
        lambda: param_groups(dense(), 1e-3),
    ),
    "model: got 'ReLU'; expected a model with gates": (ValueError, lambda: density(nn.ReLU())),
}

REFUSALS = {**HARD_CONCRETE, **FUNCTIONAL, **LAYERS, **SPARSIFY}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line: str) -> None:
    error, call = REFUSALS[line]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(line)
    assert ONE_LINE.fullmatch(message)


def test_no_two_cases_share_a_line() -> None:
    assert len(REFUSALS) == sum(map(len, (HARD_CONCRETE, FUNCTIONAL, LAYERS, SPARSIFY)))


@pytest.mark.parametrize("dense_type", GATED_TYPES)
def test_a_refused_from_dense_leaves_the_layer_alone(dense_type: Any) -> None:
    layer = dense_type(*(2, 2, 1)[: 2 if dense_type is nn.Linear else 3])
    before = dict(vars(layer))
    for options in ({"gates": "x"}, {"density_init": 2.0}, {"distribution": 1}, {"noise": "x"}):
        with pytest.raises((ValueError, TypeError), match="expected"):
            GATED_TYPES[dense_type].from_dense(layer, **options)
    assert vars(layer) == before
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_refused_draw_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for line, (error, call) in FUNCTIONAL.items():
        with pytest.raises(error, match="expected"):
            call()
        assert torch.equal(torch.get_rng_state(), before), line


def test_counting_macs_of_a_failing_model_puts_its_modes_back() -> None:
    model = dense()
    model[0].eval()
    with pytest.raises(ValueError, match=r"example_inputs: got .* shapes"):
        count_macs(model, Z(1, 5))
    assert [layer.training for layer in model] == [False, True, True]


def test_no_exception_is_built_and_not_raised() -> None:
    """The bug of an earlier implementation: `ValueError(...)` on a line of its own."""
    found: list[str] = []
    for path in Path(l0fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = ast.unparse(node.value.func)
                if name.endswith(("Error", "Exception")):
                    found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []
