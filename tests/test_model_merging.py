"Merging checkpoints: mergekit's documented configurations on tiny models, definitions, faults of sources, the command"
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from post_training import config
from post_training import run
from post_training.merging import document as merging_document
from post_training.merging import sources as merging_sources
from post_training.merging import merge as merging_merge
from post_training.stages import model_merging
from post_training.core.files import UserError, verify_manifest, write_json

torch.set_num_threads(1)


def build_llama(folder, tokenizer_from):
    "A tiny Llama with the tiny tokenizer"
    from transformers import LlamaConfig, LlamaForCausalLM
    vocab = json.loads((Path(tokenizer_from) / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=68, pad_token_id=10))
    model.save_pretrained(folder)
    for name in merging_merge.TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file():
            shutil.copy(Path(tokenizer_from) / name, folder)


def build_apertus(folder, tiny):
    "The tiny model with four layers, so that there are layers to choose from"
    from transformers import ApertusForCausalLM

    from post_training.models.load import quiet_activation, tiny_config
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("manifest.json"))
    torch.manual_seed(0)
    with quiet_activation(): model = ApertusForCausalLM(tiny_config(json.loads((tiny / "config.json").read_text())["vocab_size"], num_hidden_layers=4)).float()
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", settings | dict(num_hidden_layers=4))
    save_file(model.state_dict(), folder / "model.safetensors", metadata=dict(format="pt"))


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory):
    "For each architecture a base and three models that lie around it"
    root, out = tmp_path_factory.mktemp("merging"), {}
    build_llama(root / "llama", demo / "models/tiny")
    build_apertus(root / "apertus", demo / "models/tiny")
    for name, base in (("apertus", root / "apertus"), ("llama", root / "llama")):
        out[name] = dict(base=str(base), **{m: str(merging_sources.write_variant(root / f"{name}-{m}", base, seed)) for seed, m in enumerate("abc")})
    return out


def composed(root, document, *overrides):
    "A config of the stage around a YAML file"
    path = Path(root) / "merge.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return config.compose("model_merging", [f"model_merging={path}", f"runs_dir={root}/runs", f"artifacts_dir={root}/artifacts", *overrides]).cfg


def merge(root, document, *overrides):
    "The stage, without its notebook: the folder of the result and the facts"
    cfg = composed(root, document, *overrides)
    task = run.open_run(cfg)
    try:
        output, facts = model_merging.model_merging(task, cfg)
        run.finish_output(task, output, **facts)
    except BaseException:
        run.close_attempt(task.run_dir, task.number, 2)
        raise
    return Path(output), facts


# -- what mergekit documents: the examples of its guide and its folder `examples`, with other models and fewer layers

