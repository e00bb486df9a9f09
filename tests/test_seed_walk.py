"""Every training command of swiss-ai/posttraining, composed there and here; and the texts of its tokenizer settings.

The walk needs a checkout of that repository (commit b19a318): POST_TRAINING_SEED=FOLDER pytest tests/test_seed_walk.py -s"""
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from conftest import ROOT
from post_training.config.batch import batch_arithmetic
from post_training.config.compose import compose
from post_training.config.schema import get_key
from post_training.core.files import UserError

GOLDEN = json.loads((ROOT / "tests/golden/tokenizer_settings.json").read_text())
SEED = os.environ.get("POST_TRAINING_SEED")
RENAMED = {f"olmo2-32b-preference-{n}": f"olmo2-32b-preference-{n}-olmo2-32b-sft" for n in ("skywork-llama3-8b", "skywork-qwen3-8b", "armorm-llama3-8b")}

SAME = {  # key there -> key here; both have the same value
    "training_args": "learning_rate lr_scheduler_type optim weight_decay num_train_epochs dataloader_drop_last save_steps save_strategy logging_steps beta "
                     "normalize_beta_by_length normalize_loss_by_length ref_logprobs_from_dataset max_prompt_length max_completion_length packing bf16 "
                     "per_device_train_batch_size gradient_accumulation_steps max_length max_grad_norm dataloader_num_workers per_device_eval_batch_size",
    "plw_args": "prompt_loss_weight sequence_level_loss",
    "tokenizer_args": "chat_template_name add_bos_to_chat_template padding_side model_pad_token_id model_eos_token_id tokenizer_name_or_path",
    "model_args": "model_name_or_path attn_implementation", "dataset_args": "dataset_name", "": "trainer artifacts_subdir job_subdir"}
MOVED = {"training_args.max_seq_length": "training_args.max_length", "model_args.torch_dtype": "model_args.dtype", "tokenizer_args.pad_token_id": "tokenizer_args.model_pad_token_id",
         "training_args.gradient_checkpointing": "training_args.activation_checkpointing", "training_args.dataset_num_proc": "tokenization.num_proc"}


@pytest.mark.parametrize("case", GOLDEN["settings"], ids=lambda c: "-".join(map(str, c["settings"].values())))
def test_a_tokenizer_setting_gives_the_ids_of_the_published_runs(case, tmp_path):
    "The renderings were written by that repository's tokenizer code (data_sft/tokenization.py) around the toy tokenizer"
    from post_training.tokens.dataset import row_chat
    from post_training.tokens.masks import tokenize_chat
    from post_training.tokens.tokenizer import load_tokenizer, toy_tokenizer
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    tokenizer = load_tokenizer(str(tmp_path / "toy"), **case["settings"])
    chat = row_chat(dict(messages=GOLDEN["conversations"][case["conversation"]]), tokenizer)
    ids = [int(i) for i in tokenize_chat(tokenizer, chat.messages, chat.tools, chat.template_kwargs).input_ids]
    assert ids == tokenizer(case["rendering"], add_special_tokens=False)["input_ids"] and len(ids) > 20
    assert tokenizer.padding_side == case["settings"]["padding_side"] and tokenizer.pad_token_id == case["settings"]["model_pad_token_id"]


def commands(folder):
    "(stage, nodes, overrides) of each distinct training command in the scripts and documents"
    found = {}
    for file in sorted([*folder.rglob("*.sh"), *folder.rglob("*.md")]):
        text = file.read_text().replace("2e-06\n", "2e-06 \\\n").replace("\\\n", " ")  # one document lacks a backslash
        for line in text.splitlines():
            hit = re.search(r"train_(sft|preference)(\.py)?\s", line)
            if not hit or "=" not in line or not re.search(r"post_training\.train_|train_\w+\.py", line): continue
            words = shlex.split(line.lstrip("# "))
            at = next(i for i, w in enumerate(words) if re.search(r"train_(sft|preference)(\.py)?$", w))
            nodes = next((int(words[i + 1]) for i, w in enumerate(words[:at]) if w == "-N"), None)
            found.setdefault((hit[0].strip().removesuffix(".py"), tuple(words[at + 1:])), nodes)
    return [(stage, nodes, list(args)) for (stage, args), nodes in found.items()]


