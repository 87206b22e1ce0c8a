"""Write docs/flags.md from the parsers of the scripts: python -m docs.generate."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
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
    """The text of flags.md: a section for each command, a list for each group of flags, each flag explained once."""
    lines = [FLAGS_HEAD]
    told: dict[tuple[str, str], str] = {}  # a flag and its meaning, and the command at which it is explained
    for command in COMMANDS:
        start = f"python {command}" if command.endswith(".py") else f"python -m {command}"
        lines += [f"## {start}\n", *_sections(parser_of(command), command, told)]
    return "\n".join(lines)


def _sections(parser: argparse.ArgumentParser, command: str, told: dict[tuple[str, str], str]) -> Iterator[str]:
    if parser.description:
        yield f"{_text(parser.description)}\n"
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest not in ("help", "version")]
        rows, known = [], dict[str, list[str]]()  # known, or without a word: on one line
        for action in shown:
            names, meaning = _names(action), _meaning(action, parser.prog)
            first = told.setdefault((names, meaning), command) if meaning else ""
            if first != command:
                known.setdefault(f"as in {first}: " if first else "", []).append(names)
                continue
            default = _default(action)
            meaning = re.sub(rf" \((default: )?{re.escape(default)}\)$", "", meaning)
            rows.append(f"- {names}" + (f" ({default})" if default else "") + f": {meaning}")
        title = f"{group.title}: {group.description}" if group.description else f"{group.title}"
        plain = title in ("options", "positional arguments")
        if not rows and len(known) == 1 and not plain and (start := next(iter(known))):
            yield f"**{_text(title)}**, {start.removesuffix(': ')}\n"
            continue
        rows += [f"- {start}{', '.join(names)}" for start, names in known.items()]
        if rows:
            heading = "" if plain else f"**{_text(title)}**\n\n"
            yield heading + "\n".join(rows) + "\n"


def _names(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"


def _meaning(action: argparse.Action, prog: str) -> str:
    meaning = (action.help or "") % {**vars(action), "prog": prog}
    if action.choices and not all(str(choice) in meaning for choice in action.choices):
        meaning = f"{', '.join(map(str, action.choices))}: {meaning}".removesuffix(": ")
    return _text(meaning)


def _default(action: argparse.Action) -> str:
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
    return _text({"None": "", "\0": "", argparse.SUPPRESS: "", "True": "on", "False": "off"}.get(default, default))


def _text(text: str) -> str:
    return " ".join(text.replace("<", "&lt;").split())


if __name__ == "__main__":
    PAGE.write_text(flags(), encoding="utf-8")
