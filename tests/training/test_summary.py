"""The start-up summary, word for word, and the configuration that is written beside the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from megatron.config import RunConfig, parse_run, resolve
from megatron.core.pipeline import one_f_one_b
from megatron.data.gpt import GPTDataset
from megatron.model.presets import preset
from megatron.training.build import assign_layers
from megatron.training.datasets import RunDatasets
from megatron.training.memory import MemoryEstimate, estimate
from megatron.training.summary import startup_summary, write_config
from small_run import small_run


class Samples:
    """As much of a dataset as a summary asks for."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples


def samples(count: int) -> GPTDataset:
    return cast(GPTDataset, Samples(count))


def summary(run: RunConfig) -> str:
    chunks = run.num_stages_per_rank
    layers = assign_layers(run.model, run.layout.pp * chunks, num_chunks=chunks)
    datasets = RunDatasets(samples(2000), {"validation": samples(40)})
    return startup_summary(run, layers, kernel="sdpa_attention", device=torch.device("cpu"), datasets=datasets)


def llama2_70b(world_size: int, **flags: object) -> RunConfig:
    # The sizes of the small model are left out: the published ones apply.
    typed = {"model_name": "llama2", "size": 70, "micro_batch_size": 1, "train_iters": 500, "lr": 3e-4, **flags}
    tokens = [f"--{name}" if value is None else f"--{name}={value}" for name, value in typed.items()]
    return resolve(parse_run([*tokens, "--data_path=/data/corpus"]), world_size, tokenizer_vocab_size=32000)


def round_figures(run: RunConfig, layers: object, schedule: object, pipeline_rank: int) -> MemoryEstimate:
    """Stands for the real estimate, so that the text below is about the text alone."""
    unit = 2**30 if run.training.bf16 else 2**20
    return MemoryEstimate(2_170_000_000, 8 * unit, 12 * unit, 4 * unit, (16 - pipeline_rank) * unit, unit // 8)


def test_a_small_run_is_summed_up_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("megatron.training.summary.estimate", round_figures)
    run = small_run(4, tensor_model_parallel_size=2, sequence_parallel=None, global_batch_size=16, zero_stage=1)
    expected = """\
model      gpt, 379 k parameters: 8 layers x 64, 4 heads (2 kv), ffn 96
vocabulary 1031 tokens, padded to 1280 rows
layout     4 processes = TP2 x PP1 x DP2, ZeRO 1, sequence parallel
device     CPU, 1 thread a process
batch      16 samples = 4 micro-batches of 2 x DP2; 128 tokens a sample, 2048 a step
precision  fp32
attention  sdpa attention
recompute  nothing
schedule   one stage, 4 micro-batches in turn: no bubble
optimizer  AdamW, betas 0.9 0.999, eps 1e-08, weight decay 0.01, gradient norm clipped to 1
lr         linear from 0.001 to 0 at iteration 100; 100 iterations
data       tokens: 2000 training samples, of which the run reads 1600, 40 validation
evaluation every 1000 iterations and at the end, on 1600 samples
load       nothing: initial weights from --seed 1234
save       nowhere
note       no --save: nothing of this run is kept

Each pipeline rank: parameters of one process, its estimated peak in MiB, live micro-batches
rank  layers                   parameters  weights   grads   optim   activ  logits     sum  live
   0  embed 0-7 head               2.17 B     8.00   12.00    4.00   16.00    0.12   40.12     1"""
    assert summary(run) == expected


def test_a_large_run_is_summed_up_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("megatron.training.summary.estimate", round_figures)
    run = llama2_70b(
        64,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=5,
        sequence_parallel=None,
        zero_stage=1,
        bf16=None,
        recompute_granularity="selective",
        global_batch_size=64,
        lr_decay_style="cosine",
        lr_warmup_iters=50,
        min_lr=3e-5,
        adam_beta2=0.95,
        save="/checkpoints/70b",
        save_interval=100,
        load="/models/llama-2-70b",
        finetune=None,
    )
    expected = """\
model      llama2 70B, 69.0 B parameters: 80 layers x 8192, 64 heads (8 kv), ffn 28672
vocabulary 32000 tokens, padded to 32768 rows
layout     64 processes = TP8 x PP4 x DP2, ZeRO 1, sequence parallel
device     CPU, 8 threads a process
batch      64 samples = 32 micro-batches of 1 x DP2; 4096 tokens a sample, 262144 a step
precision  bf16, with fp32 master weights and gradient sums
attention  sdpa attention
recompute  attention cores
schedule   interleaved, 4 stages a rank, 32 micro-batches: bubble 3.4% of a step
optimizer  AdamW, betas 0.9 0.95, eps 1e-08, weight decay 0.01, gradient norm clipped to 1
lr         0 to 0.0003 in 50 iterations, then cosine from 0.0003 to 3e-05 at iteration 500; 500 iterations
data       /data/corpus: 2000 training samples, of which the run reads 32000, 40 validation
evaluation every 1000 iterations and at the end, on 6400 samples
load       /models/llama-2-70b, weights only
save       /checkpoints/70b, every 100 iterations and at the end

Each pipeline rank: parameters of one process, its estimated peak in GiB, live micro-batches
rank  layers                   parameters  weights   grads   optim   activ  logits     sum  live
   0  embed 0-4 .. 60-64           2.17 B     8.00   12.00    4.00   16.00    0.12   40.12  4.75
   1  5-9 .. 65-69                 2.17 B     8.00   12.00    4.00   15.00    0.12   39.12  4.25
   2  10-14 .. 70-74               2.17 B     8.00   12.00    4.00   14.00    0.12   38.12  3.75
   3  15-19 .. 75-79 head          2.17 B     8.00   12.00    4.00   13.00    0.12   37.12  3.25"""
    assert summary(run) == expected


def test_the_table_shows_the_estimate_of_each_pipeline_rank():
    run = small_run(2, pipeline_model_parallel_size=2, global_batch_size=8)
    layers = assign_layers(run.model, 2)
    rows = summary(run).splitlines()[-2:]
    for pipeline_rank, row in enumerate(rows):
        memory = estimate(run, layers, one_f_one_b(2, 4), pipeline_rank)
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.total)
        *figures, live = row.split()[-7:]
        assert figures == [f"{part / 2**20:.2f}" for part in parts]
        assert live == str(2 - pipeline_rank)


