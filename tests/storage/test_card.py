"""storage/card.py: the licence of the source goes along, or what is known of it; the card says what the model does."""

import pytest
import yaml

from mindalle_jax.storage.card import run_card, write_license_and_card


@pytest.mark.parametrize(
    ("config", "draws", "task", "named"),
    [
        ("tiny_config", True, "text-to-image", "Dalle.from_pretrained"),
        ("tiny_igpt_config", True, "unconditional-image-generation", "ImageGPT.from_pretrained"),
        ("tiny_config", False, "image-to-image", "A VQGAN alone"),
    ],
)
def test_the_card_is_that_of_the_kind_of_model(tmp_path, request, config, draws, task, named):
    source, folder = tmp_path / "cats", tmp_path / "new"
    source.mkdir()
    folder.mkdir()
    write_license_and_card(source, folder, request.getfixturevalue(config), 1234567, draws)
    text = (folder / "README.md").read_text()
    about = yaml.safe_load(text.split("---")[1])
    assert about["pipeline_tag"] == task and about["license_link"] == "LICENSE"
    assert (
        named in text
        and "1,234,567 parameters" in text
        and "only 32 x 32 pixels, made of 64 codes. There are 80 different codes" in text
    )
    assert 'converted from "cats"' in (folder / "LICENSE").read_text()


def test_a_licence_beside_a_file_goes_along(tmp_path, tiny_config):
    (tmp_path / "LICENSE").write_text("mine")
    (tmp_path / "new").mkdir()
    write_license_and_card(tmp_path / "vqgan.ckpt", tmp_path / "new", tiny_config, 1, False)
    assert (tmp_path / "new" / "LICENSE").read_text() == "mine"
    assert "# vqgan\n" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("header", "license", "said"),
    [
        ("---\nlicense: cc-by-nc-sa-4.0\ntags: []\n---\n", "cc-by-nc-sa-4.0", "base model, cc-by-nc-sa-4.0, see"),
        ("---\nlicense: other\nlicense_name: see-license-file\n---\n", "other", "that of the base model, see LICENSE"),
        ("a text that says license: mit\n", "other", "that of the base model, see LICENSE"),
        (None, "other", "that of the base model, see LICENSE"),
    ],
)
def test_a_run_has_the_license_of_its_base(tmp_path, tiny_config, header, license, said):
    if header is not None:
        (tmp_path / "README.md").write_text(header)
    card = run_card(tmp_path, tmp_path / "cats", tiny_config, "demo", {"Steps": "3", "Data": None})
    about = yaml.safe_load(card.split("---")[1])
    assert about["license"] == license and about["base_model"] == "demo"
    assert said in card and "- Steps: 3\n" in card and "Data" not in card