def composed_there(folder, stage, args):
    from hydra import compose as hydra_compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf
    GlobalHydra.instance().clear()
    OmegaConf.clear_resolvers()
    try:
        with initialize_config_dir(str(folder / "src/post_training/configs"), version_base=None):
            cfg = hydra_compose(stage.replace("_", "-"), [a.replace("\\${", "${") for a in args])
        OmegaConf.register_new_resolver("hydra", lambda *a: "/cwd", replace=True)
        OmegaConf.register_new_resolver("generate_random_seed", lambda *a: 1, replace=True)
        OmegaConf.set_struct(cfg, False)
        for key in ("hydra", "run_dir"): cfg.pop(key, None)
        return OmegaConf.to_container(cfg, resolve=True)
    finally:
        GlobalHydra.instance().clear()
        OmegaConf.clear_resolvers()


def differences(there, here, nodes):
    "Effective values that differ: key -> (there, here)"
    absent, out = object(), {}
    pairs = [(f"{s}.{k}".lstrip("."),) * 2 for s, keys in SAME.items() for k in keys.split()] + [*MOVED.items()]
    for old, new in pairs:
        a, b = get_key(there, old, absent), get_key(here, new, absent)
        if a is absent or old == "training_args.max_length" and "max_seq_length" in there["training_args"]: continue
        if isinstance(a, str): a = a.replace("/cwd/artifacts", "artifacts")
        if a == b or isinstance(a, (int, float)) and not isinstance(a, bool) and b is not absent and b is not None and float(a) == float(b): continue
        if a is None and old == "training_args.optim_args": continue
        out[old] = (a, None if b is absent else b)
    a, b = there["training_args"], here["training_args"]
    if (w := a.get("warmup_steps") or 0) == 0: w = a.get("warmup_ratio")
    size = (nodes or there.get("num_nodes") or 1) * 4 * a["per_device_train_batch_size"] * a["gradient_accumulation_steps"]
    for name, x, y in (
            ("warm-up", float(w or 0), float(b["warmup_steps"] or 0)), ("batch", size, batch_arithmetic(here)["global_batch"]), ("seed", a["seed"], b["seed"]),
            ("evaluation", str(a["eval_strategy"]).replace("False", "no"), b["eval_strategy"]), ("shuffle", there["dataset_args"]["shuffle"], b["train_sampling_strategy"] == "random"),
            ("engine", Path(there["accelerate_config"]).stem, Path(here["accelerate_config"]).stem),
            ("loss", {"dpo": "sigmoid"}.get(a.get("loss_type"), a.get("loss_type")), b.get("loss_type") if "loss_type" in a else None),
            ("references", None if a.get("num_ref_rewards") == -1 else a.get("num_ref_rewards"), b.get("num_ref_rewards")),
            ("bound on beta", 0.1 if a.get("loss_type") == "qrpo" else None, b.get("max_effective_beta"))):
        if x != y: out[name] = (x, y)
    return out


@pytest.mark.skipif(not SEED, reason="POST_TRAINING_SEED names no checkout of swiss-ai/posttraining")
def test_the_commands_of_the_repository_compose_and_mean_the_same(monkeypatch):
    "All but one compose, which resumes from another program's checkpoint; none differs in a value"
    folder = Path(SEED).resolve()
    monkeypatch.setenv("POST_TRAINING_CONFIGS", str(folder / "src/post_training/configs"))
    counts, causes, differ = Counter(), defaultdict(list), defaultdict(list)
    for i, (stage, nodes, args) in enumerate(commands(folder)):
        counts[stage, "all"] += 1
        there_args, here_args = args, args
        named = next((a.removeprefix("dataset=") for a in args if a.startswith("dataset=")), None)
        if named in RENAMED:  # that repository has renamed the preset: its rows are named on the command line
            there_args = [f"dataset={RENAMED[named]}" if a.startswith("dataset=") else a for a in args]
            here_args = ["dataset=local" if a.startswith("dataset=") else a for a in args]
            counts[stage, "dataset=local"] += 1
        there = composed_there(folder, stage, there_args)
        more = [f"num_nodes={nodes}"] if nodes and not any(a.startswith("num_nodes=") for a in args) else []
        try: here = compose(stage, [*here_args, "cluster=clariden", *more]).cfg
        except UserError as e: causes[re.sub(r"[\d./\w-]+/[\w./-]+", "PATH", str(e))[:120]].append(i); continue
        counts[stage, "composes"] += 1
        found = differences(there, here, nodes)
        for key, values in found.items(): differ[f"{key}: {values}"].append(i)
        counts[stage, "means the same"] += not found
    for name, n in sorted(counts.items()): print(*name, n)
    for table in (causes, differ):
        for why, numbers in table.items(): print(len(numbers), numbers[:3], why)
    assert counts["train_sft", "all"] == 73 and counts["train_preference", "all"] == 76
    assert counts["train_sft", "composes"] == counts["train_sft", "means the same"] == 72 and ["resuming_dir" in c for c in causes] == [True]
    assert counts["train_preference", "composes"] == counts["train_preference", "means the same"] == 76
