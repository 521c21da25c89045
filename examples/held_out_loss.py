"""What Hugging Face models make of text they were not trained on: the mean loss of a token, with transformers alone.

    python examples/held_out_loss.py before after --text novel.jsonl --last_documents 6 --expected_fall 2.5

The documents are joined by the end-of-sequence token, as in training, and read in windows that do not overlap.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    logging.disable_progress_bar()
    texts = [json.loads(line)["text"] for line in options.text.read_text(encoding="utf-8").splitlines()]
    losses = [held_out_loss(folder, texts[-options.last_documents :], options.seq_length) for folder in options.models]
    for folder, loss in zip(options.models, losses, strict=True):
        print(f"{folder}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.1f}")
    fall = losses[0] - losses[-1]
    if options.expected_fall is not None and fall < options.expected_fall:
        sys.exit(f"the held-out loss fell by {fall:.4f}; expected was a fall by at least {options.expected_fall}")


@torch.no_grad()
def held_out_loss(folder: str, texts: Sequence[str], seq_length: int) -> float:
    """The mean cross-entropy in nats per token; what is left after the last whole window is not counted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for batch in _windows(tokenizer, texts, seq_length).split(16):
        logits = model(batch[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().item()


def _windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seq_length: int) -> Tensor:
    """[windows, seq_length + 1]; the last token of a window is the first one of the next."""
    tokens = torch.tensor([token for text in texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)])
    return tokens.unfold(0, seq_length + 1, seq_length)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="DIR", help="Hugging Face model folders, with their tokenizers")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help='JSON lines with the key "text"')
    parser.add_argument("--last_documents", type=int, default=0, metavar="N", help="of the file; default: all of them")
    parser.add_argument(
        "--seq_length", type=int, default=128, metavar="N", help="tokens of a window; default: %(default)s"
    )
    parser.add_argument(
        "--expected_fall", type=float, metavar="X", help="fail unless the last model's loss is X below the first one's"
    )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
