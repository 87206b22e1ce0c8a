"""Write docs/flags.md from the parsers of the scripts: python -m docs.generate."""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "flags.md"
COMMANDS = ("train.py", "test.py", "predict.py", "reproduce.py")
FLAGS_HEAD = """# The flags of the four scripts

Written by `python -m docs.generate` from the parsers; a test checks that it is up to date. `--help` shows the same, of
the small commands too (`python -m dataset.check --help`). Defaults stand in parentheses. Published flags keep their
names and, unless [reproduce.md](reproduce.md#what-differs-from-the-published-program) says otherwise, their defaults.
"""


class Captured(BaseException):
    """Carries the parser of a command out of it, before it parses anything."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a script (`train.py`) or module (`dataset.check`) uses: it is started up to the parsing."""

    def capture(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise Captured(parser)

    arguments = mock.patch.object(sys, "argv", [command])
    with warnings.catch_warnings(), arguments, mock.patch.object(argparse.ArgumentParser, "parse_known_args", capture):
        warnings.simplefilter("ignore")  # runpy's, of modules that their package imports
        try:
            if command.endswith(".py"):
                runpy.run_path(str(ROOT / command), run_name="__main__")
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except Captured as captured:
            parser: argparse.ArgumentParser = captured.args[0]
            return parser
    raise RuntimeError(f"{command} parses no command line")


def flags() -> str:
    """The text of flags.md: a section for each script, a line for each flag, which is explained once."""
    lines, told = [FLAGS_HEAD], set[tuple[str, str]]()  # names and meanings
    for command in COMMANDS:
        parser, again = parser_of(command), dict[str, list[str]]()
        lines += [f"## python {command}\n", f"{_text(parser.description or '')}\n"]
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.help == argparse.SUPPRESS or action.dest in ("help", "version"):
                    continue
                names, meaning = _names(action), _meaning(action, parser.prog)
                if (names, meaning) in told or not meaning:
                    again.setdefault(f", {group.description}" * bool(group.description), []).append(names)
                else:
                    told.add((names, meaning))
                    lines.append(f"- {names}{_default(action)}: {meaning}")
        lines += [f"\nAs above{words}: {', '.join(names)}." for words, names in again.items()] + [""]
    return "\n".join(lines)


def _meaning(action: argparse.Action, prog: str) -> str:
    """Choices and help."""
    meaning = (action.help or "") % {**vars(action), "prog": prog}
    if action.choices and not all(str(choice) in meaning for choice in action.choices):
        meaning = f"{', '.join(map(str, action.choices))}: {meaning}".removesuffix(": ")
    return _text(meaning)


def _default(action: argparse.Action) -> str:
    nothing = action.default is False or action.default in (None, [], argparse.SUPPRESS)
    if nothing or "(default" in (action.help or ""):
        return ""
    return f" ({' '.join(map(str, action.default)) if isinstance(action.default, list) else action.default})"


def _names(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"


def _text(text: str) -> str:
    return " ".join(text.replace("<", "&lt;").split())


if __name__ == "__main__":
    PAGE.write_text(flags(), encoding="utf-8")
