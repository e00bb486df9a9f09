"The whole road in small: the plan's stages with fewer rows, then the report that `make pipeline` executes"
import json
import os
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT

from post_training import run

PLAN = yaml.safe_load((ROOT / "post_training/configs/plan/pipeline.yaml").read_text())
LESS = {"sft": ["training_args.num_train_epochs=1", "training_args.eval_strategy=no", "evaluation.num_prompts=0"],
        "filter": ["dataset_args.debug_subsample=480"], "completions": ["generation.n=4"], "pairs": ["max_drop_fraction=1", "min_num_ref_rewards=2"], "qrpo": ["global_batch_size=8"], "dpo": ["global_batch_size=8"]}


def test_the_grid_is_declared():
    "QRPO and DPO have the same grid of learning rates and betas, and nothing else differs between its points"
    grids = {s["name"]: s["each"] for s in PLAN["stages"] if "each" in s}
    assert set(grids) == {"qrpo", "dpo"} and grids["qrpo"] == grids["dpo"] and len(grids["qrpo"]) >= 4
    assert all([o.split("=")[0] for o in point] == ["training_args.learning_rate", "training_args.beta"] for point in grids["qrpo"])


@pytest.mark.slow
def test_the_road_in_small(tmp_path):
    plan = PLAN | dict(stages=[s | dict(overrides=[*s["overrides"], *LESS.get(s["name"], [])]) | ({"each": s["each"][:1]} if "each" in s else {}) for s in PLAN["stages"]])
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(plan))
    env = os.environ | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(tmp_path / "artifacts"))
    told = subprocess.run(["post-training", "plan", str(path)], capture_output=True, text=True, timeout=900, env=env, cwd=ROOT)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    report = tmp_path / "report.ipynb"
    words = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(ROOT / "nbs/explore"), str(ROOT / "nbs/explore/pipeline.ipynb"), str(report), "-p", "prompts", "60", "-p", "seeds", "2"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert told.returncode == 0, told.stderr[-3000:]
    cells = [c for c in nbformat.read(report, 4).cells if c.cell_type == "code"]
    answer = "".join(o["text"] for o in cells[-1].outputs if o.output_type == "stream")
    assert answer.count("95 %") == 4 and "qrpo: sampled 0." in answer and "dpo: sampled 0." in answer, answer
    assert "one training seed, 2 sampling seeds" in answer, answer
    assert [o.data for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs/train_preference/pipeline").glob("*/record.json")]
    assert sorted(r["config"]["training_args"]["loss_type"] for r in records) == ["qrpo", "sigmoid"] and {r["status"] for r in records} == {"finished"}
    assert all(len(run.read_metrics(p)) > 1 for p in (tmp_path / "runs/train_preference/pipeline").iterdir())
