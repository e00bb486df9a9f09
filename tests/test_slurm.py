"Runs on two nodes of a real Slurm: an interrupted run continues and ends with the same weights, a run that cannot work is not retried, and a cancelled run is not restarted."
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import slurm_cluster
from safetensors.torch import load_file

from post_training.core.files import file_sha256
from post_training.config.overrides import quote_value
from post_training.run.record import newest_verified, read_metrics, read_record

pytestmark = pytest.mark.slow
# Two CPU processes under ZeRO-2; on the cluster one on each node. Whatever these values hold has to arrive as it is.
NASTY = "it's a \"b\"; $(touch x) `touch y` \\ *"
SHARED = [
    "cluster.device=cpu", "accelerate_config=ds-zero2", "global_batch_size=8", "training_args.per_device_train_batch_size=2", "training_args.max_length=96",
    "dataset_args.debug_subsample.train=64", "dataset_args.debug_subsample.eval=12", "training_args.max_steps=24", "training_args.save_steps=4",
    "training_args.eval_strategy=no", "evaluation.num_prompts=0",
]
SAVED = [f"checkpoint-{n}" for n in (4, 8, 12, 16, 20)]  # what a run that is cut may go on from, depending on how far it came
ON_SLURM = ["cluster=slurm", "cluster.gpus_per_node=1", "num_nodes=2", "cluster.time=20", "cluster.preflight_seconds=100", "submit=true"]


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    return found


def steps(run_dir):
    return max((r["step"] for r in read_metrics(run_dir)), default=0)


def copy_demo(demo, root):
    "The tiny model and the demo data, without what other tests have made beside them"
    shutil.copytree(demo, root / "artifacts", ignore=shutil.ignore_patterns("outputs", "cache", "tokenized", ".*"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, demo):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    partitions = [f"PartitionName={name} Nodes=n[0-3] Default={default} PriorityTier={tier} MaxTime=60 DefaultTime=10 State=UP" for name, default, tier in (("test", "YES", 1), ("urgent", "NO", 10))]
    preempt = dict(PreemptType="preempt/partition_prio", PreemptMode="REQUEUE")
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=4, cpus=2, partitions=partitions, settings=preempt) as cluster:
        yield cluster


