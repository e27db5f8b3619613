"""`mindalle sample`: its arguments, and what is read and written for them."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mindalle_jax.cli.parser import add_path
from mindalle_jax.errors import OutputError, UsageError, one_line, warn
from mindalle_jax.sampling.options import SamplingOptions, check_every, check_keep_rows, check_quantize
from mindalle_jax.storage.files import DEMO, IN_PACKAGE, check_writable, disk_errors

EXAMPLE = """
mindalle sample "a parrot, 3d style"
mindalle sample "a painting of a cat" -m minDALL-E/1.3B -n 96 --ranker ViT-B/32 --best 16 -o cats
"""
FIELDS = {field.name: field for field in dataclasses.fields(SamplingOptions)}
OPTIONS = ("num_candidates", "seed", "top_k", "top_p", "temperature", "guidance_scale", "batch_size", "mixed_batches",
           "jacobi", "ranker")  # fmt: skip
"""Fields of SamplingOptions that have an argument of the same name."""
OUT = Path("out")
"""Where images go if nobody says where."""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle sample`."""
    what = parser.add_argument_group("what to sample")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text in quotes; each prompt gets its own images")
    text = "the same as PROMPT; may be given more than once"
    what.add_argument("--prompt", action="append", default=[], metavar="PROMPT", dest="more_prompts", help=text)
    add_path(what, "--prompts-file", metavar="FILE", help="more prompts, one per line, UTF-8")
    what.add_argument("--class-id", type=int, metavar="C", help=FIELDS["class_id"].metadata["doc"])
    _add_option(what, "num_candidates", "-n", type=int, metavar="N")
    _add_option(what, "seed", metavar="S")
    add_path(what, "--image", metavar="FILE", help="complete this image below its --keep-rows")
    text = "as --image, for a PNG that mindalle wrote, from the codes in it; its prompt is the default"
    add_path(what, "--vary", metavar="FILE", help=text)
    text = "rows of codes to keep from the top of --image or --vary"
    what.add_argument("--keep-rows", type=int, metavar="K", help=text)

    how = parser.add_argument_group("how to sample")
    how.add_argument(
        "-m",
        "--model",
        default=DEMO,
        help="demo (small, in the package: emoji), demo-scenes (shapes), a converted folder, one in the original's "
        "format, minDALL-E/1.3B, or OWNER/NAME on the Hugging Face hub (its cache alone with HF_HUB_OFFLINE=1 in the "
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
    text = "a new folder for the images (default: out/PROMPT-seedS, with a number if that exists)"
    add_path(output, "-o", "--out", metavar="DIR", help=text)
    output.add_argument("--overwrite", action="store_true", help="replace the images that are in --out")
    text = "sample once and keep nothing, to compile what the other options take; needs no prompt"
    output.add_argument("--warmup", action="store_true", help=text)
    _add_option(output, "ranker")
    output.add_argument("--best", type=int, metavar="K", help="write at most the K best of each prompt (default: all)")
    text = "after every N codes rewrite preview.png in --out (default: never)"
    output.add_argument("--preview-every", type=int, metavar="N", help=text)


def _add_option(group: Any, name: str, *short: str, after: str = "", **settings: Any) -> None:
    """An argument from a field of SamplingOptions: its name, default and doc, in which (None) is Python's word."""
    doc = FIELDS[name].metadata["doc"].replace(" (None)", "")
    settings = {"default": FIELDS[name].default, "help": f"{doc} {after}".rstrip()} | settings
    group.add_argument(*short, f"--{name.replace('_', '-')}", **settings)


def run_sample(arguments: argparse.Namespace) -> None:
    """Runs `mindalle sample`: checks, cheapest first; then the model; then prompt by prompt."""
    from mindalle_jax.sampling.image_file import read_image_record

    given = [name for name in ("image", "vary") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UsageError("--image and --vary exclude each other")
    if given and arguments.keep_rows is None:
        raise UsageError(f"--{given[0]} needs --keep-rows, the number of rows of codes to keep from the top")
    if arguments.keep_rows is not None and not given:
        raise UsageError("--keep-rows goes with --image or --vary, whose top is kept")
    if arguments.overwrite and arguments.out is None:
        raise UsageError("--overwrite goes with --out; without it the folder is always a new one")
    if arguments.preview_every is not None and arguments.mixed_batches:
        raise UsageError("--preview-every shows one prompt after the other; it goes without --mixed-batches")
    if arguments.best is not None and arguments.best < 1:
        raise UsageError(f"--best must be at least 1, not {arguments.best}")
    record = read_image_record(arguments.vary) if arguments.vary else None
    prompts = _prompts(arguments, record)
    chosen = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    options = SamplingOptions.of(**chosen | {"seed": _seed(str(arguments.seed))}).check()
    check_quantize(arguments.quantize)

    from mindalle_jax.config.file import load_config
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.image_gpt import ImageGPT
    from mindalle_jax.pipeline import Dalle
    from mindalle_jax.text.tokenizer import TextTokenizer

    folder = find_model(arguments.model, revision=arguments.revision)
    config = load_config(folder / "config.yaml")
    if not config.image_only and not prompts and arguments.warmup:
        prompts = list(_known_examples(folder)) or ["a"]
    _check_kind(arguments, config.image_only, prompts)
    if config.image_only:
        prompts = []
        if record is not None and arguments.class_id is None:
            arguments.class_id = record.settings.get("class_id")
    check_every(arguments.preview_every, config.stage1)
    tokenizer = None
    if not config.image_only and (folder / "tokenizer").is_dir():  # a VQGAN has none, and is refused below
        tokenizer = TextTokenizer(folder / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)
    request = dataclasses.replace(options, prompts=tuple(prompts), class_id=arguments.class_id)
    options = dataclasses.replace(request.check(config, tokenizer), progress=True)
    image = None
    if arguments.keep_rows is not None:
        check_keep_rows(arguments.keep_rows, config.stage1)
        image = (
            _read_image(arguments.image, config.stage1) if record is None else _codes(record, folder, arguments.vary)
        )
    # Whatever can be wrong is told before gigabytes are loaded, and before the place to write to is looked at.
    if options.ranker not in ("auto", "likelihood", None):
        from mindalle_jax.ranking.ranker import ClipRanker

        options = dataclasses.replace(options, ranker=ClipRanker.from_pretrained(str(options.ranker)))
    subjects: list[Any] = [arguments.class_id] if config.image_only else prompts
    kind = ImageGPT if config.image_only else Dalle
    with contextlib.nullcontext() if arguments.warmup else _place(arguments, subjects, options.seed) as out:
        _run_model(kind, subjects, options, image, out, arguments)


def _run_model(
    kind: Any,
    subjects: list[Any],
    options: SamplingOptions,
    image: Any,
    out: Path | None,
    arguments: argparse.Namespace,
) -> None:
    """Loads the model, and samples into `out`; without it warms up. image: whose rows are kept, or its codes."""
    from mindalle_jax.runtime.signals import stop_on_signals

    start = time.perf_counter()
    model = kind.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        local_files_only=True,  # it was found above
    )
    _say_device(model, time.perf_counter() - start)
    if image is not None:
        options = dataclasses.replace(options, prompt_codes=model.prompt_codes(image, arguments.keep_rows))
    if out is None:
        _warm_up(model, subjects[0], options)
        return
    with stop_on_signals("finishing this row of codes, then writing; once more stops at once") as stop:
        if arguments.interrupts.requested:  # and got lost
            raise KeyboardInterrupt
        written = _write_images(model, subjects, options, out, arguments, stop)
        if stop.requested:
            wanted = options.num_candidates * len(subjects)
            kept = f"their best are in {out}" if arguments.best and written else f"they are in {out}"
            kept = kept if written else "nothing was written"
            raise KeyboardInterrupt(f"interrupted: {written} of {wanted} candidates were finished; {kept}")


def _write_images(
    model: Any, subjects: Sequence[Any], options: SamplingOptions, out: Path, arguments: argparse.Namespace, stop: Any
) -> int:
    """Samples and writes until stop.requested; returns how many candidates were finished."""
    options = dataclasses.replace(options, callback=lambda _: stop.requested)
    places = [out] if len(subjects) == 1 else [out / f"{i:03d}-{_slug(text)}" for i, text in enumerate(subjects)]
    finished = 0
    if options.mixed_batches and len(subjects) > 1:
        generation = model.generate(subjects, **options.keywords())
        for p, place in enumerate(places):
            finished += _write(generation.of_prompt(p), place, arguments)
        return finished
    for subject, place in zip(subjects, places, strict=True):
        # Written prompt by prompt: a long list needs no more memory than one, and an interruption loses one.
        preview = place / "preview.png"
        for generation in model.stream(subject, every=arguments.preview_every, **options.keywords()):
            if generation.codes.min() < 0 and not stop.requested:
                _write_preview(generation, preview)
        preview.unlink(missing_ok=True)
        finished += _write(generation, place, arguments)
        if stop.requested:
            break
    return finished


def _prompts(arguments: argparse.Namespace, record: Any) -> list[str]:
    """The prompts of the command, of the file, or else of the image to vary."""
    words = [prompt for prompt in arguments.prompts if len(prompt.split()) == 1]
    if len(words) > 1 and len(words) == len(arguments.prompts):
        text = f"{len(words)} prompts: {', '.join(words)}; if one was meant, put it in quotes"
        print(f"mindalle sample: {text}", file=sys.stderr)
    prompts = [*arguments.prompts, *arguments.more_prompts]
    if arguments.prompts_file:
        prompts += _read_prompts(arguments.prompts_file)
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is blank")
    return [record.prompt] if record is not None and record.prompt and not prompts else prompts


def _check_kind(arguments: argparse.Namespace, image_only: bool, prompts: list[str]) -> None:
    """Raises UsageError for arguments that are for the other kind of model."""
    if not image_only and arguments.class_id is not None:
        raise UsageError(f"{arguments.model} draws from text; --class-id is for image-only models")
    if not image_only and not prompts:
        raise UsageError("no prompt was given; write one in quotes, or name a file with --prompts-file")
    if image_only and (arguments.prompts or arguments.more_prompts or arguments.prompts_file):
        raise UsageError(f"{arguments.model} draws without text; it takes --class-id at most, not a prompt")


@contextlib.contextmanager
def _place(arguments: argparse.Namespace, subjects: Sequence[Any], seed: int | None) -> Iterator[Path]:
    """The folder to write to: --out, or a new one below `out`, which goes if nothing is written. Raises OutputError."""
    if arguments.out is not None:
        out: Path = arguments.out
        check_writable(out)
        if not arguments.overwrite and out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} exists and is not empty; name another place or pass --overwrite")
        yield out
        return
    first = subjects[0] if isinstance(subjects[0], str) else f"class {subjects[0]}" if subjects[0] is not None else ""
    more = f"-and-{len(subjects) - 1}-more" if len(subjects) > 1 else ""
    name, number = f"{_slug(first) if first else 'images'}{more}-seed{seed}", 1
    check_writable(OUT / name)
    with disk_errors(OUT):
        OUT.mkdir(exist_ok=True)
        while os.path.lexists(out := OUT / (name if number == 1 else f"{name}-{number}")):
            number += 1
        out.mkdir()  # now, so that no other process takes it
    try:
        yield out
    finally:
        for folder in (out, OUT):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _write(generation: Any, place: Path, arguments: argparse.Namespace) -> int:
    """Writes the finished images of a prompt, if there are any; returns how many there are."""
    finished = int((generation.codes >= 0).all(axis=1).sum())
    if finished:
        paths = generation.save(place, best=arguments.best, overwrite=arguments.overwrite)
        print(f"{len(paths)} image{'s' if len(paths) > 1 else ''}, {place / 'grid.png'} and {place / 'meta.json'}")
    else:
        with contextlib.suppress(OSError):  # not there, or holds something
            place.rmdir()
    return finished


