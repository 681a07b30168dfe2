"""The proof: whether a pruned model computes what the gated one does, on the user's example and on
noise of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.compare import TOLERANCE, relative_error, tensors_of
from l0fast.layers.substitute import with_log_alpha
from l0fast.pruning.draft import Draft, GateValues
from l0fast.pruning.precision import Maker, holders_that_run, in_precision, widened

SEED = 0


class _Precision(TorchDispatchMode):
    """Notes the least precise floating dtype among the results of all ops."""

    def __init__(self) -> None:
        super().__init__()
        self.least = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if tensor.is_floating_point():
                eps = torch.finfo(tensor.dtype).eps
                if eps > torch.finfo(self.least).eps:
                    self.least = tensor.dtype
        return result


def _noise(example: Example) -> Example | None:
    """An example with noise in its floating tensors, or None if it has none."""
    if not any(tensor.is_floating_point() for tensor in example.tensors()):
        return None
    generator = torch.Generator().manual_seed(SEED)

    def draw(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return example.map(draw)


class Proof:
    """What a gated model computes with some of its gates closed, to compare pruned ones with it.

    It runs in float64, each weight widened as its module is entered; where a module reads the
    weights of others, with all of them widened at once; where the model does not run in float64,
    in its own dtypes.

    Args:
        model: with gates; it is run, and is the same afterwards.
        values: of its gates.
        example: of what it takes.

    Attributes:
        tolerance: the largest relative error that counts as equal.

    Raises:
        ValueError: the model does not take its example.
    """

    def __init__(self, model: nn.Module, values: GateValues, example: Example) -> None:
        # A gate that is closed has a log_alpha of minus infinity.
        closed = {
            name: layer.log_alpha.detach().masked_fill(
                ~values.kept[name].to(layer.log_alpha.device), -torch.inf
            )
            for name, layer in values.layers.items()
        }
        self._holders: Mapping[str, str] = {}
        self._dtype: torch.dtype | None = torch.float64
        with evaluating(model), with_log_alpha(values.layers, closed):
            self._choose(model, example)
            noise = _noise(self.probes[0])
            if noise is not None:
                try:
                    outputs = self._run(model, noise)
                except Exception:
                    return  # not every input is one that a model takes
                if all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
                    self.probes.append(noise)
                    self.expected.append(outputs)

    def _choose(self, model: nn.Module, example: Example) -> None:
        """Runs the model in the best way that it runs in."""
        ways: list[Mapping[str, str]] = [{}]
        try:
            with own_randomness(model, SEED), in_precision(model, None, {}):
                runs = holders_that_run(model, example.copy())
            ways = [runs, {}]
        except Exception:  # perhaps of the example's dtype
            pass
        for self._holders in ways:
            try:
                self._first(model, widened(example, torch.float64))
            except Exception:
                continue
            return
        self._dtype, self._holders = None, {}
        try:
            self._first(model, example)
        except Exception as error:
            example.refuse(error)

    def _first(self, model: nn.Module, example: Example) -> None:
        with _Precision() as precision:
            self.expected = [self._run(model, example)]
        self.probes = [example]
        self.tolerance = TOLERANCE.get(precision.least, TOLERANCE[torch.bfloat16])

    def _run(
        self, model: nn.Module, example: Example, makers: Mapping[str, Maker] | None = None
    ) -> list[Tensor]:
        own = example.copy()
        with own_randomness(model, SEED), in_precision(model, self._dtype, self._holders, makers):
            return [tensor.detach().clone() for tensor in tensors_of(own.call(model))]

    def error(self, draft: Draft) -> float:
        """The relative error of a draft; whatever it raises is passed on."""
        with evaluating(draft.model):
            got = [self._run(draft.model, probe, draft.makers) for probe in self.probes]
        return max(map(relative_error, got, self.expected))

    def check(self, draft: Draft) -> tuple[float, str]:
        """The error of a draft, and "" if it counts as equal or else what is wrong."""
        error = self.error(draft)
        return error, "" if error <= self.tolerance else f"the output differs by {error:.3g}"
