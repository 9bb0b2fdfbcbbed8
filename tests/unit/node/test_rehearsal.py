"""The forkserver's rehearsal: it must leave a process that can be forked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from serverless_llm.node import rehearsal


def test_every_served_type_is_rehearsed() -> None:
    threads = torch.get_num_threads()
    rehearsal.rehearse()
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_no_thread_is_left_that_would_be_missing_in_a_fork() -> None:
    code = """
import os
from serverless_llm.node import forkserver
forkserver.warm()
print(len(os.listdir("/proc/self/task")))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1"]
