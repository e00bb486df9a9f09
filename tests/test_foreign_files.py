"Files as other people and programs write them: read exactly, or refused with the file, the line and what to do."
import json
import random
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Json, Value, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.core.files import UserError
from post_training.data.io import load_rows, load_splits, read_files, reading_notes, save_rows, write_json_rows
from post_training.data.split import count_both_sides, group_keys, stratified_split
from post_training.data.swissai import as_messages

disable_progress_bars()
FOREIGN = Path(__file__).parent / "golden" / "foreign" / "data"
HI = [dict(role="user", content="Hello there"), dict(role="assistant", content="Hi.")]
SUMS = [[dict(role="user", content=f"What is {i}+{i}?"), dict(role="assistant", content=f"It is {2 * i}.")] for i in range(40)]


def lines(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def raw(name):
    "The rows of a golden file of JSON lines, by Python's own parser"
    files = sorted((FOREIGN / name).glob("*.jsonl")) if (FOREIGN / name).is_dir() else [FOREIGN / name]
    return [json.loads(line) for f in files for line in f.read_text("utf-8-sig").split("\n") if line.strip()]


def exact(rows):
    "Rows as text: 1, 1.0 and true differ"
    return [json.dumps(r, sort_keys=True, ensure_ascii=False) for r in rows]


def missing_as_none(rows):
    columns = dict.fromkeys(c for r in rows for c in r)
    return [{c: r.get(c) for c in columns} for r in rows]


# -- the golden files

@pytest.mark.parametrize("name", ["bom.jsonl", "crlf.jsonl", "nul.jsonl", "jl", "jl0", "id_kinds.jsonl", "scores_mixed.jsonl", "shards", "meta_bool.jsonl", "dup_ids.jsonl"])
def test_json_lines_are_read_exactly(name):
    want = missing_as_none(raw(name))
    assert want and exact(load_rows(FOREIGN / name).to_list()) == exact(want)


def test_line_separators_within_texts():
    "U+2028 and U+0085 end no line"
    want = [json.loads(line) for line in (FOREIGN / "u2028.jsonl").read_bytes().split(b"\n") if line]
    assert load_rows(FOREIGN / "u2028.jsonl").to_list() == want and "\u2028" in want[0]["messages"][0]["content"]


def test_numbers_that_are_none():
    data = load_rows(FOREIGN / "nan.jsonl")
    want = raw("nan.jsonl")
    assert [r["messages"] for r in data] == [r["messages"] for r in want] and repr(data["score"][:]) == repr([r["score"] for r in want])


@pytest.mark.parametrize("name", ["array.json", "pretty.jsonl"])
def test_other_layouts_of_json(name):
    text = (FOREIGN / name).read_text()
    want = json.loads(text) if name == "array.json" else json.loads("[" + text.replace("\n}\n{", "\n},{") + "]")
    assert len(want) == 10 and load_rows(FOREIGN / name).to_list() == want


def test_rows_inside_an_object_are_not_guessed():
    "One object is one row; converting it names the column that there is"
    data = load_rows(FOREIGN / "wrapped.json")
    assert len(data) == 1 and len(data[0]["data"]) == 10
    with pytest.raises(UserError, match="the dataset has data"): as_messages(data)


@pytest.mark.parametrize("name, words", [
    ("utf16.jsonl", "line 1: it is not UTF-8 .* save it as UTF-8"), ("latin1.jsonl", "line 1: it is not UTF-8"), ("trailing_comma.jsonl", "line 1: it is not JSON"),
    ("zero_rows.parquet", "there are no rows"), ("folder", r"several splits \(a, b\): name one")])
def test_refused_with_file_and_line(name, words):
    with pytest.raises(UserError, match=words) as e: load_rows(FOREIGN / name)
    assert name in str(e.value)


@pytest.mark.parametrize("name, note", [("id_kinds.jsonl", "id holds a text .*line 1.* and a number .*line 2"), ("scores_mixed.jsonl", "score holds a text .* and a number"),
                                        ("shards", "id holds a number .*00000-of.* and a text .*00001-of"), ("meta_bool.jsonl", "ok holds a text .* and a bool")])
def test_a_column_of_two_types_is_kept_and_said(name, note, capfd):
    import re
    import post_training.data.io as reader
    reader._NOTES_SAID.clear()
    data = load_rows(FOREIGN / name)
    assert [bool(re.search(note, n)) for n in reading_notes(data)] == [True]
    assert re.search(note, capfd.readouterr().err)
    kept, counts = as_messages(data)
    assert counts["out"] == len(data) and not counts["dropped"]
    column = note.split()[0]
    assert exact(kept.select_columns([column]).to_list()) == exact(data.select_columns([column]).to_list())


@pytest.mark.parametrize("name, rows, more", [
    ("spark", 20, {}), ("spark2", 20, {}), ("extra", 40, dict(n=[None] * 20 + [1] * 20)), ("two", 10, dict(extra=[None] * 5)), ("odd_columns.parquet", 20, {}),
    ("large_types.parquet", 20, {}), ("fixed_list.parquet", 20, {}), ("null_fields.parquet", 20, {})])
def test_parquet_is_read_like_the_same_rows_as_json(name, rows, more, tmp_path):
    files = sorted((FOREIGN / name).glob("*.parquet")) if (FOREIGN / name).is_dir() else [FOREIGN / name]
    want = missing_as_none([r for f in files for r in pq.read_table(f).to_pylist()])
    data = load_rows(FOREIGN / name)
    assert len(data) == rows
    plain = lambda ms: [{k: v for k, v in m.items() if v is not None} for m in ms]
    assert [plain(m) for m in data["messages"]] == [plain(r["messages"]) for r in want]
    for column, values in more.items(): assert data[column][:len(values)] == values[:len(data)] and data[column][:] == [r[column] for r in want]
    chats = lines(tmp_path / "same.jsonl", [dict(messages=plain(r["messages"])) for r in want])
    assert as_messages(data)[0]["messages"][:] == as_messages(load_rows(chats))[0]["messages"][:]
    assert not as_messages(data)[1]["dropped"]


def test_types_that_rows_do_not_know():
    "Maps are objects, decimals and times are themselves, an index of pandas is a column like others"
    row = load_rows(FOREIGN / "odd_columns.parquet")[0]
    assert row["meta"] == {"a": 1} and row["price"] == Decimal("1.20") and row["when"].year == 2024 and row["__index_level_0__"] == 0


@pytest.mark.parametrize("name", ["dictionary.parquet", "string_view.parquet", "binary.parquet"])
def test_texts_in_other_layouts(name):
    "Dictionaries, views and bytes that are text give texts; bytes are mentioned"
    data = load_rows(FOREIGN / name)
    assert data.features == Features(dict(prompt=Value("string"), completion=Value("string")))
    assert {(r["prompt"], r["completion"]) for r in data} == {("Hello there", "Hi.")} and len(data) == 20
    assert len(reading_notes(data)) == 2 * (name == "binary.parquet")
    assert [[m["content"] for m in ms] for ms in as_messages(data)[0]["messages"]] == [["Hello there", "Hi."]] * 20


def test_contents_in_parts():
    texts, images = (load_rows(FOREIGN / f"{n}_parts.parquet") for n in ("text", "image"))
    assert [m["content"] for m in as_messages(texts)[0][0]["messages"]] == ["Hello there", "Hi."]
    with_image, counts = as_messages(images)
    assert not len(with_image) and any("image" in reason for reason in counts["dropped"])


# -- parquet parts

def part(path, rows, schema=None):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def test_parts_in_any_order(tmp_path):
    "A further column, a further field, nulls only, texts and numbers, no rows, no columns: in each order the same rows"
    empty = pa.schema([("messages", pa.int8()), ("only_here", pa.string())])
    made = [dict(messages=HI, id="a", note=None), dict(messages=[dict(HI[0], name="Ann"), HI[1]], id=1, note="x"), dict(messages=HI, id=True, score=0.5, note=None)]
    files = [part(tmp_path / f"{i}.parquet", [r]) for i, r in enumerate(made)]
    files += [part(tmp_path / "empty.parquet", [], empty), part(tmp_path / "nothing.parquet", [], pa.schema([]))]
    want = [dict(id=r["id"], note=r["note"], score=r.get("score"), messages=[dict(m, name=m.get("name")) for m in r["messages"]]) for r in made]
    for seed in range(12):
        order = random.Random(seed).sample(files, len(files))
        got = read_files(order).to_list()
        assert exact(got) == exact([want[int(Path(f).stem)] for f in order if Path(f).stem.isdigit()])


def test_rows_of_no_part(tmp_path):
    files = [part(tmp_path / f"{i}.parquet", [], pa.schema([("a", pa.int8())])) for i in range(2)]
    with pytest.raises(UserError, match="0.parquet, .*1.parquet: there are no rows"): read_files(files)


def test_damaged_part_is_named(tmp_path):
    good, bad = part(tmp_path / "0.parquet", [dict(a="x" * 1000)]), tmp_path / "1.parquet"
    content = bytearray(Path(part(bad, [dict(a="y" * 1000)])).read_bytes())
    content[10:60] = b"\xff" * 50
    bad.write_bytes(content)
    with pytest.raises(UserError, match="Cannot read .*1.parquet"): read_files([good, str(bad)])
    bad.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="Cannot read .*1.parquet"): read_files([good, str(bad)])


