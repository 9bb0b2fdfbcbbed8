"""What an operator can set on the gateway. Times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from serverless_llm.gateway.keys import Key


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """
    Attributes:
        hold: how long a request that does not stream waits for its first token before 503.
        commit_after: when a stream's headers leave although there is no token yet.
        heartbeat_every: silence on a stream after which a heartbeat is sent.
        heartbeat: `chunk` (an ordinary, empty one) or `comment`.
        body_limit: bytes of a request body.
        unread_limit: characters that may wait for a client that does not read, before its sequence is dropped.
        write_stall: how long one write to such a client may take.
        admin_timeout: how long the controller may take to answer an admin request.
        connections: most at a time; a further one is told to come back.
        idle: how long a connection may stay open without a request, and how long a body may take to come.
        keys: empty: no key is needed, but Host and Origin must be local.
        hosts: names other than loopback ones that a Host or Origin header may carry without a key.
        open_metrics: /metrics needs no key (bound to loopback).
    """

    hold: float = 60.0
    commit_after: float = 2.0
    heartbeat_every: float = 10.0
    heartbeat: str = "chunk"
    body_limit: int = 16 << 20
    unread_limit: int = 256 << 10
    write_stall: float = 60.0
    admin_timeout: float = 120.0
    connections: int = 10_000
    idle: float = 75.0
    keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] = ()
    open_metrics: bool = True
