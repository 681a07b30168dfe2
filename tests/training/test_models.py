"""The models of the command: the published sizes, and the published gates and initialisation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from l0fast import DensityConstraint, TrainerSettings, density, sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.measures.flops import count_macs, count_params
from l0fast.training import models

SHIFT = 2 / 3 * math.log(11)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize(
    ("name", "in_shape", "widths", "weights", "params", "macs"),
    [
        ("mlp", (1, 28, 28), None, [(300, 784), (100, 300), (10, 100)], 266_610, 266_200),
        (
            "lenet5",
            (1, 28, 28),
            None,
            [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)],
            431_080,
            24 * 24 * 500 + 8 * 8 * 25_000 + 405_000,
        ),
        ("mlp", (1, 8, 8), (16,), [(16, 64), (10, 16)], 1_210, 1_184),
        ("mlp", (1, 2, 2), (5, 4, 3, 2), [(5, 4), (4, 5), (3, 4), (2, 3), (10, 2)], 102, 78),
        (
            "lenet5",
            (1, 8, 8),
            (3, 4, 5),
            [(3, 1, 3, 3), (4, 3, 3, 3), (5, 16), (10, 5)],
            287,
            64 * 27 + 16 * 108 + 80 + 50,
        ),
    ],
)
def test_sizes(
    name: str, in_shape: Any, widths: Any, weights: list[Any], params: int, macs: int
) -> None:
    model = models.build(name, in_shape, 10, widths)
    assert sizes(model) == weights
    assert count_params(model) == params
    assert count_macs(model, torch.zeros(1, *in_shape))[""] == macs
    assert model(torch.randn(7, *in_shape)).shape == (7, 10)
    assert not torch.equal(model(torch.randn(1, *in_shape)), model(torch.randn(1, *in_shape)))


def test_gates_stand_where_the_papers_have_them() -> None:
    mlp = sparsify_(models.build("mlp", (1, 28, 28), 10))
    assert density(mlp).total.params == 266_200
    where = {name: (g.gates, g.num_gates) for name, g in gated_layers(mlp).items()}
    assert where == {"fc1": ("input", 784), "fc2": ("input", 300), "fc3": ("input", 100)}
    lenet = sparsify_(models.build("lenet5", (1, 28, 28), 10))
    where = {name: (g.gates, g.num_gates) for name, g in gated_layers(lenet).items()}
    assert where == {
        "conv1": ("output", 20),
        "conv2": ("output", 50),
        "fc1": ("input", 800),
        "fc2": ("input", 500),
    }
    # A convolution's bias is gated with its filter, a Linear's is not.
    assert density(lenet).total.params == 20 * 26 + 50 * 501 + 800 * 500 + 500 * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", (1, 8, 8), 10), "model: got 'vgg'; expected 'mlp', 'lenet5', a torchvision"),
        (("mlp", (1, 8, 8), 10, (0,)), "widths: got (0,); expected whole numbers >= 1"),
        (("mlp", (1, 8, 8), 10, (30, -5)), "widths: got (30, -5); expected whole numbers >= 1"),
        (("mlp", (1, 8, 8), 10, (30.5,)), "widths: got (30.5,); expected whole numbers >= 1"),
        (("lenet5", (1, 8, 8), 10, (3, 4)), "widths: got (3, 4); expected three numbers for lenet"),
        (("lenet5", (1, 8, 3), 10), "in_shape: got (1, 8, 3); expected images of at least 4x4"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        models.build(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_the_published_start(name: str) -> None:
    """log_alpha ~ N(log((1 - d) / d), 0.01), within log(100); He-normal weights / (1 - d)."""
    model = models.sparsify_published_(models.build(name, (1, 28, 28), 10))
    params: dict[str, int] = {}
    start: dict[str, float] = {}
    for layer_name, layer in gated_layers(model).items():
        droprate = 0.2 if layer_name == "fc1" and name == "mlp" else 0.5
        mean = math.log((1 - droprate) / droprate)
        n = layer.num_gates
        assert float(layer.log_alpha.detach().mean()) == pytest.approx(mean, abs=0.05 / n**0.5)
        assert float(layer.log_alpha.detach().std()) == pytest.approx(0.01, rel=4 / (2 * n) ** 0.5)
        assert layer.distribution.bound == math.log(100)
        fan = layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        std = math.sqrt(2 / fan) / (1 - droprate)
        count = layer.weight.numel()
        measured = float(layer.weight.detach().std())
        assert measured == pytest.approx(std, rel=4 / (2 * count) ** 0.5)
        assert not bool(layer.bias.any())
        params[layer_name] = n * layer.group_size
        start[layer_name] = sigmoid(mean + SHIFT)
    expected = sum(params[k] * start[k] for k in params) / sum(params.values())
    assert density(model).total.expected == pytest.approx(expected, abs=1e-4)
    # "Droprate 0.5" is no density: the models start at 0.938 and 0.832.
    assert expected == pytest.approx({"mlp": 0.9379, "lenet5": 0.8318}[name], abs=5e-5)


def test_the_published_bound_refuses_what_the_published_code_never_met() -> None:
    model = models.sparsify_published_(models.build("mlp", (1, 28, 28), 10))
    with pytest.raises(ValueError, match=r"got 0\.047; expected a density in \[0\.0471298"):
        DensityConstraint(model, 0.047)


def test_the_published_settings() -> None:
    wanted = {"lr": 7e-4, "gate_lr": 7e-4, "dual_lr": 1e-4, "weight_decay": 0.0}
    wanted |= {"schedule": "constant", "epochs": 200, "batch_size": 128}
    wanted |= {"target_schedule": "constant", "settle": 0.0, "start": 0.0}
    assert wanted == models.PUBLISHED_SETTINGS
    TrainerSettings(**models.PUBLISHED_SETTINGS)


# --- torchvision's models, and the user's ---------------------------------------------------------


USERS = """
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

