"""The file of keys: what it may say, and what each mistake says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from serverless_llm.errors import ConfigurationError
from serverless_llm.gateway.keys import digest, read

GOOD = """
- id: ada
  key: ${env.ADA}
- id: ops
  sha256: %s
  scopes: [inference, admin]
  requests_per_minute: 60
  tokens_per_minute: 10000
  concurrency: 4
"""


def written(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_with_scopes_and_limits(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD % hashlib.sha256(b"secret").hexdigest(), 0o644)  # it holds no key
    ada, ops = read(path, {"ADA": "k"})
    assert (ada.id, ada.digest, set(ada.scopes)) == ("ada", digest(b"k"), {"inference"})
    assert (ada.requests_per_minute, ada.tokens_per_minute, ada.concurrency) == (None, None, None)
    assert (ops.digest, set(ops.scopes)) == (digest(b"secret"), {"inference", "admin"})
    assert (ops.requests_per_minute, ops.tokens_per_minute, ops.concurrency) == (60, 10000, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "a list of keys is needed"),
        ("[]", "a list of keys is needed"),
        ("- [1", "line 1 is no YAML"),
        ("- canary: [\n  canary", "line 2 is no YAML"),
        ("- 7", "key 1: a mapping is needed, not a whole number"),
        ("- {id: a, keys: canary}", "key a: unknown key 'keys'; did you mean 'key'?"),
        ("- {id: a b, key: canary}", "its id must be"),
        ("- {id: a}", "key a: give key or sha256"),
        ("- {id: a, key: canary, sha256: x}", "key a: give key or sha256"),
        ("- {id: a, key: ''}", "key a: its key is empty"),
        ("- {id: a, key: ' '}", "key a: its key is empty"),
        ("- {id: a, sha256: canary}", "key a: sha256 must be 64"),
        ("- {id: a, key: canary, scopes: [canary]}", "key a: scopes[0]: must be one of inference, admin"),
        ("- {id: a, key: canary, concurrency: x}", "key a: concurrency: a whole number is needed, not text"),
        ("- {id: a, key: canary, concurrency: 0}", "key a: concurrency must be at least 1"),
        ("- {id: a, key: '${env.NONE}'}", "the environment variable NONE is not set"),
        ("- {id: a, key: x}\n- {id: a, key: y}", "the id 'a' is there 2 times"),
        ("- {id: a, key: canary}\n- {id: b, key: canary}", "one of the keys is there 2 times"),
    ],
)
def test_mistakes_name_the_file_and_the_key_and_no_secret(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as raised:
        read(path, {})
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "canary" not in str(raised.value)


def test_a_file_of_keys_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "- {id: a, key: x}", 0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read(path, {})


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read(tmp_path / "none.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read(tmp_path / "bytes.yaml", {})
