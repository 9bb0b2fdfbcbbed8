"""`python -m serverless_llm`, and the script `serverless-llm`."""

from __future__ import annotations

import sys


def start() -> int:
    """Runs this process's command line; the exit status. Ctrl-C may come while all else is still being imported.

    A package may be missing where the project was installed for its loader alone.
    """
    try:
        from serverless_llm.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "serverless_llm":
            raise
        needed = f"serverless-llm needs {error.name}: in a clone of this project, pip install -c constraints.txt ."
        print(f"Error: {needed}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(start())
