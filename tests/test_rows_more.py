"Names, keys of parts and calls, spans in structured messages, and templates that depend on the name of a tool."
import json
import random

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from test_foreign import FOREIGN, family, stop
from test_rows import ASK, SAY, WEATHER, read

from post_training.core.files import UserError
from post_training.data.columns import account, account_lines, check_account, column_class, ignored_notes, message_key, with_known_names
from post_training.data.io import load_rows, reading_notes
from post_training.data.messages import MalformedRow, check_messages, read_conversation
from post_training.data.mixture import mix_sources
from post_training.data.split import count_both_sides
from post_training.data.swissai import as_messages, conversation_of, linearise_branch, linearise_dataset
from post_training.tokens.dataset import tokenize_dataset
from post_training.tokens.masks import Refused, encoder_for, tokenize_chats
from post_training.tokens.pairs import tokenize_pairs
from post_training.tokens.tokenizer import toy_tokenizer
from post_training.view import dataset as inspection

disable_progress_bars()
CALL = dict(id="abcdefghi", type="function", function=dict(name="get_weather", arguments=dict(city="Bern")))
ASK_PARTS = dict(role="user", content=[dict(type="text", text="Hi")])
TOOLS = [dict(type="function", function=WEATHER)]


@pytest.fixture(scope="module")
def apertus(): return toy_tokenizer("bpe", "apertus")


def answer(**keys): return dict(messages=[ASK, dict(SAY, **keys)])


def calling(tool_call_id="abcdefghi", **keys):
    return dict(messages=[ASK, dict(role="assistant", content="", tool_calls=[dict(CALL, **keys)]), dict(role="tool", content="12", tool_call_id=tool_call_id), SAY], tools=TOOLS)


def made(row, tokenizer="qwen25", **policies):
    "The tokens of one row, written as a file and read again, and the counts"
    t = family(tokenizer) if isinstance(tokenizer, str) else tokenizer
    ids = stop(tokenizer) if isinstance(tokenizer, str) else [68]
    data, counts = tokenize_dataset(Dataset.from_list([row] if isinstance(row, dict) else row), t, stop_ids=ids, **policies)
    return data, counts


def trained(row, tokenizer):
    t = family(tokenizer) if isinstance(tokenizer, str) else tokenizer
    weights = row.get("weights") or [1.0] * len(row["input_ids"])
    return t.decode([i for i, m, w in zip(row["input_ids"], row["completion_mask"], weights) if m and w > 0])


def classes(row, **how): return {u.name: u.kind for u in account(Dataset.from_list([row]), **how).message_keys}


# -- keys inside parts and calls

@pytest.mark.parametrize("key, value", [("weight", 0), ("train", False), ("masked", True), ("is_trainable", False), ("loss_weight", 0.0)])
@pytest.mark.parametrize("tokenizer", ["qwen25", "apertus"])
def test_weights_of_parts(key, value, tokenizer, apertus):
    row = answer(content=[{"type": "text", "text": "Hello", key: value}, {"type": "text", "text": " you", key: None}])
    row["messages"][0] = dict(role="user", content=[{"type": "text", "text": "Hi", key: None}])
    assert classes(row)[f"content.{key}"] == "weight"
    data, _ = made(row, apertus if tokenizer == "apertus" else tokenizer)
    assert trained(data[0], apertus if tokenizer == "apertus" else tokenizer).startswith(" you")


def test_keys_of_parts_and_calls_are_in_the_account():
    row = answer(content=[dict(type="text", text="Hello!", cache_control=dict(type="x"), loss_mask=[1])])
    row["messages"][0] = dict(role="user", content=[dict(type="text", text="Hi", cache_control=None, loss_mask=None)])
    found = account(Dataset.from_list([row]))
    assert {u.name: u.kind for u in found.message_keys} == {"role": "conversation", "content": "conversation", "content.type": "conversation", "content.text": "conversation",
                                                            "content.cache_control": "metadata", "content.loss_mask": "refused"}
    with pytest.raises(UserError, match=r"ignore_columns=\[messages.content.loss_mask\]"): check_account(found)
    assert len(made(row, ignore_columns=["messages.content.loss_mask"])[0]) == 1


