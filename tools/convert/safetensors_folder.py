"""Safetensors files and folders of them: read tensor by tensor with plain reads, written tensor by tensor.

The safetensors package reads through a memory map and writes only whole files from memory; here a tensor is held once,
and what a file says is checked before it is used. Headers are checked by the package itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.output_folder import read_json
from megatron_hybrid.tools.direct_io import DirectFile, DirectWriter, fill
from megatron_hybrid.tools.hf_mapping import Shape

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a safetensors file. `dtype` is torch's name without the prefix, or the file's own if foreign."""

    name: str
    shape: Shape
    dtype: str
    file: Path
    offset_bytes: int
    size_bytes: int


def read_header(path: Path, follow_symlinks: bool = True) -> dict[str, TensorPlace]:
    """All tensors of a file; ToolError if it is missing, a symbolic link that may not be followed, or damaged."""
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() and not follow_symlinks:
        raise ToolError(
            f"{path}: it is a symbolic link to {os.readlink(path)}; give real files, or --follow-symlinks if you trust "
            "it (a Hugging Face cache is made of links)"
        )
    if not path.is_file():
        raise ToolError(f"{path}: no such file; copy the whole folder again")
    try:
        # Checks that ranges fill the file exactly, without gap or overlap; "pt" would map the file as private memory.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(header_bytes))
    except (SafetensorError, ValueError) as error:
        raise ToolError(f"{path}: unreadable ({error}); it is truncated or damaged, copy it again") from None
    known = {short: name for name, short in DTYPE_NAMES.items()}
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            dtype = known.get(entry["dtype"], entry["dtype"])
            places[name] = TensorPlace(name, tuple(entry["shape"]), dtype, path, 8 + header_bytes + start, end - start)
    return places


def read_tensor(place: TensorPlace, into: Tensor | None = None) -> Tensor:
    """The tensor at a place, on the CPU, read once from the disk; `into`: contiguous memory for it, of its kind.

    Raises:
        ToolError: a dtype that no model of this family has, or the file ends early.
    """
    import torch

    if place.dtype not in DTYPE_NAMES:
        raise ToolError(f"{place.file}: {place.name} is {place.dtype}, legal: {', '.join(DTYPE_NAMES)}")
    tensor = torch.empty(place.shape, dtype=getattr(torch, place.dtype)) if into is None else into
    if tensor.numel():
        try:
            with DirectFile(place.file, os.O_RDONLY) as file:
                fill(tensor, file.pieces(place.offset_bytes, place.size_bytes))
        except EOFError:
            raise ToolError(f"{place.file}: ends inside {place.name}; it is truncated, copy it again") from None
    return tensor


def read_folder(folder: Path, follow_symlinks: bool = False) -> dict[str, TensorPlace]:
    """All tensors of a Hugging Face folder: one model.safetensors, or the files that the index names.

    Raises:
        ToolError: no weights, an index that disagrees with the files or leads out of the folder, a link, damage.
    """
    again = "copy the whole folder again"
    if not (folder / INDEX_FILE).exists() and not (folder / INDEX_FILE).is_symlink():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ToolError(f"{folder}: no {INDEX_FILE} and no model.safetensors in it; give a Hugging Face folder")
        if files != ["model.safetensors"]:
            raise ToolError(
                f"{folder}: {len(files)} safetensors files, the first {files[0]}, but no {INDEX_FILE}; {again}"
            )
        return read_header(folder / files[0], follow_symlinks)
    if (folder / INDEX_FILE).is_symlink() and not follow_symlinks:
        raise ToolError(f"{folder / INDEX_FILE}: it is a symbolic link; give real files, or --follow-symlinks")
    weight_map = read_json(folder / INDEX_FILE, again).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ToolError(f"{folder / INDEX_FILE}: weight_map is missing or empty; {again}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ToolError(f"{folder / INDEX_FILE}: {name} is said to lie in {file!r}, which leads out of the folder")
    places: dict[str, TensorPlace] = {}
    for file in sorted(set(weight_map.values())):
        found = read_header(folder / file, follow_symlinks)
        for name in found:
            if weight_map.get(name) != file:
                said = f"says it lies in {weight_map[name]}" if name in weight_map else "does not name it"
                raise ToolError(f"{folder / file}: it holds {name}, but {INDEX_FILE} {said}; {again}")
        places |= found
    for name, file in weight_map.items():
        if name not in places:
            raise ToolError(f"{folder / file}: {name} is missing in it, though {INDEX_FILE} names it; {again}")
    return places


class SafetensorsWriter:
    """Writes one file byte for byte as safetensors' save_file would; several threads may write its tensors.

    The file is made with the first tensor, and complete and on the disk with the last. `hashes` has the SHA-256 of
    each that was written.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[str, Shape]]) -> None:
        """tensors: dtype and shape by name, all that the file will hold."""
        self.hashes: dict[str, str] = {}
        self._path = path
        self._file: DirectWriter | None = None
        self._lock = threading.Lock()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide types first, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])):
            start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._size_bytes = len(self._header) + end
        self._places = {
            name: (len(self._header) + header[name]["data_offsets"][0], math.prod(shape) * ITEM_BYTES[dtype])
            for name, (dtype, shape) in tensors.items()
        }

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a contiguous tensor to its place."""
        import torch

        self.write_pieces(name, [tensor.view(-1).view(torch.uint8).numpy()])

    def write_pieces(self, name: str, pieces: Iterable[ndarray[Any, Any]]) -> None:
        """Writes a tensor to its place whose bytes come in pieces, in order."""
        offset_bytes, size_bytes = self._places[name]
        file = self._opened()
        content = file.range(offset_bytes)
        digest = hashlib.sha256()
        try:
            for piece in pieces:
                digest.update(piece)
                content.write(piece)
            content.end()
        except OSError as error:
            raise ToolError(f"{self._path}: {name} could not be written ({error})") from None
        if content.size_bytes != size_bytes:
            raise ToolError(f"{name}: {content.size_bytes} bytes where {size_bytes} were planned; this is a defect")
        with self._lock:
            self.hashes[name] = digest.hexdigest()
            complete = len(self.hashes) == len(self._places)
        if complete:
            file.finish(self._size_bytes)
            self.close()

    def _opened(self) -> DirectWriter:
        import numpy

        with self._lock:
            if self._file is None:
                self._file = DirectWriter(self._path, self._size_bytes)
                header = self._file.range(0)
                header.write(numpy.frombuffer(self._header, numpy.uint8))
                header.end()
            return self._file

    def close(self) -> None:
        """Closes the file as it is."""
        if self._file is not None:
            self._file.close()
