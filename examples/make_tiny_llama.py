"""Makes a small Llama with random weights in the format of Hugging Face: a stand-in for one that you download.

    python examples/make_tiny_llama.py --tokenizer tokenizer/tokenizer.model --output tiny-llama

Like the large models of its family it has fewer key/value heads than query heads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    logging.disable_progress_bar()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(options.tokenizer))
    config = LlamaConfig(
        vocab_size=pieces.vocab_size(),
        bos_token_id=pieces.bos_id(),
        eos_token_id=pieces.eos_id(),
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_attention_heads_kv,
        max_position_embeddings=options.max_position_embeddings,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(options.output)
    shutil.copyfile(options.tokenizer, options.output / "tokenizer.model")
    # transformers reads a lone tokenizer.model correctly where the class is named; elsewhere it guesses another.
    (options.output / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}) + "\n")
    print(f"wrote {options.output}: a Llama with {model.num_parameters():,} random parameters")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece tokenizer.model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--num_layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--hidden_size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--ffn_hidden_size", type=int, default=688, help="default: %(default)s")
    parser.add_argument("--num_attention_heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--num_attention_heads_kv", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--max_position_embeddings", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
