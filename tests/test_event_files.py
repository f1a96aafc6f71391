"""Whatever a file holds, what cannot be read costs a line, a row or the rest of that file, and is counted."""

from __future__ import annotations

import datetime
import gzip
import os
import random
import subprocess
import threading
from pathlib import Path

import orjson
import pyarrow
import pytest
from pyarrow import parquet
from test_cli import COMMAND, ripcurrent

from streamer.event_files import MAX_LINE, FileError, Unread, batches, readable_again
from streamer.offline.evaluation import read_events

LINES = [orjson.dumps({"class_uid": 3002, "time": 1_767_571_200_000 + i, "user": {"name": f"u{i}"}}) for i in range(60)]
TEXT = b"\n".join(LINES) + b"\n"


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue())


def as_parquet(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    rows = [orjson.loads(line) for line in data.splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=20)
    return bytes(sink.getvalue())


PACKED = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd, "parquet": as_parquet}
PACKED |= {
    "gzip twice": lambda data: gzip.compress(gzip.compress(data)),
    "zstd, gzip": lambda d: gzip.compress(zstd(d)),
}
PACKED |= {"members": lambda data: gzip.compress(data[: len(LINES[0]) + 1]) + gzip.compress(data[len(LINES[0]) + 1 :])}
PACKED |= {"windows": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")}
PACKED |= {"powershell": lambda data: data.decode().replace("\n", "\r\n").encode("utf-16")}


def read(*paths: Path) -> tuple[list[dict[str, object]], Unread]:
    """The events of files that are one JSON object a line, and what was lost."""
    unread = Unread()
    values = [message.value for batch in batches(paths, lost=unread.in_file) for message in batch]
    return [orjson.loads((value or b"").removeprefix(b"\xef\xbb\xbf")) for value in values], unread


@pytest.mark.parametrize("packing", PACKED)
def test_what_a_file_holds_and_not_its_name_says_how_it_is_read(packing: str, tmp_path: Path) -> None:
    (tmp_path / "events.txt").write_bytes(PACKED[packing](TEXT))
    events, unread = read(tmp_path / "events.txt")
    assert events == [orjson.loads(line) for line in LINES]
    assert str(unread) == ""


@pytest.mark.parametrize("packing", PACKED)
def test_a_damaged_file_gives_what_comes_before_the_damage_and_the_next_file_is_read(
    packing: str, tmp_path: Path
) -> None:
    whole, generator = PACKED[packing](TEXT), random.Random(1)
    (tmp_path / "good").write_bytes(TEXT)
    for round in range(40):
        damaged = bytearray(whole)
        if round % 2:
            del damaged[generator.randrange(1, len(damaged)) :]
        else:
            place = generator.randrange(4, len(damaged))
            damaged[place : place + 8] = generator.randbytes(len(damaged[place : place + 8]))
        (tmp_path / "bad").write_bytes(damaged)
        unread = Unread()
        found = [m for batch in batches([tmp_path / "bad", tmp_path / "good"], lost=unread.in_file) for m in batch]
        assert [message.value for message in found if message.topic == "good"] == LINES
        rows = sum(message.topic == "bad" for message in found)
        assert rows <= len(LINES) + 10  # plain text has more lines where the damage is one
        if packing not in ("plain", "windows", "powershell") and rows < len(LINES):
            assert list(unread.kinds) == ["DamagedFile"]
            assert f"line {rows + 1} of bad: the rest of the file cannot be read (" in str(unread)


def odd_table() -> pyarrow.Table:
    """Rows as pandas, Polars and Tenzir write them, and some that Python cannot hold."""
    utf8 = pyarrow.array([b"plain", b"\xff\xfe", b"caf\xc3\xa9"])
    moment = 1_767_571_200_123_456_789
    nanoseconds = pyarrow.array([moment, moment + 1, None], pyarrow.timestamp("ns", "UTC"))
    nested = pyarrow.array(
        [[{"at": moment, "text": b"x"}], [{"at": moment, "text": b"\xff"}], None],
        pyarrow.list_(pyarrow.struct([("at", pyarrow.timestamp("ns")), ("text", pyarrow.binary())])),
    )
    columns = {
        "class_uid": pyarrow.array([3002, 3002, 3002]),
        "time_dt": nanoseconds,
        "duration": pyarrow.array([1, 2, 3], pyarrow.duration("ns")),
        "clock": pyarrow.array([1, 2, 3], pyarrow.time64("ns")),
        "expires": pyarrow.array([0, 253_402_300_800, -99_999_999_999_999], pyarrow.timestamp("s", "Europe/Paris")),
        "nowhere": pyarrow.array([0, 1, 2], pyarrow.timestamp("ms", "Nowhere/Here")),
        "day": pyarrow.array([0, 10_000_000, 1], pyarrow.date32()),
        "text": pyarrow.Array.from_buffers(pyarrow.string(), 3, utf8.buffers()),
        "nested": nested,
        "labels": pyarrow.array(
            [[(b"a", 1)], [(b"\xff", 2), (b"\xff", 3)], []], pyarrow.map_(pyarrow.binary(), pyarrow.int64())
        ),
        "kind": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        "cost": pyarrow.array([datetime.date(2026, 1, 1), None, None]),
    }
    return pyarrow.table(columns)


def test_a_cell_that_python_cannot_hold_is_read_as_json_would_have_it(tmp_path: Path) -> None:
    parquet.write_table(odd_table(), tmp_path / "odd.parquet", store_schema=True)
    events, unread = read(tmp_path / "odd.parquet")
    assert str(unread) == ""
    assert [event["text"] for event in events] == ["plain", "\ufffd\ufffd", "café"]
    assert [event["time_dt"] for event in events] == ["2026-01-05T00:00:00.123456+00:00"] * 2 + [None]
    assert events[1]["nested"] == [{"at": "2026-01-05T00:00:00.123456", "text": "\ufffd"}]
    assert events[1]["expires"] == "10000-01-01T00:00:00.000Z"
    assert events[1]["day"] == "29349-01-26"
    assert events[1]["labels"] == {"\ufffd": 3}
    assert events[2]["nowhere"] == "1970-01-01T00:00:00.002Z"
    assert [event["kind"] for event in events] == ["a", "b", "a"]


def test_files_of_one_name_in_several_folders_are_different_files(tmp_path: Path) -> None:
    paths = [tmp_path / day / "events.ndjson" for day in ("monday", "tuesday")] + [tmp_path / "other.ndjson"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(TEXT)
    topics = {batch[0].topic for batch in batches(paths)}
    assert topics == {"monday/events.ndjson", "tuesday/events.ndjson", "other.ndjson"}
    (tmp_path / "again.ndjson").symlink_to(paths[2])
    with pytest.raises(FileError, match=r"again\.ndjson is given twice, first as .*other\.ndjson"):
        list(batches([paths[2], tmp_path / "again.ndjson"]))


def test_a_line_without_an_end_costs_itself_and_no_memory(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(LINES[0] + b"\n" + b"x" * (MAX_LINE + 1) + b"\n" + LINES[1] + b"\n" + LINES[2])
    events, unread = read(tmp_path / "long")
    assert events == [orjson.loads(line) for line in LINES[:3]]
    assert (
        str(unread) == "1 could not be read (1 LongLine); first, line 2 of long: a line of more than 16 MiB is no event"
    )


def test_what_can_be_read_only_once_is_kept_while_it_is_needed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(TEXT),))
    writer.start()
    with readable_again([tmp_path / "pipe"]) as (copy,):
        writer.join()
        assert read(copy)[0] == read(copy)[0] == [orjson.loads(line) for line in LINES]
        assert [batch[0].topic for batch in batches([copy])] == ["pipe"]
    assert not copy.exists()
    with pytest.raises(FileError, match="is a folder; name the files in it"), readable_again([tmp_path]):
        pass
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError, match="loop"), readable_again([tmp_path / "loop"]):
        pass


