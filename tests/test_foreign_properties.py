"Random conversations with the templates of other model families: every kept row is what transformers renders, every dropped row has its cause."
import json
import re

import numpy as np
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_foreign import ENDS, family, render, stop

from post_training.tokens.dataset import tokenize_rows

disable_progress_bars()
some = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
TOOLS = [dict(type="function", function=dict(name="add", description="Adds – two", parameters=dict(type="object", properties=dict(a=dict(type="integer"), b=dict(type=["string", "null"])))))]
CALLERS, THINKERS = ("qwen25", "qwen3", "llama31", "mistral7"), ("qwen3",)
# beginnings and ends that tokenizers join with what stands beside them, words of templates, tags
WORDS = ["user", "assistant", "model", "\n", "\n\n", " ", "  ", "\t", "Bern", "It is 4.", "Zürich", "🏔", "日本", "'s", "7", "\"", "{}", "[/INST", "<|im_", "<think", "</think", "_", "\u00a0", "e\u0301", "▁", "\r\n"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join).filter(str.strip)
tagged = st.tuples(st.sampled_from(["<think>\n", "<think>", "", "\n<think>"]), words, st.sampled_from(["</think>", "\n</think>\n\n", "\n</think>"]), words).map("".join)
values = st.one_of(st.integers(-2, 2), words, st.none(), st.booleans(), st.lists(st.integers(0, 1), max_size=2))
weights = st.sampled_from([None, 1, 1, 0, 0.5, 2])


@st.composite
def turns(draw, f):
    "One exchange: a question, perhaps a call and its output, an answer, perhaps with a thought"
    out = [dict(role="user", content=draw(words))]
    if f in CALLERS and draw(st.integers(0, 3)) == 0:
        calls = [dict(id="abcdefghi", type="function", function=dict(name="add", arguments=draw(st.dictionaries(st.sampled_from("ab"), values, max_size=2))))
                 for _ in range(1 if f == "llama31" else draw(st.integers(1, 2)))]
        said = draw(words) if f in ("qwen25", "qwen3") and draw(st.booleans()) else ""
        out.append(dict(role="assistant", content=said, tool_calls=calls))
        out += [dict(role="tool", content=draw(words), tool_call_id="abcdefghi") for _ in calls]
    out.append(dict(role="assistant", content=draw(tagged if draw(st.integers(0, 5)) == 0 else words)))
    if f in THINKERS and draw(st.booleans()): out[-1]["reasoning_content"] = draw(words if "think>" in out[-1]["content"] else st.just("") | words)
    for m in out:
        w = draw(weights)
        if w is not None and draw(st.booleans()): m["weight"] = w
    return out


@st.composite
def conversations(draw, f):
    "A row: messages with weights, tools, arguments of the template"
    messages = [m for _ in range(draw(st.integers(1, 3))) for m in draw(turns(f))]
    if f != "gemma2" and draw(st.integers(0, 2)) == 0: messages = [dict(role="system", content=draw(words)), *messages]
    kwargs = {}
    if f in ("qwen3", "smollm3") and draw(st.booleans()): kwargs = dict(enable_thinking=draw(st.booleans()))
    if f == "llama31" and draw(st.booleans()): kwargs = dict(date_string="1 May 2024")
    offered = TOOLS if f in CALLERS and (draw(st.booleans()) or any("tool_calls" in m for m in messages)) else None
    return dict(messages=messages, tools=offered, chat_template_kwargs=kwargs, weight=draw(st.sampled_from([1.0, 1.0, 0.5])))


@st.composite
def batches(draw):
    "A family, and rows for its template"
    f = draw(st.sampled_from(sorted(ENDS)))
    return f, draw(st.lists(conversations(f), min_size=1, max_size=6))


def tokens(f, rows, **policies):
    "Every row with its tokens, or with the reason why it is dropped"
    data = Dataset.from_list([dict({k: json.dumps(r[k]) for k in ("messages", "tools", "chat_template_kwargs")}, weight=r["weight"], id=str(i)) for i, r in enumerate(rows)])
    return tokenize_rows(data, family(f), stop_ids=stop(f), unsupported_roles="drop", **policies)[0].to_list()


def plain(messages):
    "Without weights; a thought that stands in reasoning_content and inline is one thought"
    out = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    for m in out:
        inline = re.fullmatch(r"<think>(.*?)</think>(.*)", m["content"] or "", re.S)
        if m.get("reasoning_content") and inline and m["content"].count("think>") == 2 and inline[1].strip() == m["reasoning_content"].strip():
            m["content"] = inline[2].lstrip("\n")
    return out


def encoded(t, text):
    out = t(text, add_special_tokens=False, return_offsets_mapping=True)
    return out["input_ids"], out["offset_mapping"]


