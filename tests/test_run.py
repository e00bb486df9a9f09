"What a run's folder and record withstand: races, kills, signals; each in processes of its own."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from post_training import config
from post_training import run

OPEN = """
import sys, time
from post_training import config, run
from post_training.core.files import UserError
try: a = run.open_run(config.compose("train_sft", ["cluster.device=cpu"]).cfg)
except UserError as e: print("refused", flush=True); sys.exit(2)
print("opened", a.number, flush=True)
time.sleep(float(sys.argv[1]))
"""
# The recipe of these tests: open (or join) the run, then a worker of its own process that says who it is and waits.
RECIPE = [
    "overrides: list = []\nforce: bool = False\nattempt: int = 0",
    "from post_training import config, run\nfrom post_training.launch.accelerate import launch_ranks, run_module\n"
    "task = run.open_run(config.compose('train_sft', overrides).cfg, attempt=attempt, force=force)",
    "{start}",
]
WORKER = """
import json, os, sys, time
from pathlib import Path
import yaml
from post_training import run
cfg = yaml.safe_load(open(sys.argv[1]))
run.join_run(cfg["run_dir"])
Path(cfg["run_dir"], f"pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
time.sleep(120)
"""


def notebook(path, *cells):
    "Write a notebook of code cells, the first tagged as the parameters"
    made = [dict(cell_type="code", id=f"c{i}", metadata={} if i else {"tags": ["parameters"]}, source=c, outputs=[], execution_count=None) for i, c in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A project root of the test's own, where a toy worker can be imported"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = post_training\n")
    (tmp_path / "toy_worker.py").write_text(WORKER)
    monkeypatch.setenv("POST_TRAINING_ROOT", str(tmp_path))
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def start_recipe(checkout, start, *overrides):
    "The command in a process of its own"
    notebook(checkout / "nbs/recipes/train_sft.ipynb", *[c.format(start=start) for c in RECIPE])
    command = [Path(sys.executable).parent / "post-training", "train_sft", "cluster.device=cpu", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(checkout, n, p, seconds=120):
    "The process ids of n workers, once they wait"
    end = time.monotonic() + seconds
    while time.monotonic() < end and p.poll() is None:
        found = [f for f in checkout.glob("runs/*/*/*/pid*") if f.read_text()]
        if len(found) == n:
            return [int(f.read_text()) for f in found]
        time.sleep(0.1)
    p.kill()
    raise AssertionError(f"no {n} workers came: {p.communicate()[0]}")


def gone(pids, seconds=30):
    "Whether processes end within some seconds"
    return not psutil.wait_procs([psutil.Process(i) for i in pids if psutil.pid_exists(i)], timeout=seconds)[1]


def test_two_attempts_at_once_are_refused(checkout):
    "Of four that open the same run at the same time one gets it; when it is killed the next one does, and says so of the first"
    four = [subprocess.Popen([sys.executable, "-c", OPEN, "60"], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [p.stdout.readline().strip() for p in four]
    try:
        assert sorted(said) == ["opened 1", "refused", "refused", "refused"]
        four[said.index("opened 1")].kill()
        for p in four:
            p.wait()
        out = subprocess.run([sys.executable, "-c", OPEN, "0"], capture_output=True, text=True).stdout
        assert out.strip() == "opened 2"
        [folder] = (checkout / "runs/train_sft/default").iterdir()
        first, second = run.read_record(folder)["attempts"]
        assert first["exit"] == "killed" and second["exit"] == 130  # the second left without a word
        assert json.loads((folder / "attempts/1/exit.json").read_text())["exit"] == "killed"
    finally:
        for p in four:
            p.kill()


def test_a_disk_that_failed_is_quiet_at_exit(checkout):
    "A process whose record cannot be written leaves without a traceback"
    p = subprocess.Popen([sys.executable, "-c", OPEN, "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == "opened 1"
    [folder] = (checkout / "runs/train_sft/default").iterdir()
    (folder / ".record.lock").unlink()
    (folder / ".record.lock").mkdir()  # to write the record is an OSError now, as on a disk that is read-only
    assert p.wait(30) == 0 and p.stderr.read() == ""


def test_a_killed_recipe_takes_its_worker_along(checkout):
    "kill -9 of the command: the kernel and the worker below it end, the lock is free, the attempt is known as killed"
    p = start_recipe(checkout, "run_module('toy_worker', [task.config_path], task.attempt_dir, env=dict(POST_TRAINING_ATTEMPT=str(task.number)))")
    pids = workers(checkout, 1, p)
    below = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    [folder] = (checkout / "runs/train_sft/default").iterdir()
    assert pids[0] in below and run.run_status(folder) == "running"
    assert run.locate_run(config.compose("train_sft", ["cluster.device=cpu"])).why.startswith("attempt 1 is at work now")
    p.kill()
    p.wait()
    assert gone(below)
    assert run.run_status(folder) == "killed"
    saved = json.loads((folder / "attempts/1/train_sft.ipynb").read_text())  # the last saved state is whole
    assert len(saved["cells"]) == 4 and not (folder / "train_sft.ipynb").exists()


def test_a_terminated_recipe_cleans_up(checkout):
    "SIGTERM of the command: everything below ends, and the attempt has an exit"
    p = start_recipe(checkout, "run_module('toy_worker', [task.config_path], task.attempt_dir)")
    workers(checkout, 1, p)
    below = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 143
    assert gone(below)
    [folder] = (checkout / "runs/train_sft/default").iterdir()
    assert run.read_record(folder)["attempts"][0]["exit"] == 143 and run.run_status(folder) == "failed"


@pytest.mark.slow
def test_a_killed_recipe_takes_two_ranks_along(checkout):
    "The same through accelerate's launcher, whose ranks are in sessions of their own"
    p = start_recipe(checkout, "launch_ranks('toy_worker', task)", "accelerate_config=ddp")
    pids = workers(checkout, 2, p)
    below = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    assert set(pids) <= set(below)
    p.kill()
    p.wait()
    assert gone(below)


def test_a_second_checkout_agrees_and_does_not_share(tmp_path, monkeypatch):
    "Two checkouts with one artifacts folder: the same hash, records of their own, checkpoints of their own"
    monkeypatch.delenv("POST_TRAINING_RUNS_DIR", raising=False)
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_path / "shared"))
    opened = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.ini").write_text("lib_name = post_training\n")
        monkeypatch.setenv("POST_TRAINING_ROOT", str(tmp_path / name))
        opened.append(run.open_run(config.compose("train_sft", ["cluster.device=cpu"]).cfg))
        run.close_attempt(opened[-1].run_dir, 1, 1)
    a, b = opened
    assert a.hash == b.hash and a.run_dir != b.run_dir
    assert [x.checkpoints_dir.name for x in opened] == ["g1", "g2"] and a.checkpoints_dir.parent == b.checkpoints_dir.parent
    # moved artifacts are found again by the id of the run
    os.rename(tmp_path / "shared", tmp_path / "moved")
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_path / "moved"))
    cfg = config.compose("train_sft", ["cluster.device=cpu"]).cfg
    assert run.locate_run(cfg).checkpoints_dir == tmp_path / "moved" / Path(b.checkpoints_dir).relative_to(tmp_path / "shared")
