"""Series: vLLM's names, our own, and none of a deleted model."""

from __future__ import annotations

import pytest

from serverless_llm.domain import LoadPhases
from serverless_llm.gateway.metrics import Metrics


def filled(*models: str) -> Metrics:
    metrics = Metrics()
    for model in models:
        series = metrics.served(model, "n0/0")
        series.prompt.inc(3)
        series.generated.inc(2)
        series.first_token.observe(0.5)
        metrics.ended(model, "n0/0", "stop")
        metrics.cold_start(model, 1.5)
        metrics.load_finished(model, LoadPhases(disk_s=1.0, total_s=1.2, disk_bytes=10))
        metrics.load_finished(model, LoadPhases(dram_bytes=10))
        metrics.load_finished(model, LoadPhases(remote_s=3.0, total_s=3.0, remote_bytes=10))
        metrics.estimate(model, predicted=2.0, actual=1.0)
        metrics.estimate(model, predicted=0.0, actual=1.0)
    metrics.kv_usage({(model, "n0/0"): 0.25 for model in models})
    metrics.occupancy({(model, "n0/0"): 2 for model in models}, {(model, "n0/0"): 0 for model in models})
    metrics.evicted("memory")
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_what_the_head_reports_is_on_the_page() -> None:
    metrics = filled("a")
    served = {"model_name": "a", "engine": "n0/0"}
    assert value(metrics, "vllm:prompt_tokens_total", **served) == 3
    assert value(metrics, "vllm:generation_tokens_total", **served) == 2
    assert value(metrics, "vllm:time_to_first_token_seconds_bucket", **served, le="0.5") == 1
    assert value(metrics, "vllm:request_success_total", **served, finished_reason="stop") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc", **served) == 0.25
    assert value(metrics, "vllm:num_requests_running", **served) == 2
    assert value(metrics, "serverless_llm_cold_starts_total", model_name="a", source="disk") == 1
    assert value(metrics, "serverless_llm_cold_starts_total", model_name="a", source="dram") == 1
    assert value(metrics, "serverless_llm_cold_starts_total", model_name="a", source="remote") == 1
    assert value(metrics, "serverless_llm_load_seconds_sum", model_name="a", phase="disk") == 1
    assert value(metrics, "serverless_llm_load_seconds_sum", model_name="a", phase="remote") == 3
    assert value(metrics, "serverless_llm_estimate_ratio_sum", model_name="a") == 0.5
    assert value(metrics, "serverless_llm_evictions_total", reason="memory") == 1
    assert b"vllm:e2e_request_latency_seconds" in metrics.page()
    assert b"_created" not in metrics.page()


def test_what_is_counted_as_it_happens_begins_at_none() -> None:
    """Or no rate would know of the first."""
    metrics = Metrics()
    metrics.deployed(["a"])
    for source in ("remote", "disk", "dram"):
        assert value(metrics, "serverless_llm_cold_starts_total", model_name="a", source=source) == 0
    assert value(metrics, "serverless_llm_evictions_total", reason="keep-alive") == 0
    assert value(metrics, "serverless_llm_errors_total", code="overloaded") == 0
    metrics.forget("a")
    assert b'"a"' not in metrics.page()


def test_occupancy_that_is_not_named_is_none() -> None:
    metrics = filled("a")
    metrics.occupancy({}, {("a", ""): 1})
    assert value(metrics, "vllm:num_requests_running", model_name="a", engine="n0/0") == 0
    assert value(metrics, "vllm:num_requests_waiting", model_name="a", engine="") == 1


def test_models_by_state_and_those_that_failed() -> None:
    metrics = Metrics()
    metrics.states({"a": "failed", "b": "loaded", "c": "loaded"})
    assert value(metrics, "serverless_llm_models", state="loaded") == 2
    assert value(metrics, "serverless_llm_models", state="unloaded") == 0
    assert value(metrics, "serverless_llm_model_failed", model_name="a") == 1
    metrics.states({"a": "loading"})
    assert value(metrics, "serverless_llm_model_failed", model_name="a") == 0
    metrics.forget("a")
    assert value(metrics, "serverless_llm_model_failed", model_name="a") is None


