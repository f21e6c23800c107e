"""`python -m mechinterp_cli` is `mechinterp`."""

import sys

from mechinterp_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