@pytest.mark.parametrize("keys", [dict(weight=0), dict(train=False), dict(function=dict(CALL["function"], weight=0.5))])
@pytest.mark.parametrize("as_text", [False, True])
def test_weights_of_calls_are_refused(keys, as_text):
    row = calling(**keys)
    if as_text: row["messages"] = json.dumps(row["messages"])
    name = next(k for k in ("weight", "train") if k in json.dumps(keys))
    with pytest.raises(UserError, match=f"message key 'tool_calls.{name}' .1 of 1 rows.: a call has the weight of its message"): made(row)
    assert len(made(row, ignore_columns=[f"messages.tool_calls.{name}"])[0]) == 1


def test_a_weight_of_one_in_a_call_changes_nothing(): assert len(made(calling(train=True, weight=1))[0]) == 1


def test_other_keys_of_calls_drop_their_rows():
    rows = [calling(result="x"), calling(result=None)]
    found = account(Dataset.from_list(rows))
    use = next(u for u in found.message_keys if u.name == "tool_calls.result")
    assert (use.kind, use.rows, use.by_row) == ("refused", 1, True) and not found.refused()
    _, counts = made(rows)
    assert counts["out"] == 1 and "a tool call holds result" in next(iter(counts["dropped"]))


def test_names_of_speakers(apertus):
    row = dict(messages=[dict(ASK, name="Bob"), dict(SAY, name=None)])
    line = next(c for c in made(row)[1]["columns"] if c["key"] == "name")
    assert line["class"] == "metadata" and "does not write" in line["meaning"]
    t = toy_tokenizer("char", "tulu")
    t.chat_template = "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.name }}: {{ m.content }}{% else %}<SPECIAL_61>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<SPECIAL_61>{% endif %}"
    line = next(c for c in tokenize_dataset(Dataset.from_list([row]), t)[1]["columns"] if c["key"] == "name")
    assert line["class"] == "conversation" and line["meaning"].endswith("for: user")


@pytest.mark.parametrize("values, words", [
    (dict(enable_thinkin=True), "does not read 'enable_thinkin'; it reads enable_thinking. Did you mean"), (dict(enable_thinking="false"), "is the text 'false'"),
    (dict(messages=[ASK]), "'messages' is no free variable"), (dict(tools=TOOLS), "'tools' is no free variable"), (dict(add_generation_prompt=True), "no free variable"), (dict(content="x"), "does not read 'content'")])
def test_arguments_that_do_nothing(values, words):
    with pytest.raises(UserError) as e: made(answer() | dict(chat_template_kwargs=json.dumps(values)), "qwen3")
    assert words in str(e.value)


# -- spans of characters in structured messages

SPANS = [dict(begin_offset=0, end_offset=4, train=False), dict(begin_offset=5, end_offset=8, train=True)]


@pytest.mark.parametrize("how", ["plain", "thought", "tools"])
def test_train_detail_with_blocks(how, apertus, tmp_path):
    say = dict(role="assistant", content="Hello you", train_detail=SPANS)
    if how == "plain": turns, before = [ASK, say], ""
    elif how == "thought": turns, before = [ASK, dict(say, reasoning_content="Hm.")], "<SPECIAL_69>Hm.<SPECIAL_70>"
    else: turns, before = [*calling()["messages"][:3], say], '<SPECIAL_71>[{"get_weather": {"city": "Bern"}}]<SPECIAL_72>'
    row = dict(messages=turns, tools=json.dumps(TOOLS))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    direct, _ = tokenize_dataset(load_rows(tmp_path / "rows.jsonl"), apertus, stop_ids=[68])
    assert trained(direct[0], apertus) == before + " you<SPECIAL_68>"
    mixed = mix_sources([dict(dataset_name="a", dataset_path=str(tmp_path / "rows.jsonl"))], blocks=True).train
    again, _ = tokenize_dataset(mixed, apertus, stop_ids=[68])
    assert again[0]["input_ids"] == direct[0]["input_ids"] and again[0]["weights"] == direct[0]["weights"]
    plain, _ = tokenize_dataset(mixed, family("qwen3"), stop_ids=stop("qwen3"))
    assert trained(plain[0], "qwen3").endswith(" you<|im_end|>") and "Hello" not in trained(plain[0], "qwen3")


