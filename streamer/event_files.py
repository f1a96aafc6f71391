"""Events from files: NDJSON, NDJSON behind gzip, and Parquet as Amazon Security Lake writes it, as `Message`s.

Promises: bounded memory, whatever the size of the file; a line that cannot be read is a message that cannot be read,
and is rejected like one from Kafka.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from encoder.ocsf.events import Message
from streamer.errors import RipcurrentError

BATCH = 4096
"""Messages decoded together when reading files."""


class FileError(RipcurrentError):
    """A file that cannot be read."""


def messages(path: Path) -> Iterator[Message]:
    """The lines or rows of a file; offset is the line or row from 0, topic the file's name, timestamp -1 (none)."""
    read = _parquet if path.suffix == ".parquet" else _lines
    try:
        for offset, value in read(path):
            yield Message(path.name, 0, offset, -1, value)
    except (OSError, EOFError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def batches(paths: Sequence[Path], size: int = BATCH) -> Iterator[list[Message]]:
    """The messages of several files one after the other, `size` at a time (a batch never spans two files)."""
    for path in paths:
        stream = messages(path)
        while batch := list(islice(stream, size)):
            yield batch


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _parquet(path: Path) -> Iterator[tuple[int, bytes]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    yield number, orjson.dumps(row, default=_plain, option=orjson.OPT_NON_STR_KEYS)
                    number += 1
    except pyarrow.ArrowException as error:
        raise FileError(f"{path} is not a Parquet file that can be read: {error}") from error


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def event_uid(record: Mapping[str, Any], line: int) -> str:
    """The event's `metadata.uid`, else the number of its line in the file, from 1."""
    metadata = record.get("metadata")
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    return str(uid) if uid is not None else str(line)
