"Damaged, lost and hostile files: a command ends with the same result, or with exit 2 and the name of what is damaged"
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from post_training import cli, run
from post_training.config.compose import compose
from post_training.core.files import UserError, atomic_dir, leftovers, temporary_dir, verify_once, write_atomic, write_json, write_manifest
from post_training.launch.runs import delete_checkpoints, gc_checkpoints, referenced_checkpoints
from post_training.run.check import repair_run, verify_run
from post_training.run.find import records_of

CFG = compose("train_sft", ["job_subdir=attempts", "training_args.logging_steps=1", "training_args.max_steps=4"]).cfg
SEED = int(os.environ.get("DAMAGE_SEED", 0))


def config(top, **kw):
    "A config with records and artifacts below a folder"
    text = json.dumps({**CFG, "runs_dir": f"{top}/runs", "artifacts_dir": f"{top}/artifacts"})
    return json.loads(text.replace(f'"{CFG["artifacts_dir"]}/', f'"{top}/artifacts/')) | kw


def checkpoint(folder, step):
    p = Path(folder)/f"checkpoint-{step}"
    p.mkdir(parents=True)
    (p/"model.safetensors").write_bytes(bytes(range(256))*step)
    write_manifest(p, step=step)
    return p


def finished_run(cfg):
    "A run as training leaves it, without the training"
    task = run.open_run(cfg)
    for step in (2, 4): checkpoint(task.checkpoints_dir, step)
    for step in range(1, 5): run.append_metrics(task.run_dir, dict(step=step, loss=1/step))
    write_json(task.checkpoints_dir/"evaluation-before.json", dict(accuracy=.5, samples=[]))
    for name in ("stdout.log", "stderr.log"): write_atomic(task.attempt_dir/name, "a line\n"*9)
    for folder in (task.attempt_dir, task.run_dir): write_json(folder/"train_sft.ipynb", dict(cells=[]))
    run.update_record(task.run_dir, status="finished", final=dict(checkpoint="checkpoint-4", step=4), total_steps=4)
    run.close_attempt(task.run_dir, 1, 0)
    return task


@pytest.fixture
def finished(tmp_root):
    return finished_run(config(tmp_root))


def command(*argv):
    "(exit code, what a command printed); an exception is a failure of the test"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main(list(argv))
    return code, out.getvalue() + err.getvalue()


def files_of(task):
    found = [p for top in (task.run_dir, task.checkpoints_dir) for p in top.rglob("*") if p.is_file() and p.stat().st_size]
    return sorted(p for p in found if not p.name.startswith("."))


def damaged(data, how, rng):
    at = rng.randrange(len(data))
    if how == "flipped": return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:]
    return {"cut": data[:at], "empty": b"", "binary": b"\xff\xfe\x00"*9, "list": b"[]", "braces": b"{}",
            "null": b"null", "deep": b"["*5000}[how]


def test_verify_notices_every_damage(finished):
    "Every file of a finished run, flipped, cut, emptied and removed"
    assert verify_run(finished.run_dir) == []
    rng, missed = random.Random(SEED), []
    for path in files_of(finished):
        data = path.read_bytes()
        path.chmod(0o644)
        for how in ("flipped", "cut", "empty", "gone"):
            path.unlink() if how == "gone" else path.write_bytes(damaged(data, how, rng))
            flips_a_number = path.name == "record.json" and how == "flipped" # valid JSON with another loss says nothing
            if not verify_run(finished.run_dir) and not flips_a_number: missed.append((path.name, how))
            path.write_bytes(data)
    assert not missed and verify_run(finished.run_dir) == []


@pytest.mark.parametrize("how", ["gone", "cut", "braces", "list", "null", "binary", "deep"])
def test_a_lost_record_is_named_and_rebuilt(finished, how):
    "Nothing begins anew next to whole checkpoints; `runs repair` takes them up"
    path, cfg = finished.run_dir/"record.json", config(finished.run_dir.parents[3])
    data = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(damaged(data, how, random.Random(1)))
    for start in (lambda: run.open_run(cfg), lambda: run.queue_run(cfg)):
        with pytest.raises(UserError, match=f"record.json.*runs repair {finished.run_dir.name}"): start()
    assert sorted(p.name for p in finished.checkpoints_dir.parent.iterdir()) == ["g1"]
    code, said = command("runs", "verify")
    assert code == 1 and finished.run_dir.name in said
    code, said = command("runs", "repair", finished.run_dir.name)
    assert code == 0 and "checkpoint-4 is the newest complete one" in said
    task = run.open_run(cfg)
    assert (task.status, task.number, task.checkpoints_dir) == ("resume", 2, finished.checkpoints_dir)
    run.close_attempt(task.run_dir, 2, 1)


