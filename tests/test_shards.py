"Shards: the same bytes however the work was cut, stopped and killed; nothing is merged that is not whole."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import shards_worker
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.core import shards
from post_training.core.files import MANIFEST, UserError, write_json
from post_training.core.shards import (
    ShardWorkerFailed, load_shard_plan, make_shard_plan, merge_shards, pack_floats, shard_progress, read_progress, run_workers, save_shard_plan, shard_folder,
    token_batches, unpack_floats, run_shard)

SCRIPT = Path(shards_worker.__file__)
ROWS = 90


def planned(folder, n=1, rows=ROWS, **params):
    "A plan of about 30 batches"
    save_shard_plan(folder, make_shard_plan([f"r{i}" for i in range(rows)], [1 + i * 7919 % 23 for i in range(rows)], params, budget=40, shards=n))
    return folder


def merged(folder):
    told = merge_shards(folder, folder / "out.jsonl")
    return (folder / "out.jsonl").read_bytes(), told


def calls(folder):
    "The batches that were begun"
    path = folder / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(folder, n=1, **params):
    planned(folder, n, **params)
    for k in range(load_shard_plan(folder).shards): run_shard(folder, k, shards_worker.toy)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    "Merged bytes and counts of one shard that nothing disturbed"
    return merged(finished(tmp_path_factory.mktemp("one")))


def start(folder, shard, *options, name="toy"):
    return subprocess.Popen([sys.executable, SCRIPT, name, folder, "--shard", str(shard), *options], stderr=subprocess.PIPE, text=True)


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


# -- any cut

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=80), st.integers(1, 200), st.integers(0, 9))
def test_batches_hold_each_row_once_within_the_budget(lengths, budget, most):
    batches = token_batches(lengths, budget, most)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget
        assert not most or len(b) <= most


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 90), st.integers(0, 5), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_number_of_shards_merges_to_the_same_bytes(lengths, budget, most, n, save_batches, rng):
    "Rows, batches, shards, their order and the saves are drawn; what is merged does not depend on the last three"
    keys, results = [f"r{i}" for i in range(len(lengths))], []
    for count in (1, n):
        with tempfile.TemporaryDirectory() as d:
            folder = Path(d) / "work"
            plan = save_shard_plan(folder, make_shard_plan(keys, lengths, {}, budget, most, shards=count))
            assert plan.shards == max(1, min(count, len(plan.batches))) and all(plan.by_shard) == bool(plan.batches)
            order = list(range(plan.shards))
            rng.shuffle(order)
            for k in order: run_shard(folder, k, shards_worker.toy, save_batches)
            results.append((*merged(folder), plan.fingerprint))
            assert shard_progress(folder)["share"] == 1 and sorted(calls(folder)) == sorted(plan.batches)
    assert results[0] == results[1]
    lines, told = results[0][0].decode().splitlines(), results[0][1]
    assert [json.loads(line)["id"] for line in lines] == [k for i, k in enumerate(keys) if i % 7 != 3]
    assert told["rows"] == len(lines) and sum(told["dropped"].values()) == len(keys) - len(lines)


