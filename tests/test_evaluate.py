"The stage evaluate as it is typed: comparison, done again, killed and gone on, harness tasks, bad input"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from post_training import config
from post_training.stages import evaluate
from post_training.evaluation import answers
from post_training import run
from post_training.core.files import UserError
from post_training.cli import main
from post_training.demo.data import demo_rows
from post_training.models.load import build_tiny
from post_training.stages.tokenized_data import quiet_libraries

quiet_libraries()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Two untrained checkpoints and some demo rows"
    home = tmp_path_factory.mktemp("evaluate")
    rows = [r for r in demo_rows(n_train=25, n_eval=60)["eval"] if r["skill"] != "tool"]
    for seed in (0, 1): build_tiny(home / f"model-{seed}", rows, seed=seed)
    (home / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


def typed(place, *more, rows="rows.jsonl", answers=("evaluation.max_new_tokens=4",)):
    return [f"model_args.model_name_or_path={place}/model-0", f"dataset_args.dataset_name={place / rows}", *answers, *more]


def measured(*overrides):
    cfg = config.compose("evaluate", list(overrides)).cfg
    return evaluate.evaluate(run.open_run(cfg), cfg), run.read_record(run.run_folder(cfg))


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path.name


def test_every_answer_is_in_the_file(place, tmp_root):
    results, record = measured(*typed(place, f"checkpoints=[{place}/model-0,{place}/model-1]"))
    assert list(results["checkpoints"]) == ["model-0", "model-1"] == list(record["evaluation"])
    lines = [json.loads(x) for x in (Path(record["final"]["output"]) / "answers.jsonl").read_text().splitlines()]
    told = results["checkpoints"]["model-0"]
    assert len(lines) == 2 * told["n"] and {"prompt", "expected", "got", "right", "source"} <= set(lines[0])
    assert round(sum(x["right"] for x in lines if x["checkpoint"] == "model-0") / told["n"], 4) == told["accuracy"]
    assert results["differences"]["model-1"]["bits_per_byte"]["n"] == told["n"]


def test_one_bad_row_does_not_end_it(place, tmp_root):
    rows = [dict(question="1 + 1?", answer="2"), dict(question="2 + 2?", answer="(", verifier="regex"), dict(question="x", answer="y", verifier="regx"), dict(question="no answer"),
            dict(question="3 " * 3000, answer="3"), dict(question="And?", answer=None)]
    results, record = measured(*typed(place, rows=write(place / "odd.jsonl", rows)), "measure=[accuracy]")
    told = results["checkpoints"]["model-0"]
    assert (told["n"], told["not_checked"], told["no_prompt"]) == (1, 4, 1)  # a question without an answer is asked
    assert any("not a regular expression" in k for k in told["not_checked_why"]) and any("2048 positions" in k for k in told["no_prompt_why"])
    assert record["evaluation"]["model-0"]["not_checked"] == 4 and told["not_checked_why"]["the row has no answer"] == 2


def test_a_rule_for_answers_is_no_text_to_score(place, tmp_root):
    rows = [dict(question="1 + 1?", answer="2"), dict(question="2 + 2?", answer="^4$", verifier="regex"), dict(question="Short?", answer="1-3", verifier="length")]
    results, _ = measured(*typed(place, rows=write(place / "rules.jsonl", rows), answers=()), "measure=[perplexity]")
    told = results["checkpoints"]["model-0"]["perplexity"]
    assert (told["rows"], told["dropped"], sorted(told["dropped_why"].values())) == (1, 2, [1, 1])


@pytest.mark.parametrize("more, rows, says", [
    ([], [dict(question="2 + 2?")], "measure=[perplexity]"),
    ([], [dict(question="Capital?", answer="Paris")], "evaluation.verifier=exact_match"),
    ([], [], "dataset_args.dataset_name|no rows|empty"),
    (["dataset_args.split=tset"], [dict(question="2?", answer="2")], "tset"),
    (["checkpoints=[run:nothing]"], None, "no run 'nothing'"),
    (["checkpoints=[artifacts/none]"], None, "There is no model at"),
    (["lm_eval.tasks=[none]", "lm_eval.include_path=no/folder"], None, "no such folder"),
    (["measure=[perplexity]"], [dict(prompt="only a prompt", completion="")], "completion"),
])
def test_bad_input_writes_nothing(place, tmp_root, more, rows, says):
    name = "rows.jsonl" if rows is None else write(place / "bad.jsonl", rows)
    only_text = "measure=[perplexity]" in more  # nothing is generated
    with pytest.raises(UserError) as e: measured(*(typed(place, rows=name, answers=()) if only_text else typed(place, rows=name)), *more)
    assert any(s in str(e.value) for s in says.split("|")), e.value
    assert not list(tmp_root.rglob("evaluation")) and not list(tmp_root.rglob("answers.jsonl"))


def test_a_checkpoint_without_a_template_and_a_broken_one(place, tmp_root):
    bare = shutil.copytree(place / "model-0", tmp_root / "bare")
    (bare / "chat_template.jinja").unlink()
    both = f"checkpoints=[{place}/model-0,{bare}]"
    with pytest.raises(UserError, match="set tokenizer_args.chat_template_name"): measured(*typed(place), both)
    results, _ = measured(*typed(place), both, "tokenizer_args.chat_template_name=apertus", "evaluation.num_prompts=6")
    assert results["differences"]["bare"]["bits_per_byte"]["difference"] == 0
    weights = bare / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(Exception): measured(*typed(place), both, "tokenizer_args.chat_template_name=apertus", "evaluation.num_prompts=7")
    assert len(list(tmp_root.rglob("results.json"))) == 1


def test_samples_and_words(place, tmp_root):
    results, _ = measured(*typed(place), "evaluation.samples=3", "evaluation.temperature=1.0", "evaluation.num_prompts=5", "measure=[accuracy]")
    told = results["checkpoints"]["model-0"]
    assert (told["n"], told["answers"]) == (5, 15) and "[wrong" in evaluate.sample_lines(results)
    assert "<td" in answers.show_samples(told) and "wrong" in answers.show_samples(told)


def test_an_early_stop(place, tmp_root):
    "A checkpoint that answers as the first one stops when a difference of 0.9 is ruled out; the table and the files say how many prompts were asked"
    rows = [dict(question=f"{i} + 1?", answer=str(i + 1)) for i in range(60)]
    asked = [*typed(place, rows=write(place / "sixty.jsonl", rows)), f"checkpoints=[{place}/model-0,{place}/model-1]", "evaluation.stop_early=true", "evaluation.batch_size=8", "measure=[accuracy]"]
    results, record = measured(*asked, "evaluation.smallest_difference=0.9")
    first, second = results["checkpoints"].values()
    assert first["n"] == 60 and second["n"] == second["early_stop"]["prompts"] < 60 and second["early_stop"]["decision"] == "no difference as large as 0.9"
    assert second["no_prompt_why"] == {evaluate.NOT_ASKED: 60 - second["n"]} and record["differences"]["model-1"]["accuracy"]["n"] == second["n"]
    assert [r.get("stopped") for r in evaluate.summary_rows(results)] == [None, "no difference as large as 0.9"]
    with pytest.raises(UserError, match="smallest_difference"): measured(*asked[:-2], "evaluation.smallest_difference=0.1", "evaluation.stop_early=false")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(place, tmp_root, capsys):
    rows = [dict(question=f"{i} + 1?", answer=str(i + 1)) for i in range(100)]
    asked = [*typed(place, rows=write(place / "many.jsonl", rows))[:2], "evaluation.batch_size=2", "evaluation.max_new_tokens=8", "measure=[accuracy]"]
    code = "import sys; from post_training import config, run; from post_training.stages import evaluate; c = config.compose('evaluate', sys.argv[1:]).cfg; evaluate.evaluate(run.open_run(c), c)"
    p = subprocess.Popen([sys.executable, "-c", code, *asked], start_new_session=True)
    end = time.time() + 60
    while not (kept := list(tmp_root.rglob("answers-0.jsonl"))) or len(kept[0].read_text().split("\n")) < 6:
        assert p.poll() is None and time.time() < end
        time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    results, record = measured(*asked)
    assert "prompts were answered before" in capsys.readouterr().out and [a["began_as"] for a in record["attempts"]] == ["new", "resume"]
    again, _ = measured(*asked, "job_subdir=whole")
    whole = [json.loads(x)["got"] for x in (next(tmp_root.rglob("whole/**/answers.jsonl"))).read_text().splitlines()]
    assert whole == [json.loads(x)["got"] for x in (Path(record["final"]["output"]) / "answers.jsonl").read_text().splitlines()]
    assert not list(tmp_root.rglob("answers-0.jsonl"))


@pytest.mark.slow
def test_as_typed(place, tmp_root, capsys):
    "The command twice, with a harness task; the numbers agree, and runs sort by them"
    from post_training.evaluation.lm_eval import write_task
    rows = [dict(question=f"{a} + {b}?", answer=str(a + b), verifier="exact_match") for a in range(2, 8) for b in range(2, 8)]
    write_task(tmp_root / "tasks", "sums", rows, 4)
    words = ["evaluate", *typed(place, rows=write(place / "sums.jsonl", rows)), "lm_eval.tasks=[sums]", f"lm_eval.include_path={tmp_root}/tasks", "lm_eval.apply_chat_template=true"]
    assert main([*words, "--dry-run"]) == 0 and not (tmp_root / "runs").exists()
    assert main(words) == 0
    assert "done already" not in capsys.readouterr().out
    assert main(words) == 0 and "done already" in capsys.readouterr().out
    record = run.read_record(run.all_runs()[0])
    told = record["evaluation"]["model-0"]
    assert told["lm_eval"]["sums"]["exact_match"] == told["accuracy"] and told["lm_eval"]["sums"]["n"] == len(rows)
    assert main(["runs", "--sort", "bits_per_byte"]) == 0 and "bits_per_byte" in capsys.readouterr().out
    assert main([*words, "lm_eval.task=3"]) == 2


def test_documents_of_a_task_named_by_its_file_are_inputs(place, tmp_root):
    from post_training.evaluation.lm_eval import write_task
    task = write_task(tmp_root / "far" / "away", "mine", [dict(question="2 + 2?", answer="4")], 4)
    words = [*typed(place, answers=()), "measure=[]", f"lm_eval.tasks=[{task}]", "lm_eval.apply_chat_template=true"]
    _, record = measured(*words)
    assert run.changed_inputs(record) == []
    with open(task.with_suffix(".jsonl"), "a") as f: f.write(json.dumps(dict(question="3 + 3?", answer="6")) + "\n")
    assert run.changed_inputs(record) == [str(task.with_suffix(".jsonl"))]


def test_prompts_have_the_preamble_of_training(tmp_path):
    "With `instruction_preamble` the evaluation asks as training does"
    from post_training.evaluation.answers import eval_rows
    for split in ("train", "eval"): (tmp_path / f"{split}.jsonl").write_text(json.dumps(dict(instruction="Say 1.", output="1")) + "\n")
    asked = [f"dataset_args.dataset_name={tmp_path}", "model=tiny", "dataset=demo"]
    plain, with_preamble = (eval_rows(config.compose("train_sft", [*asked, *more]).cfg, 1)[0] for more in ([], ["dataset_args.instruction_preamble=true"]))
    assert plain["instruction"] == "Say 1." and "### Instruction:\nSay 1." in with_preamble["instruction"]
