"""A model that torch.export refuses as a whole: its parts that it takes, each for itself.

What enters and leaves a part stays as it is; inside, layers are followed as in a whole model. So
are the backbone and the head of a detector, whose suppression of boxes depends on the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from l0fast.graph.calls import Example
from l0fast.graph.capture import Trace, export, is_site

_FEW = 2
"""A part has at least so many layers: one alone has no neighbours."""


class _Seen:
    """Which modules one forward of a model calls."""

    def __init__(self) -> None:
        self.first: dict[str, Example] = {}
        """Module -> what its first call was given."""
        self.calls: Counter[str] = Counter()

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        def hook_of(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.calls[name] += 1
                self.first.setdefault(name, Example(args, kwargs))

            return hook

        hooks = [
            module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def export_parts(model: nn.Module, example: Example) -> Trace | None:
    """The graphs of the largest parts of a model that torch.export takes, as one trace.

    A part is left out where a layer of it runs outside of it, too.

    Args:
        model: in evaluation, without gates; it is run.
        example: of what it takes.
    """
    seen = _Seen()
    with seen.watching(model):
        example.copy().call(model)
    found: dict[str, Trace] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            name = names[id(child)]
            if sum(map(is_site, child.modules())) < _FEW or name in found:
                continue
            if name in seen.first:
                try:
                    found[name] = export(child, seen.first[name].copy(), model)
                    continue
                except Exception:  # it, too, depends on the data
                    pass
            visit(child)

    visit(model)
    while found:
        runs: Counter[str] = Counter()
        for part, trace in found.items():
            runs.update({name: seen.calls[part] * n for name, n in trace.calls_of().items()})
        elsewhere = {name for name, number in runs.items() if number != seen.calls[name]}
        split = [part for part, trace in found.items() if elsewhere & trace.calls_of().keys()]
        if not split:
            return Trace.of_parts(found)
        for part in split:
            del found[part]
    return None
