"""Which keys a query attends to, and the kernels that compute attention.

Legend: s sequence, b micro-batch, n query heads, k key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

SegmentLengths: TypeAlias = tuple[tuple[int, ...], ...]
"""For each row of a batch the lengths of its segments, in their order."""


@dataclass(frozen=True)
class AttentionPattern:
    """A query sees every key that no field forbids.

    `is_causal`: none behind its own position. `window`, of causal patterns only: the last so many, its own included.
    `segment_ids`, [b, s]: those of its own segment, where tokens of different documents, and padding, have
    different numbers. `segment_lengths`, where every segment is a run of tokens: how the rows can be cut.
    """

    is_causal: bool = True
    window: int | None = None
    segment_ids: Tensor | None = None
    segment_lengths: SegmentLengths | None = None
    # Layers share the pattern, and with it the mask: a kernel keeps it for the backward pass as it is.
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _bounds: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def segment_mask(self, dtype: torch.dtype) -> Tensor:
        """[b, 1, s, s]: what to add to the scores of a pattern with segments, 0 or -inf; made once for all layers."""
        if dtype not in self._masks:
            assert self.segment_ids is not None
            ids = self.segment_ids
            is_seen = ids.unsqueeze(2) == ids.unsqueeze(1)
            position = torch.arange(ids.shape[1], device=ids.device)
            distance = position.unsqueeze(1) - position
            if self.is_causal:
                is_seen = is_seen & (distance >= 0)
            if self.window is not None:
                is_seen = is_seen & (distance < self.window)
            self._masks[dtype] = _additive(is_seen, dtype).unsqueeze(1)
        return self._masks[dtype]

    def segment_bounds(self, device: torch.device) -> Tensor:
        """int32 [segments + 1]: where they begin, and the last ends, in the rows end to end; once for all layers."""
        if device not in self._bounds:
            assert self.segment_lengths is not None
            lengths = (length for row in self.segment_lengths for length in row)
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._bounds[device] = bounds.to(device, non_blocking=True)
        return self._bounds[device]


AttentionKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionPattern, float], Tensor]
"""q: [s, b, n, d], k and v: [s, b, k, d], pattern, dropout -> [s, b, n, d], scaled by 1/sqrt(d)."""


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention: every pattern, on every device and in every precision."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if pattern.segment_lengths is not None:
        out = _each_segment_alone(q, k, v, pattern, pattern.segment_lengths, dropout)
    elif pattern.segment_ids is not None:
        out = _masked(q, *_repeat_heads(q, k, v), pattern.segment_mask(q.dtype), dropout)
    else:
        out = _one_text(q, k, v, pattern, dropout)
    return out.permute(2, 0, 1, 3)


def _each_segment_alone(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, lengths: SegmentLengths, dropout: float
) -> Tensor:
    """q: [b, n, s, d], k and v: [b, k, s, d] -> [b, n, s, d]. No mask, and no scores between segments."""
    rows = []
    for row, cuts in enumerate(lengths):
        texts = zip(*(x[row : row + 1].split(cuts, dim=2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([_one_text(q, k, v, pattern, dropout) for q, k, v in texts], dim=2))
    return torch.cat(rows)


def _one_text(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: float) -> Tensor:
    """q: [b, n, s, d], k and v: [b, k, s, d] -> [b, n, s, d], without regard to segments."""
    if pattern.window is not None and pattern.window < q.shape[2]:
        return banded_attention(q, *_repeat_heads(q, k, v), pattern.window, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=pattern.is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def flash_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: float) -> Tensor:
    """The flash-attn package (Dao 2023, arXiv 2307.08691): half precision on CUDA; segments that are runs."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    window = (-1, -1) if pattern.window is None else (pattern.window - 1, 0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = {"causal": pattern.is_causal, "window_size": window, "deterministic": deterministic}
    if pattern.segment_lengths is None:
        assert pattern.segment_ids is None, "flash-attn takes no mask"
        return flash_attn_func(q, k, v, dropout_p=dropout, **options).transpose(0, 1)
    bounds, longest = pattern.segment_bounds(q.device), max(map(max, pattern.segment_lengths))
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, dropout_p=dropout, **options)
    return out.unflatten(0, q.shape[:2]).transpose(0, 1)


_SMALLEST_BLOCK: Final = 256
_ALIGNMENT: Final = 8  # of the mask's rows and slices, which CUDA's kernel wants for 16 bytes at a time


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float, *, smallest_block: int = _SMALLEST_BLOCK
) -> Tensor:
    """q, k and v: [b, n, s, d] -> [b, n, s, d]; each query sees the last `window` keys.

    Blocks of queries take the keys that they can reach, so that time and memory grow with s * window, not s * s.
    """
    length, reach = q.shape[2], -(-window // _ALIGNMENT) * _ALIGNMENT
    size = max(reach, smallest_block)
    mask = _band(size, window, reach, q.dtype, q.device)
    blocks = []
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(start - reach, 0)
        reached = mask[: stop - start, reach - (start - first) : reach + stop - start]
        blocks.append(_masked(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], reached, dropout))
    return torch.cat(blocks, dim=2)


@lru_cache(maxsize=4)
def _band(num_queries: int, window: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_queries, reach + num_queries]: query i, and keys from `reach` positions before query 0 on."""
    query = torch.arange(num_queries, device=device).unsqueeze(1)
    distance = query + reach - torch.arange(reach + num_queries, device=device)
    return _additive((distance >= 0) & (distance < window), dtype)


def _additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask would become this in every layer anew."""
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, float("-inf"))


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[b, k, s, d] twice -> [b, n, s, d] twice: a fused kernel takes a mask or grouped heads, not both."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))
