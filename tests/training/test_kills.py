"""A run that is interrupted at any moment loses nothing, can give a model at once, and ends as one that was not.

In the suite as many as there is time for; pytest -m slow for the figures of docs/log.md.
"""

import contextlib
import json
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from kill_helpers import COMPLETE, DISK, KINDS, REFUSED, STOPPED, train
from training_runs import checkpoint_arrays, metrics, weights_crc32, write_code_set, write_config

from mindalle_jax import Dalle
from mindalle_jax.storage.results import RESULT
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.export import export_checkpoint, newest_model

STEPS = 30


class World(NamedTuple):
    """A configuration, and a run that nothing has interrupted."""

    config: Path
    straight: Path
    """Has a checkpoint of every step. The configuration saves every fourth and keeps two."""
    weights: dict[int, dict[str, int]]
    """Step -> checksums of the model of its checkpoint."""


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_helpers"])
    return context


@pytest.fixture(scope="module")
def begin(processes):
    """begin(config, out, kind, seed) starts a process, and returns a function that returns what `start` does."""

    def run(config: Path, out: Path, kind: str | None = None, seed: int = 0) -> Callable[[], tuple[int, str]]:
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=train, args=(config, out, kind, seed, sender))
        process.start()
        sender.close()

        def end() -> tuple[int, str]:
            said = ""
            with contextlib.suppress(EOFError):  # it was killed
                assert receiver.poll(120), "the run stands still"
                said = receiver.recv()
            process.join()
            return process.exitcode, said

        return end

    return run


@pytest.fixture(scope="module")
def start(begin):
    """start(config, out, kind, seed) -> (exit code, standard error) of a process."""
    return lambda *arguments: begin(*arguments)()


@pytest.fixture(scope="module")
def world(start, tmp_path_factory, tiny_model_folder) -> World:
    work = tmp_path_factory.mktemp("kills")
    data = write_code_set(work / "codes", tiny_model_folder, 29)
    configs = [
        write_config(
            work / f"keep{keep}.yaml",
            tiny_model_folder,
            data,
            training={
                "ema_decay": 0.9, "caption_dropout": 0.3, "checkpoint_every_steps": every, "keep_checkpoints": keep,
            },
            optimizer={"max_steps": STEPS},
        )
        for keep, every in ((99, 1), (2, 4))
    ]  # fmt: skip
    code, err = start(configs[0], work / "straight")
    assert code == COMPLETE, err
    weights = {}
    for step in Checkpoints(work / "straight" / "checkpoints").steps():
        export_checkpoint(work / "straight", work / "models" / str(step), step=step)
        weights[step] = weights_crc32(work / "models" / str(step))
    assert weights[STEPS] == weights_crc32(work / "straight")
    return World(configs[1], work / "straight", weights)


def losses(out: Path) -> list[tuple[int, float, int]]:
    return [(line["step"], line["loss"], line["samples_crc32"]) for line in metrics(out)]


def check(out: Path, world: World) -> str:
    """Looks at an interrupted run; says how it was found."""
    lines = losses(out)
    assert lines == losses(world.straight)[: len(lines)]
    if (out / "summary.json").exists():
        assert json.loads((out / "summary.json").read_text())["updates"] == STEPS
    steps = Checkpoints(out / "checkpoints").steps()
    if (out / "manifest.json").exists():
        step = json.loads((out / "manifest.json").read_text())["step"]
        model = out
        found = "with a model"
    elif steps:
        model, step = newest_model(out)
        assert step == steps[-1]
        found = "without a model"
    else:
        return "before the first checkpoint"
    assert weights_crc32(model) == world.weights[step]
    assert Dalle.from_pretrained(model).generate("the cat", num_candidates=1).images.shape[0] == 1
    partial = [path.name for path in (out / "checkpoints").iterdir() if not path.name.isdecimal()]
    half = " and half a result" if (out / RESULT).exists() else " and half a checkpoint" if partial else ""
    return found + half


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_any_moment(world, start, tmp_path, kind, times):
    out, found, ended = tmp_path / "run", Counter(), 0
    for seed in range(10_000):
        code, err = start(world.config, out, kind, seed)
        interrupted = code < 0 if kind in ("step", "save", "result") else code == (STOPPED if kind != "disk" else DISK)
        assert interrupted or code == COMPLETE, err
        assert kind != "SIGTERM" or code == COMPLETE or (out / "manifest.json").exists()
        found[check(out, world)] += interrupted
        if sum(found.values()) == times:
            break
        if code == COMPLETE or (kind == "result" and seed % 2):  # else every result would find half of another
            ended += code == COMPLETE
            shutil.rmtree(out)
    code, err = start(world.config, out)
    assert code == COMPLETE, err
    assert losses(out) == losses(world.straight) and weights_crc32(out) == world.weights[STEPS]
    one, other = checkpoint_arrays(out), checkpoint_arrays(world.straight)
    assert all(one[path].tobytes() == other[path].tobytes() for path in other)
    assert json.loads((out / "summary.json").read_text())["updates"] == STEPS and not (out / RESULT).exists()
    print(f"{kind}: {dict(found)}, {ended} runs came to their end meanwhile")


def test_two_starts_in_one_folder(world, begin, tmp_path):
    """One runs, and one says so."""
    pair = [begin(world.config, tmp_path / "run") for _ in range(2)]
    (first, _), (second, loser) = sorted(end() for end in pair)
    assert (first, second) == (COMPLETE, REFUSED)
    assert re.fullmatch(r"OutputError: .*run: process \d+ on \S+ trains in this folder; wait for it, .*\n", loser)
    assert losses(tmp_path / "run") == losses(world.straight)
    assert weights_crc32(tmp_path / "run") == world.weights[STEPS]
