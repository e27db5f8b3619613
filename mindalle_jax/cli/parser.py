"""How commands are parsed, and how a mistake in one is told: one line, with the option as it is typed there."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mindalle_jax.errors import UsageError, did_you_mean, printable


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not None, which the help explains, nor that a switch is off; keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of one verb. Options are not abbreviated; arguments and options come in any order."""

    def __init__(self, prog: str, description: str, example: str = ""):
        """example: commands, one per line, for the end of the help; "" if they stand in the description."""
        lines = [f"  {line}" for line in example.strip().splitlines()]
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n".join([f"example{'s' if len(lines) > 1 else ''}:", *lines]) if lines else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. What comes after `--` is no option. Exits with code 2 and one line for a mistake."""
        argv, rest = list(argv), []
        many = [action for action in self._actions if not action.option_strings and action.nargs == "*"]
        if many:
            if "--" in argv:
                at = argv.index("--")
                argv, rest = argv[:at], argv[at + 1 :]
            arguments, unknown = self.parse_known_intermixed_args(argv)
            setattr(arguments, many[0].dest, [*getattr(arguments, many[0].dest), *rest])
        else:
            arguments, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            kind = "unknown option" if name.startswith("-") else "unexpected argument"
            self.error(f"{kind} {name}{did_you_mean(name, known)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the usage first."""
        print(printable(f"{self.prog}: {message}; {self.prog} --help lists the options"), file=sys.stderr)
        raise SystemExit(UsageError.exit_code)

    def as_typed(self, message: str) -> str:
        """A message in which names of Python's options are those of this command: top_k becomes --top-k."""
        options = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
        if "preview_every" in options:
            options["every"] = options["preview_every"]
        # A name of one word is also a word of the language: it is the option where it must be something.
        names = "|".join(name if "_" in name else rf"^{name}(?= must )" for name in options)
        # What is in quotes, or part of a path, is somebody's own.
        pattern = rf"'[^']*'|\"[^\"]*\"|(?<![\w./~-])({names})(?![\w./-])"
        typed = re.sub(pattern, lambda match: options[match[1]] if match[1] else match[0], message)
        return re.sub(r" \(None\)|, or None\b", "", typed)


def path(text: str) -> Path:
    """The type of arguments that are paths: `~` is expanded where the shell did not."""
    return Path(os.path.expanduser(text))


def add_path(group: Any, *names: str, **settings: Any) -> None:
    """An argument that is a path."""
    group.add_argument(*names, type=path, **settings)