def test_different_weights_in_one_structured_turn_name_a_remedy(apertus):
    row = calling()
    row["messages"] = [dict(m, weight=w) for m, w in zip(row["messages"], (None, 0.0, None, 1.0))]
    with pytest.raises(UserError, match="same weight, or keep plain messages"): made(row, apertus)


# -- names

WANTED = dict(
    conversation="system_instructions system_text sys preprompt preamble tool_definitions tool_list function_list",
    weight="importance_weight is_trainable do_train mask_loss no_train masked no_loss",
    refused="weights loss response_mask train_on_input train_on_inputs template_kwargs reasoning_effort enable_thinking apis available_functions image_url image_path img file files media pixel_values "
            "audio_path attachments loss_weights skip ignore tool_call systemPrompt Loss_Mask toolDefinitions",
    repeat="instructions developer developer_prompt persona contexts passage think reasoning_text",
    metadata="margin preference_strength topic Name")
WANTED_KEYS = dict(
    conversation="think thinking_content reasoning_text thinking_blocks tool_call", weight="sample_weight is_trainable do_train masked mask_loss no_loss",
    refused="analysis reasoning_summary function channel recipient weights loss_weights skip ignore attachments image_url file toolCalls reasoning-content", metadata="mood id cache_control")


@pytest.mark.parametrize("kind", WANTED)
def test_columns(kind):
    assert {c: column_class(c, ("messages",))[0] for c in WANTED[kind].split()} == dict.fromkeys(WANTED[kind].split(), kind)


@pytest.mark.parametrize("kind", WANTED_KEYS)
def test_message_keys(kind):
    assert {k: message_key(k).kind for k in WANTED_KEYS[kind].split()} == dict.fromkeys(WANTED_KEYS[kind].split(), kind)


@pytest.mark.parametrize("key", ["masked", "mask_loss", "no_loss", "no_train"])
def test_names_that_invert(key):
    assert read(answer() | {key: True}).weight == 0 and read(answer() | {key: False}).weight == 1
    assert read(dict(messages=[{**ASK, key: False}, {**SAY, key: True}])).message_weights == [1, 0]
    assert "takes true or false" in read(answer() | {key: 0.5})


@pytest.mark.parametrize("row", [answer() | dict(skip=False), answer(loss_mask=True), answer(channel="final"), answer() | dict(thinking=False), answer() | dict(loss=True)])
def test_values_that_change_nothing(row): assert not isinstance(read(row), str)


@pytest.mark.parametrize("row", [answer() | dict(skip=True), answer(loss_mask=False), answer(channel="analysis"), answer() | dict(thinking=True), answer() | dict(loss=False), answer(skip=1)])
def test_values_that_would_change_something(row):
    with pytest.raises(UserError): read(row)


def test_other_spellings(capfd):
    data = with_known_names(Dataset.from_list([dict(Question="Hi", Answer="Hello!", systemPrompt="Be kind.", Topic="a")]))
    assert data.column_names == ["question", "answer", "system_prompt", "Topic"] and len(reading_notes(data)) == 3
    assert "'systemPrompt' is read as 'system_prompt'" in capfd.readouterr().err
    assert with_known_names(Dataset.from_list([dict(systemPrompt="a", system_prompt="b")])).column_names == ["systemPrompt", "system_prompt"]
    with pytest.raises(UserError, match="rename it to system_prompt"): read(answer() | dict(systemPrompt="a"))


@pytest.mark.parametrize("row, name", [
    (answer(isTrainable=False), "isTrainable"), (answer(Weight=0), "Weight"), (dict(messages=[ASK_PARTS, dict(role="assistant", content=[dict(type="text", text="a", Weight=0)])]), "content.Weight")])
def test_other_spellings_of_weights_are_refused(row, name):
    with pytest.raises(UserError, match=f"message key '{name}'.*rename it"): made(row)
    with pytest.raises(UserError, match="cannot be honoured"): read_conversation(row)


def test_weights_of_history():
    row = dict(instruction="a", output="b", history=[dict(ASK, train=None), dict(SAY, train=False)])
    data, counts = made(row)
    assert trained(data[0], "qwen25") == "b<|im_end|>" and "train" in [c["key"] for c in counts["columns"] if c["class"] == "weight"]


