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
from itertools import combinations, groupby
from typing import Any

from rich.console import Console

from rlme.align import costs, train, winrates
from rlme.align.checks import check_ahead, check_output
from rlme.align.config import AlignConfig
from rlme.align.inputs import compare_inputs, judge_inputs
from rlme.align.judging import Group, compare_judge, compare_protocol, make_scorer, require_judged
from rlme.align.pairs import Pair, choose, require_pairs
from rlme.align.prompts import encode_whole, load_prompts
from rlme.align.protocols import load_protocol
from rlme.align.ranking import Ranking
from rlme.align.run_models import RunModels
from rlme.align.stage import Lines, Stage, fingerprint, source_fingerprint
from rlme.align.words import Words
from rlme.config import EvaluatorConfig, evaluator_weights
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.evaluators.spending import Ledger
from rlme.folders import locked, make_folder, replace_file
from rlme.models import load_tokenizer
from rlme.training.run_folder import RunFolder

JUDGED_AT_ONCE = 4
"""Prompts whose comparisons are asked together; also what is redone after an interruption."""


class Alignment:
    """One run. `run` goes through all stages and returns the final table's rows."""

    def __init__(self, config: AlignConfig, console: Console) -> None:
        self.config = config
        self.words = Words(console)
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
            self.words.say(note)
        if config.compare is not None and not self.held_out:
            self.words.say("no comparison in the end: give data.eval, or hold prompts out with data.hold_out")
        self.models = RunModels(config, self.tokenizer, Ledger(self.folder / "spent.json").costs())
        check_ahead(config, self.models, prompts)

    def run(self) -> list[dict[str, Any]]:
        """All stages; finished ones are skipped."""
        make_folder(self.folder)
        busy = "another rlme align is at work in it: wait for it, or choose another `output` (or --output)"
        with locked(self.folder, busy):
            RunFolder(self.folder).write_config(self.config.model_dump(mode="json"))
            self.ledger = Ledger(self.folder / "spent.json")
            with self.ledger.kept():
                return self._stages()

    def _stages(self) -> list[dict[str, Any]]:
        config = self.config
        if not any(self.folder.glob("**/stage.json")):
            planned = [*config.own_models, *(config.compare.also if config.compare else ())]
            expected = costs.whole_run(config, self.models, planned, self.train, self.held_out)
            self.words.estimate(expected, "at most", "in the whole run", costs.LONGEST)
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
        if self.words.skip(stage, "sft"):
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
        self.words.say(f"sft: {len(examples)} references" + (f", {too_long} too long and left out" if too_long else ""))
        stage.begin()
        summary = train.sft(config, self.models.trainable(config.model.path), self.tokenizer, examples, stage.folder)
        self.words.finish(stage, "sft", summary | {"examples": len(examples), "too_long": too_long})
        return model, stage.inputs

    def _round(self, number: int, policy: str, before: str, first: str) -> tuple[str, str]:
        folder = self.folder / f"round-{number}"
        config = self.config
        where = f"round {number}, " if config.rounds > 1 else ""
        sampling = Stage(folder / "sample", fingerprint(before, number, config.sample.model_dump()))
        if not self.words.skip(sampling, f"{where}sample"):
            self._sample(sampling, policy, number, where)
        judging = Stage(folder / "judge", fingerprint(sampling.inputs, judge_inputs(config, self.train)))
        if not self.words.skip(judging, f"{where}judge"):
            self._judge(judging, sampling, policy, first, number, where)
        chosen = [config.pairs.model_dump(), config.dpo.max_tokens]
        pairing = Stage(folder / "pairs", fingerprint(judging.inputs, chosen))
        if not self.words.skip(pairing, f"{where}pairs"):
            self._pairs(pairing, judging, sampling, where)
        training = Stage(folder / "dpo", fingerprint(pairing.inputs, config.dpo.model_dump()))
        if not self.words.skip(training, f"{where}dpo"):
            pairs = [
                Pair(**{k: row[k] for k in Pair.__slots__}) for row in Lines(pairing.folder / "pairs.jsonl").read()
            ]
            training.begin()
            summary = train.dpo(config, self.models.trainable(policy), self.tokenizer, pairs, training.folder)
            self.words.finish(training, f"{where}dpo", summary | {"pairs": len(pairs)})
        return str(training.folder / "model"), training.inputs

    def _sample(self, stage: Stage, policy: str, number: int, where: str) -> None:
        config = self.config.sample
        stage.begin()
        lines = Lines(stage.folder / "answers.jsonl")
        total = len(self.train)
        self.words.say(f"{where}sample: {total} prompts x {config.n} answers")
        start = lines.resume(config.prompts_at_once)
        with self.words.bar(f"{where}sample", total, start) as advance:
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
        self.words.finish(stage, f"{where}sample", info)

    def _judge(self, stage: Stage, sampling: Stage, policy: str, first: str, number: int, where: str) -> None:
        evaluators = self._judges(self.config.judge.evaluators, policy, first)
        scorer = make_scorer(self.config.judge, evaluators)
        answers = Lines(sampling.folder / "answers.jsonl").read()
        groups: list[Group] = [(self.train[row["index"]], row["answers"]) for row in answers]
        self.words.say(f"{where}judge: {scorer.calls(groups)} calls for {len(groups)} prompts")
        stage.begin()
        lines = Lines(stage.folder / "scores.jsonl")
        # After an interruption: what is there stays, except where a judgement failed, which is asked again.
        kept = {row["index"]: row for row in lines.read() if not row["failures"]}
        lines.rewrite(list(kept.values()))
        left = [i for i in range(len(groups)) if i not in kept]
        expected = costs.of_judging(self.config.judge, evaluators, [groups[i] for i in left])
        self.words.estimate(expected, "about", "in this stage", "nothing cached, no retries")
        with self.words.bar(f"{where}judge", len(groups), len(kept)) as advance:
            for begin in range(0, len(left), JUDGED_AT_ONCE):
                chunk = left[begin : begin + JUDGED_AT_ONCE]
                rankings = scorer.rank([groups[i] for i in chunk], seed=self.config.seed * 1000 + number)
                lines.append([{"index": i} | asdict(r) for i, r in zip(chunk, rankings, strict=True)])
                self.words.warn(scorer.label_mass, self.config.judge.judging.mass_warning)
                self.ledger.save()
                advance(len(chunk))
        rows = sorted(lines.read(), key=lambda row: int(row["index"]))
        info = self._judged(rows, answers)
        lines.rewrite(rows)
        self.words.finish(stage, f"{where}judge", info)

    def _judged(self, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        failures: Counter[str] = Counter()
        missing = judged = 0
        for row, sampled in zip(rows, answers, strict=True):
            failures.update(row["failures"])
            if len(set(sampled["answers"])) > 1:
                judged += len(row["scores"])
                missing += sum(score is None for score in row["scores"])
        limit = self.config.judge.max_failure_rate
        require_judged("judge", "candidates", missing, judged, failures, limit)
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
        self.words.finish(stage, f"{where}pairs", info)

    def _compare(self, models: dict[str, str], before: str, first: str) -> list[dict[str, Any]]:
        config, compare = self.config, self.config.compare
        assert compare is not None
        also = {name: source_fingerprint(path, None) for name, path in compare.also.items()}
        data = [(p.prompt, p.references) for p in self.held_out]
        how = [compare.temperature, compare.max_tokens, config.sample.max_tokens, config.sample.top_p, list(models)]
        answering = Stage(self.folder / "answers", fingerprint(before, also, data, how))
        if not self.words.skip(answering, "answers"):
            self._answers(answering, models)
        stage = Stage(self.folder / "compare", fingerprint(answering.inputs, compare_inputs(config)))
        done = self.words.skip(stage, "compare")
        if not done:
            self._matches(stage, answering, list(models), first)
        return self._win_rates(stage, models, known=done)

    def _matches(self, stage: Stage, answering: Stage, names: list[str], first: str) -> None:
        """Every two models on every prompt. The stage is not done while a match has failed: the next run asks again."""
        config, compare = self.config, self.config.compare
        assert compare is not None
        stage.begin()
        by_model = [[row["answer"] for row in _answer_lines(answering, name).read()] for name in names]
        answers = [dict(zip(names, texts, strict=True)) for texts in zip(*by_model, strict=True)]
        specs = compare.evaluators or config.judge.evaluators
        evaluators = self._judges(specs, first, first)
        judge = compare_judge(config, evaluators, self.held_out, weights=evaluator_weights(specs))
        jobs = [(i, a, b) for i in range(len(answers)) for a, b in combinations(names, 2)]
        lines = Lines(stage.folder / "matches.jsonl")
        kept = {(row["prompt"], row["a"], row["b"]): row for row in lines.read() if not row["failures"]}
        lines.rewrite(list(kept.values()))
        left = [job for job in jobs if job not in kept]
        asked = winrates.comparisons(left, answers, self.held_out)
        self.words.say(
            f"compare: {judge.calls(asked)} calls for {len(left)} matches of {len(names)} models "
            f"on {len(answers)} prompts"
        )
        expected = costs.of_comparing(config, evaluators, self.held_out, asked)
        self.words.estimate(expected, "about", "in this stage", "nothing cached, no retries")
        with self.words.bar("compare", len(jobs), len(kept)) as advance:
            for _, group in groupby(left, key=lambda job: job[0]):
                played = winrates.play(chunk := list(group), answers, self.held_out, judge)
                lines.append([asdict(match) for match in played])
                self.words.warn(judge.label_mass, config.judge.judging.mass_warning)
                self.ledger.save()
                advance(len(chunk))
        found = {(row["prompt"], row["a"], row["b"]): row for row in lines.read()}
        lines.rewrite([found[job] for job in jobs])
        failures: Counter[str] = Counter()
        for row in found.values():
            failures.update(row["failures"])
        failed = sum(bool(row["failures"]) for row in found.values())
        contested = len(winrates.comparisons(jobs, answers, self.held_out))
        require_judged("compare", "matches", failed, contested, failures, config.judge.max_failure_rate)
        info = {"matches": len(jobs), "judged": len(jobs) - failed, "failures": dict(failures)}
        self.words.finish(stage, "compare", info, done=not failed)

    def _win_rates(self, stage: Stage, models: dict[str, str], *, known: bool) -> list[dict[str, Any]]:
        """The table of the matches, read from disk if it is `known` and nothing that stands in it has changed."""
        config, compare = self.config, self.config.compare
        assert compare is not None
        first_model = "the starting model" if config.sft is None else "the model after sft"
        labels = [spec.label for spec in compare.evaluators or config.judge.evaluators]
        judges = ", ".join(first_model if label in ("live", "frozen") else label for label in labels)
        judged = f"{judges} with protocol {compare_protocol(config, self.held_out).name}"
        about = {"models": models, "judged_by": judged, "seed": config.seed, "resamples": compare.resamples}
        file = stage.folder / "results.json"
        result = json.loads(file.read_text(encoding="utf-8")) if known and file.is_file() else {}
        if result | about != result:
            rows = Lines(stage.folder / "matches.jsonl").read()
            matches = [winrates.Match(**(row | {"lengths": tuple(row["lengths"])})) for row in rows]
            table = winrates.table(matches, list(models), resamples=compare.resamples, seed=config.seed)
            result = {"win_rates": table} | about
            replace_file(file, json.dumps(result, indent=2) + "\n")
            (stage.folder / "report.md").write_text(winrates.markdown(table, judged), encoding="utf-8")
        return list(result["win_rates"])

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
            with self.words.bar(f"answers: {name}", len(self.held_out), start) as advance:
                for begin in range(start, len(self.held_out), at_once):
                    chunk = self.held_out[begin : begin + at_once]
                    seed = int(fingerprint(self.config.seed, "compare", begin)[:8], 16)
                    answers = self.models.answers(path, chunk, 1, compare.temperature, longest, seed)
                    lines.append([{"answer": texts[0], "cut_off": cut[0]} for texts, cut in answers])
                    advance(len(chunk))
            written = [row["answer"] for row in lines.read()]
            chars[name] = sum(map(len, written)) / len(written)
        self.words.finish(stage, "answers", {"prompts": len(self.held_out), "mean_chars": chars})

    def _judges(self, specs: Sequence[EvaluatorConfig], live: str, frozen: str) -> list[Evaluator]:
        evaluators = self.models.evaluators(specs, live, frozen)
        self.ledger.adopt(evaluators)
        return evaluators


def _answer_lines(stage: Stage, name: str) -> Lines:
    return Lines(stage.folder / f"{name}.jsonl")
