# SPDX-License-Identifier: Apache-2.0
"""A program's options: one dataclass, filled from its defaults, then a YAML recipe, then the command line.

    options = parse_options(TrainOptions, argv, program="…")

- every field is an option `--name value`, with the field's `help` metadata and default in `--help`;
- a field that is a dictionary takes whole YAML values or single entries, `--model.experts "[fusion, action]"`;
- an unknown name is an error that suggests the closest known one;
- the text of a string option is taken as it stands ("2024_11_26", "12:30", "run #2"), only null is nothing where the
  option may be nothing; other values are read as YAML and checked against the field's type.

Options come from nowhere else, so `save_recipe` records all of them.
"""

import argparse
import dataclasses
import difflib
import errno
import os
import sys
import types
import typing
from pathlib import Path

import yaml

from data.errors import UserError
from modeling_camoe.frames import VideoDecodingError


# Disk full, over quota, read-only, no permission, file too large: a traceback would not help.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


NOTHING = ("null", "~", "")  # on a command line


def exit_on_user_error(main):
    """Run a program's `main()`: errors that the user can fix exit with one line and code 2, Ctrl-C with code 130."""
    try:
        main()
    except (UserError, VideoDecodingError) as error:
        sys.exit(_print_error(str(error)))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(_print_error(f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _print_error(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def option(default=dataclasses.MISSING, help: str = "", choices=None, **kwargs):
    """A dataclass field with help text; each instance gets its own copy of a dictionary or list."""
    if isinstance(default, (dict, list)):
        kwargs["default_factory"] = lambda: default.copy()
    else:
        kwargs["default"] = default
    return dataclasses.field(metadata={"help": help, "choices": choices}, **kwargs)


def parse_options(options_class, argv: list[str] | None = None, description: str | None = None):
    """Parse `[--config RECIPE.yaml] [--name value ...]` into `options_class`.

    Raises:
        UserError: unknown names, values of the wrong type, an unreadable recipe, a missing required field.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = {f.name: f for f in dataclasses.fields(options_class)}
    if "-h" in argv or "--help" in argv:
        _help_parser(options_class, description).print_help()
        sys.exit(0)

    values: dict = {}
    given = _read_command_line(argv)
    for path in given.pop("config", []):
        values = _merge(values, _read_recipe(path, known))
    for name in values:
        _check_name(name, known, "the recipe")
    for name, texts in given.items():
        head, _, entry = name.partition(".")
        _check_name(head, known, "the command line")
        value = texts[-1] if _is_text(known[head]) and not entry else _read_value(texts[-1], name)
        if not entry and value in NOTHING and _accepts(known[head].type, None):
            value = None
        if entry:
            if not _accepts(known[head].type, {}):
                raise UserError(f"--{name}: {head} is not a dictionary of options")
            value = _nest(entry.split("."), value)
            values[head] = _merge(values.get(head) or {}, value)
        else:
            values[head] = value

    for name, field in known.items():
        if name in values:
            values[name] = _coerce(values[name], field)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"--{name} is required: {field.metadata['help']}")
    return options_class(**values)


def save_recipe(options, path: str | os.PathLike):
    """Write all options as a recipe that reproduces them."""
    text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def flat_options(options) -> dict[str, bool | int | float | str]:
    """All options as a tracker takes them: numbers and texts, entries of dictionaries as "model.gate"."""
    flat = {}

    def add(name: str, value):
        if isinstance(value, dict):
            for key, entry in value.items():
                add(f"{name}.{key}", entry)
        else:
            flat[name] = value if isinstance(value, (bool, int, float, str)) else str(value)

    for name, value in dataclasses.asdict(options).items():
        add(name, value)
    return flat


def _read_command_line(argv: list[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r}: options are written --name value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                text = "true"  # a bare --flag
            else:
                text = rest.pop(0)
        given.setdefault(name, []).append(text)
    return given


def _is_text(field: dataclasses.Field) -> bool:
    """Whether a value is a text as it stands; an option that also takes a list is read as YAML."""
    kinds = {typing.get_origin(kind) or kind for kind in _alternatives(field.type)}
    return str in kinds and not {list, dict} & kinds


def _read_recipe(path: str, known: dict[str, dataclasses.Field]) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text) or {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must hold `name: value` lines")
    for name, node in root.value if values else ():
        is_scalar = isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"
        if is_scalar and name.value in known and _is_text(known[name.value]):
            values[name.value] = node.value  # as it is written: YAML reads 12:30 as 750
    return values


def _read_value(text: str, name: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name}: cannot read {text!r} as a value: {error}") from error


def _check_name(name: str, known: dict, where: str):
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {nearest[0]!r}?" if nearest else "; --help lists all"
        raise UserError(f"unknown option {name!r} in {where}{hint}")


def _merge(base: dict, update: dict) -> dict:
    """`update` over `base`, dictionaries entry by entry."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _nest(keys: list[str], value) -> dict:
    return {keys[0]: _nest(keys[1:], value) if keys[1:] else value}


def _alternatives(annotation) -> tuple:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _accepts(annotation, value) -> bool:
    kinds = tuple(typing.get_origin(kind) or kind for kind in _alternatives(annotation))
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _coerce(value, field: dataclasses.Field):
    choices = field.metadata.get("choices")
    kinds = _alternatives(field.type)
    if isinstance(value, str) and float in kinds and str not in kinds:
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            pass
    if not _accepts(field.type, value):
        expected = " or ".join(
            "nothing" if kind is types.NoneType else getattr(kind, "__name__", str(kind)) for kind in kinds
        )
        raise UserError(f"option {field.name!r} must be {expected}, got {value!r}")
    if choices and value not in choices:
        raise UserError(f"option {field.name!r} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and int not in kinds else value


def _help_parser(options_class, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe; options on the command line win over it")
    for field in dataclasses.fields(options_class):
        kinds = _alternatives(field.type)
        kind = "|".join("none" if k is types.NoneType else getattr(k, "__name__", str(k)) for k in kinds)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        note = " (required)" if default is dataclasses.MISSING else f" (default: {default})"
        help_text = (field.metadata["help"] + note).replace("%", "%%")
        parser.add_argument(f"--{field.name}", metavar=kind, help=help_text)
    return parser
