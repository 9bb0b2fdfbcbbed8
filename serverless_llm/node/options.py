"""What an agent is started with: one JSON object on its command line, made by the head from the configuration."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from serverless_llm.config import Config, parse_devices


class DeviceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device: `kind` cpu or cuda; `budget` bytes for weights and KV, 0: nearly all that a GPU has."""

    kind: str
    budget: int
    weights: str


class AgentOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node agent.

    Attributes:
        dram: capacity of the DRAM tier, in bytes.
        remote_rate, disk_rate, upload_rate: caps in bytes per second; 0: none.
        threads: compute threads of a CPU device's worker.
        orphan_grace: seconds without a head after which everything is freed; None: never (JSON has no infinity).
        stuck_after: seconds a worker with work may be silent before it is killed (or 20 predicted steps, if more).
    """

    state_dir: str
    node: str
    devices: tuple[DeviceOptions, ...]
    dram: int
    disk_rate: float = 0.0
    upload_rate: float = 0.0
    remote_rate: float = 0.0
    threads: int = 1
    orphan_grace: float | None = 60.0
    stuck_after: float = 10.0

    @property
    def grace(self) -> float:
        """`orphan_grace` in seconds, infinite for None."""
        return math.inf if self.orphan_grace is None else self.orphan_grace

    @property
    def limits(self) -> dict[str, float]:
        """The caps that there are, by link."""
        caps = {"remote": self.remote_rate, "disk": self.disk_rate, "upload": self.upload_rate}
        return {link: cap for link, cap in caps.items() if cap}

    @property
    def lock_path(self) -> Path:
        """Locked by the agent while it lives."""
        return Path(self.state_dir) / "agents" / f"{self.node}.lock"

    @property
    def digests(self) -> Path:
        """Where the agent keeps the digests of checkpoints."""
        return Path(self.state_dir) / "agents" / f"{self.node}.digests"

    @property
    def tensors(self) -> Path:
        """Where it keeps those of their tensors."""
        return Path(self.state_dir) / "agents" / f"{self.node}.tensors"


def local_agents(config: Config) -> tuple[AgentOptions, ...]:
    """The agents that a head with this configuration keeps on its own machine."""
    kind, count = parse_devices(config.devices)
    weights = config.weights if kind == "cpu" else "copy"
    device = DeviceOptions(kind, config.device_memory or 0, weights)
    return tuple(
        AgentOptions(
            state_dir=str(config.state_dir),
            node=f"node{number}",
            devices=(device,) * count,
            dram=config.dram,
            disk_rate=config.limits.disk,
            upload_rate=config.limits.upload,
            remote_rate=config.limits.remote,
            threads=config.threads,
            orphan_grace=config.orphan_grace if math.isfinite(config.orphan_grace) else None,
        )
        for number in range(config.nodes)
    )
