"""Rows from files, prompts and gold from rows, and a report on everything that was left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlme.data import PromptSet, Rows, build_prompts, load_rows
from rlme.errors import InputError
from rlme.models import load_tokenizer

RECORDS = [
    {"question": "How many clips?", "answer": "48 / 2 = 24\n#### 72", "topic": "shop"},
    {"question": "How many eggs?", "answer": "#### 1,200", "topic": None},
]


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_policy_dir: Path) -> Any:
    return load_tokenizer(tiny_policy_dir)


@pytest.fixture(scope="session")
def base_tokenizer(tiny_base_dir: Path) -> Any:
    return load_tokenizer(tiny_base_dir)


def make_rows(*records: dict[str, Any]) -> Rows:
    columns = list(dict.fromkeys(key for record in records for key in record))
    filled = [{column: record.get(column) for column in columns} for record in records]
    return Rows("prompts.jsonl", columns, filled, list(range(1, len(records) + 1)))


def built(*records: dict[str, Any], prompt: str = "question", **options: Any) -> PromptSet:
    return build_prompts(make_rows(*records), prompt=prompt, **options)


class TestRows:
    def write(self, folder: Path, suffix: str) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = folder / f"prompts{suffix}"
        if suffix == ".jsonl":
            file.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
        elif suffix == ".json":
            file.write_text(json.dumps(RECORDS))
        elif suffix == ".csv":
            file.write_text('question,answer,topic\nHow many clips?,"48 / 2 = 24\n#### 72",shop\n')
            with file.open("a") as out:
                out.write('How many eggs?,"#### 1,200"\n')
        else:
            pq.write_table(pa.Table.from_pylist(RECORDS), file)
        return file

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    def test_every_format_gives_the_same_rows(self, suffix: str, tmp_path: Path) -> None:
        file = self.write(tmp_path, suffix)
        rows = load_rows(file)
        assert rows.records == RECORDS and rows.columns == ["question", "answer", "topic"]
        assert rows.numbers == [1, 2]
        assert load_rows(str(file), limit=1).records == RECORDS[:1]

    def test_a_folder_that_datasets_can_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "data").mkdir()
        self.write(tmp_path / "data", ".parquet")
        assert load_rows(tmp_path / "data").records == RECORDS
        assert load_rows(tmp_path / "data", limit=1).records == RECORDS[:1]
        with pytest.raises(InputError, match="split 'test' could be loaded"):
            load_rows(tmp_path / "data", split="test")

    def test_missing_columns_are_none_and_line_numbers_count_blank_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "p.jsonl"
        file.write_text('\ufeff{"a": 1}\n\n{"b": "x\u2028y"}\n', encoding="utf-8")
        rows = load_rows(file)
        assert rows.records == [{"a": 1, "b": None}, {"a": None, "b": "x\u2028y"}]
        assert rows.numbers == [1, 3]

    def test_csv_cells_stay_as_written(self, tmp_path: Path) -> None:
        file = tmp_path / "p.csv"
        file.write_text("a,b\n007,3.50\n")
        assert load_rows(file).records == [{"a": "007", "b": "3.50"}]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.jsonl", b'{"a": 1}\n{"a": }\n', r"p\.jsonl, line 2: not valid JSON .*column 7"),
            ("p.jsonl", b'{"a": 1}\n\n[1]\n', r"p\.jsonl, line 3: expected a JSON object, found list"),
            ("p.jsonl", b"\n", "has no rows"),
            ("p.jsonl", b"\xff\xfe", "not UTF-8"),
            ("p.json", b'{"a": 1}', "expected a list of objects, found dict"),
            ("p.json", b'[{"a": 1},\n2 3]', "line 2: not valid JSON"),
            ("p.json", b'[{"a": 1}, 2]', "row 2: expected a JSON object, found int"),
            ("p.csv", b"a,b\n1,2\n1,2,3\n", r"p\.csv, line 3: more cells than the header has columns \(2\)"),
            ("p.csv", b'a\n"x', "not valid CSV"),
            ("p.parquet", b"nonsense", "not a Parquet file"),
            ("p.txt", b"hello", r"none of \.jsonl, \.json, \.csv, \.parquet"),
        ],
    )
    def test_bad_files(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_rows(tmp_path / name)

    def test_what_is_neither_a_file_nor_a_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none\.jsonl' does not exist"):
            load_rows(tmp_path / "none.jsonl")
        with pytest.raises(InputError, match=r"'no-one/nothing' is neither a file .* nor a dataset"):
            load_rows("no-one/nothing")


class TestPrompts:
    def test_template_gold_and_columns(self) -> None:
        made = built(*RECORDS, prompt="Q: {{ question }}\n", answer="answer", answer_from="####")
        assert [(p.prompt, p.gold) for p in made.prompts] == [
            ("Q: How many clips?\n", "72"),
            ("Q: How many eggs?\n", "1,200"),
        ]
        assert made.gold_columns == ("answer",)
        assert [p.columns for p in made.prompts] == [
            {"question": "How many clips?", "topic": "shop"},
            {"question": "How many eggs?", "topic": None},
        ]
        made.require_gold()

    def test_columns_behind_a_gold_template_are_hidden_too(self) -> None:
        made = built({"question": "q", "choices": ["a", "b"], "label": 1}, answer="{{ choices[label] }}")
        assert made.prompts[0].gold == "b" and made.prompts[0].columns == {"question": "q"}

    def test_chat_when_the_tokenizer_has_a_template(self, chat_tokenizer: Any, base_tokenizer: Any) -> None:
        user = {"role": "user", "content": "How many clips?"}
        assert built(RECORDS[0], tokenizer=chat_tokenizer).prompts[0].prompt == [user]
        made = built(RECORDS[0], tokenizer=chat_tokenizer, system="Be brief.")
        assert made.prompts[0].prompt == [{"role": "system", "content": "Be brief."}, user]
        assert built(RECORDS[0], tokenizer=chat_tokenizer, chat=False).prompts[0].prompt == "How many clips?"
        made = built(RECORDS[0], tokenizer=base_tokenizer, system="Be brief.")
        assert made.prompts[0].prompt == "Be brief.\n\nHow many clips?"
        with pytest.raises(InputError, match="need a tokenizer with a chat template"):
            built(RECORDS[0], tokenizer=base_tokenizer, chat=True)

    def test_column_of_messages(self, chat_tokenizer: Any, base_tokenizer: Any) -> None:
        messages = [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "Hi", "name": None},  # as Parquet fills what other rows have
        ]
        made = built({"m": messages}, prompt="m", tokenizer=chat_tokenizer, system="Other.")
        assert made.prompts[0].prompt == [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "Hi"},
        ]
        with pytest.raises(InputError, match="row 1: chat messages need a tokenizer with a chat template"):
            built({"m": messages}, prompt="m", tokenizer=base_tokenizer)
        for bad, message in (
            ([{"role": "assistant", "content": "Hi"}], "a prompt ends with the user's"),
            ([{"role": "user"}], "under 'role' and one under 'content'"),
            (["Hi"], "under 'role' and one under 'content'"),
        ):
            with pytest.raises(InputError, match=message):
                built({"m": bad}, prompt="m", tokenizer=chat_tokenizer)

    def test_report_counts_what_is_left_out(self, chat_tokenizer: Any) -> None:
        made = built(
            {"question": "one", "answer": 1},
            {"question": " ", "answer": 2},
            {"question": "one", "answer": 1},
            {"question": "word " * 200, "answer": 4},
            {"question": None, "answer": 5},
            {"question": "two", "answer": ""},
            prompt="Question: {{ question }}",
            answer="answer",
            tokenizer=chat_tokenizer,
            max_prompt_tokens=100,
        )
        report = made.report
        assert (report.rows, report.kept) == (6, 2)
        assert (report.empty, report.duplicates, report.too_long) == ([2, 5], [3], [4])
        assert report.without_gold == [6]
        assert [(p.index, p.row, p.gold) for p in made.prompts] == [(0, 1, "1"), (1, 6, None)]
        assert report.sentences() == [
            f"2 prompts from 6 rows of prompts.jsonl (the longest: {report.longest_tokens} tokens)",
            "2 empty, dropped (rows 2, 5)",
            "1 duplicate, kept once (row 3)",
            "1 longer than the limit, dropped (row 4)",
            "1 without a gold answer (row 6)",
        ]
        with pytest.raises(InputError, match=r"1 of 2 prompts have no gold answer \(row 6\)"):
            made.require_gold()

    def test_limit_is_exact_and_counts_the_chat_template(self, chat_tokenizer: Any) -> None:
        messages = [{"role": "user", "content": "How many clips?"}]
        ids = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        made = built(RECORDS[0], tokenizer=chat_tokenizer, max_prompt_tokens=len(ids))
        assert made.report.longest_tokens == len(ids)
        with pytest.raises(InputError, match=r"no prompts are left: .*1 longer than the limit"):
            built(RECORDS[0], tokenizer=chat_tokenizer, max_prompt_tokens=len(ids) - 1)

    def test_gold_auto_keeps_an_unmarked_answer_whole(self) -> None:
        golds = [
            built({"question": "q", "answer": a}, answer="answer", answer_from="auto").prompts[0].gold
            for a in ("Apollo 11", "so #### 72", r"so \boxed{3}", 7)
        ]
        assert golds == ["Apollo 11", "72", "3", "7"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt": "{{ quesion }}"}, "data.prompt: .*'quesion'.*did you mean 'question'"),
            (
                {"prompt": "quesion"},
                r"no column 'quesion' \(did you mean 'question'\?\); its columns: question",
            ),
            ({"answer": "anser"}, r"data.answer: .*no column 'anser' \(did you mean 'answer'"),
            ({"answer": "{{ anser }}"}, "data.answer: .*'anser'"),
            ({"answer": "answer", "answer_from": "boxed"}, "no gold answer for any row .looked for 'boxed'"),
            ({"answer": "answer", "answer_from": "box"}, "answer extraction 'box' is unknown"),
            ({"prompt": "n"}, "row 1: column 'n' holds int"),
            ({"answer": "list"}, "row 1: column 'list' holds list"),
            ({"max_prompt_tokens": 5}, "needs a tokenizer"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            built({**RECORDS[0], "n": 3, "list": [1]}, **options)

    def test_chat_template_that_refuses_a_role(self, chat_tokenizer: Any) -> None:
        import copy

        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(InputError, match=r"refuses .* system, user .System role"):
            built(RECORDS[0], tokenizer=tokenizer, system="Be brief.")

    def test_dataset(self, chat_tokenizer: Any) -> None:
        options: dict[str, Any] = {"answer": "answer", "answer_from": "####"}
        chat = built(*RECORDS, tokenizer=chat_tokenizer, **options).to_dataset()
        assert chat.column_names == ["prompt", "gold", "prompt_index", "columns"]
        assert chat[1]["prompt"] == [{"role": "user", "content": "How many eggs?"}]
        assert (chat[1]["gold"], chat[1]["prompt_index"]) == ("1,200", 1)
        assert json.loads(chat[0]["columns"]) == {"question": "How many clips?", "topic": "shop"}
        plain = built(*RECORDS).to_dataset()
        assert plain[0]["prompt"] == "How many clips?" and plain[0]["gold"] is None
        assert plain.to_list() == built(*RECORDS).to_dataset().to_list()


def test_gsm8k(shared_data: Path, chat_tokenizer: Any) -> None:
    rows = load_rows(shared_data / "gsm8k" / "train.jsonl", limit=500)
    made = build_prompts(rows, prompt="question", answer="answer", answer_from="####", tokenizer=chat_tokenizer)
    assert len(made) == 500 and made.report.sentences() == [f"500 prompts from 500 rows of {rows.source}"]
    made.require_gold()
    assert not any("####" in json.dumps(prompt.columns) for prompt in made.prompts)
