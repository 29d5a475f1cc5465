"""Opens input files, local or remote, and reads them as chunks of decompressed bytes of bounded size.

A compressed file that ends early never passes for a short one, and no compressed byte inflates to more than
CHUNK_BYTES at a time, so a hostile file can neither lose lines silently nor fill the memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_hybrid.tools.cli import ToolError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = {bytes([0x50 + low, 0x2A, 0x4D, 0x18]) for low in range(16)}  # seekable and pzstd files
PARQUET_MAGIC = b"PAR1"
ZSTD_MAX_WINDOW_LOG = 31  # files made with `zstd --long=31`
READ_BYTES = 256 << 10  # stored bytes read at a time
CHUNK_BYTES = 1 << 20  # decompressed bytes handed out at a time, at most
REMOTE_BLOCK_BYTES = 8 << 20  # one request to object storage


class InputFault(ToolError):
    """A file that cannot be read to its end. How many lines it has is unknown, so no policy can skip it."""


class _NoFrame(Exception):
    """No frame starts where one was said to."""


def is_compressed_name(path: str) -> bool:
    """Whether the suffix of `path` says that it is compressed; such a file may be cut where a frame starts."""
    return path.endswith((".gz", ".zst"))


def is_remote(path: str) -> bool:
    """Whether `path` is a URL for fsspec (s3://bucket/key) rather than a file of this machine."""
    return "://" in path


def remote_filesystem(path: str, flag: str = "--input") -> tuple[Any, str]:
    """(fsspec filesystem, path inside it) of a URL; raises ToolError if its driver is not installed."""
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ToolError(
            f"{flag} {path}: {error}; install the driver (s3:// needs s3fs: pip install -e '.[data]')"
        ) from error


def open_input(path: str) -> BinaryIO:
    """Opens a local file or a URL for reading; raises InputFault, naming it, if that fails."""
    try:
        if not is_remote(path):
            return open(path, "rb", buffering=0)
        filesystem, inner = remote_filesystem(path)
        return cast(BinaryIO, filesystem.open(inner, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type="readahead"))
    except (OSError, ValueError) as error:
        raise InputFault(f"{path}: cannot be opened ({error}); restore the file and run again") from error


def compression_of(path: str, magic: bytes) -> str:
    """'plain', 'gz' or 'zst', from the first bytes of the file; raises InputFault if its suffix says otherwise."""
    found = "plain"
    if magic.startswith(GZIP_MAGIC):
        found = "gz"
    elif magic[:4] == ZSTD_MAGIC or magic[:4] in ZSTD_SKIPPABLE:
        found = "zst"
    suffix = Path(path).suffix.removeprefix(".")
    if suffix in ("gz", "zst") and suffix != found:
        what = "is empty" if not magic else f"starts with {magic[:4]!r}"
        raise InputFault(f"{path}: named .{suffix}, but the file {what}; fetch it again or rename it")
    return found


def _gzip_decoder() -> Any:
    from isal import igzip_lib

    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _zstd_decoder() -> Any:
    from backports import zstd

    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_MAX_WINDOW_LOG})


def decompression_errors() -> tuple[type[Exception], ...]:
    """What the decoders raise for damaged input."""
    from backports import zstd
    from isal import igzip_lib

    return (EOFError, zstd.ZstdError, cast(type[Exception], igzip_lib.IsalError))


def decoder_of(path: str) -> Callable[[], Any]:
    """What makes a decoder for one frame of a file named .gz or .zst."""
    return _gzip_decoder if path.endswith(".gz") else _zstd_decoder


def _decoded(
    source: BinaryIO,
    make_decoder: Callable[[], Any],
    on_bytes: Callable[[int], object],
    position: int,
    cut: int | None,
    on_cut: Callable[[int], object],
) -> Iterator[bytes]:
    """Decompressed chunks of all frames (members) of `source`, which stands at stored offset `position`.

    Calls `on_cut` with the number of bytes handed out so far where the frame at stored offset `cut` starts.
    Raises EOFError if the file ends inside a frame, _NoFrame if none starts at `cut`.
    """
    decoder: Any = None
    pending = b""
    decoded = 0
    while True:
        if not pending and (decoder is None or decoder.needs_input):
            pending = source.read(READ_BYTES)
            on_bytes(len(pending))
            position += len(pending)
            if not pending:
                if decoder is not None:
                    raise EOFError("the file ends inside a compressed frame")
                if cut is not None:
                    raise _NoFrame
                return
        if decoder is None:
            if make_decoder is _gzip_decoder:  # tapes and some tools pad members with zeros
                pending = pending.lstrip(b"\0")
                if not pending:
                    continue
            if cut is not None and position - len(pending) >= cut:
                if position - len(pending) > cut:
                    raise _NoFrame
                cut = None
                on_cut(decoded)
            decoder = make_decoder()
        chunk = decoder.decompress(pending, CHUNK_BYTES)
        pending = b""
        if chunk:
            decoded += len(chunk)
            yield chunk
        if decoder.eof:
            pending, decoder = decoder.unused_data, None


def _plain(source: BinaryIO, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


def read_chunks(
    path: str,
    source: BinaryIO,
    start: int = 0,
    on_bytes: Callable[[int], object] = lambda count: None,
    cut: int | None = None,
    on_cut: Callable[[int], object] = lambda decoded: None,
) -> Iterator[bytes]:
    """Chunks of at most CHUNK_BYTES decompressed bytes, from stored offset `start` on.

    `on_bytes` is called with the number of stored bytes read since its last call. In a compressed file a frame
    starts at `start`, and one at `cut`: `on_cut` is called with the number of decompressed bytes before it.
    Raises InputFault for content that belies the suffix or has no frame at `cut`, and one of
    `decompression_errors()` for a damaged stream.
    """
    source.seek(start)
    magic = b"" if start and not is_compressed_name(path) else source.read(4)
    source.seek(start)
    kind = compression_of(path, magic)
    if kind == "plain":
        yield from _plain(source, on_bytes)
        return
    try:
        yield from _decoded(source, _gzip_decoder if kind == "gz" else _zstd_decoder, on_bytes, start, cut, on_cut)
    except _NoFrame:
        raise InputFault(
            f"{path}: no frame starts at byte {cut}, where the plan cut it; plan again with --shard-bytes above the "
            "uncompressed size of this file, which leaves it whole"
        ) from None


def damaged(path: str, where: str, error: Exception) -> InputFault:
    """The error for a compressed stream that broke off after `where` (the last whole line)."""
    return InputFault(
        f"{path}: truncated or corrupt after {where} ({error}); the lines lost cannot be counted, so --on-error "
        "skip does not apply: fetch the file again (or --salvage-truncated keeps the whole lines before the damage)"
    )


def stored_size(path: str) -> tuple[int, str]:
    """(bytes, a stamp that changes with the content: modification time or ETag) of a local file or URL."""
    if not is_remote(path):
        status = Path(path).stat()
        return status.st_size, str(status.st_mtime_ns)
    filesystem, inner = remote_filesystem(path)
    info = filesystem.info(inner)
    return int(info["size"]), str(info.get("ETag") or info.get("LastModified") or info.get("mtime") or "")


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` stored bytes of a file from `offset` on; fewer at its end."""
    with open_input(path) as source:
        source.seek(offset)
        parts = []
        while size > 0 and (part := source.read(min(size, CHUNK_BYTES))):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)
