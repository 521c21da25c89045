"""What a run will hold on each pipeline rank, in bytes, before anything is allocated.

Parameters are counted on stages built on the meta device, so they are exact. State per parameter follows from
the engines in `megatron.core.data_parallel`; activations are what autograd keeps of the layers in
`megatron.model`, operation by operation (the method of Korthikanti et al. 2022, arXiv 2205.05198, section 4); a
test compares them with autograd. --compile keeps a little less. Workspaces, communication buffers, the
allocator's gaps and what CUDA itself takes come on top.

Legend: T tokens of a micro-batch (micro_batch_size * seq_length), t tensor ranks, r = t with sequence
parallelism and else 1, h hidden, n query heads, k key/value heads, d head dimension, f ffn, v padded vocabulary,
c bytes of a number in the compute precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron.config import RunConfig
from megatron.core.pipeline import Action, ActionKind, Schedule
from megatron.core.topology import Axis
from megatron.model.stage import Stage, StageOptions

MASTER_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest process of one pipeline rank; `num_parameters` is what it stores before ZeRO shards it.

    `weights` are the fp32 masters and what the stages compute with. `activations` and `logits` are at the moment
    of the step at which the rank holds most of the two together.
    """

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(run: RunConfig, layers: Sequence[range], schedule: Schedule, pipeline_rank: int) -> MemoryEstimate:
    """The memory of `pipeline_rank`, whose stages hold `layers[stage]`, under `schedule`."""
    stages = schedule.placement.stages_of(pipeline_rank)
    models = [meta_stage(run, layers, stage) for stage in stages]
    weights, gradients, optimizer = state_bytes(run, models)
    kept = {stage: _kept_bytes(run, len(layers[stage]), stage, len(layers)) for stage in stages}
    activations, logits = _peak(schedule.ranks[pipeline_rank], kept)
    largest_stage = max(len(layers[stage]) for stage in stages)
    passing_activations, passing_logits = _passing_bytes(run, largest_stage, has_head=len(layers) - 1 in stages)
    return MemoryEstimate(
        num_parameters=sum(map(_count, models)),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + passing_activations,
        logits=logits + passing_logits,
    )


def meta_stage(run: RunConfig, layers: Sequence[range], stage: int) -> Stage:
    """The stage as a tensor rank holds it, without storage."""
    options = StageOptions(run.padded_vocab_size, sequence_parallel=run.parallel.sequence_parallel)
    with torch.device("meta"):
        return Stage(
            run.model,
            layers[stage],
            is_first=stage == 0,
            is_last=stage == len(layers) - 1,
            axis=Axis("tp", size=run.layout.tp),
            options=options,
        )


