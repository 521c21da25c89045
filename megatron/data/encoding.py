"""From a chunk of text to the tokens of its documents, in arrays that go to disk as they are."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.data.documents import Chunk, Document, Position, parse_chunk
from megatron.errors import DataError, TokenizerError
from megatron.tokenizer.protocol import TokenArray

EncodeBatch = Callable[[Sequence[str], int], list[TokenArray]]
"""The ids of every text. The number tells batches apart, for those who look closer at some of them."""
SplitText = Callable[[str], list[str]]


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of some documents under one key, end to end.

    tokens [t] in the dtype of the file; lengths int32 [s] of the sequences; num_sequences int32 [d] of the documents.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_sequences: np.ndarray


@dataclass(frozen=True)
class EncodedChunk:
    """For every key the texts of the same documents. `errors` are those of the records that hold none."""

    texts: tuple[EncodedTexts, ...]
    num_documents: int
    num_dropped: int
    errors: tuple[DataError, ...]
    longest_tokens: int
    num_bytes: int
    done_bytes: int
    end: Position


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes chunks; the same chunk always becomes the same arrays, in any thread.

    `bos` and `eod` begin and end every document where they are not None. With `split` a document is a sequence for
    every part of its text, else it is one sequence. With `skip_bad` a record without a document is left out and
    counted, else it raises `DataError`.
    """

    encode_batch: EncodeBatch
    keys: tuple[str, ...]
    vocab_size: int
    dtype: np.dtype
    bos: int | None = None
    eod: int | None = None
    split: SplitText | None = None
    skip_bad: bool = False

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        errors: list[DataError] = []
        documents = parse_chunk(chunk, self.keys, errors.append if self.skip_bad else None)
        filled = [document for document in documents if all(document.texts)]
        texts, bad = self._encode(chunk, filled)
        errors += bad
        kept = np.logical_and.reduce([_document_lengths(text) > 0 for text in texts])
        encoded = tuple(self._finish(text, kept) for text in texts)
        num_documents = int(kept.sum())
        return EncodedChunk(
            texts=encoded,
            num_documents=num_documents,
            num_dropped=len(documents) - len(bad) - num_documents,
            errors=tuple(errors),
            longest_tokens=max(int(_document_lengths(text).max(initial=0)) for text in encoded),
            num_bytes=chunk.num_bytes,
            done_bytes=chunk.done_bytes,
            end=chunk.end,
        )

    def _encode(self, chunk: Chunk, documents: list[Document]) -> tuple[list[_Sequences], list[DataError]]:
        """The documents' texts under every key, and the errors of those that the tokenizer refuses."""
        seed = zlib.crc32(f"{chunk.path}:{chunk.start.records}".encode())
        try:
            return self._encode_all(documents, seed), []
        except TokenizerError:  # ids that are no ids, say: the text is at fault, so its place is told
            encodable, errors = self._try_each(chunk, documents)
            return self._encode_all(encodable, seed), errors

    def _try_each(self, chunk: Chunk, documents: list[Document]) -> tuple[list[Document], list[DataError]]:
        encodable: list[Document] = []
        errors: list[DataError] = []
        for document in documents:
            try:
                self.encode_batch(document.texts, 0)
                encodable.append(document)
            except TokenizerError as error:
                placed = DataError(f"{chunk.place(document.number)}: {error}")
                if not self.skip_bad:
                    raise placed from error
                errors.append(placed)
        return encodable, errors

    def _encode_all(self, documents: list[Document], seed: int) -> list[_Sequences]:
        parts_of = [[self._parts(text) for text in column] for column in _columns(documents, len(self.keys))]
        flat = [part for parts_of_documents in parts_of for parts in parts_of_documents for part in parts]
        ids = iter(self.encode_batch(flat, seed))
        return [_sequences([len(parts) for parts in documents_parts], ids) for documents_parts in parts_of]

    def _parts(self, text: str) -> list[str]:
        return [text] if self.split is None else self.split(text)

    def _finish(self, text: _Sequences, kept: np.ndarray) -> EncodedTexts:
        """Leaves out empty sequences and the documents that are not kept, and adds their first and last tokens."""
        used = kept[text.document] & (text.lengths > 0)
        ids = text.ids if used.all() else list(itertools.compress(text.ids, used))
        lengths = text.lengths[used]
        num_sequences = np.bincount(text.document[used], minlength=len(kept))[kept].astype(np.int32)
        tokens = np.concatenate(ids) if ids else np.empty(0, np.int32)
        self._check_range(tokens)
        tokens, lengths = _with_ends(tokens, lengths, num_sequences, self.bos, self.eod)
        return EncodedTexts(tokens.astype(self.dtype, copy=False), lengths, num_sequences)

    def _check_range(self, tokens: np.ndarray) -> None:
        """A wrong id would become another one in the dtype of the file, and nobody would ever know."""
        if tokens.size and not 0 <= (wrong := int(tokens.view(np.uint32).max())) < self.vocab_size:
            raise TokenizerError(
                f"the tokenizer gave id {wrong}, and has {self.vocab_size} ids; its files are damaged or belong to "
                "different tokenizers: copy them from one model."
            )


@dataclass(frozen=True)
class _Sequences:
    """Sequences of some documents: their ids, their lengths [s], and for each the number of its document [s]."""

    ids: list[TokenArray]
    lengths: np.ndarray
    document: np.ndarray
    num_documents: int


def _columns(documents: list[Document], num_keys: int) -> list[list[str]]:
    return [[document.texts[i] for document in documents] for i in range(num_keys)]


def _sequences(counts: list[int], ids: Iterable[TokenArray]) -> _Sequences:
    own = list(itertools.islice(ids, sum(counts)))
    lengths = np.fromiter(map(len, own), dtype=np.int32, count=len(own))
    return _Sequences(own, lengths, np.repeat(np.arange(len(counts)), counts), len(counts))


def _document_lengths(text: _Sequences | EncodedTexts) -> np.ndarray:
    """In tokens, [d]."""
    if isinstance(text, EncodedTexts):
        document = np.repeat(np.arange(len(text.num_sequences)), text.num_sequences)
        return np.bincount(document, weights=text.lengths, minlength=len(text.num_sequences)).astype(np.int64)
    return np.bincount(text.document, weights=text.lengths, minlength=text.num_documents).astype(np.int64)


def _with_ends(
    tokens: np.ndarray, lengths: np.ndarray, num_sequences: np.ndarray, bos: int | None, eod: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each document's first sequence begins with `bos`, its last ends with `eod`, where there is one."""
    if (bos is None and eod is None) or not len(num_sequences):
        return tokens, lengths
    last = np.cumsum(num_sequences) - 1
    first = last + 1 - num_sequences
    longer = lengths.copy()
    is_text = np.ones(len(tokens) + len(num_sequences) * ((bos is not None) + (eod is not None)), dtype=bool)
    result = np.empty(len(is_text), dtype=np.int32)
    longer[first] += bos is not None
    longer[last] += eod is not None
    ends = np.cumsum(longer, dtype=np.int64)
    if bos is not None:
        starts = (ends - longer)[first]
        is_text[starts] = False
        result[starts] = bos
    if eod is not None:
        is_text[ends[last] - 1] = False
        result[ends[last] - 1] = eod
    result[is_text] = tokens
    return result, longer
