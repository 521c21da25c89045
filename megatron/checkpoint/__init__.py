"""Checkpoints without a layout: logical tensors by name, in rectangles, whatever layout wrote or reads them.

A *source* hands out rectangles (`source`); one is a folder of this project (`native`, described by its `manifest`,
stored by `storage` in the `container` format, published by `commit`), another a Hugging Face model (`hf`). `opening`
says which kind a folder is, and `manager` is what a run calls.
"""

from megatron.checkpoint.commit import check_save_folder
from megatron.checkpoint.manager import check_architecture, load, save
from megatron.checkpoint.opening import open_checkpoint, open_source
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, Source, TokenizerIdentity

__all__ = [
    "CheckpointInfo",
    "LocalTensor",
    "RunState",
    "Source",
    "TokenizerIdentity",
    "check_architecture",
    "check_save_folder",
    "load",
    "open_checkpoint",
    "open_source",
    "save",
]
