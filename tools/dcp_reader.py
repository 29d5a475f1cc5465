"""Reads a Megatron torch_dist checkpoint tensor by tensor, without a process group, a model or Megatron.

A checkpoint folder (`iter_0001000/`) holds `.metadata`, a pickle which says in which byte range of which
`__RANK_WRITER.distcp` file each chunk of each tensor lies, and those files, in which every chunk is a small zip
archive made by torch.save. A checkpoint may come from somebody else, so neither is unpickled freely: `.metadata`
goes through an unpickler that knows nothing but inert records, the chunks through torch.load(weights_only=True).
What the records say is checked before it is used: names, ranges, and that the chunks cover their tensor exactly.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle  # only to subclass Unpickler below; nothing is loaded with pickle.load or pickle.loads
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.direct_io import fill
from megatron_hybrid.tools.torch_archive import FileSlice, Payload, check_archive, first_line, plain_payload

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

Shape = tuple[int, ...]
TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"  # Megatron writes it last, so its presence means that the save finished
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
INTEGER_DTYPES = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
DTYPES = frozenset((*FLOAT_DTYPES, *INTEGER_DTYPES))


class _Record:
    """An inert stand-in for one of torch's metadata classes: it keeps the pickled state and does nothing."""

    state: Any = None

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __hash__(self) -> int:  # MetadataIndex is used as a dictionary key while its state is still unknown
        return id(self)


class _Metadata(_Record): ...


class _TensorMetadata(_Record): ...


class _BytesMetadata(_Record): ...


class _Properties(_Record): ...


class _Chunk(_Record): ...


class _Index(_Record): ...


class _StorageInfo(_Record): ...


class _StorageMeta(_Record): ...


def _as_given(value: object) -> object:
    return value


def _joined_path(*parts: str) -> str:
    return "/".join(parts)


_DCP = "torch.distributed.checkpoint."
ALLOWED_GLOBALS: dict[tuple[str, str], object] = {
    (_DCP + "metadata", "Metadata"): _Metadata,
    (_DCP + "metadata", "TensorStorageMetadata"): _TensorMetadata,
    (_DCP + "metadata", "BytesStorageMetadata"): _BytesMetadata,
    (_DCP + "metadata", "TensorProperties"): _Properties,
    (_DCP + "metadata", "ChunkStorageMetadata"): _Chunk,
    (_DCP + "metadata", "MetadataIndex"): _Index,
    (_DCP + "metadata", "StorageMeta"): _StorageMeta,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _as_given,
    (_DCP + "filesystem", "_StorageInfo"): _StorageInfo,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): _as_given,  # a tuple of sizes
    ("torch.serialization", "_get_layout"): _as_given,  # the name of a layout
    ("pathlib", "PosixPath"): _joined_path,  # the checkpoint's own path, when Megatron was given a Path
    **{("torch", dtype): dtype for dtype in DTYPES},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds only `ALLOWED_GLOBALS`; every other name stops it."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a pickled global; ToolError for one that no metadata needs."""
        try:
            return ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise ToolError(f"it names {module}.{name}, which no checkpoint metadata needs") from None


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor and the bytes of a file in which it is stored."""

    offsets: Shape
    sizes: Shape
    file: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """What `.metadata` says of one tensor. `dtype` is torch's name without the prefix, such as 'bfloat16'."""

    name: str
    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]


