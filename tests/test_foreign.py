"Rows that others write, with the tokenizers of other model families: ids, trained tokens, counts and messages of each line of golden/foreign/README.md."
import json
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, disable_progress_bars

from post_training.core.files import UserError
from post_training.data.columns import account
from post_training.data.io import load_rows
from post_training.evaluation.answers import evaluation_result, prompts_of
from post_training.models.verifiers import row_verifier
from post_training.tokens.dataset import tokenize_dataset, tokenize_rows
from post_training.tokens.pairs import tokenize_pairs
from post_training.tokens.tokenizer import load_tokenizer, toy_tokenizer

disable_progress_bars()
FOREIGN = Path(__file__).parent / "golden" / "foreign"
ENDS = dict(chatml_rstrip="<|im_end|>", gemma2="<end_of_turn>", gemma3="<end_of_turn>", llama2="</s>", llama2_first="</s>", llama31="<|eot_id|>", llama31_nopad="<|eot_id|>",
            mistral7="</s>", olmo2="<|endoftext|>", padeqeos="<|im_end|>", phi4="<|im_end|>", qwen25="<|im_end|>", qwen3="<|im_end|>", r1="<|end|>", smollm3="<|im_end|>", zephyr_eos="</s>")
PADS = dict(llama31_nopad=6, padeqeos=0)
FAMILIES = [f for f in ENDS if f != "r1"]  # its generation prompt ends in a thought that its template never writes before an answer
SYSTEM = [f for f in FAMILIES if f != "gemma2"]
FEW = ["chatml_rstrip", "llama2_first", "llama31", "qwen3"]
WEATHER = dict(name="get_weather", description="Weather", parameters=dict(type="object", properties=dict(city=dict(type="string")), required=["city"]))


@cache
def family(name):
    return load_tokenizer(str(FOREIGN / "tokenizers" / name), **({"model_pad_token_id": PADS[name]} if name in PADS else {}))


def stop(name): return [family(name).convert_tokens_to_ids(ENDS[name])]


def rows(name): return load_rows(FOREIGN / "data" / name)


def tokenized(data, name, **policies):
    "The public way from rows to tokens"
    return tokenize_dataset(rows(data) if isinstance(data, str) else data, family(name), stop_ids=stop(name), **policies)


def talk(*texts, system=None):
    "A conversation from its texts: user, assistant, user, ..."
    head = [dict(role="system", content=system)] if system else []
    return head + [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]


def render(tokenizer, messages, **kwargs): return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def expected(tokenizer, end, messages, trained=None, **kwargs):
    "The slow way: ids of the whole rendering, and the tokens from where the rendering that asks for an answer ends to the end of its turn"
    text = render(tokenizer, messages, **kwargs)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for m, message in enumerate(messages):
        if message["role"] != "assistant" or trained is not None and m not in trained: continue
        asked = render(tokenizer, messages[:m], add_generation_prompt=True, **kwargs)
        assert text.startswith(asked), (asked, text)
        spans.append((len(asked), text.index(end, len(asked)) + len(end)))
    return encoded["input_ids"], [any(a < e and s < b for s, e in spans) for a, b in encoded["offset_mapping"]]


def check_rows(data, name, conversations, **kwargs):
    "Every kept row is the slow way's"
    assert len(data) == len(conversations)
    for row, messages in zip(data, conversations):
        ids, mask = expected(family(name), ENDS[name], messages, **kwargs)
        assert row["input_ids"] == ids and row["completion_mask"] == mask


def trained_text(row, tokenizer):
    "The decoded tokens that training would learn"
    weights = row.get("weights") or [1.0] * len(row["input_ids"])
    return tokenizer.decode([i for i, m, w in zip(row["input_ids"], row["completion_mask"], weights) if m and w > 0])


# -- rows that any template takes: what the first conversation of each file is

HI = talk("Hello there", "Hi.")
SUM = talk("What is 0+0?", "It is 0.")
PIRATE = "Answer like a pirate."
FIRST = {
    "alpaca_history.jsonl": talk("Name my first car's colour.", "Red.", "Thanks", "Welcome.", "And the second one?", "It is blue.", system="Be brief."),
    "system_col.jsonl": talk("Hello there", "Arr, hello.", system="Answer like a pirate, always."), "pc_system.jsonl": talk("Hello there", "Hi.", system="Be brief."),
    **{f"sys_prompt_{k}.jsonl": talk("Say hello", "Arr, hello.", system=PIRATE) for k in ("cols", "conv", "qa", "query", "qr")},
    "pc_input.jsonl": talk("Translate to French:\n\nHello there", "Bonjour."), "multi.jsonl": talk("Hello there", "Hi.", "How are you?", "Fine, thanks.\n", system="Be brief."),
    **dict.fromkeys(("plain.jsonl", "bom.jsonl", "crlf.jsonl", "nan.jsonl", "array.json", "pretty.jsonl", "dup_ids.jsonl", "id_kinds.jsonl"), SUM),
    **dict.fromkeys(("spark", "spark2", "extra", "two", "scores_mixed.jsonl", "shards", "messages_text.jsonl", "conversations_text.jsonl", "capybara.jsonl", "singular_conversation.jsonl",
                     "mixed_content.jsonl", "null_fields.parquet", "large_types.parquet", "dictionary.parquet", "string_view.parquet", "fixed_list.parquet", "text_parts.parquet", "two_formats.jsonl"), HI),
    "emoji_start.jsonl": talk("What is 0+0?", "✅ 0"), "u2028.jsonl": talk("Hello\u2028there\u0085x", "Hi\u2029friend."), "sharegpt_roles.jsonl": talk("Hello there", "Hi, friend."),
    "ends_user.jsonl": talk("Hello there", "Hi.", "And then?"), "plain_eval.jsonl": talk("2+2?", "Bern"),
    "pairs_uf.jsonl": talk("Hello there", "Hi, friend."), **dict.fromkeys(("pairs_same.jsonl", "pairs_sharegpt.jsonl", "pairs_question.jsonl"), HI),
    "pairs_instruction.jsonl": talk("Is this right?\n\n2+2=5", "No.")}


@pytest.mark.parametrize("name", FIRST)
def test_ids_and_trained_tokens(name):
    "Of all rows with the templates of all families: those of the slow way, and the answers with the end of their turns"
    raw, has_system = rows(name), FIRST[name][0]["role"] == "system"
    for f in SYSTEM if has_system else FAMILIES if name in ("plain.jsonl", "alpaca_history.jsonl", "ends_user.jsonl") else FEW:
        data, counts = tokenized(raw, f)
        assert counts["out"] == len(data) == len(raw) - sum(counts["dropped"].values())
        assert set(counts["dropped"]) == ({"malformed: unknown speaker 'input'"} if name == "sharegpt_roles.jsonl" else set())
        check_rows(data.select([0]), f, [FIRST[name]])
        assert trained_text(data[0], family(f)).count(ENDS[f]) == sum(m["role"] == "assistant" for m in FIRST[name])


