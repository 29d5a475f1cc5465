"""Reading torch_dist checkpoints that Megatron wrote: exact, or refused in a line; nothing in them is executed."""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint, find_iteration
from megatron_hybrid.tools.torch_archive import FileSlice, plain_payload
from tests.tools.tiny_model import Job, write_checkpoints

SPLIT = "decoder.layers.0.self_attention.in_proj.weight.query"
TENSORS = {
    SPLIT: torch.arange(48.0).view(8, 6) / 7,
    "decoder.layers.0.self_attention.out_proj.weight": torch.arange(48.0).view(8, 6).bfloat16(),
    "decoder.layers.0.mlp.linear_fc1.weight": torch.arange(48.0).view(8, 6) + 100,
    "decoder.layers.0.self_attention.A_log": torch.tensor([0.5, -1.5]),
    "decoder.layers.0.input_layernorm.weight": torch.arange(6.0).half(),
    "scalar": torch.tensor(2.5),
    "counter": torch.tensor([3, 4]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint as one rank writes it (`1`) and as two do (`2`)."""
    folder = tmp_path_factory.mktemp("torch_dist")
    write_checkpoints([Job(TENSORS, ranks, folder / str(ranks)) for ranks in (1, 2)], folder)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy of the two-rank checkpoint that a test may damage."""
    return Path(shutil.copytree(written / "2", tmp_path / "iter_0000007"))


def rewrite_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    """Applies `change` to the checkpoint's real metadata object."""
    path = folder / ".metadata"
    with open(path, "rb") as handle:
        metadata = pickle.load(handle)  # noqa: S301 written by this test
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place_of(metadata: Any, name: str, number: int = 0) -> Any:
    """Where chunk `number` of a tensor is stored."""
    return [info for index, info in metadata.storage_data.items() if index.fqn == name][number]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_tensor_is_equal(written: Path, ranks: int) -> None:
    checkpoint = TorchDistCheckpoint(written / str(ranks))
    assert set(checkpoint.tensors) == set(TENSORS)  # objects that are no tensors are left out
    assert len(checkpoint.stored(SPLIT).chunks) == ranks
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name


def test_plain_tensors_come_in_pieces_past_torch(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that conversions take; what it does not know goes through torch.load instead, and nobody would see."""
    monkeypatch.delattr(torch, "load")
    checkpoint = TorchDistCheckpoint(written / "2")
    for name, tensor in TENSORS.items():
        if tensor.is_floating_point():
            assert torch.equal(checkpoint.read(name), tensor), name
        pieces = checkpoint.pieces(name)
        if pieces is not None:
            assert b"".join(piece.tobytes() for piece in pieces) == tensor.view(-1).view(torch.uint8).numpy().tobytes()
        by_columns = name.endswith("out_proj.weight")  # that rank 0 has the first of each row, rank 1 the rest
        assert (pieces is None) == (by_columns or name == "counter"), name


def _archive(content: object, change: Callable[[zipfile.ZipFile], object] = lambda archive: None) -> FileSlice:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        change(archive)
    return FileSlice(buffer, 0, len(buffer.getvalue()))


def test_what_is_not_plain_is_left_to_torch() -> None:
    plain = torch.randn(6, 4)
    payload = plain_payload(_archive(plain))
    assert payload is not None and (payload.dtype, payload.shape) == ("float32", (6, 4))
    for other in (plain.t(), plain[1:], plain[:, 1:], plain[:2], plain[:0], plain.double(), [plain], {"a": plain}, 3):
        assert plain_payload(_archive(other)) is None, other
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = _archive(plain, lambda archive: archive.writestr("archive/data/0", bytes(96)))
    assert plain_payload(twice) is None
    compressed = _archive(plain, lambda archive: archive.writestr("archive/more", bytes(9), zipfile.ZIP_DEFLATED))
    assert plain_payload(compressed) is None
    assert plain_payload(_archive(_Runs(os.getcwd))) is None


class _Runs:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("hidden_in", ["whole_file", "planner_data", "tensor_name"])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (torch.load, "torch.serialization.load")],
)
def test_metadata_that_would_run_code_is_refused(
    copy: Path, tmp_path: Path, hidden_in: str, function: Callable[..., object], named: str
) -> None:
    trap = tmp_path / "it_ran"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    hostile = _Runs(function, argument)
    if hidden_in == "whole_file":
        (copy / ".metadata").write_bytes(pickle.dumps(hostile))
    elif hidden_in == "planner_data":
        rewrite_metadata(copy, lambda metadata: setattr(metadata, "planner_data", hostile))
    else:
        rewrite_metadata(copy, lambda metadata: metadata.state_dict_metadata.update({("x", hostile): 1}))
    with pytest.raises(ToolError, match=rf"\.metadata: refused: it names {named}, which no checkpoint") as caught:
        TorchDistCheckpoint(copy)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_a_tensor_file_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "it_ran"
    hostile = copy / "hostile.distcp"
    torch.save(_Runs(os.mkdir, str(trap)), hostile)

    def redirect(metadata: Any) -> None:
        info = place_of(metadata, SPLIT)
        info.relative_path, info.offset, info.length = hostile.name, 0, hostile.stat().st_size

    rewrite_metadata(copy, redirect)
    with pytest.raises(
        ToolError, match=r"hostile.distcp: tensor .*in_proj.weight.query, chunk at \[0, 0\]: unreadable"
    ):
        TorchDistCheckpoint(copy).read(SPLIT)
    assert not trap.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "..", "folder/file"])
def test_a_file_outside_the_folder_is_refused(copy: Path, path: str) -> None:
    rewrite_metadata(copy, lambda metadata: setattr(place_of(metadata, SPLIT), "relative_path", path))
    with pytest.raises(ToolError, match="leads out of the checkpoint folder"):
        TorchDistCheckpoint(copy)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", b"\x80\x04N.", b"\x80\x04}."], ids=repr)
def test_damaged_metadata_is_one_line(copy: Path, content: bytes) -> None:
    (copy / ".metadata").write_bytes(content)
    with pytest.raises(ToolError, match=r"\.metadata: (unreadable|refused)") as caught:
        TorchDistCheckpoint(copy)
    assert "\n" not in str(caught.value)


def test_metadata_cut_anywhere_is_one_line(copy: Path) -> None:
    whole = (copy / ".metadata").read_bytes()
    for length in range(0, len(whole), 97):
        (copy / ".metadata").write_bytes(whole[:length])
        with pytest.raises(ToolError, match=r"\.metadata: (unreadable|refused)"):
            TorchDistCheckpoint(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    path = copy / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-400])
    checkpoint = TorchDistCheckpoint(copy)
    messages = []
    for name in TENSORS:
        try:
            checkpoint.read(name)
        except ToolError as error:
            messages.append((name, str(error)))
    assert len(messages) == 1  # the tensor at the end of the file, and no other
    name, message = messages[0]
    assert f"__1_0.distcp: tensor {name}, chunk at" in message
    assert f"but the file ends at {path.stat().st_size}; it is truncated" in message


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(ToolError, match=r"__1_0.distcp: tensor .*query, chunk at \[4, 0\]: the file is missing"):
        TorchDistCheckpoint(copy).read(SPLIT)


def test_a_flipped_bit_is_found(copy: Path) -> None:
    path = copy / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(TENSORS[SPLIT][4:].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ToolError, match=r"__1_0.distcp: tensor .*query, .*: checksum of archive/data/0 does not match"):
        TorchDistCheckpoint(copy).read(SPLIT)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    with pytest.raises(ToolError, match=r"no tensor decoder\.final_norm\.weight"):
        TorchDistCheckpoint(copy).read("decoder.final_norm.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chunks: chunks.pop(), "cover 24 of 48 elements; a chunk is missing"),
        (lambda chunks: chunks.append(chunks[0]), "cover 72 of 48 elements and overlap"),
        (lambda chunks: chunks.__setitem__(1, chunks[0]), "cover 48 of 48 elements and overlap"),
        (lambda chunks: setattr(chunks[0], "sizes", torch.Size([9, 6])), "reaches out of"),
        (lambda chunks: setattr(chunks[0], "sizes", torch.Size([4])), "another number of dimensions"),
        (
            lambda chunks: setattr(chunks[0], "offsets", torch.Size([1, 0])),
            r"no file is given for its chunk at \[1, 0\]",
        ),
    ],
    ids=["missing", "twice", "one_for_another", "too_large", "flat", "moved"],
)
def test_chunks_that_do_not_cover_the_tensor_once_are_refused(
    copy: Path, change: Callable[[list[Any]], object], message: str
) -> None:
    rewrite_metadata(copy, lambda metadata: change(metadata.state_dict_metadata[SPLIT].chunks))
    with pytest.raises(ToolError, match=f"tensor {SPLIT}: .*{message}"):
        TorchDistCheckpoint(copy).read(SPLIT)


def test_a_chunk_of_another_shape_or_dtype_than_described_is_refused(copy: Path) -> None:
    def exchange(metadata: Any) -> None:
        ours, other = place_of(metadata, SPLIT), place_of(metadata, "counter")
        ours.relative_path, ours.offset, ours.length = other.relative_path, other.offset, other.length

    rewrite_metadata(copy, exchange)
    with pytest.raises(ToolError, match=r"query, .*: holds int64 \[2\], but .metadata says float32 \[4, 6\]"):
        TorchDistCheckpoint(copy).read(SPLIT)


def test_find_iteration_follows_the_tracker_file(written: Path, tmp_path: Path) -> None:
    for iteration in (5, 7):
        shutil.copytree(written / "1", tmp_path / f"iter_{iteration:07d}")
    (tmp_path / "iter_0000009").mkdir()  # a save that was killed
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    assert find_iteration(tmp_path) == tmp_path / "iter_0000007"
    assert find_iteration(tmp_path, 5) == tmp_path / "iter_0000005"
    assert find_iteration(tmp_path / "iter_0000005") == tmp_path / "iter_0000005"
    with pytest.raises(ToolError, match=r"--iteration 6: .*no such folder; complete here: iter_0000005, iter_0000007"):
        find_iteration(tmp_path, 6)
    tracker.write_text("9")
    with pytest.raises(ToolError, match=r"latest_.*txt: .*iter_0000009: metadata.json is missing.*complete here: iter"):
        find_iteration(tmp_path)
    tracker.write_text("seven")
    with pytest.raises(ToolError, match="'seven' is no iteration; give --iteration N"):
        find_iteration(tmp_path)


def test_find_iteration_refuses_what_is_no_checkpoint(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"--checkpoint .*nowhere: no such folder"):
        find_iteration(tmp_path / "nowhere")
    with pytest.raises(ToolError, match=r"neither latest_checkpointed_iteration.txt nor .metadata"):
        find_iteration(tmp_path)
    with pytest.raises(ToolError, match=r"--iteration 3: .*already is one iteration"):
        find_iteration(copy, 3)
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ToolError, match="format 'zarr' is not supported, legal: 'torch_dist'"):
        find_iteration(copy)
    (copy / "metadata.json").unlink()
    with pytest.raises(ToolError, match=r"metadata.json is missing, so the save did not finish"):
        find_iteration(copy)