@pytest.mark.parametrize("where", ["turns", "parts"])
def test_weights_in_branches_are_refused(where, apertus):
    part = dict(type="response", content="a")
    turn = dict(role="assistant", parts=[dict(part, weight=0.0)] if where == "parts" else [part], **dict(weight=0.0) if where == "turns" else {})
    row = dict(conversation_branches=[dict(messages=[turn])], initial_prompt=dict(content="Hi"), system_prompt=None, available_functions=None)
    with pytest.raises(UserError, match=f"message key '{where}.weight' .1 of 1 rows"): made(row, apertus)


def test_ignored_columns_that_are_not_there():
    found = account(Dataset.from_list([answer(prefix=True) | dict(images=["a"])]), ["image", "images", "messages.prefix", "messages.prefx"])
    assert not found.refused() and [n.split(".")[0] for n in ignored_notes([found])] == ["ignore_columns: there is no column 'image'", "ignore_columns: there is no message key 'prefx'"]
    assert len(made(answer(prefix=True), ignore_columns=["messages.prefix", "topc"])[1]["notes"]) == 1


@pytest.mark.parametrize("name", ["margin", "preference_strength"])
def test_strength_of_a_preference(name):
    data = Dataset.from_list([{"prompt": "Hi", "chosen": "a", "rejected": "b", name: 0.5}])
    assert not account(data).refused() and [u.name for u in account(data, pairs=True).refused()] == [name]
    with pytest.raises(UserError, match="no preference loss takes it"): tokenize_pairs(data, family("qwen25"))


# -- words of reasons

@pytest.mark.parametrize("row, words", [
    (dict(messages=[dict(who="user", words="Hi"), dict(who="bot", words="Ho")]), "a message without role and from; its keys are who, words"),
    (dict(messages=[dict(role="user", words="Hi"), dict(role="assistant", words="Ho")]), "user message without content; its keys are role, words"),
    (answer(weight="0"), "weight is not a number, true or false, but the text '0'"), (answer(thinking=True), "thinking is True, a switch"), (answer(reasoning="on"), "put it into chat_template_kwargs"),
    (dict(question="Hi", answer="Ho", reasoning="off"), "put it into chat_template_kwargs"), (calling("zzz"), "the tool_call_id of a result is the id of no call before it"),
    (dict(messages=[dict(role="assistant", content=[dict(type="tool_reference", id="a")]), ASK_PARTS]), "move calls into tool_calls")])
def test_reasons(row, words): assert words in read(row)


def test_a_switch_beside_messages_is_advised():
    for values in (dict(reasoning="on"), dict(thinking=True)):
        with pytest.raises(UserError, match="a switch .on, true. in chat_template_kwargs"): read(answer() | values)


@pytest.mark.parametrize("row, tokenizer, words", [
    (dict(messages=[dict(role="system", content="Be kind."), ASK, SAY]), "apertus_mistral_special_tokens", "train without these system messages"), (answer(reasoning_content="Hm."), "llama31", "train without these thoughts"),
    (answer() | dict(tools=TOOLS), "phi4", "leave such rows out"), (dict(messages=[ASK_PARTS, dict(role="assistant", content=[dict(type="image_url", url="x")])]), "qwen25", "leave such rows out")])
def test_advice_says_what_the_policy_does(row, tokenizer, words):
    t = toy_tokenizer("bpe", tokenizer) if tokenizer.startswith("apertus") else tokenizer
    with pytest.raises(UserError, match=f"unsupported_roles=drop to {words}"): made(row, t)


@pytest.mark.parametrize("content, results", [("<tool_response>\n12\n</tool_response>", 1), ("<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>", 2), ("It said <tool_response>", 1)])
def test_results_in_their_tags(content, results):
    row = dict(messages=[ASK, dict(role="assistant", content="<tool_call>\n{}\n</tool_call>"), dict(role="tool", content=content), SAY])
    data, _ = made(row, "qwen25")
    text = family("qwen25").decode(data[0]["input_ids"])
    assert text.count("</tool_response>") == results and "<tool_response>\n<tool_response>" not in text


