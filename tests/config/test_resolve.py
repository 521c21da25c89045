"""From typed flags to a whole configuration: what is inferred, where the architecture comes from, what is refused."""

import dataclasses

import pytest

from megatron.config import CheckpointArguments, RunConfig, TypedFlags, parse_run, resolve, resolve_tokenizer
from megatron.core.layout import ParallelLayout
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig, RopeScaling
from megatron.model.presets import preset

SMALL = {
    "num_layers": "8",
    "hidden_size": "64",
    "num_attention_heads": "8",
    "num_attention_heads_kv": "2",
    "ffn_hidden_size": "96",
    "max_position_embeddings": "128",
    "micro_batch_size": "2",
    "train_iters": "100",
    "lr": "1e-3",
    "data_path": "tokens",
}
STORED = ModelConfig(
    num_layers=6,
    hidden_size=64,
    num_attention_heads=8,
    num_attention_heads_kv=2,
    ffn_hidden_size=96,
    vocab_size=1031,
    max_position_embeddings=256,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
CHECKPOINT = CheckpointArguments(
    STORED, seq_length=64, tokenizer={"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/t.model"}
)
RUN_ONLY = {name: SMALL[name] for name in ("micro_batch_size", "train_iters", "lr", "data_path")}
FROM_CHECKPOINT = {**RUN_ONLY, "load": "/ckpt", "use_checkpoint_args": None}


def typed(flags: dict[str, str | None], **more: object) -> TypedFlags:
    """The flags, with `more` on top; None is a flag without a value, and False leaves one out."""
    tokens: list[str] = []
    for name, value in {**flags, **more}.items():
        if value is not False:
            tokens += [f"--{name}"] if value is None else [f"--{name}={value}"]
    return parse_run(tokens)


def small_run(world_size: int = 1, **more: object) -> RunConfig:
    return resolve(typed(SMALL, **more), world_size, tokenizer_vocab_size=1031)


def from_checkpoint(world_size: int = 1, **more: object) -> RunConfig:
    return resolve(typed(FROM_CHECKPOINT, **more), world_size, checkpoint=CHECKPOINT)


def test_data_parallelism_takes_the_processes_that_tensor_and_pipeline_leave():
    run = small_run(16, tensor_model_parallel_size=4, pipeline_model_parallel_size=2)
    assert run.layout == ParallelLayout(tp=4, pp=2, dp=2)


@pytest.mark.parametrize(("global_batch_size", "expected"), [(False, 1), (8, 1), (48, 6)])
def test_micro_batches_are_the_global_batch_over_micro_batch_and_data_ranks(global_batch_size, expected):
    run = small_run(4, global_batch_size=global_batch_size)
    assert run.num_microbatches == expected
    assert run.training.global_batch_size == expected * 2 * 4


def test_a_whole_number_of_padded_vocabulary_rows_lies_on_each_tensor_rank():
    # 1031 rows; multiples of 128 x 4 = 512 and of 8 x 4 = 32.
    assert small_run(4, tensor_model_parallel_size=4).padded_vocab_size == 1536
    assert small_run(4, tensor_model_parallel_size=4, make_vocab_size_divisible_by=8).padded_vocab_size == 1056
    assert small_run(1, make_vocab_size_divisible_by=1).padded_vocab_size == 1031


def test_defaults_that_depend_on_others():
    run = small_run(seq_length=False)
    assert run.data.seq_length == 128
    assert run.optimizer.lr_decay_iters == 100
    assert (run.parallel.zero_stage, run.parallel.pipeline_schedule) == (0, "1f1b")
    assert small_run(use_distributed_optimizer=None).parallel.zero_stage == 1
    assert small_run(recompute_granularity="full").parallel.recompute_method == "uniform"
    assert small_run(max_position_embeddings=False, seq_length=48).model.max_position_embeddings == 48


def test_a_warm_up_share_counts_iterations_of_the_decay():
    assert small_run(lr_warmup_fraction=0.25, lr_decay_iters=40).optimizer.lr_warmup_iters == 10


def test_the_stage_size_gives_interleaving_and_the_stages_of_a_rank():
    more = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 8}
    run = small_run(2, **more)
    assert (run.parallel.pipeline_schedule, run.num_stages_per_rank) == ("interleaved", 2)
    assert small_run(2, pipeline_model_parallel_size=2).num_stages_per_rank == 1


def test_key_value_heads_may_be_fewer_than_tensor_ranks():
    assert small_run(8, tensor_model_parallel_size=8).layout.tp == 8


