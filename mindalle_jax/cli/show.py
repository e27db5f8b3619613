"""`mindalle show`: prints how an image was made, and the command that makes it again."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindalle_jax.cli.parser import path
from mindalle_jax.errors import UsageError, printable

if TYPE_CHECKING:
    from mindalle_jax.sampling.image_file import ImageRecord

EXAMPLE = "mindalle show out/a-red-apple-seed0/rank001_score0.7886_seed0_candidate001.png"


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle show`."""
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help="a PNG that mindalle wrote")


def run_show(arguments: argparse.Namespace) -> None:
    """Prints the record of each file."""
    from mindalle_jax.sampling.image_file import read_image_record

    for file in arguments.files:
        record = read_image_record(file)
        settings = {key: value for key, value in record.settings.items() if value not in (None, False)}
        rows = {
            "file": file,
            "prompt": record.prompt,
            "seed": f"{record.seed}, candidate {record.candidate}",
            "score": None if record.score is None else f"{record.score:.4f}, {settings.get('ranker')}",
            "model": f"{settings.get('model')}, sha256 {settings.get('model_sha256')}",
            "computed in": f"{settings.get('dtype')} on {settings.get('devices')} x {settings.get('device')}",
            "versions": _listed(settings.get("versions")),
        }
        command = remake_command(record, file)
        for name, value in rows.items():
            if value is not None:
                print(f"{name:12} {printable(' '.join(str(value).splitlines()))}")
        print(command)


def remake_command(record: "ImageRecord", file: Path) -> str:
    """Returns the `mindalle sample` command that makes an image again, bit for bit on the same kind of device.

    The command samples all candidates up to this one; the image is the last file that it writes. Raises UsageError if
    the record holds settings that no command can have.
    """
    from mindalle_jax.sampling.options import SamplingOptions, check_quantize
    from mindalle_jax.text.tokenizer import check_prompt

    settings = record.settings
    names = ("top_k", "top_p", "temperature", "guidance_scale", "batch_size", "mixed_batches", "jacobi")
    try:
        chosen = {name: settings[name] for name in names} | {
            "num_candidates": record.candidate + 1,
            "seed": record.seed,
        }
        options = SamplingOptions.of(**chosen).check()
        check_quantize(settings["quantize"])
        keep_rows, class_id, revision = settings["keep_rows"], settings.get("class_id"), settings.get("revision")
        model, dtype = settings["model"], settings["dtype"]
        numbers = [number for number in (options.top_k, keep_rows, class_id) if number is not None]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise UsageError("top_k, keep_rows or class_id is out of range")
        if dtype not in ("float32", "bfloat16") or not isinstance(model, str) or not isinstance(revision, str | None):
            raise UsageError("dtype, model or revision is out of range")
        check_prompt(record.prompt)
    except (KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{file}: its settings are damaged: {error}") from None
    if "class_id" not in settings and not record.prompt.strip():
        return "# no command: a blank prompt can be sampled only from Python, with allow_empty=True"
    words: list[Any] = ["mindalle", "sample"]
    if class_id is not None:
        words += ["--class-id", class_id]
    elif "class_id" not in settings:
        words.append(f"--prompt={record.prompt}" if record.prompt.startswith("-") else record.prompt)
    words += [f"--model={model}"] if model.startswith("-") else ["--model", model]
    words += [f"--revision={revision}"] if revision else []
    words += ["--seed", options.seed, "--num-candidates", options.num_candidates, "--batch-size", options.batch_size]
    words += ["--top-k", "off" if options.top_k is None else options.top_k]
    words += ["--top-p", "off" if options.top_p is None else options.top_p, "--temperature", options.temperature]
    if options.guided:
        words += ["--guidance-scale", options.guidance_scale]
    words += [word for word, on in (("--mixed-batches", options.mixed_batches), ("--jacobi", options.jacobi)) if on]
    words += ["--dtype", dtype, *(["--quantize", settings["quantize"]] if settings["quantize"] else [])]
    words += ["--vary", file, "--keep-rows", keep_rows] if keep_rows else []
    return " ".join(_quoted(str(word)) for word in [*words, "--ranker", "off"])


def _listed(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _quoted(word: str) -> str:
    """Quotes a word for a shell; control characters are escaped, in bash's $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    # Quotes and backslashes are escaped too, so a shell without $'...' also reads one quoted word.
    plain = {c for c in word if c.isprintable() and c not in "'\\"}
    return "$'" + "".join(c if c in plain else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word) + "'"
