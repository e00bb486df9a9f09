"Model folders as people bring them: each is read as it was meant, with a notice, or refused by name before anything is trained"
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from post_training.core.files import UserError
from post_training.export.rehearsal import weightless_model
from post_training.models.load import load_model
from post_training.tokens.tokenizer import load_tokenizer


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def weights(folder, change):
    save_file({k: v.clone() for k, v in change(load_file(folder / "model.safetensors")).items()}, folder / "model.safetensors", metadata=dict(format="pt"))


def older_rope_only(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    for k in ("rope_parameters", "rope_scaling", "rope_theta"): config.pop(k, None)
    (folder / "config.json").write_text(json.dumps(config | keys))


def poked(w, name, value):
    w[name] = w[name].clone()
    w[name][-1, -1] = value
    return w


def without(w, *words): return {k: v for k, v in w.items() if not any(word in k for word in words)}
def second(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"))))


# name -> (what is done to a copy of the tiny model, words of the refusal)
REFUSED = {
    "no head": (lambda f: weights(f, lambda w: without(w, "lm_head")), "lacks 1 tensors of ApertusForCausalLM, such as lm_head.weight"),
    "a layer too few": (lambda f: weights(f, lambda w: without(w, ".layers.3.mlp.up_proj")), "lacks 1 tensors"),
    "a classifier": (lambda f: weights(f, lambda w: without(w, "lm_head") | {"score.weight": w["lm_head.weight"][:2]}), "lacks 1 tensors"),
    "tied and two matrices": (lambda f: edit(f / "config.json", tie_word_embeddings=True), "two different matrices"),
    "an adapter beside weights": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "organisation/base"}'), "adapter of organisation/base"),
    "a GGUF": (lambda f: ((f / "config.json").unlink(), (f / "x.gguf").write_bytes(b"GGUF")), "is a GGUF"),
    "weights twice": (second, "has its weights twice"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has its weights as a pickle .pytorch_model.bin.*use_safetensors=False"),
    "pickles of two shards": (lambda f: ((f / "model.safetensors").rename(f / "pytorch_model-00001-of-00002.bin"), (f / "pytorch_model.bin.index.json").write_text("{}")), "00001-of-00002.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no file of weights"),
    "a NaN": (lambda f: weights(f, lambda w: poked(w, "model.layers.2.mlp.up_proj.weight", float("nan"))), "not finite .* in 1 tensors, such as model.layers.2.mlp.up_proj.weight"),
    "an infinity": (lambda f: weights(f, lambda w: poked(w, "lm_head.weight", -float("inf"))), "such as lm_head.weight"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
}
# name -> (what is done, words of the notice, kind and theta of the rope that is loaded)
READ = {
    "tensors too many": (lambda f: edit(f / "config.json", num_hidden_layers=3), "have no place in ApertusForCausalLM", ("default", 1e4)),
    "code of its own": (lambda f: edit(f / "config.json", auto_map=dict(AutoModelForCausalLM="modeling_mine.Mine")), "which is not run", ("default", 1e4)),
    "two thetas": (lambda f: edit(f / "config.json", rope_theta=5e5), "transformers 4 and readers that do not know rope_parameters take rope_theta=500000.0", ("default", 1e4)),
    "two scalings": (lambda f: edit(f / "config.json", rope_scaling=dict(rope_type="linear", factor=4.)), "which are different models", ("linear", 12e6)),
    "an older theta": (lambda f: older_rope_only(f, rope_theta=5e5), "It is read as written", ("llama3", 5e5)),
    "an older plain rope": (lambda f: older_rope_only(f, rope_theta=5e5, rope_scaling=None), "It is read as written", ("default", 5e5)),
}


def changed(demo, folder, change):
    shutil.copytree(demo / "models/tiny", folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for k in ("rope_theta", "rope_scaling"): config.pop(k, None)
    (folder / "config.json").write_text(json.dumps(config))
    change(folder)
    return str(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, demo, tmp_path):
    change, words = REFUSED[name]
    folder = changed(demo, tmp_path / "base", change)
    with pytest.raises(UserError, match=words): load_model(folder)
    if name in ("a GGUF", "weights twice", "an adapter beside weights", "a pickle", "pickles of two shards", "no weights"):  # known without the weights
        with pytest.raises(UserError, match=words): weightless_model(folder, load_tokenizer(str(demo / "models/tiny"), model_eos_token_id=68))


@pytest.mark.parametrize("name", READ)
def test_read_with_a_notice(name, demo, tmp_path):
    change, words, rope = READ[name]
    model = load_model(changed(demo, tmp_path / "base", change))
    assert words in " ".join(model.notices)
    used = model.config.rope_parameters
    assert (used["rope_type"], used["rope_theta"]) == rope
    assert abs(model.model.rotary_emb.inv_freq[1].item() - rope[1] ** (-1 / 16)) < 1e-4 or rope[0] != "default"
    model.save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).notices == []  # what is saved has one meaning


@pytest.mark.parametrize("name", ["a pickle", "a NaN", "a layer too few", "two thetas"])
def test_every_reader_says_the_same(name, demo, tmp_path):
    "An evaluation, a chat, a certificate's reader and an export give the words that training gives"
    from post_training.evaluation.answers import load_for_generation
    from post_training.export.weights import load_checkpoint_source, CheckpointSource
    from post_training.view.chat import load_chat_model

    change, words, *_ = (REFUSED | READ)[name]
    folder = changed(demo, tmp_path / "base", change)
    cfg = dict(model_args=dict(model_revision="main", trust_remote_code=False), consolidate="auto", base_model=None, runs_dir=None)
    readers = dict(evaluate=lambda: load_for_generation(folder, "cpu"), chat=lambda: load_chat_model(folder, device="cpu")[0],
                   export=lambda: load_checkpoint_source(cfg, CheckpointSource(folder, "base")))
    for call in readers.values():
        if name in READ: assert words in " ".join(call().notices)
        else:
            with pytest.raises(UserError, match=words): call()


def test_quantised_weights_are_not_trained(demo, tmp_path):
    tokenizer = load_tokenizer(str(demo / "models/tiny"), model_eos_token_id=68)
    folder = changed(demo, tmp_path / "base", lambda f: edit(f / "config.json", quantization_config=dict(quant_method="fp8")))
    with pytest.raises(UserError, match=r"quantised \(fp8\)"): weightless_model(folder, tokenizer)
