"The console script: what it prints, what it exits with, what it leaves alone."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from post_training import config
from post_training import run
from post_training.core.files import write_manifest

COMMAND = str(Path(sys.executable).parent / "post-training")
SEED = """dataset=apertus-sft-mixture-1 model=apertus-70b model_args.model_name_or_path=P tokenizer_args.tokenizer_name_or_path=P trainer=plw
accelerate_config=src/post_training/configs/accelerate/ds-zero3.yaml plw_args.prompt_loss_weight=0.0 training_args.gradient_accumulation_steps=1
training_args.per_device_train_batch_size=2 training_args.optim=adamw_torch training_args.learning_rate=2e-06 tokenizer_args.chat_template_name=tulu
training_args.num_train_epochs=1 artifacts_subdir=private job_subdir=A/B wandb.run_name=A/B wandb.tags=[prod,plw,default,A] resuming.resume=True""".split()
RECIPE = """from post_training import config, run
from post_training.launch.accelerate import run_module
task = run.open_run(config.compose('train_sft', overrides).cfg, attempt=attempt, force=force)
if task.status != 'done': run_module('toy_worker', [task.config_path], task.attempt_dir, dict(POST_TRAINING_ATTEMPT=str(task.number)))"""
WORKER = """
import json, os, sys
from pathlib import Path
import yaml
from post_training import run
from post_training.core.files import write_manifest
cfg = yaml.safe_load(open(sys.argv[1]))
folder, ckpts = Path(cfg["run_dir"]), Path(cfg["resuming_dir"])
run.join_run(folder)
how, n = os.environ["TOY"], os.environ["POST_TRAINING_ATTEMPT"]
if how == "user":
    (folder/"attempts"/n/"error.json").write_text(json.dumps(dict(kind="user", message="all 12 rows were dropped: too_long 12")))
    sys.exit(2)
if how == "fault": raise RuntimeError("a fault of the toy")
for i in (1, 2): run.append_metrics(folder, dict(step=i, loss=4/i))
(ckpts/"checkpoint-2").mkdir(); (ckpts/"checkpoint-2/w").write_text(n); write_manifest(ckpts/"checkpoint-2", step=2)
run.update_record(folder, status="finished", final=dict(checkpoint="checkpoint-2", step=2, train_loss=3.0))
"""


