"What other programs read in an export: a certificate refuses what was changed by name, and vLLM and transformers 4.57 are asked in environments of their own"
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from post_training import config, run
from post_training.core import shards
from post_training.core.files import UserError
from post_training.core.model_folders import write_portable
from post_training.export.certificate import certify, write_certificate
from post_training.export.parity import set_generation_ids, with_plain_messages
from post_training.export.readers import reader_python, reader_server
from post_training.export.weights import load_weights
from post_training.models.agreement import FLOAT32_BOUND, agrees, error_bound, logprob_errors, token_logprobs
from post_training.models.load import load_model
from post_training.preferences import completions as ac
from post_training.stages import preference_data
from post_training.stages.evaluate import evaluate
from post_training.tokens.tokenizer import load_tokenizer
from post_training.view import chat

THETA = 50.0  # far from the default of readers that do not know the rope of the config


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory):
    "The tiny model with another rope, exported and certified"
    base, folder = demo / "models/tiny", tmp_path_factory.mktemp("readers") / "exported"
    model, tokenizer = load_weights(str(base)), load_tokenizer(str(base), model_pad_token_id=10, model_eos_token_id=68)
    set_generation_ids(model, tokenizer)
    model.config.rope_parameters = dict(rope_type="default", rope_theta=THETA)
    tokenizer.chat_template = with_plain_messages(tokenizer.chat_template)
    for part in (model, tokenizer): part.save_pretrained(folder)
    write_portable(folder)
    write_certificate(folder)
    return folder


def needs(name):
    "Skip without the environment of a reader; where a folder of readers is named, its lack is a failure"
    try: reader_python(name)
    except UserError as e:
        if os.environ.get("POST_TRAINING_READERS_DIR"): raise
        pytest.skip(str(e))


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def refused(folder, reader="library"):
    "What a reader does not read as certified"
    return {i["item"]: i["told"] for i in certify(folder, reader) if not i["ok"]}


def one_bit(path, tensor):
    "Change the last bit of a tensor's last number"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8:8 + length])[tensor]["data_offsets"][1] - 4] ^= 1
    path.write_bytes(data)


def certified_as(folder, change):
    "Change a value of the certificate"
    path = folder / "certificate.json"
    certificate = json.loads(path.read_text())
    change(certificate)
    path.write_text(json.dumps(certificate))