class TorchDistCheckpoint:
    """A torch_dist checkpoint folder, opened for reading.

    Args:
        folder: the `iter_XXXXXXX` folder itself.
        megatron: whether Megatron wrote it, so that its own mark of completeness must be there; OLMo-core's have none.

    Raises:
        ToolError: the folder is incomplete or of another format, or its metadata is damaged or hostile.
    """

    def __init__(self, folder: Path, megatron: bool = True) -> None:
        if megatron:
            require_complete(folder)
        self.folder = folder
        self.tensors: dict[str, StoredTensor]
        self.tensors, self._objects = read_metadata(folder / METADATA_FILE)

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of what is stored and is no tensor."""
        return tuple(self._objects)

    def read(self, name: str) -> Tensor:
        """Tensor `name`, whole, on the CPU, in its stored dtype; host memory: the tensor and one chunk of it.

        Raises:
            ToolError: no such tensor, chunks that do not cover it, or a missing, short or damaged file.
        """
        import torch

        stored = self.stored(name)
        whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        if pieces := self.pieces(name):
            fill(whole, pieces)
            return whole
        for chunk in stored.chunks:
            target = whole
            for dimension, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dimension, start, size)
            target.copy_(self._read_chunk(stored, chunk))
        return whole

    def pieces(self, name: str) -> Iterator[ndarray[Any, Any]] | None:
        """The bytes of tensor `name`, in order, as arrays that hold until the next is asked for.

        None where the chunks are not its rows one after the other, or not stored plainly: `read` it then.

        Raises:
            ToolError: as `read` does; for damage not before the end of each chunk.
        """
        self.check(name)
        stored = self.stored(name)
        chunks = sorted(stored.chunks, key=lambda chunk: chunk.offsets)
        if any(chunk.sizes[1:] != stored.shape[1:] for chunk in chunks):
            return None
        payloads = [self._payload(stored, chunk) for chunk in chunks]
        if not all(payloads):
            return None
        return (
            piece
            for chunk, payload in zip(chunks, payloads, strict=True)
            if payload
            for piece in payload.pieces(self.folder / chunk.file, chunk.offset_bytes, self._place(stored, chunk))
        )

    def check(self, name: str) -> None:
        """Raises what `read` would for chunks or files that are missing or too short, without reading any."""
        stored = self.stored(name)
        check_coverage(stored)
        bits = re.search(r"\d+", stored.dtype)  # without torch, whose import takes longer than all that `info` does
        item_bytes = int(bits[0]) // 8 if bits else 1  # bool
        for chunk in stored.chunks:
            path = self.folder / chunk.file
            place = f"{path}: tensor {name}, chunk at {list(chunk.offsets)}"
            if math.prod(chunk.sizes) * item_bytes > chunk.length_bytes:
                raise ToolError(
                    f"{place}: {chunk.length_bytes} bytes cannot hold {stored.dtype} {list(chunk.sizes)}; "
                    f"{METADATA_FILE} is wrong"
                )
            if not path.is_file():
                raise ToolError(f"{place}: the file is missing; copy the whole checkpoint folder")
            size_bytes, end = path.stat().st_size, chunk.offset_bytes + chunk.length_bytes
            if size_bytes < end:
                raise ToolError(
                    f"{place}: needs bytes {chunk.offset_bytes} to {end}, but the file ends at {size_bytes}; "
                    "it is truncated, use another iteration or copy it again"
                )

    @contextmanager
    def open_object(self, name: str) -> Iterator[BinaryIO]:
        """The bytes of an object that is no tensor, as torch.save wrote them; ToolError if there is none."""
        if name not in self._objects:
            raise ToolError(f"{self.folder / METADATA_FILE}: no object {name}")
        file, offset_bytes, length_bytes = self._objects[name]
        path = self.folder / file
        if not path.is_file() or path.stat().st_size < offset_bytes + length_bytes:
            raise ToolError(f"{path}: {name} is not whole in it; the file is missing or truncated, copy it again")
        with open(path, "rb") as handle:
            yield cast(BinaryIO, FileSlice(handle, offset_bytes, length_bytes))

    def stored(self, name: str) -> StoredTensor:
        """The description of tensor `name`; ToolError if the checkpoint has none of that name."""
        if name not in self.tensors:
            raise ToolError(
                f"{self.folder / METADATA_FILE}: no tensor {name}; "
                "the checkpoint is of another model than its configuration says, or was not saved whole"
            )
        return self.tensors[name]

    def _place(self, stored: StoredTensor, chunk: Chunk) -> str:
        return f"{self.folder / chunk.file}: tensor {stored.name}, chunk at {list(chunk.offsets)}"

    def _payload(self, stored: StoredTensor, chunk: Chunk) -> Payload | None:
        """Where a chunk's bytes lie, if it is of the plain kind and what `.metadata` says."""
        with open(self.folder / chunk.file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # a few lines of it, not what is beside them
            payload = plain_payload(FileSlice(handle, chunk.offset_bytes, chunk.length_bytes))
        return payload if payload and (payload.dtype, payload.shape) == (stored.dtype, chunk.sizes) else None

    def _read_chunk(self, stored: StoredTensor, chunk: Chunk) -> Tensor:
        import torch

        place = self._place(stored, chunk)
        if payload := self._payload(stored, chunk):
            tensor = torch.empty(chunk.sizes, dtype=getattr(torch, stored.dtype))
            fill(tensor, payload.pieces(self.folder / chunk.file, chunk.offset_bytes, place))
            return tensor
        try:
            with open(self.folder / chunk.file, "rb") as handle:
                view = FileSlice(handle, chunk.offset_bytes, chunk.length_bytes)
                check_archive(view, place)
                view.seek(0)
                tensor = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except (ToolError, OSError):
            raise
        except Exception as error:  # torch.load raises several types for damaged or unsafe content
            raise ToolError(f"{place}: unreadable ({first_line(error)}); use another iteration") from None
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise ToolError(f"{place}: holds a {type(tensor).__name__} instead of a dense tensor")
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != (stored.dtype, chunk.sizes):
            raise ToolError(
                f"{place}: holds {found[0]} {list(found[1])}, "
                f"but {METADATA_FILE} says {stored.dtype} {list(chunk.sizes)}"
            )
        return tensor.detach()


def find_iteration(checkpoint: Path, iteration: int | None = None) -> Path:
    """The folder of one complete iteration.

    Args:
        checkpoint: a checkpoint root with `latest_checkpointed_iteration.txt`, or an `iter_` folder itself.
        iteration: which one; None for the one the tracker file names.

    Raises:
        ToolError: nothing there, the wanted iteration is missing or incomplete, or the tracker file is unreadable.
    """
    if not checkpoint.is_dir():
        raise ToolError(f"--checkpoint {checkpoint}: no such folder; give a Megatron save folder or an iter_ folder")
    if (checkpoint / METADATA_FILE).exists() or (checkpoint / CONFIG_FILE).exists():
        if iteration is not None and checkpoint.name != iteration_folder_name(iteration):
            raise ToolError(
                f"--iteration {iteration}: --checkpoint {checkpoint} already is one iteration; "
                "leave the flag out, or give the folder above"
            )
        require_complete(checkpoint)
        return checkpoint
    if iteration is not None:
        folder, wanted_by = checkpoint / iteration_folder_name(iteration), f"--iteration {iteration}"
    else:
        folder, wanted_by = _tracked_folder(checkpoint)
    try:
        require_complete(folder)
    except ToolError as error:
        complete = [path.name for path in sorted(checkpoint.glob("iter_*")) if is_complete(path)]
        choice = f"complete here: {', '.join(complete[-5:])}" if complete else "no complete iteration here"
        raise ToolError(f"{wanted_by}: {error}; {choice}") from None
    return folder


def iteration_folder_name(iteration: int) -> str:
    """Megatron's name for the folder of an iteration."""
    return f"iter_{iteration:07d}"


def _tracked_folder(checkpoint: Path) -> tuple[Path, str]:
    """The folder that the tracker file names, and how to speak of it in messages."""
    tracker = checkpoint / TRACKER_FILE
    if not tracker.is_file():
        raise ToolError(
            f"--checkpoint {checkpoint}: neither {TRACKER_FILE} nor {METADATA_FILE} is in it; "
            "give a Megatron save folder or an iter_ folder"
        )
    text = tracker.read_text(errors="replace").strip()
    if text == "release":
        return checkpoint / "release", str(tracker)
    if not (text.isascii() and text.isdigit()):
        raise ToolError(f"{tracker}: {text[:40]!r} is no iteration; give --iteration N")
    return checkpoint / iteration_folder_name(int(text)), str(tracker)


def is_complete(folder: Path) -> bool:
    """Whether `require_complete` accepts `folder`."""
    try:
        require_complete(folder)
    except ToolError:
        return False
    return True


def require_complete(folder: Path) -> None:
    """Raises ToolError unless `folder` is a finished torch_dist save."""
    if not folder.is_dir():
        raise ToolError(f"{folder}: no such folder")
    for name in (CONFIG_FILE, METADATA_FILE):
        if not (folder / name).is_file():
            raise ToolError(f"{folder}: {name} is missing, so the save did not finish or is of another format")
    try:
        backend = json.loads((folder / CONFIG_FILE).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError):
        raise ToolError(f"{folder / CONFIG_FILE}: not a checkpoint description; the file is damaged") from None
    if backend != "torch_dist":
        raise ToolError(f"{folder}: format {backend!r} is not supported, legal: 'torch_dist'; save with --ckpt-format")


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, int, int]]]:
    """All tensors in a `.metadata` file by name, and the file, offset and length of what is no tensor.

    Raises:
        ToolError: the file is damaged, or asks for anything but plain metadata records.
    """
    try:
        with open(path, "rb") as handle:
            content = _MetadataUnpickler(handle).load()
        return _tensors_of(content)
    except ToolError as error:
        raise ToolError(f"{path}: refused: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ToolError(f"{path}: unreadable ({type(error).__name__}: {first_line(error)})") from None


def _tensors_of(content: object) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, int, int]]]:
    """Turns the unpickled records into checked descriptions."""
    fields = _fields(content, _Metadata)
    places: dict[tuple[str, Shape], tuple[str, int, int]] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    for index, info in fields["storage_data"].items():
        key = _fields(index, _Index)
        if key.get("offset") is not None:
            places[_text(key["fqn"]), _shape(key["offset"])] = _place(_fields(info, _StorageInfo))
        else:
            objects[_text(key["fqn"])] = _place(_fields(info, _StorageInfo))
    tensors = {}
    for name, record in fields["state_dict_metadata"].items():
        if isinstance(record, _BytesMetadata):
            continue
        tensor = _fields(record, _TensorMetadata)
        chunks = []
        for chunk_record in tensor["chunks"]:
            chunk = _fields(chunk_record, _Chunk)
            offsets = _shape(chunk["offsets"])
            if (name, offsets) not in places:
                raise ToolError(f"tensor {name}: no file is given for its chunk at {list(offsets)}")
            chunks.append(Chunk(offsets, _shape(chunk["sizes"]), *places[name, offsets]))
        if not isinstance(tensor["properties"], _Properties):
            raise ToolError(f"tensor {name}: it has no properties record")
        dtype = tensor["properties"].state[0]
        if dtype not in DTYPES:
            raise ToolError(f"tensor {name}: dtype {dtype!r} is not supported")
        tensors[_text(name)] = StoredTensor(name, _shape(tensor["size"]), dtype, tuple(chunks))
    return tensors, objects


