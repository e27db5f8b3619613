"""`mindalle sample`: defines its arguments, checks and reads the files they name, and writes the images."""

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
from mindalle_jax.sampling.options import SamplingOptions, check_every, check_keep_rows, check_quantize, class_number
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
"""The folder for images if --out is not given; each command makes a new folder in it."""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle sample`."""
    what = parser.add_argument_group("what to sample")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text in quotes; each prompt gets its own images")
    text = "another prompt; the option can be repeated"
    what.add_argument("--prompt", action="append", default=[], metavar="PROMPT", dest="more_prompts", help=text)
    add_path(what, "--prompts-file", metavar="FILE", help="a UTF-8 text file with more prompts, one per line")
    what.add_argument("--class-id", type=int, metavar="C", help=FIELDS["class_id"].metadata["doc"])
    text = "name of a class, for a model whose training data had classes with names"
    what.add_argument("--class", dest="class_name", metavar="NAME", help=text)
    _add_option(what, "num_candidates", "-n", type=int, metavar="N")
    _add_option(what, "seed", metavar="S")
    add_path(what, "--image", metavar="FILE", help="keep the top of this image and sample the rest")
    text = "like --image, for a PNG that mindalle wrote; uses the codes in the file, and its prompt if none is given"
    add_path(what, "--vary", metavar="FILE", help=text)
    text = "number of rows of codes to keep from the top of --image or --vary; a code stands for a patch of the image"
    what.add_argument("--keep-rows", type=int, metavar="K", help=text)

    how = parser.add_argument_group("how to sample")
    how.add_argument(
        "-m",
        "--model",
        default=DEMO,
        help="demo (a small model of emoji in the package), demo-scenes (one of colored shapes), minDALL-E/1.3B (the "
        "published weights), a model folder (converted, or in the original's format), or OWNER/NAME on the Hugging "
        "Face hub (only from its cache if HF_HUB_OFFLINE=1 is in the environment)",
    )
    how.add_argument("--revision", metavar="REV", help="branch, tag or commit of a --model on the hub")
    default = "(default: 256, or all codes if there are fewer)"
    _add_option(how, "top_k", type=_or_off(int), metavar="K", default=argparse.SUPPRESS, after=default)
    _add_option(how, "top_p", type=_or_off(float), metavar="P", default="off")
    _add_option(how, "temperature", type=float, metavar="T")
    _add_option(how, "guidance_scale", type=float, metavar="S")
    _add_option(how, "batch_size", type=int, metavar="B")
    _add_option(how, "mixed_batches", action="store_true")
    _add_option(how, "jacobi", action="store_true")
    text = "number type of the computation (default: float32 on CPU, bfloat16 elsewhere)"
    how.add_argument("--dtype", choices=["bfloat16", "float32"], help=text)
    text = "keep the transformer's matrices as int8; with +cache also the keys and values of the images being sampled. "
    text += "int8 takes half the memory of bfloat16"
    how.add_argument("--quantize", choices=["weights", "weights+cache"], help=text)

    output = parser.add_argument_group("what to write")
    text = "a new folder for the images (default: out/PROMPT-seedS; a number is appended if that exists)"
    add_path(output, "-o", "--out", metavar="DIR", help=text)
    output.add_argument("--overwrite", action="store_true", help="replace the images in the folder --out")
    text = "only compile the programs that the other options need: samples once, writes nothing, needs no prompt"
    output.add_argument("--warmup", action="store_true", help=text)
    _add_option(output, "ranker")
    output.add_argument("--best", type=int, metavar="K", help="write the K best images of each prompt (default: all)")
    text = "rewrite preview.png in the folder --out after every N codes (default: never)"
    output.add_argument("--preview-every", type=int, metavar="N", help=text)


def _add_option(group: Any, name: str, *short: str, after: str = "", **settings: Any) -> None:
    """Adds an argument with the name, default and doc of a field of SamplingOptions, without Python's "(None)"."""
    doc = FIELDS[name].metadata["doc"].replace(" (None)", "")
    settings = {"default": FIELDS[name].default, "help": f"{doc} {after}".rstrip()} | settings
    group.add_argument(*short, f"--{name.replace('_', '-')}", **settings)


def run_sample(arguments: argparse.Namespace) -> None:
    """Runs `mindalle sample`: makes all checks, the cheapest first, then loads the model and samples."""
    from mindalle_jax.sampling.image_file import read_image_record

    given = [name for name in ("image", "vary") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UsageError("--image and --vary cannot be used together")
    if given and arguments.keep_rows is None:
        raise UsageError(f"--{given[0]} needs --keep-rows, the number of rows of codes to keep from the top")
    if arguments.keep_rows is not None and not given:
        raise UsageError("--keep-rows works only with --image or --vary, whose top rows are kept")
    if arguments.overwrite and arguments.out is None:
        raise UsageError("--overwrite works only with --out; without --out the folder is always new")
    if arguments.preview_every is not None and arguments.mixed_batches:
        raise UsageError("--preview-every cannot be used with --mixed-batches: it shows one prompt at a time")
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
    from mindalle_jax.storage.weights import read_manifest
    from mindalle_jax.text.tokenizer import TextTokenizer

    _use_checkpoint(arguments)
    folder = find_model(arguments.model, revision=arguments.revision)
    config = load_config(folder / "config.yaml")
    if not config.image_only and not prompts and arguments.warmup:
        prompts = list(_known_examples(folder)) or ["a"]
    _check_kind(arguments, config.image_only, prompts)
    if config.image_only:
        prompts = []
        names = read_manifest(folder).get("classes")
        if arguments.class_name is not None:
            arguments.class_id = class_number(arguments.class_name, names)
        elif names and arguments.class_id is None and record is None:
            listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UsageError(f"name a class with --class or --class-id; there are {listed}")
        if record is not None and arguments.class_id is None:
            arguments.class_id = record.settings.get("class_id")
    check_every(arguments.preview_every, config.stage1)
    tokenizer = None
    if not config.image_only and (folder / "tokenizer").is_dir():  # a VQGAN has no tokenizer, and is refused below
        tokenizer = TextTokenizer(folder / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)
    request = dataclasses.replace(options, prompts=tuple(prompts), class_id=arguments.class_id)
    options = dataclasses.replace(request.check(config, tokenizer), progress=True)
    image = None
    if arguments.keep_rows is not None:
        check_keep_rows(arguments.keep_rows, config.stage1)
        image = (
            _read_image(arguments.image, config.stage1) if record is None else _codes(record, folder, arguments.vary)
        )
    # All errors in the arguments are reported before gigabytes are loaded and before the output folder is checked.
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
    """Loads the model and samples into the folder `out`; if `out` is None, only compiles.

    image: the image, or its codes, whose top rows are kept; None without one.
    """
    from mindalle_jax.runtime.signals import stop_on_signals

    start = time.perf_counter()
    model = kind.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        local_files_only=True,  # find_model has downloaded it
    )
    _say_device(model, time.perf_counter() - start)
    if image is not None:
        options = dataclasses.replace(options, prompt_codes=model.prompt_codes(image, arguments.keep_rows))
    if out is None:
        _warm_up(model, subjects[0], options)
        return
    with stop_on_signals("finishing this row of codes, then writing; a second signal stops at once") as stop:
        if arguments.interrupts.requested:  # before stop_on_signals was in place
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
    """Samples and writes images until stop.requested; returns the number of finished candidates."""
    options = dataclasses.replace(options, callback=lambda _: stop.requested)
    places = [out] if len(subjects) == 1 else [out / f"{i:03d}-{_slug(text)}" for i, text in enumerate(subjects)]
    finished = 0
    if options.mixed_batches and len(subjects) > 1:
        generation = model.generate(subjects, **options.keywords())
        for p, place in enumerate(places):
            finished += _write(generation.of_prompt(p), place, arguments)
        return finished
    for subject, place in zip(subjects, places, strict=True):
        # Written prompt by prompt: a long list needs no more memory than one prompt, and an interruption loses one.
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
    """Returns the prompts of the command and of its file; if there are none, the prompt of the image to vary."""
    words = [prompt for prompt in arguments.prompts if len(prompt.split()) == 1]
    if len(words) > 1 and len(words) == len(arguments.prompts):
        text = f"{len(words)} prompts: {', '.join(words)}; if you meant one prompt, put it in quotes"
        print(f"mindalle sample: {text}", file=sys.stderr)
    prompts = [*arguments.prompts, *arguments.more_prompts]
    if arguments.prompts_file:
        prompts += _read_prompts(arguments.prompts_file)
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is blank")
    return [record.prompt] if record is not None and record.prompt and not prompts else prompts


def _check_kind(arguments: argparse.Namespace, image_only: bool, prompts: list[str]) -> None:
    """Raises UsageError for arguments that this kind of model does not take."""
    if arguments.class_id is not None and arguments.class_name is not None:
        raise UsageError("--class and --class-id cannot be used together")
    if not image_only and (arguments.class_id is not None or arguments.class_name is not None):
        raise UsageError(f"{arguments.model} samples from prompts; --class and --class-id are for image-only models")
    if not image_only and not prompts:
        raise UsageError("no prompt was given; write one in quotes, or name a file with --prompts-file")
    if image_only and (arguments.prompts or arguments.more_prompts or arguments.prompts_file):
        text = "samples without text; it takes no prompt, only --class or --class-id if it has classes"
        raise UsageError(f"{arguments.model} {text}")


def _use_checkpoint(arguments: argparse.Namespace) -> None:
    """For a run of training that is not finished, replaces --model by the model of a checkpoint, and says which."""
    run = Path(os.path.expanduser(arguments.model))
    if (run / "run.yaml").is_file() and not (run / "summary.json").is_file():
        from mindalle_jax.training.export import newest_model

        model, step = newest_model(run)
        print(f"{run} is not finished: this is its model of step {step}", file=sys.stderr)
        arguments.model = str(model)


@contextlib.contextmanager
def _place(arguments: argparse.Namespace, subjects: Sequence[Any], seed: int | None) -> Iterator[Path]:
    """Yields the output folder: --out, or a new folder in `out`, which is removed if nothing is written into it.

    Raises OutputError if the folder cannot be written to, or is not empty and --overwrite is not given.
    """
    if arguments.out is not None:
        out: Path = arguments.out
        check_writable(out)
        if not arguments.overwrite and out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} exists and is not empty; name another folder or pass --overwrite")
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
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _write(generation: Any, place: Path, arguments: argparse.Namespace) -> int:
    """Writes the finished images of a prompt, if there are any; returns their number."""
    finished = int((generation.codes >= 0).all(axis=1).sum())
    if finished:
        paths = generation.save(place, best=arguments.best, overwrite=arguments.overwrite)
        print(f"{len(paths)} image{'s' if len(paths) > 1 else ''}, {place / 'grid.png'} and {place / 'meta.json'}")
    else:
        with contextlib.suppress(OSError):  # the folder does not exist, or is not empty
            place.rmdir()
    return finished


def _known_examples(folder: Path) -> Sequence[str]:
    from mindalle_jax.text.known_words import read_known_words

    known_words = read_known_words(folder / "tokenizer")
    return known_words.examples[:1] if known_words else ()


def _codes(record: Any, folder: Path, path: Path) -> Any:
    """Returns the codes in the record of an image; warns if another model, with other codes, sampled it."""
    from mindalle_jax.storage.weights import fingerprint, read_manifest

    if record.settings.get("model_sha256") != fingerprint(read_manifest(folder)["tensors"]):
        warn(f"{path} was sampled by another model, whose codes may stand for other patches")
    return record.codes


def _warm_up(model: Any, subject: Any, options: SamplingOptions) -> None:
    """Compiles all programs: samples one batch per device and discards the images."""
    start = time.perf_counter()
    at_once = options.batch_size or model.default_batch_size(options.num_candidates)
    count = min(options.num_candidates, at_once * model.mesh.size)
    model.generate(subject, **dataclasses.replace(options, num_candidates=count, batch_size=at_once).keywords())
    elapsed = time.perf_counter() - start
    print(f"compiled, or loaded, the programs that sample {count} candidates at once: {elapsed:.1f} s")


def _read_image(path: Path, config: Any) -> Any:
    """Reads an image file; raises UsageError if it cannot be read or does not have the size of the model's images."""
    from PIL import Image, ImageOps

    from mindalle_jax.sampling.options import check_image

    try:
        # A size far beyond that of any model is refused from the file's header, before the pixels fill the memory.
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.size == (config.hparams.resolution,) * 2:
                image = ImageOps.exif_transpose(image)
            return check_image(image, config.hparams.resolution)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise UsageError(f"{path}: cannot be read as PNG, JPEG or WebP: {one_line(error)}") from None


def _write_preview(generation: Any, path: Path) -> None:
    """Writes the sheet of partial images with one rename, so that a viewer never sees half a file."""
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
        print('No GPU or TPU is in use; for an NVIDIA GPU: pip install "jax[cuda13]"', file=sys.stderr)


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
    """Returns the type of an argument that is a number, or `off` for None."""

    def parse(text: str) -> Any:
        return None if text == "off" else kind(text)

    parse.__name__ = f"{kind.__name__} or off"
    return parse


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
