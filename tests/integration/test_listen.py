"""Connections: too many, silent, slow, deaf, no HTTP at all; and TLS."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import ssl
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
import uvloop
from aiohttp import ClientSession, ClientSSLError, web

from serverless_llm import wire
from serverless_llm.errors import ConfigurationError
from serverless_llm.gateway.listen import RESERVED, Runner, listen, load_certificate, most_connections, tls_context
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.node.processes import environment
from tests.integration import scripted
from tests.integration.scripted import Controller, Served, silent

pytestmark = pytest.mark.slow
run = partial(scripted.run, loop=uvloop.run)  # whose transports differ from asyncio's


def port_of(server: Served) -> int:
    return int(server.url.rpartition(":")[2])


async def exchange(server: Served, raw: bytes) -> bytes:
    """What comes for `raw` until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    try:
        writer.write(raw)
        return await reader.read()
    finally:
        writer.close()


def shape(answer: bytes) -> tuple[int, str]:
    """Status and error code of a raw answer that has the error body and an id."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.search(rb"x-request-id: [0-9a-f]{32}\r\n", head + b"\r\n")
    assert b"Content-Type: application/json" in head
    error = msgspec.json.decode(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
    ids=["words", "version", "header", "line", "field", "length", "tls"],
)
def test_what_is_no_http_gets_the_error_body(tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Served) -> None:
        assert shape(await exchange(server, raw)) == (400, "invalid_request_error")

    run(tmp_path, silent, scenario)
    assert "Traceback" not in caplog.text


def test_an_expectation_that_nobody_knows(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: tea\r\n"
        assert shape(await exchange(server, head + b"Content-Length: 2\r\n\r\n{}")) == (417, "invalid_request_error")

    run(tmp_path, silent, scenario)


def test_one_connection_too_many(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(2)]
        assert shape(await exchange(server, b"")) == (503, "overloaded")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        async with server.http.get("/health") as response:
            assert response.status == 200

    run(tmp_path, silent, scenario, GatewayOptions(connections=2))


def test_a_connection_without_a_request_is_closed(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        assert await exchange(server, b"") == b""
        assert await exchange(server, b"GET /health HT") == b""

    run(tmp_path, silent, scenario, GatewayOptions(idle=0.05))


@pytest.mark.parametrize("route", [b"POST /v1/completions", b"PUT /admin/models/x", b"POST /admin/models/x/pin"])
def test_a_body_that_does_not_come(tmp_path: Path, route: bytes) -> None:
    async def scenario(server: Served) -> None:
        head = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 20\r\n\r\n{"
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(route + head)
        answer = await reader.readuntil(b"}}")
        assert shape(answer) == (400, "invalid_request_error")
        assert b"did not come within 0.05 s" in answer
        writer.close()

    run(tmp_path, silent, scenario, GatewayOptions(idle=0.05))


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br"])
def test_a_body_that_is_not_encoded_as_it_says(
    tmp_path: Path, encoding: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(server: Served) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: " + encoding
        answer = await exchange(server, head + b"\r\nContent-Length: 4\r\n\r\n{{{{")
        assert shape(answer) == (400, "invalid_request_error")

    run(tmp_path, silent, scenario)
    assert "Traceback" not in caplog.text


def test_a_body_that_does_not_come_keeps_no_server_from_closing(tmp_path: Path) -> None:
    async def main() -> float:
        async with scripted.served(tmp_path, silent) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{")
            async with server.http.get("/health"):
                began = asyncio.get_running_loop().time()
        writer.close()
        return asyncio.get_running_loop().time() - began

    assert uvloop.run(main()) < 10


def test_a_client_that_never_reads_an_answer_that_does_not_stream_is_cut(tmp_path: Path) -> None:
    def answers(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Ask):
            controller.deliver(wire.Answer(message.id, 200, b"x" * 8_000_000))

    async def scenario(server: Served) -> None:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", port_of(server)))
            await loop.sock_sendall(deaf, b"GET /admin/models/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            mine = deaf.getsockname()
            while mine in [one.raddr for one in psutil.Process().net_connections()]:  # the server's end of it
                async with server.http.get("/health") as response:
                    assert response.status == 200

    run(tmp_path, answers, scenario, GatewayOptions(write_stall=0.2))


def test_the_limit_on_connections_follows_the_descriptors_that_there_are() -> None:
    script = (
        "import resource; from serverless_llm.gateway.listen import most_connections;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256)); print(most_connections(10), most_connections(5000),"
        "resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10", str(256 - RESERVED), "256"]
    assert most_connections(1) == 1


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            options = GatewayOptions()
            runner = Runner(web.Application(), options)
            await runner.setup()
            with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in"):
                await listen(runner, "127.0.0.1", port, options)
            with pytest.raises(ConfigurationError, match=r"cannot listen on no\.such\.host\.invalid port 1"):
                await listen(runner, "no.such.host.invalid", 1, options)
            await runner.cleanup()

    uvloop.run(main())


NOT_HERE = [(socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "192.0.2.1")]  # RFC 3849, RFC 5737
HERE = (socket.AF_INET, "127.0.0.1")


def test_of_a_host_s_addresses_those_that_this_machine_has_are_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(addresses: list[tuple[socket.AddressFamily, str]], port: int) -> int:
        found = [(family, socket.SOCK_STREAM, 0, "", (address, 0)) for family, address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
        options = GatewayOptions()
        runner = Runner(web.Application(), options)
        await runner.setup()
        try:
            port = await listen(runner, "some.host", port, options)
            assert [address[:2] for address in runner.addresses] == [("127.0.0.1", port)]
        finally:
            await runner.cleanup()
        return port

    assert uvloop.run(main([NOT_HERE[0], HERE, HERE, NOT_HERE[1]], 0))
    with pytest.raises(ConfigurationError, match=r"cannot listen on some\.host port 1: .*address"):
        uvloop.run(main(NOT_HERE, 1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"cannot listen on some\.host port {port}: Address already in"):
            uvloop.run(main([*NOT_HERE, HERE], port))


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with cert.pem and key.pem, for localhost; other.pem belongs to another certificate."""
    folder = tmp_path_factory.mktemp("tls")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    for certificate, key in (("cert.pem", "key.pem"), ("other-cert.pem", "other.pem")):
        subprocess.run(
            [*make, *named, "-out", certificate, "-keyout", key], cwd=folder, check=True, capture_output=True
        )
    pem = (folder / "key.pem").read_text()
    (folder / "broken.pem").write_text(pem[: len(pem) // 2] + "\n-----END PRIVATE KEY-----\n")
    encrypt = ["openssl", "pkcs8", "-topk8", "-in", "key.pem", "-out", "locked.pem", "-passout", "pass:x"]
    subprocess.run(encrypt, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("none.pem", "key.pem", "tls_cert: .*none.pem: No such file"),
        ("cert.pem", "none.pem", "tls_key: .*none.pem: No such file"),
        ("key.pem", "key.pem", "tls_cert: .*key.pem holds no CERTIFICATE"),
        ("cert.pem", "cert.pem", "tls_key: .*cert.pem holds no PRIVATE KEY"),
        ("cert.pem", "other.pem", "other.pem: the key is another certificate's"),
        ("cert.pem", "broken.pem", "tls_key .*broken.pem: "),
        ("cert.pem", "locked.pem", "locked.pem: the key is encrypted"),
        (".", "key.pem", "tls_cert: .*: Is a directory"),
    ],
)
def test_a_bad_certificate_or_key_is_named(certificate: Path, cert: str, key: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tls_context(certificate / cert, certificate / key)


def test_tls(certificate: Path) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def main() -> None:
        app = web.Application()
        app.add_routes([web.get("/", hello)])
        options = GatewayOptions()
        runner = Runner(app, options)
        await runner.setup()
        context = tls_context(certificate / "cert.pem", certificate / "key.pem")
        port = await listen(runner, "localhost", 0, options, context)
        trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
        async with ClientSession() as http:
            async with http.get(f"https://localhost:{port}/", ssl=trusting) as response:
                assert await response.text() == "hello"
            with pytest.raises(ClientSSLError):
                await http.get(f"https://localhost:{port}/")
        await runner.cleanup()

    uvloop.run(main())


def test_a_certificate_that_is_refused_leaves_the_one_in_force(certificate: Path) -> None:
    async def main() -> None:
        options = GatewayOptions()
        runner = Runner(web.Application(), options)
        await runner.setup()
        context = tls_context(certificate / "cert.pem", certificate / "key.pem")
        port = await listen(runner, "localhost", 0, options, context)

        def shaken(name: str) -> bool:
            """Whether who trusts this certificate alone is shown it."""
            trusting = ssl.create_default_context(cafile=certificate / name)
            with socket.create_connection(("localhost", port), 10) as plain:
                try:
                    trusting.wrap_socket(plain, server_hostname="localhost").close()
                except (ssl.SSLError, ConnectionError):
                    return False
            return True

        try:
            with pytest.raises(ConfigurationError, match="the key is another certificate's"):
                load_certificate(context, certificate / "other-cert.pem", certificate / "key.pem")
            assert await asyncio.to_thread(shaken, "cert.pem")
            load_certificate(context, certificate / "other-cert.pem", certificate / "other.pem")
            assert await asyncio.to_thread(shaken, "other-cert.pem")
            assert not await asyncio.to_thread(shaken, "cert.pem")
        finally:
            await runner.cleanup()

    uvloop.run(main())


@pytest.mark.parametrize("word", [b"", b"GET / HTTP/1.1\r\n\r\n", None], ids=["silent", "plain", "gone"])
def test_connections_without_a_handshake_count_and_do_not_stay(certificate: Path, word: bytes | None) -> None:
    async def main() -> None:
        options = GatewayOptions(connections=2, idle=0.3)
        runner = Runner(web.Application(), options)
        await runner.setup()
        context = tls_context(certificate / "cert.pem", certificate / "key.pem")
        port = await listen(runner, "localhost", 0, options, context)
        trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
        held = [await asyncio.open_connection("localhost", port) for _ in range(2)]
        try:
            async with ClientSession() as http, asyncio.timeout(10):
                async with http.get(f"https://localhost:{port}/", ssl=trusting) as response:
                    assert response.status == 503
                for reader, writer in held:
                    writer.write(word or b"")
                    if word is None:
                        writer.transport.abort()
                    else:
                        await reader.read()  # until the server ends it
                        writer.close()
                while True:
                    async with http.get(f"https://localhost:{port}/", ssl=trusting) as response:
                        if response.status == 404:
                            break
        finally:
            for _, writer in held:
                writer.transport.abort()
            await runner.cleanup()

    gc.disable()  # what goes by itself only then would count until a rare pass
    try:
        uvloop.run(main())
    finally:
        gc.enable()