def test_column_twice(tmp_path):
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="twice.parquet: the column a occurs twice"): load_rows(tmp_path / "twice.parquet")


def test_texts_that_are_not_utf8(tmp_path):
    "Bytes that a writer called text: kept as bytes where they are bytes, refused by name where they claim to be text"
    wrong = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table(dict(a=wrong)), tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match="wrong.parquet"): load_rows(tmp_path / "wrong.parquet")
    part(tmp_path / "bytes.parquet", [dict(a=b"\xff\xfe"), dict(a=b"text")])
    assert load_rows(tmp_path / "bytes.parquet")["a"][:] == [b"\xff\xfe", b"text"]


def test_labels_of_different_classes(tmp_path):
    "The same number is another class in another part: the names are kept"
    for i, names in enumerate((["no", "yes"], ["yes", "no"])):
        Dataset.from_dict(dict(a=[0, 1, -1])).cast_column("a", ClassLabel(names=names)).to_parquet(str(tmp_path / f"{i}.parquet"))
    assert read_files([str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")])["a"][:] == ["no", "yes", None, "yes", "no", None]
    assert read_files([str(tmp_path / "0.parquet")]).features["a"].names == ["no", "yes"]


scalar = st.none() | st.booleans() | st.integers(-2**63, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["", "1", "true", "null", "2024-05-01", "é\u2028"])
anything = st.recursive(scalar, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from("xy"), v, min_size=1, max_size=2), max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), anything, min_size=1, max_size=3), min_size=1, max_size=4))
def test_one_row_per_part_is_the_same_as_json_lines(tmp_path_factory, rows):
    "Values of any kind: parquet with a part for each row gives what JSON lines give, and these what was written"
    folder = tmp_path_factory.mktemp("parts")
    try: as_arrow = [exact(pa.Table.from_pylist([r]).to_pylist()) == exact([r]) for r in rows]
    except (pa.ArrowException, OverflowError): as_arrow = [False]  # a list of several kinds has no Arrow type
    files = [part(folder / f"{i}.parquet", [r]) for i, r in enumerate(rows)] if all(as_arrow) else None
    got = load_rows(lines(folder / "rows.jsonl", rows))
    if files: assert exact(read_files(files).to_list()) == exact(got.select_columns(sorted(got.column_names, key=[*missing_as_none(rows)[0]].index)).to_list())

    def same(read, written):
        "Fields that a row lacks are None; whole numbers may be floats of the same value next to fractions"
        if isinstance(written, dict): return isinstance(read, dict) and all(same(read.get(k), written.get(k)) for k in {*read, *written})
        if isinstance(written, list): return isinstance(read, list) and len(read) == len(written) and all(map(same, read, written))
        if isinstance(written, bool) or isinstance(read, bool): return read is written
        return read == written and (isinstance(read, str) == isinstance(written, str))
    assert all(map(same, got.to_list(), rows))


