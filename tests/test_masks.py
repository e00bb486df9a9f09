"Properties of the masks over random conversations and all templates."
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, reduce

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from post_training.core.files import UserError
from post_training.data.swissai import assistant_blocks, make_block, developer_message, to_structured, user_message
from post_training.tokens.collate import PackCollator, PadCollator, best_fit_pack
from post_training.tokens.dataset import fit_to_length
from post_training.tokens.masks import Refused, template_supports, completion_mask_of, encoder_for, tokenize_chat, tokenize_chats
from post_training.tokens.gates import prompt_ids
from post_training.tokens.templates import CHAT_TEMPLATES, template_text, wants_blocks
from post_training.tokens.tokenizer import tekken_tokenizer, toy_tokenizer

PLAIN = [n for n in CHAT_TEMPLATES if not wants_blocks(template_text(n))]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Words that look like marks, whole and in pieces, control tokens, blanks, and letters of several bytes
WORDS = ["user", "assistant", "<|user|>\n", "<|", "[INST]", "[/INST]", "</s>", "<s>", "<SPECIAL_68>", "<SPECIAL_6", "1>", "[RESPONSE]", "\n", "  ", " ",
         "\t", "Zürich", "🏔", "日本", "e\u0301", "\u00a0", "]", "[", '"', "{}", "\\n", "4", "Bern.", "![a](b)", "\ue001", "\x00"]
HARMLESS = [w for w in WORDS if "SPECIAL" not in w and w not in ("[INST]", "[/INST]", "</s>", "<s>")]


def texts(words=WORDS):
    return st.lists(st.sampled_from(words), min_size=1, max_size=6).map("".join).filter(lambda s: not s.isspace())


def talks(words=WORDS):
    turn = st.tuples(texts(words), texts(words)).map(lambda t: [dict(role="user", content=t[0]), dict(role="assistant", content=t[1])])
    return st.lists(turn, min_size=1, max_size=4).map(lambda turns: [m for t in turns for m in t])


@cache
def tokenizer(kind, name):
    return toy_tokenizer(kind, name)


@quick
@given(talks(), st.sampled_from(PLAIN), st.sampled_from(["bpe", "char"]))
def test_what_is_trained_on_is_what_assistants_wrote(talk, name, kind):
    t = tokenizer(kind, name)
    chat = tokenize_chat(t, talk)
    assert chat.text == t.apply_chat_template(talk, tokenize=False)
    assert (chat.prompt_mask ^ chat.completion_mask).all() and len(chat.input_ids) == len(chat.offsets) == len(chat.completion_mask)
    answers = [m["content"].strip() if name == "mistral" else m["content"] for m in talk if m["role"] == "assistant"]
    assert len(chat.spans) == len(chat.turns) == len(answers)
    for (a, b), answer, (_, after) in zip(chat.spans, answers, [*zip(chat.spans, [s for s, _ in chat.spans[1:]]), (0, len(chat.text))]):
        assert chat.text[a:b].startswith(answer) and b <= after
    for (a, b), m in zip(chat.offsets.tolist(), chat.completion_mask):
        assert m or not any(s < b and a < s + len(answer) for (s, _), answer in zip(chat.spans, answers))
        assert not m or any(s < b and a < e for s, e in chat.spans)
    assert {i for a, b in chat.offsets.tolist() for i in range(a, b)} == set(range(len(chat.text)))  # the offsets cover all of it


@quick
@given(talks(HARMLESS), st.sampled_from(PLAIN))
def test_ids_are_those_of_the_plain_call(talk, name):
    t = tokenizer("bpe", name)
    assert tokenize_chat(t, talk).input_ids.tolist() == t.apply_chat_template(talk, return_dict=False)


@quick
@given(talks(), st.sampled_from(PLAIN))
def test_typed_control_tokens_stay_text(talk, name):
    "Whatever contents hold, a row has the control tokens of its template and no other"
    t = tokenizer("bpe", name)
    harmless = [dict(m, content="x") for m in talk]
    special = encoder_for(t).is_special
    chat, want = tokenize_chat(t, talk), tokenize_chat(t, harmless)
    assert chat.input_ids[special[chat.input_ids]].tolist() == want.input_ids[special[want.input_ids]].tolist()
    assert t.decode(chat.input_ids) == chat.text