def line(run: RunConfig, name: str) -> str:
    (found,) = (text for text in summary(run).splitlines() if text.startswith(f"{name:11}"))
    return found.removeprefix(f"{name:11}")


@pytest.mark.parametrize("num_ranks", [1, 2, 12, 13, 80])
def test_the_summary_fits_on_one_screen(num_ranks):
    run = llama2_70b(8 * num_ranks, tensor_model_parallel_size=8, pipeline_model_parallel_size=num_ranks, bf16=None)
    lines = summary(run).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110


def test_many_pipeline_ranks_show_their_ends_and_the_largest_between():
    run = llama2_70b(40, pipeline_model_parallel_size=40, global_batch_size=64)
    rows = summary(run).splitlines()[-13:]
    assert [row.split()[0] for row in rows] == [*"012345", "...", *(str(rank) for rank in range(34, 40))]
    # Under 1F1B earlier ranks hold more micro-batches, and rank 6 is the first that is not shown.
    everything = llama2_70b(12, pipeline_model_parallel_size=12)
    assert "..." not in summary(everything)
    assert rows[6].startswith(" ...  ranks 6 to 33: at most ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "linear from 0.001 to 0 at iteration 100; 100 iterations"),
        ({"lr_decay_style": "constant"}, "0.001 to the end at iteration 100"),
        (
            {"lr_decay_style": "cosine", "lr_warmup_iters": 10, "min_lr": 1e-4, "lr_decay_iters": 80},
            "0 to 0.001 in 10 iterations, then cosine from 0.001 to 0.0001 at iteration 80; 100 iterations",
        ),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 10},
            "0 to 0.001 in 10 iterations, then from 0.001 with the inverse square root, not below 0; 100 iterations",
        ),
    ],
)
def test_the_learning_rate_is_told_in_words(flags, expected):
    assert line(small_run(**flags), "lr") == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "nothing"),
        ({"recompute_granularity": "selective"}, "attention cores"),
        ({"recompute_granularity": "full", "recompute_num_layers": 2}, "all layers, in groups of 2"),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            "the first 3 layers of each stage",
        ),
    ],
)
def test_what_is_recomputed_is_told_in_words(flags, expected):
    assert line(small_run(**flags), "recompute") == expected


def test_an_even_pipeline_has_the_bubble_of_the_closed_form():
    # Layers of equal cost and a head of none: (p - 1) / (m + p - 1) of a 1F1B step, and 1 / v of the idle time
    # interleaved. 8 micro-batches on 4 ranks: 3 / 11; two chunks: 1.5 / 9.5.
    flags = {"pipeline_model_parallel_size": 4, "global_batch_size": 16, "hidden_size": 1024, "ffn_hidden_size": 8192}
    tiny_head = {"vocab_size": 1}
    assert line(small_run(4, **tiny_head, **flags), "schedule") == "1f1b, 8 micro-batches: bubble 27.3% of a step"
    interleaved = small_run(4, **tiny_head, **flags, num_layers_per_virtual_pipeline_stage=1)
    assert line(interleaved, "schedule") == "interleaved, 2 stages a rank, 8 micro-batches: bubble 15.8% of a step"


def test_options_that_do_nothing_are_noted():
    assert line(small_run(sequence_parallel=None, save="/ckpt"), "note") == (
        "--sequence_parallel changes nothing at --tensor_model_parallel_size 1"
    )


def test_a_run_that_stops_clipping_or_uses_sgd_says_so():
    run = small_run(optimizer="sgd", clip_grad=0, weight_decay=0)
    assert line(run, "optimizer") == "SGD, momentum 0.9, weight decay 0, no gradient clipping"


def test_the_configuration_beside_the_checkpoints_gives_the_same_run(tmp_path: Path):
    run = small_run(4, tensor_model_parallel_size=2, save=tmp_path / "run", global_batch_size=16)
    write_config(run, tmp_path / "run")
    write_config(run, tmp_path / "run")  # a resumed run writes it again
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    again = resolve(parse_run([f"--config={tmp_path}/run/config.yaml"]), 4, tokenizer_vocab_size=1031)
    assert again == run


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"model_name": "llama3", "size": "3.1-70"}, "llama3 3.1-70B, 70.6 B parameters"),
        ({"model_name": "mistral", "size": "7-v0.3"}, "mistral 7-v0.3, 7.25 B parameters"),
        ({"model_name": "bert", "size": "base"}, "bert base, 110 M parameters"),
    ],
)
def test_a_size_is_named_as_it_was_published(flags, expected):
    vocab_size = preset(flags["model_name"], flags["size"]).vocab_size
    tokens = [f"--{name}={value}" for name, value in {**flags, "micro_batch_size": 1, "train_iters": 1}.items()]
    run = resolve(parse_run([*tokens, "--lr=1e-3", "--data_path=/data"]), 1, tokenizer_vocab_size=vocab_size)
    assert summary(run).splitlines()[0].startswith(f"model      {expected}: ")
