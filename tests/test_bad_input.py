"What a user gets wrong: one or two lines that name the thing, exit code 2, no traceback, nothing half-written taken as whole; and the long command that must start."
import json
import os
import subprocess
import sys

import pytest

from post_training import run
from post_training import train_sft

GOOD = [dict(question=f"What is {i} + 1?", answer=str(i + 1)) for i in range(20)]
SHORT = ["cluster.device=cpu", "training_args.max_steps=1", "wandb.mode=disabled", "evaluation.num_prompts=0", "training_args.eval_strategy=no"]
CASES = {  # name: rows (None: no file), overrides, words of the message
    "missing path": (None, [], ["nowhere.jsonl"]),
    "no usable column": ([dict(text="a", label=1)], [], ["text", "label", "messages"]),
    "empty dataset": ([], [], ["nowhere.jsonl"]),
    "all rows dropped": ([dict(messages=[dict(role="user", content="a")])] * 4, [], ["All 4 rows were dropped"]),
    "too many dropped": (GOOD + [dict(question="b", answer="")] * 4, [], ["4 of 24 rows were dropped", "max_drop_fraction"]),
    "pad is eos": (GOOD, ["tokenizer_args.model_pad_token_id=68"], ["pad", "eos"]),
    "unknown template": (GOOD, ["tokenizer_args.chat_template_name=tuluu"], ["tuluu", "'tulu'"]),
    "no stop token": (GOOD, ["tokenizer_args.chat_template_name=simple_chat", "tokenizer_args.model_eos_token_id=null"], ["on_missing_stop"]),
    "missing model": (GOOD, ["model_args.model_name_or_path=models/nothing"], ["models/nothing"]),
    "batch does not divide": (GOOD, ["global_batch_size=30", "training_args.per_device_train_batch_size=16"], ["30", "16"]),
    "no row fits a step": (GOOD[:3], ["global_batch_size=32"], ["dataloader_drop_last"]),
    "unknown run": (GOOD, ["model_args.model_name_or_path=run:nothing"], ["no run 'nothing'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_and_leaves_nothing(case, demo, tmp_path, monkeypatch, capfd):
    rows, overrides, words = CASES[case]
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    data = tmp_path / "nowhere.jsonl"
    if rows is not None: data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code = train_sft.train_sft_main(["dataset=local", f"dataset_args.dataset_name={data}", f"artifacts_subdir={tmp_path.name}", *SHORT, *overrides])
    err = capfd.readouterr().err
    assert code == 2, err
    for word in words: assert word in err, (word, err)
    assert len([line for line in err.splitlines() if line and "WARNING" not in line]) <= 2, err
    assert "Traceback" not in err
    for folder in run.all_runs(tmp_path / "runs"):
        record = run.read_record(folder)
        assert record["status"] == "failed" and record["attempts"][-1]["exit"] == 2 and not run.is_done(folder)
        assert run.newest_verified(record["checkpoints_dir"])[0] is None


@pytest.mark.slow
def test_the_known_command_line_starts(demo, tmp_path, monkeypatch):
    "The command of the earlier code base, with the model of 70 billion parameters replaced by the tiny one, on two processes under ZeRO-3"
    from test_cli import SEED
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(dict(messages=[dict(role="user", content=r["question"]), dict(role="assistant", content=r["answer"])])) + "\n" for r in GOOD))
    tiny = str(demo / "models/tiny")
    argv = [a.replace("_or_path=P", f"_or_path={tiny}") for a in SEED]
    argv += [f"dataset_args.dataset_name={data}", f"runs_dir={tmp_path}/runs", "cluster.device=cpu"]
    settings = os.path.join(os.path.dirname(train_sft.__file__), "configs/accelerate/ds-zero3.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, "--num_processes", "2", "-m", "post_training.train_sft", *argv]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}
    p = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    folder, = run.all_runs(tmp_path / "runs")
    record = run.read_record(folder)
    assert run.is_done(folder) and record["topology"]["zero_stage"] == 3 and record["topology"]["world_size"] == 2
    assert record["final"]["step"] == 5  # 20 rows, two processes, two rows each