def test_the_evaluation_reads_what_the_detector_reads(tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(zstd(b"garbage\n" + TEXT))
    found = list(read_events([tmp_path / "events"]))
    assert [uid for uid, _ in found] == [str(line) for line in range(2, 62)]


@pytest.mark.extended
def test_a_command_reads_pipes_and_ends_with_1_where_nothing_can_be_read(folder: Path, tmp_path: Path) -> None:
    bundle = ["--bundle", str(folder / "bundle")]
    for name in ("-", "/dev/stdin"):
        with (folder / "test.ndjson").open("rb") as source:
            scored = subprocess.run(
                ["sh", "-c", 'cat | "$@"', "sh", *COMMAND, "score", name, *bundle, "--alerts", "alerts.ndjson"],
                stdin=source, cwd=tmp_path, capture_output=True, text=True, check=True,
            )  # fmt: skip
        events = len((folder / "test.ndjson").read_bytes().splitlines())
        assert scored.stdout.startswith(f"{events:,} events")
    (tmp_path / "empty").touch()
    (tmp_path / "array").write_text('[\n  {\n    "class_uid": 3002\n  }\n]\n')
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "cut.parquet").write_bytes(as_parquet(TEXT)[:500])
    for name, message in (
        ("empty", "empty: no event could be read"),
        ("array", "one JSON object a line is needed"),
        ("archive.zip", "it is a zip archive; NDJSON"),
        ("cut.parquet", "the rest of the file cannot be read"),
        (".", ". is a folder"),
    ):
        done = ripcurrent("score", name, *bundle, cwd=tmp_path)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ripcurrent: ")
        assert message in last, last
        assert "Traceback" not in done.stderr
