"Processes that are forks of one that has loaded the libraries behave as new processes do: exit codes, signals, settings, kills, and numbers."
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from post_training.core.fork_server import FORK_VARIABLE, SERVER_VARIABLE, fork_server, forked_command, request_of, send_request

MODULE = """import json, os, resource, signal, sys, time
def show(**kw): print(json.dumps(kw), flush=True)
what, *rest = sys.argv[1:] or ["facts"]
show(fork=os.environ.get("POST_TRAINING_FORK") == str(os.getpid()), pid=os.getpid())
if what == "facts":
    mask = os.umask(0)
    sys.stdout.reconfigure(errors="backslashreplace")  # seeks where the stream was opened for a file
    streams = [(s.name, s.line_buffering, s.write_through, s.encoding, s.errors) for s in (sys.stdin, sys.stdout, sys.stderr)]
    show(streams=streams, argv=rest, cwd=os.getcwd(), name=__name__, path=sys.path[0], env={k: v for k, v in os.environ.items() if k.startswith("MY_")},
         umask=mask, files=resource.getrlimit(resource.RLIMIT_NOFILE), nice=os.nice(0), cpus=sorted(os.sched_getaffinity(0)),
         hup=signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, input=sys.stdin.read(), loaded="json.tool" in sys.modules)
    print("to stderr", file=sys.stderr)
elif what == "exit": sys.exit(eval(rest[0]))
elif what == "raise": raise ValueError("a fault")
elif what == "signal": os.kill(os.getpid(), int(rest[0]))
elif what == "sleep": time.sleep(60)
elif what == "child":
    import subprocess
    show(child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
    time.sleep(60)
elif what == "catch":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    show(ready=True)
    time.sleep(60)
elif what == "exitfuncs":
    import atexit, threading
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
"""


@pytest.fixture(scope="module")
def server():
    "A server with one small library beside torch, in place of the session's"
    given = os.environ.pop(SERVER_VARIABLE, None)
    with fork_server(("torch", "json.tool")): yield os.environ[SERVER_VARIABLE]
    if given: os.environ[SERVER_VARIABLE] = given


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "toy_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args, forked=True, **kwargs):
    argv = [sys.executable, "-m", "toy_module", *args]
    return subprocess.run(forked_command(argv) if forked else argv, capture_output=True, text=True, timeout=60, **kwargs)


def start(*args):
    p = subprocess.Popen(forked_command([sys.executable, "-m", "toy_module", *args]), stdout=subprocess.PIPE, text=True)
    first = json.loads(p.stdout.readline())
    assert first["fork"]
    return p, first["pid"]


def gone(pid, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        time.sleep(0.02)
    return False


def test_a_fork_has_what_a_new_process_has(server, folder):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
        os.umask(0o027)
        os.nice(3)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = dict(input="some text", env=os.environ | dict(MY_VALUE="ü", MY_OTHER=""), preexec_fn=limit)
    fork, new = run("facts", "a b", "-x", **settings), run("facts", "a b", "-x", forked=False, **settings)
    assert fork.returncode == new.returncode == 0 and fork.stderr == new.stderr == "to stderr\n"
    (first, facts), (plain, wanted) = [[json.loads(line) for line in done.stdout.splitlines()] for done in (fork, new)]
    assert first["fork"] and not plain["fork"]
    assert facts.pop("loaded") and not wanted.pop("loaded")
    assert facts == wanted and facts["input"] == "some text" and facts["files"] == [200, 300] and facts["hup"] and facts["nice"] >= 3


@pytest.mark.parametrize("args", [("exit", "0"), ("exit", "7"), ("exit", "None"), ("exit", "'why'"), ("exit", "300"), ("raise",), ("signal", "9"), ("signal", "15"),
                                  ("signal", "6"), ("signal", "2"), ("exitfuncs",)], ids=" ".join)
def test_it_ends_as_a_new_process_ends(server, folder, args):
    fork, new = run(*args), run(*args, forked=False)
    assert json.loads(fork.stdout.splitlines()[0])["fork"]
    assert fork.returncode == new.returncode and fork.stdout.splitlines()[1:] == new.stdout.splitlines()[1:]
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_a_module_that_is_missing(server, folder):
    argv = forked_command([sys.executable, "-m", "no_such_module"])
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and "No module named" in done.stderr and "no_such_module" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_fork(server, folder, number):
    p, pid = start("sleep")
    time.sleep(0.5)  # until it sleeps: Python loses an interrupt that falls into a callback
    for _ in range(4):
        p.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired): p.wait(10)
        if p.poll() is not None: break
    assert p.wait(60) == -number and gone(pid)
    p, pid = start("catch")
    p.stdout.readline()
    p.terminate()
    assert p.wait(60) == 9


def test_a_killed_command_takes_its_fork_with_it(server, folder):
    p, pid = start("child")
    child = json.loads(p.stdout.readline())["child"]
    p.kill()
    assert gone(pid) and gone(child)
    assert run("exit", "0").returncode == 0  # the server goes on


