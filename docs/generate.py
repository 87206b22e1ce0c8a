"""Write the pages that follow from the code: flags.md from the parsers, robustness.md from the names of tests.

python -m docs.generate             write both pages
python -m docs.generate --check     write nothing; exit code 1 where a page differs from what would be written
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("train.py", "test.py", "predict.py", "reproduce.py"),
    *("dataset.check", "dataset.phantom", "dataset.medmnist"),
    *("CLIP.download", "engine.features", "engine.checkpoint"),
)
# Tests that start real commands with hostile input, or damage what they read and write.
ATTACKS = (
    *("integration/test_attacks*.py", "integration/test_bad_input.py", "integration/test_resume.py"),
    *("integration/test_secrets.py", "integration/test_download.py", "unit/test_fuzz.py"),
)
FLAGS_HEAD = """# Every flag

Written by `python -m docs.generate` from the parsers; a test checks that it is up to date. `--help` shows the same.
The published flags keep their names and, unless [method.md](method.md) or [reproduce.md](reproduce.md) says otherwise,
their published defaults.
"""
ROBUSTNESS_HEAD = """# Faulty and hostile input that is tested

Written by `python -m docs.generate` from the names and docstrings of the tests; a test checks that it is up to date.
Each line is a test, and most of them start the real commands. *Refused* means one line that names the file or flag and
says what to do, and exit code 2.
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
    """The text of flags.md: a section for each command, a table for each group of flags."""
    lines = [FLAGS_HEAD]
    for command in COMMANDS:
        start = f"python {command}" if command.endswith(".py") else f"python -m {command}"
        lines += [f"## {start}\n", *_sections(parser_of(command))]
    return "\n".join(lines)


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    if parser.description:
        yield f"{_cell(parser.description)}\n"
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        rows = [_row(action, parser.prog) for action in shown if not isinstance(action, argparse._SubParsersAction)]
        if rows:
            title = f"{group.title}: {group.description}" if group.description else f"{group.title}"
            yield f"**{_cell(title)}**\n\n| flag | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        for action in shown:
            for name, part in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
                yield f"### {name}\n"
                yield from _sections(part)


def _row(action: argparse.Action, prog: str) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    meaning = (action.help or "") % {**vars(action), "prog": prog}
    if action.choices and not all(str(choice) in meaning for choice in action.choices):
        meaning = f"{', '.join(map(str, action.choices))}: {meaning}".removesuffix(": ")
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
    default = {"None": "", "\0": "", argparse.SUPPRESS: "", "True": "on", "False": "off"}.get(default, default)
    return f"| {names} | {_cell(default)} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def robustness() -> str:
    """The text of robustness.md: a section for each file of tests, a line for each test."""
    lines = [ROBUSTNESS_HEAD]
    for path in (path for pattern in ATTACKS for path in sorted((ROOT / "tests").glob(pattern))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines.append(f"## {_sentence(ast.get_docstring(tree) or path.stem)}\n\n`{path.relative_to(ROOT)}`\n")
        tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        for node in sorted(tests, key=lambda node: node.lineno):
            texts = node.name.removeprefix("test_").replace("_", " "), ast.get_docstring(node)
            lines.append(f"- {': '.join(map(_sentence, filter(None, texts)))}")
        lines.append("")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    first = " ".join(text.split("\n\n", maxsplit=1)[0].split()).rstrip(".:")
    return _cell(first[:1].upper() + first[1:])


def main() -> int:
    """Write or compare the pages."""
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__, formatter_class=raw)
    options.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    check = options.parse_args().check
    pages = {ROOT / "docs" / "flags.md": flags(), ROOT / "docs" / "robustness.md": robustness()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path.name}")
        if not check:
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
