from __future__ import annotations

import bz2
import gzip
import lzma
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron.data.documents import read_chunks, read_texts
from megatron.data.text_stream import TextStream, base_suffix
from megatron.errors import ConfigError, DataError

# Incompressible, so that a stream has many blocks.
TEXT = "".join(f'{{"text": "{random.Random(i).getrandbits(400):x}"}}\n' for i in range(4000)).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.fixture(params=COMPRESS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def _write(folder: Path, suffix: str, content: bytes, name: str = "a.jsonl") -> Path:
    (folder / (name + suffix)).write_bytes(content)
    return folder / (name + suffix)


def test_a_compressed_file_reads_as_its_text_from_any_position(tmp_path, suffix):
    file = _write(tmp_path, suffix, COMPRESS[suffix](TEXT))
    for start in (0, 1, 70_000, len(TEXT)):
        with TextStream(file, start) as stream:
            assert stream.read() == TEXT[start:]


def test_members_one_after_another_are_one_text(tmp_path, suffix):
    members = [TEXT[:100], TEXT[100:100_000], b"", TEXT[100_000:]]
    file = _write(tmp_path, suffix, b"".join(map(COMPRESS[suffix], members)))
    assert TextStream(file).read() == TEXT


@pytest.mark.parametrize("num_zeros", [4, 200_000])
def test_zeros_after_a_member_are_no_end_of_the_text(tmp_path, suffix, num_zeros):
    one, two = COMPRESS[suffix](TEXT[:100]), COMPRESS[suffix](TEXT[100:])
    assert TextStream(_write(tmp_path, suffix, one + bytes(num_zeros) + two + bytes(num_zeros))).read() == TEXT


@pytest.mark.parametrize("first_byte", [0x50, 0x5F])
def test_frames_of_zstandard_that_hold_no_text_are_skipped_wherever_they_stand(tmp_path, first_byte):
    skipped = bytes([first_byte]) + b"\x2a\x4d\x18\x04\0\0\0abcd"
    one, two = COMPRESS[".zst"](TEXT[:100]), COMPRESS[".zst"](TEXT[100:])
    for members in ([skipped, one, skipped, two], [one, skipped, skipped, two], [one, two, skipped]):
        assert TextStream(_write(tmp_path, ".zst", b"".join(members))).read() == TEXT
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: ends at byte \d+ in the middle of its Zstandard data"):
        TextStream(_write(tmp_path, ".zst", one + two + skipped[:-1])).read()
    with pytest.raises(DataError, match=r"a\.jsonl: holds Zstandard data; rename it to a\.jsonl\.zst"):
        TextStream(_write(tmp_path, "", skipped + one))


def test_a_zstandard_window_larger_than_usual_is_read(tmp_path):
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)  # usual is at most 27
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()  # which does not know the text's size
    file = _write(tmp_path, ".zst", packer.compress(TEXT) + packer.flush())
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())
    assert TextStream(file).read() == TEXT


def test_the_position_in_the_file_grows_to_its_size(tmp_path, suffix):
    file = _write(tmp_path, suffix, COMPRESS[suffix](TEXT))
    done = [chunk.done_bytes for chunk in read_chunks([file], max_documents=500, max_bytes=1 << 16)]
    assert done == sorted(done)
    assert done[-1] == file.stat().st_size
    if suffix in (".gz", ".zst"):  # the others have blocks as large as this file
        assert len(set(done)) > 2


def test_the_kind_of_text_is_named_before_the_compression(tmp_path, suffix):
    file = _write(tmp_path, suffix, COMPRESS[suffix](b"one\n\n\ntwo"), "a.txt")
    assert list(read_texts([file], "text")) == ["one", "two"]
    assert base_suffix(file) == ".txt"


def test_a_truncated_file_is_an_error_and_not_a_shorter_text(tmp_path, suffix):
    packed = COMPRESS[suffix](TEXT)
    file = _write(tmp_path, suffix, packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"ends at byte \d+ in the middle of its .* data; the file is truncated"):
        TextStream(file).read()


def test_a_damaged_file_is_an_error(tmp_path, suffix):
    packed = bytearray(COMPRESS[suffix](TEXT))
    middle = len(packed) // 2
    packed[middle : middle + 50] = bytes(50)
    file = _write(tmp_path, suffix, bytes(packed))
    with pytest.raises(DataError, match=r"(damaged before byte \d+|ends at byte \d+)"):
        TextStream(file).read()


def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, suffix):
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: is no .* file, its first bytes are b'.\"text"):
        TextStream(_write(tmp_path, suffix, TEXT))
    with pytest.raises(DataError, match=rf"a\.jsonl: holds .* data; rename it to a\.jsonl\{suffix}"):
        TextStream(_write(tmp_path, "", COMPRESS[suffix](TEXT)))


def test_without_its_package_zstandard_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    file = _write(tmp_path, ".zst", COMPRESS[".zst"](TEXT))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"need the package zstandard; run `pip install zstandard`"):
        TextStream(file)


def test_text_may_begin_like_the_name_of_a_format(tmp_path):
    text = b"BZhang said nothing.\n"
    assert TextStream(_write(tmp_path, "", text, "a.txt")).read() == text
    for level in range(1, 10):
        for content in (b"", text):
            with pytest.raises(DataError, match=r"a\.txt: holds bzip2 data; rename it to a\.txt\.bz2"):
                TextStream(_write(tmp_path, "", bz2.compress(content, level), "a.txt"))
            assert TextStream(_write(tmp_path, ".bz2", bz2.compress(content, level))).read() == content


def test_text_that_repeats_itself_is_not_unpacked_all_at_once(tmp_path):
    line = b'{"text": "the same line again"}\n'
    text = line * ((256 << 20) // len(line))
    file = _write(tmp_path, ".zst", zstandard.compress(text))
    assert file.stat().st_size < 1e-4 * len(text)
    tracemalloc.start()
    try:
        with TextStream(file) as stream:
            num_bytes = sum(len(piece) for piece in iter(lambda: stream.read(1 << 16), b""))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes == len(text)
    assert peak_bytes < len(text) / 2
