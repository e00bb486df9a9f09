"The README is true: it is what its notebook says, its links lead somewhere, and every command in it has been run."
import json
import os
import re
import shlex
import signal
import subprocess

import nbformat
import pytest
from conftest import BIN, ROOT
from nbconvert import MarkdownExporter

from post_training.core.fork_server import SERVER_VARIABLE, load_time_variables

README = ROOT / "README.md"
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))


def guide():
    "The prose of the user guide"
    cells = json.loads((ROOT / "nbs" / "explore" / "user_guide.ipynb").read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def shell_commands(text):
    "The lines of a page's shell blocks, without comments"
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


# Commands that a test of their own runs (make test is what runs this file: .ci/run calls both)
ELSEWHERE = {"make demo": "test_make_demo", "make annotate": "test_make_demo", "make test": ".ci/run", "make test-slow": ".ci/run"}
COMMANDS = [*dict.fromkeys([*shell_commands(README.read_text()), *shell_commands(guide())])]


def run(args, timeout=120, **env):
    "A command in the root folder as a newcomer's shell would run it: nothing activated, no input"
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "POST_TRAINING_RUNS_DIR", "POST_TRAINING_ARTIFACTS_DIR", "HF_HUB_OFFLINE", "WANDB_MODE", "OMP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k in keep or k.startswith("PIP_")} | env
    return subprocess.run(args, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)


def test_readme_is_its_notebook():
    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    assert README.read_text().strip() == text.replace("](../", "](").strip(), "run `make readme`"


def test_readme_links_lead_somewhere():
    "Pictures, links and the paths it names are files of this repository"
    text = README.read_text()
    links = [m for m in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in m]
    named = re.findall(r"`((?:nbs|post_training|runs|tests|recipes)/[^`\s<>*]+)`", text)
    missing = [p for p in [*links, *named] if not (ROOT / p).exists() and not (ROOT / "nbs" / p).exists()]
    assert not missing


def test_readme_names_make_targets_that_exist():
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", " ".join(re.findall(r"`[^`]*`", README.read_text() + guide())) + " ".join(COMMANDS)))
    assert named <= TARGETS
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, shared_root):
    "Every command of the README and of the user guide; what would need a network, a cluster or weights is written with --dry-run"
    if command in ELSEWHERE:
        assert command.startswith("make ") and command.split()[1] in TARGETS
        return
    words = shlex.split(command)
    if words[0].startswith("make"): pytest.fail(f"name the test that runs `{command}` in ELSEWHERE")
    assert words[0].startswith(".venv/bin/"), "write the program's path: nothing is activated"
    loaded = load_time_variables(os.environ) | {SERVER_VARIABLE: os.environ[SERVER_VARIABLE]}  # the large libraries are loaded once for all commands
    done = run([str(BIN / words[0].removeprefix(".venv/bin/")), *words[1:]], **loaded)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_help_lists_every_target():
    done = run(["make"])
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^make ([a-z-]+)", done.stdout, re.M))
    assert listed == TARGETS


def test_force_reaches_the_command():
    "make demo FORCE=1 is the command with --force (what that does is tested with the runs)"
    assert run(["make", "-n", "demo", "FORCE=1"]).stdout.strip().endswith("train_sft job_subdir=demo --force")
    assert run(["make", "-n", "demo"]).stdout.strip().endswith("train_sft job_subdir=demo")


def test_every_hook_is_local():
    "The hooks are programs of .venv, so that they run without a network"
    import yaml
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {r["repo"] for r in config["repos"]} == {"local"}
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert (ROOT / hook["entry"].split()[0]).exists()


def test_lock_is_exact_and_covers_the_package():
    "Exact versions without local suffixes, and the pins of pyproject.toml among them"
    import tomllib
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    locked = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, op, version = re.fullmatch(r"([A-Za-z0-9._-]+)(==|>=)([\w.]+)", wanted).groups()
        assert name.lower().replace("_", "-") in locked, f"{name} is not locked"
        if op == "==": assert locked[name.lower().replace("_", "-")] == version


def test_workflow_runs_what_ci_run_runs():
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "for target in test test-slow" in script and 'make "$target"' in script


def test_notebooks_are_valid():
    for nb in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in nb.parts: nbformat.validate(nbformat.read(nb, 4))


@pytest.mark.slow
def test_make_demo(tmp_path):
    "The first command a newcomer types: it learns, and a second time it says in seconds that it is done; then preference data with its model"
    env = dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(tmp_path / "artifacts"))
    first = run(["make", "demo"], timeout=900, **env)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    closing = first.stdout.strip().splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"(\d+(?:\.\d+)?) ?%", closing)]
    assert len(numbers) == 2 and numbers[1] >= 70 and numbers[1] > numbers[0], f"accuracy before and after in: {closing}"
    records = list((tmp_path / "runs" / "train_sft" / "demo").glob("*/record.json"))
    assert len(records) == 1
    after = json.loads(records[0].read_text())["evaluation"]["after"]
    assert after["n"] >= 200 and all(skill["accuracy"] > 0 for skill in after["skills"].values()), after["skills"]
    outputs = [o for c in json.loads((records[0].parent / "train_sft.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"] and sum("image/png" in o.get("data", {}) for o in outputs) == 2  # lengths, curves
    again = run(["make", "demo"], timeout=900, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list((records[0].parent / "attempts").iterdir())) == 1
    made = run(["make", "annotate"], timeout=900, **env)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    stages = ("filter", "ref_completions", "ref_logprobs", "ref_rewards", "pairs")
    left = {stage: json.loads(next((tmp_path / "runs" / stage / "demo").glob("*/record.json")).read_text()) for stage in stages}
    assert {r["status"] for r in left.values()} == {"finished"} and [h["stage"] for h in left["pairs"]["history"]] == list(stages)
    counts = left["ref_completions"]["counts"]["completions"]
    assert counts["kept"] > 0.8 * 6000 and counts["kept"] + sum(counts["lost"].values()) <= 6000 and left["pairs"]["counts"]["completions"]["kept"] > 50, counts
    assert left["ref_logprobs"]["counts"]["completions"]["reencoded"]["compared"] == counts["kept"]
    again = run(["make", "annotate"], timeout=120, **env)
    assert again.returncode == 0 and again.stdout.count("done already") >= 6, again.stdout


@pytest.mark.slow
def test_make_lab_starts():
    "JupyterLab comes up and says where"
    lab = subprocess.Popen(["make", "lab", "LAB=--no-browser --allow-root --port=0 --ServerApp.port_retries=0"], cwd=ROOT, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        lines = []
        for line in lab.stdout:
            lines.append(line)
            if "http://" in line: break
        else:
            pytest.fail("".join(lines))
    finally:
        os.killpg(lab.pid, signal.SIGTERM)
        lab.wait(60)
