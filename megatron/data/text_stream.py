"""The bytes of a text file, unpacked where the file is compressed."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from megatron.errors import ConfigError, DataError

_BUFFER_BYTES = 128 * 1024
# What is unpacked at a time: of text that repeats itself this may become ten thousand times as much, all in memory.
_PACKED_BYTES = 4 * 1024


class Decompressor(Protocol):
    """One compressed member; what follows its end stays in `unused_data`."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True)
class Compression:
    """How files that start with one of `magics` are unpacked."""

    name: str
    magics: tuple[bytes, ...]
    new_member: Callable[[], Decompressor]


# What `zstd --long=31` writes; memory is taken for the window that a file has, not for this.
_ZSTANDARD_LARGEST_WINDOW = 1 << 31


def _zstandard_magics() -> tuple[bytes, ...]:
    """Of a frame with data, and of one to be skipped, in which pzstd keeps the size of the next."""
    return tuple(magic.to_bytes(4, "little") for magic in (0xFD2FB528, *range(0x184D2A50, 0x184D2A60)))


def _bzip2_magics() -> tuple[bytes, ...]:
    """Of a file with data, and of one without, at every level: text may begin with the three letters of the name."""
    first_blocks = (b"1AY&SY", b"\x17rE8P\x90")
    return tuple(b"BZh%d" % level + block for level in range(1, 10) for block in first_blocks)


def _zstandard_member() -> Decompressor:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("files of type .zst need the package zstandard; run `pip install zstandard`.") from error
    return zstandard.ZstdDecompressor(max_window_size=_ZSTANDARD_LARGEST_WINDOW).decompressobj()


COMPRESSIONS: Mapping[str, Compression] = {
    ".gz": Compression("gzip", (b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    ".zst": Compression("Zstandard", _zstandard_magics(), _zstandard_member),
    ".bz2": Compression("bzip2", _bzip2_magics(), bz2.BZ2Decompressor),
    ".xz": Compression("xz", (b"\xfd7zXZ\0",), lzma.LZMADecompressor),
}


class TextStream(io.BufferedReader):
    """The unpacked bytes of `path` from `start` on, and how far into the file itself the reader is.

    Raises `DataError` where the name and the first bytes contradict each other, and while reading where the
    compressed data is damaged or ends too early.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path = path
        compression = COMPRESSIONS.get(path.suffix)
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this stream
        _check_magic(path, self._file, compression)
        self._is_plain = compression is None
        raw = self._file if compression is None else _Unpacked(path, self._file, compression)
        super().__init__(raw, buffer_size=_BUFFER_BYTES)
        self._skip(start)

    def file_position(self, text_position: int) -> int:
        """Bytes of the file that the text up to `text_position` took; ahead by a buffer where it is compressed."""
        return text_position if self._is_plain else self._file.tell()

    def _skip(self, num_bytes: int) -> None:
        if self._is_plain:
            self.seek(num_bytes)
            return
        while num_bytes > 0:
            num_bytes -= len(self.read(min(num_bytes, 1 << 20))) or num_bytes


def base_suffix(path: Path) -> str:
    """The kind of text: the suffix, and under a compressed name the one before it."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _check_magic(path: Path, file: BinaryIO, compression: Compression | None) -> None:
    start = file.read(10)
    file.seek(0)
    if compression is not None and not start.startswith(compression.magics):
        raise DataError(
            f"{path}: is no {compression.name} file, its first bytes are {start!r}; copy it again, or give it the name "
            "of what it is."
        )
    if compression is None:
        for suffix, other in COMPRESSIONS.items():
            if start.startswith(other.magics):
                raise DataError(f"{path}: holds {other.name} data; rename it to {path.name}{suffix}.")


class _Unpacked(io.RawIOBase):
    """The members of a compressed file, one after another."""

    def __init__(self, path: Path, file: BinaryIO, compression: Compression):
        self._path = path
        self._file = file
        self._compression = compression
        self._member = compression.new_member()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._next_packed()
            if not packed:
                return 0
            try:
                self._ready = memoryview(self._member.decompress(packed))
            except Exception as error:  # every library has its own, zstandard's is not known without it
                raise DataError(
                    f"{self._path}: damaged before byte {self._file.tell()} ({error}); copy the file again from its "
                    "source."
                ) from error
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next_packed(self) -> bytes:
        if not self._member.eof:
            packed = self._file.read(_PACKED_BYTES)
            if not packed:
                raise DataError(
                    f"{self._path}: ends at byte {self._file.tell()} in the middle of its {self._compression.name} "
                    "data; the file is truncated: copy it again from its source."
                )
            return packed
        rest = self._member.unused_data or self._file.read(_PACKED_BYTES)
        while rest:
            packed = rest.lstrip(b"\0")  # padding may follow a member
            if packed:
                self._member = self._compression.new_member()
                return packed
            rest = self._file.read(_PACKED_BYTES)
        return b""
