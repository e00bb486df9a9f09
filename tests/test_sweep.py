"Sweeps: the seed's own commands, bad grids, names and values that a shell would read, submission, and the experiment's notebook"
import json
import os
import shlex
import shutil
import stat
import subprocess
import time

import pytest
import slurm_cluster
import yaml
from conftest import ROOT

from post_training import config
from post_training import run
from post_training.core.files import UserError
from post_training.launch import sweep

TEMPLATE = ROOT / "nbs" / "experiments" / "0-apertus-template.ipynb"
NASTY = "it's \"a\" $(touch x) `touch x`; touch x & \\ é *"
TINY = {"cluster": "slurm", "cluster.device": "cpu", "cluster.gpus_per_node": 1, "training_args.max_steps": 4}
# The command of the earlier code base for its 70B run, as its README prints it; P is the folder of the base model, L, Z and B what differs for the 8B
SEED = """dataset=apertus-sft-mixture-1 model=apertus-{size} model_args.model_name_or_path=P/{B} tokenizer_args.tokenizer_name_or_path=P/{B} trainer=plw
 accelerate_config=src/post_training/configs/accelerate/ds-zero{Z}.yaml plw_args.prompt_loss_weight=0.0 training_args.gradient_accumulation_steps=1
 training_args.per_device_train_batch_size=2 training_args.optim=adamw_torch training_args.learning_rate={L} tokenizer_args.chat_template_name=tulu
 training_args.num_train_epochs=1 artifacts_subdir=private
 job_subdir=0-apertus-template/{B}-apertus-sft-mixture-1-bs512-lr{L}-epochs1-adamw_torch wandb.run_name=0-apertus-template/{B}-apertus-sft-mixture-1-bs512-lr{L}-epochs1-adamw_torch
 wandb.tags=[prod,plw,default,0-apertus-template] resuming.resume=True"""
SIZES = {"8b": dict(size="8b", B="Apertus8B-tokens15T-it2627139", L="5e-06", Z=2), "70b": dict(size="70b", B="Apertus70B-tokens15T-it1155828", L="2e-06", Z=3)}


def jobs_of(points, form, **keys):
    return sweep.make_jobs("train_sft", points, TINY | keys, form)


