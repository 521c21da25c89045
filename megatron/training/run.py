"""From a resolved configuration to a trained model: what `finetune.py` composes."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from megatron.checkpoint.agreement import on_first_rank
from megatron.checkpoint.commit import check_save_folder
from megatron.checkpoint.hf import carried_files
from megatron.checkpoint.manager import check_architecture
from megatron.checkpoint.ownership import owned
from megatron.checkpoint.source import Source, TokenizerIdentity
from megatron.checkpoint.tokenizer_copy import copy_tokenizer
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER, tokenizer_files
from megatron.config import RunConfig
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.topology import Topology, launch_environment
from megatron.errors import ConfigError
from megatron.model.attention_kernels import AttentionKernel, flash_attention, sdpa_attention
from megatron.model.init import initial_value
from megatron.model.stage import StageOptions
from megatron.optimizer.optimizers import Optimizer
from megatron.tokenizer import Tokenizer
from megatron.training.build import PipelineParts, build_parts, fill_weights, recompute_policy
from megatron.training.checkpointing import Progress, RunCheckpoints, resume_point
from megatron.training.datasets import RunDatasets, build_datasets, describe_continuation
from megatron.training.forward import Pipeline
from megatron.training.restoring import restore
from megatron.training.sinks import MetricsLog
from megatron.training.step import TrainStep
from megatron.training.summary import startup_summary, write_config
from megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(run: RunConfig, tokenizer: Tokenizer, source: Source | None) -> None:
    """Trains `run` from `source`, or from initial weights when there is none.

    What can be checked by each process alone is checked before the process group exists.
    """
    device = choose_device(run)
    if run.checkpoint.save is not None:
        check_save_folder(Path(run.checkpoint.save))
    if source is not None:
        check_architecture(source.path, source.model_config(), run.model)
    datasets = build_datasets(run, tokenizer, resume_point(run, source))
    kernel = choose_kernel(run, device)
    _make_deterministic(run)
    timeout = timedelta(minutes=run.training.distributed_timeout_minutes)
    topology = Topology.create(run.layout, device, timeout=timeout)
    with _save_folder_owned(run, topology):
        _train(run, topology, kernel, tokenizer, datasets, source)
    topology.close()


def _train(
    run: RunConfig,
    topology: Topology,
    kernel: AttentionKernel,
    tokenizer: Tokenizer,
    datasets: RunDatasets,
    source: Source | None,
) -> None:
    parts = build_run_parts(run, topology, kernel)
    optimizer = Optimizer(run.optimizer, parts.data_parallel.shards)
    opened, source = source, _restore(run, topology, parts, optimizer, source)
    start = resume_point(run, source)
    if source is not opened:  # an older checkpoint has fewer samples behind it
        datasets = build_datasets(run, tokenizer, start)
    checkpoints = RunCheckpoints(
        run,
        topology,
        parts.data_parallel,
        optimizer,
        tokenizer=_keep_tokenizer(run, tokenizer, topology),
        data=datasets.record,
        carried={} if source is None else carried_files(source),
        loaded=None if source is None else source.path,
    )
    step = TrainStep(
        _pipeline(run, topology, parts),
        optimizer,
        topology,
        clip_grad=run.optimizer.clip_grad,
        seed=run.training.seed,
    )
    saver = None if run.checkpoint.save is None else checkpoints.saver()
    log = MetricsLog(run, device=topology.device, is_main=topology.world.is_first, resumed_at=start.iteration or None)
    notes = _notes(datasets, source, start, run)  # on all ranks: what is wrong with them stops all
    if topology.world.is_first:
        if run.checkpoint.save is not None:
            write_config(run, Path(run.checkpoint.save))
        log.message(
            startup_summary(run, parts.layers, kernel=kernel.__name__, device=topology.device, datasets=datasets)
        )
        for note in notes:
            log.message(f"note: {note}")
    Trainer(run, topology, step, datasets, checkpoints, saver, log).fit(start)
    log.close()


def _restore(
    run: RunConfig, topology: Topology, parts: PipelineParts, optimizer: Optimizer, source: Source | None
) -> Source | None:
    """Fills the weights, and the optimizer's state where the run continues; returns what they came from."""
    if source is None:
        fill_weights(parts.data_parallel, topology, partial(initial_value, run.model, run.training.seed))
        return None
    return restore(run, topology, parts.data_parallel, optimizer, source)


