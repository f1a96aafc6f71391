"""A range of a topic is fixed before it is read, and read in one order whatever the topic does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from confluent_kafka import Producer
from loop_harness import Topics, create

from encoder.ocsf.events import Message
from streamer.errors import ConfigurationError, RipcurrentError
from streamer.kafka import range_reader
from streamer.kafka.consumer import message_of
from streamer.kafka.offset_ranges import Bound, freeze, parse_bound, parse_duration
from streamer.kafka.range_reader import RangeReader

NOW = 1_763_000_000_000


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    # What is as old as NOW, Kafka would delete whenever it looks.
    return create(kafka, unique("range"), partitions=2, config={"retention.ms": "-1"})


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("earliest", Bound("earliest")),
        ("latest", Bound("latest")),
        ("0", Bound("offset", 0)),
        ("5000", Bound("offset", 5000)),
        ("1700000000123", Bound("time", 1_700_000_000_123)),
        ("2023-11-14T22:13:20Z", Bound("time", 1_700_000_000_000)),
        ("2023-11-14T22:13:20.5", Bound("time", 1_700_000_000_500)),
        ("2023-11-14T23:13:20+01:00", Bound("time", 1_700_000_000_000)),
        ("2023-11-14", Bound("time", 1_699_920_000_000)),
        ("last 6h", Bound("time", NOW - 6 * 3_600_000)),
        ("90s ago", Bound("time", NOW - 90_000)),
        ("1.5d", Bound("time", NOW - 129_600_000)),
    ],
)
def test_a_place_in_a_topic_in_the_words_of_a_person(text: str, bound: Bound) -> None:
    assert parse_bound(text, NOW) == bound


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "6 fortnights", "2=", "2023-13-01"])
def test_what_is_no_place_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"earliest, latest, an offset"):
        parse_bound(text, NOW)
    with pytest.raises(ConfigurationError, match="write it like"):
        parse_duration("soon")


def frozen(topics: Topics, since: Sequence[str] = (), until: Sequence[str] = ()) -> dict[int, tuple[int, int]]:
    found = freeze(topics.settings(), since, until, NOW)
    return {partition: offsets for (_, partition), offsets in found.items()}


def test_bounds_of_all_and_of_single_partitions_become_offsets(topics: Topics) -> None:
    for minute in range(10):
        topics.produce([b"x", b"y"], timestamp=NOW - 600_000 + minute * 60_000)
    assert frozen(topics) == {0: (0, 10), 1: (0, 10)}
    assert frozen(topics, ["3"], ["1=5", "8"]) == {0: (3, 8), 1: (3, 5)}
    assert frozen(topics, ["1=4"]) == {1: (4, 10)}
    assert frozen(topics, [f"{topics.events}:1=4"], ["1=6"]) == {1: (4, 6)}
    assert frozen(topics, ["last 3m"]) == {0: (7, 10), 1: (7, 10)}
    assert frozen(topics, [str(NOW - 600_000)], [str(NOW - 540_001)]) == {0: (0, 1), 1: (0, 1)}
    for since, until, words in [
        (["11"], [], "holds offsets 0 to 9, and 11 was asked for"),
        (["7=1"], [], f"no such partition: {topics.events}:7"),
        (["other:1=1"], [], "which topic"),
        (["1", "2"], [], "two bounds for all partitions"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            frozen(topics, since, until)


def test_a_time_beyond_the_last_message_is_an_empty_range_and_no_live_tail(topics: Topics) -> None:
    topics.produce([b"x"] * 4, timestamp=NOW - 600_000)
    topics.produce([b"y"], 1, timestamp=NOW - 60_000)
    assert frozen(topics, ["last 2m"]) == {0: (2, 2), 1: (2, 3)}
    assert frozen(topics, ["last 10s"]) == {0: (2, 2), 1: (3, 3)}
    settings = topics.settings()
    empty = freeze(settings, ["last 10s"], [], NOW)
    topics.produce([b"later"] * 4, timestamp=NOW)
    with RangeReader(settings, empty, message_of) as reader:
        assert list(reader.batches(10)) == []


def test_partitions_are_merged_by_timestamp_and_coordinates_within_bounded_memory(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Partition 0 comes first by time, and is far more than may be read ahead of partition 1.
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    for step in range(600):
        producer.produce(topics.events, b"%d" % step * 100, partition=0, timestamp=NOW + step)
    assert producer.flush(20) == 0
    topics.produce([b"late"] * 5, 1, timestamp=NOW + 300)
    topics.produce([b"early", b"end"], 1, timestamp=NOW + 10_000)
    monkeypatch.setattr(range_reader, "AHEAD_BYTES", 40_000)
    monkeypatch.setattr(range_reader, "CHUNK", 50)
    settings = topics.settings()
    wanted = freeze(settings, [], [], NOW)
    topics.produce([b"not of the range"] * 10, timestamp=NOW)
    runs, arrived = [], []

    def keep(raw: Any) -> Message:
        arrived.append(len(raw.value()))
        return message_of(raw)

    for size in (7, 1000):
        arrived.clear()
        with RangeReader(settings, wanted, keep) as reader:
            read, ahead = [], []
            for batch in reader.batches(size):
                read += batch
                ahead.append(sum(arrived) - sum(len(message.value or b"") for message in read))
        assert 0 <= max(ahead) < 2 * 40_000 < sum(arrived)
        runs.append([(m.timestamp, m.partition, m.offset) for m in read])
    assert runs[0] == runs[1] == sorted(runs[0])
    assert len(runs[0]) == 607


def test_marks_of_transactions_and_what_was_aborted_are_no_part_of_a_range(topics: Topics) -> None:
    writer = Producer({"bootstrap.servers": topics.bootstrap, "transactional.id": topics.name})
    writer.init_transactions(20)
    for value, end in [(b"a", writer.commit_transaction), (b"b", writer.abort_transaction)]:
        writer.begin_transaction()
        writer.produce(topics.events, value, partition=0)
        writer.flush(10)
        end(20)
    settings = topics.settings()
    wanted = freeze(settings, [], [], NOW)
    assert wanted[topics.events, 0] == (0, 4)  # two messages, two marks
    with RangeReader(settings, wanted, message_of) as reader:
        assert [m.value for batch in reader.batches(10) for m in batch] == [b"a"]


def test_a_range_that_is_gone_by_the_time_it_is_read_is_named(topics: Topics) -> None:
    from test_service import expire

    topics.produce([b"x"] * 20)
    settings = topics.settings()
    wanted = freeze(settings, [], [], NOW)
    expire(topics, 5)
    with (
        RangeReader(settings, wanted, message_of) as reader,
        pytest.raises(RipcurrentError, match=f"{topics.events}:0: messages of the range no longer exist"),
    ):
        list(reader.batches(100))


def test_a_time_cannot_be_found_where_records_are_dated_in_seconds(topics: Topics) -> None:
    """It was an empty range once, and a replay of it said that there were no alerts."""
    topics.produce([b"x"] * 4, timestamp=NOW // 1000)
    with pytest.raises(ConfigurationError, match="no record has a timestamp that is a date in milliseconds"):
        frozen(topics, ["last 2m"])
    assert frozen(topics, ["1"]) == {0: (1, 2), 1: (1, 2)}