@pytest.mark.parametrize("tokenizer", ["qwen25", "apertus"])
def test_parts_of_calls_and_results(tokenizer, apertus):
    tools = [dict(name="get_weather", description="Weather", input_schema=WEATHER["parameters"])]
    row = dict(tools=json.dumps(tools), messages=json.dumps([
        ASK, dict(role="assistant", content=[dict(type="text", text="Look."), dict(type="tool_use", id="t1", name="get_weather", input=dict(city="Bern"))]),
        dict(role="user", content=[dict(type="tool_result", tool_use_id="t1", content=[dict(type="text", text="12")])]), dict(role="assistant", content="12 degrees.")]))
    same = dict(tools=row["tools"], messages=json.dumps([ASK, dict(role="assistant", content="Look.", tool_calls=[dict(CALL, id="t1")]), dict(role="tool", tool_call_id="t1", content="12"), dict(role="assistant", content="12 degrees.")]))
    one, two = (made(r, apertus if tokenizer == "apertus" else tokenizer)[0][0] for r in (row, same))
    assert one["input_ids"] == two["input_ids"] and one["completion_mask"] == two["completion_mask"]
    late = [ASK, dict(role="assistant", content=[dict(type="tool_use", id="t1", name="f", input={}), dict(type="text", text="Look.")])]
    with pytest.raises(MalformedRow, match="split the message"): read_conversation(dict(messages=late))


def test_inspect_says_by_its_exit_code_that_training_stops(tmp_path, capsys):
    (tmp_path / "good.jsonl").write_text(json.dumps(answer()) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(answer(content=[dict(type="image_url", url="x")])) + "\n")
    assert inspection.inspect_main([str(tmp_path / "good.jsonl")]) == 0 and "Training stops" not in capsys.readouterr().out
    assert inspection.inspect_main([str(tmp_path / "bad.jsonl")]) == 1 and "Training stops" in capsys.readouterr().out


def test_inspect_shows_what_the_reader_did(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(answer() | dict(note=n, systemPrompt="Be kind.")) + "\n" for n in (1, "a")))
    assert inspection.inspect_main([str(tmp_path / "rows.jsonl"), "dataset_args.ignore_columns=[topc]"]) == 0
    out = capsys.readouterr().out
    assert "note holds a number" in out and "is read as 'system_prompt'" in out and "there is no column 'topc'" in out
    assert inspection.left_out_text("earlier thoughts, system") == "their system messages and the thoughts of earlier answers"


# -- sides and columns of several types

@pytest.mark.parametrize("row", [dict(chosen=json.dumps([ASK, SAY]), rejected=json.dumps([ASK, dict(SAY, content="No.")])),
                                 dict(prompt="Hi", chosen=json.dumps([SAY]), rejected=json.dumps([dict(SAY, content="No.")])), dict(prompt=json.dumps([ASK]), chosen="Hello!", rejected="No.")])
