"""Text columns of parquet files, a batch of rows at a time. The one place that imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Consecutive rows: `columns` holds for every key its texts. Rows count from 1.

    None stands where the file has no text: no value, or bytes that are not UTF-8.
    """

    first_row: int
    columns: tuple[list[str | None], ...]
    num_bytes: int


def read_rows(path: Path, keys: Sequence[str], *, skip_rows: int, max_rows: int, max_bytes: int) -> Iterator[Rows]:
    """The rows after the first `skip_rows`. A batch has at most `max_rows` and, estimated, `max_bytes` of text."""
    with _explained(path), _open(path) as file:
        _check_columns(path, file.schema_arrow, keys)
        batch_rows = max(1, min(max_rows, max_bytes * file.metadata.num_rows // (1 + _column_bytes(file, keys))))
        row = 0
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(keys)):
            first, row = row, row + batch.num_rows
            if row <= skip_rows:
                continue
            batch = batch.slice(max(0, skip_rows - first))
            first = max(first, skip_rows)
            columns = tuple(_texts(batch.column(key)) for key in keys)
            yield Rows(first + 1, columns, batch.nbytes)


def _texts(column: pyarrow.Array) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # writers need not check their strings
        return [_text(value) for value in column]


def _text(value: pyarrow.Scalar) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def count_rows(path: Path) -> int:
    with _explained(path), _open(path) as file:
        return file.metadata.num_rows


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs the package pyarrow; run `pip install pyarrow`.") from error
    # Column chunks are streamed: one can be as large as the file.
    return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:  # pyarrow's own, which are subclasses of ValueError, OSError, KeyError ...
        if not type(error).__module__.startswith("pyarrow") and not isinstance(error, OSError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as parquet ({reason}); copy the file again from its source."
        ) from error


def _check_columns(path: Path, schema: pyarrow.Schema, keys: Sequence[str]) -> None:
    import pyarrow

    for key in keys:
        if key not in schema.names:
            raise DataError(
                f"{path}: no column {key!r}, the file has {', '.join(map(repr, schema.names))}; name the columns that "
                "hold text with --json_keys."
            )
        if (count := schema.names.count(key)) > 1:
            raise DataError(
                f"{path}: {count} columns {key!r}; give each a name of its own, and the one that holds text with "
                "--json_keys."
            )
        kind = schema.field(key).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise DataError(f"{path}: column {key!r} holds {kind}, not text; --json_keys names text only.")


def _column_bytes(file: pyarrow.parquet.ParquetFile, keys: Sequence[str]) -> int:
    """Uncompressed size of the columns, by the file's own account."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in keys)
