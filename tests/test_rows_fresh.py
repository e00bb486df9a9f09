"Keys of other trainers, two keys for one thing, names that resemble weights and thoughts, and files that readers shorten."
import json
from decimal import Decimal

import pytest
from datasets import Dataset, disable_progress_bars
from test_foreign import family, stop
from test_rows import ASK, SAY, read

from post_training.core.files import UserError
from post_training.data.columns import NO_CHANGE, account, alike, column_class, message_key
from post_training.data.io import load_rows
from post_training.data.messages import MalformedRow, UnsupportedContent, read_conversation
from post_training.tokens.dataset import tokenize_dataset

disable_progress_bars()
TALK = [("user", "Hi"), ("assistant", "Hello!")]


def texts(row): return [(m["role"], m["content"]) for m in read_conversation(row).messages]


def answer(**keys): return dict(messages=[ASK, dict(SAY, **keys)])


def kinds(rows): return {(u.name, u.kind, u.rows) for a in [account(Dataset.from_list(rows))] for u in a.columns + a.message_keys}


# -- one thing under two keys

@pytest.mark.parametrize("row", [
    dict(conversations=[{"from": "human", "value": "Hi", "content": ""}, {"from": "gpt", "value": "Hello!", "content": ""}]),
    dict(conversations=[{"from": "human", "role": "", "value": "Hi"}, {"from": "gpt", "role": "", "value": "Hello!"}]),
    dict(conversations=[{"from": "human", "role": "user", "value": "Hi", "content": "Hi"}, {"from": "gpt", "role": "assistant", "value": "Hello!"}]),
    # huggingface.co/docs/datasets, about features: a sequence of objects is an object of lists
    dict(messages=dict(role=["user", "assistant"], content=["Hi", "Hello!"])),
    # docs.cohere.com, chat fine-tuning: the speaker Chatbot
    dict(messages=[dict(role="User", content="Hi"), dict(role="Chatbot", content="Hello!")])])
def test_the_same_conversation(row): assert texts(row) == TALK


