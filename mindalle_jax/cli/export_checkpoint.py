"""`mindalle export-checkpoint`: a model from a checkpoint of a run."""

import argparse

from mindalle_jax.cli.parser import add_path
from mindalle_jax.errors import UsageError

EXAMPLE = """
mindalle export-checkpoint runs/cats cats-now
mindalle export-checkpoint runs/cats cats-best --step best
"""


def add_export_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle export-checkpoint`."""
    add_path(parser, "run_dir", metavar="RUN", help="folder of a run of mindalle finetune, also of one that runs")
    add_path(parser, "target", metavar="DST", help="the folder to make")
    text = "last: the newest checkpoint; best: that with the lowest validation loss; or the number of a step"
    parser.add_argument("--step", default="last", metavar="STEP", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")


def run_export_checkpoint(arguments: argparse.Namespace) -> None:
    """Runs `mindalle export-checkpoint`."""
    from mindalle_jax.training.export import export_checkpoint

    step = arguments.step
    if step not in ("last", "best"):
        if not step.isdecimal():
            raise UsageError(f"--step must be last, best or the number of a step, not {step!r}")
        step = int(step)
    told = export_checkpoint(arguments.run_dir, arguments.target, step=step, overwrite=arguments.overwrite)
    print(f'{told}; mindalle sample "..." --model {arguments.target}')
