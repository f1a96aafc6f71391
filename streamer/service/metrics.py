"""What an operator sees: Prometheus metrics, /healthz (the loop is alive) and /readyz (assigned, loaded, connected).

Promises names that stay, and figures that are cheap enough to be always on. Does not decide what is healthy: the
service passes two functions that do.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from streamer.errors import ConfigurationError

DAY_MS = 86_400_000
_STAGE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)


class Metrics:
    """The metrics of one service, in a registry of its own so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # Memory, CPU and open files, by the names that all exporters use.

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ripcurrent_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"ripcurrent_{name}", text, labels, registry=registry)

        self.messages = counter("messages", "Messages read and committed")
        self.events = counter("events", "Events scored and committed")
        self.incomplete = counter(
            "incomplete", "Events scored while history of one of their entities was known to be missing"
        )
        self.lowered = counter(
            "lowered_events",
            "Events whose evidence counts less, as it came too often lately (news: values that training did not have; "
            "part: a part of the score), committed",
            "why",
        )
        self.batches = counter("batches", "Micro-batches scored")
        self.anomalies = counter("anomalies", "Events at or under the threshold, committed")
        self.alerts = counter("alerts", "Alerts (Create) committed")
        self.suppressed = counter(
            "suppressed",
            "Events at or under the threshold that a verdict silences, by its uid, committed",
            "suppression",
        )
        self.updates = counter("alert_updates", "Updates and closes of alerts, committed", "activity")
        self.rejects = counter(
            "rejects", "Messages or members of bundles that went to the dead-letter topic", "exception"
        )
        self.crashes = counter(
            "crashing_events", "Events that crashed the detector and went to the dead-letter topic, by stage", "stage"
        )
        self.repairs = counter("repairs", "Repairs of events, by kind", "kind")
        self.repair_share = gauge(
            "repair_share", "Share of recent events that a repair touched, of those above a tenth", "kind"
        )
        self.transactions = counter("transactions", "Groups of batches by how they ended", "outcome")
        self.waits = counter("redis_waits", "Times that a batch had to wait for Redis")
        self.losses = counter(
            "window_losses", "Times that Redis had lost windows and they were filled again from Kafka"
        )
        self.rebuild_left = gauge("rebuild_left_messages", "Messages still to be read to fill windows again")
        self.stage = Histogram(
            "ripcurrent_stage_seconds", "Time of one batch in a stage", ["stage"], registry=registry, buckets=_STAGE_S
        )
        self.latency = Histogram(
            "ripcurrent_alert_latency_seconds",
            "From the Kafka timestamp of the event to the commit of its alert",
            registry=registry,
            buckets=_LATENCY_S,
        )
        self.batch_latency = Histogram(
            "ripcurrent_batch_latency_seconds",
            "From the Kafka timestamp of the oldest message of a batch to its commit",
            registry=registry,
            buckets=_LATENCY_S,
        )
        self.lag = gauge("lag_messages", "Messages behind the end of the partition", "topic", "partition")
        self.round_trip = gauge("kafka_round_trip_seconds", "Until a broker answers the producer, 95 %", "broker")
        self.store_round_trip = gauge("redis_round_trip_seconds", "Until Redis answers, a moving average", "server")
        self.threshold = gauge("line_p_value", "Events at or under this p-value are alerts")
        self.promised = gauge("budget_promised_per_day", "Alerts a day that normal traffic may cost")
        self.spent = gauge("budget_spent_today", "Alerts (Create) of the latest day of event time")
        self.bundle = gauge("bundle_info", "1 for the bundle that serves", "version")
        self.swaps = counter("bundle_swaps", "Times that a promoted bundle took over while running")
        self.bundles_refused = counter("bundles_refused", "Promoted bundles that could not serve")
        self.shadow_events = counter("shadow_events", "Events that the candidate beside has scored too")
        self.shadow_alerts = counter(
            "shadow_alerts", "Alerts of both, of the candidate only (gained), of the serving bundle (lost)", "whose"
        )
        self.shadow_decades = counter(
            "shadow_decades", "Sum over events of how many powers of ten lie between the p-values of both bundles"
        )
        self.shadow_failures = counter("shadow_failures", "Times that the candidate beside had to begin again")
        self._day = -1

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe how long the block takes as one stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stage.labels(stage).observe(time.perf_counter() - began)

    def spend(self, event_times: list[int]) -> None:
        """Count alerts, by the event times (ms) of what they are about, against the budget of their day."""
        for day in sorted(event_time // DAY_MS for event_time in event_times):
            if day > self._day:
                self._day = day
                self.spent.set(0)
            if day == self._day:
                self.spent.inc()

    def repaired(self, repairs: Mapping[str, int]) -> None:
        """Count the repairs of a batch."""
        for kind, count in repairs.items():
            self.repairs.labels(kind).inc(count)

    def set_repair_shares(self, shares: Mapping[str, float]) -> None:
        """Show the shares of these repairs, and of no others."""
        _show_only(self.repair_share, {(kind,): share for kind, share in shares.items()})

    def set_lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """Show the lag of these partitions and of no others."""
        _show_only(self.lag, {(topic, str(partition)): behind for (topic, partition), behind in lag.items()})

    def set_round_trips(self, brokers: Mapping[str, float], stores: Mapping[str, float]) -> None:
        """Show how long these servers take to answer, in seconds, and no others."""
        for gauge, seconds in ((self.round_trip, brokers), (self.store_round_trip, stores)):
            _show_only(gauge, {(server,): taken for server, taken in seconds.items()})


def _show_only(gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    for labels in {
        tuple(sample.labels.values()) for family in gauge.collect() for sample in family.samples
    } - values.keys():
        gauge.remove(*labels)
    for labels, value in values.items():
        gauge.labels(*labels).set(value)


def serve(
    metrics: Metrics,
    address: str,
    port: int,
    *,
    alive: Callable[[], str],
    ready: Callable[[], str],
    slow: Callable[[], str] = str,
) -> ThreadingHTTPServer:
    """Serve /metrics, /healthz and /readyz on a port of an address, in a thread, until `shutdown()`.

    alive and ready return why not, or an empty string. slow returns what /readyz adds to "ok", or an empty string.

    Raises:
        ConfigurationError: the port is taken, or the address is not one of this host.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(metrics.registry), "text/plain; version=0.0.4; charset=utf-8")
            elif self.path in ("/healthz", "/readyz"):
                problem = alive() if self.path == "/healthz" else alive() or ready()
                note = slow() if self.path == "/readyz" else ""
                body = problem or (f"ok, but {note}" if note else "ok")
                self._answer(503 if problem else 200, f"{body}\n".encode(), "text/plain; charset=utf-8")
            else:
                self._answer(404, b"/metrics, /healthz or /readyz\n", "text/plain; charset=utf-8")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """A scrape every few seconds is not worth a line."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    try:
        server = Server((address, port), Handler)
    except OSError as error:
        raise ConfigurationError(
            f"metrics_port {port} cannot be opened on metrics_address {address}: {error.strerror}; port 0 turns it off"
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
