"""A folder in which the commands of the documentation run as they are written.

It has what the pages name: photos with captions, model folders, tokenizers, a run. Small models with random weights
stand in for those that are downloaded: the published one in the cache, and CLIP and OWNER/NAME in the cache of the hub.
"""

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from commands import Installed
from image_folders import write_tar
from PIL import Image

from mindalle_jax.config.schema import Config
from mindalle_jax.interop.mindalle import import_checkpoint

SHORT = {
    "finetune": "experiment.epochs=1 experiment.total_batch_size=2 experiment.local_batch_size=1 "
    "experiment.valid_batch_size=2 training.warmup_steps=0 training.ema_decay=0 dataset.image_resolution=64 "
    "optimizer.max_steps=2",
    "train-vqgan": "experiment.epochs=1 experiment.total_batch_size=2 experiment.local_batch_size=1 "
    "experiment.valid_batch_size=2",
    "train-clip": "experiment.epochs=1 experiment.total_batch_size=2 experiment.local_batch_size=2 "
    "experiment.valid_batch_size=2 training.warmup_steps=0 optimizer.max_steps=2",
}
"""Verb -> what is added to its commands, so that two steps on two images are a run."""
TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class World:
    """The folder, and the package that runs in copies of it."""

    folder: Path
    installed: Installed

    @property
    def environment(self) -> dict[str, str]:
        """One CPU device, caches of this world, and no network."""
        return {
            "MINDALLE_CACHE": str(self.folder.parent / "cache"),
            "HF_HOME": str(self.folder.parent / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.folder.parent),
            "PATH": f"{self.installed.folder / 'bin'}:{os.environ['PATH']}",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_NUM_CPU_DEVICES": "1",
        }

    def copy(self, target: Path) -> Path:
        """A copy in which one command or page may write."""
        return Path(shutil.copytree(self.folder, target / "world"))

    def command(self, command: str, folder: Path) -> None:
        """Runs one line of a page in `folder` by a shell, and asserts that it succeeds."""
        words = shlex.split(command, comments=True)
        line = command.partition(" #")[0] + (f" {SHORT[words[1]]}" if words[1] in SHORT else "")
        run = "import subprocess, sys; sys.exit(subprocess.run(['bash', '-c', sys.argv[1]]).returncode)"
        done = self.installed.run("-c", run, line, cwd=folder, timeout_s=TIMEOUT_S, **self.environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def python(self, code: str, folder: Path) -> None:
        """Runs Python code of a page in `folder`, and asserts that it succeeds. Nothing is shown on a screen."""
        quiet = "from PIL import ImageShow\nImageShow._viewers.clear()\n"
        (folder / "page.py").write_text(quiet + code, encoding="utf-8")
        done = self.installed.run("page.py", cwd=folder, timeout_s=TIMEOUT_S, **self.environment)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def remove_outputs(command: str, folder: Path) -> None:
    """Removes what a command says it writes, and is there already."""
    words = shlex.split(command, comments=True)
    outputs = re.findall(r"(?:--out|-o) (\S+)", command)
    if words[1] == "convert":
        outputs.append(words[3])
    for output in outputs:
        shutil.rmtree(folder / output, ignore_errors=True)


def stand_in_config(tiny: Config) -> Config:
    """The tiny model with 64 x 64 pixels and 16 x 16 codes, as many as the published model has, out of 160."""
    hparams1 = dataclasses.replace(tiny.stage1.hparams, resolution=64, attn_resolutions=(16,))
    stage1 = dataclasses.replace(tiny.stage1, n_embed=160, hparams=hparams1)
    hparams2 = dataclasses.replace(tiny.stage2.hparams, ctx_len_img=256)
    stage2 = dataclasses.replace(tiny.stage2, vocab_size_img=160, hparams=hparams2)
    return dataclasses.replace(
        tiny, dataset=dataclasses.replace(tiny.dataset, image_resolution=64), stage1=stage1, stage2=stage2
    )


def write_photo(path: Path, number: int, caption: str | None = None) -> None:
    """A noisy image of 64 x 64 pixels, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def build_world(
    root: Path, installed: Installed, tiny: Config, clip: Path, write_folder: Callable[[Path, Config], Path]
) -> World:
    """Writes everything into root/world, root/cache and root/hub."""
    world = World(root / "world", installed)
    folder = world.folder
    folder.mkdir()
    captions = ["a cat", "the dog and the cat", "a painting of a cat", "the cat 12"]
    for place in ("photos", "more-photos", "scenes-clip", "scenes-valid"):
        for number, caption in enumerate(captions):
            write_photo(folder / place / f"{number:04d}.png", number, caption)
    for split, count in (("train", 200), ("val", 4)):
        for number in range(count):
            write_photo(folder / "birds" / split / f"class{number:03}" / f"{number}.png", number)
    for number in range(332):
        width = 2 if number < 32 else 5
        photo, caption = (folder / "photos" / f"0000.{kind}" for kind in ("png", "txt"))
        members: dict = {f"{number}.png": photo.read_bytes(), f"{number}.txt": caption.read_bytes()}
        for digits in {width, 5}:
            write_tar(folder / f"cc3m-{number:0{digits}d}.tar", members)
    write_photo(folder / "cat.png", 0)
    write_photo(folder / "dog.png", 1)
    (folder / "prompts.txt").write_text("a cat\nthe dog\n", encoding="utf-8")

    config = stand_in_config(tiny)
    published = write_folder(root / "cache" / "minDALL-E" / "1.3B", config)
    shutil.copytree(published, folder / "1.3B")
    for name in ("models/mindalle", "runs/vqgan", "runs/demo-cats"):
        import_checkpoint(published, folder / name)
    classes = dataclasses.replace(
        config.stage2,
        type="igpt",
        use_cls_cond=True,
        hparams=dataclasses.replace(config.stage2.hparams, n_classes=1000),
    )
    write_folder(root / "classes", dataclasses.replace(config, stage2=classes))
    for name in ("models/imagenet", "runs/birds"):
        import_checkpoint(root / "classes", folder / name)
    shutil.copytree(clip, folder / "clip-vit-base-patch32")
    _add_to_hub(root / "hub", "openai/clip-vit-base-patch32", "main", clip)
    _add_to_hub(root / "hub", "OWNER/NAME", "v2", published)

    return world


def add_results(world: World) -> None:
    """Adds what earlier commands of a page would have made: tokenizers, a run with LoRA, codes and images."""
    folder = world.folder
    world.command("mindalle train-tokenizer photos --out tokenizer --vocab-size 8192 --kind mindalle", folder)
    world.command("mindalle train-tokenizer photos --out clip-tokenizer --vocab-size 8192 --kind clip", folder)
    world.command(
        "mindalle finetune --config finetune-captions --out runs/cats data.train=photos data.valid=more-photos "
        "training.lora.rank=2",
        folder,
    )
    world.command("mindalle prepare-codes --model models/mindalle --data photos --out photos-codes", folder)
    world.command('mindalle sample "a cat" --model models/mindalle --out images -n 4 --ranker off', folder)
    shown = folder / "out/a-red-apple-seed0/rank001_score0.7886_seed0_candidate001.png"
    shown.parent.mkdir(parents=True)
    shutil.copy(folder / "images/seed0_candidate003.png", shown)


def _add_to_hub(hub: Path, repository: str, revision: str, files: Path) -> None:
    """A repository in the cache that huggingface_hub keeps."""
    folder = hub / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(files, folder / "snapshots" / "0")
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text("0", encoding="utf-8")
