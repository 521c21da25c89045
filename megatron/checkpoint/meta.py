"""Meta's folders (consolidated.00.pth, ..., params.json), read as a source of weights.

The shards are those of a tensor-parallel run: each matrix is cut along the dimension that its layer was, norms are
held by all. They are merged as slices are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from megatron.checkpoint.foreign_names import is_repeated
from megatron.checkpoint.meta_names import EMBEDDING, HEAD, IGNORED, MetaTensors
from megatron.checkpoint.meta_params import PARAMS_FILE, model_config_from_params, read_params
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.plan import Rectangle, parts_of
from megatron.checkpoint.source import MODEL, RunState, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import first_identity
from megatron.checkpoint.torch_files import TorchFile
from megatron.errors import CheckpointError, listed
from megatron.model.config import ModelConfig

SHARD_PATTERN: Final = "consolidated.*.pth"

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_CUT_ROWS = re.compile(r"(attention\.w[qkv]|feed_forward\.w[13]|^output)\.weight$")
_CUT_COLUMNS = re.compile(r"(attention\.wo|feed_forward\.w2)\.weight$")


class MetaSource:
    """See `Source`. `family` ("llama2") says what params.json leaves open, see `model_config_from_params`.

    Raises CheckpointError where params.json and the shards disagree, or a shard is missing.
    """

    def __init__(self, path: Path, *, family: str | None = None):
        self.path = path
        params = read_params(path / PARAMS_FILE)
        shards = MetaShards(path, params.get("dim"))
        self._model = model_config_from_params(
            params,
            path / PARAMS_FILE,
            vocab_size=shards.shape(EMBEDDING)[0],
            tied=HEAD not in shards.names() or is_repeated(shards, EMBEDDING, HEAD),
            family=family,
        )
        if self._model.tie_embed_logits:
            shards.drop(HEAD)
        self._tensors = MetaTensors(shards, self._model, logical_shapes(self._model), PARAMS_FILE)
        self._family = family

    def names(self) -> Sequence[str]:
        return [f"{MODEL}.{name}" for name in self._tensors.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name.removeprefix(f"{MODEL}."))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name.removeprefix(f"{MODEL}."))

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._tensors.read(name.removeprefix(f"{MODEL}."), start, size)

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        """The family the source was opened as: the format does not record it."""
        return self._family

    def tokenizer(self) -> TokenizerIdentity | None:
        """The tokenizer beside the weights or, as in Meta's downloads, in the folder above."""
        return first_identity((self.path, self.path.absolute().parent))

    def state(self) -> RunState | None:
        return None


