"Plans of several stages, the jobs of runs, and the room that checkpoints take: what is refused, what is printed, and the same on a real Slurm"
import json
import os
import pty
import subprocess
import sys
import time

import pytest
import slurm_cluster
from conftest import BIN

from post_training import cli
from post_training import config
from post_training import run
from post_training.core.files import UserError, write_manifest
from post_training.launch import plan
from post_training.launch import runs as launch_runs

CPU = ["cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=1", "cluster.time=10"]
SMALL = ["training_args.max_steps=3", "training_args.max_length=96", "dataset_args.debug_subsample.train=64", "dataset_args.debug_subsample.eval=12", "evaluation.num_prompts=0"]
OK = "name: p\nstages:\n  - {name: rows, stage: dataset_mixture}\n  - {name: train, stage: train_sft}\n"


def command(*words, **env):
    return subprocess.run([str(BIN / "post-training"), *map(str, words)], capture_output=True, text=True, env={**os.environ, **env}, timeout=600, stdin=subprocess.DEVNULL)


# -- plans

@pytest.mark.parametrize("text, says", [
    ("- rows\n- train\n", "contains no keys"),
    ("name: p\nstages: [\n", "line 3: did not find expected node content"),
    ("name: p\n", "has no stages"),
    ("name: p\nstages: []\n", "has no stages"),
    ("name: a/b\nstages: [{name: a, stage: tokenize}]\n", "the name 'a/b'"),
    (OK + "stage: []\n", "unknown key stage. Did you mean 'stages'?"),
    (OK.replace("stage: train_sft", "stage: train_stf"), "stage train: There is no stage train_stf. Did you mean 'train_sft'?"),
    (OK.replace("stage: train_sft", "stage: train_sft, aftar: [rows]"), "stage train: unknown key aftar. Did you mean 'after'?"),
    (OK.replace("stage: train_sft", "stage: train_sft, after: [row]"), "train waits for row, which is not a stage of this plan. Did you mean 'rows'?"),
    (OK.replace("stage: dataset_mixture", "stage: dataset_mixture, after: [train]"), "rows, train wait for each other in a circle"),
    (OK.replace("name: train", "name: rows"), "rows is the name of 2 stages"),
    (OK.replace("name: train,", "name: 1st,"), "stage 1st: a name is letters"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: {seed: 1}"), "stage train: overrides is a list of texts"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: [{seed: 1}]"), "is not an override"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: [model=tinny]"), "stage train: There is no preset model=tinny. Did you mean 'tiny'"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: [training_args.max_step=1]"), "stage train: Unknown key training_args.max_step."),
    (OK.replace("stage: train_sft", "stage: train_sft, each: []"), "stage train: each is a list with the overrides of each run"),
    (OK.replace("stage: train_sft", "stage: train_sft, each: [training_args.seed=1]"), "stage train: each[0] is a list of texts"),
    (OK.replace("stage: train_sft", "stage: train_sft, each: [[], []]"), "stages train and train are the same run"),
    (OK.replace("stage: train_sft", 'stage: train_sft, overrides: ["resume_from={row.run}"]'), "does not come after a stage row. Did you mean 'rows'?"),
    (OK.replace("stage: train_sft", 'stage: train_sft, overrides: ["resume_from={rows.folder}"]'), "there are {rows.run} and {rows.data}"),
    (OK.replace("stage: train_sft", 'stage: train_sft, overrides: ["resume_from={rows.1.run}"]'), "rows has 1 run, the first is 0"),
    (OK.replace("stage: dataset_mixture", "stage: dataset_mixture, each: [[seed=1], [seed=2]]").replace("stage: train_sft", 'stage: train_sft, overrides: ["resume_from={rows.run}"]'),
     "rows is an array of 2 runs. Choose one: {rows.0.run} to {rows.1.run}"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: [cluster=slurm, cluster.device=cpu, cluster.gpus_per_node=1]"), "rows is local and train is slurm"),
    (OK.replace("stage: train_sft", "stage: train_sft, overrides: [submit=false]"), "submit=false is not allowed"),
])
def test_mistakes_in_a_plan(text, says, tmp_root):
    "Each names the file, the stage and what to do, and nothing is written"
    path = tmp_root / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e: plan.load_plan(str(path))
    assert says in str(e.value) and "p.yaml" in str(e.value), str(e.value)
    assert os.listdir(tmp_root) == ["p.yaml"]