of = lambda models, **parameters: [dict(model=m) | (dict(parameters=parameters) if parameters else {}) for m in models]
EXAMPLES = {
    "linear": lambda m: dict(merge_method="linear", models=[dict(model=m[x], parameters=dict(weight=w)) for x, w in zip("abc", (1.0, 0.3, 0.5))], dtype="float16"),
    "linear, not normalised": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=0.5), parameters=dict(normalize=False)),
    "slerp": lambda m: dict(merge_method="slerp", base_model=m["a"], models=of([m["a"], m["b"]]), parameters=dict(t=0.5)),
    "gradient slerp with filters": lambda m: dict(
        merge_method="slerp", base_model=m["a"], dtype="float16", slices=[dict(sources=[dict(model=m[x], layer_range=[0, 4]) for x in "ab"])],
        parameters=dict(t=[dict(filter="self_attn", value=[0, 0.5, 0.3, 0.7, 1]), dict(filter="mlp", value=[1, 0.5, 0.7, 0.3, 0]), dict(value=0.5)])),
    "nuslerp": lambda m: dict(merge_method="nuslerp", models=of([m["a"], m["b"]], weight=0.5)),
    "nuslerp of task vectors": lambda m: dict(merge_method="nuslerp", base_model=m["base"], models=of([m["a"], m["b"]], weight=0.5), parameters=dict(nuslerp_flatten=False)),
    "multislerp": lambda m: dict(merge_method="multislerp", models=of([m[x] for x in "abc"], weight=1)),
    "multislerp of task vectors": lambda m: dict(merge_method="multislerp", base_model=m["base"], models=of([m[x] for x in "abc"], weight=1)),
    "karcher": lambda m: dict(merge_method="karcher", models=of([m[x] for x in "abc"]), parameters=dict(max_iter=10, tol=1e-5)),
    "task arithmetic": lambda m: dict(merge_method="task_arithmetic", base_model=m["base"], models=of([m["a"], m["b"]], weight=0.7), parameters={"lambda": 0.8}),
    "ties": lambda m: dict(merge_method="ties", base_model=m["base"], models=of([m["a"], m["b"]], density=0.5, weight=0.5), parameters=dict(normalize=False, int8_mask=True),
                           dtype="float16"),
    "ties with gradients": lambda m: dict(merge_method="ties", base_model=m["base"], parameters=dict(normalize=True, int8_mask=True), models=[
        dict(model=m["a"], parameters=dict(density=[1, 0.7, 0.1], weight=1.0)), dict(model=m["b"], parameters=dict(density=0.5, weight=[0, 0.3, 0.7, 1])),
        dict(model=m["c"], parameters=dict(density=0.33, weight=[dict(filter="mlp", value=0.5), dict(value=0)]))]),
    "dare_ties": lambda m: dict(merge_method="dare_ties", base_model=m["base"], models=of([m["a"], m["b"]], density=0.53, weight=0.4), parameters=dict(int8_mask=True)),
    "dare_linear": lambda m: dict(merge_method="dare_linear", base_model=m["base"], models=of([m["a"], m["b"]], density=0.6, weight=0.5), parameters=dict(rescale=True)),
    "della": lambda m: dict(merge_method="della", base_model=m["base"], models=of([m["a"], m["b"]], density=0.5, weight=0.5, epsilon=0.1)),
    "della_linear": lambda m: dict(merge_method="della_linear", base_model=m["base"], models=of([m["a"], m["b"]], density=0.5, weight=0.5, epsilon=0.1)),
    "breadcrumbs": lambda m: dict(merge_method="breadcrumbs", base_model=m["base"], models=of([m["a"], m["b"]], density=0.9, gamma=0.01, weight=0.5)),
    "breadcrumbs_ties": lambda m: dict(merge_method="breadcrumbs_ties", base_model=m["base"], models=of([m["a"], m["b"]], density=0.9, gamma=0.01, weight=0.5)),
    "sce": lambda m: dict(merge_method="sce", base_model=m["base"], models=of([m["a"], m["b"]]), parameters=dict(select_topk=0.5)),
    "model_stock": lambda m: dict(merge_method="model_stock", base_model=m["base"], models=of([m[x] for x in "abc"])),
    "nearswap": lambda m: dict(merge_method="nearswap", base_model=m["a"], models=of([m["b"]]), parameters=dict(t=0.0001)),
    "arcee_fusion": lambda m: dict(merge_method="arcee_fusion", base_model=m["a"], models=of([m["a"], m["b"]]), dtype="bfloat16"),
    "ram": lambda m: dict(merge_method="ram", base_model=m["base"], models=of([m["a"], m["b"]])),
    "ramplus_tl": lambda m: dict(merge_method="ramplus_tl", base_model=m["base"], models=of([m["a"], m["b"]])),
    "frankenmerge": lambda m: dict(merge_method="passthrough", dtype="float16", slices=[dict(sources=[dict(model=m["a"], layer_range=[0, 3])]),
                                                                                        dict(sources=[dict(model=m["b"], layer_range=[1, 4])])]),
    "passthrough with scale": lambda m: dict(merge_method="passthrough", slices=[dict(sources=[dict(
        model=m["a"], layer_range=[0, 4], parameters=dict(scale=[dict(filter="down_proj", value=0.5), dict(value=1.0)]))])]),
    "modules": lambda m: dict(merge_method="linear", modules=dict(default=dict(models=of([m["a"], m["b"]], weight=1)))),
    "tokenizer_source union": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), tokenizer_source="union"),
    "tokenizer_source base": lambda m: dict(merge_method="task_arithmetic", base_model=m["base"], models=of([m["a"]], weight=1), tokenizer_source="base"),
    "tokenizer with tokens": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), tokenizer=dict(source="union", pad_to_multiple_of=32, tokens={
        "<|new|>": dict(source=dict(kind="model_token", model=m["a"], token="<s>")), "<|unused|>": dict(source=dict(kind="zero")), "</s>": dict(source=m["b"], force=True)})),
    "chat_template auto": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), chat_template="auto"),
    "chat_template chatml": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), chat_template="chatml"),
    "out_dtype": lambda m: dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), dtype="float32", out_dtype="bfloat16"),
    "several documents": lambda m: "---\n".join(yaml.safe_dump(d) for d in (
        dict(name="first-merge", merge_method="linear", models=of([m["a"], m["b"]]), parameters=dict(weight=0.5)),
        dict(name="second-merge", merge_method="slerp", base_model="first-merge", models=of([m["c"]]), parameters=dict(t=0.5)),
        dict(merge_method="dare_ties", base_model=m["base"], models=of(["second-merge", m["a"]], density=0.6, weight=0.5)))),
    "several named documents": lambda m: "---\n".join(yaml.safe_dump(d) for d in (
        dict(merge_method="linear", models=of([m["a"], m["b"]], weight=1), out_path="./models/first"),
        dict(merge_method="ties", base_model=m["base"], models=of(["./models/first", m["c"]], weight=1, density=0.3), out_path="./models/second"))),
}
QUICK = ("linear", "gradient slerp with filters", "ties with gradients", "frankenmerge", "several documents", "tokenizer with tokens")
FAILS = { # honest: what does not work, and with which words it is refused
    ("apertus", "della"): "filter: act_fn",  # mergekit ranks a row's entries, and Apertus' activation has rows of one entry: 0/0
    ("apertus", "della_linear"): "filter: act_fn",
    ("apertus", "multislerp of task vectors"): "no direction"}  # the activation's constants never change: a task vector of length 0