def _fields(record: object, kind: type[_Record]) -> dict[str, Any]:
    """The pickled attributes of a record of type `kind`."""
    state = record.state if isinstance(record, kind) else None
    if not isinstance(state, dict):
        raise ToolError(f"a {kind.__name__.lstrip('_')} record was expected, but {type(record).__name__} is there")
    return state


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ToolError(f"a tensor name was expected, but {type(value).__name__} is there")
    return value


def _shape(value: object) -> Shape:
    if not isinstance(value, tuple) or any(type(size) is not int or size < 0 for size in value):
        raise ToolError(f"a shape was expected, but {str(value)[:60]} is there")
    return value


def _place(info: dict[str, Any]) -> tuple[str, int, int]:
    """File name, offset and length in bytes of a storage record; the file must lie in the folder itself."""
    file, offset, length = _text(info.get("relative_path")), info.get("offset"), info.get("length")
    if Path(file).name != file or file in ("", ".", ".."):
        raise ToolError(f"file name {file!r} leads out of the checkpoint folder")
    if info.get("transform_descriptors"):
        raise ToolError(f"file {file} is stored with transforms {info['transform_descriptors']}, not supported")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise ToolError(f"file {file}: byte range {offset!r} + {length!r} is not one")
    return file, offset, length


def check_coverage(stored: StoredTensor) -> None:
    """Raises ToolError unless the chunks of a tensor cover each of its elements exactly once."""
    covered = 0
    for chunk in stored.chunks:
        if len(chunk.offsets) != len(stored.shape) or len(chunk.sizes) != len(stored.shape):
            raise ToolError(f"tensor {stored.name}: a chunk has another number of dimensions than the tensor")
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)):
            raise ToolError(f"tensor {stored.name}: chunk at {list(chunk.offsets)} reaches out of {list(stored.shape)}")
        covered += math.prod(chunk.sizes)
    total = math.prod(stored.shape)
    overlap = any(_overlap(a, b) for a, b in itertools.combinations(stored.chunks, 2))
    if covered != total or overlap:
        files = ", ".join(sorted({chunk.file for chunk in stored.chunks})) or "no file"
        raise ToolError(
            f"tensor {stored.name}: its chunks in {files} cover {covered} of {total} elements"
            f"{' and overlap' if overlap else ''}; a chunk is missing or wrong in {METADATA_FILE}"
        )


def _overlap(a: Chunk, b: Chunk) -> bool:
    """Whether two blocks of one tensor have an element in common."""
    return all(
        max(start_a, start_b) < min(start_a + size_a, start_b + size_b)
        for start_a, size_a, start_b, size_b in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
