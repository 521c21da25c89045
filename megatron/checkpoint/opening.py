"""What a folder is: the table of formats that can be loaded, and how each is opened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.agreement import on_every_rank
from megatron.checkpoint.dcp_metadata import METADATA_FILE
from megatron.checkpoint.hf import CONFIG_FILE, HuggingFaceSource
from megatron.checkpoint.legacy import LegacySource, is_legacy_tree
from megatron.checkpoint.locate import TRACKER_FILE, find_checkpoint, list_iterations
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.meta import SHARD_PATTERN, MetaSource
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import Source
from megatron.checkpoint.state_dict_source import StateDictSource, dcp_steps, open_dcp, open_torch_file
from megatron.checkpoint.validity import newest_valid, open_checked
from megatron.core.topology import Axis
from megatron.errors import CheckpointError, listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint. `open` takes the folder and the iteration asked for, None for the latest.

    `looks_like` names what `recognises` goes by, to say what was expected of a folder that is none of them.
    """

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, int | None], Source]
    looks_like: str


def format_of(path: Path) -> Format | None:
    """The first of `FORMATS` that recognises `path`."""
    return next((known for known in FORMATS if known.recognises(path)), None)


def open_source(path: Path, iteration: int | None = None) -> Source:
    """Opens `path` in its format. Raises CheckpointError that says what was found and what is expected."""
    if (known := format_of(path)) is not None:
        return known.open(path, iteration)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint or of a Hugging Face model.")
    expected = f"give {', or '.join(known.looks_like for known in FORMATS)}"
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; {expected}.")
    names = sorted(entry.name for entry in path.iterdir())
    raise CheckpointError(f"{path} holds no checkpoint (found: {listed(names, ', ') or 'nothing'}); {expected}.")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint in any format; opening it may still find it damaged."""
    return format_of(path) is not None


def open_checkpoint(path: Path, world: Axis, iteration: int | None = None) -> Source:
    """`open_source` on every rank; all raise if one cannot open it (its host does not see the folder, say)."""
    return on_every_rank(world, lambda: open_source(path, iteration))


def _is_native(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST_FILE, TRACKER_FILE)) or bool(list_iterations(path))


def _open_native(path: Path, iteration: int | None) -> NativeSource:
    """`path` is the folder of a run or that of one iteration. What is named explicitly must be valid."""
    if not (path / MANIFEST_FILE).exists():
        return newest_valid(path, {}) if iteration is None else open_checked(find_checkpoint(path, iteration))
    source = open_checked(path)
    stored = source.manifest.info.state.iteration
    if iteration not in (None, stored):
        raise CheckpointError(f"--load_iters {iteration}: {path} is iteration {stored}; give its parent folder.")
    return source


def _is_megatron_legacy(path: Path) -> bool:
    """The tracker is named alike: a folder in which this project has saved as well is this project's."""
    return not list_iterations(path) and is_legacy_tree(path)


def open_megatron_legacy(path: Path, iteration: int | None, *, rotary_halves: bool = False) -> LegacySource:
    """`rotary_halves`: queries and keys have the order of Hugging Face, whatever the tree says."""
    source = LegacySource(path, iteration, rotary_pairs=False if rotary_halves else None)
    for note in source.notes:
        logger.warning(note)
    return source


def _is_hugging_face(path: Path) -> bool:
    return (path / CONFIG_FILE).exists()


def _open_hugging_face(path: Path, iteration: int | None) -> HuggingFaceSource:
    if iteration is not None:
        raise CheckpointError(f"--load_iters {iteration}: {path} is a Hugging Face model, which has none; drop it.")
    return HuggingFaceSource(path)


def _is_meta(path: Path) -> bool:
    """Some folders hold a model twice, in Meta's files and Hugging Face's: then the latter say more."""
    hugging_face = [*path.glob("model*.safetensors*"), *path.glob("pytorch_model*.bin*")]
    return any(path.glob(SHARD_PATTERN)) and not hugging_face


def _open_meta(path: Path, iteration: int | None) -> MetaSource:
    if iteration is not None:
        raise CheckpointError(f"--load_iters {iteration}: {path} are Meta's weights, which have none; drop it.")
    return MetaSource(path)


def _is_dcp(path: Path) -> bool:
    return (path / METADATA_FILE).is_file() or bool(dcp_steps(path))


def _open_file(path: Path, iteration: int | None) -> StateDictSource:
    if iteration is not None:
        raise CheckpointError(f"--load_iters {iteration}: {path} is a file with one model; drop it.")
    return open_torch_file(path)


# The order decides where two recognise a folder.
FORMATS: tuple[Format, ...] = (
    Format(
        "megatron_legacy",
        _is_megatron_legacy,
        open_megatron_legacy,
        "a tree of Megatron-LM or Megatron-LLM (with mp_rank_XX folders)",
    ),
    Format(
        "megatron",
        _is_native,
        _open_native,
        f"a folder that a run saved to (with {TRACKER_FILE}), an iter_XXXXXXX folder (with {MANIFEST_FILE})",
    ),
    Format("meta", _is_meta, _open_meta, "Meta's weights (with consolidated.00.pth and params.json)"),
    Format("dcp", _is_dcp, open_dcp, "a tree of torch.distributed.checkpoint (with .metadata)"),
    Format("torch", Path.is_file, _open_file, "a file of torch.save with a state dictionary (beside config.json)"),
    Format(
        "hf",
        _is_hugging_face,
        _open_hugging_face,
        "a Hugging Face model (with config.json and safetensors files)",
    ),
)
