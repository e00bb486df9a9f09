"Renderings, linearised rows and mask spans that must never change: what models were and will be trained on."
import json
from functools import cache
from pathlib import Path

import pytest

from post_training.core.files import UserError
from post_training.data.messages import MalformedRow
from post_training.data.swissai import linearise_branch
from post_training.tokens.masks import completion_mask_of, encoder_for, tokenize_chat
from post_training.tokens.templates import CHAT_TEMPLATES, render_template, template_text, wants_blocks
from post_training.tokens.tokenizer import tekken_tokenizer, toy_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES, ROWS, MASKS = (json.loads((GOLDEN / f"{n}.json").read_text()) for n in ("chat_templates", "linearise", "masks"))
PLAIN = [n for n in CHAT_TEMPLATES if not wants_blocks(template_text(n))]
NO_SYSTEM = [n for n in PLAIN if "system" not in MASKS["masks"][n]]


@cache
def bare_tokenizer(kind):
    return tekken_tokenizer() if kind == "tekken" else toy_tokenizer(kind)


def tokenizer(kind, template):
    t = bare_tokenizer(kind)
    t.chat_template = template_text(template)
    return t


def messages(template, case):
    return ROWS["expected"][case]["messages"] if wants_blocks(template_text(template)) else TEMPLATES["conversations"][case]


def test_all_names_are_known():
    assert sorted(TEMPLATES["renderings"]) == sorted(CHAT_TEMPLATES) == sorted(MASKS["masks"])
    assert len(CHAT_TEMPLATES) == 21 and len(NO_SYSTEM) == 14


@pytest.mark.parametrize("name", PLAIN)
def test_renderings(name):
    assert TEMPLATES["renderings"][name]
    for key, want in TEMPLATES["renderings"][name].items():
        case, what = key.split("|")
        got = render_template(template_text(name), TEMPLATES["conversations"][case], what == "gen", **TEMPLATES["special_tokens"])
        assert got == want, key


@pytest.mark.parametrize("case", ROWS["samples"])
def test_linearised_rows(case):
    want = ROWS["expected"][case]
    if "malformed" in want:
        with pytest.raises(MalformedRow, match=want["malformed"]): linearise_branch(ROWS["samples"][case])
        return
    got = linearise_branch(ROWS["samples"][case])
    assert got == want["messages"]
    for what in ("full", "gen"):
        assert render_template(template_text("apertus"), got, what == "gen", **TEMPLATES["special_tokens"]) == want[what]


def test_every_case_has_its_spans():
    "Each template has spans for every answered conversation that it has a place for, and the three vocabularies are the ones they are called"
    for name in PLAIN:
        full = {k.split("|")[0] for k in TEMPLATES["renderings"][name] if k.endswith("|full")}
        assert set(MASKS["masks"][name]) >= {c for c in full if "open" not in c and (name not in NO_SYSTEM or "system" not in c)}, name
    assert set(MASKS["masks"]["apertus"]) == {c for c, want in ROWS["expected"].items() if "messages" in want}
    assert len(bare_tokenizer("tekken")) == 131_072
    assert encoder_for(tokenizer("tekken", "tulu")).n_bytes is not None and encoder_for(tokenizer("char", "tulu")).n_bytes is None


@pytest.mark.parametrize("kind", ["char", "bpe", "tekken"])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_mask_spans(name, kind):
    "The spans are the golden ones; a token is completion where it overlaps what was written or lies in the end of a turn"
    t = tokenizer(kind, name)
    assert MASKS["masks"][name]
    for case, want in MASKS["masks"][name].items():
        chat = tokenize_chat(t, messages(name, case))
        assert chat.text == want["rendering"] and [list(s) for s in chat.spans] == want["completion"], case
        assert chat.input_ids.tolist() == t(chat.text, add_special_tokens=False).input_ids
        for (a, b), m in zip(chat.offsets.tolist(), chat.completion_mask):
            if m: assert any(a < e and s < b for s, e in want["completion"]), (case, chat.text[a:b])
            else: assert not any(s <= a and b <= e for s, e in want["completion"]), (case, chat.text[a:b])
        _, skeleton, edges, _ = encoder_for(t).verify(messages(name, case), chat.text)
        assert completion_mask_of(skeleton, edges, chat.spans, chat.offsets).tolist() == chat.completion_mask.tolist()
        if kind == "char": assert t.decode(chat.input_ids[chat.completion_mask]) == "".join(want["text"])


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_system_message_without_a_place_is_refused(name):
    t, system = tokenizer("bpe", name), TEMPLATES["conversations"]["system"]
    with pytest.raises(UserError, match=f"{name} has no place for: system"): tokenize_chat(t, system)
    chat = tokenize_chat(t, system, unsupported_roles="drop")
    assert chat.text == TEMPLATES["renderings"][name]["system|full"] and chat.dropped == ["system.content"]
