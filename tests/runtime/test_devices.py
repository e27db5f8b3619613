"""Where a network runs by default: of a CPU, a small network takes a device a core."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mindalle_jax import Dalle, base_model
from mindalle_jax.runtime.devices import CPU_DEVICES, choose_devices
from mindalle_jax.sampling import generate


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core makes one device")
def test_a_small_network_takes_the_devices_of_a_cpu(tiny_model_folder, tiny_dalle, monkeypatch):
    """And draws the same there, bit by bit; a large one takes the first, since each device holds all weights."""
    small = Dalle.from_pretrained(tiny_model_folder)
    assert small.mesh.devices.tolist() == jax.devices()[:CPU_DEVICES]
    assert [small.default_batch_size(n) for n in (1, 16)] == [1, 8]
    for count in (3, 6):  # the first device, and two
        options = {"num_candidates": count, "batch_size": 4, "ranker": "likelihood"}
        one, drawn = tiny_dalle.generate("the cat", **options), small.generate("the cat", **options)
        np.testing.assert_array_equal(one.codes, drawn.codes)
        np.testing.assert_array_equal(one.scores, drawn.scores)
        np.testing.assert_array_equal(one.images, drawn.images)

    monkeypatch.setattr(base_model, "SMALL", 1000)
    large = Dalle.from_pretrained(tiny_model_folder)
    assert large.mesh.devices.tolist() == jax.devices()[:1] and large.default_batch_size(16) == 16
    assert choose_devices(None, None)[0].size == 1


def test_no_device_draws_padding_alone(tiny_model_folder, monkeypatch):
    """Eight devices of which two have candidates: the others are not asked."""
    eight = Dalle.from_pretrained(tiny_model_folder, mesh=jax.sharding.Mesh(jax.devices(), ("data",)))
    used, decode = [], generate.sample_row

    def watch(model, mesh, *arguments):
        used.append(mesh.devices.tolist())
        return decode(model, mesh, *arguments)

    monkeypatch.setattr(generate, "sample_row", watch)
    eight.generate_codes("the cat", num_candidates=6, batch_size=4)
    assert used == [jax.devices()[:2]] * 8


@pytest.mark.parametrize(
    ("before", "variables", "expected"),
    [
        ("", {}, CPU_DEVICES),
        ("jax.devices()", {}, 1),
        ("", {"JAX_NUM_CPU_DEVICES": "1"}, 1),
        ("", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ("", {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_whoever_spoke_first_says_how_many_devices_a_cpu_has(before, variables, expected):
    """A program that has begun keeps its devices, and so does a person who asked for some. A run is not divided."""
    code = f"import jax; {before}\nfrom mindalle_jax import ClipRanker, Dalle\n"
    code += "ClipRanker.from_pretrained('demo')\n"  # the command line loads it first
    code += "from mindalle_jax.runtime.sharding import make_mesh\n"
    code += "size = Dalle.from_pretrained('demo').mesh.size\n"
    code += "print(size, len(jax.devices()), make_mesh('replicated', {}).size)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX_NUM"))}
    environment |= variables | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    divided = before == "" and not variables
    numbers = [min(expected, CPU_DEVICES), expected, 1 if divided else expected]
    assert [int(number) for number in done.stdout.split()] == numbers


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "1"}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "10"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "18"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "20"}, "20"),
    ],
)
def test_several_cpu_devices_get_threads_to_spare(variables, expected):
    """With one thread per device, training with fsdp stood still on two cores in 3 of 4 tries."""
    code = "import os; from mindalle_jax.runtime.devices import prepare_process; prepare_process()\n"
    code += "print(os.environ.get('NPROC'))"
    dropped = ("XLA_FLAGS", "JAX_NUM", "NPROC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= variables | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
