"""Presets: the configurations that come with the package, by name."""

from pathlib import Path

import mindalle_jax


def preset_files() -> dict[str, Path]:
    """Returns {name: YAML file} of all presets, sorted: `finetune-captions`, `emoji/vqgan`, ...

    A wheel holds them inside the package. In a checkout, also in an editable install of one, they lie beside it.
    """
    package = Path(mindalle_jax.__file__).parent
    inside, beside = package / "configs", package.parent / "configs"
    folder = inside if inside.is_dir() else beside
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def first_line(file: Path) -> str:
    """Returns the first line of a preset, a comment that says what the preset is for."""
    with file.open(encoding="utf-8") as lines:
        return next(lines, "").removeprefix("#").strip()
