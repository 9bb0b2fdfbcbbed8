"""The agent's end of a worker's socket, for the tests beside this file."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from serverless_llm import framing, wire
from serverless_llm.loader.pool import Pool
from serverless_llm.node.worker import Worker

MIB = 1 << 20
ME = framing.worker_address(3, 0)
M = TypeVar("M", bound=wire.Message)


class Agent:
    """Sends frames to a worker with a real engine and a real pool; collects its answers."""

    def __init__(self, checkpoint: Path, weights: str) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(10)
        self.raw = (checkpoint / "model.safetensors").read_bytes()
        self.config = (checkpoint / "config.json").read_text()
        self.pool = Pool(4 * MIB)
        self.pool.range(self.pool.offset(1), len(self.raw))[:] = self.raw
        self.heard: list[tuple[framing.Header, wire.Message]] = []
        self._splitter = framing.Splitter()
        boot = wire.Boot(0, 5, "cpu", 8 * MIB, weights, self.pool.capacity, 1, 0.0)
        self._worker = Worker(theirs, boot, self.pool.fd)
        self.thread = threading.Thread(target=self._worker.run)
        self.thread.start()

    def send(self, message: wire.Message, source: int = 0, epoch: int = 1) -> None:
        self.ours.sendall(wire.encode(message, source, ME, epoch))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            data = self.ours.recv(MIB)
            assert data, "the worker is there"
            for frame in self._splitter.feed(data):
                self.heard.append((frame.header, wire.decode(frame.header.kind, frame.body)))

    def all(self, kind: type[M]) -> list[M]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    def answer(self, kind: type[M]) -> M:
        """The next message of a kind that was not heard before."""
        known = len(self.all(kind))
        self.until(lambda: len(self.all(kind)) > known)
        return self.all(kind)[known]

    def place(
        self,
        replica: int = 1,
        dtype: str = "auto",
        config: str | None = None,
        ring: bool = False,
        room: bool = True,
        online: bool = True,
        verify: str = "off",
        twins: Sequence[tuple[int, int, int, int]] = (),
    ) -> None:
        files = [len(self.raw)]
        config = config or self.config
        place = wire.Place(replica, "tiny", "c", config, dtype, 0, files, ring, room, online, verify, twins=[*twins])
        self.send(place)

    def land(self, replica: int = 1) -> None:
        """The bytes in two pieces, the second first."""
        half = len(self.raw) // 2
        start = self.pool.offset(1)
        self.send(wire.Landed(replica, [(0, half, len(self.raw) - half, start + half)], False))
        self.send(wire.Landed(replica, [(0, 0, half, start)], True))

    def run(self, sequence: int, epoch: int = 1, gateway: int = 1, tokens: int = 4, generation: int = 1,
            replica: int = 1, **more: bytes) -> None:  # fmt: skip
        prompt = np.arange(5, dtype=np.int32).tobytes()
        run = wire.Run(sequence, epoch, replica, prompt, more.get("generated", b""), 0.0, 0, 1.0, 0, tokens, [])
        self.send(run, gateway, generation)

    def said(self, sequence: int) -> list[int]:
        return [token for frame in self.all(wire.Tokens) for number, _, tokens, _ in frame.entries
                if number == sequence for token in tokens]  # fmt: skip

    def finished(self, sequence: int) -> bool:
        return any(number == sequence and why for frame in self.all(wire.Tokens) for number, _, _, why in frame.entries)

    def close(self) -> None:
        self.ours.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.pool.close()