@pytest.mark.parametrize("f", FAMILIES)
def test_every_row_of_a_file(f):
    data, counts = tokenized("plain.jsonl", f)
    assert counts["out"] == 40 and not counts["dropped"]
    check_rows(data, f, [talk(f"What is {i}+{i}?", f"It is {2 * i}.") for i in range(40)])


def test_each_row_by_its_own_format():
    assert account(rows("two_formats.jsonl")).formats == {"messages": 10, "instruction + output": 10}
    for f in FEW:
        data, _ = tokenized("two_formats.jsonl", f)
        check_rows(data.select([0, 19]), f, [HI, talk("Say hi", "Hi.")])


# -- weights of messages

@pytest.mark.parametrize("name", ["openai_weight.jsonl", "train_flag.jsonl"])
@pytest.mark.parametrize("f", FAMILIES)
def test_a_turn_of_weight_zero(name, f):
    "It is in the context, and no token of it is trained; the other answer is, with its end"
    messages = talk("What is 2+2?", "It is 5, surely.", "Are you sure?", "It is 4.")
    data, counts = tokenized(name, f)
    ids, trained = expected(family(f), ENDS[f], messages, trained=[3])
    for row in data:
        assert row["input_ids"] == ids and row["row_weight"] == 1
        assert [m and w > 0 for m, w in zip(row["completion_mask"], row["weights"])] == trained
        assert set(row["weights"]) == {0, 1}
    assert "5, surely" not in trained_text(data[0], family(f)) and trained_text(data[0], family(f)).strip().endswith(ENDS[f])
    assert counts["trained_tokens"] == 20 * sum(trained) == counts["weight_sum"] and counts["out"] == 20


# -- control tokens that swallow whitespace, answers that begin with it

@pytest.mark.parametrize("name", ["multi.jsonl", "plain.jsonl"])
def test_an_end_token_that_swallows_the_line_break(name):
    "Trained in every turn"
    data, counts = tokenized(name, "chatml_rstrip")
    end, = stop("chatml_rstrip")
    for row in data:
        ends = [m for i, m in zip(row["input_ids"], row["completion_mask"]) if i == end]
        assert sum(ends) == (2 if name == "multi.jsonl" else 1)
    assert counts["out"] == len(data) and not counts["dropped"]


@pytest.mark.parametrize("name", ["one_newline_sampled.jsonl", "one_newline_unsampled.jsonl"])
@pytest.mark.parametrize("at", [0, 57, -1])
def test_one_answer_that_begins_with_a_line_break(name, at):
    "Its row is dropped and counted, wherever it stands; the others are kept"
    raw = rows(name)
    odd, = [i for i, r in enumerate(raw) if r["messages"][-1]["content"].startswith("\n")]
    order = [i for i in range(len(raw)) if i != odd]
    order.insert(at % len(raw), odd)
    data, counts = tokenized(raw.select(order), "qwen25")
    assert counts["dropped"] == {"generation prompt": 1} and counts["out"] == len(raw) - 1
    assert counts["first"]["generation prompt"] == str(order.index(odd)) and str(order.index(odd)) not in data["row_id"][:]
    assert "joins the end of the generation prompt and the beginning of an answer" in counts["details"]["generation prompt"]
    assert tokenized(raw, "mistral7")[1]["dropped"] == {}  # no line break before its answers
    with pytest.raises(UserError, match="max_drop_fraction"): tokenized(raw, "qwen25", max_drop_fraction=0.001)
    kept, counts = tokenized(raw.select(order), "qwen25", on_missing_stop="warn")
    assert len(kept) == len(raw) and counts["warned"]["rows"] == 1
    with pytest.raises(UserError, match=f"Row {order.index(odd)}: .*on_unverifiable=drop"): tokenized(raw.select(order), "qwen25", on_unverifiable="error")


# -- thoughts

THOUGHT = "<think>\nEasy sum.\n</think>\n\nIt is 4."


@pytest.mark.parametrize("name", ["think_inline.jsonl", "think_inline_noncanon.jsonl"])
def test_inline_thoughts(name):
    "Recognised as the template does, or refused by naming the tag and the key"
    data, _ = tokenized(name, "qwen3")
    check_rows(data, "qwen3", [[*talk("2+2?"), dict(role="assistant", content="It is 4.", reasoning_content="Easy sum.")]] * 20)
    assert trained_text(data[0], family("qwen3")) == THOUGHT + "<|im_end|>"
    plain, _ = tokenized(name, "smollm3")  # writes contents as they are
    assert trained_text(plain[0], family("smollm3")) == rows(name)[0]["messages"][1]["content"] + "<|im_end|>"
    with pytest.raises(UserError, match="</think>.*reasoning_content"): tokenized(name, "r1")


def test_thoughts_of_earlier_answers():
    "Left out as the template does, and counted; or one row of each turn, as the model sees it"
    first, second = [dict(role="assistant", content=c, reasoning_content=r) for c, r in (("It is 4.", "Easy sum."), ("It is 6.", "Also easy."))]
    whole = [*talk("2+2?"), first, *talk("3+3?"), second]
    data, counts = tokenized("think_inline_multi.jsonl", "qwen3")
    check_rows(data, "qwen3", [whole] * 20)
    assert counts["left_out"] == {"earlier thoughts": 20} and "Easy sum" not in trained_text(data[0], family("qwen3"))
    data, counts = tokenized("think_inline_multi.jsonl", "qwen3", history="split")
    assert counts["in"] == counts["out"] == 40 and data["row_id"][:2] == ["0#0", "0#1"] and not counts["left_out"].get("assistant")
    for row, messages in zip(data.select([0, 1]), (whole[:2], whole)):
        ids, mask = expected(family("qwen3"), "<|im_end|>", messages, trained=[len(messages) - 1])
        assert row["input_ids"] == ids and row["completion_mask"] == mask
    assert [trained_text(r, family("qwen3")) for r in data.select([0, 1])] == [THOUGHT + "<|im_end|>", "<think>\nAlso easy.\n</think>\n\nIt is 6.<|im_end|>"]
    with pytest.raises(UserError, match="</think>.*reasoning_content"): tokenized("think_inline_multi.jsonl", "r1")


@pytest.mark.parametrize("name", ["think_field.jsonl", "conv_think_field.jsonl", "pc_think.jsonl", "chosen_think.jsonl", "thinking_parts.jsonl", "reasoning_col.jsonl"])
def test_thoughts_in_a_key(name):
    "In all formats alike; a template without a place for them refuses by the name of the key"
    data, _ = tokenized(name, "qwen3")
    answer = "4" if name in ("thinking_parts.jsonl", "reasoning_col.jsonl") else "It is 4."
    check_rows(data.select([0]), "qwen3", [[*talk("2+2?"), dict(role="assistant", content=answer, reasoning_content="Easy sum.")]])
    assert trained_text(data[0], family("qwen3")).startswith("<think>\nEasy sum.\n</think>")
    for f in ("r1", "llama31", "qwen25"):
        with pytest.raises(UserError, match="Row 0.*reasoning_content.*unsupported_roles=drop"): tokenized(name, f)