def _known_examples(folder: Path) -> Sequence[str]:
    from mindalle_jax.text.known_words import read_known_words

    known_words = read_known_words(folder / "tokenizer")
    return known_words.examples[:1] if known_words else ()


def _codes(record: Any, folder: Path, path: Path) -> Any:
    """The codes of an image that was sampled before; warns if by another model, whose codes may mean other patches."""
    from mindalle_jax.storage.weights import fingerprint, read_manifest

    if record.settings.get("model_sha256") != fingerprint(read_manifest(folder)["tensors"]):
        warn(f"{path} was sampled by another model, whose codes may mean other patches")
    return record.codes


def _warm_up(model: Any, subject: Any, options: SamplingOptions) -> None:
    """Samples what is sampled at once, which compiles everything, and throws it away."""
    start = time.perf_counter()
    at_once = options.batch_size or model.default_batch_size(options.num_candidates)
    count = min(options.num_candidates, at_once * model.mesh.size)
    model.generate(subject, **dataclasses.replace(options, num_candidates=count, batch_size=at_once).keywords())
    print(f"compiled, or loaded, what samples {count} candidates at once: {time.perf_counter() - start:.1f} s")


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
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises what its decoders do
        raise UsageError(f"{path}: cannot be read as PNG, JPEG or WebP: {one_line(error)}") from None


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
    if model.backend == "cpu" and model.name not in IN_PACKAGE:
        print('No GPU or TPU is in use; for an NVIDIA GPU: pip install -U "jax[cuda13]"', file=sys.stderr)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
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
