"Rows from files to messages: nothing changed on the way, every fault counted under its reason or refused with its place, killed saves never read."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.base import UserError
from post_training.data.io import load_rows, load_splits, read_files, read_json, save_rows
from post_training.data.messages import CHECKS, FORMATS, MalformedRow, UnsupportedContent, check_messages, to_messages
from post_training.data.swissai import as_messages, format_tools, linearise, linearise_dataset, plain_messages, structured, tool_list

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
    data, counts = as_messages(read_json([str(lines(tmp_path / "rows.jsonl", ROWS.values()))]))
    assert counts["in"] == len(ROWS) and counts["out"] == len(GOOD)
    assert counts["dropped"] == {v["malformed"]: 1 for v in EXPECTED.values() if "malformed" in v}
    assert counts["examples"] == {v["malformed"]: ROWS[k]["conversation_id"] for k, v in EXPECTED.items() if "malformed" in v}
    back = saved(data, tmp_path, kind)
    assert [to_messages(r) for r in back] == list(GOOD.values())
    again, counts = as_messages(back)
    assert [to_messages(r) for r in again] == list(GOOD.values()) and not counts["dropped"]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_raw_rows_survive_saving(kind, tmp_path):
    "Golden rows as they come, read and saved, linearise to the golden messages; the order of a tool's properties stays"
    data = load_rows(lines(tmp_path / "rows.jsonl", ROWS.values()))
    back = saved(data, tmp_path, kind)
    for row, want in zip(back, EXPECTED.values()):
        if "messages" in want: assert linearise(row) == want["messages"]


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
    "two types in a column": ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "a", "answer": 5}\n', "line 2: column 'answer' is a number there, and a text in"),
    "parquet cut short": ("rows.parquet", b"PAR1\0\0", "rows.parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_place(case, tmp_path, capfd):
    name, content, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e: load_rows(tmp_path / name)
    assert words in str(e.value) and name in str(e.value), str(e.value)
    assert "rror" not in capfd.readouterr().err


def test_columns_of_one_row_only_are_none_in_the_others(tmp_path):
    "Rows of two formats in one file: the rows without the chosen columns are counted"
    rows = [dict(messages=HI), dict(question="a", answer="b")]
    data, counts = as_messages(load_rows(lines(tmp_path / "rows.jsonl", rows)))
    assert counts == {"in": 2, "out": 1, "dropped": {"no messages": 1}, "examples": {"no messages": "1"}}


def test_splits_and_files(tmp_path):
    one, two = Dataset.from_list([dict(a=1)]), Dataset.from_list([dict(a=2), dict(a=3)])
    for where, data in dict(dict=dict(train=one, test=two), dictionary=DatasetDict(train=one, test=two)).items():
        assert {k: len(v) for k, v in load_splits(save_rows(data, tmp_path / where)).items()} == dict(train=1, test=2)
        assert load_rows(tmp_path / where, "test")["a"][:] == [2, 3]
    assert {k: len(v) for k, v in load_splits(save_rows(two, tmp_path / "one")).items()} == dict(train=2)
    lines(tmp_path / "files" / "x.jsonl" if (tmp_path / "files").mkdir() else tmp_path / "files" / "states.jsonl", [dict(a=4)])
    save_rows(two, tmp_path / "files" / "train-00000-of-00001.parquet")
    assert {k: v["a"][:] for k, v in load_splits(tmp_path / "files").items()} == dict(states=[4], train=[2, 3])
    two.to_parquet(tmp_path / "snapshot" / "data" / "test-00000-of-00001.parquet") if (tmp_path / "snapshot" / "data").mkdir(parents=True) is None else None
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
        with pytest.raises(UserError, match="not a whole dataset"): load_rows(left[0], "train")
    save_rows(Dataset.from_list([dict(a=1)]), tmp_path / name)
    assert load_rows(tmp_path / name)["a"][:] == [1]
