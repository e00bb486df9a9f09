"The estimate against the library it speaks of: parameters of real models, tensors that layers really keep, arithmetic that torch counts."
import collections
import json
import logging

import pytest

from post_training.core.files import UserError
from post_training.launch.model_sizes import FAMILIES, dense_shape, flops_per_token, parameter_counts
from post_training.launch.estimate import (
    CPU_RESERVE, PRECISION_POLICIES, MemoryOptions, TrainShape, estimate_of, estimate_rows, head_memory, layer_activations, memory_per_gpu)

SMALL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, head_dim=32, pad_token_id=0)


def small_config(family, **changes):
    "A config of transformers, and what its config.json would hold"
    from transformers import AutoConfig
    config = AutoConfig.for_model(family, **SMALL | changes)
    return config, json.loads(config.to_json_string())


def small_model(config, device="meta", dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config.dtype = getattr(torch, dtype)
    with torch.device(device): return AutoModelForCausalLM.from_config(config, dtype=config.dtype, attn_implementation="sdpa")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_a_real_model(family, tied, biased):
    config, written = small_config(family, tie_word_embeddings=tied, **(dict(attention_bias=True, mlp_bias=True) if biased else {}))
    model = small_model(config)
    counted = parameter_counts(written)
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    parts = collections.Counter()
    for name, p in model.named_parameters():
        part = next((k for k, words in dict(norms=("norm",), embedding=("embed",), head=("lm_head",), attention=("attn",), mlp=("mlp",)).items() if any(w in name for w in words)), name)
        parts[part] += p.numel()
    assert {k: v for k, v in counted.items() if k != "total" and v} == dict(parts)


@pytest.mark.parametrize("family", ["apertus", "llama", "olmo2", "qwen3"])
def test_every_head_of_its_own_and_no_head_dim(family):
    config, _ = small_config(family, num_key_value_heads=4, head_dim=16)
    written = {k: v for k, v in json.loads(config.to_json_string()).items() if k not in ("head_dim", "num_key_value_heads")}
    assert parameter_counts(written)["total"] == sum(p.numel() for p in small_model(config).parameters())


def kept_by_layers(config, policy, batch=3, length=40):
    "Bytes per token that one layer keeps for its backward, from two depths of the same model"
    import torch
    found = []
    for layers in (1, 3):
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"]*layers
        model = small_model(config, "cpu", "bfloat16" if policy == "bf16" else "float32")
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        seen = {}

        def pack(t, own=own, seen=seen):
            "A weight's bf16 copy under autocast is no activation: it has no dimension of tokens"
            if t.untyped_storage()._cdata not in own and (batch*length in t.shape or length in t.shape and batch in t.shape): seen[t.untyped_storage()._cdata] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=policy == "autocast"):
            model.base_model(input_ids=torch.ones(batch, length, dtype=torch.long), use_cache=False)
        found.append(sum(t.untyped_storage().nbytes() for t in seen.values()))
    return (found[1] - found[0])/2/(batch*length)


@pytest.mark.parametrize("policy", PRECISION_POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_what_is_estimated(family, policy):
    "Counted with hooks on autograd; xIELU under autocast keeps fp32 on a GPU where a CPU keeps bf16 (4 F bytes)"
    config, written = small_config(family, intermediate_size=176)
    shape = dense_shape(written)
    expected = layer_activations(shape, policy) - (4*shape["mlp"] if (family, policy) == ("apertus", "autocast") else 0)
    assert kept_by_layers(config, policy) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["apertus", "llama", "olmo2", "qwen3"])
def test_arithmetic_is_what_torch_counts(family, recompute):
    "Eager attention multiplies the whole square, twice the causal half; a plain head is not recomputed, nor is a layer's last product where nothing needs its result"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    T = 48
    config, written = small_config(family)
    config._attn_implementation = "eager"
    model = small_model(config, "cpu").train()
    model.set_attn_implementation("eager")
    if recompute: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    with FlopCounterMode(display=False) as counter: model(torch.ones(1, T, dtype=torch.long), use_cache=False).logits.sum().backward()
    shape = dense_shape(written)
    scores = (4 if recompute else 3)*2*shape["layers"]*shape["query"]*T
    spared = recompute*(2*shape["vocab"]*shape["hidden"] + 2*shape["layers"]*shape["mlp"]*shape["hidden"]*(shape["norms"] == "pre"))
    assert counter.get_total_flops()/T == pytest.approx(flops_per_token(written, T, recompute) + scores - spared, rel=0.001)


def test_memory_grows_with_what_it_should():
    "More of anything never needs less, more GPUs never more (under ZeRO), and the parts are the total"
    base = dict(zero_stage=2, world_size=8, per_device_batch=2, seq_len=2048)
    model = "swiss-ai/Apertus-8B-2509"

    def total(head="fused", xielu_kernel=False, **kw):
        return memory_per_gpu(model, TrainShape(**base | kw), MemoryOptions(head=head, xielu_kernel=xielu_kernel))["total"]

    large = dict(per_device_batch=16)
    assert total(**large) > total() and total(seq_len=32768) > total() and total(recompute=False) > total()
    assert total(world_size=64) < total() and total(zero_stage=3) < total() < total(zero_stage=1)
    assert total(optimizer="ademamix") > total() and total(head="logits") > total() and total(xielu_kernel=True, **large) < total(**large)
    assert total(accumulation=4, **large) > total(**large) and total(head="logits", scored=0.1) < total(head="logits")
    assert total(zero_stage=0, world_size=8) > total(zero_stage=0, world_size=1)


