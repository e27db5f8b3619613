"""ClipRanker: scores and order against transformers' CLIP in PyTorch, and what is refused."""

import io
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mindalle_jax.errors import CheckpointError, DeviceMemoryError, NonFiniteError, OutputError, UsageError
from mindalle_jax.interop.clip import ClipModel
from mindalle_jax.models.clip import (
    CLIP,
    PIXEL_MEAN,
    PIXEL_STD,
    ClipConfig,
    ClipTextConfig,
    ClipVisionConfig,
    Preprocessing,
)
from mindalle_jax.ranking import ranker as rerank
from mindalle_jax.ranking.ranker import ClipRanker
from mindalle_jax.ranking.resize import resize_and_crop

WORDS = ["<start>", "a", "red", "cat", "dog", "on", "the", "moon", "<unk>", "<end>"]
START, END = 0, 9

# Pictures of 32 x 32 in patches of 8, 2 layers, 8 text positions. No two widths are equal.
TINY = ClipConfig(
    ClipTextConfig(
        vocab_size=10, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=8, eos_token_id=END,
    ),
    ClipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    ),
    projection_dim=16,
)  # fmt: skip

SIDE = 48
"""Of the pictures below; CLIP sees 32 x 32."""


@pytest.fixture(scope="module")
def model() -> ClipModel:
    """The tiny model with random weights that keep activations of order one, so that scores are far apart."""
    shapes = jax.eval_shape(CLIP(TINY).init, jax.random.key(0), np.zeros((1, 8), np.int32), np.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        std = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.5 if "embedding" in name else 0.1
        return (float(name == "scale") + std * rng.standard_normal(leaf.shape)).astype(np.float32)

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    return ClipModel(TINY, jax.tree_util.tree_map_with_path(fill, shapes["params"]), tokenizer)


@pytest.fixture(scope="module")
def ranker(model) -> ClipRanker:
    return ClipRanker(model)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """96 pictures of nine fields of random colours, with noise."""
    rng = np.random.default_rng(1)
    fields = rng.integers(20, 236, (96, 3, 3, 3)).repeat(SIDE // 3, axis=1).repeat(SIDE // 3, axis=2)
    return (fields + rng.integers(-20, 20, fields.shape)).astype(np.uint8)


def broken(model: ClipModel, *path: str, value: float) -> ClipModel:
    """The model with one parameter set to a value."""

    def replace(tree: Any, path: tuple[str, ...]) -> Any:
        if not path:
            return np.full_like(tree, value)
        return {**tree, path[0]: replace(tree[path[0]], path[1:])}

    return model._replace(params=replace(model.params, path))


# ---------------------------------------- against PyTorch


@pytest.fixture(scope="module")
def torch_scores(model):
    """torch_scores(prompt, images) -> f64[n]: cosines by transformers' CLIPModel, pixels by Pillow, text not padded."""
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    from transformers import CLIPConfig, CLIPModel

    text, vision = {**vars(TINY.text), "bos_token_id": START}, vars(TINY.vision)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TINY.projection_dim)).eval()
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        *names, last = (key.key for key in path)
        if last == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
        state[".".join([*names, last])] = torch.tensor(leaf)
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)

    def scores(prompt: str, images: Any) -> np.ndarray:
        ids = torch.tensor([model.tokenizer.encode(prompt).ids])
        pixels = np.stack(
            [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in images]
        ).astype(np.float32)
        pixels = torch.tensor((pixels / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)).permute(0, 3, 1, 2)
        with torch.no_grad():
            t = clip.get_text_features(input_ids=ids).pooler_output.double()
            i = clip.get_image_features(pixel_values=pixels).pooler_output.double()
        return torch.nn.functional.cosine_similarity(t, i).numpy()

    return scores


def test_scores_and_order_are_those_of_pytorch(ranker, torch_scores, pictures):
    """64 pictures, whose scores lie further apart than the two implementations, so the order is a claim."""
    for prompt in ("a red cat", "the dog on the moon"):
        expected = torch_scores(prompt, pictures[:64])
        scores = ranker.scores(prompt, pictures[:64])
        assert scores.shape == (64,) and scores.dtype == np.float32
        error = np.abs(scores - expected).max()
        gap = np.diff(np.sort(expected)).min()
        print(f"{prompt}: error {error:.1e}, gap {gap:.1e}, scores {expected.min():.2f} to {expected.max():.2f}")
        # Sums of at most 48 products of order one, and 20 roundings on the way: some 1e-6 in float32.
        assert error < 1e-5 and gap > 5 * error
        np.testing.assert_array_equal(ranker.rank(prompt, pictures[:64]), np.argsort(-expected))