@quick
@given(st.lists(talks(), min_size=1, max_size=5), st.sampled_from(PLAIN))
def test_a_batch_is_its_rows(talks_, name):
    t = tokenizer("bpe", name)
    for one, many in zip([tokenize_chat(t, x) for x in talks_], tokenize_chats(t, talks_)):
        assert one.input_ids.tolist() == many.input_ids.tolist() and one.completion_mask.tolist() == many.completion_mask.tolist()


@quick
@given(talks(), st.sampled_from(PLAIN), st.sampled_from(["bpe", "char"]))
def test_the_two_ways_to_a_mask_agree(talk, name, kind):
    "From the tokens at the edges of the regions of a batch, and from the characters of every token of a row"
    t = tokenizer(kind, name)
    chat = tokenize_chat(t, talk)
    _, skeleton, edges, _ = encoder_for(t).verify(talk, chat.text)
    assert completion_mask_of(skeleton, edges, chat.spans, chat.offsets).tolist() == chat.completion_mask.tolist()


@st.composite
def structured_talks(draw):
    out, part = [], lambda kind, **kw: dict(dict(type=kind, content="", name="", args="", answers=[]), **kw)
    for _ in range(draw(st.integers(1, 3))):
        parts = []
        for kind in draw(st.lists(st.sampled_from(["thought", "calls", "response", "answers"]), min_size=1, max_size=4)):
            if kind == "calls":
                n = draw(st.integers(1, 2))
                parts += [part("function-call", name="f", args='{"x": "%s"}' % draw(st.sampled_from(["</s>", "a", "é"]))) for _ in range(n)]
                parts += [part("function-output", content=draw(texts())) for _ in range(n)]
            elif kind == "answers": parts.append(part("verifiable-responses", answers=["A"]))
            else: parts.append(part(kind, content=draw(texts())))
        out += [user_message(draw(texts())), dict(role="assistant", content=dict(blocks=assistant_blocks(parts)))]
    return [developer_message([], True), *out]


@quick
@given(structured_talks())
def test_tool_outputs_are_never_trained_on(talk):
    t = tokenizer("char", "apertus")
    chat = tokenize_chat(t, talk)
    blocks = [b for m in talk if m["role"] == "assistant" for b in m["content"]["blocks"]]
    written = "".join("".join(c["arguments"] for c in b["calls"]) if b["type"] == "tool_calls" else b["text"] for b in blocks if b["type"] != "tool_outputs")
    trained = "".join(chat.text[a:b] for a, b in chat.spans)
    for mark in ("<SPECIAL_67>", "<SPECIAL_68>"): assert trained.count(mark) - written.count(mark) == (mark == "<SPECIAL_68>")*len(chat.turns)
    prompt = "".join(chat.text[a:b] for (a, b), m in zip(chat.offsets.tolist(), chat.completion_mask) if not m)
    for b in blocks:
        if b["type"] == "tool_outputs": assert "[" + ", ".join(o["output"] for o in b["outputs"]) + "]" in prompt
    left = len(trained) - len(written) - sum(len(c["name"]) + 6 for b in blocks for c in b["calls"] if b["type"] == "tool_calls")
    assert left >= 0 and "".join(chat.text[a:b] for a, b in chat.offsets[chat.completion_mask]) == trained


