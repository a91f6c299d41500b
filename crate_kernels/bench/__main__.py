"""``python -m crate_kernels.bench``: the subcommand ``crate-kernels bench`` without the installed script."""

import argparse
import sys

from . import command

parser = argparse.ArgumentParser(prog="crate-kernels bench", description=command.__doc__)
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args()))