def test_sides_as_json_text(row):
    plain = dict(prompt="Hi", chosen="Hello!", rejected="No.")
    one, two = (tokenize_pairs(Dataset.from_list([r]), family("qwen25"))[0][0] for r in (row, plain))
    assert all(one[k] == two[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_an_answer_in_json_stays_an_answer():
    for text in ('{"role": "admin"}', '[{"a": 1}]', "[1, 2"):
        assert read(dict(prompt="Hi", completion=text)).messages[-1]["content"] == text
    assert not account(Dataset.from_list([dict(prompt="Hi", completion='{"weight": 0, "answer": 3}')])).message_keys


def test_a_column_of_two_types_across_sources(tmp_path):
    for name, score in (("a", 1), ("b", "good")): (tmp_path / f"{name}.jsonl").write_text(json.dumps(answer() | dict(score=score)) + "\n")
    mixture = mix_sources([dict(dataset_name=n, dataset_path=str(tmp_path / f"{n}.jsonl")) for n in "ab"], columns_to_keep=["messages", "score"], shuffle=False)
    assert mixture.train["score"][:] == [1, "good"] and any("'score' is int64 in a and string in b" in n for n in mixture.notes)
    mixture.train.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")["score"][:] == [1, "good"]


def test_a_split_counts_both_sides():
    rows = Dataset.from_list([dict(question=f"{i}?", answer="a") for i in range(3)])
    counts = count_both_sides(rows.select([0, 1]), rows.select([1, 2]))
    assert (counts["train_rows"], counts["rows"], counts["same_conversation"], counts["same_prompt"]) == (2, 2, 1, 1)


# -- templates that depend on the name of a tool

TEXTS = ["Hi", "Zürich", "a b\n", "", " x ", "2+2?", "日本"]


def random_branch(r):
    "A random row of the Swiss-AI format"
    def part():
        kind = r.choice(["thought", "response", "function", "verifiable-responses"])
        if kind == "function":
            return [dict(type="function-call", name=r.choice(["f", "display_answers"]), args=r.choice(['{"a": "é"}', dict(b=1), "{}"])), dict(type="function-output", content=r.choice(['"é"', "[]"]))]
        return [dict(type=kind, content=r.choice(TEXTS), answers=[r.choice(TEXTS) for _ in range(r.randint(0, 2))])]
    turns = []
    for _ in range(r.randint(1, 3)):
        turns += [dict(role="assistant", parts=[p for _ in range(r.randint(1, 4)) for p in part()]), dict(role="user", parts=[dict(type="text", content=r.choice(TEXTS[:3])) for _ in range(r.randint(1, 2))])]
    return dict(conversation_branches=[dict(messages=turns[:-1])], initial_prompt=dict(content="Hi"), system_prompt=r.choice([None, dict(content="Be kind.")]),
                available_functions=r.choice([[], [dict(name="f", description="F", parameters=dict(type="object", properties=dict(a=dict(type="string"))))]]))


def published_text(messages):
    "The rendering of the published Apertus template, written again in Python: thoughts end before a response and before a call that displays answers"
    out = "<s>" + (f"<SPECIAL_61>{messages[0]['content']['text']}<SPECIAL_62>" if messages[0]["role"] == "system" else "<SPECIAL_61><SPECIAL_62>")
    for m in messages:
        c = m["content"]
        if m["role"] == "developer":
            out += f"<SPECIAL_63>Deliberation: {'enabled' if c['has_thinking'] else 'disabled'}\nTool Capabilities:" + (f"\n{c['formatted_tools']}" if c["formatted_tools"] else " disabled") + "<SPECIAL_64>"
        if m["role"] == "user": out += f"<SPECIAL_65>{''.join(p['text'] for p in c['parts'])}<SPECIAL_66>"
        if m["role"] != "assistant": continue
        out, inner = out + "<SPECIAL_67>", False
        for n, b in enumerate(c["blocks"]):
            shows = b["type"] == "tool_calls" and [x["name"] for x in b["calls"]] == ["display_answers"]
            if inner and n and (b["type"] == "response" or shows): out, inner = out + "<SPECIAL_70>", False
            if b["type"] == "thoughts": out, inner = out + "<SPECIAL_69>" * (not inner) + b["text"], True
            elif b["type"] == "response": out += b["text"]
            elif b["type"] == "tool_calls": out += "<SPECIAL_71>[" + ", ".join(f'{{"{x["name"]}": {x["arguments"]}}}' for x in b["calls"]) + "]<SPECIAL_72>"
            else: out += "[" + ", ".join(o["output"] for o in b["outputs"]) + "]" + " " * (n < len(c["blocks"]) - 1)
        out += "<SPECIAL_68>"
    return out


def test_apertus_renders_displayed_answers_as_published(apertus):
    r = random.Random(1)
    chats = [linearise_branch(random_branch(r)) for _ in range(300)]
    shown = sum(b["calls"][0]["name"] == "display_answers" for c in chats for m in c if m["role"] == "assistant" for b in m["content"]["blocks"])
    done = tokenize_chats(apertus, chats)
    assert shown > 200 and not [d for d in done if isinstance(d, Refused)]
    assert [d.text for d in done] == [published_text(c) for c in chats]
    for chat, d in zip(chats, done):
        written = "".join(published_text([m]).split("<SPECIAL_67>")[1] for m in chat if m["role"] == "assistant")
        kept = apertus.decode(d.input_ids[d.completion_mask])
        assert kept.count("<SPECIAL_70>") == written.count("<SPECIAL_70>") and kept.count("<SPECIAL_71>") == written.count("<SPECIAL_71>")
        assert not encoder_for(apertus).turn_fault(d, chat, frozenset([68]))


DEPENDS = {  # on the name of a tool, in several ways
    "equal": "{% if c.function.name == 'show' %}<SPECIAL_70>{% endif %}", "in a list": "{% if c.function.name in ['show', 'tell'] %}<SPECIAL_70>{% endif %}",
    "beginning": "{% if c.function.name.startswith('sh') %}<SPECIAL_70>{% endif %}", "upper case": "{{ c.function.name | upper }}", "length": "{{ c.function.name | length }}"}


@pytest.mark.parametrize("how", DEPENDS)
def test_other_templates_that_depend_on_a_name(how):
    t = toy_tokenizer("bpe", "tulu")
    t.chat_template = ("{% for m in messages %}{% if m.role == 'assistant' %}<SPECIAL_67>{{ m.content }}{% for c in m.tool_calls or [] %}" + DEPENDS[how]
                       + "<SPECIAL_71>{{ c.function.name }} {{ c.function.arguments | tojson }}<SPECIAL_72>{% endfor %}<SPECIAL_68>{% else %}<SPECIAL_65>{{ m.content }}<SPECIAL_66>{% endif %}{% endfor %}"
                       "{% if add_generation_prompt %}<SPECIAL_67>{% endif %}")
    chats = [[ASK, dict(role="assistant", content=text, tool_calls=[dict(CALL, function=dict(name=name, arguments=dict(x=name))) for name in names]), dict(role="tool", content="1"), SAY]
             for names in (["show"], ["f"], ["f", "show"], ["tell", "show"]) for text in ("", "Look.")]
    done = tokenize_chats(t, chats)
    assert not [d for d in done if isinstance(d, Refused)]
    for chat, d in zip(chats, done):
        assert d.text == t.apply_chat_template(chat, tokenize=False)
        want = "".join(x.split("<SPECIAL_68>")[0] + "<SPECIAL_68>" for x in d.text.split("<SPECIAL_67>")[1:])
        assert t.decode(d.input_ids[d.completion_mask]) == want
    assert np.array_equal(tokenize_chats(t, chats[:1])[0].input_ids, done[0].input_ids)


# -- linearised rows

def test_each_part_of_a_user_message_is_a_turn():
    row = random_branch(random.Random(0))
    row["conversation_branches"][0]["messages"] = [dict(role="assistant", parts=[dict(type="response", content="a")]), dict(role="user", parts=[dict(type="text", content=t) for t in "bc"]),
                                                   dict(role="assistant", parts=[dict(type="response", content="d")])]
    assert [m["content"]["parts"][0]["text"] for m in linearise_branch(row) if m["role"] == "user"] == ["Hi", "b", "c"]


def test_texts_as_published():
    "Escapes beyond ASCII in what is dumped as JSON, required: false read as all, and no tool declared where there is none"
    parts = [dict(type="function-call", name="f", args=dict(a="é")), dict(type="function-output", content='"é"'), dict(type="verifiable-responses", answers=["é"])]
    schema = dict(type="object", properties=dict(a=dict(type="string", description="é")), required=False)
    row = dict(conversation_branches=[dict(messages=[dict(role="assistant", parts=parts)])], initial_prompt=dict(content="é"), system_prompt=None, available_functions=[dict(name="f", description="é", parameters=schema)])
    own, published = linearise_branch(row), linearise_branch(row, published=True)
    blocks = [[b["calls"][0]["arguments"] for b in c[-1]["content"]["blocks"] if b["calls"][0]["name"]] for c in (own, published)]
    assert blocks == [['{"a": "é"}', '{"answers": ["é"]}'], ['{"a": "\\u00e9"}', '{"answers": ["\\u00e9"]}']]
    assert ["a?: string" in c[0]["content"]["formatted_tools"] for c in (own, published)] == [True, False] and "é" not in published[0]["content"]["tools"]
    bare = dict(row, available_functions=[], conversation_branches=[dict(messages=[dict(role="assistant", parts=parts[2:])])])
    assert [bool(linearise_branch(bare, published=p)[0]["content"]["tools"]) for p in (False, True)] == [True, False]
    assert linearise_dataset(Dataset.from_list([bare]), published=True)[0][0]["messages"][0]["content"]["tools"] == ""
    assert conversation_of(row).messages == own and not check_messages(own) and as_messages(Dataset.from_list([bare]))[1]["out"] == 1
    assert account_lines(account(Dataset.from_list([bare]))) and FOREIGN.exists()
