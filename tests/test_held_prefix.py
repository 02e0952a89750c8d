"""What does not fit into one pass reads its shared prefix once: the numbers and gradients of one pass, from several."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DiffLlamaConfig

from rlme.cli import main
from rlme.key_values import HELD_FROM, HeldPrefix
from rlme.prefix_tree import build_row, plan_packs
from rlme.scoring import completion_logps, continuation_logprobs, read_prefix
from rlme.training.packs import _alike, _cut, plan, with_prefixes
from tests.tiny_runs import write_config, write_jsonl

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")  # the last with sliding windows shorter than these prompts


def tokens(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(30, 300), k=n)


LONG, OTHER, SHORT = tokens(70, 1), tokens(45, 2), tokens(6, 3)
# Ragged, one token, empty, a group of one, a prompt that begins as another does, prompts too short to be held.
GROUPS = [(LONG, (20, 1, 0, 33, 20, 7)), (OTHER, (5, 6, 37, 8)), (LONG[:50], (9,)), (SHORT, (3, 60, 60))]
PROMPTS = [torch.tensor(prompt) for prompt, lengths in GROUPS for _ in lengths]
ANSWERS = [torch.tensor(tokens(n, 10 + i), dtype=torch.long) for i, n in enumerate(n for _, ns in GROUPS for n in ns)]
ANSWERS[4] = ANSWERS[0]  # the same answer twice
BUDGET = 90


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def gradient_of(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights_of_loss(rows: list[int]) -> torch.Tensor:
    longest = max(map(len, ANSWERS))
    return torch.linspace(-1, 1, len(ANSWERS) * longest).view(len(ANSWERS), -1)[rows]


def in_one_pass(model: Any, prompts: Any = PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logps, _ = completion_logps(model, prompts, ANSWERS)
    (weights_of_loss(list(range(len(ANSWERS)))) * logps).sum().backward()
    return logps.detach(), gradient_of(model)


def in_packs(model: Any, budget: int = BUDGET, prompts: Any = PROMPTS) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Also: how many tokens were computed with gradient."""
    model.zero_grad()
    whole = torch.zeros(len(ANSWERS), max(map(len, ANSWERS)))
    computed = 0

    def count(module: Any, args: Any) -> None:
        nonlocal computed
        computed += args[0].numel() if torch.is_grad_enabled() else 0

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    packs = plan(model, prompts, ANSWERS, budget, hold=True)
    computed = 0  # the comparison's
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(ANSWERS)))
    for pack, held in with_prefixes(packs, lambda prompt: read_prefix(model, prompt)):
        logps, _ = completion_logps(
            model,
            [prompts[row] for row in pack.rows],
            [ANSWERS[row] for row in pack.rows],
            held=held,
            gives_back=pack.last,
        )
        whole[pack.rows, : logps.shape[1]] = logps.detach()
        (weights_of_loss(pack.rows)[:, : logps.shape[1]] * logps).sum().backward()
    hook.remove()
    return whole, gradient_of(model), computed


