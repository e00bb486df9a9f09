"Rows as others write them: every column and key is conversation, weight or metadata, or it is refused by name."
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, disable_progress_bars

from post_training.core.files import UserError
from post_training.data.columns import MESSAGE_KEYS, NO_CHANGE, ROW_KEYS, account, account_lines, check_account
from post_training.data.io import load_rows
from post_training.data.messages import (
    MalformedRow, UnsupportedContent, check_messages, format_of, keeps_nulls, read_conversation, split_inline_thought)
from post_training.data.mixture import mix_sources
from post_training.data.swissai import as_messages, conversation_of, structured_conversation

disable_progress_bars()
FOREIGN = Path(__file__).parent / "golden" / "foreign" / "data"
ASK, SAY = dict(role="user", content="Hi"), dict(role="assistant", content="Hello!")
WEATHER = dict(name="get_weather", description="Weather", parameters=dict(type="object", properties=dict(city=dict(type="string")), required=["city"]))
CALL = dict(name="get_weather", arguments=dict(city="Bern"))


def conversations(data, ignore=()):
    "The conversations of a dataset, or the reason of each row that has none"
    check_account(account(data, ignore), "rows")
    columns, out = format_of([c for c in data.column_names if c not in ignore]), []
    for row in data:
        try:
            c = read_conversation(row, columns, ignore, keeps_nulls(data))
            out.append(check_messages(c.messages) or c)
        except (MalformedRow, UnsupportedContent) as e: out.append(str(e))
    return out


def first(name):
    "The conversation of the first row of a file; all its rows have to be readable"
    found = conversations(load_rows(FOREIGN / name))
    assert not [c for c in found if isinstance(c, str)], found
    return found[0]


def read(row, **how):
    "One row as a person's file: written, read, accounted, and read as a conversation"
    found, = conversations(Dataset.from_list([row]), **how)
    return found


def texts(c): return [(m["role"], m["content"]) for m in c.messages]


# -- the files that were handed over

@pytest.mark.parametrize("name", ["openai_weight", "train_flag"])
def test_message_weights(name):
    c = first(f"{name}.jsonl")
    assert c.message_weights == [1, 0, 1, 1] and len(c.messages) == 4
    assert not any(set(m) - {"role", "content"} for m in c.messages)


SYSTEM = dict(system_col="Answer like a pirate, always.", sys_prompt_cols="Answer like a pirate.", sys_prompt_conv="Answer like a pirate.",
              sys_prompt_qa="Answer like a pirate.", sys_prompt_query="Answer like a pirate.", sys_prompt_qr="Answer like a pirate.", pc_system="Be brief.")


@pytest.mark.parametrize("name", SYSTEM)
def test_system_columns(name):
    "In every format alike"
    c = first(f"{name}.jsonl")
    assert c.messages[0] == dict(role="system", content=SYSTEM[name]) and [m["role"] for m in c.messages[1:]] == ["user", "assistant"]


def test_history():
    assert texts(first("alpaca_history.jsonl")) == [
        ("system", "Be brief."), ("user", "Name my first car's colour."), ("assistant", "Red."), ("user", "Thanks"), ("assistant", "Welcome."),
        ("user", "And the second one?"), ("assistant", "It is blue.")]


def test_input_belongs_to_the_prompt():
    assert texts(first("pc_input.jsonl"))[0] == ("user", "Translate to French:\n\nHello there")
    assert texts(first("pairs_instruction.jsonl")) == [("user", "Is this right?\n\n2+2=5"), ("assistant", "No.")]
    assert texts(first("dolly.jsonl"))[0] == ("user", "When was it founded?\n\nThe firm was founded in 1901 in Bern.")


def test_functions_are_tools():
    tool, = first("functions_col.jsonl").tools
    assert tool["type"] == "function" and tool["function"]["name"] == "get_weather" and "properties" in tool["function"]["parameters"]


@pytest.mark.parametrize("name, column", [("image_placeholder", "images"), ("conv_image", "image"), ("cot_col", "chain_of_thought")])
def test_refused_columns(name, column):
    data = load_rows(FOREIGN / f"{name}.jsonl")
    with pytest.raises(UserError) as e: conversations(data)
    assert f"column {column!r} ({len(data)} of {len(data)} rows)" in str(e.value) and f"ignore_columns=[{column}]" in str(e.value)
    assert all(c.messages for c in conversations(data, ignore=[column]))


@pytest.mark.parametrize("name, reason", [
    ("multimodal.jsonl", "image_url"), ("multimodal_some.jsonl", "image"), ("image_parts.parquet", "image"), ("qa_list.jsonl", "answer is a list"),
    ("sharegpt_roles.jsonl", "unknown speaker 'input'"), ("instances_more.jsonl", "several instances")])
