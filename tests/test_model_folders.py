"Model folders as people bring them: each is read as it was meant, with a notice, or refused by name before anything is trained"
import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from post_training.core.files import UserError
from post_training.export.rehearsal import weightless_model
from post_training.export.weights import load_adapter
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
    "a layer too few": (lambda f: weights(f, lambda w: without(w, ".layers.1.mlp.up_proj")), "lacks 1 tensors"),
    "a classifier": (lambda f: weights(f, lambda w: without(w, "lm_head") | {"score.weight": w["lm_head.weight"][:2]}), "lacks 1 tensors"),
    "tied and two matrices": (lambda f: edit(f / "config.json", tie_word_embeddings=True), "two different matrices"),
    "an adapter beside weights": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "organisation/base"}'), "adapter of organisation/base"),
    "a GGUF": (lambda f: ((f / "config.json").unlink(), (f / "x.gguf").write_bytes(b"GGUF")), "is a GGUF"),
    "weights twice": (second, "has its weights twice"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has its weights as a pickle .pytorch_model.bin.*use_safetensors=False"),
    "pickles of two shards": (lambda f: ((f / "model.safetensors").rename(f / "pytorch_model-00001-of-00002.bin"), (f / "pytorch_model.bin.index.json").write_text("{}")), "00001-of-00002.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no file of weights"),
    "an older name of a scaling": (lambda f: older_rope_only(f, rope_scaling=dict(type="su", short_factor=[1.] * 16, long_factor=[2.] * 16)), "of the type su, .* write longrope"),
    "an unknown scaling": (lambda f: older_rope_only(f, rope_scaling=dict(type="mrope", mrope_section=[2, 3])), "'mrope', which this version"),
    "an unknown type": (lambda f: edit(f / "config.json", model_type="mine", auto_map=dict(AutoConfig="c.C", AutoModelForCausalLM="m.M")), "no class for its model_type"),
    "a dtype that is none": (lambda f: edit(f / "config.json", dtype="auto"), "no attribute 'auto'"),
    "a NaN": (lambda f: weights(f, lambda w: poked(w, "model.layers.1.mlp.up_proj.weight", float("nan"))), "not finite .* in 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
    "an infinity": (lambda f: weights(f, lambda w: poked(w, "lm_head.weight", -float("inf"))), "such as lm_head.weight"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
}
# name -> (what is done, words of the notice, kind and theta of the rope that is loaded)
READ = {
    "tensors too many": (lambda f: edit(f / "config.json", num_hidden_layers=1), "have no place in ApertusForCausalLM", ("default", 1e4)),
    "code of its own": (lambda f: edit(f / "config.json", auto_map=dict(AutoModelForCausalLM="modeling_mine.Mine")), "which is not run", ("default", 1e4)),
    "stops without a row": (lambda f: (edit(f / "config.json", eos_token_id=[68, 10**6]), edit(f / "generation_config.json", eos_token_id=[10**6, 68])), "1000000 is no id of this model", ("default", 1e4)),
    "an attention that is not installed": (lambda f: edit(f / "config.json", attn_implementation="flash_attention_2"), "", ("default", 1e4)),
    "a theta in the scaling": (lambda f: older_rope_only(f, rope_scaling=dict(type="linear", factor=2., rope_theta=5e5)), "transformers 4 reads this key beside rope_scaling only", ("linear", 5e5)),
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


def test_a_model_without_rotary_positions(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).notices == []


# name -> (what is done to the tensors and to the settings of an adapter, words of the refusal)
ADAPTERS = {
    "names of another model": (lambda w: {k.replace(".layers.", ".language.layers."): v for k, v in w.items()}, {}, "no place for 4 of the adapter's 4 tensors"),
    "a layer that is not there": (lambda w: w | {k.replace(".1.", ".9."): v.clone() for k, v in w.items() if ".1." in k}, {}, "no place for 2 of"),
    "a layer too few": (lambda w: without(w, ".1."), {}, "2 tensors that adapter_config.json describes are missing"),
    "a NaN": (lambda w: {k: v * float("nan") for k, v in w.items()}, {}, "not finite"),
    "a pickle": (None, {}, "Its weights are a pickle"), "a classifier": (dict, dict(task_type="SEQ_CLS"), "for task_type=SEQ_CLS"),
    "virtual tokens": (dict, dict(peft_type="PREFIX_TUNING"), "adds vectors to the input"), "a kind of tomorrow": (dict, dict(peft_type="X"), "peft_type=X"),
    "a key of tomorrow": (dict, dict(use_more=True), "has use_more=True"), "other layers": (dict, dict(target_modules=["c_attn"]), "c_attn"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_not_the_trained_ones(name, demo, tmp_path):
    "None of them exports its base, or a part of what was trained, in silence"
    change, settings, words = ADAPTERS[name]
    tiny, folder = str(demo / "models/tiny"), tmp_path / "adapter"
    get_peft_model(load_model(tiny), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(folder)
    load_adapter(str(folder), tiny)
    file = folder / "adapter_model.safetensors"
    if change: save_file(change(load_file(file)), file)
    else: file.rename(folder / "adapter_model.bin")
    edit(folder / "adapter_config.json", **settings)
    with pytest.raises(UserError, match=words): load_adapter(str(folder), tiny)
