"""Events from files, as `Message`s: NDJSON, plain or behind gzip or zstd, and Parquet as Amazon Security Lake has it.

What a file holds decides how it is read, not its name. Promises: bounded memory, whatever the size of the file; what
cannot be read costs a line, a row or the rest of its file, and is told to `lost`; files of one name in several folders
have coordinates of their own. A file has no second clock to hold an event time against, so times are held against each
other.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.decoder import event_times
from encoder.ocsf.event_time import TimeBounds, common_range, stand_ins
from encoder.ocsf.events import Message, Reject
from streamer.errors import RipcurrentError

BATCH = 4096
"""Messages decoded together when reading files."""
BATCH_BYTES = 64 << 20
"""About how much of a file is held at once: of long lines, a batch has fewer."""
MAX_LINE = 16 << 20
"""Bytes of a line that can still be an event. Kafka takes 1 MB unless told otherwise."""
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UNREADABLE = {b"PK\x03\x04": "a zip archive", b"BZh": "packed with bzip2", b"\xfd7zXZ": "packed with xz"}
UNREADABLE |= {b"Obj\x01": "an Avro file", b"ORC": "an ORC file", b"SQLite": "a database"}

Lost = Callable[[str, int, Reject], None]
"""Told of what could not be read: the topic, the line or row from 0, and why."""
Reread = Callable[[], Iterable[Sequence[Message]]]
"""Gives the same messages in batches each time it is called: a range of a topic."""


class FileError(RipcurrentError):
    """A file that cannot be opened."""


class Unread:
    """Counts what could not be read, in files or in a range of a topic, and remembers the first."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._first = ""

    def __len__(self) -> int:
        return self.kinds.total()

    def in_file(self, name: str, row: int, reject: Reject) -> None:
        """Something at a line or row of a file, from 0: a `Lost`."""
        self.add(f"line {row + 1} of {name}", reject)

    def add(self, where: str, reject: Reject) -> None:
        """Something at a place, in words."""
        self._first = self._first or f"{where}: {reject.reason}"
        self.kinds[reject.exception] += 1

    def __str__(self) -> str:
        """One line, empty where all was read."""
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.kinds.most_common())
        return f"{len(self):,} could not be read ({kinds}); first, {self._first}" if self.kinds else ""


def ignore(*_: object) -> None:
    """For who reads a file again, or does not count what is lost."""


def batches(paths: Sequence[Path], size: int = BATCH, lost: Lost = ignore) -> Iterator[list[Message]]:
    """The messages of several files one after the other, at most `size` and about BATCH_BYTES at a time (a batch never
    spans two files). Offset is the line or row from 0, topic the file's name with as many of its folders as it takes to
    tell the files apart, timestamp -1 (none). Event times are bounded by `with_common_times`, which reads files twice.

    Raises:
        FileError: a file cannot be opened, or is given twice.
    """
    passes = iter((ignore, lost))
    return with_common_times(lambda: _batches(paths, size, next(passes)))


def with_common_times(read: Reread) -> Iterator[list[Message]]:
    """The batches of `read`, with bounds for the messages whose event times do not belong to the others, or that have
    none: the range of the others (`common_range`), and as stand-in the believed time before it in the stream. Reads
    twice, first the times alone: 16 bytes an event."""
    flagged, bounds = _outlying(read())
    place = next_flagged = 0
    for batch in read():
        bounded = list(batch)
        while next_flagged < len(flagged) and flagged[next_flagged] < place + len(batch):
            at = int(flagged[next_flagged]) - place
            bounded[at] = bounded[at]._replace(bounds=bounds[next_flagged])
            next_flagged += 1
        place += len(batch)
        yield bounded


def _outlying(read: Iterable[Sequence[Message]]) -> tuple[NDArray[np.int64], list[TimeBounds]]:
    """The places in the stream of the messages with a time that does not belong to the others, ascending, and the
    bounds of each."""
    places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    times: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    done = 0
    for batch in read:
        position, time = event_times(batch)
        places.append(position + done)
        times.append(time)
        done += len(batch)
    place, time = np.concatenate(places), np.concatenate(times)
    if (common := common_range(time)) is None:
        return np.empty(0, np.int64), []
    earliest, latest = common
    outside = np.flatnonzero((time < earliest) | (time > latest))
    flagged, first = np.unique(place[outside], return_index=True)
    stand_in = stand_ins(time, earliest, latest)[outside[first]]
    return flagged, [TimeBounds(earliest, latest, at) for at in stand_in.tolist()]


