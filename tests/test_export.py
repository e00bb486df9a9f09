"Exports as a person makes them: the command twice, what is refused and what is left then, ZeRO-3 checkpoints of two processes, a real server asked through the openai client"
import json
import os
import re
import shutil
import socket
import subprocess

import pytest
import torch
from conftest import BIN, ROOT
from safetensors.torch import load_file, save_file

from post_training import config
from post_training.export import weights
from post_training.export import serving
from post_training.stages import export
from post_training import run
from post_training.core.files import UserError, atomic_dir, verify_manifest, write_manifest
from post_training.tokens.masks import tokenize_chats
from post_training.tokens.tokenizer import load_tokenizer
from post_training.training.checkpoint import tensor_header


@pytest.fixture(scope="module")
def tiny(demo):
    return demo / "models" / "tiny"


@pytest.fixture
def copy(tiny, tmp_path):
    "A checkpoint to spoil: the embedded model without its manifest"
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "manifest.json").unlink()
    return folder


def compose(source, *overrides):
    return config.compose("export", [f"model_args.model_name_or_path={source}", "tokenizer_args.model_eos_token_id=68", *overrides])


def made(source, folder, *overrides):
    "Export to a folder, without a run"
    cfg = compose(source, *overrides).cfg
    from post_training.stages.tokenized_data import tokenizer_of
    with atomic_dir(folder) as tmp: return export.export_checkpoint(cfg, weights.find_checkpoint_source(str(source)), tokenizer_of(cfg), tmp, folder.name)


def refused(source, folder, match, *overrides):
    with pytest.raises(UserError, match=match): made(source, folder, *overrides)
    assert not [p for p in folder.parent.iterdir() if folder.name in p.name], "nothing is left"


@pytest.mark.slow
def test_the_command_twice_and_its_card(tiny, demo, tmp_root):
    "A whole folder with a record; the second time it is only looked up; no path or host is in it; other stages and chat find it as run:RUN"
    shutil.copytree(demo / "models", tmp_root / "artifacts/models")
    words = [BIN / "post-training", "export", f"model_args.model_name_or_path={tiny}", "tokenizer_args.model_eos_token_id=68", "model_name=tiny-chat",
             f"dataset_args.dataset_name={demo}/datasets/demo", "dataset_args.split=train", "parity.dialogues=3", "max_shard_size=2MB"]
    first, second = (subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "ids of 9 dialogues equal, logits differ by 0 at most" in first.stdout and "done already" in second.stdout
    run_dir = run.all_runs()[0]
    folder = config.site_path(run.read_record(run_dir)["final"]["output"])
    assert folder.name == "tiny-chat" and not verify_manifest(folder) and not weights.weight_faults(folder) and len(list(folder.glob("*.safetensors"))) > 1
    texts = "".join(p.read_text() for p in folder.iterdir() if p.suffix in (".md", ".json", ".jinja"))
    assert str(tmp_root) not in texts and str(demo) not in texts and not re.search(rf"\b{re.escape(socket.gethostname())}\b", texts)
    assert run.base_model(f"run:{run_dir.name}")[0] == str(folder)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in folder.iterdir())


def test_ids_and_masks_of_the_demo_are_those_of_training(tiny, demo, tmp_path):
    "Every kind of row: thoughts, tools, several turns; and training on the export would see the same"
    result = made(tiny, tmp_path / "out", f"dataset_args.dataset_name={demo}/datasets/demo", "dataset_args.split=train", "parity.dialogues=40")
    assert len(result.dialogues) == 46 and all(r["same"] for r in result.dialogues)
    assert result.logits["max_difference"] == 0
    from post_training.data.io import load_rows
    from post_training.tokens.dataset import row_chat
    from post_training.tokens.tokenizer import load_tokenizer as load
    talks = [row_chat(r, load(str(tiny))).messages for r in load_rows(str(demo / "datasets/demo"), "train").select(range(0, 4000, 40))]
    before, after = (tokenize_chats(load_tokenizer(str(p)), talks) for p in (tiny, tmp_path / "out"))
    for a, b in zip(before, after): assert a.input_ids.tolist() == b.input_ids.tolist() and a.completion_mask.tolist() == b.completion_mask.tolist()
    c = json.loads((tmp_path / "out/config.json").read_text())
    assert c["eos_token_id"] == 68 and c["use_cache"] and json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [68]


