"""`mindalle`: exit codes, messages and help whatever the verb, and that its documentation is true."""

import re
import shlex

import pytest
from commands import ROOT, message, tree

from mindalle_jax import Dalle, cli, errors
from mindalle_jax.interop import mindalle


def test_mindalle_alone_shows_its_help(mindalle_cli):
    assert mindalle_cli() == mindalle_cli("--help") == mindalle_cli("-h")
    code, stdout, err = mindalle_cli()
    assert (code, err) == (0, "") and all(f"  {verb} " in stdout for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["smaple"], "mindalle: there is no verb smaple; did you mean sample?"),
        (["fine"], "mindalle: there is no verb fine; did you mean finetune?"),
        (["nonsense"], "mindalle: there is no verb nonsense; mindalle --help lists them"),
        (["a cat"], 'mindalle: a verb comes first, as in mindalle sample "a red apple"'),
        (["--prompt", "a cat"], 'mindalle: a verb comes first, as in mindalle sample "a red apple"'),
        (["convert", "x"], "mindalle convert: the following arguments are required: DST; mindalle convert --help "
         "lists the options"),
    ],
)  # fmt: skip
def test_an_incomplete_command_is_one_line(mindalle_cli, arguments, text):
    assert mindalle_cli(*arguments) == (2, "", text + "\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example_that_is_a_command(mindalle_cli, verb):
    code, stdout, err = mindalle_cli(verb, "--help")
    assert (code, err) == (0, "")
    examples = stdout.partition("\nexample")[2].partition(":\n")[2].strip().splitlines()
    assert examples and len(examples) == len(cli.VERBS[verb].example.strip().splitlines())
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["mindalle", verb]
        cli.verb_parser(verb).parse(words[2:])  # exits where it does not parse


@pytest.mark.parametrize("verb", ["sample", "convert"])
def test_an_interruption_is_exit_code_130(sample, mindalle_cli, monkeypatch, tmp_path, tiny_folder, verb):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dalle, "stream", interrupt)
    monkeypatch.setattr(mindalle, "write_weights", interrupt)
    code, stdout, err = sample("a cat") if verb == "sample" else mindalle_cli("convert", tiny_folder, tmp_path / "a")
    assert (code, stdout) == (130, "") and err.splitlines()[-1] == f"mindalle {verb}: interrupted"
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error", "/some/file"), errors.MindalleError("said so")],
    ids=["OSError", "MindalleError"],
)
def test_an_error_without_a_code_of_its_own_is_1(mindalle_cli, monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mindalle, "import_checkpoint", fail)
    code, _, err = mindalle_cli("convert", "x", tmp_path / "a")
    assert code == 1 and message(err, "convert") == str(error)


def test_the_process_keeps_its_own_warnings(sample):
    """main() may be called from a program, which has its own way to show them."""
    import warnings

    before = warnings.showwarning
    assert sample("")[0] == 2
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ([], ["sample", "convert"]),
        (
            ["sample"],
            ["--prompts-file", "does not grow with it (default: 16)", "(default: 256, or all codes", "(default: off)",
             "the lowest id on a tie (default: 1.0)", "random takes a new one and reports it (default: 0)",
             "(default: float32 on CPU, bfloat16 elsewhere)"],
        ),
        (["convert"], ["SRC", "DST", "the format to make (default: jax)"]),
    ],
    ids=["mindalle", "sample", "convert"],
)  # fmt: skip
def test_help_shows_the_defaults(mindalle_cli, arguments, texts):
    code, stdout, err = mindalle_cli(*arguments, "--help")
    text = " ".join(stdout.split())
    assert (code, err) == (0, "")
    assert [part for part in texts if part not in text] == []
    assert "default: None" not in text and "default: False" not in text


# The documentation


def test_the_table_of_what_may_change_in_a_run_is_the_loops():
    from mindalle_jax.training.run_dir import FREE_FIELDS

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(data|experiment|training|sharding)` \| (.+) \|$", text, re.MULTILINE)
    fields = [f"{section}.{name}" for section, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted([*fields, "sharding"]) == sorted(FREE_FIELDS) and ("sharding", "all") in rows


def test_the_examples_of_the_documentation_are_commands():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {command[1] for command in commands} == {
        "sample", "show", "finetune", "train-tokenizer", "train-vqgan", "train-clip", "check-data", "configs",
        "prepare-codes", "convert", "export-checkpoint",
    }  # fmt: skip
    for command in commands:
        assert command[0] == "mindalle"
        cli.verb_parser(command[1]).parse(command[2:])  # exits where it does not parse


@pytest.mark.parametrize("module", ["optax", "orbax.checkpoint", "grain"])
def test_a_missing_extra_is_one_sentence(capsys, module):
    def train():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert cli.run_reporting("mindalle finetune", train) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"mindalle finetune: needs {module.split('.')[0]}: pip install ")
    packages = [re.split("[<>=]", package)[0] for package in shlex.split(told.partition("pip install ")[2])]
    assert packages == ["optax", "orbax-checkpoint", "grain", "tensorboardX"]  # what stands in pyproject.toml


def test_a_missing_module_of_another_kind_is_a_fault_of_ours():
    def train():
        raise ModuleNotFoundError("No module named 'mindalle_jax.none'", name="mindalle_jax.none")

    with pytest.raises(ModuleNotFoundError):
        cli.run_reporting("mindalle finetune", train)