class Sized(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

def any_options(**options):
    return Sized(**options)

class Holder:
    build = Sized

def wrong():
    return 3

def fails():
    raise KeyError("oh\\nno")

number = 3
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module in the working directory, which is not on the path."""
    (tmp_path / "users_own.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("users_own", None)


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("path", ["plain", "Sized", "any_options", "Holder.build"])
def test_a_users_model(path: str) -> None:
    model = models.build(f"users_own:{path}", (1, 8, 8), 10)
    assert model.training
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_own:nothing", "expected package.module:callable (AttributeError: "),
        ("users_own:", "expected package.module:callable (AttributeError: "),
        (":plain", "expected package.module:callable (ValueError: "),
        ("no_such_module:f", "expected package.module:callable (ModuleNotFoundError: "),
        ("users_own:number", "expected package.module:callable, not a int"),
        ("users_own:wrong", "expected a callable that returns a torch.nn.Module, not int"),
        ("users_own:fails", "expected a callable that builds a model (KeyError: "),
        ("users_own:plain", "expected a model with 7 outputs for an example of shape (1, 8, "),
        ("resnet", "expected 'mlp', 'lenet5', a torchvision model such as 'resnet18', or"),
        ("alexnet", "expected a model with 7 outputs for an example of shape (1, 8, 8) (Runt"),
    ],
)
def test_a_model_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model: got {name!r}; expected") as caught:
        models.build(name, (1, 8, 8), 7)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_torchvisions_models(name: str) -> None:
    assert models.from_torchvision(name)
    model = models.build(name, (3, 32, 32), 7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_only_our_own_models_have_widths() -> None:
    with pytest.raises(ValueError, match=r"^widths: got \[3\]; expected none: only mlp and lenet5"):
        models.build("resnet18", (3, 32, 32), 10, [3])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pretrained(tmp_path: Path, suffix: str) -> None:
    source, model = (models.build("mlp", (1, 8, 8), 10, (5,)) for _ in range(2))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    models.load_pretrained_(model, path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("import sys; sys.l0fast_was_here = True",)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "(there is no such file)"),
        (b"garbage", "(it cannot be read: "),
        ([1, 2], "(it holds a list)"),
        ({"fc9.weight": 1.0}, "(it has no 'fc1.bias')"),
        ({"zzz": torch.zeros(1)}, "(it has a 'zzz')"),
        ({"fc1.bias": torch.zeros(6)}, "(its 'fc1.bias' is (6,), not (5,))"),
        ({"fc1.bias": 1.5}, "(its 'fc1.bias' is no tensor, not (5,))"),
        (Evil(), "(it cannot be read: UnpicklingError: "),
    ],
    ids=["missing", "garbage", "list", "other", "surplus", "shape", "number", "code"],
)
def test_a_pretrained_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, state: Any, message: str
) -> None:
    model = models.build("mlp", (1, 8, 8), 10, (5,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "weights.pt"
    if isinstance(state, bytes):
        path.write_bytes(state)
    elif isinstance(state, dict):
        torch.save(state if "fc9.weight" in state else before | state, path)
    elif state is not None:
        torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"^pretrained: got .*; expected a file with the st"
    ) as caught:
        models.load_pretrained_(model, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(sys, "l0fast_was_here")
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
