"""The state of a constraint beside its tensors: what it is about, and its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l0fast import _checks
from l0fast.constraints.dual import Dual, state_in_words
from l0fast.constraints.schedule import TargetSchedule
from l0fast.constraints.term import DensityTerm
from l0fast.measures.groups import Group
from l0fast.measures.latency import LatencyTable


class SavedTargets(DensityTerm):
    """A term whose state names its targets."""

    measure: str
    groups: dict[str, Group]
    dual: Dual
    schedule: TargetSchedule | None
    _exact: list[float]

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Refuses the state of constraints on something else."""
        saved = state_dict.get(prefix + "_extra_state", {})
        both = [state_in_words(state) for state in (saved, self.get_extra_state()) if state]
        if len(set(both)) > 1:
            _checks.refuse("state_dict", both[0], both[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> dict[str, Any]:
        """What the state holds beside tensors: the layers of each constraint, and the targets."""
        groups = [[name, list(group.layers)] for name, group in self.groups.items()]
        state = {
            "measure": self.measure,
            "groups": groups,
            "targets": list(self._exact),
            "dual": type(self.dual).__name__,
            "scheduled": self.schedule is not None,
            **super().get_extra_state(),
        }
        return state if (table := self.table) is None else {**state, "latency": table.as_json()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the targets over, for `prune` too, and the table they are shares of."""
        if "latency" in state:
            table = LatencyTable.from_json(state["latency"])
            self.groups = {n: g._replace(measure=table) for n, g in self.groups.items()}
            self.__dict__["_measure"].take(list(self.groups.values()))
        self._exact = list(state["targets"])
        super().set_extra_state(state)

    @property
    def table(self) -> LatencyTable | None:
        """What latencies are read off, if the measure is one."""
        measure = next(iter(self.groups.values())).measure
        return measure if isinstance(measure, LatencyTable) else None
