"""Parameters in memory: placed on the devices in either layout, described as a manifest does, and written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax import Dalle
from mindalle_jax.errors import CheckpointError, OutputError, UsageError
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.models.quantization import quantize
from mindalle_jax.models.transformer import unstack_blocks
from mindalle_jax.storage.params import describe_params, place_params, write_params
from mindalle_jax.storage.weights import fingerprint, read_manifest

BATCH = 4  # one compiled size for all tests


def in_memory(dalle: Dalle, *, stacked: bool = False, **settings) -> Dalle:
    """The same model from its arrays, in either layout."""
    stage2 = jax.tree.map(np.asarray, dalle._stage2)
    if stacked:
        layers = [stage2.pop(f"blocks_{i}") for i in range(dalle.config.stage2.hparams.n_layers)]
        stage2["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    params = {"stage1": jax.tree.map(np.asarray, dalle._codec.params), "stage2": stage2}
    return Dalle(dalle.config, params, dalle.tokenizer, **{"mesh": dalle.mesh} | settings)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_a_model_from_arrays_is_the_model_from_the_folder(tiny_dalle, tiny_model_folder, stacked):
    """Bit by bit, in either layout; its fingerprint is that of the folder."""
    model = in_memory(tiny_dalle, stacked=stacked)
    a, b = (dalle.generate("the cat", num_candidates=3, batch_size=BATCH) for dalle in (model, tiny_dalle))
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.images, b.images)
    assert model.folder is None and a.meta["model"] == "in memory"
    assert a.meta["model_sha256"] == b.meta["model_sha256"] == fingerprint(read_manifest(tiny_model_folder)["tensors"])


def test_quantizing_in_memory_is_quantizing_at_load(tiny_dalle, tiny_model_folder):
    loaded = Dalle.from_pretrained(tiny_model_folder, quantize="weights", mesh=tiny_dalle.mesh)
    made = in_memory(tiny_dalle, quantize="weights", stacked=True)
    for a, b in zip(jax.tree.leaves(loaded._stage2), jax.tree.leaves(made._stage2), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_model_made_in_memory_is_saved(tiny_dalle, tmp_path):
    """Its arrays, tokenizer and configuration: what is loaded again draws the same."""
    in_memory(tiny_dalle).save_pretrained(tmp_path / "saved")
    again = Dalle.from_pretrained(tmp_path / "saved", mesh=tiny_dalle.mesh)
    expected = tiny_dalle.generate_codes("the cat", num_candidates=3, batch_size=BATCH)
    np.testing.assert_array_equal(again.generate_codes("the cat", num_candidates=3, batch_size=BATCH), expected)
    np.testing.assert_array_equal(again.tokenize("the cat and 12 dogs"), tiny_dalle.tokenize("the cat and 12 dogs"))
    with pytest.raises(OutputError, match="exists already"):
        in_memory(tiny_dalle).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "weights"}], ids=str)
def test_rounded_weights_are_not_saved(tiny_dalle, tmp_path, settings):
    """Digits beyond would be gone without a word."""
    with pytest.raises(UsageError, match="are rounded and are not saved; make the model with dtype='float32'"):
        in_memory(tiny_dalle, **settings).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_arrays_that_do_not_fit_are_named(tiny_dalle):
    """All of them at once."""
    params = {"stage1": tiny_dalle._codec.params, "stage2": dict(tiny_dalle._stage2)}
    del params["stage2"]["ln_f"]
    params["stage2"]["head_img"] = {"weight": np.zeros((3, 3), np.float32)}
    with pytest.raises(CheckpointError) as raised:
        Dalle(tiny_dalle.config, params, tiny_dalle.tokenizer)
    assert "head_img/weight is [3, 3], wanted [80, 32]" in str(raised.value)
    assert "ln_f/scale is missing, wanted [32]" in str(raised.value)


def test_an_array_that_changes_later_changes_no_model(tiny_dalle):
    """On CPU a device array may share the memory of the NumPy array that it was made from."""
    stage2 = jax.tree.map(np.array, tiny_dalle._stage2)
    model = Dalle(tiny_dalle.config, {"stage1": tiny_dalle._codec.params, "stage2": stage2}, tiny_dalle.tokenizer,
                  mesh=tiny_dalle.mesh)  # fmt: skip
    jax.tree.map(lambda leaf: leaf.fill(np.nan), stage2)
    expected = tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=BATCH)
    np.testing.assert_array_equal(model.generate_codes("the cat", num_candidates=1, batch_size=BATCH), expected)


# ---------------------------------------- place_params, describe_params and write_params alone


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))


def test_either_layout_is_placed_alike(tiny_config, random_params, mesh):
    """blocks_1 is the second layer of a stacked tensor; every device has a copy, in the dtype that is asked for."""
    stacked = random_params(tiny_config, "stage2")
    for dtype in (np.dtype("float32"), jnp.dtype("bfloat16")):
        placed = place_params(stacked, "stage2", tiny_config, dtype, mesh)
        again = place_params(unstack_blocks(stacked), "stage2", tiny_config, dtype, mesh)
        assert "blocks" not in placed
        qkv = stacked["blocks"]["qkv"]["weight"][1].astype(dtype)
        np.testing.assert_array_equal(placed["blocks_1"]["qkv"]["weight"], qkv)
        for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True):
            assert a.dtype == b.dtype == dtype and len(a.devices()) == 2 and a.sharding.is_fully_replicated
            np.testing.assert_array_equal(a, b)


def test_what_lies_on_the_devices_is_not_copied(tiny_config, random_params, mesh):
    """5 GB would be there twice. Another dtype needs a copy."""

    def addresses(params) -> list[int]:
        return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(params) for shard in x.addressable_shards]

    placed = place_params(random_params(tiny_config, "stage2"), "stage2", tiny_config, np.dtype("float32"), mesh)
    again = place_params(placed, "stage2", tiny_config, np.dtype("float32"), mesh)
    assert addresses(again) == addresses(placed)
    half = place_params(placed, "stage2", tiny_config, jnp.dtype("bfloat16"), mesh)
    assert not set(addresses(half)) & set(addresses(placed))


def test_int8_has_a_scale_beside_each_weight(tiny_config, random_params, mesh):
    """Of linear layers alone; what is int8 already stays as it is, bit by bit."""
    params = random_params(tiny_config, "stage2")
    placed = place_params(params, "stage2", tiny_config, jnp.dtype("bfloat16"), mesh, int8=True)
    layer = placed["blocks_0"]["fc1"]
    assert {name: leaf.dtype.name for name, leaf in layer.items()} == {
        "weight": "int8", "weight_scale": "float32", "bias": "bfloat16"
    }  # fmt: skip
    assert placed["tok_emb_txt"]["embedding"].dtype == jnp.bfloat16
    expected = quantize(params["blocks"]["fc1"]["weight"][0], np.float32)
    np.testing.assert_array_equal(layer["weight"], expected.values)
    np.testing.assert_array_equal(layer["weight_scale"], expected.scale)
    again = place_params(placed, "stage2", tiny_config, jnp.dtype("bfloat16"), mesh, int8=True)
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_ten_parameters_that_do_not_fit_are_named_and_the_rest_counted(tiny_config, random_params, mesh):
    params = random_params(tiny_config, "stage2")
    wanted = len(jax.tree.leaves(unstack_blocks(params)))
    with pytest.raises(CheckpointError) as raised:
        place_params({"odd": np.zeros(3)}, "stage2", tiny_config, np.dtype("float32"), mesh)
    assert str(raised.value).startswith("params['stage2'] do not fit the configuration: ")
    assert str(raised.value).count("is missing") == 10 and str(raised.value).endswith(f" and {wanted + 1 - 10} more")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_parameters_are_described_as_in_the_manifest(tiny_model_folder, tiny_dalle, stage):
    """With one digest for the layers of a stacked tensor, one after another."""
    params = tiny_dalle._stage2 if stage == "stage2" else tiny_dalle._codec.params
    described = describe_params(params, stage, tiny_dalle.config)
    assert described == read_manifest(tiny_model_folder)["tensors"][stage]
    assert any(name.startswith("blocks/") for name in described) == (stage == "stage2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_was_converted(tiny_folder, tiny_model_folder, tiny_dalle, tmp_path, dtype):
    """The same files, byte by byte, as the import of a checkpoint writes; without a tokenizer there is none."""
    params = {"stage1": tiny_dalle._codec.params, "stage2": tiny_dalle._stage2}
    write_params(tmp_path / "a", tiny_dalle.config, params, None, dtype=dtype)
    expected = tiny_model_folder
    if dtype != "float32":
        expected = import_checkpoint(tiny_folder, tmp_path / "b", dtype=dtype).target
    for name in ("stage1.safetensors", "stage2.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (expected / name).read_bytes()
    assert read_manifest(tmp_path / "a")["tensors"] == read_manifest(expected)["tensors"]
    files = {"config.yaml", "manifest.json", "stage1.safetensors", "stage2.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    with pytest.raises(OutputError, match="exists already"):
        write_params(tmp_path / "a", tiny_dalle.config, params, None)


def test_a_failed_write_leaves_nothing(tiny_dalle, tmp_path):
    """Half a model would look like a whole one."""
    params = {"stage1": tiny_dalle._codec.params, "stage2": tiny_dalle._stage2 | {"ln_f": {}}}
    with pytest.raises(AssertionError, match="ln_f"):
        write_params(tmp_path / "a", tiny_dalle.config, params, tiny_dalle.tokenizer)
    assert list(tmp_path.iterdir()) == []