def test_force_on_a_damaged_record_keeps_everything(finished):
    cfg = config(finished.run_dir.parents[3])
    (finished.run_dir/"record.json").write_text("{}")
    task = run.open_run(cfg, force=True)
    record = run.read_record(task.run_dir)
    assert (task.number, record["generation"], record["earlier"][0]["generation"]) == (2, 2, 1)
    assert (finished.checkpoints_dir/"checkpoint-4").is_dir() and (task.run_dir/"metrics-g1.jsonl").is_file()
    run.close_attempt(task.run_dir, 2, 1)


CHANGES = [("record.json", dict(counts=[1])), ("record.json", dict(overrides=3)), ("metrics.jsonl", None)]
def test_a_notebook_without_cells_and_a_record_without_status(finished):
    (finished.run_dir/"train_sft.ipynb").write_text('{"nbformat": 4}')
    code, said = command("runs", "keep", finished.run_dir.name)
    assert code == 2 and "train_sft.ipynb is damaged" in said, said
    path = finished.run_dir/"record.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(status=None)))
    for argv in (["runs"], ["board", "--out", str(finished.run_dir.parent/"page")]):
        code, said = command(*argv)
        assert code == 0 and "Traceback" not in said, said


@pytest.mark.parametrize("name,change", CHANGES)
def test_a_value_or_file_of_another_kind_is_named(finished, name, change):
    path = finished.run_dir/name
    path.chmod(0o644)
    if change: path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.unlink()
        path.mkdir()
    run_name = path.parent.name
    for argv in (["verify", run_name], ["show", run_name] if change else ["diff", run_name, run_name]):
        code, said = command("runs", *argv)
        assert code in (1, 2) and name in said, (argv, code, said)


@pytest.mark.parametrize("content", [None, b"", b"stage: train_sft\n", b"a: [", b"\xff\xfe", b"- 1\n", b"x\n"])
def test_a_lost_config_is_named_and_restored(finished, content):
    path, cfg = finished.run_dir/"config.yaml", config(finished.run_dir.parents[3])
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    run.edit_record(finished.run_dir, lambda r: r.update(status="failed"))
    with pytest.raises(UserError, match="config.*runs repair"): run.open_run(cfg)
    assert "config.yaml restored" in repair_run(finished.run_dir)
    assert path.read_bytes() == before


def test_one_damaged_record_hides_no_other_run(tmp_root):
    one, other = (finished_run(config(tmp_root, job_subdir=name)) for name in ("attempts", "b"))
    (one.run_dir/"record.json").write_text('{"stage": "train_sft", "conf')
    for argv in (["runs"], ["jobs"], ["jobs", "--all"], ["runs", "gc", "--failed", "--yes"], ["runs", "verify"]):
        code, said = command(*argv)
        assert code == (argv[-1] == "verify") and (other.run_dir.name in said or argv[1:2] != ["verify"])
    assert "damaged" in command("runs")[1] and command("runs", "--status", "finished")[0] == 0
    folders, notices = gc_checkpoints([str(other.run_dir)], all_checkpoints=True)
    assert len(folders) == 2 and any("record.json" in n for n in notices)


def test_runs_behind_links_and_under_any_name_are_found(tmp_root):
    task = finished_run(config(tmp_root)) # job_subdir=attempts
    assert run.all_runs() == [task.run_dir]
    shutil.move(tmp_root/"runs/train_sft", tmp_root/"elsewhere")
    (tmp_root/"runs/train_sft").symlink_to(tmp_root/"elsewhere")
    (tmp_root/"elsewhere/loop").symlink_to(tmp_root/"elsewhere")
    assert [p.name for p in run.all_runs()] == [task.run_dir.name]


def test_moved_artifacts_are_found_by_all(tmp_root, monkeypatch):
    "After the artifacts were moved, verify, run:RUN and the next start agree"
    task = finished_run(config(tmp_root))
    shutil.move(tmp_root/"artifacts", tmp_root/"b")
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_root/"b"))
    assert verify_run(task.run_dir) == []
    path, _ = run.base_model(f"run:{task.run_dir.name}")
    assert Path(path).is_relative_to(tmp_root/"b") and run.is_trained(task.run_dir)


