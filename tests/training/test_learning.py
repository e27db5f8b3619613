"""It learns: pictures by heart, others with adapters; and the arithmetic of an update does what its switches say."""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from training_runs import metrics, weights_crc32, write_code_set, write_config

from mindalle_jax import Dalle, cli
from mindalle_jax.config.schema import Config
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.sources import open_source
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.sharding import make_mesh, param_shardings
from mindalle_jax.storage.adapters import matches
from mindalle_jax.storage.weights import count_parameters, leaf_shapes, load_stacked, map_weights, nest, read_manifest
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import StepConfig, init_state, train_step

PICTURES = 32
PAD = 1
"""Of the tiny vocabulary."""


def finetuned(config: Path, out: Path, *overrides: str) -> Path:
    assert cli.main(["finetune", "--config", str(config), "--out", str(out), *overrides]) == 0
    return out


def stage2_of(folder: Path) -> dict[str, np.ndarray]:
    """Parameters of a model folder by path."""
    return map_weights(folder / "stage2.safetensors", read_manifest(folder)["tensors"]["stage2"])


# Runs

SECTIONS = {
    "optimizer": {"base_lr": 2e-2, "max_steps": 100, "weight_decay": 0.0},
    "experiment": {"local_batch_size": 4, "total_batch_size": 32},
    "training": {"remat": "none", "warmup_steps": 10},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_model_folder) -> tuple[Path, Path, float]:
    """(data, folder of the run, seconds): the tiny model, taught 32 pictures by heart."""
    work = tmp_path_factory.mktemp("learned")
    codes = write_code_set(work / "codes", tiny_model_folder, PICTURES)
    config = write_config(work / "run.yaml", tiny_model_folder, codes, **SECTIONS)
    start_s = time.perf_counter()
    return codes, finetuned(config, work / "out"), time.perf_counter() - start_s


@pytest.mark.slow
def test_pictures_are_learned_by_heart(learned, tiny_model_folder):
    """32 pictures of 64 codes out of 80: 13,000 bits, a third of a bit for each of the 40,000 parameters."""
    codes, out, seconds = learned
    source = open_source(codes, "text", vqgan=vqgan_digest(tiny_model_folder))
    by_caption = {sample.captions[0]: np.asarray(sample.codes) for sample in source.samples}
    assert len(by_caption) == PICTURES
    drawn = Dalle.from_pretrained(out).generate_codes(list(by_caption), num_candidates=1, temperature=0.0)
    same = np.array([drawn[i, 0] == expected for i, expected in enumerate(by_caption.values())])
    print(f"{same.mean():.2%} of {same.size} codes, loss {metrics(out)[-1]['image_loss']:.4f}, {seconds:.0f} s")
    assert same.all()


@pytest.mark.slow
def test_the_result_is_exported_to_the_originals_format(learned, tmp_path, capsys):
    out = learned[1]
    assert cli.main(["convert", str(out), str(tmp_path / "torch"), "--to", "torch"]) == 0
    import_checkpoint(tmp_path / "torch", tmp_path / "back")
    assert weights_crc32(tmp_path / "back") == weights_crc32(out)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, learned) -> dict[str, Path]:
    """The model that knows 32 pictures, taught others, whose codes are below 20: as a whole, and with adapters."""
    work = tmp_path_factory.mktemp("adapted")
    codes = write_code_set(work / "codes", learned[1], 256, seed=5, num_codes=20)
    config = write_config(work / "run.yaml", learned[1], codes, **SECTIONS)
    targets = "[blocks/fc2/weight, blocks/proj/weight, head_img/weight]"
    lora = ["training.lora.rank=1", "training.lora.alpha=1.0", f"training.lora.targets={targets}"]
    return {
        "whole": finetuned(config, work / "whole"),
        "adapters": finetuned(config, work / "adapters", *lora, "optimizer.base_lr=3e-2"),
    }


@pytest.mark.slow
def test_adapters_come_close_with_a_hundredth_of_the_parameters(adapted, tiny_config):
    """Which 20 of the 80 codes these pictures have must be learned: to ln 20 = 3.0 nats a code, from 11.6.

    The image loss, because the captions are new as well, and the targets leave the text head as it is.
    """
    lines = {name: metrics(out) for name, out in adapted.items()}
    first = {name: lines[name][0]["image_loss"] for name in lines}
    last = {name: float(np.mean([line["image_loss"] for line in lines[name][-8:]])) for name in lines}
    whole_loss = {name: float(np.mean([line["loss"] for line in lines[name][-8:]])) for name in lines}
    adapters = safetensors.numpy.load_file(adapted["adapters"] / "adapters.safetensors")
    share = sum(leaf.size for leaf in adapters.values()) / count_parameters(tiny_config, "stage2")
    print(f"image loss {first['whole']:.3f}, then {last}; loss with text {whole_loss}; adapters are {share:.2%}")
    assert first["adapters"] == pytest.approx(first["whole"], rel=1e-6), "adapters change nothing at first"
    assert share < 0.02
    assert first["whole"] > 2 * last["whole"]
    assert last["adapters"] < 1.1 * last["whole"]


