"""Prometheus series: vLLM's names, so that its dashboards work, and our own with the prefix `serverless_llm_`.

The gateway counts what it sees of requests; the head's other parts report through the methods of `Metrics`.
The series of a deleted model vanish (`forget`). Every `Metrics` has a registry of its own.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serverless_llm.domain import LoadPhases, Tier
from serverless_llm.gateway.traffic import Traffic

# vLLM's buckets (vllm/v1/metrics/loggers.py)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
               80.0, 160.0, 640.0, 2560.0)  # fmt: skip
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
           960.0, 1920.0, 7680.0)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
LOAD = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
RATIO = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)

SERVED = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class ServedSeries:
    """The series of one model on one device that a request's end and tokens feed."""

    prompt: Counter
    generated: Counter
    first_token: Histogram
    gap: Histogram
    per_token: Histogram
    latency: Histogram
    queue: Histogram
    prefill: Histogram
    inference: Histogram
    decode: Histogram
    prompt_size: Histogram
    generated_size: Histogram
    allowed_size: Histogram


_SERVED: dict[str, tuple[type[Counter] | type[Histogram], str, str, tuple[float, ...] | None]] = {
    "prompt": (Counter, "vllm:prompt_tokens", "Prompt tokens of sequences that got a token.", None),
    "generated": (Counter, "vllm:generation_tokens", "Generated tokens.", None),
    "first_token": (Histogram, "vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN),
    "gap": (Histogram, "vllm:inter_token_latency_seconds", "Between two tokens of a stream.", PER_TOKEN),
    "per_token": (Histogram, "vllm:request_time_per_output_token_seconds", "A request's mean gap.", PER_TOKEN),
    "latency": (Histogram, "vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST),
    "queue": (Histogram, "vllm:request_queue_time_seconds", "From arrival to dispatch.", REQUEST),
    "prefill": (Histogram, "vllm:request_prefill_time_seconds", "From dispatch to the first token.", REQUEST),
    "inference": (Histogram, "vllm:request_inference_time_seconds", "From dispatch to the last token.", REQUEST),
    "decode": (Histogram, "vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST),
    "prompt_size": (Histogram, "vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS),
    "generated_size": (Histogram, "vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS),
    "allowed_size": (Histogram, "vllm:request_max_num_generation_tokens", "Tokens it might generate.", TOKENS),
}

# What vLLM counts and this engine does not do: it shares no prefixes.
_STILL = {
    "vllm:prefix_cache_queries": "Prompt tokens looked up in a prefix cache: there is none.",
    "vllm:prefix_cache_hits": "Prompt tokens found in a prefix cache: there is none.",
}
_STATES = ("unloaded", "loading", "loaded", "failed")
_REASONS = ("memory", "keep-alive", "unload", "delete", "abandoned", "rollover", "drain")  # of `commands.Evicted`
_CODES = ("overloaded", "model_loading", "model_load_failed", "rate_limit_exceeded", "engine_error")  # to alert on
_MEMORY = {
    "dram_used_bytes": ("Checkpoints in the DRAM tier.", "node"),
    "dram_budget_bytes": ("What the DRAM tier may hold.", "node"),
    "device_used_bytes": ("Weights and KV on a device.", "engine"),
    "device_budget_bytes": ("What weights and KV may take of a device.", "engine"),
}
# Names that older dashboards of vLLM ask for, and those that have what they mean.
_ALIASES = {
    "vllm:time_per_output_token_seconds": "vllm:inter_token_latency_seconds",
    "vllm:gpu_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries": "vllm:prefix_cache_queries",
    "vllm:gpu_prefix_cache_hits": "vllm:prefix_cache_hits",
}


class _Aliases(Collector):
    """The same samples under other names; made when the page is."""

    def __init__(self, families: Mapping[str, _Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for alias, name in _ALIASES.items():
            for metric in self._families[name].metric.collect():
                renamed = Metric(alias, f"Another name of {name}.", metric.type)
                renamed.samples = [one._replace(name=one.name.replace(name, alias, 1)) for one in metric.samples]
                yield renamed


@dataclass(slots=True)
class _Family:
    """One metric and the label values in use, so that a model's can be found again."""

    metric: Any
    children: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def child(self, *labels: str) -> Any:
        found = self.children.get(labels)
        if found is None:
            found = self.children[labels] = self.metric.labels(*labels)
        return found

    def forget(self, model: str) -> None:
        self.keep([labels for labels in self.children if labels[0] != model])

    def keep(self, wanted: Collection[tuple[str, ...]]) -> None:
        """Drop all children but these."""
        for labels in self.children.keys() - set(wanted):
            self.metric.remove(*labels)
            del self.children[labels]


class Metrics:
    """All series of one head."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.traffic = Traffic()
        self._of_models: list[_Family] = []
        self._families: dict[str, _Family] = {}
        self._gone: set[str] = set()
        self._served = {name: self._metric(*spec[:3], SERVED, spec[3]) for name, spec in _SERVED.items()}
        self._bundles: dict[tuple[str, str], ServedSeries] = {}
        self._running = self._metric(Gauge, "vllm:num_requests_running", "Sequences on a device.", SERVED)
        self._waiting = self._metric(Gauge, "vllm:num_requests_waiting", "Sequences without a device.", SERVED)
        self._swapped = self._metric(Gauge, "vllm:num_requests_swapped", "Sequences swapped out: none.", SERVED)
        self._still = [self._metric(Counter, name, text, SERVED) for name, text in _STILL.items()]
        self._preemptions = self._metric(
            Counter, "vllm:num_preemptions", "Sequences that gave their KV to others, to go on later.", SERVED
        )
        self._kv = self._metric(Gauge, "vllm:kv_cache_usage_perc", "KV in use, 1 is all.", SERVED)
        self._ends = self._metric(
            Counter, "vllm:request_success", "Requests by how they ended.", (*SERVED, "finished_reason")
        )
        self._cold_starts = self._ours(Counter, "cold_starts", "Loads by the tier the bytes came from.", "source")
        self._cold_first = self._ours(Histogram, "cold_start_seconds", "Cold: arrival to first token.", buckets=LOAD)
        self._load = self._ours(Histogram, "load_seconds", "Seconds of loads by phase.", "phase", buckets=LOAD)
        self._error = self._ours(Histogram, "estimate_ratio", "Actual over predicted load time.", buckets=RATIO)
        self._errors = self._ours(
            Counter, "errors", "Requests answered with an error status, by code.", "code", of_model=False
        )
        self._evictions = self._ours(Counter, "evictions", "Replicas that left a device.", "reason", of_model=False)
        self._states = self._ours(Gauge, "models", "Deployed models by state.", "state", of_model=False)
        self._failed = self._ours(Gauge, "model_failed", "1 while a model cannot be loaded, else 0.")
        self._memory = {name: self._ours(Gauge, name, *spec, of_model=False) for name, spec in _MEMORY.items()}
        self._bytes = self._ours(Counter, "bytes_moved", "Bytes moved by link.", "node", "link", of_model=False)
        self._verified = self._ours(Counter, "verified_bytes", "Bytes compared or learned.", "node", of_model=False)
        self._differing = self._ours(
            Counter,
            "blocks_differing",
            "Blocks unlike the first load, by who is at fault.",
            "node",
            "tier",
            of_model=False,
        )
        for reason in _REASONS:
            self._evictions.child(reason)
        for code in _CODES:
            self._errors.child(code)
        self._totals: dict[tuple[str, ...], int] = {}
        self.registry.register(_Aliases(self._families))

    def _metric(
        self,
        kind: Any,
        name: str,
        text: str,
        labels: tuple[str, ...],
        buckets: tuple[float, ...] | None = None,
        of_model: bool = True,
    ) -> _Family:
        options = {"buckets": buckets} if buckets else {}
        family = self._families[name] = _Family(kind(name, text, labels, registry=self.registry, **options))
        if of_model:
            self._of_models.append(family)
        return family

    def _ours(
        self, kind: Any, name: str, text: str, *labels: str, buckets: Any = None, of_model: bool = True
    ) -> _Family:
        named = ("model_name", *labels) if of_model else labels
        return self._metric(kind, f"serverless_llm_{name}", text, named, buckets, of_model)

    def served(self, model: str, device: str) -> ServedSeries:
        """The series of a model on a device; on no page where the model is deleted."""
        found = self._bundles.get((model, device))
        if found is None:
            children = {name: family.child(model, device) for name, family in self._served.items()}
            for family in (*self._still, self._preemptions):
                family.child(model, device)
            found = self._bundles[model, device] = ServedSeries(**children)
            if model in self._gone:  # its last sequences go on
                self.forget(model)
        return found

    def ended(self, model: str, device: str, reason: str) -> None:
        """A request ended: stop, length, abort (client gone) or error."""
        self._ends.child(model, device, reason).inc()
        self.traffic.ended(reason == "error", time.monotonic())

    def refused(self, code: str) -> None:
        """A request, of whatever route, was answered with an error's status."""
        self._errors.child(code).inc()

    def cold_start(self, model: str, seconds: float) -> None:
        """From a request's arrival, no replica being resident, to its first token."""
        self._cold_first.child(model).observe(seconds)

    def load_finished(self, model: str, phases: LoadPhases) -> None:
        """A replica is ready."""
        self._cold_starts.child(model, phases.source.value).inc()
        seconds = {
            "queue": phases.queue_s,
            "remote": phases.remote_s,
            "disk": phases.disk_s,
            "upload": phases.upload_s,
            "total": phases.total_s,
        }
        for phase, value in seconds.items():
            self._load.child(model, phase).observe(value)

    def estimate(self, model: str, predicted: float, actual: float) -> None:
        """A load's predicted and actual seconds."""
        if predicted > 0:
            self._error.child(model).observe(actual / predicted)

    def evicted(self, reason: str) -> None:
        self._evictions.child(reason).inc()

    def bytes_moved(self, node: str, link: str, total: int) -> None:
        """`total`: since the agent's start; one that is smaller than the last comes from a new agent."""
        self._bytes.child(node, link).inc(self._new(total, "bytes", node, link))

    def verified(self, node: str, totals: Mapping[str, int]) -> None:
        """`totals`: bytes, and differing blocks by tier (`device`, `dram`, `disk`), since the agent's start."""
        for name, total in totals.items():
            child = self._verified.child(node) if name == "bytes" else self._differing.child(node, name)
            child.inc(self._new(total, "verified", node, name))

    def preempted(self, device: str, totals: Mapping[str, int]) -> None:
        """`totals`: by model, since the worker's start."""
        for model, total in totals.items():
            new = self._new(total, "preempted", device, model)
            if model not in self._gone:
                self._preemptions.child(model, device).inc(new)

    def _new(self, total: int, *key: str) -> int:
        """What has come since it was last asked for."""
        before = self._totals.get(key, 0)
        self._totals[key] = total
        return total - before if total >= before else total

    def occupancy(self, running: Mapping[tuple[str, str], int], waiting: Mapping[tuple[str, str], int]) -> None:
        """Live requests by (model, device); all others are 0."""
        for family, counts in ((self._running, running), (self._waiting, waiting)):
            for labels in {*family.children, *counts}:
                family.child(*labels).set(counts.get((labels[0], labels[1]), 0))
                self._swapped.child(*labels)

    def kv_usage(self, fractions: Mapping[tuple[str, str], float]) -> None:
        """Of every replica, by (model, device); series of others vanish."""
        self._kv.keep(fractions)
        for labels, fraction in fractions.items():
            self._kv.child(*labels).set(fraction)

    def states(self, states: Mapping[str, str]) -> None:
        """Of every deployed model, by its name."""
        counts = collections.Counter(states.values())
        for state in _STATES:
            self._states.child(state).set(counts[state])
        for name, state in states.items():
            self._failed.child(name).set(state == "failed")

    def memory(self, name: str, amounts: Mapping[str, int]) -> None:
        """Bytes of one of `dram_used_bytes` and so on, by node or device; series of those that are gone vanish."""
        family = self._memory[name]
        family.keep([(place,) for place in amounts])
        for place, amount in amounts.items():
            family.child(place).set(amount)

    def forget(self, model: str) -> None:
        """The model is deleted: so are its series, until it is `deployed` again."""
        self._gone.add(model)
        for family in self._of_models:
            family.forget(model)
        self._bundles = {key: bundle for key, bundle in self._bundles.items() if key[0] != model}

    def deployed(self, models: Collection[str]) -> None:
        """These have series, and their cold starts are counted from 0: no rate knows of what a series began with."""
        self._gone.difference_update(models)
        for model in models:
            for source in (Tier.REMOTE, Tier.DISK, Tier.DRAM):
                self._cold_starts.child(model, source.value)

    def page(self) -> bytes:
        """Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)
