"Masks of templates and tokenizers that are not of this repository: published layouts, other kinds of vocabulary, marks of a library's own templates."
import json
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from post_training.tokens.dataset import tokenize_dataset
from post_training.tokens.masks import Refused, encoder_for, tokenize_chats
from post_training.tokens.gates import prompt_ids
from post_training.tokens.templates import render_template

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|call|>", "<|inner|>", "<|tool|>", "<think>"]
quick = settings(max_examples=40, deadline=None)
# Templates with brackets around what the model writes: with them an answer sheet, without them the template
HEAD, END = "<|im_start|>", "<|im_end|>"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHEETS = dict(
    chatml="{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}⟦{{ m.content }}<|im_end|>⟧{% else %}{{ m.content }}<|im_end|>{% endif %}"
           "{{ '\n' }}{% endfor %}" + ASK,
    trimmed="{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{% if m.role == 'assistant' %}⟦{{ m.content | trim }}<|im_end|>⟧{% else %}"
            "{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    renamed="{{ bos_token }}{% for m in messages if m.role != 'system' %}<|im_start|>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
            "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
            "{% if m.role == 'assistant' %}⟦{{ m.content }}<|im_end|>⟧{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    words="{% for m in messages %}{% if m.role == 'assistant' %}### Answer:\n⟦{{ m.content }}</s>⟧{% else %}### {{ m.role }}:\n{{ m.content }}{% endif %}\n\n{% endfor %}"
          "{% if add_generation_prompt %}### Answer:\n{% endif %}",
    thinks="{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
           "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}⟦{% if loop.index0 > ns.last %}<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n"
           "{% endif %}{{ m.content }}<|im_end|>⟧{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + ASK,
    asks_to_think="{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>⟦</think>{{ m.content }}"
                  "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>⟧{% else %}{{ m.content }}<|im_end|>{% endif %}"
                  "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    calls="{% if tools %}<|tool|>{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}⟦{{ m.content }}"
          "{% for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>⟧"
          "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}" + ASK,
    named="{% set ns = namespace(name='') %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>functions.{{ ns.name }} to=assistant\n{{ m.content }}<|im_end|>"
          "{% elif m.role == 'assistant' %}<|im_start|>assistant⟦{% for c in m.tool_calls or [] %}{% set ns.name = c.function.name %} to=functions.{{ c.function.name }}\n"
          "{{ c.function.arguments | tojson }}<|call|>{% endfor %}{% if not m.tool_calls %}{{ '\n' + m.content }}{{ '</s>' if loop.last }}{% endif %}⟧"
          "{{ '<|im_end|>' if not loop.last and not m.tool_calls }}"
          "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    goes_on="{% set ns = namespace(open=false, tool=false) %}{% for m in messages %}{% if m.role == 'tool' %}{{ ', ' if ns.tool else '[' }}{{ m.content }}{% set ns.tool = true %}"
            "{% elif m.role == 'assistant' %}{% if not ns.open %}<|im_start|>{% endif %}{{ ']' if ns.tool else '' }}⟦{{ '<|inner|>' if ns.open else '' }}{% set ns.open = true %}{% set ns.tool = false %}"
            "{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}: {{ c.function.arguments | tojson }}<|tool|>{% endfor %}"
            "{% if loop.last or messages[loop.index0 + 1].role == 'user' %}<|im_end|>{% set ns.open = false %}{% endif %}⟧{% else %}{{ m.role }} {{ m.content }}</s>{% endif %}{% endfor %}"
            "{{ ']' if ns.tool else '' }}{% if add_generation_prompt %}<|im_start|>{% endif %}")
