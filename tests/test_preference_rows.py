"Preference rows in the forms that others write: thoughts, calls, tools, system messages and weights reach the tokens of a pair, or are refused by name"
import json
from functools import cache
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars, load_dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from post_training.core.files import UserError
from post_training.data.columns import account, check_account
from post_training.data.io import load_rows
from post_training.preferences.completions import completions_batch_fn
from post_training.preferences.filter import filter_batch_fn
from post_training.preferences.pairs import pair_features, pairs_batch_fn
from post_training.preferences.reference_logprobs import read_pieces
from post_training.preferences.rewards import plain_turns, rewards_batch_fn, verifier_scorer
from post_training.preferences.rows import ROW_COLUMNS, row_prompt, row_fields, to_preference, to_rows, to_swissai
from post_training.tokens.pairs import tokenize_pairs
from post_training.tokens.tokenizer import toy_tokenizer

disable_progress_bars()
FOREIGN = Path(__file__).parent / "golden/foreign"
few = settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
CLOCK = dict(type="function", function=dict(name="clock", description="The time.", parameters=dict(type="object", properties=dict(city=dict(type="string"), zone=dict(type=["string", "null"])))))


@cache
def tokenizer(name):
    return AutoTokenizer.from_pretrained(FOREIGN / "tokenizers" / name)


def user(text): return dict(role="user", content=text)


def says(text, **more): return dict(role="assistant", content=text, **more)


def call(**arguments): return dict(type="function", function=dict(name="clock", arguments=arguments))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_rows(str(path))


def pairs_of(rows, mode="offline", **rules):
    "The pairs that the stage makes of rows, as it writes them"
    done = pairs_batch_fn(rows, mode, **{"min_num_ref_rewards": 0, **rules})(range(len(rows)))
    columns = [c for c in ROW_COLUMNS if c in rows.column_names]
    features = pair_features(isinstance(rows.features["prompt"].feature["content"], dict), row_fields(rows.features), columns)
    made = [p for out in done for p in out.get("rows", [])]
    return Dataset.from_list(made, features=features) if made else [], done