def test_options_without_effect_are_noted_for_the_summary():
    notes = " ".join(small_run(sequence_parallel=None, zero_stage=3).notes)
    assert "--sequence_parallel changes nothing at --tensor_model_parallel_size 1" in notes
    assert "--zero_stage 3 shards nothing" in notes
    assert "no --save" in notes
    assert small_run(2, zero_stage=3, save="/out").notes == ()


def test_a_family_sets_its_architecture_and_typed_flags_win():
    run = small_run(model_name="llama2", layernorm_epsilon="1e-6")
    assert (run.model.glu_activation, run.model.use_rms_norm, run.model.tie_embed_logits) == ("swiglu", True, False)
    assert run.model.layernorm_epsilon == 1e-6
    assert run.model.vocab_size == 1031


def test_a_published_size_is_the_preset():
    run = resolve(typed(RUN_ONLY, model_name="llama2", size="70"), 1, tokenizer_vocab_size=32000)
    assert run.model == preset("llama2", "70")
    assert run.data.seq_length == 4096


def test_a_checkpoint_gives_architecture_sequence_length_and_tokenizer_and_nothing_of_the_run():
    run = from_checkpoint(2, pipeline_model_parallel_size=2)
    assert run.model == STORED
    assert run.data.seq_length == 64
    assert run.tokenizer.path == "/t.model"
    assert (run.layout, run.training.micro_batch_size) == (ParallelLayout(pp=2), 2)


def test_typed_values_win_over_the_checkpoint_where_its_weights_keep_their_meaning():
    run = from_checkpoint(hidden_dropout=0.1, seq_length=512, rope_scaling_factor=2, max_position_embeddings=512)
    expected = dataclasses.replace(
        STORED, hidden_dropout=0.1, rope_scaling=RopeScaling("linear", 2.0), max_position_embeddings=512
    )
    assert run.model == expected
    assert run.data.seq_length == 512


def test_a_typed_tokenizer_takes_the_place_of_the_checkpoint_s_as_a_whole():
    flags = typed(FROM_CHECKPOINT, tokenizer_type="NullTokenizer", vocab_size=9)
    assert resolve_tokenizer(flags, CHECKPOINT) == resolve_tokenizer(flags)
    added = resolve_tokenizer(typed(FROM_CHECKPOINT, vocab_extra_ids_list="[a],[b]"), CHECKPOINT)
    assert (added.path, added.vocab_extra_ids_list) == ("/t.model", ("[a]", "[b]"))


def test_without_use_checkpoint_args_a_checkpoint_changes_nothing():
    flags = typed(SMALL, load="/ckpt")
    assert resolve(flags, 1, checkpoint=CHECKPOINT, tokenizer_vocab_size=1031).model.num_layers == 8


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": None, "use_distributed_optimizer": None}),
        (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 8}),
        (
            1,
            {"model_name": "llama3", "rope_scaling_factor": 2, "lr_warmup_fraction": 0.1, "save": "/out", "bf16": None},
        ),
        (1, {"vocab_extra_ids_list": "[a],[b]", "recompute_granularity": "full", "no_save_optim": None}),
    ],
)
def test_a_resolved_configuration_written_as_yaml_resolves_to_itself(world_size, more, tmp_path):
    run = small_run(world_size, **more)
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    assert resolve(parse_run(["--config", str(path)]), world_size, tokenizer_vocab_size=1031) == run


def test_a_configuration_taken_from_a_checkpoint_survives_yaml_too(tmp_path):
    run = from_checkpoint()
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    assert resolve(parse_run(["--config", str(path)]), 1, checkpoint=CHECKPOINT) == run