def test_shares_are_even():
    "No shard has more than a fair share and one batch"
    rng = random.Random(3)
    plan = make_shard_plan(range(5000), [int(rng.lognormvariate(5, 1)) + 1 for _ in range(5000)], {}, budget=4096, shards=7)
    loads = [sum(plan.costs[b] for b in mine) for mine in plan.by_shard]
    assert max(loads) - min(loads) <= max(plan.costs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_packed_floats_come_back_bit_for_bit(bits):
    "Any pattern of 32 bits, NaN with its payload too"
    a = np.array(bits, dtype=np.uint32).view(np.float32)
    assert unpack_floats(json.loads(json.dumps(pack_floats(a)))).tobytes() == a.tobytes()


# -- killed and stopped

def dies_at(folder, k, save_batches):
    "Work in a forked process that ends, without a word, before its k-th call that changes the disk; False where it came to its end"
    pid = os.fork()
    if pid == 0:
        left = [k]

        def counted(real):
            def call(*args, **kwargs):
                if left[0] == 0: os._exit(9)
                left[0] -= 1
                return real(*args, **kwargs)
            return call
        for name in ("fsync", "replace", "unlink"): setattr(os, name, counted(getattr(os, name)))
        run_shard(folder, 0, shards_worker.toy, save_batches)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_death_before_any_change_of_the_disk(tmp_path):
    "Every point in turn: the same bytes, at most one save interval made twice"
    want, every = merged(finished(tmp_path / "one", rows=24)), 2
    for k in range(1000):
        folder = planned(tmp_path / str(k), rows=24)
        died = dies_at(folder, k, every)
        run_shard(folder, 0, shards_worker.toy, every)
        assert merged(folder) == want
        assert len(calls(folder)) <= len(load_shard_plan(folder).batches) + every
        if not died: break
    assert 10 < k < 999


def test_kill_9_in_the_middle(tmp_path, expected):
    "A worker that is killed again and again, at any instant"
    rng, every, kills = random.Random(1), 3, 0
    folder = planned(tmp_path, 1, wait=0.01)
    n = len(load_shard_plan(folder).batches)
    while True:
        before = len(calls(folder))
        p = start(folder, 0, "--save-batches", str(every))
        wait_for(lambda: p.poll() is not None or len(calls(folder)) >= before + rng.randint(every + 1, 13))
        time.sleep(rng.random() * 0.01)
        if p.poll() is not None: break
        p.kill(); p.communicate()
        kills += 1
        kept = read_progress(shard_folder(folder, load_shard_plan(folder), 0)).get("batches", 0)
        assert kept >= len(calls(folder)) - kills * every, "more than a save interval was lost"
    assert p.returncode == 0, p.communicate()[1]
    assert kills >= 2 and len(calls(folder)) <= n + kills * every
    assert merged(folder)[0] == merged(finished(tmp_path / "calm", wait=0.0))[0] == expected[0]


def test_asked_to_leave_it_saves(tmp_path):
    "SIGTERM: nothing is lost but the batch in work"
    folder = planned(tmp_path, 1, wait=0.1)
    p = start(folder, 0)
    wait_for(lambda: len(calls(folder)) >= 4)
    p.terminate(); p.communicate()
    assert p.returncode == 143
    assert read_progress(shard_folder(folder, load_shard_plan(folder), 0))["batches"] >= len(calls(folder)) - 1


def test_workers_end_with_the_process_that_started_them(tmp_path, expected):
    folder = planned(tmp_path, 4, wait=0.02)
    code = f"from post_training.core.shards import run_workers; run_workers({str(folder)!r}, [{sys.executable!r}, {str(SCRIPT)!r}, 'toy'], processes=3, save_batches=1)"
    p = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(calls(folder)) >= 6)
    p.kill(); p.wait()
    time.sleep(0.2)
    still = len(calls(folder))
    time.sleep(0.2)
    assert len(calls(folder)) == still
    assert run_workers(folder, [sys.executable, SCRIPT, "toy"], processes=2)["rows"] == ROWS
    assert merged(folder)[0] == expected[0] and len(calls(folder)) <= len(load_shard_plan(folder).batches) + 2 * 3


def test_a_full_disk_ends_the_worker_and_spoils_nothing(tmp_path, expected, monkeypatch):
    folder, real = planned(tmp_path), os.fsync

    def full(fd):
        if len(calls(folder)) >= 7: raise OSError(28, "No space left on device")
        real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): run_shard(folder, 0, shards_worker.toy, save_batches=2)
    assert read_progress(shard_folder(folder, load_shard_plan(folder), 0))["batches"] == 6
    monkeypatch.undo()
    run_shard(folder, 0, shards_worker.toy, save_batches=2)
    assert merged(folder) == expected


@pytest.mark.parametrize("damage", ["cut", "changed", "progress gone", "tail"])
def test_a_damaged_part_is_not_continued(damage, tmp_path, expected):
    "What counts has to be what was written; what stands behind it does not matter"
    folder = planned(tmp_path)

    def stops(folder, plan):
        make = shards_worker.toy(folder, plan)
        return lambda batch: make(batch) if len(calls(folder)) < 6 else 1 / 0
    with pytest.raises(ZeroDivisionError) as e: run_shard(folder, 0, stops)
    assert "at the rows" in e.value.__notes__[0]
    at = shard_folder(folder, load_shard_plan(folder), 0)
    data = (at / "rows.txt").read_bytes()
    if damage == "cut": (at / "rows.txt").write_bytes(data[:-5])
    if damage == "changed": (at / "rows.txt").write_bytes(data.replace(b"score", b"scare", 1))
    if damage == "progress gone": (at / "progress.json").unlink()
    if damage == "tail": (at / "rows.txt").write_bytes(data + b'7\t{"half')
    run_shard(folder, 0, shards_worker.toy)
    assert merged(folder) == (expected[0], expected[1] | dict(fingerprint=load_shard_plan(folder).fingerprint))
    assert len(calls(folder)) == len(load_shard_plan(folder).batches) + (0 if damage == "tail" else 6)


# -- one worker for a shard