def test_memory_of_a_node_that_left_vanishes() -> None:
    metrics = Metrics()
    metrics.memory("dram_used_bytes", {"node0": 5, "node1": 6})
    metrics.memory("dram_used_bytes", {"node1": 7})
    assert value(metrics, "serverless_llm_dram_used_bytes", node="node1") == 7
    assert value(metrics, "serverless_llm_dram_used_bytes", node="node0") is None


def test_kv_of_a_replica_that_left_vanishes() -> None:
    metrics = filled("a", "b")
    metrics.kv_usage({("b", "n0/0"): 0.5})
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="a", engine="n0/0") is None
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="b", engine="n0/0") == 0.5
    assert value(metrics, "vllm:num_requests_running", model_name="a", engine="n0/0") == 2


def test_bytes_go_on_over_an_agents_restart() -> None:
    metrics = Metrics()
    for total in (100, 150, 40):
        metrics.bytes_moved("n0", "disk", total)
    assert value(metrics, "serverless_llm_bytes_moved_total", node="n0", link="disk") == 190


def test_preemptions_go_on_over_a_workers_restart_and_a_deleted_models_are_not_told() -> None:
    metrics = filled("a")
    served = {"model_name": "a", "engine": "n0/0"}
    assert value(metrics, "vllm:num_preemptions_total", **served) == 0
    for total in (3, 5, 2):
        metrics.preempted("n0/0", {"a": total})
    metrics.preempted("n0/1", {"a": 7})
    assert value(metrics, "vllm:num_preemptions_total", **served) == 7
    metrics.forget("a")
    metrics.preempted("n0/0", {"a": 4})
    assert b'"a"' not in metrics.page()
    metrics.deployed(["a"])
    metrics.preempted("n0/0", {"a": 5})
    assert value(metrics, "vllm:num_preemptions_total", **served) == 1


def test_what_was_verified_and_what_differed() -> None:
    metrics = Metrics()
    for totals in (
        {"bytes": 100, "device": 3, "dram": 1, "disk": 0},
        {"bytes": 150, "device": 3, "dram": 1, "disk": 2},
        {},
    ):
        metrics.verified("n0", totals)
    assert value(metrics, "serverless_llm_verified_bytes_total", node="n0") == 150
    assert value(metrics, "serverless_llm_blocks_differing_total", node="n0", tier="device") == 3
    assert value(metrics, "serverless_llm_blocks_differing_total", node="n0", tier="dram") == 1
    assert value(metrics, "serverless_llm_blocks_differing_total", node="n0", tier="disk") == 2


def test_a_deleted_models_series_vanish() -> None:
    metrics = filled("gone", "stays")
    old = metrics.served("gone", "n0/0")
    metrics.forget("gone")
    assert b'"gone"' not in metrics.page()
    assert b'"stays"' in metrics.page()
    assert metrics.served("gone", "n0/0") is not old


def test_a_deleted_models_last_sequences_bring_no_series_back() -> None:
    metrics = filled("gone")
    metrics.forget("gone")
    metrics.served("gone", "n0/1").generated.inc()
    assert b'"gone"' not in metrics.page()
    metrics.deployed(["gone"])
    metrics.served("gone", "n0/1").generated.inc()
    assert value(metrics, "vllm:generation_tokens_total", model_name="gone", engine="n0/1") == 1


# vLLM's names, as its own dashboards ask for them
VLLM = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_swapped",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
)


@pytest.mark.parametrize("name", [*VLLM, *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum"))])
def test_every_series_of_vllm_is_there_for_a_served_model(name: str) -> None:
    lines = filled("a").page().decode().splitlines()
    found = [line for line in lines if line.startswith(f"vllm:{name}{{")]
    assert found
    assert all('model_name="a"' in line and 'engine="n0/0"' in line for line in found)


def test_aliases_have_their_originals_values() -> None:
    metrics = filled("a")
    served = {"model_name": "a", "engine": "n0/0"}
    metrics.served("a", "n0/0").gap.observe(0.06)
    assert value(metrics, "vllm:time_per_output_token_seconds_bucket", **served, le="0.05") == 0
    assert value(metrics, "vllm:time_per_output_token_seconds_bucket", **served, le="0.075") == 1
    assert value(metrics, "vllm:gpu_cache_usage_perc", **served) == 0.25
