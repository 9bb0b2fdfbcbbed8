"""What surrounds a process."""

from __future__ import annotations

import subprocess
import sys

from serverless_llm.node.processes import environment


def test_a_process_takes_the_descriptors_that_there_are() -> None:
    script = (
        "import resource; from serverless_llm.surroundings import take_descriptors;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256)); print(take_descriptors(), take_descriptors(),"
        "*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, check=True)
    assert done.stdout == b"256 256 256 256\n"