@pytest.mark.slow
def test_the_merged_model_is_base_and_adapters(adapted, learned, tiny_config):
    adapters = safetensors.numpy.load_file(adapted["adapters"] / "adapters.safetensors")  # alpha / rank is 1
    base, merged = stage2_of(learned[1]), stage2_of(adapted["adapters"])
    rng = np.random.default_rng(0)
    prefix, codes = rng.integers(2, 110, (2, 12)), rng.integers(0, 80, (2, 64))
    model = Transformer(tiny_config.stage2)
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": "0"})
    beside, inside, without = (
        apply({"params": nest(leaves)}, prefix, codes) for leaves in (base | adapters, merged, base)
    )
    for a, b, c in zip(beside, inside, without, strict=True):
        scale = max(1.0, float(np.abs(a).max()))
        print(
            f"logits up to {scale:.1f} differ by {np.abs(a - b).max():.1e}, without adapters {np.abs(a - c).max():.1f}"
        )
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
        assert np.abs(a - c).max() > 0.1
    touched = {path for path in base if not np.array_equal(base[path], merged[path])}
    assert touched == {"blocks/fc2/weight", "blocks/proj/weight", "head_img/weight"}


# Updates


def batches(updates: int, micro_batches: int) -> list[dict[str, np.ndarray]]:
    """Eight samples for each update, the same however they are split."""
    rng = np.random.default_rng(0)
    return [
        {
            "prefix": rng.integers(2, 110, (8, 12)).astype(np.int32).reshape(micro_batches, -1, 12),
            "codes": rng.integers(0, 80, (8, 64)).astype(np.int32).reshape(micro_batches, -1, 64),
            "index": (8 * i + np.arange(8, dtype=np.uint32)).reshape(micro_batches, -1),
        }
        for i in range(updates)
    ]


def train(config: Config, folder: Path, *, updates=3, micro_batches=1, frozen=(), remat="none", **changes: Any):
    """(parameters before, state after each update, figures of each): unsharded, from the model in the folder."""
    mesh = make_mesh("replicated", {}, jax.devices()[:1])
    shapes = leaf_shapes(config, "stage2")
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    leaves = load_stacked(folder, "stage2", config, dtypes, param_shardings(shapes, "replicated", mesh))
    kept = {path: leaves.pop(path) for path in shapes if matches(path, frozen)}
    schedule = learning_rate(dataclasses.replace(config.optimizer, base_lr=1e-3), 0, 10)
    optimizer = make_optimizer(config.optimizer, schedule, "all", leaves)
    values = {"text_loss_weight": 0.125, "caption_dropout": 0.0, "ema_decay": 0.0, "lora_scale": 1.0, "seed": 0}
    model = Transformer(config.stage2, remat=remat)
    step_config = StepConfig(model, optimizer, schedule, PAD, **(values | changes))
    before = {path: np.asarray(leaf) for path, leaf in (leaves | kept).items()}
    state, states, figures = init_state(step_config, leaves), [], []
    step = jax.jit(partial(train_step, step_config), compiler_options={"xla_backend_optimization_level": "0"})
    for batch in batches(updates, micro_batches):
        state, figure = step(state, kept, batch)
        states.append(jax.device_get(state))
        figures.append(jax.device_get(figure))
    return before, states, figures


@pytest.fixture(scope="module")
def plain(tiny_config, tiny_model_folder):
    """Three updates without anything special."""
    return train(tiny_config, tiny_model_folder)


def losses(figures: list[dict[str, Any]]) -> list[float]:
    return [float(figure["loss"]) for figure in figures]


@pytest.mark.parametrize("name", ["4 micro-batches", "remat dots", "remat full"])
def test_how_an_update_is_computed_does_not_matter(plain, tiny_config, tiny_model_folder, name):
    """1e-6 of losses of about 5.6: two units in the last place of a float32."""
    changes = {"4 micro-batches": {"micro_batches": 4}}.get(name) or {"remat": name.split()[1]}
    _, states, figures = train(tiny_config, tiny_model_folder, **changes)
    np.testing.assert_allclose(losses(figures), losses(plain[2]), rtol=1e-6, atol=0)
    np.testing.assert_allclose(
        [figure["grad_norm"] for figure in figures], [figure["grad_norm"] for figure in plain[2]], rtol=1e-5
    )


