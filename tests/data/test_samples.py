"""data/samples.py: the samples of a task, and the digest that tells data sets apart."""

import json

import pytest
from image_folders import picture, write_tar

from mindalle_jax.data.sources import open_source


@pytest.mark.parametrize("format", ["folder", "metadata", "tar"])
def test_another_data_set_has_another_fingerprint(tmp_path, format):
    def build(name: str, **changes: str | bytes | None) -> str:
        files = {"a.jpg": picture(1), "a.txt": "a cat", "b.jpg": picture(2), "b.txt": "a dog"} | changes
        files = {key: content for key, content in files.items() if content is not None}
        if format == "tar":
            return open_source(write_tar(tmp_path / name / "a.tar", files), "text").fingerprint()
        (tmp_path / name).mkdir()
        rows = []
        for key, content in files.items():
            if format == "metadata" and key.endswith(".txt"):
                rows.append(json.dumps({"file_name": key.replace(".txt", ".jpg"), "text": content}))
            else:
                (tmp_path / name / key).write_bytes(content.encode() if isinstance(content, str) else content)
        if rows:
            (tmp_path / name / "metadata.jsonl").write_text("\n".join(rows))
        return open_source(tmp_path / name, "text").fingerprint()

    same = build("1")
    assert build("2") == same, "the place on the disk is no part of it"
    others = [
        build("3", **{"b.txt": "a dig"}),
        build("4", **{"b.jpg": picture(2) + b"\0"}),
        build("5", **{"b.jpg": None, "b.txt": None}),
        build("6", **{"c.jpg": picture(3), "c.txt": "a fish"}),
    ]
    assert len({same, *others}) == 5
