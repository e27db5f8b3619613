"""`mindalle VERB`: a thin layer over the functions that do the work. Results go to stdout, all else to stderr."""

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindalle_jax.errors import MindalleError, OutputError, UsageError
from mindalle_jax.files import check_output, check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (docs/cli.md has the table)."""
    arguments = _parser().parse_args(argv)
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
        except OSError as error:
            print(f"{command}: {error}", file=sys.stderr)
            return MindalleError.exit_code
        except KeyboardInterrupt:
            print(f"{command}: interrupted", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mindalle", description="minDALL-E in JAX: text to image.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sample = verb("sample", _sample, "draw pictures of prompts and write them to a folder")
    sample.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; each prompt gets its own pictures")
    sample.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, UTF-8")
    sample.add_argument(
        "--model", required=True, help="a converted folder, a folder in the original's format, or minDALL-E/1.3B"
    )
    sample.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the pictures go; a new folder")
    sample.add_argument("--overwrite", action="store_true", help="replace files of the same names in --out")
    sample.add_argument("--class-id", type=int, help="class to draw, for a class-conditional image-only model")
    sample.add_argument("--num-candidates", type=int, default=16, metavar="N", help="pictures a prompt")
    sample.add_argument("--batch-size", type=int, metavar="B", help="candidates drawn at once (None: by the device)")
    sample.add_argument(
        "--top-k",
        type=_or_off(int),
        default=argparse.SUPPRESS,
        help="draw among the K most likely codes, or off (default: 256, or all codes where there are fewer)",
    )
    sample.add_argument(
        "--top-p", type=_or_off(float), default="off", help="draw among the codes that make up P, or off"
    )
    sample.add_argument("--temperature", type=float, default=1.0, help="under 1 is more careful; 0 is greedy")
    sample.add_argument("--seed", default="0", help="0 to 4294967295, or random")
    sample.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute dtype (None: float32 on CPU)")

    convert = verb("convert", run_convert, "convert weights from PyTorch, or back to it, without PyTorch")
    add_convert_arguments(convert)
    return parser


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle convert`, shared with `python -m convert.mindalle`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder in the original's format, a transfer or VQGAN .ckpt, or a name (minDALL-E/1.3B is downloaded); "
        "with --to torch a converted folder",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=["jax", "torch"], default="jax", help="the format to make")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml, where it is not beside the weights")
    parser.add_argument(
        "--download-from", metavar="URL", help="another source of the same archive: a URL or a local file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST, if it is a model folder")


def run_convert(arguments: argparse.Namespace) -> None:
    """What `mindalle convert` does."""
    from mindalle_jax.interop.download import RELEASES, fetch_release
    from mindalle_jax.interop.mindalle import MODEL_MARKS, export_checkpoint, import_checkpoint

    check_output(arguments.target, arguments.overwrite, MODEL_MARKS)  # before gigabytes are downloaded
    source = arguments.source
    if arguments.to == "torch":
        print(export_checkpoint(source, arguments.target, overwrite=arguments.overwrite))
        return
    if source in RELEASES and not Path(source).exists():
        source = fetch_release(source, source=arguments.download_from)
    elif arguments.download_from:
        raise UsageError(f"--download-from goes with a name to download ({', '.join(RELEASES)}), not {source!r}")
    print(import_checkpoint(source, arguments.target, config=arguments.config, overwrite=arguments.overwrite))


def _sample(arguments: argparse.Namespace) -> None:
    prompts = list(arguments.prompts)
    if arguments.prompts_file:
        prompts += _read_prompts(arguments.prompts_file)
    out: Path = arguments.out
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is blank")
    check_writable(out)
    if not arguments.overwrite and out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty; name another place or pass --overwrite")

    from mindalle_jax.config import load_config
    from mindalle_jax.interop.mindalle import find_model
    from mindalle_jax.pipeline import Dalle, ImageGPT, check_batch_size, class_prefix
    from mindalle_jax.sampling import DEFAULT_TOP_K, Settings, check_num_candidates
    from mindalle_jax.tokenizer import TextTokenizer

    options: dict[str, Any] = {
        "top_k": getattr(arguments, "top_k", DEFAULT_TOP_K),
        "top_p": arguments.top_p,
        "temperature": arguments.temperature,
        "seed": _seed(arguments.seed),
    }
    check_num_candidates(arguments.num_candidates)
    check_batch_size(arguments.batch_size)
    folder = find_model(arguments.model)
    config = load_config(folder / "config.yaml")
    # Whatever can be wrong is told before gigabytes are loaded.
    options["seed"] = Settings.make(config.stage2.vocab_size_img, **options).seed  # one for all prompts
    if config.image_only and prompts:
        raise UsageError(f"{folder} draws without text; it takes --class-id at most, not a prompt")
    if not config.image_only and arguments.class_id is not None:
        raise UsageError(f"{folder} draws from text; --class-id is for image-only models")
    if not config.image_only and not prompts:
        raise UsageError("no prompt was given; write one in quotes, or name a file with --prompts-file")
    if config.image_only:
        class_prefix(config.stage2, None if arguments.class_id is None else [arguments.class_id], 1)
    elif (folder / "tokenizer").is_dir():  # not so in the folder of a VQGAN, which is refused below
        TextTokenizer(folder / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)(prompts)
    options |= {
        "num_candidates": arguments.num_candidates,
        "batch_size": arguments.batch_size,
        "progress": True,
    }
    start = time.perf_counter()
    if config.image_only:
        model = ImageGPT.from_pretrained(folder, dtype=arguments.dtype)
        _say_device(model, time.perf_counter() - start)
        _finish(model.generate(arguments.class_id, **options), out, arguments.overwrite)
        return
    model = Dalle.from_pretrained(folder, dtype=arguments.dtype)
    _say_device(model, time.perf_counter() - start)
    if len(prompts) == 1:
        _finish(model.generate(prompts[0], **options), out, arguments.overwrite)
        return
    for i, prompt in enumerate(prompts):
        # Written prompt by prompt: a long list needs no more memory than one, and an interruption loses one.
        _finish(model.generate(prompt, **options), out / f"{i:03d}-{_slug(prompt)}", arguments.overwrite)


def _finish(generation: Any, folder: Path, overwrite: bool) -> None:
    paths = generation.save(folder, overwrite=overwrite)
    print(f"{len(paths)} pictures, {folder / 'grid.png'} and {folder / 'meta.json'}")


def _say_device(model: Any, load_s: float) -> None:
    device = model.mesh.devices.flat[0]
    print(f"{model.folder.name}, loaded in {load_s:.1f} s; {device.device_kind} ({model.backend}), {model.dtype}",
          file=sys.stderr)  # fmt: skip
    if model.backend == "cpu":
        print(
            "No GPU or TPU is in use. For an NVIDIA GPU install the CUDA build: pip install 'mindalle-jax[cuda]'",
            file=sys.stderr,
        )


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path}: holds no prompt")
    return prompts


def _seed(text: str) -> int | None:
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--seed must be an integer in [0, 4294967296), or random; not {text!r}") from None


def _or_off(kind: type) -> Callable[[str], Any]:
    """An argument that is a number, or `off` for None."""

    def parse(text: str) -> Any:
        return None if text == "off" else kind(text)

    parse.__name__ = f"{kind.__name__} or off"
    return parse


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
