"""Where connections come in: how many, for how long without a word, over TLS or not; bad HTTP is answered in JSON."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from serverless_llm.errors import ConfigurationError, RequestError
from serverless_llm.gateway import failure
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.surroundings import take_descriptors

BACKLOG = 1024  # connections that the kernel holds until they are accepted; a burst of clients
PASSIVE = socket.AI_PASSIVE
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # as of ::1, which a name may have although IPv6 is off
CLOSE_SECONDS = 1.0  # for handlers that still run when the server closes; streams had their time before
HANDSHAKE_SECONDS = 10.0  # at most, for TLS to begin; a slow link takes a second or two
RESERVED = 128  # descriptors for all else: agents, text processes, logs, the database


def _answer(error: RequestError) -> web.Response:
    headers = failure.headers(error) | {"x-request-id": uuid.uuid4().hex}
    answer = web.Response(
        status=error.status, body=failure.encoded(error), headers=headers, content_type="application/json"
    )
    answer.force_close()
    return answer


_FULL_BODY = failure.encoded(RequestError(503, "overloaded", "too many connections"))
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"x-request-id: %%s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(_FULL_BODY)
) + _FULL_BODY


class _Full(asyncio.Protocol):
    """A connection too many: told so, and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writable = cast(asyncio.Transport, transport)  # uvloop's are, and say so to no isinstance
        writable.write(_FULL % uuid.uuid4().hex.encode())
        writable.close()


class _Accepted(asyncio.Protocol):
    """A connection before its first request; over TLS, in its handshake. uvloop drops it where that fails."""

    def __init__(self, door: _Door) -> None:
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = self._door.connection(self)
        transport.set_protocol(connection)
        connection.connection_made(transport)


class _Connection(web.RequestHandler):
    """As aiohttp's, but what is no HTTP gets the error body that everything gets, and no trace in the log."""

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status == 500:
            super().handle_error(request, status, exc, message)  # a bug: logs it
            return _answer(RequestError(500, "engine_error", "an internal error; the log tells more"))
        return _answer(RequestError(400, "invalid_request_error", "this is no valid HTTP request"))


class _Door(web.Server):
    """Makes the protocol of each new connection."""

    def __init__(self, like: web.Server, most: int) -> None:
        super().__init__(
            like.request_handler,
            request_factory=like.request_factory,
            handler_cancellation=like.handler_cancellation,
            loop=like._loop,
            **like._kwargs,
        )
        self._most = most

        self._accepted: weakref.WeakSet[_Accepted] = weakref.WeakSet()  # nobody is told that a handshake failed

    def __call__(self) -> Any:
        if len(self._connections) + len(self._accepted) >= self._most:
            return _Full()
        accepted = _Accepted(self)
        self._accepted.add(accepted)
        return accepted

    def connection(self, accepted: _Accepted) -> _Connection:
        """Takes the place of what was accepted."""
        self._accepted.discard(accepted)
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Site(web.SockSite):
    """As aiohttp's, but a TLS handshake has `patience` seconds."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket, tls: ssl.SSLContext | None, patience: float) -> None:
        super().__init__(runner, sock, ssl_context=tls, backlog=BACKLOG)
        self._patience = patience

    async def start(self) -> None:
        await web.BaseSite.start(self)
        self._server = await asyncio.get_running_loop().create_server(
            cast(web.Server, self._runner.server),
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self._patience if self._ssl_context else None,
        )


class Runner(web.AppRunner):
    """Serves a gateway's application; a client that goes away ends its handler."""

    __slots__ = ("_most",)

    def __init__(self, app: web.Application, options: GatewayOptions) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=options.idle,
            shutdown_timeout=CLOSE_SECONDS,
        )
        self._most = most_connections(options.connections)

    async def _make_server(self) -> web.Server:
        return _Door(await super()._make_server(), self._most)


def most_connections(wanted: int) -> int:
    """How many connections this process has descriptors for, at most `wanted`; raises its soft limit."""
    return max(1, min(wanted, take_descriptors() - RESERVED))


async def listen(
    runner: web.AppRunner, host: str, port: int, options: GatewayOptions, tls: ssl.SSLContext | None = None
) -> int:
    """Accepts connections on those addresses of the host that this machine has; returns the port.

    Raises:
        ConfigurationError: it has none of them, or one is taken.
    """
    try:
        for sock in _bound_to(host, port, options):
            await _Site(runner, sock, tls, min(options.idle, HANDSHAKE_SECONDS)).start()
            port = sock.getsockname()[1]
    except OSError as error:
        hint = "; choose another --port, 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from error
    return port


def _bound_to(host: str, port: int, options: GatewayOptions) -> Iterator[socket.socket]:
    """One for each address; where `port` is 0 all have the one that was free for the first."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=PASSIVE)
    addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)  # a hosts file may repeat one
    absent: list[OSError] = []
    for family, address in addresses:
        try:
            sock = _bound(family, (address[0], port, *address[2:]), options)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            absent.append(error)
        else:
            port = sock.getsockname()[1]
            yield sock
    if len(absent) == len(addresses):
        raise absent[0]


def _bound(family: int, address: tuple[object, ...], options: GatewayOptions) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # a client that takes nothing of what was sent is cut by the kernel; accepted sockets inherit it
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * options.write_stall))
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


TLS = ("tls_cert", "tls_key")  # where both were given, if nobody says


def tls_context(certificate: Path, key: Path, where: tuple[str, str] = TLS) -> ssl.SSLContext:
    """For a server of this certificate chain.

    Raises:
        ConfigurationError: names the file at fault, and `where` it was given.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, certificate, key, where)
    return context


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path, where: tuple[str, str] = TLS) -> None:
    """New connections of `context` show this certificate. Raises as `tls_context`; it shows the former one then."""
    tls_context(certificate, key, where)  # a key that does not fit would leave `context` with a certificate and no key
    _load(context, certificate, key, where)


def _load(context: ssl.SSLContext, certificate: Path, key: Path, where: tuple[str, str]) -> None:
    for name, path, mark in zip(where, (certificate, key), ("CERTIFICATE", "PRIVATE KEY"), strict=True):
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise ConfigurationError(f"{name}: {path}: {error.strerror}") from None
        if f"{mark}-----" not in text:
            raise ConfigurationError(f"{name}: {path} holds no {mark} in PEM form")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ConfigurationError) as error:
        reason = getattr(error, "reason", None) or str(error)
        reason = "the key is another certificate's" if reason == "KEY_VALUES_MISMATCH" else reason
        raise ConfigurationError(f"{where[0]} {certificate} and {where[1]} {key}: {reason}") from None


def _no_password() -> str:
    raise ConfigurationError("the key is encrypted; give one without a password")
