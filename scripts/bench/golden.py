"""Compares the port with arrays of the original implementation, in float32, on the device that JAX picks.

    python -m scripts.bench.golden
    JAX_PLATFORMS=cpu python -m scripts.bench.golden --golden ../shared/golden_small

Compares token ids, logits, greedy codes, codes of images, and pixels, for the text-to-image model and both image-only
models, through the public API. Then compares greedy codes for every other attention backend that runs here in float32,
and lists the rest with the reason. Prints a table, then one JSON line.

Fails with exit code 1 if a difference is over the tolerance: 1e-4 on CPU, and 1e-3 elsewhere, since other devices add
in another order. Different codes are an error on CPU only, because one near tie changes all codes after it.
"""

import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.cli.parser import path
from mindalle_jax.interop.mindalle import import_checkpoint
from scripts.bench import common
from scripts.bench.goals import BACKENDS

FOLDERS = (common.ROOT / "tests" / "golden", common.ROOT.parent / "shared" / "golden_small")
TOLERANCE_ON_CPU, TOLERANCE = 1e-4, 1e-3


class Differences:
    """The largest difference, and the least share of equal integers, of each quantity."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.equal: dict[str, float] = {}
        self.not_run: dict[str, str] = {}
        """Attention backend -> why it does not run on this device."""

    def close(self, name: str, actual: Any, expected: np.ndarray) -> None:
        """Compares floating point arrays of one shape."""
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        self.largest[name] = float(f"{np.abs(actual - expected).max():.3g}")

    def same(self, name: str, actual: Any, expected: np.ndarray) -> None:
        """Compares integer arrays; the expected one is broadcast to the other."""
        self.equal[name] = round(float(np.mean(np.asarray(actual) == expected)), 6)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def images_of(arrays: np.ndarray) -> np.ndarray:
    """Images f32[n, 3, H, W] in [-1, 1] as the API takes them: [n, H, W, 3] in [0, 1]."""
    return np.moveaxis(arrays, 1, -1) * 0.5 + 0.5


def compare_text_to_image(golden: Path, work: Path, found: Differences) -> None:
    """Compares the text-to-image model."""
    arrays = read_arrays(golden / "golden.npz")
    prompts = json.loads((golden / "prompts.json").read_text(encoding="utf-8"))
    import_checkpoint(golden / "model", work / "model")
    model = Dalle.from_pretrained(work / "model", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one prompt is cut, on purpose
        found.same("token ids", model.tokenize(prompts), arrays["tok_ids"])
    image_logits, text_logits = model.logits(arrays["s2_txt"], arrays["s2_img"])
    found.close("image logits", image_logits, arrays["s2_logits_img"])
    found.close("text logits", text_logits, arrays["s2_logits_txt"])
    chosen = [prompts[i] for i in (0, 1, 5)]
    options: dict[str, Any] = {"num_candidates": 2, "batch_size": 2, "top_k": 1}
    found.same("greedy codes", model.generate_codes(chosen, **options), arrays["s2_greedy"][:, None])
    found.same("codes of images", model.encode_images(images_of(arrays["vq_x"])).reshape(2, -1), arrays["vq_codes"])
    found.close("pixels", model.decode_codes(arrays["vq_dec_codes"]), np.moveaxis(arrays["pixels"], 1, -1))
    default = model._transformer
    for attention in BACKENDS:
        if attention != default.attention:
            model._transformer = default.copy(attention=attention)
            try:
                codes = model.generate_codes(chosen, **options)
            except Exception as error:  # a backend may raise anything on a device that it does not support
                found.not_run[attention] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                found.same(f"greedy codes, {attention}", codes, arrays["s2_greedy"][:, None])


def compare_image_only(golden: Path, work: Path, kind: str, found: Differences) -> None:
    """Compares an image-only model. kind: cls or uncond."""
    source = work / f"original-{kind}"
    source.mkdir()
    shutil.copy(golden / f"igpt_{kind}.yaml", source / "config.yaml")
    shutil.copy(golden / "model" / "stage1_last.ckpt", source)
    shutil.copy(golden / f"igpt_{kind}_init.ckpt", source / "stage2_last.ckpt")
    import_checkpoint(source, work / kind)
    model = ImageGPT.from_pretrained(work / kind, dtype="float32")
    arrays = {name.removeprefix(f"{kind}_"): a for name, a in read_arrays(golden / "golden_igpt.npz").items()}
    logits = model.logits(arrays["codes"], arrays["labels"] if kind == "cls" else None)
    found.close(f"logits, {kind}", logits, arrays["logits"])
    class_id = 3 if kind == "cls" else None
    codes = model.generate(class_id, num_candidates=2, top_k=1, batch_size=2).codes
    found.same(f"greedy codes, {kind}", codes, arrays["greedy"])


def main() -> None:
    """Parses the command line, compares, prints."""
    parser = common.make_parser(__doc__)
    default = next((folder for folder in FOLDERS if folder.is_dir()), None)
    text = "folder of the arrays (default: tests/golden, or ../shared/golden_small)"
    parser.add_argument("--golden", type=path, default=default, metavar="DIR", help=text)
    golden = parser.parse_args().golden
    if golden is None or not (golden / "golden.npz").is_file():
        sys.exit(f"scripts.bench.golden: no golden.npz in {golden or ' or '.join(map(str, FOLDERS))}; give --golden")
    found, start = Differences(), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        compare_text_to_image(golden, Path(work), found)
        for kind in ("cls", "uncond"):
            compare_image_only(golden, Path(work), kind, found)
    device = jax.devices()[0]
    tolerance = TOLERANCE_ON_CPU if device.platform == "cpu" else TOLERANCE
    # NumPy's maximum, because it keeps NaN.
    largest, equal = float(np.max(list(found.largest.values()))), min(found.equal.values())
    common.report(
        common.conditions("golden", device, "float32", 2),
        {
            "largest_differences": found.largest,
            "equal_shares": found.equal,
            "attention_not_run": found.not_run,
            "largest_difference": largest,
            "least_equal_share": equal,
            "tolerance": tolerance,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    if not largest <= tolerance or (device.platform == "cpu" and equal < 1):
        sys.exit(f"scripts.bench.golden: differs by {largest:g} (tolerance {tolerance:g}); {equal:.2%} of codes equal")


if __name__ == "__main__":
    main()
