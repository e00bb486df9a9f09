"The stages that prepare data, as commands: with their defaults, and over real files of three formats; what they leave, and what a mistake leaves"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIN

from post_training import config
from post_training import run


def command(*words, **env):
    return subprocess.run([str(BIN / "post-training"), *words], capture_output=True, text=True, env={**os.environ, **env}, timeout=600)


def the_run(stage):
    "Record and folder of the only run of a stage"
    found = [p for p in run.all_runs() if p.parent.parent.name == stage]
    assert len(found) == 1, found
    return run.read_record(found[0]), found[0]


@pytest.fixture
def small(demo, tmp_root, monkeypatch):
    "Runs of a test's own; the tiny model and the demo data are the session's"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    return f"artifacts_subdir={tmp_root.name}"


def test_mixture(small, tmp_root):
    out = command("dataset_mixture", small)
    assert out.returncode == 0, out.stderr
    record, folder = the_run("dataset_mixture")
    assert "2,970 rows from 2 sources in demo-mixture" in out.stdout and run.is_done(folder)
    assert [s["source"] for s in record["sources"]] == ["demo", "greetings", "total"] and record["sources"][-1]["rows"] == 2970
    notebook = json.loads((folder / "dataset_mixture.ipynb").read_text())
    assert sum("image/png" in o.get("data", {}) for c in notebook["cells"] for o in c.get("outputs", [])) == 2
    from post_training.data.io import load_splits
    splits = load_splits(record["final"]["output"])
    assert {k: len(v) for k, v in splits.items()} == {"train": 2970, "eval": 400}
    again = command("dataset_mixture", small)
    assert again.returncode == 0 and again.stdout.startswith("done already"), again.stdout + again.stderr
    (Path(record["final"]["output"]) / "train/state.json").write_text("{}")  # damage: done no longer
    third = command("dataset_mixture", small)
    assert third.returncode == 0 and "attempt 2 (resume)" in third.stdout, third.stdout + third.stderr


@pytest.mark.slow
def test_another_mixture_does_not_replace_it(small):
    assert command("dataset_mixture", small).returncode == 0
    out = command("dataset_mixture", small, "seed=1")
    assert out.returncode == 2 and "rows of another configuration" in out.stderr and "dataset_name" in out.stderr, out.stderr
    assert command("dataset_mixture", small, "job_subdir=elsewhere").returncode == 0  # the same rows, asked for under another name


@pytest.mark.slow
def test_real_mixture_then_tokenize_and_train(data_dir, small, tmp_root, demo):
    "Three sources of three formats, one drawn from, one repeated; then training reads the tokenized rows"
    out = command("dataset_mixture", "mixture=real-small", small, f"tokenizer_args.tokenizer_name_or_path={demo}/models/tiny", "tokenizer_args.chat_template_name=tulu",
                  "tokenizer_args.model_pad_token_id=10", "max_drop_fraction=0.2")
    assert out.returncode == 0, out.stderr
    record, _ = the_run("dataset_mixture")
    rows = {s["source"]: s for s in record["sources"]}
    assert rows["gsm8k"]["rows"] == 7473 // 4 and rows["seed-tasks"]["rows"] == 3 * rows["seed-tasks"]["drawn"] and rows["sharegpt"]["rows"] <= 500
    assert all(s["tokens"] > s["completion_tokens"] > 0 for s in record["sources"])
    assert [k for k in record["overlaps"]] and set(record["inputs"]) >= {str(data_dir / "gsm8k_train.jsonl")}
    mixed = ["dataset=local", f"dataset_args.dataset_name={record['final']['output']}", small, f"model_args.model_name_or_path={demo}/models/tiny", "tokenizer_args.chat_template_name=tulu",
             "tokenizer_args.model_eos_token_id=null", "training_args.max_length=256", "training_args.max_steps=2", "cluster.device=cpu", "max_drop_fraction=0.2"]
    out = command("tokenize", *mixed)
    assert out.returncode == 0, out.stderr
    made, _ = the_run("tokenize")
    before = sorted(p.name for p in Path(made["final"]["output"]).parent.iterdir() if not p.name.startswith("."))
    out = subprocess.run([sys.executable, "-m", "post_training.train_sft", *mixed], capture_output=True, text=True, env=os.environ | dict(WANDB_MODE="disabled"))
    assert out.returncode == 0, out.stderr
    trained, _ = the_run("train_sft")
    assert trained["counts"]["train"] == made["counts"]["train"] and trained["fingerprints"]["train_rows"] == made["fingerprints"]["train_rows"]
    assert sorted(p.name for p in Path(made["final"]["output"]).parent.iterdir() if not p.name.startswith(".")) == before  # nothing was tokenized again
    assert [p["hash"] for p in trained["parents"]] == [record["hash"]]  # the mixture is named in the record of the training