# -- JSON in pieces

@pytest.mark.parametrize("size", [64, 200, 10_000])
def test_pieces_are_joined_without_changing_values(size, tmp_path):
    "A reader that guesses each piece's types would turn later texts into numbers and dates, or the reverse"
    for rows in ([dict(id=str(i)) for i in range(40)] + [dict(id=i) for i in range(40)], [dict(id=i) for i in range(40)] + [dict(id="007")],
                 [dict(id=True)] * 40 + [dict(id=1)], [dict(id="never")] * 40 + [dict(id="2024-05-01T01:02:03Z")] * 40, [dict(id="x")] * 40 + [dict(id=dict(a=1))],
                 [dict(id=None)] * 40 + [dict(id=0.5)], [dict(id=1)] * 40 + [dict(id=2**64)], [dict(id=[])] * 40 + [dict(id=["x"], new=dict(a=None))] * 40 + [dict(new=dict(b="y"))]):
        file = tmp_path / "out.arrow"
        write_json_rows(file, [str(lines(tmp_path / "rows.jsonl", rows))], size=size)
        filled = missing_as_none(rows)
        if "new" in filled[0]: filled = [dict(r, new=r["new"] and dict(a=None, b=r["new"].get("b"))) for r in filled]
        assert exact(Dataset.from_file(str(file)).to_list()) == exact(filled)