def decoded(rows, tok):
    "Prompt, chosen and rejected of each pair, as the model is given them; all tokens of the sides are scored"
    data, counts = tokenize_pairs(pairs_of(rows)[0], tok)
    assert all(all(r["chosen_scored"]) and all(r["rejected_scored"]) for r in data)
    return [tuple(tok.decode(r[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")) for r in data], data, counts


# -- the files of tests/golden/foreign

EMPTY = "<think>\n\n</think>\n\n"  # what the template of Qwen 3 writes in front of an answer without a thought
THOUGHT = "<think>\n{}\n</think>\n\n".format
FILES = {  # file: messages of its first prompt, chosen (thought, text), rejected (thought, text), pairs
    "pairs_instruction": ([user("Is this right?\n\n2+2=5")], ("", "No."), ("", "Yes."), 20),
    "pairs_question": ([user("Hello there")], ("", "Hi."), ("", "Go."), 20),
    "pairs_sharegpt": ([user("Hello there")], ("", "Hi."), ("", "Go."), 20),
    "pairs_same": ([user("Hello there")], ("", "Hi."), ("", "Go."), 19),
    "pairs_uf": ([user("Hello there")], ("", "Hi, friend."), ("", "Go away."), 20),
    "pairs_weight_scores": ([user("2+2?")], ("", "It is 4."), ("", "It is 5."), 20),
    "pairs_sys_multi": ([dict(role="system", content="Be kind."), user("Hello there"), says("Hi."), user("How is 0?")], ("", " Fine, "), ("", "Bad."), 12),
    "pairs_think_field": ([user("2+2?")], ("Easy sum.", "It is 4."), ("Hard sum.", "It is 5."), 20),
    "pairs_think_inline": ([user("2+2?")], ("Easy sum.", "It is 4."), ("Hm.", "It is 5."), 20),
    "pairs_think_same_text": ([user("2+2?")], ("Easy sum.", "It is 4."), ("I guess.", "It is 4."), 20),
    "chosen_think": ([user("2+2?")], ("Easy sum.", "It is 4."), ("", "5."), 20)}


@pytest.mark.parametrize("name", FILES)
def test_every_form_with_thoughts_under_a_template_that_writes_them(name):
    "Thoughts are part of the side that is trained and scored, as a field and inline alike"
    prompt, chosen, rejected, n = FILES[name]
    tok = tokenizer("qwen3")
    texts, data, counts = decoded(to_rows(load_rows(str(FOREIGN / f"data/{name}.jsonl")))[0], tok)
    assert len(data) == n and not counts["dropped"]
    assert texts[0][0] == tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert texts[0][1:] == tuple((THOUGHT(t) if t else EMPTY) + text + "<|im_end|>" for t, text in (chosen, rejected))


@pytest.mark.parametrize("name", FILES)
def test_every_form_under_a_template_without_thoughts(name):
    "Fields that a template leaves out drop the pair by name; an inline thought is text there"
    prompt, chosen, rejected, n = FILES[name]
    tok, rows = tokenizer("qwen25"), to_rows(load_rows(str(FOREIGN / f"data/{name}.jsonl")))[0]
    if name in ("pairs_think_field", "pairs_think_same_text", "chosen_think"):
        with pytest.raises(UserError, match="unsupported_roles"): tokenize_pairs(pairs_of(rows)[0], tok)
        return
    texts, data, counts = decoded(rows, tok)
    assert len(data) == n and texts[0][0] == tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert texts[0][1:] == tuple((THOUGHT(t) if t else "") + text + "<|im_end|>" for t, text in (chosen, rejected))


@pytest.mark.parametrize("name, why", [("pairs_hh", "chosen is a text and there is no prompt"), ("pairs_multi_diff", "the completions answer different prompts")])
def test_forms_that_are_no_pairs_are_dropped_by_name(name, why):
    rows, counts = to_rows(load_rows(str(FOREIGN / f"data/{name}.jsonl")))
    assert not len(rows) and counts["dropped"] == {why: 20} and counts["examples"] == {why: "0"}


@pytest.mark.parametrize("name", FILES)
def test_rows_without_thoughts_have_the_types_they_always_had(name):
    rows = to_rows(load_rows(str(FOREIGN / f"data/{name}.jsonl")))[0]
    field = name in ("pairs_think_field", "pairs_think_same_text", "chosen_think")
    assert row_fields(rows.features) == dict(prompt=[], completions=["reasoning_content"] if field else [])
    assert not set(ROW_COLUMNS) & set(rows.column_names)


def test_scores_of_others_are_rewards():
    rows = to_rows(load_rows(str(FOREIGN / "data/pairs_weight_scores.jsonl")))[0]
    assert [c["reward"] for c in rows[0]["completions"]] == [1.0, 3.0]


# -- tools, calls, template arguments, weights

TOOLS = dict(tools=[CLOCK], prompt=[user("What time is it in Bern?")], chosen=[says("", tool_calls=[call(city="Bern", zone=None)])], rejected=[says("I do not know.", tool_calls=None)])


@pytest.mark.parametrize("name", ["qwen3", "qwen25"])
def test_tools_are_in_the_prompt_and_calls_in_the_side(name, tmp_path):
    "A side that ends in a call; its arguments are an object, nulls that are real stay"
    tok = tokenizer(name)
    (prompt, chosen, rejected), = decoded(to_rows(jsonl(tmp_path / "a.jsonl", TOOLS))[0], tok)[0]
    assert prompt == tok.apply_chat_template(TOOLS["prompt"], tools=[CLOCK], tokenize=False, add_generation_prompt=True) and '"clock"' in prompt
    assert '"arguments": {"city": "Bern", "zone": null}' in chosen and "clock" not in rejected and "I do not know." in rejected


def test_a_prompt_that_ends_in_the_output_of_a_tool(tmp_path):
    used = [user("Time?"), says("", tool_calls=[call(city="Bern")]), dict(role="tool", content="12:00", name="clock")]
    row = dict(prompt=used, chosen="Noon.", rejected="Night.", functions=[CLOCK["function"]])
    tok = tokenizer("qwen25")
    rows, counts = to_rows(jsonl(tmp_path / "a.jsonl", row))
    (prompt, chosen, _), = decoded(rows, tok)[0]
    assert "12:00" in prompt and '{"city": "Bern"}' in prompt and chosen == "Noon.<|im_end|>"
    assert row_fields(rows.features)["prompt"] == ["name", "tool_calls"]
    assert [(u["class"], u["rows"]) for u in counts["columns"] if u["key"] == "functions"] == [("conversation", 1)]


@pytest.mark.parametrize("form", ["pairs", "rows", "prompt", "messages"])
def test_arguments_of_the_template_and_the_system_column_in_every_form(form, tmp_path):
    more = dict(system="Be brief.", chat_template_kwargs=dict(enable_thinking=False), weight=0.5)
    row = dict(pairs=dict(prompt="2+2?", chosen="4", rejected="5"), rows=dict(prompt="2+2?", completions=["4", "5"]),
               prompt=dict(prompt="2+2?"), messages=dict(question="2+2?", answer="4"))[form]
    rows = to_rows(jsonl(tmp_path / "a.jsonl", {**row, **more}))[0]
    c = row_prompt(rows[0])
    assert c.messages == [dict(role="system", content="Be brief."), user("2+2?")]
    assert (c.template_kwargs, c.weight, c.tools) == (dict(enable_thinking=False), 0.5, None)
    assert "system" not in rows.column_names
    if form == "pairs":
        prompt, chosen, _ = decoded(rows, tokenizer("qwen3"))[0][0]
        assert prompt.endswith("<|im_start|>assistant\n" + EMPTY) and chosen == "4<|im_end|>"  # the block is prompt, not learned


def test_the_weight_of_a_row_reaches_the_tokenized_pair(tmp_path):
    rows = [dict(prompt="2+2?", chosen="4", rejected="5", loss_weight=w) for w in (1, 0.25, 0)]
    made = pairs_of(to_rows(jsonl(tmp_path / "a.jsonl", *rows))[0])[0]
    assert made["weight"][:] == [None, 0.25, 0.0]
    data, counts = tokenize_pairs(made, tokenizer("qwen25"))
    assert data["row_weight"][:] == [1.0, 0.25] and counts["dropped"] == {"weight: the pair has weight 0": 1}


def test_a_branch_carries_the_weight_and_arguments_of_its_row(tmp_path):
    talk = [dict(messages=[dict(role="assistant", parts=[dict(type="response", content=x, name=None, args=None, answers=None)])], label=x) for x in "45"]
    row = dict(conversation_id="c", system_prompt=None, available_functions=[], initial_prompt=dict(role="user", content="2+2?"), conversation_branches=talk, weight=2.0, chat_template_kwargs=dict(a=1))
    rows, counts = to_rows(jsonl(tmp_path / "a.jsonl", row))
    assert (rows[0]["weight"], json.loads(rows[0]["chat_template_kwargs"])) == (2.0, dict(a=1))
    assert isinstance(rows.features["prompt"].feature["content"], dict)
    assert to_rows(to_swissai(rows))[0][:] == rows[:]


# -- through the stages

def think_rows(tmp_path, **more):
    sides = dict(chosen=[user("2+2?"), says("It is 4.", reasoning_content="Easy sum.")], rejected=[user("2+2?"), says("It is 4.", reasoning_content="A long thought, " * 9)])
    return to_rows(jsonl(tmp_path / "t.jsonl", dict(sides, answer="4", verifier="final_number", **more)))[0]


def test_filter_counts_thoughts_and_tools(tmp_path):
    tok = tokenizer("qwen3")
    long, plain = think_rows(tmp_path), to_rows(jsonl(tmp_path / "p.jsonl", dict(prompt="2+2?", chosen="It is 4.", rejected="It is 4, so.")))[0]
    sizes = [c["num_tokens"] for c in filter_batch_fn(long, tok, 1000)([0])[0]["completions"]]
    short = filter_batch_fn(plain, tok, 1000)([0])[0]["completions"]
    assert sizes[1] > sizes[0] > short[0]["num_tokens"]
    offered = to_rows(jsonl(tmp_path / "o.jsonl", dict(prompt="2+2?", chosen="4", rejected="5", tools=[CLOCK])))[0]
    assert filter_batch_fn(offered, tok, 1000)([0])[0]["completions"][0]["prompt_tokens"] > short[0]["prompt_tokens"] + 20
    kept = filter_batch_fn(long, tok, 20 + sizes[0])([0])[0]
    assert [c["reasoning_content"] for c in kept["completions"]] == ["Easy sum."] and kept["lost"] == {"longer than max_seq_len": 1}


def test_scored_tokens_are_those_of_the_pair(tmp_path):
    "The reference scores the ids that training reads: thought, text and end token"
    tok, rows = tokenizer("qwen3"), think_rows(tmp_path, tools=[CLOCK])
    (pieces, reason, lost), = read_pieces(rows[:1], tok)
    _, data, _ = decoded(rows, tok)
    assert [p.ids for p in pieces] == [data[0]["chosen_ids"], data[0]["rejected_ids"]] and pieces[0].prompt == data[0]["prompt_ids"]
    assert "Easy sum." in tok.decode(pieces[0].ids) and all(pieces[0].scored)


def test_rewards_see_what_a_reader_sees(tmp_path):
    rows = think_rows(tmp_path)
    made = rewards_batch_fn(rows, verifier_scorer())([0])[0]["completions"]
    assert [c["reward"] for c in made] == [1.0, 1.0] and made[0]["reasoning_content"] == "Easy sum."
    read = row_prompt(rows[0]).messages
    assert plain_turns([*read, says("It is 4.", reasoning_content="Hm.")]) == plain_turns([*read, says("<think>\nHm.\n</think>\n\nIt is 4.")]) == [user("2+2?"), says("It is 4.")]
    inline = jsonl(tmp_path / "i.jsonl", dict(prompt="2+2?", chosen="<think>3?</think>4", rejected="<think>4", answer="4", verifier="final_number"))
    assert [c["reward"] for c in rewards_batch_fn(to_rows(inline)[0], verifier_scorer())([0])[0]["completions"]] == [1.0, 0.0]


def test_a_sampled_thought_is_kept_apart_and_encoded_as_it_was_written():
    tok = tokenizer("qwen3")
    rows = Dataset.from_list([dict(id="a", prompt=[user("2+2?")], completions=[])])
    wrote = ["<think>\nEasy sum.\n</think>\n\nIt is 4.", "<think>\nEasy", "a <think>b</think> c"]
    def complete(prompts, n, seeds):
        return [[dict(ids=tok.encode(t, add_special_tokens=False) + [tok.eos_token_id], text=t, finish_reason="stop") for t in wrote]]
    made, = completions_batch_fn(rows, tok, complete, "m", 3, 0, None, 64)([0])
    c, = made["completions"]
    assert (c["content"], c["reasoning_content"]) == ("It is 4.", "Easy sum.")
    assert sum(made["lost"].values()) == 2 and "no answer after the thoughts" in made["lost"]
    (pieces, _, _), = read_pieces(dict(prompt=[[user("2+2?")]], completions=[[c]]), tok)
    assert pieces[0].ids == c["token_ids"]


def test_thoughts_alone_make_two_answers_differ(tmp_path):
    made, done = pairs_of(think_rows(tmp_path))
    assert len(made) == 1 and [made[0][s][0]["reasoning_content"][:5] for s in ("chosen", "rejected")] == ["Easy ", "A lon"]
    same = dict(prompt="q", chosen=[says("a", reasoning_content="t")], rejected=[says("a", reasoning_content="t")])
    assert pairs_of(to_rows(jsonl(tmp_path / "s.jsonl", same))[0])[1][0]["dropped"] == "chosen equals rejected"


# -- round trips

words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
thoughts = words.map("{} so".format)  # a word alone may be a switch such as none, which is refused as a thought


@st.composite
def rich_pairs(draw):
    "A pair with perhaps a system prompt, tools, earlier turns, thoughts, calls, template arguments and a weight"
    offers = draw(st.booleans())
    def side():
        out = says(draw(words))
        if draw(st.booleans()): out["reasoning_content"] = draw(thoughts)
        nulls = {"zone": None} if offers and draw(st.booleans()) else {}
        if draw(st.booleans()): out["tool_calls"] = [call(city=draw(words), **nulls)]
        return [out]
    head = [user(draw(words)), says(draw(words))] if draw(st.booleans()) else []
    row = dict(id="a", prompt=[*head, user(draw(words))], chosen=side(), rejected=side())
    if draw(st.booleans()): row["system"] = draw(words)
    if offers: row["tools"] = [CLOCK]
    thinks = any("reasoning_content" in m for m in row["chosen"] + row["rejected"])  # a thought where the prompt forbids it is refused
    if draw(st.booleans()): row["chat_template_kwargs"] = dict(enable_thinking=thinks or draw(st.booleans()))
    if draw(st.booleans()): row["weight"] = draw(st.floats(0.1, 3))
    return row


@few
@given(rich_pairs())
def test_pairs_of_the_pipeline_give_the_ids_of_the_raw_pair(tmp_path_factory, row):
    "Raw pairs, pairs made of rows, rows again, parquet and JSON lines: the same tokens"
    folder = tmp_path_factory.mktemp("rich")
    tok, raw = tokenizer("qwen3"), jsonl(folder / "raw.jsonl", row)
    rows, counts = to_rows(raw)
    assert counts["out"] == 1 and not counts["lost"]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    made = pairs_of(rows)[0]
    if not len(made): return  # both sides are the same
    direct = tokenize_pairs(raw, tok)[0][0]
    made.to_parquet(str(folder / "p.parquet"))
    rows.to_json(str(folder / "rows.jsonl"))
    again = to_rows(load_rows(str(folder / "rows.jsonl")))[0]
    others = [made, load_rows(str(folder / "p.parquet")), pairs_of(to_rows(made)[0])[0], pairs_of(again)[0], to_preference(rows)]
    for other in others:
        got = tokenize_pairs(other, tok)[0][0]
        assert {k: got[k] for k in keys} == {k: direct[k] for k in keys}
        assert got.get("row_weight", 1.0) == pytest.approx(row.get("weight", 1.0))


def test_a_row_is_the_same_from_arrow_and_parquet(tmp_path):
    rows = to_rows(jsonl(tmp_path / "a.jsonl", {**TOOLS, "weight": 0.5, "chat_template_kwargs": {"enable_thinking": True}}))[0]
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for back in (load_rows(str(tmp_path / "saved")), load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "c"))):
        again, counts = to_rows(back)
        assert again[:] == rows[:] and counts["columns"] == []  # rows that have the form stay as they are
    assert [row_prompt(rows[0]).tools, row_prompt(rows[0]).template_kwargs] == [[CLOCK], dict(enable_thinking=True)]


@pytest.mark.parametrize("name", ["apertus"])
def test_a_template_with_structured_contents_gets_structured_rows(name, tmp_path):
    "Only where rows think or use tools; the note to the assistant is one for all answers of a prompt"
    tok = toy_tokenizer("bpe", name)
    raw = load_rows(str(FOREIGN / "data/chosen_think.jsonl"))
    rows = to_rows(raw, template_blocks=True)[0]
    assert row_prompt(rows[0]).messages[0]["content"]["has_thinking"]
    made = pairs_of(rows)[0]
    data, counts = tokenize_pairs(made, tok)
    assert len(data) == 20 and "Easy sum." in tok.decode(data[0]["chosen_ids"])
    inline = to_rows(load_rows(str(FOREIGN / "data/pairs_think_inline.jsonl")), template_blocks=True)[0]
    assert [b["type"] for b in inline[0]["completions"][0]["content"]["blocks"]] == ["thoughts", "response"]
    plain = to_rows(load_rows(str(FOREIGN / "data/pairs_question.jsonl")), template_blocks=True)[0]
    assert isinstance(plain[0]["completions"][0]["content"], str)


# -- the account

@pytest.mark.parametrize("more, says_", [
    (dict(image="x.png"), "column 'image' \\(2 of 2 rows\\): this library trains on text"),
    (dict(completion_mask=[1, 0]), "column 'completion_mask' \\(2 of 2 rows\\)"),
    (dict(chain_of_thought="hm"), "column 'chain_of_thought' .*rename it to reasoning_content"),
    (dict(chosen=[says("4", weight=0.5)]), "message key 'weight' \\(2 of 2 rows\\): preference losses take a weight of the row"),
    (dict(chosen=[says("4", train=False)]), "message key 'train'"),
    (dict(rejected=[says("5", loss_mask=[1])]), "message key 'loss_mask'")])
def test_refusals_name_the_key_its_rows_and_what_to_do(more, says_, tmp_path):
    row = {**dict(prompt="2+2?", chosen=[says("4")], rejected=[says("5")]), **more}
    raw = jsonl(tmp_path / "a.jsonl", row, row)
    with pytest.raises(UserError, match=says_) as e: to_rows(raw)
    key = str(e.value).split("ignore_columns=[")[1].split("]")[0]
    rows, counts = to_rows(raw, ignore=key.split(","))
    assert counts["out"] == 2 and [c["content"] for c in rows[0]["completions"]] == ["4", "5"]
    assert any(line["class"] == "ignored" and line["key"] == key for line in counts["columns"])
    assert key not in rows.column_names


def test_a_refused_key_of_one_row_does_not_pass_unseen(tmp_path):
    rows = [dict(prompt="2+2?", chosen="4", rejected="5", image=x) for x in (None, None, "x.png")]
    with pytest.raises(UserError, match="'image' \\(1 of 3 rows\\)"): to_rows(jsonl(tmp_path / "a.jsonl", *rows))
    check_account(account(jsonl(tmp_path / "b.jsonl", *rows[:2]), pairs=True))


def test_the_account_names_what_is_read_and_what_is_kept(tmp_path):
    row = dict(prompt="2+2?", chosen="4", rejected="5", chosen_score=1.0, system="Be brief.", level=0.5, weight=2.0, answer="4")
    rows, counts = to_rows(jsonl(tmp_path / "a.jsonl", row))
    assert {line["key"]: line["class"] for line in counts["columns"]} == dict(
        weight="weight", prompt="conversation", chosen="conversation", rejected="conversation", system="conversation", chosen_score="metadata", level="metadata", answer="metadata")
    assert {"level", "weight"} < {*rows.column_names} and "system" not in rows.column_names


# -- the stage

@pytest.fixture
def stage(demo, tmp_root, monkeypatch):
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))

    def run_stage(name, *overrides):
        from post_training import config, run
        from post_training.stages import preference_data
        cfg = config.compose(name, [*overrides, f"artifacts_subdir={tmp_root.name}", "dataset_args.split=null"]).cfg
        task = run.open_run(cfg)
        splits, counts = preference_data.run_annotation(task, cfg)
        return splits, counts, run.read_record(task.run_dir)

    return run_stage