def test_split(small):
    out = command("dataset_split", small, "dataset_args.eval_split.ratio=0.1")
    assert out.returncode == 0 and "570 rows in validation" in out.stdout, out.stdout + out.stderr
    record, _ = the_run("dataset_split")
    assert record["counts"] == {"train": 5130, "validation": 570, "eval": 400} and len(record["classes"]) > 1


def test_split_that_is_there(small):
    out = command("dataset_split", small, "dataset_args.eval_split.name=eval")
    assert out.returncode == 0 and "nothing done" in out.stdout, out.stdout + out.stderr


def test_linearise_then_train_on_the_same_tokens(small, demo):
    "Rows that were linearised before are tokenized to the very ids of rows that were not"
    out = command("linearise", small)
    assert out.returncode == 0, out.stderr
    record, _ = the_run("linearise")
    from post_training.stages.tokenized_data import load_tokenized_data
    few = ["dataset_args.debug_subsample.train=300", small]
    a = load_tokenized_data(config.compose("tokenize", few).cfg)
    b = load_tokenized_data(config.compose("tokenize", [*few, "dataset=local", f"dataset_args.dataset_name={record['final']['output']}", "dataset_args.train_split.name=train"]).cfg)
    assert a.train["input_ids"][:] == b.train["input_ids"][:] and a.train["completion_mask"][:] == b.train["completion_mask"][:]


def test_generation_ratio(small):
    out = command("generation_ratio", small, "dataset_args.debug_subsample.train=500")
    assert out.returncode == 0 and "completion over prompt" in out.stdout, out.stderr
    record, _ = the_run("generation_ratio")
    assert record["ratios"][-1]["source"] == "all" and record["ratios"][-1]["rows"] == 500


@pytest.mark.slow
def test_a_changed_source_is_noticed(small, tmp_path):
    rows = tmp_path / "rows.jsonl"
    talk = lambda i: json.dumps(dict(question=f"What is {i} + 1?", answer=str(i + 1))) + "\n"
    rows.write_text("".join(map(talk, range(20))))
    args = ["dataset_mixture", "mixture=local", "dataset_name=mine", f"sources=[{{dataset_name: a, dataset_path: {rows}}}]", small]
    assert command(*args).returncode == 0
    rows.write_text("".join(map(talk, range(30))))
    out = command(*args)
    assert out.returncode == 2 and "rows.jsonl changed since the finished run" in out.stderr, out.stderr
    out = command(*args, "--force")
    assert out.returncode == 0 and "30 rows" in out.stdout, out.stderr


@pytest.mark.slow
def test_training_on_changed_rows_is_refused(small, tmp_path, demo):
    rows = tmp_path / "rows.jsonl"
    talk = lambda i, more="": json.dumps(dict(question=f"What is {i} + 1?", answer=f"{i + 1}{more}")) + "\n"
    rows.write_text("".join(map(talk, range(20))))
    args = ["dataset=local", f"dataset_args.dataset_name={rows}", "training_args.max_steps=1", "cluster.device=cpu", "evaluation.num_prompts=0", "global_batch_size=8",
            "training_args.per_device_train_batch_size=8", small]
    assert command("train_sft", *args, WANDB_MODE="disabled").returncode == 0
    assert command("train_sft", *args).stdout.startswith("done already")
    rows.write_text("".join(map(talk, range(19))) + talk(19, " of course"))
    out = command("train_sft", *args)
    assert out.returncode == 2 and "rows.jsonl changed since the finished run" in out.stderr, out.stdout + out.stderr