@pytest.mark.parametrize("arch, name", [pytest.param(a, n, marks=() if a == "apertus" and n in QUICK else pytest.mark.slow) for a in ("apertus", "llama") for n in EXAMPLES])
def test_documented_merges_work(models, tmp_path, arch, name):
    if (said := FAILS.get((arch, name))):
        with pytest.raises(UserError, match=said):
            merge(tmp_path, EXAMPLES[name](models[arch]))
        return
    folder, facts = merge(tmp_path, EXAMPLES[name](models[arch]))
    result = list(facts["merge"].values())[-1]
    assert result["result"]["loaded"] and not verify_manifest(folder) and (folder / "tokenizer.json").is_file()
    assert (folder / "generation_config.json").is_file()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == (6 if name == "frankenmerge" else 4)
    assert not list(folder.parent.glob(".tmp-*"))


@pytest.mark.slow
def test_della_leaves_single_entries_whole(models, tmp_path):
    document = EXAMPLES["della"](models["apertus"])
    for m in document["models"]:
        m["parameters"]["density"] = [dict(filter="act_fn", value=1), dict(value=0.5)]
    assert merge(tmp_path, document)[1]["merge"]["result"]["result"]["loaded"]


# -- numbers

def test_presets_are_their_definitions(models, tmp_path):
    m = models["apertus"]
    for preset in ("linear", "task-arithmetic", "ties"):
        sources = f"sources=[{m['a']},{m['b']},{m['c']}]"
        cfg = config.compose("model_merging", [f"model_merging={preset}", sources, f"runs_dir={tmp_path}/runs", f"artifacts_dir={tmp_path}/artifacts",
                                               *([] if preset == "linear" else [f"base={m['base']}"])]).cfg
        task = run.open_run(cfg)
        output, facts = model_merging.model_merging(task, cfg)
        run.finish_output(task, output, **facts)
        compared = facts["merge"]["result"]["compared"]
        assert compared["off"] == 0 and compared["tensors"] == compared["of"] and compared["largest_difference"] < 1e-6
        got, read = load_file(f"{output}/model.safetensors"), [load_file(f"{m[x]}/model.safetensors") for x in "abc"]
        if preset == "linear":
            assert all(torch.equal(t, torch.stack([r[k] for r in read]).mean(0)) for k, t in got.items())
        assert run.base_model(f"run:{task.run_dir.name}", f"{tmp_path}/runs")[0] == output


def by_hand(method, base, sources, weights, density):
    "Task arithmetic (2212.04089) and TIES (2306.01708, each tensor on its own) in numpy and fp64, entry by entry"
    delta = np.stack([w * (s - base) for s, w in zip(sources, weights)])
    if method == "task_arithmetic":
        return base + delta.sum(0)
    size = np.abs(delta).reshape(len(delta), -1)
    kept = max(1, int(density * base.size))
    least = np.sort(size, axis=1)[:, ::-1][:, kept - 1]
    delta = np.where(np.abs(delta) >= least.reshape(-1, *[1] * base.ndim), delta, 0)
    elected = np.where(delta.sum(0) >= 0, 1, -1)
    agree = np.sign(delta) == elected
    share = sum(w * a for w, a in zip(weights, agree))
    return base + np.where(agree, delta, 0).sum(0) / np.where(share == 0, 1, share)


