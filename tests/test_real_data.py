"The tiny model on real grade-school problems: it learns from completions, and from nothing else"
import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training import run

STEPS = 200


@pytest.mark.slow
def test_gsm8k_is_learned(data_dir, demo, tmp_root):
    "Two hundred steps on question and answer rows at prompt weight 0"
    args = ["dataset=gsm8k", "model=tiny", f"model_args.model_name_or_path={demo}/models/tiny", "cluster.device=cpu", "trainer=plw", "plw_args.prompt_loss_weight=0.0",
            "dataset_args.debug_subsample.train=900", "dataset_args.debug_subsample.eval=40", "global_batch_size=4", "training_args.per_device_train_batch_size=4",
            "training_args.per_device_eval_batch_size=20", "training_args.max_length=384", f"training_args.max_steps={STEPS}", "training_args.eval_strategy=steps",
            f"training_args.eval_steps={STEPS // 2}", "training_args.eval_on_start=true"]
    out = subprocess.run([sys.executable, "-m", "post_training.train_sft", *args], capture_output=True, text=True, env=os.environ | dict(WANDB_MODE="disabled"))
    assert out.returncode == 0, out.stderr[-3000:]
    run_dir = next(Path(os.environ["POST_TRAINING_RUNS_DIR"]).rglob("record.json")).parent
    lines = run.read_metrics(run_dir)
    evals = [line["eval_completion_loss"] for line in lines if "eval_completion_loss" in line]
    print("eval completion loss:", [round(e, 3) for e in evals])
    assert len(evals) == 3 and evals[0] > evals[1] > evals[2] and evals[-1] < 0.7 * evals[0]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == STEPS
    for line in steps:  # at weight 0 no prompt token is trained on, and none is even scored
        assert line["trained_tokens"] == line["completion_tokens"] > 0 and line["prompt_tokens"] > 0 and "prompt_loss" not in line
        assert abs(line["loss"] - line["completion_loss"]) < 1e-5
    counts = run.read_record(run_dir)["counts"]["train"]
    assert counts["out"] + sum(counts.get("dropped", {}).values()) == counts["in"] == 900
