"Preference data as swiss-ai/posttraining and OLMo's pipelines write it: log-probabilities, rewards and reference flags are kept where they are valid, and counted where not"
import json

import pytest
from datasets import Dataset, disable_progress_bars, load_from_disk

from post_training import config, run
from post_training.core.files import UserError
from post_training.data.io import load_rows
from post_training.preferences.pairs import as_pairs, mix_pairs
from post_training.preferences.rows import needs_blocks, row_features, row_fields, to_rows, to_swissai
from post_training.stages import preference_data
from post_training.stages.tokenized_data import tokenizer_of

disable_progress_bars()
LEFT_OUT = "ref_logprob was computed for another number of tokens: left out"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def branch(text, metadata=None, **fields):
    return dict(messages=[dict(role="assistant", parts=[dict(type="response", content=text, metadata=metadata)])], **fields)


def conversation(i, branches):
    return dict(conversation_id=f"c{i}", dataset_source="sums", original_metadata=dict(level=i % 3), system_prompt=dict(content="Be brief.", metadata=None), available_functions=[],
                initial_prompt=dict(role="user", content=f"{i} + 1 = ?", metadata=None), conversation_branches=branches, created_timestamp="2025-01-01")


def block_message(role, **content):
    empty = dict(text=None, tools=None, has_thinking=None, formatted_tools=None, parts=None, blocks=None)
    return dict(role=role, content={**empty, **content})


def linear(i, text):
    "A whole conversation as the seed's preference format stores it"
    block = dict(type="response", text=text, calls=[dict(name="", arguments="")], outputs=[dict(name="", output="")])
    return [block_message("developer", tools="", has_thinking=False, formatted_tools=""), block_message("user", parts=[dict(type="text", text=f"{i} + 1 = ?")]), block_message("assistant", blocks=[block])]


def hf_row(i):
    return dict(chosen=linear(i, f"{i + 1}"), rejected=linear(i, "no"), ref_chosen_logprob=-2., ref_rejected_logprob=-3., chosen_reward=3., rejected_reward=0., ref_rewards=[2., 3., 1.],
                chosen_quantile_reward=1., rejected_quantile_reward=0.)


def olmo_row(i):
    "A pair with completions of the reference as JSON text and nested rewards"
    ask = dict(role="user", content=f"{i} + 1 = ?")
    return dict(id=f"o{i}", source="tulu" if i % 2 else "olmo", prompt=ask["content"], chosen=[ask, dict(role="assistant", content=f"{i + 1}")], rejected=[ask, dict(role="assistant", content="no")],
                chosen_rewards=[1.5], rejected_rewards=[0.5], ref_completions=[ask, dict(role="assistant", content=json.dumps([f"{i}", f"{i + 2}", f"{i + 3}"]))], ref_rewards=[[1.], [0.2], [0.1]],
                max_chosen_rejected_reward_tokens_len=2)


def annotate(name, data, *overrides, out=None):
    "A stage in this process: its rows, counts of completions, and the folder that it writes"
    cfg = config.compose(name, [f"dataset_args.dataset_name={data}", *overrides]).cfg
    tokenizer = tokenizer_of(cfg) if "tokenizer_args" in cfg else None
    rows, _ = preference_data.read_annotation_rows(cfg, tokenizer)
    facts = dict(reference="ab12", probe_rows=[0])
    work = preference_data.ANNOTATION_STAGES[name]
    results = list(enumerate(work.batch_fn(cfg, rows, tokenizer, facts)(range(len(rows)))))
    blocks = needs_blocks(rows)
    extra = {k: f for k, f in rows.features.items() if k not in (*row_features(blocks), preference_data.SPLIT_COLUMN)}
    made = list(preference_data.output_rows(rows, [(i, r) for i, r in results if "dropped" not in r]))
    made = Dataset.from_list([{k: v for k, v in r.items() if k != preference_data.SPLIT_COLUMN} for r in made], features=work.features(blocks, extra, row_fields(rows.features)))
    if out: preference_data.in_output_format(made, cfg).save_to_disk(out)
    return made, preference_data.completion_counts(results), str(out)


@pytest.fixture(autouse=True)
def artifacts(demo, monkeypatch):
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))


