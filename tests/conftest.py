"Fixtures that the tests share: a folder of its own for what a test writes, the tiny model and demo data, and real rows where they are."
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's programs lie here
DATA_VAR = "POST_TRAINING_DATA"

# No hub, no accounts, few threads; programs of the environment are found by what the tests start. What the caller set wins.
for key, value in dict(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                       TRL_EXPERIMENTAL_SILENCE="1").items():
    os.environ.setdefault(key, value)
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
# Modules with large libraries that tests start in any way are forks too (tests/forks/sitecustomize.py).
FORKS = str(ROOT / "tests/forks")
if FORKS not in os.environ.get("PYTHONPATH", ""): os.environ["PYTHONPATH"] = os.pathsep.join([FORKS, *filter(None, [os.environ.get("PYTHONPATH")])])


SERVER = contextlib.ExitStack()
LOADED = {}  # variables of the libraries with which the fork server has started


def pytest_configure(config):
    "Processes of recipes that tests start are forks of one that has loaded the libraries; the workers of a session share it"
    from post_training.core.fork_server import fork_server, load_time_variables

    LOADED.update(load_time_variables(os.environ))
    if not hasattr(config, "workerinput"): SERVER.enter_context(fork_server())


def pytest_unconfigure(config): SERVER.close()


@pytest.fixture(scope="session", autouse=True)
def forks_are_taken():
    "A test module that sets a variable of the libraries when it is imported would turn every fork into a process that loads them again, 4 to 5 s each"
    from post_training.core import fork_server
    now = fork_server.SERVER_SETTINGS | fork_server.load_time_variables(os.environ)
    before = fork_server.SERVER_SETTINGS | LOADED
    changed = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
    assert not changed, f"importing the tests changed {', '.join(changed)}: set them in tests/conftest.py, before the fork server starts"


@pytest.fixture(scope="session", autouse=True)
def shared_root():
    "One folder for all the tests of a session: models and data are built once below it, and it is removed at the end"
    given = os.environ.get("POST_TRAINING_ARTIFACTS_DIR")
    root = Path(tempfile.mkdtemp(prefix="post-training-tests-"))
    os.environ["POST_TRAINING_RUNS_DIR"] = str(root / "runs")
    os.environ["POST_TRAINING_ARTIFACTS_DIR"] = given or str(root / "artifacts")
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def tmp_root(tmp_path, monkeypatch):
    "A folder of this test's own for runs and artifacts"
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    return tmp_path


@pytest.fixture(scope="session")
def demo(shared_root):
    "The artifacts folder with the tiny model and the demo data in it, built under a lock the first time"
    from post_training import config
    from post_training.demo.data import ensure_demo

    ensure_demo(config.compose("train_sft").cfg)
    return Path(os.environ["POST_TRAINING_ARTIFACTS_DIR"])


@pytest.fixture
def data_dir():
    "The folder with gsm8k_train.jsonl and other real rows"
    if not os.environ.get(DATA_VAR):
        pytest.skip(f"{DATA_VAR} is not set: it names the folder with gsm8k_train.jsonl")
    folder = Path(os.environ[DATA_VAR])
    assert folder.is_dir(), f"{DATA_VAR}={folder} is not a folder"
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Tests that start a Slurm are marked: two clusters would have the same ports, and its jobs are watched by the clock"
    for item in items:
        if "slurm" in item.fixturenames:
            item.add_marker(pytest.mark.slurm)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    "A test that is skipped for want of the real rows although they are there has failed"
    report = (yield).get_result()
    if report.skipped and DATA_VAR in str(report.longrepr) and os.environ.get(DATA_VAR):
        report.outcome, report.longrepr = "failed", f"skipped for want of {DATA_VAR}, which is set: {report.longrepr}"
