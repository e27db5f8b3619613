"""What people of the PyTorch repository type gives what it should, or one sentence with the call to use."""

import pickle

import pytest

import mindalle_jax
from mindalle_jax import ImageGPT
from mindalle_jax.errors import UsageError


@pytest.fixture(scope="module")
def igpt(tiny_igpt_model_folder) -> ImageGPT:
    return ImageGPT.from_pretrained(tiny_igpt_model_folder)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("to", "leave the call out, or pass mesh= to from_pretrained"),
        ("cuda", "leave the call out"),
        ("half", "pass dtype='bfloat16' or 'float32' to from_pretrained"),
        ("eval", "leave the call out"),
        ("train", "mindalle finetune trains"),
        ("stage1", "model.encode_images(images) is stage1.get_codes, model.decode_codes(codes) is stage1.decode_code"),
        ("stage2", "model.logits(text_ids, codes) is stage2(codes, texts, pos_images, pos_texts)"),
        ("state_dict", "mindalle convert --to torch"),
    ],
)
def test_a_name_of_the_original_tells_the_call(tiny_dalle, name, call):
    assert not hasattr(tiny_dalle, name)
    with pytest.raises(AttributeError) as error:
        getattr(tiny_dalle, name)
    assert str(error.value).startswith(f"'Dalle' object has no attribute {name!r}: ") and call in str(error.value)


@pytest.mark.parametrize("name", ["sample", "sampling"])
def test_the_image_only_model_has_calls_of_its_own(igpt, name):
    with pytest.raises(AttributeError, match=r"model.generate\(class_id, num_candidates=16\) is sample\(cls_idx=...\)"):
        getattr(igpt, name)
    with pytest.raises(AttributeError, match=r"model.logits\(codes, labels\) is stage2"):
        _ = igpt.stage2


def test_another_name_is_an_attribute_error_as_ever(tiny_dalle):
    with pytest.raises(AttributeError, match="^'Dalle' object has no attribute 'foo'$"):
        _ = tiny_dalle.foo


@pytest.mark.parametrize(("name", "call"), [("set_seed", "seed= to the call"), ("clip_score", "is clip_score")])
def test_functions_of_its_utils_are_named(name, call):
    with pytest.raises(ImportError, match=f"{name} is not here: .*{call}"):
        exec(f"from mindalle_jax import {name}")
    assert name not in dir(mindalle_jax)


def test_arguments_of_its_sampling_do_nothing_but_warn(tiny_dalle):
    """Of the line that can be changed, and the images are the same."""
    expected = tiny_dalle.sampling("the cat", num_candidates=2)
    with pytest.warns(UserWarning) as warned:
        images = tiny_dalle.sampling("the cat", num_candidates=2, device="cuda:0", use_fp16=True)
    assert (images == expected).all()
    assert [str(w.message) for w in warned] == [
        "sampling(device=...) does nothing: the model is on cpu; pass mesh= to from_pretrained",
        "sampling(use_fp16=...) does nothing: the model computes in float32 (dtype= of from_pretrained)",
    ]
    assert {w.filename for w in warned} == {__file__}


def test_its_arguments_come_in_its_order(tiny_dalle):
    """sampling(prompt, top_k, top_p, softmax_temperature, num_candidates, device, use_fp16)."""
    expected = tiny_dalle.sampling("the cat", top_k=9, num_candidates=2)
    with pytest.warns(UserWarning, match="does nothing"):
        images = tiny_dalle.sampling("the cat", 9, None, 1.0, 2, "cuda", True)
    assert (images == expected).all()
    with pytest.raises(UsageError, match="sampling takes one prompt, as the original does; generate takes a list"):
        tiny_dalle.sampling(["the cat", "12"])


def test_its_from_pretrained_of_two_files_is_from_upstream(tiny_model_folder, tiny_igpt_config, tmp_path):
    with pytest.raises(UsageError, match=r"is from_upstream\(upstream, config\) here"):
        ImageGPT.from_pretrained(tiny_model_folder, "transfer.yaml")
    (tmp_path / "transfer.yaml").write_text(mindalle_jax.config.file.dump_config(tiny_igpt_config), encoding="utf-8")
    model = ImageGPT.from_upstream(tiny_model_folder, tmp_path / "transfer.yaml")
    # The file of a run has sections of its own, and leaves out what is as in the model to begin from.
    run = "stage2: {type: igpt, use_cls_cond: true, hparams: {n_classes: 5}}\ntraining: {init_from: x}\ndata: {}"
    (tmp_path / "run.yaml").write_text(run, encoding="utf-8")
    assert ImageGPT.from_upstream(tiny_model_folder, tmp_path / "run.yaml").num_classes == 5
    assert model.num_classes == 5 and model.generate(3, num_candidates=1).images.shape == (1, 32, 32, 3)


def test_pickling_says_what_to_do_instead(tiny_dalle):
    with pytest.raises(TypeError, match="Give another process the folder .* and call from_pretrained there"):
        pickle.dumps(tiny_dalle)