def test_several_kinds_in_one_folder(tmp_path):
    lines(tmp_path / "train-0.jsonl", [dict(a=1)])
    part(tmp_path / "train-1.parquet", [dict(a=2)])
    with pytest.raises(UserError, match=r"json: .*train-0.jsonl; parquet: .*train-1.parquet\)"): load_rows(tmp_path)
    assert load_rows(f"{tmp_path}/*.jsonl")["a"][:] == [1]


def test_files_that_are_not_read_are_named(tmp_path, capfd):
    (tmp_path / "train.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match="Other files in it are not read: train.xlsx"): load_rows(tmp_path)
    lines(tmp_path / "train.jsonl", [dict(a=1)])
    assert len(load_rows(tmp_path)) == 1 and "not read: train.xlsx" in capfd.readouterr().err


def test_json_columns_survive_stages(tmp_path):
    "Values of several kinds, decimals and large integers among them, through saving in each form"
    rows = [dict(question="a", answer="b", x=v) for v in ("1", 1, True, 2.28, 2**70, None, [0.1, "0.1"])]
    data = load_rows(lines(tmp_path / "rows.jsonl", rows))
    for where in ("saved", "saved.jsonl", "saved.parquet"): assert exact(load_rows(save_rows(data, tmp_path / where)).to_list()) == exact(rows)


# -- rows on both sides of a split

def test_same_rows_on_both_sides_are_counted():
    data = Dataset.from_list([dict(messages=SUMS[i % 10], talk=str(i % 7)) for i in range(40)])
    train, held, _ = stratified_split(data, 0.2)
    counts = count_both_sides(train, held)
    texts = {json.dumps(m) for m in train["messages"]}
    assert counts["same_conversation"] == sum(json.dumps(m) in texts for m in held["messages"]) > 0
    for by in ("conversation", "talk"):
        train, held, _ = stratified_split(data, 0.2, group_by=by)
        keys = group_keys(data, by)
        assert len(train) + len(held) == 40 and len(held) >= 4 and len({*keys}) in (7, 10)
    assert count_both_sides(*stratified_split(data, 0.2, group_by="conversation")[:2])["same_prompt"] == 0


def test_formats_alike():
    "The same conversation in another format is the same conversation"
    pairs = Dataset.from_list([dict(question=m[0]["content"], answer=m[1]["content"]) for m in SUMS[:5]])
    chats = Dataset.from_list([dict(messages=m) for m in SUMS[3:8]])
    assert count_both_sides(pairs, chats)["same_conversation"] == 2


def test_ids_that_are_not_unique():
    "Forty rows of one id are forty rows: they can be split, and are counted"
    data = load_rows(FOREIGN / "dup_ids.jsonl")
    train, held, table = stratified_split(data, 0.1)
    assert (len(train), len(held)) == (36, 4) and count_both_sides(train, held)["shared_ids"] == 40
    copies = data.select([*range(40), 3])  # a copy: the same id and content
    for seed in range(10):
        train, held, _ = stratified_split(copies, 0.1, seed=seed)
        assert sum(r == data[3] for r in train) in (0, 2)


def test_stratified_by_origin_and_by_a_column_of_two_types():
    data = Dataset.from_list([dict(messages=SUMS[i], source="all", origin="ab"[i % 2]) for i in range(40)])
    assert [t["eval"] for t in stratified_split(data, 0.1, by="origin")[2]] == [2, 2, 4]
    mixed = load_rows(FOREIGN / "meta_bool.jsonl")
    assert isinstance(mixed.features["ok"], Json)
    assert {t["class"]: t["eval"] for t in stratified_split(mixed, 0.2, by="ok")[2]} == dict(yes=2, true=2, total=4)


# -- cases rebuilt from public reports: own rows with the fault that was reported

def empty_groups(path, groups):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as w:
        for n in groups: w.write_table(pa.table(dict(text=[f"row {n}"] * n), schema=schema))
    return path


@pytest.mark.parametrize("groups", [[0], [0, 2], [2, 0, 1], [0, 0, 3, 0]], ids=str)
def test_row_groups_without_rows(groups, tmp_path):
    "apache/parquet-java#1018, apache/beam#30038, ClickHouse/ClickHouse#107746: row groups of zero rows, first or between"
    path = empty_groups(tmp_path / "groups.parquet", groups)
    if not sum(groups):
        with pytest.raises(UserError, match="there are no rows"): load_rows(path)
    else: assert load_rows(path)["text"][:] == [f"row {n}" for n in groups for _ in range(n)]


REPORTED = {  # source: rows, which have to come back exactly
    "huggingface/datasets#6937": [dict(score=x) for x in (0.0, 1.0, 2.0)],  # floats that became integers
    "huggingface/datasets#2799": [dict(url="https://a.b/1", created_at=None), dict(url="2021-08-13", created_at="2021-08-13T07:05:21Z")],  # texts that became times
    "huggingface/datasets#7664": [dict(title="a", body="(...) ,action: string, datetime: timestamp[s], author: string", at="2025-07-01")],  # a text that looks like a schema
    "huggingface/datasets#8365": [dict(a=x) for x in (9007199254740993, None, 5)],  # a null that makes integers floats
    "apache/arrow#46698": [dict(day="2024-05-01", at="2024-05-01 10:00:00"), dict(day="2024-05-02", at="2024-05-01 10:00:00+02:00")],  # texts that became times
    "pandas-dev/pandas#44684": [dict(NO="202101010000000003"), dict(NO="202101010000000013")],  # digits that lost their last ones
    "airbytehq/airbyte#25861": [dict(units=[dict(on=[[0, 1]])]), dict(units=[dict(on=[[True]])])],  # a number, then a boolean, deep inside
    "marin-community/marin#5142": [dict(metadata=dict(language=None))] * 959 + [dict(metadata=dict(language="Python"))],  # nulls first
    "tloen/alpaca-lora#239": [dict(instruction="a", input="", output="b"), dict(instruction="a", input=[], output=2)],  # answers that are not texts
    "apache/arrow#5571": [dict(a=0), dict(a=True)],  # number, then boolean
    "vega/vegafusion#472": [dict(price="12.0"), dict(price=12.0)],  # numbers, some of them as texts
}


@pytest.mark.parametrize("source", REPORTED)
@pytest.mark.parametrize("layout", ["jsonl", "json", "indented", "shards"])
def test_reported_rows_are_read_exactly(source, layout, tmp_path):
    rows = REPORTED[source]
    if layout == "jsonl": lines(tmp_path / "train.jsonl", rows)
    if layout == "json": (tmp_path / "train.json").write_text(json.dumps(rows))
    if layout == "indented": (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r, indent=4) for r in rows))  # apache/arrow#40912
    if layout == "shards":
        for i, r in enumerate(rows): lines(tmp_path / f"train-{i:05d}.jsonl", [r])
    assert exact(load_rows(tmp_path).to_list()) == exact(rows)