def test_rows_that_are_dropped_by_name(name, reason):
    bad = [c for c in conversations(load_rows(FOREIGN / name)) if isinstance(c, str)]
    assert bad and all(reason in c for c in bad)


def test_speakers():
    good = [c for c in conversations(load_rows(FOREIGN / "sharegpt_roles.jsonl")) if not isinstance(c, str)]
    assert len(good) == 9 and all([m["role"] for m in c.messages] == ["user", "assistant"] for c in good)


def test_sharegpt_tools():
    c = first("sharegpt_tools.jsonl")
    assert c.messages[1] == dict(role="assistant", content=None, tool_calls=[dict(type="function", function=CALL)])
    assert c.messages[2] == dict(role="tool", content='{"t": 12}') and c.tools[0]["function"]["name"] == "get_weather"


def test_arguments_as_text_and_as_object_are_the_same():
    a, b = first("tools_argstext.jsonl"), first("tools_argsdict.jsonl")
    assert a == b and a.messages[1]["tool_calls"][0]["function"]["arguments"] == dict(city="Bern")
    assert first("tools_argsdict_id9.jsonl").messages[1]["tool_calls"][0]["id"] == "abcdefghi"


@pytest.mark.parametrize("name", ["function_call_last", "function_call_legacy"])
def test_legacy_calls(name):
    c = first(f"{name}.jsonl")
    assert c.messages[1]["content"] == "Let me look." and c.messages[1]["tool_calls"] == [dict(type="function", function=CALL)]
    if name.endswith("legacy"): assert c.messages[2] == dict(role="tool", content='{"t": 12}', name="get_weather")


def test_a_result_that_is_an_object():
    assert first("tool_content_json.jsonl").messages[2]["content"] == '{"t": 12, "list": [1, 2]}'


@pytest.mark.parametrize("name", ["think_field", "conv_think_field", "reasoning_col", "chosen_think", "pc_think", "thinking_parts", "pairs_think_field"])
def test_thoughts(name):
    assert first(f"{name}.jsonl").messages[-1]["reasoning_content"] == "Easy sum."


def test_inline_thoughts_stay_where_they_are():
    assert first("think_inline.jsonl").messages[-1] == dict(role="assistant", content="<think>\nEasy sum.\n</think>\n\nIt is 4.")
    assert split_inline_thought("<think>\nEasy sum.\n</think>\n\nIt is 4.") == ("Easy sum.", "It is 4.")


@pytest.mark.parametrize("name", ["messages_text.jsonl", "conversations_text.jsonl", "capybara.jsonl", "singular_conversation.jsonl", "large_types.parquet",
                                  "fixed_list.parquet", "null_fields.parquet", "text_parts.parquet", "dictionary.parquet", "string_view.parquet"])
def test_other_stores_of_the_same_conversation(name):
    assert texts(first(name)) == [("user", "Hello there"), ("assistant", "Hi.")]


def test_two_formats():
    data = load_rows(FOREIGN / "two_formats.jsonl")
    assert account(data).formats == {"messages": 10, "instruction + output": 10}
    assert {texts(c)[0][1] for c in conversations(data)} == {"Hello there", "Say hi"}


def test_text_only_says_what_to_do():
    with pytest.raises(UserError, match="split them into messages"): first("text_only.jsonl")


@pytest.mark.parametrize("name, last", [("pairs_sharegpt", "Hi."), ("pairs_question", "Hi."), ("pairs_uf", "Hi, friend."), ("pairs_same", "Hi.")])
def test_pairs_read_like_their_sft_forms(name, last):
    c = first(f"{name}.jsonl")
    assert texts(c) == [("user", "Hello there"), ("assistant", last)]
    assert not account(load_rows(FOREIGN / f"{name}.jsonl"), pairs=True).refused()


@pytest.mark.parametrize("name, roles", [("system_twice", "ssua"), ("system_middle", "uasua"), ("double_assistant", "uaa"), ("ends_user", "uau"), ("starts_gpt", "aua"),
                                         ("developer", "dua"), ("dup_ids", "ua"), ("id_kinds", "ua"), ("scores_mixed", "ua")])
def test_left_to_the_template(name, roles):
    assert "".join(m["role"][0] for m in first(f"{name}.jsonl").messages) == roles


# -- forms of public datasets and trainers; each with the page that describes it, in own words

