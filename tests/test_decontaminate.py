"Duplicates and benchmark contamination: what is found, removed and kept, and what bad input gives."
import json

import numpy as np
import pytest
from test_stages import command, the_run

from post_training import config
from post_training.core.files import UserError
from post_training.data import contamination, duplicates
from post_training.data.io import load_splits
from post_training.stages.decontaminate import decontaminate

QUESTION = "A farmer has seventeen sheep and all but nine run away: how many sheep does the farmer have left?"


def write(path, rows):
    path.write_text("\n".join(json.dumps(dict(question=q, answer=a)) for q, a in rows))
    return path


def clean(*overrides):
    return decontaminate(config.compose("decontaminate", [*overrides, "max_drop_fraction=1"]).cfg)


def test_stage_removes_and_records(tmp_path, tmp_root):
    "Rows in are rows out and removed rows; the table names each; a second run of the same config changes nothing; remove=[] keeps all"
    rng = np.random.default_rng(0)
    text = lambda: " ".join(map(str, rng.integers(0, 10_000, 40)))
    rows = [(text(), "yes") for _ in range(50)]
    near = [(f"{q} {q.split()[0]}", a) for q, a in rows[:7]]
    data, bench = write(tmp_path / "rows.jsonl", [*rows, *near, *rows[10:15], (f"Please tell me. {QUESTION}", "9")]), write(tmp_path / "bench.jsonl", [(QUESTION, "#### 9"), ("A short one", "1")])
    overrides = [f"dataset_args.dataset_name={data}", f"benchmarks.sources=[{bench}]", f"save_data_dir={tmp_path}/clean"]
    out = command("decontaminate", *overrides)
    assert out.returncode == 0 and "13 rows removed, 50 written" in out.stdout, out.stdout + out.stderr
    record, _ = the_run("decontaminate")
    counts = record["counts"]["train"]
    assert counts["in"] == 63 == counts["out"] + sum(counts["dropped"].values()) and counts["dropped"] == {"exact duplicate": 5, "near duplicate": 7, "benchmark prompt": 1}
    assert load_splits(f"{tmp_path}/clean")["train"]["question"][:] == [q for q, _ in rows]
    removed = clean(*overrides).removed
    assert removed["match"].tolist() == [*(f"train:{i}" for i in [*range(7), *range(10, 15)]), "train:0"] and removed["same_answer"].tolist()[-1] is True
    assert all(line["rows"] == 7 for line in record["curves"]["near duplicates by similarity"] if line["similarity"] <= 0.9)
    again = command("decontaminate", *overrides)
    assert again.returncode == 0 and len(the_run("decontaminate")[0]["attempts"]) == len(record["attempts"])
    assert clean(*overrides, "remove=[]").counts["train"]["dropped"] == {}


@pytest.mark.parametrize("given, message", [
    ("benchmarks.sources=[EMPTY]", "empty"), ("benchmarks.sources=[HASHES]", "n-grams of 5 words"), ("benchmarks.sources=[{path: ROWS, promt: question}]", "'prompt'"),
    ("benchmarks.sources=[ROWS, ROWS]", "Two benchmarks"), ("benchmarks.sources=[BLANK]", "none of its 1 prompts"), ("benchmarks.sources=[ROWS]", "All 2 rows"), ("dataset_args.splits=[trian]", "'train'"),
    ("benchmarks.sources=[missing.jsonl]", "missing.jsonl"), ("benchmarks.sources=[BROKEN]", "no list of hashes")])
def test_bad_input_is_refused_by_name(tmp_path, tmp_root, given, message):
    rows = write(tmp_path / "rows.jsonl", [(QUESTION, "9"), (f"{QUESTION} Now.", "9")])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.hashes.parquet").write_text("no")
    write(tmp_path / "blank.jsonl", [("?", "9")])
    hashes = contamination.save_benchmark(contamination.hash_benchmark([("a", QUESTION, "9")], "five", 5), tmp_path)
    places = dict(EMPTY=tmp_path / "empty.jsonl", HASHES=hashes, ROWS=rows, BLANK=tmp_path / "blank.jsonl", BROKEN=tmp_path / "broken.hashes.parquet")
    for name, path in places.items(): given = given.replace(name, str(path))
    with pytest.raises(UserError, match=message): clean(f"dataset_args.dataset_name={rows}", given)


def test_memory_of_a_row_is_bounded():
    "4 million rows fit into 4 GB: below 0.5 kB for each, whatever the length of the text"
    sketches = duplicates.sketch_texts((f"{i} " * 50 + "a b c d e f" for i in range(200)), 200)
    assert sum(a.nbytes for a in (sketches.bands, sketches.marks, sketches.words, sketches.digests)) <= 0.5e3 * 200


def test_a_crowded_band_stays_linear_and_is_reported():
    "Rows of one template below the threshold: each is compared with a bounded number, and those not compared with all are counted"
    frame = " ".join(f"w{i}" for i in range(60))
    texts = [f"{frame} {' '.join(f'{n}x{k}' for k in range(30))}" for n in range(400)]
    settings = duplicates.SketchSettings()
    pairs, full = duplicates.candidate_pairs(duplicates.sketch_texts(texts, len(texts), settings), settings)
    assert len(pairs) <= 8 * len(texts) and full.sum() <= len(texts)
    same = duplicates.sketch_texts([f"{frame} {i % 2}" for i in range(400)], 400, settings)
    pairs, full = duplicates.candidate_pairs(same, settings)
    assert len(pairs) <= 8 * 400 and full.sum() == 400 - 33
