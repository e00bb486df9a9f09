"Mixtures and splits: what a draw promises, on made-up sources of several schemas and on real files; duplicates against a comparison of all pairs"
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from post_training.core.files import UserError
from post_training.data import mixture
from post_training.data import duplicates
from post_training.data import split
from post_training.data.mixture import mix_sources
from post_training.data.duplicates import count_duplicates, count_overlap

SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = dict(sums=37, chats=11, prose=60)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three sources of three formats, one with ids, one with two splits"
    where = tmp_path_factory.mktemp("sources")
    (where / "sums.jsonl").write_text("".join(json.dumps(dict(question=f"What is {i} and {i}?", answer=str(2 * i), level=i % 3)) + "\n" for i in range(SIZES["sums"])))
    chats = [dict(id=f"c{i}", conversations=[{"from": "human", "value": f"Hello {i}"}, {"from": "gpt", "value": "Good day. " * (i + 1)}]) for i in range(SIZES["chats"])]
    (where / "chats.json").write_text(json.dumps(chats))
    prose = Dataset.from_list([dict(messages=talk(f"Write about {i}.", "words " * i + "end"), level=i / 2) for i in range(SIZES["prose"] + 5)])
    DatasetDict(train=prose.select(range(SIZES["prose"])), test=prose.select(range(SIZES["prose"], SIZES["prose"] + 5))).save_to_disk(where / "prose")
    return where


def talk(question, answer):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def sources(folder, **changes):
    "The three sources as a preset writes them; `changes` are keys by name"
    paths = dict(sums="sums.jsonl", chats="chats.json", prose="prose")
    return [dict(dataset_name=n, dataset_path=str(folder / p), **changes.get(n, {})) for n, p in paths.items()]


def save(folder, name, rows, features=None):
    "Rows saved as a dataset; a source of that name"
    Dataset.from_list(rows, features=features).save_to_disk(folder / name)
    return dict(dataset_name=name, dataset_path=str(folder / name))


def ids(m, name):
    return [i for i, s in zip(m.train["id"], m.train["source"]) if s == name]


def words(rows):
    "Stands in for a tokenizer"
    each = [[len(m["content"].split()) for m in r["messages"]] for r in rows]
    return [sum(e) for e in each], [e[-1] for e in each]


# -- the draw

FACTORS = st.one_of(st.sampled_from([1, 1.0, 0.5, 0.29, 0.999, 2, 7, 500]), st.floats(0.1, 1).map(lambda x: round(x, 3)), st.integers(2, 70))
ONE = st.fixed_dictionaries(dict(subsample_factor=FACTORS, duplication_factor=st.integers(1, 4)))


def wanted(factor, n):
    return min(factor, n) if factor > 1 else math.floor(Fraction(str(factor)) * n)


@SETTINGS
@given(sums=ONE, chats=ONE, prose=ONE, seed=st.integers(0, 2**32), shuffle=st.booleans())
def test_what_a_draw_promises(folder, sums, chats, prose, seed, shuffle):
    "Row counts are the formula's, copies are whole, nothing is drawn twice, contents belong to their ids, the same call gives the same rows"
    asked = dict(sums=sums, chats=chats, prose=prose)
    m = mix_sources(sources(folder, **asked), seed=seed, shuffle=shuffle, columns_to_keep=["messages", "level"])
    for row in m.table[:-1]:
        name, factor, copies = row["source"], asked[row["source"]]["subsample_factor"], asked[row["source"]]["duplication_factor"]
        counted = Counter(ids(m, name))
        assert row["drawn"] == len(counted) == wanted(factor, SIZES[name]) and set(counted.values()) == {copies}
        assert row["rows"] == row["drawn"] * copies and row["rows_in"] == SIZES[name]
    assert m.table[-1]["rows"] == len(m.train) == sum(r["rows"] for r in m.table[:-1])
    for r in m.train:
        if r["source"] == "sums": assert r["messages"][0]["content"] == f"What is {(i := int(r['id'].split('_')[1]))} and {i}?" and r["level"] == i % 3
        if r["source"] == "chats": assert r["messages"][0]["content"] == f"Hello {r['id'].split('_')[1]}" and r["level"] is None
    again = mix_sources(sources(folder, **asked), seed=seed, shuffle=shuffle, columns_to_keep=["messages", "level"])
    assert again.train.to_list() == m.train.to_list() and again.table == m.table
    if not shuffle: assert m.train["source"][:] == [r["source"] for r in m.table[:-1] for _ in range(r["rows"])]


