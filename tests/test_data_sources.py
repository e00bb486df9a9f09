"Rows from files to messages: nothing changed on the way, every fault counted under its reason or refused with its place, killed saves never read."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.core.files import UserError
from post_training.data.io import load_rows, load_splits, read_json_exactly, save_rows
from post_training.data.messages import ROLE_CHECKS, MalformedRow, UnsupportedContent, to_messages
from post_training.data.swissai import (
    as_messages, format_tools, linearise_branch, linearise_dataset, plain_messages, to_structured, texts_only, tool_list)

disable_progress_bars()
GOLDEN = json.loads((Path(__file__).parent / "golden" / "linearise.json").read_text())
ROWS, EXPECTED = GOLDEN["samples"], GOLDEN["expected"]
GOOD = {k: v["messages"] for k, v in EXPECTED.items() if "messages" in v}
HI = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello!")]


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def saved(data, folder, kind):
    where = folder / dict(folder="data", jsonl="data.jsonl", parquet="data.parquet")[kind]
    return load_rows(save_rows(data, where))


# -- files

@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_linearised_rows_survive_saving(kind, tmp_path):
    "The messages of every golden row, through Arrow and a file, are the golden messages"
    data, counts = as_messages(read_json_exactly([str(lines(tmp_path / "rows.jsonl", ROWS.values()))]))
    assert counts["in"] == len(ROWS) and counts["out"] == len(GOOD)
    assert counts["dropped"] == {v["malformed"]: 1 for v in EXPECTED.values() if "malformed" in v}
    assert counts["examples"] == {v["malformed"]: ROWS[k]["conversation_id"] for k, v in EXPECTED.items() if "malformed" in v}
    back = saved(data, tmp_path, kind)
    assert [to_messages(r) for r in back] == list(GOOD.values())
    again, counts = as_messages(back)
    assert [to_messages(r) for r in again] == list(GOOD.values()) and not counts["dropped"]


@pytest.mark.parametrize("rows", [
    [dict(id=1, b=[dict(t="x", m=None), dict(t="y", m=None)])],
    [dict(b=[dict(t="x", m=None, l=[None], tools=i or "none"), dict(t="y", m=None, l=None, tools=None)], n=None) for i in range(3)],
    [dict(tools=[dict(name="f", parameters=dict(a=1))], b=[dict(m=[dict(c=None)] * 2)], c=i) for i in range(1001)]], ids=["alone", "beside kinds", "beside tools"])
def test_fields_that_are_always_null(rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = load_rows(tmp_path / "rows.json")
    assert data.to_list() == rows and saved(data, tmp_path, "folder").to_list() == rows
    assert read_json_exactly([str(lines(tmp_path / "rows.jsonl", rows))]).to_list() == rows


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_raw_rows_survive_saving(kind, tmp_path):
    "Golden rows as they come, read and saved, linearise to the golden messages; the order of a tool's properties stays"
    data = load_rows(lines(tmp_path / "rows.jsonl", ROWS.values()))
    back = saved(data, tmp_path, kind)
    for row, want in zip(back, EXPECTED.values()):
        if "messages" in want: assert linearise_branch(row) == want["messages"]


value = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["42", "null", "true", "{}", "[1]", '"q"', "2024-05-01", "1e3"]),
                     lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "type", "text"]), v, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict(text=st.text(st.characters(codec="utf-8")), args=st.dictionaries(st.sampled_from("abc"), value))), min_size=1, max_size=4))
def test_json_is_read_exactly(tmp_path_factory, rows):
    "Texts that look like numbers, dates or JSON stay texts; free objects keep their keys and the order of these"
    path = lines(tmp_path_factory.mktemp("json") / "rows.jsonl", rows)
    got = load_rows(path).to_list()
    assert got == rows and [list(r["args"]) for r in got] == [list(r["args"]) for r in rows]
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    assert load_rows(path.with_suffix(".json")).to_list() == rows


