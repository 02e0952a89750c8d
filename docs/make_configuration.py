"""Write docs/configuration.md from the configuration's own models: python docs/make_configuration.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlme.align.config import AlignConfig
from rlme.config import Config, PairwiseRewardConfig, TemplateConfig
from rlme.evaluators.endpoint_config import EndpointConfig, Prices
from rlme.judgebench.config import BenchConfig, SetConfig

HEAD = """# Configuration

One YAML file; only `model`, `data` and (unless the reward is `rlvr` or `pairwise`) `questions` have to be given.
`rlme init` writes a starter, `rlme check FILE --show` prints a file with all defaults filled in, `rlme schema` gives
the JSON schema for editors, and `--set section.key=value` overrides any key on the command line
(`--set evaluators.0.weight=0.5` reaches into a list). An unknown key is an error that names the nearest known one.

Made by `python docs/make_configuration.py`.
"""

SHORT = {
    "model": "`model: NAME` is short for `model: {path: NAME}`.",
    "data": "`data: FILE` is short for `data: {train: FILE}`.",
    "questions": "A mapping `name: question`; `name: text` is short for `name: {ask: text}`.",
    "evaluators": "A list; `live`, `frozen` or a model's name is short for `{model: ...}`.",
    "reward": "`reward: rlvr` is short for `reward: {mode: rlvr}`.",
}


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The configuration models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in sections(inner)]


def kind(annotation: Any) -> str:
    """A type as people say it."""
    if annotation is type(None):
        return "null"
    if choices := [a for a in get_args(annotation) if isinstance(a, str)]:
        return " \\| ".join(choices)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {bool: "true \\| false", int: "integer", float: "number", str: "text"}
    if annotation in names:
        return names[annotation]
    if getattr(annotation, "__origin__", None) is list:
        return "list of " + kind(get_args(annotation)[0])
    if getattr(annotation, "__origin__", None) is dict:
        return "mapping"
    return " or ".join(dict.fromkeys(kind(a) for a in get_args(annotation))) or str(annotation)


def table(model: type[BaseModel]) -> list[str]:
    """One row a key: type, default, meaning."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default!r}`"
        if (field.default is PydanticUndefined and not field.is_required()) or isinstance(field.default, BaseModel):
            default = ""  # of a section: those in its table
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind(field.annotation)} | {default} | {text} |")
    return lines


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        found = sections(field.annotation)
        lines += [f"## {name}", "", " ".join((field.description or "").split()), ""]
        if name in SHORT:
            lines += [SHORT[name], ""]
        if found:
            lines += [*table(found[0]), ""]
        if name == "reward":
            lines += ["### reward.pairwise", "", "See [align.md](align.md#the-bridge-to-rlme-train).", ""]
            lines += [*table(PairwiseRewardConfig), ""]
        elif not field.is_required() and not isinstance(field.default, BaseModel):
            lines += [f"Default: `{field.default!r}`.", ""]
    lines += ["## template", "", "Where it is not a name.", "", *table(TemplateConfig), ""]
    lines += ["## evaluators: endpoint", "", "See [endpoints.md](endpoints.md).", "", *table(EndpointConfig), ""]
    lines += ["## evaluators: endpoint: prices", "", *table(Prices), ""]
    lines += ["## The file of rlme align", "", "See [align.md](align.md).", "", *table(AlignConfig), ""]
    for name, field in AlignConfig.model_fields.items():
        if name not in Config.model_fields or name == "data":
            for found in sections(field.annotation)[:1]:
                lines += [f"### align: {name}", "", *table(found), ""]
    lines += ["## The file of rlme judge-bench", "", "See [judge-bench.md](judge-bench.md).", ""]
    lines += [*table(BenchConfig), ""]
    lines += ["### judge-bench: sets", "", *table(SetConfig), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page(), encoding="utf-8")
