"""`make demo`: three models on two logical devices that cannot hold them all, and what may go wrong with them.

Everything is proved from outside: prompts are drawn at random and their answers checked, counters are read from
`/metrics`, processes and the bytes they read from `/proc`. The first proof that fails is named, and the status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.probes import (
    DISK_RATE,
    PATIENCE,
    Answer,
    Broken,
    Server,
    alive,
    family,
    forget_cached,
    prove,
    storage_bytes,
    until,
)
from serverless_llm.cli.run import PHASES
from serverless_llm.demo import tasks
from serverless_llm.domain import ModelSpec
from serverless_llm.node.admin import footprint

MODELS = ("demo-count", "demo-add", "demo-reverse")
STREAMS = 3  # killed together, in mid-stream
MISTAKES = 1  # of the models themselves in one run: demo-count is wrong once in a thousand prompts


def device_bytes() -> int:
    """Memory of a device in which the largest of the models has room, and no two of them."""
    sizes = [footprint(ModelSpec(name, str(tasks.checkpoint_dir(name)))) for name in MODELS]
    needs = sorted(size.weight_bytes + size.kv_bytes(size.context) for size in sizes)
    memory = needs[-1] * 21 // 20
    prove(needs[0] + needs[1] > memory, f"no two models fit in one device of {memory} bytes ({needs})")
    return memory


class Story:
    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.draws = {name: tasks.TASKS[name].prompts(random.Random(f"{seed}:{name}"), test=True) for name in MODELS}
        self.long = random.Random(f"{seed}:long")
        self.mistakes = 0

    def right(self, model: str, answer: Answer, **options: Any) -> Answer:
        """The answer, proved to be right, or the model's own mistake: one that is the same when it is asked again."""
        wanted = tasks.TASKS[model].answer(answer.prompt)
        prove(not answer.error, f"{model} on {answer.prompt!r} ends without an error (it said {answer.error!r})")
        if (answer.text, answer.finish) != (wanted, "stop"):
            again = self.server.ask(model, answer.prompt, **options).text
            self.mistakes += again == answer.text
            own = again == answer.text and self.mistakes <= MISTAKES
            prove(own, f"{model} on {answer.prompt!r} says {wanted!r} (it said {answer.text!r}, asked again {again!r})")
        return answer

    def ask(self, model: str, **options: Any) -> Answer:
        return self.right(model, self.server.ask(model, next(self.draws[model]), **options), **options)

    def disk_start(self) -> str:
        agent = self.server.agent()
        how = forget_cached([tasks.checkpoint_dir(name) for name in MODELS])
        before, read = self.server.metric("cold_starts_total", source="disk"), storage_bytes(agent)
        answer = self.ask("demo-count")
        prove(self.server.metric("cold_starts_total", source="disk") == before + 1, "/metrics counts one disk start")
        size = sum(file.stat().st_size for file in tasks.checkpoint_dir("demo-count").glob("*.safetensors"))
        read = storage_bytes(agent) - read
        prove(
            read >= size, f"/proc/{agent}/io shows the {size} bytes of the weights read from storage (it shows {read})"
        )
        phases = cold_phases(answer)
        prove(set(phases) == set(PHASES.values()), f"the phases of the start are known ({phases})")
        prove(phases["disk -> DRAM"] > 0, f"bytes took time from disk to DRAM ({phases})")
        spent = ", ".join(f"{name} {value:.1f} ms" for name, value in phases.items())
        return (
            f"{shown(answer)}; {how}, {read / 1e6:.1f} MB read; first token {1000 * answer.moments[0]:.0f} ms: {spent}"
        )

    def warm(self) -> str:
        before = self.server.metric("cold_starts_total")
        answer = self.ask("demo-count")
        prove(self.server.metric("cold_starts_total") == before, "/metrics counts no start")
        prove("cold_start_ms" not in answer.metrics or not answer.metrics["cold_start_ms"], "the answer says warm")
        return f"{shown(answer)}; first token after {1000 * answer.moments[0]:.1f} ms"

    def eviction(self) -> str:
        before = self.server.metric("evictions_total", reason="memory")
        self.ask("demo-add")
        prove(self.server.loaded() == {"demo-count", "demo-add"}, "the two devices hold one model each")
        answer = self.ask("demo-reverse")
        loaded = self.server.loaded()
        prove("demo-reverse" in loaded and len(loaded) == 2, "the third model took the place of another")
        prove(self.server.metric("evictions_total", reason="memory") == before + 1, "/metrics counts one eviction")
        (gone,) = set(MODELS) - loaded
        return f"{shown(answer)}; {gone} made room"

    def dram_start(self) -> str:
        (gone,) = set(MODELS) - self.server.loaded()
        moved, before = self.server.disk_bytes(), self.server.metric("cold_starts_total", source="dram")
        answer = self.ask(gone)
        prove(self.server.metric("cold_starts_total", source="dram") == before + 1, "/metrics counts one DRAM start")
        prove(self.server.disk_bytes() == moved, "/metrics counts no byte from disk")
        return f"{gone}: {shown(answer)}; no byte from disk, first token after {1000 * answer.moments[0]:.1f} ms"

    def scale_to_zero(self) -> str:
        model = sorted(self.server.loaded())[0]
        worker = self.server.device_of(model)["worker_pid"]
        self.ask(model, keep_alive="500ms")
        ended = time.monotonic()
        until(lambda: model not in self.server.loaded(), f"{model} leaves its device")
        prove(alive(worker), "its worker stays, ready for the next model")
        return f"{model} left its device {time.monotonic() - ended:.1f} s after its last use (keep_alive 500ms)"

    def killed(self, victim: Callable[[], int], gone: str) -> str:
        """Kills a process while streams run through it; all must end as if nothing had happened."""
        self.ask("demo-count")
        answers = [Answer(self.long_prompt()) for _ in range(STREAMS)]
        threads = [
            threading.Thread(target=self.server.ask, args=("demo-count", one.prompt, one), daemon=True)
            for one in answers
        ]
        pid, workers = victim(), [device["worker_pid"] for device in self.server.devices()]
        for thread in threads:
            thread.start()
        until(lambda: all(len(one.moments) > 5 for one in answers), "every stream has begun")
        os.kill(pid, signal.SIGKILL)
        had = [len(one.text) for one in answers]
        prove(not any(one.finish for one in answers), "the streams were still running when the process was killed")
        until(lambda: not alive(pid), f"process {pid} is gone from /proc")
        for thread in threads:
            thread.join(PATIENCE)
        for one in answers:
            self.right("demo-count", one)
        prove(self.server.device_of("demo-count")["worker_pid"] not in {pid, *self._orphans(gone, workers)}, gone)
        gap = max(late - early for one in answers for early, late in zip(one.moments, one.moments[1:], strict=False))
        cut = ", ".join(f"{early}/{len(one.text)}" for early, one in zip(had, answers, strict=True))
        return f"pid {pid} killed after {cut} characters of {STREAMS} streams; all right to the last number, " + (
            f"longest gap {gap:.2f} s"
        )

    def _orphans(self, gone: str, workers: list[int]) -> list[int]:
        """The workers that had to die with the agent, proved to be gone."""
        if gone != AGENT_GONE:
            return []
        until(lambda: not any(map(alive, workers)), "the agent's workers are gone with it")
        return workers

    def long_prompt(self) -> str:
        """Numbers from the beginning of a hundred, so that the answer is long; from the held-out ones."""
        task = tasks.TASKS["demo-count"]
        while True:
            first = self.long.randrange(1, 8) * 100 + self.long.randrange(30)
            prompt = " ".join(str(first + term) for term in range(self.long.randrange(1, 5)))
            if task.is_test(prompt):
                return prompt

    def worker_killed(self) -> str:
        worker_gone = "another worker has the model now"
        return self.killed(lambda: int(self.server.device_of("demo-count")["worker_pid"]), worker_gone)

    def agent_killed(self) -> str:
        return self.killed(self.server.agent, AGENT_GONE) + ", for its workers and its copy in DRAM died with it"

    def head_killed(self) -> str:
        self.ask("demo-count")
        agent, held = self.server.agent(), self.server.loaded()
        worker = self.server.device_of("demo-count")["worker_pid"]
        moved, read = self.server.agent_disk_bytes(), storage_bytes(agent)
        self.server.kill_head()
        began = time.monotonic()
        self.server.start()
        until(lambda: self.server.loaded() == held, "the new head knows what the devices hold")
        back = time.monotonic() - began
        answer = self.ask("demo-count")
        prove(self.server.agent() == agent, "the agent is the same process")
        prove(self.server.device_of("demo-count")["worker_pid"] == worker, "the worker is the same process")
        prove(self.server.metric("cold_starts_total") == 0, "the new head's /metrics count no start")
        prove(self.server.agent_disk_bytes() == moved, "the agent moved no byte from disk")
        prove(storage_bytes(agent) == read, f"/proc/{agent}/io shows no byte read from storage")
        return f"back after {back:.2f} s with {', '.join(sorted(held))} loaded, 0 bytes read; {shown(answer)}"

    def stopped(self) -> str:
        pids = family(str(self.server.state))
        began = time.monotonic()
        self.server.stop()
        until(lambda: not any(map(alive, pids)), "every process has ended")
        return f"{len(pids)} processes ended in {time.monotonic() - began:.1f} s"