def test_a_command_ends_with_its_parent(server, folder):
    code = (f"import subprocess, sys, time; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); from post_training.core.fork_server import forked_command; "
            "subprocess.Popen(forked_command([sys.executable, '-m', 'toy_module', 'sleep'])); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    first = json.loads(parent.stdout.readline())
    assert first["fork"]
    parent.kill()
    assert gone(first["pid"])


def test_forks_end_with_their_server(folder, monkeypatch):
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    with fork_server(("torch",)):
        p, pid = start("sleep")
        psutil.Process(pid).parent().kill()
        assert p.wait(10) == -9 and gone(pid)
        done = run("facts", input="")
        assert done.returncode == 0 and not json.loads(done.stdout.splitlines()[0])["fork"]  # a process of its own
    assert SERVER_VARIABLE not in os.environ and forked_command([sys.executable, "-m", "x"]) == [sys.executable, "-m", "x"]


@pytest.mark.parametrize("env", [dict(OMP_NUM_THREADS="3"), dict(HF_HOME="/elsewhere"), dict(PYTHONPATH="/elsewhere"), dict(MKL_CBWR="COMPATIBLE")], ids=lambda e: next(iter(e)))
def test_what_a_fork_would_not_see_is_a_new_process(server, folder, env):
    done = run("facts", input="", env=os.environ | env)
    assert done.returncode == 0 and not json.loads(done.stdout.splitlines()[0])["fork"]


def test_what_libraries_set_for_themselves_does_not_matter(server, folder):
    "PyTorch sets these in a process that imports its compiler, and in the ranks that its launcher starts"
    own = dict(TORCHINDUCTOR_CACHE_DIR="/tmp/torchinductor", TORCHELASTIC_RESTART_COUNT="0", TORCH_NCCL_ASYNC_ERROR_HANDLING="1", RANK="1")
    done = run("facts", input="", env=os.environ | own)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[0])["fork"]


def test_large_modules_that_tests_start_are_forks():
    "`python -m` of a module in forks/sitecustomize.py loads no library again"
    if os.environ.get(SERVER_VARIABLE, "off") == "off": pytest.skip("the session has no fork server")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--num_processes" in done.stdout, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7, "the seconds of a processor; 2 in a process of its own"


def test_other_commands_and_no_server(server, monkeypatch):
    assert forked_command(["ls"]) == ["ls"] and forked_command([sys.executable, "x.py"]) == [sys.executable, "x.py"]
    monkeypatch.setenv(SERVER_VARIABLE, "off")
    assert forked_command([sys.executable, "-m", "x"]) == [sys.executable, "-m", "x"]
    with fork_server(): assert os.environ[SERVER_VARIABLE] == "off"


def test_a_broken_request_harms_nobody(server, folder):
    for bad in (b"", b"\xff\xff\xff\xff", b"\0\0\0\2{}", b"nonsense" * 1000):
        with socket.socket(socket.AF_UNIX) as c:
            c.connect(server)
            c.sendall(bad)
    with socket.socket(socket.AF_UNIX) as c:
        c.connect(server)
        send_request(c, {"argv": ["json.tool"]}, (0, 1, 2))
        assert c.makefile().readline() == "no the request is incomplete\n"
    done = run("exit", "3")
    assert done.returncode == 3 and json.loads(done.stdout.splitlines()[0])["fork"]


def test_forks_do_not_share_random_numbers(server, folder):
    (folder / "draw.py").write_text("import random, tempfile, uuid, numpy\nprint(random.random(), numpy.random.rand(), tempfile.mkdtemp(), uuid.uuid4())")
    drawn = [subprocess.run(forked_command([sys.executable, "-m", "draw"]), capture_output=True, text=True).stdout.split() for _ in range(2)]
    assert len(drawn[0]) == 4 and all(a != b for a, b in zip(*drawn))


def test_a_request_holds_no_fork_of_another(server, monkeypatch):
    monkeypatch.setenv(FORK_VARIABLE, "1")
    assert FORK_VARIABLE not in request_of(["x"])["env"]


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without(demo, tmp_path):
    "Every logged number but the clock's, every sample and every byte of the weights"
    runs = {}
    for how in ("forks", "off"):
        env = os.environ | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / how / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(tmp_path / how / "artifacts"))
        if how == "off": env[SERVER_VARIABLE] = "off"
        else: env.pop(SERVER_VARIABLE, None)
        done = subprocess.run([Path(sys.executable).parent / "post-training", "train_sft", "cluster.device=cpu", "training_args.max_steps=4", "evaluation.num_prompts=4",
                               "training_args.eval_strategy=no"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in next((tmp_path / how).rglob("metrics.jsonl")).read_text().splitlines()]
        weights = next(p for p in (tmp_path / how).rglob("model.safetensors") if "checkpoint-4" in str(p)).read_bytes()
        answers = [json.loads(next((tmp_path / how).rglob(f"evaluation-{when}.json")).read_text())["accuracy"] for when in ("before", "after")]
        runs[how] = [{k: v for k, v in line.items() if not k.startswith("perf/") and "time" not in k} for line in lines], weights, answers
    assert runs["forks"] == runs["off"]
