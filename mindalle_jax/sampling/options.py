"""Every option of sampling with its type, default, bound and meaning, in one place.

Imports no JAX, and needs no weights: the command line checks a whole request before gigabytes are loaded.
"""

import dataclasses
import inspect
import math
import numbers
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np

from mindalle_jax.config.schema import Config, Stage1Config, Stage2Config
from mindalle_jax.errors import UsageError, did_you_mean

if TYPE_CHECKING:  # the library `tokenizers` takes time to import
    from mindalle_jax.text.tokenizer import TextTokenizer

MAX_CANDIDATES = 1_000
MAX_BATCH_SIZE = 4_096
Quantize = Literal["weights", "weights+cache"]


class Progress(NamedTuple):
    """Tells a callback how far sampling is. It is about one prompt and the candidates of one batch."""

    prompt: int
    """Index of the prompt in the list."""
    candidates: range
    """Numbers of the candidates in this batch."""
    codes: int
    """Number of codes that each of them has."""
    codes_total: int
    """Number of codes of a whole image, h * w."""


Callback = Callable[[Progress], bool | None]
"""Called after each row of codes; sampling stops if it returns True."""


class Scorer(Protocol):
    """Anything that can rank: ClipRanker, or an object of your own."""

    def scores(self, prompt: str, images: np.ndarray) -> np.ndarray:
        """Scores images uint8[n, H, W, 3]; returns f32[n], higher is better."""
        ...


Ranker = Scorer | str | None
"""An object that ranks, "likelihood", "auto", or the path or name of a CLIP model; None does not rank."""


class _DefaultTopK(int):
    """The default of top_k, told apart from a 256 that somebody asked for."""


_OTHER_NAMES = {
    **dict.fromkeys(("n", "num_images", "num_images_per_prompt", "num_samples"), "num_candidates"),
    "generator": "seed",
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), "guidance_scale"),
}
"""Names in other libraries -> those here."""
DEFAULT_TOP_K = _DefaultTopK(256)
"""256, or the whole vocabulary where that is smaller."""