@st.composite
def rounds(draw, name):
    "A conversation in the form its template takes, with its texts: (messages, kinds of text in it, written texts, texts that are given)"
    has = {k: draw(st.booleans()) for k in ("system", "thoughts", "tool calls", "tool outputs")}
    has["tool outputs"] |= has["tool calls"]
    blocks, out, kinds, n = name == "apertus", [], set(), 0

    def text(kind, store):
        nonlocal n
        n += 1
        kinds.add(kind)
        store.append(f"<{n}>{draw(texts()).strip() or 'x'}<{n}>")  # each is unlike all others
        return store[-1]
    written, given_ = [], []
    if has["system"]: out.append(dict(role="system", content=text("system", given_)))
    for _ in range(draw(st.integers(1, 3))):
        out.append(dict(role="user", content=text("user", given_)))
        turn, args = [], None
        thought = text("thoughts", written) if has["thoughts"] and draw(st.booleans()) else None
        if thought: turn.append(make_block("thoughts", thought))
        if has["tool calls"]:
            args = '{"x": "%s"}' % text("tool calls", written)
            turn.append(make_block("tool_calls", calls=[("f", args)]))
        if has["tool outputs"]:
            if not blocks: out.append(dict(role="assistant", content=text("answer", written)) if not args else dict(role="assistant", content="", tool_calls=[
                dict(id="call00001", type="function", function=dict(name="f", arguments=args))]))
            elif not args: turn.append(make_block("tool_calls", calls=[("f", "{}")]))
            got = text("tool outputs", given_)
            out.append(dict(role="tool", content=got))
            turn.append(make_block("tool_outputs", outputs=[("", got)]))
        answer = text("answer", written)
        out.append(dict(role="assistant", content=answer) | (dict(reasoning_content=thought) if thought else {}))
        if blocks:
            while out[-1]["role"] != "user": out.pop()
            out.append(dict(role="assistant", content=dict(blocks=[*turn, make_block("response", answer)])))
    if blocks:
        out = [dict(m, content=dict(text=m["content"])) if m["role"] == "system" else user_message(m["content"]) if m["role"] == "user" else m for m in out]
        out.insert(int(has["system"]), developer_message([], has["thoughts"]))
    return out, kinds, written, given_


@cache
def able(name):
    return template_supports(tokenizer("bpe", name))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_and_kind_of_turn(name):
    "Trained on: all that an assistant wrote and nothing that it was given; what a template cannot carry, it says"
    @settings(max_examples=25, deadline=None)
    @given(rounds(name), st.sampled_from(["bpe", "char"]), st.integers(1, 60))
    def check(talk, kind, length):
        messages, kinds, written, given_ = talk
        t = tokenizer(kind, name)
        chat, = tokenize_chats(t, [messages])
        missing = [k for k in able(name) if k in kinds and not able(name)[k]]
        if missing or isinstance(chat, Refused):
            assert missing and isinstance(chat, Refused) and chat.reason in ("unsupported_roles", "template")
            roles = {"system": "system", "thoughts": "assistant.reasoning_content", "tool calls": "assistant.tool_calls", "tool outputs": "tool"}
            assert chat.reason == "template" or any(roles[k] in chat.detail for k in missing)
            return
        at = {w: (chat.text.index(w), chat.text.index(w) + len(w)) for w in [*written, *given_] if name != "assistant_message_only" or w in written}
        for w in written: assert any(s <= at[w][0] and at[w][1] <= e for s, e in chat.spans), w
        for g in given_: assert g not in at or not any(s < at[g][1] and at[g][0] < e for s, e in chat.spans), g
        for (a, b), m in zip(chat.offsets.tolist(), chat.completion_mask):
            mine = any(a < at[w][1] and at[w][0] < b for w in written)
            assert m or not mine
            assert not m or mine or not any(a < at[g][1] and at[g][0] < b for g in given_ if g in at)
        assert (chat.prompt_mask ^ chat.completion_mask).all() and (kind == "char" or t.decode(chat.input_ids) == chat.text)
        row = fit_to_length(chat, length, "truncate")
        assert isinstance(row, Refused) or row[1][1:].any() and len(row[0]) <= length
    check()


