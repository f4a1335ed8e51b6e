"""Counters for operators: requests, bytes, latencies, in flight, refusals by reason; as JSON and in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from typing import Any

EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)   # seconds; upper bounds of the buckets


class Histogram:
    """Durations in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES) + 1)
        self.seconds = 0.0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(EDGES, seconds)] += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)

    def facts(self) -> dict[str, float]:
        """Number, mean, quantiles and the longest."""
        total = sum(self.counts)
        return {"requests": total, "mean": self.seconds / max(1, total), "median": self.quantile(0.5), "p95": self.quantile(0.95),
                "longest": self.longest}

    def quantile(self, share: float) -> float:
        """The upper bound of the bucket in which this share of the durations ends; 0 without any."""
        total, seen = sum(self.counts), 0
        for edge, count in zip((*EDGES, self.longest), self.counts, strict=True):
            seen += count
            if total and seen >= share * total:
                return min(edge, self.longest)
        return 0.0


class Metrics:
    """What a running owner counts; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.started = time.time()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._refused: Counter[str] = Counter()
        self._latency: dict[str, Histogram] = {}
        self._streams: Counter[tuple[str, str]] = Counter()
        self._in_flight = 0
        self._repeats = 0

    def opened(self, party: str, purpose: str, change: int = 1) -> None:
        """A stream was opened, or (-1) closed."""
        with self._lock:
            self._streams[party, purpose] += change

    def began(self) -> None:
        """A request is under way."""
        with self._lock:
            self._in_flight += 1

    def answered(self, party: str, kind: str, *, up: int, down: int, seconds: float, repeat: bool) -> None:
        """A request that had begun was answered, with a reply or a refusal."""
        with self._lock:
            self._in_flight -= 1
            self._requests[party, kind] += 1
            self._bytes[party, "up"] += up
            self._bytes[party, "down"] += down
            self._repeats += repeat
            self._latency.setdefault(kind, Histogram()).add(seconds)

    def abandoned(self) -> None:
        """A request that had begun was not answered; its party will send it again."""
        with self._lock:
            self._in_flight -= 1

    def refused(self, reason: str) -> None:
        """A frame, request or caller was turned away."""
        with self._lock:
            self._refused[reason] += 1

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        with self._lock:
            parties: dict[str, dict[str, Any]] = {}
            for (party, kind), count in self._requests.items():
                parties.setdefault(party, {"requests": {}, "up": 0, "down": 0})["requests"][kind] = count
            for (party, way), count in self._bytes.items():
                parties[party][way] = count
            latency = {kind: one.facts() for kind, one in self._latency.items()}
            streams = [{"party": party, "purpose": purpose, "streams": count}
                       for (party, purpose), count in sorted(self._streams.items()) if count]
            return {"started": self.started, "uptime": time.time() - self.started, "in_flight": self._in_flight,
                    "streams": streams, "parties": parties, "repeats": self._repeats, "refused": dict(self._refused),
                    "seconds": latency}

    def text(self) -> str:
        """Prometheus' text format."""
        with self._lock:
            lines = ["# TYPE deltaloom_requests_total counter"]
            lines += [f'deltaloom_requests_total{{party="{party}",kind="{kind}"}} {count}'
                      for (party, kind), count in sorted(self._requests.items())]
            lines += ["# TYPE deltaloom_bytes_total counter"]
            lines += [f'deltaloom_bytes_total{{party="{party}",way="{way}"}} {count}'
                      for (party, way), count in sorted(self._bytes.items())]
            lines += ["# TYPE deltaloom_refused_total counter"]
            lines += [f'deltaloom_refused_total{{reason="{reason}"}} {count}' for reason, count in sorted(self._refused.items())]
            lines += ["# TYPE deltaloom_in_flight gauge", f"deltaloom_in_flight {self._in_flight}"]
            lines += ["# TYPE deltaloom_request_seconds histogram"]
            for kind, one in sorted(self._latency.items()):
                total = 0
                for edge, count in zip((*map(str, EDGES), "+Inf"), one.counts, strict=True):
                    total += count
                    lines.append(f'deltaloom_request_seconds_bucket{{kind="{kind}",le="{edge}"}} {total}')
                lines.append(f'deltaloom_request_seconds_sum{{kind="{kind}"}} {one.seconds:.6f}')
                lines.append(f'deltaloom_request_seconds_count{{kind="{kind}"}} {total}')
            return "\n".join(lines) + "\n"
