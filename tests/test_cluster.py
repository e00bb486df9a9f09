"A cluster preset on a machine without a scheduler: what is shown, what is written, what is refused; a stop that a person asks for."
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from post_training.launch.recipe import execute_notebook, recipe_path
from post_training.run.record import read_metrics, read_record

NO_SLURM = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "sbatch").exists())
ON_SLURM = ["cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=1", "accelerate_config=ds-zero2", "num_nodes=2", "global_batch_size=8", "training_args.per_device_train_batch_size=2"]


def command(*args, **env):
    return subprocess.run(["post-training", *args], capture_output=True, text=True, timeout=180, env=os.environ | env)


def test_dry_run_shows_the_job(tmp_root):
    "The script and its arithmetic; nothing is written"
    said = command("train_sft", "model=apertus-70b", "dataset=apertus-sft-mixture-1", "cluster=clariden", "cluster.account=a01", "cluster.environment=/e/post training.toml", "cluster.time=2-00",
                   "cluster.reservation=r", "cluster.exclude='nid[1-2]'", "training_args.max_steps=100", "--dry-run")
    assert said.returncode == 0, said.stderr
    lines = [line.lstrip("# ") for line in said.stdout.splitlines()]
    for wanted in ("SBATCH --nodes=64", "SBATCH --time=2-00", "SBATCH --account=a01", "SBATCH --reservation=r", "SBATCH --exclude='nid[1-2]'", "SBATCH --cpus-per-task=288", "SBATCH --signal=B:USR1@300"):
        assert wanted in lines, wanted
    table = {" ".join(line.split()[:-1]): line.split()[-1] for line in lines if line}
    assert (table["GPUs"], table["global batch"], table["node-hours at most, per job"]) == ("256", "512", "3072.0")
    assert "'--environment=/e/post training.toml'" in said.stdout and "gpus-per-node" not in said.stdout
    assert not (tmp_root / "runs").exists()


def test_without_a_scheduler(tmp_root):
    "The script is written and shown; submitting is refused before anything is made"
    refused = command("train_sft", *ON_SLURM, "submit=true", PATH=NO_SLURM)
    assert refused.returncode == 2 and "sbatch is not on this machine" in refused.stderr and not (tmp_root / "runs").exists()
    said = command("train_sft", *ON_SLURM, PATH=NO_SLURM)
    assert said.returncode == 0 and "not submitted" in said.stdout, said.stderr
    [script] = (tmp_root / "runs").rglob("submit.sbatch")
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and str(script) in said.stdout
    assert "ready" in command("runs").stdout
    wrong = command("train_sft", *ON_SLURM, "cluster.partitio=a")
    assert wrong.returncode == 2 and "Did you mean 'cluster.partition'" in wrong.stderr


def test_recipe_on_a_login_node(tmp_root):
    "A recipe that is executed by hand hands over and ends well; its later cells are left to the job"
    execute_notebook(recipe_path("train_sft"), tmp_root / "out.ipynb", dict(overrides=ON_SLURM))
    cells = json.loads((tmp_root / "out.ipynb").read_text())["cells"]
    assert any("not submitted" in json.dumps(c.get("outputs")) for c in cells) and not any(c.get("execution_count") for c in cells[-3:])
    assert [p.name for p in (tmp_root / "runs").rglob("submit.*")] and not list((tmp_root / "runs").rglob("attempts"))


@pytest.mark.slow
def test_a_stop_by_hand(demo, monkeypatch, tmp_path):
    "A file named stop: training saves and leaves with 75, and the same command goes on"
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    args = ["train_sft", "cluster.device=cpu", "job_subdir=stopped", "training_args.max_steps=40", "training_args.save_steps=100", "training_args.eval_strategy=no", "evaluation.num_prompts=0"]
    running = subprocess.Popen(["post-training", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (found := [p.parent for p in (tmp_path / "runs").rglob("metrics.jsonl")]): assert running.poll() is None; time.sleep(0.2)
    (found[0] / "attempts/1/stop").touch()
    _, said = running.communicate(timeout=120)
    assert running.returncode == 75 and "is saved" in said and "Traceback" not in said, said
    step = max(r["step"] for r in read_metrics(found[0]))
    assert step < 40 and read_record(found[0])["attempts"][0]["exit"] == 75
    assert command(*args).returncode == 0
    record = read_record(found[0])
    assert record["status"] == "finished" and record["resumed_from"]["2"] == f"checkpoint-{step}"
    assert [r["step"] for r in read_metrics(found[0]) if "loss" in r] == list(range(1, 41))
