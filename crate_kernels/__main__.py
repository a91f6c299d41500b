"""``python -m crate_kernels``: the command line, as torchrun starts it."""

from .cli import command

if __name__ == "__main__":
    command()
