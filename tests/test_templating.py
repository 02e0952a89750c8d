"""The one Jinja sandbox: plain text out, one clear sentence for whatever is wrong."""

import pytest

from rlme.errors import InputError
from rlme.templating import check_variables, render, undeclared


def test_plain_text_comes_out_as_it_went_in() -> None:
    text = render("{{ q }} & {{ n }}\n", {"q": "<b>{{ x }}</b>", "n": 3}, where="t")
    assert text == "<b>{{ x }}</b> & 3\n"  # no escaping, the last newline kept, inserted text not rendered


def test_missing_value_is_written_as_nothing() -> None:
    assert render("[{{ answer }}]{% if answer is none %}!{% endif %}", {"answer": None}, where="t") == "[]!"


def test_undeclared() -> None:
    assert undeclared("{{ a.b }}{% for x in rows %}{{ x }}{{ loop.index }}{% endfor %}") == {"a", "rows"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ quesion }}",
            r"data\.prompt: .*'quesion'.*did you mean 'question'\?.*available: question, rows",
        ),
        ("{% if rows %}{{ zzz }}{% endif %}", "uses 'zzz', which does not exist; available"),
        ("{{ question", "is not valid Jinja .line 1"),
        ("{{ question | shout }}", "No filter named 'shout'"),
        ("{{ question.nothing }}", "has no attribute 'nothing'"),
        ("{{ question + 1 }}", "cannot be rendered .TypeError"),
        ("{{ rows.append(1) }}", "SecurityError"),
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ],
)
def test_whatever_is_wrong_is_an_input_error(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(template, {"question": "text", "rows": []}, where="data.prompt")


def test_check_needs_no_values() -> None:
    check_variables("{{ a }}", {"a", "b"}, where="t")
    with pytest.raises(InputError, match="available: nothing"):
        check_variables("{{ a }}", [], where="t")
