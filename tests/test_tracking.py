"What the real wandb client writes offline, read back from its own file."
import glob
import json
import os
import socket
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from post_training import run
from post_training.core.files import UserError, write_atomic
from post_training.run import tracking

CODE = """
import os, sys, time
from post_training import run
from post_training.run import tracking
folder, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
run.truncate_metrics(folder, first - 1)
import json
more = json.loads(sys.argv[5])
wait = more.pop("wait", 0)
t = tracking.Tracker(folder, dict(project="demo", run_name="a run", tags=["x"]) | more, dict(learning_rate=1e-3, hub_token="hf_abcdefghijklmnopqrst")).start()
for i in range(first, last + 1):
    run.append_metrics(folder, dict(step=i, loss=1/i))
    if i % 2 == 0: run.append_metrics(folder, dict(step=i, eval_loss=2/i))
    t.sync()
    print("step", i, flush=True)
time.sleep(wait)
if end.startswith("kill"): time.sleep(float(end[4:])); os.kill(os.getpid(), 9)
t.finish()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A run folder, a home of its own, and no credentials"
    for name in [k for k in os.environ if k.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SOME_API_KEY", "sk-abcdefghijklmnop1234")
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    run.update_record(tmp_path / "run", id="tiny-demo-01234567-abcdef")
    return tmp_path / "run"


def log(folder, first, last, end="finish", **wandb):
    "Log steps first to last in a process of its own"
    p = subprocess.run([sys.executable, "-c", CODE, folder, str(first), str(last), end, json.dumps(wandb)], capture_output=True, text=True, timeout=120)
    assert p.returncode == (-9 if end.startswith("kill") else 0), p.stderr
    return p


def kept(folder):
    "What wandb's files hold, in the order they were begun; a process that was killed at once leaves an empty one"
    files = [tracking.read_offline(p) for p in sorted(glob.glob(f"{folder}/wandb/offline-run-*/*.wandb"), key=os.path.dirname)]
    return [f for f in files if f["id"]]


@pytest.mark.parametrize("end", ["kill0", "kill4"])
def test_killed_and_resumed(folder, end):
    """Offline without an account; killed after step 5, resumed from step 3: one id, each line once, and metrics.jsonl has the same;
    also where wandb had not written yet what it was told"""
    log(folder, 1, 5, end)
    log(folder, 4, 8)
    files = kept(folder)
    assert {f["id"] for f in files} == {"tiny-demo-01234567-abcdef"}
    history = [row for f in files for row in f["history"]]
    assert history == run.read_metrics(folder)
    assert [r["step"] for r in history if "loss" in r] == list(range(1, 9))
    assert files[-1]["config"] == {**files[-1]["config"], "learning_rate": 1e-3, "hub_token": "[redacted]"}


def test_nothing_is_told_and_nothing_is_left(folder):
    "No host name, path, commit, command or secret in what would be sent; no file outside the run folder"
    log(folder, 1, 2)
    files = [Path(p) for pattern in ("*.wandb", "files/**") for p in glob.glob(f"{folder}/wandb/offline-run-*/{pattern}", recursive=True)]
    data = b"".join(p.read_bytes() for p in files if p.is_file())
    host = socket.gethostname()
    secrets = [str(folder), os.getcwd(), "sk-abcdefghij", "hf_abcdefghij", *([host] if len(host) > 4 and host != "localhost" else []), *filter(None, [run.git_state()["commit"]])]
    assert [s for s in secrets if s.encode() in data] == []
    assert [p for p in files if p.suffix in (".py", ".patch", ".txt")] == []
    assert [p for p in (folder.parent / "home").rglob("*") if p.is_file()] == []


def test_an_id_of_ones_own_and_the_curves_of_the_machine(folder):
    "wandb.run_id is the run's id, also when it is resumed; processor and memory are logged, the output only if it is asked for"
    log(folder, 1, 2, run_id="mine-7", mode="offline", wait=6)
    log(folder, 3, 4, run_id="mine-7", console=True)
    first, second = kept(folder)
    assert {first["id"], second["id"]} == {"mine-7"}
    assert any("cpu" in k for k in first["system"]) and any("memory" in k for k in first["system"]), first["system"]
    assert not first["output"] and "step 4" in "".join(second["output"])
    assert [r["step"] for f in (first, second) for r in f["history"] if "loss" in r] == [1, 2, 3, 4]


def test_the_curves_are_left_out(folder):
    log(folder, 1, 2, system_metrics=False, wait=6)
    assert kept(folder)[0]["system"] == []


def test_a_configured_mode_wins(folder, monkeypatch):
    "WANDB_MODE=disabled in the environment and wandb.mode=offline in the config: the run is kept offline, and composing says so"
    from post_training.config.compose import compose
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log(folder, 1, 2, mode="offline")
    assert len(kept(folder)) == 1
    notices = compose("train_sft", ["wandb.mode=offline"]).notices
    assert "wandb.mode=offline is taken, though the environment says disabled." in notices
    assert not [n for n in compose("train_sft", ["wandb.mode=off"]).notices if "environment" in n]


def test_disabled_writes_nothing(folder, monkeypatch):
    "WANDB_MODE=disabled: the metrics are there, wandb is not"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log(folder, 1, 3)
    assert len(run.read_metrics(folder)) == 4 and not (folder / "wandb").exists()


def test_sending_needs_credentials(folder):
    "post-training wandb-sync without an account says what to do"
    write_atomic(folder / "config.yaml", "wandb: {}\n")
    with pytest.raises(UserError, match="wandb login"):
        tracking.wandb_sync([folder])


FOLLOW = """
import os, sys
from post_training.run import trackers
from post_training.run.record import append_metrics
folder, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
followers = [trackers.Follower(name, folder, dict(wandb=dict(project="demo"), hub_token="hf_abcdefghijklmnopqrst")) for name in trackers.WRITERS]
for i in range(first, last + 1):
    append_metrics(folder, dict(step=i, loss=2.0**-i))
    for f in followers: f.sync()
if end == "kill": os.kill(os.getpid(), 9)
for f in followers: f.finish()
"""


def test_other_trackers_after_a_kill(folder, tmp_path, monkeypatch, capsys):
    "TensorBoard and trackio hold exactly the lines of metrics.jsonl after a kill and a resume; one that fails says so and costs nothing else"
    from post_training.run import trackers
    from post_training.run.record import append_metrics, truncate_metrics
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first, last, end in ((1, 5, "kill"), (4, 8, "finish")):
        p = subprocess.run([sys.executable, "-c", FOLLOW, folder, str(first), str(last), end], capture_output=True, text=True, timeout=120)
        assert p.returncode == (-9 if end == "kill" else 0), p.stderr
        if end == "kill": truncate_metrics(folder, 3)
    lines = [("loss", i, 2.0**-i) for i in range(1, 9)]
    assert trackers.read_tensorboard(folder) == lines
    read = subprocess.run([sys.executable, "-c", "from post_training.run.trackers import *; print(read_trackio('demo', 'tiny-demo-01234567-abcdef'))"],
                          capture_output=True, text=True)
    assert eval(read.stdout) == lines, read.stderr
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"hf_abcdefgh" in f.read_bytes()]
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("a file in the way")
    broken = trackers.Follower("tensorboard", folder, {})
    append_metrics(folder, dict(step=9, loss=1.))
    broken.sync()
    broken.finish()
    assert capsys.readouterr().err.count("the tracker tensorboard stopped") == 1
