"Properties of the masks over random conversations and all templates."
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from post_training.data.swissai import assistant_blocks, developer, structured, user
from post_training.tokens.collate import PackCollator, PadCollator, best_fit_pack
from post_training.tokens.dataset import fit
from post_training.tokens.masks import Refused, completion_of, encoder_for, tokenize_chat, tokenize_chats
from post_training.tokens.templates import CHAT_TEMPLATES, template_text, wants_blocks
from post_training.tokens.tokenizer import toy_tokenizer

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
    _, skeleton, edges = encoder_for(t).verify(talk, chat.text)
    assert completion_of(skeleton, edges, chat.spans, chat.offsets).tolist() == chat.completion_mask.tolist()


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
        out += [user(draw(texts())), dict(role="assistant", content=dict(blocks=assistant_blocks(parts)))]
    return [developer([], True), *out]


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


@quick
@given(talks(), st.sampled_from(PLAIN), st.integers(1, 40))
def test_truncation_leaves_something_to_train_on(talk, name, length):
    chat = tokenize_chat(tokenizer("bpe", name), talk)
    row = fit(chat, length, "truncate")
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
    chat = tokenize_chat(tokenizer("bpe", name), structured(talk) if name == "apertus" else talk)
    assert chat.text[slice(*chat.spans[-1])].startswith("Yes.")