PUBLIC = {
    # huggingface.co/datasets/Open-Orca/SlimOrca: from, value and a float weight in each turn
    "SlimOrca": (dict(conversations=[{"from": "system", "value": "Be kind.", "weight": None}, {"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Hello!", "weight": 1.0}]),
                 [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!")], dict(message_weights=[1, 0, 1])),
    # github.com/mistralai/mistral-finetune README: "weight": 0 on an answer
    "mistral-finetune": (dict(messages=[ASK, dict(SAY, weight=0), ASK, SAY]), [("user", "Hi"), ("assistant", "Hello!")] * 2, dict(message_weights=[1, 0, 1, 1])),
    # huggingface.co/datasets/THUDM/AgentInstruct and the documentation of ms-swift: "loss": false on an answer
    "AgentInstruct": (dict(conversations=[{"from": "human", "value": "Hi", "loss": None}, {"from": "gpt", "value": "OK.", "loss": False}, {"from": "human", "value": "Go", "loss": None},
                                          {"from": "gpt", "value": "Done.", "loss": True}]), [("user", "Hi"), ("assistant", "OK."), ("user", "Go"), ("assistant", "Done.")],
                      dict(message_weights=[1, 0, 1, 1])),
    # github.com/axolotl-ai-cloud/axolotl docs/dataset-formats/conversation.qmd: train and train_detail, the end of a span is inclusive
    "axolotl": (dict(conversations=[{"from": "human", "value": "How are you?", "train": True},
                                    {"from": "assistant", "value": "I'm doing very well, thank you!", "train_detail": [
                                        dict(begin_offset=0, end_offset=8, train=False), dict(begin_offset=9, end_offset=18, train=True), dict(begin_offset=19, end_offset=30, train=False)]}]),
                [("user", "How are you?"), ("assistant", "I'm doing very well, thank you!")], dict(span_weights={1: [(0, 9, 0.0), (9, 19, 1.0), (19, 31, 0.0)]})),
    # github.com/hiyouga/LLaMA-Factory data/README.md: alpaca with system and history, whose answers are learned too
    "LLaMA-Factory alpaca": (dict(instruction="Sum", input="1 2", output="3", system="Be exact.", history=[["Hi", "Hello!"]]),
                             [("system", "Be exact."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Sum\n\n1 2"), ("assistant", "3")], dict(message_weights=None)),
    # the same page: sharegpt with system and tools columns; function_call and observation turns
    "LLaMA-Factory sharegpt": (dict(system="Use tools.", tools=json.dumps([WEATHER]), conversations=[
        {"from": "human", "value": "Bern?"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "12"}, {"from": "gpt", "value": "12 degrees."}]),
        [("system", "Use tools."), ("user", "Bern?"), ("assistant", None), ("tool", "12"), ("assistant", "12 degrees.")], dict(tools=[dict(type="function", function=WEATHER)])),
    # github.com/modelscope/ms-swift docs/source_en/Customization/Custom-dataset.md: query, response and history
    "ms-swift query": (dict(system="Be kind.", query="And now?", response="Bye.", history=[["Hi", "Hello!"]]),
                       [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?"), ("assistant", "Bye.")], {}),
    # the same page: conversation with human and assistant in one object
    "ms-swift conversation": (dict(system="Be kind.", conversation=[dict(human="Hi", assistant="Hello!"), dict(human="And now?", assistant="Bye.")]),
                              [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?"), ("assistant", "Bye.")], {}),
    # the same page: rejected_response beside messages
    "ms-swift rejected": (dict(messages=[ASK, SAY], rejected_response="No."), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/jqi/alpaca_nemo alpaca2nemo.py: NeMo's chat format, mask names the speaker without loss
    "NeMo": (dict(mask="User", system="A chat.", conversations=[{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hello!"}]),
             [("system", "A chat."), ("user", "Hi"), ("assistant", "Hello!")], dict(weight=1)),
    # huggingface.co/datasets/LDJnr/Capybara: conversation of input and output, and a source
    "Capybara": (dict(source="Airoboros", conversation=[dict(input="Hi", output="Hello!"), dict(input="And now?", output="Bye.")]),
                 [("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?"), ("assistant", "Bye.")], {}),
    # huggingface.co/datasets/databricks/databricks-dolly-15k: instruction, context, response, category
    "Dolly": (dict(instruction="Who?", context="Ann came.", response="Ann.", category="closed_qa"), [("user", "Who?\n\nAnn came."), ("assistant", "Ann.")], {}),
    # huggingface.co/datasets/NousResearch/hermes-function-calling-v1: tools column as text, calls inside the texts
    "Hermes": (dict(id="1", tools=json.dumps([dict(type="function", function=WEATHER)]), conversations=[
        {"from": "system", "value": "Tools: <tools></tools>"}, {"from": "human", "value": "Bern?"}, {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"}, {"from": "tool", "value": "<tool_response>12</tool_response>"}]),
        [("system", "Tools: <tools></tools>"), ("user", "Bern?"), ("assistant", "<tool_call>\n{}\n</tool_call>"), ("tool", "<tool_response>12</tool_response>")], dict(tools=[dict(type="function", function=WEATHER)])),
    # huggingface.co/datasets/Salesforce/APIGen-MT-5k: sharegpt with function_call and observation, tools and system as columns
    "APIGen-MT": (dict(system="Policy.", tools=json.dumps([WEATHER]), conversations=[{"from": "human", "value": "Bern?"}, {"from": "function_call", "value": json.dumps([CALL, CALL])}]),
                  [("system", "Policy."), ("user", "Bern?"), ("assistant", None)], {}),
    # huggingface.co/docs/trl dataset_formats: calls without content, the name of the tool in its result
    "TRL tools": (dict(messages=[ASK, dict(role="assistant", tool_calls=[dict(type="function", function=CALL)]), dict(role="tool", name="get_weather", content="12"), dict(role="assistant", content="12.")],
                       tools=[dict(type="function", function=WEATHER)]), [("user", "Hi"), ("assistant", None), ("tool", "12"), ("assistant", "12.")], {}),
    # the same page: the thought of gpt-oss in the key thinking, a developer message
    "TRL harmony": (dict(messages=[dict(role="developer", content="Be kind."), ASK, dict(SAY, thinking="They greet.")]), [("developer", "Be kind."), ("user", "Hi"), ("assistant", "Hello!")], {}),
    # the same page: prompt and completion as messages
    "TRL prompt completion": (dict(prompt=[ASK], completion=[SAY]), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # platform.openai.com/docs/guides/fine-tuning: weight 0 or 1 in messages of the assistant
    "OpenAI": (dict(messages=[ASK, dict(SAY, weight=1)]), [("user", "Hi"), ("assistant", "Hello!")], dict(message_weights=None)),
    # huggingface.co/datasets/HuggingFaceTB/smoltalk2: chat_template_kwargs beside messages, and a source
    "smoltalk2": (dict(messages=[ASK, SAY], chat_template_kwargs=dict(enable_thinking=False, custom_instructions="", python_tools=None), source="x"), [("user", "Hi"), ("assistant", "Hello!")],
                  dict(template_kwargs=dict(enable_thinking=False, custom_instructions=""))),
    # huggingface.co/datasets/HuggingFaceH4/ultrachat_200k: prompt repeats the first question
    "UltraChat": (dict(prompt="Hi", prompt_id="a", messages=[ASK, SAY]), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized: prompt, chosen, rejected, messages, scores
    "UltraFeedback": (dict(prompt="Hi", messages=[ASK, SAY], chosen=[ASK, SAY], rejected=[ASK, dict(SAY, content="No.")], score_chosen=8.0, score_rejected=2.0), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/allenai/tulu-3-sft-mixture: id, messages, source
    "Tulu 3": (dict(id="a", messages=[ASK, SAY], source="flan"), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/open-r1/OpenR1-Math-220k: problem and solution beside messages
    "OpenR1-Math": (dict(problem="2+2?", solution="Count: 4.", answer="4", messages=[dict(role="user", content="2+2?"), dict(role="assistant", content="<think>\nSo 4.\n</think>\n\n4")]),
                    [("user", "2+2?"), ("assistant", "<think>\nSo 4.\n</think>\n\n4")], {}),
    # huggingface.co/datasets/Magpie-Align/Magpie-Pro-300K-Filtered: instruction and response repeat the conversation
    "Magpie": (dict(uuid="a", instruction="Hi", response="Hello!", conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/meta-math/MetaMathQA: query, response, type, original_question
    "MetaMath": (dict(query="2+2?", response="4", type="x", original_question="1+1?"), [("user", "2+2?"), ("assistant", "4")], {}),
    # huggingface.co/datasets/teknium/OpenHermes-2.5: conversations with many columns that are null
    "OpenHermes": (dict(custom_instruction=None, language=None, system_prompt=None, id=None, model=None, source="x", conversations=[{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Hello!", "weight": None}]),
                   [("user", "Hi"), ("assistant", "Hello!")], dict(message_weights=None)),
    # huggingface.co/datasets/open-thoughts/OpenThoughts-114k: system column and from, value turns
    "OpenThoughts": (dict(system="Think first.", conversations=[{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]), [("system", "Think first."), ("user", "Hi"), ("assistant", "Hello!")], {}),
    # docs.mistral.ai, magistral: a content of parts, the thought as a part that holds parts
    "Magistral": (dict(messages=[ASK, dict(role="assistant", content=[dict(type="thinking", thinking=[dict(type="text", text="Easy.")]), dict(type="text", text="Hello!")])]), [("user", "Hi"), ("assistant", "Hello!")], {}),
    # huggingface.co/datasets/CohereForAI/aya_dataset: inputs, targets, language
    "Aya": (dict(inputs="Hi", targets="Hello!", language="English"), [("user", "Hi"), ("assistant", "Hello!")], {}),
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_public_forms(name, kind, tmp_path):
    row, want, fields = PUBLIC[name]
    if (name, kind) == ("Magistral", "parquet"): pytest.skip("a column of texts and lists has no Arrow type")
    if kind == "jsonl": (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    else: pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    c, = conversations(load_rows(tmp_path / f"rows.{kind}"))
    assert texts(c) == want
    for key, value in fields.items(): assert getattr(c, key) == value, key
    thought = dict(Magistral="Easy.").get(name, "They greet." if name == "TRL harmony" else None)
    assert c.messages[-1].get("reasoning_content") == thought


REFUSED = {
    # docs.mistral.ai, chat completion: prefix on the last answer
    "prefix": (dict(messages=[ASK, dict(SAY, prefix=True)]), "message key 'prefix'", "messages.prefix"),
    # huggingface.co/docs/trl dataset_formats: unpaired preference (KTO)
    "KTO": (dict(prompt="Hi", completion="Hello!", label=False), "column 'label'", "label"),
    # github.com/hiyouga/LLaMA-Factory data/README.md: KTO
    "kto_tag": (dict(instruction="Hi", input="", output="Hello!", kto_tag=True), "column 'kto_tag'", "kto_tag"),
    # huggingface.co/docs/trl sft_trainer: completion_mask beside tokens
    "completion_mask": (dict(messages=[ASK, SAY], completion_mask=[0, 1]), "column 'completion_mask'", "completion_mask"),
    # huggingface.co/datasets/TAUR-dev: ranges of characters in a column
    "mask_ranges": (dict(conversations=[ASK, SAY], mask_ranges=[dict(start=0, end=1)]), "column 'mask_ranges'", "mask_ranges"),
    # github.com/modelscope/ms-swift Custom-dataset.md: audio
    "audios": (dict(messages=[ASK, SAY], audios=["a.wav"]), "column 'audios'", "audios"),
    # huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K: image
    "LLaVA": (dict(image="a.png", conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]), "column 'image'", "image"),
    # huggingface.co/datasets/allenai/Dolci: functions and function_calls in messages
    "functions in a message": (dict(messages=[ASK, dict(SAY, function_calls="f()")]), "message key 'function_calls'", "messages.function_calls"),
    # huggingface.co/docs/transformers chat_extras: documents for retrieval
    "documents": (dict(messages=[ASK, SAY], documents=[dict(title="a", text="b")]), "column 'documents'", "documents"),
    # platform.openai.com/docs/api-reference: the refusal of an answer in a key of its own
    "refusal": (dict(messages=[ASK, dict(SAY, refusal="No.")]), "message key 'refusal'", "messages.refusal"),
    # huggingface.co/datasets/kaist-ai/CoT-Collection: rationale
    "rationale": (dict(question="2+2?", rationale="Easy.", answer="4"), "column 'rationale'", "rationale"),
    # two datasets joined by name: the prompt is not the conversation's
    "another prompt": (dict(prompt="Other", messages=[ASK, SAY]), "column 'prompt'", "prompt"),
    "input beside messages": (dict(input="1 2", messages=[ASK, SAY]), "column 'input'", "input"),
    "history beside messages": (dict(history=[["a", "b"]], messages=[ASK, SAY]), "column 'history'", "history"),
    "reasoning beside messages": (dict(reasoning="Easy.", messages=[ASK, SAY]), "column 'reasoning'", "reasoning"),
    # huggingface.co/datasets/ondevicellm/SlimOrca: messages beside conversations that have weights
    "weights in the other column": (dict(messages=[ASK, SAY], conversations=[{"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Hello!", "weight": 1.0}]), "column 'conversations'", "conversations"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    "By name, with the rows and what to do; the same row is read if the column is ignored, and a row by itself is refused too"
    row, words, ignore = REFUSED[name]
    with pytest.raises(UserError) as e: read(row)
    assert words in str(e.value) and "(1 of 1 rows)" in str(e.value) and f"[{ignore}]" in str(e.value)
    with pytest.raises(UnsupportedContent): read_conversation(row)
    assert read(row, ignore=[ignore]).messages == read_conversation(row, ignore=[ignore]).messages
    key = ignore.removeprefix("messages.")
    empty = json.loads(json.dumps(row))
    for holder in [empty, *empty.get("messages", []), *empty.get("conversations", [])]:
        if key in holder: holder[key] = None
    if key != "conversations": assert not isinstance(read(empty), str) # a key without a value is nothing


NO_FORMAT = {  # datasets that no format fits: refused with the names of their columns
    "xLAM": dict(id=0, query="Bern?", answers=json.dumps([CALL]), tools=json.dumps([WEATHER])),  # huggingface.co/datasets/Salesforce/xlam-function-calling-60k
    "glaive": dict(system="SYSTEM: ...", chat="USER: Hi\n\n\nASSISTANT: Hello! <|endoftext|>"),  # huggingface.co/datasets/glaiveai/glaive-function-calling-v2
    "OASST": dict(message_id="a", parent_id=None, text="Hi", role="prompter", lang="en"),  # huggingface.co/datasets/OpenAssistant/oasst1
    "TRL stepwise": dict(prompt="2+2?", completions=["a", "b"], labels=[True, False])}  # huggingface.co/docs/trl dataset_formats


@pytest.mark.parametrize("name", NO_FORMAT)
def test_no_format(name):
    with pytest.raises(UserError, match="No usable column|cannot be honoured") as e: read(NO_FORMAT[name])
    assert any(c in str(e.value) for c in NO_FORMAT[name])


MALFORMED = {
    "two system prompts": (dict(system="a", system_prompt="b", messages=[ASK, SAY]), "different system prompts"),
    "a column and a message": (dict(system="a", messages=[dict(role="system", content="b"), ASK, SAY]), "different system prompts"),
    "arguments": (dict(messages=[ASK, dict(role="assistant", tool_calls=[dict(function=dict(name="f", arguments="x=1"))])]), "arguments of a tool call are not JSON"),
    "a list of arguments": (dict(messages=[ASK, dict(role="assistant", tool_calls=[dict(function=dict(name="f", arguments="[1]"))])]), "not an object"),
    "negative weight": (dict(messages=[ASK, dict(SAY, weight=-1)]), "weight is negative"),
    "text weight": (dict(messages=[ASK, dict(SAY, weight="1")]), "weight is not a number"),
    "row weight": (dict(messages=[ASK, SAY], sample_weight=float("nan")), "sample_weight is not a finite number"),
    "weights in a list": (dict(messages=[ASK, SAY], loss_weight=[1.0, 0.0]), "loss_weight is not a number"),
    "a mask of the assistant": (dict(mask="Assistant", messages=[ASK, SAY]), "mask names another speaker"),
    "a span outside": (dict(messages=[ASK, dict(SAY, train_detail=[dict(begin_offset=9, end_offset=12, train=True)])]), "outside of its content"),
    "numbers as messages": (dict(conversations=[1, 2]), "a message is not a mapping"),
    "a switch": (dict(question="2+2?", reasoning="off", answer="4"), "a switch"),  # huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset
    "two thoughts": (dict(messages=[ASK, dict(SAY, reasoning="a", thinking="b")]), "two different texts as its thought"),
    "a context of lists": (dict(question="a", context=["b", "c"], answer="d"), "context is not text"),
    "a thought of the user": (dict(messages=[dict(ASK, thinking="a"), SAY]), "a thought in a user message"),
    "bad history": (dict(instruction="a", output="b", history=[["c"]]), "history is not a list of pairs"),
    "tools": (dict(messages=[ASK, SAY], tools="{"), "the tools are not JSON")}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(name):
    row, words = MALFORMED[name]
    assert words in read(row)


def test_the_same_system_prompt_counts_once():
    c = read(dict(system="Be kind.", system_prompt="Be kind.", messages=[dict(role="system", content="Be kind."), ASK, SAY]))
    assert [m["role"] for m in c.messages] == ["system", "user", "assistant"]


def test_row_weights():
    "Aliases multiply; false is 0, true and null are 1"
    assert [read(dict(messages=[ASK, SAY], **w)).weight for w in (dict(weight=0.5), dict(sample_weight=2, loss_weight=0.25), dict(train=False), dict(training=True), dict(weight=None), {})] == [0.5, 0.5, 0, 1, 1, 1]


@pytest.mark.parametrize("detail, spans, weight", [
    ([dict(begin_offset=0, end_offset=4, train=True)], [(0, 5, 1.0), (5, 6, 0.0)], 1), ([dict(begin_offset=1, end_offset=1, weight=0.5)], [(0, 1, 0.0), (1, 2, 0.5), (2, 6, 0.0)], 1),
    ([dict(begin_offset=0, end_offset=3, train=False), dict(begin_offset=2, end_offset=9, train=True)], [(0, 2, 0.0), (2, 4, 1.0), (4, 6, 1.0)], 1), ([], None, 0)])
def test_train_detail(detail, spans, weight):
    "Inclusive ends, nothing between the entries, the trained one wins; an empty list trains nothing (axolotl, ChatTemplatePrompter.get_offsets_for_train_detail)"
    c = read_conversation(dict(messages=[ASK, dict(SAY, train_detail=detail)]))
    assert (c.span_weights or {}).get(1) == spans and (c.message_weights or [1, 1])[1] == weight


# -- nulls

CALLS = [dict(city="Bern", unit=None), dict(city="Basel"), dict(when=None, count=3)]
NULLABLE = dict(WEATHER, parameters=dict(type="object", properties=dict(city=dict(type="string"), unit=dict(type=["string", "null"]), when=dict(type="string")), required=["city"]))


def rows_with_calls(calls):
    return [dict(messages=[ASK, dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="get_weather", arguments=a))])], tools=json.dumps([NULLABLE])) for a in calls]


def arguments(data): return [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in conversations(data)]


def test_nulls_that_were_written_stay(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_with_calls(CALLS)))
    assert arguments(load_rows(tmp_path / "rows.jsonl")) == CALLS


def test_nulls_that_arrow_filled_in_go(tmp_path):
    "In a struct the schema decides: unit may be null, when may not; both ways of storing give the same rows"
    pq.write_table(pa.Table.from_pylist(rows_with_calls(CALLS)), tmp_path / "rows.parquet")
    got = arguments(load_rows(tmp_path / "rows.parquet"))
    assert got == [dict(city="Bern", unit=None), dict(city="Basel", unit=None), dict(city=None, unit=None, count=3)]
    plain = [dict(city="Bern"), dict(city="Basel", count=3)]
    free = [dict(r, tools=json.dumps([WEATHER])) for r in rows_with_calls(plain)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in free))
    pq.write_table(pa.Table.from_pylist(free), tmp_path / "free.parquet")
    assert conversations(load_rows(tmp_path / "rows.jsonl")) == conversations(load_rows(tmp_path / "free.parquet"))


def test_tools_from_structs(tmp_path):
    "Schemas with different keys: read from a struct as from JSON lines"
    other = dict(type="function", function=dict(name="add", parameters=dict(type="object", properties=dict(a=dict(type="number", minimum=0)))))
    rows = [dict(messages=[ASK, SAY], tools=[dict(type="function", function=WEATHER)]), dict(messages=[ASK, SAY], tools=[other])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    got = conversations(load_rows(tmp_path / "rows.parquet"))
    assert got == conversations(load_rows(tmp_path / "rows.jsonl")) and [c.tools for c in got] == [r["tools"] for r in rows]


# -- what a stage passes on

FULL = dict(tools=[dict(type="function", function=WEATHER)], chat_template_kwargs=dict(enable_thinking=True), weight=0.5, source="a/b", messages=[
    dict(role="system", content="Be kind."), dict(ASK, weight=0), dict(role="assistant", content=None, reasoning_content="Look.", tool_calls=[dict(id="c1", type="function", function=dict(name="get_weather", arguments=dict(city=None, other="x")))]),
    dict(role="tool", tool_call_id="c1", name="get_weather", content="12"), dict(role="assistant", content="12 degrees.", train_detail=[dict(begin_offset=0, end_offset=1, train=True)])])


def test_conversion_loses_nothing(tmp_path):
    rows = [FULL, dict(messages=[ASK, SAY], source="c")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = load_rows(tmp_path / "rows.jsonl")
    out, counts = as_messages(data, blocks=False)
    assert not counts["dropped"] and conversations(out) == conversations(data)
    out.save_to_disk(tmp_path / "saved")
    assert conversations(load_rows(tmp_path / "saved")) == conversations(data)
    out.to_parquet(tmp_path / "rows.parquet")
    assert conversations(load_rows(tmp_path / "rows.parquet")) == conversations(data)
    simple, _ = as_messages(data.select([1]), blocks=False)
    assert set(simple.column_names) == {"messages", "source", "tools", "chat_template_kwargs", "weight"} and set(simple.features["messages"].feature) == {"role", "content"}


def test_structured_conversion_keeps_weights():
    row = dict(FULL, messages=[dict(m, train_detail=None, weight=0.5 if m["role"] == "assistant" else m.get("weight")) for m in FULL["messages"]])
    out, counts = as_messages(Dataset.from_list([row]), blocks=True)
    assert not counts["dropped"] and set(out.column_names) == {"messages", "source", "chat_template_kwargs", "weight"}
    c = read_conversation(out[0])
    assert c.message_weights == [1, 1, 0, 0.5] and c.weight == 0.5 and c.template_kwargs == dict(enable_thinking=True)
    assert c.messages == structured_conversation(read_conversation(row)).messages
    spanned, counts = as_messages(Dataset.from_list([dict(FULL, messages=[*FULL["messages"][:2], FULL["messages"][-1]])]), blocks=True)
    assert not counts["dropped"] and read_conversation(spanned[0]).span_weights == {3: {0: [(0, 2, 1.0), (2, 11, 0.0)]}}


def test_a_mixture_carries_what_changes_training(tmp_path):
    rows = [FULL, dict(messages=[ASK, SAY], source="c")]
    (tmp_path / "full.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(dict(question=f"{i}?", answer="a", topic="x")) + "\n" for i in range(3)))
    sources = [dict(dataset_name=n, dataset_path=str(tmp_path / f"{n}.jsonl")) for n in ("full", "qa")]
    m = mix_sources(sources, shuffle=False, blocks=False)
    assert conversations(m.train.select([0, 1])) == conversations(load_rows(tmp_path / "full.jsonl"))
    assert m.train["origin"][:] == ["a/b", "c", None, None, None] and m.train["source"][:] == ["full"] * 2 + ["qa"] * 3
    assert {"tools", "chat_template_kwargs", "weight"} <= set(m.train.column_names) and any("tools, chat_template_kwargs, weight, origin" in n for n in m.notes)
    assert m.accounts["qa"].names("metadata") == ["topic"] and m.accounts["full"].names("weight") == ["weight"]


def test_a_mixture_refuses_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(messages=[ASK, SAY], loss_mask=[0, 1])) + "\n")
    source = [dict(dataset_name="masked", dataset_path=str(tmp_path / "rows.jsonl"))]
    with pytest.raises(UserError, match="Source 'masked'.*column 'loss_mask' .1 of 1 rows"): mix_sources(source)
    assert len(mix_sources(source, ignore_columns=("loss_mask",)).train) == 1
    assert "ignore_columns: there is no column 'los_mask'. Did you mean 'loss_mask'?" in mix_sources(source, ignore_columns=("los_mask", "loss_mask")).notes


def test_pairs_take_no_message_weights():
    data = Dataset.from_list([dict(chosen=[ASK, dict(SAY, weight=0.0)], rejected=[ASK, dict(SAY, content="No.", weight=1.0)], weight=0.5)])
    found = account(data, pairs=True)
    assert found.names("refused", "message_keys") == ["weight"] and found.names("weight") == ["weight"]


# -- the account

def test_every_column_and_key_has_one_class():
    row = {k: "x" for k in ROW_KEYS} | dict(messages=[{k: "x" for k in MESSAGE_KEYS}], other="y")
    for holder in (row, row["messages"][0]): holder.update(label=True, labels=[1])
    found = account(Dataset.from_list([row]))
    lines = account_lines(found)
    assert {r["class"] for r in lines} == {"refused", "weight", "conversation", "metadata"}
    assert sorted(u.name for u in found.columns) == sorted(row) and sorted(u.name for u in found.message_keys) == sorted(MESSAGE_KEYS)
    assert all(r["rows"] == 1 and r["meaning"] for r in lines)


@pytest.mark.parametrize("kind", ["list", "text", "json"])
def test_the_account_counts_rows(kind, tmp_path):
    "In lists of structs, in JSON text, and where contents have several kinds"
    rows = [dict(messages=[ASK, dict(SAY, weight=w, prefix=p)], images=i) for w, p, i in ((0, False, []), (None, False, None), (0.5, True, ["a"]))]
    if kind == "text": rows = [dict(r, messages=json.dumps(r["messages"])) for r in rows]
    if kind == "json": rows.append(dict(messages=[dict(role="user", content=[dict(type="text", text="a")]), SAY], images=None))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = account(load_rows(tmp_path / "rows.jsonl"))
    uses = {u.name: (u.kind, u.rows) for u in found.columns + found.message_keys if u.text != NO_CHANGE}
    assert uses["weight"] == ("weight", 2) and uses["prefix"] == ("refused", 1) and uses["images"] == ("refused", 1) and uses["role"] == ("conversation", len(rows))


def test_swissai_rows():
    row = dict(conversation_branches=[dict(messages=[dict(role="assistant", parts=[dict(type="response", content="a")])])], initial_prompt=dict(content="b"), system_prompt=None, available_functions=None, weight=0.5,
               chat_template_kwargs='{"enable_thinking": true}')
    c = conversation_of(row)
    assert c.weight == 0.5 and c.template_kwargs == dict(enable_thinking=True) and [m["role"] for m in c.messages] == ["developer", "user", "assistant"]
    assert account(Dataset.from_list([row])).formats == {"conversation_branches": 1}
    with pytest.raises(UnsupportedContent, match="images"): conversation_of(dict(row, images=["a.png"]))