def test_lock_of_the_living_and_of_the_dead(tmp_path):
    folder = planned(tmp_path, 2, wait=0.3)
    p = start(folder, 0)
    wait_for(lambda: calls(folder))
    with pytest.raises(UserError, match=rf"Process {p.pid} on .* is at work on shard 0000-of-0002"): run_shard(folder, 0, shards_worker.toy)
    told = shard_progress(folder)
    assert told["rows"] == 0 and told["of"] == ROWS and told["per_second"] is None  # nothing is saved yet
    with shards.hold_shard(shard_folder(folder, load_shard_plan(folder), 1)): pass  # the other shard is free
    p.kill(); p.communicate()
    assert (tmp_path / "shards" / "0000-of-0002.lock").read_text().startswith(f"Process {p.pid}")  # it is still there and nobody holds it
    at = shard_folder(folder, load_shard_plan(folder), 0)
    with shards.hold_shard(at): assert (tmp_path / "shards" / "0000-of-0002.lock").read_text().startswith(f"Process {os.getpid()}")


def test_progress_counts_what_is_saved(tmp_path):
    folder, seen = planned(tmp_path, 2, wait=0.02), []
    run_workers(folder, [sys.executable, SCRIPT, "toy"], processes=2, tick=seen.append, every=0.05, save_batches=1)
    assert [s["rows"] for s in seen] == sorted(s["rows"] for s in seen) and seen[-1] == dict(rows=ROWS, of=ROWS, shards=2, of_shards=2, share=1., per_second=None)
    rates = [s["per_second"] for s in seen if s["per_second"]]
    assert rates and 1 < rates[-1] < 4 * ROWS / (0.02 * len(load_shard_plan(folder).batches))  # two workers, each waits 0.02 s a batch


# -- what is done is not done again

def test_one_task_of_an_array_is_done_again_alone(tmp_path, monkeypatch, expected):
    "SLURM_ARRAY_TASK_COUNT is 1 where a single task is submitted again; the plan knows better"
    folder = planned(tmp_path, 7)
    plan = load_shard_plan(folder)
    for task in range(7):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task)); monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "7")
        assert shards.run_shard_worker(dict(toy=shards_worker.toy), ["toy", str(folder), "--array"]) == 0
    at = shard_folder(folder, plan, 3)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("rows.txt") if p.parent != at}
    shutil.rmtree(at); (folder / "calls.txt").unlink()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3"); monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    assert shards.run_shard_worker(dict(toy=shards_worker.toy), ["toy", str(folder), "--array"]) == 0
    assert calls(folder) == [plan.batches[b] for b in plan.by_shard[3]]
    assert times == {p: p.stat().st_mtime_ns for p in times} and merged(folder)[0] == expected[0]


def test_finished_shards_load_nothing(tmp_path):
    folder = finished(tmp_path, 3)

    def never(folder, plan): raise AssertionError("a model was loaded for nothing")
    assert [run_shard(folder, k, never) for k in range(3)] == [0, 0, 0]
    assert run_workers(folder, ["/no/such/command"])["shards"] == 3


# -- refused

def damage_of(folder, plan, kind):
    "What is done to the shards, and what has to be said of it"
    first, second = (shard_folder(folder, plan, k) for k in (0, 1))
    row = plan.keys[min(i for b in plan.by_shard[1] for i in plan.batches[b])]
    if kind == "missing": shutil.rmtree(second); return [r"rows of shard 0001-of-0003 missing", f"'{row}'"]
    if kind == "unfinished": (second / MANIFEST).unlink(); return [r"0001-of-0003: it is not finished: \d+ rows are saved", f"'{row}'"]
    if kind == "corrupt": (second / "rows.txt").write_bytes((second / "rows.txt").read_bytes().replace(b"score", b"scare", 1)); return ["0001-of-0003: rows.txt has another SHA-256", f"'{row}'"]
    if kind == "short": (second / "rows.txt").write_bytes((second / "rows.txt").read_bytes()[:-9]); return [r"0001-of-0003: rows.txt has \d+ bytes, not \d+"]
    if kind == "no manifest to read": (second / MANIFEST).write_text("{"); return ["0001-of-0003/manifest.json is not readable"]
    if kind == "double": shutil.copytree(second, folder / "shards" / "0000-of-0005"); return ["rows duplicated, in 0000-of-0005 and 0001-of-0003", f"'{row}'"]
    if kind == "in another's place": shutil.rmtree(first); shutil.copytree(second, first); return ["of shard 0000-of-0003 missing", "duplicated, in 0000-of-0003 and 0001-of-0003"]
    write_json(second / MANIFEST, json.loads((second / MANIFEST).read_text()) | dict(fingerprint="0" * 64))
    return ["0001-of-0003: it is foreign", f"'{row}'"]


