"""The license and the model card that a converted folder gets."""

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


EXAMPLE = """
    from mindalle_jax import {cls}
    model = {cls}.from_pretrained("PATH-OF-THIS-FOLDER")
"""


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