def seed_rows(scored, old=False):
    "Rows of the stage ref_logprobs as the seed would have written them; `old`: before it had fields of branches"
    out = []
    for row in scored:
        branches = []
        for j, c in enumerate(row["completions"]):
            text = c["content"]["blocks"][0]["text"] if isinstance(c["content"], dict) else c["content"]
            n, prompt, is_reference = c["num_tokens"], c["prompt_tokens"], j > 0
            metadata = dict(chat_num_tokens=n + prompt, context_num_tokens=prompt, model="/models/apertus-8b" if is_reference else None)
            if old: branches.append(branch(text, metadata | dict(is_reference_completion=is_reference), rewards=[float(j)]))
            else: branches.append(branch(text, metadata, completion_ref_logprob=c["ref_logprob"], completion_length=n, reward=float(j), is_reference_completion=is_reference))
        out.append(conversation(int(row["id"][1:]), branches))
    return out


@pytest.fixture(scope="module")
def scored(demo, tmp_path_factory):
    "Twelve rows of four completions with log-probabilities under the tiny model"
    rows = [conversation(i, [branch(t) for t in (f"{i + 1}", f"It is {i + 1}.", "No.", f"{i} plus one")]) for i in range(12)]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
        return annotate("ref_logprobs", jsonl(tmp_path_factory.mktemp("raw") / "raw.jsonl", rows), "batch_tokens=2000")[0]


def numbers(rows): return [(c["ref_logprob"], c["reward"], c["is_reference_completion"], c["policy"]) for r in rows for c in r["completions"]]


def test_rows_with_log_probabilities_keep_them_through_filter_and_pairs(scored, tmp_path):
    given = seed_rows(scored)
    rows, counts, path = annotate("filter", jsonl(tmp_path / "seed.jsonl", given), "max_seq_len=300", out=tmp_path / "rows")
    expected = [(b["completion_ref_logprob"], b["reward"], b["is_reference_completion"], b["messages"][0]["parts"][0]["metadata"]["model"]) for r in given for b in r["conversation_branches"]]
    assert numbers(rows) == expected and counts["with_ref_logprob"] == 48
    assert rows["original_metadata"][0] == dict(level=0)
    pairs, counts, _ = annotate("pairs", path, "min_num_ref_rewards=3")
    assert len(pairs) == 12 and counts["with_ref_logprob"] == 12
    by_reward = {(f"c{i}", b["reward"]): b["completion_ref_logprob"] for i, r in enumerate(given) for b in r["conversation_branches"]}
    for p in pairs:
        assert (p["ref_chosen_logprob"], p["ref_rejected_logprob"]) == (by_reward[p["id"], p["chosen_reward"]], by_reward[p["id"], p["rejected_reward"]])
        assert p["ref_rewards"] == [1., 2., 3.]


def test_old_rows_with_flags_and_rewards_in_other_places(scored, tmp_path):
    rows, counts, _ = annotate("filter", jsonl(tmp_path / "old.jsonl", seed_rows(scored, old=True)), "max_seq_len=300")
    assert [n[1:] for n in numbers(rows)][:2] == [(0., False, None), (1., True, "/models/apertus-8b")]
    assert counts["with_ref_logprob"] == 0


@pytest.mark.parametrize("change", ["completion_length", "context_num_tokens"])
def test_log_probabilities_of_another_encoding_are_left_out_and_counted(change, scored, tmp_path):
    given = seed_rows(scored)
    for row in given[:3]:
        b = row["conversation_branches"][1]
        if change in b: b[change] += 1
        else: b["messages"][0]["parts"][0]["metadata"][change] += 1
    rows, counts, _ = annotate("filter", jsonl(tmp_path / "seed.jsonl", given), "max_seq_len=300")
    assert counts["lost"] == {LEFT_OUT: 3} and counts["with_ref_logprob"] == 45
    assert rows[0]["completions"][1]["ref_logprob"] is None and rows[0]["completions"][1]["reward"] == 1.


