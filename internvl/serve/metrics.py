"""Counters of a server for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What `/metrics` shows, of one server."""

    def __init__(self) -> None:
        # A registry of its own: the global one would hold the metrics of every server of a process.
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            # By path and status: a rate of 429 asks for another GPU.
            "internvl_requests",
            "Requests answered",
            ["path", "status"],
            registry=registry,
        )
        self.running = Gauge("internvl_running", "Requests in slots", registry=registry)
        self.waiting = Gauge("internvl_waiting", "Requests that wait for one", registry=registry)
        self.up = Gauge("internvl_up", "1 if the engine answers", registry=registry)
        self.prompt_tokens = Counter(
            "internvl_prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.tokens = Counter("internvl_generated_tokens", "Tokens generated", registry=registry)
        self.tiles = Counter("internvl_tiles", "Tiles of images and frames", registry=registry)
        self.first_token_s = Histogram(
            "internvl_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.total_s = Histogram(
            "internvl_request_seconds",
            "From the request to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' format."""
        return generate_latest(self.registry)
