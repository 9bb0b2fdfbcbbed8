"""Machines before which suspects are tried: one device, or two."""

from __future__ import annotations

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceId
from tests.unit.cluster.desk import D0, D1, PHASES, STILL, Desk, deploy, node


def dispatched(out: list[c.Command]) -> list[int]:
    return [one.sequence for one in out if isinstance(one, c.Dispatch)]


class Court(Desk):
    """One device; its worker can die, and comes back at once."""

    def __init__(self) -> None:
        super().__init__(STILL)
        self.incarnation = 1
        self.join()

    def die(self) -> list[c.Command]:
        out = self.tell(e.WorkerLost(D0, self.incarnation, "SIGSEGV"))
        self.incarnation += 1
        return out + self.tell(e.WorkerUp(D0, self.incarnation))

    def reload(self) -> list[c.Command]:
        """Every start under way succeeds."""
        out: list[c.Command] = []
        for replica in sorted(self.machine.state.replicas):
            out += self.tell(e.Reserved(D0, replica))
        for replica in sorted(self.machine.state.replicas):
            out += self.tell(e.ReplicaReady(replica, PHASES))
        return out

    def progress(self, *sequences: tuple[int, int]) -> list[c.Command]:
        """(sequence, tokens) at their current epochs."""
        state = self.machine.state
        held = tuple((sequence, state.sequences[sequence].epoch, tokens, 1) for sequence, tokens in sequences)
        return self.tell(e.Progress(D0, self.incarnation, held))


class Pair(Desk):
    """Two devices, each with a replica of `a`. Sequence 1 was there when a worker died, and is on `D1` now."""

    def __init__(self) -> None:
        super().__init__(STILL)
        self.incarnations = {D0: 1, D1: 1}
        self.join(node(devices=2))
        self.tell(deploy("a", size=30, min_replicas=2, max_replicas=2))
        self.bring_up(1, D0)
        self.bring_up(2, D1)
        self.ask(1, "a")
        self.die(D0)
        self.back(D0)

    def die(self, device: DeviceId) -> list[c.Command]:
        return self.tell(e.WorkerLost(device, self.incarnations[device], "SIGSEGV"))

    def back(self, device: DeviceId) -> list[c.Command]:
        """A new worker, and all that starts there."""
        self.incarnations[device] += 1
        out = self.tell(e.WorkerUp(device, self.incarnations[device]))
        for replica in sorted(self.machine.state.devices[device].replicas):
            out += self.bring_up(replica, device)
        return out