def test_existing_log_probabilities_are_kept_after_a_check(scored, tmp_path):
    given = seed_rows(scored)
    path = jsonl(tmp_path / "seed.jsonl", given)
    kept, counts, _ = annotate("ref_logprobs", path, "existing_logprobs=keep")
    assert counts["existing"]["kept"] == 48 and numbers(kept) == numbers(to_rows(load_rows(str(path)))[0])
    again, counts, _ = annotate("ref_logprobs", path)
    report = counts["existing"]
    assert (report["kept"], report["replaced"]) == (0, 48) and report["mean_difference_per_token"] < 1e-4
    for row in given:
        for b in row["conversation_branches"]: b["completion_ref_logprob"] -= 1
    with pytest.raises(UserError, match="not those of this model.*existing_logprobs=recompute"): annotate("ref_logprobs", jsonl(tmp_path / "other.jsonl", given), "existing_logprobs=keep")


def test_a_stage_writes_the_swissai_format_and_reads_the_same_rows_again(scored, tmp_path):
    rows, _, path = annotate("filter", jsonl(tmp_path / "seed.jsonl", seed_rows(scored)), "max_seq_len=300", "output_format=swissai", out=tmp_path / "rows")
    written = load_from_disk(path)
    b = written[0]["conversation_branches"][1]
    assert {"completion_ref_logprob", "completion_length", "reward", "is_reference_completion"} <= b.keys()
    meta = b["messages"][-1]["parts"][-1]["metadata"]
    assert meta["chat_num_tokens"] - meta["context_num_tokens"] == b["completion_length"]
    again, _ = to_rows(written)
    assert again[:] == rows[:] and to_swissai(again)[:] == written[:]
    pairs, _, _ = annotate("pairs", path, "min_num_ref_rewards=3")
    assert len(pairs) == 12 and pairs[0]["ref_chosen_logprob"] is not None


def test_olmo_pairs_bring_completions_of_the_reference(tmp_path):
    rows, counts, path = annotate("filter", jsonl(tmp_path / "olmo.jsonl", [olmo_row(i) for i in range(6)]), "max_seq_len=300", out=tmp_path / "rows")
    assert [(c["policy"], c["reward"]) for c in rows[0]["completions"]] == [("chosen", 1.5), ("rejected", 0.5), ("reference", 1.), ("reference", 0.2), ("reference", 0.1)]
    pairs, _, _ = annotate("pairs", path, "mode=offline")
    assert (pairs[0]["ref_rewards"], pairs[0]["chosen_quantile_reward"]) == ([1., 0.2, 0.1], 1.) and pairs["source"][:2] == ["olmo", "tulu"]
    broken = dict(olmo_row(0), ref_rewards=[[1.]])
    assert to_rows(load_rows(str(jsonl(tmp_path / "broken.jsonl", [broken]))))[1]["lost"] == {"ref_completions and ref_rewards have different lengths": 1}


def test_sets_of_every_form_mix_and_keep_their_source(tmp_path):
    sets = dict(hf=[hf_row(i) for i in range(4)], olmo=[olmo_row(i) for i in range(4)], texts=[dict(prompt=f"{i} + 1 = ?", chosen=f"{i + 1}", rejected="no", score_chosen=2., score_rejected=1.) for i in range(4)])
    sources = [dict(dataset_name=k, dataset_path=str(jsonl(tmp_path / f"{k}.jsonl", rows))) for k, rows in sets.items()]
    mixed = mix_pairs(sources)
    rows = {r["id"]: r for r in mixed.train}
    assert sorted(mixed.train["source"][:]) == ["hf"]*4 + ["olmo"]*4 + ["texts"]*4 and rows["olmo_1"]["origin"] == "tulu"
    assert all(isinstance(m["content"], dict) for r in mixed.train for m in (*r["prompt"], *r["chosen"], *r["rejected"]))
    hf = rows["hf_2"]
    assert (hf["ref_chosen_logprob"], hf["ref_rewards"], hf["chosen_quantile_reward"], hf["rejected_quantile_reward"]) == (-2., [2., 3., 1.], 1., 0.)
    assert (rows["texts_0"]["chosen_reward"], rows["olmo_0"]["ref_rewards"]) == (2., [1., 0.2, 0.1])
    plain = mix_pairs(sources[1:]).train  # without a structured set all stay plain
    assert all(isinstance(m["content"], str) for r in plain for m in r["chosen"])
    mixed.train.to_json(tmp_path / "mixed.jsonl")
    twice = mix_pairs([dict(dataset_name="mixed", dataset_path=f"{tmp_path}/mixed.jsonl"), sources[2]])
    assert {r["origin"] for r in twice.train if r["source"] == "mixed"} == {None, "olmo", "tulu"}