def test_a_tag_that_is_no_thought():
    "The row is dropped, and the others are not"
    data, counts = tokenized("think_word.jsonl", "qwen3")
    assert counts["dropped"] == {"unverifiable": 1} and "</think>" in counts["details"]["unverifiable"] and counts["out"] == 39


def test_a_generation_prompt_that_no_answer_follows():
    "The template of R1 asks for a thought and writes answers without: refused with what stands where, and one row in colour"
    with pytest.raises(UserError) as e: tokenized("plain.jsonl", "r1")
    assert all(words in str(e.value) for words in ("40 of 40 rows", "<think>", "on_missing_stop=warn", "It is 0.")) and "\ue001" not in str(e.value)


# -- tools

CALL = dict(type="function", function=dict(name="get_weather", arguments=dict(city="Bern")))
OFFERED = [dict(type="function", function=WEATHER)]
USED = [*talk("Weather in Bern?"), dict(role="assistant", content="", tool_calls=[dict(CALL, id="call_abc1")]), dict(role="tool", content='{"t": 12}', tool_call_id="call_abc1"),
        dict(role="assistant", content="12 degrees.")]
WRITES = dict(qwen25='<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>', llama31='{"name": "get_weather", "parameters": {"city": "Bern"}}<|eot_id|>',
              qwen3='<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>',
              mistral7='[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bern"}, "id": "call_abc1"}]</s>')


@pytest.mark.parametrize("f", WRITES)
@pytest.mark.parametrize("name", ["tools_argsdict.jsonl", "tools_argstext.jsonl", "tools_emptycontent.jsonl", "tools_argsdict_id9.jsonl", "tools_argstext_id9.jsonl"])
def test_calls(name, f):
    "Arguments are an object, however they were stored; the call and the answer are trained, the tool's output is not"
    data, counts = tokenized(name, f)
    call = "abcdefghi" if "id9" in name else "call_abc1"
    messages = [USED[0], dict(USED[1], tool_calls=[dict(CALL, id=call)]), dict(USED[2], tool_call_id=call), USED[3]]
    check_rows(data, f, [messages] * 20, tools=OFFERED)
    answer = "<think>\n\n</think>\n\n12 degrees." if f == "qwen3" else "12 degrees."
    assert trained_text(data[0], family(f)) == WRITES[f].replace("call_abc1", call) + answer + ENDS[f] and counts["out"] == 20


@pytest.mark.parametrize("name, f", [("sharegpt_tools.jsonl", "qwen25"), ("sharegpt_tools.jsonl", "qwen3"), ("sharegpt_tools.jsonl", "llama31"), ("function_call_legacy.jsonl", "qwen25"),
                                     ("function_call_legacy.jsonl", "qwen3"), ("function_call_last.jsonl", "qwen25"), ("tools_text_and_call.jsonl", "qwen3")])
def test_calls_in_other_forms(name, f):
    "ShareGPT's function_call and observation, legacy calls, a text before a call"
    said = "" if name == "sharegpt_tools.jsonl" else "Let me look."
    messages = [USED[0], dict(role="assistant", content=said, tool_calls=[CALL]), dict(USED[2]), USED[3]][:2 if name == "function_call_last.jsonl" else 4]
    data, counts = tokenized(name, f)
    check_rows(data, f, [messages] * 20, tools=OFFERED)
    assert "get_weather" in trained_text(data[0], family(f)) and said in trained_text(data[0], family(f)) and not counts["dropped"]


@pytest.mark.parametrize("f", ["qwen25", "qwen3", "llama31", "mistral7"])
def test_a_result_that_is_an_object(f):
    data, _ = tokenized("tool_content_json.jsonl", f)
    check_rows(data, f, [[*USED[:2], dict(USED[2], content='{"t": 12, "list": [1, 2]}'), USED[3]]] * 20, tools=OFFERED)


@pytest.mark.parametrize("f", ["qwen25", "llama31"])
def test_arguments_with_null(f):
    "A null that was written stays"
    raw = rows("tools_mixedargs.jsonl")
    data, _ = tokenized(raw, f)
    written = [json.loads(line)["messages"] for line in (FOREIGN / "data" / "tools_mixedargs.jsonl").read_text().splitlines()]
    check_rows(data, f, [[m if m["content"] is not None else dict(m, content="") for m in ms] for ms in written], tools=OFFERED)
    assert '"units": null' in trained_text(data[0], family(f))


@pytest.mark.parametrize("f", ["qwen25", "qwen3", "llama31", "mistral7"])
def test_the_same_rows_from_json_lines_and_parquet(f, tmp_path):
    "Calls of several tools, with other keys in each row"
    calls = [dict(name="get_weather", arguments=dict(city="Bern")), dict(name="add", arguments=dict(a=1, b=[2, 3])), dict(name="add", arguments=dict(a=2))]
    add = dict(name="add", description="Add", parameters=dict(type="object", properties=dict(a=dict(type="integer"), b=dict(type="array", items=dict(type="integer")))))
    made = [dict(messages=[USED[0], dict(role="assistant", content="", tool_calls=[dict(type="function", id="abcdefghi", function=c)]), dict(role="tool", tool_call_id="abcdefghi", content="1"),
                           USED[3]], tools=[dict(type="function", function=t) for t in (WEATHER, add)]) for c in calls]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    a, b = (tokenized(load_rows(tmp_path / n), f)[0] for n in ("rows.jsonl", "rows.parquet"))
    assert a["input_ids"][:] == b["input_ids"][:] and a["completion_mask"][:] == b["completion_mask"][:]
    check_rows(a, f, [r["messages"] for r in made], tools=made[0]["tools"])


@pytest.mark.parametrize("f", WRITES)
def test_functions_are_tools(f):
    data, _ = tokenized("functions_col.jsonl", f)
    tool = dict(type="function", function=dict(WEATHER, parameters=dict(type="object", properties=dict(city=dict(type="string")))))
    check_rows(data, f, [talk("Weather in Bern?", "I cannot call tools.")] * 40, tools=[tool])
    assert "get_weather" in family(f).decode(data[0]["input_ids"])


@pytest.mark.parametrize("name", ["function_call_legacy.jsonl", "sharegpt_tools.jsonl", "tools_argstext.jsonl"])
def test_calls_with_the_template_of_apertus(name):
    data, counts = tokenize_dataset(rows(name), toy_tokenizer("bpe", "apertus"), stop_ids=[68])
    text = trained_text(data[0], toy_tokenizer("bpe", "apertus"))
    assert counts["out"] == 20 and '[{"get_weather": {"city": "Bern"}}]' in text and "12 degrees." in text and '"t"' not in text


def test_a_call_without_an_output():
    "A turn of the template of Apertus ends with an answer, so a row that ends with its call is refused"
    with pytest.raises(UserError, match="All 20 rows were dropped.*a tool call is followed by the end of the turn with no tool output"):
        tokenize_dataset(rows("function_call_last.jsonl"), toy_tokenizer("bpe", "apertus"), stop_ids=[68])