@contextmanager
def _save_folder_owned(run: RunConfig, topology: Topology) -> Iterator[None]:
    """While inside, no other run saves into this one's folder. Raises CheckpointError on all ranks."""
    with ExitStack() as stack:
        if run.checkpoint.save is not None:
            root = Path(run.checkpoint.save)
            on_first_rank(topology.world, lambda: stack.enter_context(owned(root)))
        yield


def choose_device(run: RunConfig) -> torch.device:
    """--device, with "auto" meaning a GPU where there is one. Raises ConfigError if the GPU asked for is missing."""
    wanted, num_gpus = run.training.device, torch.cuda.device_count()
    num_processes = launch_environment().local_world_size
    if wanted != "cpu" and 0 < num_gpus < num_processes:
        raise ConfigError(
            f"--nproc_per_node {num_processes} starts more processes than this host's {num_gpus} GPUs; start "
            f"{num_gpus}, or give --device cpu."
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch finds no GPU; install its CUDA build, or give --device cpu.")
    return torch.device(wanted)


def choose_kernel(run: RunConfig, device: torch.device) -> AttentionKernel:
    """flash-attn where it is asked for, installed and applicable; PyTorch's own kernels otherwise, with one warning."""
    if not run.training.use_flash_attn:
        return sdpa_attention
    if device.type != "cuda":
        reason = "flash-attn needs a GPU"
    elif not run.training.bf16:
        reason = "flash-attn needs --bf16"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "the flash-attn package is not installed"
    else:
        return flash_attention
    logger.warning("--use_flash_attn: %s; PyTorch's scaled_dot_product_attention is used instead", reason)
    return sdpa_attention


def _make_deterministic(run: RunConfig) -> None:
    if run.training.deterministic:
        # cuBLAS reads it when it is first used; without it deterministic matmuls raise.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


def build_run_parts(run: RunConfig, topology: Topology, kernel: AttentionKernel) -> PipelineParts:
    """This rank's stages as `run` asks for them, with weights still to be filled."""
    parallel = run.parallel
    options = StageOptions(
        padded_vocab_size=run.padded_vocab_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute=recompute_policy(run.parallel),
        kernel=kernel,
        compile=run.training.compile,
    )
    engine = DataParallelConfig(zero_stage=parallel.zero_stage, compute_dtype=compute_dtype(run))
    return build_parts(run.model, topology, options, engine, num_chunks=run.num_stages_per_rank)


def _pipeline(run: RunConfig, topology: Topology, parts: PipelineParts) -> Pipeline:
    return Pipeline(
        parts,
        topology,
        schedule=run.parallel.pipeline_schedule,
        compute_dtype=compute_dtype(run),
        sequence_parallel=run.parallel.sequence_parallel,
    )


def compute_dtype(run: RunConfig) -> torch.dtype:
    """What the stages compute in; the masters are fp32 either way."""
    return torch.bfloat16 if run.training.bf16 else torch.float32


def _keep_tokenizer(run: RunConfig, tokenizer: Tokenizer, topology: Topology) -> TokenizerIdentity:
    """Copies the tokenizer beside the checkpoints, so that they can be exported without the original."""
    path, save = run.tokenizer.path, run.checkpoint.save
    if path is None:
        return TokenizerIdentity(tokenizer.name, "", tokenizer.identity.file_sha256)
    if save is None:
        return TokenizerIdentity(tokenizer.name, path, tokenizer.identity.file_sha256)
    folder = Path(save) / TOKENIZER_FOLDER
    merge_file = None if run.tokenizer.merge_file is None else Path(run.tokenizer.merge_file)
    on_first_rank(
        topology.world, lambda: copy_tokenizer(tokenizer_files(Path(path), merge_file), folder, may_replace=True)
    )
    return TokenizerIdentity(tokenizer.name, str(folder.absolute()), tokenizer.identity.file_sha256)


def _notes(datasets: RunDatasets, source: Source | None, start: Progress, run: RunConfig) -> list[str]:
    """What a user should know who continues a run."""
    state = None if source is None else source.state()
    if state is None or start.iteration == 0:
        return []
    notes = []
    if start.iteration >= run.training.train_iters:
        notes.append(
            f"the checkpoint is of iteration {start.iteration}, and --train_iters {run.training.train_iters} asks for "
            "no more: nothing is trained"
        )
    continuation = describe_continuation(datasets, state.data)
    if continuation is not None:
        notes.append(continuation)
    if state.seed is not None and state.seed != run.training.seed:
        notes.append(f"--seed {run.training.seed} is not the checkpoint's {state.seed}: samples come in another order")
    return notes
