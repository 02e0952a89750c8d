"""The one Jinja sandbox: prompts, evaluation templates and gold templates are all rendered here.

Templates come from configuration files that people share, so they run sandboxed. What they insert
(completions, columns of the data) is plain text and is never itself rendered.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlme.errors import InputError

# Autoescape is off: the output is text for a language model, not HTML. A missing value (a column that a
# row lacks, an answer that was not found) is written as nothing, never as the word None.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    finalize=lambda value: "" if value is None else value,
)


@lru_cache(maxsize=1024)
def _compiled(template: str) -> tuple[Template, frozenset[str]]:
    return _ENVIRONMENT.from_string(template), frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(template)))


def _parsed(template: str, where: str) -> tuple[Template, frozenset[str]]:
    try:
        return _compiled(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"{where}: the template {_short(template)} is not valid Jinja (line {error.lineno}: {error.message})."
        ) from None


def _short(template: str) -> str:
    return repr(template if len(template) <= 80 else template[:77] + "...")


def undeclared(template: str, *, where: str = "template") -> set[str]:
    """The variables that `template` expects from outside; InputError when it is not valid Jinja."""
    return set(_parsed(template, where)[1])


def nearest(name: str, known: Collection[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, or nothing; for the end of an error message."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def check_variables(template: str, known: Collection[str], *, where: str) -> None:
    """InputError that names the template, the variable and the known names if `template` uses an unknown one.

    Every branch of the template counts, so that a misspelt name is found before any row reaches it.
    """
    for name in sorted(undeclared(template, where=where) - set(known)):
        raise InputError(
            f"{where}: the template {_short(template)} uses {name!r}, which does not exist"
            f"{nearest(name, known)}; available: {', '.join(sorted(known)) or 'nothing'}."
        )


def render(template: str, variables: Mapping[str, Any], *, where: str) -> str:
    """`template` filled with `variables`.

    Args:
        template: Jinja source.
        variables: the names it may use.
        where: what the template is, for messages ("data.prompt", "the question 'brief'", ...).

    Raises:
        InputError: invalid syntax, an unknown variable (naming the nearest known one), or an operation that
            fails or that the sandbox forbids.
    """
    compiled, _ = _parsed(template, where)
    check_variables(template, variables, where=where)
    try:
        return compiled.render(**variables)
    except Exception as error:  # whatever fails in a template is its author's to mend
        raise InputError(
            f"{where}: the template {_short(template)} cannot be rendered ({type(error).__name__}: {error})."
        ) from None
