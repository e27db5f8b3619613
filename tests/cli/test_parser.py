"""How commands are parsed, and that a mistake is told with the option as it is typed there."""

import pytest

from mindalle_jax.cli.parser import Parser, add_path, path


@pytest.fixture
def parser() -> Parser:
    parser = Parser("mindalle draw", "Draws.", 'mindalle draw "a cat"')
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("-n", "--num-candidates", type=int, default=16, help="how many")
    parser.add_argument("--seed", type=int, help="a number (default: none)")
    parser.add_argument("--preview-every", type=int)
    parser.add_argument("--top-k")
    parser.add_argument("--quick", action="store_true", help="in a hurry")
    add_path(parser, "-o", "--out")
    return parser


@pytest.mark.parametrize(
    ("argv", "prompts", "out"),
    [
        (["a", "--out", "o", "b"], ["a", "b"], "o"),
        (["--out", "o", "a b", "--quick", "c"], ["a b", "c"], "o"),
        (["a", "-o", "o", "--", "--b", "-c"], ["a", "--b", "-c"], "o"),
        (["--", "-x", "--out"], ["-x", "--out"], None),
        (["- a thing", "-5"], ["- a thing", "-5"], None),
        ([], [], None),
    ],
)
def test_options_and_prompts_come_in_any_order(parser, argv, prompts, out):
    arguments = parser.parse(argv)
    assert arguments.prompts == prompts
    assert arguments.out == (None if out is None else path(out))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["a", "--num", "3"], "unknown option --num; did you mean --num-candidates?"),
        (["a", "--topk", "3", "b"], "unknown option --topk; did you mean --top-k?"),
        (["--sead=3"], "unknown option --sead; did you mean --seed?"),
        (["--SEED", "3"], "unknown option --SEED; did you mean --seed?"),
        (["--xyzzy"], "unknown option --xyzzy"),
        (["-x"], "unknown option -x"),
        (["--seed"], "argument --seed: expected one argument"),
        (["-n", "many"], "argument -n/--num-candidates: invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_line(parser, capsys, argv, text):
    """And an abbreviation is one: what it stands for changes when an option is added."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse(argv)
    expected = f"mindalle draw: {text}; mindalle draw --help lists the options\n"
    assert stopped.value.code == 2 and capsys.readouterr() == ("", expected)


def test_too_many_arguments_are_told(capsys):
    parser = Parser("mindalle copy", "Copies.", "mindalle copy a b")
    parser.add_argument("source")
    parser.add_argument("target")
    with pytest.raises(SystemExit):
        parser.parse(["a", "b", "c"])
    assert "mindalle copy: unexpected argument c;" in capsys.readouterr().err
    arguments = parser.parse(["--", "-a", "b"])
    assert (arguments.source, arguments.target) == ("-a", "b")


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("num_candidates must be an integer, not 0", "--num-candidates must be an integer, not 0"),
        ("seed must be in [0, 4)", "--seed must be in [0, 4)"),
        (
            "every must be a multiple of 16 codes, or None; not 3",
            "--preview-every must be a multiple of 16 codes; not 3",
        ),
        ("top_k must be 1, or off (None); not 0", "--top-k must be 1, or off; not 0"),
        ("they do not fit; try num_candidates 8", "they do not fit; try --num-candidates 8"),
        ("'top_k' of \"num_candidates\" is odd", "'top_k' of \"num_candidates\" is odd"),
        ("top_k/x.png: no such file", "top_k/x.png: no such file"),
        ("/a/num_candidates: no such folder", "/a/num_candidates: no such folder"),
        ("top_k.png: no such file", "top_k.png: no such file"),
        ("the seed of a plant must be dry", "the seed of a plant must be dry"),
        ("the out tray is full", "the out tray is full"),
        ("training.top_k_codes is unknown", "training.top_k_codes is unknown"),
    ],
)
def test_messages_name_options_as_typed(parser, message, typed):
    assert parser.as_typed(message) == typed


def test_help_shows_defaults_and_the_example(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    text = capsys.readouterr().out
    assert "how many (default: 16)" in text and 'example:\n  mindalle draw "a cat"' in text
    assert "default: None" not in text and "in a hurry\n" in text


def test_a_tilde_is_the_home_folder(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert (
        str(parser.parse(["--out", "~/images"]).out) == str(parser.parse(["--out=~/images"]).out) == "/home/ada/images"
    )