def assert_equal(found: Any, expected: Any, at_most: float = 1e-4) -> None:
    assert (found[0] - expected[0]).abs().max() <= at_most
    assert (found[1] - expected[1]).norm() / expected[1].norm() <= at_most


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packs_of_a_group_have_the_gradient_of_one_pass(name: str, tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, found = in_one_pass(model), in_packs(model)
    assert_equal(found, expected)
    assert sum(p.last for p in plan(model, PROMPTS, ANSWERS, BUDGET, hold=True)) == 2


def test_the_prompt_is_computed_with_gradient_once(tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs["llama"])
    once = len(build_row([[*p.tolist(), *a.tolist()[:-1]] for p, a in zip(PROMPTS, ANSWERS, strict=True)]).tokens)
    _, _, few = in_packs(model, 100)
    # What two prompts have in common, the last token of a prompt in another pass, short prompts, equal answers.
    assert few <= once + 50 + 4 + 2 * len(SHORT) + 20
    assert len(plan(model, PROMPTS, ANSWERS, 100, hold=True)) > 4
    assert all(pack.prefix is None for pack in plan(model, PROMPTS, ANSWERS, 100, hold=False))


def behind_examples(own: tuple[int, ...]) -> list[torch.Tensor]:
    """Prompts of four groups that begin with the same 70 tokens and go on with these numbers of their own."""
    prompts = [torch.tensor([*LONG, *tokens(n, 200 + i)]) for i, n in enumerate(own)]
    return [prompts[g] for g, (_, lengths) in enumerate(GROUPS) for _ in lengths]


@pytest.mark.parametrize("own", [(6, 9, 1, 12), (0, 1, 5, 5)], ids=["each its own", "one is the others' beginning"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_behind_the_same_examples_read_them_once(name: str, own: tuple[int, ...], tiny_model_dirs: Any) -> None:
    """Groups larger than a pass and smaller ones; a beginning that is longer than a pass as well."""
    model = load(tiny_model_dirs[name])
    prompts = behind_examples(own)
    expected = in_one_pass(model, prompts)
    for budget in (50, 110, 140):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packs = plan(model, prompts, ANSWERS, budget, hold=True)
            found = in_packs(model, budget, prompts)
        assert_equal(found, expected)
        assert [pack.last for pack in packs] == [False] * (len(packs) - 1) + [True]
        assert all(pack.prefix is not None for pack in packs)
        beginning = len(LONG) - (min(own) == 0)  # a prompt's last token is in each pass that has an answer to it
        once = beginning
        for pack in packs:
            rows = [[*prompts[row].tolist(), *ANSWERS[row].tolist()[:-1]] for row in pack.rows]
            once += len(build_row(rows).tokens) - beginning
        assert found[2] == once


def test_a_large_group_goes_on_from_its_own_prompt_where_most_of_that_is_its_own() -> None:
    """Not from the short beginning that it has in common with another; small groups go on from that."""

    def held(own: int, answers: int) -> list[int]:
        prompts = [[*OTHER, *tokens(own, seed)] for seed in (1, 2, 3)]
        groups = {tuple(prompt): [4 * g + i for i in range(4)] for g, prompt in enumerate(prompts)}
        return [length for length, _ in _alike(groups, [answers] * 12, 150)]

    assert held(own=60, answers=20) == [104, 104, 104]
    assert held(own=60, answers=10) == [45]
    assert held(own=10, answers=40) == [45]
    assert held(own=1, answers=5) == []


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(0, 40),
    st.integers(1, 200),
)
def test_chains_have_every_row_and_keep_to_the_budget(groups: Any, answers: int, budget: int) -> None:
    """But for a row that is longer; a group is in one pass where it fits in one and others stand before it."""
    members: dict[tuple[int, ...], list[int]] = {}
    rows = 0
    for i, (n, size) in enumerate(groups):
        members[(*LONG, *tokens(n, i))] = list(range(rows, rows + size))
        rows += size
    own = [(answers * (7 + row) // 9) for row in range(rows)]
    for length, alike in _alike(members, own, budget):
        chain = _cut(length, alike, own, budget)
        assert [row for some in chain for row in some] == [row for _, some in alike for row in some]
        assert all(chain)
        for i, some in enumerate(chain):
            mine = [(ids, row) for ids, group in alike for row in group if row in some]
            used = sum(own[row] for _, row in mine) + sum(len(ids) - length for ids in {ids for ids, _ in mine})
            assert used + (length if i == 0 else 0) <= budget or len(some) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool, tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs["gemma3"])
    expected = in_one_pass(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(in_packs(model), expected)


def test_an_adapter_on_the_last_layers_only(tiny_model_dirs: Any) -> None:
    base = load(tiny_model_dirs["llama"])
    last = base.config.num_hidden_layers - 1
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[last], init_lora_weights=False)
    model = get_peft_model(base, config)
    assert_equal(in_packs(model), in_one_pass(model))


def test_under_autocast(tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs["qwen3"])
    exact = in_one_pass(model)
    with torch.autocast("cpu", torch.bfloat16):
        whole = in_one_pass(model)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        packs = plan(model, PROMPTS, ANSWERS, BUDGET, hold=True)
    assert any(pack.last for pack in packs)

    def read(prompt: torch.Tensor) -> HeldPrefix:
        with torch.autocast("cpu", torch.bfloat16):
            return read_prefix(model, prompt)

    model.zero_grad()
    for pack, held in with_prefixes(packs, read):
        some = [PROMPTS[row] for row in pack.rows], [ANSWERS[row] for row in pack.rows]
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = completion_logps(model, *some, held=held, gives_back=pack.last)
        (weights_of_loss(pack.rows)[:, : logps.shape[1]] * logps).sum().backward()
    rounding = (whole[1] - exact[1]).norm()
    assert (gradient_of(model) - exact[1]).norm() <= 1.5 * rounding


def test_dropout_draws_anew_in_each_pass_so_each_reads_the_prompt(tiny_model_dirs: Any) -> None:
    for model in (
        load(tiny_model_dirs["llama"], attention_dropout=0.1),
        get_peft_model(load(tiny_model_dirs["llama"]), LoraConfig(lora_dropout=0.1, target_modules=["q_proj"])),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packs = plan(model, PROMPTS, ANSWERS, BUDGET, hold=True)
        assert all(pack.prefix is None for pack in packs)


class Wrong(HeldPrefix):
    """Of a model whose keys and values are not all that later tokens want of a text."""

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().layer(number)
        return keys * 0.5, values


class Unpaid(HeldPrefix):
    def give_back(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [Wrong, Unpaid])
def test_a_model_that_it_is_wrong_for_reads_the_prompt_in_each_pass(
    kind: Any, tiny_model_dirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rlme.sharing", "rlme.scoring", "rlme.forward"):
        monkeypatch.setattr(f"{module}.HeldPrefix", kind)
    model = load(tiny_model_dirs["llama"])
    with pytest.warns(UserWarning, match="what several passes share is read in each of them"):
        packs = plan(model, PROMPTS, ANSWERS, BUDGET, hold=True)
    assert all(pack.prefix is None for pack in packs)
    if kind is Wrong:
        contexts = [[*LONG, *tokens(20, i)] for i in range(8)]
        expected, _ = continuation_logprobs(model, contexts, [[[5]]] * 8)
        with pytest.warns(UserWarning, match="what several passes share is read in each of them"):
            found, _ = continuation_logprobs(model, contexts, [[[5]]] * 8, token_budget=100)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_model_that_attends_twice_in_a_layer_reads_the_prompt_in_each_pass() -> None:
    """DiffLlama does, with other values each time: what is held are the second's."""
    sizes = {"vocab_size": 301, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with pytest.warns(UserWarning, match="what several passes share is read in each of them"):
        found = in_packs(model)
    assert_equal(found, in_one_pass(model))


# -- judging --


@pytest.mark.parametrize("budget", [20, 100, 200])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_judging_in_passes_reads_a_long_text_once(name: str, budget: int, tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs[name])
    answers = [[*LONG, *tokens(n, n)] for n in (40, 41, 3, 0)] + [[*SHORT, *tokens(50, 5)]]
    contexts = [[*answer, *tokens(8, 100 + k)] for answer in answers for k in range(3)] + answers
    labels = [[[33], [34, 35]]] * len(contexts)
    expected, once = continuation_logprobs(model, contexts, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, computed = continuation_logprobs(model, contexts, labels, token_budget=budget)
    for row, plain in zip(found, expected, strict=True):
        assert row == pytest.approx(plain, abs=1e-4)
    passes = len(plan_packs([(*c, 34) for c in contexts], budget, held_from=HELD_FROM))
    # Again: where less is shared than is worth holding, and last tokens of contexts, whose hidden states are read.
    assert computed <= once + passes * HELD_FROM


def test_a_text_longer_than_the_budget_is_read_once(tiny_model_dirs: Any) -> None:
    model = load(tiny_model_dirs["llama"])
    text = tokens(300, 0)
    contexts = [[*text, *tokens(10, i)] for i in range(20)]
    expected, _ = continuation_logprobs(model, contexts, [[[5]]] * 20)
    found, computed = continuation_logprobs(model, contexts, [[[5]]] * 20, token_budget=100)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    assert computed <= 300 + 20 * 10


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(max_examples=200)
@given(sequences, st.integers(1, 40), st.integers(1, 10))
def test_packs_hold_every_sequence_once_and_compute_what_is_new(rows: Any, budget: int, held_from: int) -> None:
    packs = plan_packs(rows, budget, held_from=held_from)
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    seen: list[tuple[int, ...]] = []
    for pack in packs:
        mine = [tuple(rows[i]) for i in pack]
        prefixes = {sequence[:n] for sequence in mine for n in range(1, len(sequence) + 1)}
        last = seen[-1] if seen else ()
        held = {last[:n] for n in range(1, len(last) + 1)} & {mine[0][:n] for n in range(1, len(mine[0]) + 1)}
        new = prefixes - held if len(held) >= held_from else prefixes
        assert len(new) <= budget or len(set(mine)) == 1
        seen += mine


# -- a run --


def test_a_run_in_packs_of_a_group_is_the_run_in_one_pass(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of the weights, the loss as it is logged and what is sampled next."""
    read: list[int] = []
    plain = read_prefix

    def watched(model: Any, prompt: Any) -> HeldPrefix:
        read.append(len(prompt))
        return plain(model, prompt)

    monkeypatch.setattr("rlme.training.trainer.read_prefix", watched)
    question = "Which of these numbers is the largest, and why is it not one of the others? 3, 14, 15, 92, 65, 35, 89"
    results = []
    for name, budget in (("one", 8192), ("several", 130)):
        folder = tmp_path / name
        folder.mkdir()
        data = {"train": str(write_jsonl(folder / "rows.jsonl", [{"question": question, "answer": "92"}]))}
        changes = {"token_budget": budget, "steps": 2, "group_size": 8, "max_completion_tokens": 12}
        config = write_config(folder, tiny_policy_dir, data=data, train=changes | {"learning_rate": 1e-2})
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config), "--set", "trl.adam_epsilon=1e-3"])
        assert ended.value.code == 0
        results.append(load(folder / "run" / "final").state_dict())
        assert bool(read) == (name == "several")
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=2e-5), name