ASK, SAY = dict(role="user", content="2+2?"), dict(role="assistant", content="4")
BAD = dict(
    no_messages=[], not_a_list=None, not_messages=[None], no_role=[dict(content="2+2?"), SAY], no_content=[dict(role="user"), SAY], none=[dict(role="user", content=None), SAY],
    a_number=[dict(role="user", content=4), SAY], a_set=[dict(role="user", content={"2+2?"}), SAY], a_mapping=[dict(role="user", content=dict(text="2+2?")), SAY],
    surrogate=[dict(role="user", content="2+2\ud83d"), SAY], surrogate_answer=[ASK, dict(role="assistant", content="\udfff")],
    role_is_control=[dict(role="</s>", content="2+2?"), SAY], key_is_control=[dict(ASK, **{"</s>": 1}), SAY],
    deep=[ASK, dict(SAY, extra=reduce(lambda x, _: [x], range(5000), "x"))])


@pytest.mark.parametrize("name", ["tulu", "zephyr", "mistral", "simple_concat_with_space", "apertus_mistral_special_tokens", "apertus"])
@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_refused_one_by_one(name, case):
    "With a reason, and the good rows of the batch go on; nothing of a bad one is trained on"
    t = tokenizer("bpe", name)
    good = to_structured([ASK, SAY]) if name == "apertus" else [ASK, SAY]
    before, bad, after = tokenize_chats(t, [good, BAD[case], good])
    assert before.input_ids.tolist() == after.input_ids.tolist() == tokenize_chat(t, good).input_ids.tolist()
    if isinstance(bad, Refused): assert bad.reason.split(":")[0] in ("malformed", "template", "unverifiable", "unsupported_roles") and bad.detail
    else: assert case in ("no_messages", "no_role", "no_content", "none", "a_number", "role_is_control", "key_is_control", "deep")
    if case.startswith("surrogate") and name not in ("apertus", "mistral"): assert bad.reason.startswith("malformed")


def test_numbers_that_are_equal_are_not_the_same():
    "1, 1.0 and true are one key of a dict but three renderings"
    t = toy_tokenizer("bpe", "tulu")
    t.chat_template = t.chat_template.replace("message['content'] + eos_token", "message['content'] + message['n'] | tojson + eos_token")
    out = tokenize_chats(t, [[ASK, dict(SAY, n=n)] for n in (1, True, 1.0, -0.0, 0.0)])
    assert [c.text.split("4")[-1] for c in out] == ["1</s>", "true</s>", "1.0</s>", "-0.0</s>", "0.0</s>"]


def test_a_template_that_writes_the_date():
    "Rows go on when the day changes"
    t = toy_tokenizer("bpe", "tulu")
    t.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + t.chat_template
    chat, = tokenize_chats(t, [[ASK, SAY]])
    e = encoder_for(t)
    e.skeletons = {k: replace(s, items=[("1999-12-31" + s.items[0][0][10:], *s.items[0][1:]), *s.items[1:]]) for k, s in e.skeletons.items()}
    assert tokenize_chats(t, [[ASK, SAY]])[0].input_ids.tolist() == chat.input_ids.tolist()


@quick
@given(talks(), st.sampled_from(PLAIN), st.integers(1, 40))
def test_truncation_leaves_something_to_train_on(talk, name, length):
    chat = tokenize_chat(tokenizer("bpe", name), talk)
    row = fit_to_length(chat, length, "truncate")
    if isinstance(row, Refused): assert not chat.completion_mask[1:length].any()
    else: assert len(row[0]) == min(length, len(chat)) and row[1][1:].any()


@quick
@given(st.lists(talks(), min_size=1, max_size=5), st.sampled_from(PLAIN), st.sampled_from(["left", "right"]))
def test_targets_do_not_depend_on_the_layout(talks_, name, side):
    "Padded left, padded right or packed: the same targets, and never the first token of a row"
    t = tokenizer("bpe", name)
    rows = [dict(input_ids=c.input_ids, completion_mask=c.completion_mask, row_index=i) for i, c in enumerate(tokenize_chats(t, talks_))]
    for batch in (PadCollator(10, side)(rows), PackCollator()(rows)):
        for i, r in enumerate(rows):
            mine = batch["sequence"] == i
            assert batch["input_ids"][mine].tolist() == r["input_ids"].tolist()
            assert batch["completion_mask"][mine].tolist() == [False, *r["completion_mask"][1:].tolist()]
            assert batch["prompt_mask"][mine].tolist() == [False, *(~r["completion_mask"][1:]).tolist()]
        assert not (batch["prompt_mask"] | batch["completion_mask"])[batch["sequence"] < 0].any()


