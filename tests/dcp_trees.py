"""Trees of torch.distributed.checkpoint, written by that library itself, in one process or from the ranks of a run."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "rows and columns": (Shard(0), Shard(1)),
    "columns and rows": (Shard(1), Shard(0)),
    "rows twice": (Shard(0), Shard(0)),
    "copies": (Replicate(), Replicate()),
}


def save_tree(folder: Path, state: Mapping[str, Any]) -> Path:
    with warnings.catch_warnings():  # that it saves from a single process
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=folder)
    return folder


def placed_tensors() -> dict[str, Tensor]:
    """A tensor for each placement and dtype; 7 and 5 rows on 2 or 4 ranks are uneven, 1 row leaves ranks without."""
    torch.manual_seed(3)
    shapes = {"uneven": (7, 5), "one row": (1, 9), "even": (8, 12)}
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    return {
        f"{placement}.{shape}.{str(dtype).removeprefix('torch.')}": (100 * torch.randn(size)).to(dtype)
        for placement in PLACEMENTS
        for shape, size in shapes.items()
        for dtype in dtypes
    }


def save_placed(folder: Path, world_size: int) -> None:
    """Every rank saves its part of `placed_tensors`, on a mesh of two axes."""
    mesh = init_device_mesh("cpu", (world_size // 2, 2))
    tensors = placed_tensors()
    state = {name: distribute_tensor(t, mesh, PLACEMENTS[name.split(".")[0]]) for name, t in tensors.items()}
    dcp.save(state, checkpoint_id=folder)


def module_of(state: Mapping[str, Tensor]) -> nn.Module:
    """A module whose parameters have the names and values of `state`."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def step_with(model: nn.Module, gradients: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """AdamW after two steps with the given gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for factor in (1.0, -0.5):
        for name, parameter in model.named_parameters():
            whole = factor * gradients[name]
            is_sharded = hasattr(parameter, "device_mesh")
            parameter.grad = (
                distribute_tensor(whole, parameter.device_mesh, parameter.placements) if is_sharded else whole
            )
        optimizer.step()
    return optimizer


def save_sharded_run(folder: Path, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor], app: bool) -> None:
    """What a run with FSDP saves after two steps: flat as torchtitan does, or nested in "app" as PyTorch's recipe."""
    model = module_of(state)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = step_with(model, gradients)
    if app:
        options = StateDictOptions()
        optim = get_optimizer_state_dict(model, optimizer, options=options)
        saved: dict[str, Any] = {"app": {"model": get_model_state_dict(model), "optim": optim}}
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        saved = {
            **get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "train_state": {"step": torch.tensor(1000, dtype=torch.int32), "ntokens_seen": torch.tensor(5)},
            "lr_scheduler": {"last_epoch": 2},
        }
    dcp.save(saved, checkpoint_id=folder)


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Changes the records in `.metadata`: `edit` changes its argument, or returns another object."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edited = edit(metadata)
    file.write_bytes(pickle.dumps(metadata if edited is None else edited))


def copied(value: Any, **changes: Any) -> Any:
    """A copy of a record with some attributes changed."""
    other = copy.copy(value)
    for name, change in changes.items():
        setattr(other, name, change)
    return other
