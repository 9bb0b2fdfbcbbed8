"""How much memory each device of a node may use."""

from __future__ import annotations

from collections.abc import Sequence

from serverless_llm.errors import ConfigurationError
from serverless_llm.node.options import DeviceOptions

CUDA_RESERVE = 2 << 30  # bytes of a GPU left to its context, to workspaces and to the allocator's slack


def budgets(devices: Sequence[DeviceOptions]) -> list[int]:
    """Bytes for weights and KV of each device, asking the driver for those that state none.

    Raises:
        ConfigurationError: a CUDA device that the driver does not have.
    """
    if all(device.budget for device in devices):
        return [device.budget for device in devices]
    import pynvml

    try:
        pynvml.nvmlInit()
        free = [
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number)).free
            for number in range(len(devices))
        ]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ConfigurationError(f"cannot ask the NVIDIA driver for its devices: {error}") from error
    return [device.budget or int(bytes_) - CUDA_RESERVE for device, bytes_ in zip(devices, free, strict=True)]