@pytest.mark.parametrize("key", ["checkpoints", "sources", "base", "ref_model_args"])
def test_gc_keeps_what_a_starting_run_names(tmp_root, key):
    "Checkpoints that an evaluation, a merge or preference training will read, by run:NAME and by path"
    task, name = finished_run(config(tmp_root)), "other-01234567"
    for value in (f"run:{task.run_dir.name}", str(task.checkpoints_dir/"checkpoint-4")):
        named = dict(checkpoints=dict(checkpoints=[value]), base=dict(base_model=value),
                     sources=dict(model_merging=dict(models=[dict(model=value)])),
                     ref_model_args=dict(ref_model_args=dict(model_name_or_path=value)))[key]
        write_json(tmp_root/f"runs/evaluate/{name}/record.json",
                   dict(stage="evaluate", id=name, status="queued", config=named | dict(runs_dir=str(tmp_root/"runs"))))
        folders, _ = gc_checkpoints([str(task.run_dir)], all_checkpoints=True)
        assert {p.path.name: p.keep_reason for p in folders}["checkpoint-4"] == f"needed by {name}", value
    assert referenced_checkpoints(records_of(run.all_runs())[0])


KILL = """
import sys, os, signal
sys.path.insert(0, {tests!r})
from test_damage import config, run
from post_training.run import attempt
calls = 0
for name in ("write_atomic", "save_frozen", "edit_record", "_settle", "_claim_generation"):
    def killed(*a, f=getattr(attempt, name), **k):
        global calls
        calls += 1
        if calls == {at}: os.kill(os.getpid(), signal.SIGKILL)
        return f(*a, **k)
    setattr(attempt, name, killed)
run.open_run(config({top!r}), force=True)
"""


@pytest.mark.parametrize("at", range(1, 7))
def test_force_killed_at_its_start_loses_nothing(finished, at):
    "At each step of the beginning of a generation: the finished run is whole, or the new one has its own clean files"
    top = finished.run_dir.parents[3]
    metrics = (finished.run_dir/"metrics.jsonl").read_bytes()
    program = KILL.format(tests=str(ROOT/"tests"), at=at, top=str(top))
    p = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    if run.read_record(finished.run_dir)["generation"] == 1:
        assert run.open_run(config(top)).status == "done" and verify_run(finished.run_dir) == []
        assert (finished.run_dir/"metrics.jsonl").read_bytes() == metrics
        return
    task = run.open_run(config(top))
    assert (task.checkpoints_dir.name, run.read_metrics(task.run_dir)) == ("g2", [])
    assert (task.run_dir/"metrics-g1.jsonl").read_bytes() == metrics and not (task.run_dir/"train_sft.ipynb").exists()
    run.close_attempt(task.run_dir, task.number, 1)


def test_what_killed_writers_left_is_cleared(finished):
    "Temporary files and folders, and an attempt's notebook that was cut"
    program = ("import sys, time; from post_training.core.files import atomic_dir\n"
               "with atomic_dir(sys.argv[1]) as tmp: print('ready', flush=True); time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", program, str(finished.run_dir/"export")], stdout=subprocess.PIPE, cwd=ROOT)
    assert p.stdout.readline()
    cut = finished.run_dir/".record.json.abcd1234"
    cut.write_text("{")
    os.utime(cut, (0, 0))
    time.sleep(1.1)
    assert leftovers(finished.run_dir) == [cut] # the other writer lives
    p.kill()
    p.wait()
    assert len(leftovers(finished.run_dir)) == 2 and len(verify_run(finished.run_dir)) == 2
    with atomic_dir(finished.run_dir/"export"): pass
    run.edit_record(finished.run_dir, lambda r: (r.update(status="failed"), r["attempts"][0].pop("exit")))
    (finished.attempt_dir/"train_sft.ipynb").write_text('{"cells": [')
    task = run.open_run(config(finished.run_dir.parents[3]))
    assert leftovers(finished.run_dir) == [] and not (finished.attempt_dir/"train_sft.ipynb").exists()
    run.close_attempt(task.run_dir, task.number, 1)


def test_gc_removes_what_killed_processes_left(finished):
    "Listed first; removed with the checkpoints, in the folders of the run and among the artifacts; a living writer keeps its folder"
    top = finished.run_dir.parents[3]
    (top/"artifacts/datasets").mkdir(exist_ok=True)
    dead = [top/"artifacts/datasets/.tmp-rows-abcd1234", finished.run_dir/".record.json.abcd1234", finished.attempt_dir/".tmp-x-abcd1234"]
    for p in dead: p.write_text("{") if "record" in p.name else p.mkdir()
    for p in dead: os.utime(p, (0, 0))
    with temporary_dir(top/"artifacts/datasets") as living:
        os.utime(living, (0, 0))
        run.edit_record(finished.run_dir, lambda r: (r.update(status="failed"), r["attempts"][0].update(exit=1)))
        folders = [f for f in gc_checkpoints(failed=True)[0] if f.kind == "leftover"]
        assert {f.path for f in folders} == {*dead} and all(p.exists() for p in dead)
        delete_checkpoints(folders)
        assert living.exists() and not any(p.exists() for p in dead)


