"""Any source -> a tree that Megatron-LLM loads: weights, and the arguments that describe them."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.commit import check_room, check_save_folder, sweep
from megatron.checkpoint.legacy.bert import bert_flags
from megatron.checkpoint.legacy.keys import nested
from megatron.checkpoint.legacy.recording import arguments_of, beyond_megatron_llm
from megatron.checkpoint.legacy.target import LegacyTreePlan
from megatron.checkpoint.legacy.tensors import Part, StoredTensor
from megatron.checkpoint.legacy.tokenizers import sentencepiece_file
from megatron.checkpoint.legacy.tree import MODEL_FILES, RELEASE, TOKENIZER_FILE, rank_name
from megatron.checkpoint.locate import STAGING_PREFIX, TRACKER_FILE, list_iterations
from megatron.checkpoint.ownership import owned
from megatron.checkpoint.source import MODEL, Source, row_chunks
from megatron.durable import sync_folder
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

_VERSION = 3.0


def write_legacy_tree(plan: LegacyTreePlan, root: Path, *, on_bytes: Callable[[int], object] = lambda _: None) -> Path:
    """Writes the planned tree as ``root/release``, or as the source's iteration if it has one; returns its folder.

    It appears whole or not at all, and the tracker moves last; a SentencePiece model is copied beside it. Memory: the
    tensors of one rank at a time, because torch.save takes them all at once. Only weights are written: what else the
    source holds, and what Megatron-LLM would not compute, is logged.
    """
    for note in _notes(plan):
        logger.warning(note)
    check_save_folder(root)
    final = root / plan.name
    _check_free(root, final)
    _check_tokenizer(plan.source, root)
    with owned(root):
        sweep(root)
        check_room(root, plan.num_bytes)
        staging = root / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
        try:
            for p in range(plan.layout.pp):
                for t in range(plan.layout.tp):
                    _write_rank(plan, staging / rank_name(p, t, plan.layout.pp), p, t, on_bytes)
            sync_folder(staging)
            staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(root)
        _carry_tokenizer(plan.source, root)
        _write_tracker(root, "release" if plan.name == RELEASE else str(int(plan.name.removeprefix("iter_"))))
    return final


def _write_rank(plan: LegacyTreePlan, folder: Path, p: int, t: int, on_bytes: Callable[[int], object]) -> None:
    folder.mkdir(parents=True)
    models = []
    for chunk in plan.chunks(p):
        tensors = {}
        for stored in plan.stored_as.tensors(chunk):
            tensors[stored.key] = _share(plan, stored, t)
            on_bytes(tensors[stored.key].nbytes)
        models.append(nested(tensors))
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    state: dict[str, Any] = {
        "args": arguments_of(
            plan.source,
            plan.layout,
            model_name=plan.model_name,
            num_chunks=plan.num_chunks,
            padded_vocab_size=plan.stored_as.padded_vocab_size,
            vocabulary_multiple=plan.vocabulary_multiple,
            dtype=plan.weights_dtype or plan.source.dtype(f"{MODEL}.embedding.word.weight"),
        ),
        "checkpoint_version": _VERSION,
        "iteration": RELEASE if plan.name == RELEASE else int(plan.name.removeprefix("iter_")),
        **dict(zip(names, models, strict=True)),
    }
    try:
        with (folder / MODEL_FILES[0]).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); nothing of it stays.") from error
    sync_folder(folder)


def _share(plan: LegacyTreePlan, stored: StoredTensor, t: int) -> Tensor:
    """What tensor rank `t` holds of a tensor."""
    share = torch.empty(stored.local_shape(plan.layout.tp), dtype=plan.dtype(stored))
    for part in stored.parts:
        if stored.cut == "rows":
            _fill_rows(plan.source, stored, part, share, t)
        else:
            start = (0,) * (share.ndim - 1) + (t * share.shape[-1] if stored.cut == "columns" else 0,)
            target = torch.arange(share.shape[0]) if part.rows is None else part.rows
            _copy(plan.source, part, start, tuple(share.shape), share, target)
    return share


def _fill_rows(source: Source, stored: StoredTensor, part: Part, share: Tensor, t: int) -> None:
    shape = source.shape(f"{MODEL}.{part.name}")
    rows = torch.arange(shape[0]) if part.rows is None else part.rows
    here = (rows // len(share) == t).nonzero().squeeze(1)
    if len(here):
        first, num_rows = int(here[0]), len(here)
        assert int(here[-1]) == first + num_rows - 1, "a rank holds neighbouring rows of each logical tensor"
        origin = (first,) + (0,) * (len(shape) - 1)
        _copy(source, part, origin, (num_rows, *shape[1:]), share, rows[here] - t * len(share))
    if part.rows is None and stored.shape[0] > shape[0]:
        # Padding repeats the last token, as Megatron-LLM's own tool does: its softmax runs over padding too.
        padding = max(0, shape[0] - t * len(share))
        last = source.read(f"{MODEL}.{part.name}", (shape[0] - 1, *(0 for _ in shape[1:])), (1, *shape[1:]))
        share[padding:] = last.to(share.dtype)


def _copy(
    source: Source, part: Part, start: tuple[int, ...], size: tuple[int, ...], share: Tensor, target: Tensor
) -> None:
    """The rectangle ``start, size`` of a logical tensor -> the rows `target` of a rank's share, some at a time."""
    row = 0
    for rows in row_chunks(source, f"{MODEL}.{part.name}", start, size):
        share[target[row : row + len(rows)]] = rows.to(share.dtype)
        row += len(rows)


def _check_free(root: Path, final: Path) -> None:
    if list_iterations(root):
        raise CheckpointError(
            f"{root} holds checkpoints of this project, whose tracker the tree would take over; "
            "write it to a folder of its own."
        )
    if final.exists():
        raise CheckpointError(f"{final} exists already; remove it, or write to another folder.")


def _check_tokenizer(source: Source, root: Path) -> None:
    """All trees of a folder are read with the one SentencePiece model beside them."""
    model, held = sentencepiece_file(source), root / TOKENIZER_FILE
    if model is not None and held.exists() and not filecmp.cmp(model, held, shallow=False):
        raise CheckpointError(
            f"{held} is not the tokenizer of {source.path}, which is {model}; write the tree to a folder of its own, "
            "or remove the file if no tree there needs it."
        )


def _notes(plan: LegacyTreePlan) -> Iterator[str]:
    if any(not name.startswith(f"{MODEL}.") for name in plan.source.names()):
        yield f"{plan.name} holds weights only: the optimizer's state in {plan.source.path} is not written"
    model = plan.stored_as.model
    if beyond := beyond_megatron_llm(model):
        yield (
            f"{plan.name} is read back here as it is, but {plan.program} itself does not compute this model: "
            f"it does not know {', '.join(beyond)}"
        )
    if model.bert_head:
        yield f"{plan.name} is a BERT of Megatron-LM, which has to be told: {bert_flags(model)}"


def _carry_tokenizer(source: Source, root: Path) -> None:
    model, target = sentencepiece_file(source), root / TOKENIZER_FILE
    if model is not None and not target.exists():
        temporary = root / f"{STAGING_PREFIX}tokenizer-{uuid.uuid4().hex}"
        shutil.copyfile(model, temporary)
        temporary.replace(target)


def _write_tracker(root: Path, text: str) -> None:
    temporary = root / f"{STAGING_PREFIX}tracker-{uuid.uuid4().hex}"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / TRACKER_FILE)
    sync_folder(root)
