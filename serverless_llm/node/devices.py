"""How much memory each device of a node may use."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from serverless_llm.node.options import DeviceOptions

log = logging.getLogger(__name__)

CUDA_RESERVE = 2 << 30  # bytes of a GPU left to its context, to workspaces and to the allocator's slack


def budgets(devices: Sequence[DeviceOptions]) -> list[int]:
    """Bytes for weights and KV of each device, asking the driver for those that state none.

    0 of one that the driver does not have: why it cannot come up is its worker's to tell.
    """
    return [device.budget or _free(number) for number, device in enumerate(devices)]


def _free(number: int) -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.warning("cannot ask the NVIDIA driver for device %d: %s", number, error)
        return 0
    return int(memory.free) - CUDA_RESERVE