def _batches(paths: Sequence[Path], size: int, lost: Lost) -> Iterator[list[Message]]:
    for path, topic in zip(paths, _topics(paths), strict=True):
        batch: list[Message] = []
        held = 0
        for offset, value in _rows(path, topic, lost):
            batch.append(Message(topic, 0, offset, -1, value))
            held += len(value)
            if len(batch) == size or held >= BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch


@contextmanager
def readable_again(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The same files as regular ones: what can be read only once (`-` for standard input, a named pipe, `<(...)`) is
    copied to temporary files, which are removed at the end.

    Raises:
        FileError: there is no such file, it is a folder, or the copy cannot be written.
    """
    with ExitStack() as stack:
        found = []
        for place, path in enumerate(paths):
            standard = str(path) in ("-", "/dev/stdin")
            try:
                if path.is_dir():
                    raise FileError(f"{path} is a folder; name the files in it, such as {path}/*")
                if not standard and not path.exists():
                    raise FileError(f"no such file: {path}")
                if path.is_file() and not standard:
                    found.append(path)
                    continue
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ripcurrent-"))
                copy = Path(folder) / str(place) / ("stdin" if standard else path.name)
                copy.parent.mkdir()
                with copy.open("wb") as target, path.open("rb") if not standard else _standard_input() as source:
                    shutil.copyfileobj(source, target, 1 << 20)
            except OSError as error:
                raise FileError(
                    f"{path} cannot be read: {error}"
                    + ("" if path.is_file() else "; a pipe is copied to a temporary file, TMPDIR says where")
                ) from error
            found.append(copy)
        yield found


def _standard_input() -> BinaryIO:
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb")


def _topics(paths: Sequence[Path]) -> list[str]:
    """A name for each file that no other has. Raises FileError where two are one file."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error}") from error
        if (first := seen.setdefault((found.st_dev, found.st_ino), path)) is not path:
            raise FileError(f"{path} is given twice, first as {first}")
    names, depth = [path.name for path in paths], 1
    while len(counts := Counter(names)) < len(names):
        depth += 1
        names = [
            name if counts[name] == 1 else "/".join(path.absolute().parts[-depth:])
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def _rows(path: Path, topic: str, lost: Lost) -> Iterator[tuple[int, bytes]]:
    """The lines or rows of a file with their numbers from 0."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PARQUET))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    read = _parquet if start == PARQUET else _lines
    number = 0

    def skip(row: int, kind: str, reason: str) -> None:
        lost(topic, row, Reject(-1, -1, None, "read", kind, reason))

    rows = read(path, skip)
    while True:
        try:
            row, value = next(rows)
        except StopIteration:
            return
        # Of damaged data the libraries raise nearly everything: OSError, EOFError, zlib.error, ValueError.
        except Exception as error:
            skip(number, "DamagedFile", f"the rest of the file cannot be read ({error or type(error).__name__})")
            return
        yield row, value
        number = row + 1


def _lines(path: Path, skip: Callable[[int, str, str], None]) -> Iterator[tuple[int, bytes]]:
    number = 0
    with ExitStack() as stack:
        stream: Any = stack.enter_context(path.open("rb"))
        start = stream.peek(8)[:8]
        while (packed := start.startswith(GZIP)) or start.startswith(ZSTD):
            inner = gzip.GzipFile(fileobj=stream, mode="rb") if packed else _zstd(stream)
            stream = stack.enter_context(io.BufferedReader(inner, 1 << 20))
            start = stream.peek(8)[:8]
        for magic, what in UNREADABLE.items():
            if start.startswith(magic):
                raise ValueError(f"it is {what}; NDJSON, plain or behind gzip or zstd, or Parquet is needed")
        if start.startswith(PARQUET):
            raise ValueError("it is Parquet within gzip or zstd; unpack it first")
        if start.startswith(UTF_16):
            text = stack.enter_context(io.TextIOWrapper(stream, "utf-16", errors="replace", newline="\n"))
            read: Callable[[int], bytes] = lambda size: text.readline(size).encode()  # noqa: E731
        else:
            read = stream.readline
        while line := read(MAX_LINE + 1):
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = read(1 << 20)
                skip(number, "LongLine", f"a line of more than {MAX_LINE >> 20} MiB is no event")
            elif line.strip():
                yield number, line.rstrip(b"\r\n")
            number += 1


def _zstd(stream: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")


def _parquet(path: Path, skip: Callable[[int, str, str], None]) -> Iterator[tuple[int, bytes]]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            for value in _json_rows(batch):
                if isinstance(value, bytes):
                    yield number, value
                else:
                    skip(number, "UnreadableRow", value)
                number += 1


def _json_rows(batch: Any) -> Iterator[bytes | str]:
    """Each row of a RecordBatch as JSON; of one that cannot be, why (str)."""
    import pyarrow

    # Python's times have no nanoseconds, which pandas, Polars and Arrow write unless told otherwise.
    wanted = pyarrow.schema([field.with_type(_microseconds(field.type)) for field in batch.schema])
    try:
        batch = batch if wanted == batch.schema else batch.cast(wanted, safe=False)
        yield from [_json(row) for row in batch.to_pylist(maps_as_pydicts="lossy")]
        return
    except Exception:  # noqa: S110 - one odd cell in 4,096 rows; and what it is, Arrow says with exceptions of any type
        pass
    for row in range(len(batch)):
        one = batch.slice(row, 1)
        try:
            value: bytes | str = _json(one.to_pylist(maps_as_pydicts="lossy")[0])
        except Exception:
            value = _json_by_cell(one)
        yield value


def _json_by_cell(row: Any) -> bytes | str:
    """A batch of one row as JSON, cell by cell; why not (str) where that fails."""
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record[name] = _cell(column[0])
            _json(record[name])
        except Exception as error:
            return f"column {name}: {error}"
    return _json(record)


def _json(value: Any) -> bytes:
    return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _microseconds(kind: Any) -> Any:
    """A type of Arrow with microseconds in place of nanoseconds, at any depth."""
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(kind) and kind.unit == "ns":
        return pyarrow.timestamp("us", kind.tz)
    if types.is_time64(kind) and kind.unit == "ns":
        return pyarrow.time64("us")
    if types.is_duration(kind) and kind.unit == "ns":
        return pyarrow.duration("us")
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_microseconds(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_microseconds(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_microseconds(kind.value_type)))
    if types.is_map(kind):
        return pyarrow.map_(_microseconds(kind.key_type), _microseconds(kind.item_type))
    return kind


def _cell(scalar: Any) -> Any:
    """A scalar of Arrow where Python's own types fail: times beyond the year 9999 or of unknown zones are ISO text,
    bytes that are not UTF-8 become U+FFFD as in JSON, and of a key that comes twice the last value stands."""
    from pyarrow import types

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if types.is_struct(kind):
        return {kind.field(i).name: _cell(scalar[i]) for i in range(kind.num_fields)}
    if types.is_map(kind):
        return {str(_plain(_cell(pair[0]))): _cell(pair[1]) for pair in scalar.values}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_cell(item) for item in scalar.values]
    if types.is_dictionary(kind):
        return _cell(scalar.value)
    try:
        return scalar.as_py()
    except Exception:
        if types.is_string(kind) or types.is_large_string(kind):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
        if types.is_timestamp(kind):
            return f"{np.datetime64(scalar.value, kind.unit)}{'Z' if kind.tz else ''}"
        if types.is_date(kind):
            return str(np.datetime64(scalar.value, "D" if types.is_date32(kind) else "ms"))
        raise


def event_uid(record: Mapping[str, Any], line: int) -> str:
    """The event's `metadata.uid`, else the number of its line in the file, from 1."""
    metadata = record.get("metadata")
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    return str(uid) if uid is not None else str(line)