def test_mistakes_of_a_whole_plan_on_the_cluster(tmp_root, capsys):
    path = tmp_root / "p.yaml"
    path.write_text(OK)
    assert cli.main(["plan", str(path), *CPU, "cluster.requeue=false"]) == 2
    assert "train would wait for rows, which has cluster.requeue=false" in capsys.readouterr().err
    path.write_text(OK.replace("stage: train_sft", "stage: train_sft, each: [[cluster.time=10, seed=1], [cluster.time=20]]".replace("seed", "training_args.seed")))
    assert cli.main(["plan", str(path), *CPU[:-1]]) == 2
    assert "the runs of an array must have the same nodes" in capsys.readouterr().err
    assert cli.main(["plan", str(path.with_name("q.yaml"))]) == 2
    assert "There is no plan" in capsys.readouterr().err and os.listdir(tmp_root) == ["p.yaml"]


@pytest.mark.parametrize("path", sorted((config.CONFIGS / "plan").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("where", [["cluster.device=cpu"], CPU], ids=["local", "slurm"])
def test_shipped_plans_compose(path, where, tmp_root, capsys):
    "And are no stage, and no group of presets"
    if where is not CPU and path.stem == "preference-apertus-8b":  # its server is started by a job
        assert cli.main(["plan", path.stem, "--dry-run", *where]) == 2
        assert "stage completions: backend=server needs a server: set server.url" in capsys.readouterr().err
        return
    assert cli.main(["plan", path.stem, "--dry-run", *where]) == 0
    out = capsys.readouterr().out
    stages = plan.read_plan(path)[1]
    assert all(f"\n{s.name}\n  " in out for s in stages) and os.listdir(tmp_root) == []
    assert ("node-hours at most" in out) == (where is CPU)
    assert "plan" not in config.stage_names() and path.stem not in config.stage_names()


@pytest.mark.slow
def test_three_stages_on_this_machine(demo, tmp_root, monkeypatch):
    "Rows, their tokens, a model of them; the same command again finds all of it done"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    path = tmp_root / "p.yaml"
    path.write_text(f"""
name: small
overrides: [artifacts_subdir={tmp_root.name}, job_subdir=small]
stages:
  - name: rows
    stage: dataset_mixture
  - name: tokens
    stage: tokenize
    overrides: &train ["dataset=demo-mixture", "dataset_args.dataset_name={{rows.data}}", {", ".join(SMALL)}, cluster.device=cpu]
  - {{name: train, stage: train_sft, overrides: *train}}
""")
    begin = time.monotonic()
    done = command("plan", path)
    assert done.returncode == 0, done.stdout + done.stderr
    by = {p.parent.parent.name: run.read_record(p) for p in run.all_runs()}
    assert list(by) == ["dataset_mixture", "tokenize", "train_sft"] and all(r["status"] == "finished" for r in by.values())
    assert by["train_sft"]["parents"][0]["hash"] == by["dataset_mixture"]["hash"]
    print(f"three stages in {time.monotonic() - begin:.0f} s")
    again = command("plan", path)
    assert again.returncode == 0 and "all done" in again.stdout and again.stdout.count("done already") == 3, again.stdout + again.stderr
    assert [len(run.read_record(p)["attempts"]) for p in run.all_runs()] == [1, 1, 1]


def test_a_failing_stage_ends_a_plan_here(tmp_root):
    path = tmp_root / "p.yaml"
    path.write_text("name: p\nstages:\n  - {name: rows, stage: dataset_split, overrides: [dataset_args.dataset_name=nothing.jsonl]}\n  - {name: train, stage: train_sft}\n")
    done = command("plan", path, "cluster.device=cpu")
    assert done.returncode == 2 and "error: stage rows of p failed: " in done.stderr and "Not started: train." in done.stderr, done.stdout + done.stderr
    assert not (tmp_root / "runs/train_sft").exists()


# -- room

def trained(name, status="finished", steps=(1, 2, 3), best=None, files=1, **more):
    "A run whose checkpoints are folders of small files"
    task = run.open_run(config.compose("train_sft", [f"job_subdir={name}"]).cfg)
    for s in steps:
        (folder := task.checkpoints_dir / f"checkpoint-{s}").mkdir()
        for i in range(files): (folder / f"w{i}").write_bytes(b"w" * 1000)
        write_manifest(folder, step=s)
    if status == "finished": run.update_record(task.run_dir, status="finished", final=dict(checkpoint=f"checkpoint-{steps[-1]}") | (dict(best=dict(checkpoint=best)) if best else {}))
    if more: run.update_record(task.run_dir, **more)
    run.close_attempt(task.run_dir, task.number, 0 if status == "finished" else 1)
    return task.run_dir, task.checkpoints_dir


def left(folder): return sorted(p.name for p in folder.iterdir() if p.name != "owner")


def test_gc_keeps_what_a_run_made(tmp_root, capsys):
    "Nothing goes without an answer; then only what was saved on the way"
    run_dir, folder = trained("a", best="checkpoint-2", steps=(1, 2, 3, 4))
    (run_dir / "train_sft.ipynb").write_text("{}")
    for step in (1, 2, 3, 4): run.append_metrics(run_dir, dict(step=step, loss=1.0))
    done = command("runs", "gc", run_dir)
    assert done.returncode == 2 and "no terminal to ask" in done.stderr and "2 of 4 folders will be deleted" in done.stdout, done.stdout + done.stderr
    assert left(folder) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)] and "freed" not in run.read_record(run_dir)
    assert cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0
    assert left(folder) == ["checkpoint-2", "checkpoint-4"] and run.is_done(run_dir)
    freed = run.read_record(run_dir)["freed"]
    assert [(f["what"], f["done"]) for f in freed] == [(["checkpoint-1", "checkpoint-3"], True)] and freed[0]["bytes"] > 2000
    assert (run_dir / "train_sft.ipynb").exists() and run.read_metrics(run_dir)
    capsys.readouterr()
    assert cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0 and "nothing to free" in capsys.readouterr().out
    assert cli.main(["runs", "show", str(run_dir)]) == 0 and "checkpoint-1, checkpoint-3" in capsys.readouterr().out
    assert cli.main(["runs", "verify", str(run_dir)]) == 0


