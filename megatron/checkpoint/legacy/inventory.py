"""What the files of a tree hold, compared with the model that its recorded arguments describe."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from megatron.checkpoint.legacy.arguments import Recorded
from megatron.checkpoint.legacy.keys import EMBEDDING, HEAD, HEAD_COPY, TOKEN_TYPES, num_layers
from megatron.checkpoint.legacy.optimizer import (
    DISTRIBUTED_OPTIMIZER,
    Chunks,
    UnreadableOptimizerStateError,
    check_masters,
    count_steps,
    find_optimizer_state,
)
from megatron.checkpoint.legacy.tensors import Chunk, Part, StoredTensor, TreeModel
from megatron.checkpoint.legacy.tree import DISTRIBUTED_FILE, Tree, chunks_of, read_rank
from megatron.checkpoint.source import MODEL
from megatron.errors import CheckpointError, listed
from megatron.model.config import ModelConfig

# Besides the model itself: what all files of one iteration record alike.
_COMPARED: Final = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "vocab_size",
    "padded_vocab_size",
    "rotary_interleaved",
    "consumed_train_samples",
)


@dataclass(frozen=True)
class Held:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OptimizerFacts:
    """What is the same in all files. `dtypes` of each kind of tensor, that of masters as "model"."""

    optimizer: str
    num_steps: int
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Place:
    """Where a logical tensor lies: in chunk `chunk` of all tensor ranks of a pipeline rank, under `key`.

    `copy` is another stage's tensor of the same values.
    """

    kind: str
    pipeline_rank: int
    chunk: int
    key: str
    stored: StoredTensor
    part: Part
    shape: tuple[int, ...]
    dtype: torch.dtype
    copy: Place | None = None


@dataclass(frozen=True)
class Inventory:
    """`held` are the tensors by key in each chunk of each (pipeline rank, tensor rank), `recorded` its arguments.

    `optimizer` is None where the files have no such state, or one that cannot be read; `unread` says why.
    """

    tree: Tree
    recorded: Mapping[tuple[int, int], Recorded]
    held: Mapping[tuple[int, int], list[Mapping[str, Held]]]
    optimizer: OptimizerFacts | None
    unread: str | None

    @property
    def padded_vocab_size(self) -> int:
        return self.held[0, 0][0][EMBEDDING].shape[0] * self.tree.tp

    @property
    def num_token_types(self) -> int:
        """0 without such a tensor."""
        held = self.held[0, 0][0].get(TOKEN_TYPES)
        return 0 if held is None else held.shape[0]

    @property
    def keys(self) -> set[str]:
        return {key for chunks in self.held.values() for chunk in chunks for key in chunk}

    def chunks(self) -> dict[tuple[int, int], Chunk]:
        """(pipeline rank, chunk) -> its layers: chunk 0 of every rank comes before chunk 1 of the first."""
        order = [(p, number) for number in range(len(self.held[0, 0])) for p in range(self.tree.pp)]
        chunks, layer = {}, 0
        for p, number in order:
            count = num_layers(self.held[p, 0][number])
            is_first, is_last = (p, number) == order[0], (p, number) == order[-1]
            chunks[p, number] = Chunk(range(layer, layer + count), is_first, is_last)
            layer += count
        return chunks

    def check_same_model(self, model: ModelConfig) -> None:
        """`model` is that of the first file. Raises CheckpointError if another's arguments describe another one."""
        keys, first = self.keys, self.recorded[0, 0]
        for rank, recorded in self.recorded.items():
            own = recorded.model_config(keys, model.vocab_size, num_token_types=self.num_token_types)
            pairs = {
                "checkpoint_version": (recorded.version, first.version),
                **{name: (getattr(recorded.args, name, None), getattr(first.args, name, None)) for name in _COMPARED},
                **{field.name: (getattr(own, field.name), getattr(model, field.name)) for field in fields(model)},
            }
            if different := [f"{name} {own!r}, not {other!r}" for name, (own, other) in pairs.items() if own != other]:
                raise _mixed(self.tree, self.tree.files[rank], different)

    def places(self, stored_as: TreeModel) -> dict[str, Place]:
        """Entry -> its place, the optimizer's included.

        Raises CheckpointError listing what is missing, unknown or of another shape.
        """
        places, problems, chunks = {}, [], self.chunks()
        num_held = sum(len(chunk.layers) for chunk in chunks.values())
        if num_held != stored_as.model.num_layers:
            problems.append(f"there are {num_held} layers, not {stored_as.model.num_layers}")
            chunks = {}
        for (pipeline_rank, number), chunk in chunks.items():
            expected = {stored.key: stored for stored in stored_as.tensors(chunk)}
            differences = list(self._differences(pipeline_rank, number, expected))
            problems += differences
            for stored in expected.values() if not differences else ():
                for place in self._placed(pipeline_rank, number, stored, stored_as.model):
                    entry = f"{place.kind}.{place.part.name}"
                    if not place.part.is_copy:
                        places[entry] = place
                    elif place.kind == MODEL:
                        # The chunks are in the order of the model, so that the copy comes after the embedding.
                        places[entry] = dataclasses.replace(places[entry], copy=place)
        if problems:
            raise CheckpointError(
                f"{self.tree.folder} does not hold the model that its args describe: "
                f"{listed(problems)}. Copy the whole folder again."
            )
        return places

    def _placed(self, pipeline_rank: int, number: int, stored: StoredTensor, model: ModelConfig) -> Iterator[Place]:
        held = self.held[pipeline_rank, 0][number]
        key = stored.key if stored.key in held else HEAD
        for part in stored.parts:
            shape = _logical_shape(stored, part, model)
            own = {MODEL: held[key].dtype}
            for kind, dtype in {**own, **(self.optimizer.dtypes if self.optimizer else {})}.items():
                yield Place(kind, pipeline_rank, number, key, stored, part, shape, dtype)

    def _differences(self, pipeline_rank: int, number: int, expected: Mapping[str, StoredTensor]) -> Iterator[str]:
        first = self.held[pipeline_rank, 0][number]
        for tensor_rank in range(self.tree.tp):
            where = self.tree.files[pipeline_rank, tensor_rank].parent.name
            held = self.held[pipeline_rank, tensor_rank][number]
            if HEAD_COPY in expected and HEAD_COPY not in held and HEAD in held:
                # Later versions of Megatron-LM name the last stage's copy of a tied embedding like a head of its own.
                held = {HEAD_COPY if key == HEAD else key: tensor for key, tensor in held.items()}
            yield from (f"{key} is missing in {where}" for key in expected if key not in held)
            yield from (f"{key} in {where} has no place in the model" for key in held if key not in expected)
            for key, stored in expected.items():
                shape = stored.local_shape(self.tree.tp)
                if key in held and held[key].shape != shape:
                    yield f"{key} has shape {list(held[key].shape)} in {where}, not {list(shape)}"
                if key in held and key in first and held[key].dtype != first[key].dtype:
                    yield f"{key} is {held[key].dtype} in {where}, not {first[key].dtype}"


