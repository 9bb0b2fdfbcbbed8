"""One start from a URL in a fresh process: `python -m bench.remote_once load|pull URL` prints a line of JSON.

Imports are done before the clock starts; requests for what is there, the disk tier and its last sync are inside.
"""

from __future__ import annotations

import json
import sys
import time

from bench.load_once import usage
from serverless_llm.loader import disk_tier, load_checkpoint


def main() -> None:
    way, url = sys.argv[1:]
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
