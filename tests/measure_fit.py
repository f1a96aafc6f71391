"""What `fit` needs for many distinct values: 300 attribute paths, 30 classes, a user name of its own for every event.

    python tests/measure_fit.py [events]

Prints the most memory that the process held, and what the schema did with the names.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import orjson

from encoder.ocsf.events import Message
from streamer.training.fit import fit

CLASSES = [1000 * category + n for category in (1, 3, 4, 5, 6) for n in range(1, 7)]
PATHS = 9
"""Attributes of each class that no other has: with the common ones, 300 paths."""
START = 1_767_225_600_000


def stream(events: int) -> Iterator[list[Message]]:
    """A week of so many events, the same each time it is asked for."""
    step = 7 * 86_400_000 / events
    batch: list[Message] = []
    for i in range(events):
        kind = CLASSES[i * 7919 % len(CLASSES)]
        event = {
            "class_uid": kind,
            "activity_id": 1 + i % 3,
            "type_uid": kind * 100 + 1 + i % 3,
            "category_uid": kind // 1000,
            "time": START + int(i * step),
            "severity_id": 1,
            "metadata": {"version": "1.5.0", "product": {"name": f"p{kind}"}},
            "user": {"name": "".join(chr(97 + i // 26**k % 26) for k in range(5))},
            "device": {"hostname": f"host-{chr(97 + i % 23)}"},
            "src_endpoint": {"ip": f"10.{i % 7}.{i % 251}.{i % 13}"},
            "unmapped": {f"k{kind}_{place}": _value(i, place) for place in range(PATHS)},
        }
        batch.append(Message("names", 0, i, START + int(i * step), orjson.dumps(event)))
        if len(batch) == 4096:
            yield batch
            batch = []
    if batch:
        yield batch


def _value(i: int, place: int) -> str | int:
    """Constants, few values, many values, quantities and text, by turns."""
    n = i * 2246822519 % 4294967296
    return ("on", f"v{chr(97 + n % 11)}", f"item {n:x}", n % 100_003, f"job {n % 977} of {chr(97 + n % 5)} done")[
        place % 5
    ]


def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    began = time.monotonic()
    stages: dict[str, float] = {}

    def progress(stage: str, done: int, total: int, note: str) -> None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if stages.get(stage) != most:
            stages[stage] = most

    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(lambda: stream(events), Path(folder) / "bundle", progress=progress)
    for stage, most in stages.items():
        print(f"{stage}: at most {most:.2f} GiB until its end")
    print(
        f"whole: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, {time.monotonic() - began:.0f} s"
    )
    schema = fitted.bundle.encoder.schema
    print(
        f"{fitted.events:,} events, {fitted.used:,} used, {len(schema.known_paths)} paths, {len(schema.fields)} fields"
    )
    names = next(field for field in schema.fields if field.path == "user.name")
    print(f"user.name: {names.kind}, {len(names.values):,} values, {names.left_out:,} left out")


if __name__ == "__main__":
    main()