AGENT_GONE = "another agent's worker has the model now"
STEPS: dict[str, Callable[[Story], str]] = {
    "disk start": Story.disk_start,
    "warm answer": Story.warm,
    "eviction": Story.eviction,
    "DRAM start": Story.dram_start,
    "scale to zero": Story.scale_to_zero,
    "worker killed": Story.worker_killed,
    "agent killed": Story.agent_killed,
    "head killed": Story.head_killed,
    "stop": Story.stopped,
}


def cold_phases(answer: Answer) -> dict[str, float]:
    """Phase -> ms of a cold start, as the answer's metrics give them."""
    found = answer.metrics.get("cold_start_phases") or {}
    return {word: float(found[name]) for name, word in PHASES.items() if name in found}


def shown(answer: Answer) -> str:
    text = answer.text if len(answer.text) <= 24 else f"{answer.text[:12]} ... {answer.text[-8:]}"
    return f"{answer.prompt!r} -> {text!r}"


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="serverless-llm-demo-"))
    yield folder
    shutil.rmtree(folder)


def tell(story: Story) -> None:
    for name, step in STEPS.items():
        try:
            report = step(story)
        except Exception as error:
            print(f"  ✗ {name:14} {error}", flush=True)
            raise
        print(f"  ✓ {name:14} {report}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the prompts")
    arguments = parser.parse_args()
    began = time.monotonic()
    with working_folder() as folder:
        server = Server(folder, device_bytes())
        sizes = f"two devices of {server.device_memory / 1e6:.1f} MB, one model fits in each"
        print(f"three models, {sizes}; disk capped at {DISK_RATE}; --seed {arguments.seed}", flush=True)
        try:
            server.start()
            for model in MODELS:
                status, text = server.call(
                    "PUT", f"/admin/models/{model}", {"source": str(tasks.checkpoint_dir(model))}
                )
                prove(status < 300, f"{model} is deployed ({text.decode()})")
            tell(Story(server, arguments.seed))
        except (Broken, OSError, http.client.HTTPException) as error:
            print(f"demo: not so: {error}", file=sys.stderr)
            print("".join(server.log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
            return 1
        finally:
            server.stop()
    print(f"everything held, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