@SETTINGS
@given(before=ONE, after=ONE, other=ONE, seed=st.integers(0, 1000), name=st.sampled_from(list(SIZES)), gone=st.booleans(), turned=st.booleans())
def test_sources_do_not_know_of_each_other(folder, before, after, other, seed, name, gone, turned):
    "One source is changed or removed, the list is turned round: rows and relative order of the others stay"
    first = [dict(s, **(before if s["dataset_name"] == name else other)) for s in sources(folder)]
    second = [dict(s, **(after if s["dataset_name"] == name else other)) for s in sources(folder) if not (gone and s["dataset_name"] == name)]
    a, b = mix_sources(first, seed=seed), mix_sources(second[::-1] if turned else second, seed=seed)
    order = [[(r["id"], r["source"]) for r in m.train if r["source"] != name] for m in (a, b)]
    assert order[0] == order[1]


def test_more_of_a_source_keeps_what_was_there(folder):
    "A larger fraction adds rows, another copy adds copies; those that were there keep their order"
    small, large = (ids(mix_sources(sources(folder, prose=dict(subsample_factor=f))), "prose") for f in (0.3, 0.6))
    assert [i for i in large if i in set(small)] == small
    one, two = (mix_sources(sources(folder, prose=dict(duplication_factor=c))).train for c in (1, 2))
    left = iter((r["id"], r["source"]) for r in two)
    assert all(any(x == y for y in left) for x in [(r["id"], r["source"]) for r in one])  # a subsequence


