"""Who may speak to this server."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from serverless_llm.errors import RequestError
from serverless_llm.gateway.access import Access, is_local
from serverless_llm.gateway.keys import Key, digest, full
from serverless_llm.gateway.options import GatewayOptions

SCOPED = Key("infers", digest(b"only"), frozenset(("inference",)))
KEYED = GatewayOptions(keys=(full("k1"), full("k2"), full("é"), SCOPED))
OPEN = GatewayOptions(hosts=("GPU-box.lan",))


def refusal(options: GatewayOptions, path: str = "/v1/models", **headers: str) -> int:
    """The status, 0 where the request may pass."""
    try:
        Access(options).check(make_mocked_request("GET", path, headers=headers))
    except RequestError as error:
        return error.status
    return 0


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", None, 0),
        ("127.0.0.1", None, 0),
        ("127.1.2.3:1", None, 0),
        ("[::1]:8000", None, 0),
        ("gpu-box.lan:8000", None, 0),
        ("LOCALHOST", "http://localhost:3000", 0),
        ("localhost", "http://gpu-box.lan", 0),
        ("evil.example", None, 403),
        ("localhost.evil.example", None, 403),
        ("10.0.0.1", None, 403),
        ("", None, 403),
        ("[::1", None, 403),
        ("localhost@evil.example", None, 403),
        ("localhost", "https://evil.example", 403),
        ("localhost", "null", 403),
    ],
)
def test_without_a_key_only_local_names(host: str, origin: str | None, status: int) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    assert refusal(OPEN, **headers) == status


@pytest.mark.parametrize("path", ["/admin/models/pwn", "/admin/events", "/%61dmin/status"])
def test_without_keys_a_further_name_administers_nothing(path: str) -> None:
    """Behind a proxy under that name is anybody."""
    with pytest.raises(RequestError, match="needs a key here: set `api_key` or `keys_file`") as caught:
        Access(OPEN).check(make_mocked_request("PUT", path, headers={"Host": "gpu-box.lan"}))
    assert (caught.value.status, caught.value.code) == (403, "permission_denied")
    assert refusal(OPEN, path, Host="localhost:8000") == 0
    assert refusal(KEYED, path, Host="gpu-box.lan", Authorization="Bearer k1") == 0
    assert refusal(OPEN, path, Host="localhost:8000", Origin="http://gpu-box.lan:9999") == 403  # from its pages
    assert refusal(OPEN, path, Host="localhost:8000", Origin="http://localhost:9999") == 0


@pytest.mark.parametrize(
    ("site", "mode", "origin", "status"),
    [
        ("cross-site", "no-cors", None, 403),  # an image of a foreign page, which has no Origin
        ("cross-site", "navigate", None, 0),  # a link to the dashboard
        ("cross-site", "cors", "http://gpu-box.lan", 0),
        ("same-site", "no-cors", None, 0),
        ("none", "navigate", None, 0),
    ],
)
def test_without_a_key_no_foreign_page_embeds_anything(site: str, mode: str, origin: str | None, status: int) -> None:
    fetched = {"Host": "localhost", "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert refusal(OPEN, "/v1/models", **fetched | ({} if origin is None else {"Origin": origin})) == status


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer k1", 0),
        ("bearer  k2", 0),
        ("Bearer k3", 401),
        ("Basic k1", 401),
        ("k1", 401),
        ("", 401),
        ("Bearer é", 0),
    ],
)
def test_with_keys_one_of_them(header: str, status: int) -> None:
    assert refusal(KEYED, Host="evil.example", Authorization=header) == status
    assert refusal(KEYED, path="/admin/status", Host="x", Authorization=header) == status


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/models", 0), ("/models/a/v1/models", 0), ("/metrics", 0), ("/unknown", 0), ("/admin/status", 403)],
)
def test_a_key_opens_what_its_scopes_say(path: str, status: int) -> None:
    assert refusal(KEYED, path=path, Host="x", Authorization="Bearer only") == status


def test_an_admin_key_alone_does_not_infer() -> None:
    options = GatewayOptions(keys=(Key("ops", digest(b"k"), frozenset(("admin",))),))
    assert refusal(options, path="/admin/status", Host="x", Authorization="Bearer k") == 0
    assert refusal(options, path="/v1/models", Host="x", Authorization="Bearer k") == 403


def test_keys_that_are_read_anew_count_at_once() -> None:
    access = Access(GatewayOptions(keys=(full("old"),)))
    access.set_keys([full("new")])
    request = make_mocked_request("GET", "/v1/models", headers={"Authorization": "Bearer new"})
    assert access.check(request) == full("new")
    with pytest.raises(RequestError, match="a valid key"):
        access.check(make_mocked_request("GET", "/v1/models", headers={"Authorization": "Bearer old"}))


def test_what_needs_no_key() -> None:
    closed = GatewayOptions(keys=(full("k"),), open_metrics=False)
    assert [refusal(KEYED, path=path) for path in ("/health", "/ready")] == [0, 0]
    assert refusal(KEYED, path="/metrics", Host="localhost:1") == 0
    assert refusal(KEYED, path="/metrics", Host="evil.example") == 403
    assert [refusal(closed, path=path) for path in ("/health", "/ready", "/metrics")] == [0, 0, 401]
    assert [refusal(OPEN, path=path, Host="10.0.0.7") for path in ("/health", "/ready", "/metrics")] == [0, 0, 403]


def test_a_url_without_a_host_is_not_local() -> None:
    assert not is_local("file:///x", ("",))


@pytest.mark.parametrize("headers", [{"Host": "gpu-2.lan"}, {"Host": "localhost", "Origin": "http://gpu-2.lan"}])
def test_a_foreign_name_is_told_the_option_that_allows_it(headers: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="one of `hosts` in the server's configuration"):
        Access(OPEN).check(make_mocked_request("GET", "/v1/models", headers=headers))
