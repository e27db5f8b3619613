"""The license and the model card that a converted folder gets."""

import contextlib
import re
import shutil
from pathlib import Path

import mindalle_jax
from mindalle_jax.config.schema import Config

CODE_LICENSE_NOTE = """\
License of the weights in this folder

These weights were converted from "{source}" and keep the license of that source.

The published minDALL-E/1.3B weights (Kakao Brain, 2021), and all weights fine-tuned from them, are under
CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): give credit to Kakao Brain, do not use them
commercially, and share derivatives under the same license. The VQGAN of stage 1 is based on the f16-16384 model of
Esser, Rombach and Ommer (2021).

The code of mindalle-jax is under Apache-2.0, which does not apply to these weights.
"""


CARD = """\
---
library_name: mindalle-jax
pipeline_tag: {task}
license: other
license_name: see-license-file
license_link: LICENSE
---

# {title}

Converted from `{source}` by mindalle-jax {version}: {parameters:,} parameters.
{example}
- Images: only {resolution} x {resolution} pixels, made of {codes} codes. There are {n_embed} different codes.
- {use}
- Limits: it was trained on captions from the web and repeats their biases and errors. It cannot spell or count.
- License of the weights: see LICENSE.
"""


RUN_CARD = """\
---
library_name: mindalle-jax
pipeline_tag: {task}
base_model: {base}
{license}
---

# {title}

This model was fine-tuned from `{base}` by mindalle-jax {version}.
{example}
{rows}
- License of the weights: that of the base model{license_name}, see LICENSE.
{sheet}"""


OTHER_LICENSE = """\
license: other
license_name: see-license-file
license_link: LICENSE"""


EXAMPLE = """
    from mindalle_jax import {cls}
    model = {cls}.from_pretrained("PATH-OF-THIS-FOLDER")
"""


def run_card(base: Path, folder: Path, config: Config, name: str, facts: dict[str, object]) -> str:
    """Returns the model card of a run.

    base, name: the folder and the name of the model that the run started from, whose license the result has. folder:
    the model folder, whose newest sheet in samples/ is shown. facts: what else is known of the run, name -> value; None
    is left out.
    """
    license = _license(base)
    task, cls = ("unconditional-image-generation", "ImageGPT") if config.image_only else ("text-to-image", "Dalle")
    sheets = sorted((folder / "samples").glob("step_*.png"))
    size = config.stage1.hparams.resolution
    return RUN_CARD.format(
        task=task,
        base=name,
        license=OTHER_LICENSE if license is None else f"license: {license}",
        license_name="" if license is None else f", {license}",
        title=folder.name,
        version=mindalle_jax.__version__,
        example=EXAMPLE.format(cls=cls),
        rows="\n".join(
            f"- {name}: {value}"
            for name, value in {"Images": f"{size} x {size} pixels", **facts}.items()
            if value is not None
        ),  # fmt: skip
        sheet=f"\n![Samples]({sheets[-1].relative_to(folder).as_posix()})\n" if sheets else "",
    )


def _license(folder: Path) -> str | None:
    """Returns the license that the model card of a folder names, such as "apache-2.0"; None if it names none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        header = (folder / "README.md").read_text(encoding="utf-8").partition("---\n")[2].partition("\n---")[0]
        if found := re.search(r"^license: *([a-z0-9.-]+) *$", header, re.MULTILINE):
            return None if found[1] == "other" else found[1]
    return None


def write_license_and_card(source: Path, folder: Path, config: Config, parameters: int, draws: bool) -> None:
    """Writes LICENSE and README.md, the model card, into a converted folder.

    LICENSE is that of the source if it has one, else CODE_LICENSE_NOTE. draws: whether the folder holds a transformer.
    """
    own = (source if source.is_dir() else source.parent) / "LICENSE"
    if own.is_file():
        shutil.copyfile(own, folder / "LICENSE")
    else:
        (folder / "LICENSE").write_text(CODE_LICENSE_NOTE.format(source=source.name), encoding="utf-8")
    if not draws:
        task, cls, use = "image-to-image", None, "A VQGAN alone: turns images into codes and back. It cannot sample."
    elif config.image_only:
        task, cls = "unconditional-image-generation", "ImageGPT"
        use = "Makes images without text, of a class or of any kind."
    else:
        task, cls, use = "text-to-image", "Dalle", "Makes images from English prompts."
    card = CARD.format(
        task=task,
        title=source.name if source.is_dir() else source.stem,
        source=source.name,
        version=mindalle_jax.__version__,
        parameters=parameters,
        example=EXAMPLE.format(cls=cls) if cls else "",
        resolution=config.stage1.hparams.resolution,
        codes=config.stage1.code_size**2,
        n_embed=config.stage1.n_embed,
        use=use,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