@pytest.mark.parametrize("row, words", [
    (dict(conversations=[{"from": "human", "value": "Hi", "content": "Bye"}, {"from": "gpt", "value": "Hello!"}]), "different values as content and value"),
    (dict(conversations=[{"from": "human", "role": "assistant", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]), "the role 'assistant' from 'human'"),
    (answer(train_detail=[dict(begin_offset=0, end_offset=1, train=True)], training_detail=[dict(begin_offset=2, end_offset=3, train=True)]), "train_detail and training_detail"),
    (dict(messages=[dict(ASK, input="1 2"), SAY]), "holds input"),
    (dict(messages=[dict(ASK, system="Be brief."), SAY]), "holds system")])
def test_what_one_of_two_keys_would_lose(row, words):
    with pytest.raises(MalformedRow, match=words): read_conversation(row)


# -- xtuner.readthedocs.io, single- and multi-turn conversations: system, output_with_loss and need_eos_token beside input and output

def test_turns_of_xtuner():
    turns = [dict(system="Be brief.", input="Hi", output="Hello!", output_with_loss=False, need_eos_token=True), dict(input="And now?", output="Bye.", output_with_loss=True)]
    c = read_conversation(dict(conversation=turns))
    assert [(m["role"], m["content"]) for m in c.messages] == [("system", "Be brief."), *TALK, ("user", "And now?"), ("assistant", "Bye.")]
    assert c.message_weights == [1, 1, 0, 1, 1]
    with pytest.raises(UnsupportedContent, match="need_eos_token"): read_conversation(dict(conversation=[dict(turns[0], need_eos_token=False)]))


# -- names that resemble weights, masks and thoughts

@pytest.mark.parametrize("name", "message_weight turnWeight compute_loss include_in_loss is_train should_train learnable trained loss_factor".split())
@pytest.mark.parametrize("value", [0, 1, True, False, 0.5])
def test_names_like_weights(name, value):
    for row, key in ((answer(**{name: value}), f"messages.{name}"), (answer() | {name: value}, name)):
        with pytest.raises(UserError, match=f"'{name}'"): read(row)
        assert not isinstance(read(row, ignore=[key]), str)


# huggingface.co/datasets/FreedomIntelligence/medical-o1-reasoning-SFT (Complex_CoT), open-thoughts/OpenThoughts-114k (deepseek_reasoning), simplescaling/s1K-1.1
@pytest.mark.parametrize("name", ["Complex_CoT", "deepseek_reasoning", "reasoning_chain", "deepseek_thinking_trajectory", "thought_process"])
def test_names_like_thoughts(name):
    with pytest.raises(UserError, match=f"'{name}'.*reasoning_content"): read({"question": "2+2?", "answer": "4", name: "Easy."})
    assert not isinstance(read(dict(messages=[ASK, dict(SAY, content="<think>\nEasy.\n</think>\n\nHello!")]) | {name: "Easy."}), str) # it repeats the conversation


@pytest.mark.parametrize("name", ["reasoning_language", "in_gsm8k_train", "used_in_training", "body_weight", "train_split", "reasoning_model", "model", "source"])
def test_names_of_metadata(name):
    assert alike(name) is None and column_class(name, ("messages",))[0] == "metadata" == message_key(name).kind


def test_sides_of_pairs():
    for name in ("chosen_weight", "rejected_thinking", "chosen_reasoning"):
        assert column_class(name, ("chosen", "rejected"))[0] in ("refused", "repeat"), name


# -- texts that belong to the prompt

@pytest.mark.parametrize("name, value", [("choices", ["3", "4"]), ("options", "A) 3 B) 4"), ("suffix", "return x"), ("definition", "Add."), ("demonstrations", "1+1=2"), ("prefill", "Sure")])
def test_columns_of_the_prompt(name, value):
    with pytest.raises(UserError, match=f"'{name}'"): read({"question": "2+2?", "answer": "B", name: value})
    text = value if isinstance(value, str) else " ".join(value)
    assert not isinstance(read({"question": f"2+2? {text}", "answer": "B", name: value}), str)


@pytest.mark.parametrize("key, value", [("instruction", "Sum"), ("context", "c"), ("history", [["a", "b"]]), ("parts", [dict(text="1 2")]), ("system_prompt", "Be brief."),
                                        ("chat_template_kwargs", dict(enable_thinking=False)), ("enable_thinking", False), ("end_turn", False)])
def test_keys_of_messages_that_would_be_lost(key, value):
    with pytest.raises(UserError, match=f"message key '{key}'"): read(answer(**{key: value}))


# -- parts of a content

def test_types_of_parts():
    "platform.openai.com, responses: input_text, output_text and reasoning_text"
    row = dict(messages=[dict(role="user", content=[dict(type="input_text", text="Hi")]), dict(role="assistant", content=[dict(type="reasoning_text", text="Easy."), dict(type="output_text", text="Hello!")])])
    assert texts(row) == TALK and read_conversation(row).messages[1]["reasoning_content"] == "Easy."
    for kind in ("summary_text", "code", "refusal"):
        row["messages"][1]["content"][0]["type"] = kind
        with pytest.raises(UnsupportedContent, match=kind): read_conversation(row)
    row["messages"][1]["content"][0] = dict(type="text", content="Hello!")
    with pytest.raises(UnsupportedContent, match="without the key text"): read_conversation(row)


# -- the account

def test_values_that_change_nothing_are_listed():
    rows = [answer(channel="final", label="sports") | dict(loss_mask=True, label="news"), answer() | dict(loss_mask=None, label=None)]
    found = kinds(rows)
    assert {("channel", "metadata", 1), ("label", "metadata", 1), ("loss_mask", "metadata", 1)} <= found
    assert {u.text for u in account(Dataset.from_list(rows)).message_keys if u.name == "channel"} == {NO_CHANGE}
    assert ("label", "refused", 1) in kinds([answer() | dict(label=v) for v in ("Good", "sports")])


def test_a_decimal_is_a_number(): assert read_conversation(answer() | dict(weight=Decimal("0.5"))).weight == 0.5


def test_a_refused_key_is_named_once():
    with pytest.raises(UserError) as e: tokenize_dataset(Dataset.from_list([answer() | dict(loss_mask=[0, 1])]), family("qwen25"), stop_ids=stop("qwen25"))
    assert "template has no form" not in str(e.value)


# -- files

def test_a_line_with_null_is_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(answer()) + "\n null\n" + json.dumps(answer()) + "\n")
    with pytest.raises(UserError, match="line 2: it is not an object"): load_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("levels", [11, 20, 100, 500])
@pytest.mark.parametrize("opens, closes", [("[", "]"), ('{"a":', "}")])
def test_deep_values(levels, opens, closes, tmp_path):
    value = opens * levels + "1" + closes * levels
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "more": ' + value + "}\n")
    assert load_rows(tmp_path / "rows.jsonl")[0]["more"] == json.loads(value)


def test_values_too_deep(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "more": ' + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1"): load_rows(tmp_path / "rows.jsonl")
