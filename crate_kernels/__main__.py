"""``python -m crate_kernels``: the command line, as torchrun starts it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
