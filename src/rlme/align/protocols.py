"""Pairwise judging protocols: what the judge is told, in our own wording, and how its answer is spelled.

The rules behind `base`, `refeval` and `refmatch` follow the description of the prompts of arXiv 2602.16802;
`vanilla`, `cot` and `reference` follow the ideas of LLMBar, `href` that of HREF. The wording is ours, so
numbers from those papers are a comparison and not a reproduction.

The long constant part comes first, then instruction and reference, then the outputs: all comparisons of one
prompt share everything up to the outputs, which the prefix tree of a local evaluator computes once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from rlme.config import Section
from rlme.config_file import parse_yaml, validate
from rlme.errors import InputError
from rlme.templating import nearest, undeclared

_CUE = "Therefore, the better output is "
VARIABLES = frozenset({"instruction", "reference", "output_a", "output_b"})


@dataclass(frozen=True, slots=True)
class Protocol:
    """How one pairwise comparison is put to a judge.

    `template` is Jinja over `instruction`, `reference`, `output_a` and `output_b`. The answer starts with
    `prefill`, after which the spellings of the first or the second label are expected; spellings of one
    label are summed. With `reason` the judge writes first, and what it wrote up to `verdict_cue` stands
    before the prefill.
    """

    name: str
    template: str
    labels: tuple[tuple[str, ...], tuple[str, ...]] = (("a", "A"), ("b", "B"))
    prefill: str = "Output ("
    reason: bool = False
    verdict_cue: str = _CUE

    @property
    def needs_reference(self) -> bool:
        """Whether the judge is shown a reference output."""
        return "reference" in undeclared(self.template, where=f"protocol {self.name!r}")


_OUTPUTS = """\
# Output (a)
{{ output_a }}

# Output (b)
{{ output_b }}
"""

_INSTRUCTION = """\
# Instruction
{{ instruction }}

"""

_ANSWER = """
Reply with "Output (a)" or "Output (b)" and with nothing else."""

_BASE = (
    """\
You compare two outputs that were written for the same instruction and say which one is better.

Judge by these rules:
1. Doing what was asked comes first. An output that leaves out something that was asked for, or adds \
something that has nothing to do with it, is at fault.
2. What the output states must be true. Check numbers, names and quantities; a wrong one weighs heavily.
3. A short output that fully does the job is better than a long one. Explanations that nobody asked for do
not help.
4. Which output is shown first means nothing.

"""
    + _INSTRUCTION
    + _OUTPUTS
    + "\nWhich output is better by the rules above?"
    + _ANSWER
)

_REFEVAL = (
    """\
You compare two outputs that were written for the same instruction and say which one is better. A \
reference output is given: it is factually right and does the job well, and shows what success looks like
here.

Judge by these rules:
1. Doing what was asked comes first. An output that leaves out something that was asked for, or adds \
something that has nothing to do with it, is at fault.
2. What the output states must be true. Check it against the reference output, numbers above all.
3. A short output that fully does the job is better than a long one.
4. Work out how the reference output manages to be helpful, right and natural, then compare how close each \
of the two comes to it.
5. Content that goes beyond what the reference output offers counts against an output.
6. Which output is shown first means nothing.

"""
    + _INSTRUCTION
    + "# Reference output\n{{ reference }}\n\n"
    + _OUTPUTS
    + "\nWhich output is better, judged by the rules and with the reference output in view?"
    + _ANSWER
)

_REFMATCH = (
    """\
You measure how well two outputs match a reference output, which is the ground truth for the instruction.

Judge by these rules:
1. The instruction decides what has to match. First name to yourself the aspects of the reference that
matter for it.
2. An output with missing, additional or a wrong number of elements does not match, even if it uses the same
words.
3. Similar wording or layout alone is worth nothing; sameness of content is what counts.
4. First understand why the reference is right, then compare each output with it.
5. Content that the reference does not have counts against an output.
6. Which output is shown first means nothing.

# Reference output (ground truth)
{{ reference }}

"""
    + _INSTRUCTION
    + _OUTPUTS
    + "\nWhich output matches the reference more closely in what matters for the instruction?"
    + _ANSWER
)

_LLMBAR_RULES = """\
Your task is to choose the output that carries out the instruction better.

