"""`mindalle VERB`: a thin layer over the functions that do the work. Results go to stdout, all else to stderr."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mindalle_jax
from mindalle_jax.cli import check_data, configs, convert, export_checkpoint, prepare_codes, sample, show, train
from mindalle_jax.cli.logs import quiet_libraries
from mindalle_jax.cli.parser import HelpFormatter, Parser
from mindalle_jax.errors import MindalleError, UsageError, did_you_mean, install_hint, printable
from mindalle_jax.runtime.signals import note_interrupts


class Verb(NamedTuple):
    """One command."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    help: str
    example: str


VERBS = {
    "sample": Verb(
        sample.add_sample_arguments,
        sample.run_sample,
        "sample images of prompts, and write them to a folder",
        sample.EXAMPLE,
    ),
    "show": Verb(
        show.add_show_arguments,
        show.run_show,
        "show how an image was made, and how to make it again",
        show.EXAMPLE,
    ),
    "finetune": Verb(
        train.add_run_arguments,
        train.run_finetune,
        "train a model on your own images, or resume a run",
        train.FINETUNE_EXAMPLE,
    ),
    "export-checkpoint": Verb(
        export_checkpoint.add_export_checkpoint_arguments,
        export_checkpoint.run_export_checkpoint,
        "make a model from a checkpoint, also of an unfinished run",
        export_checkpoint.EXAMPLE,
    ),
    "train-vqgan": Verb(
        train.add_run_arguments,
        train.run_vqgan,
        "train a VQGAN, which turns images into codes, or resume",
        train.VQGAN_EXAMPLE,
    ),
    "train-clip": Verb(
        train.add_run_arguments,
        train.run_clip,
        "train a CLIP model, which ranks images, or resume",
        train.CLIP_EXAMPLE,
    ),
    "train-tokenizer": Verb(
        train.add_tokenizer_arguments,
        train.run_tokenizer,
        "make a tokenizer from the captions of a data set",
        train.TOKENIZER_EXAMPLE,
    ),
    "check-data": Verb(
        check_data.add_check_data_arguments,
        check_data.run_check_data,
        "look at a data set before training",
        check_data.EXAMPLE,
    ),
    "configs": Verb(
        configs.add_configs_arguments,
        configs.run_configs,
        "list the presets for --config, or print one",
        configs.EXAMPLE,
    ),
    "prepare-codes": Verb(
        prepare_codes.add_prepare_codes_arguments,
        prepare_codes.run_prepare_codes,
        "compute the codes of a data set before training",
        prepare_codes.EXAMPLE,
    ),
    "convert": Verb(
        convert.add_convert_arguments,
        convert.run_convert,
        "convert weights from PyTorch, or back to it, without PyTorch",
        convert.EXAMPLE,
    ),
}
OTHER_WORDS = {
    "train": "finetune",
    "generate": "sample",
    "draw": "sample",
    "export": "convert",
    "info": "show",
    "presets": "configs",
}
"""Other words that people type -> the verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (docs/cli.md has the table)."""
    if argv is None:
        argv = sys.argv[1:]
        _prepare_streams()
    if not argv or argv[0].startswith("-") or argv[0] not in VERBS:
        return _without_verb(argv)
    parser = verb_parser(argv[0])
    arguments = parser.parse(argv[1:])
    with quiet_libraries(arguments.verbose), note_interrupts() as arguments.interrupts:
        return run_reporting(parser.prog, lambda: VERBS[argv[0]].run(arguments), parser.as_typed)


def _prepare_streams() -> None:
    """Opens standard streams that are closed, and lets every character be printed in every locale."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def verb_parser(name: str) -> Parser:
    """The parser of a verb."""
    verb = VERBS[name]
    parser = Parser(f"mindalle {name}", f"{verb.help[0].upper()}{verb.help[1:]}.", verb.example)
    verb.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="show what JAX, Orbax and other libraries log")
    return parser


def run_reporting(command: str, run: Callable[[], None], as_typed: Callable[[str], str] = str) -> int:
    """Calls `run` and returns the exit code; what goes wrong becomes one message that starts with `command`.

    as_typed: turns names of Python's options into those of the command line.
    """

    def report(message: Any, code: int) -> int:
        print(printable(f"{command}: {message}"), file=sys.stderr)
        return code

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        print(printable(f"warning: {as_typed(str(message))}"), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            run()
            sys.stdout.flush()  # here, where a reader that has left is no error
            return 0
        except MindalleError as error:
            return report(as_typed(str(error)), error.exit_code)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in train.TRAINING_MODULES:
                raise
            return report(f"needs {module}: {install_hint('train')}", UsageError.exit_code)
        except BrokenPipeError:  # who reads has seen enough
            sys.stdout = open(os.devnull, "w")  # or Python complains at its end
            return 0
        except OSError as error:
            return report(error, MindalleError.exit_code)
        except KeyboardInterrupt as interruption:
            return report(interruption if interruption.args else "interrupted", 130)


def _without_verb(argv: Sequence[str]) -> int:
    """`mindalle` alone, --help, --version, or a mistake."""
    width = max(map(len, VERBS)) + 2
    parser = argparse.ArgumentParser(
        prog="mindalle",
        usage="mindalle VERB ...",
        description="minDALL-E in JAX: text to image.",
        epilog="verbs:\n"
        + "\n".join(f"  {name:{width}}{verb.help}" for name, verb in VERBS.items())
        + '\n\nexample:\n  mindalle sample "a parrot, 3d style"\n\n'
        "mindalle VERB --help lists the options of a verb.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {mindalle_jax.__version__}")
    if argv and argv[0] not in ("-h", "--help", "--version"):
        given = argv[0]
        if given.startswith("--") and (near := did_you_mean(given, ("--help", "--version"))):
            hint = f"unknown option {given}{near}"
        elif given.startswith("-") or " " in given:
            hint = 'a verb comes first, as in mindalle sample "a red apple"'
        else:
            near = did_you_mean(OTHER_WORDS.get(given, given), VERBS)
            hint = f"there is no verb {given}{near or '; mindalle --help lists them'}"
        print(printable(f"mindalle: {hint}"), file=sys.stderr)
        return UsageError.exit_code
    parser.parse_args(argv or ["--help"])
    return 0
