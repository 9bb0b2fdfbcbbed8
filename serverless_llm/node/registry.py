"""The deployed models as the head knows them: kept on disk, told to the machine, shown to gateways and operators."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from serverless_llm import wire
from serverless_llm.cluster import events
from serverless_llm.domain import Footprint, ModelSpec
from serverless_llm.errors import TRIED_AGAIN, RequestError, did_you_mean
from serverless_llm.loader import disk_tier
from serverless_llm.loader.leases import Lease
from serverless_llm.node import admin, catalog, news
from serverless_llm.node.catalog import Clocks, Entry
from serverless_llm.node.controller import Controller
from serverless_llm.node.peers import quoted
from serverless_llm.node.state import Deployed, State
from serverless_llm.node.threads import apart

log = logging.getLogger(__name__)

READ_LIMIT = 10.0  # seconds for a checkpoint's headers when the head starts, which listens only then
LOOKS = 3  # at the text files of a kept model until it fails: they have a time limit, and a machine starts busy
DEPLOY_LIMIT = 60.0  # seconds for them in a deploy; its client is told before it, or its gateway, gives up
READERS = 64  # checkpoints whose headers are read at once; a bound on the wait for each other
CATALOG_S = 0.2  # least seconds between two catalogs that differ only in progress and counts
WRITE_AGAIN = 10.0  # seconds after which a client may ask again for what the disk did not take; arbitrary
BROKEN = f"%s cannot be served: %s; {TRIED_AGAIN}, or: serverless-llm rm %s"
JSON = dict[str, Any]
T = TypeVar("T")
TextCheck = Callable[[str, str, str], Awaitable[bool]]


class Registry:
    """Answers `Ask`, and publishes a `Catalog` after every change.

    Args:
        keep_alive: default of a deploy, in seconds.
        roots: directories that sources must lie in; none: anywhere.
        check: looks at the text files of (name, source, checkpoint), tells whether they have a chat template, raises
            RequestError where they cannot be used.
    """

    def __init__(
        self,
        controller: Controller,
        state: State,
        deliver: Callable[[wire.Message], None],
        keep_alive: float,
        roots: Sequence[Path] = (),
        check: TextCheck | None = None,
    ) -> None:
        self._controller = controller
        self._state = state
        self._deliver = deliver
        self._keep_alive = keep_alive
        self._roots = roots
        self._check = check
        self._entries: dict[str, Entry] = {}
        self._unseen: list[str] = []  # models that were restored without a look at their text files
        self._looked_at: set[str] = set()  # failed models: a mount that does not answer is asked once
        self._leases: dict[str, Lease] = {}
        self._changing = asyncio.Lock()  # deploys and deletes happen one after another, on disk and in the machine
        self._readers = asyncio.Semaphore(READERS)
        self._configured: frozenset[str] = frozenset()  # models that every start with this configuration deploys
        self._restored = False
        self._published: wire.Catalog | None = None
        self._publishing: asyncio.Handle | None = None
        self._promptly = False  # how `_publishing` was asked for; uvloop's handles of no delay know no time
        self._verbs: Mapping[str, Callable[[str, bytes], Awaitable[JSON]]] = {
            "deploy": self._deploy,
            "delete": self._delete,
            "show": self._show,
            "load": self._load,
            "unload": self._unload,
            "pin": self._pin,
            "status": self._status,
            "nodes": self._nodes,
            "drain": self._drain,
        }
        controller.changed = self.changed

    async def restore(self, wanted: Mapping[str, bytes] = {}) -> None:
        """Deploys what was deployed before, and `wanted` (name -> body of a deploy) over it.

        A model that cannot be deployed any more is shown as failed.

        Raises:
            RequestError: one of `wanted` that was never deployed before is refused; names it.
        """
        known = {model.spec.name: model for model in self._state.models()}
        self._configured = frozenset(wanted)
        async with asyncio.TaskGroup() as group:
            for name, model in known.items():
                if name not in wanted:
                    group.create_task(self._revive(Entry(model.spec, model.created)))
                    self._unseen.append(name)
        reading = [self._read(name, body, READ_LIMIT) for name, body in wanted.items()]
        for name, found in zip(wanted, await asyncio.gather(*reading, return_exceptions=True), strict=True):
            try:
                if isinstance(found, BaseException):
                    raise found
                await self._admit(*found)
            except RequestError as error:
                if name not in known:
                    raise RequestError(error.status, error.code, f"{name}: {error.message}", error.param) from error
                log.warning(BROKEN, name, error.message, name)
                self._entries[name] = Entry(known[name].spec, known[name].created, error.message, wanted[name])
        self._restored = True
        self.changed(prompt=True)

    async def _revive(self, entry: Entry, look: bool = False) -> None:
        """Serves it as it was wanted last, or shows why not. `look`: at its text files, too."""
        name, why, unexpected = entry.spec.name, "", None
        former = self._entries.get(name)
        try:
            spec, footprint = await self._found(entry)
            if look:
                await self._look_at_text(name, spec.source, footprint)
        except Exception as error:  # noqa: BLE001  one model's checkpoint must not keep the others from being served
            why = str(error) or type(error).__name__
            unexpected = None if isinstance(error, RequestError) else error
        async with self._changing:
            if self._entries.get(name) is not former:  # it was deployed anew, or deleted, meanwhile
                return
            try:
                if not why:
                    await self._put(spec, entry.created, footprint, save=bool(entry.wanted))
            except RequestError as error:
                why = error.message
            if why:
                self._entries[name] = dataclasses.replace(entry, error=why)
                if former is None or why != former.error:
                    log.warning(BROKEN, name, why, name, exc_info=unexpected)

    async def _found(self, entry: Entry) -> tuple[ModelSpec, Footprint]:
        spec = entry.spec
        if entry.wanted:
            return await self._read(spec.name, entry.wanted, READ_LIMIT)
        if not spec.url:  # an earlier version kept none
            url = await admin.within(READ_LIMIT, spec.source, lambda: disk_tier.url_of(Path(spec.source)))
            spec = dataclasses.replace(spec, url=url)
        return spec, await self._footprint(spec, READ_LIMIT)

    async def look(self) -> None:
        """Looks at the text files of revived models, one after another; a model whose files cannot be used fails.

        Beside requests, not before them: a large tokenizer takes a second.
        """
        while self._unseen:
            name = self._unseen.pop()
            try:
                await self._look(name)
            except Exception:  # one model's files must not end the server
                log.exception("the text files of %s", name)

    async def look_again(self, pause: float) -> None:
        """Every `pause` seconds, looks at the failed models: their mounts may come after the server's start."""
        async with asyncio.TaskGroup() as looks:
            while True:
                await asyncio.sleep(pause)
                for name, entry in self._entries.items():
                    if entry.error and name not in self._looked_at:
                        self._looked_at.add(name)
                        looks.create_task(self._look_again(name, entry))

    async def _look_again(self, name: str, entry: Entry) -> None:
        try:
            source = admin.parse(entry.wanted, admin.DeployBody).source if entry.wanted else entry.spec.source
            await apart(lambda: os.path.exists(source))  # noqa: PTH110  never raises; as long as a dead mount takes
            if self._entries.get(name) is entry:
                await self._revive(entry, look=True)
                self.changed(prompt=True)
        except Exception:  # one model's files must not end the server
            log.exception("another look at %s", name)
        finally:
            self._looked_at.remove(name)

    async def _look(self, name: str) -> None:
        models = self._controller.machine.state.models
        if name not in models:
            return
        footprint = models[name].footprint
        try:
            await self._look_at_text(name, models[name].spec.source, footprint)
        except RequestError as error:
            why = error.message
        else:
            return
        async with self._changing:
            if name in models and models[name].footprint is footprint:  # else it was deployed anew, and checked
                entry = self._entries[name]
                log.warning(BROKEN, name, why, name)
                self._entries[name] = dataclasses.replace(entry, error=why)
                self._controller.handle(events.Delete(name))
        self.changed(prompt=True)

    async def _look_at_text(self, name: str, source: str, footprint: Footprint) -> None:
        """A look that fails once is no sign: the machine may be busy.

        Raises:
            RequestError: they cannot be used.
        """
        if self._check is None:
            return
        for left in reversed(range(LOOKS)):
            try:
                await self._check(name, source, footprint.checkpoint)
            except RequestError:
                if not left:
                    raise
            else:
                return

    # --- what operators ask ---

    async def ask(self, question: wire.Ask) -> None:
        """Answers one `Ask`."""
        try:
            body = await self._verbs[question.verb](question.name, question.body)
            answer = wire.Answer(question.id, 200, msgspec.json.encode(body))
        except RequestError as error:
            answer = _refused(question, error)
        except Exception as error:  # the process's edge: whoever asked waits for an answer
            log.exception("%s of %r", question.verb, question.name)
            answer = _refused(question, RequestError(500, "engine_error", f"{type(error).__name__}: {error}"))
        self._deliver(answer)

    async def _deploy(self, name: str, body: bytes) -> JSON:
        chats = await self._admit(*await self._read(name, body, DEPLOY_LIMIT))
        return self._row(name) | {"chat": chats, "configured": name in self._configured}

    async def _read(self, name: str, body: bytes, limit: float) -> tuple[ModelSpec, Footprint]:
        """What a deploy asks for, as far as `limit` seconds tell; its source may lie on a mount that is dead."""
        source = admin.parse(body, admin.DeployBody).source
        spec = await admin.within(limit, source, lambda: admin.spec_of(name, body, self._keep_alive, self._roots))
        return spec, await self._footprint(spec, limit)

    async def _footprint(self, spec: ModelSpec, limit: float) -> Footprint:
        async with self._readers:
            return await admin.read_footprint(spec, limit)

    async def _admit(self, spec: ModelSpec, footprint: Footprint) -> bool:
        """Whether it has a chat template, as far as anybody looks."""
        name = spec.name
        chats = self._check is None or await self._check(name, spec.source, footprint.checkpoint)
        async with self._changing:
            old = self._entries.get(name)
            await self._put(spec, old.created if old else int(time.time()), footprint)
        self._publish()
        return chats

    async def _put(self, spec: ModelSpec, created: int, footprint: Footprint, save: bool = True) -> None:
        """Deploys it; whoever calls holds `_changing`.

        Raises:
            RequestError: 503, the disk does not take it; nothing changed.
        """
        lease = await self._hold(spec)
        try:
            if save:
                await self._write(self._state.save, Deployed(spec, created))
        except BaseException:
            if lease is not None:
                lease.close()
            raise
        self._keep(spec.name, lease)
        self._entries[spec.name] = Entry(spec, created)
        self._controller.handle(events.Deploy(spec, footprint))

    async def _hold(self, spec: ModelSpec) -> Lease | None:
        """
        Raises:
            RequestError: 503, it lies in a disk tier whose lock cannot be had.
        """
        try:
            return await asyncio.to_thread(disk_tier.hold, Path(spec.source))
        except OSError as error:
            message = f"{spec.source} cannot be kept on the disk tier: {error.strerror}"
            raise RequestError(503, "overloaded", message, retry_after=WRITE_AGAIN) from error

    def _keep(self, name: str, lease: Lease | None) -> None:
        """What is deployed from the disk tier stays there."""
        self._release(name)
        if lease is not None:
            self._leases[name] = lease

    def _release(self, name: str) -> None:
        if lease := self._leases.pop(name, None):
            lease.close()

    async def _delete(self, name: str, body: bytes) -> JSON:
        async with self._changing:
            entry = self._entry(name)
            await self._write(self._state.delete, name)
            del self._entries[name]
            self._release(name)
            if not entry.error:
                self._controller.handle(events.Delete(name))
        self._publish()
        return {"name": name, "deleted": True, "configured": name in self._configured}

    async def _show(self, name: str, body: bytes) -> JSON:
        return self._row(name)

    async def _load(self, name: str, body: bytes) -> JSON:
        entry = self._entry(name)
        if entry.error:  # what it lies on may be back
            await self._revive(entry, look=True)
        self._usable(name)
        self._controller.handle(events.Load(name))
        return self._row(name)

    async def _unload(self, name: str, body: bytes) -> JSON:
        self._usable(name)
        self._controller.handle(events.UnloadModel(name))
        return self._row(name)

    async def _pin(self, name: str, body: bytes) -> JSON:
        pinned = admin.parse(body, admin.PinBody).pinned
        async with self._changing:
            entry = self._usable(name)
            spec = dataclasses.replace(entry.spec, pinned=pinned)
            await self._write(self._state.save, Deployed(spec, entry.created))
            self._entries[name] = Entry(spec, entry.created)
            self._controller.handle(events.Pin(name, pinned))
        return self._row(name)

    async def _status(self, name: str, body: bytes) -> JSON:
        machine = self._controller.machine.state
        return {
            "generation": self._controller.generation,
            "models": [quoted(one) for one in self._infos(self._entries)],
            "nodes": catalog.nodes(machine, self._controller.peers),
            "problems": catalog.problems(machine),
            "disk_tier": str(disk_tier.place()),
            "starts": self._controller.starts.shown(machine, self._controller.now(), time.time()),
        }

    async def _nodes(self, name: str, body: bytes) -> JSON:
        return {"nodes": catalog.nodes(self._controller.machine.state, self._controller.peers)}

    async def _drain(self, name: str, body: bytes) -> JSON:
        """Not kept on disk: who restarts the head says so again."""
        peers, state = self._controller.peers, self._controller.machine.state
        joined = peers.keys() & state.nodes.keys()  # a node may be dropped before its link has ended
        if name not in joined:
            raise RequestError(404, "not_found", f"no node {name!r} has joined{did_you_mean(name, joined)}")
        self._controller.handle(events.Drain(name, admin.parse(body, admin.DrainBody).drained))
        (row,) = catalog.nodes(state, {name: peers[name]})
        return row

    async def _write(self, change: Callable[[T], object], value: T) -> None:
        """
        Raises:
            RequestError: 503, the change is not on disk, and nothing else happened.
        """
        try:
            await asyncio.to_thread(change, value)
        except sqlite3.OperationalError as error:
            log.error("the state database cannot be written: %s", error)  # noqa: TRY400 - the operator's disk, not a bug
            message = f"the state database cannot be written ({error}); nothing was changed"
            raise RequestError(503, "overloaded", message, retry_after=WRITE_AGAIN) from error

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = did_you_mean(name, self._entries)
            raise RequestError(404, "model_not_found", f"no model {name!r} is deployed{near}")
        return self._entries[name]

    def _usable(self, name: str) -> Entry:
        entry = self._entry(name)
        if entry.error:
            raise RequestError(503, "model_load_failed", f"{entry.error}; {TRIED_AGAIN}")
        return entry

    def _row(self, name: str) -> JSON:
        (info,) = self._infos({name: self._entry(name)})
        return quoted(info)

    # --- what gateways are shown ---

    def changed(self, prompt: bool) -> None:
        """Something changed: publishes at the end of this turn of the loop, or, unless `prompt`, a little later."""
        loop = asyncio.get_running_loop()
        if self._publishing is not None:
            if not prompt or self._promptly:
                return
            self._publishing.cancel()
        self._promptly = prompt
        self._publishing = loop.call_later(0.0 if prompt else CATALOG_S, self._publish)

    def _publish(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        machine = self._controller.machine.state
        ready = self._restored and any(device.open for device in machine.devices.values())
        latest = wire.Catalog(self._infos(self._entries), ready, catalog.problems(machine))
        if latest != self._published:
            before = {one.name: one.error for one in self._published.models} if self._published else {}
            for one in latest.models:
                if one.error and one.error != before.get(one.name):
                    self._controller.tell(news.failed(one.name, one.error))
            self._published = latest
            self._deliver(latest)

    def _infos(self, entries: Mapping[str, Entry]) -> list[wire.ModelInfo]:
        controller = self._controller
        clocks = Clocks(controller.now(), time.time())
        machine = controller.machine
        return [
            catalog.info(entry, machine.state.models.get(name), machine.state, machine.policy, clocks)
            for name, entry in sorted(entries.items())
        ]


def _refused(question: wire.Ask, error: RequestError) -> wire.Answer:
    return wire.Answer(question.id, error.status, msgspec.json.encode(error.body()), error.retry_after)
