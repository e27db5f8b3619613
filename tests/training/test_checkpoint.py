"""checkpoint.py: a training goes on with the same bits after any kill, on any mesh, or is told why it cannot."""

import contextlib
import gc
import json
import multiprocessing
import random
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_helpers import (
    LEAVES,
    MESHES,
    expected,
    mesh_of,
    restore_and_save,
    save_until_killed,
    sharding_of,
    target,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.errors import CheckpointError, DeviceMemoryError, OutputError, UsageError
from mindalle_jax.training.checkpoint import Checkpoints, Restored

# What Orbax leaves of its tasks and event loops when a read or a write fails.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception ignored in.*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
    ),
]

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(mesh, leaf.shape)), tree)


def target_on(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(mesh, leaf.shape)), tree
    )


def training_state(seed: int = 0) -> dict[str, Any]:
    """Every kind of leaf that a training has: two precisions, a named tuple of optax, a key, scalars, nothing."""
    bits = jax.random.bits(jax.random.key(seed), (16, 24), jnp.uint32)  # NaNs with payload and denormals among them
    params = {
        "blocks": {"kernel": jax.lax.bitcast_convert_type(bits, jnp.float32), "bias": jnp.arange(24.0) + seed},
        "half": jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16),
    }
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
        "mask": bits % 2 == 0,
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
    }


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder: Path, *steps: int, **options: Any) -> Path:
    """`expected` of each of the steps."""
    with Checkpoints(folder, fingerprint="f", **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, jax.device_put(expected(step)), data_state={"at": step})
    return folder


