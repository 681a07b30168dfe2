"""The directive `l0fast-command`: the help of a subcommand, from its own parser."""

from __future__ import annotations

import argparse
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from l0fast.cli import _parser as command_parser


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


class CommandDirective(Directive):
    """`{l0fast-command} train`: usage and options of one subcommand."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        found = _subparsers(command_parser())
        if name not in found:
            raise self.error(f"l0fast-command: got {name!r}; expected one of {sorted(found)}")
        text = found[name].format_help()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("l0fast-command", CommandDirective)
    return {"parallel_read_safe": True}