@pytest.mark.parametrize("kind", ["missing", "unfinished", "corrupt", "short", "no manifest to read", "double", "in another's place", "foreign"])
def test_what_is_not_whole_is_named_and_not_merged(kind, tmp_path, expected):
    folder = finished(tmp_path, 3)
    for word in (said := damage_of(folder, load_shard_plan(folder), kind)):
        with pytest.raises(UserError, match=word): merge_shards(folder, folder / "out.jsonl")
    assert said and not (folder / "out.jsonl").exists() and not list(folder.glob(".out*"))
    if kind == "double": shutil.rmtree(folder / "shards" / "0000-of-0005")
    run_workers(folder, [sys.executable, SCRIPT, "toy"], shards=range(3)) if kind != "in another's place" else shutil.rmtree(folder / "shards")
    if kind == "in another's place": finished(folder, 3)
    assert merged(folder)[0] == expected[0]  # and mended by running again


def test_another_plan_is_refused(tmp_path):
    folder = planned(tmp_path, 3, model="a", seed=1)
    planned(folder, 3, model="a", seed=1)
    assert load_shard_plan(planned(folder, 5, model="a", seed=1)).shards == 5  # nothing is begun
    run_shard(folder, 0, shards_worker.toy)
    with pytest.raises(UserError, match="planned for 5 shards and 1 have begun, so the number cannot change to 7"): planned(folder, 7, model="a", seed=1)
    with pytest.raises(UserError, match="with other model. Choose another folder"): planned(folder, 5, model="b", seed=1)
    with pytest.raises(UserError, match="with other rows"): planned(folder, 5, rows=ROWS + 1, model="a", seed=1)
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"r1"', '"r9999"'))
    with pytest.raises(UserError, match="has been changed"): run_shard(folder, 0, shards_worker.toy)
    (folder / "plan.json").write_text(text[:99])
    with pytest.raises(UserError, match="not readable"): merge_shards(folder, folder / "out.jsonl")


@pytest.mark.parametrize("rows, said", [([dict(x=float("nan"))], "row 'r0' cannot be kept exactly"), ([dict(x=np.float32(1))], "row 'r0' cannot be kept exactly"),
                                        ([], "0 results for a batch of 1 rows, 'r0'"), ([dict(dropped=None)], "the reason has to be a text")])
def test_results_that_cannot_be_kept(rows, said, tmp_path):
    save_shard_plan(tmp_path, make_shard_plan(["r0"], [1], {}, budget=9))
    with pytest.raises(ValueError, match=said): run_shard(tmp_path, 0, lambda folder, plan: lambda batch: rows)


# -- workers that fail

def test_a_fault_leaves_the_others_alone(tmp_path, expected, monkeypatch):
    "They finish, no further shard is begun, and another run goes on from there"
    folder = planned(tmp_path, 5, row=13, wait=0.15)  # in the first batch of its shard
    bad = (plan := load_shard_plan(folder)).shard_of[next(b for b, batch in enumerate(plan.batches) if 13 in batch)]
    with pytest.raises(ShardWorkerFailed) as e: run_workers(folder, [sys.executable, SCRIPT, "fault"], processes=2, shards=[bad, *(k for k in range(5) if k != bad)], save_batches=1)
    said = str(e.value)
    assert f"The worker of shard {bad} ended with exit code 1" in said and "MemoryError: no more memory" in said and "at the rows" in said
    assert "finished nevertheless: 1" in said and "not begun: 3" in said
    assert shard_progress(folder)["shards"] == 1 and len(list((folder / "shards").glob("*.log"))) == 2
    monkeypatch.setattr(shards_worker.time, "sleep", lambda seconds: None)
    for k in range(5): run_shard(folder, k, shards_worker.toy)
    assert merged(folder)[0] == expected[0]


def test_a_mistake_stops_the_others(tmp_path):
    "The same would come there; the message is the worker's"
    save_shard_plan(tmp_path, make_shard_plan(range(40), [9] * 40, dict(wait=0.3), budget=9, shards=4))
    with pytest.raises(UserError, match=r"There is no model 'tini'") as e: run_workers(tmp_path, [sys.executable, SCRIPT, "mistake"], processes=2)
    assert "stopped, because the same would happen there: 1" in str(e.value) and "not begun: 2" in str(e.value)
    assert 0 < shard_progress(tmp_path)["rows"] < 10  # the one that was stopped has saved


def test_a_killed_worker_is_told(tmp_path):
    folder = planned(tmp_path, 1, wait=0.01)
    code = f"import os, signal\nfrom post_training.core.shards import run_shard_worker\ndef toy(folder, plan): os.kill(os.getpid(), {int(signal.SIGKILL)})\nrun_shard_worker(dict(toy=toy))"
    with pytest.raises(ShardWorkerFailed, match="was ended by signal 9"): run_workers(folder, [sys.executable, "-c", code, "toy"])
    with pytest.raises(UserError, match=r"There is no 'toyy' to work on. Did you mean 'toy'\?"): run_workers(folder, [sys.executable, SCRIPT, "toyy"])
    with pytest.raises(UserError, match="There is no shard 9"): run_workers(folder, [sys.executable, SCRIPT, "toy"], shards=[0, 9])
