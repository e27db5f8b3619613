"""hub/huggingface.py, and models loaded by way of it, from a hub on this machine that answers just what that takes."""

import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from mindalle_jax import ClipRanker, Dalle, cli
from mindalle_jax.errors import CheckpointError, DownloadError, UsageError
from mindalle_jax.hub import download, resolve
from mindalle_jax.hub.huggingface import fetch_repo, is_repo_id
from mindalle_jax.hub.resolve import find_clip, find_model
from mindalle_jax.interop.clip import WEIGHT_FILES
from mindalle_jax.storage.model_folder import MODEL_FILES
from mindalle_jax.text.known_words import KnownWords

REPO = "somebody/tiny.model"


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders as the commits of repositories, but for those that it refuses."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[tuple[str, str], str] = {}  # (repository, branch or commit) -> commit
        self.folders: dict[str, Path] = {}  # commit -> folder
        self.refused: dict[str, tuple[int, str]] = {}  # repository -> (status, X-Error-Code)
        self.got: list[str] = []  # paths of the files that were sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Makes the files of a folder the newest commit of a branch."""
        commit = hashlib.sha1(f"{repo} {branch} {len(self.folders)}".encode()).hexdigest()
        self.folders[commit] = folder
        self.commits[repo, branch] = self.commits[repo, commit] = commit
        return commit


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        repo, (kind, revision, *path) = "/".join((parts := parts[2:] if is_api else parts)[:2]), parts[2:]
        commit = self.server.commits.get((repo, revision))
        if repo in self.server.refused:
            return self.answer(b"{}", *self.server.refused[repo])
        if commit is None:
            known = any(repo == name for name, _ in self.server.commits)
            # A repository that is not there is 401 to who is not logged in, as a private one is.
            return self.answer(b"{}", *((404, "RevisionNotFound") if known else (401, "RepoNotFound")))
        folder = self.server.folders[commit]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not is_api:
            return self.answer((folder / "/".join(path)).read_bytes(), commit=commit)
        names = [file.relative_to(folder).as_posix() for file in files]
        if kind == "revision":
            found = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        else:
            found = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file.read_bytes())}
                for name, file in zip(names, files, strict=True)
            ]
        return self.answer(json.dumps(found).encode())

    def answer(self, body: bytes, status: int = 200, code: str = "", commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("ETag", f'"{digest(body)}"')
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            if commit:  # before the body: whoever has that may look at once
                self.server.got.append(self.path.split(commit + "/")[1])
            self.wfile.write(body)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and an empty cache of it; no token, no Xet, and not offline, whatever this machine is set to."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(hub, tmp_path, tiny_model_folder) -> Path:
    """The tiny model on the hub, beside files that are none of ours."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "pushed"))
    for name in ("flax_model.msgpack", "model.safetensors", "tokenizer/merges.txt", "images/grid.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not ours")
    hub.push(REPO, folder)
    return folder


def down(hub: Hub) -> None:
    """Nobody listens any more."""
    hub.shutdown()
    hub.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error) and len(str(error)) < 600, str(error)
    return str(error)


# Names


@pytest.mark.parametrize("name", ["a/b", REPO, "Kakao-Brain/minDALL-E_1.3B", "minDALL-E/1.4B"])
def test_a_name_of_the_hub(name):
    assert is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["", "a", "a/", "/b", "a/b/c", "./b", "~/b", "../b", "a/b.git", "a/b--c", "a/b c", "a/" + "b" * 97]
)
def test_what_is_no_name_of_the_hub(name):
    assert not is_repo_id(name)


# What is fetched


def test_only_what_is_read_is_downloaded_and_once(hub, pushed, tiny_model_folder):
    folder = find_model(REPO)
    assert sorted(hub.got) == names(folder) == names(tiny_model_folder)
    assert all((folder / name).read_bytes() == (pushed / name).read_bytes() for name in names(folder))
    assert find_model(REPO) == folder and len(hub.got) == len(names(folder))


@pytest.mark.parametrize("how", ["server down", "local_files_only", "HF_HUB_OFFLINE"])
def test_the_cache_does_without_the_hub(hub, pushed, monkeypatch, how):
    first = find_model(REPO)
    down(hub)
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(REPO, local_files_only=how == "local_files_only") == first


def test_a_model_of_the_hub_draws_what_the_folder_draws(hub, pushed, tiny_dalle):
    """Its files are links into another folder; each CRC is checked through them."""
    model = Dalle.from_pretrained(REPO)
    assert (model.folder / "stage2.safetensors").is_symlink()
    ours, theirs = (m.generate_codes("a cat", num_candidates=2, seed=5) for m in (model, tiny_dalle))
    np.testing.assert_array_equal(ours, theirs)
    blob = (model.folder / "stage2.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="stage2.safetensors: .* is damaged"):
        Dalle.from_pretrained(REPO, local_files_only=True)


def test_ranker_and_words_come_with_a_model(hub, tmp_path, tiny_model_folder, tiny_clip_folder, tiny_dalle):
    """Else a model of the hub would neither rank nor say what it knows, where the folder that was pushed does."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "ranked"))
    shutil.copytree(tiny_clip_folder, folder / "ranker")
    KnownWords(frozenset(["a", "cat"])).save(folder / "tokenizer")
    hub.push(REPO, folder)
    model = Dalle.from_pretrained(REPO)
    generation = model("a cat", num_candidates=2)
    assert generation.meta["ranker"] == f"CLIP {REPO}/ranker" and generation.meta["model"] == REPO
    assert model.tokenizer.known_words == KnownWords(frozenset(["a", "cat"]))
    expected = ClipRanker.from_pretrained(tiny_clip_folder).scores("a cat", generation.images)
    np.testing.assert_array_equal(generation.scores, expected)


def test_a_revision_is_another_commit(hub, pushed, tmp_path, tiny_igpt_model_folder):
    branch = hub.push(REPO, tiny_igpt_model_folder, "image/only")
    assert find_model(REPO, revision="image/only") == find_model(REPO, revision=branch)
    assert not (find_model(REPO, revision=branch) / "tokenizer").exists()
    assert (find_model(REPO) / "tokenizer").is_dir()
    newer = hub.push(REPO, tiny_igpt_model_folder)
    assert find_model(REPO).name == newer
    down(hub)
    assert find_model(REPO, revision=branch, local_files_only=True).name == branch


@pytest.mark.parametrize("file", [False, True], ids=["folder", "linked file"])
def test_the_originals_format_is_converted_into_the_cache(
    hub, monkeypatch, tmp_path, tiny_folder, tiny_dalle, tiny_model_folder, file
):
    """A .ckpt of the cache was once followed to where its link leads, where no config.yaml lies."""
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path / "cache"))
    hub.push(REPO, tiny_folder)
    snapshot = fetch_repo(REPO, MODEL_FILES)
    assert names(snapshot) == names(tiny_folder)
    if file:
        folder = find_model(snapshot / "stage1_last.ckpt")
        assert not (folder / "stage2.safetensors").exists()
    else:
        folder = Dalle.from_pretrained(REPO).folder
        stage2 = "stage2.safetensors"
        assert (folder / stage2).read_bytes() == (tiny_model_folder / stage2).read_bytes()
    assert folder.parent == tmp_path / "cache" / "converted"
    monkeypatch.setattr(resolve, "import_checkpoint", lambda *_, **__: pytest.fail("converted again"))
    assert find_model(snapshot / "stage1_last.ckpt" if file else REPO) == folder


