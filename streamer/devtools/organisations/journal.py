"""Collects the events of all days in the order of their delivery.

A product delivers an event some time after it happened. While a product's sensor is cut off it delivers nothing; what
it saw comes afterwards, in one go and with its old times.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.products import Event, Product


class Outage(NamedTuple):
    """A product delivers nothing from `begins` to `ends`, in ms."""

    product: str
    begins: float
    ends: float


class Entry(NamedTuple):
    """An event as JSON, without its uid. arrives: when it is delivered, in ms; mark: the incident that made it."""

    arrives: float
    body: bytes
    mark: str


class Journal:
    """Entries in the order in which they were made. mark: the incident that makes the next ones, "" for none."""

    def __init__(self, outages: list[Outage]) -> None:
        self.entries: list[Entry] = []
        self.mark = ""
        self._outages = outages

    def add(self, product: Product, time: float, event: Event, dice: Dice) -> None:
        arrives = time + 1000 * dice.around(product.delay, 0.4)
        for outage in self._outages:
            if outage.product == product.name and outage.begins <= time < outage.ends:
                arrives = outage.ends + (time - outage.begins) / 50
        metadata = event["metadata"]
        if "logged_time" in metadata:
            metadata["logged_time"] = int(arrives)
        self.entries.append(Entry(arrives, orjson.dumps(event), self.mark))
