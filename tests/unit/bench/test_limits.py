import json
import math
import mmap
import os
from pathlib import Path

import pytest

from bench import checkpoints, limits
from bench.limits import Limits, Linear, RawReader, Read, Setting


def test_a_cold_start_from_disk_takes_as_long_as_its_slowest_part_and_then_the_prefill() -> None:
    assert limits.ttft_limit("disk", 100, Limits(50, 200, 0.5, 0.25)) == 2.25
    assert limits.ttft_limit("disk", 100, Limits(200, 50, 0.5, 0.25)) == 2.25
    assert limits.ttft_limit("disk", 100, Limits(200, 200, 3.0, 0.25)) == 3.25


def test_a_start_from_dram_waits_for_the_second_link_alone() -> None:
    assert limits.ttft_limit("dram", 100, Limits(50, 200, 3.0, 0.25)) == 0.75
    assert limits.ttft_limit("dram", 100, Limits(50, math.inf, 3.0, 0.25)) == 0.25


def test_reads_cover_every_file_once_and_end_on_pages() -> None:
    assert limits.reads([10_000, 4096], 8192) == [Read(0, 0, 8192), Read(0, 8192, 4096), Read(1, 0, 4096)]
    assert limits.reads([1], 8192) == [Read(0, 0, 4096)]


def test_a_prefill_multiplies_all_rows_with_projections_and_one_with_the_head() -> None:
    shapes = {
        "model.embed_tokens.weight": (264, 64),
        "model.layers.0.mlp.up_proj.weight": (128, 64),
        "model.layers.0.input_layernorm.weight": (64,),
    }
    assert limits.linears(shapes, 32) == [Linear(32, 128, 64), Linear(1, 264, 64)]
    assert limits.linears(shapes | {"lm_head.weight": (300, 64)}, 2)[-1] == Linear(1, 300, 64)


def test_the_best_way_to_read_may_be_fio() -> None:
    found = limits.DiskLimit({"1x1MiB": 2e9, "fio 4x4MiB": 3e9}, Setting(1, limits.MIB))
    assert (found.best, found.handicap) == (3e9, 1.5)


def test_fio_splits_a_file_between_its_jobs_in_whole_pieces() -> None:
    command = limits.fio_command(Path("/x"), 10 * limits.MIB, Setting(4, limits.MIB))
    assert f"--size={2 * limits.MIB}" in command
    assert "--numjobs=4" in command


def test_fio_may_warn_before_its_json() -> None:
    assert limits.fio_rate('note: x\n{"jobs": [{"read": {"bw_bytes": 7}}]}') == 7.0


def test_the_raw_reader_reads_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 10_001)
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system knows no O_DIRECT")
    reader = RawReader([file, file], threads=1)
    assert reader.nbytes == 20_002
    assert reader.rate(Setting(1, 4096)) > 0
    assert reader.rate(Setting(1, 4096), at_most=5000) > 0
    memory = mmap.mmap(-1, 2 * 12_288)
    assert reader.fill(memoryview(memory), Setting(2, 4096)) > 0
    assert bytes(memory).replace(b"\0", b"") == b"x" * 20_002
    with file.open("ab") as grown:
        grown.write(b"y")
    with pytest.raises(OSError, match="read 20004 bytes of 20002"):
        reader.rate(Setting(1, 1 << 20))
    reader.close()


@pytest.mark.slow
def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    directory = checkpoints.checkpoint(tmp_path, "tiny-llama", 1, 2)
    before = (directory / "config.json").stat().st_mtime_ns
    assert checkpoints.checkpoint(tmp_path, "tiny-llama", 1, 2) == directory
    assert (directory / "config.json").stat().st_mtime_ns == before
    assert len(checkpoints.weight_files(directory)) == 2
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_prefill_runs_on_a_checkpoints_shapes(tmp_path: Path) -> None:
    assert limits.Prefill(checkpoints.checkpoint(tmp_path, "tiny-llama", 1), 32, "cpu").seconds(1) > 0