def test_from_raw_pairs_to_training_pairs_by_the_commands(stage, tmp_path):
    "filter, ref_rewards, pairs: a thought, tools and a weight arrive, the record holds the account"
    row = dict(chosen=[user("2 + 2 = ?"), says("4", reasoning_content="sum")], rejected=[user("2 + 2 = ?"), says("5", reasoning_content="a guess")], answer="4", verifier="final_number", weight=0.5, image=None)
    jsonl(tmp_path / "raw.jsonl", *(dict(row, id=f"r{i}", image="x" if i == 2 else None) for i in range(3)))
    with pytest.raises(UserError, match="'image' \\(1 of 3 rows\\)"): stage("filter", f"dataset_args.dataset_name={tmp_path}/raw.jsonl", "max_seq_len=200")
    splits, counts, record = stage("filter", f"dataset_args.dataset_name={tmp_path}/raw.jsonl", "max_seq_len=200", "dataset_args.ignore_columns=[image]", "job_subdir=i")
    assert counts["out"] == 3 and any(line["key"] == "weight" for line in record["counts"]["columns"])
    splits, counts, record = stage("ref_rewards", f"dataset_args.dataset_name={record['final']['output']}", "reward_model=verifier")
    splits, counts, record = stage("pairs", f"dataset_args.dataset_name={record['final']['output']}", "mode=best-worst", "references=all")
    made = splits["train"]
    assert len(made) == 3 and made["weight"][:] == [0.5] * 3
    assert [b["text"] for b in made[0]["chosen"][0]["content"]["blocks"]] == ["sum", "4"]


def test_the_model_stops_at_its_own_ids_and_at_the_tokenizers(demo, monkeypatch, tmp_path):
    import shutil

    from post_training import config
    from post_training.stages import preference_data
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    shutil.copytree(demo / "models/tiny", tmp_path / "tiny")
    kept = json.loads((tmp_path / "tiny/generation_config.json").read_text())
    (tmp_path / "tiny/generation_config.json").write_text(json.dumps({**kept, "eos_token_id": [2, 68]}))
    cfg = config.compose("ref_completions", ["dataset_args.dataset_name=x", f"model_args.model_name_or_path={tmp_path}/tiny", f"tokenizer_args.tokenizer_name_or_path={tmp_path}/tiny", "tokenizer_args.model_eos_token_id=72"]).cfg
    assert preference_data.annotation_model(cfg).generation_config.eos_token_id == [2, 68, 72]
