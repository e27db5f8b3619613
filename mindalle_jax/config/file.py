"""Reads and writes config.yaml: YAML, `section.key=value` overrides, and the types of the schema."""

import contextlib
import copy
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import yaml

from mindalle_jax.config.presets import preset_files
from mindalle_jax.config.schema import Config, Stage1Hparams
from mindalle_jax.errors import ConfigError, did_you_mean


class AnyFile(Protocol):
    """A dataclass whose fields are the sections of a file."""

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        ...


AnyConfig = TypeVar("AnyConfig", bound=AnyFile)


Section = TypeVar("Section")
RUN_SECTIONS = ("data", "training", "sharding")
"""Sections of the file of a run that say nothing of the model."""


def load_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    kind: type[AnyConfig] = Config,
    defaults: Config | None = None,
) -> AnyConfig:
    """Reads a config.yaml, then applies `section.key=value` overrides in order.

    path: a file, or the name of a preset (config/presets.py); a file goes first.
    kind: Config, or a dataclass with other sections. defaults: whose fields stand in for those of dataset, stage1 and
    stage2 that the file leaves out; None: the published model's.
    Raises ConfigError naming the file, the field and the nearest valid name or the type expected.
    """
    return ConfigFile(path, overrides).config(kind, defaults)


def load_section(path: str | os.PathLike[str], overrides: Iterable[str], name: str, kind: type[Section]) -> Section:
    """Returns one section of the file, when the other sections cannot be read yet; otherwise as load_config."""
    return ConfigFile(path, overrides).section(name, kind)


class ConfigFile:
    """A config.yaml that is read once. Sections and complete configurations are made from it."""

    def __init__(self, path: str | os.PathLike[str], overrides: Iterable[str] = ()):
        """Raises ConfigError for a file that cannot be read or is not YAML."""
        self.path, self.overrides = path, tuple(overrides)
        with _naming(path):
            self._tree = _parse_yaml(_read(path))

    def config(self, kind: type[AnyConfig] = Config, defaults: Config | None = None) -> AnyConfig:
        """Returns the configuration; arguments and errors as load_config."""
        with _naming(self.path, self.overrides):
            return _build_config(self._tree, self.overrides, kind, defaults)

    def has(self, section: str) -> bool:
        """Returns whether the file has this section."""
        return isinstance(self._tree, dict) and section in self._tree

    def check_fields(self, kind: type[AnyConfig]) -> None:
        """Checks names and types of all fields, as config does, where the defaults are not known yet."""
        with _naming(self.path, self.overrides):
            _build(kind, _overridden(self._tree, self.overrides), "")

    def model_config(self, defaults: Config) -> Config:
        """Returns the configuration of a model. In the file of a run it ignores the other sections."""
        with _naming(self.path):
            _check_mapping(self._tree, "the file")
            tree = {name: section for name, section in self._tree.items() if name not in RUN_SECTIONS}
            return _build_config(tree, self.overrides, Config, defaults)

    def section(self, name: str, kind: type[Section]) -> Section:
        """Returns one section; errors as load_config."""
        with _naming(self.path, self.overrides):
            tree = _overridden(self._tree, self.overrides)
            _check_mapping(tree, "the file")
            section = tree.get(name)
            return _build(kind, {} if section is None else section, f"{name}.")


def parse_config(
    text: str, overrides: Iterable[str] = (), kind: type[AnyConfig] = Config, defaults: Config | None = None
) -> AnyConfig:
    """load_config from the text of a config.yaml."""
    return _build_config(_parse_yaml(text), overrides, kind, defaults)


def _build_config(tree: Any, overrides: Iterable[str], kind: type[AnyConfig], defaults: Config | None) -> AnyConfig:
    if defaults is not None and isinstance(tree, dict):
        plain, sections = _plain(defaults), typing.get_type_hints(kind)
        tree = _merged({name: plain[name] for name in ("dataset", "stage1", "stage2") if name in sections}, tree)
    config = _build(kind, _overridden(tree, overrides), "")
    config.check()
    return config


