"""Evaluators in this process: any causal language model, asked by forward passes over a shared prefix tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from rlme.control_tokens import pattern_of
from rlme.errors import InputError
from rlme.judgement import Answer, Failure, Message, Request
from rlme.key_values import KeyValues
from rlme.memory import keep_freed_memory
from rlme.models import end_tokens, has_chat_template
from rlme.sampling import sample
from rlme.scoring import continuation_logprobs

WRITTEN = 4  # times `token_budget`: tokens whose keys and values are held while critiques are written

ModelContext = Callable[[], AbstractContextManager[Any]]


class LocalEvaluator:
    """A model and its tokenizer as an `Evaluator`.

    `model` is a causal language model, or a function that returns a context manager giving one (how the live and the
    frozen self borrow the policy: see `self_evaluator.py`). `chat`: ask through the chat template; by default when the
    tokenizer has one. `token_budget` bounds the tokens in one forward pass. `max_context_tokens`: a longer context is a
    failed judgement; by default the model's own limit. `share`: compute what contexts have in common once. `known`
    gives keys and values that the model has computed already, or None.

    `logprobs` and `write` answer in the order of the requests, log-probabilities in nats; what cannot be judged is a
    failed `Answer`, never an exception. Raises `InputError` for `chat` where the tokenizer has no template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        chat: bool | None = None,
        token_budget: int = 8192,
        share: bool = True,
        max_context_tokens: int | None = None,
        known: Callable[[], KeyValues | None] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.control_tokens = pattern_of(tokenizer)
        self.chat = has_chat_template(tokenizer) if chat is None else chat
        if self.chat and not has_chat_template(tokenizer):
            raise InputError(
                f"evaluator {name!r} is to be asked through a chat template, but its tokenizer has none: "
                "use a template of kind text (e.g. paper or reply) with style: completion"
            )
        self.token_budget = token_budget
        self.share = share
        self.max_context_tokens = max_context_tokens
        self.known = known
        """Gives the keys and values that the model has computed before, with the weights it has now."""
        self.tokens_computed = 0
        """Tokens that went through the model so far; less than the tokens asked about wherever prefixes are shared."""
        self._model: ModelContext = model
        if hasattr(model, "config"):
            keep_freed_memory(model.device)
            self._model = lambda: _borrowed(model)

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request; identical contexts and shared prefixes are computed once."""
        if not requests:
            return []
        contexts = self._encode([(r.context, r.prefill) for r in requests])
        spelled = {s: self._spell(s) for s in {s for r in requests for s in r.continuations}}
        wanted = [[spelled[s] for s in r.continuations] for r in requests]
        with self._model() as model, torch.no_grad():
            limit = self._limit(model)
            fits = [
                i
                for i, (ids, cs) in enumerate(zip(contexts, wanted, strict=True))
                if len(ids) + max(map(len, cs), default=0) <= limit
            ]
            values, computed = continuation_logprobs(
                model,
                [contexts[i] for i in fits],
                [wanted[i] for i in fits],
                token_budget=self.token_budget,
                share=self.share,
                known=self.known() if self.known else None,
            )
        self.tokens_computed += computed
        answers = [
            Answer.failed(
                Failure.CONTEXT_TOO_LONG,
                f"the context has {len(ids)} tokens, the evaluator's limit is {limit}",
                tokens_in=len(ids),
            )
            for ids in contexts
        ]
        for i, logprobs in zip(fits, values, strict=True):
            n = len(contexts[i])
            if any(math.isnan(lp) for lp in logprobs):
                answers[i] = Answer.failed(Failure.NOT_A_NUMBER, "the model returned NaN", tokens_in=n)
            else:
                answers[i] = Answer(tuple(logprobs), tokens_in=n)
        return answers

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        """Greedy text after each context."""
        contexts = self._encode([(r.context, r.prefill) for r in requests])
        with self._model() as model, torch.no_grad():
            limit = self._limit(model) - max_tokens
            fits = [i for i, ids in enumerate(contexts) if len(ids) <= limit]
            ends = {*end_tokens(model), self.tokenizer.eos_token_id} - {None}
            longest = max((len(contexts[i]) for i in fits), default=0) + max_tokens
            written = sample(
                model,
                [contexts[i] for i in fits],
                1,
                max_new_tokens=max_tokens,
                temperature=0.0,
                eos_token_ids=sorted(ends),
                seed=0,
                max_rows=max(8, min(256, WRITTEN * self.token_budget // longest)),
            )
        texts: list[str | Failure] = [Failure.CONTEXT_TOO_LONG for _ in requests]
        for i, (draw,) in zip(fits, written, strict=True):
            self.tokens_computed += len(contexts[i]) + len(draw.ids)
            texts[i] = str(self.tokenizer.decode(draw.ids, skip_special_tokens=True))
        return texts

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """The candidates that the tokenizer can write, without those that begin with another one's tokens."""
        kept: dict[str, list[int]] = {}
        for text in sorted(dict.fromkeys(candidates), key=lambda s: len(self._spell(s))):
            ids = self._spell(text)
            writable = bool(ids) and self.tokenizer.decode(ids).strip() == text.strip()
            writable = writable and getattr(self.tokenizer, "unk_token_id", None) not in ids
            if writable and not any(ids[: len(other)] == other for other in kept.values()):
                kept[text] = ids
        return tuple(s for s in dict.fromkeys(candidates) if s in kept)

    def count_tokens(self, context: str | tuple[Message, ...]) -> int:
        """Length of a context in this evaluator's tokens."""
        return len(self._encode([(context, "")])[0])

    def _limit(self, model: Any) -> int:
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        own = own if own and own > 0 else 10**9  # XLNet says -1
        return min(own, self.max_context_tokens or own)

    def _encode(self, contexts: Sequence[tuple[str | tuple[Message, ...], str]]) -> list[list[int]]:
        """Token ids of whole contexts. Text gets the tokenizer's special tokens (as TRL does with a text prompt); a
        chat template writes its own, also where what it wrote is continued as text."""
        bos = self.tokenizer.bos_token
        ids: list[list[int]] = [[] for _ in contexts]
        for chat in (False, True):
            rows = [i for i, (context, _) in enumerate(contexts) if isinstance(context, str) != chat]
            if not rows:
                continue
            texts = [self._text(*contexts[i]) for i in rows]
            # One text many times (several questions over one completion share it whole): encode it once.
            distinct = list(dict.fromkeys(texts))
            encoded: dict[str, list[int]] = {}
            for add in (False, True):
                some = [text for text in distinct if (not chat and not (bos and text.startswith(bos))) == add]
                if some:
                    encoded |= zip(some, self.tokenizer(some, add_special_tokens=add)["input_ids"], strict=True)
            for i, text in zip(rows, texts, strict=True):
                ids[i] = list(encoded[text])
        return ids

    def _text(self, context: str | tuple[Message, ...], prefill: str) -> str:
        if isinstance(context, str):
            return context + prefill
        if not has_chat_template(self.tokenizer):
            raise InputError(
                f"evaluator {self.name!r} has no chat template, but the evaluation template is a chat one: "
                "use a template of kind text, such as paper or reply"
            )
        text = self.tokenizer.apply_chat_template(list(context), tokenize=False, add_generation_prompt=True)
        return str(text) + prefill

    def _spell(self, text: str) -> list[int]:
        """Tokens of a continuation. Encoded behind a newline, so that a tokenizer which puts a space before the
        first word (SentencePiece) does not put one into the middle of a text."""
        before = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        both = self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before:
            return list(both[len(before) :])
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def _borrowed(model: Any) -> Iterator[Any]:
    """The model in evaluation mode (no dropout), put back as it was."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
