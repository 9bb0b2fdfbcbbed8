"""One start of vLLM with one load format: `python vllm_once.py FORMAT DIRECTORY` prints a line of JSON.

Run by `bench/vllm_formats.py` with the Python that has vLLM; this file needs nothing else. `load_s` is the time that
the format's loader took to put the weights into the model.
"""

import json
import sys
import time
from typing import Any

PROMPT, TOKENS = "the quick brown fox jumps over the lazy dog", 24


def main() -> None:
    load_format, directory = sys.argv[1:]
    from vllm import LLM, SamplingParams
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    kind = type(get_model_loader(LoadConfig(load_format=load_format)))
    load_weights, took = kind.load_weights, []

    def timed(self: Any, *arguments: Any) -> None:
        began = time.perf_counter()
        load_weights(self, *arguments)
        took.append(time.perf_counter() - began)

    kind.load_weights = timed
    model = LLM(
        model=directory,
        load_format=load_format,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
    )
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answer = model.generate(PROMPT, sampling, use_tqdm=False)[0].outputs[0]
    print(json.dumps({"load_s": sum(took), "tokens": list(answer.token_ids)}))


if __name__ == "__main__":
    main()