def test_pairs_of_the_pipeline_are_mixed_unchanged(scored, tmp_path):
    _, _, path = annotate("filter", jsonl(tmp_path / "seed.jsonl", seed_rows(scored)), "max_seq_len=300", out=tmp_path / "rows")
    pairs, _, _ = annotate("pairs", path)
    again, counts = as_pairs(pairs, blocks=isinstance(pairs[0]["chosen"][0]["content"], dict))
    assert again[:] == pairs[:] and not counts["dropped"]


def test_a_run_is_finished_when_its_recipe_is(demo, tmp_root, tmp_path, monkeypatch):
    "Rows that are written do not make a run finished: a cell that fails leaves it failed, and the next attempt only merges"
    data = jsonl(tmp_path / "pairs.jsonl", [dict(prompt=f"{i} + 1 = ?", chosen=f"{i + 1}", rejected="no") for i in range(5)])
    cfg = config.compose("pairs", ["mode=offline", f"dataset_args.dataset_name={data}", f"artifacts_subdir={tmp_root.name}", f"job_subdir={tmp_path.name}"]).cfg
    task = run.open_run(cfg)
    preference_data.run_annotation(task, cfg, finish=False)
    run.close_attempt(task.run_dir, task.number, 1, error="a cell failed")
    assert run.read_record(task.run_dir)["status"] == "failed"
    task = run.open_run(cfg)
    assert task.status == "resume"
    assert len(preference_data.run_annotation(task, cfg, finish=False)[0]["train"]) == 5
    preference_data.finish_annotation(task, cfg)
    assert run.read_record(task.run_dir)["status"] == "finished" and run.open_run(cfg).status == "done"


@pytest.mark.slow
def test_plain_dpo_in_two_commands(demo, tmp_root, monkeypatch):
    "A file of chosen and rejected answers without rewards and references: pairs, then train_preference with a loss of DPO; or the second command alone"
    from post_training import cli
    from post_training.train_preference import load_tokenized_pairs
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    data = jsonl(tmp_root / "mine.jsonl", [dict(prompt=f"{i} + 1 = ?", chosen=f"{i + 1}", rejected="no") for i in range(8)])
    where = f"artifacts_subdir={tmp_root.name}"
    assert cli.main(["pairs", "mode=offline", f"dataset_args.dataset_name={data}", where]) == 0
    record, = (run.read_record(p.parent) for p in (tmp_root / "runs/pairs").rglob("record.json"))
    assert record["status"] == "finished" and record["counts"]["out"] == 8
    source, dpo = record["final"]["output"], ["training_args.loss_type=sigmoid", "training_args.ref_logprobs_from_dataset=false", "training_args.max_steps=2", "global_batch_size=4", "training_args.per_device_train_batch_size=4"]
    command = lambda path: ["preference=tiny", "dataset=local", f"dataset_args.dataset_name={path}", where, *dpo]
    assert cli.main(["train_preference", *command(source)]) == 0
    losses, = ([json.loads(line)["loss"] for line in p.read_text().splitlines()] for p in (tmp_root / "runs/train_preference").rglob("metrics.jsonl"))
    assert len(losses) == 2 and abs(losses[0] - 0.6931) < 1e-3
    ids = [load_tokenized_pairs(config.compose("train_preference", command(path)).cfg).train["chosen_ids"][:] for path in (source, data)]
    assert ids[0] == ids[1]  # train_preference alone reads the file as well


def test_branches_that_are_left_out_are_counted(capfd):
    from datasets import Dataset
    from post_training.data.swissai import as_messages
    turn = lambda t: dict(messages=[dict(role="assistant", parts=[dict(type="response", content=t)])])
    rows = Dataset.from_list([dict(conversation_id=str(i), initial_prompt=dict(role="user", content="Hi"), conversation_branches=[turn(f"a{j}") for j in range(n)]) for i, n in enumerate((1, 3, 2))])
    made, counts = as_messages(rows)
    assert (len(made), counts["out"]) == (3, 3) and "2 of 3 rows have further branches: the first one is used, and 3 others are left out" in capfd.readouterr().err
