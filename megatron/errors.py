"""The errors a user can cause. Each message states the value, the reason and the remedy."""

from collections.abc import Iterable


def listed(items: Iterable[str], separator: str = "; ", most: int = 8) -> str:
    """The first of many things for a message, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


class MegatronError(Exception):
    """Base of every error that ends a command with one line instead of a traceback.

    The entry points print ``<TypeName>: <message>`` and exit with `EXIT_STATUS`. An error that all
    ranks raise alike is printed by local rank 0 alone; one that only some rank can see (its own
    shard is damaged, its own disk is full) is raised with ``this_rank_only=True`` and printed by
    that rank with its number.
    """

    EXIT_STATUS = 2

    def __init__(self, message: str, *, this_rank_only: bool = False):
        super().__init__(message)
        self.this_rank_only = this_rank_only


class ConfigError(MegatronError):
    """A flag, a combination of flags, or a layout that cannot be run."""


class DataError(MegatronError):
    """Input text or a tokenized dataset that is missing, damaged, or does not fit the model."""


class TokenizerError(MegatronError):
    """A tokenizer that cannot be loaded, or whose vocabulary does not fit the model."""


class CheckpointError(MegatronError):
    """A checkpoint that is missing, damaged, of another architecture, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """Stored bytes that are not what was written. An older checkpoint of the run can take the place of this one."""


class TrainingError(MegatronError):
    """A run that cannot go on: a loss or gradient norm that is not finite, say."""
