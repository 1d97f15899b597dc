"""Hook: tables made from the code. `<!-- table: NAME -->` on a page is replaced by the table of that name."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from site_docstrings import cell, entries_of

if typing.TYPE_CHECKING:
    from trl_steppo.trainer.metric_table import Metric

Schema = dict[str, typing.Any]
"""A JSON schema, or a part of one."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def code(value: object) -> str:
    """A value as code, or nothing for none."""
    return f"`{value}`" if value not in ("", None) else ""


# -- settings ---------------------------------------------------------------------------------------------------------


def steppo_config() -> str:
    """The fields of `StepPOConfig`, in the groups that `--help` has, and the rest of `TrainingArguments`."""
    from trl_steppo import StepPOConfig
    from trl_steppo.trainer.setting_groups import MEANINGS, SETTING_GROUPS

    fields = {field.name: field for field in dataclasses.fields(StepPOConfig)}
    texts = {name: text for cls in reversed(StepPOConfig.__mro__) for name, text in _documented(cls)} | MEANINGS
    groups = {group.title: group.fields for group in SETTING_GROUPS}
    in_groups = {name for names in groups.values() for name in names}
    groups["Other settings of transformers"] = tuple(
        name for name, f in fields.items() if f.init and name not in in_groups
    )
    parts = []
    for title, names in groups.items():
        rows = [_setting(fields[name], _annotation(StepPOConfig, name), texts.get(name)) for name in names]
        parts.append(f"## {title}\n\n{table(['setting', 'type', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts)


def _documented(cls: type) -> Iterator[tuple[str, str]]:
    if cls.__module__.startswith("trl_steppo.") and cls.__doc__:
        for names, _, text in entries_of(inspect.cleandoc(cls.__doc__), "Parameters"):
            if len(found := re.findall(r"\w+", names)) <= 2:  # the help of each says more than one text for all
                yield from ((name, text) for name in found)


def _annotation(cls: type, name: str) -> object:
    """A field's type as it is written: a parser of command lines overwrites the types of the fields themselves."""
    return next(kind.__annotations__[name] for kind in cls.__mro__ if name in vars(kind).get("__annotations__", {}))


def _setting(field: dataclasses.Field[object], kind: object, text: str | None) -> tuple[str, str, str, str]:
    default = field.default if field.default is not dataclasses.MISSING else None
    if default is None and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    shown = f'"{default}"' if isinstance(default, str) else str(default)
    help_text = text or " ".join(str(field.metadata.get("help", "")).split())
    return f"`{field.name}`", code(_type_name(kind)), code(shown), plain(help_text)


def _type_name(kind: object) -> str:
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    name = re.sub(r"\b(?:typing|\w+(?:\.\w+)+)\.", "", name)
    name = re.sub(r"Literal\[([^\]]*)\]", lambda choices: choices[1].replace("'", '"').replace(", ", " or "), name)
    return name.replace(" | ", " or ")


def plain(text: str) -> str:
    """Text that is no markdown, so that it shows as it is written; what stands in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", text))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


# -- metrics ----------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """All metrics, by the stage that they come from."""
    from trl_steppo.trainer.metric_table import METRICS

    stages = dict.fromkeys(metric.source for metric in METRICS)
    parts = []
    for stage in stages:
        rows = [(f"`{m.name}`", m.unit, _meaning(m), plain(m.when) or "always") for m in METRICS if m.source == stage]
        parts.append(f"## {stage[:1].upper()}{stage[1:]}\n\n{table(['metric', 'unit', 'meaning', 'when'], rows)}")
    return "\n\n".join(parts)


def _meaning(metric: Metric) -> str:
    same = f" The same as `{metric.same_as}`, under the name that `GRPOTrainer` has for it." if metric.same_as else ""
    return plain(metric.meaning) + same


# -- the command ------------------------------------------------------------------------------------------------------


def cli() -> str:
    """Each command of `trl-steppo` with its arguments."""
    from trl_steppo.cli import make_parser

    return "\n\n".join(_commands(make_parser(), level=2))


def _commands(parser: argparse.ArgumentParser, level: int, summary: str = "") -> Iterator[str]:
    formatter = argparse.HelpFormatter(prog=parser.prog, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    text = (parser.description or summary).strip()
    text = text[:1].upper() + text[1:].removesuffix(".") + "."
    usage = formatter.format_help().strip().removeprefix("usage: ").replace("\n" + " " * len("usage: "), "\n")
    yield f"{'#' * level} {parser.prog}\n\n{plain(text)}\n\n```text\n{usage}\n```"
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    shown = [action for action in parser._actions if action not in subcommands and action.help != argparse.SUPPRESS]
    if rows := [_argument(parser, action) for action in shown if action.dest != "help"]:
        has_defaults = any(default for *_, default in rows)
        head = ["argument", "meaning", *(["default"] if has_defaults else [])]
        yield table(head, [row[: len(head)] for row in rows])
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```"
    for action in subcommands:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            yield from _commands(inner, level + 1, helps.get(name, ""))


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str]:
    options = [name for name in action.option_strings if "-" not in name.lstrip("-")]
    names = options or [str(action.metavar or action.dest)]
    value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    default = action.default if action.nargs != 0 else None
    default = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    shown = "" if default in (None, argparse.SUPPRESS) else str(default)
    help_text = parser._get_formatter()._expand_help(action) if action.help else ""
    help_text += "." if choices and help_text and not help_text.endswith(".") else ""
    return ", ".join(f"`{name}{value}`" for name in names), plain(help_text) + choices, code(shown)


# -- the gateway ------------------------------------------------------------------------------------------------------


@cache
def openapi() -> Schema:
    """What the gateway serves under `/openapi.json`."""
    from starlette.requests import Request
    from starlette.routing import Route

    from trl_steppo.gateway.app import make_app
    from trl_steppo.gateway.sampling import SamplingPort
    from trl_steppo.gateway.service import Gateway
    from trl_steppo.gateway.tokens import ChatFormats
    from trl_steppo.testing import byte_tokenizer

    app = make_app(Gateway(ChatFormats(byte_tokenizer()), SamplingPort()))
    (route,) = (route for route in app.routes if isinstance(route, Route) and route.path == "/openapi.json")
    answer = asyncio.run(route.endpoint(Request({"type": "http"})))
    return typing.cast("Schema", json.loads(answer.body))


def _operations() -> Iterator[tuple[str, str, Schema]]:
    for path, methods in openapi()["paths"].items():
        for method, described in methods.items():
            yield method.upper(), path, described


def gateway_operations() -> str:
    """Method, path, meaning, key and body of each operation."""

    def row(method: str, path: str, described: Schema) -> tuple[str, str, str, str]:
        summary, _, admin = described["summary"].partition(" (admin's key)")
        admin = described["summary"] != summary
        key = "none" if not described["security"] else "admin's" if admin else "session's"
        body = described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        return f"`{method} {path}`", summary, key, _kind(body) if body else ""

    return table(["request", "what it does", "key", "body"], [row(*operation) for operation in _operations()])


def gateway_refusals() -> str:
    """The statuses of refused requests."""
    meanings: dict[str, list[str]] = {}
    for _, _, described in _operations():
        for status, answer in described["responses"].items():
            if status >= "400" and answer["description"] not in meanings.setdefault(status, []):
                meanings[status].append(answer["description"])
    return table(["status", "meaning"], [(f"`{s}`", "; ".join(texts)) for s, texts in sorted(meanings.items())])


def gateway_bodies() -> str:
    """The fields of each body, and of the objects in them."""
    parts = []
    for name, schema in openapi()["components"]["schemas"].items():
        if "properties" in schema:
            required = schema.get("required", ())
            rows = [
                (
                    f"`{field}`",
                    _kind(kind),
                    "required" if field in required else code(json.dumps(kind.get("default"))),
                )
                for field, kind in schema["properties"].items()
            ]
            text = schema.get("description", "").replace("\n", " ")
            parts.append(f"### {name}\n\n{text}\n\n{table(['field', 'type', 'default'], rows)}")
    return "\n\n".join(parts)


def _kind(schema: Schema) -> str:
    """A type in words; objects of their own are links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_kind(option) for option in options if option.get("type") != "null")
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if schema.get("items") else "list"
    return f"{schema.get('type', 'any')}{_range(schema)}"