def is_integer(value: Any) -> bool:
    """Whether value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _is_number(value: Any) -> bool:
    """Whether value is a number that a float can hold; inf and NaN are not."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _option(
    default: Any, doc: str, bound: str = "", holds: Callable[[Any], bool] | None = None, kind: type | None = None
) -> Any:
    """A field of SamplingOptions. bound: says in words what `holds` tests. kind: the type that a valid value gets."""
    return dataclasses.field(default=default, metadata={"doc": doc, "bound": bound, "holds": holds, "kind": kind})


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """One request: what to sample, and how. Its fields are the options of `generate` and its relatives, by name."""

    prompts: tuple[str, ...] = _option((), "one text, or several; each gets its own images")
    class_id: int | None = _option(None, "number of a class, for a class-conditional image-only model")
    num_candidates: int = _option(
        16, "images per prompt; memory does not grow with it",
        f"an integer in [1, {MAX_CANDIDATES}]", lambda n: is_integer(n) and 1 <= n <= MAX_CANDIDATES, int,
    )  # fmt: skip
    seed: int | None = _option(
        0, "the same seed, candidate number and batch size give the same image; random (None) takes a new one "
        "and reports it",
        "an integer in [0, 4294967296), or random (None);",
        lambda s: s is None or (is_integer(s) and 0 <= s < 2**32), int,
    )  # fmt: skip
    top_k: int | None = _option(
        DEFAULT_TOP_K, "sample among the k most likely codes and those that tie with the last of them, or off (None)"
    )
    top_p: float | None = _option(
        None, "sample among the most likely codes that together just reach the probability p, or off (None)",
        "a number in (0, 1], or off (None);", lambda p: p is None or (_is_number(p) and 0 < p <= 1), float,
    )  # fmt: skip
    temperature: float = _option(
        1.0, "below 1 is more careful, above 1 more varied; 0 is greedy: the most likely code, the lowest id on a tie",
        "a finite number > 0, or 0 for greedy;", lambda t: _is_number(t) and t >= 0, float,
    )  # fmt: skip
    guidance_scale: float = _option(
        1.0, "above 1 follows the prompt more closely, for twice the memory and nearly twice the time. Works only for "
        "models fine-tuned with caption dropout; the published weights were trained without it",
        "a finite number >= 0, 1 for off;", lambda g: _is_number(g) and g >= 0, float,
    )  # fmt: skip
    batch_size: int | None = _option(
        None, "candidates sampled at once on each device; memory grows with it, and the last bits of images depend "
        "on it (default: by the device)",
        f"an integer in [1, {MAX_BATCH_SIZE}]",
        lambda b: b is None or (is_integer(b) and 1 <= b <= MAX_BATCH_SIZE), int,
    )  # fmt: skip
    mixed_batches: bool = _option(
        False, "fill batches with rows of several prompts: much faster for many prompts with few images each. In "
        "this mode too an image does not depend on the other prompts in the list",
        "True or False", lambda m: isinstance(m, bool),
    )  # fmt: skip
    jacobi: bool = _option(
        False, "sample all codes of a row at once, and repeat until nothing changes: the same codes but for rounding, "
        "in fewer passes. Faster for one candidate or a few",
        "True or False", lambda j: isinstance(j, bool),
    )  # fmt: skip
    prompt_codes: Any = _option(
        None, "codes int[m] of whole rows that every image begins with; `complete` and `variations` set it"
    )
    ranker: Ranker = _option(
        "auto", "what orders the images: auto (the CLIP model in the folder of the model, if it has one), a CLIP model "
        "(a folder, OpenAI's name such as ViT-B/32, or OWNER/NAME on the Hugging Face hub), likelihood (the "
        "log-probability that the transformer gave to the codes, for free), or off (None)",
        "auto, likelihood, off (None), or a CLIP model: a name, a folder or a ClipRanker;",
        lambda r: r is None or isinstance(r, (str, os.PathLike)) or hasattr(r, "scores"),
    )  # fmt: skip
    callback: Callback | None = _option(
        None, "called with a Progress after each row of codes; if it returns True, sampling stops, and codes that are "
        "missing are -1"
    )  # fmt: skip
    allow_empty: bool = _option(False, "take a blank prompt, which is otherwise an error")
    progress: bool | None = _option(
        None, "show progress bars on stderr; by default in terminals and notebooks",
        "True, False or None", lambda p: p is None or isinstance(p, bool),
    )  # fmt: skip

    @classmethod
    def of(cls, **keywords: Any) -> "SamplingOptions":
        """Makes options from keywords.

        Args:
            **keywords: fields by name.

        Returns:
            The options, not checked yet.

        Raises:
            TypeError: a name is unknown; the message has the nearest one.
        """
        if "kept_codes" in keywords:  # the public name of old
            keywords["prompt_codes"] = keywords.pop("kept_codes")
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in fields:
                near = did_you_mean(_OTHER_NAMES.get(name, name), SamplingKeywords.__annotations__)
                names = ", ".join(SamplingKeywords.__annotations__)
                raise TypeError(f"unknown option {name}{near or f'; there are {names}'}")
        return cls(**keywords)

    def check(self, config: Config | None = None, tokenizer: "TextTokenizer | None" = None) -> "SamplingOptions":
        """Checks every value.

        Args:
            config: the configuration of the model; None checks only what does not depend on the model.
            tokenizer: checks the prompts too.

        Returns:
            The same request with the numbers of Python instead of those of NumPy, and a random seed instead of None.

        Raises:
            UsageError: a value is out of range; the message has the value and the bound.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value, about = getattr(self, field.name), field.metadata
            if about["holds"] is not None and not about["holds"](value):
                bound = about["bound"] if about["bound"].endswith(";") else f"{about['bound']},"
                raise UsageError(f"{field.name} must be {bound} not {value!r}")
            values[field.name] = value if about["kind"] is None or value is None else about["kind"](value)
        if self.seed is None:
            values["seed"] = secrets.randbits(32)
        if self.ranker == "off":  # the command line's word
            values["ranker"] = None
        if self.progress is None:
            values["progress"] = _is_watched()
        if config is not None:
            values["top_k"] = _check_top_k(self.top_k, config.stage2.vocab_size_img)
            values["prompt_codes"] = _check_prompt_codes(self.prompt_codes, config)
            if config.image_only:
                self._check_image_only(config.stage2)
            elif tokenizer is not None:
                self._check_prompts(tokenizer)
        return SamplingOptions(**values)

    @property
    def guided(self) -> bool:
        """Whether candidates are sampled with guidance, which takes a second, blank prompt for each."""
        return self.guidance_scale != 1

    def keywords(self) -> "SamplingKeywords":
        """Gives the options as keywords of `generate`.

        Returns:
            All fields but prompts and class_id.
        """
        names = SamplingKeywords.__annotations__.keys() - {"kept_codes"}
        return SamplingKeywords(**{name: getattr(self, name) for name in names})  # type: ignore[typeddict-item]

    def _check_prompts(self, tokenizer: "TextTokenizer") -> None:
        if not self.prompts:
            raise UsageError("no prompt was given")
        for prompt in self.prompts:
            if isinstance(prompt, str) and not prompt.strip() and not self.allow_empty:
                raise UsageError("the prompt is blank; pass allow_empty=True to sample without text")
        tokenizer(list(self.prompts))

    def _check_image_only(self, config: Stage2Config) -> None:
        if self.ranker not in ("auto", "likelihood", "off", None):
            raise UsageError(f"ranker must be likelihood or off (None) for a model without text, not {self.ranker!r}")
        if self.guided:
            raise UsageError("guidance_scale is for text-to-image models: without a text there is nothing to guide by")
        class_prefix(config, None if self.class_id is None else [self.class_id], 1)


class SamplingKeywords(TypedDict, total=False):
    """The fields of SamplingOptions that generate and its relatives take by name; a test holds it to them."""

    num_candidates: int
    seed: int | None
    top_k: int | None
    top_p: float | None
    temperature: float
    guidance_scale: float
    batch_size: int | None
    mixed_batches: bool
    jacobi: bool
    prompt_codes: Any
    kept_codes: Any
    ranker: Ranker
    callback: Callback | None
    allow_empty: bool
    progress: bool | None


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_options(method: Method) -> Method:
    """Writes the options into the signature and docstring of a method that takes them as **options, for `help`."""
    fields = [field for field in dataclasses.fields(SamplingOptions) if field.name in SamplingKeywords.__annotations__]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields
    ]
    doc = "\n".join(f"    {field.name}: {field.metadata['doc']}." for field in fields)
    signature = inspect.signature(method)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    method.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
    method.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\nOptions:\n\n{doc}"
    return method


def as_prompts(prompt: Any) -> tuple[str, ...]:
    """Returns the prompts of a text or a sequence of texts. Raises UsageError for anything else."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)) or isinstance(prompt, np.ndarray):
        return tuple(str(text) if isinstance(text, np.str_) else text for text in prompt)
    raise UsageError(f"a prompt is a text or a list of texts, not {type(prompt).__name__}")


