"""The paper-size recipes of every experiment run from end to end, with small random models in the big ones' place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlme.cli import main
from rlme.commands import find_config
from tests.tiny_runs import PROMPTS, read_rollouts, write_jsonl

RECIPES = ("generator", "evaluator", "crowd", "concise", "nocheat", "reading")


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_with_small_models(name: str, tiny_base_dir: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(find_config(f"paper-{name}").read_text())
    data = write_jsonl(tmp_path / "data.jsonl", [{**p, "context": "Sums are done as usual."} for p in PROMPTS])
    recipe["model"]["path"] = str(tiny_base_dir)
    recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in ("name", "split", "eval", "eval_split")}
    recipe["data"]["train"] = str(data)
    recipe["evaluators"] = [
        e if isinstance(e, str) else {"model": str(tiny_base_dir), "name": f"e{i}"}
        for i, e in enumerate(recipe["evaluators"])
    ]
    recipe["train"] |= {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4}
    recipe["train"] |= {"precision": "float32"}
    # these need a GPU: vLLM, and the paged optimiser of bitsandbytes
    recipe["trl"] = {k: v for k, v in recipe["trl"].items() if k != "optim" and not k.startswith(("use_vllm", "vllm"))}
    recipe["output"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "recipe.yaml")])
    assert ended.value.code == 0
    rows = read_rollouts(tmp_path / "run")
    assert len(rows) == 4
    assert len(rows[0]["judgements"]) == len(recipe["questions"]) * len(recipe["evaluators"])
    if name == "nocheat":
        assert all(f"(The correct answer is {row['gold']})" in row["prompt"] for row in rows)
