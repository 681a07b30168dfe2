"""Checkpoints: one file with all that a run needs to go on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, _warnings
from l0fast._digest import check_sealed, write_sealed
from l0fast._files import open_regular, write_atomically
from l0fast.measures.latency import LatencyTable
from l0fast.training.entries import Entries
from l0fast.training.generators import set_host_rng
from l0fast.training.ranks import Ranks
from l0fast.training.settings import BEFORE

CHECKPOINT = "checkpoint.pt"
FORMAT = 2
"""The file ends with a digest; checkpoints of format 1 have none."""
EARLIER = 1
OPTIONAL = {
    *("cuda_rng", "host_rng", "best", "removals", "idle"),
    *("threads", "average", "scaler", "ranks"),
}
"""Entries that some runs do not have."""
WHOLE = "a whole checkpoint of this project"


def _place(value: Any) -> Any:
    """A key that is the same for two names of one tensor."""
    named = isinstance(value, Tensor) and value.numel() > 0
    return (value.data_ptr(), value.shape) if named else id(value)


def _check_kinds(entries: Entries, state: dict[str, Any]) -> None:
    """Refuses entries of a wrong class; `Run.check` (matching.py) checks their contents."""
    entries.names("keys", state)
    for name in ("identity", "optimizer"):
        entries.names(name, state[name])
    entries.kind("history", state["history"], list)
    entries.whole("epoch", state["epoch"], 0)
    entries.kind("rng", state["rng"], Tensor)
    entries.names("model", state["model"])
    if state["term"] is not None:
        entries.names("term", state["term"])
        extra = state["term"].get("_extra_state", {})
        entries.names("term._extra_state", extra)
        if "latency" in extra:
            try:
                LatencyTable.from_json(extra["latency"])
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                entries.refuse("latency table", f"is damaged ({_checks.one_line(error)})")
    for name in ("average", "scaler"):
        if state.get(name) is not None:
            entries.names(name, state[name])
    best = state.get("best")
    if best is not None:
        entries.names("best", best, ("epoch", "model"))
        entries.whole("best.epoch", best["epoch"], 1, state["epoch"])
        entries.names("best.model", best["model"])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run between two epochs, as the file holds it (see `RunState`)."""

    format: int = FORMAT
    identity: dict[str, Any]
    """Facts about data, model and settings; a run that goes on from here must have the same."""
    epoch: int
    step: int
    seconds: float
    history: list[dict[str, Any]]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    term: dict[str, Any] | None
    """The state of the constraint or penalty."""
    rng: Tensor
    cuda_rng: Tensor | None = None
    host_rng: dict[str, Any] | None = None
    """Generators of Python and NumPy (`host_rng` in generators.py); earlier versions have none."""
    removals: list[dict[str, Any]] | None = None
    """The removals of `shrink` so far, in order."""
    idle: dict[str, Any] | None = None
    """With `shrink`: for how many epochs each remaining gate has seldom been open."""
    best: dict[str, Any] | None = None
    """With `select="best"`: "epoch" and "model" (a state dict) of the best epoch so far."""
    average: dict[str, Any] | None = None
    """With `ema`: the averages of weights and buffers, by name."""
    scaler: dict[str, Any] | None = None
    """With fp16: the state of the loss's scale."""
    threads: int | None = None
    """CPU threads of the run; with another number, sums are rounded differently."""
    ranks: int | None = None
    """Number of processes, if there are several; it changes rounding as well."""

    @property
    def selected(self) -> tuple[int, dict[str, Any]]:
        """The epoch whose model the run would prune, and the state of that model."""
        if self.best is None:
            averages = self.average or {}
            # A tied tensor has several names in a state, but only one among the averages.
            tied = {_place(self.model[n]): x for n, x in averages.items() if n in self.model}
            return self.epoch, {n: tied.get(_place(x), x) for n, x in self.model.items()}
        return self.best["epoch"], self.best["model"]

    @property
    def of_term(self) -> dict[str, Any]:
        """The entries of the term's state that are not tensors; empty if that is not a dict."""
        extra: Any = (self.term or {}).get("_extra_state")
        return extra if isinstance(extra, dict) else {}

    @property
    def table(self) -> LatencyTable | None:
        """The latency table of the run, if its targets are about latency."""
        state = self.of_term
        return LatencyTable.from_json(state["latency"]) if "latency" in state else None

    def write(self, path: Path) -> None:
        """Writes the checkpoint into a file, completely or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        state = {
            name: value
            for name, value in vars(self).items()
            if not (name in OPTIONAL and value is None)
        }
        state["format"] = FORMAT

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                write_sealed(file, lambda sealed: torch.save(state, sealed))

        write_atomically(path, write)

    @classmethod
    def read(cls, path: Path, device: torch.device, name: str = "resume") -> Checkpoint:
        """Reads a checkpoint from a file.

        Args:
            path: of the file.
            device: for its tensors.
            name: the user's option that named the file, for messages.

        Raises:
            ValueError: the file is not a whole checkpoint.
        """
        try:
            with open_regular(path) as file:
                sealed = check_sealed(file)
                state: Any = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            _checks.refuse(name, str(path), f"{WHOLE} ({_checks.one_line(error)})")
        if not isinstance(state, dict):
            _checks.refuse(name, str(path), f"{WHOLE} (this one is a {type(state).__name__})")
        missing = {field.name for field in fields(cls)} - OPTIONAL - state.keys()
        if missing:
            _checks.refuse(name, str(path), f"{WHOLE} (this one has no {min(missing)!r})")
        version = state["format"]
        if type(version) is not int or version not in (EARLIER, FORMAT):
            expected = f"{WHOLE} (this one has format {version!r}, not {FORMAT})"
            _checks.refuse(name, str(path), expected)
        if not sealed and version != EARLIER:
            _checks.refuse(name, str(path), f"{WHOLE} (this one has lost its digest)")
        _check_kinds(Entries(path, name, WHOLE), state)
        return cls(
            **{field.name: state[field.name] for field in fields(cls) if field.name in state}
        )

    def refuse_other(self, path: Path, identity: Mapping[str, Any], model: nn.Module) -> None:
        """Refuses a run with another identity, or a model with other shapes.

        Raises:
            ValueError: the message has the first fact or shape that differs, and `path`.
        """
        self.refuse_other_run(path, identity)
        self.refuse_other_model(path, model)

    def refuse_other_run(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Refuses a run with another identity.

        A checkpoint of an earlier version counts as one with the settings in `BEFORE`.
        """
        known = {key: BEFORE[key] for key in BEFORE.keys() & identity.keys()} | self.identity
        for key in sorted({*identity, *known}):
            ours, theirs = identity.get(key), known.get(key)
            if key not in known:
                expected = "a run without it (an earlier version's cannot be resumed)"
                _checks.refuse(key, ours, f"{expected}, as in the checkpoint {path}")
            if ours != theirs or isinstance(ours, bool) is not isinstance(theirs, bool):
                _checks.refuse(key, ours, f"{theirs!r}, as in the checkpoint {path}")

    def refuse_other_model(self, path: Path, model: nn.Module) -> None:
        """Refuses a model with other shapes; repeat the checkpoint's removals on it first."""
        shapes = [
            {name: getattr(value, "shape", None) for name, value in state.items()}
            for state in (model.state_dict(), self.model)
        ]
        for name in dict.fromkeys([*shapes[0], *shapes[1]]):
            mine, saved = (
                "none" if name not in part else str(tuple(part[name] or ())) for part in shapes
            )
            if mine != saved:
                _checks.refuse(f"model.{name}", mine, f"shape {saved}, as in the checkpoint {path}")

    def warn_of_rounding(self) -> None:
        """Warns if a run goes on with another number of CPU threads or processes."""
        now = torch.get_num_threads()
        pairs = (
            ("threads", now, self.threads or now),
            ("processes", Ranks.here().size, self.ranks or 1),
        )
        for name, got, before in pairs:
            if got != before:
                words = f"{name}: got {got}; the run began with {before}"
                _warnings.warn(f"{words}: its results will differ in their last bits")

    def restore_rng(self, device: torch.device) -> None:
        """Sets the generators to the states that they had in the run."""
        torch.set_rng_state(self.rng.cpu())
        if self.host_rng is not None:
            set_host_rng(self.host_rng)
        if self.cuda_rng is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda_rng.cpu(), device)
