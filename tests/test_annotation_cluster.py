"Annotation stages on two nodes of a real Slurm: an array of shards that goes on after whatever cuts it, and behind it the job that merges and says what failed"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from post_training.run.identity import run_folder
from post_training.run.record import read_record
from post_training.core.files import file_sha256
from post_training.config.overrides import quote_value
from post_training.config.compose import load_frozen

pytestmark = pytest.mark.slow
TASKS, BATCHES = 2, 6
# A worker that does what the test's folder says: wait between batches, fall, make a mistake. It is a hook of the interpreter, so that all else is what a user runs.
HOOK = """
import os, sys
if "post_training.stages.preference_data" in sys.orig_argv and "--shard" in sys.orig_argv:
    import time
    from pathlib import Path
    from post_training.core import shards
    from post_training.core.files import UserError
    told, keep, shard = Path(os.environ["POST_TRAINING_TEST"]), shards.encode_results, sys.orig_argv[sys.orig_argv.index("--shard") + 1]
    def encode_rows(plan, batch, rows):
        with open(told/"batches", "a") as f: f.write(f"{shard}\\n")
        if (told/f"fault-{shard}").exists(): raise MemoryError("no more memory for this")
        if (told/f"mistake-{shard}").exists(): raise UserError("There is no such thing.")
        while (told/"wait").exists() and (told/"batches").read_text().splitlines().count(shard) > 1: time.sleep(0.1) # a first batch is made and saved
        return keep(plan, batch, rows)
    shards.encode_results = encode_rows
"""
SERVER = """
import json, sys, time
sys.path.insert(0, {tests!r})
from recorded_endpoint import Endpoint
class Here(Endpoint):
    def server_bind(self): self.server_address = ("127.0.0.1", int(sys.argv[2].split("=")[1])); super().server_bind()
json.dump(sys.argv, open({told!r}, "w"))
if sys.argv[3] == "broken": sys.exit("CUDA error: no device, it's $(touch x)")
time.sleep(2)
with Here(model="served", max_model_len=4096): time.sleep(600)
"""


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "So many conversations that the stage filter makes six batches of them; some are too long"
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    talk = lambda i: [dict(role="user", content=f"What is {i} plus {i}?"), dict(role="assistant", content=f"It is {2 * i}. " * (40 if i % 50 == 0 else 1))]
    path.write_text("".join(json.dumps(dict(messages=talk(i))) + "\n" for i in range(200 * BATCHES)))
    return path


def shared(root, rows, *more):
    return ["filter", f"dataset_args.dataset_name={quote_value(str(rows))}", "max_seq_len=60", "cluster.device=cpu", "shards.save_seconds=0", "max_drop_fraction=0.5",
            f"artifacts_dir={quote_value(str(root / 'artifacts'))}", f"runs_dir={quote_value(str(root / 'runs'))}", *more]


