from typing import Any

import pytest

from bench import load, load_subjects
from bench.cold_subjects import WrongTier
from bench.load import Key, Round
from bench.load_subjects import Sample

NBYTES = 4_000_000_000


def sample(seconds: float, cpu_s: float, storage: int = NBYTES, idle: float | None = None) -> Sample:
    return Sample(seconds=seconds, cpu_s=cpu_s, peak_rss_mib=1.0, storage=storage, faults=7, idle=idle)


def made_up(service: float = 2.0, idle: float = 0.01, count: int = 3) -> list[Round]:
    samples = {
        Key("cold", "ours-service"): sample(service, 0.4, idle=idle),
        Key("cold", "ours-library"): sample(2.1, 1.0),
        Key("cold", "runai"): sample(2.2, 1.0),
        Key("cold", "safetensors"): sample(3.0, 0.1),
        Key("warm", "ours-service"): sample(0.5, 0.4, storage=0),
        Key("warm", "runai"): sample(1.0, 0.4, storage=0),
        Key("warm", "safetensors"): sample(0.1, 0.1, storage=0),
    }
    return [Round({"cold": 2e9, "warm": 10e9}, samples)] * count


def of(found: list[dict[str, Any]], case: str, subject: str, metric: str) -> dict[str, Any]:
    [entry] = [e for e in found if (e["case"], e["subject"], e["metric"]) == (case, subject, metric)]
    return entry


def test_rows_stand_beside_the_limit_and_the_best_peer() -> None:
    found = load.rows(made_up(), NBYTES)
    entry = of(found, "cold", "ours-service", "throughput")
    assert entry["median"] == pytest.approx(2.0)
    assert entry["ratio_to_limit"] == pytest.approx(1.0)
    assert (entry["best_peer"], entry["ratio_to_best_peer"]) == ("runai", pytest.approx(1.1))
    assert of(found, "cold", "ours-service", "cpu_s")["ratio_to_best_peer"] == pytest.approx(2.5)
    assert of(found, "cold", "runai", "throughput")["ratio_to_best_peer"] is None
    assert of(found, "cold", "ours-service", "read_ratio")["median"] == 1.0
    assert of(found, "warm", "limit", "throughput")["median"] == 10.0
    assert of(found, "warm", "ours-service", "throughput")["best_peer"] == "runai"  # the other only maps


def test_what_is_promised_is_judged() -> None:
    judged = load.verdicts(made_up(), NBYTES)
    assert all(line.endswith(": met") for line in judged), judged
    assert len(judged) == 8
    assert "cold service over the limit 1.00 (at least 0.97; interval from 1.00): met" in judged
    missed = [line for line in load.verdicts(made_up(service=2.3, idle=0.1), NBYTES) if line.endswith("MISSED")]
    assert [line.split(" (")[0] for line in missed] == [
        "cold service over the limit 0.87", "cold service over runai 0.96", "share of the time with no request 0.1",
    ]  # fmt: skip


def test_bytes_from_elsewhere_are_no_sample() -> None:
    assert load_subjects.check("cold", sample(1, 1), NBYTES)
    with pytest.raises(WrongTier, match="cold: only 0 of"):
        load_subjects.check("cold", sample(1, 1, storage=0), NBYTES)
    assert load_subjects.check("warm", sample(1, 1), NBYTES), "a loader may go past the page cache"
