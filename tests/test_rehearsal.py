"Bases whose first save would fail: repaired with a notice, or refused before the first step"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from post_training.core.files import UserError
from post_training.export.rehearsal import SavePlan, rehearse, weightless_model
from post_training.models.load import load_model, set_special_ids
from post_training.tokens.tokenizer import config_ids, load_tokenizer

# name -> (keys of generation_config.json, keys of config.json, words of the first notice)
REPAIRED = {
    "temperature": (dict(temperature=.6), {}, "do_sample=true is added"), "top_p and greedy": (dict(top_p=.9, do_sample=False), {}, "it is left out"),
    "beams": (dict(early_stopping=True, length_penalty=2.), {}, "it is left out"), "sequences": (dict(num_return_sequences=4), {}, "it is left out"),
    "no tokens": (dict(max_new_tokens=0), {}, "it is left out"), "cache": (dict(use_cache=False, cache_implementation="static"), {}, "it is left out"),
    "unknown cache": (dict(cache_implementation="quantum"), {}, "it is left out"), "scores": (dict(output_scores=True), {}, "it is left out"),
    "negative pad": (dict(pad_token_id=-1), {}, "no id"), "text as id": (dict(eos_token_id="68"), {}, "no id"),
    "pad of the config": ({}, dict(pad_token_id=-1), "pad_token_id=-1"), "large pad": ({}, dict(pad_token_id=10**6), "pad_token_id=1000000"),
    "watermark": (dict(watermarking_config=dict(greenlist_ratio=2.)), {}, "it is left out"), "sampling in the config": (None, dict(temperature=.6), "do_sample=true"),
    "several": (dict(temperature=.6, max_new_tokens=0, eos_token_id=[68, "x"], output_scores=True), {}, "do_sample=true"),
}
REFUSED = {
    "layers": (dict(layer_types=["none"]), "config.json is not valid"), "scaling": (dict(rope_parameters=dict(rope_type="ntkx", rope_theta=1e4)), "Cannot load the model"),
    "a text": (dict(vocab_size="many"), "config.json is not valid"),
}


def base(folder, demo, generation=None, config=None):
    "A copy of the tiny model with other settings"
    shutil.copytree(demo / "models/tiny", folder)
    (folder / "manifest.json").unlink()
    settings = json.loads((folder / "config.json").read_text())
    if config: (folder / "config.json").write_text(json.dumps(settings | config))
    if generation is None: (folder / "generation_config.json").unlink()
    else: (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=68) | generation))
    return folder


@pytest.mark.parametrize("name", REPAIRED)
def test_what_can_be_repaired_is_saved(name, demo, tmp_path):
    "The rehearsal passes, and the real model saves and loads again"
    generation, config, words = REPAIRED[name]
    folder = base(tmp_path / "base", demo, generation, config)
    tokenizer = load_tokenizer(str(folder), model_eos_token_id=68)
    model = weightless_model(str(folder), tokenizer)
    assert words in " ".join(model.notices)
    rehearse(tmp_path / "checkpoints", model, tokenizer)
    real = load_model(str(folder))
    assert real.notices == model.notices
    set_special_ids(real, config_ids(tokenizer))
    real.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert (again.notices, again.generation_config.eos_token_id) == ([], [68])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused(name, demo, tmp_path):
    config, words = REFUSED[name]
    folder = base(tmp_path / "base", demo, {}, config)
    tokenizer = load_tokenizer(str(demo / "models/tiny"), model_eos_token_id=68)
    with pytest.raises(UserError, match=words): load_model(str(folder))
    if name != "scaling":  # the functions of a scaling are looked up when a model gets memory
        with pytest.raises(UserError, match=words): weightless_model(str(folder), tokenizer)


def test_named_templates_and_names_that_are_no_files(demo, tmp_path):
    "Several templates come back; a name that is no file name is refused"
    tokenizer = load_tokenizer(str(demo / "models/tiny"), model_eos_token_id=68)
    model = weightless_model(str(demo / "models/tiny"), tokenizer)
    text = tokenizer.chat_template
    tokenizer.chat_template = dict(default=text, tool_use=text)
    rehearse(tmp_path / "checkpoints", model, tokenizer)
    tokenizer.chat_template = {"default": text, "tools/of/mine": text}
    with pytest.raises(UserError, match="could not be written|cannot be saved"): rehearse(tmp_path / "checkpoints", model, tokenizer)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_folders_and_disks(demo, tmp_path):
    "A file in the place of a folder, a folder below it, a disk that is too small"
    tokenizer = load_tokenizer(str(demo / "models/tiny"), model_eos_token_id=68)
    model = weightless_model(str(demo / "models/tiny"), tokenizer)
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(UserError, match="could not be written to"): rehearse(tmp_path / folder, model, tokenizer)
    with pytest.raises(UserError, match="save_total_limit is None"): rehearse(tmp_path / "c", model, tokenizer, SavePlan(saves=10**8))
    assert rehearse(tmp_path / "c", model, tokenizer, SavePlan(saves=10**8, limit=2)).facts["checkpoints"] == 4


@pytest.mark.slow
def test_a_run_from_such_a_base(demo, tmp_path):
    "Training from a base with a temperature keeps its checkpoint, and the record and the log say what was repaired; a foreign tokenizer ends before the model is loaded"
    folder = base(tmp_path / "base", demo, dict(temperature=.6, top_p=.9))
    env = os.environ | dict(POST_TRAINING_RUNS_DIR=str(tmp_path / "runs"), WANDB_MODE="disabled")
    command = [sys.executable, "-m", "post_training.train_sft", "cluster.device=cpu", "dataset_args.debug_subsample.train=40", "dataset_args.debug_subsample.eval=8",
               "global_batch_size=8", "training_args.per_device_train_batch_size=8", "training_args.max_steps=1", f"tokenizer_args.tokenizer_name_or_path={folder}"]
    p = subprocess.run([*command, f"model_args.model_name_or_path={folder}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "rehearsal: settings and tokenizer written" in p.stdout and "do_sample=true is added" in p.stderr
    record = json.loads(next((tmp_path / "runs").rglob("record.json")).read_text())
    assert record["rehearsal"]["checkpoints"] == 1 and any("do_sample=true" in n for n in record["notices"])
    generation = json.loads((Path(record["checkpoints_dir"]) / "checkpoint-1/generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"], generation["eos_token_id"]) == (.6, True, [68])