class MetaShards:
    """The tensors of consolidated.*.pth merged; see `NamedTensors`. `hidden_size` tells how embeddings were cut."""

    def __init__(self, path: Path, hidden_size: object):
        self.path = path
        self._shards = [TorchFile(file) for file in _shard_files(path)]
        names = [set(shard.names()) - IGNORED for shard in self._shards]
        for shard, held in zip(self._shards, names, strict=True):
            if differing := held ^ names[0]:
                raise CheckpointError(
                    f"{shard.path} and {self._shards[0].path.name} do not hold the same tensors: "
                    f"{listed(sorted(differing))} is in one of them only. Download the folder again."
                )
        if EMBEDDING not in names[0] or len(self._shards[0].shape(EMBEDDING)) != 2:
            raise CheckpointError(f"{self._shards[0].path} has no matrix {EMBEDDING}; give the files of a Llama model.")
        self._pieces = {
            name: self._placed(name, hidden_size) for name in self._shards[0].names() if name not in IGNORED
        }

    def drop(self, name: str) -> None:
        """Leaves `name` out: a head that is the embedding is stored twice."""
        self._pieces.pop(name, None)

    def names(self) -> Sequence[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        last = self._pieces[name][-1]
        return tuple(a + n for a, n in zip(last.start, last.size, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[0].dtype(name)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        wanted = Rectangle(tuple(start), tuple(size))
        pieces = self._pieces[name]
        out = torch.empty(wanted.size, dtype=self.dtype(name))
        for part in parts_of(wanted, pieces):
            inner = tuple(s.start for s in part.rectangle.slices_in(pieces[part.piece]))
            read = self._shards[part.piece].read(name, inner, part.rectangle.size)
            out[part.rectangle.slices_in(wanted)] = read
        return out

    def _placed(self, name: str, hidden_size: object) -> list[Rectangle]:
        """Where each shard's piece lies in the whole tensor: one piece where all shards hold the same."""
        shapes = [shard.shape(name) for shard in self._shards]
        dtypes = {shard.dtype(name) for shard in self._shards}
        if len(set(shapes)) > 1 or len(dtypes) > 1:
            raise CheckpointError(
                f"{self.path}: {name} differs between the shards (shapes {listed(map(str, map(list, shapes)))}); "
                "they are not of one model: download the folder again."
            )
        dim = self._cut_dimension(name, shapes[0], hidden_size)
        if dim is None:
            self._check_equal(name)
            return [Rectangle.whole(shapes[0])]
        step = shapes[0][dim]
        starts = [tuple(number * step * (d == dim) for d in range(len(shapes[0]))) for number in range(len(shapes))]
        return [Rectangle(start, shapes[0]) for start in starts]

    def _cut_dimension(self, name: str, shape: tuple[int, ...], hidden_size: object) -> int | None:
        if len(self._shards) == 1 or len(shape) == 1:
            return None
        if _CUT_ROWS.search(name):
            return 0
        if _CUT_COLUMNS.search(name):
            return 1
        if name == EMBEDDING:
            return self._embedding_dimension(shape, hidden_size)
        raise CheckpointError(f"{self.path}: {name} is no tensor of a Llama model, so that shards cannot be merged.")

    def _embedding_dimension(self, shape: tuple[int, ...], hidden_size: object) -> int:
        """Columns up to Llama 2, rows since Llama 3: the shape tells, and the head, which is always cut by rows."""
        num_rows = self._shards[0].shape(HEAD)[0] * len(self._shards) if HEAD in self._shards[0].names() else None
        by_columns = shape[1] * len(self._shards) == hidden_size and num_rows in (None, shape[0])
        by_rows = shape[1] == hidden_size and num_rows in (None, shape[0] * len(self._shards))
        if by_columns == by_rows:
            rows = f" and {num_rows} rows" if num_rows else ""
            raise CheckpointError(
                f"{self.path}: {EMBEDDING} has shape {list(shape)} in each of {len(self._shards)} shards: cut neither "
                f"by rows nor by columns from a matrix with {hidden_size} columns (dim){rows}; a shard is missing, or "
                f"{PARAMS_FILE} is of another model."
            )
        return 0 if by_rows else 1

    def _check_equal(self, name: str) -> None:
        whole = (0,) * len(self._shards[0].shape(name)), self._shards[0].shape(name)
        for shard in self._shards[1:]:
            if not torch.equal(shard.read(name, *whole), self._shards[0].read(name, *whole)):
                raise CheckpointError(
                    f"{shard.path} holds another {name} than {self._shards[0].path.name}, though every shard has the "
                    "same one; they are not of one model: download the folder again."
                )


def _shard_files(path: Path) -> list[Path]:
    numbered = {int(m[1]): file for file in path.glob(SHARD_PATTERN) if (m := _SHARD.fullmatch(file.name))}
    if not numbered:
        raise CheckpointError(f"{path} has no {SHARD_PATTERN}; give a folder with the weights as Meta publishes them.")
    if absent := [f"consolidated.{number:02d}.pth" for number in range(max(numbered)) if number not in numbered]:
        raise CheckpointError(f"{path} lacks {listed(absent)}; download the missing files.")
    return [numbered[number] for number in sorted(numbered)]
