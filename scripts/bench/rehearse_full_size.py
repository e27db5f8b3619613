"""Makes a full-size checkpoint with random weights, converts it, samples from it, exports it, and compares both.

    python -m scripts.bench.rehearse_full_size --work /tmp/rehearsal

Downloads nothing. Each stage runs in a process of its own, so that its memory is measured alone. Needs 17 GB of disk at
full size, and frees it at the end unless --keep is given. Prints a table, then one JSON line.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindalle_jax.cli.parser import path
from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.interop.key_maps import slots
from mindalle_jax.interop.mindalle import export_checkpoint, import_checkpoint
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.storage.files import check_free_disk, check_output
from mindalle_jax.storage.model_folder import STAGE_FILES
from mindalle_jax.storage.weights import Stage, count_parameters
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE
from scripts.bench import common

STAGES = ("make", "convert", "sample", "export", "compare")


def make(config: Config, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint folder in the original's format: gains about 1, all else N(0, 0.02), no two tensors equal."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "tokenizer").mkdir()
    vocab = ["[UNK]", "[PAD]", *(c + end for end in ("", "</w>") for c in "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-")]
    vocab += [f"#{i}" for i in range(len(vocab), config.stage2.vocab_size_txt)]
    (folder / "tokenizer" / VOCAB_FILE).write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "tokenizer" / MERGES_FILE).write_text("#version: 0.2\n")
    stages: tuple[Stage, Stage] = ("stage1", "stage2")
    for number, stage in enumerate(stages):
        table = {slot.torch_key: slot for slot in slots(config, stage)}
        places = {key: i for i, key in enumerate(table)}

        def read(key: str, number: int = number, table: Any = table, places: Any = places) -> np.ndarray:
            random = np.random.default_rng((number, places[key])).standard_normal(table[key].torch_shape, np.float32)
            return random * np.float32(0.02) + np.float32(table[key].path.endswith("scale"))

        header = [(key, np.dtype(np.float32), slot.torch_shape) for key, slot in table.items()]
        write_torch_archive(folder / STAGE_FILES[stage], header, read)
    return {"bytes": _size(folder)}


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Converts as `mindalle convert` does."""
    return _transfer(import_checkpoint(source, target), target)


def sample(folder: Path, out: Path) -> dict[str, Any]:
    """Loads the model and samples one image, from prompt to PNG."""
    import jax

    from mindalle_jax import Dalle

    start = time.perf_counter()
    model = Dalle.from_pretrained(folder)
    loaded = time.perf_counter()
    generation = model.generate("a painting of a cat", num_candidates=1, progress=True)
    first = time.perf_counter()
    again = model.generate("another prompt", num_candidates=1, seed=1, progress=True)
    done = time.perf_counter()
    (image,) = generation.save(out)
    return {
        "load_s": round(loaded - start, 2),
        "first_image_s": round(first - loaded, 2),
        "second_image_s": round(done - first, 2),
        "different_codes": int((generation.codes != again.codes).sum()),
        "image_bytes": image.stat().st_size,
        "device": jax.devices()[0].device_kind,
        "dtype": model.dtype,
    }


def export(folder: Path, target: Path) -> dict[str, Any]:
    """Exports as `mindalle convert --to torch` does."""
    return _transfer(export_checkpoint(folder, target), target)


def _transfer(report: Any, target: Path) -> dict[str, Any]:
    return {
        "bytes": _size(target),
        "write_s": round(report.write_s, 2),
        "verify_s": round(report.verify_s, 2),
        "GB_per_s": round(report.weight_bytes / 1e9 / report.write_s, 3),
    }


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Checks that two folders in the original's format hold the same tensors, bit for bit."""
    tensors = 0
    for name in STAGE_FILES.values():
        with TorchArchive(first / name) as a, TorchArchive(second / name) as b:
            left, right = a.state_dict(), b.state_dict()
            if set(left) != set(right):
                raise SystemExit(f"{name}: keys differ: {sorted(set(left) ^ set(right))[:5]}")
            for key in left:
                x, y = a.read(left[key]), b.read(right[key])
                if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                    raise SystemExit(f"{name}: {key} differs")
                tensors += 1
    return {"equal_tensors": tensors}


def main() -> None:
    """Runs the stages, each in a child process."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--work", type=path, required=True, help="a new folder to work in")
    parser.add_argument(
        "--config", type=path, default=common.PRESETS["1.3b"], help="the network (default: the published one)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder (default: remove it)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config, work = load_config(arguments.config), arguments.work
    source, converted, exported = work / "source", work / "converted", work / "exported"
    if arguments.stage:
        run = {
            "make": lambda: make(config, source),
            "convert": lambda: convert(source, converted),
            "sample": lambda: sample(converted, work / "images"),
            "export": lambda: export(converted, exported),
            "compare": lambda: compare(source, exported),
        }[arguments.stage]
        with _peak_memory() as memory:
            start = time.perf_counter()
            result = run() | {"seconds": round(time.perf_counter() - start, 2)}
        print(json.dumps(result | memory))
        return

    check_output(work, overwrite=False)
    parameters = {stage: count_parameters(config, stage) for stage in STAGE_FILES}
    check_free_disk(work, 3 * 4 * sum(parameters.values()) + (256 << 20), "the rehearsal")
    work.mkdir(parents=True)
    results: dict[str, Any] = {}
    try:
        for stage in STAGES:
            command = [sys.executable, "-m", "scripts.bench.rehearse_full_size"]
            command += ["--work", str(work.resolve()), "--config", str(arguments.config.resolve())]
            child = subprocess.run([*command, "--stage", stage], stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
            if child.returncode:
                raise SystemExit(f"stage {stage} failed")
            results[stage] = json.loads(child.stdout.strip().splitlines()[-1])
            print(f"{stage:8}", *(f"{key}={value}" for key, value in results[stage].items()))
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    head = common.conditions(
        "rehearse_full_size", results["sample"]["device"], results["sample"]["dtype"], 1,
        config=arguments.config.stem, parameters=parameters,
    )  # fmt: skip
    common.report(head, results)


@contextlib.contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Fills in the peak of this process's anonymous memory, sampled every 20 ms (Linux), in MB of 10**6 bytes.

    Anonymous memory is the memory of the process itself. Pages of files, which the kernel can drop, do not count.
    """
    result: dict[str, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    result["peak_anon_MB"] = max(result.get("peak_anon_MB", 0), int(line.split()[1]) * 1024 // 10**6)
            stop.wait(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    if Path("/proc/self/status").exists():
        thread.start()
    yield result
    stop.set()
    if thread.is_alive():
        thread.join()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
