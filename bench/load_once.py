"""One load of a checkpoint in a fresh process: `python load_once.py SUBJECT DIRECTORY` prints a line of JSON.

Imports are done before the clock starts, what they left is collected, and the host has as much memory as the files have
bytes; the subject's threads, its memory and a sum over every page of every tensor are inside. It runs in the peers'
environment, too, so it imports only the subject's library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

PAGE = 4096
Tensors = dict[str, torch.Tensor]


def ours(files: list[Path]) -> Tensors:
    from serverless_llm.loader import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def safetensors(files: list[Path]) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def safetensors_pread(files: list[Path]) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file, backend="pread").items()}


def runai(files: list[Path]) -> Tensors:
    """Its buffer holds everything (the limit of -1), so that no tensor must be copied out of it."""
    os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = "-1"
    from runai_model_streamer import SafetensorsStreamer

    tensors: Tensors = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor
    return tensors


def fastsafetensors(files: list[Path]) -> Tensors:
    """Through host memory: without GPUDirect Storage, which a CPU has not."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [str(file) for file in files]})
    buffer = loader.copy_files_to_device()
    KEPT.extend((loader, buffer))
    return {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}


def tensorizer(files: list[Path]) -> Tensors:
    """From its own format, which `bench/load.py` wrote beside each file."""
    from tensorizer import TensorDeserializer

    tensors: Tensors = {}
    for file in files:
        loader = TensorDeserializer(str(file.with_suffix(".tensors")), device="cpu", num_readers=4)
        KEPT.append(loader)
        tensors |= {name: loader[name] for name in loader.keys()}  # noqa: SIM118  # not a dict
    return tensors


def transformers(files: list[Path]) -> Tensors:
    """The whole model, as `from_pretrained` makes it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.bfloat16)
    KEPT.append(model)
    return dict(model.named_parameters())


SUBJECTS: dict[str, Callable[[list[Path]], Tensors]] = {
    "ours-library": ours,
    "safetensors": safetensors,
    "safetensors-pread": safetensors_pread,
    "runai": runai,
    "fastsafetensors": fastsafetensors,
    "tensorizer": tensorizer,
    "transformers": transformers,
}
MODULES = {
    "ours-library": "serverless_llm.loader.library",
    "safetensors": "safetensors.torch",
    "safetensors-pread": "safetensors.torch",
    "runai": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "tensorizer": "tensorizer",
    "transformers": "transformers.models.llama.modeling_llama",
}
KEPT: list[object] = []  # what owns the tensors' memory


def page_sum(tensors: Tensors) -> int:
    """Of one byte of every page, so that every page is there."""
    return sum(int(_bytes(tensor)[::PAGE].sum(dtype=torch.int64)) for tensor in tensors.values())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def usage() -> Iterator[float]:
    """CPU seconds, page faults that took no reading, bytes that came from storage."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield used.ru_utime + used.ru_stime
    yield used.ru_minflt
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    yield int(io["read_bytes"])


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def give_memory(nbytes: int) -> None:
    """Has the host give so much to this machine; the process's peak does not count it."""
    runpy.run_path(str(Path(__file__).with_name("pretouch.py")))["pretouch"](nbytes)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew


def main() -> None:
    load, directory = SUBJECTS[sys.argv[1]], Path(sys.argv[2])
    files = sorted(directory.glob("*.safetensors"))
    importlib.import_module(MODULES[sys.argv[1]])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gc.collect()
    give_memory(sum(file.stat().st_size for file in files))
    idle_kib = peak_kib()
    before = list(usage())
    began = time.perf_counter()
    tensors = load(files)
    checksum = page_sum(tensors)
    seconds = time.perf_counter() - began
    cpu_s, faults, storage = (after - was for after, was in zip(usage(), before, strict=True))
    answer = {
        "seconds": seconds, "cpu_s": cpu_s, "faults": faults, "storage": storage,
        "peak_rss_mib": (peak_kib() - idle_kib) / 1024, "tensors": len(tensors), "checksum": checksum,
    }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
