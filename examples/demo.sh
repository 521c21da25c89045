#!/usr/bin/env bash
# From raw text to a trained model in Hugging Face format, on the CPU: what `make demo` runs.
#
# Every command is printed as it is run, and can be typed as it stands from the root of the repository, with
# .venv/bin on the PATH. Everything is written to demo/, where a second run starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

# Four processes share the cores, so each gets one thread; nothing is looked up on the hub; and a GPU is left alone,
# because four processes need four of them.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Prints the command that it reads from its input, and runs it. One that fails ends the demo and is named.
run() {
    local command
    command=$(cat)
    printf '\n$ %s\n' "$command"
    if ! bash -euo pipefail -c "$command" </dev/null; then
        printf '\nThe demo stops here, because this command failed:\n%s\n' "$command" >&2
        exit 1
    fi
}

run <<'COMMAND'
rm -rf demo && mkdir demo
COMMAND

step "1. A tokenizer, learned from the text of a novel"
run <<'COMMAND'
python tools/train_tokenizer.py --input examples/data/pride_and_prejudice.jsonl --output demo/tokenizer --vocab_size 2048
COMMAND

step "2. Text to tokens"
run <<'COMMAND'
python tools/preprocess_data.py --input examples/data/pride_and_prejudice.jsonl --output_prefix demo/data/novel \
    --tokenizer_type SentencePieceTokenizer --tokenizer_model demo/tokenizer/tokenizer.model \
    --no_new_tokens --append_eod
COMMAND

step "3. A small Llama with random weights, in the format of Hugging Face"
run <<'COMMAND'
python examples/make_tiny_llama.py --tokenizer demo/tokenizer/tokenizer.model --output demo/llama
COMMAND

step "4. Its weights in the native format, and the proof that they mean the same"
run <<'COMMAND'
python weights_conversion/hf_to_megatron.py llama2 --model-path=demo/llama --out=demo/native
COMMAND
run <<'COMMAND'
python verify_correctness.py --model_name llama2 --load demo/native --huggingface_path demo/llama
COMMAND

step "5. One file for each of four processes: tensor parallel 2 x pipeline parallel 2"
run <<'COMMAND'
python tools/checkpoint_util.py --target_tensor_parallel_size 2 --target_pipeline_parallel_size 2 \
    --load_dir demo/native --save_dir demo/sharded --model_type llama2
COMMAND

step "6. Training on four processes: tensor, sequence and pipeline parallel. It is stopped half-way"
run <<'COMMAND'
torchrun --nproc_per_node 4 finetune.py --model_name llama2 \
    --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --sequence_parallel \
    --recompute_granularity selective \
    --load demo/sharded --use_checkpoint_args --no_new_tokens --save demo/tp2-pp2 --save_interval 140 \
    --data_path demo/data/novel_text_document --split 55,6,0 --seq_length 128 \
    --micro_batch_size 4 --global_batch_size 16 --train_iters 300 --exit_interval 150 \
    --lr 3e-3 --min_lr 1e-4 --lr_decay_style cosine --lr_warmup_iters 20 --weight_decay 0.1 --adam_beta2 0.95 \
    --eval_interval 50 --eval_iters 8
COMMAND

step "7. The rest on another layout: no tensor parallelism, pipeline parallel 2 x data parallel 2, ZeRO-1.
   It starts from the checkpoint of iteration 140, so that both layouts do ten iterations"
run <<'COMMAND'
torchrun --nproc_per_node 4 finetune.py --model_name llama2 \
    --pipeline_model_parallel_size 2 --zero_stage 1 \
    --load demo/tp2-pp2 --load_iters 140 --use_checkpoint_args --no_new_tokens --save demo/pp2-dp2 \
    --data_path demo/data/novel_text_document --split 55,6,0 --seq_length 128 \
    --micro_batch_size 4 --global_batch_size 16 --train_iters 300 \
    --lr 3e-3 --min_lr 1e-4 --lr_decay_style cosine --lr_warmup_iters 20 --weight_decay 0.1 --adam_beta2 0.95 \
    --eval_interval 50 --eval_iters 8
COMMAND

step "8. The ten iterations that both layouts did have the same losses"
run <<'COMMAND'
python examples/compare_losses.py demo/tp2-pp2/metrics.jsonl demo/pp2-dp2/metrics.jsonl
COMMAND

step "9. One file again, back to Hugging Face, and the proof that it means the same"
run <<'COMMAND'
python tools/checkpoint_util.py --target_tensor_parallel_size 1 --target_pipeline_parallel_size 1 \
    --load_dir demo/pp2-dp2 --save_dir demo/merged --model_type llama2
COMMAND
run <<'COMMAND'
python weights_conversion/megatron_to_hf.py --input_dir demo/merged --output_dir demo/trained
COMMAND
run <<'COMMAND'
python verify_correctness.py --model_name llama2 --load demo/merged --huggingface_path demo/trained \
    --data_path demo/data/novel_text_document --no_new_tokens --seq_length 128 --train_iters 4
COMMAND

step "10. The figures of both runs in one file and in a picture"
run <<'COMMAND'
cat demo/tp2-pp2/metrics.jsonl demo/pp2-dp2/metrics.jsonl > demo/metrics.jsonl
COMMAND
run <<'COMMAND'
python examples/plot_loss.py demo/tp2-pp2/metrics.jsonl demo/pp2-dp2/metrics.jsonl --output demo/loss.png
COMMAND

step "11. Before and after, in transformers: six chapters that no step has seen, and text of their own"
run <<'COMMAND'
python examples/held_out_loss.py demo/llama demo/trained --text examples/data/pride_and_prejudice.jsonl \
    --last_documents 6 --expected_fall 2.5
COMMAND
run <<'COMMAND'
python examples/generate.py demo/llama demo/trained --prompt '"My dear Mr. Bennet,"'
COMMAND

step "Done in $SECONDS s. demo/loss.png shows the loss, demo/metrics.jsonl has the figures. What to try next:"
cat <<'NEXT'
  - step 7 on another layout, each with a --save folder of its own: --zero_stage 3; or --tensor_model_parallel_size 4
    without the other two; or plain `python finetune.py ...`, which is one process
  - a pipeline's schedule, drawn:
    python tools/draw_schedule.py --schedule 1f1b --pipeline_model_parallel_size 4 --num_microbatches 8
  - your own text: steps 1 and 2 take .jsonl and .txt files
  - a real Llama on GPUs: docs/guide/getting_started.md
NEXT
