"""One line of log for each request, at its end: never a prompt, an answer or a key."""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_FIELD = re.compile(r"[\w.\[\]-]{1,64}")  # what is called so; anything else may be a text, or forge a line
_log = logging.getLogger("serverless_llm.request")


@dataclass(slots=True)
class Record:
    """What is known of one HTTP request; whoever learns something writes it here.

    Attributes:
        key: the caller's key by its id.
        route: method and path; paths name models and nothing secret.
        end: why it ended: a finish reason, an error's code, `client gone`.
        param: the field at fault.
        prompt, generated: tokens.
        phases: milliseconds.
        restarts: how often its sequence went on at another worker.
    """

    request_id: str
    route: str
    key: str = "-"
    model: str = ""
    work_class: str = ""
    status: int = 0
    end: str = ""
    param: str = ""
    prompt: int = 0
    generated: int = 0
    device: str = ""
    restarts: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Logs it."""
        fields = self._fields()
        _log.info("%s", " ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "key": self.key,
            "route": self.route,
            "status": self.status,
            "end": self.end.replace(" ", "_"),
            "ms": round(1000 * (time.monotonic() - self.began), 3),
        }
        if _FIELD.fullmatch(self.param):
            fields["param"] = self.param
        if not self.model:
            return fields
        node, _, number = self.device.rpartition("/")
        return fields | {
            "model": self.model,
            "class": self.work_class,
            "prompt": self.prompt,
            "generated": self.generated,
            "node": node or "-",
            "device": number or "-",
            "restarts": self.restarts,
            **self.phases,
        }


CURRENT: ContextVar[Record] = ContextVar("record")  # each request has a task of its own
