"""Where the program's own messages go: warnings and notes to stderr, from one rank of the job."""

from __future__ import annotations

import logging

from megatron.core.topology import LaunchEnvironment


def configure_logging(launch: LaunchEnvironment) -> None:
    """Notes come from rank 0 alone; every rank may still report errors, with its number."""
    handler = logging.StreamHandler()
    prefix = "" if launch.rank == 0 else f"[rank {launch.rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger = logging.getLogger("megatron")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if launch.rank == 0 else logging.ERROR)
    logger.propagate = False