def dump_config(config: Any, sections: Collection[str] | None = None) -> str:
    """Returns the text of a config.yaml that parse_config reads back to an equal Config. sections: None for all.

    The one field that the original does not know is left out where it has the original's value.
    """
    tree = {name: section for name, section in _plain(config).items() if sections is None or name in sections}
    hparams = tree.get("stage1", {}).get("hparams", {})
    if hparams.get("num_groups") == Stage1Hparams.num_groups:
        del hparams["num_groups"]
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        presets, name = preset_files(), Path(path).as_posix()
        if name in presets:
            return presets[name].read_text(encoding="utf-8")
        hint = "" if os.path.isabs(path) else did_you_mean(name, presets)
        if not hint and not Path(path).suffix:
            hint = " and no preset; mindalle configs lists them"
        raise ConfigError(f"cannot be read: {'a folder' if Path(path).is_dir() else 'no such file'}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from None


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Iterator[None]:
    """Puts the file before the message of a ConfigError, or the override whose field it names."""
    try:
        yield
    except ConfigError as error:
        keys = {override: override.partition("=")[0].strip() for override in overrides}
        named = next((override for override, key in keys.items() if key and key in str(error)), path)
        raise ConfigError(f"{named}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as people mean it. YAML 1.1 reads it as text, because it has no dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse_yaml(text: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())[:200]}") from None
    return {} if tree is None else tree


def _merged(under: Any, over: Any) -> Any:
    """Returns two parsed files in one, the second on top of the first."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {key: _merged(under[key], value) if key in under else value for key, value in over.items()}


def _overridden(tree: Any, overrides: Iterable[str]) -> Any:
    """Returns a copy of the parsed file with the overrides applied."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _apply_override(tree: Any, override: str) -> None:
    """Sets `section.key=value` in the parsed file, creating sections that it leaves out."""
    path, equals, value = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = path.strip().split(".")
    for section in sections:
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        if tree.get(section) is None:
            tree[section] = {}
        if isinstance(tree[section], _Override):  # of a whole section, before this one
            tree[section] = tree[section].parsed()
        tree = tree[section]
    if not isinstance(tree, dict):
        raise ConfigError(f"override {override!r}: {path.strip()!r} is not a field of a section")
    tree[key] = _Override(value)


class _Override:
    """The value of an override. The type of its field decides whether it is text or YAML."""

    def __init__(self, text: str):
        self.text = text.strip()

    def parsed(self) -> Any:
        """Returns the value as YAML. Raises ConfigError if it is not YAML."""
        return _parse_yaml(self.text)

    def for_text(self) -> str | None:
        """Returns the value for a field of text: as it is typed, so that 2021, on, `a #1` and *.tar need no quotes.

        Quotes of YAML around all of it are taken off. An empty value and null are None.
        """
        if self.text[:1] in ("'", '"') and self.text[-1:] == self.text[:1]:
            return str(self.parsed())
        return None if self.text in ("", "null", "~") else self.text


def _check_mapping(tree: Any, what: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} must be a mapping of fields, not {tree!r:.60}")


def _build(cls: type, tree: Any, path: str) -> Any:
    """Makes a dataclass from a parsed mapping; `path` is its place in the file, with a trailing dot."""
    _check_mapping(tree, path.rstrip(".") or "the file")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = [name for name in hints if str(key).lower() in name.split("_")]
            near = near or difflib.get_close_matches(str(key), hints, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(hints)}"
            raise ConfigError(f"unknown field {path}{key}; {hint}")
    values = {}
    for name, value in tree.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = value.parsed() if isinstance(value, _Override) else value
            values[name] = _build(typing.cast(type, hint), {} if value is None else value, f"{path}{name}.")
        else:
            values[name] = _typed(value, hint, f"{path}{name}")
    return cls(**values)


def _typed(value: Any, hint: Any, path: str) -> Any:
    """`value` if it is of the annotated type; ints pass for floats, lists for tuples, and bools never for numbers."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Override):
        kind = options[0] if origin is types.UnionType else hint
        if typing.get_origin(kind) is Literal and value.text in typing.get_args(kind):
            value = value.text
        else:
            value = value.for_text() if kind is str else value.parsed()
        if value is None and origin is not types.UnionType:
            raise ConfigError(f"{path} needs a value; it cannot be empty or null")
    if origin is types.UnionType:  # X | None
        return None if value is None else _typed(value, options[0], path)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{path} must be {' or '.join(map(repr, options))}, not {value!r:.60}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list of {options[0].__name__}, not {value!r:.60}")
        return tuple(_typed(item, options[0], f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) is str:
        return os.path.expanduser(value)  # no field but a path begins with ~
    if type(value) is not hint:
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {value!r:.60} ({type(value).__name__})")
    return value


def _plain(value: Any) -> Any:
    """Returns dataclasses and tuples as the dicts and lists that YAML knows."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value