WORDS = ["user", "assistant", "### Answer:\n", "<|im_end|>", "</s>", "<think>", "<|im_", "end|>", "\n", "  ", " ", "Bern.", "Zürich", "🏔", "日本", "\u00a0", '"', "\\", "{}", "ſ", "e\u0301", "'"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(lambda s: not s.isspace())
values = st.one_of(texts, st.integers(-2, 2), st.booleans(), st.none(), st.floats(-1, 1), st.lists(texts, max_size=2), st.dictionaries(st.sampled_from("ab"), texts, max_size=2))
arguments = st.dictionaries(st.sampled_from(["x", "output", "role", "type"]), values, max_size=3)


@st.composite
def talks(draw, name):
    out = [dict(role="system", content=draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        out.append(dict(role="user", content=draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if name in ("calls", "named", "goes_on", "asks_to_think") else 0):
            call = dict(id="call00001", type="function", function=dict(name=draw(st.sampled_from(["f", "clock"])), arguments=draw(arguments)))
            out += [dict(role="assistant", content="", tool_calls=[call]), dict(role="tool", content=draw(texts), tool_call_id="call00001")]
        answer = dict(role="assistant", content=draw(texts))
        if name == "thinks" and draw(st.booleans()): answer["reasoning_content"] = draw(texts.filter(lambda s: s.strip("\n")))
        out.append(answer)
    return out


def vocabulary(kind):
    "A small tokenizer of a kind"
    be, control = Tokenizer(models.BPE()), [AddedToken(s, special=True, normalized=False) for s in SPECIAL]
    train = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    sample = ["user assistant Bern. Zürich answer: what a day"] * 8
    be.decoder = decoders.ByteLevel()
    be.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte, blank first")
    if kind == "byte, composed": be.normalizer = normalizers.NFC()
    if kind == "sentencepiece":
        be = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        be.pre_tokenizer, be.decoder = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace(prepend_scheme="first")
        train = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    be.train_from_iterator(sample, train)
    if kind == "sentencepiece":
        state = json.loads(be.to_str())
        for i in range(256): state["model"]["vocab"].setdefault(f"<0x{i:02X}>", len(state["model"]["vocab"]))
        be = Tokenizer.from_str(json.dumps(state))
    if kind == "byte, strips": control = [AddedToken(s, special=True, normalized=False, rstrip=s == "<|im_end|>") for s in SPECIAL]
    be.add_special_tokens(control)
    return be


@cache
def tokenizer(kind, name):
    out = PreTrainedTokenizerFast(tokenizer_object=vocabulary(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    out.chat_template = re.sub("[⟦⟧]", "", SHEETS[name])
    return out


def answers(sheet):
    "The text of an answer sheet and which of its characters the model writes"
    text, written, on = [], [], False
    for c in sheet:
        if c in "⟦⟧": on = c == "⟦"
        else:
            text.append(c)
            written.append(on)
    return "".join(text), np.array(written)


@pytest.mark.parametrize("name", SHEETS)
def test_spans_are_those_of_the_answer_sheet(name):
    "Every character that the model writes is in a span and no other, whatever the contents hold"
    @quick
    @given(talks(name))
    def check(talk):
        t = tokenizer("byte", name)
        text, written = answers(render_template(SHEETS[name], talk, bos_token="<s>", eos_token="</s>"))
        chat, = tokenize_chats(t, [talk])
        if isinstance(chat, Refused) and chat.reason == "unverifiable": # an argument whose name or type is a control token
            assert "control token" in chat.detail and name in ("calls", "named", "goes_on", "asks_to_think")
            return
        assert chat.text == text
        got = np.zeros(len(text), bool)
        for a, b in chat.spans: got[a:b] = True
        assert got.tolist() == written.tolist(), [text[a:b] for a, b in chat.spans]
        special = encoder_for(t).is_special
        harmless, = tokenize_chats(t, [[{k: "x" if v and k in ("content", "reasoning_content") else v for k, v in m.items()} for m in talk]])
        assert chat.input_ids[special[chat.input_ids]].tolist() == harmless.input_ids[special[harmless.input_ids]].tolist()
    check()


KINDS = ["byte", "byte, blank first", "byte, composed", "byte, strips", "sentencepiece"]


@pytest.mark.parametrize("name", ["chatml", "trimmed", "words"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_places_are_the_tokenizers_own(kind, name):
    "Also where control tokens are typed: as if the template's own had names that nobody types"
    t = tokenizer(kind, name)
    other = {s: s.replace("m_", "\ue010_").replace("s>", "\ue010>").replace("th", "\ue010h").replace("l|", "\ue010|").replace("er|", "\ue010r|") for s in SPECIAL[1:]}
    state = json.loads(encoder_for(t).backend.to_str())
    for token in state["added_tokens"]: token["content"] = other.get(token["content"], token["content"])
    state["model"]["vocab"] = {other.get(k, k): v for k, v in state["model"]["vocab"].items()}
    renamed, template = Tokenizer.from_str(json.dumps(state)), t.chat_template
    for a, b in other.items(): template = template.replace(a, b)

    @quick
    @given(talks(name))
    def check(talk):
        chat, = tokenize_chats(t, [talk])
        want = renamed.encode(render_template(template, talk, bos_token=other["<s>"], eos_token=other["</s>"]), add_special_tokens=False)
        assert chat.input_ids.tolist() == want.ids
        assert chat.offsets.tolist() == [list(o) for o in want.offsets]
        control = encoder_for(t).is_special[chat.input_ids]
        for (a, b), m, c in zip(chat.offsets.tolist(), chat.completion_mask, control):
            tails = [END if name != "words" else "</s>"] * len(chat.spans)
            inside = any(s <= a and b <= e or a < e - len(tail) and s < b for (s, e), tail in zip(chat.spans, tails))
            assert m == (inside or c and any(s <= a < e for s, e in chat.spans))  # an end token may cover the line break behind it
    check()


@quick
@given(talks("chatml"), st.sampled_from(list(SHEETS)))
def test_a_prompt_is_the_beginning_of_its_conversation(talk, name):
    "What a model is given when it is asked for the last answer, typed control tokens and all"
    t = tokenizer("byte", name)
    chat, = tokenize_chats(t, [talk])
    asked = prompt_ids(t, talk[:-1])
    n = len(asked) - (1 if name == "asks_to_think" else 0)  # its line break is not in past answers
    assert chat.input_ids[:n].tolist() == asked[:n].tolist()
    special = encoder_for(t).is_special
    harmless = prompt_ids(t, [dict(m, content="x") for m in talk[:-1]])
    assert asked[special[asked]].tolist() == harmless[special[harmless]].tolist()


def test_a_template_that_takes_blocks_and_texts():
    "Without a developer message of its own it gets plain texts"
    t = tokenizer("byte", "chatml")
    t = PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    t.chat_template = ("<s>{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is mapping %}{% for b in m.content.blocks %}{{ b.text }}{% endfor %}{% else %}{{ m.content }}"
                       "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    rows = Dataset.from_dict(dict(question=["2+2?"], answer=["4"]))
    data, counts = tokenize_dataset(rows, t, stop_ids=[t.convert_tokens_to_ids("<|im_end|>")])
    assert counts["out"] == 1 and t.decode(np.array(data[0]["input_ids"])[data[0]["completion_mask"]]) == "4<|im_end|>"


# -- the templates that TRL ships with marks around what is trained on

def marked_templates():
    import trl
    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
    return [p for p in found if not re.match("idefics|llava|smolvlm", p.name)]  # those take images


def trl_tokenizer(template):
    marks = sorted(set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|<｜[^｜]+｜>|<\|?turn\|?>", template)))
    be = vocabulary("byte")
    be.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    out = PreTrainedTokenizerFast(tokenizer_object=be, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    out.chat_template = template
    return out


def trl_talk(rng, kind):
    def text():
        return "".join(rng.choices(["user", "assistant", "\n", " ", "Bern", "{}", '"x"'], k=rng.randint(1, 5))) + "."
    out = [dict(role="system", content=text())] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        out.append(dict(role="user", content=text()))
        if kind == "tools" and rng.random() < 0.7:
            calls = [dict(id="abcdefghi", type="function", function=dict(name="f", arguments=dict(x=text(), n=rng.randint(0, 2), on=rng.random() < 0.5)))
                     for _ in range(rng.randint(1, 2))]
            out.append(dict(role="assistant", content=rng.choice(["", text()]), tool_calls=calls))
            out += [dict(role="tool", content=text(), name="f", tool_call_id="abcdefghi") for _ in calls]
        thought = dict.fromkeys(("reasoning_content", "reasoning"), text()) if kind == "thoughts" else {}
        out.append(dict(role="assistant", content=text(), **thought))
    return out


@pytest.mark.parametrize("path", marked_templates(), ids=lambda p: p.stem)
def test_against_the_marks_of_published_templates(path):
    "Nothing is trained on outside the template's own marks; what the marks have beyond is headers, thoughts that are asked for, control tokens and blanks"
    t, rng, kept = trl_tokenizer(path.read_text()), random.Random(path.stem), 0
    names = "|".join(re.escape(a.content) for a in t.added_tokens_decoder.values())
    for kind in ["plain", "thoughts", "tools"] * 6:
        talk = trl_talk(rng, kind)
        chat, = tokenize_chats(t, [talk])
        if isinstance(chat, Refused): continue
        kept += 1
        want = t.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        marked, mine = np.array(want["assistant_masks"], bool), chat.completion_mask
        assert chat.input_ids.tolist() == want["input_ids"]
        # the one exception: a model of the Gemma family stops at the token that opens the output of its tool
        assert t.decode(chat.input_ids[mine & ~marked]).replace("<|tool_response>", "") == ""
        beyond = re.sub(names + r"|assistant|model|</?think>|\s", "", t.decode(chat.input_ids[marked & ~mine]))
        assert not beyond or "deepseekv3" in path.stem and set(beyond.split("function")) == {""}  # it opens the answer in the first round of calls only
    assert kept


def test_apertus_takes_plain_contents():
    "Text, a list of parts and structured contents are one conversation; the developer block is there in each"
    from post_training.data.swissai import to_structured
    from post_training.tokens.templates import template_text

    plain = [dict(role="system", content="Be brief."), dict(role="user", content="2+2?"), dict(role="assistant", content="4")]
    parts = [dict(m, content=[dict(type="text", text=m["content"])]) for m in plain]
    bare = [m for m in to_structured(plain) if m["role"] != "developer"]
    texts = {render_template(template_text("apertus"), talk, bos_token="<s>") for talk in (plain, parts, bare, to_structured(plain))}
    assert texts == {"<s><SPECIAL_61>Be brief.<SPECIAL_62><SPECIAL_63>Deliberation: disabled\nTool Capabilities: disabled<SPECIAL_64>"
                     "<SPECIAL_65>2+2?<SPECIAL_66><SPECIAL_67>4<SPECIAL_68>"}
    with pytest.raises(Exception, match="a content of a user is text or has parts"):
        render_template(template_text("apertus"), [dict(role="user", content=dict(text="2+2?"))], bos_token="<s>")
