"""`mindalle sample`: its arguments, and what is read and written for them."""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.sampling.options import SamplingOptions, check_every, check_keep_rows, check_quantize
from mindalle_jax.storage.files import DEMO, RANKER, check_writable

FIELDS = {field.name: field for field in dataclasses.fields(SamplingOptions)}
OPTIONS = ("num_candidates", "seed", "top_k", "top_p", "temperature", "guidance_scale", "batch_size", "mixed_batches",
           "jacobi")  # fmt: skip
"""Fields of SamplingOptions that have an argument of the same name."""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle sample`."""
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; each prompt gets its own images")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one per line, UTF-8")
    what.add_argument("--class-id", type=int, metavar="C", help=FIELDS["class_id"].metadata["doc"])
    _add_option(what, "num_candidates", type=int, metavar="N", default=16, help="images per prompt")
    _add_option(what, "seed", metavar="S")
    what.add_argument("--image", type=Path, metavar="FILE", help="complete this image below its --keep-rows")
    text = "as --image, for an image that this command wrote, from its exact codes"
    what.add_argument("--vary", type=Path, metavar="FILE", help=text)
    text = "rows of codes to keep from the top of --image or --vary"
    what.add_argument("--keep-rows", type=int, metavar="K", help=text)

    how = parser.add_argument_group("how to draw")
    how.add_argument(
        "--model",
        default=DEMO.name,
        help="demo (small, in the package: coloured shapes), a converted folder, a folder in the original's format, "
        "minDALL-E/1.3B, or OWNER/NAME on the Hugging Face hub (its cache alone with HF_HUB_OFFLINE=1 in the "
        "environment)",
    )
    how.add_argument("--revision", metavar="REV", help="branch, tag or commit of a --model on the hub")
    default = "(default: 256, or all codes where there are fewer)"
    _add_option(how, "top_k", type=_or_off(int), metavar="K", default=argparse.SUPPRESS, after=default)
    _add_option(how, "top_p", type=_or_off(float), metavar="P", default="off")
    _add_option(how, "temperature", type=float, metavar="T")
    _add_option(how, "guidance_scale", type=float, metavar="S")
    _add_option(how, "batch_size", type=int, metavar="B")
    _add_option(how, "mixed_batches", action="store_true")
    _add_option(how, "jacobi", action="store_true")
    text = "compute dtype (default: float32 on CPU, bfloat16 elsewhere)"
    how.add_argument("--dtype", choices=["bfloat16", "float32"], help=text)
    text = "int8 for the transformer's matrices, and for keys and values of the images being sampled: half the memory"
    how.add_argument("--quantize", choices=["weights", "weights+cache"], help=text)

    output = parser.add_argument_group("what to write")
    output.add_argument("--out", type=Path, metavar="DIR", help="where the images go; a new folder")
    output.add_argument("--overwrite", action="store_true", help="replace files of the same names in --out")
    text = "sample once and keep nothing, to compile what the other options take; needs no prompt and no --out"
    output.add_argument("--warmup", action="store_true", help=text)
    output.add_argument(
        "--ranker",
        help="what orders the images: a CLIP model (a Hugging Face folder, or a hub id such as "
        "openai/clip-vit-base-patch32), likelihood (the transformer's own), or off (default: the CLIP model in the "
        "folder `ranker` of --model where there is one, else off)",
    )
    output.add_argument("--best", type=int, metavar="K", help="write at most the K best of each prompt (default: all)")
    text = "after every N codes rewrite preview.png in --out (default: never)"
    output.add_argument("--preview-every", type=int, metavar="N", help=text)


def _add_option(group: Any, name: str, *, after: str = "", **settings: Any) -> None:
    """An argument from a field of SamplingOptions: its name, default and doc, in which (None) is Python's word."""
    doc = FIELDS[name].metadata["doc"].replace(" (None)", "")
    settings = {"default": FIELDS[name].default, "help": f"{doc} {after}".rstrip()} | settings
    group.add_argument(f"--{name.replace('_', '-')}", **settings)


def run_sample(arguments: argparse.Namespace) -> None:
    """What `mindalle sample` does."""
    prompts = list(arguments.prompts)
    if arguments.prompts_file:
        prompts += _read_prompts(arguments.prompts_file)
    out: Path = arguments.out
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is blank")
    if not arguments.warmup:
        if out is None:
            raise UsageError("--out is missing: a folder for the images")
        check_writable(out)
        if not arguments.overwrite and out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} exists and is not empty; name another place or pass --overwrite")
    # Whatever can be wrong is told before gigabytes are downloaded, or loaded.
    chosen = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    options = SamplingOptions.of(**chosen | {"seed": _seed(str(arguments.seed))}).check()
    check_quantize(arguments.quantize)
    if arguments.best is not None and arguments.best < 1:
        raise UsageError(f"--best must be at least 1, not {arguments.best}")
    given = [name for name in ("image", "vary") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UsageError("--image and --vary exclude each other")
    if bool(given) != (arguments.keep_rows is not None):
        raise UsageError("--keep-rows goes with --image or --vary, and they need it")
    if arguments.preview_every is not None and arguments.mixed_batches:
        raise UsageError("--preview-every shows one prompt after the other; it goes without --mixed-batches")

    from mindalle_jax.config.file import load_config
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.pipeline import Dalle, ImageGPT
    from mindalle_jax.text.tokenizer import TextTokenizer

    folder = find_model(arguments.model, revision=arguments.revision)
    config = load_config(folder / "config.yaml")
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
    if config.image_only and options.guided:
        raise UsageError(f"{folder} draws without text; there is nothing for --guidance-scale to guide by")
    check_every(arguments.preview_every, config.stage1)
    tokenizer = None
    if not config.image_only and (folder / "tokenizer").is_dir():  # a VQGAN has none, and is refused below
        tokenizer = TextTokenizer(folder / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)
    request = dataclasses.replace(options, prompts=tuple(prompts), class_id=arguments.class_id)
    options = request.check(config, tokenizer)
    image = None
    if arguments.keep_rows is not None:
        check_keep_rows(arguments.keep_rows, config.stage1)
        image = _read_codes(arguments.vary) if arguments.vary else _read_image(arguments.image, config.stage1)
    options = dataclasses.replace(options, ranker=_ranker(ranker), progress=True)
    start = time.perf_counter()
    kind: Any = ImageGPT if config.image_only else Dalle
    model = kind.from_pretrained(folder, dtype=arguments.dtype, quantize=arguments.quantize)
    _say_device(model, time.perf_counter() - start)
    if image is not None:
        options = dataclasses.replace(options, prompt_codes=model.prompt_codes(image, arguments.keep_rows))
    subjects: list[Any] = [arguments.class_id] if config.image_only else prompts
    if arguments.warmup:
        _warm_up(model, subjects[0], options)
        return
    places = [out] if len(subjects) == 1 else [out / f"{i:03d}-{_slug(prompt)}" for i, prompt in enumerate(subjects)]
    if options.mixed_batches and not config.image_only:
        generation = model.generate(prompts, **options.keywords())
        for p, place in enumerate(places):
            _write(generation.of_prompt(p), place, arguments)
        return
    for subject, place in zip(subjects, places, strict=True):
        # Written prompt by prompt: a long list needs no more memory than one, and an interruption loses one.
        preview = place / "preview.png"
        for generation in model.stream(subject, every=arguments.preview_every, **options.keywords()):
            if generation.codes.min() < 0:
                _write_preview(generation, preview)
        preview.unlink(missing_ok=True)
        _write(generation, place, arguments)


def _write(generation: Any, place: Path, arguments: argparse.Namespace) -> None:
    paths = generation.save(place, best=arguments.best, overwrite=arguments.overwrite)
    print(f"{len(paths)} images, {place / 'grid.png'} and {place / 'meta.json'}")


def _warm_up(model: Any, subject: Any, options: SamplingOptions) -> None:
    """Samples what is sampled at once, which compiles everything, and throws it away."""
    start = time.perf_counter()
    at_once = options.batch_size or model.default_batch_size(options.num_candidates)
    count = min(options.num_candidates, at_once * model.mesh.size)
    model.generate(subject, **dataclasses.replace(options, num_candidates=count, batch_size=at_once).keywords())
    print(f"compiled, or loaded, what draws {count} candidates at once: {time.perf_counter() - start:.1f} s")


def _ranker(name: str) -> Any:
    """What --ranker names, loaded."""
    if name in ("off", "likelihood"):
        return None if name == "off" else name
    from mindalle_jax.ranking.ranker import ClipRanker

    return ClipRanker.from_pretrained(name)


def _read_image(path: Path, config: Any) -> Any:
    """The image in a file, of the size of the model."""
    from PIL import Image, ImageOps

    from mindalle_jax.sampling.options import check_image

    try:
        # Sizes far beyond any model's are refused by their header, before they fill memory.
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.size == (config.hparams.resolution,) * 2:
                image = ImageOps.exif_transpose(image)
            return check_image(image, config.hparams.resolution)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as PNG, JPEG or WebP: {error}") from None


def _read_codes(path: Path) -> Any:
    """The codes of an image that `mindalle sample` wrote, from the meta.json beside it."""
    import json

    meta = path.with_name("meta.json")
    try:
        images = json.loads(meta.read_text(encoding="utf-8"))["pictures"]
        return next(entry["codes"] for entry in images if entry["file"] == path.name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise UsageError(
            f"{path}: {meta} does not hold its codes; name an image where mindalle sample wrote it, or use --image"
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
