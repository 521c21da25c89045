"""What a run is about to do, on one screen, and its configuration in a file beside the checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.config import RunConfig
from megatron.core.pipeline import Schedule, Timeline, build_schedule, simulate
from megatron.model.flops import num_parameters
from megatron.training.build import recompute_policy, stage_costs
from megatron.training.datasets import RunDatasets
from megatron.training.memory import MemoryEstimate, estimate, meta_stage, snapshot_bytes
from megatron.training.metrics import GIB, MIB

CONFIG_FILE = "config.yaml"

# More pipeline ranks than this are shown as the first and the last ones, so that the summary stays on one screen.
_MAX_ROWS = 12
_MAX_LISTED_PATHS = 6


def startup_summary(
    run: RunConfig, layers: Sequence[range], *, kernel: str, device: torch.device, datasets: RunDatasets
) -> str:
    """At most 40 lines of about 100 columns. `layers[stage]` are the layers of each pipeline stage."""
    schedule = build_schedule(
        run.parallel.pipeline_schedule, run.layout.pp, run.num_microbatches, num_chunks=run.num_stages_per_rank
    )
    timeline = simulate(schedule, stage_costs(run.model, layers, recompute_policy(run.parallel)))
    entries = [
        ("model", _model(run)),
        ("vocabulary", _vocabulary(run)),
        ("layout", _layout(run)),
        ("device", _device(device)),
        ("batch", _batch(run)),
        ("precision", _precision(run)),
        ("attention", kernel.replace("_", " ")),
        ("recompute", _recompute(run)),
        ("schedule", _schedule(run, timeline)),
        ("optimizer", _optimizer(run)),
        ("lr", _learning_rate(run)),
        ("data", _data(run, datasets)),
        *(("", text) for text in datasets.about),
        ("evaluation", _evaluation(run, datasets)),
        ("load", _load(run)),
        ("save", _save(run, layers, schedule)),
        *(("note", note) for note in run.notes),
    ]
    return "\n".join([*(f"{name:11}{text}" for name, text in entries), "", *_table(run, layers, schedule, timeline)])


def write_config(run: RunConfig, save: Path) -> None:
    """Writes <save>/config.yaml, which ``--config`` reads; whole or not at all."""
    save.mkdir(parents=True, exist_ok=True)
    temporary = save / f".{CONFIG_FILE}.tmp"
    temporary.write_text(run.to_yaml(), encoding="utf-8")
    os.replace(temporary, save / CONFIG_FILE)


def _model(run: RunConfig) -> str:
    model, name = run.model, run.training.model_name
    size = run.training.size or ""
    unit = "B" if re.fullmatch(r"[\d.-]+", size) else ""  # not of words and versions: base, 7-v0.3
    sized = f"{name} {size}{unit}".rstrip()
    heads = f"{model.num_attention_heads} heads"
    if model.num_attention_heads_kv != model.num_attention_heads:
        heads += f" ({model.num_attention_heads_kv} kv)"
    return (
        f"{sized}, {_count(num_parameters(model))} parameters: {model.num_layers} layers x {model.hidden_size}, "
        f"{heads}, ffn {model.ffn_hidden_size}"
    )


def _vocabulary(run: RunConfig) -> str:
    stored = run.padded_vocab_size
    padding = "" if stored == run.model.vocab_size else f", padded to {stored} rows"
    return f"{run.model.vocab_size} tokens{padding}"


def _layout(run: RunConfig) -> str:
    layout, parallel = run.layout, run.parallel
    processes = "1 process" if run.world_size == 1 else f"{run.world_size} processes"
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    return f"{processes} = TP{layout.tp} x PP{layout.pp} x DP{layout.dp}, ZeRO {parallel.zero_stage}{sequence}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, one a process"
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} {'thread' if num_threads == 1 else 'threads'} a process"


def _batch(run: RunConfig) -> str:
    training, seq_length = run.training, run.data.seq_length
    most = "at most " if run.data.variable_seq_lengths else ""
    return (
        f"{training.global_batch_size} samples = {run.num_microbatches} micro-batches of {training.micro_batch_size} "
        f"x DP{run.layout.dp}; {most}{seq_length} tokens a sample, {training.global_batch_size * seq_length} a step"
    )


def _precision(run: RunConfig) -> str:
    return "bf16, with fp32 master weights and gradient sums" if run.training.bf16 else "fp32"


def _recompute(run: RunConfig) -> str:
    parallel = run.parallel
    if parallel.recompute_granularity is None:
        return "nothing"
    if parallel.recompute_granularity == "selective":
        return "attention cores"
    if parallel.recompute_method == "uniform":
        return f"all layers, in groups of {parallel.recompute_num_layers}"
    return f"the first {parallel.recompute_num_layers} layers of each stage"


def _schedule(run: RunConfig, timeline: Timeline) -> str:
    name = run.parallel.pipeline_schedule
    if run.layout.pp == 1:
        return f"one stage, {run.num_microbatches} micro-batches in turn: no bubble"
    chunks = f", {run.num_stages_per_rank} stages a rank" if run.num_stages_per_rank > 1 else ""
    return f"{name}{chunks}, {run.num_microbatches} micro-batches: bubble {timeline.bubble_fraction:.1%} of a step"


def _optimizer(run: RunConfig) -> str:
    config = run.optimizer
    rule = (
        f"AdamW, betas {config.adam_beta1:g} {config.adam_beta2:g}, eps {config.adam_eps:g}"
        if config.optimizer == "adam"
        else f"SGD, momentum {config.sgd_momentum:g}"
    )
    clipping = f"gradient norm clipped to {config.clip_grad:g}" if config.clip_grad else "no gradient clipping"
    return f"{rule}, weight decay {config.weight_decay:g}, {clipping}"


def _learning_rate(run: RunConfig) -> str:
    config, train_iters = run.optimizer, run.training.train_iters
    rise = f"0 to {config.lr:g} in {config.lr_warmup_iters} iterations, then " if config.lr_warmup_iters else ""
    if config.lr_decay_style == "constant":
        return f"{rise}{config.lr:g} to the end at iteration {train_iters}"
    if config.lr_decay_style == "inverse-square-root":
        fall = f"with the inverse square root, not below {config.min_lr:g}"
        return f"{rise}from {config.lr:g} {fall}; {train_iters} iterations"
    return (
        f"{rise}{config.lr_decay_style} from {config.lr:g} to {config.min_lr:g} at iteration "
        f"{config.lr_decay_iters}; {train_iters} iterations"
    )


def _data(run: RunConfig, datasets: RunDatasets) -> str:
    wanted = run.training.train_iters * run.training.global_batch_size
    sizes = "".join(f", {len(data)} {name}" for name, data in {**datasets.validation, **datasets.test}.items())
    paths = [*run.data.data_path, *run.data.train_data_path]
    blend = " ".join(paths) if len(paths) <= _MAX_LISTED_PATHS else f"{' '.join(paths[:_MAX_LISTED_PATHS])} ..."
    return f"{blend}: {len(datasets.train)} training samples, of which the run reads {wanted}{sizes}"


def _evaluation(run: RunConfig, datasets: RunDatasets) -> str:
    if not datasets.validation:
        return "none"
    num_samples = run.training.eval_iters * run.training.global_batch_size
    return f"every {run.training.eval_interval} iterations and at the end, on {num_samples} samples"


def _load(run: RunConfig) -> str:
    if run.checkpoint.load is None:
        return f"nothing: initial weights from --seed {run.training.seed}"
    return run.checkpoint.load + (", weights only" if run.checkpoint.finetune else "")


def _save(run: RunConfig, layers: Sequence[range], schedule: Schedule) -> str:
    checkpoint = run.checkpoint
    if checkpoint.save is None:
        return "nowhere"
    interval = checkpoint.save_interval
    when = "at the end" if interval is None else f"every {interval} iterations and at the end"
    kept = "" if checkpoint.keep_last is None else f", keeping the last {checkpoint.keep_last}"
    return f"{checkpoint.save}, {when}{kept}{_copy(run, layers, schedule) if checkpoint.async_save else ''}"


def _copy(run: RunConfig, layers: Sequence[range], schedule: Schedule) -> str:
    placement = schedule.placement
    stages = [[meta_stage(run, layers, stage) for stage in placement.stages_of(rank)] for rank in range(run.layout.pp)]
    most = max(snapshot_bytes(run, held) for held in stages)
    unit, unit_bytes = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    return f", from a copy of {most / unit_bytes:.2f} {unit} of host memory a process"


_COLUMNS = (
    f"{'rank':>4}  {'layers':24} {'parameters':>10}{'weights':>9}{'grads':>8}{'optim':>8}{'activ':>8}{'logits':>8}"
)


def _table(run: RunConfig, layers: Sequence[range], schedule: Schedule, timeline: Timeline) -> list[str]:
    """Who holds what: one row per pipeline rank, with the memory of the fullest of its processes."""
    estimates = [estimate(run, layers, schedule, rank) for rank in range(run.layout.pp)]
    unit, unit_bytes = ("GiB", GIB) if max(memory.total for memory in estimates) >= GIB else ("MiB", MIB)
    rows = [
        _row(rank, _held(schedule.placement.stages_of(rank), layers), memory, unit_bytes, timeline.peak_live[rank])
        for rank, memory in enumerate(estimates)
    ]
    if len(rows) > _MAX_ROWS:
        between = range(_MAX_ROWS // 2, len(rows) - _MAX_ROWS // 2)
        largest = max(estimates[rank].total for rank in between) / unit_bytes
        hidden = f" ...  ranks {between.start} to {between.stop - 1}: at most {largest:.2f} {unit} each"
        rows = [*rows[: between.start], hidden, *rows[between.stop :]]
    heading = f"Each pipeline rank: parameters of one process, its estimated peak in {unit}, live micro-batches"
    return [heading, f"{_COLUMNS}{'sum':>8}{'live':>6}", *rows]


def _row(rank: int, held: str, memory: MemoryEstimate, unit_bytes: int, peak_live: float) -> str:
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.total)
    weights, *others = (f"{part / unit_bytes:.2f}" for part in parts)
    cells = f"{weights:>9}" + "".join(f"{other:>8}" for other in others)
    return f"{rank:4d}  {held:24} {_count(memory.num_parameters):>10}{cells}{peak_live:6g}"


def _held(stages: Sequence[int], layers: Sequence[range]) -> str:
    """The layers of a rank, first and last ones where they are many: "embed 0-1 8-9", "0-1 .. 56-57 head"."""
    ranges = [_layers(layers[stage]) for stage in stages]
    if len(ranges) > 3:
        ranges = [ranges[0], "..", ranges[-1]]
    first = ["embed"] if stages[0] == 0 else []
    last = ["head"] if stages[-1] == len(layers) - 1 else []
    return " ".join([*first, *ranges, *last])


def _layers(layers: range) -> str:
    return f"{layers.start}-{layers[-1]}" if len(layers) > 1 else f"{layers.start}"


def _count(number: int) -> str:
    """A number of parameters to three digits: 70.6 B, 1.24 M, 935."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return str(number)
