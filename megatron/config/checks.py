"""What must hold between owners: model against layout, batches against layout, data against model."""

from __future__ import annotations

from megatron.config.run import RunConfig
from megatron.core.layout import place_layers
from megatron.data.bert import MIN_PAIR_LENGTH
from megatron.data.config import DataConfig
from megatron.data.splits import parse_split
from megatron.errors import ConfigError


def check_run(run: RunConfig) -> None:
    """Raises ConfigError for the first thing that cannot be run."""
    check_tensor_parallel(run)
    check_pipeline(run)
    check_sequence(run)
    check_data(run)


def check_tensor_parallel(run: RunConfig) -> None:
    """Heads and MLP features are cut evenly; key/value heads may be copied instead."""
    tp, model = run.layout.tp, run.model
    for flag, size in (
        ("--num_attention_heads", model.num_attention_heads),
        ("--ffn_hidden_size", model.ffn_hidden_size),
    ):
        if size % tp:
            raise ConfigError(
                f"{flag} {size} cannot be split over --tensor_model_parallel_size {tp}; use a divisor of {size}."
            )
    kv_heads = model.num_attention_heads_kv
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(
            f"--num_attention_heads_kv {kv_heads} cannot be split over --tensor_model_parallel_size {tp}; "
            f"use a divisor or a multiple of {kv_heads}."
        )


def check_pipeline(run: RunConfig) -> None:
    """Every stage has a layer, and interleaved schedules have the micro-batches they need."""
    parallel, pp = run.parallel, run.layout.pp
    place_layers(run.model.num_layers, pp * run.num_stages_per_rank)
    if parallel.recompute_num_layers > run.model.num_layers:
        raise ConfigError(
            f"--recompute_num_layers {parallel.recompute_num_layers} is more than the {run.model.num_layers} layers of "
            "the model; lower it."
        )
    if parallel.pipeline_schedule == "interleaved" and run.num_microbatches % pp:
        step = run.training.micro_batch_size * run.layout.dp * pp
        raise ConfigError(
            f"--global_batch_size {run.training.global_batch_size} gives {run.num_microbatches} micro-batches, and an "
            f"interleaved schedule needs a multiple of --pipeline_model_parallel_size {pp}; use a multiple of {step}, "
            "or --pipeline_schedule 1f1b."
        )


def check_sequence(run: RunConfig) -> None:
    """The sequence fits the model's positions and can be cut over the tensor axis."""
    seq_length, limit, tp = run.data.seq_length, run.model.max_position_embeddings, run.layout.tp
    if seq_length > limit:
        raise ConfigError(
            f"--seq_length {seq_length} is longer than --max_position_embeddings {limit}, for which the model is made; "
            "shorten it, or raise the latter (with --rope_scaling_factor, for rotary positions)."
        )
    if run.parallel.sequence_parallel and seq_length % tp:
        raise ConfigError(
            f"--seq_length {seq_length} cannot be cut into {tp} equal parts, as --sequence_parallel does over "
            f"--tensor_model_parallel_size {tp}; use a multiple of {tp}."
        )


def check_data(run: RunConfig) -> None:
    """There is training data, and validation data where it is asked for."""
    data, eval_iters = run.data, run.training.eval_iters
    if not data.data_path and not data.has_own_sources:
        raise ConfigError(
            "--data_path is missing, and there is nothing to train on; give the prefix of a .bin/.idx pair, or a "
            ".jsonl or .txt file."
        )
    _check_split(data)
    if run.model.bert_head:
        check_pairs(run)
    else:
        check_no_pairs(run)
        check_fill_in_middle(run)
    if data.train_data_path and not data.valid_data_path and eval_iters:
        raise ConfigError(
            f"--eval_iters {eval_iters} has no validation data to read; give --valid_data_path, or --eval_iters 0."
        )


def _check_split(data: DataConfig) -> None:
    """It can be read, and nobody asks for a cut in vain; all for training is what data of its own is."""
    shares = parse_split(data.split)
    if data.train_data_path and shares not in (parse_split(DataConfig.split), (1.0, 0.0, 0.0)):
        raise ConfigError(
            f"--split {data.split} cuts --data_path, and --train_data_path is taken whole; drop --split, or give "
            "--data_path alone."
        )


def check_pairs(run: RunConfig) -> None:
    """BERT's samples are pairs of texts, and flags about other samples are refused."""
    data, what = run.data, "a BERT trains on pairs of texts"
    flags = {
        f"--data_type {data.data_type}": data.data_type != "gpt",
        "--reset_position_ids": data.reset_position_ids,
        "--reset_attention_mask": data.reset_attention_mask,
        "--eod_mask_loss": data.eod_mask_loss,
        f"--fim_rate {data.fim_rate:g}": data.fim_rate != 0,
        **_ways_to_fill_in(data),
    }
    wrong = [flag for flag, is_given in flags.items() if is_given]
    if wrong:
        raise ConfigError(f"{wrong[0]} is about other samples: {what}; drop it.")
    if data.seq_length < MIN_PAIR_LENGTH:
        raise ConfigError(
            f"--seq_length {data.seq_length} has no room: {what}, at least one token of each beside [CLS] and two "
            f"[SEP]; use {MIN_PAIR_LENGTH} or more."
        )


def check_no_pairs(run: RunConfig) -> None:
    """Nobody asks for hidden tokens in vain."""
    for name in ("mask_prob", "short_seq_prob"):
        value = getattr(run.data, name)
        if value != getattr(DataConfig, name):
            raise ConfigError(f"--{name} {value:g} is about a BERT's samples; give --model_name bert, or drop it.")


def check_fill_in_middle(run: RunConfig) -> None:
    """Nobody says how documents are rearranged where none is."""
    wrong = [flag for flag, is_given in _ways_to_fill_in(run.data).items() if is_given]
    if wrong and not run.data.fim_rate:
        raise ConfigError(
            f"{wrong[0]} says how documents are rearranged, and without --fim_rate none is; give --fim_rate 0.5, say, "
            "or drop it."
        )


def _ways_to_fill_in(data: DataConfig) -> dict[str, bool]:
    return {
        f"--fim_tokens {' '.join(data.fim_tokens)}": bool(data.fim_tokens),
        f"--fim_spm_rate {data.fim_spm_rate:g}": data.fim_spm_rate != DataConfig.fim_spm_rate,
    }
