"The pre-flight as the batch script starts it: one process per node, on loopback; what it says, how it ends and how long it takes."
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from post_training import config
from post_training.launch import preflight
from post_training import run

PAIR = ["cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=1", "num_nodes=2", "accelerate_config=ddp"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def attempt(demo, tmp_path, monkeypatch):
    "An open attempt of a two-node run, whose model and data are those of all tests"
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    opened = run.open_run(config.compose("train_sft", [*PAIR, f"artifacts_subdir={tmp_path.name}"]).cfg)
    yield opened
    run.close_attempt(opened.run_dir, opened.number, 130)


def changed(attempt, name, **keys):
    "The attempt's config with other values, beside it"
    cfg = config.load_frozen(attempt.config_path)
    for key, value in keys.items(): config.set_key(cfg, key.replace("__", "."), value)
    return config.save_frozen(cfg, attempt.attempt_dir / name)


def start(rank, path, port, seconds=60, nodes=2, address="127.0.0.1", *more):
    argv = [sys.executable, "-m", "post_training.launch.preflight", path, "--address", address, "--port", port, "--rank", rank, "--nodes", nodes, "--seconds", seconds, *more]
    env = os.environ | dict(SLURMD_NODENAME=f"n{rank}", SLURM_JOB_NODELIST="n[0-1]", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    return subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ended(*tasks):
    "(codes, outputs, errors) of tasks that were started"
    said = [t.communicate(timeout=100) for t in tasks]
    return [t.returncode for t in tasks], [out for out, _ in said], [err for _, err in said]


def error_of(attempt):
    error = json.loads((attempt.attempt_dir / "error.json").read_text())
    assert error["where"] == "pre-flight"
    return error["kind"], error["message"]


def left_behind(attempt):
    return [p.name for folder in (attempt.attempt_dir, attempt.run_dir, attempt.checkpoints_dir) for p in folder.glob(".preflight-*")]


def test_two_nodes_pass(attempt):
    port, began = free_port(), time.monotonic()
    codes, out, err = ended(*(start(r, attempt.config_path, port) for r in (0, 1)))
    assert codes == [0, 0] and not any(err) and not out[1]
    assert [line.split()[0] for line in out[0].splitlines()] == ["pre-flight:", "batch", "address", "port", "artifacts", "run", "model", "dataset", "gpus", "folders", "all-reduce"]
    assert "gloo, 2 nodes" in out[0]
    assert time.monotonic() - began < 30  # some 2 s on a quiet machine
    assert not left_behind(attempt) and not (attempt.attempt_dir / "error.json").exists()


def test_a_node_that_never_comes(attempt):
    began = time.monotonic()
    codes, _, err = ended(start(0, attempt.config_path, free_port(), 12))
    assert codes == [1] and time.monotonic() - began < 20
    kind, message = error_of(attempt)
    assert kind == "lost" and "node 1 (n1): did not report to the roll call" in message and message in err[0]
    assert "Traceback" not in err[0] and not left_behind(attempt)


def test_the_first_node_never_comes(attempt):
    codes, _, err = ended(start(1, attempt.config_path, free_port(), 8))
    kind, message = error_of(attempt)
    assert codes == [1] and kind == "lost" and "node 1 (n1): cannot reach node 0 at 127.0.0.1" in message and "Traceback" not in err[0]


def test_what_one_node_lacks_all_know(attempt):
    "Two problems of one node in one message; the same code everywhere, for a retry would not help"
    port = free_port()
    other = changed(attempt, "other.yaml", dataset_args__dataset_name="/x/y", model_args__model_name_or_path="an-org/not-here")
    codes, _, err = ended(start(0, attempt.config_path, port), start(1, other, port))
    kind, message = error_of(attempt)
    assert codes == [2, 2] and kind == "user" and message in err[0]
    assert "node 1 (n1): dataset_args.dataset_name=/x/y does not exist there." in message
    assert "node 1 (n1): model_args.model_name_or_path=an-org/not-here is neither a path there nor in the cache" in message
    assert "node 0" not in message


def test_what_the_first_node_lacks_the_others_hear_of(attempt):
    port = free_port()
    codes, _, err = ended(start(0, attempt.config_path, port, 60, 2, "127.0.0.1", "--needed-gib", 1e9), start(1, attempt.config_path, port))
    kind, message = error_of(attempt)
    assert codes == [2, 2] and kind == "user" and "node 0 (n0): artifacts_dir=" in message and "1000000000.0 are needed (--needed-gib)" in message
    assert "node 0 reports those of the others" in err[1]


def test_a_folder_that_is_not_shared(attempt, tmp_path):
    port = free_port()
    (tmp_path / "local").mkdir()
    other = changed(attempt, "other.yaml", resuming_dir=str(tmp_path / "local"))
    task = start(0, other, port)
    node = preflight.JobNode(config.load_frozen(attempt.config_path), attempt.attempt_dir, "127.0.0.1", port, 1, 2, 60., None, time.monotonic())
    store = preflight.open_store(node)
    mine = dict(rank=1, name="n1", seconds={}, results={}, problems=[])
    marks = preflight.exchange_reports(store, node, "checks", mine, 0.7)[0]["markers"]
    assert len(marks) == 3 and not preflight.check_markers(marks)
    seen = preflight.check_markers({f"{tmp_path}/elsewhere{path}": token for path, token in marks.items()}, 0.1)
    preflight.exchange_reports(store, node, "folders", dict(mine, problems=seen[:1]), 0.8)
    preflight.close_store(store, node)
    codes, _, _ = ended(task)
    assert codes == [2] and "it is not the folder that node 0 writes to" in error_of(attempt)[1]


@pytest.mark.parametrize("case", ["port", "address", "nodes", "artifacts", "read-only", "config"])
def test_one_node_alone_ends_at_once(attempt, case):
    "What is seen without the others is told without torch, and without waiting for them"
    port, address, nodes, path = free_port(), "127.0.0.1", 2, attempt.config_path
    holder = socket.create_server(("127.0.0.1", port)) if case == "port" else None
    if case == "address": address = "no-such-node.invalid"
    if case == "nodes": nodes = 1
    if case in ("artifacts", "read-only"):
        folder = dict(artifacts="/no/such/place").get(case, "/proc")
        path, nodes = changed(attempt, "other.yaml", artifacts_dir=folder, resuming_dir=None, num_nodes=1, accelerate_config="single"), 1
    if case == "config": path, nodes = attempt.attempt_dir / "absent.yaml", 1
    began = time.monotonic()
    codes, _, err = ended(start(0, path, port, 60, nodes, address))
    if holder: holder.close()
    told = dict(port=(1, "lost", f"port {port} cannot be opened"), address=(1, "lost", "the address no-such-node.invalid of the first node does not resolve there"),
                nodes=(2, "user", "the job has 1 node, and the config says num_nodes=2"), artifacts=(2, "user", "the folder /no/such/place does not exist there"),
                config=(2, "user", "absent.yaml cannot be read")) | {"read-only": (2, "user", "the folder /proc cannot be written to there")}
    code, kind, text = told[case]
    assert codes == [code] and error_of(attempt)[0] == kind and text in error_of(attempt)[1]
    assert "Traceback" not in err[0] and time.monotonic() - began < 20


def test_the_hub_that_does_not_answer(monkeypatch, tmp_path):
    "Another try may help where the network is at fault"
    code = ("from post_training.launch.preflight import TransientError, on_hub\n"
            "try: on_hub('dataset_args.dataset_name', 'an-org/rows', 'dataset', seconds=3)\n"
            "except TransientError as e: print(e)\n")
    env = os.environ | dict(HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path), HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "dataset_args.dataset_name=an-org/rows is not in the local cache, and the hub does not answer from there" in said.stdout, said.stderr


def test_a_check_that_hangs_is_left_behind(attempt, monkeypatch):
    "A file system that does not answer costs half of the time at most, and the others hear of it"
    monkeypatch.setitem(preflight.PREFLIGHT_CHECKS, "dataset", lambda n: time.sleep(30))
    node = preflight.JobNode(config.load_frozen(attempt.config_path), attempt.attempt_dir, "127.0.0.1", free_port(), 0, 2, 4., None, time.monotonic())
    report = preflight.local_report(node)
    assert [(p["check"], p["kind"]) for p in report["problems"]] == [("dataset", "lost")] and "did not end within" in report["problems"][0]["message"]
    assert time.monotonic() - node.start < 4 and "gpus" in report["results"]


def test_checkpoints_that_are_there_need_no_room(attempt):
    "A run that has two checkpoints needs room for one more; the model's headers say how large"
    node = preflight.JobNode(config.load_frozen(attempt.config_path), attempt.attempt_dir, "127.0.0.1", 1, 0, 2, 60., None, time.monotonic())
    assert "2 checkpoints of" in preflight.check_artifacts(node)
    for step in (1, 2): (attempt.checkpoints_dir / f"checkpoint-{step}").mkdir()
    assert "1 checkpoint of" in preflight.check_artifacts(node)
    hub = {**node.cfg, "model_args": {**node.cfg["model_args"], "model_name_or_path": "an-org/a-model"}}
    node.cfg = hub
    assert "1.0 needed (the model's size is not known" in preflight.check_artifacts(node)
