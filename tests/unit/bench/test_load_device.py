"""Loads to a device: what fits, what is told of them, and a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import load_device
from bench.load_device import Part, Road, Timed
from serverless_llm.cli.make_checkpoint import make_checkpoint

NBYTES = 1_000_000_000


def timed(seconds: float) -> Timed:
    return Timed(seconds, [Part(NBYTES // 2, 0.1, 0.2, 0.4), Part(NBYTES // 2, 0.5, 0.6, 1.2)])


def test_a_shape_has_as_many_layers_as_fit() -> None:
    whole = load_device.nbytes_of("llama-3.1-8b", None)
    assert whole == 16_060_522_496
    assert load_device.fitting("llama-3.1-8b", whole) == (True, None)
    assert load_device.fitting("llama-3.1-8b", whole - 1) == (True, 31)
    one = load_device.nbytes_of("llama-3.1-8b", 1)
    assert load_device.fitting("llama-3.1-8b", one) == (True, 1)
    assert load_device.fitting("llama-3.1-8b", one - 1) == (False, 0)


def test_the_disk_is_busy_while_copies_are() -> None:
    assert load_device.overlap(timed(2).parts) == pytest.approx(0.3)
    assert load_device.overlap([Part(1, 0.1, 0.2, 0.3)]) == 0


def test_each_way_is_judged_by_its_own_limit() -> None:
    loads = {"disk": [timed(0.5)] * 2, "bounce": [timed(0.05)] * 2, "direct": [timed(0.04)] * 2}
    limits = {"disk": [2e9, 2e9], "device": [25e9, 25e9]}
    found = {(one["subject"], one["metric"]): one for one in load_device.rows("c", NBYTES, loads, limits)}
    shares = {name: found[name, "throughput"]["ratio_to_limit"] for name in loads}
    assert shares == pytest.approx({"disk": 1.0, "bounce": 0.8, "direct": 1.0})
    assert found["direct", "usable_s"]["median"] == 0.04
    assert found["limit (device)", "throughput"]["median"] == 25
    assert all(line.endswith(": met") for line in load_device.verdicts("c", NBYTES, loads, limits))
    del loads["direct"]
    assert load_device.verdicts("c", NBYTES, loads, limits)[0] == "c direct: MISSING"
    slower = {"disk": [timed(0.53)] * 2, "bounce": [timed(0.053)] * 2}
    assert all(": MISS" in line for line in load_device.verdicts("c", NBYTES, slower, limits))


def test_the_library_stands_beside_itself_with_another_backend() -> None:
    loads = {"library": [1.0, 2.0, 4.0], "library (gds)": [0.5, 1.0, 2.0]}
    plain, straight = load_device.library_rows("c", 4_000_000_000, loads)
    assert (plain["subject"], plain["median"], plain["best_peer"]) == ("library", 2.0, None)
    assert (straight["median"], straight["ratio_to_best_peer"], straight["best_peer"]) == (4.0, 2.0, "library")


def test_the_library_loads_from_disk_in_every_round(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "tiny", dtype="bfloat16")
    evicted: list[Sequence[Path]] = []
    found = load_device.measure_library(tmp_path / "tiny", torch.device("cpu"), 2, evicted.append)
    assert evicted == [[tmp_path / "tiny" / "model.safetensors"]] * 3  # one before those that count
    assert found.keys() == {"library"}
    assert len(found["library"]) == 2


def test_a_checkpoint_arrives_and_every_part_has_its_times(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "tiny", dtype="bfloat16")
    with Road(tmp_path / "tiny", torch.device("cpu")) as road:
        for done in (road.bounce(), road.bounce()):  # from disk, from DRAM
            assert sum(part.bytes for part in done.parts) == road.nbytes
            assert all(0 < part.landed <= part.begun <= part.ended <= done.seconds for part in done.parts)
            road.check()
        assert road.register() == "this device needs nothing registered"
        with pytest.raises(RuntimeError, match="went through buffers"):
            road.direct()
        road._arena.zero_()
        with pytest.raises(RuntimeError, match="did not arrive"):
            road.check()
