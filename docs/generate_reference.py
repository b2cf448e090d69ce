"""Writes docs/configuration.md from the types of the configuration, and docs/commands.md from what the commands say of
themselves: python docs/generate_reference.py"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from diki_ray.commands.app import app
from diki_ray.config import Config
from diki_ray.config.affects import Affects, affects
from diki_ray.config.sweep import SweepConfig
from diki_ray.serving.settings import Settings

FOLDER = Path(__file__).parent
COMMAND = "python docs/generate_reference.py"
HEAD = f"""\
# Configuration

<!-- Generated from the types by `{COMMAND}`: change the text there, below the field it is about. -->

A run is one YAML file. Every field can be overridden on the command line, as in `train.epochs=3 run.name=second`. An
unknown field, a wrong type or a value out of range is an error that names the field, its value and what is allowed. A
default of – means that the field must be given; `null` is *not set*.
"""
COMMANDS_HEAD = f"""\
# Commands

<!-- Generated from the commands by `{COMMAND}`: change the text there, in diki_ray/commands/. -->

`diki-ray COMMAND`, or `python -m diki_ray COMMAND`. Every command has `--help`. `DIKI_STORAGE` and `DIKI_RUN` are the
defaults of `--storage` and `--run`. Exit codes: 0, done; 1, a check has failed (`doctor`, `store verify`); 2, something
that you can put right, with a sentence on standard error; 130 and 143, ended by Ctrl-C or SIGTERM. `jobs/*.py` are the
same commands as files, for `ray job submit`. `diki-ray --install-completion` makes the shell complete them.
"""
ROOTS = (
    (
        Config,
        "A run",
        "`diki-ray continual --config FILE [section.field=value …]`. Examples are in `configs/`. What another value of "
        "a field *changes*: *modules* are trained anew, under other keys, and those of the former value stay; "
        "*answers*: the run is evaluated anew with the modules that are there; *nothing*: a finished run has nothing "
        "to do, and a sweep still knows its settings.",
    ),
    (SweepConfig, "A sweep", "`diki-ray sweep --config FILE`, see [sweeps](sweeps.md)."),
    (Settings, "A server", "Options of `diki-ray serve`, written `--max-images 8`."),
)


def page() -> str:
    """The page of the configuration as the types give it."""
    parts = [HEAD]
    for root, title, about in ROOTS:
        parts += [f"## {title}", about, *_tables(root, "")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def commands_page() -> str:
    """The page of all commands as they describe themselves."""
    parts = [COMMANDS_HEAD, *_command(get_command(app), "diki-ray")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _command(command: Any, name: str) -> Iterator[str]:
    """A command's text and options; of a group, those of the commands in it."""
    if (inner := getattr(command, "commands", None)) is not None:
        for own_name, each in inner.items():
            yield from _command(each, f"{name} {own_name}")
        return
    yield f"## {name}"
    yield inspect.cleandoc(command.help or "")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = [name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]" if options else ""]
    yield f"```\n{' '.join(filter(None, usage))}\n```"
    if options:
        rows = [f"| `{_cell(_written(p))}` | {_shown_default(p)} | {_text(p.help or '')} |" for p in options]
        yield "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _written(option: Any) -> str:
    """An option as it is typed."""
    if option.is_flag:
        return ", ".join(option.opts)
    return f"{', '.join(option.opts)} {option.metavar or option.name.upper()}"


def _shown_default(option: Any) -> str:
    return "" if option.default in (None, False) else f"`{_cell(option.default)}`"


def _tables(model: type[BaseModel], path: str) -> Iterator[str]:
    """A section's table, then those of the sections in it."""
    if path:
        yield f"### {path}"
        yield _text(inspect.cleandoc(model.__doc__ or ""))
    told, inner, rows = _documented(model), [], []
    for name, info in model.model_fields.items():
        sections = list(_sections(info.annotation))
        for section in sections:
            label = f"{path}.{name}" if path else name
            variant = f" ({_discriminator(section)})" if len(sections) > 1 else ""
            inner.append((section, f"`{label}`{variant}" if not path.startswith("`") else label))
        if not sections:
            rows.append((name, _type(info), _default(info), affects(info), told.get(name, "")))
        elif told.get(name):
            rows.append((name, "below", "", affects(info), told[name]))
    if rows:
        yield _table(rows)
    for section, label in inner:
        yield from _tables(section, label)


def _table(rows: list[tuple[str, str, str, Affects | None, str]]) -> str:
    """Its fields; with what they change where fields say it, as those of a run do."""
    marked = any(mark for *_, mark, _ in rows)
    lines = ["| field | type | default | changes | |" if marked else "| field | type | default | |"]
    lines.append("|---" * (4 + marked) + "|")
    for name, type_, default, mark, text in rows:
        changes = f" {mark.value if mark else ''} |" if marked else ""
        lines.append(f"| `{name}` | {type_} | {default} |{changes} {_text(text)} |")
    return "\n".join(lines)


def _documented(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                found[field.target.id] = inspect.cleandoc(text.value.value) if told else ""
    return found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field holds: one, one of several, or a list of them."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _sections(part)


def _discriminator(section: type[BaseModel]) -> str:
    """What tells this section from the others that may stand in its place: the values of its first fixed field."""
    for name, info in section.model_fields.items():
        if get_origin(info.annotation) is Literal:
            return f"{name}: {', '.join(map(str, get_args(info.annotation)))}"
    return section.__name__


def _type(info: FieldInfo) -> str:
    limits = []
    for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        limits += [f"{sign} {getattr(m, bound):g}" for m in info.metadata if getattr(m, bound, None) is not None]
    limits += [f"`{_cell(m.pattern)}`" for m in info.metadata if getattr(m, "pattern", None)]
    return ", ".join([_named(info.annotation), *limits])


def _named(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_named(a) for a in arguments if a is not NoneType)
    if origin in (tuple, list):
        return f"list of {_named(arguments[0])}"
    if origin is dict:
        return f"{_named(arguments[0])} → {_named(arguments[1])}"
    if annotation is Any:
        return "any value"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "–"
    if default is None or isinstance(default, bool):
        return "`null`" if default is None else f"`{str(default).lower()}`"
    return f"`{_cell(list(default) if isinstance(default, tuple) else default)}`"


def _text(text: str) -> str:
    return _cell(" ".join(text.split()))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


PAGES = {"configuration.md": page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (FOLDER / name).write_text(text())