def test_frozen_parameters_stay_and_the_average_follows(plain, tiny_config, tiny_model_folder):
    frozen, decay = ("blocks/(qkv|ln1)/.*", "tok_emb_img/embedding"), 0.75
    before, states, figures = train(tiny_config, tiny_model_folder, frozen=frozen, ema_decay=decay)
    expected_frozen = {path for path in before if matches(path, frozen)}
    assert len(expected_frozen) == 5
    for state in states:
        assert set(state.params) == set(state.ema) == set(before) - expected_frozen
    average = {path: before[path].astype(np.float64) for path in states[0].params}
    for state in states:
        for path, leaf in state.params.items():
            average[path] = decay * average[path] + (1 - decay) * leaf
            np.testing.assert_allclose(state.ema[path], average[path], rtol=0, atol=1e-6)
    for path, leaf in states[-1].params.items():
        assert not np.array_equal(leaf, before[path]), f"{path} was not trained"
    # Freezing changes no gradient of the first update, and from then on the losses go apart.
    assert losses(figures)[0] == pytest.approx(losses(plain[2])[0], rel=1e-6)
    assert losses(figures)[2] != losses(plain[2])[2]


def test_dropout_is_another_one_in_each_update(plain, tiny_config, tiny_model_folder):
    """With a learning rate of nearly 0 and one batch, nothing but dropout makes losses differ."""
    rates = {"embd_pdrop": 0.2, "resid_pdrop": 0.2, "attn_pdrop": 0.2}
    hparams = dataclasses.replace(tiny_config.stage2.hparams, **rates)
    config = dataclasses.replace(tiny_config, stage2=dataclasses.replace(tiny_config.stage2, hparams=hparams))
    mesh = make_mesh("replicated", {}, jax.devices()[:1])
    shapes = leaf_shapes(config, "stage2")
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    leaves = load_stacked(tiny_model_folder, "stage2", config, dtypes, param_shardings(shapes, "replicated", mesh))
    step_config = StepConfig(
        Transformer(config.stage2), optax.adamw(1e-12), lambda _: 0.0, PAD, 0.125, 0.0, 0.0, 1.0, 0
    )
    state = init_state(step_config, leaves)
    step = jax.jit(
        lambda state, batch: train_step(step_config, state, {}, batch)[1]["loss"],
        compiler_options={"xla_backend_optimization_level": "0"},
    )
    (batch,) = batches(1, 2)
    drawn = [float(step(state._replace(step=jnp.int32(i)), batch)) for i in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3], "the number of the update is all that dropout depends on"
    assert min(abs(loss - losses(plain[2])[0]) for loss in drawn) > 1e-3


# Captions left blank


class Blanks:
    """Stands in for the transformer: its image loss is the share of captions that are not blank."""

    config = SimpleNamespace(hparams=SimpleNamespace(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0))

    def apply(self, variables, prefix, codes, train, rngs):
        # Two codes: where the caption is blank, code 0 is certain; elsewhere its probability is 1 / e.
        blank = jnp.all(prefix == PAD, axis=1)[:, None]
        other = jnp.where(blank, -100.0, math.log(math.e - 1))
        logits = jnp.stack([jnp.zeros(codes.shape), jnp.broadcast_to(other, codes.shape)], -1)
        nothing = 0 * variables["params"]["w"]  # also keeps XLA from computing all this while it compiles
        return logits + nothing, jnp.zeros((*prefix[:, 1:].shape, 6)) + nothing


def kept_shares(rate: float, micro_batches: int, devices: int, rows: int = 4096) -> list[float]:
    """Of captions, in three updates."""
    mesh = make_mesh("replicated", {}, jax.devices()[:devices])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step_config: Any = StepConfig(Blanks(), optax.adamw(1e-3), lambda _: 0.0, PAD, 0.0, rate, 0.0, 1.0, 7)
    state = init_state(step_config, {"w": jax.device_put(jnp.ones(()), everywhere)})
    step = jax.jit(partial(train_step, step_config))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp")))
    shares = []
    for i in range(3):
        batch = {
            "prefix": np.full((micro_batches, rows // micro_batches, 3), 5, np.int32),
            "codes": np.zeros((micro_batches, rows // micro_batches, 1), np.int32),
            "index": np.arange(rows * i, rows * (i + 1), dtype=np.uint32).reshape(micro_batches, -1),
        }
        state, figures = step(state, {}, jax.device_put(batch, split))
        shares.append(float(figures["image_loss"]))
    return shares


def test_as_many_captions_are_left_blank_as_stated():
    """Of 4,096: within four standard deviations, which are 0.47 % at a rate of 0.1."""
    assert kept_shares(0.0, 1, 1) == pytest.approx([1.0] * 3, abs=1e-5)
    shares = kept_shares(0.1, 1, 1)
    print(f"blank: {', '.join(f'{1 - share:.2%}' for share in shares)}")
    np.testing.assert_allclose(shares, 0.9, atol=4 * math.sqrt(0.1 * 0.9 / 4096))
    assert len(set(shares)) == 3, "the same captions are blank in every update"


@pytest.mark.parametrize(("micro_batches", "devices"), [(16, 1), (1, 8), (4, 4)])
def test_which_captions_are_blank_does_not_depend_on_the_split(micro_batches, devices):
    """1e-5: one caption more or less would be 2.4e-4."""
    np.testing.assert_allclose(kept_shares(0.3, micro_batches, devices), kept_shares(0.3, 1, 1), rtol=0, atol=1e-5)
