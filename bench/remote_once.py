"""One start from a URL in a fresh process: `python -m bench.remote_once load|pull URL BYTES` prints a line of JSON.

Imports are done before the clock starts, what they left is collected, and the host has the `BYTES` of memory that a
load takes; requests for what is there, taking that memory, the disk tier and its last sync are inside.
"""

from __future__ import annotations

import gc
import json
import sys
import time

from bench.load_once import usage
from bench.pretouch import pretouch
from serverless_llm.loader import disk_tier, load_checkpoint


def main() -> None:
    way, url, nbytes = sys.argv[1:]
    if way == "load":
        pretouch(int(nbytes))
    gc.collect()  # 0.1 s after an import of torch, which comes at some time anyway
    cpu_s = next(usage())
    began = time.perf_counter()
    if way == "load":
        load_checkpoint(url)
    else:
        disk_tier.tier().bring(url, lambda name, done, total: None).close()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "cpu_s": next(usage()) - cpu_s}))


if __name__ == "__main__":
    main()
