"""Commands and presets written for swiss-ai/posttraining compose and mean the same, or are refused when they are typed.

The commands and presets here have the shapes of that repository (commit b19a318) and are written for these tests."""

import json

import pytest
from post_training.config.batch import batch_arithmetic
from post_training.config.compose import compose
from post_training.config import refusals
from post_training.config.refusals import REFUSALS
from post_training.config.schema import ENGINE_ARGS, REFUSED_TRAINING_ARGS, UNREAD_TRAINING_ARGS, get_key, known_keys
from post_training.core.files import UserError

SETUP = """# @package _global_
seed: ${generate_random_seed:}
cuda_deterministic: false
artifacts_dir: ${hydra:runtime.cwd}/artifacts
artifacts_subdir: private
job_subdir: dev
hydra:
  run:
    dir: ${artifacts_dir}/runs/${now:%Y}
wandb:
  project: chats
  anonymous: allow
  run_id: null
  use_global_dir: false
  global_dir: ${hydra:runtime.cwd}/outputs
run_dir: ${hydra:run.dir}
resuming:
  resume: false
  wandb_cache_bust: 0
"""
COMMON = """
  bf16: true
  max_grad_norm: {clip}
  learning_rate: {rate}
  lr_scheduler_type: linear
  warmup_ratio: {ratio}
  optim: adamw_torch
  num_train_epochs: 1
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  gradient_checkpointing: true
  gradient_checkpointing_kwargs:
    use_reentrant: false
  eval_strategy: no
  report_to: wandb
  seed: ${{seed}}
  dataset_num_proc: 8
  dataloader_num_workers: ${{training_args.per_device_train_batch_size}}
seed: 11
accelerate_config: src/post_training/configs/accelerate/ds-zero1.yaml
global_batch_size: 32
dataset_args:
  shuffle: true
script_args:
  dataset_name: ${{dataset_args.dataset_name}}
"""
SFT = """defaults:
  - setup
  - _self_
  - model: house-8b
  - dataset: chats
  - optional preset: none
trainer: plw
plw_args:
  prompt_loss_weight: 0.0
training_args:
  max_seq_length: 2048
  warmup_steps: 0
  remove_unused_columns: false""" + COMMON.format(clip=1, rate="4.0e-6", ratio="0.02")
PREFERENCE = """defaults:
  - setup
  - _self_
  - model: house-8b-sft
  - dataset: pairs-house
training_args:
  max_prompt_length: 2048
  max_completion_length: 2048
  max_length: 2048
  num_ref_rewards: 6
  loss_type: qrpo
  beta: 0.1
  precompute_ref_log_probs: false
  ref_logprobs_from_dataset: false""" + COMMON.format(clip="1e5", rate="3.0e-7", ratio="0.1")
