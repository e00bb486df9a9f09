"Forms of public datasets under other names, verdicts on answers, flags that speak against rows, tables, and dataset cards."
import gzip
import json

import pytest
from datasets import Dataset, disable_progress_bars
from test_foreign import family, stop

from post_training.core.files import UserError
from post_training.data.columns import account, account_lines, account_notes, with_known_names
from post_training.data.io import load_rows, load_splits, reading_notes, split_names
from post_training.data.messages import format_of, read_conversation
from post_training.data.mixture import mix_sources
from post_training.tokens.dataset import tokenize_dataset
from post_training.tokens.pairs import check_pair_columns, pair_messages, tokenize_pairs

disable_progress_bars()
TALK = [("user", "Hi"), ("assistant", "Hello!")]
MESSAGES = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello!")]
CALL = dict(name="add", arguments=dict(a=2, b=2))


def loaded(*rows, via=None):
    "Rows as a command loads them"
    if via is None: return with_known_names(Dataset.from_list(list(rows)))
    (via / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return with_known_names(load_rows(via / "rows.jsonl"))


def said(c): return [(m["role"], m["content"]) for m in c.messages]


READ = {  # the source of a form: a row of it
    "docs.cohere.com, chat: message, chat_history": dict(message="Hi", chat_history=[], response="Hello!"),
    "docs.cohere.com, chat: the text under message": dict(messages=[dict(role="User", message="Hi"), dict(role="Chatbot", message="Hello!")]),
    "platform.openai.com, batch: request, response": dict(request=dict(messages=MESSAGES[:1]), response=dict(choices=[dict(message=MESSAGES[1], finish_reason="stop")])),
    "platform.openai.com, responses": dict(messages=[dict(type="message", role="user", content=[dict(type="input_text", text="Hi")]), dict(type="message", role="assistant", content=[dict(type="output_text", text="Hello!")])]),
    "ai.google.dev: contents, parts": dict(contents=[dict(role="user", parts=[dict(text="Hi")]), dict(role="model", parts=[dict(text="Hello!")])]),
    "ai.google.dev, tuning: text_input": dict(text_input="Hi", output="Hello!"),
    "GAIR/lima": dict(conversations=["Hi", "Hello!"]),
    "stingning/ultrachat: data": dict(id="0", data=["Hi", "Hello!"]),
    "li2017dailydialog/daily_dialog: dialog": dict(dialog=["Hi", "Hello!"]),
    "python.langchain.com, messages as objects": dict(messages=[dict(type="human", content="Hi"), dict(type="ai", content="Hello!")]),
    "columns named after the speakers": dict(user="Hi", assistant="Hello!"),
    "camel-ai/math: message_1, message_2": dict(message_1="Hi", message_2="Hello!"),
    "YeungNLP/firefly-train-1.1M: input, target": dict(kind="a", input="Hi", target="Hello!"),
    "bigscience/P3": dict(inputs_pretokenized="Hi", targets_pretokenized="Hello!"),
    "distilabel.argilla.io: generation": dict(instruction="Hi", generation="Hello!", model_name="m"),
    "pytorch.org/torchtune, instruct: input, output": dict(input="Hi", output="Hello!"),
    "nvidia/OpenMathReasoning: generated_solution": dict(problem="Hi", generated_solution="Hello!", expected_answer="4"),
    "PrimeIntellect/SYNTHETIC-1: llm_response": dict(prompt="Hi", llm_response="Hello!"),
    "nvidia/Llama-Nemotron: a list of messages as input": dict(input=MESSAGES[:1], output="Hello!", category="chat"),
    "timdettmers/openassistant-guanaco": dict(text="### Human: Hi### Assistant: Hello!"),
    "github.com/openai/openai-python, chatml.md": dict(text="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"),
    "Dahoas/full-hh-rlhf: prompt, response": dict(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Hello!"),
    "turns with speaker and text": dict(dialogue=[dict(speaker="user", text="Hi"), dict(speaker="bot", text="Hello!")])}


@pytest.mark.parametrize("name", READ)
def test_a_form_is_read(name, tmp_path):
    for data in (loaded(READ[name]), loaded(READ[name], via=tmp_path)):
        assert said(read_conversation(data[0], format_of(data.column_names))) == TALK
        assert not account(data).refused() and all(note.endswith(("known name.", "known form.")) for note in reading_notes(data))


PAIRS = {
    "Anthropic/hh-rlhf": dict(chosen="\n\nHuman: Hi\n\nAssistant: Hello!", rejected="\n\nHuman: Hi\n\nAssistant: Go."),
    "Dahoas/rm-static": dict(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Hello!", chosen=" Hello!", rejected=" Go."),
    "platform.openai.com, preference fine-tuning": dict(input=dict(messages=MESSAGES[:1], parallel_tool_calls=True), preferred_output=MESSAGES[1:], non_preferred_output=[dict(role="assistant", content="Go.")]),
    "nvidia/HelpSteer2: preference_strength": dict(prompt="Hi", response_1="Go.", response_2="Hello!", preference_strength=2),
    "nvidia/HelpSteer3": dict(context=MESSAGES[:1], response1="Hello!", response2="Go.", overall_preference=-1),
    "stanfordnlp/SHP": dict(history="Hi", human_ref_A="Go.", human_ref_B="Hello!", labels=0, score_A=1, score_B=3),
    "openai/webgpt_comparisons": dict(question=dict(full_text="Hi"), answer_0="Hello!", answer_1="Go.", score_0=0.5, score_1=-0.5),
    "lmsys/chatbot_arena_conversations": dict(winner="model_b", conversation_a=[MESSAGES[0], dict(role="assistant", content="Go.")], conversation_b=MESSAGES),
    "lmarena-ai/arena-human-preference-55k": dict(prompt='["Hi"]', response_a='["Go."]', response_b='["Hello!"]', winner_model_a=0, winner_model_b=1),
    "PKU-Alignment/PKU-SafeRLHF": dict(prompt="Hi", response_0="Hello!", response_1="Go.", better_response_id=0, safer_response_id=1),
    "tatsu-lab/alpaca_farm": dict(instruction="Hi", input="", output_1="Go.", output_2="Hello!", preference=2),
    "openbmb/UltraInteract_pair: trajectory": dict(trajectory=[{"from": "user", "value": "Hi"}], chosen="Hello!", rejected="Go."),
    "argilla/distilabel-intel-orca-dpo-pairs: input": dict(input="Hi", chosen="Hello!", rejected="Go.", generations=["Hello!", "Go."]),
    "argilla/ultrafeedback-binarized-preferences": dict(instruction="Hi", chosen_response="Hello!", rejected_response="Go.")}


@pytest.mark.parametrize("name", PAIRS)
def test_two_answers_and_a_verdict(name, tmp_path):
    for data in (loaded(PAIRS[name]), loaded(PAIRS[name], via=tmp_path)):
        prompt, chosen, rejected = pair_messages(data[0])
        assert (said(prompt), chosen["content"], rejected["content"]) == (TALK[:1], "Hello!", "Go.")


def test_marks_in_what_somebody_wrote(capfd):
    "A row whose turns do not alternate is dropped with a count; a text that begins otherwise stays a text"
    row = PAIRS["Anthropic/hh-rlhf"]
    data = loaded(row, {k: v.replace("Hi", "Hi\n\nHuman: you") for k, v in row.items()})
    assert [r["chosen"] is None for r in data] == [False, True]
    assert "1 of 2 rows are dropped: chosen: the speakers do not alternate, first row 1" in capfd.readouterr().err
    plain = dict(prompt="What does Human: mean?", completion="A mark.\n\nHuman: so")
    assert loaded(plain)[0] == plain


def test_ties_are_dropped_with_their_reason(capfd):
    row = PAIRS["lmsys/chatbot_arena_conversations"]
    data = loaded(row, dict(row, winner="tie"), dict(row, winner="tie (bothbad)"))
    assert [r["chosen"] is None for r in data] == [False, True, True]
    assert "1 of 3 rows are dropped: the verdict 'tie' prefers no answer, first row 1" in capfd.readouterr().err
    _, counts = tokenize_pairs(data, family("qwen25"))
    assert (counts["in"], counts["out"]) == (3, 1)
    with pytest.raises(UserError, match="none of the 1 can be read: the verdict 'tie'"): loaded(dict(row, winner="tie"))


def test_calls_are_answers():
    "Salesforce/xlam-function-calling-60k; the items of OpenAI's Responses; github.com/modelscope/ms-swift/issues/9427"
    asked, result = dict(role="user", content="2+2?"), dict(role="assistant", content="4")
    rows = [loaded(dict(query="2+2?", answers=json.dumps([CALL]), tools=json.dumps([dict(name="add", description="", parameters={})])))[0],
            dict(messages=[asked, dict(type="function_call", call_id="c", name="add", arguments='{"a": 2, "b": 2}'), dict(type="function_call_output", call_id="c", output="4"), result]),
            dict(messages=[asked, dict(role="tool_call", name="add", arguments=CALL["arguments"]), dict(role="tool", content="4"), result])]
    for row in rows:
        call = read_conversation(row).messages[1]
        assert call["role"] == "assistant" and call["tool_calls"][0]["function"] == CALL, row
    with pytest.raises(UserError, match="of several texts make one row of each"): loaded(dict(query="a", answers=["b", "c"]))  # microsoft/ms_marco


ADVISED = {  # the source of a form that is not read: its columns, words of the advice
    "openbmb/UltraFeedback": ("source instruction models completions", "completions with scores.*chosen"),
    "berkeley-nest/Nectar": ("prompt answers turns", "ranked answers"),
    "huggingface.co/docs/trl, PRM": ("prompt completions labels", "labels of steps"),
    "OpenAssistant/oasst1": ("message_id parent_id text role", "follow parent_id"),
    "glaiveai/glaive-function-calling-v2": ("system chat", "split them"),
    "rajpurkar/squad": ("context question answers", "an empty line and question"),
    "wmt/wmt14": ("translation", "to translate"),
    "github.com/volcengine/verl": ("data_source prompt reward_model", "ref_completions"),
    "docs.axolotl.ai, template-free": ("segments", "train_detail"),
    "docs.axolotl.ai, tokenized": ("input_ids labels attention_mask", "give the texts"),
    "docs.openpipe.ai": ("messages rejected_message", "messages\\[:-1\\]")}


@pytest.mark.parametrize("name", ADVISED)
def test_a_form_that_is_not_read_is_named_with_a_conversion(name):
    columns, words = ADVISED[name]
    with pytest.raises(UserError, match=words): check_pair_columns(columns.split())
    if "messages" not in columns:
        with pytest.raises(UserError, match=words): format_of(columns.split())


# -- flags

UNFIT = [dict(deleted=True), dict(truncated=True), dict(finish_reason="length"), dict(finishReason="MAX_TOKENS"), dict(stop_reason="max_tokens"), dict(is_chosen=False),
         dict(accepted=False), dict(preference="reject"), dict(preferred="rejected"), dict(is_finished=0)]
FIT = [dict(deleted=False), dict(truncated=None), dict(finish_reason="stop"), dict(stop_reason="end_turn"), dict(is_chosen=True), dict(accepted="yes"), dict(preference=0), dict(winner="model_b")]
JUDGED = [dict(is_correct=False), dict(resolved=False), dict(is_safe="no"), dict(feedback="thumbs_down"), dict(rating=-1), dict(toxic=True), dict(split="test")]


@pytest.mark.parametrize("flag", UNFIT, ids=str)
def test_a_flag_drops_its_row(flag):
    (name, value), = flag.items()
    for bad, key in ((dict(messages=MESSAGES, **flag), name), (dict(messages=[MESSAGES[0], dict(MESSAGES[1], **flag)]), f"messages.{name}")):
        data = Dataset.from_list([dict(bad), *[dict(messages=[dict(m) for m in MESSAGES])]*2])
        kept, counts = tokenize_dataset(data, family("qwen25"), stop_ids=stop("qwen25"))
        assert (counts["out"], len(kept)) == (2, 2) and any(f"{name} is {value!r}" in reason for reason in counts["dropped"])
        assert [(line["class"], line["rows"]) for line in counts["columns"] if line["key"] == name and "dropped" in line["meaning"]] == [("refused", 1)]
        assert len(tokenize_dataset(data, family("qwen25"), stop_ids=stop("qwen25"), ignore_columns=[key])[0]) == 3
    pair = Dataset.from_list([dict(prompt="Hi", chosen="a", rejected="b", **flag)]*2)
    with pytest.raises(UserError, match=f"{name} is"): tokenize_pairs(pair, family("qwen25"))


def test_flags_in_favour_change_nothing():
    for flag in FIT: assert said(read_conversation(dict(messages=MESSAGES, **flag))) == TALK and not account_notes([account(Dataset.from_list([dict(messages=MESSAGES, **flag)]))])


@pytest.mark.parametrize("flag", JUDGED, ids=str)
def test_a_judgement_is_told_and_its_row_kept(flag):
    (name, _), = flag.items()
    for row in (dict(messages=MESSAGES, **flag), dict(messages=[MESSAGES[0], dict(MESSAGES[1], **flag)])):
        kept, counts = tokenize_dataset(Dataset.from_list([row, dict(messages=MESSAGES)]), family("qwen25"), stop_ids=stop("qwen25"))
        assert len(kept) == 2 and [n for n in counts["notes"] if n.startswith(f"{name} speaks against 1 rows")]


def test_flags_in_json_text():
    "Messages as JSON text, and the flag of a tool's result among the parts of a content (Anthropic)"
    result = dict(role="user", content=[dict(type="tool_result", tool_use_id="t", content="12", is_error=True), dict(type="text", text="So?")])
    call = dict(role="assistant", content=[dict(type="tool_use", id="t", name="add", input=CALL["arguments"])])
    for messages in ([MESSAGES[0], call, result, MESSAGES[1]],):
        for value in (json.dumps(messages),):
            found = account(Dataset.from_list([dict(messages=value)]))
            assert found.judged == {"content.is_error": 1} and [line["meaning"] for line in account_lines(found) if line["key"] == "content.is_error"]


@pytest.mark.parametrize("tag", [True, False])
def test_labels_of_single_answers_are_refused(tag):
    "huggingface.co/docs/trl and github.com/hiyouga/LLaMA-Factory: KTO"
    for key in ("label", "kto_tag"):
        with pytest.raises(UserError, match=f"'{key}'.*KTO.*make pairs"): tokenize_dataset(Dataset.from_list([{"prompt": "Hi", "completion": "Ho", key: tag}]), family("qwen25"))


# -- files

def test_tables_and_compressed_files(tmp_path, capfd):
    text = 'id,question,answer,weight,is_correct\n1,"1, 2\nor 3?",4,0.5,True\n2,1+1?,02,,False\n'
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.tsv").write_text(text.replace(",", "\t").replace("1\t 2", "1, 2"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    want = [dict(id="1", question="1, 2\nor 3?", answer="4", weight=0.5, is_correct="True"), dict(id="2", question="1+1?", answer="02", weight=None, is_correct="False")]
    for name in ("a.csv", "a.tsv", "a.csv.gz"): assert load_rows(tmp_path / name).to_list() == want, name
    assert "a table has no types: weight hold numbers" in capfd.readouterr().err
    assert account_notes([account(load_rows(tmp_path / "a.csv"))])[0].startswith("is_correct speaks against 1 rows")
    lines = "".join(json.dumps(r) + "\n" for r in want)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.ndjson").write_text(lines)
    assert load_rows(tmp_path / "b.jsonl.gz").to_list() == load_rows(tmp_path / "b.ndjson").to_list() == want
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-12])
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "x.xlsx").write_text("x")
    for name, words in (("cut.jsonl.gz", "cut.jsonl.gz: Truncated"), ("short.csv", "Expected 2 columns, got 1"), ("x.xlsx", "Of an archive give its files")):
        with pytest.raises(UserError, match=words): load_rows(tmp_path / name)


