"""What came of trying a draft, and where in the model it was noticed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from l0fast import _checks
from l0fast.graph.capture import is_site


def _raised_in(error: Exception, model: nn.Module) -> str | None:
    """The innermost module of a model, other than a layer, whose forward has raised an error."""
    names = {id(module): name for name, module in model.named_modules() if not is_site(module)}
    found, trace = None, error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


class Outcome(NamedTuple):
    """What came of trying a draft."""

    error: float
    """The largest relative error."""
    failure: str = ""
    """What is wrong, "" for nothing."""
    place: str | None = None
    """The module in which it was noticed, if that is known."""

    @classmethod
    def of(cls, error: Exception, model: nn.Module) -> Outcome:
        """The outcome of a draft of a model that has raised an error."""
        place = _raised_in(error, model)
        where = f" (in {place!r})" if place else ""
        return cls(float("inf"), _checks.one_line(error) + where, place)


def unseen_in_words(names: list[str]) -> list[str]:
    """A note on layers that have not run."""
    if not names:
        return []
    return [
        f"not run on the example, and so left as they are: {', '.join(names)}; where they read "
        "units that are gone, they fail"
    ]
