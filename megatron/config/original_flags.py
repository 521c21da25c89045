"""Flags of Megatron-LM and Megatron-LLM that are no flags here: which may be typed still, and which are refused.

`ACCEPTED` changed how something was computed, never what: a script that has them keeps working, with a warning that
names what took their place. `REFUSED` would change the result, so that ignoring them would train something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Accepted:
    """`instead` says what took the flag's place. With `harmless`, other values are refused with `otherwise`."""

    instead: str
    takes_value: bool = False
    harmless: tuple[str, ...] = ()
    otherwise: str = ""


_FUSED = "PyTorch chooses the fused kernel; --compile fuses more"
_LINEAR = "the linear layers overlap communication by themselves"
_ZERO = "data parallelism is chosen with --zero_stage"
_FP32 = "this is always done in fp32"
_TIMERS = "every log line has the times, at no cost"
_TENSORBOARD = "TensorBoard gets all that metrics.jsonl gets, every --log_interval"
_RANDOMNESS = "there is no random state: randomness is a function of --seed and the position"

ACCEPTED: Final[Mapping[str, Accepted]] = MappingProxyType(
    {
        "no_masked_softmax_fusion": Accepted(_FUSED),
        "no_bias_gelu_fusion": Accepted(_FUSED),
        "no_bias_dropout_fusion": Accepted(_FUSED),
        "no_persist_layer_norm": Accepted(_FUSED),
        "onnx_safe": Accepted(_FUSED, takes_value=True),
        "no_async_tensor_model_parallel_allreduce": Accepted(_LINEAR),
        "no_gradient_accumulation_fusion": Accepted(_LINEAR),
        "DDP_impl": Accepted(_ZERO, takes_value=True),
        "no_contiguous_buffers_in_local_ddp": Accepted(_ZERO),
        "distributed_backend": Accepted("--device chooses: NCCL on cuda, gloo on cpu", takes_value=True),
        "local_rank": Accepted("torchrun tells each process its rank", takes_value=True),
        "use_cpu_initialization": Accepted("initial weights are the same for every layout"),
        "no_initialization": Accepted("weights are filled once, from the checkpoint or the seed"),
        "empty_unused_memory_level": Accepted("PYTORCH_CUDA_ALLOC_CONF tunes the allocator", takes_value=True),
        "no_scatter_gather_tensors_in_pipeline": Accepted("--sequence_parallel sends slices between stages"),
        "use_ring_exchange_p2p": Accepted("torch.distributed sends between stages"),
        "no_query_key_layer_scaling": Accepted("queries and keys are never scaled by the layer number"),
        "attention_softmax_in_fp32": Accepted(_FP32),
        "accumulate_allreduce_grads_in_fp32": Accepted(_FP32),
        "fp16_lm_cross_entropy": Accepted(_FP32),
        "no_save_rng": Accepted(_RANDOMNESS),
        "no_load_rng": Accepted(_RANDOMNESS),
        "override_opt_param_scheduler": Accepted("the schedule on the command line always holds"),
        "mmap_warmup": Accepted("the data is read through the page cache"),
        "timing_log_level": Accepted(_TIMERS, takes_value=True),
        "timing_log_option": Accepted(_TIMERS, takes_value=True),
        "barrier_with_L1_time": Accepted(_TIMERS),
        "tensorboard_log_interval": Accepted(_TENSORBOARD, takes_value=True),
        "tensorboard_queue_size": Accepted(_TENSORBOARD, takes_value=True),
        "log_timers_to_tensorboard": Accepted(_TENSORBOARD),
        "log_batch_size_to_tensorboard": Accepted(_TENSORBOARD),
        "log_memory_to_tensorboard": Accepted(_TENSORBOARD),
        "log_world_size_to_tensorboard": Accepted(_TENSORBOARD),
        "log_validation_ppl_to_tensorboard": Accepted(_TENSORBOARD),
        "log_learning_rate_to_tensorboard": Accepted(_TENSORBOARD, takes_value=True),
        "log_loss_scale_to_tensorboard": Accepted(_TENSORBOARD, takes_value=True),
        "model_type": Accepted(
            "--model_name says what the model is",
            True,
            ("encoder_or_decoder",),
            "there are no encoder-decoder models here",
        ),
        "data_impl": Accepted(
            "data is memory-mapped",
            True,
            ("infer", "mmap"),
            "only memory-mapped data is read; tokenize again with tools/preprocess_data.py",
        ),
        "dataloader_type": Accepted(
            "samples come in the order of the seeded index",
            True,
            ("single",),
            "samples come in the order of the seeded index only; drop it",
        ),
        "transformer_impl": Accepted(
            "there is one implementation", True, ("local",), "Transformer Engine is not used; drop it"
        ),
        "weight_decay_incr_style": Accepted(
            "the weight decay is constant", True, ("constant",), "the weight decay is constant; set --weight_decay"
        ),
        "sample_rate": Accepted(
            "all of the data is used", True, ("1", "1.0"), "all of the data is used; tokenize a part of it instead"
        ),
    }
)


