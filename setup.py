"""What pyproject.toml cannot say: configs/ is the package mindalle_jax.configs, and links in the README are absolute.

A package index shows the README without the files beside it, so its images and pages need addresses.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?:|#)([^)\s]+)\)")


def with_absolute_links(readme: str, repository: str, tag: str) -> str:
    """The README with the addresses of files of this version; images as files, everything else as pages."""
    return RELATIVE_LINK.sub(
        lambda link: f"{link[1]}{link[2]}{repository}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})", readme
    )


setup(
    include_package_data=False,  # package_data says all of it
    packages=[*find_packages(include=["mindalle_jax*"]), "mindalle_jax.configs"],
    package_dir={"mindalle_jax.configs": "configs"},
    package_data={"mindalle_jax": ["py.typed", "demo/**", "demo-scenes/**"], "mindalle_jax.configs": ["**/*.yaml"]},
    long_description=with_absolute_links(
        (ROOT / "README.md").read_text(encoding="utf-8"), PROJECT["urls"]["Repository"], f"v{PROJECT['version']}"
    ),
    long_description_content_type="text/markdown",
)