def test_shuffled_means_mixed(folder):
    "Every source is spread over the whole mixture"
    m = mix_sources(sources(folder, sums=dict(duplication_factor=10), prose=dict(duplication_factor=10)))
    half = Counter(m.train["source"][:len(m.train) // 2])
    assert abs(half["sums"] / 370 - 0.5) < 0.1 and abs(half["prose"] / 600 - 0.5) < 0.1
    assert [r["id"] for r in m.train] != sorted(r["id"] for r in m.train)


def test_a_known_draw(folder):
    "What seed 42 drew when this was written: another result means that old mixtures cannot be made again"
    assert mixture.draw_rows(10, mixture.MixtureSource("sums", "x", subsample_factor=5))[0].tolist() == [2, 5, 7, 1, 8]
    assert ids(mix_sources(sources(folder)), "chats") == [f"chats_{i}" for i in (7, 3, 2, 1, 6, 0, 10, 5, 8, 4, 9)]


def test_the_same_in_another_process(folder):
    "Another process, with another hash seed, draws the same"
    code = ("import json, sys; from post_training.data.mixture import mix_sources; from post_training.data.split import stratified_split as s;"
            "m = mix_sources(json.loads(sys.argv[1])); print(json.dumps([m.train['id'][:], s(m.train, 0.2, by='source')[1]['id'][:]]))")
    given = sources(folder, prose=dict(subsample_factor=0.4, duplication_factor=2))
    out = subprocess.run([sys.executable, "-c", code, json.dumps(given)], capture_output=True, text=True, env=os.environ | dict(PYTHONHASHSEED="7"), check=True)
    m = mix_sources(given)
    assert json.loads(out.stdout.splitlines()[-1]) == [m.train["id"][:], split.stratified_split(m.train, 0.2, by="source")[1]["id"][:]]


@SETTINGS
@given(budget=st.integers(14, 900), copies=st.integers(1, 3), factor=st.sampled_from([1, 0.5, 20]), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_token_budget(folder, budget, copies, factor, shuffle, seed):
    "Rows in drawn order until the next would exceed the budget, all copies counted"
    one = dict(subsample_factor=factor, duplication_factor=copies)
    free = mix_sources(sources(folder, prose=one), seed=seed, shuffle=shuffle, count_tokens=words)
    each = free.lengths["prose"] * copies
    fits = int((each.cumsum() <= budget).sum())
    if not fits:
        with pytest.raises(UserError, match="its first row alone exceeds token_budget"): mix_sources(sources(folder, prose=one | dict(token_budget=budget)), seed=seed, shuffle=shuffle, count_tokens=words)
        return
    m = mix_sources(sources(folder, prose=one | dict(token_budget=budget)), seed=seed, shuffle=shuffle, count_tokens=words)
    row = m.table[2]
    assert row["drawn"] == fits and row["tokens"] == each[:fits].sum() <= budget
    assert sum(len(c["content"].split()) for r in m.train if r["source"] == "prose" for c in r["messages"]) == row["tokens"]
    assert any("fewer than its budget" in n for n in m.notes) == (each.sum() < budget)
    assert set(ids(m, "prose")) <= set(ids(free, "prose")) and ids(m, "sums") == ids(free, "sums")


# -- columns, schemas, ids

def test_evaluation_rows_are_whole_and_apart(folder):
    m = mix_sources(sources(folder, prose=dict(eval_splits=["test"], subsample_factor=0.1)), count_tokens=words)
    assert m.eval["id"][:] == [f"prose_eval_{i}" for i in range(5)] and set(m.eval["source"]) == {"prose"}
    assert m.eval.features == m.train.features and m.table[2]["eval_rows"] == m.table[-1]["eval_rows"] == 5
    assert m.inputs[str(folder / "prose")] == 65 and set(m.counts) == {*SIZES, "prose_eval"}
    none = mix_sources(sources(folder, prose=dict(eval_splits=["test"], subsample_factor=0)))
    assert len(none.eval) == 5 and not ids(none, "prose") and mix_sources(sources(folder)).eval is None
    both = mix_sources(sources(folder, prose=dict(train_splits=["train", "test"])))
    assert both.table[2]["rows"] == 65 and "prose_64" in ids(both, "prose")


def test_schemas_are_aligned(tmp_path):
    "Missing columns are null, numbers are widened, structs get all fields, labels of other meaning become names; types hold through a save"
    label = lambda *names: Features(messages=List(dict(role=Value("string"), content=Value("string"))), kind=ClassLabel(names=list(names)), n=Value("int32"))
    made = [save(tmp_path, "a", [dict(messages=talk("a?", "a"), kind=0, n=1)], label("code", "math")), save(tmp_path, "b", [dict(messages=talk("b?", "b"), kind=0, n=2)], label("math", "code")),
            save(tmp_path, "c", [dict(messages=talk("c?", "c"), n=0.5, tags=["x"], more=dict(p=1))]), save(tmp_path, "d", [dict(messages=talk("d?", "d"), n=None, tags=[], more=dict(q="y"))])]
    m = mix_sources(made, columns_to_keep=["messages", "kind", "n", "tags", "more"], shuffle=False)
    assert [(r["kind"], r["n"], r["tags"], r["more"]) for r in m.train] == [("code", 1.0, None, None), ("math", 2.0, None, None), (None, 0.5, ["x"], dict(p=1, q=None)), (None, None, [], dict(p=None, q="y"))]
    same = mix_sources([made[0], made[2]], columns_to_keep=["messages", "kind"], shuffle=False).train
    assert same.features["kind"].names == ["code", "math"] and same["kind"][:] == [0, None]
    m.train.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").to_list() == m.train.to_list()


def test_conflicting_types_become_json(tmp_path):
    made = [save(tmp_path, n, [dict(messages=talk("?", "!"), score=v)]) for n, v in (("first", 1), ("empty", None), ("second", "high"))]
    mixture = mix_sources(made, columns_to_keep=["messages", "score"], shuffle=False)
    assert mixture.train["score"][:] == [1, None, "high"] and any("'score' is int64 in first and string in second" in n for n in mixture.notes)
    assert len(mix_sources(made).train) == 3  # not kept, no conflict


def test_own_ids_and_sources(tmp_path):
    rows = lambda **more: [dict(messages=talk(f"{i}?", "!"), **{k: v[i] for k, v in more.items()}) for i in range(2)]
    made = [save(tmp_path, "own", rows(id=[7, 8], source=["web", "book"])), save(tmp_path, "twice", rows(id=["x", "x"])), save(tmp_path, "null", rows(id=["x", None])), save(tmp_path, "same", rows(id=["7", "9"]))]
    m = mix_sources(made, shuffle=False, columns_to_keep=["messages", "source", "id"])
    assert m.train["id"][:] == ["own_0", "own_1", "twice_0", "twice_1", "null_0", "null_1", "same_0", "same_1"]
    assert m.train["origin_id"][:] == ["7", "8", "x", "x", "x", None, "7", "9"]
    assert m.train["source"][:] == ["own", "own", "twice", "twice", "null", "null", "same", "same"]
    assert m.train["origin"][:2] == ["web", "book"] and set(m.train["origin"][2:]) == {None}
    assert len(m.notes) <= 1 and len(set(m.train["id"])) == 8
    assert set(mix_sources(made[:1]).train.column_names) == {"messages", "id", "source", "origin"} and "id" not in mix_sources(made, keep_ids=False).train.column_names


def test_columns_that_a_conversion_uses_up_and_rows_as_they_are(folder):
    m = mix_sources(sources(folder)[:1], columns_to_keep=["messages", "answer", "level"], need_columns=["question"])
    assert all(r["messages"][1]["content"] == r["answer"] for r in m.train)
    raw = mix_sources(sources(folder)[:1], columns_to_keep=["question", "answer"])
    assert set(raw.train.column_names) == {"question", "answer", "id", "source"}


def test_structured_and_plain(tmp_path, folder):
    "A Swiss-AI source beside a plain one: one form of messages for both, or an error that says how"
    part = dict(type="response", content="Hi!", name=None, args=None, answers=None, metadata=None)
    rows = [dict(conversation_id="s", system_prompt=None, available_functions=[], initial_prompt=dict(role="user", content="Hello", metadata={}), conversation_branches=[dict(messages=[dict(role="assistant", parts=[part])])])]
    (tmp_path / "swiss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = [*sources(folder)[:1], dict(dataset_name="swiss", dataset_path=str(tmp_path / "swiss.jsonl"))]
    with pytest.raises(UserError, match="Column 'messages' .* blocks=True"): mix_sources(made)
    m = mix_sources(made, blocks=True)
    assert len(m.train) == 38 and all(isinstance(r["messages"][0]["content"], dict) for r in m.train)


# -- bad input

BAD = {
    "no sources": ([], "at least one"),
    "not a list": (dict(dataset_name="a"), "list of sources"),
    "not a mapping": (["sums.jsonl"], "mapping"),
    "unknown key": ([dict(subsample=0.5)], "unknown key 'subsample'. Did you mean 'subsample_factor'"),
    "no name": ([dict(dataset_name=None)], "dataset_name is missing"),
    "blank path": ([dict(dataset_path=" ")], "dataset_path is missing"),
    "same name": ([{}, {}], "name 'sums'"),
    "negative factor": ([dict(subsample_factor=-1)], "subsample_factor is -1"),
    "nan": ([dict(subsample_factor=float("nan"))], "subsample_factor is nan"),
    "a text": ([dict(subsample_factor="all")], "subsample_factor is 'all'"),
    "half a row": ([dict(subsample_factor=2.5)], "a whole number"),
    "half a copy": ([dict(duplication_factor=1.5)], "duplication_factor is 1.5"),
    "no copy": ([dict(duplication_factor=0)], "duplication_factor is 0"),
    "negative copies": ([dict(duplication_factor=-2)], "duplication_factor is -2"),
    "budget of nothing": ([dict(token_budget=0)], "token_budget is 0"),
    "budget without tokenizer": ([dict(token_budget=100)], "name a tokenizer"),
    "unknown split": ([dict(train_splits=["trian"])], "no split 'trian'"),
    "no split": ([dict(train_splits=[])], "names no split"),
    "less than a row": ([dict(subsample_factor=0.001)], "subsample_factor=0.001 of 37 rows is less than one row"),
    "nothing at all": ([dict(subsample_factor=0)], "no training rows"),
    "no file": ([dict(dataset_path="./gone.jsonl")], "no dataset at ./gone.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(folder, case):
    given, said = BAD[case]
    if isinstance(given, list): given = [dict(sources(folder)[0], **g) if isinstance(g, dict) else g for g in given]
    with pytest.raises(UserError) as e: mix_sources(given)
    assert said in str(e.value)


@pytest.mark.parametrize("case", [dict(seed=-1), dict(seed=1.5), dict(columns_to_keep=[]), dict(need_columns=["topic"]), dict(checks=["alternating"]), dict(on_malformed="keep")])
def test_bad_arguments(folder, case):
    with pytest.raises(UserError): mix_sources(sources(folder), **case)


def test_malformed_rows_are_counted_and_limited(tmp_path):
    rows = [dict(messages=talk("?", "!")) for _ in range(18)] + [dict(messages=talk("?", None)), dict(messages=[])]
    made = [save(tmp_path, "leaky", rows), save(tmp_path, "sound", [dict(messages=talk("?", "!"))] * 500)]
    with pytest.raises(UserError, match=r"2 of 20 rows of leaky were dropped \(.*max_drop_fraction=0.05"): mix_sources(made)
    m = mix_sources(made, max_drop_fraction=0.1)
    assert m.counts["leaky"]["in"] == 20 and m.counts["leaky"]["out"] == 18 and sum(m.counts["leaky"]["dropped"].values()) == 2
    assert set(m.counts["leaky"]["examples"].values()) == {"leaky_18", "leaky_19"} and m.table[0]["dropped"] == 2
    assert mix_sources([dict(made[0], subsample_factor=0.5)], max_drop_fraction=None).table[0]["drawn"] == 9  # half of the usable rows
    with pytest.raises(UserError, match="Row leaky_18"): mix_sources(made, on_malformed="error")
    with pytest.raises(UserError, match="'bad' contributes nothing: none of its 2 rows"): mix_sources([save(tmp_path, "bad", [dict(messages=talk("", None))] * 2)], max_drop_fraction=None)


def test_role_checks_count(tmp_path):
    made = save(tmp_path, "turns", [dict(messages=talk("?", "!"))] * 3 + [dict(messages=talk("?", "!") + talk("?", "!")[:1])])
    m = mix_sources([made], checks=["ends_with_assistant"], max_drop_fraction=None)
    assert m.table[0]["dropped"] == 1 and len(m.train) == 3


# -- duplicates and overlap, against a comparison of all pairs

def variants(seed, n=120):
    "Texts, some of them changed in a few words: similarities of every size"
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefghij", k=5))
    texts = [[word() for _ in range(rng.randint(3, 80))] for _ in range(n)]
    for i in range(n):
        copy = list(texts[i])
        for _ in range(rng.randint(0, 4)): copy[rng.randrange(len(copy))] = word()
        texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(t) for t in texts]


def rows_of(texts, **columns):
    return Dataset.from_dict(dict(messages=[talk(t, "Yes, I think so.") for t in texts], **columns))


@pytest.mark.parametrize("seed, threshold, ngram", [(0, 0.8, 5), (1, 0.6, 3), (2, 0.95, 5), (3, 0.8, 1)])
def test_duplicates_equal_a_comparison_of_all_pairs(seed, threshold, ngram):
    "No pair below the threshold is counted, and (at most one in a hundred at the threshold itself missed) none above is left out"
    texts = variants(seed)
    grams = [duplicates.shingles(f"{t}\nYes, I think so.", ngram) for t in texts]
    kept, exact, near = [], 0, 0
    for i, t in enumerate(texts):
        if t in texts[:i]: exact += 1
        elif any(duplicates.jaccard(grams[i], grams[k]) >= threshold for k in kept): near += 1
        else: kept.append(i)
    found = count_duplicates(rows_of(texts), threshold=threshold, ngram=ngram)
    assert found["exact"] == exact and near - 1 <= found["near"] <= near and near >= 2
    for e in count_duplicates(rows_of(texts), threshold=threshold, ngram=ngram, n_examples=100)["examples"]:
        assert round(duplicates.jaccard(grams[int(e["id"])], grams[int(e["like"])]), 3) == e["similarity"] >= round(threshold, 3)


def test_few_pairs_at_the_threshold_are_missed():
    "500 pairs of similarity 0.804, where the sketch errs most: at most one in a hundred is missed"
    rng = random.Random(5)
    texts = [["".join(rng.choices("abcdefghijklmnopqrst", k=6)) for _ in range(50)] for _ in range(500)]
    changed = [[*t[:25], "other", *t[26:]] for t in texts]
    data = Dataset.from_dict(dict(messages=[[dict(role="user", content=" ".join(t))] for t in texts + changed]))
    assert 495 <= count_duplicates(data)["near"] <= 500


def test_copies_are_not_duplicates(folder):
    m = mix_sources(sources(folder, sums=dict(duplication_factor=3), prose=dict(duplication_factor=2)))
    found = count_duplicates(m.train, threshold=0)
    assert found["copies"] == 2 * 37 + 60 and found["exact"] == 0 and found["rows"] == 37 + 11 + 60
    twice = mix_sources([dict(sources(folder)[0], dataset_name=n) for n in ("here", "there")])  # the same file as two sources
    assert count_duplicates(twice.train, threshold=0)["exact"] == 37 and count_duplicates(twice.train)["near"] == count_duplicates(mix_sources(sources(folder)[:1]).train)["near"]


def test_overlap_equals_a_comparison_of_all_pairs():
    train, test = variants(7)[:200], variants(7)[150:] + variants(8, 10)
    grams = [duplicates.shingles(t) for t in train]
    exact = sum(t in train for t in test)
    near = sum(t not in train and any(duplicates.jaccard(duplicates.shingles(t), g) >= 0.8 for g in grams) for t in test)
    here = count_overlap(rows_of(train), dict(test=rows_of(test)))["test"]
    assert here["prompt_exact"] == here["conversation_exact"] == exact >= 50 and near - 1 <= here["prompt_near"] <= near and near > 0
    assert here["rows"] == len(test) and exact + here["prompt_near"] <= here["found"] <= len(test)


def test_texts_that_are_hard_to_compare():
    "Blank, without words, without spaces, lone surrogates, structured contents"
    texts = ["", "...", "!?", "今日はとても良い天気ですね散歩に行きましょう", "今日はとても良い天気ですね散歩に行きましょうか", "a\ud800b c d e f"]
    data = [dict(messages=[dict(role="user", content=t)]) for t in texts[:-1]]
    assert {k: count_duplicates(Dataset.from_list(data))[k] for k in ("rows", "exact", "near")} == dict(rows=5, exact=0, near=1)
    assert duplicates.sketch_texts(texts, len(texts)).words.tolist() == [False, False, False, True, True, True]
    with pytest.raises(UserError, match="no column messages"): count_duplicates(Dataset.from_dict(dict(text=["a"])))
    for wrong in (dict(threshold=2), dict(threshold=-0.1), dict(ngram=0), dict(num_perm=1)):
        with pytest.raises(UserError): count_duplicates(Dataset.from_list(data), **wrong)


# -- splits

@SETTINGS
@given(sizes=st.lists(st.integers(2, 60), min_size=1, max_size=8), ratio=st.floats(0.005, 0.95).map(lambda x: round(x, 3)), seed=st.integers(0, 1000))
def test_split_is_stratified(sizes, ratio, seed):
    "Every class within one row of its share, at least one on each side, the whole within its rounding; nothing lost, order and types kept"
    names = [f"class {i}" for i, n in enumerate(sizes) for _ in range(n)]
    data = Dataset.from_dict(dict(n=range(len(names)), label=names)).shuffle(seed=seed).cast_column("label", ClassLabel(names=sorted(set(names))))
    train, evaluation, table = split.stratified_split(data, ratio, by="label", seed=seed)
    share = Fraction(str(ratio))
    for row in table[:-1]:
        assert abs(row["eval"] - share * row["rows"]) < 1 or row["eval"] == 1
        assert row["eval"] >= 1 and row["train"] >= 1
    raised = sum(1 for row in table[:-1] if share * row["rows"] < 1)
    assert abs(len(evaluation) - share * len(data)) <= Fraction(1, 2) + raised + sum(1 for n in sizes if math.ceil(share * n) == n)
    where = {n: i for i, n in enumerate(data["n"])}
    for part in (train, evaluation):
        assert part.features == data.features and [where[n] for n in part["n"]] == sorted(where[n] for n in part["n"])
    assert sorted(train["n"][:] + evaluation["n"][:]) == list(range(len(names)))
    assert split.stratified_split(data, ratio, by="label", seed=seed)[1]["n"][:] == evaluation["n"][:]


@pytest.mark.parametrize("values, kind", [(["a", "b", None], Value("string")), ([1, 2, None], Value("int64")), ([True, False, None], Value("bool")), ([0, 1, None], ClassLabel(names=["x", "y"]))])
def test_split_columns_of_every_kind(values, kind):
    data = Dataset.from_dict(dict(n=range(30), c=values * 10), features=Features(n=Value("int64"), c=kind))
    train, evaluation, table = split.stratified_split(data, 0.2, by="c")
    assert train.features["c"] == evaluation.features["c"] == kind and Counter(evaluation["c"]) == {v: 2 for v in values}
    assert len(table) == 4 and all(data[n]["c"] == c for n, c in zip(evaluation["n"], evaluation["c"]))


def test_split_keeps_copies_together(folder):
    m = mix_sources(sources(folder, sums=dict(duplication_factor=3)))
    train, evaluation, _ = split.stratified_split(m.train, 0.2, by="source")
    assert not {(r["source"], r["id"]) for r in train} & {(r["source"], r["id"]) for r in evaluation}


# -- real rows

def real(folder):
    return [dict(dataset_name="gsm8k", dataset_path=str(folder / "gsm8k_train.jsonl"), subsample_factor=0.25), dict(dataset_name="sharegpt", dataset_path=str(folder / "sharegpt_conversations.json"), subsample_factor=300),
            dict(dataset_name="seed-tasks", dataset_path=str(folder / "instruction_seed_tasks.jsonl"), duplication_factor=3)]


def test_three_real_sources(data_dir):
    "Formats, subsample and duplication on real files; no row of one source moves when another changes; gsm8k's test rows are not in its train rows"
    m = mix_sources(real(data_dir), count_tokens=words)
    assert [(r["rows_in"], r["drawn"], r["rows"]) for r in m.table] == [(7473, 1868, 1868), (500, 300, 300), (175, 175, 525), (8148, 2343, 2693)]
    assert not any(c["dropped"] for c in m.counts.values()) and ids(m, "seed-tasks")[0].startswith("seed-tasks_") and ids(m, "gsm8k")[0].startswith("gsm8k_")
    less = mix_sources([dict(real(data_dir)[0], subsample_factor=10), *real(data_dir)[1:]])
    assert ids(less, "sharegpt") == ids(m, "sharegpt") and ids(less, "seed-tasks") == ids(m, "seed-tasks")
    found = count_duplicates(m.train)
    assert found["copies"] == 350 and found["by_source"]["gsm8k"] == dict(rows=1868, exact=0, near=0)
    test = mix_sources([dict(dataset_name="test", dataset_path=str(data_dir / "gsm8k_test.jsonl"), subsample_factor=200)]).train
    planted = datasets.concatenate_datasets([test, m.train.filter(lambda s: s == "gsm8k", input_columns="source").select(range(7))])
    assert {k: count_overlap(m.train, dict(t=planted))["t"][k] for k in ("rows", "found", "prompt_exact")} == dict(rows=207, found=7, prompt_exact=7)
    for figure in (mixture.plot_composition(m), mixture.plot_mixture_lengths(m)): assert [t.get_text() for t in figure.axes[0].get_yticklabels()][0].startswith("gsm8k")
