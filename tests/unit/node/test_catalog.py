"""What the outside sees of devices."""

from __future__ import annotations

import asyncio

from aiohttp import web

from serverless_llm import framing, wire
from serverless_llm.cluster import events as e
from serverless_llm.node import catalog
from serverless_llm.node.links import WebSocketLink
from serverless_llm.node.peers import Peer
from tests.unit.cluster.desk import D0, PHASES, STILL, Desk, deploy


async def agent() -> Peer:
    """One that is connected; its link lives on a loop."""
    hello = wire.Hello(framing.PROTOCOL, "n0", 4, 900, [], [], [], [], {})
    return Peer(0, WebSocketLink(web.WebSocketResponse(), lambda _frame: None), hello, kv={0: (7, 1)})


def test_what_replicas_share_counts_once() -> None:
    desk = Desk(STILL)
    desk.join()
    for number, (name, shared) in enumerate((("a", ()), ("b", ((7, 20, 1), (8, 5, 1)))), start=1):
        desk.tell(deploy(name, size=30))
        desk.ask(number, name)
        desk.tell(e.Reserved(D0, number))
        desk.tell(e.ReplicaReady(number, PHASES, shared))
    desk.machine.state.nodes["n0"].lent["sha-c"] = 5
    peers = {"n0": asyncio.run(agent())}
    (node,) = catalog.nodes(desk.machine.state, peers)
    (device,) = node["devices"]
    assert node["lent_bytes"] == {"sha-c": 5}
    assert device["memory"] == {"weights": 35, "kv": 7, "free": 58}
    assert device["granted"] == 55  # with two floors of KV
    assert [(one["weight_bytes"], one["shared_bytes"]) for one in device["replicas"]] == [(30, 25), (30, 25)]

    desk.tell(e.WorkerLost(D0, 1, "killed"))
    (node,) = catalog.nodes(desk.machine.state, peers)
    assert node["devices"][0]["memory"]["weights"] == 0


def test_what_nobody_else_has_any_more_is_not_shared() -> None:
    desk = Desk(STILL)
    desk.join()
    for number, (name, shared) in enumerate((("a", ()), ("b", ((7, 25, 1),))), start=1):
        desk.tell(deploy(name, size=30))
        desk.tell(e.Load(name))
        desk.tell(e.Reserved(D0, number))
        desk.tell(e.ReplicaReady(number, PHASES, shared))
    peers = {"n0": asyncio.run(agent())}
    desk.tell(e.UnloadModel("a"))
    both = catalog.nodes(desk.machine.state, peers)[0]["devices"][0]
    desk.tell(e.Unloaded(1))
    alone = catalog.nodes(desk.machine.state, peers)[0]["devices"][0]
    told = [[(one["model"], one["shared_bytes"]) for one in device["replicas"]] for device in (both, alone)]
    assert told == [[("a", 25), ("b", 25)], [("b", 0)]]
    assert [device["memory"]["weights"] for device in (both, alone)] == [35, 30]