@quick
@given(st.lists(st.integers(1, 50), max_size=60))
def test_packing_keeps_every_row_once(lengths):
    lines = best_fit_pack(lengths, 50)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= 50 for line in lines)
    assert len(lines) <= 2*np.ceil(sum(lengths)/50) + 1


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_large_message(name):
    "300 kB in one message: the same masks, at once"
    talk = [dict(role="user", content="Bern. " * 50_000), dict(role="assistant", content="Yes.")]
    chat = tokenize_chat(tokenizer("bpe", name), to_structured(talk) if name == "apertus" else talk)
    assert chat.text[slice(*chat.spans[-1])].startswith("Yes.")


def test_a_tokenizer_that_panics(monkeypatch):
    "The library's panics are no exceptions of the usual kind; the other rows go on, and interrupts pass"
    t = toy_tokenizer("bpe", "tulu")
    e, want = encoder_for(t), tokenize_chat(t, [ASK, SAY]).input_ids.tolist()
    PanicException = type("PanicException", (BaseException,), {})

    class Backend:
        def __getattr__(self, name): return getattr(e.__dict__["real"], name)

        def encode_batch_fast(self, texts, **kwargs):
            if any("stop" in x for x in texts): raise KeyboardInterrupt
            if any("panic" in x for x in texts): raise PanicException("retry-limit-in-match over")
            return e.real.encode_batch_fast(texts, **kwargs)
    e.real, e.backend = e.backend, Backend()
    before, bad, after = tokenize_chats(t, [[ASK, SAY], [dict(ASK, content="panic"), SAY], [ASK, SAY]])
    assert before.input_ids.tolist() == after.input_ids.tolist() == want
    assert bad.reason == "malformed: the tokenizer cannot encode it" and "retry-limit" in bad.detail
    with pytest.raises(UserError, match="cannot encode"): prompt_ids(t, [dict(ASK, content="panic")])
    with pytest.raises(KeyboardInterrupt): tokenize_chats(t, [[dict(ASK, content="stop"), SAY]])


@pytest.mark.slow
def test_ten_million_blanks():
    "More than the regular expression of the Tekken vocabulary can take: refused, and the batch goes on"
    t = tekken_tokenizer("tulu")
    good, bad, small = tokenize_chats(t, [[ASK, SAY], [dict(ASK, content=" " * 10_000_000 + "x"), SAY], [dict(ASK, content=" " * 1_000_000 + "x"), SAY]])
    assert isinstance(bad, Refused) and bad.reason == "malformed: the tokenizer cannot encode it"
    assert good.completion_mask.sum() == small.completion_mask.sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Bern is a city. " * 640_000, "a" * 10_000_000, "Zürich 🏔 " * 900_000, "No </s> here. " * 700_000], ids=["words", "one word", "wide letters", "control tokens"])
def test_ten_megabytes(text):
    "In one message, at the Tekken vocabulary: less than two minutes and 5 GB, and the masks are right"
    code = ("import resource, sys, time; from post_training.tokens.masks import tokenize_chat; from post_training.tokens.tokenizer import tekken_tokenizer\n"
            "text = sys.stdin.read(); t = tekken_tokenizer('tulu'); start = time.process_time()\n"
            "a = tokenize_chat(t, [dict(role='user', content=text), dict(role='assistant', content='Yes.')])\n"
            "assert a.text[slice(*a.spans[0])] == 'Yes.</s>' and a.completion_mask.sum() == 3\n"
            "b = tokenize_chat(t, [dict(role='user', content='What?'), dict(role='assistant', content=text)])\n"
            "assert b.text[slice(*b.spans[0])] == text + '</s>' and b.completion_mask.sum() > 500_000/8\n"
            "print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)")
    out = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONUTF8="1"))
    seconds, gigabytes = map(float, out.stdout.split())
    assert seconds < 120 and gigabytes < 5
