"""Command lines whose errors are one line (exit code 2) and which stay in the language of the other errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

from moe_cl.typed import ConfigError, Range, convert


def speaks() -> bool:
    """True on the one rank of a host that says what is wrong: one line a host, not one a rank."""
    return "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK"))


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that names what is wrong and where help is, in one line; sub-commands are made of it too.

    ``MARK`` stands before the line, as before every other error of the command.
    """

    MARK = "moe_cl"

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        if speaks():
            print(f"{self.MARK}: {' '.join(message.split())} ({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


def whole(least: int) -> Callable[[str], int]:
    """An ``argparse`` type: whole numbers from ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"a whole number of at least {least} is needed, found {text!r}")
        return value

    return number


def real(**ends: float) -> Callable[[str], float]:
    """An ``argparse`` type: finite numbers within ``ends`` (see ``moe_cl.typed.Range``)."""

    def number(text: str) -> float:
        try:
            return convert(Annotated[float, Range(**ends)], text, "a value")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("a value ").removeprefix("a value: ")) from None

    return number
