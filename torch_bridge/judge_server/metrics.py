"""What the server counts, in Prometheus' format."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from torch_bridge.judge_server.chat_model import Completion

LEAST_MASS = 0.5  # below, a client takes a score as invalid
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The server's own registry, so that several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("judge_requests", "Chat requests answered", ["status"], registry=registry)
        self.images = Counter("judge_images", "Pictures of the chat requests that were computed", registry=registry)
        self.invalid = Counter(
            "judge_invalid", f"One-token replies with less than {LEAST_MASS} on the digits 0-5", registry=registry
        )
        self.covered_mass = Histogram(
            "judge_covered_mass",
            "Probability of the digits 0-5 among the candidates of one-token replies",
            buckets=[n / 10 for n in range(1, 11)],
            registry=registry,
        )
        self.queue_depth = Gauge("judge_queue_depth", "Requests that wait to be computed", registry=registry)
        self.decoding_given_up = Gauge(
            "judge_decoding_given_up", "Threads that still decode pictures of requests given up", registry=registry
        )
        self.batch_size = Histogram(
            "judge_batch_size",
            "Requests computed at once",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "judge_batch_seconds", "Time a batch took to compute", buckets=_SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "judge_request_seconds", "Time from a request's head to its reply", buckets=_SECONDS, registry=registry
        )
        self.connections = Gauge("judge_connections", "Open connections", registry=registry)
        self.connections_refused = Counter(
            "judge_connections_refused", "Connections beyond the limit", registry=registry
        )
        self.slow_connections = Counter(
            "judge_slow_connections", "Connections closed for not sending a request in time", registry=registry
        )

    def observe_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def observe_mass(self, completion: Completion, digits: frozenset[int]) -> None:
        """Of a one-token completion with candidates; `digits`: ids of the tokens "0" to "5", with and without space."""
        candidates = completion.choices[0].candidates if completion.choices else ()
        if not candidates:
            return
        mass = min(1.0, sum(math.exp(logprob) for token_id, logprob in candidates if token_id in digits))
        self.covered_mass.observe(mass)
        if mass < LEAST_MASS:
            self.invalid.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
