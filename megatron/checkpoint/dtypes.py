"""What users call the dtypes that weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

WEIGHT_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)
