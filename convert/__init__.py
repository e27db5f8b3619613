"""Thin scripts with sources, checksums and commands; the work is `mindalle convert`."""

import argparse

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.convert import add_convert_arguments, run_convert


def run_script(name: str, doc: str | None) -> int:
    """Runs `mindalle convert` with the arguments of a script of this folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_convert_arguments(parser)
    arguments = parser.parse_args()
    return run_reporting(name, lambda: run_convert(arguments))
