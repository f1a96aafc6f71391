"""python -m streamer.devtools.organisations FOLDER [--seeds 0,1,2]: write a stream a seed, `organisation-SEED`."""

from __future__ import annotations

from pathlib import Path

import typer

from streamer.devtools.organisations.generator import (
    EVENTS_PER_DAY,
    TEST_DAYS,
    TRAIN_DAYS,
    simulate,
    write_stream,
)


def main(
    folder: Path,
    seeds: str = "0",
    train_days: int = TRAIN_DAYS,
    test_days: int = TEST_DAYS,
    events_per_day: int = EVENTS_PER_DAY,
) -> None:
    """Draw an organisation a seed and write its training days, its test days and their labels to a folder."""
    for seed in map(int, seeds.split(",")):
        made = simulate(seed, train_days=train_days, test_days=test_days, events_per_day=events_per_day)
        written = write_stream(made, folder, f"organisation-{seed}")
        typer.echo(f"organisation-{seed}: {written:,} events, {len(made.entities)} incidents in {folder}")


if __name__ == "__main__":
    typer.run(main)
