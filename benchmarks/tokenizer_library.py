"""One cold run of a tokenizer's library alone: prints its seconds and CPU seconds for the texts of a file.

python -m benchmarks.tokenizer_library FILE TOKENIZER_MODEL NUM_THREADS
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron.data.documents import read_texts
from megatron.tokenizer import TokenizerConfig, build_tokenizer
from megatron.tokenizer.library import LibraryTokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer


def main(file: str, tokenizer_model: str, num_threads: str) -> None:
    texts = list(read_texts([Path(file)], "text"))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=tokenizer_model))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    # The fastest call that each library has for many texts; `tokenizers` takes every core there is.
    if isinstance(tokenizer, LibraryTokenizer):
        tokenizer.library.encode_batch_fast(texts, add_special_tokens=False)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.library.encode(texts, num_threads=int(num_threads))
    print(time.perf_counter() - start_s, time.process_time() - start_cpu_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