class Job:
    "Submits a stage with the command line, in folders of its own"
    on = [f"shards.number={TASKS}", "cluster=slurm", "cluster.exclusive=false", "cluster.memory=null", "cluster.cpus_per_task=1", "cluster.time=20", "submit=true"]

    def __init__(self, slurm, root, rows):
        self.slurm, self.root, self.rows, self.told = slurm, root, rows, root / "hook"
        self.told.mkdir()
        (self.told / "sitecustomize.py").write_text(HOOK)
        path = os.pathsep.join(filter(None, [str(self.told), os.environ.get("PYTHONPATH")]))
        self.env = slurm.env | dict(POST_TRAINING_RUNS_DIR=str(root / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(root / "artifacts"), PYTHONPATH=path, POST_TRAINING_TEST=str(self.told))

    def command(self, *words, check=True):
        done = subprocess.run(["post-training", *words], env=self.env, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def words(self, *more):
        return [*shared(self.root, self.rows, *self.on), *more]

    def submit(self, *more):
        said = self.command(*self.words(*more)).stdout
        [record] = (self.root / "runs").rglob("record.json")
        self.run_dir = record.parent
        *_, array, last = self.record["jobs"]
        self.array, self.id = array["id"], last["id"]
        assert (array["kind"], array["tasks"], last["after"]) == ("shards", TASKS, [str(self.array)]) and f"behind array {self.array}" in said
        return self

    @property
    def record(self):
        return read_record(self.run_dir)

    def batches(self):
        return (self.told / "batches").read_text().split() if (self.told / "batches").exists() else []

    def hold(self):
        (self.told / "wait").touch()

    def let_go(self):
        (self.told / "wait").unlink()

    def at_second(self, seconds=90):
        held = lambda: all(self.batches().count(str(k)) == 2 for k in range(TASKS))
        wait_for(lambda: held() or self.slurm.state(self.id) in slurm_cluster.FINISHED, seconds, "the second batch of each shard")
        assert held(), self.log()

    def end(self, state, seconds=120):
        assert self.slurm.wait(self.id, seconds) == state, self.log()
        return self.record

    def left(self, task, what):
        path = self.run_dir / f"array/{self.array}/{task}.{what}"
        return path.read_text().strip() if path.exists() else None

    def log(self):
        parts = [*self.run_dir.glob("slurm-*.out"), *self.run_dir.glob("attempts/*/*.log"), *self.run_dir.glob("array/*/*")]
        return "\n".join(f"--- {p}\n{p.read_text()[-3000:]}" for p in parts)


@pytest.fixture
def job(slurm, rows, tmp_path, demo):
    "A job of this test's own; what a failed test leaves is cancelled"
    shutil.copytree(demo / "models/tiny", tmp_path / "artifacts/models/tiny")
    made = Job(slurm, tmp_path, rows)
    yield made
    for known in (made.record.get("jobs") or []) if hasattr(made, "run_dir") else []:
        slurm.run("scancel", known["id"], check=False)


def written(record):
    "The rows that a run wrote, as digests of its files"
    folder = Path(record["final"]["output"])
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("manifest.json", "state.json")}  # the latter holds a random name


@pytest.fixture(scope="module")
def local(tmp_path_factory, rows, demo):
    "The same rows filtered on this machine, by one worker in one piece"
    root = tmp_path_factory.mktemp("local")
    shutil.copytree(demo / "models/tiny", root / "artifacts/models/tiny")
    done = subprocess.run(["post-training", *shared(root, rows)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = (root / "runs").rglob("record.json")
    return read_record(record.parent)


def same(job, local):
    assert written(job.record) == written(local)
    assert job.record["counts"]["dropped"] == local["counts"]["dropped"]


def test_array_and_record(job, slurm, local):
    "All tasks work, the job behind them merges to the bytes of a local run; what is seen of them while they are at work; more tasks than work"
    job.hold()
    job.submit()
    job.at_second()
    told = job.command("jobs").stdout
    assert f"{job.array}_[0-1]" in told and "2 running" in told and "Dependency" in told, told
    assert f"array {job.array} of {TASKS} tasks" in job.command("runs", "show", job.run_dir.name).stdout
    twice = job.command(*job.words(), check=False)
    assert twice.returncode == 2 and f"scancel {job.id} {job.array} ends it" in twice.stderr
    job.let_go()
    record = job.end("COMPLETED")
    assert (record["status"], record["array"]["failed"], record["attempts"][-1]["job"]["id"]) == ("finished", [], job.id), job.log()
    assert len(job.batches()) == BATCHES and [job.left(t, "end") for t in range(TASKS)] == ["0 done"] * TASKS
    assert len([n for n in job.run_dir.glob(f"slurm-{job.array}_*.out")]) == TASKS
    same(job, local)
    assert job.command(*job.words()).stdout.startswith("done already")


def test_time_limit(job, slurm, local):
    "The scheduler asks the batch shell to leave, the workers save, each task is put back under its id and goes on"
    job.hold()
    job.submit("cluster.time=2", "cluster.signal_seconds=60")
    job.at_second()
    wait_for(lambda: any("asked to leave" in p.read_text() for p in job.run_dir.glob("slurm-*_*.out")), 100, "the signal")
    wait_for(lambda: all("the workers ended with 143" in (job.run_dir / f"slurm-{job.array}_{t}.out").read_text() for t in range(TASKS)), 60, "the workers' leave")
    job.let_go()
    record = job.end("COMPLETED")
    assert record["status"] == "finished" and {t["Restarts"] for t in slurm.jobs(job.array)} == {"1"}, job.log()
    assert [job.left(t, "tries") for t in range(TASKS)] == [None] * TASKS and len(job.batches()) == BATCHES + TASKS  # the batch that was cut
    same(job, local)


def test_killed_worker(job, slurm, local):
    "kill -9 of a worker costs its task a try; the other task is not disturbed"
    job.hold()
    job.submit()
    job.at_second()
    found = subprocess.run(["pgrep", "-f", f"post_training.stages.preference_data {job.run_dir}/submit.yaml .* --shard 1"], capture_output=True, text=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    wait_for(lambda: job.left(1, "tries") == "1", 30, "the count")
    job.let_go()
    record = job.end("COMPLETED")
    assert record["status"] == "finished" and job.left(0, "tries") is None, job.log()
    assert [t["Restarts"] for t in sorted(slurm.jobs(job.array), key=lambda t: int(t["ArrayTaskId"]))] == ["0", "1"]
    assert "was ended by signal 9" in (job.run_dir / f"slurm-{job.array}_1.out").read_text()
    same(job, local)


def test_cancelled(job, slurm, local):
    "scancel ends the array; the record says so, and the same command goes on with what was saved"
    job.hold()
    job.submit()
    job.at_second()
    slurm.run("scancel", job.array)
    record = job.end("FAILED")
    assert record["status"] == "failed" and "tasks of array" in record["stopped"] and "ended from outside" in record["stopped"], job.log()
    time.sleep(7)  # longer than a requeue takes here
    assert {t["JobState"] for t in slurm.jobs(job.array)} == {"CANCELLED"}
    job.let_go()
    before = len(job.batches())
    job.submit()
    assert job.end("COMPLETED")["status"] == "finished" and "stopped" not in job.record, job.log()
    assert len(job.batches()) - before == BATCHES - TASKS  # what was saved was not made again
    same(job, local)


def test_failing_tasks(job, slurm):
    "A fault is tried again, a mistake is not; the others finish, and the record has the ends of the logs"
    for name in ("fault-0", "mistake-1"):
        (job.told / name).touch()
    job.submit("cluster.max_retries=1")
    record = job.end("FAILED")
    assert [(f["task"], f["exit"]) for f in record["array"]["failed"]] == [(0, 1), (1, 2)], job.log()
    assert "no more memory" in record["array"]["failed"][0]["tail"] and "There is no such thing." in record["array"]["failed"][1]["tail"]
    assert job.left(0, "tries") == "2" and job.left(1, "tries") is None and f"2 of {TASKS} tasks of array {job.array}" in record["stopped"]
    assert "task 1      ended with 2" in job.command("runs", "show", job.run_dir.name).stdout


def test_no_requeue(job, slurm):
    "Without requeueing a task that is cut ends, with what it made; the same command goes on"
    job.hold()
    job.submit("cluster.requeue=false")
    job.at_second()
    for task in range(TASKS):
        slurm.run("scancel", "--batch", "--signal=USR1", f"{job.array}_{task}")
    record = job.end("FAILED")
    assert {f["exit"] for f in record["array"]["failed"]} == {75} and "the same command continues" in record["stopped"], job.log()
    assert [json.loads(p.read_text())["batches"] for p in Path(record["checkpoints_dir"]).parent.glob("work/shards/*/progress.json")] == [1] * TASKS


def test_plan(job, slurm, tmp_path, rows):
    "Two annotation stages behind each other: the second reads what the record's job of the first wrote"
    plan = tmp_path / "two.yaml"
    words = shared(tmp_path, rows, *job.on)[1:]
    second = [w for w in words if not w.startswith(("dataset_args.dataset_name", "max_seq_len"))] + ["dataset_args.dataset_name={wide.data}", "max_seq_len=40"]
    plan.write_text(json.dumps(dict(name="two", stages=[dict(name="wide", stage="filter", overrides=words), dict(name="narrow", stage="filter", overrides=second)])))
    looked = job.command("plan", str(plan), "--dry-run").stdout
    assert "2 node-hours at most" in looked, looked  # 2 x (2 tasks + 1) x 20 min
    job.command("plan", str(plan))
    records = lambda: {r["config"]["max_seq_len"]: r for r in map(read_record, (p.parent for p in (tmp_path / "runs").rglob("record.json")))}
    jobs = [j for r in records().values() for j in r["jobs"]]
    try:
        for j in jobs:
            assert slurm.wait(j["id"], 120) == "COMPLETED"
    finally:
        for j in jobs: slurm.run("scancel", j["id"], check=False)
    wide, narrow = (records()[n] for n in (60, 40))
    assert wide["status"] == narrow["status"] == "finished" and narrow["jobs"][0]["after"] == [str(wide["jobs"][1]["id"])]
    assert narrow["counts"]["in"] == wide["counts"]["out"]


@pytest.fixture
def served(job, tmp_path, rows):
    "Reference completions from a server that each task starts"
    script = tmp_path / "it's a server.py"
    script.write_text(SERVER.format(tests=str(Path(__file__).parent), told=str(tmp_path / "argv.json")))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(True)[:8]))

    def words(*more, third="$(touch x) it's; {tensor_parallel_size}"):
        command = ",".join(quote_value(w) for w in (sys.executable, str(script), "{model}", "--port={port}", third))
        own = [w for w in shared(tmp_path, few, *job.on)[1:] if not w.startswith("max_seq_len")]
        return ["ref_completions", *own, "backend=server", "server.model=served", f"server.command=[{command}]", "model_args.model_name_or_path=${artifacts_dir}/models/tiny",
                "generation.n=2", "generation.max_new_tokens=20", "generation.batch_tokens=400", "max_drop_fraction=1.0", *more]

    job.words = words
    job.argv = lambda: json.loads((tmp_path / "argv.json").read_text())
    return job


def test_server(served, slurm, tmp_path):
    "A server is started in each task, waited for, asked, and gone at the end; its words arrive as they are"
    record = served.submit().end("COMPLETED")
    assert record["status"] == "finished" and record["array"]["failed"] == [], served.log()
    model, port, third = served.argv()[1:]
    assert model == str(tmp_path / "artifacts/models/tiny") and 20000 <= int(port.removeprefix("--port=")) < 30000 and third == "$(touch x) it's; 1"
    assert not (tmp_path / "x").exists() and not Path("x").exists()
    assert not subprocess.run(["pgrep", "-f", f"{tmp_path}/it's a server.py"], capture_output=True, text=True).stdout


def test_server_that_fails(served, slurm):
    "One that dies is told with the end of its log; it counts as a fault"
    word = served.words
    served.words = lambda *more: word("cluster.max_retries=0", *more, third="broken")
    record = served.submit().end("FAILED")
    assert "the server ended with 1 before it answered" in record["stopped"], served.log()
    assert "CUDA error: no device, it's $(touch x)" in record["array"]["failed"][0]["tail"]


def test_frozen_run_folder(job, slurm):
    "What the array reads is the run's own frozen config"
    job.on = [w for w in job.on if not w.startswith("submit")]
    said = job.command(*job.words()).stdout
    [record] = (Path(job.env["POST_TRAINING_RUNS_DIR"])).rglob("record.json")
    assert "afterany:$(sbatch --parsable " in said and run_folder(load_frozen(record.parent / "submit.yaml")) == record.parent
