"""What does a server that nobody asks cost? CPU of all its processes with a hundred models, as % of one core."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.common import demand_quiet, row, write_results
from serverless_llm.demo.tasks import NAMES, checkpoint_dir
from tests.serving import Server

MODELS = 100
OPTIONS = ("--nodes", "2", "--devices", "cpu:1", "--device-memory", "64MiB", "--dram", "64MiB")
WARM = 3  # models that are resident


def cpu_seconds(server: Server) -> float:
    times = [process.cpu_times() for process in server.processes()]
    return sum(one.user + one.system for one in times)


def deploy(server: Server, models: int) -> None:
    for number in range(models):
        server.put(f"/admin/models/m{number}", {"source": str(checkpoint_dir(NAMES[number % len(NAMES)]))})
    for number in range(WARM):
        body = {"model": f"m{number}", "messages": [{"role": "user", "content": "7"}], "max_tokens": 4}
        server.put("/v1/chat/completions", body, "POST")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sample")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="one short sample")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds, samples = (1.0, 1) if arguments.smoke else (arguments.seconds, arguments.samples)
    demand_quiet(arguments.smoke)
    shares = []
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "state", *OPTIONS) as server:
        deploy(server, 10 if arguments.smoke else MODELS)
        time.sleep(seconds)
        for _ in range(samples):
            before, began = cpu_seconds(server), time.monotonic()
            time.sleep(seconds)
            shares.append(100 * (cpu_seconds(server) - before) / (time.monotonic() - began))
            print(f"{shares[-1]:.2f} % of a core", flush=True)
    if arguments.json:
        write_results(
            arguments.json, "idle", vars(arguments), [row("100 models", "ours", "cpu", "% of a core", shares)]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
