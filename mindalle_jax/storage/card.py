"""The licence and the model card that a converted folder gets."""

import shutil
from pathlib import Path

import mindalle_jax
from mindalle_jax.config.schema import Config

CODE_LICENSE_NOTE = """\
Licence of the weights in this folder

They were converted from "{source}" and keep the licence of that source.

The published minDALL-E/1.3B weights (Kakao Brain, 2021), and any weights fine-tuned from them, are under
CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): credit Kakao Brain, no commercial use, share
derivatives alike. The VQGAN of stage 1 goes back to the f16-16384 model of Esser, Rombach and Ommer (2021).

The mindalle-jax code is under Apache-2.0; that does not extend to these weights.
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
- Images: {resolution} x {resolution} pixels only, {codes} codes out of {n_embed}.
- {use}
- Limits: trained on captions from the web; it reproduces their biases and errors, cannot spell, and counts badly.
- Licence of the weights: see LICENSE.
"""


EXAMPLE = """
    from mindalle_jax import {cls}
    model = {cls}.from_pretrained("PATH-OF-THIS-FOLDER")
"""


def write_license_and_card(source: Path, folder: Path, config: Config, parameters: int, draws: bool) -> None:
    """The licence of the source if it has one, else what is known of it; and a model card."""
    own = (source if source.is_dir() else source.parent) / "LICENSE"
    if own.is_file():
        shutil.copyfile(own, folder / "LICENSE")
    else:
        (folder / "LICENSE").write_text(CODE_LICENSE_NOTE.format(source=source.name), encoding="utf-8")
    if not draws:
        task, cls, use = "image-to-image", None, "A VQGAN alone: images to codes and back. Nothing in here draws."
    elif config.image_only:
        task, cls = "unconditional-image-generation", "ImageGPT"
        use = "Images without text, by class or freely."
    else:
        task, cls, use = "text-to-image", "Dalle", "Text to image, English prompts."
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