@pytest.mark.parametrize("method, weights", [("task_arithmetic", (0.7, -0.2, 0.4)), ("ties", (1.0, 0.5, 0.8))])
def test_merges_are_what_the_papers_say(models, tmp_path, method, weights):
    m = models["llama"]
    own = lambda w: dict(weight=w) | (dict(density=0.4) if method == "ties" else {})
    folder, _ = merge(tmp_path, dict(merge_method=method, base_model=m["base"], models=[dict(model=m[x], parameters=own(w)) for x, w in zip("abc", weights)]))
    read = lambda p: {k: t.double().numpy() for k, t in load_file(Path(p) / "model.safetensors").items()}
    got, base, sources = read(folder), read(m["base"]), [read(m[x]) for x in "abc"]
    off = sum((np.abs(t - by_hand(method, base[k], [s[k] for s in sources], weights, 0.4)) > 1e-5).sum() for k, t in got.items())
    assert off <= (1e-4 * sum(t.size for t in got.values()) if method == "ties" else 0)  # entries of the same size are ties of another kind


def test_distances_are_those_of_flat_vectors(models, tmp_path):
    m = models["llama"]
    folder, facts = merge(tmp_path, EXAMPLES["task arithmetic"](m))
    far = facts["merge"]["result"]["distances"]
    flat = lambda p: torch.cat([t.double().flatten() for _, t in sorted(load_file(Path(p) / "model.safetensors").items())])
    base, made = flat(m["base"]), [flat(p) for p in (m["a"], m["b"], folder)]
    assert torch.allclose(torch.tensor(far["apart"]).double(), torch.stack([torch.stack([(x - y).norm() for y in made]) for x in made]), atol=1e-4)
    taken = torch.stack([x - base for x in made])
    assert torch.allclose(torch.tensor(far["cosines"]).double(), torch.nn.functional.cosine_similarity(taken[:, None], taken[None], dim=-1), atol=1e-5)


