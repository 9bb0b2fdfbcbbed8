"""A peer's start, from imports to its first token, in a process of its own; run by `bench/cold_start.py`.

`python bench/starts.py PEER DEVICE ARCHITECTURE FD`, with the Python that has the peer; this file needs nothing else.
It imports the peer, says `{"ready": true}` on descriptor FD, waits for one line of JSON on standard input (`directory`
and `prompts`), answers the prompts with one token each, and says what that took. Then it stays until its input ends,
so that the bytes that it read can be counted. Times in milliseconds.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

Answer = Callable[[str], object]  # one token to one prompt


def transformers(device: str, architecture: str) -> Callable[[str], Answer]:
    import torch
    import transformers

    kind = getattr(transformers, architecture)  # else its modules are imported while it loads

    def load(directory: str) -> Answer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        place = {"device_map": device} if device != "cpu" and find_spec("accelerate") else {}
        model = kind.from_pretrained(directory, dtype=torch.bfloat16, **place).to(device)

        def answer(prompt: str) -> object:
            inputs = tokenizer(prompt, return_tensors="pt").to(device)
            return model.generate(**inputs, max_new_tokens=1, do_sample=False).tolist()

        return answer

    return load


def vllm(_device: str, _architecture: str) -> Callable[[str], Answer]:
    from vllm import LLM, SamplingParams

    def load(directory: str) -> Answer:
        model = LLM(model=directory, dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=4)
        sampling = SamplingParams(max_tokens=1, temperature=0)
        return lambda prompt: model.generate(prompt, sampling, use_tqdm=False)

    return load


PEERS: dict[str, Callable[[str, str], Callable[[str], Answer]]] = {"transformers": transformers, "vllm": vllm}


def main() -> None:
    peer, device, architecture, descriptor = sys.argv[1:]
    with os.fdopen(int(descriptor), "w", buffering=1) as out:

        def say(**what: Any) -> None:
            out.write(json.dumps(what) + "\n")

        load = PEERS[peer](device, architecture)
        say(ready=True)
        line = sys.stdin.readline()
        if not line:
            return
        order = json.loads(line)
        began = time.perf_counter()
        answer = load(order["directory"])
        times = [time.perf_counter()]
        for prompt in order["prompts"]:
            answer(prompt)
            times.append(time.perf_counter())
            if len(times) == 2:
                say(load_ms=1000 * (times[0] - began), first_ms=1000 * (times[1] - times[0]))
        say(warm_ms=[1000 * (end - start) for start, end in pairwise(times[1:])])
        sys.stdin.read()


if __name__ == "__main__":
    main()
