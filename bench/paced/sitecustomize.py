"""On the PYTHONPATH of a server, this makes its engines instantaneous and paced: only the forward pass is replaced.

A sequence gets its first token as soon as it is there, and one more each 1 / BENCH_PACE seconds after that, at its own
phase. What a step would compute is made up; blocks, batches, frames and everything above them are real.
"""

import importlib.abc
import importlib.machinery
import os
import pathlib
import random
import select
import sys
import time

PERIOD = 1 / float(os.environ.get("BENCH_PACE", "20"))
GRID = 0.005  # seconds between two steps of a busy engine: tokens of a step travel together
BYTES = 512  # token ids below may stand for a part of a character, which no client sees before the rest is there
VOCABULARY = int(os.environ.get("BENCH_VOCABULARY", "150000"))
link = None  # the worker's socket, which may have something to do before the next token is due


class Paced:
    """Which sequence's next token is due when, on a grid."""

    def __init__(self, engine):
        self.batch = engine.Batch
        self.compose, self.remove = engine.Scheduler._compose, engine.Scheduler.remove
        self.due = {}
        self.random = random.Random(0)

    def chunks(self, scheduler, replica, rows):
        """Those of the model's chunks that are due; waits for one, or for a message, where none is."""
        now = time.monotonic()
        chunks = self.compose(scheduler, replica, rows)
        ready = [chunk for chunk in chunks if self.due.get(chunk.sequence, now) <= now]
        if chunks and not ready:
            soonest = min(self.due[chunk.sequence] for chunk in chunks)
            select.select([link] if link else [], [], [], soonest - now)
        return ready

    def next_batch(self, scheduler, rows):
        """As the scheduler's own, but a model of which nothing is due makes an empty batch: it is not stuck."""
        for replica in list(scheduler._turns):
            scheduler._turns.remove(replica)
            scheduler._turns.append(replica)
            return self.batch(replica, self.chunks(scheduler, replica, rows(replica)))
        return None

    def run(self, model, chunks, device):
        after = (time.monotonic() + PERIOD) // GRID * GRID + GRID
        self.due |= {sequence: after for sequence, tokens in chunks if tokens == sequence.missing}

    def draw(self, logits, sequences):
        return [self.random.randrange(BYTES, VOCABULARY) for _ in sequences]

    def forget(self, scheduler, sequence):
        self.due.pop(sequence, None)
        self.remove(scheduler, sequence)


def pace_engine(engine):
    """Replaces the forward pass and the sampler of `serverless_llm.engine.engine`."""
    paced = Paced(engine)
    engine.Scheduler.next_batch = lambda scheduler, rows: paced.next_batch(scheduler, rows)
    engine.Scheduler.remove = lambda scheduler, sequence: paced.forget(scheduler, sequence)
    engine.run, engine._draw = paced.run, paced.draw
    engine.Engine.step = timed(engine.Engine.step)


def timed(step):
    """Writes down the seconds of every step in which a sequence got its first token; such a step waits for nothing."""

    def timed_step(engine):
        began = time.monotonic()
        result = step(engine)
        if result.first:
            with pathlib.Path(os.environ["BENCH_STEPS"]).open("a") as log:
                log.write(f"{time.monotonic() - began}\n")
        return result

    return timed_step


def show_link(worker):
    begin = worker.Worker.__init__

    def init(self, socket, *rest):
        global link
        link = socket
        begin(self, socket, *rest)

    worker.Worker.__init__ = init


PATCHES = {"serverless_llm.engine.engine": pace_engine, "serverless_llm.node.worker": show_link}


class Patching(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if "BENCH_PACE" in os.environ:
    sys.meta_path.insert(0, Patching())