def rates(*values):
    return jobs_of(sweep.grid(learning_rate=list(values)), "lr{learning_rate}", **{"training_args.learning_rate": "{learning_rate}"})


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    "An sbatch that writes down its arguments, one call a line, and the variables that must not reach it; FAILS in its folder makes it refuse"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!{shutil.which('python3')}\n" + """
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
calls = here / "calls"
n = len(calls.read_text().splitlines()) if calls.exists() else 0
if (here / "FAILS").exists() and n >= int((here / "FAILS").read_text()): sys.exit("sbatch: error: Batch job submission failed: invalid account")
with calls.open("a") as f: f.write(json.dumps([sys.argv[1:], sorted(k for k in os.environ if k.startswith(("SLURM_", "SBATCH_")))]) + "\\n")
print(f"Submitted batch job {1000 + n}")
""")
    (folder / "squeue").write_text("#!/bin/sh\n")
    for p in folder.iterdir(): p.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()] if (folder / "calls").exists() else []


# -- the seed's experiment

@pytest.fixture(scope="module")
def apertus(shared_root):
    "The template's grid for Apertus, written and not submitted"
    return sweep.run_experiment(TEMPLATE, models="apertus", checkpoints="P")


@pytest.mark.parametrize("size", SIZES)
def test_the_seeds_command(size, apertus):
    "Every key of the frozen config is what the seed's own command composes to, at the nodes, partition and time of its sbatch line"
    words = SEED.format(**SIZES[size]).split()
    seed = config.compose("train_sft", [*words, "cluster=clariden", "cluster.partition=large512", "cluster.time='48:00:00'"]).cfg
    job = next(j for j in sweep.read_sweep(apertus) if size.upper() in j["name"].split("-")[0])
    ours = config.load_frozen(apertus / f"configs/{job['name']}.yaml")
    a, b = config.flatten(ours), config.flatten(seed)
    assert {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {}
    assert run.config_hash(ours) == run.config_hash(seed) == job["hash"]
    typed = {k: str(v) for k, v in (o.split("=", 1) for o in words)}  # and every option of it, one by one
    for key in typed.keys() - {"dataset", "model", "accelerate_config", "wandb.tags"}:
        assert config.get_key(ours, key) == config.parse_override(f"{key}={typed[key]}").value, key
    assert (ours["accelerate_config"], ours["num_nodes"], ours["global_batch_size"]) == (f"ds-zero{SIZES[size]['Z']}", 64, 512)
    assert ours["wandb"]["tags"] == ["prod", "plw", "default", "0-apertus-template"] and ours["dataset_name"] == "apertus-sft-mixture-1"


def test_the_seeds_sbatch_line(apertus):
    name = "Apertus70B-tokens15T-it1155828-apertus-sft-mixture-1-bs512-lr2e-06-epochs1-adamw_torch"
    line = sweep.show_submit(apertus).splitlines()[1]
    assert line == f"sbatch -N 64 -p large512 -t 48:00:00 -o ./out/{name}.out -e ./out/{name}.err ./scripts/{name}.sbatch"
    assert apertus.parent == run.runs_root() / "experiments" / "0-apertus-template" and (apertus / "out").is_dir()
    assert (apertus / "submit.sh").stat().st_mode & stat.S_IXUSR and not (apertus / TEMPLATE.name).stat().st_mode & stat.S_IWUSR
    assert [r["status"] for r in sweep.sweep_rows(apertus)] == ["not begun"] * 2


# -- bad grids

@pytest.mark.parametrize("make, told", [
    (lambda: sweep.grid(model=["tiny"], lr=[]), "The axis lr is empty"),
    (lambda: sweep.grid(model="tiny"), "give a list of values"),
    (lambda: rates(), "learning_rate is empty"),
    (lambda: rates(0.1, 0.1), "Two jobs are called lr0.1"),
    (lambda: jobs_of([dict(dataset="a/b")], "{dataset}"), "not a safe file name"),
    (lambda: jobs_of([dict(dataset="it's")], "{dataset}"), "not a safe file name"),
    (lambda: jobs_of([dict(dataset="a\nb")], "{dataset}"), "not a safe file name"),
    (lambda: jobs_of([dict(dataset="demo")], "{datasets}"), "Did you mean 'dataset'?"),
    (lambda: jobs_of([dict(a=1), dict(a=2)], "{a}"), "1 and 2 are the same run"),
    (lambda: jobs_of([dict(lr=1)], "x", **{"training_args.learning_rat": "{lr}"}), "job x: Unknown key training_args.learning_rat. Did you mean"),
    (lambda: jobs_of([dict(lr="fast")], "x", **{"training_args.learning_rate": "{lr}"}), "job x: training_args.learning_rate=fast does not fit"),
    (lambda: jobs_of([dict(model="tinny")], "x", model="{model}"), "job x: There is no preset model=tinny"),
    (lambda: jobs_of([dict(a=1)], "x", job_subdir="mine"), "job_subdir of job x"),
    (lambda: jobs_of([dict(status="a")], "x"), "status is a column of the results"),
    (lambda: jobs_of([dict(a=1)], "x", **{"cluster.env": {"HF_TOKEN": "hf_" + "a" * 34}}), "job x: "),
    (lambda: [], "at least one job"),
])
def test_bad_grid(make, told, tmp_root):
    "One clear error, and nothing is written"
    with pytest.raises(UserError) as e: sweep.write_sweep("bad", "grid", make())
    assert told in str(e.value)
    assert not (tmp_root / "runs").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "it's", "$(touch x)", ""])
def test_bad_names_of_experiments(name, tmp_root):
    for names in ((name, "grid"), ("mine", name)):
        with pytest.raises(UserError, match="not a safe file name"): sweep.write_sweep(*names, rates(0.1))
    assert not (tmp_root / "runs").exists()


def test_one_mistake_stops_all(tmp_root):
    good, (bad,) = rates(0.1, 0.2), jobs_of([dict(n=-1)], "bad", num_nodes="{n}")
    with pytest.raises(UserError, match="job bad: num_nodes=-1"): sweep.write_sweep("bad", "grid", [*good, bad])
    assert not (tmp_root / "runs").exists()


# -- what a shell would read

def test_values_arrive_and_run_nothing(tmp_path, monkeypatch, scheduler):
    "Spaces, quotes and $(touch x) in a value and in the folder: unchanged in the frozen config, one argument of sbatch, and nothing is run"
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "my 'runs' $(touch x)%j"))
    monkeypatch.setenv("SLURM_NNODES", "7")
    monkeypatch.setenv("SBATCH_QOS", "low")
    jobs = jobs_of([dict(group=NASTY)], "one", **{"wandb.group": "{group}", "dataset_name": "{group}", "cluster.partition": "{group}", "cluster.env": {"SAID": NASTY}})
    folder = sweep.write_sweep("quoting", "values", jobs, f"Does {NASTY} run?\ntouch x")
    frozen = yaml.safe_load((folder / "configs/one.yaml").read_text())
    assert frozen["wandb"]["group"] == frozen["dataset_name"] == frozen["cluster"]["partition"] == NASTY
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for script in (folder / "submit.sh", folder / "scripts/one.sbatch"): assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    done = subprocess.run([folder / "submit.sh"], cwd=elsewhere, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Submitted batch job 1000: one\n", "")
    (argv, inherited), = calls(scheduler)
    out = str(folder / "out/one").replace("%", "%%")
    assert argv == ["-N", "1", "-p", NASTY, "-o", f"{out}.out", "-e", f"{out}.err", str(folder / "scripts/one.sbatch")] and not inherited
    directives = [shlex.split(line)[1] for line in (folder / "scripts/one.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    partition = NASTY.replace("\\", "\\\\")  # sbatch reads two backslashes of a directive as one
    assert {f"--partition={partition}", f"--output={out}.out", f"--error={out}.err", "--job-name=one"} <= set(directives)
    assert not [p for p in (ROOT, elsewhere, folder, tmp_path) if (p / "x").exists()]


def test_submit_script_chooses_and_stops(tmp_root, scheduler):
    folder = sweep.write_sweep("mine", "rates", rates(0.1, 0.2, 0.3))
    submit = [str(folder / "submit.sh")]
    assert subprocess.run([*submit, "lr0.3", "lr0.1"], capture_output=True).returncode == 0
    assert [argv[-1].split("/")[-1] for argv, _ in calls(scheduler)] == ["lr0.1.sbatch", "lr0.3.sbatch"]
    typo = subprocess.run([*submit, "lr0.1", "lr0.4"], capture_output=True, text=True)
    assert typo.returncode == 2 and "there is no job lr0.4" in typo.stderr and len(calls(scheduler)) == 2
    (scheduler / "FAILS").write_text("2")
    refused = subprocess.run(submit, capture_output=True, text=True)
    assert refused.returncode == 1 and "invalid account" in refused.stderr and len(calls(scheduler)) == 2
    (scheduler / "FAILS").unlink()
    for _ in range(2): assert subprocess.run(submit, capture_output=True).returncode == 0 and len(calls(scheduler)) == 3  # the one that is left, and then none
    assert [r["status"] for r in sweep.sweep_rows(folder)] == ["queued"] * 3 and [j["jobs"] for j in sweep.read_sweep(folder)] == [[1000], [1002], [1001]]
    (folder / "submitted/lr0.2").unlink()  # it failed
    assert subprocess.run(submit, capture_output=True).returncode == 0 and calls(scheduler)[-1][0][-1].endswith("lr0.2.sbatch") and len(calls(scheduler)) == 4


# -- submitting

def test_what_was_submitted_is_recorded_where_one_is_refused(tmp_root, scheduler):
    "The first of three is submitted and known, the second refused: said in a sentence; afterwards the rest is submitted"
    folder = sweep.write_sweep("mine", "rates", rates(0.1, 0.2, 0.3))
    (scheduler / "FAILS").write_text("1")
    with pytest.raises(UserError, match="1 of 3 jobs were submitted, then: sbatch: error: .*invalid account"): sweep.submit_sweep(folder)
    told = sweep.read_sweep(folder)
    assert [j["jobs"] for j in told] == [[1000], [], []]
    record = run.read_record(config.project_root() / told[0]["run"])
    assert record["status"] == "queued" and [(j["id"], j["task"]) for j in record["jobs"]] == [(1000, None)]
    assert [r["status"] for r in sweep.sweep_rows(folder)] == ["queued", "ready", "ready"]
    (scheduler / "FAILS").unlink()
    assert sweep.submit_sweep(folder, ["lr0.2", "lr0.3"]) == {"lr0.2": 1001, "lr0.3": 1002}


def test_the_same_minute_and_the_same_runs(tmp_root):
    "Two folders of one minute, one set of runs"
    a, b = (sweep.write_sweep("mine", "rates", rates(0.1)) for _ in range(2))
    assert a != b and [j["hash"] for j in sweep.read_sweep(a)] == [j["hash"] for j in sweep.read_sweep(b)]


@pytest.mark.slurm
@pytest.mark.slow
def test_on_a_real_scheduler(demo, tmp_path, monkeypatch):
    "Two jobs submitted by the script, from inside what looks like another job; while they are there nothing is submitted twice, afterwards nothing is left to submit"
    if reason := slurm_cluster.missing(): pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", nodes=2, cpus=2) as cluster:
        settings = cluster.env | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "it's runs"), POST_TRAINING_ARTIFACTS_DIR=str(demo), SLURM_NNODES="7", SBATCH_PARTITION="nowhere")
        for k, v in settings.items(): monkeypatch.setenv(k, v)
        keys = {"training_args.learning_rate": "{lr}", "training_args.eval_steps": 4, "evaluation.num_prompts": 0, "cluster.time": 10, "wandb.group": "it's $(touch x)"}
        folder = sweep.write_sweep("real", "rates", jobs_of(sweep.grid(lr=[0.003, 0.001]), "lr{lr}", **keys))
        assert list(sweep.submit_sweep(folder)) == ["lr0.003", "lr0.001"]
        assert sweep.submit_sweep(folder) == {}
        end = time.monotonic() + 300
        while any(cluster.state(n) not in slurm_cluster.FINISHED for j in sweep.read_sweep(folder) for n in j["jobs"]):
            assert time.monotonic() < end, sweep.sweep_rows(folder)
            time.sleep(1)
        rows = sweep.sweep_rows(folder)
        assert [(r["status"], r["steps"], r["attempts"]) for r in rows] == [("finished", 4, 1)] * 2, [p.read_text()[-2000:] for p in (folder / "out").iterdir()]
        assert sweep.submit_sweep(folder) == {} and [len(j["jobs"]) for j in sweep.read_sweep(folder)] == [1, 1]
        assert sorted(p.name for p in (folder / "out").iterdir()) == ["lr0.001.err", "lr0.001.out", "lr0.003.err", "lr0.003.out"]


# -- the notebook

def edited(path, *changes):
    "A copy of the template with its parameters or its grid changed"
    text = TEMPLATE.read_text()
    for old, new in changes:
        assert json.dumps(old)[1:-1] in text
        text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    path.write_text(text)
    return path


def test_a_new_experiment_is_a_copy_with_another_name_and_grid(tmp_root):
    mine = edited(tmp_root / "1-mine.ipynb", ("learning_rate=2e-6", "learning_rate=1e-6"))
    with pytest.raises(UserError, match="Set experiment to 1-mine"): sweep.run_experiment(mine, models="apertus")
    edited(mine, ("learning_rate=2e-6", "learning_rate=1e-6"), ('experiment: str = "0-apertus-template"', 'experiment: str = "1-mine"'))
    folder = sweep.run_experiment(mine, models="apertus", sub_experiment="slower")
    assert folder.parent == run.runs_root() / "experiments" / "1-mine" and folder.name.startswith("slower-")
    job = sweep.read_sweep(folder)[1]
    assert "lr1e-06" in job["name"] and config.load_frozen(folder / f"configs/{job['name']}.yaml")["job_subdir"] == f"1-mine/{job['name']}"


def test_a_mistake_in_the_grid_is_told_as_one(tmp_root):
    wrong = edited(tmp_root / "0-apertus-template.ipynb", ('"training_args.optim"', '"training_args.optimm"'))
    with pytest.raises(UserError, match="^job tiny-demo-lr0.001-adamw_torch: Unknown key training_args.optimm"): sweep.run_experiment(wrong)


@pytest.mark.slow
def test_the_template_runs_its_tiny_grid(demo, tmp_root, monkeypatch):
    "Two runs made here, found by the folder that wrote them and by the next one, which makes none"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    first = sweep.run_experiment(TEMPLATE)
    rows = sweep.sweep_rows(first)
    assert [(r["status"], r["steps"], r["attempts"]) for r in rows] == [("finished", 8, 1)] * 2
    assert all(r["train_loss"] > r["eval_loss"] * .9 > 0 and r["tokens_per_second"] > 0 and 0 < r["node_hours"] < .2 for r in rows)
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"]
    outputs = [o for c in json.loads((first / TEMPLATE.name).read_text())["cells"] for o in c.get("outputs", [])]
    text = "".join("".join(o.get("text", "")) for o in outputs)
    assert "the lowest eval_loss is" in text and "at learning_rate 0.003" in text and sum("image/png" in o.get("data", {}) for o in outputs) == 1
    again = sweep.run_experiment(TEMPLATE)
    assert again != first and sweep.sweep_rows(again) == rows
