#!/bin/sh
# docs/judge-bench-qwen.md from the verdicts that judge_bench_tables.sh left: benchmarks/judge_bench_page.sh OUT...
set -e
work=$(mktemp -d)
for out in "$@"; do cat "$out/verdicts.jsonl"; done > "$work/all.jsonl"
rlme judge-bench --verdicts "$work/all.jsonl" --seed 0 -o "$work/report" > /dev/null
{
  echo "# Qwen2.5-Coder-0.5B and 1.5B (Instruct) as judges"
  echo
  echo "Made by \`benchmarks/judge_bench_tables.sh\` for each judge and \`benchmarks/judge_bench_page.sh\`; what it comes to"
  echo "stands in [judge-bench.md](judge-bench.md#two-small-judges-measured). Seconds are of the clock on a busy machine."
  tail -n +2 "$work/report/report.md"
} > "$(dirname "$0")/../docs/judge-bench-qwen.md"
rm -r "$work"
