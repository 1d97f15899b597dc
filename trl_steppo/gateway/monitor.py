"""Counters and durations for Prometheus. They have no keys and no texts of conversations."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Monitor:
    """Metrics of one gateway, in a registry of its own, because a process may have several gateways."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "steppo_gateway_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.request_s = Histogram(
            "steppo_gateway_request_seconds", "Time from request to response", ["route"], registry=registry
        )
        self.steps = Counter(
            "steppo_gateway_steps", "Recorded steps by how they continue their session", ["history"], registry=registry
        )
        self.mismatches = Counter(
            "steppo_gateway_mismatches", "Requests whose history is not what was recorded", registry=registry
        )
        self.retries = Counter("steppo_gateway_retries", "Requests answered by a recorded step", registry=registry)
        self.undelivered = Counter(
            "steppo_gateway_undelivered_steps", "Steps whose client went away before it was told", registry=registry
        )
        self.upstream_failures = Counter(
            "steppo_gateway_upstream_failures", "Calls of the sampler that failed", registry=registry
        )
        self.tokens = Counter(
            "steppo_gateway_tokens", "Tokens kept, tokenized and sampled", ["kind"], registry=registry
        )
        self.episodes = Counter(
            "steppo_gateway_episodes", "Sessions that ended, by how", ["ending"], registry=registry
        )
        self.sessions = Gauge("steppo_gateway_sessions", "Sessions that are running", registry=registry)
        self.paused = Gauge("steppo_gateway_paused", "Whether requests wait for new weights", registry=registry)

    def watch(self, *, num_sessions: Callable[[], int], is_paused: Callable[[], bool]) -> None:
        """Set the functions that two gauges call whenever they are read."""
        self.sessions.set_function(num_sessions)
        self.paused.set_function(is_paused)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
