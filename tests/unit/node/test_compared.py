"""The store and a worker's half of a load, without processes between them: what differs on a device."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch

from serverless_llm import wire
from serverless_llm.demo.tasks import ADD, checkpoint_dir
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.layers import Tensors
from serverless_llm.loader import manifest
from serverless_llm.loader.converted import Conversion
from serverless_llm.loader.digest import Due
from serverless_llm.loader.tasks import Mapping, Progress, Upload
from serverless_llm.node.options import AgentOptions, DeviceOptions
from serverless_llm.node.placing import Placing
from serverless_llm.node.slot import Slot
from serverless_llm.node.store import Store
from tests.serving import until

MIB = 1 << 20


class Pair:
    """A store and its one worker. `harm`: flip a bit of what the device holds as soon as something is there.

    Attributes:
        ends: how loads ended, as the head is told.
    """

    up = True

    def __init__(self, directory: Path, dram: int, harm: bool, weights: str) -> None:
        device = DeviceOptions("cpu", 32 * MIB, weights)
        options = AgentOptions(state_dir=str(directory), node="n", devices=(device,), dram=dram, orphan_grace=5.0)
        self.ends: asyncio.Queue[wire.ReplicaReady | wire.LoadFailed] = asyncio.Queue()
        self.store = Store(options, self._tell, lambda _: cast(Slot, self))
        self.engine = Engine("cpu", device.budget, weights, 1)
        self.placing = Placing(
            self.engine, wire.Boot(0, 1, "cpu", device.budget, weights, dram, 1, 0.0), self.store.pool_fd
        )
        self._convert = self.placing._uploader.conversion
        self.placing._uploader.conversion = self._conversion  # type: ignore[method-assign]
        self._harm = harm
        self._ring = False
        self._pieces: list[tuple[int, int, int, int]] = []
        asyncio.get_running_loop().add_reader(self.placing.wakeup, self._finished)

    def send(self, message: wire.Message) -> None:
        """To the worker."""
        match message:
            case wire.Place():
                self._ring = message.ring
                assert self.placing.place(message) is None
            case wire.Landed(replica, pieces, last):
                self._pieces += pieces
                if self._ring or last:  # one after another: the header first where it can be had
                    for piece in sorted(self._pieces):
                        assert self.placing.landed(replica, [piece], False) is None
                        self._flip(replica)
                    self._pieces.clear()
                assert self.placing.landed(replica, [], last) is None
            case wire.Drop(replica):
                self.placing.drop(replica)
                self.store.dropped(replica)

    def _tell(self, message: wire.Message) -> None:
        if isinstance(message, wire.ReplicaReady | wire.LoadFailed):
            self.ends.put_nowait(message)

    def _flip(self, replica: int) -> None:
        task = self.placing._placements[replica].task
        if self._harm and isinstance(task, Upload) and task.total:
            until(lambda: task.done > 0, "the first copies")
            self.engine.arena[self.engine.arena.nonzero()[0]] ^= 1
            self._harm = False

    def _conversion(
        self, mapping: Mapping, targets: Tensors, on_progress: Progress, due: Due | None = None
    ) -> Conversion:
        first = next(one.entry.name for one in mapping.stored() if one.entry.name in targets)

        def progress(done: int, total: int) -> None:
            if self._harm:
                targets[first].view(-1).view(torch.uint8)[0] ^= 1
            self._harm = False
            on_progress(done, total)

        return self._convert(mapping, targets, progress, due)

    def _finished(self) -> None:
        for answer in self.placing.finished():
            match answer:
                case wire.Copied(replica, nbytes):
                    self.store.copied(replica, nbytes)
                case wire.Compared():
                    self.store.compared(answer)
                case wire.Placed():
                    self.store.placed(answer)

    async def load(self, source: Path, dtype: str) -> wire.ReplicaReady | wire.LoadFailed:
        """Loads the checkpoint, with `full`; how that ended."""
        found = manifest.build(source)
        self.store.start(wire.StartLoad(1, 0, "m", str(source), found.checkpoint, dtype, 0, True, "full"))
        async with asyncio.timeout(20):
            return await self.ends.get()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.placing.wakeup)
        self.placing.close()
        self.store.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_dir(ADD.name), tmp_path / "source"))


def loaded(
    tmp_path: Path, source: Path, dram: int, harm: bool, dtype: str = "auto", weights: str = "copy"
) -> tuple[wire.ReplicaReady | wire.LoadFailed, dict[str, int]]:
    """How a load ended, and what the node counts."""

    async def tell() -> tuple[wire.ReplicaReady | wire.LoadFailed, dict[str, int]]:
        pair = Pair(tmp_path, dram, harm, weights)
        try:
            end = await pair.load(source, dtype)
            tally = pair.store.tally
            return end, {"bytes": tally.bytes, "device": tally.device, "dram": tally.dram, "disk": tally.disk}
        finally:
            pair.close()

    return asyncio.run(tell())


def test_what_differs_on_a_device_is_copied_again_and_counted(tmp_path: Path, source: Path) -> None:
    size = (source / "model.safetensors").stat().st_size
    end, tally = loaded(tmp_path, source, 8 * MIB, harm=True)
    assert isinstance(end, wire.ReplicaReady)
    held = tally.pop("bytes") - size
    assert size - MIB < held < size  # all but the header
    assert tally == {"device": 1, "dram": 0, "disk": 0}


@pytest.mark.parametrize("weights", ["copy", "view"])
def test_what_differs_of_converted_weights_is_converted_again_and_counted(
    tmp_path: Path, source: Path, weights: str
) -> None:
    size = (source / "model.safetensors").stat().st_size
    end, tally = loaded(tmp_path, source, 8 * MIB, True, "bfloat16", weights)
    assert isinstance(end, wire.ReplicaReady)
    held = 2 * (tally.pop("bytes") - size)  # of float32
    assert size - MIB < held < size  # all but the header
    assert tally == {"device": 1, "dram": 0, "disk": 0}


def test_what_differs_of_tensors_that_lie_misaligned_is_copied_again_and_counted(tmp_path: Path, source: Path) -> None:
    """In view mode they are no views, and nothing else is compared."""
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    end, tally = loaded(tmp_path, source, 8 * MIB, harm=True, weights="view")
    assert isinstance(end, wire.ReplicaReady)
    held = tally.pop("bytes") - file.stat().st_size
    assert file.stat().st_size - MIB < held < file.stat().st_size  # all but the header
    assert tally == {"device": 1, "dram": 0, "disk": 0}


def test_what_cannot_be_copied_again_fails_the_load_for_now(tmp_path: Path, source: Path) -> None:
    end, tally = loaded(tmp_path, source, 2 * MIB, harm=True)
    assert isinstance(end, wire.LoadFailed)
    assert not end.permanent
    assert end.message.startswith(f"{source / 'model.safetensors'}: bytes ")
    assert ", in them " in end.message
    assert end.message.endswith("are not in the memory of device 0 what was copied there")
    assert (tally["device"], tally["dram"], tally["disk"]) == (1, 0, 0)


@pytest.mark.parametrize("dram", [8 * MIB, 2 * MIB], ids=["whole", "ring"])
def test_copies_that_arrive_whole_are_not_told_of(tmp_path: Path, source: Path, dram: int) -> None:
    end, tally = loaded(tmp_path, source, dram, harm=False)
    assert isinstance(end, wire.ReplicaReady)
    assert (tally["device"], tally["dram"], tally["disk"]) == (0, 0, 0)