def test_the_card_of_a_folder_names_its_files(tmp_path, capfd):
    "huggingface.co/docs/hub/datasets-manual-configuration"
    def card(text): (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\n# Data\n")
    for part in ("en/a", "en/b", "de/a", "train"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(dict(prompt=part, completion="x")) + "\n")
    card("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: en/*\n  - split: test\n    path: [de/a.jsonl]\n- config_name: de\n  data_files: de/*")
    assert split_names(tmp_path) == ["train", "test"]
    assert {k: d["prompt"][:] for k, d in load_splits(tmp_path).items()} == dict(train=["en/a", "en/b"], test=["de/a"])
    card("configs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*")
    with pytest.raises(UserError, match="several sets of files .en: .*de: .*by a glob"): load_rows(tmp_path)
    for text in ("pretty_name: x", "configs:\n- config_name: en\n  data_files:\n  - spit: x", "configs: ["):
        card(text)
        assert load_rows(tmp_path)["prompt"][:] == ["train"]
    assert capfd.readouterr().err.count("its data_files are not read") == 2


def test_a_mixture_of_forms(tmp_path):
    "The rows, the dropped ones and the notices of two forms in one mixture, and of pairs"
    def source(name, row): (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | dict(id=f"{name}{i}", is_correct=i > 0, truncated=i == 1)) + "\n" for i in range(4)))
    def mixed(*names, **how): return mix_sources([dict(dataset_name=n, dataset_path=str(tmp_path / f"{n}.jsonl"), train_splits=["train"]) for n in names], max_drop_fraction=0.5, **how)
    source("gemini", READ["ai.google.dev: contents, parts"])
    source("lima", READ["GAIR/lima"])
    source("arena", PAIRS["lmsys/chatbot_arena_conversations"])
    m = mixed("gemini", "lima")
    assert len(m.train) == 6 and all([(t["role"], t["content"]) for t in r["messages"]] == TALK for r in m.train)
    assert [c["dropped"] for c in m.counts.values()] == [{"truncated is True: it is cut off": 1}]*2
    assert any("is_correct speaks against 2 rows" in n for n in m.notes) and any("Gemini contents" in n for n in m.notes)
    pairs = mixed("arena", columns_to_keep=["chosen", "rejected"])
    assert {json.loads(r["chosen"])[-1]["content"] for r in pairs.train} == {"Hello!"} and len(pairs.train) == 3
    assert [c["dropped"] for c in pairs.counts.values()] == [{"truncated is True: it is cut off": 1}]