def test_an_interrupted_download_is_not_taken_for_a_model(hub, pushed):
    """huggingface_hub tells from 2 on; before, it is the reader of the weights that finds none."""
    folder = fetch_repo(REPO, ["manifest.json", "config.yaml"])
    with pytest.raises((DownloadError, CheckpointError), match="not complete in the cache|stage1.safetensors: missing"):
        Dalle.from_pretrained(REPO, local_files_only=True)
    assert fetch_repo(REPO, MODEL_FILES) == folder and (folder / "stage1.safetensors").is_file()


# What comes first


def test_a_path_comes_first_then_a_release(hub, monkeypatch, tmp_path, tiny_model_folder, tiny_folder):
    monkeypatch.chdir(tmp_path)
    hub.push("minDALL-E/1.3B", tiny_model_folder)
    release = Path(shutil.copytree(tiny_folder, tmp_path / "cache" / "minDALL-E" / "1.3B"))
    monkeypatch.setenv("MINDALLE_CACHE", str(release.parents[1]))
    assert find_model("minDALL-E/1.3B").parent == release.parents[1] / "converted"
    here = shutil.copytree(tiny_model_folder, "minDALL-E/1.3B")
    assert find_model("minDALL-E/1.3B") == Path(here)
    assert hub.got == []


def test_a_revision_goes_with_a_repository(tiny_model_folder):
    with pytest.raises(UsageError, match="is a path and has no revision 'main'"):
        find_model(tiny_model_folder, revision="main")
    with pytest.raises(UsageError, match="minDALL-E/1.3B is a known name and has no revision 'main'"):
        find_model("minDALL-E/1.3B", revision="main")


def test_a_release_is_not_downloaded_with_local_files_only(monkeypatch, tmp_path):
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "_request", lambda *_: pytest.fail("asked for"))
    with pytest.raises(DownloadError, match="minDALL-E/1.3B is not in the cache .*local_files_only"):
        find_model("minDALL-E/1.3B", local_files_only=True)


# What goes wrong


def refused(match: str, repo: str = REPO, **options) -> str:
    with pytest.raises(DownloadError, match=match) as caught:
        find_model(repo, **options)
    return one_line(caught.value)


def test_an_unknown_repository_or_revision(hub, pushed):
    assert "no/model: no such folder, and no such repository" in refused("hf auth login", "no/model")
    refused("has no revision 'v2'; name a branch, a tag or a commit", revision="v2")
    refused(f"has no revision '{'0' * 40}'", revision="0" * 40)


