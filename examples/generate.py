"""Lets one or several Hugging Face models continue the same prompt, with transformers alone.

    python examples/generate.py before after --prompt "It is a truth"

Nothing of this project is imported: what is generated here, any program that reads the format generates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    logging.disable_progress_bar()
    for folder in options.models:
        print(f"{folder}:\n{generate(folder, options)}\n")


def generate(folder: str, options: argparse.Namespace) -> str:
    """The prompt and what the model in `folder` makes of it; drawn at random, and alike for the same seed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    torch.manual_seed(options.seed)
    tokens = model.generate(
        **prompt,
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=options.temperature,
        top_k=options.top_k,
        pad_token_id=model.config.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="DIR", help="Hugging Face model folders, with their tokenizers")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the distribution; default: %(default)s")
    parser.add_argument("--top_k", type=int, default=50, help="most likely tokens to draw from; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
