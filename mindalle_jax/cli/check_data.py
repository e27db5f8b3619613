"""`mindalle check-data`: looks at a data set before training."""

import argparse
import sys
from typing import TYPE_CHECKING

from mindalle_jax.cli.parser import add_path
from mindalle_jax.errors import DataError, OutputError, UsageError, printable
from mindalle_jax.storage.files import check_writable, disk_errors

if TYPE_CHECKING:
    from mindalle_jax.data.samples import DataTask, Source
    from mindalle_jax.text.tokenizer import TextTokenizer

EXAMPLE = """
mindalle check-data photos
mindalle check-data photos --model minDALL-E/1.3B --sheet photos.png
"""


def add_check_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle check-data`."""
    parser.add_argument("data", metavar="DATA", help="a folder, tar files or a table of images, as data.train takes it")
    text = "a model whose tokenizer reads the captions, as for mindalle sample; its task is checked"
    parser.add_argument("-m", "--model", help=text)
    parser.add_argument(
        "--task",
        choices=["text", "class", "unconditional"],
        help="text takes images with captions, class those with a label, unconditional all (default: that of --model, "
        "else the first that the data fits)",
    )
    parser.add_argument("--image-column", metavar="NAME", help="field with the image (default: a usual name)")
    parser.add_argument("--caption-column", metavar="NAME", help="field with the captions (default: a usual name)")
    parser.add_argument("--valid", action="store_true", help="look at the validation split")
    add_path(parser, "--sheet", metavar="FILE", help="write a sheet of 64 images with their captions to this PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --sheet")


def run_check_data(arguments: argparse.Namespace) -> None:
    """Runs `mindalle check-data`. Prints one line per fact; warnings are lines that begin with "warning:"."""
    from mindalle_jax.data.check import check_images, contact_sheet, describe

    sheet = arguments.sheet
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet must be the name of a .png, not {str(sheet)!r}")
        if sheet.exists() and not arguments.overwrite:
            raise OutputError(f"{sheet} exists; name another file or pass --overwrite")
        check_writable(sheet.absolute().parent)
    tokenizer, task = None, arguments.task
    if arguments.model is not None:
        tokenizer, task = _tokenizer(arguments.model, task)
    source = _open(arguments, task)
    for line in [f"task: {source.task}", *describe(source, tokenizer)]:
        print(printable(line))
    if source.has_codes:
        return
    checked = check_images(source, progress=sys.stderr.isatty())
    for line in checked.lines():
        print(printable(line))
    if sheet is not None:
        with disk_errors(sheet):
            contact_sheet(source).save(sheet)
        print(f"sheet: {sheet}")
    if not checked.readable:
        raise DataError(f"{arguments.data}: none of the {len(source):,} images can be read")


def _tokenizer(name: str, task: "DataTask | None") -> "tuple[TextTokenizer | None, DataTask]":
    """Returns the tokenizer of a model (None without text) and the task: the given one, or that of the model."""
    from mindalle_jax.config.file import load_config
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.text.tokenizer import TextTokenizer

    folder = find_model(name)
    config = load_config(folder / "config.yaml")
    if config.image_only:
        return None, task or ("class" if config.stage2.use_cls_cond else "unconditional")
    tokenizer = TextTokenizer(folder / "tokenizer", config.stage2.hparams.ctx_len_txt, config.stage2.vocab_size_txt)
    return tokenizer, task or "text"


def _open(arguments: argparse.Namespace, task: "DataTask | None") -> "Source":
    """Opens the data for its task, or for the first task that it fits. Raises DataError as for the first one."""
    from mindalle_jax.data.records import Columns
    from mindalle_jax.data.samples import TASKS
    from mindalle_jax.data.sources import open_source

    columns = Columns(arguments.image_column, arguments.caption_column)
    errors = []
    tasks = TASKS if task is None else (task,)
    for one in tasks:
        try:
            return open_source(arguments.data, one, split="valid" if arguments.valid else "train", columns=columns)
        except DataError as error:
            errors.append(error)
    raise errors[0]
