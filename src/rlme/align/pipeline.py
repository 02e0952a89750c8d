"""The alignment pipeline: sft -> (sample -> judge -> pairs -> dpo) x rounds -> compare, each stage on disk.

output/
  config.yaml
  sft/                stage.json, model/
  round-1/sample/     answers.jsonl: one line a prompt, its n candidates
  round-1/judge/      scores.jsonl: one line a prompt, the candidates' scores
  round-1/pairs/      pairs.jsonl: best against worst, with the margin
  round-1/dpo/        model/
  answers/            NAME.jsonl: every model's answers to the held-out prompts
  compare/            matches.jsonl, report.md, results.json
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlme.align import costs, train, winrates
from rlme.align.checks import check_ahead, check_output
from rlme.align.config import AlignConfig, CompareStage
from rlme.align.judging import Group, compare_judge, make_scorer
from rlme.align.label_mass import LabelMass
from rlme.align.pairs import Pair, choose, require_pairs
from rlme.align.prompts import encode_whole, load_prompts
from rlme.align.protocols import load_protocol
from rlme.align.ranking import Ranking, instruction_text
from rlme.align.run_models import RunModels
from rlme.align.stage import Lines, Stage, fingerprint, source_fingerprint
from rlme.config import EvaluatorConfig, evaluator_weights
from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.evaluators.spending import Ledger, estimates
from rlme.models import load_tokenizer
from rlme.training.run_folder import RunFolder

JUDGED_AT_ONCE = 4
"""Prompts whose comparisons are asked together; also what is redone after an interruption."""


class Alignment:
    """One run. `run` goes through all stages and returns the final table's rows."""

    def __init__(self, config: AlignConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.folder = config.folder
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("rlme align runs in one process: start it without accelerate launch or torchrun.")
        check_output(self.folder)
        load_protocol(config.judge.protocol)  # refused before anything is loaded
        if config.compare is not None and config.compare.protocol is not None:
            load_protocol(config.compare.protocol)
        self.tokenizer = load_tokenizer(
            config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
        prompts = load_prompts(config, self.tokenizer)
        self.train, self.held_out = prompts.train, prompts.held_out
        for note in prompts.notes:
            self._say(note)
        if config.compare is not None and not self.held_out:
            self._say("no comparison in the end: give data.eval, or hold prompts out with data.hold_out")
        self.models = RunModels(config, self.tokenizer)
        check_ahead(config, self.models, prompts)
        self.warned: set[tuple[str, str]] = set()
        self.ledger = Ledger(self.folder / "spent.json")

    def run(self) -> list[dict[str, Any]]:
        """All stages; finished ones are skipped."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output is {str(self.folder)!r}, which cannot be made: {error.strerror}") from None
        RunFolder(self.folder).write_config(self.config.model_dump(mode="json"))
        try:
            return self._stages()
        finally:
            self.ledger.save()

    def _stages(self) -> list[dict[str, Any]]:
        config = self.config
        if not any(self.folder.glob("**/stage.json")):
            planned = [*config.own_models, *(config.compare.also if config.compare else ())]
            expected = costs.whole_run(config, self.models, planned, self.train, self.held_out)
            self._estimate(expected, "at most", "in the whole run", costs.LONGEST)
        policy, state = self._start()
        names = {"base": config.model.path}
        if config.sft is not None:
            policy, state = self._sft(state)
            names["sft"] = policy
        first = policy
        for number, name in enumerate(config.own_models[-config.rounds :], 1):
            policy, state = self._round(number, policy, state, first)
            names[name] = policy
        if config.compare is None or not self.held_out:
            return []
        return self._compare(names | config.compare.also, state, first)

    # stages

    def _start(self) -> tuple[str, str]:
        config = self.config
        data = [(p.prompt, p.references) for p in self.train]
        model = source_fingerprint(config.model.path, config.model.revision)
        return config.model.path, fingerprint(model, config.model.model_dump(), data, config.lora, config.seed)

    def _sft(self, before: str) -> tuple[str, str]:
        config = self.config
        assert config.sft is not None
        stage = Stage(self.folder / "sft", fingerprint(before, config.sft.model_dump()))
        model = str(stage.folder / "model")
        if self._skip(stage, "sft"):
            return model, stage.inputs
        examples, too_long = [], 0
        for prompt in self.train:
            reference = prompt.references[0]
            if len(encode_whole(self.tokenizer, prompt.prompt, reference)) > config.sft.max_tokens:
                too_long += 1
                continue
            chat = not isinstance(prompt.prompt, str)
            answer: Any = [{"role": "assistant", "content": reference}] if chat else reference
            examples.append({"prompt": prompt.prompt, "completion": answer})
        if not examples:
            raise InputError(
                f"sft: every prompt with its reference is longer than sft.max_tokens {config.sft.max_tokens}."
            )
        self._say(f"sft: {len(examples)} references" + (f", {too_long} too long and left out" if too_long else ""))
        stage.begin()
        summary = train.sft(config, self.models.trainable(config.model.path), self.tokenizer, examples, stage.folder)
        self._finish(stage, "sft", summary | {"examples": len(examples), "too_long": too_long})
        return model, stage.inputs

    def _round(self, number: int, policy: str, before: str, first: str) -> tuple[str, str]:
        folder = self.folder / f"round-{number}"
        config = self.config
        where = f"round {number}, " if config.rounds > 1 else ""
        sampling = Stage(folder / "sample", fingerprint(before, number, config.sample.model_dump()))
        if not self._skip(sampling, f"{where}sample"):
            self._sample(sampling, policy, number, where)
        judging = Stage(folder / "judge", fingerprint(sampling.inputs, self._judged_with()))
        if not self._skip(judging, f"{where}judge"):
            self._judge(judging, sampling, policy, first, number, where)
        chosen = [config.pairs.model_dump(), config.dpo.max_tokens]
        pairing = Stage(folder / "pairs", fingerprint(judging.inputs, chosen))
        if not self._skip(pairing, f"{where}pairs"):
            self._pairs(pairing, judging, sampling, where)
        training = Stage(folder / "dpo", fingerprint(pairing.inputs, config.dpo.model_dump()))
        if not self._skip(training, f"{where}dpo"):
            pairs = [
                Pair(**{k: row[k] for k in Pair.__slots__}) for row in Lines(pairing.folder / "pairs.jsonl").read()
            ]
            training.begin()
            summary = train.dpo(config, self.models.trainable(policy), self.tokenizer, pairs, training.folder)
            self._finish(training, f"{where}dpo", summary | {"pairs": len(pairs)})
        return str(training.folder / "model"), training.inputs

    def _judged_with(self, compare: CompareStage | None = None) -> list[Any]:
        """What the verdicts depend on beside the texts: settings, the protocol's wording, the judges' weights."""
        config = self.config.judge
        evaluators = compare.evaluators if compare is not None and compare.evaluators else config.evaluators
        name = compare.protocol if compare is not None and compare.protocol else config.protocol
        weights = [source_fingerprint(e.model, e.revision) for e in evaluators if e.model is not None]
        return [config.model_dump(mode="json"), asdict(load_protocol(name)), weights]

    def _sample(self, stage: Stage, policy: str, number: int, where: str) -> None:
        config = self.config.sample
        stage.begin()
        lines = Lines(stage.folder / "answers.jsonl")
        total = len(self.train)
        self._say(f"{where}sample: {total} prompts x {config.n} answers")
        start = lines.resume(config.prompts_at_once)
        with self._bar(f"{where}sample", total, start) as advance:
            for begin in range(start, total, config.prompts_at_once):
                chunk = self.train[begin : begin + config.prompts_at_once]
                seed = int(fingerprint(self.config.seed, number, begin)[:8], 16)
                answers = self.models.answers(policy, chunk, config.n, config.temperature, config.max_tokens, seed)
                lines.append(
                    [{"index": begin + k, "answers": texts, "cut_off": cut} for k, (texts, cut) in enumerate(answers)]
                )
                advance(len(chunk))
        rows = lines.read()
        texts = [text for row in rows for text in row["answers"]]
        info = {
            "answers": len(texts),
            "cut_off": sum(sum(row["cut_off"]) for row in rows),
            "mean_chars": sum(map(len, texts)) / len(texts),
            "distinct": sum(len(set(row["answers"])) for row in rows) / len(texts),
        }
        self._finish(stage, f"{where}sample", info)

    def _judge(self, stage: Stage, sampling: Stage, policy: str, first: str, number: int, where: str) -> None:
        evaluators = self._judges(self.config.judge.evaluators, policy, first)
        scorer = make_scorer(self.config.judge, evaluators)
        answers = Lines(sampling.folder / "answers.jsonl").read()
        groups: list[Group] = [(self.train[row["index"]], row["answers"]) for row in answers]
        self._say(f"{where}judge: {scorer.calls(groups)} calls for {len(groups)} prompts")
        stage.begin()
        lines = Lines(stage.folder / "scores.jsonl")
        # After an interruption: what is there stays, except where a judgement failed, which is asked again.
        kept = {row["index"]: row for row in lines.read() if not row["failures"]}
        lines.rewrite(list(kept.values()))
        left = [i for i in range(len(groups)) if i not in kept]
        expected = costs.of_judging(self.config.judge, evaluators, [groups[i] for i in left])
        self._estimate(expected, "about", "in this stage", "nothing cached, no retries")
        with self._bar(f"{where}judge", len(groups), len(kept)) as advance:
            for begin in range(0, len(left), JUDGED_AT_ONCE):
                chunk = left[begin : begin + JUDGED_AT_ONCE]
                rankings = scorer.rank([groups[i] for i in chunk], seed=self.config.seed * 1000 + number)
                lines.append([{"index": i} | asdict(r) for i, r in zip(chunk, rankings, strict=True)])
                self._warn(scorer.label_mass)
                self.ledger.save()
                advance(len(chunk))
        rows = sorted(lines.read(), key=lambda row: int(row["index"]))
        info = self._judged(rows, answers)
        lines.rewrite(rows)
        self._finish(stage, f"{where}judge", info)

    def _judged(self, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        failures: Counter[str] = Counter()
        missing = judged = 0
        for row, sampled in zip(rows, answers, strict=True):
            failures.update(row["failures"])
            if len(set(sampled["answers"])) > 1:
                judged += len(row["scores"])
                missing += sum(score is None for score in row["scores"])
        limit = self.config.judge.max_failure_rate
        if judged and missing / judged > limit:
            kinds = ", ".join(f"{kind} x{n}" for kind, n in failures.most_common())
            raise RunStopped(
                f"judge: {missing} of {judged} candidates have no score ({kinds}), more than "
                f"judge.max_failure_rate {limit:g} allows. The scores that came are kept: mend the judge and run again."
            )
        masses = [row["mass"] for row in rows if row["mass"] is not None]
        return {
            "calls": sum(row["readings"] for row in rows),
            "failures": dict(failures),
            "shortened": sum(row["shortened"] for row in rows),
            "without_score": missing,
            "label_mass": sum(masses) / len(masses) if masses else None,
            "tokens": sum(row["tokens_in"] for row in rows),
            "cost": sum(row["cost"] for row in rows) or None,
        }

    def _pairs(self, stage: Stage, judging: Stage, sampling: Stage, where: str) -> None:
        pairs: list[Pair] = []
        skipped: Counter[str] = Counter()
        scores = Lines(judging.folder / "scores.jsonl").read()
        answers = Lines(sampling.folder / "answers.jsonl").read()
        for row, sampled in zip(scores, answers, strict=True):
            prompt, texts = self.train[row["index"]].prompt, sampled["answers"]
            ranking = Ranking(tuple(row["scores"]), row["best"], row["worst"])
            lengths = [len(encode_whole(self.tokenizer, prompt, text)) for text in texts]
            found = choose(
                texts,
                ranking,
                lengths=lengths,
                max_tokens=self.config.dpo.max_tokens,
                min_margin=self.config.pairs.min_margin,
            )
            if isinstance(found, str):
                skipped[found] += 1
                continue
            best, worst = found
            high, low = ranking.scores[best], ranking.scores[worst]
            assert high is not None and low is not None
            pairs.append(Pair(prompt, texts[best], texts[worst], high, low, row["index"]))
        require_pairs(pairs, skipped)
        stage.begin()
        (stage.folder / "pairs.jsonl").unlink(missing_ok=True)
        Lines(stage.folder / "pairs.jsonl").append([asdict(pair) | {"margin": pair.margin} for pair in pairs])
        info = {
            "pairs": len(pairs),
            "skipped": dict(skipped),
            "mean_margin": sum(p.margin for p in pairs) / len(pairs),
            "chosen_chars": sum(len(p.chosen) for p in pairs) / len(pairs),
            "rejected_chars": sum(len(p.rejected) for p in pairs) / len(pairs),
        }
        self._finish(stage, f"{where}pairs", info)

    def _compare(self, models: dict[str, str], before: str, first: str) -> list[dict[str, Any]]:
        config, compare = self.config, self.config.compare
        assert compare is not None
        also = {name: source_fingerprint(path, None) for name, path in compare.also.items()}
        data = [(p.prompt, p.references) for p in self.held_out]
        how = [compare.temperature, compare.max_tokens, config.sample.max_tokens, config.sample.top_p, list(models)]
        answering = Stage(self.folder / "answers", fingerprint(before, also, data, how))
        if not self._skip(answering, "answers"):
            self._answers(answering, models)
        settings = [compare.model_dump(mode="json"), self._judged_with(compare)]
        stage = Stage(self.folder / "compare", fingerprint(answering.inputs, settings))
        if self._skip(stage, "compare"):
            found = json.loads((stage.folder / "results.json").read_text(encoding="utf-8"))
            return list(found["win_rates"])
        stage.begin()
        names = list(models)
        by_model = [[row["answer"] for row in _answer_lines(answering, name).read()] for name in names]
        answers = [dict(zip(names, texts, strict=True)) for texts in zip(*by_model, strict=True)]
        specs = compare.evaluators or config.judge.evaluators
        evaluators = self._judges(specs, first, first)
        judge = compare_judge(config, evaluators, self.held_out, weights=evaluator_weights(specs))
        total = len(self.held_out)
        needed = len(names) * (len(names) - 1) * total * len(specs)
        self._say(f"compare: up to {needed} calls for {total} prompts and {len(names)} models")
        lines = Lines(stage.folder / "matches.jsonl")
        start = lines.resume(len(names) * (len(names) - 1) // 2) // (len(names) * (len(names) - 1) // 2)
        expected = costs.of_comparing(config, evaluators, self.held_out[start:], answers[start:])
        self._estimate(expected, "about", "in this stage", "nothing cached, no retries")
        with self._bar("compare", total, start) as advance:
            for i in range(start, total):
                prompt = self.held_out[i]
                instruction = instruction_text(prompt.prompt)
                matches = winrates.play(names, [answers[i]], [instruction], [prompt.references], judge, i)
                lines.append([asdict(match) for match in matches])
                self._warn(judge.label_mass)
                self.ledger.save()
                advance(1)
        matches = [winrates.Match(**(row | {"lengths": tuple(row["lengths"])})) for row in lines.read()]
        rows = winrates.table(matches, names, resamples=compare.resamples, seed=config.seed)
        first_model = "the starting model" if config.sft is None else "the model after sft"
        judges = [first_model if e.name in ("live", "frozen") else e.name for e in judge.evaluators]
        judged = f"{', '.join(judges)} with protocol {judge.protocol.name}"
        result = {"win_rates": rows, "models": models, "judged_by": judged, "seed": config.seed}
        (stage.folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (stage.folder / "report.md").write_text(winrates.markdown(rows, judged), encoding="utf-8")
        self._finish(stage, "compare", {"matches": len(matches), "judged": sum(m.p is not None for m in matches)})
        return rows

    def _answers(self, stage: Stage, models: dict[str, str]) -> None:
        """Every model's answers to the held-out prompts."""
        compare, at_once = self.config.compare, self.config.sample.prompts_at_once
        assert compare is not None
        stage.begin()
        longest = compare.max_tokens or self.config.sample.max_tokens
        chars = {}
        for name, path in models.items():
            lines = _answer_lines(stage, name)
            start = lines.resume(at_once)
            with self._bar(f"answers: {name}", len(self.held_out), start) as advance:
                for begin in range(start, len(self.held_out), at_once):
                    chunk = self.held_out[begin : begin + at_once]
                    seed = int(fingerprint(self.config.seed, "compare", begin)[:8], 16)
                    answers = self.models.answers(path, chunk, 1, compare.temperature, longest, seed)
                    lines.append([{"answer": texts[0], "cut_off": cut[0]} for texts, cut in answers])
                    advance(len(chunk))
            written = [row["answer"] for row in lines.read()]
            chars[name] = sum(map(len, written)) / len(written)
        self._finish(stage, "answers", {"prompts": len(self.held_out), "mean_chars": chars})

    def _judges(self, specs: Sequence[EvaluatorConfig], live: str, frozen: str) -> list[Evaluator]:
        evaluators = self.models.evaluators(specs, live, frozen)
        self.ledger.adopt(evaluators)
        return evaluators

    # words

    def _estimate(self, expected: costs.Expected, how: str, where: str, why: str) -> None:
        for text, style in estimates(expected, how=how, where=where, why=why):
            self.console.print(text, style=style, markup=False, highlight=False)

    def _skip(self, stage: Stage, title: str) -> bool:
        if stage.done:
            self._say(f"{title}: done before, skipped")
        elif stage.stale:
            self._say(f"{title}: its inputs have changed, done anew")
        return stage.done

    def _finish(self, stage: Stage, title: str, info: dict[str, Any]) -> None:
        stage.finish(info)
        shown = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in info.items() if v not in (None, {}, []))
        self._say(f"{title}: {shown}")

    def _warn(self, found: LabelMass) -> None:
        for key, text in found.warnings(self.config.judge.judging.mass_warning).items():
            if key not in self.warned:
                self.warned.add(key)
                self.console.print(text, style="yellow", markup=False, highlight=False)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _bar(self, title: str, total: int, start: int) -> _Bar:
        return _Bar(self.console, title, total, start)


class _Bar:
    """A progress bar with the time left, as a context that gives its advance function."""

    def __init__(self, console: Console, title: str, total: int, start: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self.task = self.progress.add_task(title, total=total, completed=start)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda n: self.progress.advance(self.task, n)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def _answer_lines(stage: Stage, name: str) -> Lines:
    return Lines(stage.folder / f"{name}.jsonl")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{_short(v)} {k}" for k, v in value.items()) + ")"
    return str(value)