def _range(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    above = "above" if "exclusiveMinimum" in schema else "at least"
    below = "below" if "exclusiveMaximum" in schema else "at most"
    low_text = [] if low is None else [f"{above} {low:g}" if low < 1e6 else f"{above} {low}"]
    high_text = [] if high is None or high == 2**31 else [f"{below} {high:g}"]
    return f", {' and '.join([*low_text, *high_text])}" if low_text or high_text else ""


# -- errors -----------------------------------------------------------------------------------------------------------


def errors() -> str:
    """Every exception of the package: what it is, and what it is raised for."""
    import trl_steppo.errors

    classes = [kind for kind in vars(trl_steppo.errors).values() if inspect.isclass(kind)]

    def row(kind: type) -> tuple[str, str, str]:
        return f"`{kind.__name__}`", ", ".join(f"`{base.__name__}`" for base in kind.__bases__), kind.__doc__ or ""

    return table(["error", "is a", "meaning"], [row(kind) for kind in classes])


TABLES: dict[str, Callable[[], str]] = {
    "steppo_config": steppo_config,
    "metrics": metrics,
    "cli": cli,
    "gateway_operations": gateway_operations,
    "gateway_refusals": gateway_refusals,
    "gateway_bodies": gateway_bodies,
    "errors": errors,
}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables into a page."""
    return re.sub(r"^<!-- table: (\w+) -->$", lambda mark: TABLES[mark[1]](), markdown, flags=re.MULTILINE)