# ---------------------------------------- text


def test_tokenize(ranker):
    """A bare string is one prompt; every row ends in end tokens."""
    ids = ranker.tokenize("a red cat")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[START, 1, 2, 3, END, END, END, END]])
    np.testing.assert_array_equal(ranker.tokenize(["a red cat", ""])[1], [START] + [END] * 7)
    full = "a a a a a a"  # just fits
    np.testing.assert_array_equal(ranker.tokenize(full), [[START, 1, 1, 1, 1, 1, 1, END]])


def test_long_prompts_are_cut_before_the_end_token(ranker, pictures):
    """Features are taken at the end token, so it must stay. The warning is of the caller's line."""
    prompt = "a red cat a red cat a red cat"
    calls = [
        ranker.tokenize,
        ranker.encode_text,
        lambda prompt: ranker.scores(prompt, pictures[:1]),
        lambda prompt: ranker.rank(prompt, pictures[:1]),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match=f"'{prompt}' has 11 tokens.*takes 8.*last 3") as warned:
            call(prompt)
        assert [w.filename for w in warned] == [__file__]
    with warnings.catch_warnings(action="ignore"):
        np.testing.assert_array_equal(ranker.tokenize(prompt), [[START, 1, 2, 3, 1, 2, 3, END]])


def test_text_features(ranker):
    """Of length 1, and the same whatever else is encoded."""
    features = ranker.encode_text(["a red cat", "the dog", ""])
    assert features.shape == (3, 16) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(ranker.encode_text("the dog"), features[1:2])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([3], "a prompt is text, not int"),
        ("x" * 2001, "2,001 characters"),
        ("a\0b", "NUL"),
        ("a\ud800", "lone surrogate"),
    ],
)
def test_what_is_not_text_is_refused(ranker, prompts, message):
    for call in (ranker.tokenize, ranker.encode_text):
        with pytest.raises(UsageError, match=message):
            call(prompts)


def test_a_list_is_not_one_prompt(ranker, pictures):
    with pytest.raises(UsageError, match="a prompt is text, not list"):
        ranker.scores(["a cat", "a dog"], pictures[:1])


# ---------------------------------------- pictures


@pytest.fixture(scope="module")
def scores(ranker, pictures) -> np.ndarray:
    return ranker.scores("a red cat", pictures)


def test_image_features(ranker, pictures, scores):
    features = ranker.encode_images(pictures[:3])
    assert features.shape == (3, 16) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(features @ ranker.encode_text("a red cat")[0], scores[:3], atol=1e-6)


