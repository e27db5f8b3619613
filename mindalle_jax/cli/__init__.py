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
from mindalle_jax.storage.files import DEMO, RANKER, check_output, check_writable


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

    convert = verb("convert", run_convert, "convert weights from PyTorch, or back to it, without PyTorch")
    add_convert_arguments(convert)
    return parser


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle convert`, shared with `python -m convert.mindalle`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder in the original's format, a transfer or VQGAN .ckpt, a converted folder, or a name "
        "(minDALL-E/1.3B, or OWNER/NAME on the Hugging Face hub, is downloaded); with --to torch a converted folder",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=["jax", "torch"], default="jax", help="the format to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the weights in DST (default: that of a converted SRC, else float32)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml, where it is not beside the weights")
    parser.add_argument(
        "--adapters", type=Path, metavar="FILE", help="add adapters.safetensors of a run that began from SRC"
    )
    parser.add_argument(
        "--download-from", metavar="URL", help="another source of the same archive: a URL or a local file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST, if it is a model folder")


def run_convert(arguments: argparse.Namespace) -> None:
    """What `mindalle convert` does."""
    from mindalle_jax.hub.download import RELEASES, fetch_release
    from mindalle_jax.hub.huggingface import fetch_repo, is_repo_id
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.interop.mindalle import export_checkpoint, import_checkpoint
    from mindalle_jax.storage.adapters import load_adapters
    from mindalle_jax.storage.model_folder import MODEL_FILES, MODEL_MARKS, copy_model
    from mindalle_jax.storage.weights import MANIFEST

    check_output(arguments.target, arguments.overwrite, MODEL_MARKS)  # before gigabytes are downloaded
    source = arguments.source
    if arguments.dtype and arguments.to == "torch":
        raise UsageError("--dtype goes with --to jax; the original's format is float32")
    if arguments.adapters:
        if arguments.to == "torch" or arguments.config or arguments.download_from:
            raise UsageError("--adapters goes with --dtype and --overwrite alone; convert what it makes once more")
        folder = find_model(source)  # as the run did
        adapters = load_adapters(arguments.adapters, folder)
        print(
            copy_model(
                folder, arguments.target, dtype=arguments.dtype, adapters=adapters, overwrite=arguments.overwrite
            )
        )
        return
    if not (source in RELEASES or arguments.download_from or Path(source).exists()) and is_repo_id(source):
        source = str(fetch_repo(source, MODEL_FILES))
    if arguments.to == "torch":
        print(export_checkpoint(source, arguments.target, overwrite=arguments.overwrite))
        return
    if source in RELEASES and not Path(source).exists():
        source = fetch_release(source, source=arguments.download_from)
    elif arguments.download_from:
        raise UsageError(f"--download-from goes with a name to download ({', '.join(RELEASES)}), not {source!r}")
    if (Path(source) / MANIFEST).is_file():
        if arguments.config:
            raise UsageError(f"--config goes with weights from PyTorch; {source} holds a config.yaml")
        print(copy_model(source, arguments.target, dtype=arguments.dtype, overwrite=arguments.overwrite))
        return
    dtype = arguments.dtype or "float32"
    print(
        import_checkpoint(source, arguments.target, config=arguments.config, dtype=dtype, overwrite=arguments.overwrite)
    )


def _finetune(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.finetune import finetune

    _run(finetune, arguments)
    print(f"{arguments.out}: a model; mindalle sample --model {arguments.out}")


def _train_vqgan(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.vqgan.run import train_vqgan

    _run(train_vqgan, arguments)
    print(f"{arguments.out}: a VQGAN; scripts/prepare_codes.py --model {arguments.out}, or training.vqgan of finetune")


def _train_clip(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.clip.run import train_clip

    _run(train_clip, arguments)
    print(f"{arguments.out}: a CLIP model; mindalle sample --ranker {arguments.out}")


def _run(train: Callable[..., bool], arguments: argparse.Namespace) -> None:
    if any("=" not in override for override in arguments.overrides):
        raise UsageError("overrides have the form section.key=value, such as data.train=photos")
    if arguments.distributed:
        from mindalle_jax.runtime.devices import join_processes

        join_processes()
    complete = train(
        arguments.config, arguments.overrides, arguments.out, ignore_fingerprint=arguments.ignore_fingerprint
    )
    if not complete:
        raise KeyboardInterrupt  # so that a script does not go on as if there were a model


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.tokenizers import train_tokenizer

    print(train_tokenizer(arguments.data, arguments.out, vocab_size=arguments.vocab_size, kind=arguments.kind))


def _sample(arguments: argparse.Namespace) -> None:
    prompts = list(arguments.prompts)
    if arguments.prompts_file:
        prompts += _read_prompts(arguments.prompts_file)
    out: Path = arguments.out
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is blank")
    if not arguments.warmup:
        if out is None:
            raise UsageError("--out is missing: a folder for the pictures")
        check_writable(out)
        if not arguments.overwrite and out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} exists and is not empty; name another place or pass --overwrite")

    from mindalle_jax.config.file import load_config
    from mindalle_jax.drawing import check_batch_size, check_every
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.pipeline import Dalle, ImageGPT, class_prefix
    from mindalle_jax.sampling.codec import check_keep_rows
    from mindalle_jax.sampling.decode import DEFAULT_TOP_K, Settings, check_num_candidates
    from mindalle_jax.text.tokenizer import TextTokenizer

    options: dict[str, Any] = {
        "top_k": getattr(arguments, "top_k", DEFAULT_TOP_K),
        "top_p": arguments.top_p,
        "temperature": arguments.temperature,
        "seed": _seed(arguments.seed),
        "guidance_scale": arguments.guidance_scale,
    }
    # Whatever can be wrong is told before gigabytes are loaded.
    check_num_candidates(arguments.num_candidates)
    check_batch_size(arguments.batch_size)
    if arguments.best is not None and arguments.best < 1:
        raise UsageError(f"--best must be at least 1, not {arguments.best}")
    given = [name for name in ("image", "vary") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UsageError("--image and --vary exclude each other")
    if bool(given) != (arguments.keep_rows is not None):
        raise UsageError("--keep-rows goes with --image or --vary, and they need it")
    folder = find_model(arguments.model, revision=arguments.revision)
    config = load_config(folder / "config.yaml")
    options["seed"] = Settings.make(config.stage2.vocab_size_img, **options).seed  # one for all prompts
    if config.image_only and prompts:
        raise UsageError(f"{folder} draws without text; it takes --class-id at most, not a prompt")
    if not config.image_only and arguments.class_id is not None:
        raise UsageError(f"{folder} draws from text; --class-id is for image-only models")
    if not config.image_only and not prompts and arguments.warmup:
        prompts = ["a"]
    if not config.image_only and not prompts:
        raise UsageError("no prompt was given; write one in quotes, or name a file with --prompts-file")
    ranker = arguments.ranker
    if ranker is None:
        own = folder / RANKER
        ranker = str(own) if own.is_dir() and not config.image_only else "off"
    if config.image_only and ranker not in ("off", "likelihood"):
        raise UsageError(f"{folder} draws without text; --ranker must be likelihood or off")
    if config.image_only and arguments.guidance_scale != 1:
        raise UsageError(f"{folder} draws without text; there is nothing for --guidance-scale to guide by")
    check_every(arguments.preview_every, config.stage1)
    if config.image_only:
        class_prefix(config.stage2, None if arguments.class_id is None else [arguments.class_id], 1)
    elif (folder / "tokenizer").is_dir():  # not so in the folder of a VQGAN, which is refused below
        TextTokenizer(folder / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)(prompts)
    picture = None
    if arguments.keep_rows is not None:
        check_keep_rows(arguments.keep_rows, config.stage1)
        picture = _read_codes(arguments.vary) if arguments.vary else _read_picture(arguments.image, config.stage1)
    options |= {
        "num_candidates": arguments.num_candidates,
        "batch_size": arguments.batch_size,
        "jacobi": arguments.jacobi,
        "ranker": _ranker(ranker),
        "progress": True,
    }
    start = time.perf_counter()
    kind: Any = ImageGPT if config.image_only else Dalle
    model = kind.from_pretrained(folder, dtype=arguments.dtype, quantize=arguments.quantize)
    _say_device(model, time.perf_counter() - start)
    if picture is not None:
        options["kept_codes"] = model.kept_codes(picture, arguments.keep_rows)
    subjects: list[Any] = [arguments.class_id] if config.image_only else prompts
    if arguments.warmup:
        _warm_up(model, subjects[0], options)
        return
    for i, subject in enumerate(subjects):
        # Written prompt by prompt: a long list needs no more memory than one, and an interruption loses one.
        place = out if len(subjects) == 1 else out / f"{i:03d}-{_slug(subject)}"
        preview = place / "preview.png"
        for generation in model.stream(subject, every=arguments.preview_every, **options):
            if generation.codes.min() < 0:
                _write_preview(generation, preview)
        preview.unlink(missing_ok=True)
        paths = generation.save(place, best=arguments.best, overwrite=arguments.overwrite)
        print(f"{len(paths)} pictures, {place / 'grid.png'} and {place / 'meta.json'}")


def _warm_up(model: Any, subject: Any, options: dict[str, Any]) -> None:
    """Draws what is drawn at once, which compiles everything, and throws it away."""
    start = time.perf_counter()
    at_once = options["batch_size"] or model.default_batch_size(options["num_candidates"])
    count = min(options["num_candidates"], at_once * model.mesh.size)
    model.generate(subject, **options | {"num_candidates": count, "batch_size": at_once})
    print(f"compiled, or loaded, what draws {count} candidates at once: {time.perf_counter() - start:.1f} s")


def _ranker(name: str) -> Any:
    """What --ranker names, loaded."""
    if name in ("off", "likelihood"):
        return None if name == "off" else name
    from mindalle_jax.ranking.ranker import ClipRanker

    return ClipRanker.from_pretrained(name)


def _read_picture(path: Path, config: Any) -> Any:
    """The picture in a file, of the size of the model."""
    from PIL import Image, ImageOps

    from mindalle_jax.sampling.codec import check_picture

    try:
        # Sizes far beyond any model's are refused by their header, before they fill memory.
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.size == (config.hparams.resolution,) * 2:
                image = ImageOps.exif_transpose(image)
            return check_picture(image, config.hparams.resolution)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as PNG, JPEG or WebP: {error}") from None


def _read_codes(path: Path) -> Any:
    """The codes of a picture that `mindalle sample` wrote, from the meta.json beside it."""
    import json

    meta = path.with_name("meta.json")
    try:
        pictures = json.loads(meta.read_text(encoding="utf-8"))["pictures"]
        return next(entry["codes"] for entry in pictures if entry["file"] == path.name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise UsageError(
            f"{path}: {meta} does not hold its codes; name a picture where mindalle sample wrote it, or use --image"
        ) from None


def _write_preview(generation: Any, path: Path) -> None:
    """By one rename, so that a viewer never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    generation.grid().save(partial, format="PNG")
    partial.replace(path)


def _say_device(model: Any, load_s: float) -> None:
    device = model.mesh.devices.flat[0]
    numbers = model.dtype + (f", int8 {model.quantize}" if model.quantize else "")
    print(f"{model.folder.name}, loaded in {load_s:.1f} s; {device.device_kind} ({model.backend}), {numbers}",
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
