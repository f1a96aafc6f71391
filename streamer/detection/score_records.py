"""Score records: one JSON record for each event, for the scores topic and for the file of a replay."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from streamer.detection.batches import ScoredBatch


def score_lines(scored: ScoredBatch) -> Iterator[tuple[str, bytes]]:
    """(coordinates, JSON) for each event: coordinates, p-value, severity, and whether the history of its entities is
    complete."""
    where = scored.coordinates
    for row in range(len(scored)):
        topic, partition = where.sources[where.source[row]]
        value = {
            "topic": topic,
            "partition": partition,
            "offset": int(where.offset[row]),
            "index": int(where.index[row]),
            "p_value": float(scored.p_value[row]),
            "severity": float(scored.severity[row]),
            "complete": scored.complete is None or bool(scored.complete[row]),
        }
        yield where.label(row), orjson.dumps(value)
