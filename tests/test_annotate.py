"The annotation stages: killed and gone on with, shared among any number of workers, and refused where what they read is not what it was"
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from post_training.stages import preference_data
from post_training import config
from post_training import run
from post_training.core import shards
from post_training.core.files import UserError

ANSWERS = ["dataset_args.dataset_name=${artifacts_dir}/datasets/demo-answers", "dataset_args.split=train", "max_drop_fraction=1"]
STAGES = {
    "filter": ["dataset_args.split=train", "dataset_args.debug_subsample=1500", "max_seq_len=60", "max_drop_fraction=1"],
    "ref_completions": [*ANSWERS, "dataset_args.debug_subsample=40", "generation.n=2", "generation.max_new_tokens=8", "generation.batch_tokens=800"],
    "ref_logprobs": [*ANSWERS, "dataset_args.debug_subsample=120", "batch_tokens=64"],
    "ref_rewards": [*ANSWERS, "reward_model=verifier"],
    "pairs": [*ANSWERS, "num_pairs=2"],
}


@pytest.fixture
def planned(demo, tmp_root, monkeypatch):
    "A stage composed, planned and frozen, with a folder of work of its own"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))

    def make(stage, *overrides, name="once"):
        cfg = config.compose(stage, [*STAGES[stage], f"artifacts_subdir={tmp_root.name}-{name}", *overrides]).cfg
        preference_data.plan_work(cfg)
        return cfg, config.save_frozen(cfg, tmp_root / f"{stage}-{name}.yaml")

    return make


