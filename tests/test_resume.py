"Exact resume: a run that is killed at any instant and started again ends as if it had never been interrupted, bit for bit"
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from post_training import run
from post_training.core.files import verify_manifest

STEPS = 14
CONFIG = ["dataset_args.debug_subsample.train=40", "dataset_args.debug_subsample.eval=12", "cluster.device=cpu", "global_batch_size=8", "training_args.max_length=96",
          "training_args.per_device_train_batch_size=2", f"training_args.max_steps={STEPS}", "training_args.save_steps=3",
          "training_args.logging_steps=2", "training_args.save_total_limit=2", "training_args.optim=ademamix"]
SFT = [*CONFIG, "training_args.eval_steps=4", "trainer=ln-plw", "plw_args.prompt_loss_weight=0.1"]
LAUNCH = """import sys
from post_training import config, run
from post_training.launch.accelerate import launch_ranks
c = config.compose("train_sft", sys.argv[1:])
task = run.open_run(c.cfg, origins=c.origins, overrides=sys.argv[1:])
launch_ranks("post_training.train_sft", task)
run.close_attempt(task.run_dir, task.number, 0)
"""
COMMANDS = {"single": [sys.executable, "-m", "post_training.train_sft", *SFT],
            "ddp": [sys.executable, "-c", LAUNCH, *SFT, "accelerate_config=ddp", "num_processes=2"],
            "ds-zero2": [sys.executable, "-c", LAUNCH, *SFT, "accelerate_config=ds-zero2", "num_processes=2"],
            "pairs": [sys.executable, "-m", "post_training.train_preference", *CONFIG, "preference=tiny"]}


class Place:
    "Runs and checkpoints of one run, below a folder of its own; models and data are shared"

    def __init__(self, folder, demo):
        self.folder, self.env = folder, os.environ | dict(POST_TRAINING_RUNS_DIR=str(folder / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(folder / "artifacts"),
                                                          WANDB_MODE="disabled", OMP_NUM_THREADS="1")
        for name in ("models", "datasets"): shutil.copytree(demo / name, folder / "artifacts" / name)

    @property
    def run_dir(self): return next((p.parent for p in (self.folder / "runs").rglob("record.json")), None)

    @property
    def checkpoints(self): return Path(run.read_record(self.run_dir)["checkpoints_dir"])

    def start(self, how):
        log = open(self.folder / "log.txt", "a")
        return subprocess.Popen(COMMANDS[how], env=self.env, stdout=log, stderr=log, start_new_session=True)

    def finish(self, how):
        p = self.start(how)
        assert p.wait(timeout=900) == 0, (self.folder / "log.txt").read_text()[-4000:]

    def lines(self): return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in run.read_metrics(self.run_dir)] if self.run_dir else []

    def kill_when(self, how, ready):
        "Start, and kill everything at once when `ready()` first holds; False where the run ended before"
        p = self.start(how)
        while p.poll() is None and not ready(): time.sleep(0.001)
        if p.poll() is not None: return False
        try: os.killpg(p.pid, signal.SIGKILL)  # the ranks of a launcher have a session of their own and die with their parent
        except ProcessLookupError: pass
        p.wait()
        while self.run_dir and run.is_live(self.run_dir): time.sleep(0.05)
        return True


def after_lines(place, n):
    "Whether `n` more lines than now have been logged"
    before = len(place.lines())
    return lambda: len(place.lines()) >= before + n


def during_a_save(place, step):
    "Whether a checkpoint at or after `step` is being written"
    def ready():
        try: tmp = [p for p in (place.folder / "artifacts").rglob(".tmp-checkpoint-*") if int(p.name.split("-")[-1]) >= step]
        except FileNotFoundError: return False  # another temporary folder went away under the walk
        return bool(tmp and list(tmp[0].iterdir()))
    return ready