@pytest.fixture
def job(slurm, tmp_path, demo):
    "Submits a training run with the command line; cancels what a failed test leaves"
    copy_demo(demo, tmp_path)

    class Job:
        env = slurm.env | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(tmp_path / "artifacts"))

        def command(self, *overrides, check=True):
            done = subprocess.run(["post-training", *overrides], env=self.env, cwd=tmp_path.parent if check is None else None, capture_output=True, text=True, timeout=120)
            assert not check or done.returncode == 0, done.stdout + done.stderr
            return done

        def submit(self, *overrides, stage="train_sft"):
            self.command(stage, *SHARED, *ON_SLURM, *overrides)
            [record] = (tmp_path / "runs" / stage).rglob("record.json")
            self.run_dir = record.parent
            self.id = self.record["jobs"][-1]["id"]
            return self

        @property
        def record(self):
            return read_record(self.run_dir)

        def at_step(self, n, seconds=240):
            wait_for(lambda: steps(self.run_dir) >= n or slurm.state(self.id) in slurm_cluster.FINISHED, seconds, f"step {n}")
            assert steps(self.run_dir) >= n, self.log()

        def end(self, state, seconds=400):
            assert slurm.wait(self.id, seconds) == state, self.log()
            return self.record

        def log(self):
            parts = [*self.run_dir.glob("slurm-*.out"), *self.run_dir.glob("attempts/*/*.log"), *self.run_dir.glob("attempts/*/*.json")]
            return "\n".join(f"--- {p}\n{p.read_text()[-3000:]}" for p in parts)

        def weights(self):
            return newest_verified(self.record["checkpoints_dir"])[0]

    made = Job()
    yield made
    for known in (made.record.get("jobs") or []) if hasattr(made, "run_dir") else []:
        slurm.run("scancel", known["id"], check=False)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, demo):
    "The same training on this machine without interruption: its metrics and its final weights"
    root = tmp_path_factory.mktemp("uncut")
    copy_demo(demo, root)
    env = os.environ | dict(POST_TRAINING_RUNS_DIR=str(root / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(root / "artifacts"))

    def made(*overrides, stage):
        name = f"uncut-{len(cache)}"
        done = subprocess.run(["post-training", stage, *SHARED, "num_processes=2", f"job_subdir={name}", *overrides], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        [record] = (root / f"runs/{stage}/{name}").rglob("record.json")
        return record.parent, newest_verified(read_record(record.parent)["checkpoints_dir"])[0]

    cache = {}
    def once(*overrides, stage="train_sft"):
        key = stage, *overrides
        if key not in cache: cache[key] = made(*overrides, stage=stage)
        return cache[key]
    return once


def same(job, reference):
    "The same lines and the same weights, bit for bit"
    run_dir, weights = reference
    plain = lambda d: [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in read_metrics(d)]
    assert plain(job.run_dir) == plain(run_dir)
    mine = job.weights()
    assert mine.name == weights.name
    assert load_file(mine / "model.safetensors").keys() == load_file(weights / "model.safetensors").keys()
    assert file_sha256(mine / "model.safetensors") == file_sha256(weights / "model.safetensors")


def test_two_nodes(job, slurm, uncut, tmp_path):
    "Emit, submit, finish; the record, its attempt and its notebook; the metrics and weights of a local run; nothing that was typed is run"
    job.env["POST_TRAINING_FORK_SERVER"] = "off"  # every process of this job is a new one, as on a cluster; those of the other tests are forks
    job.submit(f"wandb.run_name={quote_value(NASTY)}", "job_subdir='a %j b/c'", f"cluster.env.SAID={quote_value(NASTY)}", f"cluster.directives.comment={quote_value(NASTY)}")
    twice = job.command("train_sft", *SHARED, *ON_SLURM, "job_subdir='a %j b/c'", check=False)
    assert twice.returncode == 2 and f"Job {job.id} of run" in twice.stderr
    record = job.end("COMPLETED")
    assert record["status"] == "finished" and record["config"]["wandb"]["run_name"] == NASTY and record["config"]["cluster"]["env"]["SAID"] == NASTY
    [attempt] = record["attempts"]
    assert (attempt["exit"], attempt["job"]["id"], attempt["job"]["num_nodes"], attempt["topology"]["world_size"]) == (0, job.id, 2, 2)
    assert slurm.job(job.id)["Comment"].strip() == NASTY
    script = job.run_dir / "submit.sbatch"
    assert not [p for p in (Path.cwd(), tmp_path, job.run_dir) if (p / "x").exists() or (p / "y").exists()]
    said = [line for line in script.read_text().splitlines() if line.startswith("export SAID=")]
    assert subprocess.run(["bash", "-c", f"{said[0]}; printf %s \"$SAID\""], capture_output=True, text=True).stdout == NASTY
    notebook = json.loads((job.run_dir / "train_sft.ipynb").read_text())
    assert not [c for c in notebook["cells"] if any(o.get("ename") for o in c.get("outputs", []))]
    assert {"stdout.log", "stderr.log", "preflight.log", "train_sft.ipynb"} <= {p.name for p in (job.run_dir / "attempts/1").iterdir()}
    assert job.command("train_sft", *SHARED, *ON_SLURM, "job_subdir='a %j b/c'", f"wandb.run_name={quote_value(NASTY)}").stdout.startswith("done already")
    same(job, uncut())


def test_time_limit(job, slurm, uncut):
    "A job is asked to stop after 30 to 60 s of a longer training: the ranks save and stop, the next attempts finish the run, and its wandb id stays the same"
    long = ("training_args.max_steps=800", "training_args.save_steps=1000", "dataset_args.debug_subsample.train=0", "training_args.num_train_epochs=10")
    job.submit(*long, "cluster.time=2", "cluster.signal_seconds=60", "wandb.mode=offline")
    record = job.end("COMPLETED", seconds=1200)
    exits = [a["exit"] for a in record["attempts"]]
    assert len(exits) > 1 and set(exits[:-1]) == {75} and exits[-1] == 0, job.log()
    assert all(record["resumed_from"][str(a["number"])] for a in record["attempts"][1:])
    ids = {p.name.split("-", 3)[-1].removesuffix(".wandb") for p in job.run_dir.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(ids) == 1
    same(job, uncut(*long))


def test_asked_to_leave(job, slurm, uncut):
    "The same by a file, without requeueing: a successor that waited for the job continues"
    job.submit("cluster.requeue=false", "cluster.directives.comment='kept by the successor'")
    job.at_step(6)
    first, waiting = job.record["jobs"]  # whoever looks knows of the successor
    assert slurm.state(waiting["id"]) == "PENDING" and waiting["after"] == [str(first["id"])]
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    record = job.end("FAILED")  # 75: not finished, and nobody shall take it for that
    assert slurm.job(job.id)["ExitCode"] == "75:0" and record["attempts"][0]["exit"] == 75
    wait_for(lambda: len(job.record["attempts"]) == 2, 60, "the successor")
    job.id = job.record["attempts"][1]["job"]["id"]
    record = job.end("COMPLETED")
    assert "kept by the successor" in slurm.job(job.id)["Comment"]
    same(job, uncut())


def test_preference(job, slurm, uncut):
    "Preference training is asked to stop once: the next attempt reads the computed reference, and ends with the numbers of two local processes"
    job.submit(stage="train_preference")
    job.at_step(6)
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    record = job.end("COMPLETED")
    assert [a["exit"] for a in record["attempts"]] == [75, 0] and slurm.job(job.id)["Restarts"] == "1", job.log()
    assert record["attempts"][1]["job"]["num_nodes"] == 2 and record["resumed_from"]["2"] and record["reference_check"] < 1e-6
    assert record["reference"].startswith("computed by")
    same(job, uncut(stage="train_preference"))


def test_second_job(job, slurm):
    "A script submitted by hand while its run is at work ends, and does not change the other attempt"
    job.submit("training_args.max_steps=400", "training_args.num_train_epochs=100", "training_args.save_steps=400")  # long enough for the second to come
    job.at_step(1)
    second = slurm.submit(job.run_dir / "submit.sbatch", env=job.env)
    assert slurm.wait(second, 120) == "FAILED", job.log()
    log = job.run_dir / f"slurm-{second}.out"
    assert "it is not changed" in log.read_text() and log.stat().st_mode & 0o077 == 0
    assert "exit" not in job.record["attempts"][0] and job.record["status"] == "running" and "stopped" not in job.record
    assert job.end("COMPLETED")["status"] == "finished"


def test_cancelled_while_waiting(job, slurm):
    "What never began is told by whoever asks for jobs"
    job.submit("cluster.directives.hold=true")
    assert slurm.state(job.id) == "PENDING" and "JobHeldUser" in job.command("jobs").stdout
    slurm.run("scancel", job.id)
    job.end("CANCELLED")
    job.command("jobs")
    assert job.record["status"] == "failed" and f"job {job.id} ended as CANCELLED" in job.record["stopped"]


def test_node_failure(job, slurm, uncut):
    job.submit("cluster.nodelist='n[0-1]'")
    job.at_step(9)
    slurm.kill_node(1)
    wait_for(lambda: slurm.state(job.id) == "PENDING", 90, "the requeue")
    slurm.restart_node(1)
    record = job.end("COMPLETED")
    assert [a["exit"] for a in record["attempts"]] in (["killed", 0], [143, 0], [1, 0]), job.log()
    assert record["resumed_from"]["2"] in SAVED
    same(job, uncut())


def test_preemption(job, slurm, uncut):
    "A job with a higher priority takes the nodes; the run continues after it"
    job.submit()
    job.at_step(5)
    slurm.submit("#!/bin/bash\nsleep 3\n", "--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null")
    record = job.end("COMPLETED")
    assert len(record["attempts"]) == 2 and record["attempts"][0]["exit"] != 0 and int(slurm.job(job.id)["Restarts"]) == 1
    assert record["resumed_from"]["2"] in SAVED
    same(job, uncut())


def test_killed_rank(job, slurm, uncut):
    "kill -9 of a rank costs a try; without one left the chain stops and says why"
    job.submit("cluster.max_retries=1")

    def kill_one():
        found = subprocess.run(["pgrep", "-f", f"post_training.train_sft {job.run_dir}/attempts"], capture_output=True, text=True).stdout.split()
        workers = [int(p) for p in found if b"accelerate.commands.launch" not in Path(f"/proc/{p}/cmdline").read_bytes()]
        os.kill(max(workers), signal.SIGKILL)

    job.at_step(6)
    kill_one()
    wait_for(lambda: len(job.record["attempts"]) == 2, 120, "the second try")
    assert job.record["attempts"][0]["then"].startswith("again:")
    wait_for(lambda: "2" in job.record.get("resumed_from", {}), 120, "the second start")
    at = steps(job.run_dir)
    job.at_step(at + 2)
    kill_one()
    record = job.end("FAILED")
    assert len(record["attempts"]) == 2 and "max_retries=1" in record["stopped"], job.log()
    assert slurm.job(job.id)["ExitCode"] == "1:0"
    job.submit("cluster.max_retries=4")  # the same command with more retries continues
    assert job.end("COMPLETED")["status"] == "finished"
    same(job, uncut())


def test_mistake_is_not_tried_again(job, slurm):
    "A learning rate that diverges: told once, with the reason, and the exit code is the mistake's"
    job.submit("training_args.learning_rate=100", "training_args.weight_decay=100", "training_args.warmup_steps=0", "training_args.lr_scheduler_type=constant")
    record = job.end("FAILED")
    assert slurm.job(job.id)["ExitCode"] == "2:0" and slurm.job(job.id)["Restarts"] == "0"
    assert len(record["attempts"]) == 1 and "diverged" in record["stopped"], job.log()
    told = job.command("runs", "show", record["attempts"] and job.run_dir.name).stdout
    assert "diverged" in told


def test_missing_data_is_told_before_training(job, slurm):
    job.submit("dataset=local", "dataset_name=gone", "dataset_args.dataset_name=/nowhere/rows.jsonl")
    record = job.end("FAILED")
    assert slurm.job(job.id)["ExitCode"] == "2:0" and len(record["attempts"]) == 1
    assert "/nowhere/rows.jsonl" in record["stopped"] and not (job.run_dir / "attempts/1/stdout.log").exists()


def test_cancelled(job, slurm, uncut):
    "scancel ends the chain; the same command continues later"
    job.submit()
    job.at_step(6)
    slurm.run("scancel", job.id)
    job.end("CANCELLED")
    time.sleep(8)  # longer than a requeue takes here
    assert slurm.state(job.id) == "CANCELLED" and len(job.record["attempts"]) == 1
    shown = job.command("runs", "show", job.run_dir.name).stdout  # whoever looks makes the record say what the scheduler says
    assert job.record["status"] == "failed" and "failed" in shown.splitlines()[0]
    assert "queued" not in job.command("runs", "list").stdout and "CANCELLED" in job.command("jobs", "--all").stdout
    job.submit()
    record = job.end("COMPLETED")
    assert [a["exit"] for a in record["attempts"]][-1] == 0 and record["resumed_from"]["2"] in SAVED
    same(job, uncut())
