"""A tree as a source of weights: the shares of all ranks, seen as whole logical tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.legacy.arguments import recorded_precision
from megatron.checkpoint.legacy.inventory import Inventory, Place, take_inventory
from megatron.checkpoint.legacy.mapped import MappedFiles
from megatron.checkpoint.legacy.recording import CARRIED_ARGUMENT, MODEL_ARGUMENT
from megatron.checkpoint.legacy.tensors import TreeModel
from megatron.checkpoint.legacy.tokenizers import recorded_tokenizer
from megatron.checkpoint.legacy.tree import TOKENIZER_FILE, find_tree
from megatron.checkpoint.source import JSON, MODEL, RunState, TokenizerIdentity
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig
from megatron.model.presets import MODEL_NAMES


class LegacySource:
    """See `Source`. `true_vocab_size` says how many vocabulary rows are no padding where the tree does not.

    `rotary_pairs` overrides in which order queries and keys are taken to be: False for the first checkpoints of
    Megatron-LLM, which have the order of Hugging Face and record nothing about it. `notes` says what a user should
    know about what was read. Raises CheckpointError where files and recorded arguments disagree.
    """

    def __init__(
        self,
        path: Path,
        iteration: int | None = None,
        *,
        true_vocab_size: int | None = None,
        rotary_pairs: bool | None = None,
    ):
        self._tree = tree = find_tree(path, iteration)
        self.path = tree.folder
        inventory = take_inventory(tree)
        self._recorded, padded = inventory.recorded[0, 0], inventory.padded_vocab_size
        vocab_size, notes = _true_vocab_size(self.path, self._recorded.args, true_vocab_size, padded)
        self._optimizer = inventory.optimizer
        self.notes = (*notes, *_optimizer_notes(self.path, inventory))
        self._model = self._recorded.model_config(inventory.keys, vocab_size, num_token_types=inventory.num_token_types)
        conventions = self._recorded.conventions(self._model, rotary_pairs=rotary_pairs)
        _check_tensor_ranks(self.path, self._model, tree.tp)
        self._places = inventory.places(TreeModel(self._model, conventions, tree.tp, padded))
        inventory.check_same_model(self._model)
        self._files = MappedFiles(tree, with_optimizer=self._optimizer is not None)

    def names(self) -> Sequence[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        place = self._places[name]
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        if place.stored.cut == "columns":
            return self._read_columns(place, *slices)
        rows = torch.arange(slices[0].start, slices[0].stop)
        rows = rows if place.part.rows is None else place.part.rows[rows]
        result = self._read_rows(place, rows, slices[1:])
        self._check_copies(place, rows, slices[1:], result)
        return result

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        name = getattr(self._recorded.args, "model_name", None)
        return name if name in MODEL_NAMES else None

    def tokenizer(self) -> TokenizerIdentity | None:
        """The SentencePiece model that converters leave beside the tree, else the one that training used."""
        beside = self.path.parent / TOKENIZER_FILE
        recorded = self._tokenizer()
        path = str(beside) if beside.is_file() else recorded.get("tokenizer_model")
        if not isinstance(path, str) or not Path(path).exists():
            return None
        return TokenizerIdentity(str(recorded.get("tokenizer_type", "SentencePieceTokenizer")), path)

    def state(self) -> RunState | None:
        """None for a release. Samples are counted alike; the order they are drawn in is this project's own, so that
        the seed means nothing here.
        """
        args = self._recorded.args
        config = dict(getattr(args, CARRIED_ARGUMENT, None) or {})
        if tokenizer := self._tokenizer():
            config["tokenizer"] = tokenizer
        if self._tree.iteration is None:
            return RunState(iteration=0, config=config) if config else None
        if training := recorded_precision(args):
            config["training"] = training
        consumed, found = getattr(args, "consumed_train_samples", 0), self._optimizer
        return RunState(
            iteration=self._tree.iteration,
            consumed_samples=consumed if isinstance(consumed, int) else 0,
            optimizer={} if found is None else {"name": found.optimizer, "num_steps": found.num_steps},
            scheduler={"iteration": self._tree.iteration},
            config=config,
        )

    def _tokenizer(self) -> Mapping[str, JSON]:
        """Nothing for a tree of this project's that no run was trained for: its tokenizer is what its files say."""
        args = self._recorded.args
        if hasattr(args, MODEL_ARGUMENT) and not hasattr(args, "new_tokens"):
            return {}
        return recorded_tokenizer(args, self.path.parent / TOKENIZER_FILE)

    def _read_rows(self, place: Place, rows: Tensor, columns: tuple[slice, ...]) -> Tensor:
        """`rows`: where the wanted rows lie, counted over the tensors of all ranks."""
        share = place.stored.local_shape(self._tree.tp)[0]
        result: Tensor | None = None
        for rank in (rows // share).unique().tolist():
            here = (rows // share == rank).nonzero().squeeze(1)
            held = self._tensor(place, rank)[(slice(None), *columns)]
            if result is None:
                result = torch.empty((len(rows), *held.shape[1:]), dtype=held.dtype)
            result[here] = held.index_select(0, rows[here] - rank * share)
        assert result is not None
        return result

    def _check_copies(self, place: Place, rows: Tensor, columns: tuple[slice, ...], read: Tensor) -> None:
        """Raises CheckpointError if a tensor that several ranks hold has other values on one of them."""
        if place.copy is not None:
            ranks = rows // place.stored.local_shape(self._tree.tp)[0]
            for rank in ranks.unique().tolist():
                held = self._read_rows(place.copy, rows[ranks == rank], columns)
                if not _is_same(held, read[ranks == rank]):
                    raise self._different(place.copy, rank, place, rank)
        # Of the optimizer's averages only those are of use that belong to the weights which are read.
        if place.stored.cut == "copies" and place.kind == MODEL:
            for rank in range(1, self._tree.tp):
                held = self._tensor(place, rank)[(slice(None), *columns)]
                if not _is_same(held.index_select(0, rows), read):
                    raise self._different(place, rank, place, 0)

    def _different(self, copy: Place, copy_rank: int, place: Place, rank: int) -> CheckpointError:
        other, one = (
            self._tree.files[at.pipeline_rank, number].parent.name for at, number in ((copy, copy_rank), (place, rank))
        )
        return CheckpointError(
            f"{self.path}: {copy.key} in {other} differs from {place.key} in {one}, though it is a copy; "
            "they are of different checkpoints, or the run let them drift apart. Copy the whole folder again."
        )

    def _read_columns(self, place: Place, rows: slice, columns: slice) -> Tensor:
        share = place.stored.local_shape(self._tree.tp)[-1]
        pieces = []
        for rank in range(columns.start // share, -(-columns.stop // share)):
            first, end = (min(max(edge - rank * share, 0), share) for edge in (columns.start, columns.stop))
            pieces.append(self._tensor(place, rank)[rows, first:end])
        return torch.cat(pieces, dim=1)

    def _tensor(self, place: Place, tensor_rank: int) -> Tensor:
        return self._files.tensor((place.pipeline_rank, tensor_rank), place.chunk, place.kind, place.key)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """A value that is no number is the same as another one."""
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _true_vocab_size(path: Path, args: object, given: int | None, padded: int) -> tuple[int, tuple[str, ...]]:
    recorded = getattr(args, "vocab_size", None)
    size = given if given is not None else recorded if isinstance(recorded, int) else None
    if size is None:
        return padded, (
            f"{path} does not record how many of its {padded} vocabulary rows are padding: all are kept; "
            "--true_vocab_size drops the padding.",
        )
    if not 1 <= size <= padded:
        raise CheckpointError(
            f"{path} has {padded} vocabulary rows, not {size}; "
            "give the number of tokens of the tokenizer that the model was trained with."
        )
    return size, ()


def _optimizer_notes(path: Path, inventory: Inventory) -> tuple[str, ...]:
    if inventory.unread is not None:
        return (f"{path}: the optimizer's state is not read ({inventory.unread}); a run starts with a fresh one",)
    if inventory.optimizer is not None:
        return (f"{path}: a run that continues draws its samples in an order of its own, after as many as were seen",)
    return ()


def _check_tensor_ranks(path: Path, model: ModelConfig, tp: int) -> None:
    for name in ("num_attention_heads_kv", "ffn_hidden_size"):
        if getattr(model, name) % tp:
            raise CheckpointError(
                f"{path}: its args have {name} {getattr(model, name)}, which cannot have been cut over {tp} tensor "
                "ranks; copy the whole folder again."
            )