def slow(f, row):
    "For each answer: first token and end of its span, and whether the ids before it are those of inference; None where the template asks for something else"
    t, messages = family(f), plain(row["messages"])
    how = dict(row["chat_template_kwargs"]) | (dict(tools=row["tools"]) if row["tools"] else {})
    text = render(t, messages, **how)
    ids, offsets = encoded(t, text)
    found = {}
    for m, message in enumerate(messages):
        if message["role"] != "assistant": continue
        asked = render(t, messages[:m], add_generation_prompt=True, **how)
        prompt, _ = encoded(t, asked)
        end = text.find(ENDS[f], len(asked))
        same = text.startswith(asked) and ids[:len(prompt)] == prompt and end >= 0
        last = max(i for i, (a, b) in enumerate(offsets) if a < end + len(ENDS[f]) and b > end) if same else None
        found[m] = (len(prompt), last + 1) if same else None
    return ids, found


def check_kept(f, row, got, trained_from=0):
    "Ids of the whole rendering, spans that begin after the ids of inference and end with a trained stop token, weights"
    ids, spans = slow(f, row)
    assert got["input_ids"] == ids, family(f).decode(got["input_ids"])
    mask, weights = np.array(got["completion_mask"]), np.array(got.get("weights") or np.ones(len(ids)))
    weight = {m: row["messages"][m].get("weight", 1) for m in spans}
    known = np.zeros(len(ids), bool)
    for m, span in spans.items():
        if m < trained_from: continue
        if span is None:
            assert weight[m] == 0
            continue
        first, end = span
        known[first:end] = True
        assert mask[first:end].all() and ids[end - 1] in stop(f) and (weights[first:end] == np.float32(weight[m])).all()
    if all(s for m, s in spans.items() if m >= trained_from): assert not (mask & ~known).any()
    assert (mask & (weights > 0)).any() and got["row_weight"] == row["weight"]
    asked = np.cumsum([0, *(m["role"] == "assistant" for m in row["messages"])])
    assert asked[-1] == len(spans)


def check_dropped(f, row, got):
    "A row is dropped for what the slow way finds too"
    t, reason = family(f), got["reason"]
    trained = [m for m, x in enumerate(row["messages"]) if x["role"] == "assistant" and x.get("weight", 1)]
    if reason.startswith("weight:"): assert not trained or row["weight"] == 0
    elif reason == "generation prompt": assert any(slow(f, row)[1][m] is None for m in trained)
    elif reason in ("template", "unsupported_roles"):
        thinks = any(x.get("reasoning_content") for x in row["messages"])
        try: assert thinks or not render(t, plain(row["messages"]), tools=row["tools"], **row["chat_template_kwargs"])
        except Exception as e: assert not isinstance(e, AssertionError), (f, got)
    elif reason in ("malformed: a message holds two different texts as its thought", "malformed: a thought begins with <think> and has no </think>"):
        assert any("think>" in (x["content"] or "") for x in row["messages"])
    elif reason == "unverifiable":
        asked = [x["content"] for x in row["messages"] if x["role"] == "user"]
        if f == "mistral7" and len(set(asked)) < len(asked): return  # its template compares messages: tools stand before each question that equals the last
        assert any("think" in x["content"] for x in row["messages"]) and "think" in got["detail"], (f, got)
    else: raise AssertionError((f, got))


@some
@given(batches())
def test_kept_rows_are_what_transformers_renders(batch):
    f, rows = batch
    for row, got in zip(rows, tokens(f, rows)):
        if got["reason"]: check_dropped(f, row, got)
        else: check_kept(f, row, got)


@some
@given(batches())
def test_one_row_of_each_turn_is_what_inference_sees(batch):
    f, rows = batch
    for got in tokens(f, rows, history="split"):
        i, _, n = got["row_id"].partition("#")
        asks = [m for m, x in enumerate(rows[int(i)]["messages"]) if x["role"] == "user"]
        begin = asks[int(n or 0)]
        end = (asks + [len(rows[int(i)]["messages"])])[int(n or 0) + 1]
        row = dict(rows[int(i)], messages=rows[int(i)]["messages"][:end])
        if got["reason"].startswith("malformed:"):  # of the whole conversation
            check_dropped(f, rows[int(i)], got)
            continue
        if not n: assert len(asks) == 1
        if not got["reason"]: check_kept(f, row, got, begin)
        elif not got["reason"].startswith("weight:"): check_dropped(f, row, got)


@some
@given(batches())
def test_a_row_does_not_depend_on_its_batch(batch):
    f, rows = batch
    together = tokens(f, rows)
    for i, row in enumerate(rows[:2]):
        alone, = tokens(f, [dict(row, messages=[dict(m) for m in row["messages"]])])
        for key in ("input_ids", "completion_mask", "reason", "detail"): assert alone[key] == together[i][key]