def test_an_output_is_finished_when_its_command_is(tmp_root):
    "A cell that fails after the output was recorded: record, exit and state say failed, and the same command goes on"
    cfg = config(tmp_root)
    task = run.open_run(cfg)
    joined = run.open_run(cfg, attempt=1)
    write_manifest(tmp_root)
    run.finish_output(joined, tmp_root)
    run.close_attempt(task.run_dir, 1, 1, error="the last cell")
    record = run.read_record(task.run_dir)
    assert (record["status"], run.run_status(task.run_dir), run.locate_run(cfg).status) == ("failed", "failed", "resume")


def test_changed_rows_are_noticed_before_training(tmp_path):
    "A flipped bit in saved rows and in the tokenized cache, and a cache without its manifest"
    from datasets import Dataset

    from post_training.data.io import read_saved, save_rows

    folder = Path(save_rows(Dataset.from_list([dict(a=1), dict(a=2)]), str(tmp_path/"rows")))
    assert len(read_saved(folder)["train"]) == 2
    arrow = next(folder.rglob("*.arrow"))
    data = bytearray(arrow.read_bytes())
    data[len(data)//2] ^= 1
    arrow.write_bytes(data)
    program = f"from post_training.core.files import verify_once; print(verify_once({str(folder)!r}))"
    env = {k: v for k, v in os.environ.items() if k != "POST_TRAINING_VERIFIED"}
    fresh = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env)
    assert "another SHA-256" in fresh.stdout
    (folder/"manifest.json").unlink()
    assert "has no manifest.json" in verify_once(folder)[0]


def test_pickles_of_strangers_are_refused(tmp_root):
    "A manifest of one's own making is no permission; a record of this checkout with matching checksums is"
    import pickle

    cfg, ran = config(tmp_root), tmp_root/"ran"

    class Evil:
        def __reduce__(self): return (os.system, (f"touch {ran}",))

    def zero_checkpoint(parent):
        folder = checkpoint(parent, 6)
        write_atomic(folder/"global_step6/zero_pp_rank_0_mp_rank_00_optim_states.pt", pickle.dumps(Evil()))
        shutil.copy(folder/"model.safetensors", folder/"config.json")
        (folder/"model.safetensors").unlink()
        write_manifest(folder, step=6, config_hash=run.config_hash(cfg))
        return folder

    stranger = zero_checkpoint(tmp_root/"stranger")
    code, said = command("export", f"model_args.model_name_or_path={stranger}", f"runs_dir={tmp_root}/runs")
    assert code != 0 and not ran.exists()
    with pytest.raises(UserError, match="may run code"): run.refuse_foreign_pickles(stranger, "FOLDER")
    task = finished_run(cfg)
    for n, tag in enumerate(("a/b", "../elsewhere", str(tmp_root/"elsewhere"))): # partitions that only `latest` names
        folder = checkpoint(tmp_root/f"pointing{n}", 6)
        write_atomic(folder/tag/"mp_rank_00_model_states.pt", pickle.dumps(Evil()))
        (folder/"latest").write_text(tag)
        write_manifest(folder, step=6)
        with pytest.raises(UserError, match="may run code"): run.refuse_foreign_pickles(folder, "FOLDER")
    own = zero_checkpoint(task.checkpoints_dir)
    run.refuse_foreign_pickles(own, "FOLDER")
    with pytest.raises(UserError, match="may run code"): # copied next to its own checkpoints by name alone
        run.refuse_foreign_pickles(shutil.copytree(own, tmp_root/"g1"/own.name), "FOLDER")
    (own/"config.json").write_text("changed")
    with pytest.raises(UserError, match="may run code"): run.refuse_foreign_pickles(own, "FOLDER")
    assert not ran.exists()


# -- a seeded random attack: exit 0 with the same result, or exit 2 with the thing named

VALUES = ["-1", "0", "1e400", ".nan", "null", "true", "[1]", "{a: 1}", "''", "x", "99999999999999999999", "'${a}'",
          "'${oc.env:HOME}'", "/proc/x", "'a" + "b"*300 + "'", "'\\x00'", "[[[1]]]", "-0.5", "'<img src=x>'", "../../x"]
