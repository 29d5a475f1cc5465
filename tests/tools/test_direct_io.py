"""Files past the page cache: the same bytes as through it, in any order of ranges, also where that is refused."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools import direct_io
from megatron_hybrid.tools.direct_io import BLOCK_BYTES, DirectFile, DirectWriter, Stream

#: Where ranges end: inside a block, at its edges, over several, beyond one piece.
ENDS = (8, 100, 4096, 4097, 8191, 8192, 20480, 20481, 5 * 2**20 + 3, 14 * 2**20 + 1, 14 * 2**20 + 9)
CONTENT = np.random.default_rng(1).integers(0, 256, ENDS[-1], np.uint8)


def write(path: Path) -> None:
    """Writes CONTENT range by range, from two threads, the last range first, in pieces of odd sizes."""
    writer = DirectWriter(path, len(CONTENT))

    def one(begin: int, end: int) -> None:
        content = writer.range(begin)
        for start in range(begin, end, 1_500_001):
            content.write(CONTENT[start : min(end, start + 1_500_001)])
        content.end()
        assert content.size_bytes == end - begin

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(one, *ends) for ends in reversed(list(zip((0, *ENDS), ENDS, strict=False)))]:
            done.result()
    writer.finish(len(CONTENT))
    writer.close()


@pytest.mark.parametrize("refused", [False, True])
def test_what_is_written_in_ranges_is_read_in_ranges(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        (tmp_path / "file").write_bytes(bytes(BLOCK_BYTES))
        with pytest.raises(OSError, match="Invalid argument"):  # the kernel wants whole blocks; tmpfs would not
            os.preadv(os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT), [bytearray(5)], 1)
        monkeypatch.setattr(direct_io, "BLOCK_BYTES", 1)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT.tobytes()
    with DirectFile(tmp_path / "file", os.O_RDONLY) as file:
        for begin, end in ((0, 8), (5, 4096), (4096, 8192), (4097, 9 * 2**20), (len(CONTENT) - 3, len(CONTENT))):
            read = np.concatenate([piece.copy() for piece in file.pieces(begin, end - begin)])
            assert np.array_equal(read, CONTENT[begin:end])
        with pytest.raises(EOFError, match="ends before byte"):
            list(file.pieces(len(CONTENT) - 3, 4))
        is_direct = fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT
    assert bool(is_direct) != refused


def test_a_stream_is_cut_where_it_is_asked_to() -> None:
    stream = Stream(iter(np.split(CONTENT[:1000], [10, 500, 501])))
    for begin, end in ((0, 4), (4, 502), (502, 502), (502, 990)):
        assert b"".join(part.tobytes() for part in stream.take(end - begin)) == CONTENT[begin:end].tobytes()
    stream.finish()
    with pytest.raises(StopIteration):
        next(stream._pieces)
