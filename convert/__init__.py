"""Scripts that name sources, checksums and commands; `mindalle convert` does the work."""

import sys

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.convert import add_convert_arguments, run_convert
from mindalle_jax.cli.parser import Parser


def run_script(name: str, doc: str | None) -> int:
    """Runs `mindalle convert` with the arguments of a script of this folder; returns the exit code."""
    parser = Parser(f"python -m {name}", doc or "")
    add_convert_arguments(parser)
    arguments = parser.parse(sys.argv[1:])
    return run_reporting(name, lambda: run_convert(arguments), parser.as_typed)
