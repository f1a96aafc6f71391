"""Real servers for the tests that need them: one Kafka and one Valkey a session, started when first asked for."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from streamer import servers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the command does, before torch is imported


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers of a real Kafka; tests share it, so name topics with `unique`."""
    with servers.kafka() as bootstrap:
        yield bootstrap


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a real Valkey; tests share it, so use a tenant or a key prefix of your own (`unique`)."""
    with servers.valkey() as url:
        yield url


@pytest.fixture
def unique() -> Callable[[str], str]:
    """Names that no other test has: unique("events") -> "events-3f2a9c"."""
    return lambda name: f"{name}-{uuid.uuid4().hex[:10]}"
