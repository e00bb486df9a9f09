"The alignment experiment: chains of jobs for Apertus, their names and dependencies; a copy with another name and grid; the submit script; the tiny chain on a real Slurm"
import json
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT
from test_sweep import calls, scheduler  # noqa: F401

from post_training import config
from post_training import run
from post_training.launch import sweep

TEMPLATE = ROOT / "nbs" / "experiments" / "alignment-apertus-swissaiformat.ipynb"
STAGES = ["filter", "ref_completions", "ref_logprobs", "ref_rewards", "pairs", "train_preference"]
GRID = 'loss=["qrpo", "sigmoid"], beta=[5.0, 10.0], optim=["adamw_torch", "ademamix"], num_pairs=[1, 2]'


def copied(folder, *changes, name="1-mine"):
    "A copy of the template under another name, with its grid edited"
    text = TEMPLATE.read_text()
    for old, new in (('experiment: str = "alignment-apertus-swissaiformat"', f'experiment: str = "{name}"'), *changes):
        assert json.dumps(old)[1:-1] in text, old
        text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    path = folder / f"{name}.ipynb"
    path.write_text(text)
    return path


def frozen(folder, name):
    return config.load_frozen(folder / f"configs/{name}.yaml")


def lines(folder):
    "Name -> (names it waits for, array it comes behind, command)"
    told = [shlex.split(line) for line in (folder / "submit.sh").read_text().splitlines() if line.startswith("submit ")]
    return {w[1]: (w[2].split(), w[3], w[4:]) for w in told}


@pytest.fixture(scope="module")
def apertus(shared_root, tmp_path_factory):
    "A renamed copy with a smaller grid, for the 8B and the 70B; written, not submitted"
    path = copied(tmp_path_factory.mktemp("copy"), (GRID, 'loss=["sigmoid"], beta=[5.0], optim=["ademamix"], num_pairs=[1, 2]'))
    return sweep.run_experiment(path, models="apertus", checkpoints="P", prompts="P/prompts", site={"cluster": "clariden", "cluster.partition": "large512"})


def test_chains_for_apertus(apertus):
    "Every stage once for what is common, in an order that can run, each behind the one before it"
    jobs = sweep.read_sweep(apertus)
    assert apertus.parent == run.runs_root() / "experiments/1-mine" and (apertus / "out").is_dir()
    big = [j for j in jobs if "70b" in j["name"]]
    count = {s: sum(j["stage"] == s for j in jobs if "apertus-8b" in j["name"]) for s in STAGES}
    assert count == dict(filter=1, ref_completions=1, ref_logprobs=1, ref_rewards=1, pairs=2, train_preference=2)
    assert [sum(j["stage"] == s for j in big) for s in STAGES] == [1, 1, 1, 1, 2, 2]
    stage, seen = {j["name"]: j["stage"] for j in jobs}, []
    for j in jobs:
        assert all(a in seen for a in j["after"]) and len(j["after"]) == (j["stage"] != "filter")
        seen.append(j["name"])
        if j["after"]: assert STAGES.index(stage[j["after"][0]]) == STAGES.index(j["stage"]) - 1


def test_rows_are_named_by_their_history(apertus):
    named = "prompts-apertus-8b-sft-maxlen4096-Nref10-logprobs-skywork-v2-llama3-8b-heuristic"
    by = {j["name"]: j for j in sweep.read_sweep(apertus)}
    assert {f"{named}{x}" for x in ("", "-x2")} < by.keys() and "prompts-apertus-70b-sft-maxlen4096-Nref10-logprobs-skywork-v2-llama3-8b-heuristic" in by
    cfg = frozen(apertus, "apertus-8b-sft-sigmoid-beta5.0-ademamix-pairs2")
    assert cfg["dataset_name"] == f"{named}-x2" and cfg["dataset_args"]["dataset_name"] == frozen(apertus, f"{named}-x2")["save_data_dir"]
    for name, job in by.items():
        if job["after"]: assert frozen(apertus, name)["dataset_args"]["dataset_name"] == frozen(apertus, job["after"][0])["save_data_dir"]