REPORTED_PARTS = {  # source: rows of each part with its schema; the columns may differ
    "apache/arrow#8741": [([dict(p=None, q=[1.1], s=None)], [("p", pa.null()), ("q", pa.list_(pa.float64())), ("s", pa.null())]),
                          ([dict(p=1.1, q=None, s="a")], [("p", pa.float64()), ("q", pa.null()), ("s", pa.string())])],  # nulls only in one part
    "apache/arrow#11967": [([dict(a=None)], [("a", pa.null())]), ([dict(a="x")], [("a", pa.string())]), ([dict(a=None)], [("a", pa.int32())])],
    "apache/arrow#39670": [([dict(x=1)], [pa.field("x", pa.int32(), nullable=False)]), ([dict(y=2)], [pa.field("y", pa.int32(), nullable=False)])],  # no nulls allowed, and none there
    "apache/arrow#50515": [([dict(o=dict(i=dict(n=1)))], [("o", pa.struct([("i", pa.struct([pa.field("n", pa.int64(), nullable=False)]))]))]),
                           ([dict(o=dict(i=None))], [("o", pa.struct([("i", pa.struct([pa.field("n", pa.int64(), nullable=False)]))]))])],  # a null struct of fields that are never null
    "scicode-bench/SciCode#40": [([dict(name="a", general_solution="x")], None), ([dict(name="b")], None)],  # a column less
    "huggingface/datasets#6509": [([dict(task=dict(major=["a"], minor=["b"]))], None), ([dict(answer_from="c", task=dict(major=["d"]))], None)],  # other columns and fields
    "risingwavelabs/risingwave#26363": [([dict(s=dict(a=1))], None), ([dict(s=dict(a=2, b="x"))], None)],  # a nested field less
    "apache/spark#10474": [([dict(a=[])], [("a", pa.list_(pa.null()))]), ([dict(a=["x"])], None)],  # lists of nothing
    "ray-project/ray#48478": [([dict(a="x")], [pa.field("a", pa.string(), nullable=False)]), ([dict(a=None)], [("a", pa.large_string())])],  # may be null, or not
    "pandas index": [([dict(a=1, __index_level_0__=7)], None), ([dict(a=2)], None)],  # ibrahimethemhamamci/CT-CLIP#9: pandas' columns in one part
}