def test_a_gated_repository(hub, pushed):
    hub.refused[REPO] = (403, "GatedRepo")
    refused("is gated: accept its terms there, then run `hf auth login`")


def test_a_hub_that_fails(hub, pushed):
    hub.refused[REPO] = (500, "")
    refused("is no folder here and not complete in the cache .*500 .*Error")


def test_a_download_that_breaks_off(hub, pushed, monkeypatch):
    monkeypatch.setattr(Handler, "answer", lambda self, *_, **__: self.connection.close())
    refused("somebody/tiny.model.*: ")


@pytest.mark.parametrize("revision", [None, "v1", ""])
def test_without_cache_and_connection(hub, monkeypatch, tmp_path, revision):
    message = refused("local_files_only", local_files_only=True, revision=revision)
    assert "is no folder here and not complete in the cache" in message and str(tmp_path / "hub") in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("not complete in the cache", revision=revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    down(hub)
    refused("not complete in the cache .*[Rr]efused", revision=revision)


def test_a_full_disk(hub, pushed, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    refused(f"cannot download {hub.url}/{REPO}: .*No space left on device")


def test_a_repository_without_a_model(hub, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.gguf").write_text("other")
    hub.push(REPO, tmp_path / "other")
    refused("holds no model: none of config.yaml, manifest.json")


def test_no_folder_of_a_name_that_the_hub_cannot_have():
    with pytest.raises(CheckpointError, match="a/b/c: no such folder, and no known name .* or OWNER/NAME of the hub"):
        find_model("a/b/c")


# The command line


def sample(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["sample", "a cat", "--num-candidates", "2", *(str(argument) for argument in arguments)])
    return code, capsys.readouterr().err


def test_sample_takes_a_repository_and_a_revision(hub, tmp_path, capsys, tiny_model_folder):
    hub.push(REPO, tiny_model_folder, "v1")
    out = tmp_path / "out"
    assert sample(capsys, "--model", REPO, "--revision", "v1", "--out", out)[0] == 0
    assert len(list(out.glob("seed0_*.png"))) == 2
    code, err = sample(capsys, "--model", REPO, "--revision", "v2", "--out", tmp_path / "none")
    assert code == 5 and err.count("\n") == 1 and err.startswith("mindalle sample: ")
    assert sample(capsys, "--model", tiny_model_folder, "--revision", "v1", "--out", tmp_path / "none")[0] == 2


def test_convert_takes_a_repository_in_either_format(hub, tmp_path, tiny_folder, tiny_model_folder):
    hub.push(REPO, tiny_folder)
    hub.push("somebody/converted", tiny_model_folder)
    for source, target in ((REPO, "a"), ("somebody/converted", "b")):
        assert cli.main(["convert", source, str(tmp_path / target), "--dtype", "bfloat16"]) == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())["tensors"] for name in "ab"]
    assert manifests[0] == manifests[1]
    assert {entry["dtype"] for entry in manifests[0]["stage2"].values()} == {"bfloat16"}
    assert cli.main(["convert", "somebody/converted", str(tmp_path / "c"), "--to", "torch"]) == 0
    assert (tmp_path / "c" / "stage2_last.ckpt").is_file()
    assert cli.main(["convert", "no/model", str(tmp_path / "e")]) == 5


# CLIP


@pytest.mark.parametrize("weights", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_one_file_of_weights_is_fetched(hub, tiny_clip_folder, tmp_path, monkeypatch, weights):
    """Most repositories of CLIP hold the same gigabytes in three or four formats."""
    folder = Path(shutil.copytree(tiny_clip_folder, tmp_path / "pushed"))
    (folder / "model.safetensors").unlink()
    for name in ("tf_model.h5", *WEIGHT_FILES[WEIGHT_FILES.index(weights) :]):
        (folder / name).write_bytes(b"weights")
    commit = hub.push("openai/clip", folder, "v1")
    found = find_clip("openai/clip", revision="v1")
    expected = sorted(["config.json", "preprocessor_config.json", "tokenizer.json", weights])
    assert names(found) == expected == sorted(hub.got)
    down(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_clip("openai/clip", revision=commit) == find_clip("openai/clip", revision="v1") == found


def test_a_ranker_of_the_hub(hub, tiny_clip_folder):
    hub.push("openai/clip", tiny_clip_folder)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    ranker = ClipRanker.from_pretrained("openai/clip")
    assert str(ranker) == "CLIP openai/clip"
    expected = ClipRanker.from_pretrained(tiny_clip_folder).scores("the cat", pictures)
    np.testing.assert_array_equal(ranker.scores("the cat", pictures), expected)
    with pytest.raises(DownloadError, match="no such repository"):
        ClipRanker.from_pretrained("openai/none")


def test_a_repository_without_weights(hub, tiny_clip_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_clip_folder, tmp_path / "pushed"))
    (folder / "model.safetensors").unlink()
    hub.push("openai/clip", folder)
    with pytest.raises(CheckpointError, match="holds no weights; it needs one of model.safetensors, "):
        ClipRanker.from_pretrained("openai/clip")
