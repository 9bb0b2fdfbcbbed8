"""How much memory each device of a node may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from serverless_llm.config import visible_gpus
from serverless_llm.errors import CapacityError
from serverless_llm.node.options import DeviceOptions
from serverless_llm.quantities import size

log = logging.getLogger(__name__)

CUDA_RESERVE = 2 << 30  # bytes of a GPU left to its context, to workspaces and to the allocator's slack


def budgets(devices: Sequence[DeviceOptions]) -> list[int]:
    """Bytes for weights and KV of each device, asking the driver for those that state none.

    0 of one whose memory is not known or not free: it cannot come up, and its worker or `free` tells why.
    """
    return [device.budget or _asked(number) for number, device in enumerate(devices)]


def _asked(number: int) -> int:
    try:
        return free(number)
    except CapacityError as error:
        log.warning("%s", error)
        return 0


def handle(number: int, environ: Mapping[str, str]) -> Any:
    """NVML's handle of the GPU that CUDA calls `number`: NVML counts all of the machine, CUDA those that it may see.

    Raises:
        CapacityError: CUDA may see none of this number.
        pynvml.NVMLError: the driver does not know it.
    """
    import pynvml

    names = visible_gpus(environ)
    name = str(number) if names is None else names[number] if number < len(names) else ""
    if not name:
        raise CapacityError(f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']!r} shows no device {number}")
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def free(number: int) -> int:
    """Bytes of a GPU that are free for weights and KV now.

    Raises:
        CapacityError: none are, or the driver does not tell.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle(number, os.environ))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        why = f"cannot ask the NVIDIA driver for device {number}: {error}; state --device-memory"
        raise CapacityError(why) from error
    if memory.free <= CUDA_RESERVE:
        free, kept = size(memory.free), size(CUDA_RESERVE)
        raise CapacityError(f"device {number} has {free} free, and {kept} are left to its context and workspaces")
    return int(memory.free) - CUDA_RESERVE
