"""Reading a configuration file: YAML in, one clear sentence out when something is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlme.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are distinct words."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)  # type: ignore[no-untyped-call]
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise InputError(f"line {line}: YAML reads an unquoted {{ as a mapping; put a template in quotes")
            if isinstance(key, bool):
                raise InputError(f"line {line}: YAML reads the key {key_node.value!r} as {key}; put it in quotes")
            if key in seen:
                raise InputError(f"line {line}: the key {key!r} is already given on line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e-4 for a word because it has no dot; everybody who writes it means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; errors are `InputError` naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except InputError as error:
        raise InputError(f"{where}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `rlme init {path}` writes a commented starter")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; a YAML file is expected") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return content


def beside(file: Path, value: str) -> str:
    """A path as it is, or as seen from the configuration's folder where only there is something."""
    there = file.parent / value
    return str(there) if not Path(value).exists() and there.exists() else value


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put `section.key=value` settings into the mapping (values are YAML); a list item is addressed by its number."""
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise InputError(f"--set {item!r}: expected section.key=value")
        *parents, last = path.strip().split(".")
        node: Any = content
        for depth, key in enumerate(parents):
            child = _child(node, key, item)
            if child is None:
                child = node[key] = {}
            elif not isinstance(child, dict | list):
                # `model: gpt2` is short for `model: {path: gpt2}`: expand it so that the other keys can be set
                short = {"model": "path", "data": "train", "reward": "mode"}
                items = {"questions": "ask", "evaluators": "model"}
                field = short.get(key) if depth == 0 else items.get(parents[0]) if depth == 1 else None
                if field is None:
                    raise InputError(f"--set {item!r}: {'.'.join(parents[: depth + 1])} is {child!r}, not a section")
                child = {field: child}
                node[int(key) if isinstance(node, list) else key] = child
            node = child
        value = parse_yaml(text, f"--set {item!r}")
        if isinstance(node, list):
            _child(node, last, item)
            node[int(last)] = value
        else:
            node[last] = value
    return content


def _child(node: Any, key: str, item: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise InputError(f"--set {item!r}: {key!r} is not a position in a list of {len(node)}")
        return node[int(key)]
    return node.get(key)


def validate(schema: type[Model], content: dict[str, Any], where: str) -> Model:
    """Check a mapping against a pydantic model; the first problem becomes one `InputError` sentence."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        # unknown keys first: a misspelt key is usually also the cause of a missing one
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more problems)" if len(errors) > 1 else ""
        raise InputError(f"{where}: {describe(errors[0], schema)}{more}") from None


def describe(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """One pydantic error in plain words: key, value, what is expected (with the nearest key for an unknown one)."""
    location = [str(part) for part in error["loc"] if not (isinstance(part, str) and part.endswith("]"))]
    key = ".".join(location) or "the file"
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            known = sorted(_known_keys(schema, error["loc"][:-1]))
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            return f"unknown key {key!r}; {hint}"
        case "missing":
            return f"{key!r} is missing"
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return message if key == "the file" else f"{key}: {message}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key} is {_short(value)}, expected a section: `key: value` lines under it"
        case "literal_error":
            return f"{key} is {value!r}, expected one of {error.get('ctx', {}).get('expected')}"
        case _:
            message = error["msg"].removeprefix("Input should be ").removeprefix("a ")
            return f"{key} is {_short(value)}, expected {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(schema: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The fields of the section at `path`, found by walking the model's annotations."""
    current: Any = schema
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[str(part)].annotation
        current = _section_in(current)
    return set(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else set()


def _section_in(annotation: Any) -> Any:
    """The pydantic model inside `X | None`, `list[X]`, `dict[str, X]` or `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