def test_texts_stay_texts(tmp_path):
    "Contents in two forms, days in every row: what the quick reader would turn into numbers, nothing and dates"
    texts = ["42", "null", "true", "2024-05-01", '{"a": 1}', '"q"']
    rows = [dict(messages=[dict(role="user", content=t), dict(role="assistant", content=t)]) for t in texts]
    rows.append(dict(messages=[dict(role="user", content=[dict(type="text", text="a"), dict(type="text", text="b")]), dict(role="assistant", content="c")]))
    data, counts = as_messages(load_rows(lines(tmp_path / "mixed.jsonl", rows)))
    assert [m[0]["content"] for m in data["messages"]] == [*texts, "ab"] and not counts["dropped"]
    days = load_rows(lines(tmp_path / "days.jsonl", [dict(question="When?", answer="2024-05-01"), dict(question="Then?", answer="2024-05-02T01:02:03")]))
    assert days["answer"][:] == ["2024-05-01", "2024-05-02T01:02:03"]


def test_columns_that_stay_are_not_touched(tmp_path):
    "A column of several kinds goes through conversion and saving as it is"
    rows = [dict(question="q", answer="a", extra=e) for e in ("42", ["x"], None, {"b": None, "a": "null"})]
    data, _ = as_messages(load_rows(lines(tmp_path / "rows.jsonl", rows)).select([3, 2, 1, 0]))
    for kind in ("folder", "jsonl", "parquet"): assert [r["extra"] for r in saved(data, tmp_path, kind)] == [r["extra"] for r in rows[::-1]]