def class_number(name: str, names: Sequence[str] | None) -> int:
    """Returns the number of a class by its name; a number as text is itself. names: of all classes, if they have names.

    Raises UsageError for an unknown name.
    """
    if names is not None and name in names:
        return list(names).index(name)
    if name.isdecimal():
        return int(name)
    if names is None:
        raise UsageError(f"the classes of this model have no names; name one by its number, not {name!r}")
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise UsageError(f"the model has no class {name!r}, only {listed}{did_you_mean(name, names)}")


def class_prefix(config: Stage2Config, labels: Any, rows: int) -> np.ndarray:
    """Returns prefix ids int32[rows, 1] of the image-only model. labels: int[rows]; None for an unconditional one.

    Raises UsageError for labels that the model does not know, or does not take.
    """
    classes = config.hparams.n_classes if config.use_cls_cond else None
    if (labels is None) != (classes is None):
        raise UsageError(
            "this model is unconditional and takes no class"
            if classes is None
            else f"this model is class-conditional: name a class in [0, {classes})"
        )
    if labels is None:
        return np.zeros((rows, 1), np.int32)
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UsageError(f"labels must be [B], not {list(labels.shape)}")
    check_ids(labels, classes or 1, "classes")
    return labels[:, None].astype(np.int32)


def default_batch_size(rows: int, backend: str, *, small: bool) -> int:
    """Returns the rows per device and compiled call. It depends on these three alone, and so do images.

    rows: how many are sampled. A power of two up to 16 on CPU; half of that for a small network, which has one device
    per core there. Elsewhere a power of two up to 32, and from there the multiple of 32 up to 128 that fits, because
    each call reads all weights once and padding up to 128 would waste a quarter of the usual 96.
    """
    power = 1 << (rows - 1).bit_length()
    if backend == "cpu":
        at_most_16 = min(16, power)
        return max(1, at_most_16 // 2) if small else at_most_16
    return power if power <= 32 else min(128, 32 * math.ceil(rows / 32))


def check_quantize(quantize: Any) -> None:
    """Raises UsageError unless it is one of the words of Quantize, or None."""
    if quantize not in (None, "weights", "weights+cache"):
        raise UsageError(f"quantize must be 'weights', 'weights+cache' or None, not {quantize!r}")


def check_every(every: Any, config: Stage1Config) -> None:
    """Raises UsageError unless it is None or a number of codes that makes whole rows."""
    side = config.code_size
    if every is not None and (not is_integer(every) or every < 1 or every % side):
        raise UsageError(
            f"every must be a multiple of {side} codes, which is one row of the image, or None; not {every!r}"
        )


def check_keep_rows(keep_rows: Any, config: Stage1Config) -> int:
    """Raises UsageError unless it is an integer in [1, h - 1]."""
    side = config.code_size
    if not is_integer(keep_rows) or not 1 <= keep_rows < side:
        raise UsageError(
            f"keep_rows must be an integer in [1, {side - 1}], rows of codes, each {config.hparams.resolution // side} "
            f"pixels high; not {keep_rows!r}"
        )
    return int(keep_rows)


def check_image(image: Any, size: int) -> np.ndarray:
    """One image [size, size, 3] from a PIL image in RGB, or from an array. Raises UsageError for anything else."""
    mode = getattr(image, "mode", "RGB")
    if mode != "RGB":
        raise UsageError(f"the image has the mode {mode}; convert it to RGB first")
    image = as_array(image, "an image")
    if image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"an image must be [{size}, {size}, 3], not {list(image.shape)}")
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        raise UsageError(
            f"the image is {width} x {height} pixels; this model knows {size} x {size} only: crop or resize it first"
        )
    return image