@pytest.mark.parametrize("size, engine, rate, parallel", [("8b", "ds-zero2", 5e-7, 1), ("70b", "ds-zero3", 1e-7, 4)])
def test_each_model_has_its_own_settings(size, engine, rate, parallel, apertus):
    cfg = frozen(apertus, f"apertus-{size}-sft-sigmoid-beta5.0-ademamix-pairs1")
    t = cfg["training_args"]
    assert (cfg["accelerate_config"], t["learning_rate"], cfg["num_nodes"], cfg["global_batch_size"]) == (engine, rate, 64, 512)
    assert (t["loss_type"], t["beta"], t["optim"], t["ref_logprobs_from_dataset"], t["normalize_beta_by_length"]) == ("sigmoid", 5.0, "ademamix", True, True)
    assert cfg["model_args"]["model_name_or_path"] == cfg["tokenizer_args"]["tokenizer_name_or_path"] == f"P/apertus-{size}-sft" and cfg["job_subdir"].startswith("1-mine/")
    sampled = f"prompts-apertus-{size}-sft-maxlen4096-Nref10"
    told = frozen(apertus, sampled)
    assert (told["tensor_parallel_size"], told["backend"], told["job_subdir"]) == (parallel, "server", "annotation")
    assert frozen(apertus, f"{sampled}-logprobs")["tensor_parallel_size"] == parallel
    script = (apertus / f"scripts/{sampled}+shards.sbatch").read_text()
    assert f"--tensor-parallel-size={parallel}" in script and "--data-parallel-size=" + str(4 // parallel) in script and "#SBATCH --array=0-63" in script


def test_lines_and_dependencies(apertus):
    "An annotation stage is an array and a job behind it; what follows waits for the latter"
    told = lines(apertus)
    name = "prompts-apertus-8b-sft-maxlen4096-Nref10"
    assert told[f"{name}+shards"][:2] == (["prompts-apertus-8b-sft-maxlen4096"], "") and told[name][:2] == (["prompts-apertus-8b-sft-maxlen4096"], f"{name}+shards")
    after, array, words = told["apertus-70b-sft-sigmoid-beta5.0-ademamix-pairs1"]
    assert words[:7] == ["sbatch", "-N", "64", "-p", "large512", "-t", "10:00:00"] and words[8] == str(apertus / "out/apertus-70b-sft-sigmoid-beta5.0-ademamix-pairs1.out")
    assert after == ["prompts-apertus-70b-sft-maxlen4096-Nref10-logprobs-skywork-v2-llama3-8b-heuristic"] and array == ""
    for n, (_, _, w) in told.items(): assert subprocess.run(["bash", "-n", w[-1]]).returncode == 0, n
    rows = sweep.sweep_job_rows(apertus)
    assert {r["nodes"] for r in rows if r["stage"] == "train_preference"} == {64} and all(r["node-hours"] > 0 for r in rows)


def test_the_template_writes_and_runs_nothing(shared_root):
    "The template as it is writes the tiny jobs and runs none; a stage that two points share is there once, before both"
    folder = sweep.run_experiment(TEMPLATE)
    assert [j["stage"] for j in sweep.read_sweep(folder)] == ["train_sft", *STAGES, "pairs", *["train_preference"] * 3]
    assert not list((folder / "submitted").iterdir()) and {r["status"] for r in sweep.sweep_rows(folder)} == {"not begun"}
    text = "".join("".join(o.get("text", "")) for c in json.loads((folder / TEMPLATE.name).read_text())["cells"] for o in c.get("outputs", []))
    assert "No answer yet: none of 4 jobs" in text


def test_refused_in_the_middle_and_called_again(apertus, scheduler, monkeypatch):  # noqa: F811
    "submit.sh stops at the first refusal, goes on there, and submits nothing twice; ids of jobs are in the lines of those that wait for them"
    submit = [str(apertus / "submit.sh")]
    (scheduler / "FAILS").write_text("5")
    refused = subprocess.run(submit, capture_output=True, text=True)
    assert refused.returncode == 1 and "invalid account" in refused.stderr and len(calls(scheduler)) == 5, refused.stderr
    (scheduler / "FAILS").unlink()
    done = subprocess.run(submit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, ids = lines(apertus), {}
    for (argv, _), (name, (after, array, words)) in zip(calls(scheduler), told.items(), strict=True):
        ids[name] = 1000 + len(ids)
        waits = [f"afterok:{':'.join(str(ids[a]) for a in after)}"] * bool(after) + [f"afterany:{ids[a]}" for a in [array] if a]
        assert argv == [*[f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] * bool(waits), *words[1:]]
    assert subprocess.run(submit, capture_output=True).returncode == 0 and len(calls(scheduler)) == len(told)
    jobs = sweep.read_sweep(apertus)
    for j in jobs:
        record = run.read_record(config.project_root() / j["run"])
        assert [k["id"] for k in record["jobs"]] == j["jobs"] == [ids[n] for n in (f"{j['name']}+shards", j["name"]) if n in ids]
        assert [k["kind"] for k in record["jobs"] if "kind" in k] == ["shards"] * (j["stage"] in config.SHARD_STAGES)


@pytest.mark.slurm
@pytest.mark.slow
def test_the_tiny_chain_on_a_real_slurm(demo, tmp_path, monkeypatch):
    "Submitted by the script in one go: from a model that answers to trained ones; then nothing is left to submit, and another experiment finds the rows"
    if reason := slurm_cluster.missing(): pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", nodes=2, cpus=2) as cluster:
        for k, v in (cluster.env | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(demo))).items(): monkeypatch.setenv(k, v)
        smaller = [('"cluster.device": "cpu"', '"cluster.device": "cpu", "cluster.time": 20, "artifacts_subdir": "mine"'), ("sft_steps=400", "sft_steps=4"),
                   ('optim=["adamw_torch"], num_pairs=[1, 2]', 'optim=["adamw_torch"], num_pairs=[1]'), ("sub_experiment: str = \"losses\"", "sub_experiment: str = \"small\""),
                   ('source, reward = {', f'source, reward = {{"dataset_args.dataset_name": "{demo}/datasets/demo-answers", '), ('"dataset_args.debug_subsample": 300', '"dataset_args.debug_subsample": 40'),
                   ('"generation.n": 6, "generation.max_new_tokens": 32', '"generation.n": 2, "generation.max_new_tokens": 4'), ('"keep_existing": False', '"keep_existing": True'),
                   ('"num_pairs": "{num_pairs}", "max_drop_fraction": 0.9', '"num_pairs": "{num_pairs}", "references": "all", "max_drop_fraction": 0.95'),
                   ('"training_args.max_steps": 16, "training_args.save_steps": 16', '"training_args.max_steps": 2, "training_args.save_steps": 2'),
                   ('"global_batch_size": 16', '"global_batch_size": 8'),
                   ('"evaluation.num_prompts": 100', '"evaluation.num_prompts": 8')]
        path = copied(tmp_path, *smaller)
        folder = sweep.run_experiment(path)
        done = subprocess.run([str(folder / "submit.sh")], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 13, done.stdout + done.stderr
        assert sweep.submit_sweep(folder) == {}  # all of them wait or run
        last, end = sweep.read_sweep(folder)[-1]["jobs"], time.monotonic() + 400
        said = lambda: "\n".join(f"-- {p}\n{p.read_text()[-1500:]}" for p in [*Path(folder / "out").glob("*.*"), *Path(folder / "out").glob("*/*.out")] if p.is_file())
        while any(cluster.state(n) not in slurm_cluster.FINISHED for j in sweep.read_sweep(folder) for n in j["jobs"]):
            assert time.monotonic() < end, (last, sweep.sweep_rows(folder), said())
            time.sleep(1)
        rows = sweep.sweep_rows(folder)
        assert [r["status"] for r in rows] == ["finished"] * len(rows), said()
        trained = sweep.sweep_rows(folder, "train_preference")
        assert [(r["loss"], r["steps"]) for r in trained] == [("qrpo", 2), ("sigmoid", 2)] and all(r["accuracy_after"] is not None for r in trained)
        assert "Of 2 finished jobs" in sweep.sweep_conclusion(trained, "job", "accuracy_gain", maximize=True)
        assert sweep.submit_sweep(folder) == {}
        again = sweep.run_experiment(path)
        assert {(again / f"submitted/{j['name']}").read_text() for j in sweep.read_sweep(again)} == {"done\n"}