@pytest.mark.parametrize("name", ["function_call_last.jsonl", "function_call_legacy.jsonl", "sharegpt_tools.jsonl", "tools_argsdict.jsonl", "functions_col.jsonl", "tool_content_json.jsonl"])
@pytest.mark.parametrize("f", ["chatml_rstrip", "gemma2", "llama2", "phi4", "zephyr_eos", "smollm3"])
def test_a_template_without_tools(name, f):
    "One row is an error under unsupported_roles=error; under drop it is dropped and counted, and the others stay"
    row = rows(name)[0]
    offered = row.get("tools") or row.get("functions")
    row = dict(messages=json.dumps(row.get("messages") or row["conversations"]), tools=offered if isinstance(offered, str) else json.dumps(offered))
    mixed = Dataset.from_list([dict(messages=json.dumps(SUM), tools="")] * 199 + [row])
    with pytest.raises(UserError, match="Row 199: .*tool.*unsupported_roles=drop"): tokenized(mixed, f)
    data, counts = tokenized(mixed, f, unsupported_roles="drop")
    assert counts["dropped"] == {"unsupported_roles": 1} and len(data) == 199


# -- roles

@pytest.mark.parametrize("name", ["system_plain.jsonl", "one_system.jsonl"])
def test_a_template_that_raises_on_a_role(name):
    "Is an error whatever the share of such rows"
    raw = rows(name)
    one = next(i for i, r in enumerate(raw) if r["messages"][0]["role"] == "system")
    with pytest.raises(UserError, match=f"Row {one}: .*System role not supported.*unsupported_roles=drop"): tokenized(raw, "gemma2")
    many = Dataset.from_list([dict(messages=SUM)] * 199 + [raw[one]])
    with pytest.raises(UserError, match="Row 199: .*System role not supported"): tokenized(many, "gemma2")
    data, counts = tokenized(many, "gemma2", unsupported_roles="drop")
    assert len(data) == 199 and counts["dropped"] == {"unsupported_roles": 1}


def test_a_template_that_needs_a_bos():
    "A sentence, no traceback"
    with pytest.raises(UserError, match="The chat template apertus needs.*a BOS token"): load_tokenizer(str(FOREIGN / "tokenizers" / "qwen25"), "apertus")


ORDERS = {  # file: (a template that takes it, roles, answers; templates that do not, and how it is said)
    "starts_gpt": (["chatml_rstrip", "llama31", "mistral7", "qwen25", "zephyr_eos", "phi4"], 2, dict(gemma2="Roles must alternate", llama2="Roles must alternate")),
    "system_middle": (["chatml_rstrip", "llama31", "mistral7", "qwen25", "olmo2", "qwen3"], 2, dict(smollm3="has no place for: system")),
    "system_twice": (["chatml_rstrip", "llama31", "mistral7", "qwen25", "olmo2"], 1, dict(r1="has no place for: system", gemma2="System role not supported")),
    "double_assistant": (["chatml_rstrip", "llama31", "mistral7", "qwen25"], 2, dict(gemma3="Roles must alternate", olmo2="has not seen in training", qwen3="has not seen in training")),
    "ends_user": (["chatml_rstrip", "llama31", "llama2", "qwen3", "gemma2"], 1, {}),
    "developer": (["chatml_rstrip", "llama31", "zephyr_eos"], 1, dict(gemma2="the role developer", qwen25="has no place for: developer", mistral7="the role developer"))}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_roles(name):
    "Kept where the template takes them, else dropped or refused with what the template says"
    takes, answers, refuses = ORDERS[name]
    raw = rows(f"{name}.jsonl")
    for f in takes:
        data, counts = tokenized(raw, f)
        assert counts["out"] == 20 and data[0]["input_ids"] == family(f)(render(family(f), to_roles(raw[0])), add_special_tokens=False).input_ids
        assert trained_text(data[0], family(f)).count(ENDS[f]) == answers
    for f, says in refuses.items():
        with pytest.raises(UserError, match=says) as e: tokenized(raw, f)
        assert "20" in str(e.value) or "Row 0" in str(e.value)


def to_roles(row):
    names = dict(human="user", gpt="assistant")
    return [dict(role=names[m["from"]], content=m["value"]) for m in row["conversations"]] if "conversations" in row else row["messages"]


def test_empty_turns():
    data, counts = tokenized("empty_turns.jsonl", "qwen25")
    assert counts["out"] == 4 and sum(n for r, n in counts["dropped"].items() if r.startswith("malformed: ")) == 6 == counts["in"] - 4


def test_a_nul_character():
    data, counts = tokenized("nul.jsonl", "qwen25")
    assert counts["dropped"] == {"malformed: text with a NUL character": 1} and len(data) == 39


# -- refused by name

@pytest.mark.parametrize("name, words", [
    ("image_placeholder.jsonl", "column 'images' (20 of 20 rows)"), ("conv_image.jsonl", "column 'image' (20 of 20 rows)"), ("cot_col.jsonl", "column 'chain_of_thought' (40 of 40 rows)"),
    ("multimodal.jsonl", "not text: image_url"), ("multimodal_some.jsonl", "not text: image"), ("image_parts.parquet", "not text: image"), ("qa_list.jsonl", "answer is a list"),
    ("text_only.jsonl", "split them into messages"), ("wrapped.json", "the dataset has data"), ("pairs_hh.jsonl", "there is no prompt")])
def test_refused(name, words):
    for f in ("qwen25", "gemma2"):
        with pytest.raises(UserError) as e: tokenized(name, f)
        assert words in str(e.value)


def test_some_rows_with_images_are_left_out():
    raw = rows("multimodal_some.jsonl")
    with_image = sum(any(p["type"] == "image" for m in r["messages"] for p in m["content"]) for r in raw)
    data, counts = tokenized(raw, "qwen25", unsupported_roles="drop")
    assert counts["dropped"] == {"unsupported_roles: a content holds parts that are not text: image": with_image} and len(data) == 40 - with_image > 0


# -- pairs

def paired(name, f, **policies): return tokenize_pairs(rows(name), family(f), stop_ids=stop(f), **policies)


def check_pair(row, f, prompt, chosen, rejected):
    t = family(f)
    assert row["prompt_ids"] == t(render(t, prompt, add_generation_prompt=True), add_special_tokens=False).input_ids
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        ids, mask = expected(t, ENDS[f], [*prompt, answer], trained=[len(prompt)])
        assert row["prompt_ids"] + row[f"{side}_ids"] == ids[:max(i for i, m in enumerate(mask) if m) + 1] and all(row[f"{side}_scored"])


def say(text, thought=None): return dict(role="assistant", content=text) | (dict(reasoning_content=thought) if thought else {})


PAIRS = {"pairs_uf.jsonl": (talk("Hello there"), "Hi, friend.", "Go away."), "pairs_sharegpt.jsonl": (talk("Hello there"), "Hi.", "Go."), "pairs_question.jsonl": (talk("Hello there"), "Hi.", "Go."),
         "pairs_instruction.jsonl": (talk("Is this right?\n\n2+2=5"), "No.", "Yes."), "pairs_weight_scores.jsonl": (talk("2+2?"), "It is 4.", "It is 5."),
         "pairs_sys_multi.jsonl": (talk("Hello there", "Hi.", "How is 0?", system="Be kind."), " Fine, ", "Bad.")}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("f", FAMILIES)
