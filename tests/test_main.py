"""`python -m mindalle_jax` is the command `mindalle`, in processes of its own."""

import os
import signal
import subprocess
import sys

from commands import ROOT, message, python

import mindalle_jax


def test_its_version_is_that_of_the_package():
    """And its name that of the command, not __main__.py."""
    done = python("-m", "mindalle_jax", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mindalle {mindalle_jax.__version__}\n", "")


def test_the_command_in_a_process(tmp_path, tiny_folder):
    (tmp_path / "out").write_text("taken")
    done = python("-m", "mindalle_jax", "sample", "a cat", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (6, "")
    out = tmp_path / "out"
    assert message(done.stderr) == f"{out}: {out} is not a folder that can be written to; name another folder"


def test_ctrl_c_in_a_process(tmp_path):
    """A named pipe as prompts file: the command waits in it for as long as the test likes."""
    pipe = tmp_path / "prompts"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "mindalle_jax", "sample", "--model", "x", "--out", str(tmp_path / "out")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    child = subprocess.Popen([*command, "--prompts-file", str(pipe)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with open(pipe, "w"):  # returns when the child has opened it too
        child.send_signal(signal.SIGINT)
    # Closed before waiting: a signal that came just before the child began to read waits for the read to return.
    _, err = child.communicate(timeout=60)
    assert (child.returncode, message(err)) == (130, "interrupted")


def test_closed_streams_are_no_error(tmp_path):
    """Of a daemon, say. The images are written, and nothing that belongs to stderr goes elsewhere."""
    command = f"exec {sys.executable} -m mindalle_jax sample 'a red apple' -n 1 -o {tmp_path}/out 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120)
    out = tmp_path / "out"
    assert (done.returncode, done.stdout) == (0, f"1 image, {out}/grid.png and {out}/meta.json\n")


def test_a_reader_that_leaves_is_no_error(tmp_path, tiny_dalle):
    """As `head -1` does. Python complains at its end of what it could not write."""
    files = tiny_dalle.generate("the cat", num_candidates=2).save(tmp_path / "out")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mindalle_jax", "show", *map(str, files)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"cwd": ROOT, "env": environment, "stdout": write, "stderr": subprocess.PIPE, "timeout": 60}
    done = subprocess.run(command, text=True, **options)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
