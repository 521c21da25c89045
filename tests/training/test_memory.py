"""The estimate against what is really allocated: state byte for byte, activations as autograd keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from megatron.config import RunConfig
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.pipeline import build_schedule
from megatron.core.random import DropoutStreams
from megatron.core.recompute import RecomputePolicy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.topology import Axis, Topology
from megatron.model.flops import num_parameters
from megatron.model.stage import Stage, StageOptions
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import PipelineParts, assign_layers, build_parts
from megatron.training.memory import MemoryEstimate, estimate, layer_bytes
from small_run import small_run


def estimates(run: RunConfig) -> list[MemoryEstimate]:
    """Of every pipeline rank."""
    chunks = run.num_stages_per_rank
    layers = assign_layers(run.model, run.layout.pp * chunks, num_chunks=chunks)
    schedule = build_schedule(run.parallel.pipeline_schedule, run.layout.pp, run.num_microbatches, num_chunks=chunks)
    return [estimate(run, layers, schedule, rank) for rank in range(run.layout.pp)]


def built(run: RunConfig, topology: Topology) -> tuple[PipelineParts, Optimizer]:
    options = StageOptions(run.padded_vocab_size, sequence_parallel=run.parallel.sequence_parallel)
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    engine = DataParallelConfig(zero_stage=run.parallel.zero_stage, compute_dtype=dtype)
    parts = build_parts(run.model, topology, options, engine, num_chunks=run.num_stages_per_rank)
    return parts, Optimizer(run.optimizer, parts.data_parallel.shards)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def held_bytes(parts: PipelineParts, optimizer: Optimizer) -> tuple[int, int]:
    """(masters, optimizer state) of this rank."""
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return num_bytes([shard.tensor for shard in parts.data_parallel.shards]), num_bytes(states)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_optimizer_of_one_process_are_exact(optimizer: str, bf16: bool, tied: bool) -> None:
    run = small_run(optimizer=optimizer, bf16=None if bf16 else False, no_tie_embed_logits=False if tied else None)
    parts, state = built(run, Topology.serial())
    (memory,) = estimates(run)
    masters, optimizer_state = held_bytes(parts, state)
    copies = num_bytes([parameter for stage in parts.stages.values() for parameter in stage.parameters()])
    assert memory.weights == masters + (copies if bf16 else 0)
    assert memory.gradients == masters
    assert memory.optimizer == optimizer_state


def held_on_this_rank(runs: list[RunConfig]) -> list[tuple[int, int]]:
    topology = Topology.create(runs[0].layout)
    return [held_bytes(*built(run, topology)) for run in runs]


def test_shards_and_optimizer_of_every_layout_are_exact():
    # TP2 x PP2 x DP2; 1031 + padding and 96 features make shards of unequal rows.
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "make_vocab_size_divisible_by": 1}
    runs = [small_run(8, global_batch_size=8, zero_stage=zero, **sizes) for zero in (0, 1, 2, 3)]
    held = run_distributed(held_on_this_rank, 8, runs)
    for i, run in enumerate(runs):
        for pipeline_rank, memory in enumerate(estimates(run)):
            on_ranks = [held[rank][i] for rank in range(8) if run.layout.coordinate(rank).pp == pipeline_rank]
            masters, optimizer_state = max(on_ranks)
            assert memory.optimizer == optimizer_state
            assert memory.optimizer == 2 * masters


def test_the_state_of_a_parameter_costs_what_the_literature_says():
    """Rajbhandari et al. 2020 (arXiv 1910.02054) with fp32 gradients, on d = 4 data ranks."""

    def state_per_parameter(zero_stage: int, num_layers: int) -> float:
        flags = {"num_layers": num_layers, "hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 128}
        run = small_run(4, bf16=None, zero_stage=zero_stage, **flags)
        (memory,) = estimates(run)
        return (memory.weights + memory.gradients + memory.optimizer) / memory.num_parameters

    n = 64  # layers, of which stages 2 and 3 hold one whole gradient, and stage 3 two whole sets of weights
    assert state_per_parameter(0, n) == 18
    assert state_per_parameter(1, n) == 6 + 16 / 4
    assert state_per_parameter(2, n) == pytest.approx(2 + 16 / 4 + 4 / n, rel=0.002)
    assert state_per_parameter(3, n) == pytest.approx(16 / 4 + 4 / n + 2 * 2 / n, rel=0.002)


def test_the_ranks_of_a_layout_hold_the_parameters_of_the_model_between_them():
    flags = {"vocab_size": 1024, "pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 1}
    run = small_run(4, global_batch_size=8, **flags)
    assert sum(memory.num_parameters for memory in estimates(run)) == num_parameters(run.model)


ARCHITECTURES = {
    "llama": {},
    "gqa": {"num_attention_heads_kv": 1},
    "geglu": {"glu_activation": "geglu"},
    "reglu": {"glu_activation": "reglu"},
    "liglu": {"glu_activation": "liglu"},
    "gpt": {"use_rms_norm": False, "glu_activation": False, "position_embedding_type": "absolute"},
    "dropout": {"hidden_dropout": 0.1},
    "parallel": {"parallel_attn": None, "hidden_dropout": 0.1},
    "parallel, two norms": {"parallel_attn": None, "parallel_layernorm": None},
    "falcon": {"use_rms_norm": False, "glu_activation": False, "parallel_attn": None, "parallel_layernorm": None},
    "qk-norm": {"qk_layernorm": None},
    "1 + weight": {"apply_layernorm_1p": None, "glu_activation": "geglu_tanh"},
    "window": {"sliding_window_size": 32},
    "window, multi-head": {"sliding_window_size": 32, "num_attention_heads_kv": 4},
    "window, qk-norm": {"sliding_window_size": 32, "qk_layernorm": None},
    "window, positions": {"sliding_window_size": 32, "position_embedding_type": "absolute"},
    "window, gqa": {"sliding_window_size": 32, "num_attention_heads_kv": 1},
    "documents": {"reset_attention_mask": None, "num_attention_heads_kv": 4},
    "documents, gqa, window": {"reset_attention_mask": None, "sliding_window_size": 32},
    "window, selective": {"sliding_window_size": 32, "recompute_granularity": "selective"},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_layer_keeps_what_the_formula_says(name, bf16):
    flags = {"hidden_size": 256, "ffn_hidden_size": 640, "num_layers": 2, **ARCHITECTURES[name]}
    run = small_run(bf16=None if bf16 else False, **flags)
    per_layer = kept_by(run, num_layers=2) - kept_by(run, num_layers=1)
    # The formula leaves out one number per token and norm, against 256 to 1280 for each of the tensors it counts.
    assert per_layer == pytest.approx(layer_bytes(run), rel=0.005)


def test_documents_keep_no_mask_only_their_contexts_before_they_are_joined():
    flags = {"hidden_size": 256, "bf16": None}
    packing = {"data_type": "instruction", "packing": None}
    plain, *cut = (activations(1, **flags, **more) for more in ({}, {"reset_attention_mask": None}, packing))
    # Eight layers, and two samples of 128 tokens in bf16.
    assert [more - plain for more in cut] == [8 * 2 * 128 * 256 * 2] * 2


def kept_by(run: RunConfig, num_layers: int) -> int:
    """Bytes of distinct storages that autograd keeps of `num_layers` layers, parameters left out."""
    recompute = RecomputePolicy(run.parallel.recompute_granularity)
    options = StageOptions(run.padded_vocab_size, recompute=recompute)
    stage = Stage(run.model, range(num_layers), is_first=False, is_last=False, axis=Axis("tp"), options=options)
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    stage.to(dtype)
    x = torch.randn(run.data.seq_length, run.training.micro_batch_size, run.model.hidden_size, dtype=dtype)
    cuts: dict[str, Any] = {}
    if run.data.reset_attention_mask:
        lengths = ((50, 78), (128,))
        ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
        cuts = {"segment_ids": torch.stack(ids), "segment_lengths": lengths}
    streams = DropoutStreams(1, 1, 0)
    return saved_bytes(lambda: stage(x.requires_grad_(), run.data.seq_length, None, streams, **cuts), stage)


def saved_bytes(forward: Callable[[], Tensor], stage: Stage) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return num_bytes([tensor for pointer, tensor in kept.items() if pointer not in parameters])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_whole_model_with_its_loss_keeps_what_the_estimate_says(bf16):
    run = small_run(bf16=None if bf16 else False, hidden_size=256, ffn_hidden_size=640, num_layers=3)
    parts, _ = built(run, Topology.serial())
    parts.data_parallel.refresh()
    stage = parts.stages[0]
    tokens = torch.randint(1031, (2, 128), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        logits = stage(tokens, 128)
        return vocab_parallel_cross_entropy(logits, tokens.t(), Axis("tp"), vocab_size=1031).sum()

    (memory,) = estimates(run)
    passing = 2 * 128 * 2 * run.padded_vocab_size if bf16 else 0  # the bf16 logits beside the fp32 softmax
    assert saved_bytes(loss, stage) == pytest.approx(memory.activations + memory.logits - passing, rel=0.01)


def activations(world_size: int, pipeline_rank: int = 0, **flags: object) -> int:
    return estimates(small_run(world_size, **flags))[pipeline_rank].activations


def test_sequence_and_tensor_parallelism_divide_all_activations():
    both = activations(2, tensor_model_parallel_size=2, sequence_parallel=None)
    tensor_only = activations(2, tensor_model_parallel_size=2)
    assert 2 * both == activations(1)
    assert both < tensor_only < activations(1)


def test_a_pipeline_rank_keeps_as_many_micro_batches_as_its_schedule_has_in_flight():
    def of_first_rank(schedule: str, num_microbatches: int) -> int:
        flags = {"pipeline_model_parallel_size": 4, "pipeline_schedule": schedule}
        return activations(4, global_batch_size=2 * num_microbatches, **flags)

    one = of_first_rank("1f1b", 1)
    assert of_first_rank("1f1b", 16) == 4 * one
    assert of_first_rank("gpipe", 16) == 16 * one


def test_gpipe_keeps_the_softmax_of_every_micro_batch_on_the_last_rank():
    def logits(schedule: str) -> int:
        flags = {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule, "global_batch_size": 16}
        return estimates(small_run(2, **flags))[-1].logits

    one = 2 * 128 * 1152 * 4  # two samples of 128 tokens, 1031 rows padded to 1152, fp32
    assert (logits("1f1b"), logits("gpipe")) == (one, 8 * one)


def test_full_recomputation_keeps_the_input_of_every_group_and_one_live_group():
    hidden = 2 * 128 * 64 * 4
    for group in (1, 2):
        run = small_run(recompute_granularity="full", recompute_num_layers=group)
        (memory,) = estimates(run)
        final_norm = 2 * hidden
        assert memory.activations == 8 // group * hidden + group * layer_bytes(run) + final_norm


def test_recomputing_the_first_layers_keeps_the_others():
    hidden = 2 * 128 * 64 * 4
    run = small_run(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    (memory,) = estimates(run)
    assert memory.activations == 3 * hidden + (5 + 1) * layer_bytes(run) + 2 * hidden
