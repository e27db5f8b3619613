"""data/tables.py: saved data sets, parquet files as the hub and img2dataset write them, and the hub."""

import sys
from pathlib import Path

import pytest
from image_folders import captions, labels, picture

from mindalle_jax.data.records import Columns
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library copies parquet files into its cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(path: Path, **columns) -> None:
    """Columns of lists; `image` holds encoded images, as the hub stores them."""
    import datasets

    if "image" in columns:
        columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
    dataset = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        dataset = dataset.cast_column("image", datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


def test_saved_datasets_need_the_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the library datasets: pip install 'datasets>=4'"):
        open_source(tmp_path, "text")


def test_saved_datasets(tmp_path):
    import datasets

    files = []
    for number in range(4):
        files.append(str(tmp_path / f"{number}.jpg"))
        Path(files[-1]).write_bytes(picture(number))
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y"])
    )
    rows = {"image": files, "caption": ["a cat", "", "a dog", None], "label": [0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", "text")
    assert list(captions(source).values()) == [["a cat"], ["a dog"]] and source[1].image.read() == picture(2)
    assert source.fingerprint() == open_source(tmp_path / "saved", "text").fingerprint()
    source = open_source(tmp_path / "saved", "class", num_classes=2)
    assert list(labels(source).values()) == [0, 1, 1, 0] and source.classes == ["x", "y"]
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert len(open_source(tmp_path / "splits", "text")) == 2
    with pytest.raises(DataError, match="holds the splits train, and no valid; name the folder of one"):
        open_source(tmp_path / "splits", "text", split="valid")
    dataset.select_columns("caption").save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="has no column of images, only caption"):
        open_source(tmp_path / "text", "text")


def test_parquet_files_of_the_hub(tmp_path):
    """data/train-00000-of-00002.parquet ...; validation takes its own files."""
    for number in range(2):
        images = [picture(2 * number), picture(2 * number + 1)]
        path = tmp_path / "data" / f"train-{number:05}-of-00002.parquet"
        write_parquet(path, image=images, text=[f"cat {number}", f"dog {number}"])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", image=[picture(9)], text=["an owl"])
    (tmp_path / "README.md").write_text("---\n---\n")
    source = open_source(tmp_path, "text")
    assert list(captions(source).values()) == [["cat 0"], ["dog 0"], ["cat 1"], ["dog 1"]]
    assert [sample.image.read() for sample in source.samples] == [picture(number) for number in range(4)]
    assert source.report.layout == "2 parquet files: images in the column image, captions in text"
    valid = open_source(tmp_path, "text", split="valid")
    assert list(captions(valid).values()) == [["an owl"]]
    assert source.fingerprint() == open_source(tmp_path, "text").fingerprint() != valid.fingerprint()


def test_parquet_files_of_img2dataset(tmp_path):
    """The encoded images are in a column of bytes, and other columns are said to be unused."""
    write_parquet(tmp_path / "00000.parquet", jpg=[picture(1), picture(2)], caption=["a cat", "a dog"], url=["u", "v"])
    source = open_source(tmp_path / "00000.parquet", "text")
    assert list(captions(source).values()) == [["a cat"], ["a dog"]] and source[1].image.read() == picture(2)
    assert "not used: 1 column url" in str(source.report)


def test_a_chosen_column_of_a_table(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[picture(1)], text=["cat"], alt=["a cat on a sofa"])
    source = open_source(tmp_path, "text", columns=Columns(caption="alt"))
    assert list(captions(source).values()) == [["a cat on a sofa"]]
    with pytest.raises(
        DataError, match="data.caption_column: there is no 'alta', only image, text, alt; did you mean alt"
    ):
        open_source(tmp_path, "text", columns=Columns(caption="alta"))


def test_a_damaged_parquet_file(tmp_path, capfd):
    """One message: the library also logs the error that it raises."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1xx")
    with pytest.raises(DataError, match="cannot be opened by the library datasets"):
        open_source(tmp_path, "text")
    assert capfd.readouterr().err == ""


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """The library is asked by the name, for the split; nothing is downloaded here."""
    import datasets

    def load(name, split):
        assert (name, split) == ("someone/cats", "validation")
        return datasets.Dataset.from_dict({"image": [picture(1)], "caption": ["a cat"]})

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf://someone/cats", "text", split="valid")
    assert list(captions(source).values()) == [["a cat"]] and source[0].image.read() == picture(1)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["full"])
    with pytest.raises(DataError, match="hf://someone/cats: holds the splits full, and no train"):
        open_source("hf://someone/cats", "text")