def test_it_knows_nothing_of_torch():
    "The module loads without torch or transformers"
    import subprocess
    import sys
    code = "import sys, post_training.launch.estimate as e; e.estimate('swiss-ai/Apertus-8B-2509'); print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_tile_is_never_larger_than_the_logits():
    shape = dense_shape("swiss-ai/Apertus-8B-2509")
    assert head_memory(shape, 16)[0] < head_memory(shape, 16, head="logits")[1]
    assert head_memory(shape, 65536)[1] - head_memory(shape, 32768)[1] == 32768*4096*(2 + 4) # the tile is full: only hidden states and their gradients grow


def test_what_is_no_dense_decoder_is_refused():
    with pytest.raises(UserError, match="num_experts"): parameter_counts(dict(model_type="qwen3_moe", num_experts=128))
    with pytest.raises(UserError, match="family"): parameter_counts(dict(model_type="gpt2", n_embd=768))


def test_presets_on_a_cluster_have_an_estimate():
    "Each model preset that names a published model or a folder: an estimate, or one sentence that says why there is none"
    from post_training.config.presets import preset_names
    from post_training.config.compose import compose
    found = {}
    for name in preset_names("model"):
        e = estimate_of(compose("train_sft", ["cluster=clariden", "accelerate_config=ds-zero3", "num_nodes=4", "global_batch_size=512", f"model={name}"]).cfg, tokens=1e9)
        assert ("reason" in e) != ("memory" in e), e
        found[name] = e
        assert all(isinstance(r["value"], str) for r in estimate_rows(e))
        json.dumps(e)
    assert any("memory" in e for e in found.values()) or all("folder" in e["reason"] for e in found.values())


def test_a_run_is_the_model_of_another(tmp_root):
    "run:RUN is sized by its newest checkpoint's config.json; what cannot be sized stops nothing"
    from post_training.config.compose import compose
    run_dir, folder = tmp_root / "runs/train_sft/default/tiny-demo-0123abcd", tmp_root / "g1"
    for step, layers in ((5, 2), (10, 3)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        config, written = small_config("llama", num_hidden_layers=layers)
        (folder / f"checkpoint-{step}/config.json").write_text(json.dumps(written))
    run_dir.mkdir(parents=True)
    (run_dir / "record.json").write_text(json.dumps(dict(checkpoints_dir=str(folder))))
    cfg = compose("train_sft", ["cluster.device=cpu", "model_args.model_name_or_path=run:tiny-demo-0123abcd"]).cfg
    e = estimate_of(cfg)
    assert e["parameters"] == parameter_counts(small_config("llama", num_hidden_layers=3)[1])["total"] and e["device"] == "cpu" and e["memory"]["reserve"] >= CPU_RESERVE
    for step in (5, 10): (folder / f"checkpoint-{step}/config.json").write_text("[1, 2]")
    assert set(estimate_of(cfg)) == {"reason"}
    assert "unknown optimizer 'sgd'" in estimate_of(compose("train_sft", ["cluster.device=cpu", "training_args.optim=sgd", "model=apertus-8b",
                                                                          "model_args.model_name_or_path=swiss-ai/Apertus-8B-2509"]).cfg)["reason"]
    assert "unknown device 'h300'" in estimate_of(compose("train_sft", ["cluster=clariden", "cluster.gpu=h300", "model=apertus-8b",
                                                                        "model_args.model_name_or_path=swiss-ai/Apertus-8B-2509", "accelerate_config=ds-zero2"]).cfg)["reason"]


@pytest.mark.parametrize("family, asked", [("apertus", {}), ("llama", dict(lora_r=4, lora_target_modules=["q_proj", "mlp.down_proj"])), ("qwen3", dict(lora_target_modules=[r".*\.(k|o)_proj"])),
                                           ("olmo2", dict(use_dora=True, lora_modules_to_save=["lm_head"])), ("llama", dict(lora_target_modules=[r"model\.layers\.1\..*proj"]))])
def test_adapters_are_those_of_peft(family, asked):
    from post_training.launch.model_sizes import lora_parameters
    from post_training.training.lora import adapter_facts, add_adapters, lora_config
    config, written = small_config(family)
    facts = adapter_facts(add_adapters(small_model(config, "cpu"), lora_config(dict(use_peft=True, **asked))))
    counted = lora_parameters(written, asked.get("lora_r", 16), asked.get("lora_target_modules") or ["all-linear"], asked.get("lora_modules_to_save") or (), asked.get("use_dora", False))
    assert counted == facts["trained_parameters"]


def test_a_frozen_model_is_multiplied_twice():
    "Forward, and backward to the inputs alone; counted by torch"
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from post_training.launch.model_sizes import lora_parameters
    from post_training.training.lora import add_adapters, lora_config
    config, written = small_config("llama", hidden_size=256, intermediate_size=704)
    model = add_adapters(small_model(config, "cpu"), lora_config(dict(use_peft=True, lora_r=4)))
    T = 64
    with FlopCounterMode(display=False) as counter: model(input_ids=torch.ones(1, T, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert counter.get_total_flops()/T == pytest.approx(flops_per_token(written, T, trained=lora_parameters(written, 4)), rel=0.08)