def test_pairs(name, f):
    prompt, chosen, rejected = PAIRS[name]
    if prompt[0]["role"] == "system" and f == "gemma2":
        with pytest.raises(UserError, match="unsupported_roles"): paired(name, f)
        return
    data, counts = paired(name, f)
    assert counts["out"] == counts["in"] == len(rows(name))
    check_pair(data[0], f, prompt, say(chosen), say(rejected))


def test_pairs_with_two_equal_sides():
    data, counts = paired("pairs_same.jsonl", "qwen25")
    assert counts["dropped"] == {"chosen equals rejected": 1} and len(data) == 19
    check_pair(data[0], "qwen25", talk("Hello there"), say("Hi."), say("Go."))


@pytest.mark.parametrize("name, chosen, rejected", [
    ("pairs_think_field.jsonl", say("It is 4.", "Easy sum."), say("It is 5.", "Hard sum.")), ("pairs_think_same_text.jsonl", say("It is 4.", "Easy sum."), say("It is 4.", "I guess.")),
    ("pairs_think_inline.jsonl", say("It is 4.", "Easy sum."), say("It is 5.", "Hm.")), ("chosen_think.jsonl", say("It is 4.", "Easy sum."), say("5."))])
def test_thoughts_of_pairs(name, chosen, rejected):
    "They are part of the side that is trained and scored"
    data, counts = paired(name, "qwen3")
    assert counts["out"] == 20 and not counts["dropped"]
    check_pair(data[0], "qwen3", talk("2+2?"), chosen, rejected)
    assert family("qwen3").decode(data[0]["chosen_ids"]) == THOUGHT + "<|im_end|>"
    if name != "pairs_think_inline.jsonl":
        with pytest.raises(UserError, match="unsupported_roles"): paired(name, "llama31")