def state_bytes(run: RunConfig, stages: Sequence[Stage]) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of the rank that holds `stages`, on the first data rank, which has most.

    Per parameter, with bf16, AdamW and d data ranks: 18 bytes without ZeRO, 6 + 16/d with stage 1, 2 + 16/d with
    stage 2 (its gradients whole for one unit at a time), 16/d with stage 3 (its weights too).
    """
    zero_stage, whole = run.parallel.zero_stage, sum(map(_count, stages))
    owned = sum(_owned(parameter, run) for stage in stages for parameter in stage.parameters())
    optimizer = _states_per_parameter(run) * MASTER_BYTES * owned
    if zero_stage == 0:
        copies = _compute_bytes(run) * whole if run.training.bf16 else 0
        return MASTER_BYTES * whole + copies, MASTER_BYTES * whole, optimizer
    gathered = max(_gathered_under_zero_3(run, stage) for stage in stages) if zero_stage == 3 else whole
    unreduced = whole if zero_stage == 1 else max(_count(unit) for stage in stages for unit in stage.units())
    weights = MASTER_BYTES * owned + _compute_bytes(run) * gathered
    return weights, MASTER_BYTES * (owned + unreduced), optimizer


def snapshot_bytes(run: RunConfig, stages: Sequence[Stage]) -> int:
    """Host memory of the copy that --async_save keeps: of what this rank writes, which data ranks share row by row."""
    rows = sum(_first_rows(parameter, run.layout.dp) for stage in stages for parameter in stage.parameters())
    return rows * MASTER_BYTES * (1 + (_states_per_parameter(run) if run.checkpoint.save_optim else 0))


def _states_per_parameter(run: RunConfig) -> int:
    return {"adam": 2, "sgd": 1 if run.optimizer.sgd_momentum else 0}[run.optimizer.optimizer]


def _gathered_under_zero_3(run: RunConfig, stage: Stage) -> int:
    """Weights gathered at once: while one unit computes the next one arrives, and a tied embedding stays.

    A group of layers that is recomputed together is gathered together.
    """
    parallel, sizes = run.parallel, [_count(unit) for unit in stage.units()]
    is_grouped = parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform"
    at_once = max(2, parallel.recompute_num_layers if is_grouped else 0)
    most = max(sum(sizes[start : start + at_once]) for start in range(len(sizes)))
    return _count(stage) - sum(sizes) + most


def layer_bytes(run: RunConfig) -> int:
    """What one layer keeps of one micro-batch for its backward pass, unless it is recomputed as a whole.

    Llama in bf16: T [8h / r + 2 (3n + 3k) d / t + 6f / t]. The attention kernel is taken to store no
    probabilities, which holds for flash kernels; recomputing its core then saves next to nothing.
    """
    model, t, c = run.model, run.layout.tp, _compute_bytes(run)
    heads, kv_heads = model.num_attention_heads, max(model.num_attention_heads_kv, t)
    is_core_kept = run.parallel.recompute_granularity != "selective"
    attention = _attention_width(run, heads, kv_heads, is_core_kept=is_core_kept) * model.kv_channels
    num_dropouts = 1 if model.parallel_attn else 2
    dropouts = num_dropouts * model.hidden_size if model.hidden_dropout else 0  # masks of one byte
    in_sequence_shards = _norms_of_layer_bytes(run) + dropouts
    per_head = 4 * heads if is_core_kept else 0  # the log-sum-exp, fp32
    per_head += 4 * (heads + kv_heads) if model.qk_layernorm else 0  # the scale, fp32
    in_tensor_shards = c * (attention + _mlp_width(run)) + per_head
    return _tokens(run) * in_sequence_shards // _sequence_shards(run) + _tokens(run) * in_tensor_shards // t


@dataclass(frozen=True)
class _Kept:
    """What one micro-batch keeps on a stage from its forward to its backward pass."""

    activations: int
    logits: int


def _kept_bytes(run: RunConfig, num_layers: int, stage: int, num_stages: int) -> _Kept:
    policy = run.parallel
    hidden = _hidden_bytes(run)
    if policy.recompute_granularity != "full":
        layers = num_layers * layer_bytes(run)
    elif policy.recompute_method == "uniform":
        layers = -(-num_layers // policy.recompute_num_layers) * hidden
    else:
        recomputed = min(policy.recompute_num_layers, num_layers)
        layers = recomputed * hidden + (num_layers - recomputed) * layer_bytes(run)
    is_first, is_last = stage == 0, stage == num_stages - 1
    # The executor holds a stage's input and output. The input is counted already where the first norm keeps it
    # as it is, or a recomputed layer does.
    is_counted = run.model.use_rms_norm or not run.training.bf16 or policy.recompute_granularity == "full"
    received = 0 if is_first or is_counted else hidden
    activations = layers + received + (0 if is_last else hidden)
    if is_first and run.model.hidden_dropout:
        activations += hidden // _compute_bytes(run)  # the embedding's mask, one byte a number
    if not is_last:
        return _Kept(activations, 0)
    activations += _tokens(run) * _norm_bytes(run) // _sequence_shards(run)
    # The softmax in fp32; compiled, the logits themselves.
    bytes_each = _compute_bytes(run) if run.training.compile else 4
    return _Kept(activations, bytes_each * _logits_count(run))


def _passing_bytes(run: RunConfig, num_layers: int, *, has_head: bool) -> tuple[int, int]:
    """(activations, logits) that exist for one micro-batch at a time, on top of what is kept."""
    policy = run.parallel
    live_layers = 0
    if policy.recompute_granularity == "full":
        group = policy.recompute_num_layers if policy.recompute_method == "uniform" else 1
        live_layers = min(group, num_layers)
    # Half-precision logits and, later, their gradient exist beside the softmax.
    has_copy = run.training.bf16 and has_head and not run.training.compile
    logits = _compute_bytes(run) * _logits_count(run) if has_copy else 0
    return live_layers * layer_bytes(run), logits


def _peak(actions: Sequence[Action], kept: dict[int, _Kept]) -> tuple[int, int]:
    """(activations, logits) at the moment when their sum is largest, stage by stage as the schedule runs them."""
    activations = logits = 0
    peak = (0, 0)
    for action in actions:
        sign = {ActionKind.F: 1, ActionKind.B: -1, ActionKind.I: 0, ActionKind.W: -1}[action.kind]
        activations += sign * kept[action.stage].activations
        logits += sign * kept[action.stage].logits
        if activations + logits > sum(peak):
            peak = (activations, logits)
    return peak


def _norm_bytes(run: RunConfig) -> int:
    """Per token, a norm and the input of the linear behind it: x (LayerNorm: in fp32), and the normed one."""
    c = _compute_bytes(run)
    return run.model.hidden_size * ((c if run.model.use_rms_norm else 4) + c)


def _has_band(run: RunConfig) -> bool:
    window = run.model.sliding_window_size
    return window is not None and window < run.data.seq_length


def _attention_width(run: RunConfig, heads: int, kv_heads: int, *, is_core_kept: bool) -> int:
    """Heads per token that attention keeps: of the fused projection, of queries and keys as rotated, of the context."""
    is_rotary = run.model.position_embedding_type == "rotary"
    is_in_pieces = is_core_kept and (_has_band(run) or run.data.reset_attention_mask or run.data.packing)
    context = 2 * heads if is_in_pieces else heads  # in pieces, and joined
    if not (is_core_kept and _has_band(run)):
        # v is a view of the fused projection's output and keeps all of it; q and k are a second, rotated copy.
        return heads + 2 * kv_heads + (heads + kv_heads if is_rotary else 0) + context
    # With a mask, key and value heads are repeated for their queries, and then only the norms of heads keep the
    # projection, and only where both are in one tensor do rotated queries keep the keys.
    is_grouped = heads != kv_heads
    projection = heads + 2 * kv_heads if not (is_grouped and is_rotary) or run.model.qk_layernorm else 0
    rotated_keys = 0 if is_grouped and run.model.qk_layernorm else kv_heads
    rotated = heads + rotated_keys if is_rotary else 0
    return projection + rotated + (2 * heads if is_grouped else 0) + context


def _norms_of_layer_bytes(run: RunConfig) -> int:
    """Side by side, attention and MLP have one input, or, with two norms, two of one x."""
    if not run.model.parallel_attn:
        return 2 * _norm_bytes(run)
    if not run.model.parallel_layernorm:
        return _norm_bytes(run)
    has_own_copy = run.training.bf16 and not run.model.use_rms_norm
    return 2 * _norm_bytes(run) - (0 if has_own_copy else _compute_bytes(run) * run.model.hidden_size)


def _mlp_width(run: RunConfig) -> int:
    """Numbers per token: the input of the activation (gate and up, where it is gated), and of the second linear."""
    return (2 if run.model.glu_activation is None else 3) * run.model.ffn_hidden_size


def _hidden_bytes(run: RunConfig) -> int:
    """One hidden state between layers, as a rank holds it."""
    return _tokens(run) * run.model.hidden_size * _compute_bytes(run) // _sequence_shards(run)


def _logits_count(run: RunConfig) -> int:
    return _tokens(run) * run.padded_vocab_size // run.layout.tp


def _tokens(run: RunConfig) -> int:
    return run.training.micro_batch_size * run.data.seq_length


def _sequence_shards(run: RunConfig) -> int:
    return run.layout.tp if run.parallel.sequence_parallel else 1


def _compute_bytes(run: RunConfig) -> int:
    return 2 if run.training.bf16 else 4


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _owned(parameter: nn.Parameter, run: RunConfig) -> int:
    """What the first data rank has of a parameter: all of it, or the first rows."""
    return _first_rows(parameter, run.layout.dp if run.parallel.zero_stage else 1)


def _first_rows(parameter: nn.Parameter, num_ranks: int) -> int:
    """Elements of the first of `num_ranks` equal groups of rows."""
    rows = parameter.shape[0]
    return -(-rows // num_ranks) * (parameter.numel() // rows)
