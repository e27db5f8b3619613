"""Measures guidance after caption dropout: fine-tunes demo-scenes with several shares of blank captions, and samples.

    python -m scripts.scenes.guidance --out DIR

DIR/images has scenes on tiles, which demo-scenes does not know, and DIR/dropout-S the run with the share S.
DIR/guidance.json has the share of captions that are right in everything, by guidance scale. If it is interrupted, the
same command resumes it.
"""

import argparse
import sys
from typing import Any

from mindalle_jax import Dalle
from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from scripts.recipe import CONFIGS, run, write_metrics
from scripts.scenes.accuracy import accuracy, sample_scenes
from scripts.scenes.dataset import write_scenes

NUM_IMAGES = 2000
SCALES = (1.0, 1.5, 2.0, 3.0)


def main(arguments: argparse.Namespace) -> None:
    """Renders images, and for each share of blank captions trains and measures."""
    out, found = arguments.out, {}
    write_scenes(out / "images", "train", 0, NUM_IMAGES, style="tiled")
    for share in arguments.dropout:
        folder = out / f"dropout-{share:g}"
        changes = [f"training.caption_dropout={share:g}", f"optimizer.max_steps={arguments.steps}"]
        config = CONFIGS / "scenes" / "captions.yaml"
        run("finetune", "--config", config, "--out", folder, f"data.train={out}/images", *changes)
        model = Dalle.from_pretrained(folder)
        found[f"{share:g}"] = {f"{scale:g}": measure(model, arguments.prompts, scale) for scale in SCALES}
    write_metrics(out / "guidance.json", {"prompts": arguments.prompts, "steps": arguments.steps, "right": found})


def measure(model: Dalle, prompts: int, scale: float) -> dict[str, float]:
    """Returns the shares of captions that are right in each attribute, and in all, with a guidance scale."""
    options: dict[str, Any] = {} if scale == 1 else {"guidance_scale": scale}
    return accuracy(one.first_verdict for one in sample_scenes(model, "valid", prompts, style="tiled", **options))


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="where everything goes")
    text = "shares of captions that are left blank"
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], metavar="S", help=text)
    text = "steps of each run; after 500 nearly all is right without guidance"
    parser.add_argument("--steps", type=int, default=150, metavar="N", help=text)
    parser.add_argument("--prompts", type=int, default=100, metavar="N", help="captions to measure with")
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("guidance.py", lambda: main(parser().parse_args())))
