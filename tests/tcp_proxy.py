"""A TCP proxy in front of a server of a test: it delays, throttles, half-closes and cuts the connections through it.

It runs in a thread of its own (`with TcpProxy(...)`), or in a process (`serve`) where it must not take time from
what is measured.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

CHUNK, QUEUED = 1 << 16, 64
"""Bytes read at once, and how often before what was read is passed on."""
STEP_S = 0.05
"""How often a throttled connection passes something on."""
END_S = 10.0


@dataclass(frozen=True)
class Disturbance:
    """What is done to the connections. delay_s: how much later a byte arrives, in each direction; bytes_per_s: of each
    connection, in each direction."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf


class TcpProxy:
    """Passes on what comes to `port` of this host to `target` of this host, and what comes back the same way.

    `disturbance` may be set at any time, also while connections are open.
    """

    def __init__(self, port: int, target: int, disturbance: Disturbance | None = None) -> None:
        self.port, self.disturbance = port, disturbance or Disturbance()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._open: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []  # to the client, to the server
        self._ended: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._serve_in_thread, name="proxy", daemon=True)
        self._listening = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(END_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def cut(self) -> int:
        """Drop all connections at both ends, with what is under way in them. Returns how many."""
        return self._each(lambda writer: writer.transport.abort(), 0, 1)

    def half_close(self, *, to_client: bool) -> int:
        """Send the end of the stream one way, drop what would come after it, and leave the other way open. Returns on
        how many connections."""

        def end(writer: asyncio.StreamWriter) -> None:
            if writer not in self._ended:
                self._ended.add(writer)
                writer.write_eof()

        return self._each(end, 0 if to_client else 1)

    def _each(self, act: Callable[[asyncio.StreamWriter], None], *ends: int) -> int:
        async def on_each() -> int:
            for writers in self._open:
                for end in ends:
                    if not writers[end].is_closing():
                        act(writers[end])
            return len(self._open)

        return asyncio.run_coroutine_threadsafe(on_each(), self._loop).result(END_S)

    def _serve_in_thread(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._join, "127.0.0.1", self.port))
        self._listening.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        pair = writer, back
        self._open.append(pair)
        try:
            await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))
        finally:
            self._open.remove(pair)
            self._ended.difference_update(pair)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the end of the stream, which is passed on after what came before it."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)

        async def read() -> None:
            data = b""
            try:
                while data := await reader.read(CHUNK):
                    await waiting.put((loop.time() + self.disturbance.delay_s, data))
            finally:
                await waiting.put((loop.time() + self.disturbance.delay_s, b""))

        async def write() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    writer.close()
                    return
                while data:
                    rate = self.disturbance.bytes_per_s
                    part = len(data) if rate == math.inf else max(int(rate * STEP_S), 1)
                    if rate < math.inf:
                        await asyncio.sleep(STEP_S)
                    if not writer.is_closing() and writer not in self._ended:
                        writer.write(data[:part])
                    data = data[part:]

        await asyncio.gather(read(), write(), return_exceptions=True)


def serve(port: int, target: int, delay_s: float) -> None:
    """A proxy that only delays, for a process of its own."""
    proxy = TcpProxy(port, target, Disturbance(delay_s))
    with proxy:
        threading.Event().wait()