def take_inventory(tree: Tree) -> Inventory:
    """Reads what every file holds, but no tensor. Raises CheckpointError where files do not belong together."""
    held: dict[tuple[int, int], list[Mapping[str, Held]]] = {}
    optimizers: list[OptimizerFacts | None] = []
    recorded: dict[tuple[int, int], Recorded] = {}
    iteration, unread = None, None
    for rank, file in sorted(tree.files.items()):
        state = read_rank(file)
        recorded[rank] = _recorded(state, file)
        if len(recorded) == 1:
            tree.check_complete(recorded[rank].tp, recorded[rank].pp)
            iteration = state.get("iteration")
        elif state.get("iteration") != iteration:
            raise _mixed(tree, file, [f"iteration {state.get('iteration')!r}, not {iteration!r}"])
        chunks = chunks_of(state)
        held[rank] = [{key: Held(tuple(t.shape), t.dtype) for key, t in chunk.items()} for chunk in chunks]
        if len(held[rank]) != len(held[0, 0]):
            raise CheckpointError(
                f"{file} holds {len(held[rank])} model chunks, and {tree.files[0, 0]} {len(held[0, 0])}; "
                "they are of different runs: copy the whole folder again."
            )
        try:
            optimizers.append(_optimizer_facts(state, chunks) if tree.iteration is not None else None)
        except UnreadableOptimizerStateError as error:
            unread = unread or f"{file.parent.name}: {error}"
    if tree.iteration is not None and any(file.name == DISTRIBUTED_FILE for file in tree.files.values()):
        unread = DISTRIBUTED_OPTIMIZER
    if unread is None and any(facts != optimizers[0] for facts in optimizers):
        unread = "the files are of different optimizers or steps"
    inventory = Inventory(tree, recorded, held, optimizers[0] if unread is None else None, unread)
    _check_vocabulary(inventory)
    return inventory


def _optimizer_facts(state: Mapping[str, Any], chunks: Chunks) -> OptimizerFacts | None:
    found = find_optimizer_state(state, chunks)
    if found is None:
        return None
    check_masters(found, chunks)
    return OptimizerFacts(found.optimizer, count_steps(state), found.dtypes)


def _recorded(state: Mapping[str, Any], file: Path) -> Recorded:
    args, version = state.get("args"), state.get("checkpoint_version", 0)
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{file} records no args, so that its model is unknown; use a tree that does.")
    if not isinstance(version, int | float):
        raise CheckpointError(f"{file} has checkpoint_version {version!r}, which is no number; copy it again.")
    return Recorded(args, version, file)


def _mixed(tree: Tree, file: Path, differences: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{file} is not of the same checkpoint as {tree.files[0, 0]}: it has {listed(differences)}. "
        "Copy the whole folder again."
    )


def _check_vocabulary(inventory: Inventory) -> None:
    first, file = inventory.held[0, 0][0], inventory.tree.files[0, 0]
    if EMBEDDING not in first or len(first[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{file} holds no {EMBEDDING}, which the first stage of a language model has.")
    recorded = getattr(inventory.recorded[0, 0].args, "padded_vocab_size", None)
    if recorded not in (None, inventory.padded_vocab_size):
        raise CheckpointError(
            f"{file}: its args have padded_vocab_size {recorded}, and {EMBEDDING} has {inventory.padded_vocab_size} "
            f"rows on {inventory.tree.tp} tensor ranks; copy the whole folder again."
        )


def _logical_shape(stored: StoredTensor, part: Part, model: ModelConfig) -> tuple[int, ...]:
    if part.rows is not None:
        return (len(part.rows), *stored.shape[1:])
    if part.name in ("embedding.word.weight", "head.weight", "head.bias"):
        return (model.vocab_size, *stored.shape[1:])
    return stored.shape