BAD_FILES = {
    "nothing in it": ("rows.jsonl", b"", "is empty"),
    "blank lines": ("rows.jsonl", b"\n\n", "there are no rows"),
    "empty list": ("rows.json", b"[]", "there are no rows"),
    "not JSON": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": }\n', "line 2: it is not JSON"),
    "cut short": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "a", "ans', "line 2: it is not JSON"),
    "list cut short": ("rows.json", b'[{"question": "a"}, {"ques', "rows.json: it is not JSON"),
    "not objects": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n"c"\n', "line 2: it is not an object"),
    "list of texts": ("rows.json", b'["a", "b"]', "row 1: it is not an object"),
    "lone surrogate": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n\n{"question": "a", "answer": "\\ud800"}\n', "line 3: a lone surrogate"),
    "lone surrogate among parts": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [{"role": "user", "content": ["\\udfff"]}]}\n', "line 2: a lone surrogate"),
    "lone surrogate in a list": ("rows.json", b'[{"question": "\\ud800"}]', "a lone surrogate"),
    "NUL byte": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "a", "answer": "\0"}\n', "line 2: it is not JSON"),
    "not UTF-8": ("rows.jsonl", '{"question": "\u00e9"}\n'.encode("latin-1"), "line 1: it is not UTF-8"),
    "key twice": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "a", "answer": "b", "answer": "c"}\n', "line 2: the key 'answer' occurs twice"),
    "parquet cut short": ("rows.parquet", b"PAR1\0\0", "rows.parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_place(case, tmp_path, capfd):
    name, content, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e: load_rows(tmp_path / name)
    assert words in str(e.value) and name in str(e.value), str(e.value)
    assert "rror" not in capfd.readouterr().err


def test_an_answer_that_is_no_text_is_dropped_by_name(tmp_path):
    "A column of two types is read; the row whose answer is a number is counted, whatever its line"
    data = load_rows(lines(tmp_path / "rows.jsonl", [dict(question="a", answer="b"), dict(question="a", answer=5)]))
    assert data["answer"][:] == ["b", 5]
    kept, counts = as_messages(data)
    assert (len(kept), counts["in"], sum(counts["dropped"].values())) == (1, 2, 1) and "content" in "".join(counts["dropped"])
    with pytest.raises(UserError, match="Row 1: "): as_messages(data, on_malformed="error")


def test_columns_of_one_row_only_are_none_in_the_others(tmp_path):
    "Rows of two formats in one file: each is read by its own format; a row of neither is counted"
    rows = [dict(messages=HI), dict(question="a", answer="b"), dict(question="a")]
    data, counts = as_messages(load_rows(lines(tmp_path / "rows.jsonl", rows)))
    assert (counts["in"], counts["out"], sum(counts["dropped"].values())) == (3, 2, 1) and len(data) == 2


def test_splits_and_files(tmp_path):
    one, two = Dataset.from_list([dict(a=1)]), Dataset.from_list([dict(a=2), dict(a=3)])
    for where, data in dict(dict=dict(train=one, test=two), dictionary=DatasetDict(train=one, test=two)).items():
        assert {k: len(v) for k, v in load_splits(save_rows(data, tmp_path / where)).items()} == dict(train=1, test=2)
        assert load_rows(tmp_path / where, "test")["a"][:] == [2, 3]
    assert {k: len(v) for k, v in load_splits(save_rows(two, tmp_path / "one")).items()} == dict(train=2)
    save_rows(Dataset.from_list([dict(a=4)]), tmp_path / "files" / "states.jsonl")
    save_rows(two, tmp_path / "files" / "train-00000-of-00001.parquet")
    assert {k: v["a"][:] for k, v in load_splits(tmp_path / "files").items()} == dict(states=[4], train=[2, 3])
    save_rows(two, tmp_path / "snapshot" / "data" / "test-00000-of-00001.parquet")
    assert list(load_splits(tmp_path / "snapshot")) == ["test"]
    for split in ("tests", "validation"):
        with pytest.raises(UserError, match="it has train"): load_rows(tmp_path / "one", split)


def test_saving_never_destroys(tmp_path):
    data = Dataset.from_list([dict(a=1)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not a saved dataset"): save_rows(data, tmp_path / "mine", replace=True)
    for name in ("out", "out.jsonl", "out.parquet"):
        save_rows(data, tmp_path / name)
        with pytest.raises(UserError, match="exists already"): save_rows(data, tmp_path / name)
        save_rows(Dataset.from_list([dict(a=2)]), tmp_path / name, replace=True)
        assert load_rows(tmp_path / name)["a"][:] == [2]
    with pytest.raises(UserError, match="several splits"): save_rows(dict(a=data, b=data), tmp_path / "two.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "out.jsonl", "out.parquet"]


KILLED = """
import sys
from datasets import Dataset, disable_progress_bars
from post_training.data.io import save_rows
disable_progress_bars()
data = Dataset.from_dict(dict(text=["x" * 1000] * 300_000))
print("ready", flush=True)
save_rows(dict(train=data, test=data), sys.argv[1]) if sys.argv[1].endswith("data") else save_rows(data, sys.argv[1])
print("saved", flush=True)
"""


@pytest.mark.parametrize("name", ["data", "data.jsonl", "data.parquet"])
def test_killed_save_is_no_dataset(name, tmp_path):
    "kill -9 in the middle of a save: there is no dataset, and what is left behind is not taken for one; the next save works"
    p = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ready\n"
    deadline = time.time() + 60
    while not [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size > 0] and time.time() < deadline: time.sleep(0.001)
    p.send_signal(signal.SIGKILL)
    assert "saved" not in p.stdout.read() and p.wait() == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert left and not (tmp_path / name).exists() and all(f.name.startswith(".") for f in left)
    with pytest.raises(UserError, match="There is no dataset"): load_rows(tmp_path / name)
    with pytest.raises(UserError): load_rows(tmp_path)
    with pytest.raises(UserError): load_rows(f"{tmp_path}/*")
    if left[0].is_dir():
        with pytest.raises(UserError, match="not a complete dataset"): load_rows(left[0], "train")
    save_rows(Dataset.from_list([dict(a=1)]), tmp_path / name)
    assert load_rows(tmp_path / name)["a"][:] == [1]


# -- rows

ASK = dict(role="user", content="Weather in Bern?")
CALL = dict(id="c1", type="function", function=dict(name="get_weather", arguments='{"city": "Bern"}'))
CALLS = dict(role="assistant", content=None, tool_calls=[CALL])
OUTPUT = dict(role="tool", tool_call_id="c1", content='{"temp": 3}')
SAY = dict(role="assistant", content="It is 3 C.")
TOOL = dict(name="get_weather", description="Weather", parameters=dict(type="object", properties=dict(city=dict(type="string")), required=["city"]))

BAD_ROWS = {  # what is wrong: (row, reason it is counted under)
    "no messages": (dict(messages=[]), "no messages"),
    "messages missing": (dict(messages=None), "no messages"),
    "no content": (dict(messages=[dict(role="user", content=None), SAY]), "user message without content"),
    "no answer text": (dict(messages=[ASK, dict(role="assistant", content=None)]), "assistant message without content"),
    "empty content": (dict(messages=[dict(role="user", content=""), SAY]), "empty user message"),
    "blank answer": (dict(messages=[ASK, dict(role="assistant", content=" \n\t")]), "empty assistant message"),
    "no system text": (dict(messages=[dict(role="system", content=None), ASK, SAY]), "system message without content"),
    "unknown role": (dict(messages=[ASK, dict(role="ghost", content="Boo")]), "unknown role 'ghost'"),
    "no role": (dict(messages=[ASK, dict(role=None, content="Boo")]), "a message without role and from; its keys are content"),
    "no answer": (dict(messages=[ASK]), "no assistant message"),
    "NUL": (dict(messages=[ASK, dict(role="assistant", content="a\0b")]), "text with a NUL character"),
    "lone surrogate": (dict(messages=[ASK, dict(role="assistant", content="\udc00")]), "text with a lone surrogate"),
    "number": (dict(messages=[ASK, dict(role="assistant", content=5)]), "assistant message with a content that is not text"),
    "picture": (dict(messages=[dict(role="user", content=[dict(type="image_url", text=None)]), SAY]), "a content holds parts that are not text: image_url"),
    "not a mapping": (dict(messages=["Hi"]), "a message is not a mapping"),
    "two kinds": (dict(messages=[ASK, dict(role="assistant", content=dict(blocks=[dict(type="response", text="a")]))]), "plain and structured messages in one conversation"),
    "structured without parts": (dict(messages=[dict(role="user", content=dict(text="a")), dict(role="assistant", content=dict(blocks=[]))]), "a structured user message without parts"),
    "unknown speaker": (dict(conversations=[{"from": "ghost", "value": "Boo"}]), "unknown speaker 'ghost'"),
    "no turns": (dict(conversations=None), "no messages"),
    "no instruction": (dict(instruction=None, input="a", output="b"), "user message without content"),
    "no instances": (dict(instruction="a", instances=[]), "no instances"),
    "no prompt": (dict(chosen="a", rejected="b"), "chosen is a text and there is no prompt"),
    "tools are not JSON": (dict(messages=[ASK, CALLS, OUTPUT, SAY], tools="[{"), "the tools are not JSON"),
    "tools are no list": (dict(messages=[ASK, SAY], tools='{"a": 1}'), "the tools are not a list"),
    "tool without a name": (dict(messages=[ASK, SAY], tools=[dict(description="x")]), "a tool without a name"),
    "schema is not JSON": (dict(messages=[ASK, SAY], tools=[dict(TOOL, parameters='{"type"')]), "the parameters of a tool are not JSON"),
    "schema is a list": (dict(messages=[ASK, SAY], tools=[dict(TOOL, parameters="[1]")]), "the parameters of a tool are not an object"),
    "properties are not JSON": (dict(messages=[ASK, SAY], tools=[dict(TOOL, parameters=dict(properties="{"))]), "the properties of a tool are not JSON"),
    "arguments are not JSON": (dict(messages=[ASK, dict(CALLS, tool_calls=[dict(function=dict(name="f", arguments="city: Bern"))]), OUTPUT]), "the arguments of a tool call are not JSON"),
    "call without a name": (dict(messages=[ASK, dict(CALLS, tool_calls=[dict(function=dict(name=None, arguments="{}"))]), OUTPUT]), "a tool call without a name"),
    "call without output": (dict(messages=[ASK, CALLS, ASK, SAY]), "a tool call is followed by the end of the turn with no tool output in between"),
    "output without call": (dict(messages=[ASK, OUTPUT, SAY]), "the tool_call_id of a result is the id of no call before it"),
    "output of another call": (dict(messages=[ASK, CALLS, dict(OUTPUT, tool_call_id="c2"), SAY]), "the tool_call_id of a result is the id of no call before it"),
    "half the outputs": (dict(messages=[ASK, dict(CALLS, tool_calls=[CALL, dict(CALL, id="c2")]), OUTPUT, SAY]), "2 tool calls have 1 tool output(s)"),
    "late system": (dict(messages=[ASK, SAY, dict(role="system", content="a")]), "a system message that is not the first has no structured form"),
    "developer": (dict(messages=[dict(role="developer", content="a"), ASK, SAY]), "a plain developer message has no structured form"),
    "no branches": (dict(conversation_branches=[], initial_prompt=dict(content="a")), "there is no branch 0: the row has 0"),
    "no initial prompt": (dict(conversation_branches=[dict(messages=[])], initial_prompt=None), "there is no initial prompt"),
    "empty initial prompt": (dict(conversation_branches=[dict(messages=[])], initial_prompt=dict(content="")), "empty user message"),
    "initial prompt without text": (dict(conversation_branches=[dict(messages=[])], initial_prompt=dict(content=None)), "user message without content"),
    "nobody answers": (dict(conversation_branches=[dict(messages=[])], initial_prompt=dict(content="a")), "no assistant message"),
    "no parts": (dict(conversation_branches=[dict(messages=[dict(role="assistant", parts=[])])], initial_prompt=dict(content="a")), "empty assistant message"),
    "unknown part": (dict(conversation_branches=[dict(messages=[dict(role="assistant", parts=[dict(type="poem", content="a")])])], initial_prompt=dict(content="a")), "unknown part type 'poem'"),
    "role in a branch": (dict(conversation_branches=[dict(messages=[dict(role="system", parts=[])])], initial_prompt=dict(content="a")), "unknown role 'system' in a branch"),
}


class Rows:
    "What conversion needs of a dataset, around rows that Arrow cannot hold"
    def __init__(self, row): self.row = row

    def convert(self, on_malformed):
        from post_training.data.messages import format_of
        from post_training.data.swissai import convert_batch, is_swissai
        columns = None if is_swissai(self.row) else format_of(self.row)
        return convert_batch({k: [v] for k, v in self.row.items()}, [7], columns, True, [], on_malformed)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_counted_or_refused_with_its_id(case):
    row, reason = BAD_ROWS[case]
    assert Rows(row).convert("drop")["_fault"] == [reason]
    with pytest.raises(UserError) as e: Rows(row | dict(id="row-1")).convert("error")
    assert str(e.value).startswith(f"Row row-1: {reason}.")
    try: data = Dataset.from_list([dict(row, id="row-1")])
    except Exception: return  # what Arrow cannot hold does not come from a file either
    _, counts = as_messages(data, blocks=True)
    assert counts == {"in": 1, "out": 0, "dropped": {reason: 1}, "examples": {reason: "row-1"}}
    with pytest.raises(UserError, match="Row row-1: "): as_messages(data, blocks=True, on_malformed="error")


def test_counts_add_up(tmp_path):
    "Bad rows among good ones, from a file, on one process and on two: what is kept is what was good, in order"
    bad = [row["messages"] for name, (row, _) in BAD_ROWS.items() if list(row) == ["messages"] and name not in ("lone surrogate", "not a mapping", "tools")]
    rows = [dict(id=f"r{i}", messages=m) for i, m in enumerate([HI, *bad, HI, [*HI, *HI]])]
    data = load_rows(lines(tmp_path / "rows.jsonl", rows))
    for n in (None, 2):
        kept, counts = as_messages(data, blocks=True, num_proc=n)
        assert counts["in"] == len(rows) == counts["out"] + sum(counts["dropped"].values()) and counts["out"] == len(kept) == 3
        assert kept["id"][:] == ["r0", rows[-2]["id"], rows[-1]["id"]]
        assert all(rows[int(i[1:])]["messages"] in bad for i in counts["examples"].values())


def test_columns_that_name_no_format():
    with pytest.raises(UserError, match="the dataset has label, text. Known formats: messages; conversations;"): as_messages(Dataset.from_list([dict(text="a", label=1)]))


def test_a_very_long_message(tmp_path):
    "Ten million characters go through file, conversion and saving"
    text = "long 😀 " * 1_500_000
    data, counts = as_messages(load_rows(lines(tmp_path / "rows.jsonl", [dict(question="a", answer=text)])), blocks=True)
    save_rows(data, tmp_path / "saved")
    assert plain_messages(to_messages(load_from_disk(str(tmp_path / "saved"))[0]))[1]["content"] == text


def test_which_columns_go():
    "Those that became messages; all others stay"
    rows = {
        "instruction": dict(instruction="a", input="b", output="c", id=1), "question": dict(system_prompt="a", question="b", response="c", id=1),
        "chosen": dict(prompt="a", chosen="b", rejected="c", id=1), "messages": dict(messages=HI, prompt="a", tools="[]"),
        "branches": dict(conversation_branches=[dict(messages=[dict(role="assistant", parts=[dict(type="response", content="a")])])], initial_prompt=dict(content="a"),
                         system_prompt=None, available_functions=None, conversation_id="x", language="en")}
    left = {k: as_messages(Dataset.from_list([r]))[0].column_names for k, r in rows.items()}
    assert left == dict(instruction=["id", "messages"], question=["id", "messages"], chosen=["id", "messages"], messages=["prompt", "tools", "messages"],
                        branches=["conversation_id", "language", "messages"])
    assert as_messages(Dataset.from_list([rows["messages"]]), blocks=True)[0].column_names == ["prompt", "messages"]


def test_checks_filter(tmp_path):
    data = Dataset.from_list([dict(messages=HI), dict(messages=[HI[0], *HI]), dict(messages=[*HI, HI[0]]), dict(messages=[*HI, dict(role="system", content="a")])])
    reasons = dict(alternation=["roles do not alternate: user after user", "roles do not alternate: system after assistant"],
                   system_first=["a system message is not the first message"],
                   ends_with_assistant=["the last message is the user's", "the last message is the system's"])
    for name in ROLE_CHECKS: assert list(as_messages(data, checks=[name])[1]["dropped"]) == reasons[name]
    assert as_messages(data, checks=ROLE_CHECKS)[1]["out"] == 1


# -- tools and structure

PARAMETERS = [  # JSON schema of a parameter, its declaration
    (dict(type="object", properties=dict(a=dict(type="object", properties=dict(b=dict(type="array", items=dict(type="string"))), required=["b"]))),
     "p: {\na?: \n                {\nb: \n                string[]}}"),
    (dict(type="object", properties={}), "p: object"),
    (dict(type="array", items=dict(type="array", items=dict(type="array", items=dict(type="integer")))), "p: number[][][]"),
    (dict(type="array", items=dict(type="object", properties=dict(k=dict(type="string")))), "p: {\nk?: \n                string}[]"),
    (dict(type="array", items=dict(type="object", properties=dict(a=dict(type="string"), b=dict(type="number")))), "p: any[]"),
    (dict(type="array", items=dict(oneOf=[dict(type="string"), dict(type="number")])), "p: string | \nnumber[]"),
    (dict(type="array", items=dict(type=["object", "object"]), nullable=True), "p: any[] | null"),
    (dict(type="array", items=dict(type="string", enum=["a", "b"])), "p: string[]"),
    (dict(type="array"), "p: any[]"),
    (dict(type="array", items=dict(type="array", items=dict(type="boolean"), nullable=True)), "p: boolean[] | null[]"),
    (dict(type="string", enum=["a", 1, None], default="a"), 'p: "a" | "1" | "None", // default: a'),
    (dict(type="integer", enum=[1, 2], default=2), "p: number, // default: 2"),
    (dict(enum=["a"], default="a"), "p: any, // default: a"),
    (dict(oneOf=[dict(type="string", description="name", default="x"), dict(type="object", properties=dict(a=dict(type="integer")))], default="y"),
     'p: string// name                    // default: "x" | \n{\na?: \n                number}// default: y'),
    (dict(type=["string", "null"], default=None), "p: string | null, // default: null"),
    (dict(type=["integer"]), "p: integer"),
    (dict(type="string", nullable=True, description="why"), "// why\np: string | null"),
    (dict(type="number", nullable=True), "p: number"),
    (dict(type="boolean", default=False), "p: boolean, // default: false"),
    (dict(type="string", default="a\"é"), 'p: string, // default: "a\\"é"'),
    (dict(type="object", default=dict(a=[1, None])), 'p: object, // default: {"a": [1, null]}'),
    (dict(type="array", default=[]), "p: any[], // default: []"),
    (dict(type="number", default=1e-05), "p: number, // default: 1e-05"),
    (dict(type="file"), "p: any"), (dict(type=None), "p: any"), ({}, "p: any"), (dict(anyOf=[dict(type="string")]), "p: any"),
]


@pytest.mark.parametrize("spec, want", PARAMETERS, ids=range(len(PARAMETERS)))
def test_tools_are_laid_out_to_the_character(spec, want):
    tool = dict(name="f", description="d", parameters=dict(type="object", required=["p"], properties=dict(p=spec)))
    forms = [[dict(tool, parameters=json.dumps(tool["parameters"]))], json.dumps([tool]), json.dumps([dict(type="function", function=tool)])]
    if "null" not in want: forms.append([tool])
    for tools in forms: assert format_tools(tool_list(tools)) == f"// d\ntype f = (_: {{\n{want}\n}}) => any;"


def test_tools_that_arrow_filled():
    "Objects that Arrow gave each other's keys are the tools that were written"
    tools = [TOOL, dict(name="add", description="", parameters=dict(type="object", properties=dict(values=dict(type="array", items=dict(type="number"))))), dict(name="ping", description="Nothing", parameters=None)]
    filled = Dataset.from_list([dict(tools=tools)])[0]["tools"]
    assert filled != tools and tool_list(filled) == tool_list(json.dumps(tools))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)
exchange = st.tuples(st.one_of(st.none(), texts), st.one_of(st.none(), texts), st.lists(st.tuples(texts, st.dictionaries(texts, value.filter(lambda v: v is not None), max_size=2), texts), max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.none(), texts), st.lists(st.tuples(texts, st.lists(exchange, max_size=2), texts), min_size=1, max_size=3), st.randoms())
def test_two_ways_to_write_a_conversation(system, turns, random):
    "The same thoughts, calls and outputs in OpenAI's messages and in a Swiss-AI row become the same structured messages"
    messages, branch = [dict(role="system", content=system)] if system else [], []
    for ask, steps, say in turns:
        messages.append(dict(role="user", content=ask))
        parts = []
        for thought, said, calls in steps:
            if not calls: continue
            ids = [f"c{i}" for i in range(len(calls))]
            messages.append(dict(role="assistant", content=said, reasoning_content=thought, tool_calls=[
                dict(id=c, type="function", function=dict(name=name, arguments=json.dumps(args))) for c, (name, args, _) in zip(ids, calls)]))
            messages += random.sample([dict(role="tool", tool_call_id=c, content=out) for c, (_, _, out) in zip(ids, calls)], len(calls))
            parts += [dict(type="thought", content=thought)]*bool(thought) + [dict(type="response", content=said)]*bool(said)
            parts += [dict(type="function-call", name=name, args=json.dumps(args)) for name, args, _ in calls] + [dict(type="function-output", content=out) for _, _, out in calls]
        messages.append(dict(role="assistant", content=say))
        branch += [dict(role="user", parts=[dict(type="response", content=ask)]), dict(role="assistant", parts=[*parts, dict(type="response", content=say)])]
    row = dict(system_prompt=system and dict(content=system), initial_prompt=dict(content=branch[0]["parts"][0]["content"]), available_functions=[TOOL], conversation_branches=[dict(messages=branch[1:])])
    want = linearise_branch(row)
    assert to_structured(messages, [dict(type="function", function=TOOL)]) == want
    if any(c for _, steps, _ in turns for _, _, c in steps):
        with pytest.raises(UnsupportedContent): plain_messages(want)
        with pytest.raises(UnsupportedContent): texts_only(messages)
    shown = plain_messages(want, show=True)
    assert [m["content"].split("\n")[-1] for m in shown if m["role"] == "assistant"] == [say.split("\n")[-1] for _, _, say in turns]


def test_branches_become_rows():
    branch = lambda text: dict(messages=[dict(role="assistant", parts=[dict(type="response", content=text)])])
    row = lambda i, *answers: dict(conversation_id=i, system_prompt=None, available_functions="[]", initial_prompt=dict(content="Hi"), conversation_branches=[*map(branch, answers)], language="en")
    data = Dataset.from_list([row("a", "1", "2"), row("b"), row("c", "3", ""), row(None, "4")])
    got, counts = linearise_dataset(data, branches="all")
    assert got["conversation_id"][:] == ["a/0", "a/1", "c/0", "3/0"]
    assert [plain_messages(to_messages(r))[1]["content"] for r in got] == ["1", "2", "3", "4"]
    assert counts == {"in": 6, "out": 4, "dropped": {"there is no branch 0: the row has 0": 1, "empty assistant message": 1},
                      "examples": {"there is no branch 0: the row has 0": "b/0", "empty assistant message": "c/1"}}
    first, counts = linearise_dataset(data)
    assert first["conversation_id"][:] == ["a", "c", None] and first.column_names == ["conversation_id", "language", "messages"] and counts["in"] == 4
    with pytest.raises(MalformedRow): linearise_branch(data[1])


REAL = dict(gsm8k_train=7473, gsm8k_test=1319, instruction_seed_tasks=175, sharegpt_conversations=500)


@pytest.mark.parametrize("name", REAL)
def test_real_rows(name, data_dir, tmp_path):
    "Every row of the real files becomes messages, plain and structured, and comes back from disk as it was"
    path = next(data_dir.glob(f"{name}.json*"))
    raw = [json.loads(line) for line in path.open()] if path.suffix == ".jsonl" else json.loads(path.read_text())
    data = load_rows(path)
    assert len(data) == len(raw) == REAL[name] and data[-1] == raw[-1]
    plain, counts = as_messages(data)
    blocks, _ = as_messages(data, blocks=True)
    assert counts["out"] == len(plain) == len(blocks) == len(raw) and not counts["dropped"]
    back = load_rows(save_rows(dict(train=blocks), tmp_path / "saved"), "train")
    for a, b, r in zip(plain, back, raw): assert plain_messages(to_messages(b)) == a["messages"] == to_messages(r)