@pytest.mark.parametrize("template", ["tulu", "mistral", "apertus"])
def test_templates(copy, tmp_path, template):
    "The template is inside; one whose turns end with a text has to be asked for"
    out = tmp_path / "out"
    result = made(copy, out, f"tokenizer_args.chat_template_name={template}", "parity.on_missing_stop=warn", "parity.dialogues=0")
    assert sum(r["same"] is True for r in result.dialogues) >= 2 and not any(r["same"] is False for r in result.dialogues)
    assert (out / "chat_template.jinja").read_text().endswith(load_tokenizer(str(copy), template, model_pad_token_id=10).chat_template)


def test_spoilt_weights_are_refused(tiny, copy, tmp_path):
    out, path = tmp_path / "out", copy / "model.safetensors"
    data, tensors = path.read_bytes(), load_file(tiny / "model.safetensors")
    path.write_bytes(data[:-7])
    refused(copy, out, "is truncated")
    path.write_bytes(b"")
    refused(copy, out, "not readable")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, path, metadata=dict(format="pt"))
    refused(copy, out, "lacks 1 tensors.*lm_head")
    save_file(tensors | {"model.extra": torch.zeros(1)}, path, metadata=dict(format="pt"))
    refused(copy, out, "does not have")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * float("nan")}, path, metadata=dict(format="pt"))
    refused(copy, out, "not finite .* such as model.norm.weight")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, path, metadata=dict(format="pt"))
    refused(copy, out, "Cannot load|lacks")
    path.unlink()
    refused(copy, out, "no file of weights")
    torch.save({}, copy / "pytorch_model.bin")
    refused(copy, out, "a pickle")


def test_a_lost_shard_and_a_changed_checkpoint(tiny, tmp_path):
    made(tiny, tmp_path / "shards", "max_shard_size=1MB", "parity.dialogues=0")
    write_manifest(tmp_path / "shards")
    again = shutil.copytree(tmp_path / "shards", tmp_path / "again")
    next((tmp_path / "shards").glob("*-00002-of-*")).unlink()
    refused(tmp_path / "shards", tmp_path / "out", "is incomplete: .*00002-of.* is missing")
    (tmp_path / "shards/manifest.json").unlink()
    refused(tmp_path / "shards", tmp_path / "out", "00002-of.* is missing, which the index names")
    (again / "config.json").write_text((again / "config.json").read_text().replace("128", "129"))
    refused(again, tmp_path / "out", "config.json has")


