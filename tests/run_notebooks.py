"""Run notebooks as `nbdev_test` does, each in a process of its own that is forked from one that has loaded the libraries.

    find nbs -name '*.ipynb' | python tests/run_notebooks.py --workers 2 [--flags slow]

A fork starts with the libraries and with nothing that another notebook has set. Loading them takes 4 to 5 seconds of a processor,
which a process for each notebook would spend anew.
"""
import argparse
import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ["torch", "transformers", "datasets", "accelerate", "trl", "peft", "matplotlib.pyplot", "IPython", "pandas", "nbdev.test",
             "transformers.models.auto.modeling_auto", "transformers.models.apertus.modeling_apertus",
             "transformers.models.llama.modeling_llama", "transformers.trainer", "papermill"]
# Parameters of benchmarks and experiments under test: processes, rows and repetitions are fewer than those of the kept notebooks. What is left out here
# (several processes, the largest batch, two vocabularies) runs in the chapters of nbs/90_bench.
FEWER = {
    "bench_data": dict(sizes=[100, 200, 400], repeats=1, processes=[], vocabulary="bpe"),
    "bench_generation": dict(sizes=["tiny"]),
    "bench_logprobs": dict(vocabularies=[1024], rows=[4]),
    "bench_masks": dict(turns=[2], rows=20, repeats=1, vocabulary="bpe"),
    "bench_preference": dict(tokens=64, steps=1),
    "bench_rewards": dict(rows=8, completions=[4], longest=60, repeats=1, hidden=64),
    "bench_scale": dict(memory={"hidden": [64], "tokens": [64], "loss": ["plw"]}, batches={}, processes=[], lengths={"cost": [64, 128], "attention": [128]}),
    "bench_training": dict(commands=["post-training --help"]),
    "qrpo-claims": dict(seeds=3, prompts=30, length_seeds=3, pairs=300),
    "preference-claims": dict(seeds=3, prompts=60, pairs=200, steps=200),
    "merge-of-experts": dict(base_steps=60, skill_steps=8, prompts=16),
}


def with_parameters(notebook, parameters, folder):
    "A copy of a notebook in `folder` with other values of its parameters"
    import nbformat
    nb = nbformat.read(notebook, 4)
    at = next(i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", []))
    if unknown := [name for name in parameters if f"\n{name}:" not in f"\n{nb.cells[at].source}"]: sys.exit(f"{notebook} has no {unknown}")
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items())))
    copy = Path(folder) / notebook.name
    nbformat.write(nb, copy)
    return copy


def run_forked(notebook, flags):
    "Fork a process that tests `notebook`; returns its id"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        from nbdev.config import get_config
        from nbdev.test import test_nb
        sys.argv[1:] = []
        faulthandler.register(signal.SIGUSR1)
        config = get_config()
        folder = tempfile.mkdtemp()
        if notebook.stem in FEWER:
            notebook = with_parameters(notebook, FEWER[notebook.stem], folder)
            os.environ["POST_TRAINING_ROOT"] = str(ROOT)
        passed, _ = test_nb(notebook, skip_flags=config.tst_flags.split(), force_flags=flags.split(), basepath=config.config_path)
        code = 0 if passed else 1
        shutil.rmtree(folder)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop_late(running, limit):
    "Print where each notebook stands that runs for more than `limit` seconds, and end it with what it started"
    for pid, (notebook, start, late) in running.items():
        if late or time.monotonic() - start < limit: continue
        print(f"{notebook.parent.name}/{notebook.name}: not at its end after {limit:.0f} s; it stands here:", flush=True)
        os.kill(pid, signal.SIGUSR1)  # faulthandler
        time.sleep(1)
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in tree[1:]:
            with contextlib.suppress(psutil.NoSuchProcess): print(f"  started: {' '.join(process.cmdline())[:200]}", flush=True)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()
        running[pid] = notebook, start, True


def run_all(notebooks, workers, flags, limit):
    "Test all notebooks, at most `workers` at a time, each within `limit` seconds; returns those that failed"
    waiting, running, failed = list(notebooks), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            notebook = waiting.pop(0)
            running[run_forked(notebook, flags)] = notebook, time.monotonic(), False
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid not in running:
            stop_late(running, limit)
            time.sleep(0.05)
            continue
        notebook, start, _ = running.pop(pid)
        seconds, cpu = time.monotonic() - start, used.ru_utime + used.ru_stime
        print(f"{notebook.parent.name}/{notebook.name}: {seconds:.0f} s, processor {cpu:.0f} s{' FAILED' if status else ''}", flush=True)
        if status: failed.append(notebook)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--flags", default="", help="flags of cells to run that are left out otherwise, as nbdev_test has them")
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which a notebook has failed")
    args = parser.parse_args()
    notebooks = [Path(line.strip()).absolute() for line in sys.stdin if line.strip()]
    if not notebooks: sys.exit("no notebooks: write their paths to the standard input, one to a line")
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/forks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    from post_training.core.fork_server import fork_server
    with fork_server():  # for what notebooks start
        for name in LIBRARIES: importlib.import_module(name)
        gc.collect()
        gc.freeze()  # pages of the libraries stay shared: no collection of a fork touches them
        failed = run_all(notebooks, args.workers, args.flags, args.limit)
    if failed: sys.exit("notebooks that failed:\n" + "\n".join(f"  {path}" for path in failed))


if __name__ == "__main__": main()