@pytest.mark.parametrize("n", [1, 5, 96])
@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_the_same_bits_for_any_number_of_pictures_and_devices(model, pictures, scores, n, devices):
    """A program of another shape, or a matrix product over all pictures at the end, would change last bits."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    ranker = ClipRanker(model, mesh=mesh)
    assert all(len(leaf.devices()) == devices for leaf in jax.tree.leaves(ranker._params))
    np.testing.assert_array_equal(ranker.scores("a red cat", pictures[:n]), scores[:n])


def test_nothing_is_compiled_again(ranker, pictures, scores, compilations):
    """Neither for the same 96 pictures, nor for another number, another prompt, or another kind of array."""
    for n in (96, 1, 50):
        np.testing.assert_array_equal(ranker.rank("a red cat", pictures[:n]), np.argsort(-scores[:n], kind="stable"))
    ranker.encode_text(["the dog", "the moon", "a cat"])
    ranker.scores("the dog", list(pictures[:9]))
    assert compilations == []
    ranker.encode_images(pictures[:1, :40, :40])  # the count does see a new size
    assert len(compilations) == 1


def test_kinds_of_pictures(ranker, pictures, scores):
    """Arrays of bytes and floats, and sequences of arrays and PIL images, score the same."""
    few = pictures[:3]
    floats = ((np.float32(few) + 0.5) / 255).clip(0, 1)
    kinds = [floats, np.float64(floats), jax.numpy.asarray(few), list(few)]
    kinds += [[Image.fromarray(picture) for picture in few], (few[0], Image.fromarray(few[1]), floats[2])]
    for images in kinds:
        np.testing.assert_array_equal(ranker.scores("a red cat", images), scores[:3])


def test_floats_are_truncated(ranker):
    """As pictures are before they are saved, so that a picture has one score in memory and on disk."""
    almost, cut = np.full((1, SIDE, SIDE, 3), 0.999, np.float32), np.full((1, SIDE, SIDE, 3), 254, np.uint8)  # 254.7
    np.testing.assert_array_equal(ranker.encode_images(almost), ranker.encode_images(cut))


def test_pictures_of_many_sizes(ranker, pictures, scores, compilations):
    """Resized on the host, by the program of one size; the order is kept. Features are those of the device's pixels."""
    rng = np.random.default_rng(2)
    shapes = [(40, 60), (60, 40), (33, 33), (32, 32), (5, 200)]
    others = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    mixed = ranker.scores("a red cat", [others[0], pictures[0], *others[1:], Image.fromarray(pictures[1])])
    before = len(compilations)
    for i, other in zip((0, 2, 3, 4, 5), others, strict=True):
        cropped = ranker.scores("a red cat", resize_and_crop(other, Preprocessing(32, 32))[None])
        np.testing.assert_array_equal(mixed[i], cropped[0])
        # Alone, a square picture is resized on the device.
        np.testing.assert_allclose(ranker.scores("a red cat", other[None]), cropped, rtol=0, atol=1e-6)
    assert len(compilations) == before + 1  # 33 x 33
    # Another compiled program than for 48 x 48: last bits may differ.
    np.testing.assert_allclose(mixed[[1, 6]], scores[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(ranker, pictures, mode):
    image = Image.fromarray(pictures[0]).convert(mode)
    expected = ranker.encode_images([np.asarray(image.convert("RGB"))])
    np.testing.assert_array_equal(ranker.encode_images([image]), expected)


def test_ties_go_to_the_lower_index(ranker, pictures, scores):
    """Of 60 pictures: NumPy's default sort keeps the order of 16 and fewer by chance."""
    is_best = np.random.default_rng(3).integers(0, 2, 60)
    order = ranker.rank("a red cat", pictures[np.where(is_best, scores.argmax(), scores.argmin())])
    np.testing.assert_array_equal(order, [*np.flatnonzero(is_best), *np.flatnonzero(1 - is_best)])
    assert np.issubdtype(order.dtype, np.integer)


GOOD = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GOOD, r"images must be \[n, H, W, 3\].*not \[4, 4, 3\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"image 0 must be \[H, W, 3\].*not \[3, 4, 4\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no image"),
        ([], "no image"),
        (np.zeros((1, 0, 4, 3), np.uint8), r"at least one pixel, not \[0, 4, 3\]"),
        ([GOOD, Image.new("RGB", (4, 0))], r"image 1 must be .*at least one pixel, not \[0, 4, 3\]"),
        ([GOOD, GOOD[..., 0]], r"image 1 must be .*not \[4, 4\]"),
        ([GOOD.astype(np.int64)], "uint8 or floating point, not int64"),
        ([GOOD.astype(bool)], "uint8 or floating point, not bool"),
        (np.full((1, 4, 4, 3), 255.0), r"\[0, 1\], not \[255, 255\]"),
        (np.full((1, 4, 4, 3), -0.1), r"\[0, 1\], not \[-0.1"),
        (np.full((1, 4, 4, 3), np.nan), r"\[0, 1\], not \[nan"),
        (Image.fromarray(GOOD), "a sequence of images; not Image"),
        ("cat.png", "a sequence of images; not str"),
        (["cat.png"], "image 0: an array of numbers or a PIL image is wanted, not str; open it first"),
        (None, "not NoneType"),
    ],
)
def test_bad_pictures_are_refused(ranker, images, message):
    for call in (ranker.encode_images, lambda images: ranker.rank("a cat", images)):
        with pytest.raises(UsageError, match=message) as error:
            call(images)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut off", "a chunk of an unknown kind"])
def test_a_damaged_file_is_refused(ranker, pictures, damage):
    """Pillow reads a file when its pixels are first needed, and raises one of two errors."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(file, "PNG")
    data = file.getvalue()
    data = data[: len(data) // 2] if damage == "cut off" else data[:1000] + data[1000:].replace(b"IDAT", b"\x01DAT", 1)
    with pytest.raises(UsageError, match="image 1 cannot be read: "):
        ranker.encode_images([pictures[0], Image.open(io.BytesIO(data))])


# ---------------------------------------- weights


def test_bfloat16(model, ranker, pictures):
    """The compute dtype reaches the weights; features stay float32 of length 1."""
    half = ClipRanker(model, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half._params)} == {"bfloat16"}
    for encode in (lambda r: r.encode_images(pictures[:8]), lambda r: r.encode_text(["a cat", "the red dog"])):
        features = encode(half)
        assert features.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
        # 8 bits a value, about 20 roundings on the way: sqrt(20) * 2**-9 = 0.009 of a length of 1.
        assert 1e-4 < np.sqrt(np.mean(np.sum((features - encode(ranker)) ** 2, axis=1))) < 0.03


def test_the_default_dtype_on_cpu_is_float32(ranker):
    assert ranker.dtype == "float32"


def test_bad_dtypes_and_meshes_are_refused(model):
    with pytest.raises(UsageError, match="dtype must be .*not 'float16'"):
        ClipRanker(model, dtype="float16")
    with pytest.raises(UsageError, match="one axis 'data', not"):
        ClipRanker(model, mesh=jax.make_mesh((8,), ("model",)))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_broken_weights_are_told(model, pictures, value):
    """A feature of length 0 has no direction: its cosine would be NaN, and NaN sorts somewhere."""
    ranker = ClipRanker(broken(model, "visual_projection", "kernel", value=value))
    with pytest.raises(NonFiniteError, match="features of image 0: the weights are damaged"):
        ranker.rank("a cat", pictures[:3])
    ranker = ClipRanker(broken(model, "text_projection", "kernel", value=value))
    with pytest.raises(NonFiniteError, match="features of prompt 0: the weights are damaged"):
        ranker.rank("a cat", pictures[:3])


def test_from_pretrained_and_save_pretrained(tiny_clip_folder, pictures, tmp_path):
    """What is written is what was read: the same scores, and the same files when it is written again."""
    ranker = ClipRanker.from_pretrained(tiny_clip_folder)
    assert str(ranker) == f"CLIP {tiny_clip_folder}"
    ranker.save_pretrained(tmp_path / "copy")
    copy = ClipRanker.from_pretrained(str(tmp_path / "copy"))
    scores = ranker.scores("the cat and the dog", pictures)
    np.testing.assert_array_equal(copy.scores("the cat and the dog", pictures), scores)
    assert np.ptp(scores) > 1e-3
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tiny_clip_folder / name).read_bytes()


def test_a_ranker_saved_in_float16_is_nearly_the_same(ranker, pictures, tmp_path):
    """Half the bytes. A weight is off by up to 2^-11 of itself, and a feature is a sum of many through two blocks:
    the tolerance is eight times that of a weight. The best of 96 pictures lies far enough ahead to stay the best.
    """
    ranker.save_pretrained(tmp_path / "whole")
    ranker.save_pretrained(tmp_path / "half", dtype="float16")
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole  # the header and its names are the same
    loaded = ClipRanker.from_pretrained(tmp_path / "half")
    assert loaded.dtype == "float32"  # what it computes in
    prompts = ["a red cat", "the moon"]
    for features, expected in (
        (loaded.encode_text(prompts), ranker.encode_text(prompts)),
        (loaded.encode_images(pictures[:8]), ranker.encode_images(pictures[:8])),
    ):
        np.testing.assert_allclose(features, expected, atol=8 * 2**-11)
        assert (features != expected).any(), "nothing was rounded"
    assert loaded.rank("a red cat", pictures)[0] == ranker.rank("a red cat", pictures)[0]
    with pytest.raises(UsageError, match="the dtype of weights must be one of float32, .*not 'float8'"):
        ranker.save_pretrained(tmp_path / "other", dtype="float8")


def test_what_is_not_saved(model, tiny_clip_folder, tmp_path):
    """Digits that are gone cannot be written, and nothing is replaced unasked."""
    with pytest.raises(UsageError, match="held in bfloat16 .*load with dtype='float32'"):
        ClipRanker(model, dtype="bfloat16").save_pretrained(tmp_path / "copy")
    ranker = ClipRanker.from_pretrained(tiny_clip_folder)
    ranker.save_pretrained(tmp_path / "copy")
    with pytest.raises(OutputError, match="exists already"):
        ranker.save_pretrained(tmp_path / "copy")
    ranker.save_pretrained(tmp_path / "copy", overwrite=True)


def test_a_ranker_that_cannot_be_found(tiny_clip_folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder, .* and no OWNER/NAME of the hub"):
        ClipRanker.from_pretrained("nowhere")
    with pytest.raises(UsageError, match="is a path and has no revision 'v2'"):
        ClipRanker.from_pretrained(tiny_clip_folder, revision="v2")


def test_out_of_memory_while_ranking(ranker, pictures, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")

    monkeypatch.setattr(rerank, "encode_images", exhausted)
    with pytest.raises(DeviceMemoryError, match="ranking does not fit into the memory of cpu"):
        ranker.scores("a cat", pictures)
