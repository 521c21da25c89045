"""Text to token ids: one protocol; SentencePiece, Hugging Face, and ids that exist already. Imports no torch."""

from megatron.tokenizer.build import build_tokenizer, fit_to_vocabulary
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.protocol import Tokenizer, TokenizerIdentity

__all__ = ["Tokenizer", "TokenizerConfig", "TokenizerIdentity", "build_tokenizer", "fit_to_vocabulary"]