def typed(*argv, **env):
    "The command as a user types it: exit code, output, errors"
    p = subprocess.run([COMMAND, *argv], capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    return p.returncode, p.stdout, p.stderr


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A project root of the test's own with a recipe that starts a toy worker"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = post_training\n")
    (tmp_path / "toy_worker.py").write_text(WORKER)
    sources = ['overrides: list = ["a=1"]  # what to change\nforce: bool = False\nattempt: int = 0', RECIPE]
    cells = [dict(cell_type="code", id=f"c{i}", metadata={} if i else {"tags": ["parameters"]}, source=s, outputs=[], execution_count=None) for i, s in enumerate(sources)]
    (tmp_path / "nbs/recipes").mkdir(parents=True)
    (tmp_path / "nbs/recipes/train_sft.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    for name, value in dict(ROOT=tmp_path, RUNS_DIR=tmp_path / "runs", ARTIFACTS_DIR=tmp_path / "artifacts").items():
        monkeypatch.setenv(f"POST_TRAINING_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_known_command_line_composes(tmp_root):
    "The known command line composes as it is; the output is YAML; nothing is written"
    code, out, err = typed("train-sft", *SEED, "--dry-run")
    assert (code, err) == (0, "")
    cfg = yaml.safe_load(out)
    assert (cfg["training_args"]["learning_rate"], cfg["tokenizer_args"]["chat_template_name"], cfg["wandb"]["tags"]) == (2e-6, "tulu", ["prod", "plw", "default", "A"])
    assert "# run\n" in out and "new: no run of this config is recorded" in out and list(tmp_root.iterdir()) == []


@pytest.mark.parametrize("argv, says", [
    (["train_sft", "model=apertus-8"], "apertus-8b"),
    (["train_sft", "training_args.learning_rat=1"], "learning_rate"),
    (["train_sft", "trainer=PLW"], "plw"),
    (["train_sft", "global_batch_size=33"], "is not divisible"),
    (["train_sft", "accelerate_config=ds-zero4"], "ds-zero3"),
    (["train_sft", "job_subdir=../up"], "job_subdir"),
    (["train_sft", "cluster=slurm", "accelerate_config=ddp", "training_args.per_device_train_batch_size=1", "cluster.time=soon"], "HH:MM:SS"),
    (["train_sft", "--forse"], "--force"),
    (["train_stf"], "train_sft"),
    (["runs", "show", "nothing-like-it"], "no run"),
])
def test_mistakes_are_told_in_a_line_or_two(tmp_root, argv, says):
    "Exit code 2, what is wrong and what to do, no traceback, nothing written"
    code, out, err = typed(*argv)
    assert code == 2 and err.startswith("error: ") and says in err and "Traceback" not in err + out, err
    assert len(err.strip().splitlines()) <= 3 and list(tmp_root.iterdir()) == []


def test_outside_a_checkout(tmp_path, monkeypatch):
    "Outside a checkout the command says so"
    monkeypatch.delenv("POST_TRAINING_ROOT", raising=False)
    p = subprocess.run([COMMAND, "train_sft", "--dry-run"], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 2 and "not inside a checkout" in p.stderr


def test_a_run_from_mistake_to_done(checkout):
    "A mistake, a fault, success, done, forced: exit codes, messages, attempts; what a worker says reaches the terminal in a line"
    args = ("train_sft", "cluster.device=cpu")
    code, out, err = typed(*args, TOY="user")
    assert code == 2 and err == "error: all 12 rows were dropped: too_long 12\n"
    code, out, err = typed(*args, TOY="fault")
    assert code == 1 and "RuntimeError: a fault of the toy" in err and "stderr.log" in err.strip().splitlines()[-1] and len(err.splitlines()) < 25
    code, out, err = typed(*args, TOY="ok")
    assert (code, err) == (0, ""), err
    assert out.strip().splitlines()[-1] == "train_sft: loss 4 at the first step, 2 at the last"
    begin = time.monotonic()
    code, out, err = typed(*args, TOY="fault")  # nothing is started again
    assert code == 0 and out.startswith("done already") and "checkpoint-2" in out and err == "", out + err
    print(f"a finished run is found in {time.monotonic() - begin:.1f} s")
    code, out, err = typed(*args, "resuming.resume=false", TOY="ok")
    assert code == 2 and "resuming.resume is false" in err
    code, out, err = typed(*args, "--force", TOY="ok")
    assert code == 0, err
    [folder] = (checkout / "runs/train_sft/default").iterdir()
    record = run.read_record(folder)
    assert [a["exit"] for a in record["attempts"]] == [2, 1, 0, 0] and record["generation"] == 2
    kept = [Path(page["checkpoints_dir"]) / "checkpoint-2/w" for page in (record["earlier"][0], record)]
    assert [p.read_text() for p in kept] == ["3", "4"]
    assert "finished" in typed("runs")[1] and typed("runs", "verify")[0] == 0
    assert typed("runs", "diff", folder.name, folder.name)[1] == "nothing to show\n"
    assert record["attempts"][0]["command"] == ["post-training", *args]
    code, out, err = typed("runs", "keep", folder.name, "demo")
    assert code == 0, err
    assert sorted(p.name for p in (checkout / "runs/examples/demo").iterdir()) == ["config.yaml", "metrics.jsonl", "record.json", "train_sft.ipynb"]
    assert str(checkout) not in "".join(p.read_text() for p in (checkout / "runs/examples/demo").iterdir())


def test_a_kept_record_is_no_finished_run(checkout):
    "A record without its checkpoint, and a copy under runs/examples, do not count as done"
    cfg = config.compose("train_sft", ["cluster.device=cpu"]).cfg
    a = run.open_run(cfg)
    folder = a.checkpoints_dir / "checkpoint-1"
    folder.mkdir()
    (folder / "w").write_text("w")
    write_manifest(folder, step=1)
    run.update_record(a.run_dir, status="finished", final=dict(checkpoint="checkpoint-1"))
    run.close_attempt(a.run_dir, 1, 0)
    assert "done: finished, checkpoint-1 verifies" in typed("train_sft", "cluster.device=cpu", "--dry-run")[1]
    (folder / "w").unlink()
    assert "resume: attempt 1 finished; no checkpoint is complete; skipped checkpoint-1: w is missing" in typed("train_sft", "cluster.device=cpu", "--dry-run")[1]
    examples = a.run_dir.parents[2] / "examples"
    a.run_dir.parents[1].rename(examples)
    assert "new: " in typed("train_sft", "cluster.device=cpu", "--dry-run")[1]


@pytest.mark.parametrize("module", ["post_training", "post_training.cli"])
def test_module_forms_do_what_the_console_script_does(module, tmp_root):
    "python -m post_training and python -m post_training.cli: the same output, errors and exit codes"
    for argv in (["--help"], ["--version"], ["runs", "shw"], ["train_sft", "--forse"]):
        p = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True, timeout=300)
        assert (p.returncode, p.stdout, p.stderr) == typed(*argv) and (p.stdout or p.stderr), argv


@pytest.mark.parametrize("argv, says", [
    (["runs", "diff", "a"], "takes A B; 1 given"),
    (["runs", "show"], "takes RUN; 0 given"),
    (["jobs", "--lines", "some"], "it takes a whole number"),
    (["inspekt", "demo"], "inspect"),
    (["inspect", "demo", "--rosw", "2"], "--rows"),
    (["chat", "a", "--temprature", "1"], "--temperature"),
    (["plan"], "takes PLAN.yaml"),
    (["wandb-sync", "--all"], "There is no option --all"),
])
def test_each_command_names_the_nearest(tmp_root, argv, says):
    "One parser: unknown options and wrong numbers of words are mistakes of the user in every command"
    code, out, err = typed(*argv)
    assert code == 2 and err.startswith("error: ") and says in err and "Traceback" not in err, err


def test_words_and_options_in_any_order(tmp_root):
    "Overrides before, between and after options; a value that begins with a dash"
    words = ["training_args.seed=1", "job_subdir=x", "--dry-run"]
    outputs = [typed("train_sft", *(words[i] for i in order))[1] for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1))]
    assert len({*outputs}) == 1 and "job_subdir: x" in outputs[0]
    assert typed("runs", "--sort", "-loss")[0] == 0


def test_light_commands_import_nothing_heavy(checkout):
    "--help, a dry run and the list of runs leave torch and its like alone"
    heavy = "('torch', 'transformers', 'papermill', 'wandb', 'matplotlib', 'pandas')"
    for argv in (["--help"], ["train_sft", "--dry-run"], ["runs"]):
        code = f"import sys; from post_training.cli import main; main({argv!r}); print([m for m in {heavy} if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip().splitlines()[-1] == "[]"


def test_the_tab_key_completes_stages_presets_and_keys():
    "The script that is printed, in bash: stages, presets behind =, choices, and one level of keys; nothing heavy is imported"
    script = """eval "$(post-training completion)"
        for COMP_LINE in 'post-training train_s' 'post-training train_sft model=ti' 'post-training train_sft plw_args.prompt' 'post-training train-sft trainer=ln'; do
            COMP_POINT=${#COMP_LINE}; _post_training; echo "${COMPREPLY[*]}"; done"""
    env = dict(os.environ, PATH=f"{Path(COMMAND).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines() == ["train_sft", "tiny", "plw_args.prompt_loss_weight=", "ln-plw"], done
    code = "import sys; from post_training.cli import completions as c; c('post-training train_sft model='); print({'torch', 'hydra', 'papermill', 'pandas'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
