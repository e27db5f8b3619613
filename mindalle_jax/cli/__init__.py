"""`mindalle VERB`: a thin layer over the functions that do the work. Results go to stdout, all else to stderr."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mindalle_jax
from mindalle_jax.cli.convert import add_convert_arguments, run_convert
from mindalle_jax.cli.logs import quiet_libraries
from mindalle_jax.cli.prepare_codes import add_prepare_codes_arguments, run_prepare_codes
from mindalle_jax.cli.sample import add_sample_arguments, run_sample
from mindalle_jax.cli.train import (
    add_run_arguments,
    add_tokenizer_arguments,
    run_clip,
    run_finetune,
    run_tokenizer,
    run_vqgan,
)
from mindalle_jax.errors import MindalleError, UsageError

VERBS: list[tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str]] = [
    ("sample", add_sample_arguments, run_sample, "draw images of prompts and write them to a folder"),
    ("finetune", add_run_arguments, run_finetune, "train a model on your own images, or resume a run"),
    ("train-vqgan", add_run_arguments, run_vqgan, "train the network that turns images into codes, or resume a run"),
    ("train-clip", add_run_arguments, run_clip, "train a CLIP model, which ranks images, or resume a run"),
    ("train-tokenizer", add_tokenizer_arguments, run_tokenizer, "make a tokenizer from the captions of a data set"),
    (
        "prepare-codes",
        add_prepare_codes_arguments,
        run_prepare_codes,
        "compute the codes of a data set once, so that fine-tuning need not run the VQGAN in every step",
    ),
    ("convert", add_convert_arguments, run_convert, "convert weights from PyTorch, or back to it, without PyTorch"),
]
"""Name, arguments, work and one-line help of each verb."""
TRAINING_MODULES = ("optax", "orbax", "grain", "tensorboardX")
"""Modules of the extra [train]."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (docs/cli.md has the table)."""
    arguments = _parser().parse_args(argv)
    with quiet_libraries(arguments.verbose):
        return run_reporting(f"mindalle {arguments.verb}", lambda: arguments.run(arguments))


def run_reporting(command: str, run: Callable[[], None]) -> int:
    """Calls `run` and returns the exit code; what goes wrong becomes one message that starts with `command`."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            run()
            return 0
        except MindalleError as error:
            print(f"{command}: {error}", file=sys.stderr)
            return error.exit_code
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in TRAINING_MODULES:
                raise
            print(f"{command}: needs {module}: pip install 'mindalle-jax[train]'", file=sys.stderr)
            return UsageError.exit_code
        except OSError as error:
            print(f"{command}: {error}", file=sys.stderr)
            return MindalleError.exit_code
        except KeyboardInterrupt:
            print(f"{command}: interrupted", file=sys.stderr)
            return 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are: not None, where the help says what that means, nor that a switch is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mindalle", description="minDALL-E in JAX: text to image.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {mindalle_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, add_arguments, run, text in VERBS:
        sub = verbs.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        add_arguments(sub)
        sub.add_argument("--verbose", action="store_true", help="show what JAX, Orbax and other libraries log")
        sub.set_defaults(run=run)
    return parser


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