@pytest.mark.slow
def test_mixture_keeps_tools(small, tmp_path):
    "Rows that offer or call tools make the mixture structured; plain rows keep tools and calls as well"
    offered = [dict(type="function", function=dict(name="add", description="Sum", parameters=dict(type="object", properties=dict(x=dict(type="number")))))]
    call = [dict(role="user", content="1+1?"), dict(role="assistant", content=None, tool_calls=[dict(id="c", type="function", function=dict(name="add", arguments='{"x": 1}'))]),
            dict(role="tool", content="2", tool_call_id="c"), dict(role="assistant", content="2")]
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(dict(messages=call, tools=offered)) + "\n" for _ in range(5)))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(dict(question=f"{i}?", answer=f"{i}")) + "\n" for i in range(5)))
    args = ["dataset_mixture", "mixture=local", "dataset_name=tooled", f"sources=[{{dataset_name: a, dataset_path: {tmp_path}/plain.jsonl}}, {{dataset_name: b, dataset_path: {tmp_path}/tools.jsonl}}]", small]
    from post_training.data.io import load_rows
    from post_training.data.messages import read_conversation, to_messages

    def rows_of(name): return load_rows(next(run.read_record(p)["final"]["output"] for p in run.all_runs() if name in p.name and run.is_done(p)), "train")
    out = command(*args, "message_format=plain", "dataset_name=plain-tools")
    assert out.returncode == 0, out.stderr
    kept = [read_conversation(r, ("messages",)) for r in rows_of("plain-tools") if r["source"] == "b"]
    assert [[c.messages[1]["tool_calls"][0]["function"]["arguments"], c.tools[0]["function"]["name"]] for c in kept] == [[dict(x=1), "add"]] * 5
    assert command(*args).returncode == 0
    rows = rows_of("tooled")
    blocks = [[b["type"] for b in to_messages(r, ("messages",))[-1]["content"]["blocks"]] for r in rows if r["source"] == "b"]
    assert blocks == [["tool_calls", "tool_outputs", "response"]] * 5 and len(rows) == 10


@pytest.mark.slow
def test_mixture_without_messages(small, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(dict(question=f"{i}?", answer=f"{i}", chosen="x")) + "\n" for i in range(5)))
    source = f"sources=[{{dataset_name: a, dataset_path: {tmp_path}/rows.jsonl}}]"
    out = command("dataset_mixture", "mixture=local", "dataset_name=raw", source, "columns_to_keep=[question,answer]", small)
    assert out.returncode == 0, out.stderr
    out = command("dataset_mixture", "mixture=local", "dataset_name=typo", source, "columns_to_keep=[mesages]", small)
    assert out.returncode == 2 and "Did you mean 'messages'" in out.stderr, out.stderr


def test_only_the_named_splits_are_read(small, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.jsonl").write_text(json.dumps(dict(question="a", answer="b")) + "\n")
    (tmp_path / "x/test.jsonl").write_text("not json\n")
    out = command("dataset_mixture", "mixture=local", "dataset_name=half", f"sources=[{{dataset_name: a, dataset_path: {tmp_path}/x}}]", small)
    assert out.returncode == 0, out.stderr


MISTAKES = {  # name: words after dataset_mixture, words of the message
    "unknown key of a source": (["mixture=local", "dataset_name=m", "sources=[{dataset_name: a, dataset_pth: b}]"], ["dataset_pth", "dataset_path"]),
    "missing file": (["mixture=local", "dataset_name=m", "sources=[{dataset_name: a, dataset_path: nowhere/b.jsonl}]"], ["nowhere/b.jsonl"]),
    "double name": (["mixture=local", "dataset_name=m", "sources=[{dataset_name: a, dataset_path: b.jsonl}, {dataset_name: a, dataset_path: c.jsonl}]"], ["'a'"]),
    "no sources": (["mixture=local", "dataset_name=m", "sources=[]"], ["sources"]),
    "unknown preset": (["mixture=demmo"], ["Did you mean 'demo'"]),
    "unknown file": (["mixture=my.yaml"], ["my.yaml", "no such file"]),
    "negative share": (["mixture=local", "dataset_name=m", "sources=[{dataset_name: a, dataset_path: b.jsonl, subsample_factor: -1}]"], ["subsample_factor"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told(case, small):
    words, told = MISTAKES[case]
    out = command("dataset_mixture", *words, small)
    assert out.returncode == 2 and "Traceback" not in out.stderr, out.stdout + out.stderr
    for word in told: assert word in out.stderr, (word, out.stderr)
    assert len(out.stderr.strip().splitlines()) <= 3, out.stderr


@pytest.mark.slow
def test_several_ranks_read_what_one_made(small, tmp_path):
    "Two processes under accelerate, started by hand: rank 0 tokenizes before they meet, the other reads"
    args = [small, "cluster.device=cpu", "accelerate_config=ddp", "training_args.max_steps=1", "evaluation.num_prompts=0", "wandb.mode=disabled", "global_batch_size=8",
            "training_args.per_device_train_batch_size=4", "training_args.eval_strategy=no", "dataset_args.debug_subsample.train=64"]
    settings = tmp_path / "ddp.yaml"
    settings.write_text((config.CONFIGS / "accelerate/ddp.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), "-m", "post_training.train_sft", *args]
    out = subprocess.run(argv, capture_output=True, text=True, env=os.environ | dict(ACCELERATE_USE_CPU="true"), timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    record, folder = the_run("train_sft")
    assert record["topology"]["world_size"] == 2 and run.is_done(folder)
