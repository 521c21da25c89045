"""A checkpoint for the reader: what it is, how it lies in files, and a tree of its tensors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from megatron.checkpoint.container import DTYPE_NAMES
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import MODEL, RunState, Source

# Where files that a checkpoint carries along lie in its configuration: too long to be shown.
_MAX_VALUE_CHARACTERS = 60


def overview(source: Source) -> Group:
    """Everything there is to see of any source; a checkpoint of this project also shows its files."""
    parts: list[RenderableType] = [_summary(source), _heading("model configuration"), _model_table(source)]
    state = source.state()
    if state is not None and state.config:
        parts += [_heading("configuration of the run"), _run_table(state)]
    if isinstance(source, NativeSource):
        parts += [_heading("files"), _file_table(source.manifest)]
    return Group(*parts, _heading("tensors"), tensor_tree(source))


def tensor_tree(source: Source) -> Tree:
    """All entries by the parts of their names; what looks alike (the layers, mostly) is one branch."""
    nested: dict[str, object] = {}
    for name in source.names():
        level = nested
        *path, last = name.split(".")
        for part in path:
            level = level.setdefault(part, {})  # type: ignore[assignment]
        level[last] = f"{list(source.shape(name))} {DTYPE_NAMES[source.dtype(name)]}"
    tree = Tree("", hide_root=True)
    _grow(tree, nested)
    return tree


def format_bytes(num_bytes: int) -> str:
    """In decimal units, as the progress bars count."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{num_bytes} B"
        size /= 1000
    return f"{size:.3g} TB"


def _summary(source: Source) -> Table:
    table = _plain_table()
    state, tokenizer = source.state(), source.tokenizer()
    sizes: dict[str, list[int]] = {}
    for name in source.names():
        kind = MODEL if name.startswith(f"{MODEL}.") else ".".join(name.split(".")[:2])
        count = math.prod(source.shape(name))
        held = sizes.setdefault(kind, [0, 0, 0])
        held[:] = held[0] + 1, held[1] + count, held[2] + count * source.dtype(name).itemsize
    table.add_row("path", str(source.path))
    table.add_row("model", source.model_name() or "not recorded")
    if state is None:
        table.add_row("state of a run", "none: weights only")
    else:
        table.add_row("iteration", str(state.iteration))
        table.add_row("consumed samples", str(state.consumed_samples))
        table.add_row("seed", str(state.seed))
        for name in ("optimizer", "scheduler", "data"):
            table.add_row(name, _short(getattr(state, name)))
    if tokenizer is None:
        table.add_row("tokenizer", "not recorded")
    else:
        table.add_row("tokenizer", f"{tokenizer.tokenizer_type} {tokenizer.tokenizer_model}".rstrip())
        table.add_row("tokenizer SHA-256", tokenizer.sha256 or "not recorded")
    for kind, (num_tensors, num_elements, num_bytes) in sizes.items():
        table.add_row(kind, f"{num_tensors} tensors, {num_elements:,} elements, {format_bytes(num_bytes)}")
    return table


def _model_table(source: Source) -> Table:
    table = _plain_table()
    for name, value in dataclasses.asdict(source.model_config()).items():
        table.add_row(name, _short(value))
    return table


def _run_table(state: RunState) -> Table:
    """What the run that saved was told; only values, because a whole file that travels along is not to be read here."""
    table = _plain_table()
    for owner, fields in state.config.items():
        if owner == "model" or not isinstance(fields, Mapping):
            continue
        for name, value in fields.items():
            if value is not None:
                table.add_row(f"{owner}.{name}", _short(value))
    return table


def _file_table(manifest: Manifest) -> Table:
    pieces: dict[str, list[tuple[str, bool]]] = {name: [] for name in manifest.files}
    for name, entry in manifest.entries.items():
        for piece in entry.pieces:
            pieces[piece.file].append((name, piece.rectangle.size != entry.shape))
    table = Table(box=None, header_style="bold")
    for heading in ("file", "size", "tensors", "of them parts", "layers", "checksums"):
        table.add_column(heading, justify="left" if heading in ("file", "layers") else "right", overflow="fold")
    for name, record in sorted(manifest.files.items()):
        held = pieces[name]
        layers = {int(found[1]) for entry, _ in held if (found := re.search(r"\blayers\.(\d+)\.", entry))}
        num_checksums = f"{sum(tiles.num_checksums for tiles in record.tiles.values()):,}"
        num_parts = str(sum(is_part for _, is_part in held))
        table.add_row(
            name, format_bytes(record.num_bytes), str(len(held)), num_parts, number_ranges(layers), num_checksums
        )
    return table


def number_ranges(numbers: Iterable[int]) -> str:
    """``0-3, 8``: ascending, consecutive ones as a range."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _grow(tree: Tree, level: Mapping[str, object]) -> None:
    for names, below in _branches(level):
        label = names[0] if len(names) == 1 else f"{{{', '.join(names)}}}"
        if names[0].isdigit():
            label = number_ranges(map(int, names))
        while isinstance(below, Mapping) and len(below) == 1:  # a name that leads to one place only
            ((name, below),) = below.items()
            label = f"{label}.{name}"
        if isinstance(below, Mapping):
            _grow(tree.add(label), below)
        else:
            tree.add(f"{label}  {below}")


def _branches(level: Mapping[str, object]) -> list[tuple[list[str], object]]:
    """What is below each name; names with the same below them come together, in the place of the first."""
    names: dict[str, list[str]] = {}
    below: dict[str, object] = {}
    for name, held in level.items():
        looks = json.dumps(held) if isinstance(held, Mapping) else name
        names.setdefault(looks, []).append(name)
        below[looks] = held
    return [(names[looks], held) for looks, held in below.items()]


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _plain_table() -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}={_short(held)}" for key, held in value.items()) or "-"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = " ".join(map(_short, value))
    text = str(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 3] + "..."