BAD_RUNS = [
    (
        3,
        {"tensor_model_parallel_size": 2},
        (
            "3 processes cannot be divided into groups of 2 (--tensor_model_parallel_size 2 x "
            "--pipeline_model_parallel_size 1); start a multiple of 2 processes or choose smaller sizes."
        ),
    ),
    (
        3,
        {"tensor_model_parallel_size": 3},
        "--num_attention_heads 8 cannot be split over --tensor_model_parallel_size 3; use a divisor of 8.",
    ),
    (
        4,
        {"tensor_model_parallel_size": 4, "ffn_hidden_size": 90},
        "--ffn_hidden_size 90 cannot be split over --tensor_model_parallel_size 4; use a divisor of 90.",
    ),
    (
        2,
        {"tensor_model_parallel_size": 2, "num_attention_heads": 12, "num_attention_heads_kv": 3, "hidden_size": 48},
        (
            "--num_attention_heads_kv 3 cannot be split over --tensor_model_parallel_size 2; use a divisor or "
            "a multiple of 3."
        ),
    ),
    (
        9,
        {"pipeline_model_parallel_size": 9},
        (
            "--num_layers 8 cannot fill 9 pipeline stages with a layer each; lower "
            "--pipeline_model_parallel_size to at "
            "most 8."
        ),
    ),
    (
        2,
        {"global_batch_size": 6},
        "--global_batch_size 6 is not a multiple of 4 (--micro_batch_size 2 x 2 data-parallel ranks); use 4 or 8.",
    ),
    (
        2,
        {"global_batch_size": 3},
        "--global_batch_size 3 is not a multiple of 4 (--micro_batch_size 2 x 2 data-parallel ranks); use 4.",
    ),
    (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": None, "seq_length": 63},
        (
            "--seq_length 63 cannot be cut into 2 equal parts, as --sequence_parallel does over "
            "--tensor_model_parallel_size 2; use a multiple of 2."
        ),
    ),
    (
        1,
        {"seq_length": 129},
        (
            "--seq_length 129 is longer than --max_position_embeddings 128, for which the model is made; "
            "shorten it, or "
            "raise the latter (with --rope_scaling_factor, for rotary positions)."
        ),
    ),
    (
        1,
        {"num_layers_per_virtual_pipeline_stage": 1},
        (
            "--pipeline_model_parallel_size 1 has nothing to interleave; raise it, or drop "
            "--num_layers_per_virtual_pipeline_stage and --pipeline_schedule interleaved."
        ),
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved"},
        "--pipeline_schedule interleaved needs the size of its stages; give --num_layers_per_virtual_pipeline_stage.",
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe", "num_layers_per_virtual_pipeline_stage": 2},
        (
            "--pipeline_schedule gpipe has one stage per process, so --num_layers_per_virtual_pipeline_stage 2 has no "
            "meaning; drop one of the two."
        ),
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        (
            "--num_layers 8 cannot be dealt out to 2 pipeline ranks in stages of "
            "--num_layers_per_virtual_pipeline_stage 3: "
            "8 is not a multiple of 6; choose another size, or --pipeline_schedule 1f1b, which allows uneven stages."
        ),
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 6},
        (
            "--global_batch_size 6 gives 3 micro-batches, and an interleaved schedule needs a multiple of "
            "--pipeline_model_parallel_size 2; use a multiple of 4, or --pipeline_schedule 1f1b."
        ),
    ),
    (
        1,
        {"zero_stage": 2, "use_distributed_optimizer": None},
        "--use_distributed_optimizer means --zero_stage 1, and --zero_stage 2 was given; drop one of the two.",
    ),
    (
        1,
        {"recompute_granularity": "selective", "recompute_method": "uniform"},
        (
            "--recompute_method uniform is for whole layers, and --recompute_granularity is selective; drop it or use "
            "--recompute_granularity full."
        ),
    ),
    (
        1,
        {"recompute_num_layers": 2},
        (
            "--recompute_num_layers 2 is for whole layers, and --recompute_granularity is not given; drop it or use "
            "--recompute_granularity full."
        ),
    ),
    (
        1,
        {"recompute_granularity": "full", "recompute_num_layers": 9},
        "--recompute_num_layers 9 is more than the 8 layers of the model; lower it.",
    ),
    (
        1,
        {"eval_iters": 0, "data_path": False, "train_data_path": "a", "split": "9,1"},
        "--split 9,1 cuts --data_path, and --train_data_path is taken whole; drop --split, or give --data_path alone.",
    ),
    (
        1,
        {"eval_iters": 5, "data_path": False, "train_data_path": "a"},
        "--eval_iters 5 has no validation data to read; give --valid_data_path, or --eval_iters 0.",
    ),
    (
        1,
        {"data_path": False},
        (
            "--data_path is missing, and there is nothing to train on; give the prefix of a .bin/.idx pair, or "
            "a .jsonl or "
            ".txt file."
        ),
    ),
    (
        1,
        {"lr": False},
        "--lr is missing, and it has no default (highest learning rate); give it.",
    ),
    (
        1,
        {"micro_batch_size": False},
        "--micro_batch_size is missing, and it has no default (samples that pass through the model at once); give it.",
    ),
    (
        1,
        {"train_iters": False},
        "--train_iters is missing, and it has no default (optimizer steps of the whole run); give it.",
    ),
    (
        1,
        {"num_layers": False, "hidden_size": False},
        (
            "--num_layers, --hidden_size are missing, so the architecture is not known; give all sizes, or "
            "--model_name with "
            "a published --size, or --load PATH --use_checkpoint_args."
        ),
    ),
    (
        1,
        {"max_position_embeddings": False},
        (
            "--max_position_embeddings is missing, so the architecture is not known; give all sizes, or "
            "--model_name with a "
            "published --size, or --load PATH --use_checkpoint_args."
        ),
    ),
    (
        1,
        {"num_attention_heads": 0},
        "--num_attention_heads 0 is not a size; use 1 or more.",
    ),
    (
        1,
        {"hidden_dropout": 1},
        "--hidden_dropout 1.0 is not a probability below 1; use 0 for no dropout.",
    ),
    (
        1,
        {"rope_theta": 0},
        "--rope_theta 0.0 is not positive; leave it out for the family's own.",
    ),
    (
        1,
        {"init_method_std": -1},
        "--init_method_std -1.0 is negative; use 0.02, say.",
    ),
    (
        1,
        {"size": "70", "model_name": "gpt"},
        "--size 70: gpt was not published in this size; give --num_layers, --hidden_size and so on.",
    ),
    (
        1,
        {"lr_warmup_iters": 100},
        (
            "--lr_warmup_iters 100 leaves none of the 100 iterations (--lr_decay_iters, by default "
            "--train_iters) to decay "
            "over; shorten the warm-up."
        ),
    ),
    (
        1,
        {"use_checkpoint_args": None, "load": "/ckpt"},
        "--use_checkpoint_args: nothing was read from --load /ckpt; check the path.",
    ),
]


