"""Parses commands. A mistake in a command becomes one line that names the option as it is typed."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mindalle_jax.errors import UsageError, did_you_mean, printable


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formats --help: shows defaults other than None, False and an empty list, and keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of one verb. Options are not abbreviated; arguments and options come in any order."""

    def __init__(self, prog: str, description: str, example: str = ""):
        """Makes a parser. example: commands for the end of the help, one per line; "" for none."""
        lines = [f"  {line}" for line in example.strip().splitlines()]
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n".join([f"example{'s' if len(lines) > 1 else ''}:", *lines]) if lines else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the arguments. For a mistake, prints one line and exits with code 2.

        Everything after `--` is an argument of the first kind that takes any number of values, and no option.
        """
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
        """Prints one line and exits with code 2; argparse would print the usage before it."""
        print(printable(f"{self.prog}: {message}; {self.prog} --help lists the options"), file=sys.stderr)
        raise SystemExit(UsageError.exit_code)

    def as_typed(self, message: str) -> str:
        """Replaces the names of Python's options in a message by those of this command: top_k becomes --top-k."""
        options = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
        if "preview_every" in options:
            options["every"] = options["preview_every"]
        # A name without "_", such as seed, is also an English word. It is the option in "seed must be ...".
        names = "|".join(name if "_" in name else rf"^{name}(?= must )" for name in options)
        # Text in quotes and parts of a path come from the user and stay as they are.
        pattern = rf"'[^']*'|\"[^\"]*\"|(?<![\w./~-])({names})(?![\w./-]|=True)"
        typed = re.sub(pattern, lambda match: options[match[1]] if match[1] else match[0], message)
        return re.sub(r" \(None\)|, or None\b", "", typed)


def path(text: str) -> Path:
    """Returns the path of an argument; expands `~` if the shell did not."""
    return Path(os.path.expanduser(text))


def add_path(group: Any, *names: str, **settings: Any) -> None:
    """Adds an argument that is a path to a parser or to a group of arguments."""
    group.add_argument(*names, type=path, **settings)
