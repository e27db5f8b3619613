"""`mindalle configs`: the presets that come with the package."""

import argparse

from mindalle_jax.config.presets import first_line, preset_files
from mindalle_jax.errors import UsageError, did_you_mean

EXAMPLE = """
mindalle configs
mindalle configs finetune-captions
"""


def add_configs_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle configs`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this preset; add `> my.yaml` to copy it")


def run_configs(arguments: argparse.Namespace) -> None:
    """Lists the presets, or prints one."""
    presets = preset_files()
    if arguments.name is None:
        width = max(map(len, presets)) + 2
        for name, file in presets.items():
            print(f"{name:{width}}{first_line(file)}")
    elif arguments.name in presets:
        print(presets[arguments.name].read_text(encoding="utf-8"), end="")
    else:
        hint = did_you_mean(arguments.name, presets) or "; mindalle configs lists them"
        raise UsageError(f"there is no preset {arguments.name}{hint}")
