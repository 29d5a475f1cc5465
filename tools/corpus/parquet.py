"""Documents from Parquet files, row by row, without ever holding a row group."""

from collections.abc import Iterator
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.streams import InputFault, open_input

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20  # of each column that is read


def _pyarrow() -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ToolError("--input: Parquet files need pyarrow; pip install -e '.[data]'") from None
    return pyarrow


def _open(path: str) -> tuple[Any, Any]:
    """(pyarrow.parquet.ParquetFile, the handle to close); raises InputFault for a file that is none."""
    pyarrow = _pyarrow()
    handle = open_input(path)
    try:
        return pyarrow.parquet.ParquetFile(handle, buffer_size=BUFFER_BYTES, pre_buffer=False), handle
    except (pyarrow.ArrowException, OSError) as error:
        handle.close()
        reason = str(error).split("\n")[0]
        raise InputFault(
            f"{path}: truncated or not a Parquet file ({reason}); how many rows it had cannot be known: fetch it again"
        ) from error


def row_group_bytes(path: str) -> list[int]:
    """The uncompressed bytes of every row group, from the footer."""
    file, handle = _open(path)
    with handle:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]


def read_rows(path: str, first: int, last: int | None, columns: list[str]) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yields (number of the first row, from 0 in the file; the values of each of `columns`) by batches.

    Row groups [first, last) are read. A string that is no UTF-8 comes as bytes. Raises InputFault
    for a missing column, naming those there are, and for damaged pages.
    """
    pyarrow = _pyarrow()
    file, handle = _open(path)
    with handle:
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise InputFault(
                f"{path}: no column {missing[0]!r}; it has {', '.join(map(repr, file.schema_arrow.names[:12]))}: "
                "choose with --text-key or --metadata-keys"
            )
        metadata = file.metadata
        last = metadata.num_row_groups if last is None else last
        row = sum(metadata.row_group(group).num_rows for group in range(first))
        expected = row + sum(metadata.row_group(group).num_rows for group in range(first, last))
        try:
            groups = list(range(first, last))
            for batch in file.iter_batches(BATCH_ROWS, groups, columns, use_threads=False) if groups else ():
                yield row, [_values(batch.column(batch.schema.get_field_index(name))) for name in columns]
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise InputFault(
                f"{path}: truncated or corrupt after row {row} ({reason}); --on-error skip does not apply: "
                "fetch it again"
            ) from error
    if row != expected:
        raise InputFault(f"{path}: {row} rows where its footer promises {expected}; fetch it again")


def _values(column: Any) -> list[Any]:
    """Python values of a column; strings that are no UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast("large_binary").to_pylist()
        return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