@pytest.mark.parametrize(("world_size", "more", "expected"), BAD_RUNS)
def test_a_run_that_cannot_be_says_why_and_what_to_do(world_size, more, expected):
    with pytest.raises(ConfigError) as caught:
        small_run(world_size, **more)
    assert str(caught.value) == expected


@pytest.mark.parametrize("split", ["969, 30, 1", "1,0,0"])
def test_a_split_that_cuts_nothing_may_stand_beside_training_data_of_its_own(split):
    assert small_run(data_path=False, train_data_path="a", split=split, eval_iters=0).data.train_data_path == ("a",)


def test_a_vocabulary_that_nothing_tells_is_asked_for():
    with pytest.raises(ConfigError) as caught:
        resolve(typed(SMALL), 1)
    assert str(caught.value) == (
        "the size of the vocabulary is not known; give a tokenizer with --tokenizer_model, or --tokenizer_type "
        "NullTokenizer --vocab_size N."
    )


def test_a_vocabulary_smaller_than_the_tokenizer_s_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {vocab_size: 1000}")
    with pytest.raises(ConfigError) as caught:
        small_run(config=str(path))
    assert str(caught.value) == (
        "vocab_size 1000 of the model is smaller than the tokenizer's 1031 ids; leave it out, and the model gets a row "
        "for each."
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"num_layers": 7, "glu_activation": "geglu"},
            (
                "--num_layers 7 (checkpoint: 6), --glu_activation geglu (checkpoint: swiglu): typed values "
                "differ from the "
                "checkpoint that --use_checkpoint_args takes them from; leave them out."
            ),
        ),
        (
            {"model_name": "llama2", "num_layers": 6},
            None,
        ),
    ],
)
def test_typed_sizes_may_repeat_the_checkpoint_but_not_contradict_it(more, expected):
    if expected is None:
        assert from_checkpoint(**more).model == STORED
        return
    with pytest.raises(ConfigError) as caught:
        from_checkpoint(**more)
    assert str(caught.value) == expected


def test_learned_positions_of_a_checkpoint_cannot_be_extended():
    absolute = dataclasses.replace(STORED, position_embedding_type="absolute")
    with pytest.raises(ConfigError, match=r"^--max_position_embeddings 512 \(checkpoint: 256\): typed values differ"):
        resolve(typed(FROM_CHECKPOINT, max_position_embeddings=512), 1, checkpoint=CheckpointArguments(absolute))


def test_a_checkpoint_of_another_family_is_named():
    layer_norm = dataclasses.replace(STORED, use_rms_norm=False)
    with pytest.raises(ConfigError) as caught:
        resolve(typed(FROM_CHECKPOINT, model_name="llama2"), 1, checkpoint=CheckpointArguments(layer_norm))
    assert str(caught.value) == (
        "--model_name llama2 has use_rms_norm True, and the checkpoint has False: it is of another family; give the "
        "family it was made from."
    )