def test_pickled_weights_and_adapters_are_sources_too(models, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    m = models["llama"]
    pickled = Path(shutil.copytree(m["b"], tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    document = dict(merge_method="linear", models=of([m["a"], str(pickled)], weight=1))
    with pytest.raises(UserError, match="options.lazy_unpickle=true"):
        merge(tmp_path, document)
    folder, _ = merge(tmp_path, document, "options.lazy_unpickle=true")
    got, read = load_file(folder / "model.safetensors"), [load_file(f"{m[x]}/model.safetensors") for x in "ab"]
    assert all(torch.equal(t, (read[0][k] + read[1][k]) / 2) for k, t in got.items())
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(m["a"]), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    folder, facts = merge(tmp_path, dict(merge_method="linear", models=of([f"{m['a']}+{tmp_path}/adapter"], weight=1)))
    assert [c["largest_difference"] < 1e-4 for c in facts["merge"]["result"]["adapters"].values()] == [True]
    want = lora.merge_and_unload().state_dict()
    assert all(torch.allclose(t, want[k], atol=1e-6) for k, t in load_file(folder / "model.safetensors").items())


# -- what is refused, and what is left of it

def spoil(models, tmp_path, how):
    "A copy of a model with one fault"
    folder = Path(shutil.copytree(models["apertus"]["b"], tmp_path / "spoilt"))
    weights, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "missing":
        weights.unlink()
    elif how == "shard":
        weights.unlink()
        write_json(folder / "model.safetensors.index.json", dict(weight_map=dict.fromkeys(tensors, "model-00001-of-00002.safetensors")))
    elif how == "nan":
        tensors["model.embed_tokens.weight"][3, 3] = float("nan")
        save_file(tensors, weights)
    elif how == "dtype":
        save_file({k: t.bfloat16() for k, t in tensors.items()}, weights)
    elif how == "tensor":
        save_file({k: t for k, t in tensors.items() if "layers.3.mlp.up_proj" not in k}, weights)
    elif how == "rope":
        write_json(folder / "config.json", settings | dict(rope_theta=5e5, rope_parameters=dict(rope_type="default", rope_theta=5e5)))
    elif how == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    elif how == "stop":
        write_json(folder / "generation_config.json", dict(eos_token_id=2))
    return str(folder)


FAULTS = dict(truncated="is truncated", missing="has no weights", shard="lacks model-00001-of-00002.safetensors", nan="not finite, in model.embed_tokens.weight",
              dtype="model_merging.dtype=float32", tensor="model.layers.3.mlp.up_proj.weight is in", rope="rope_theta.*donor=SOURCE", template="chat templates.*donor=SOURCE",
              stop="generation_config.*donor=SOURCE")


@pytest.mark.parametrize("how", FAULTS)
def test_faulty_sources_are_refused_and_leave_nothing(models, tmp_path, how):
    folder = spoil(models, tmp_path, how)
    with pytest.raises(UserError, match=FAULTS[how]):
        merge(tmp_path, dict(merge_method="linear", models=of([models["apertus"]["a"], folder], weight=1)))
    assert not list((tmp_path / "artifacts").rglob("*.safetensors")) and not list((tmp_path / "artifacts").rglob(".tmp-*"))


@pytest.mark.parametrize("how", ("rope", "stop"))
def test_a_donor_decides(models, tmp_path, how):
    other = spoil(models, tmp_path, how)
    folder, _ = merge(tmp_path, dict(merge_method="linear", models=of([models["apertus"]["a"], other], weight=1)), f"donor={other}")
    name = "config.json" if how == "rope" else "generation_config.json"
    read = lambda p: {k: v for k, v in json.loads((Path(p) / name).read_text()).items() if k != "transformers_version"}
    assert read(folder) == read(other)


@pytest.mark.parametrize("document, said", [
    (dict(merge_method="linear", models=[dict(model="A", parameters=dict(weight=1)), dict(model="B", parameters=dict(weight=-1))]), "sum to 0"),
    (dict(merge_method="linear", models=of(["A", "B"], weigt=1)), "weigt.*'weight'"), (dict(merge_method="linera", models=of(["A"], weight=1)), "'linear'"),
    (dict(merge_method="linear", model=of(["A"], weight=1)), "Unknown key model_merging.model.*'model_merging.models'"),
    (dict(merge_method="linear", models=of(["A", "L"], weight=1)), "ApertusForCausalLM and .* LlamaForCausalLM"),
    (dict(merge_method="linear", models=of(["A", "B"])), "Missing required parameter weight"),
    (dict(merge_method="ties", models=of(["A", "B"], weight=1)), "base"),
    (dict(merge_method="passthrough", slices=[dict(sources=[dict(model="A", layer_range=[0, 9])])]), "4 layers"),
    (dict(merge_method="linear", models=of(["A", "nobody/nothing-like-it"], weight=1)), "the hub does not give it"),
    (dict(base_model="A", gate_mode="hidden", experts=[]), "Unknown key|mergekit-moe")])
def test_faulty_documents_are_refused(models, tmp_path, document, said):
    names = dict(A=models["apertus"]["a"], B=models["apertus"]["b"], L=models["llama"]["a"])
    text = yaml.safe_dump(document)
    for k, v in names.items():
        text = text.replace(f"model: {k}\n", f"model: {v}\n")
    with pytest.raises(UserError, match=said):
        merge(tmp_path, text)
    assert not list((tmp_path / "artifacts").rglob("*.safetensors"))


@pytest.mark.parametrize("overrides, said", [
    (["model_merging=ties", "sources=[A,B]"], "set base=MODEL"), (["model_merging=task-arithmetic", "sources=[A,B]"], "set base=MODEL"),
    (["model_merging=ties", "sources=[A,A]", "base=C"], "names A twice"), (["sources=[A,B]", "weights=[1,x]"], "weights takes a list of numbers"),
    (["sources=[A,B]", "weights=[1,2,3]"], "3 numbers for 2 sources"), (["model_merging.dtype=int8"], "dtype=int8 is not a dtype of weights")])
def test_short_forms_that_cannot_mean_a_merge_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        merging_document.check_merge_config(config.compose("model_merging", overrides).cfg)


@pytest.mark.parametrize("text", ("", "---\n", "# nothing\n---\n"))
def test_an_empty_file_is_named(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    with pytest.raises(UserError, match="empty.yaml has no document"):
        config.compose("model_merging", [f"model_merging={tmp_path}/empty.yaml"])


@pytest.mark.parametrize("preset", ("linear", "task-arithmetic", "ties"))
def test_presets_alone_need_no_base(preset):
    assert len(merging_document.check_merge_config(config.compose("model_merging", [f"model_merging={preset}"]).cfg)) == 1


@pytest.mark.slow
def test_random_merges_are_the_same_in_every_process(models, tmp_path):
    digests = set()
    for seed in ("0", "1"):
        root = tmp_path / seed
        root.mkdir()
        (root / "m.yaml").write_text(yaml.safe_dump(EXAMPLES["dare_ties"](models["apertus"])))
        env = dict(os.environ, PYTHONHASHSEED=seed, POST_TRAINING_RUNS_DIR=str(root / "runs"), POST_TRAINING_ARTIFACTS_DIR=str(root / "artifacts"))
        subprocess.run([str(Path(sys.executable).parent / "post-training"), "model_merging", f"model_merging={root}/m.yaml"], check=True, env=env, capture_output=True)
        digests.add(hashlib.sha256(next(root.rglob("model.safetensors")).read_bytes()).hexdigest())
    assert len(digests) == 1
