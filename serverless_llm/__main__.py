"""`python -m serverless_llm`."""

import sys

from serverless_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
