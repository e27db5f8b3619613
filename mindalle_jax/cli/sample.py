"""`mindalle sample`: its arguments, and what is read and written for them."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.storage.files import RANKER, check_writable


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
