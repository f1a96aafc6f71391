"""Whether brokers can be reached under the names that they give themselves.

A client asks the bootstrap address once, and then connects to the addresses that the answer names (each broker's
advertised.listeners). These may mean nothing on this host: a name that only containers know, or localhost.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from typing import Protocol

CONNECT_S = 3.0


class Broker(Protocol):
    """As the client's metadata have it."""

    id: int
    host: str
    port: int


def unreachable(brokers: Iterable[Broker]) -> list[str]:
    """What is wrong with each that cannot be connected to, in one line each; empty if all can. Takes CONNECT_S."""
    asked = sorted(brokers, key=lambda broker: broker.id)
    problems = {broker.id: "cannot be resolved in time" for broker in asked}

    def connect(broker: Broker) -> None:
        problems[broker.id] = _problem(broker.host, broker.port)

    # Looking a name up knows no timeout, so it is left behind.
    threads = [threading.Thread(target=connect, args=(broker,), daemon=True) for broker in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CONNECT_S + 0.5)
    return [
        f"broker {broker.id} calls itself {broker.host}:{broker.port}, which {problems[broker.id]}"
        for broker in asked
        if problems[broker.id]
    ]


def _problem(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except socket.gaierror:
        return "cannot be resolved here"
    except TimeoutError:
        return f"does not answer within {CONNECT_S:.0f} s"
    except ConnectionRefusedError:
        return "refuses connections"
    except OSError as error:
        return f"cannot be reached ({error.strerror})"
    return ""
