"""Copies finished datasets to object storage, every byte read back, the manifest last."""

from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.finish import manifest_path
from megatron_hybrid.tools.corpus.shard import METADATA_SUFFIX, REJECTS_SUFFIX
from megatron_hybrid.tools.corpus.streams import is_remote, remote_filesystem

COMPARED_BYTES = 8 << 20


def check_target(url: str) -> None:
    """Raises ToolError unless `url` is one that can be written to; before a run, not after it."""
    if not is_remote(url):
        raise ToolError(f"--upload-to {url}: not a URL; give s3://bucket/folder or another that fsspec knows")
    remote_filesystem(url, "--upload-to")


def upload(content: dict[str, Any], output: Path, one_prefix: bool, url: str) -> int:
    """Copies the files of the manifest `content` to the folder `url`; returns the bytes copied.

    What is there already with the same bytes is left. Raises ToolError if a copy fails or reads back otherwise.
    """
    folder = output.parent if one_prefix else output
    manifest = manifest_path(output, one_prefix)
    suffixes = (".bin", ".idx", METADATA_SUFFIX)
    paths = [Path(f"{folder / entry['prefix']}{suffix}") for entry in content["datasets"] for suffix in suffixes]
    paths.append(Path(f"{output}{REJECTS_SUFFIX}") if one_prefix else folder / "rejects.jsonl")
    filesystem, inner = remote_filesystem(url, "--upload-to")
    copied = 0
    for path in [*filter(Path.exists, paths), manifest]:
        target = f"{inner.rstrip('/')}/{path.name}"
        try:
            if not _same(filesystem, path, target):
                filesystem.put_file(str(path), target)
                filesystem.invalidate_cache()
                copied += path.stat().st_size
                if not _same(filesystem, path, target):
                    raise OSError("it reads back otherwise than it was written")
        except Exception as error:  # each driver has its own exceptions
            raise ToolError(f"--upload-to {url}: {path.name}: {error}; the same command goes on from here") from error
    return copied


def _same(filesystem: Any, path: Path, target: str) -> bool:
    """Whether the object `target` is there and has the bytes of `path`."""
    if not filesystem.exists(target) or filesystem.info(target)["size"] != path.stat().st_size:
        return False
    with open(path, "rb") as here, filesystem.open(target, "rb", block_size=COMPARED_BYTES) as there:
        while chunk := here.read(COMPARED_BYTES):
            if there.read(len(chunk)) != chunk:
                return False
    return True