def test_tokenizers_that_do_not_belong(tiny, copy, tmp_path):
    out = tmp_path / "out"
    c = json.loads((copy / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    rows = c["vocab_size"] - 5
    short = {k: v[:rows].clone() if k in ("lm_head.weight", "model.embed_tokens.weight") else v for k, v in tensors.items()}
    save_file(short, copy / "model.safetensors", metadata=dict(format="pt"))
    (copy / "config.json").write_text(json.dumps(c | dict(vocab_size=rows)))
    refused(copy, out, f"only {rows} rows of embeddings")
    (copy / "chat_template.jinja").unlink()
    refused(copy, out, "chat_template_name")
    (copy / "tokenizer.json").unlink()
    refused(copy, out, "tokenizer")


def test_a_template_other_than_that_of_training_is_refused(tiny, tmp_path):
    "Where the record is known"
    cfg = compose(tiny, "parity.dialogues=0").cfg
    from post_training.stages.tokenized_data import tokenizer_of
    source = weights.CheckpointSource(str(tiny), "tiny", dict(fingerprints=dict(template="0" * 64)))
    with pytest.raises(UserError, match="differs from the template of this run's training"), atomic_dir(tmp_path / "out") as tmp:
        export.export_checkpoint(cfg, source, tokenizer_of(cfg), tmp, "out")
    assert not list(tmp_path.iterdir())


def test_dtype_and_place(tiny, tmp_path, tmp_root):
    "A narrower dtype within its bound and not beyond; a folder of others is left alone; a push is refused before any work"
    result = made(tiny, tmp_path / "bf16", "dtype=bfloat16", "parity.dialogues=0")
    assert {dtype for dtype, _ in tensor_header(tmp_path / "bf16/model.safetensors").values()} == {"BF16"} and 0 < result.logits["max_difference"] < 0.05 * result.logits["largest"]
    refused(tiny, tmp_path / "tight", "more than", "dtype=bfloat16", "parity.max_difference=1e-6", "parity.dialogues=0")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("x")
    for override, match in ((f"save_dir={tmp_path}/taken", "did not write"), ("push_to_hub=a/b", "HF_HUB_OFFLINE")):
        c = compose(tiny, override, "parity.dialogues=0")
        task = run.open_run(c.cfg)
        with pytest.raises(UserError, match=match): export.export(task, c.cfg)
        run.close_attempt(task.run_dir, task.number, 2)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    c = compose(tiny, f"save_dir={tmp_path}/free", "parity.dialogues=0")
    folder, _ = export.export(run.open_run(c.cfg), c.cfg)
    assert folder == tmp_path / "free" and not verify_manifest(folder)


def test_a_typo_is_told(tiny):
    for bad, match in (("dtyp=float32", "Did you mean 'dtype'"), ("parity.dialogs=3", "parity.dialogues"), ("consolidate=maste", "master"), ("push_to_hub=name", "organisation/name"), ("max_shard_size=5", "")):
        if match:
            with pytest.raises(UserError, match=match): compose(tiny, bad)


# -- engines and servers

@pytest.mark.slow
def test_zero3_checkpoints_of_two_processes(tmp_path, tiny):
    "Partitions are put together to the weights that training wrote beside them; without adapters' matrices; foreign pickles are not read"
    from test_lora import DEEPSPEED
    from test_trainer_equivalence import start_ranks

    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps(dict(train_batch_size=4, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, gradient_clipping=1e9, zero_optimization=dict(stage=3, stage3_gather_16bit_weights_on_model_save=True), zero_allow_untested_optimizer=True)))
    case = dict(name="zero3", objective_name="plw", objective=dict(name="plw", prompt_loss_weight=0.1), per_device=1, accumulation=2, args=dict(save_strategy="epoch"))
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    start_ranks(2, [tmp_path / "cases.json", tmp_path], DEEPSPEED | dict(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(ds)))
    folder = sorted((tmp_path / "zero3").glob("checkpoint-*"))[-1]
    assert weights.weights_kind(folder) == "weights" and weights.weights_kind(folder, "master") == "partitions"
    saved = load_file(folder / "model.safetensors")
    for kind in ("beside", "alone"):
        if kind == "alone": # a checkpoint whose weights were not gathered
            (folder / "model.safetensors").unlink()
            write_manifest(folder)
            assert weights.weights_kind(folder) == "partitions"
        model = weights.load_partitions(str(folder))
        for name, p in model.named_parameters(): assert torch.equal(p.detach(), saved[name]), name
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="may run code"): weights.weights_kind(folder)


@pytest.mark.slow
def test_a_server_answers_as_the_library(tiny, tmp_path):
    "transformers serve on the folder, asked through the openai client; and what it cannot carry is refused, not left out"
    from post_training.tokens.tokenizer import load_tokenizer
    folder = tmp_path / "served"
    made(tiny, folder, "parity.dialogues=0")
    user = lambda text: dict(role="user", content=text)
    talks = [[user("Hello")], [dict(role="system", content="Be brief."), user("Reverse: abc")], [user("17 + 25?"), dict(role="assistant", content="42"), user("And  \n 8?")], [user("日本 🏔")]]
    tokenizer = load_tokenizer(str(tiny), "apertus", model_eos_token_id=68)
    with serving.temporary_server(folder, "cpu") as url:
        found = serving.serving_parity(url, folder, talks, tokenizer, 24)
        import openai
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model=str(folder), messages=talks[0], tools=[dict(type="function", function=dict(name="f", parameters={}))])
    assert all(f["same"] for f in found), found
    assert len({f["server"] for f in found}) > 1, "the prompt matters"
    with pytest.raises(UserError, match="did not start"), serving.temporary_server(tmp_path / "nowhere", "cpu", 60): pass
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