def digest(cfg):
    "SHA-256 of what all shards make together"
    out = preference_data.work_folder(cfg) / "merged.jsonl"
    shards.merge_shards(preference_data.work_folder(cfg), out)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def worker(cfg, frozen):
    "A worker that saves after each batch"
    argv = [sys.executable, "-m", "post_training.stages.preference_data", str(frozen), str(preference_data.work_folder(cfg)), "--shard", "0", "--save-batches", "1"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_midway(cfg, frozen, sent):
    "Stop a worker after its first saved batch and before its last; the batches that it saved"
    at = shards.shard_folder(preference_data.work_folder(cfg), plan := shards.load_shard_plan(preference_data.work_folder(cfg)), 0)
    of = len(plan.batches)
    assert of > 1
    for _ in range(8):  # a worker that was faster than this process is tried again
        process = worker(cfg, frozen)
        end = time.monotonic() + 120
        while not shards.read_progress(at).get("batches") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        process.send_signal(sent)
        said = process.communicate()[0]
        done = shards.read_progress(at).get("batches", 0)
        assert done, said
        if done < of and not (at / "manifest.json").exists():
            return done, of, process.returncode
        for p in at.iterdir():
            p.unlink()
    pytest.fail(f"no worker could be stopped before its end: {said}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_any_sharding_and_any_kill_give_the_same_bytes(stage, planned):
    cfg, frozen = planned(stage)
    preference_data.work_on_shards(cfg, frozen)
    whole = digest(cfg)
    seven, frozen_7 = planned(stage, "shards.number=7", "num_processes=2", name="seven")
    preference_data.work_on_shards(seven, frozen_7)
    assert shards.load_shard_plan(preference_data.work_folder(seven)).shards == min(7, len(shards.load_shard_plan(preference_data.work_folder(cfg)).batches))
    assert digest(seven) == whole
    for name, sent in (("killed", signal.SIGKILL), ("asked", signal.SIGTERM)):
        cut, frozen_cut = planned(stage, name=name)
        done, of, code = kill_midway(cut, frozen_cut, sent)
        assert code == (-9 if sent == signal.SIGKILL else 143)
        again = worker(cut, frozen_cut)
        said = again.communicate(timeout=300)[0]
        assert again.returncode == 0 and f"shard 0: {of - done} batches made" in said, said  # what was saved is not made again
        assert digest(cut) == whole


@pytest.mark.slow
def test_whole_command_killed(planned, demo, tmp_root):
    "kill -9 of the command, its kernel and its worker go with it; the same command goes on and writes what an uncut one writes"
    words = ["post-training", "ref_logprobs", *STAGES["ref_logprobs"], "shards.number=3", "shards.save_seconds=0"]
    uncut = subprocess.run([*words, f"artifacts_subdir={tmp_root.name}-a"], capture_output=True, text=True, timeout=300)
    assert uncut.returncode == 0, uncut.stderr
    process = subprocess.Popen([*words, f"artifacts_subdir={tmp_root.name}-b", "job_subdir=b"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cfg = config.compose("ref_logprobs", [*STAGES["ref_logprobs"], "shards.number=3", "shards.save_seconds=0", f"artifacts_subdir={tmp_root.name}-b", "job_subdir=b"]).cfg
    end = time.monotonic() + 120
    while not list(preference_data.work_folder(cfg).glob("shards/*/progress.json")) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    time.sleep(3)
    left = subprocess.run(["pgrep", "-f", f"post_training.stages.preference_data .*{tmp_root.name}"], capture_output=True, text=True).stdout.split()
    assert not left, "workers live on after the command that started them"
    again = subprocess.run([*words, f"artifacts_subdir={tmp_root.name}-b", "job_subdir=b"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    from post_training.data.io import load_rows
    from post_training.tokens.dataset import rows_fingerprint

    a, b = (load_rows(cfg["save_data_dir"].replace(f"{tmp_root.name}-b", f"{tmp_root.name}-{x}")) for x in "ab")
    assert len(a) == 120 and rows_fingerprint(a) == rows_fingerprint(b)
    third = subprocess.run([*words, f"artifacts_subdir={tmp_root.name}-b", "job_subdir=b"], capture_output=True, text=True, timeout=120)
    assert third.stdout.startswith("done already"), third.stdout


def test_corrupt_shard_is_named(planned):
    cfg, frozen = planned("pairs")
    preference_data.work_on_shards(cfg, frozen)
    [rows] = preference_data.work_folder(cfg).glob("shards/*/rows.txt")
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(bytes(data))
    with pytest.raises(UserError, match="0000-of-0001.*SHA-256"):
        preference_data.collect_output(cfg)
    preference_data.work_on_shards(cfg, frozen)  # a shard that does not verify is made again
    assert preference_data.collect_output(cfg)[1]["out"] > 300


def test_rows_that_changed_since(planned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(id=f"r{i}", prompt="2 + 2 = ?", chosen="4", rejected="5")) + "\n" for i in range(3)))
    cfg, frozen = planned("filter", f"dataset_args.dataset_name={rows}", "dataset_args.split=null", "max_seq_len=64")
    rows.write_text(rows.read_text().replace('"5"', '"6"'))
    with pytest.raises(UserError, match="rows.jsonl has changed since this work began"):
        preference_data.plan_work(cfg)


def test_another_reference_than_the_one_that_sampled(planned, tmp_root, demo):
    "Completions of one model scored by another: refused by name, unless it is meant"
    cfg, frozen = planned("ref_completions", "dataset_args.debug_subsample=3")
    task = run.open_run(cfg)
    preference_data.run_annotation(task, cfg)
    written = run.read_record(task.run_dir)["final"]["output"]
    asked = [f"dataset_args.dataset_name={written}", "dataset_args.split=null", "dataset_args.debug_subsample=0"]
    scored, _ = planned("ref_logprobs", *asked, name="same")
    assert shards.load_shard_plan(preference_data.work_folder(scored)).params["reference"]
    with pytest.raises(UserError, match="another chat template"):
        planned("ref_logprobs", *asked, "tokenizer_args.chat_template_name=tulu", "tokenizer_args.model_eos_token_id=2", name="other")
    planned("ref_logprobs", *asked, "tokenizer_args.chat_template_name=tulu", "tokenizer_args.model_eos_token_id=2", "allow_other_reference=true", name="meant")


def test_nothing_that_can_be_used(planned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(id=f"r{i}", chosen="4", rejected="5")) + "\n" for i in range(3)))  # texts without a prompt
    with pytest.raises(UserError, match="No row of .*rows.jsonl can be used: .*no prompt"):
        planned("filter", f"dataset_args.dataset_name={rows}", "dataset_args.split=null")


def test_too_many_rows_lost_stops_the_stage(planned):
    cfg, frozen = planned("filter", "max_drop_fraction=0.01", "min_completions=1", "max_seq_len=40", "dataset_args.debug_subsample=200")
    preference_data.work_on_shards(cfg, frozen)
    with pytest.raises(UserError, match="max_drop_fraction"):
        preference_data.collect_output(cfg)


def test_two_splits_stay_apart(planned):
    cfg, frozen = planned("pairs", "dataset_args.split=null", "dataset_args.debug_subsample=30")
    preference_data.work_on_shards(cfg, frozen)
    splits, counts = preference_data.collect_output(cfg)
    assert splits.keys() == {"train", "eval"} and counts["in"] == 60
    assert sum(len(set(rows["id"][:])) for rows in splits.values()) == counts["out"]


def test_a_server_that_nobody_named(planned):
    with pytest.raises(UserError, match="server.url"): planned("ref_completions", "backend=server")


def test_help_says_how_a_worker_is_called():
    out = subprocess.run([sys.executable, "-m", "post_training.stages.preference_data", "--help"], capture_output=True, text=True, env=os.environ)
    assert out.returncode == 0 and "--array" in out.stdout and "--shard" in out.stdout


def test_what_a_model_may_write_or_a_source_may_hold(planned, tmp_path):
    "Numbers that no exact value can be had of, rewards that are none, fields that are always null"
    from post_training.models.verifiers import run_verifier

    assert run_verifier("final_number", "The answer is 1e9999999", "5") == 0.0
    talk = [dict(role="assistant", parts=[dict(type="response", content=x, name=None, args=None, answers=None, metadata=None)]) for x in "45"]
    row = dict(system_prompt=None, available_functions=[], initial_prompt=dict(role="user", content="2 + 2 = ?", metadata=None))
    branches = [dict(messages=[talk[0]], label="right", reward=1.0), dict(messages=[talk[1]], label=None, reward=float("nan"))]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(conversation_id=f"c{i}", conversation_branches=branches, **row)) + "\n" for i in range(3)))
    cfg, frozen = planned("filter", f"dataset_args.dataset_name={rows}", "dataset_args.split=null", "max_seq_len=128")
    preference_data.work_on_shards(cfg, frozen)
    splits, counts = preference_data.collect_output(cfg)
    [first] = {tuple(c["reward"] for c in found) for found in splits["train"]["completions"][:]}
    assert first == (1.0, None) and counts["lost before"] == {"reward is not finite: left out": 3}
