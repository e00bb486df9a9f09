"Rejection sampling as a stage: the same rows from any number of shards and after a kill, rows that training reads, and bad input."
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import BIN
from test_stages import command, the_run

from post_training import config, run
from post_training.core.files import UserError
from post_training.data.columns import account, check_account
from post_training.data.io import load_splits
from post_training.data.swissai import as_messages
from post_training.stages import preference_data


def completion(text, reward, **more):
    return dict(content=text, reward=reward, policy="m", is_reference_completion=True, finish_reason="stop", num_tokens=len(text.split())) | more


def write(path, rows):
    "Rows of prompts and completions; NaN as JSON has it"
    path.write_text("\n".join(json.dumps(dict(id=f"r{i}", source="s", prompt=[dict(role="user", content=p)], answer="1", completions=c)) for i, (p, c) in enumerate(rows)))
    return path


def chosen(path, *overrides, name):
    cfg = config.compose("rejection_sample", [f"dataset_args.dataset_name={path}", f"dataset_name={name}", *overrides]).cfg
    task = run.open_run(cfg)
    splits, counts = preference_data.run_annotation(task, cfg)
    return splits, counts, Path(run.read_record(task.run_dir)["final"]["output"])


@pytest.mark.slow
def test_rows_are_the_same_from_any_shards_and_can_be_trained_on(tmp_path, tmp_root):
    "Every completion is kept or has a reason; bad ones (NaN, which is read as no reward, and cut ones) are counted; three shards write the bytes of one"
    rows = [(f"What is {i} + 1?", [completion(f"It is {i + 1}.", 1.), completion("No.", 0.), completion("Oh", math.nan), completion("It i", 1., finish_reason="length"), completion(f"{i + 1}", 1.)]) for i in range(450)]
    path = write(tmp_path / "rows.jsonl", [*rows, ("Nobody answered", [])])
    one, counts, where = chosen(path, "min_reward=1", "on_malformed=drop", name="one")
    made = one["train"]
    assert counts["in"] == counts["out"] + sum(counts["dropped"].values()) and counts["out"] == 450 == len(made)
    lost = counts["completions"]["lost"]
    assert lost == {"reward below min_reward": 450, "no reward": 450, "stopped by length": 450, "others were chosen": 450}
    assert set(made["pass_rate"][:]) == {0.5} and {m[-1]["content"] for m in made["messages"][:]} <= {f"It is {i + 1}." for i in range(450)} | {f"{i + 1}" for i in range(450)}
    check_account(account(made))
    assert as_messages(made)[1]["dropped"] == {}
    _, _, again = chosen(path, "min_reward=1", "shards.number=3", name="three")
    files = [sorted(p for p in f.rglob("*.arrow")) for f in (where, again)]
    assert files[0] and [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


@pytest.mark.parametrize("overrides, message", [
    (["min_reward=2"], "All 3 rows"), (["pass_rate.low=0.2"], "needs min_reward"), (["pass_rate={low: 0.9, high: 0.1}", "min_reward=1"], "no prompt could pass"),
    (["hygiene.min_tokens=9", "hygiene.max_tokens=3"], "no completion could pass"), (["vote.enabled=true", "min_reward=1"], "counts votes|reads no rewards"), (["mode=bets"], "best")])
def test_bad_settings_are_refused(tmp_path, tmp_root, overrides, message):
    path = write(tmp_path / "rows.jsonl", [(f"Q{i}", [completion("A", 1.), completion("B", 0.)]) for i in range(3)])
    with pytest.raises(UserError, match=message): chosen(path, *overrides, name="x")


@pytest.mark.slow
def test_a_killed_stage_writes_the_same(tmp_path, tmp_root):
    "SIGKILL while shards are worked on, then the same command: the rows of an undisturbed run"
    rows = [(f"Say {i}", [completion(" ".join(f"w{i * j + k}" for k in range(60)), float(j % 2)) for j in range(8)]) for i in range(1500)]
    path = write(tmp_path / "rows.jsonl", rows)
    words = ["rejection_sample", f"dataset_args.dataset_name={path}", "min_reward=1", "shards.save_seconds=0"]
    plain = command(*words, "dataset_name=plain")
    assert plain.returncode == 0, plain.stderr
    record, _ = the_run("rejection_sample")
    p = subprocess.Popen([str(BIN / "post-training"), *words, "dataset_name=killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=os.environ)
    end = time.time() + 300
    while p.poll() is None and time.time() < end and not list(tmp_root.rglob("shard*/*")): time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    out = command(*words, "dataset_name=killed")
    assert out.returncode == 0, out.stderr
    other = next(r for r in map(run.read_record, run.all_runs()) if r["id"] != record["id"])
    a, b = (load_splits(r["final"]["output"])["train"].to_list() for r in (record, other))
    assert a == b and len(a) == 1500