@pytest.mark.parametrize("source", REPORTED_PARTS)
def test_reported_parts_are_read_like_json(source, tmp_path):
    rows, files = [], []
    for i, (some, schema) in enumerate(REPORTED_PARTS[source]):
        rows += some
        files.append(part(tmp_path / f"train-{i}.parquet", some, schema and pa.schema(schema)))
    want = load_rows(lines(tmp_path / "rows.jsonl", rows)).to_list()
    assert exact(read_files(files).to_list()) == exact(want)
    assert exact(read_files(files[::-1]).to_list()[::-1]) == exact(load_rows(lines(tmp_path / "back.jsonl", rows[::-1])).to_list()[::-1])


def test_a_row_larger_than_a_piece(tmp_path):
    "huggingface/datasets#629 and #2181: an object that straddles two blocks of the parser"
    rows = [dict(text="a"), dict(text="long " * 3_000_000), dict(text="b")]
    assert load_rows(lines(tmp_path / "rows.jsonl", rows)).to_list() == rows


def test_metadata_in_csv_next_to_data(tmp_path, capfd):
    "huggingface/datasets#6315: a CSV file among JSON lines is not parsed as JSON; it is mentioned"
    (tmp_path / "metadata.csv").write_text("a,b\n")
    lines(tmp_path / "train.jsonl", [dict(a=1)])
    assert load_splits(tmp_path)["train"].to_list() == [dict(a=1)] and "metadata.csv" in capfd.readouterr().err


def test_key_twice(tmp_path):
    "apache/arrow#5571: an object with a key twice; Python's parser would keep the last without a word"
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": {"c": 1, "c": 2}}\n')
    with pytest.raises(UserError, match="rows.jsonl, line 2: the key 'c' occurs twice"): load_rows(tmp_path / "rows.jsonl")
