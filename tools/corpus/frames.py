"""Where one large .gz or .zst file can be cut: it is often many members or frames end to end, each read on its own.

bgzip, pzstd, seekable zstd and files joined by `cat` are. What gzip, pigz and zstd write by default is one member
or frame, and cannot be cut.
"""

from megatron_hybrid.tools.corpus.streams import (
    CHUNK_BYTES,
    GZIP_MAGIC,
    ZSTD_MAGIC,
    InputFault,
    decoder_of,
    decompression_errors,
    read_at,
)

SEARCH_BYTES = 64 << 20  # stored bytes searched for the next frame, from where a cut would be best
STEP_BYTES = 1 << 20
GZIP_START = GZIP_MAGIC + b"\x08"  # deflate, the only method there is
GZIP_RESERVED_FLAGS = 0xE0


def find_cuts(path: str, stored_bytes: int, parts: int) -> list[int]:
    """Stored offsets, ascending, at most `parts` - 1, where a frame of `path` starts and decodes.

    A worker that reads up to such an offset checks that a frame ends there, so that bytes which only look
    like the start of one cost an error, and no line.
    """
    cuts: list[int] = []
    try:
        for part in range(1, parts):
            best = stored_bytes * part // parts
            if cuts and best <= cuts[-1]:
                continue
            found = _next_frame(path, best, min(best + SEARCH_BYTES, stored_bytes))
            if found is not None:
                cuts.append(found)
    except InputFault:  # the worker reports it
        return []
    return cuts


def _next_frame(path: str, start: int, end: int) -> int | None:
    magic = GZIP_START if path.endswith(".gz") else ZSTD_MAGIC
    overlap = b""
    at = start
    while at < end:
        data = overlap + read_at(path, at, STEP_BYTES)
        first = at - len(overlap)
        found = data.find(magic)
        while found >= 0:
            if _decodes(path, first + found):
                return first + found
            found = data.find(magic, found + 1)
        overlap = data[-len(magic) + 1 :]
        at += STEP_BYTES
    return None


def _decodes(path: str, offset: int) -> bool:
    """Whether a frame starts at `offset`, as far as its first part tells (and its checksum, if it ends there)."""
    stored = read_at(path, offset, CHUNK_BYTES)
    if path.endswith(".gz") and (len(stored) < 4 or stored[3] & GZIP_RESERVED_FLAGS):
        return False
    try:
        decoder_of(path)().decompress(stored, CHUNK_BYTES)
    except decompression_errors():
        return False
    return True