def check_pixels(images: np.ndarray) -> None:
    """Raises UsageError unless they are uint8, or floating point in [0, 1]."""
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UsageError(f"images must be uint8 or floating point, not {images.dtype}")
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise UsageError(f"floating point images must lie in [0, 1], not [{images.min():.3g}, {images.max():.3g}]")


def check_ids(ids: np.ndarray, limit: int, what: str) -> None:
    """Raises UsageError unless ids are integers in [0, limit)."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{what} must be integers, not {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        raise UsageError(f"{what} must lie in [0, {limit}), not [{ids.min()}, {ids.max()}]")


def as_array(value: Any, what: str) -> np.ndarray:
    """Makes a NumPy array of an array, a PIL image or lists of numbers. Raises UsageError for anything else."""
    remedy = "open it first (PIL.Image.open)" if isinstance(value, (str, bytes, Path)) else "give an array"
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        kind = type(value).__name__
        raise UsageError(f"{what}: an array of numbers or a PIL image is wanted, not {kind}; {remedy}")
    return array


def _is_watched() -> bool:
    """Whether a person sees what is written to stderr: in a terminal, or in a notebook."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _check_top_k(top_k: Any, vocab_size: int) -> int | None:
    if isinstance(top_k, _DefaultTopK):
        return min(int(top_k), vocab_size)
    if top_k is not None and (not is_integer(top_k) or not 1 <= top_k <= vocab_size):
        raise UsageError(
            f"top_k must be an integer in [1, {vocab_size}] (the number of codes), or off (None); not {top_k!r}"
        )
    return None if top_k is None else int(top_k)


def _check_prompt_codes(codes: Any, config: Config) -> np.ndarray:
    """int32[m]."""
    side = config.stage1.code_size
    codes = np.zeros(0, np.int32) if codes is None else as_array(codes, "prompt_codes")
    if codes.ndim != 1 or len(codes) % side or len(codes) >= side * side:
        raise UsageError(
            f"prompt_codes must be the codes of whole rows, [m] with m a multiple of {side} below {side * side}, "
            f"not {list(codes.shape)}"
        )
    check_ids(codes, config.stage2.vocab_size_img, "prompt_codes")
    return codes.astype(np.int32)
