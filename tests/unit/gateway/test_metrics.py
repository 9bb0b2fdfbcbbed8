"""Series: vLLM's names, our own, and none of a deleted model."""

from __future__ import annotations

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
        metrics.estimate(model, predicted=2.0, actual=1.0)
        metrics.estimate(model, predicted=0.0, actual=1.0)
    metrics.kv_usage({(model, "n0/0"): 0.25 for model in models})
    metrics.occupancy({(model, "n0/0"): 2 for model in models}, {})
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
    assert value(metrics, "serverless_llm_load_seconds_sum", model_name="a", phase="disk") == 1
    assert value(metrics, "serverless_llm_estimate_ratio_sum", model_name="a") == 0.5
    assert value(metrics, "serverless_llm_evictions_total", reason="memory") == 1
    assert b"vllm:e2e_request_latency_seconds" in metrics.page()
    assert b"_created" not in metrics.page()


def test_occupancy_that_is_not_named_is_none() -> None:
    metrics = filled("a")
    metrics.occupancy({}, {("a", ""): 1})
    assert value(metrics, "vllm:num_requests_running", model_name="a", engine="n0/0") == 0
    assert value(metrics, "vllm:num_requests_waiting", model_name="a", engine="") == 1


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


def test_a_deleted_models_series_vanish() -> None:
    metrics = filled("gone", "stays")
    old = metrics.served("gone", "n0/0")
    metrics.forget("gone")
    assert b'"gone"' not in metrics.page()
    assert b'"stays"' in metrics.page()
    assert metrics.served("gone", "n0/0") is not old