TENSOR = "model.layers.1.self_attn.k_proj.weight"
CHANGES = {
    "rope of the folder": (lambda f: edit(f / "config.json", f'"rope_theta": {THETA}', '"rope_theta": 60.0'), "config", "rope_theta is 60.0, certified is 50.0"),
    "rope of the certificate": (lambda f: certified_as(f, lambda c: c["config"].update({"config.json: rope_parameters.rope_theta": 60.0})), "config", "rope_theta is 50.0, certified is 60.0"),
    "character of the template": (lambda f: edit(f / "chat_template.jinja", "<SPECIAL_66>", "<SPECIAL_66> "), "tokenizer", "chat_template.jinja differs"),
    "character of a certified text": (lambda f: certified_as(f, lambda c: c["dialogues"][1].update(text=c["dialogues"][1]["text"].replace("city", "town"))), "template", "dialogue 'system': character"),
    "weight": (lambda f: one_bit(f / "model.safetensors", TENSOR), "weights", f"{TENSOR} differs"),
    "stop token": (lambda f: edit(f / "generation_config.json", "68", "69"), "stops", "does not stop at [68]"),
    "tokenizer": (lambda f: edit(f / "tokenizer.json", '"single_word": false', '"single_word": true'), "tokenizer", "tokenizer.json differs"),
    "a key of the certificate": (lambda f: certified_as(f, lambda c: c["dialogues"][0].update(written=[5], margins=[0.0])), "certificate", "was changed after it was written"),
    "a tokenizer of another program": (lambda f: (f / "tekken.json").write_text("{}"), "files", "tekken.json is not certified"),
    "weights beside the weights": (lambda f: shutil.copy(f / "model.safetensors", f / "consolidated.safetensors"), "weights", "lm_head.weight differs"),
    "an index of other files": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}'), "weights", "model-00001.safetensors is missing"),
    "a config that is cut": (lambda f: (f / "config.json").write_text("{"), "config", "config.json: valid JSON is not certified"),
    "weights that are cut": (lambda f: (f / "model.safetensors").write_bytes(b"123"), "weights", "header of model.safetensors is not certified"),
    "a log-probability": (lambda f: certified_as(f, lambda c: c["dialogues"][0]["logps"].__setitem__(-1, -30.0)), "log-probabilities", "Likely cause"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name(exported, tmp_path, name):
    folder = shutil.copytree(exported, tmp_path / "copied elsewhere")
    assert not refused(folder)
    change, item, says = CHANGES[name]
    change(folder)
    found = refused(folder)
    assert says in found[item], found


def test_the_command_needs_the_folder_only(exported, tmp_path):
    "Exit code 0 where all agrees, 1 where something differs, 2 where nothing could be asked"
    folder = shutil.copytree(exported, tmp_path / "x")
    def command(*words): return subprocess.run(["post-training", "certify", *words], capture_output=True, text=True, cwd=tmp_path)
    fine = command("x")
    assert fine.returncode == 0 and fine.stdout.count("yes ") == 11 and not fine.stderr, fine
    (folder / "chat_template.jinja").unlink()
    assert command("x").returncode == 1
    for words, says in ((["y"], "There is no folder y"), (["x", "--reader", "vlm"], "'vllm'")):
        out = command(*words)
        assert out.returncode == 2 and says in out.stderr, out


@pytest.mark.slow
def test_transformers_4(exported, tmp_path):
    "The generation before reads the export as it was written, and is refused by name where only the newer spelling of the rope is there"
    needs("transformers-4.57")
    assert not refused(exported, "transformers-4.57")
    folder = shutil.copytree(exported, tmp_path / "newer")
    settings = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"): settings.pop(key, None)
    (folder / "config.json").write_text(json.dumps(settings))
    certified_as(folder, lambda c: [c["config"].pop(k) for k in list(c["config"]) if k.startswith(("config.json: rope_theta", "config.json: rope_scaling"))])
    found = refused(folder, "transformers-4.57")
    assert found.pop("certificate")
    assert [*found] == ["log-probabilities", "continuation"][:len(found)] and "Likely cause: rope: the reader uses the default of apertus (rope_theta 1.2e+07)" in found["log-probabilities"], found


PARENT = """
import sys
from post_training.export.serving import free_port, running_server
port = free_port()
with running_server([sys.executable, "-c", sys.argv[1], str(port), sys.argv[2]], port, {}, "stubborn"):
    if sys.argv[3] == "waits": sys.stdin.read()
"""
STUBBORN = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "900"], start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer)
with open(sys.argv[2], "w") as f: print(os.getpid(), child.pid, file=f)
server.serve_forever()
"""


@pytest.mark.slow
def test_no_server_outlives_its_parent(tmp_path):
    "A server that ignores SIGTERM, and its child in another session, end when their parent leaves, gets SIGTERM or is killed"
    parents = {}
    for end in ("leaves", signal.SIGTERM, signal.SIGKILL):
        file = tmp_path / str(int(end) if end != "leaves" else end)
        words = [sys.executable, "-c", PARENT, STUBBORN, str(file), end if end == "leaves" else "waits"]
        parents[end] = subprocess.Popen(words, stdin=subprocess.PIPE), file
    for end, (parent, file) in parents.items():
        wait_until(lambda file=file: file.is_file() and file.read_text().endswith("\n"))
        if end != "leaves": parent.send_signal(end)
        parent.wait(120)
    left = [psutil.Process(int(pid)) for _, file in parents.values() for pid in file.read_text().split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(left, timeout=120)
    assert not alive


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true(): assert time.monotonic() < end; time.sleep(0.1)


def compose(exported, name, url):
    words = ["dataset_args.dataset_name=${artifacts_dir}/datasets/demo-answers", "dataset_args.split=train", "max_drop_fraction=1", "dataset_args.debug_subsample=24", "generation.n=2",
             "generation.max_new_tokens=24", "generation.batch_tokens=400", "max_seq_len=200", f"model_args.model_name_or_path={exported}", "backend=server", f"server.url={url}",
             "keep_existing=false", f"artifacts_subdir={name}"]
    return config.compose("ref_completions", words).cfg


def worker(cfg, frozen):
    "A worker of the only shard, which saves after each batch"
    argv = ["python", "-m", "post_training.stages.preference_data", str(frozen), str(preference_data.work_folder(cfg)), "--shard", "0", "--save-batches", "1"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_samples(url, folder):
    "Samples of the server: their log-probabilities are those of the model here, they end at the stops, a seed gives the same tokens again"
    tokenizer, model = load_tokenizer(str(folder), model_pad_token_id=10, model_eos_token_id=68), load_model(str(folder)).eval()
    prompts = ac.prompts_as_ids(tokenizer, [[dict(role="user", content=f"Add {i} and 7.")] for i in range(4)])
    stop = range(300, 400)
    name = ac.served_model(url.removesuffix("/v1"))
    complete = ac.server_backend(url, name, 12, stop=stop)
    seeds = [ac.sample_seeds(0, f"r{i}", 3) for i in range(4)]
    got = [c for cs in complete(prompts, 3, seeds) for c in cs]
    rows = [[*prompts[k // 3], *c["ids"]] for k, c in enumerate(got)]
    errors = logprob_errors(token_logprobs(model, rows), ac.server_logprobs(url.removesuffix("/v1"), name, rows))
    assert agrees(errors, FLOAT32_BOUND), errors
    ends = {68, *stop}
    assert all((c["ids"][-1] in ends) == (c["finish_reason"] == "stop") and not ends & {*c["ids"][:-1]} for c in got)
    assert {c["finish_reason"] for c in got} == {"stop", "length"}
    def ids(of, seeds): return [c["ids"] for cs in of(prompts, 3, seeds) for c in cs]
    assert sum(a == c["ids"] for a, c in zip(ids(complete, seeds), got)) >= 10  # a server promises the noise of a seed, not its rounding
    assert sum(a == c["ids"] for a, c in zip(ids(complete, [[s + 1 for s in r] for r in seeds]), got)) <= 2


def check_evaluation_and_chat(url, folder, tmp_path):
    "An evaluation and a conversation with the server give what the model here gives"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(dict(question=f"What is {i} + 4?", answer=str(i + 4))) + "\n" for i in range(8)))
    cfg = config.compose("evaluate", [f"checkpoints=[{folder},'{url}']", f"model_args.model_name_or_path={folder}", f"dataset_args.dataset_name={tmp_path}/rows.jsonl",
                                      "evaluation.max_new_tokens=6"]).cfg
    here, there = evaluate(run.open_run(cfg), cfg)["checkpoints"].values()
    assert there["server_check"]["compared_with"] == "certificate" and there["answers"] == 8
    assert there["new_tokens"] == here["new_tokens"] and abs(there["perplexity"]["nats_per_token"] - here["perplexity"]["nats_per_token"]) < 1e-3
    said = [chat.send_message(chat.Chat(*chat.load_chat_model(name, folder=str(folder)), max_new_tokens=8), "Hello")["ids"] for name in (str(folder), url)]
    assert said[0] == said[1] and len(said[0]) == 8


@pytest.mark.slow
def test_vllm(exported, demo, tmp_root, monkeypatch):
    "vLLM reads the export as certified; the server backend samples from it, refuses another model, and goes on after the server was killed midway"
    needs("vllm")
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(reader_server("vllm", exported))
        items = {i["item"]: i for i in certify(exported, url, "float32")}
        assert all(i["ok"] for i in items.values()), items
        check_samples(url, exported)
        check_evaluation_and_chat(url, exported, tmp_root)
        other = shutil.copytree(exported, tmp_root / "other")
        (other / "certificate.json").unlink()
        (other / "config.json").write_text((other / "config.json").read_text().replace('"rope_theta": 50.0', '"rope_theta": 10000.0'))
        with pytest.raises(UserError, match="Nothing was sampled"): ac.check_server_model(url, str(exported), str(other), [[1, 65, *range(100, 130)]])
        cfg = compose(exported, tmp_root.name, url)
        plan = preference_data.plan_work(cfg)
        frozen = config.save_frozen(cfg, tmp_root / "frozen.yaml")
        at = shards.shard_folder(preference_data.work_folder(cfg), plan, 0)
        process = worker(cfg, frozen)
        while not shards.read_progress(at).get("batches") and process.poll() is None: time.sleep(0.01)
    saved = shards.read_progress(at).get("batches", 0)
    assert 0 < saved < len(plan.batches), process.communicate()[0]
    port = int(url.removesuffix("/v1").rpartition(":")[2])
    with reader_server("vllm", exported, port=port):
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0 or "did not answer" in said, said
        if process.returncode: assert worker(cfg, frozen).wait(300) == 0
    assert shards.read_progress(at)["batches"] == len(plan.batches)
    told = preference_data.server_numbers(cfg)["server_check"]
    assert told["compared_with"] == "certificate" and told["as_float32"] and told["max"] <= error_bound("float32")["max"]


def test_the_table_of_the_readme_is_the_record():
    "Each cell: the largest error of its architectures in the kept record, and what did not agree"
    from conftest import ROOT
    matrix = json.loads((ROOT / "runs/examples/readers/matrix.json").read_text())
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(("| Apertus:", "| Llama (", "| Qwen", "| Gemma", "| Phi"))]
    seen = []
    for names, *cells in rows:
        of = [n for n in matrix if n.split(",")[0].split(" 1.0")[0] in names and (n != "Qwen 2" or names == n)]
        seen += of
        for reader, cell in zip(("transformers", "transformers-4.57", "vllm", "llama.cpp"), cells):
            entries = [matrix[n][reader] for n in of]
            if cell == "not converted": assert all([*e["why"]] == ["reader"] for e in entries)
            else: assert cell.split()[0] == f"{max(e['max'] for e in entries):.0e}" and ("(" in cell) == any(not e["agrees"] for e in entries), (names, reader)
    assert sorted(seen) == sorted(matrix)
