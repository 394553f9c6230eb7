"""Command lines whose errors are one line (exit code 2) and which stay in the language of the other errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

from moe_cl.typed import ConfigError, Range, convert

# (rank, world, local rank, local world) of torchrun and DeepSpeed, of Slurm's srun, and of Open MPI, in this order.
SOURCES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def sources() -> Iterator[tuple[str, str, str, str]]:
    """Those that may say who this process is. An interactive Slurm allocation and a batch script have Slurm's numbers
    without being tasks; only srun gives a step."""
    return (names for names in SOURCES if names[0] != "SLURM_PROCID" or "SLURM_STEP_ID" in os.environ)


def speaks() -> bool:
    """True on the one rank of a host that says what is wrong: one line a host, not one a rank."""
    for rank, world, local, _ in sources():
        if rank in os.environ and world in os.environ:
            return os.environ.get(local, os.environ[rank]) == "0"
    return True


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that names what is wrong and where help is, in one line; sub-commands are made of it too.

    ``MARK`` stands before the line, as before every other error of the command.
    """

    MARK = "moe_cl"

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        print(f"{self.MARK}: {' '.join(message.split())} ({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


class RanksParser(Parser):
    """Of a command that every rank of a job reads: one line a host."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        if not speaks():
            sys.exit(2)
        super().error(message)


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