def test_calls_of_pairs(tmp_path):
    "Tools, calls and a system prompt of a pair are rendered; a null that was written stays"
    def call(**arguments): return dict(role="assistant", content="", tool_calls=[dict(type="function", id="abcdefghi", function=dict(name="get_weather", arguments=arguments))])
    made = [dict(system="Be brief.", prompt=[USED[0]], chosen=[call(city="Bern", unit=None)], rejected=[call(city="Basel", days=2)], tools=OFFERED, weight=w) for w in (0.5, 1.0)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    for f in ("qwen25", "qwen3", "mistral7"):
        data, counts = tokenize_pairs(load_rows(tmp_path / "rows.jsonl"), family(f), stop_ids=stop(f))
        assert counts["out"] == 2 and data["row_weight"][:] == [0.5, 1]
        t, prompt = family(f), [dict(role="system", content="Be brief."), USED[0]]
        assert data[0]["prompt_ids"] == t(render(t, prompt, tools=OFFERED, add_generation_prompt=True), add_special_tokens=False).input_ids
        for side, answer in (("chosen", made[0]["chosen"][0]), ("rejected", made[0]["rejected"][0])):
            ids, mask = expected(t, ENDS[f], [*prompt, answer], tools=OFFERED)
            assert data[0]["prompt_ids"] + data[0][f"{side}_ids"] == ids[:max(i for i, m in enumerate(mask) if m) + 1]
        assert '"unit": null' in t.decode(data[0]["chosen_ids"])
    with pytest.raises(UserError, match="Row 0: .*no place for: tools.*unsupported_roles=drop"): tokenize_pairs(load_rows(tmp_path / "rows.jsonl"), family("phi4"), unsupported_roles="error")
    with pytest.raises(UserError, match="All 2 rows of pairs were dropped.*no place for: tools"): tokenize_pairs(load_rows(tmp_path / "rows.jsonl"), family("phi4"))


@pytest.mark.parametrize("name, reason", [("pairs_hh.jsonl", "chosen is a text and there is no prompt"), ("pairs_multi_diff.jsonl", "chosen and rejected differ before the last answer")])
def test_pairs_that_are_refused(name, reason):
    with pytest.raises(UserError, match=f"All 20 rows of pairs were dropped.*{reason}"): paired(name, "qwen25")


# -- evaluation

@pytest.mark.parametrize("f", ["qwen3", "smollm3"])
def test_the_answer_behind_a_thought_is_scored(f):
    "A thought that is cut by the limit is no answer"
    t, raw = family(f), rows("think_eval.jsonl").to_list()
    prompts = prompts_of(t, raw)
    assert all(t.decode(p).endswith("<|im_start|>assistant\n") for p in prompts) and row_verifier(raw[0]) is not None
    def result(text, reason="stop"):
        made = [dict(ids=t(text, add_special_tokens=False).input_ids, finish_reason=reason)] * len(raw)
        return evaluation_result(t, raw, prompts, made)
    assert result("<think>\nEasy sum.\n</think>\n\nBern<|im_end|>")["accuracy"] == 1
    assert result("Bern<|im_end|>")["accuracy"] == 1
    assert result("<think>\nBern\n</think>\n\nBasel<|im_end|>")["accuracy"] == 0
    cut = result("<think>\nBern", "length")
    assert cut["accuracy"] == 0 and cut["cut"] == len(raw)
    assert result("<think>\nEasy sum.\n</think>\n\nBern<|im_end|>")["samples"][0]["got"] == "Bern"


# -- templates as they are published: those that trl brings along

def published():
    import trl
    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return [p for p in found if not re.search("training|idefics|llava|smolvlm|_vl", p.name)]  # copies with marks; those that take images


USES = [dict(type="function", function=dict(name="f", description="d", parameters=dict(type="object", properties=dict(x=dict(type="string"), n=dict(type="integer"), on=dict(type="boolean")))))]


@pytest.mark.parametrize("path", published(), ids=lambda p: p.stem)
def test_published_templates(path):
    "Every kept row is the whole rendering, and each span that is trained begins after the ids of an inference prompt; with one row of each turn as well"
    from test_own_templates import trl_talk, trl_tokenizer
    t, rng, kept = trl_tokenizer(path.read_text()), random.Random(path.stem), {}
    stops = [i for i, a in t.added_tokens_decoder.items() if a.special]
    for kind, history in (("plain", "as_template"), ("thoughts", "as_template"), ("tools", "as_template"), ("plain", "split"), ("thoughts", "split"), ("tools", "split")):
        talks = [[{k: v for k, v in m.items() if k != "reasoning"} for m in trl_talk(rng, kind)] for _ in range(5)]
        made = [dict(messages=json.dumps(m), tools=json.dumps(USES) if any("tool_calls" in x for x in m) else "") for m in talks]
        data, _ = tokenize_rows(Dataset.from_list(made), t, stop_ids=stops, unsupported_roles="drop", history=history)
        for row in data:
            if row["reason"]: continue
            kept[kind, history] = kept.get((kind, history), 0) + 1
            i, _, n = row["row_id"].partition("#")
            how = dict(tools=USES) if made[int(i)]["tools"] else {}
            asks = [k for k, m in enumerate(talks[int(i)]) if m["role"] == "user"] + [len(talks[int(i)])]
            messages = talks[int(i)][:asks[int(n or len(asks) - 2) + 1]]
            assert row["input_ids"] == t(render(t, messages, **how), add_special_tokens=False).input_ids
            mask, prompts = np.array(row["completion_mask"]), []
            for k, m in enumerate(messages):
                try: prompts += [t(render(t, messages[:k], add_generation_prompt=True, **how), add_special_tokens=False).input_ids] if m["role"] == "assistant" else []
                except Exception: pass  # templates that cannot be asked there
            for start in np.flatnonzero(mask & ~np.append(False, mask[:-1])):
                assert row["input_ids"][:start] in prompts, t.decode(row["input_ids"][:start + 4])
    asks_for_more = re.match("deepseek|glm4moe", path.stem)  # a prompt that opens a thought; no end token
    assert bool(kept.get(("plain", "split"))) != bool(asks_for_more or "nemotron" in path.stem), kept


# -- nothing is missing

def test_every_file_of_the_list_is_used():
    "Names in the table's first column, and all files that lie there"
    table = (FOREIGN / "README.md").read_text().partition("| file | with | right |")[2]
    table = [line.split("|")[1] for line in table.splitlines() if line.startswith("|") and "|---" not in line]
    assert len(table) > 30
    named = {n.strip().split(".")[0] for cell in table for n in re.sub(r"\(.*?\)", "", cell).split(",")}
    lie = {p.name.split(".")[0] for p in (FOREIGN / "data").iterdir()}
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    used = set(re.findall(r"[\"'(,\s]([a-z0-9_]+)(?:\.jsonl|\.json|\.parquet)?[\"'),]", text)) | {f"sys_prompt_{k}" for k in ("cols", "conv", "qa", "query", "qr")}
    assert named - lie == set() and named | lie <= used | {"image_parts"}, sorted((named | lie) - used)


# -- forms of public templates, datasets and trainers: small equivalents in own words, each with the page that describes it

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {  # kind of vocabulary, control tokens beside its own, end of a turn, template
    # huggingface.co/Qwen/Qwen3-4B-Thinking-2507, chat_template.jinja: asked for an answer, it opens the thought itself
    "opens the thought": ("byte", [], "<|im_end|>", "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
                          "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
                          "{% if m.role == 'assistant' and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
                          "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
                          "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"),
    # huggingface.co/deepseek-ai/DeepSeek-V3.1: answers without a thought begin with the end of one, which the prompt holds
    "closes the thought": ("byte", ["<|User|>", "<|Bot|>"], "</s>", "{{ bos_token }}{% for m in messages %}{{ '<|User|>' + m.content if m.role == 'user' else '<|Bot|></think>' + m.content + eos_token }}{% endfor %}"
                           "{% if add_generation_prompt %}<|Bot|></think>{% endif %}"),
    # huggingface.co/mistralai/Mistral-Nemo-Instruct-2407, tokenizer_config.json: the system prompt stands in the last question
    "system in the last question": ("byte", ["[INST]", "[/INST]"], "</s>", "{{ bos_token }}{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
                                    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% set asked = talk | selectattr('role', 'equalto', 'user') | list %}"
                                    "{% for m in talk %}{% if m.role == 'user' %}[INST]{{ sys + '\n\n' if sys and m == asked[-1] }}{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"),
    # huggingface.co/CohereForAI/c4ai-command-r-v01, tokenizer_config.json: turns of control tokens, contents stripped
    "command": ("byte", ["<|START|>", "<|END|>", "<|USER|>", "<|BOT|>", "<|SYS|>"], "<|END|>", "{{ bos_token }}{% for m in messages %}<|START|>{{ {'user': '<|USER|>', 'assistant': '<|BOT|>', 'system': '<|SYS|>'}[m.role] }}"
                "{{ m.content.strip() }}<|END|>{% endfor %}{% if add_generation_prompt %}<|START|><|BOT|>{% endif %}"),
    # huggingface.co/ibm-granite/granite-3.1-8b-instruct, tokenizer_config.json: roles between control tokens, the date in a system prompt of its own
    "granite": ("byte", ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], "<|end_of_text|>", "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Today is {{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}"
                "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"),
    # github.com/openai/harmony, docs/format.md: channels; <|return|> ends the last answer and <|end|> the earlier ones
    "harmony": ("byte", ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"], "<|return|>", "{% for m in messages %}{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% else %}"
                "{% if m.thinking or m.reasoning_content %}{% if loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking or m.reasoning_content }}<|end|>{% endif %}{% endif %}"
                "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"),
    # huggingface.co/HuggingFaceTB/SmolVLM-Instruct, chat_template.json: contents are lists of parts
    "parts only": ("byte", [], "<|im_end|>", "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    # huggingface.co/tiiuae/falcon-7b-instruct, tokenizer_config.json: turns marked by words only
    "words": ("byte", [], "</s>", "{% for m in messages %}{% if not loop.first %}\n\n{% endif %}{{ 'User: ' + m.content if m.role == 'user' else 'Assistant: ' + m.content }}{% endfor %}{% if add_generation_prompt %}\n\nAssistant:{% endif %}"),
    # huggingface.co/docs/tokenizers, AddedToken: rstrip takes the whitespace behind a control token
    "strips": ("byte, strips", [], "<|im_end|>", CHATML),
    # huggingface.co/docs/transformers, chat_templating_writing: ChatML, on a vocabulary like those of SentencePiece
    "metaspace": ("sentencepiece", [], "<|im_end|>", CHATML),
    # huggingface.co/microsoft/Phi-4-mini-instruct, tokenizer_config.json: tools in the system message, line breaks nowhere
    "phi mini": ("byte", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"], "<|end|>", "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'system' and tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"),
    # huggingface.co/allenai/Llama-3.1-Tulu-3-8B, tokenizer_config.json: no line break after the last answer
    "tulu 3": ("byte", [], "</s>", "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{{ '\n' if not loop.last }}{% else %}{{ '\n' }}{% endif %}"
               "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}")}


@cache
def made(name):
    from test_own_templates import vocabulary
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    kind, marks, end, template = TEMPLATES[name]
    inner = vocabulary(kind)
    inner.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    out = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    out.chat_template = template
    return out, end


ASKED = dict(role="user", content="2+2?")
FOUR = dict(role="assistant", content="It is 4.")
AGAIN = talk("2+2?", "It is 4.", "3+3?", "It is 6.")
KEPT = {  # template or family, row, how its messages are rendered (None: as they are), what is trained
    "a thought after a prompt that opens it": ("opens the thought", dict(messages=[ASKED, dict(FOUR, reasoning_content="Easy sum.")]), None, "Easy sum.\n</think>\n\nIt is 4.<|im_end|>"),
    # huggingface.co/datasets/open-r1/OpenR1-Math-220k: answers as the model wrote them
    "an inline thought after a prompt that opens it": ("opens the thought", dict(messages=[ASKED, dict(FOUR, content="<think>\nEasy sum.\n</think>\n\nIt is 4.")]), [ASKED, dict(FOUR, reasoning_content="Easy sum.")], "Easy sum.\n</think>\n\nIt is 4.<|im_end|>"),
    "a forced end of a thought": ("closes the thought", dict(messages=AGAIN), None, "It is 4.</s>It is 6.</s>"),
    "the system prompt in the question": ("system in the last question", dict(messages=talk("2+2?", "It is 4.", system="Be brief.")), None, "It is 4.</s>"),
    "control tokens around roles": ("command", dict(messages=talk(" 2+2? ", " It is 4. ", system="Be brief.")), None, "It is 4.<|END|>"),
    "the date of today": ("granite", dict(messages=AGAIN), None, "It is 4.<|end_of_text|>It is 6.<|end_of_text|>"),
    "channels": ("harmony", dict(messages=[dict(role="developer", content="Be brief."), ASKED, FOUR]), None, "<|channel|>final<|message|>It is 4.<|return|>"),
    # cookbook.openai.com, articles/gpt-oss/handle-raw-cot: the thought in the analysis channel, under the key thinking
    "a thought in a channel": ("harmony", dict(messages=[ASKED, dict(FOUR, thinking="Easy sum.")]), [ASKED, dict(FOUR, reasoning_content="Easy sum.")],
                               "<|channel|>analysis<|message|>Easy sum.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"),
    "an end token that strips": ("strips", dict(messages=AGAIN), None, "It is 4.<|im_end|>It is 6.<|im_end|>"),
    "metaspace": ("metaspace", dict(messages=talk("What a day", "user assistant Bern.", "  Zürich ", " what")), None, "user assistant Bern.<|im_end|> what<|im_end|>"),
    "the last answer without a line break": ("tulu 3", dict(messages=AGAIN), None, "It is 4.</s>It is 6.</s>"),
    "tools in the system message": ("phi mini", dict(messages=talk("2+2?", "It is 4.", system="Be brief."), tools=OFFERED), None, "It is 4.<|end|></s>"),
    # qwen.readthedocs.io, framework/function_call: several calls in one message, each answered by a message of its own
    "parallel calls": ("qwen25", dict(messages=[USED[0], dict(USED[1], tool_calls=[dict(CALL, id="a"), dict(CALL, id="b")]), dict(USED[2], tool_call_id="a"), dict(USED[2], tool_call_id="b", content="13"), USED[3]], tools=OFFERED), None,
                       (WRITES["qwen25"].removesuffix("<|im_end|>") + "\n") + WRITES["qwen25"] + "12 degrees.<|im_end|>"),
    # docs.vllm.ai, features/tool_calling and reasoning_outputs: thoughts before each call
    "thoughts between calls": ("qwen3", dict(messages=[USED[0], dict(USED[1], reasoning_content="Look it up."), USED[2], dict(USED[3], reasoning_content="Read it.")], tools=OFFERED), None,
                               "<think>\nLook it up.\n</think>\n\n" + WRITES["qwen3"] + "<think>\nRead it.\n</think>\n\n12 degrees.<|im_end|>"),
    # platform.openai.com, chat completions: contents of tools and of the system as lists of text parts
    "a tool's output in parts": ("qwen25", dict(messages=[*USED[:2], dict(USED[2], content=[dict(type="text", text='{"t": '), dict(type="text", text="12}")]), USED[3]], tools=OFFERED), USED, WRITES["qwen25"] + "12 degrees.<|im_end|>"),
    "a system prompt in parts": ("llama31", dict(messages=[dict(role="system", content=[dict(type="text", text="Be brief.")]), ASKED, FOUR]), talk("2+2?", "It is 4.", system="Be brief."), "It is 4.<|eot_id|>"),
    # llama.com, docs/model-cards-and-prompt-formats/llama3_1: the role ipython holds the output of a tool
    "ipython": ("llama31", dict(messages=[*USED[:2], dict(role="ipython", content='{"t": 12}'), USED[3]], tools=OFFERED), [*USED[:2], dict(role="tool", content='{"t": 12}'), USED[3]], WRITES["llama31"] + "12 degrees.<|eot_id|>"),
    "no thought by an argument of the template": ("smollm3", dict(messages=talk("2+2?", "It is 4.", system="Be brief."), chat_template_kwargs=dict(enable_thinking=False)), None, "It is 4.<|im_end|>"),
    # huggingface.co/Qwen/Qwen3-8B, README: enable_thinking=False, in a row
    "no thought": ("qwen3", dict(messages=[ASKED, FOUR], chat_template_kwargs=dict(enable_thinking=False)), None, "It is 4.<|im_end|>"),
    # huggingface.co/docs/transformers, chat_extras: arguments of a call may be empty
    "a call without arguments": ("qwen25", dict(messages=[USED[0], dict(USED[1], tool_calls=[dict(type="function", function=dict(name="get_weather", arguments=""))]), USED[2], USED[3]], tools=OFFERED),
                                 [USED[0], dict(USED[1], tool_calls=[dict(type="function", function=dict(name="get_weather", arguments={}))]), USED[2], USED[3]],
                                 '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call><|im_end|>12 degrees.<|im_end|>'),
    # huggingface.co/docs/trl, dataset_formats: prompt and completion as messages, with tools; calls with an index, as vLLM writes them
    "prompt and completion with a call": ("qwen25", dict(prompt=[USED[0]], completion=[dict(USED[1], tool_calls=[dict(CALL, id="a", index=0)])], tools=json.dumps(OFFERED)), USED[:2], WRITES["qwen25"]),
    # github.com/modelscope/ms-swift, docs/source_en/Instruction/Agent-support: the roles tool_call and tool_response
    "tool_call and tool_response": ("qwen25", dict(messages=[USED[0], dict(role="tool_call", content='{"name": "get_weather", "arguments": {"city": "Bern"}}'), dict(role="tool_response", content='{"t": 12}'), USED[3]], tools=OFFERED),
                                    USED, WRITES["qwen25"] + "12 degrees.<|im_end|>"),
    # github.com/axolotl-ai-cloud/axolotl, docs/dataset-formats/conversation.qmd: spans of a content that the template strips
    "spans of a stripped content": ("llama31", dict(messages=[ASKED, dict(FOUR, content="  It is 4.", train_detail=[dict(begin_offset=4, end_offset=9, train=True)])]), [ASKED, FOUR], " is 4.<|eot_id|>"),
    # huggingface.co/datasets/nvidia/Nemotron-Post-Training-Dataset-v1: an empty thought beside the answer
    "an empty thought": ("qwen3", dict(messages=[ASKED, dict(FOUR, reasoning_content="")]), None, "<think>\n\n</think>\n\nIt is 4.<|im_end|>"),
    # huggingface.co/google/gemma-3-4b-it: a system prompt joins the first question, and contents may be parts
    "a system prompt in the first question": ("gemma3", dict(messages=[dict(role="system", content="Be brief."), dict(ASKED, content=[dict(type="text", text="2+2?")]), FOUR]), talk("2+2?", "It is 4.", system="Be brief."), "It is 4.<end_of_turn>"),
    # llama.meta.com, the format of Llama 2: no generation prompt, and a blank before an answer
    "a blank before an answer": ("llama2_first", dict(messages=talk("2+2?", "Bern", "3+3?", "7", system="Be brief.")), None, " Bern </s> 7 </s>")}


@pytest.mark.parametrize("name", KEPT)
def test_public_forms(name):
    how, row, canonical, trained = KEPT[name]
    t, end = made(how) if how in TEMPLATES else (family(how), ENDS[how])
    stored = row if "completion" in row else {k: json.dumps(v, ensure_ascii=False) for k, v in row.items()}
    data, counts = tokenize_dataset(Dataset.from_list([stored]), t, stop_ids=[t.convert_tokens_to_ids(end)])
    messages = canonical or row["messages"]
    kwargs = row.get("chat_template_kwargs", {}) | (dict(tools=OFFERED) if "tools" in row else {})
    ids, mask = expected(t, end, messages, **kwargs)
    assert data[0]["input_ids"] == ids and counts["out"] == 1
    assert data[0]["completion_mask"] == mask or not trained.endswith(end) # a template may write another control token behind the end
    assert trained_text(data[0], t).lstrip(" ") == trained.lstrip(" ") # a decoder drops the first blank


REFUSED = {  # template or family, row, words of the refusal
    # github.com/huggingface/trl/pull/6363: what a model writes after a prompt that opens the thought has no opening tag
    "a thought without an opening tag": ("opens the thought", dict(messages=[ASKED, dict(FOUR, content="Easy sum.\n</think>\n\nIt is 4.")]), "</think>.*reasoning_content"),
    # github.com/modelscope/ms-swift/issues/9427: several thoughts in one answer
    "several thoughts": ("qwen3", dict(messages=[ASKED, dict(FOUR, content="<think>a</think>b<think>c</think>It is 4.")]), "</think>.*reasoning_content"),
    # huggingface.co/meta-llama/Llama-3.1-8B-Instruct, tokenizer_config.json: one call at a time
    "parallel calls": ("llama31", dict(messages=[USED[0], dict(USED[1], tool_calls=[CALL, CALL]), USED[2], USED[3]], tools=OFFERED), "one call at a time.*unsupported_roles"),
    # github.com/openai/harmony, docs/format.md: earlier answers end with another token than the last one
    "ends of earlier answers": ("harmony", dict(messages=AGAIN), "would not learn to stop.*history=split"),
    # huggingface.co/mistralai/Mistral-Nemo-Instruct-2407: the system prompt moves to the last question
    "a prompt that moves": ("system in the last question", dict(messages=talk("2+2?", "It is 4.", "3+3?", "It is 6.", system="Be brief.")), "has not seen in training.*history=split"),
    "contents that have to be parts": ("parts only", dict(messages=[ASKED, FOUR]), "has no place for: assistant"),
    "turns of words": ("words", dict(messages=[ASKED, FOUR]), "would not learn to stop|has not seen in training"),
    # huggingface.co/datasets/glaiveai/glaive-function-calling and others: tools by their names only
    "tools by name": ("qwen25", dict(messages=[ASKED, FOUR], tools=["get_weather"]), "the tools are not JSON"),
    # huggingface.co/HuggingFaceTB/SmolLM3-3B, README: a flag in the system prompt, which the template takes out of it
    "a flag in the system prompt": ("smollm3", dict(messages=talk("2+2?", "It is 4.", system="/no_think")), "/no_think.*chat_template_kwargs"),
    # huggingface.co/google/gemma-2-9b-it: neither system prompts nor tools
    "a tool": ("gemma2", dict(messages=USED, tools=OFFERED), "unsupported_roles"),
    # docs.mistral.ai, capabilities/function_calling: ids of nine letters
    "an id of another length": ("mistral7", dict(messages=[USED[0], dict(USED[1], tool_calls=[dict(CALL, id="call_1")]), dict(USED[2], tool_call_id="call_1"), USED[3]], tools=OFFERED), "nine characters.*unsupported_roles"),
    # platform.openai.com, o1 and later: instructions of a developer
    "a developer": ("phi4", dict(messages=[dict(role="developer", content="Be brief."), ASKED, FOUR]), "developer.*unsupported_roles")}


@pytest.mark.parametrize("name", REFUSED)
def test_public_forms_that_are_refused(name):
    "With the cause, and the key that decides where there is one"
    how, row, words = REFUSED[name]
    t, end = made(how) if how in TEMPLATES else (family(how), ENDS[how])
    data = Dataset.from_list([{k: json.dumps(v, ensure_ascii=False) for k, v in row.items()}])
    with pytest.raises(UserError) as e: tokenize_dataset(data, t, stop_ids=[t.convert_tokens_to_ids(end)])
    assert re.search(words, str(e.value), re.DOTALL), str(e.value)


@pytest.mark.parametrize("how, messages", [("harmony", AGAIN), ("system in the last question", talk("2+2?", "It is 4.", "3+3?", "It is 6.", system="Be brief.")),
                                           ("opens the thought", [ASKED, dict(FOUR, reasoning_content="Easy."), *talk("3+3?"), dict(role="assistant", content="It is 6.", reasoning_content="Also.")])])
def test_what_only_one_row_of_each_turn_can_be(how, messages):
    "Templates that write an earlier turn in another way than the last"
    t, end = made(how)
    data, counts = tokenize_dataset(Dataset.from_list([dict(messages=json.dumps(messages))]), t, stop_ids=[t.convert_tokens_to_ids(end)], history="split")
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    assert counts["out"] == 2
    for row, end_of_turn in zip(data, (first + 1, len(messages))):
        ids, mask = expected(t, end, messages[:end_of_turn], trained=[end_of_turn - 1])
        assert row["input_ids"] == ids and row["completion_mask"] == mask


def test_arguments_of_the_template_in_each_row():
    "Mixed in one dataset; the block that inference forces is prompt"
    kwargs = [dict(enable_thinking=True), dict(enable_thinking=False), None, dict(enable_thinking=True)]
    data, _ = tokenize_dataset(Dataset.from_list([dict(messages=[ASKED, FOUR], chat_template_kwargs=json.dumps(k)) for k in kwargs]), family("qwen3"), stop_ids=stop("qwen3"))
    block = "<think>\n\n</think>\n\n"
    assert [trained_text(r, family("qwen3")) for r in data] == [block + "It is 4.<|im_end|>", "It is 4.<|im_end|>", block + "It is 4.<|im_end|>", block + "It is 4.<|im_end|>"]
    for row, k in zip(data, kwargs): assert (row["input_ids"], row["completion_mask"]) == expected(family("qwen3"), "<|im_end|>", [ASKED, FOUR], **(k or {}))
