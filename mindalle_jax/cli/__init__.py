"""`mindalle VERB`: a thin layer over the functions that do the work. Results go to stdout, all else to stderr."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindalle_jax.cli.convert import add_convert_arguments, run_convert
from mindalle_jax.cli.logs import quiet_libraries
from mindalle_jax.cli.prepare_codes import add_prepare_codes_arguments, run_prepare_codes
from mindalle_jax.cli.sample import _or_off, _sample
from mindalle_jax.cli.train import _finetune, _train_clip, _train_tokenizer, _train_vqgan
from mindalle_jax.errors import MindalleError, UsageError
from mindalle_jax.storage.files import DEMO

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
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mindalle", description="minDALL-E in JAX: text to image.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        sub.set_defaults(run=run)
        return sub

    sample = verb("sample", _sample, "draw pictures of prompts and write them to a folder")
    what = sample.add_argument_group("what to draw")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; each prompt gets its own pictures")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, UTF-8")
    what.add_argument("--class-id", type=int, metavar="C", help="class, for a class-conditional image-only model")
    what.add_argument("--num-candidates", type=int, default=16, metavar="N", help="pictures a prompt")
    what.add_argument("--seed", default="0", help="0 to 4294967295, or random")
    what.add_argument("--image", type=Path, metavar="FILE", help="complete this picture below its --keep-rows")
    what.add_argument(
        "--vary",
        type=Path,
        metavar="FILE",
        help="as --image, for a picture that this command wrote, from its exact codes",
    )
    what.add_argument(
        "--keep-rows", type=int, metavar="K", help="rows of codes to keep from the top of --image or --vary"
    )

    how = sample.add_argument_group("how to draw")
    how.add_argument(
        "--model",
        default=DEMO.name,
        help="demo (small, in the package: coloured shapes), a converted folder, a folder in the original's format, "
        "minDALL-E/1.3B, or OWNER/NAME on the Hugging Face hub (its cache alone with HF_HUB_OFFLINE=1 in the "
        "environment)",
    )
    how.add_argument("--revision", metavar="REV", help="branch, tag or commit of a --model on the hub")
    how.add_argument(
        "--top-k",
        type=_or_off(int),
        default=argparse.SUPPRESS,
        metavar="K",
        help="draw among the K most likely codes, or off (default: 256, or all codes where there are fewer)",
    )
    how.add_argument(
        "--top-p", type=_or_off(float), default="off", metavar="P", help="draw among the codes that make up P, or off"
    )
    how.add_argument("--temperature", type=float, default=1.0, metavar="T", help="under 1 is more careful; 0 is greedy")
    how.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="over 1 follows the prompt more closely; for models fine-tuned with caption dropout; 1 is off",
    )
    how.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="candidates drawn at once; fewer take less memory (default: by the device)",
    )
    how.add_argument(
        "--jacobi",
        action="store_true",
        help="draw a row of codes at once, again and again until nothing changes: the same codes in fewer passes, "
        "for one candidate or a few",
    )
    how.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="compute dtype (default: float32 on CPU, bfloat16 elsewhere)"
    )

    how.add_argument(
        "--quantize",
        choices=["weights", "weights+cache"],
        help="int8 for the transformer's matrices, and for the keys and values of what is drawn: half the memory",
    )

    output = sample.add_argument_group("what to write")
    output.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go; a new folder")
    output.add_argument("--overwrite", action="store_true", help="replace files of the same names in --out")
    output.add_argument(
        "--warmup",
        action="store_true",
        help="draw once and keep nothing, to compile what the other options take; needs no prompt and no --out",
    )
    output.add_argument(
        "--ranker",
        help="what orders the pictures: a CLIP model (a Hugging Face folder, or a hub id such as "
        "openai/clip-vit-base-patch32), likelihood (the transformer's own), or off (default: the CLIP model in the "
        "folder `ranker` of --model where there is one, else off)",
    )
    output.add_argument("--best", type=int, metavar="K", help="write at most the K best of each prompt (default: all)")
    output.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="after every N codes rewrite preview.png in --out (default: never)",
    )

    for train in (
        verb("finetune", _finetune, "train a model on your own pictures, or go on with a run"),
        verb("train-vqgan", _train_vqgan, "train the network that turns pictures into codes, or go on with a run"),
        verb("train-clip", _train_clip, "train a CLIP model, which ranks pictures, or go on with a run"),
    ):
        text = "changes to the configuration, as data.train=photos"
        train.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
        train.add_argument("--config", required=True, type=Path, metavar="FILE", help="configs/ has some to start from")
        text = "folder of the run, in the end a model; if a run is there, it goes on"
        train.add_argument("--out", required=True, type=Path, metavar="DIR", help=text)
        text = "go on although the data set has changed since the checkpoint"
        train.add_argument("--ignore-fingerprint", action="store_true", help=text)
        train.add_argument(
            "--distributed",
            action="store_true",
            help="this is one of several processes with the same --out (docs/fine-tuning.md, Several processes)",
        )

    tokenizer = verb("train-tokenizer", _train_tokenizer, "make a tokenizer from the captions of a data set")
    tokenizer.add_argument("data", metavar="DATA", help="a folder or tars of pictures with captions, as for finetune")
    tokenizer.add_argument("--out", required=True, type=Path, metavar="DIR", help="where its files go; a new folder")
    tokenizer.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens at most")
    tokenizer.add_argument(
        "--kind",
        required=True,
        choices=["mindalle", "clip"],
        help="for the transformer that draws, or for a CLIP model",
    )

    text = "compute the codes of a data set once, so that fine-tuning need not run the VQGAN in every step"
    add_prepare_codes_arguments(verb("prepare-codes", run_prepare_codes, text))

    convert = verb("convert", run_convert, "convert weights from PyTorch, or back to it, without PyTorch")
    add_convert_arguments(convert)

    for sub in verbs.choices.values():
        sub.add_argument("--verbose", action="store_true", help="show what JAX, Orbax and other libraries log")
    return parser


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
