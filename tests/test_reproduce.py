"Runs repeated from their records, and what a receipt says about them"
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from post_training import cli
from post_training import run

ROOT = Path(__file__).parents[1]
SHORT = ["training_args.max_steps=4", "global_batch_size=8", "training_args.save_steps=2", "training_args.eval_steps=4", "evaluation.num_prompts=2", "evaluation.max_new_tokens=4"]


def receipt_of(artifacts, name):
    return json.loads((artifacts / "reproduced" / name / "receipt.json").read_text())


@pytest.mark.slow
def test_a_run_and_what_makes_it_differ(tmp_root, capfd, monkeypatch):
    "Repeated: equal to the last bit. With a record that was changed by hand the first difference is named; a changed input and a killed run are refused."
    artifacts, rows = tmp_root / "artifacts", tmp_root / "rows.jsonl"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(artifacts))
    rows.write_text("".join(json.dumps(dict(prompt=f"{i} + 1?", completion=str(i + 1))) + "\n" for i in range(40)))
    assert cli.main(["train_sft", "dataset=local", f"dataset_args.dataset_name={rows}", "training_args.eval_strategy=no", *[w for w in SHORT if "eval" not in w]]) == 0
    [folder] = [r for r in run.all_runs() if "train_sft" in str(r)]
    assert cli.main(["runs", "reproduce", folder.name, "--here"]) == 0
    receipt = receipt_of(artifacts, folder.name)
    assert receipt["equal"] and receipt["steps"]["compared"] >= 1 and receipt["outputs"] == dict(equal=True, files=1, different=[]), receipt
    assert {f["fact"] for f in receipt["facts"]} <= {"commit", "changed_files"}, receipt["facts"]
    assert (artifacts / "reproduced" / folder.name / "receipt.ipynb").is_file()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | dict(loss=1.25)
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    again = artifacts / "reproduced" / folder.name / "runs"
    capfd.readouterr()
    assert cli.main(["runs", "receipt", str(folder), str(run.all_runs(again)[0])]) == 1
    assert f"Different from step {changed['step']} on (loss: 1.25 and" in capfd.readouterr().out
    rows.write_text(rows.read_text() + '{"prompt": "x", "completion": "y"}\n')
    assert cli.main(["runs", "reproduce", folder.name, "--here"]) == 2
    assert "has changed since the run" in capfd.readouterr().err
    moved = tmp_root / "moved.jsonl"
    moved.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    record = run.read_record(folder)
    [name] = [k for k in record["inputs"] if k.endswith("rows.jsonl")]
    from post_training.view import rerun
    rerun.check_inputs(record, {name: str(moved)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation_ratio", "dataset_mixture"])
def test_kept_records(name, tmp_root, monkeypatch, capfd):
    "The kept record is repeated with the code of its commit, in a worktree that is removed afterwards"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_root / "artifacts"))
    shutil.rmtree(tmp_root / "artifacts", ignore_errors=True)
    commit = run.read_record(ROOT / "runs/examples" / name)["attempts"][-1]["git"]["commit"]
    if subprocess.run(["git", "-C", ROOT, "cat-file", "-e", commit], capture_output=True).returncode: pytest.skip(f"the history of this checkout lacks {commit[:10]}")
    code = cli.main(["runs", "reproduce", str(ROOT / "runs/examples" / name)])
    said = capfd.readouterr()
    assert code == 0, said.err[-3000:] + said.out[-3000:]
    receipt = receipt_of(tmp_root / "artifacts", name)
    assert receipt["equal"] and receipt["results"] == [] and not (tmp_root / "artifacts/reproduced" / name / "code").exists()


@pytest.mark.parametrize("words, says", [
    (["reproduce"], "RUN"), (["reproduce", "nothing"], "no run 'nothing'"), (["reproduce", "runs/examples/demo", "--input", "x"], "write NAME=PATH"),
    (["reproduce", "runs/examples/demo", "--input", "x=/tmp"], "the record names no such input, only artifacts/"),
    (["receipt", "runs/examples/demo"], "B"), (["receipt", "runs/examples/demo", "runs/examples/generation_ratio"], "A run of train_sft cannot be compared with one of generation_ratio")])
def test_mistakes(words, says, tmp_root, capsys):
    assert cli.main(["runs", *[str(ROOT / w) if w.startswith("runs/") else w for w in words]]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
