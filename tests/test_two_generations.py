"Model folders read by transformers 4.57, in an environment of its own: ids, templates and logits are those that were trained"
import json
import os
import subprocess

import pytest
import torch
import transformers

from post_training.core.files import UserError
from post_training.export.readers import reader_python
from post_training.stages.export import write_folder
from post_training.tokens.tokenizer import toy_tokenizer

SHAPE = dict(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2, pad_token_id=10)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4., original_max_position_embeddings=64)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1 + .1 * i for i in range(8)], long_factor=[2. + i for i in range(8)])
LAYERS = dict(full_attention=dict(rope_type="linear", factor=8., rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4))
MIXED = dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def plain(theta, **more): return dict(rope_type="default", rope_theta=theta, **more)


MODELS = {
    "apertus": ("Apertus", dict(rope_parameters=plain(1e4))), "apertus-1.0": ("Apertus", dict(rope_parameters=LLAMA3 | dict(rope_theta=12e6))),
    "apertus-linear": ("Apertus", dict(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=4.))), "apertus-own": ("Apertus", {}),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3)), "llama-tied": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=5e4, factor=4.), max_position_embeddings=64)),
    "llama-longrope": ("Llama", dict(rope_parameters=LONGROPE | dict(factor=4., original_max_position_embeddings=64))),
    "olmo2": ("Olmo2", dict(rope_parameters=plain(5e5))), "olmo2-linear": ("Olmo2", dict(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=2.))),
    "olmo3": ("Olmo3", MIXED), "qwen2": ("Qwen2", dict(rope_parameters=plain(1e6))), "qwen3": ("Qwen3", dict(rope_parameters=YARN, head_dim=16)),
    "mistral": ("Mistral", dict(rope_parameters=plain(1e6), sliding_window=16)), "gemma2": ("Gemma2", MIXED), "gemma3": ("Gemma3Text", MIXED | dict(rope_parameters=LAYERS)),
    "phi3": ("Phi3", dict(rope_parameters=plain(2e4))), "phi3-longrope": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=64)),
    "neox": ("GPTNeoX", dict(rope_parameters=plain(2e4, partial_rotary_factor=.5))), "phi": ("Phi", dict(rope_parameters=plain(2e4, partial_rotary_factor=.5))),
}
# what the reader itself rounds: 4.57 holds the two numbers of each xIELU in bfloat16
BOUNDS = dict.fromkeys((n for n in MODELS if n.startswith("apertus")), 2e-3)
TEXTS = ["Hello, 12345 <user> Zürich\n\n  two", "<s>It's</s>"]
TEMPLATES = dict(default="{% for m in messages %}<SPECIAL_65>{{ m.content }}{% endfor %}", tool_use="{{ tools }}|{% for m in messages %}{{ m.content }}{% endfor %}")
READ = """
import json, os, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
job = json.load(sys.stdin)
out = dict(version=__version__, read={})
for name in job["names"]:
    folder = os.path.join(job["root"], name)
    more = dict(attn_implementation="eager") if name == "gemma2" else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad(): torch.save(model.eval()(torch.tensor([job["ids"]])).logits, folder + ".read.pt")
    chat = [dict(role="user", content="Hi")]
    tool = dict(type="function", function=dict(name="f", description="d", parameters=dict(type="object", properties={})))
    out["read"][name] = dict(ids=[tokenizer(t, add_special_tokens=False).input_ids for t in job["texts"]], missing=sorted(map(str, info["missing_keys"])),
                             chat=tokenizer.apply_chat_template(chat, tokenize=False), tools=tokenizer.apply_chat_template(chat, tools=[tool], tokenize=False)[-3:],
                             special=[tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id], stops=model.generation_config.eos_token_id,
                             extra=tokenizer.additional_special_tokens)
    inputs = tokenizer("Hello", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)  # inputs that this version's generate takes
    out["read"][name] |= dict(inputs=sorted(inputs), side=tokenizer.padding_side)
    model.save_pretrained(folder + ".again")  # a generation config that this version refuses could not be saved
print(json.dumps(out))
"""


def build(name):
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=.2)
    model.generation_config.eos_token_id = [2, 68]
    return model


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    "Folders written here, and what transformers 4.57 reads from them in one process"
    try: python = reader_python("transformers-4.57")
    except UserError as e: pytest.skip(str(e))
    root, ids = tmp_path_factory.mktemp("folders"), torch.randint(11, 590, (1, 100), generator=torch.Generator().manual_seed(0))
    tokenizer = toy_tokenizer("bpe")
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATES, "left"
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<SPECIAL_61>", "<SPECIAL_62>"]))
    written = {}
    for name in MODELS:
        model, folder = build(name), root / name
        folder.mkdir()
        write_folder(folder, model, tokenizer, "100KB" if name == "llama-tied" else "5GB")
        own = transformers.AutoTokenizer.from_pretrained(folder)  # as training would read it: some families have a class of their own
        with torch.no_grad(): written[name] = model(ids).logits, [own(t, add_special_tokens=False).input_ids for t in TEXTS]
    p = subprocess.run([python, "-c", READ], input=json.dumps(dict(root=str(root), names=list(MODELS), ids=ids[0].tolist(), texts=TEXTS)), text=True, capture_output=True,
                       env=os.environ | dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"))
    assert p.returncode == 0, p.stderr[-3000:]
    return root, written, json.loads(p.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_reads_what_was_trained(read, name):
    "The same ids, special ids, stops and templates; logits equal up to rounding"
    root, written, out = read
    logits, ids = written[name]
    found = out["read"][name]
    assert out["version"].startswith("4.57")
    assert (found["ids"], found["special"], found["stops"], found["missing"]) == (ids, [1, 2, 10], [2, 68], [])
    assert (found["chat"], found["tools"], found["extra"]) == ("<SPECIAL_65>Hi", "|Hi", ["<SPECIAL_61>", "<SPECIAL_62>"])
    assert (found["inputs"], found["side"]) == (["attention_mask", "input_ids"], "left")
    gap = (torch.load(root / f"{name}.read.pt") - logits).abs().max().item() / logits.abs().max().item()
    assert gap <= BOUNDS.get(name, 1e-5), gap


@pytest.mark.slow
def test_this_generation_reads_the_same_folders(read):
    "The folders give the same logits here, bit for bit; tied weights are written once"
    root, written, _ = read
    ids = torch.randint(11, 590, (1, 100), generator=torch.Generator().manual_seed(0))
    for name, (logits, _) in written.items():
        with torch.no_grad(): assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)(ids).logits, logits), name
    index = json.loads((root / "llama-tied/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and "lm_head.weight" not in index["weight_map"]