def _alike(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        **_alike(
            "fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
            "belongs to float16 training, which is not available yet; use --bf16, which needs no loss scale.",
        ),
        **_alike(
            "fp8_e4m3 fp8_hybrid fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo no_fp8_wgrad",
            "belongs to FP8 training, which is not available; use --bf16.",
        ),
        "fp32_residual_connection": "is not available: the residual stream has the type of the weights; drop it.",
        **_alike(
            "wandb_logger wandb_project wandb_name wandb_id wandb_api_key wandb_entity wandb_resume",
            "is not available yet: Weights & Biases gets nothing; use --tensorboard_dir, or <save>/metrics.jsonl.",
        ),
        "rampup_batch_size": (
            "is not available yet: the global batch size is constant; start with a smaller --global_batch_size and "
            "continue from its checkpoint with a larger one."
        ),
        **_alike(
            "train_samples lr_decay_samples lr_warmup_samples",
            "counts samples, and this program counts iterations; divide by --global_batch_size and use --train_iters, "
            "--lr_decay_iters or --lr_warmup_iters.",
        ),
        "lima_dropout": "is not available yet: dropout is alike in all layers; use --hidden_dropout.",
        **_alike(
            "start_weight_decay end_weight_decay",
            "is not available: the weight decay is constant; use --weight_decay.",
        ),
        "use_checkpoint_opt_param_scheduler": (
            "is not available: the schedule on the command line holds; repeat its flags, or give --config with the "
            "config.yaml beside the checkpoint."
        ),
        "exit_duration_in_mins": "is not available yet; use --exit_interval, or send SIGTERM, which saves and leaves.",
        "skip_iters": "is not available: no iteration is skipped; remove the harmful documents from the data.",
        "eval_only": "is not available yet: evaluation happens during training; see --eval_interval and --eval_iters.",
        "metrics": "is not available yet: the evaluation reports the loss; drop it.",
        **_alike(
            "log_params_norm log_num_zeros_in_grad",
            "is not available yet; the log has the gradient norm. Drop it.",
        ),
        "apply_residual_connection_post_layernorm": (
            "is not available: norms come before their sublayers, or behind both with --use_post_ln; drop it."
        ),
        "init_method_xavier_uniform": "is not available: initial weights are normal; use --init_method_std.",
        "data_parallel_random_init": "is not available: data-parallel processes hold the same weights; drop it.",
        "distribute_saved_activations": "is not available; --sequence_parallel cuts what is kept over the tensor axis.",
        **_alike(
            "pipeline_model_parallel_split_rank standalone_embedding_stage",
            "is not available: the layers are dealt out by --pipeline_model_parallel_size alone; drop it.",
        ),
        **_alike(
            "inference_batch_times_seqlen_threshold max_tokens_to_oom",
            "belongs to text generation, which this program does not do; drop it.",
        ),
        **_alike("adlr_autoresume adlr_autoresume_interval", "is not available; --save and --load resume a run."),
        **_alike(
            "decoder_num_layers decoder_seq_length retriever_seq_length ict_head_size "
            "biencoder_projection_dim biencoder_shared_query_context_model ict_load bert_load titles_data_path "
            "query_in_block_prob use_one_sent_docs evidence_data_path retriever_report_topk_accuracies "
            "retriever_score_scaling block_data_path embedding_path indexer_batch_size indexer_log_interval "
            "num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction no_data_sharding "
            "head_lr_mult iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size "
            "dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp "
            "dino_teacher_temp dino_warmup_teacher_temp_epochs",
            "belongs to models that do not exist here (T5, retrieval, vision); drop it.",
        ),
    }
)