DOCUMENTS = ["a: &a [*a]\n", "- 1\n", "1\n", "a: b: c\n", "a: 1\na: 2\n", "\x00", "a: " + "["*500, "!!python/object:os.system x\n",
             "x: &x [1,2]\n" + "".join(f"x{i}: &x{i} [*x{i-1 if i else ''},*x{i-1 if i else ''}]\n" for i in range(40)),
             "stage: nothing\n", "stage: train_sft\n", "defaults: [x]\n", "dataset_args: {dataset_name: 3}\n"]
DATA = [b"", b"null\n", b"[" * 3000, b'{"messages": null}\n', b'{"messages": [{"role": "user"}]}\n', b"\xff\xfe\n", b"{}\n",
        b'{"messages": "x"}\n', b'{"a": 1}\n[1]\n', b'{"messages": [{"role": 1, "content": {}}]}\n', b"PAR1garbage", b'{"a": NaN}\n']


@contextlib.contextmanager
def time_limit(seconds):
    "A case that takes longer hangs"
    def hang(*_): raise AssertionError("it hangs")
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0)


def attack_key(rng, top):
    from post_training.config.schema import known_keys
    stage = rng.choice(["train_sft", "train_preference", "evaluate", "export", "tokenize", "dataset_mixture"])
    key, value = rng.choice(sorted(known_keys(stage))), rng.choice(VALUES)
    return f"{stage} {key}={value}", lambda: cfg_of(stage, f"{key}={value}"), key.split(".")[-1]


def cfg_of(stage, *overrides):
    compose(stage, list(overrides))
    return 0, ""


def attack_yaml(rng, top):
    path, document = top/"attack.yaml", rng.choice(DOCUMENTS)
    path.write_text(document, newline="")
    argv = rng.choice([["train_sft", f"dataset={path}"], ["train_sft", f"accelerate_config={path}"], ["train_sft", str(path)],
                       ["dataset_mixture", f"mixture={path}"], ["model_merging", f"model_merging={path}"]])
    return f"{argv} {document[:40]!r}", lambda: cfg_of(argv[0], argv[1]), "attack"


def attack_data(rng, top):
    from post_training.data.io import load_rows
    path, content = top/f"attack.{rng.choice(['jsonl', 'json', 'parquet'])}", rng.choice(DATA)
    path.write_bytes(content)
    def read():
        rows = load_rows(str(path))
        for row in rows.select(range(min(3, len(rows)))) if hasattr(rows, "select") else (): row
        return 0, ""
    return f"{path.name} {content[:40]!r}", read, "attack"


def attack_run(rng, top, made={}):
    if top not in made:
        made[top] = finished_run(config(top))
        for name in ("runs", "artifacts"): shutil.copytree(top/name, top/"kept"/name)
    for name in ("runs", "artifacts"):
        shutil.rmtree(top/name, ignore_errors=True)
        shutil.copytree(top/"kept"/name, top/name)
    task = made[top]
    path, how = rng.choice(files_of(task)), rng.choice(["flipped", "cut", "empty", "binary", "list", "braces", "null", "deep", "gone"])
    data = path.read_bytes()
    path.chmod(0o644)
    path.unlink() if how == "gone" else path.write_bytes(damaged(data, how, rng))
    def look():
        for argv in (["runs"], ["runs", "verify", str(task.run_dir)], ["jobs"], ["runs", "gc", "--failed", "--yes"]):
            assert command(*argv)[0] in (0, 1, 2), argv
        command("runs", "show", str(task.run_dir))
        opened = run.open_run(config(top))
        if opened.status != "done": run.close_attempt(opened.run_dir, opened.number, 1)
        assert opened.checkpoints_dir == task.checkpoints_dir, "another generation was begun"
        return 0, ""
    return f"{path.name} {how}", look, None


@pytest.mark.slow
def test_a_random_attack(tmp_root):
    "200 cases of keys, YAML, data files and damaged runs; DAMAGE_SEED gives others"
    rng, faults = random.Random(SEED), []
    attacks = [attack_key]*3 + [attack_yaml]*2 + [attack_data]*8 + [attack_run]*3
    for n in range(200):
        what, call, name = rng.choice(attacks)(rng, tmp_root)
        try:
            with time_limit(30), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): call()
        except UserError as e:
            if name and name not in str(e): faults.append(f"{n} {what}: not named: {e}")
        except (Exception, SystemExit) as e: # anything else is the fault that is looked for
            faults.append(f"{n} {what}: {type(e).__name__}: {e}")
    assert not faults, "\n".join(faults)
