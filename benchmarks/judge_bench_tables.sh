#!/bin/sh
# The verdicts behind the table of docs/judge-bench.md: every protocol on LLMBar and GSM8K judgements, for one judge.
#   benchmarks/judge_bench_tables.sh JUDGE DATA OUT [PAIRS LONG REASONS ANSWERS]
# DATA holds llmbar/ and gsm8k/. The numbers say how many items are judged: of Natural and Neighbor, of GPTInst (with
# outputs three times as long), with
# written reasons (48 tokens of them), and of GSM8K. Stopped, it goes on where it was.
# Afterwards, for all judges together: benchmarks/judge_bench_page.sh OUT...
set -e
judge=$1 data=$2 out=$3 pairs=${4:-16} long=${5:-8} reasons=${6:-8} answers=${7:-48}

bench() { rlme judge-bench --set "judges=[{model: $judge, dtype: bfloat16}]" --seed 0 -o "$out" "$@"; }
natural="--data llmbar:$data/llmbar/natural.jsonl" neighbor="--data llmbar:$data/llmbar/neighbor.jsonl"
gptinst="--data llmbar:$data/llmbar/gptinst.jsonl" gsm8k="--data gsm8k:$data/gsm8k/judged.jsonl"
all="--protocol base --protocol vanilla --protocol refeval --protocol refmatch --protocol reference --protocol href"

bench $natural $neighbor --limit "$pairs" --no-wrong-references $all
bench $gsm8k --limit "$answers" --set sets.0.name=gsm8k --set judging.template=judge --set 'questions={
  correct: "Is the final answer of this solution correct?",
  with reference: "A correct solution reads: {{ reference }}\nIs the final answer of the solution above correct?"}'
bench $gptinst --limit "$long" --no-wrong-references $all
bench $natural $neighbor --limit "$pairs" --protocol refeval
bench $natural $neighbor --limit "$reasons" --protocol cot --set critique_tokens=48
