"""The command line: parsing, flags generated from dataclass fields, and how a command ends."""

from megatron.cli.entry import run_and_leave, run_main, warn
from megatron.cli.parser import ArgumentParser

__all__ = ["ArgumentParser", "run_and_leave", "run_main", "warn"]
