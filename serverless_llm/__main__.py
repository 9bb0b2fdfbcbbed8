"""`python -m serverless_llm`, and the script `serverless-llm`."""

from __future__ import annotations

import sys


def start() -> int:
    """Runs this process's command line; the exit status. Ctrl-C may come while all else is still being imported."""
    try:
        from serverless_llm.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(start())
