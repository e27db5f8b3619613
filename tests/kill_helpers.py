"""Runs of `mindalle finetune` that are interrupted at a random moment of a kind. Imported by a fork server."""

import io
import os
import random
import resource
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mindalle_jax.errors import MindalleError
from mindalle_jax.storage import results
from mindalle_jax.training import finetune as finetune_module
from mindalle_jax.training import loop
from mindalle_jax.training.checkpoint import Checkpoints

KINDS = ("step", "save", "result", "SIGTERM", "disk")
"""Killed during a step, a save, or the writing of the result; stopped by SIGTERM; and a disk that takes no more."""
WINDOW_S = {"step": 0.03, "save": 0.15, "result": 0.06, "SIGTERM": 0.03}
"""The signal comes at most this long after the beginning of a step, a save, or the first file of the result."""
COMPLETE, STOPPED, DISK, REFUSED = 0, 130, 6, 6
"""Exit codes; the last two are both of an OutputError."""


def train(config: Path, out: Path, kind: str | None, seed: int, said: Connection) -> None:
    """Starts or resumes the run, and interrupts it once; None does not. Ends the process with an exit code.

    seed: of the moment. said: gets the standard error, unless the process is killed. A file would have the limit of the
    kind "disk", too.
    """
    sys.stderr = io.StringIO()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    rng = random.Random(seed)
    after = rng.randint(1, 8)  # the step or the save of this process that is interrupted

    def strike(*_: Any) -> None:
        nonlocal after
        after -= 1
        if after == 0 and kind == "disk":
            # The kernel refuses the rest of each file, with another number than on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randint(1 << 10, 400 << 10), resource.RLIM_INFINITY))
        elif after == 0:
            number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
            threading.Timer(rng.uniform(0, WINDOW_S[str(kind)]), os.kill, (os.getpid(), number)).start()

    def before(owner: Any, name: str) -> None:
        call = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: (strike(), call(*args, **options))[1])

    if kind == "save":
        after = rng.randint(1, 3)
        before(Checkpoints, "save")
    elif kind == "result":
        after = 1
        before(results, "write_weights")
    elif kind is not None:
        before(loop.Monitor, "log_metrics")
    code = 1
    try:
        code = COMPLETE if finetune_module.finetune(config, [], out) else STOPPED
    except MindalleError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        said.send(sys.stderr.getvalue())
        os._exit(code)
