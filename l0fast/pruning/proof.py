"""The proof: whether a pruned model computes what the gated one does, on the user's example, on
noise, and on other sizes than the example's."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import product

import torch
from torch import nn

from l0fast import _checks
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import layer_size, train_but_norms
from l0fast.graph.compare import Precision
from l0fast.layers.substitute import with_log_alpha
from l0fast.pruning.draft import Draft
from l0fast.pruning.gate_values import GateValues
from l0fast.pruning.observation import Observation, Rows, observe, sites_of
from l0fast.pruning.outcome import Outcome
from l0fast.pruning.precision import (
    float64_for_float32,
    holders_that_run,
    in_precision,
    widened,
)
from l0fast.pruning.probes import SEED, Probe, groups_of_probes, perturbed


class Proof:
    """What a gated model computes with some of its gates closed, to compare pruned ones with it.

    It runs in float64, each weight widened as its module is entered; where a module reads the
    weights of others, with all of them widened at once; where its forward makes tensors of float32,
    with these in float64, too; where the model does not run in float64, in its own dtypes. Compared
    are its output, and the outputs that each Linear and convolution has left.

    Args:
        model: with gates; it is run, and is the same afterwards.
        values: of its gates.
        example: of what it takes.
        training: whether pruned models must run on the example in training, too.
        added: tensors that keep their values: they may be in the constants that closed units leave,
            or parts of them are copied.

    Attributes:
        tolerance: the largest relative error that counts as equal.
        compared: on what, in words.

    Raises:
        ValueError: the model does not take its example, gives nothing that can be compared, or has
            a weight that is NaN: nothing would differ from it.
    """

    def __init__(
        self,
        model: nn.Module,
        values: GateValues,
        example: Example,
        training: bool = False,
        added: Collection[str] = (),
    ) -> None:
        _refuse_nan(model)
        self._training, self._example, self._added = training, example, added
        # A gate that is closed has a log_alpha of minus infinity, one that is 1 of infinity.
        closed: dict[str, torch.Tensor] = {}
        for name, layer in values.layers.items():
            log_alpha, kept = layer.log_alpha.detach(), values.kept[name].to(layer.log_alpha.device)
            if values.fully_open:
                log_alpha = torch.full_like(log_alpha, torch.inf)
            closed[name] = log_alpha.masked_fill(~kept, -torch.inf)
        self._source, self._sites = model, sites_of(model)
        self._holders: Mapping[str, str] = {}
        self._dtype: torch.dtype | None = torch.float64
        self._doubling = False
        self._seen: list[tuple[Probe, Observation]] = []
        with self._running(values, closed):
            self._choose(model, example)
            first, given = self._seen[0]
            if not given.something:
                got = f"{type(model).__name__}, whose {given.kind} output has no finite number"
                _checks.refuse("model", got, "an output with finite numbers, which prune compares")
        for probes in groups_of_probes(model, first.example, added):
            for probe in probes:
                try:
                    with self._running(values, closed):
                        given = self._run(model, probe)
                except Exception:
                    continue  # not every input is one that a model takes
                if given.finite:
                    self._seen.append((probe, given))
                    break
        self.compared = [probe.title for probe, _ in self._seen]

    @contextmanager
    def _running(self, values: GateValues, closed: Mapping[str, torch.Tensor]) -> Generator[None]:
        with evaluating(self._source), with_log_alpha(values.layers, closed):
            yield

    def _choose(self, model: nn.Module, example: Example) -> None:
        """Runs the model in the best way that it runs in."""
        ways: list[Mapping[str, str]] = [{}]
        try:
            with own_randomness(model, SEED), in_precision(model, None, {}):
                runs = holders_that_run(model, example.copy())
            ways = [runs, {}]
        except Exception:  # perhaps of the example's dtype
            pass
        for self._doubling, self._holders in product((False, True), ways):
            try:
                self._first(model, widened(example, torch.float64))
            except Exception:
                continue
            return
        self._dtype, self._holders, self._doubling = None, {}, False
        try:
            self._first(model, example)
        except Exception as error:
            example.refuse(error)

    def _first(self, model: nn.Module, example: Example) -> None:
        probe = Probe("the example", example)
        with Precision() as precision:
            self._seen = [(probe, self._run(model, probe))]
        self.tolerance = precision.tolerance

    def _run(
        self,
        model: nn.Module,
        probe: Probe,
        draft: Draft | None = None,
        rows: Mapping[str, Rows] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Observation:
        changed = perturbed(self._source, self._added) if probe.perturbed else nullcontext()
        holders, sites = self._holders, self._sites
        if names is not None:
            new = {old: name for name, old in names.items()}
            found = ((name, holders.get(old, "")) for name, old in names.items())
            holders = {name: new.get(holder, "") for name, holder in found}
            sites = {name: sites[old] for name, old in names.items() if old in sites}
        with changed:
            if draft is not None:
                draft.cut_again()
            makers = {} if draft is None else draft.makers
            with (
                own_randomness(model, SEED),
                in_precision(model, self._dtype, holders, makers),
                float64_for_float32() if self._doubling else nullcontext(),
            ):
                return observe(model, probe.example.copy(), sites, rows)

    def _rows(self, draft: Draft, name: str, old: str) -> Rows:
        _, size = layer_size(self._source.get_submodule(old))
        edit = draft.edit(name)
        if edit is None:
            return Rows(size)
        return Rows(size, edit.outputs, None if edit.scatter is None else edit.scatter[0])

    def check(self, draft: Draft) -> Outcome:
        """Whether a draft counts as equal; whatever it raises is passed on."""
        names, worst = draft.names, 0.0
        sites = ((name, old) for name, old in names.items() if old in self._sites)
        rows = {name: self._rows(draft, name, old) for name, old in sites}
        for probe, expected in self._seen:
            with evaluating(draft.model):
                got = self._run(draft.model, probe, draft, rows, names)
            for error, name in got.errors(expected, names):
                worst = max(worst, error)
                if error > self.tolerance:
                    what = f"what {name!r} gives" if name else "the output"
                    words = f"{what} differs by {error:.3g} on {probe.title}"
                    return Outcome(error, words, name.rpartition(".")[0])
        if self._training:
            with evaluating(draft.model), own_randomness(draft.model):
                train_but_norms(draft.model)
                self._example.copy().call(draft.model)
        return Outcome(worst)


def _refuse_nan(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        plain = parameter.detach()
        if plain.is_meta or not plain.is_floating_point() or plain.itemsize < 2:
            continue
        if bool(plain.isnan().any()):
            _checks.refuse(f"model.{name}", "NaN", "weights that are numbers")
