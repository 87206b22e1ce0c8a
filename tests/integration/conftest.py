"""The fixture that starts real commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.commands import Commands


@pytest.fixture(scope="session")
def command() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()
