"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rl_mlx.server.models import Loaded
from rl_mlx.types import Timings

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_MODEL = ["model"]


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counters = {
            "prompt": "Prompt tokens",
            "reused": "Prompt tokens that a prefix in the cache saved",
            "generated": "Tokens generated",
            "drafted": "Tokens guessed by speculation",
            "accepted": "Guessed tokens that were right",
        }
        self._tokens = {
            name: Counter(f"rl_mlx_{name}_tokens", text, _MODEL, registry=self.registry)
            for name, text in counters.items()
        }
        self._requests = Counter(
            "rl_mlx_requests", "Requests by what became of them", ["path", "model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.tasks = Gauge("rl_mlx_tasks", "Tasks of the event loop", registry=self.registry)
        self._seconds = self._histogram("request_seconds", "Whole requests", ["path"], _LONG)
        self._first = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token", _MODEL, _LONG
        )
        self._queued = self._histogram(
            "queue_seconds", "From submission to the first prefill step", _MODEL, _LONG
        )
        self._between = self._histogram(
            "inter_token_seconds", "Mean time between two tokens of an answer", _MODEL, _SHORT
        )

    def _histogram(
        self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(f"rl_mlx_{name}", text, labels, buckets=buckets, registry=self.registry)

    def watch(self, loaded: Callable[[], Iterable[Loaded]], active: Callable[[], int]) -> None:
        """Report also what is loaded and under way, as it is when somebody asks."""
        self.registry.register(_Now(loaded, active))

    def request(self, path: str, status: int, seconds: float, record: Mapping[str, Any]) -> None:
        """Count a request that is over; ``path`` is that of its route."""
        self._requests.labels(path, record.get("model", ""), str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answer(self, model: str, timings: Timings) -> None:
        """Count an answer that was generated."""
        counts = {
            "prompt": timings.prompt_tokens,
            "reused": timings.reused,
            "generated": timings.generated,
            "drafted": timings.drafted,
            "accepted": timings.accepted,
        }
        for name, count in counts.items():
            self._tokens[name].labels(model).inc(count)
        self._first.labels(model).observe(timings.first_token)
        self._queued.labels(model).observe(timings.queued)
        if timings.generated > 1:
            self._between.labels(model).observe(timings.decode / (timings.generated - 1))

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)


class _Now(Collector):
    """Gauges that are read off when they are asked for."""

    def __init__(self, loaded: Callable[[], Iterable[Loaded]], active: Callable[[], int]) -> None:
        self._loaded = loaded
        self._active = active

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rl_mlx_requests_active", "Requests under way or waiting", value=self._active()
        )
        gauges = {
            "running": GaugeMetricFamily(
                "rl_mlx_batch_size", "Sequences that are computed together", labels=_MODEL
            ),
            "waiting": GaugeMetricFamily(
                "rl_mlx_queue_length", "Sequences that wait for a place", labels=_MODEL
            ),
            "kv_bytes": GaugeMetricFamily(
                "rl_mlx_kv_cache_bytes", "Bytes of the KV cache in use", labels=_MODEL
            ),
            "memory_bytes": GaugeMetricFamily(
                "rl_mlx_memory_bytes", "Bytes that the backend holds", labels=_MODEL
            ),
        }
        for model in self._loaded():
            stats = model.llm.stats()
            for name, gauge in gauges.items():
                gauge.add_metric([model.files.name], getattr(stats, name))
        yield from gauges.values()
