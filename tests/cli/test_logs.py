"""cli/logs.py: a verb prints what is ours to say; --verbose adds what libraries log."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mindalle_jax import cli
from mindalle_jax.cli.logs import QUIET, quiet_libraries

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_heard_when_asked_for(capsys, verbose):
    root, hook = logging.getLogger(), sys.excepthook
    before = (root.level, list(root.handlers))
    with quiet_libraries(verbose):
        logging.getLogger("grain.sampler").error("of a library")
        logging.getLogger("mindalle_jax.data").warning("of ours")
        logging.getLogger("jax._src").info("a detail")
    assert capsys.readouterr().err.splitlines() == (
        ["error: of a library", "warning: of ours", "info: a detail"] if verbose else ["warning: of ours"]
    )
    assert (root.level, root.handlers, sys.excepthook) == (*before, hook)
    assert "absl" in QUIET  # not named above: absl must make its logger itself


@pytest.mark.parametrize(("verbose", "message", "shown"), [
    (False, "Event loop is closed", False), (True, "Event loop is closed", True), (False, "another", True)
])  # fmt: skip
def test_tracebacks_of_threads_that_come_late(monkeypatch, verbose, message, shown):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error))
    with quiet_libraries(verbose):
        sys.excepthook(RuntimeError, RuntimeError(message), None)
    assert len(seen) == shown


@pytest.mark.parametrize("verbose", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, verbose):
    """The kernel refuses to write on, here for a limit of the size of a file: 340 lines of Orbax once."""
    script = f"""
        import resource, signal
        from pathlib import Path
        from mindalle_jax.cli import run_reporting
        from mindalle_jax.cli.logs import quiet_libraries

        def save():
            import jax.numpy as jnp
            from mindalle_jax.training.checkpoint import Checkpoints

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))
            with Checkpoints(Path({str(tmp_path / "run")!r}), keep=1, fingerprint="x") as checkpoints:
                checkpoints.save(1, {{"w": jnp.ones(1 << 20)}}, data_state={{}})

        with quiet_libraries({verbose}):
            raise SystemExit(run_reporting("mindalle finetune", save))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 6
    *logs, message = [line for line in done.stderr.splitlines() if line]
    assert message.startswith(f"mindalle finetune: {tmp_path / 'run'}")
    assert bool(logs) == verbose


def test_every_verb_has_the_switch(capsys):
    for verb in cli.VERBS:
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        assert "--verbose" in capsys.readouterr().out