Points to observe:
- Weigh first whether the output honestly and precisely carries out the instruction; only then its \
helpfulness, accuracy and harmlessness.
- An output should contain neither more nor less than what the instruction asks for.
- Stay neutral: the order of the outputs must not influence you.

"""

_VANILLA = _LLMBAR_RULES + _INSTRUCTION + _OUTPUTS + "\nWhich output is better?" + _ANSWER

_COT = (
    _LLMBAR_RULES
    + _INSTRUCTION
    + _OUTPUTS
    + "\nWhich output is better? First explain your reasons in a few sentences. Then end with a line that "
    + 'reads "Therefore, the better output is Output (a)" or "Therefore, the better output is Output (b)".'
)

_REFERENCE = (
    _LLMBAR_RULES
    + _INSTRUCTION
    + _OUTPUTS
    + "\n# A good output for this instruction, for comparison\n{{ reference }}\n\nWhich output is better?"
    + _ANSWER
)

_HREF = (
    """\
A person who asked for something received two outputs. Decide which one follows the request better. A \
response written by an expert is given to help you: it shows one correct way to respond, and others can be
as good.

Look at whether an output answers the request, whether what it says is right, and whether a reader would \
find it natural. The order of the outputs carries no information.

"""
    + _INSTRUCTION
    + "# Response of an expert\n{{ reference }}\n\n"
    + _OUTPUTS
    + "\nWhich output follows the request better?"
    + _ANSWER
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("base", _BASE),
        Protocol("refeval", _REFEVAL),
        Protocol("refmatch", _REFMATCH),
        Protocol("vanilla", _VANILLA),
        Protocol("cot", _COT, reason=True),
        Protocol("reference", _REFERENCE),
        Protocol("href", _HREF),
    )
}


def load_protocol(name: str) -> Protocol:
    """A protocol by its name, or a user's own from a file.

    A `.jinja` file is the template, answered by "Output (a)" or "Output (b)". A `.yaml` file is a mapping
    with `template` and, where the answer is spelled differently, `labels` (two spellings or two lists of
    them), `prefill` and `reason`.

    Raises:
        InputError: unknown name, unreadable file, unknown key, or a template without `output_a` and
            `output_b`.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    path = Path(name)
    if path.suffix not in (".jinja", ".yaml", ".yml"):
        raise InputError(
            f"unknown judging protocol {name!r}{nearest(name, PROTOCOLS)}; "
            f"expected one of {', '.join(PROTOCOLS)}, or a .jinja or .yaml file with your own."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"judging protocol {name}: cannot be read ({why}).") from None
    protocol = Protocol(path.stem, text) if path.suffix == ".jinja" else _from_yaml(path.stem, text, name)
    check(protocol, where=name)
    return protocol


def check(protocol: Protocol, *, where: str) -> None:
    """InputError unless the template shows both outputs and uses no unknown variable."""
    used = undeclared(protocol.template, where=where)
    for variable in sorted(used - VARIABLES):
        raise InputError(
            f"{where}: the template uses {variable!r}, which does not exist{nearest(variable, VARIABLES)}; "
            f"available: {', '.join(sorted(VARIABLES))}."
        )
    for variable in ("output_a", "output_b"):
        if variable not in used:
            raise InputError(
                f"{where}: the template does not show {{{{ {variable} }}}}; a judge has to see both outputs."
            )


class _ProtocolFile(Section):
    """A protocol in a .yaml file."""

    template: str = Field(min_length=1)
    labels: tuple[str | list[str], str | list[str]] | None = None
    prefill: str | None = None
    reason: bool = False
    verdict_cue: str = Field(_CUE, pattern=r"\S")


def _from_yaml(stem: str, text: str, where: str) -> Protocol:
    content = parse_yaml(text, where)
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a mapping with a text under 'template'.")
    file = validate(_ProtocolFile, content, where)
    default = Protocol(stem, file.template, reason=file.reason, verdict_cue=file.verdict_cue)
    if file.labels is None:
        return default if file.prefill is None else replace(default, prefill=file.prefill)
    first, second = (tuple(one if isinstance(one, list) else [one]) for one in file.labels)
    if not first or not second or not all([*first, *second]) or set(first) & set(second):
        raise InputError(f"{where}: 'labels' is {file.labels!r}; the two labels need different, non-empty spellings.")
    return replace(default, labels=(first, second), prefill=file.prefill or "")