BASE = """# @package _global_
model_args:
  torch_dtype: bfloat16
  model_name_or_path: /models/house-8b
  attn_implementation: flash_attention_2
  trust_remote_code: true
  use_peft: false
tokenizer_args:
  tokenizer_name_or_path: /models/house-8b
  chat_template_name: tulu
  padding_side: right
  add_bos_to_chat_template: true
  model_pad_token_id: 10
  model_eos_token_id: null
"""
TUNED = """# @package _global_
model_args:
  torch_dtype: bfloat16
  model_name_or_path: ${artifacts_dir}/shared/house-8b-sft
tokenizer_args:
  pad_token_id: 10
model_vllm_config:
  tensor_parallel_size: 4
model_generation_config:
  temperature: 1.0
model_eval_generation_config:
  top_p: 0.9
"""
PRESETS = {
    "setup.yaml": SETUP, "train-sft.yaml": SFT, "train-preference.yaml": PREFERENCE,
    "model/house-8b.yaml": BASE, "model/house-8b-sft.yaml": TUNED, "model/apertus-8b.yaml": BASE,
    "dataset/chats.yaml": "# @package _global_\ndataset_name: chats\ndataset_args:\n  dataset_name: /data/chats\n"
                          "  train_split:\n    name: train\n  eval_split:\n    name: null\n"
                          "training_args:\n  eval_strategy: \"no\"\n  eval_steps: null\n",
    "dataset/pairs-house.yaml": "# @package _global_\ndataset_args:\n  dataset_name: /data/pairs\n  train_split:\n"
                                "    name: train\n    start: 0\n    end: 900\n  eval_split:\n    name: null\n",
    "accelerate/ds-zero3.yaml": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n  zero3_save_16bit_model: true\n"
                                "machine_rank: 0\nmain_process_ip: nid1\nmixed_precision: bf16\nnum_machines: 1\n"
                                "num_processes: 1\n",
    "accelerate/sharded.yaml": "distributed_type: FSDP\nnum_processes: 2\n",
    "reward_model/house-judge.yaml": "# @package _global_\nreward_model_args:\n  torch_dtype: bfloat16\n"
                                     "  pretrained_model_name_or_path: /models/judge\n  num_labels: 1\n"
                                     "reward_model_distributed_config:\n  tensor_parallel_size: 1\n",
    "experiment/long.yaml": "# @package _global_\ntraining_args:\n  learning_rate: 9.0e-6\n  num_train_epochs: 3\n",
    "override/mine.yaml": "# @package _global_\nwandb:\n  mode: disabled\n",
    "blend.yaml": "defaults:\n  - setup\n  - _self_\ndataset_mixer:\n  - dataset_name: a\n"
                  "    dataset_path: ${artifacts_dir}/a.jsonl\n    train_splits: [train]\n    eval_splits: []\n"
                  "keep_ids: true\nsave_data_dir: ${artifacts_dir}/${artifacts_subdir}/datasets/house/blend-2\n",
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A folder of presets in the form of swiss-ai/posttraining"
    for name, text in PRESETS.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("POST_TRAINING_CONFIGS", str(tmp_path))
    return tmp_path


ZERO3 = "accelerate_config=src/post_training/configs/accelerate/ds-zero3.yaml"
RUN = ["artifacts_subdir=shared", "job_subdir=a/b-lr2e-06", "wandb.run_name=a/b-lr2e-06", "wandb.tags=[prod,plw]", "resuming.resume=True"]
BATCH = ["training_args.per_device_train_batch_size=2", "training_args.gradient_accumulation_steps=1", "cluster=clariden"]
SEED_VALUES = {  # of the stage file and the preset
    "training_args.lr_scheduler_type": "linear", "training_args.warmup_steps": 0.02, "training_args.max_length": 2048, "training_args.seed": 11,
    "training_args.max_grad_norm": 1.0, "training_args.dataloader_num_workers": 2, "training_args.eval_strategy": "no", "training_args.report_to": "none",
    "training_args.activation_checkpointing": True, "training_args.train_sampling_strategy": "random", "tokenization.num_proc": 8, "tokenizer_args.model_pad_token_id": 10,
    "tokenizer_args.add_bos_to_chat_template": True, "model_args.dtype": "bfloat16", "dataset_args.train_split.name": "train", "artifacts_dir": "artifacts"}
PAIR_VALUES = {
    "training_args.warmup_steps": 0.1, "training_args.max_grad_norm": 1e5, "training_args.max_length": 2048, "training_args.seed": 11,
    "training_args.max_prompt_length": 2048, "training_args.max_completion_length": 2048,
    "training_args.ref_logprobs_from_dataset": False, "tokenizer_args.chat_template_name": None, "tokenizer_args.model_pad_token_id": 10,
    "model_args.model_name_or_path": "artifacts/shared/house-8b-sft", "dataset_name": "pairs-house", "dataset_args.train_split": dict(name="train")}

COMMANDS = [  # stage, overrides, global batch, effective values
    ("train_sft", ["dataset=chats", "model=house-8b", ZERO3, "trainer=plw", "plw_args.prompt_loss_weight=0.0", "training_args.learning_rate=2e-06",
                   "training_args.optim=ademamix", "num_nodes=16", "global_batch_size=128", *BATCH, *RUN],
     128, SEED_VALUES | {"training_args.learning_rate": 2e-6, "training_args.optim": "ademamix", "tokenizer_args.chat_template_name": "tulu", "trainer": "plw"}),
    ("train_sft", ["dataset=chats", "model=house-8b", ZERO3, "tokenizer_args.chat_template_name=apertus", "tokenizer_args.model_eos_token_id=68",
                   "tokenizer_args.padding_side=left", "trainer=ln-plw", "plw_args.prompt_loss_weight=0.1", "num_nodes=4", *BATCH],
     32, SEED_VALUES | {"training_args.learning_rate": 4e-6, "tokenizer_args.model_eos_token_id": 68, "trainer": "ln-plw", "plw_args.prompt_loss_weight": 0.1}),
    ("train_sft", ["model=house-8b.yaml", "training_args.lr_scheduler_type=constant", "training_args.warmup_ratio=0", "training_args.warmup_steps=0",
                   "training_args.dataset_num_proc=1", "training_args.save_strategy=epoch", *BATCH],
     8, SEED_VALUES | {"training_args.lr_scheduler_type": "constant", "training_args.warmup_steps": 0, "tokenization.num_proc": 1}),
    ("train_sft", ["training_args.warmup_steps=500", *BATCH], 8, SEED_VALUES | {"training_args.warmup_steps": 500}),
    ("train_sft", ["training_args.warmup_steps=0", *BATCH], 8, SEED_VALUES),
    ("train_sft", ["experiment=long", "override=mine", *BATCH], 8,
     SEED_VALUES | {"training_args.learning_rate": 9e-6, "training_args.num_train_epochs": 3, "wandb.mode": "disabled"}),
    ("train_sft", ["preset=long", "training_args.num_train_epochs=2", *BATCH], 8,
     SEED_VALUES | {"training_args.learning_rate": 9e-6, "training_args.num_train_epochs": 2}),
    ("train_preference", ["dataset=pairs-house", "model=house-8b-sft", ZERO3, r"dataset_args.dataset_name=\${artifacts_dir}/shared/mixed", "num_nodes=4",
                          "training_args.loss_type=qrpo", "training_args.num_ref_rewards=-1", "training_args.beta=5.0",
                          "training_args.normalize_beta_by_length=True", "training_args.learning_rate=5e-07", *BATCH, *RUN],
     32, PAIR_VALUES | {"training_args.loss_type": "qrpo", "training_args.num_ref_rewards": None, "training_args.beta": 5.0, "training_args.max_effective_beta": 0.1,
                        "training_args.normalize_beta_by_length": True, "training_args.learning_rate": 5e-7, "dataset_args.dataset_name": "artifacts/shared/mixed"}),
    ("train_preference", ["training_args.loss_type=dpo", "training_args.num_ref_rewards=6", "training_args.beta=5.0", "training_args.normalize_beta_by_length=True", *BATCH],
     8, PAIR_VALUES | {"training_args.loss_type": "sigmoid", "training_args.beta": 5.0, "training_args.max_effective_beta": None, "training_args.learning_rate": 3e-7}),
]


@pytest.mark.parametrize("stage, overrides, batch, values", COMMANDS)
def test_a_command_means_the_same(house, stage, overrides, batch, values):
    c = compose(stage, overrides)
    assert {k: get_key(c.cfg, k) for k in values} == values
    assert batch_arithmetic(c.cfg)["global_batch"] == batch


TRANSLATED = [  # stage, overrides, key, value, what the notice says
    ("train_preference", ["training_args.loss_type=dpo"], "training_args.loss_type", "sigmoid", "TRL calls the loss of DPO sigmoid"),
    ("train_preference", ["training_args.loss_type=[dpo,sft]"], "training_args.loss_type", ["sigmoid", "sft"], "TRL calls the loss of DPO sigmoid"),
    ("train_preference", ["training_args.num_ref_rewards=-1"], "training_args.num_ref_rewards", None, "all reference rewards"),
    ("pairs", ["num_ref_rewards=-1"], "num_ref_rewards", None, "all reference rewards"),
    ("train_sft", ["model=apertus-8b.yaml"], "model_args.model_name_or_path", "swiss-ai/Apertus-8B-2509", "taken as the preset model=apertus-8b"),
    ("train_sft", ["training_args.report_to=wandb"], "training_args.report_to", "none", "tracking is set in the wandb group"),
    ("train_sft", ["training_args.report_to=[wandb]"], "training_args.report_to", ["none"], "tracking is set in the wandb group"),
    ("train_sft", ["training_args.dataset_num_proc=3"], "tokenization.num_proc", 3, "is called tokenization.num_proc"),
    ("train_sft", ["cuda_deterministic=true"], "training_args.full_determinism", True, "is called training_args.full_determinism"),
    ("train_sft", ["wandb.anonymous=allow"], "wandb.anonymous", None, "no anonymous runs"),
    ("train_sft", ["training_args.warmup_ratio=0.1", "training_args.warmup_steps=0"], "training_args.warmup_steps", 0.1, "does not override training_args.warmup_ratio=0.1"),
    ("train_sft", ["training_args.warmup_ratio=0.1", "training_args.warmup_steps=50"], "training_args.warmup_steps", 50, "wins over warmup_ratio=0.1"),
    ("train_preference", ["training_args.beta=0.5"], "training_args.max_effective_beta", 0.1, "bounds training_args.beta=0.5"),
    ("ref_rewards", ["reward_model=skywork-llama3-8b"], "reward_args.name", "skywork-v2-llama3-8b", "taken as the preset reward_model=skywork-v2-llama3-8b"),
    ("train_sft", ["dataset=olmo2-32b-sft"], "dataset_name", "tulu-3-sft-olmo-2-mixture-0225", "taken as the preset dataset=tulu-3"),
    ("model_merging", ["config_yml=src/post_training/configs/model_merging/ties.yaml"], "model_merging.merge_method", "ties", "model_merging=ties"),
]


@pytest.mark.parametrize("stage, overrides, key, value, says", TRANSLATED)
def test_a_value_is_translated_with_a_notice(stage, overrides, key, value, says):
    c = compose(stage, overrides)
    assert get_key(c.cfg, key) == value
    assert any(says in n for n in c.notices), c.notices


def test_without_a_ratio_zero_steps_are_no_warmup():
    assert compose("train_sft", ["training_args.warmup_steps=0"]).cfg["training_args"]["warmup_steps"] == 0


REFUSED = [  # stage, overrides, what the error says
    ("train_preference", ["training_args.loss_type=kto"], "is not one of the choices. Choices: qrpo, sigmoid"),
    ("train_preference", ["training_args.loss_type=grpo"], "is not one of the choices. Choices: qrpo, sigmoid"),
    ("train_preference", ["training_args.loss_type=[kto]"], "unknown loss 'kto'. Known: qrpo"),
    ("train_sft", ["trainer=dpo"], "is not one of the choices. Choices: sft, plw"),
    ("train_sft", ["training_args.loss_type=dpo"], "not one of the choices"),
    ("train_sft", ["training_args.report_to=tensorboard"], "tracking is set in the wandb group"),
    ("train_sft", ["training_args.truncation_mode=keep_end"], "set tokenization.overlength"),
    ("train_preference", ["training_args.truncation_mode=keep_end"], "a pair is never cut"),
    ("train_sft", ["resuming_dir=/runs/old"], "type model_args.model_name_or_path=/runs/old/checkpoint-N"),
    ("train_sft", ["wandb.use_global_dir=true"], "has no counterpart: wandb's files are below the run's folder"),
    ("train_sft", ["wandb.run_id=a/b"], "1 to 128 characters without /"),
    ("train_sft", ["resuming.wandb_cache_bust=1"], "choose another job_subdir"),
    ("train_sft", ["dataset_args.train_split.start=100"], "dataset_split"),
    ("train_sft", ["experiment=none-such"], "There is no file experiment/none-such.yaml"),
    ("filter", ["dataset=demo"], "Give the rows with dataset_args.dataset_name=PATH"),
    ("train_sft", ["hydra.run.dir=x"], "Unknown key"),
]


@pytest.mark.parametrize("stage, overrides, says", REFUSED)
def test_what_cannot_mean_the_same_is_refused(stage, overrides, says):
    with pytest.raises(UserError) as e: compose(stage, overrides)
    assert says in str(e.value), str(e.value)


def test_keep_start_is_what_is_done():
    compose("train_sft", ["training_args.truncation_mode=keep_start"])


@pytest.mark.parametrize("name", REFUSALS)
def test_a_combination_that_a_worker_refuses_is_refused_when_it_is_typed(name, monkeypatch):
    "The message ends as in the table; without the last value the reason is gone"
    stage, *overrides = REFUSALS[name].example.split()
    ending = REFUSALS[name].text.rpartition(">")[2]
    if "library" in name: monkeypatch.setattr(refusals.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError) as e: compose(stage, overrides)
    assert str(e.value).endswith(ending) or "is not read" in str(e.value), str(e.value)
    try: compose(stage, overrides[:-1])
    except UserError as other: assert not str(other).endswith(ending)


@pytest.mark.parametrize("table", [REFUSED_TRAINING_ARGS, ENGINE_ARGS])
def test_no_refused_argument_passes(table):
    "Each argument of the tables with a value that they do not accept"
    for key, (accepted, instead) in table.items():
        value = "true" if False in accepted else "false" if True in accepted else "0.1" if 0 in accepted else "x"
        with pytest.raises(UserError): compose("train_sft", [f"training_args.{key}={value}"])


def test_an_unread_argument_is_refused():
    values = {"bool": "true", "int": "3", "list": "[x]", "dict": "{a: 1}", "str": "x", "float": "0.5", "any": "x"}
    keys = known_keys("train_sft")
    for key in UNREAD_TRAINING_ARGS:
        if key == "dataset_num_proc": continue  # it is translated
        kind = next((v for k, v in values.items() if keys[f"training_args.{key}"].startswith((k, f"list[{k}"))), "x")
        with pytest.raises(UserError, match=rf"training_args.{key}\b"):
            compose("train_sft", [f"training_args.{key}={kind}"])


def test_a_preset_of_ones_own_wins(house):
    c = compose("train_sft", ["model=apertus-8b", "accelerate_config=ds-zero3", "cluster=clariden"])
    assert c.cfg["model_args"]["model_name_or_path"] == "/models/house-8b"
    assert c.cfg["accelerate_config"] == str(house / "accelerate/ds-zero3.yaml")
    own = [n for n in c.notices if str(house) in n]
    assert {n.split()[0] for n in own if "model=" in n or "accelerate" in n} == {"model=apertus-8b", "accelerate_config"}
    assert any("train-sft.yaml is applied on top of the shipped train_sft.yaml" in n for n in own)
    assert any("setup.yaml is applied on top" in n and "hydra" in n and "seed" in n for n in own)


def test_a_shipped_preset_stays_without_a_folder_of_ones_own():
    c = compose("train_sft", ["model=apertus-8b"])
    assert c.cfg["model_args"]["model_name_or_path"] == "swiss-ai/Apertus-8B-2509" and not [n for n in c.notices if "your own" in n]


def test_stages_of_a_stage_file_take_it_too(house):
    for stage in ("tokenize", "generation_ratio"):
        c = compose(stage, ["cluster=clariden"])
        assert c.cfg["training_args"]["max_length"] == 2048 and c.cfg["model_args"]["model_name_or_path"] == "/models/house-8b"


def test_other_files_of_the_folder_are_read(house):
    c = compose("ref_rewards", ["reward_model=house-judge"])
    assert {k: c.cfg["reward_args"][k] for k in ("kind", "name", "model_name_or_path", "dtype")} == dict(
        kind="model", name="house-judge", model_name_or_path="/models/judge", dtype="bfloat16")
    m = compose("dataset_mixture", [f"mixture={house}/blend.yaml"])
    assert m.cfg["sources"] == [dict(dataset_name="a", dataset_path="artifacts/a.jsonl", train_splits=["train"], eval_splits=[])]
    assert (m.cfg["dataset_name"], m.cfg["save_data_dir"]) == ("blend-2", "artifacts/private/datasets/house/blend-2")
    with pytest.raises(UserError, match="distributed_type=FSDP is not supported"):
        compose("train_sft", ["accelerate_config=sharded", "num_processes=2", "cluster=local"])


def test_an_unknown_key_of_a_preset_is_named(house):
    (house / "model/odd.yaml").write_text("# @package _global_\nmodel_args:\n  model_name_or_path: a\nmodle_kind: x\n")
    with pytest.raises(UserError, match=r"Unknown key modle_kind.*model=odd, line 4 of .*/model/odd.yaml"): compose("train_sft", ["model=odd"])


OWN_FILES = [  # group, file, its text, what the error says of it
    ("override", "override/wrong.yaml", "# @package _global_\n\nis_this_key_overridden: yes\n", "Unknown key is_this_key_overridden.*line 3 of"),
    ("experiment", "experiment/wrong.yaml", "# @package _global_\ntraining_args:\n  max_stepz: 3\n", "Did you mean 'training_args.max_steps'.*line 3 of"),
    ("preset", "wrong.yaml", "training_args:\n  learning_rate: -1\n", "between 0 and|line 2 of"),
    ("experiment", "wrong.yaml", "training_args:\n  max_seq_length: many\n", r"max_length=many does not fit.*\(preset experiment=wrong.*line 2 of"),
    ("override", "other.yaml", "wandb:\n  mode: disabled\n", "no file override/wrong.yaml.*Files: .*other"),
    ("experiment", "train-sft.yaml", SFT, "no file experiment/wrong.yaml")]


@pytest.mark.parametrize("group, file, text, says", OWN_FILES)
def test_a_line_of_ones_own_file_that_is_not_known_is_named(house, group, file, text, says):
    (house / file).write_text(text)
    with pytest.raises(UserError, match=says): compose("train_sft", [f"{group}=wrong", *BATCH])


def test_a_file_beside_those_of_the_stages_is_an_experiment(house):
    (house / "quick.yaml").write_text("training_args:\n  max_steps: 3\n")
    for typed in ("experiment=quick", "preset=quick.yaml", "override=quick"):
        c = compose("train_sft", [typed, *BATCH])
        assert c.cfg["training_args"]["max_steps"] == 3 and any("quick.yaml" in n for n in c.notices)
    with pytest.raises(UserError, match="train-sft.yaml is the file of a stage"): compose("train_sft", ["experiment=train-sft"])


def test_limits_of_prompt_and_completion_drop_pairs_with_a_count(tmp_path, tmp_root):
    "Pairs above a limit are left out and counted by the limit; the notice says that nothing is cut"
    from post_training.tokens.tokenizer import toy_tokenizer
    from post_training.train_preference import load_tokenized_pairs
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    pairs = [dict(prompt="2 + 2?" + " please" * n, chosen="4" + " or so" * m, rejected="5") for n, m in ((0, 0), (30, 0), (0, 30), (0, 1))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    args = ["dataset=local", f"dataset_args.dataset_name={tmp_path}/pairs.jsonl", "training_args.loss_type=sigmoid", "training_args.ref_logprobs_from_dataset=false",
            f"tokenizer_args.tokenizer_name_or_path={tmp_path}/toy", "tokenizer_args.chat_template_name=tulu", "max_drop_fraction=1", f"artifacts_dir={tmp_path}"]
    limits = ["training_args.max_prompt_length=40", "training_args.max_completion_length=40"]
    c = compose("train_preference", [*args, *limits])
    assert any("max_prompt_length=40" in n and "dropped and counted, not cut" in n for n in c.notices)
    dropped = {"longer than max_prompt_length": 1, "longer than max_completion_length": 1}
    assert load_tokenized_pairs(c.cfg).counts["train"]["dropped"] == dropped
    assert not load_tokenized_pairs(compose("train_preference", args).cfg).counts["train"].get("dropped")


def test_a_folder_of_checkpoints_is_resumed(tmp_path):
    for step in (5, 10): (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-5/manifest.json").write_text("{}")
    c = compose("train_sft", [f"resuming_dir={tmp_path}"])
    assert c.cfg["resume_from"] == str(tmp_path / "checkpoint-5") and c.cfg["resuming_dir"] is None


def test_the_frozen_file_is_the_command(house, tmp_path, monkeypatch):
    "A job reads the frozen file, also where the folder of presets is not there"
    from post_training.config.compose import save_frozen
    stage, overrides, batch, values = COMMANDS[0]
    c = compose(stage, overrides)
    path = save_frozen(c.cfg, tmp_path / "config.yaml", overrides)
    assert compose(stage, [str(path)]).cfg == c.cfg
    monkeypatch.delenv("POST_TRAINING_CONFIGS")
    assert compose(stage, [str(path)]).cfg == c.cfg


@pytest.mark.parametrize("template, bos, end", [("tulu", "<s>", "</s>"), ("apertus", "<s>", "<SPECIAL_68>")])
def test_the_text_begins_and_ends_as_published(house, tmp_path, template, bos, end):
    "With the presets of the folder and without them: <s> in front, and the template's end token behind an answer"
    from post_training.data.messages import read_conversation
    from post_training.tokens.masks import tokenize_chat
    from post_training.tokens.dataset import row_chat
    from post_training.tokens.tokenizer import load_tokenizer, toy_tokenizer
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    row = dict(messages=[dict(role="user", content="What is 2 + 2?"), dict(role="assistant", content="It is 4.")])
    assert read_conversation(row).messages[1]["content"] == "It is 4."
    ids = []
    for model in ("house-8b", "llama3-8b"):
        args = compose("train_sft", [f"model={model}", f"tokenizer_args.chat_template_name={template}"]).cfg["tokenizer_args"]
        tokenizer = load_tokenizer(**args | dict(tokenizer_name_or_path=str(tmp_path / "toy"), model_pad_token_id=None))
        chat = row_chat(row, tokenizer)
        ids.append([int(i) for i in tokenize_chat(tokenizer, chat.messages, chat.tools).input_ids])
    assert ids[0] == ids[1]
    assert tokenizer.convert_ids_to_tokens([ids[0][0], ids[0][-1]]) == [bos, end]
