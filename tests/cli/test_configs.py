"""`mindalle configs` lists the presets, and prints one so that it can be changed."""

import pytest
from commands import message

from mindalle_jax.config.presets import first_line, preset_files


def test_presets_are_listed_with_what_they_are_for(mindalle_cli):
    code, stdout, err = mindalle_cli("configs")
    assert (code, err) == (0, "")
    listed = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert listed == {name: first_line(file) for name, file in preset_files().items()}


@pytest.mark.parametrize("name", ["finetune-captions", "scenes/clip"])
def test_a_preset_is_printed_as_it_is(mindalle_cli, name):
    assert mindalle_cli("configs", name) == (0, preset_files()[name].read_text(encoding="utf-8"), "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("finetune", "there is no preset finetune; did you mean finetune-captions?"),
        ("emoji/vqgn", "there is no preset emoji/vqgn; did you mean emoji/vqgan?"),
        ("zzz", "there is no preset zzz; mindalle configs lists them"),
    ],
)
def test_a_name_with_a_slip_gets_the_nearest(mindalle_cli, name, text):
    code, stdout, err = mindalle_cli("configs", name)
    assert (code, stdout, message(err, "configs")) == (2, "", text)
