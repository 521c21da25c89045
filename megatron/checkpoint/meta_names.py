"""The tensors of a Llama under the names that Meta gave them, which torchtitan kept.

Meta's rotary positions turn neighbouring features (2j, 2j + 1) of a head; this project and Hugging Face turn (j, j +
d/2). So the rows of the query and key matrices are stored in another order, and `MetaTensors` reads them in ours: row
j + t * d/2 of a head is stored as row 2j + t.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from megatron.checkpoint.named_tensors import NamedTensors, check_holds
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

EMBEDDING: Final = "tok_embeddings.weight"
HEAD: Final = "output.weight"
# A table of frequencies that old files carry; the configuration determines it.
IGNORED: Final = frozenset({"rope.freqs", "freqs_cis"})

_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "embedding.word.weight": EMBEDDING,
        "layers.{i}.attention_norm.weight": "layers.{i}.attention_norm.weight",
        "layers.{i}.attention.q.weight": "layers.{i}.attention.wq.weight",
        "layers.{i}.attention.k.weight": "layers.{i}.attention.wk.weight",
        "layers.{i}.attention.v.weight": "layers.{i}.attention.wv.weight",
        "layers.{i}.attention.output.weight": "layers.{i}.attention.wo.weight",
        "layers.{i}.mlp_norm.weight": "layers.{i}.ffn_norm.weight",
        "layers.{i}.mlp.gate.weight": "layers.{i}.feed_forward.w1.weight",
        "layers.{i}.mlp.up.weight": "layers.{i}.feed_forward.w3.weight",
        "layers.{i}.mlp.down.weight": "layers.{i}.feed_forward.w2.weight",
        "final_norm.weight": "norm.weight",
        "head.weight": HEAD,
    }
)
_LAYER = re.compile(r"^layers\.(\d+)\.")
_ROTATED = re.compile(r"attention\.([qk])\.weight$")


def meta_name(native_name: str) -> str:
    """``layers.3.mlp.up.weight`` -> ``layers.3.feed_forward.w3.weight``. Raises CheckpointError if there is none."""
    layer = _LAYER.match(native_name)
    pattern = _LAYER.sub("layers.{i}.", native_name)
    if pattern not in _NAMES:
        raise CheckpointError(
            f"{native_name} has no name in Meta's format, which holds Llamas only; use a Hugging Face folder."
        )
    return _NAMES[pattern].format(i=layer[1] if layer else "")


class MetaTensors:
    """A model's logical tensors, by native name, read from `stored`, which has them under Meta's names.

    `shapes` are those of all logical tensors of `model`. Raises CheckpointError, naming `described_by`, if `stored`
    does not hold exactly these.
    """

    def __init__(
        self, stored: NamedTensors, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], described_by: str
    ):
        self.path = stored.path
        self._stored, self._head_dim = stored, model.kv_channels
        self._names = {native: meta_name(native) for native in shapes}
        check_holds(stored, {self._names[native]: shape for native, shape in shapes.items()}, described_by)

    def names(self) -> Sequence[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._names[name])

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        if not _ROTATED.search(name):
            return self._stored.read(self._names[name], start, size)
        # Whole heads are read, since neighbouring rows of one order are half a head apart in the other.
        first = start[0] // self._head_dim * self._head_dim
        end = -(-(start[0] + size[0]) // self._head_dim) * self._head_dim
        heads = self._stored.read(self._names[name], (first, *start[1:]), (end - first, *size[1:]))
        halves = heads.unflatten(0, (-1, self._head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return halves[start[0] - first : start[0] - first + size[0]].contiguous()