def assert_same(a, b):
    "The same lines in metrics.jsonl, and the same bytes in the last checkpoint"
    assert a.lines() == b.lines()
    steps = [line["step"] for line in b.lines() if "loss" in line]
    assert steps == sorted(set(steps)), "each step is logged once"
    last = f"checkpoint-{STEPS}"
    manifests = [json.loads((p.checkpoints / last / "manifest.json").read_text()) for p in (a, b)]
    assert not verify_manifest(b.checkpoints / last)
    differ = [n for n in manifests[0]["files"] if manifests[0]["files"][n]["sha256"] != manifests[1]["files"].get(n, {}).get("sha256")]
    assert not differ, differ
    assert set(manifests[0]["files"]) == set(manifests[1]["files"])
    assert run.read_record(b.run_dir)["status"] == "finished"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo):
    "The run that was never interrupted"
    place = Place(tmp_path_factory.mktemp("whole"), demo)
    place.finish("single")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_instants(tmp_path, demo, whole, seed):
    rng, cut = random.Random(seed), Place(tmp_path / "cut", demo)
    killed = [cut.kill_when("single", after_lines(cut, rng.randint(1, 2))), cut.kill_when("single", during_a_save(cut, 3 + 3 * seed)),
              cut.kill_when("single", after_lines(cut, rng.randint(1, 3)))]
    assert sum(killed) >= 2, "the run ended before it could be killed"
    cut.finish("single")
    assert_same(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("room", [2_000_000, 5_000_000], ids=["weights", "optimizer"])
def test_a_save_that_finds_no_room(tmp_path, demo, whole, room):
    "The disk takes no more in the middle of a save: the message says so, older checkpoints stay, and with room again the run ends as ever"
    cut = Place(tmp_path / "cut", demo)
    assert cut.kill_when("single", during_a_save(cut, 6))
    cut.env["POST_TRAINING_FORK_SERVER"] = "off"  # the limit is for the process that is started here
    log, p = cut.folder / "log.txt", cut.start("single")
    while p.poll() is None and log.read_text().count("rehearsal:") < 2: time.sleep(0.001)  # a rehearsal would notice the limit
    for process in (psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    assert p.wait(timeout=600) == 2
    said = log.read_text()
    assert "checkpoint-6 could not be written" in said and "Older checkpoints are untouched" in said and "Traceback" not in said
    assert json.loads((cut.run_dir / "attempts/2/error.json").read_text())["kind"] == "user"
    assert sorted(p.name for p in cut.checkpoints.iterdir()) == ["checkpoint-3", "owner"] and not verify_manifest(cut.checkpoints / "checkpoint-3")
    cut.finish("single")
    assert_same(whole, cut)


@pytest.mark.slow
def test_fewer_processes_after_a_kill(tmp_path, demo, whole):
    "Two processes are killed, one goes on: the same rows in the same steps, and the same losses up to rounding"
    cut = Place(tmp_path / "cut", demo)
    assert cut.kill_when("ddp", during_a_save(cut, 6))
    cut.finish("single")
    a, b = whole.lines(), cut.lines()
    assert [(x["step"], x.get("rows"), x.get("tokens"), x.get("total_trained_tokens")) for x in a] == [(x["step"], x.get("rows"), x.get("tokens"), x.get("total_trained_tokens")) for x in b]
    for x, y in zip(a, b):
        for k in ("loss", "eval_loss", "grad_norm"):
            if k in x: assert y[k] == pytest.approx(x[k], rel=2e-3)


@pytest.mark.slow
def test_two_processes_zero2_killed(tmp_path, demo):
    whole, cut = Place(tmp_path / "whole", demo), Place(tmp_path / "cut", demo)
    whole.finish("ds-zero2")
    assert cut.kill_when("ds-zero2", during_a_save(cut, 6))
    assert cut.kill_when("ds-zero2", after_lines(cut, 2))
    cut.finish("ds-zero2")
    assert_same(whole, cut)


@pytest.mark.slow
def test_preference_killed(tmp_path, demo):
    "Killed between steps and in a save: the reference is not computed again, and the run ends as if it had never been cut"
    whole, cut = Place(tmp_path / "whole", demo), Place(tmp_path / "cut", demo)
    whole.finish("pairs")
    assert cut.kill_when("pairs", after_lines(cut, 1))
    reference = cut.checkpoints / "reference-train.npz"
    written = reference.stat().st_mtime_ns
    assert cut.kill_when("pairs", during_a_save(cut, 6))
    cut.finish("pairs")
    assert_same(whole, cut)
    assert reference.stat().st_mtime_ns == written and reference.read_bytes() == (whole.checkpoints / "reference-train.npz").read_bytes()