def restore(folder: Path, step: int | None = None) -> Restored:
    with Checkpoints(folder, fingerprint="f") as checkpoints:
        return checkpoints.restore(target(ONE), step)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a disk that becomes full while it is written to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """What is described above is collected before the tests of another file, which would fail."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved_on_2x4(tmp_path_factory) -> Path:
    """A folder with one step, saved on a mesh of 2 x 4. Read only."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, on_mesh(training_state(), mesh_of("2x4")), data_state={"index": 7, "epochs": [1, 2]})
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A folder with steps 1 and 2 of `expected`. Read only: copy it before damaging it."""
    return save_steps(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


@pytest.mark.parametrize("mesh", MESHES)
def test_restores_the_same_bits_on_any_mesh(saved_on_2x4, mesh):
    state = training_state()
    wanted = target_on(state, mesh_of(mesh))
    with Checkpoints(saved_on_2x4) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert_same_bits(restored.state, state)
    assert (restored.step, restored.data_state) == (3, {"index": 7, "epochs": [1, 2]})
    for leaf, shape in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == shape.sharding


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = jax.device_put(expected(1))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 3 + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, fingerprint="f") as checkpoints:
        checkpoints.save(1, state, data_state={})
        for _ in range(5):
            state = overwrite(state)
        jax.block_until_ready(state)
    assert_same_bits(restore(tmp_path).state, expected(1))


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: float("nan"), 6: 3.5}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    for step, loss in losses.items():
        with Checkpoints(tmp_path / "c", keep=2) as checkpoints:  # opened anew: the losses are on disk
            checkpoints.save(step, {"x": jnp.int32(step)}, data_state={}, validation_loss=loss)
            checkpoints.wait()
            assert checkpoints.steps() == kept[step]
            assert (checkpoints.latest_step(), checkpoints.best_step()) == (step, 1 if step == 1 else 2)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step, loss in ((7, 2.0), (8, 2.5), (9, 2.5)):  # in one process, one save right after another
            checkpoints.save(step, {"x": jnp.int32(step)}, data_state={}, validation_loss=loss)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([7, 8, 9], 7)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["7", "8", "9"]


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_reading_changes_nothing_on_disk(two_steps, tmp_path):
    """An evaluation may read while a training writes."""
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest_step(), checkpoints.best_step()) == ([], None, None)
        with pytest.raises(CheckpointError, match=r"none: holds no checkpoint"):
            checkpoints.restore(target(ONE))
    assert not (tmp_path / "none").exists()
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(folder.rglob("*"))
    assert restore(folder).step == 2
    assert sorted(folder.rglob("*")) == before


def test_a_save_deletes_what_killed_processes_left(two_steps, tmp_path):
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / ".removed" / "1")  # the very step that is removed next
    save_steps(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_going_on_from_an_older_step(two_steps, tmp_path):
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    with Checkpoints(folder, fingerprint="f") as checkpoints:
        for step in (1, 2):
            with pytest.raises(OutputError, match=rf"step {step} is not after step 2.*delete_after"):
                checkpoints.save(step, jax.device_put(expected(step)), data_state={})
        (folder / ".removed" / "2" / "state").mkdir(parents=True)  # a process was killed while it deleted
        checkpoints.delete_after(1)
        assert checkpoints.steps() == [1]
        checkpoints.save(2, jax.device_put(expected(20)), data_state={})
    assert_same_bits(restore(folder).state, expected(20))


def test_too_little_memory_is_not_damage(two_steps, monkeypatch):
    def exhausted(_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("mindalle_jax.training.checkpoint.digests", exhausted)
    with pytest.raises(DeviceMemoryError, match=r"2 does not fit into the memory"):
        restore(two_steps)


def test_typed_keys_and_targets_without_sharding_are_refused(two_steps, tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UsageError, match=r"a/key .*jax\.random\.key_data"):
        checkpoints.save(1, {"a": {"key": jax.random.key(0)}}, data_state={})
    with Checkpoints(two_steps) as checkpoints, pytest.raises(UsageError, match=r"leaf0 .*no sharding"):
        checkpoints.restore({"leaf0": jax.ShapeDtypeStruct((256, 256), np.uint32)})


def test_all_differences_to_the_target_are_listed(saved_on_2x4):
    wanted = target_on(training_state(), mesh_of("8"))
    wanted["params"]["blocks"]["kernel"] = jax.ShapeDtypeStruct((16, 25), jnp.float32, sharding=ONE)
    wanted["params"]["half"] = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=ONE)
    wanted["new"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=ONE)
    del wanted["key"]
    with Checkpoints(saved_on_2x4) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(wanted)
    assert str(error.value) == (
        f"{saved_on_2x4 / '3'}: does not fit this training: new is nothing, wanted int32[]; "
        "params/blocks/kernel is float32[16, 24], wanted float32[16, 25]; "
        "params/half is bfloat16[16, 24], wanted float32[16, 24]; key is uint32[2], wanted nothing; "
        "restore it with the configuration it was saved with"
    )


def test_another_data_set_is_refused_unless_it_is_let_pass(two_steps):
    with Checkpoints(two_steps, fingerprint="other") as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"changed since the checkpoint of step 2 \(it was 'f' and is 'other'\)"
        ) as caught:
            checkpoints.restore(target(ONE))
        assert str(caught.value).endswith("--ignore-fingerprint (in Python: ignore_fingerprint=True)")
        assert checkpoints.restore(target(ONE), ignore_fingerprint=True).step == 2


def test_a_step_that_is_not_there(two_steps):
    with pytest.raises(CheckpointError, match=r"no step 5; there are 1, 2$"):
        restore(two_steps, 5)


def outcome(folder: Path) -> str:
    """The error of restoring step 2, or "" when it gave the right bits."""
    try:
        restored = restore(folder, 2)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and str(folder / "2") in text and text.endswith("; try the older step 1")
        return text
    assert_same_bits(restored.state, expected(2))
    assert restored.data_state == {"at": 2}
    return ""


def test_no_flipped_bit_is_taken_for_good(two_steps, tmp_path):
    """Orbax alone restores most of them without a word. Some files hold nothing that a restore depends on."""
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    rng = random.Random(0)
    files = sorted((path for path in (folder / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    record, data = folder / "2" / "record" / "record.json", files[-1]
    assert data.stat().st_size > 2**18
    for path in [record] * 8 + [data] * 12 + files * 2:
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        error = outcome(folder)
        path.write_bytes(whole)
        assert error or path not in (record, data), f"{path.name}: byte {at}"
        if path == data and "other bits" in error:
            assert "the bits have changed since the save in leaf" in error
    assert outcome(folder) == ""


def test_truncated_and_missing_files_are_not_taken_for_good(two_steps, tmp_path):
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    for path in [path for path in (folder / "2").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for size in (None, 0, len(whole) // 2):
            path.unlink() if size is None else path.write_bytes(whole[:size])
            error = outcome(folder)
            path.write_bytes(whole)
            assert error or (path.name != "record.json" and len(whole) < 2**18), f"{path.name} cut to {size}"
    shutil.rmtree(folder / "1")
    shutil.rmtree(folder / "2" / "state")
    with pytest.raises(CheckpointError, match=r"2: damaged: .*; there is no older step$"):
        restore(folder)


def test_a_damaged_record_is_an_error_of_its_own_step_only(two_steps, tmp_path):
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    record = folder / "2" / "record" / "record.json"
    for text in ("", "{}", "[]", "null", '{"crc32": 0, "format_version": 2}', record.read_text().replace("2", "3")):
        record.write_text(text)
        assert outcome(folder)
    shutil.copy(folder / "1" / "record" / "record.json", record)
    assert "its record is of step 1" in outcome(folder)
    record.write_text("{")
    save_steps(folder, 3)  # the loss of step 2 is not known any more
    assert_same_bits(restore(folder).state, expected(3))


def test_the_record_is_readable(saved_on_2x4):
    record = json.loads((saved_on_2x4 / "3" / "record" / "record.json").read_text())
    assert record["leaves"]["params/half"].keys() == {"shape", "dtype", "digest"}
    assert record["leaves"]["optimizer/0/mu/blocks/bias"]["shape"] == [24]
    assert record["versions"].keys() == {"mindalle-jax", "jax", "orbax-checkpoint"}


def test_too_small_a_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    folder = save_steps(tmp_path / "c", 1)
    before = sorted(folder.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, Checkpoints(folder) as checkpoints:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=LEAVES * 2**18 - 1))
        with pytest.raises(OutputError, match=r"the checkpoint of step 2 needs 0\.0 GB under .*; free some space"):
            checkpoints.save(2, jax.device_put(expected(2)), data_state={})
    assert sorted(folder.rglob("*")) == before
    save_steps(folder, 2)


def test_a_disk_that_becomes_full_is_an_error_at_the_next_call(tmp_path):
    folder = save_steps(tmp_path / "c", 1, 2)
    with Checkpoints(folder, fingerprint="f") as checkpoints:
        for call in (checkpoints.wait, checkpoints.close, lambda: checkpoints.restore(target(ONE))):
            with largest_file(2**17):
                checkpoints.save(3, jax.device_put(expected(3)), data_state={})
                with pytest.raises(OutputError, match=r"c/3: the checkpoint could not be saved: File too large$"):
                    call()
            assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, jax.device_put(expected(3)), data_state={"at": 3})  # the training may have gone on
    assert_same_bits(restore(folder).state, expected(3))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_a_failed_save_does_not_hide_what_ended_the_training(tmp_path):
    with pytest.raises(ZeroDivisionError) as error, largest_file(2**17), Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, jax.device_put(expected(1)), data_state={})
        raise ZeroDivisionError
    assert "could not be saved" in error.value.__notes__[0]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with Checkpoints(tmp_path / "file" / "c") as checkpoints:
        with pytest.raises(OutputError, match=r"file/c/1: the checkpoint could not be saved: .*Not a directory"):
            checkpoints.save(1, {"x": jnp.int32(1)}, data_state={})


def test_an_error_in_the_block_does_not_lose_the_save(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, fingerprint="f") as checkpoints:
        checkpoints.save(1, jax.device_put(expected(1)), data_state={"at": 1})
        raise ZeroDivisionError
    assert_same_bits(restore(tmp_path).state, expected(1))


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already. They see the environment of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_helpers"])
    return context


# In the normal suite as many kills as there is time for; pytest -m slow for a figure worth quoting.
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_at_any_moment(tmp_path, processes, kills):
    """After every kill all listed steps are whole, and none that was acknowledged is lost."""
    folder, rng, done = tmp_path / "c", random.Random(kills), 0
    found = {"while saving": 0, "while deleting": 0}
    for kill in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=save_until_killed, args=(folder, kill % 2 == 1, sender))
        process.start()
        sender.close()
        assert receiver.poll(60), "the process saved nothing"
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                done = receiver.recv()
        names = [path.name for path in folder.iterdir()]
        found["while saving"] += any("orbax-checkpoint-tmp" in name for name in names)
        found["while deleting"] += ".removed" in names
        with Checkpoints(folder, fingerprint="f") as checkpoints:
            steps = checkpoints.steps()
            assert steps[-1] in (done, done + 1) and len(steps) <= 3
            for step in steps:
                restored = checkpoints.restore(target(ONE), step)
                assert_same_bits(restored.state, expected(step))
                assert (restored.step, restored.data_state) == (step, {"at": step})
    print(f"{kills} kills, {found}, newest step {done}")
    assert sum(found.values()) >= kills / 4, "the kills came between the saves"


def test_two_processes_read_what_one_wrote_and_the_other_way(tmp_path, processes):
    folder = save_steps(tmp_path / "c", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pair = [processes.Process(target=restore_and_save, args=(folder, i, address)) for i in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(90)
        process.kill()
    assert [process.exitcode for process in pair] == [0, 0]
    with Checkpoints(folder, fingerprint="f") as checkpoints:
        assert checkpoints.steps() == [1, 2]
        restored = checkpoints.restore(target(NamedSharding(mesh_of("2x4"), PartitionSpec("model", "data"))))
    assert restored.step == 2
    assert_same_bits(restored.state, expected(1))
