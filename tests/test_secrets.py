"Secrets reach no configuration, record, script, notebook or kept copy; what is not secret is left as it is"
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from post_training.config.compose import compose
from post_training.core.files import UserError, redact, visible_text
from post_training.run.record import read_record, update_record
from post_training.view.report import anonymise, as_table

CLUSTER = ("train_sft", "cluster=slurm", "cluster.python=/a", "accelerate_config=ddp")
SERVER = ("ref_completions", "backend=server")
REFUSED = {
    "a variable named like a secret": (*CLUSTER, "+cluster.env={AWS_SECRET_ACCESS_KEY: x}"),
    "a variable of two words": (*CLUSTER, "+cluster.env={DB_PASS: x1}"),
    "a number as a password": (*CLUSTER, "+cluster.env={PGPASSWORD: 12345}"),
    "a token of known form under any name": (*CLUSTER, "+cluster.env={NOTE: hf_abcdefghijklmnopqrstuvwx}"),
    "an option and its value": (*SERVER, "server.command=[vllm,serve,--api-key,K]"),
    "an option with its value": (*SERVER, "server.command=[vllm,serve,'--api-key=K']"),
    "a URL with a password": (*SERVER, "server.url='http://u:pw@h/v1'"),
    "a URL with a token": (*SERVER, "server.url='https://t0ken@h/v1'"),
    "a URL with a key in its query": (*SERVER, "server.url='https://h/v1?api_key=abc'"),
    "a model behind a password": ("train_sft", "model_args.model_name_or_path='https://u:p4ss@h/m'"),
    "a key of an earlier version": ("train_sft", "training_args.hub_token=abc"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_with_a_secret_is_refused(name):
    stage, *overrides = REFUSED[name]
    with pytest.raises(UserError, match="looks like a secret|hub_token") as said: compose(stage, overrides)
    for secret in ("pw@", "t0ken", "p4ss", "12345", "hf_abc"): assert secret not in str(said.value)


def test_a_variable_named_like_a_secret_is_not_read(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "MY_API_KEY", "PGPASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "value")
        with pytest.raises(UserError, match=f"{name} is named like a secret"):
            compose("train_sft", [f"wandb.project=${{oc.env:{name}}}"])


@pytest.mark.parametrize("command", [("--dry-run",), ("submit=false",)])
def test_nothing_of_a_refused_command_is_printed_or_written(tmp_path, command):
    env = os.environ | dict(POST_TRAINING_RUNS_DIR=str(tmp_path/"runs"), POST_TRAINING_ARTIFACTS_DIR=str(tmp_path/"a"))
    p = subprocess.run([sys.executable, "-m", "post_training", *CLUSTER, "+cluster.env={HF_TOKEN: s3cretvalue}", *command],
                       cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode == 2 and "cluster.env.HF_TOKEN" in p.stderr
    assert "s3cretvalue" not in p.stdout + p.stderr and not list(tmp_path.rglob("*.*"))


def test_what_is_no_secret_is_left(tmp_path):
    "Words that contain sk-, lengths of generations, and all that the program reads back"
    stay = ["model_merging=task-arithmetic", "/w/multi-task-instruction-tuning/runs/x-01234567", "max_new_tokens=64",
            "sk-learn-pipelines-of-2024", "risk-management-and-assessment-data", "eos_token=<|im_end|>"]
    assert redact(stay) == stay
    assert redact(dict(max_new_tokens="64", stop_tokens=["a"], pad_token="x", n_keys=3)) == dict(
        max_new_tokens="64", stop_tokens=["a"], pad_token="x", n_keys=3)
    odd = "/w/sk-abcdefghijklmnop1234/runs" # a folder that looks like a key is read back, and stays
    facts = dict(checkpoints_dir=odd, inputs={odd: {}}, final=dict(output=odd), config=dict(max_new_tokens=64, path=odd))
    update_record(tmp_path, **facts, summary="saw sk-abcdefghijklmnop1234")
    assert read_record(tmp_path) == facts | dict(summary="saw [redacted]")
    cfg = compose("model_merging", ["model_merging=task-arithmetic"]).cfg
    assert "task" in json.dumps(cfg)


def test_texts_for_people_hide_secrets(monkeypatch):
    "In logs, diffs and notebooks: after names and options, in URLs, and the values of variables by themselves"
    monkeypatch.setenv("SITE_PASSWORD", "correct-horse-battery")
    text = ("+PASSWORD = \"hunter2\"\n+export HF_TOKEN=abcdef\nGET https://u:pw@h/a?sig=zzz&b=1\n"
            "Authorization: Bearer abcdefghijklmnopqrstuv\n{\"api_key\": \"qqq\"}\nfatal: correct-horse-battery\n"
            "-----BEGIN " "PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n")
    for shown in (redact(text), anonymise(dict(cells=[dict(outputs=[dict(text=[text])])]), {})["cells"][0]["outputs"][0]["text"][0]):
        for secret in ("hunter2", "abcdef", "pw@", "zzz", "qqq", "horse", "MIIE"): assert secret not in shown, secret
    code = "def f(token: str, password=None, key=key): return self.tokens[token]\n"
    assert redact(code) == code


def test_tables_show_markup_as_text():
    "A role, a name or an error is neither HTML nor a control sequence in any table"
    hostile = "<img src=x onerror=alert(1)>\x1b[2J\x1b]0;t\x07[a](javascript:b)\u202e"
    for name, value in (("role", hostile), (hostile, "x")):
        shown = as_table([{name: value}], markdown=True)
        assert "<img" not in shown and "](" not in shown and "\x1b" not in shown and "\u202e" not in shown
        assert not {"\x1b", "\x07", "\u202e"} & {*as_table([{name: value}])}
    assert visible_text("a\tb\nc") == "a\tb\nc"


def test_reports_escape_what_a_dataset_names():
    from post_training.view import report
    hostile = "<img src=x onerror=alert(1)>"
    for shown in (report.show_rows([dict(role=hostile)]), report.show_counts({hostile: 3}),
                  report.show_evaluation(dict(accuracy=.5, skills={hostile: .5}, notice=hostile), None)):
        assert "<img" not in shown.data and "&lt;img" in shown.data