@pytest.mark.parametrize("answer, stays", [("n", True), ("", True), ("y", False)])
def test_gc_asks_at_a_terminal(answer, stays, tmp_root):
    run_dir, folder = trained("a")
    outside, inside = pty.openpty()
    child = subprocess.Popen([str(BIN / "post-training"), "runs", "gc", str(run_dir)], stdin=inside, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(outside, answer.encode() + b"\n")
    out, err = child.communicate(timeout=60)
    os.close(outside), os.close(inside)
    assert child.returncode == 0 and "Delete? [y/N]" in out, out + err
    assert ("checkpoint-1" in left(folder)) == stays


def test_gc_of_failed_runs_parents_and_earlier_generations(tmp_root, capsys):
    good, kept = trained("good")
    bad, gone = trained("bad", "failed")
    trained("child", steps=(1,), parents=[dict(run=run.read_record(bad)["id"], hash="x", checkpoint="checkpoint-2")])
    trained("other", steps=(1,), config=dict(resume_from=str(kept / "checkpoint-1")))
    again = run.open_run(config.compose("train_sft", ["job_subdir=bad"]).cfg, force=True)  # another generation, with nothing in it
    with pytest.raises(UserError, match="at work now"): launch_runs.gc_checkpoints([str(bad)])
    run.close_attempt(bad, again.number, 1)
    (gone / ".tmp-checkpoint-9").mkdir()
    assert cli.main(["runs", "gc", "--failed", "--yes"]) == 0
    assert left(gone) == ["checkpoint-2"] and "stays: needed by" in capsys.readouterr().out
    assert run.read_record(bad)["earlier"][0]["freed"][0]["what"] == [".tmp-checkpoint-9", "checkpoint-1", "checkpoint-3"]
    assert left(kept) == [f"checkpoint-{i}" for i in (1, 2, 3)]  # a finished one is named, or stays
    assert cli.main(["runs", "gc", str(good), "--yes"]) == 0 and left(kept) == ["checkpoint-1", "checkpoint-3"]


def test_gc_touches_only_its_own(tmp_root, capsys):
    "Another's folder, links inside, and a link that leads out of the artifacts"
    run_dir, folder = trained("a", "failed")
    outside = tmp_root / "elsewhere"
    (folder / "checkpoint-2").rename(outside)
    (folder / "checkpoint-2").symlink_to(outside)
    (folder / "checkpoint-1" / "data").symlink_to(tmp_root)
    (tmp_root / "precious").write_text("x")
    owner = (folder / "owner").read_text()
    (folder / "owner").write_text("somebody-else\n")
    assert cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "names somebody-else" in out and "nothing to free" in out and len(left(folder)) == 3
    (folder / "owner").write_text(owner)
    assert cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0
    assert left(folder) == ["checkpoint-2"] and (outside / "w0").exists() and (tmp_root / "precious").exists()
    other, its = trained("b", "failed")
    moved = tmp_root / "moved"
    its.rename(moved)
    its.symlink_to(moved)
    capsys.readouterr()
    assert cli.main(["runs", "gc", str(other), "--yes"]) == 0
    assert "outside the artifacts" in capsys.readouterr().out and "checkpoint-1" in left(moved)


def test_gc_killed_in_the_middle(tmp_root):
    "What is half deleted is no checkpoint any more, the record says what went, and the next one clears up"
    run_dir, folder = trained("a", "failed", files=20)
    code = f"""
import os, signal
from post_training.launch import runs
n, unlink = 0, os.unlink
def counted(*args, **kwargs):
    global n
    n += 1
    if n == 30: os.kill(os.getpid(), signal.SIGKILL)
    return unlink(*args, **kwargs)
os.unlink = counted
runs.delete_checkpoints(runs.gc_checkpoints([{str(run_dir)!r}])[0])"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert left(folder) == [".freed-checkpoint-2", "checkpoint-3"] and run.newest_verified(folder)[0].name == "checkpoint-3"
    assert len(list((folder / ".freed-checkpoint-2").iterdir())) < 21
    assert run.read_record(run_dir)["freed"][0]["done"] is False and not run.is_live(run_dir)
    assert cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0 and left(folder) == []


def test_a_run_that_was_freed_begins_anew_only_when_told(tmp_root):
    run_dir, folder = trained("a")
    assert cli.main(["runs", "gc", str(run_dir), "--all-checkpoints", "--yes"]) == 0 and left(folder) == []
    cfg = config.compose("train_sft", ["job_subdir=a"]).cfg
    with pytest.raises(UserError, match="were freed.*--force"): run.open_run(cfg)
    run.queue_run(cfg, force=True)  # made for a scheduler, with nothing to free
    assert run.run_status(run_dir) == "ready" and cli.main(["runs", "gc", str(run_dir), "--yes"]) == 0
    task = run.open_run(cfg, force=True)
    assert task.status == "new" and task.checkpoints_dir != folder
    run.close_attempt(task.run_dir, task.number, 1)


def test_jobs_without_a_scheduler(tmp_root, monkeypatch, capsys):
    "The records are told, and that they are all there is; a control sequence in a log does nothing"
    assert cli.main(["jobs"]) == 0 and "no job of these runs waits or runs" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_root))
    job = dict(id=12, task=None, script=None, submitted="2026-01-02T03:04:05+00:00", after=["11"])
    waiting = run.queue_run(config.compose("train_sft", ["job_subdir=waiting"]).cfg).run_dir
    failed, _ = trained("failed", "failed", steps=(), jobs=[job | dict(id=11, after=[])], stopped="a mistake that would come again: no such dataset")
    unsent, _ = trained("unsent", steps=(1,))
    run.update_record(waiting, jobs=[job])
    (failed / "slurm-11.out").write_text("begins\n\x1b[2Jhf_" + "a" * 30 + "\nno such dataset\n")
    assert cli.main(["jobs"]) == 0
    out = capsys.readouterr().out
    assert "There is no squeue on this machine" in out and "queued" in out and f"job 11 ({failed.name}), which it waited for, failed: a mistake" in out
    assert cli.main(["jobs", str(failed), "--lines", "2"]) == 0
    out = capsys.readouterr().out
    assert "== slurm-11.out" in out and "[redacted]\nno such dataset" in out and "begins" not in out and "\x1b" not in out
    assert cli.main(["jobs", str(unsent)]) == 2 and "was never submitted" in capsys.readouterr().err
    assert cli.main(["jobs", "--all"]) == 0 and "failed" in capsys.readouterr().out
    assert cli.main(["plan", "three-stages", *CPU]) == 2 and "sbatch is not on this machine" in capsys.readouterr().err


# -- on a real Slurm

@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := slurm_cluster.missing(): pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=2) as cluster: yield cluster


@pytest.fixture
def typed(slurm, demo, tmp_root):
    "The command line where the test's Slurm is, on runs of the test's own and the session's model and rows"
    env = slurm.env | dict(POST_TRAINING_RUNS_DIR=str(tmp_root / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(demo))
    yield lambda *words: command(*words, **env)
    slurm.run("scancel", "--me")


def submitted(done):
    "Stage -> the last job that the command named for it"
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n\n", 1)[1].splitlines()
    return {line.split(":")[0]: int(line.split("submitted as job ")[1].split(",")[0]) if "submitted" in line else None for line in lines if ": " in line}


def story(root):
    "Whatever the jobs of a test wrote, for the message of a failed test"
    return "\n".join(f"--- {p}\n{p.read_text()[-2000:]}" for p in [*root.rglob("slurm-*.out"), *root.rglob("attempts/*/std*.log")])


@pytest.mark.slow
def test_three_stages_on_slurm(typed, slurm, tmp_root):
    "Submitted in one go, each behind the one before it; then all done; a fourth stage starts from the third's run"
    path = tmp_root / "p.yaml"
    text = f"""
name: small
overrides: [artifacts_subdir={tmp_root.name}, job_subdir=small, {", ".join(CPU)}]
stages:
  - {{name: rows, stage: dataset_mixture}}
  - name: tokens
    stage: tokenize
    overrides: &train ["dataset=demo-mixture", "dataset_args.dataset_name={{rows.data}}", {", ".join(SMALL)}]
  - {{name: train, stage: train_sft, overrides: *train}}
"""
    path.write_text(text)
    jobs = submitted(typed("plan", path))
    assert list(jobs) == ["rows", "tokens", "train"]
    waiting = typed("plan", path)  # the same command while they wait changes nothing
    assert waiting.returncode == 0 and waiting.stdout.count("already in the queue") == 3, waiting.stdout + waiting.stderr
    shown = typed("jobs").stdout
    assert "PENDING" in shown and "Dependency: waits for another job to succeed" in shown, shown
    assert slurm.wait(jobs["train"], 300) == "COMPLETED", story(tmp_root)
    again = typed("plan", path)
    assert again.returncode == 0 and "all done" in again.stdout and again.stdout.count(": done") == 3, again.stdout + again.stderr
    path.write_text(text + f"""  - name: more
    stage: train_sft
    overrides: ["dataset=demo-mixture", "dataset_args.dataset_name={{rows.data}}", {", ".join(SMALL)}, "model_args.model_name_or_path=run:{{train.run}}"]
""")
    fourth = submitted(typed("plan", path))
    assert fourth == dict(rows=None, tokens=None, train=None, more=fourth["more"]) and slurm.wait(fourth["more"], 200) == "COMPLETED", story(tmp_root)
    by = {run.read_record(p)["hash"]: run.read_record(p) for p in run.all_runs()}
    [heir] = [r for r in by.values() if r.get("stage") == "train_sft" and any(q.get("checkpoint") for q in r["parents"])]
    assert "train_sft" in [by[q["hash"]]["stage"] for q in heir["parents"]]


@pytest.mark.slow
def test_an_array_is_completed_by_its_failed_task(typed, slurm, tmp_root):
    "One of three finds no rows: what waits for the array is cancelled, the command again submits that task and what waited, and no more"
    rows = {n: tmp_root / f"{n}.jsonl" for n in "abc"}
    text = "".join(json.dumps(dict(messages=[dict(role="user", content=f"{i}?"), dict(role="assistant", content=str(i))])) + "\n" for i in range(20))
    for n in "ac": rows[n].write_text(text)
    source = "sources=[{{dataset_name: {n}, dataset_path: {p}}}]"
    each = ", ".join(json.dumps([f"dataset_name={n}", source.format(n=n, p=p)]) for n, p in rows.items())
    path = tmp_root / "p.yaml"
    path.write_text(f"""
name: three
overrides: [artifacts_subdir={tmp_root.name}, {", ".join(CPU)}]
stages:
  - name: parts
    stage: dataset_mixture
    each: [{each}]
  - name: whole
    stage: dataset_mixture
    overrides: [dataset_name=whole, "sources=[{{dataset_name: a, dataset_path: '{{parts.0.data}}', train_splits: [train]}}, {{dataset_name: b, dataset_path: '{{parts.1.data}}', train_splits: [train]}}]"]
""")
    first = submitted(typed("plan", path))
    states = slurm.wait(first["parts"], 120), [j["JobState"] for j in slurm.jobs(first["parts"])]
    assert sorted(states[1]) == ["COMPLETED", "COMPLETED", "FAILED"], story(tmp_root)
    assert slurm.wait(first["whole"], 60) == "CANCELLED"
    why = typed("jobs").stdout
    assert f"job {first['parts']}_1" in why and "which it waited for, failed: a mistake that would come again" in why, why
    rows["b"].write_text(text)
    assert "2 done, 1 resume" in typed("plan", path, "--dry-run").stdout
    second = submitted(typed("plan", path))
    assert slurm.wait(second["whole"], 120) == "COMPLETED", story(tmp_root)
    assert [j["JobState"] for j in slurm.jobs(second["parts"])] == ["COMPLETED"]
    attempts = {run.read_record(p)["config"]["dataset_name"]: len(run.read_record(p)["attempts"]) for p in run.all_runs()}
    assert attempts == dict(a=1, b=2, c=1, whole=1)
    assert "all done" in typed("plan", path).stdout


@pytest.mark.slow
def test_a_failing_first_stage_cancels_the_rest(typed, slurm, tmp_root):
    path = tmp_root / "p.yaml"
    path.write_text(f"""
name: fails
overrides: [artifacts_subdir={tmp_root.name}, {", ".join(CPU)}]
stages:
  - {{name: rows, stage: dataset_mixture, overrides: [dataset_name=none, "sources=[{{dataset_name: a, dataset_path: {tmp_root}/none.jsonl}}]"]}}
  - {{name: tokens, stage: tokenize}}
  - {{name: train, stage: train_sft}}
""")
    jobs = submitted(typed("plan", path))
    assert slurm.wait(jobs["rows"], 120) == "FAILED", story(tmp_root)
    assert [slurm.wait(jobs[n], 60) for n in ("tokens", "train")] == ["CANCELLED", "CANCELLED"]
    why = typed("jobs").stdout
    assert why.count(f"job {jobs['rows']} (") == 2 and why.count("which it waited for, failed: ") == 2 and "none.jsonl" in why, why
    [failed] = [p for p in run.all_runs() if p.parent.parent.name == "dataset_mixture"]
    named = typed("jobs", failed)
    assert named.returncode == 0 and "FAILED" in named.stdout and f"== slurm-{jobs['rows']}.out" in named.stdout and "none.jsonl" in named.stdout, named.stdout + named.stderr
