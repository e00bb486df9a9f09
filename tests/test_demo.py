"The embedded data and model: disjoint splits, built once however many ask, evaluated as a process of its own"
import json
import subprocess
import sys

import pytest

from post_training import config
from post_training.demo import data as embedded
from post_training.core.files import UserError, verify_manifest


@pytest.mark.parametrize("seed", range(4))
def test_no_problem_is_in_both_splits(seed):
    rows = embedded.demo_rows(seed)
    assert not embedded.shared_problems(rows["train"], rows["eval"])
    assert len(rows["eval"]) >= 300
    for column in ("skill", "language", "source"): assert {r[column] for r in rows["eval"]} == {r[column] for r in rows["train"]}
    assert 0 < sum(bool(r["available_functions"]) for r in rows["train"]) < .05 * len(rows["train"])


def test_answers_are_right():
    "Every answer passes its own verifier, and every conversation linearises"
    from post_training.data.swissai import linearise_branch
    from post_training.models.verifiers import run_verifier
    for row in embedded.demo_rows()["eval"]:
        messages = linearise_branch(row)
        blocks = messages[-1]["content"]["blocks"]
        call = next((json.dumps([{c["name"]: json.loads(c["arguments"])} for c in b["calls"]]) for b in blocks if b["type"] == "tool_calls"), None)
        assert run_verifier(row["verifier"], call or blocks[-1]["text"], row["answer"]) == 1


def test_built_once(tmp_root):
    "Two processes that find nothing build everything once between them"
    code = "from post_training import config; from post_training.demo import data as demo; print(len(demo.ensure_demo(config.compose('train_sft').cfg)))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(p.communicate()[0].splitlines()[-1]) for p in both]
    assert [p.returncode for p in both] == [0, 0] and sum(counts) == 2
    home = tmp_root / "artifacts"
    assert not verify_manifest(home / "datasets" / "demo") and not verify_manifest(home / "models" / "tiny")
    assert not [p for p in home.rglob(".tmp-*")]
    with (home / "models" / "tiny" / "model.safetensors").open("ab") as f: f.write(b"x")  # damage is seen and mended
    assert embedded.ensure_demo(config.compose("train_sft").cfg) == [home / "models" / "tiny"]


def test_a_folder_of_another_hand_stays(tmp_root):
    (tmp_root / "artifacts" / "datasets" / "demo").mkdir(parents=True)
    with pytest.raises(UserError, match="was not built here"): embedded.ensure_demo(config.compose("train_sft").cfg)


def evaluate(*args):
    return subprocess.run([sys.executable, "-m", "post_training.evaluation.answers", *map(str, args)], capture_output=True, text=True)


def test_evaluation_is_a_process(demo, tmp_path):
    "It reads a frozen configuration, writes its result, and says the user's mistakes without a traceback"
    cfg = config.compose("train_sft", ["evaluation.max_new_tokens=4"]).cfg
    config.save_frozen(cfg, tmp_path / "config.yaml")
    done = evaluate("--config", tmp_path / "config.yaml", "--out", tmp_path / "out.json", "--num-prompts", 30)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["n"] == 30 and out["checkpoint"] == "tiny" and "accuracy" in done.stdout
    done = evaluate("--config", tmp_path / "config.yaml", "--out", tmp_path / "out2.json", "--checkpoint", tmp_path / "missing")
    assert done.returncode == 2 and "There is no model at" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out2.json").exists()
    assert json.loads((tmp_path / "error.json").read_text())["kind"] == "user"
