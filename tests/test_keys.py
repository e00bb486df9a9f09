"Every key of every stage is read, refused or noticed; what is not read is no part of a run's identity; what counts as read is named by a reader"
import ast
import functools
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from post_training.config import get_key, pop_key, schema, set_key
from post_training.config.batch import engine_of
from post_training.config.compose import compose, load_frozen, save_frozen, with_origins
from post_training.core.files import UserError
from post_training.run.identity import config_hash

START = {"filter": ["model=tiny"], "ref_completions": ["model=tiny"], "ref_logprobs": ["model=tiny"], "ref_rewards": ["reward_model=tiny"]}
SWITCHES = {  # stage: overrides that turn on what is off by default, and the reverse
    "train_sft": [["trainer=sft"], ["trainer=irl"], ["evaluation.num_prompts=0", "training_args.eval_strategy=no"], ["model_args.use_peft=true"],
                  ["training_args.optim=sgd"], ["training_args.max_steps=2"], ["tokenization.max_length=64"], ["accelerate_config=ddp", "num_processes=2"],
                  ["accelerate_config=ds-zero2", "num_processes=2"], ["cluster=slurm", "num_nodes=1", "accelerate_config=ddp"]],
    "train_preference": [["training_args.loss_type=sigmoid"], ["training_args.loss_type=sft"], ["training_args.ref_logprobs_from_dataset=true"],
                         ["training_args.loss_type=[qrpo,robust]", "training_args.label_smoothing=0.1"]],
    "ref_completions": [["backend=server", "server.url=http://host/v1"], ["generation.temperature=0", "generation.n=1"]], "pairs": [["mode=offline"]], "rejection_sample": [["vote.enabled=true"]],
    "ref_rewards": [["reward_model=verifier"]], "evaluate": [["measure=[perplexity]"], ["checkpoints=[a,b]"], ["lm_eval.tasks=[arc]"], ["dataset_args.split=test"]],
    "dataset_mixture": [["message_format=pairs"], ["near_duplicates.threshold=0"]], "dataset_split": [["dataset_args.stratify_by_column=null"]],
    "decontaminate": [["benchmarks.sources=[b.jsonl]", "near_duplicates.threshold=0"]],
    "export": [["push_to_hub=a/b"], ["parity.dialogues=0"]]}
CASES = [(s, extra) for s in schema.STAGES for extra in [[], *SWITCHES.get(s, [])]]
FOLDERS = ("artifacts_dir", "artifacts_subdir")  # parts of paths in other keys, which change with them


def another(key, now):
    "A value that a key may have and does not have now; None where there is none"
    for kind in key.types.split("|"):
        low = key.low if math.isfinite(key.low) else 1
        numbers = [low + 1, low + 2, (low + min(key.high, 2)) / 2, low + 0.25]
        tries = dict(int=[int(n) for n in numbers[:2]], float=numbers, bool=[True, False], str=["some-text", "others"], dict=[{"a": 1}], list=[["a"]]).get(kind)
        if kind.startswith("list["): tries = [[{"a": 1}]] if "dict" in kind else [["a"], ["b"]]
        if kind[0] == "=": tries = [kind[1:]]
        for value in tries or []:
            if value != now and (not isinstance(value, (int, float)) or key.low <= value <= key.high): return value
    return None


@pytest.mark.parametrize("stage, extra", CASES, ids=["-".join([s, *e]) for s, e in CASES])
def test_every_key_is_read_refused_or_noticed(stage, extra, tmp_root):
    "Another value for each key: where nobody reads it, it is refused or noticed, and the folder stays; where somebody reads it, the folder changes"
    cfg = compose(stage, [*START.get(stage, []), *extra]).cfg
    engine, before = engine_of(cfg), config_hash(cfg)
    ignored = cfg["resuming"]["ignore_keys"]
    for name, key in schema.stage_keys(stage).items():
        if name in ("stage", *FOLDERS) or name.startswith("resuming."): continue
        value = another(key, get_key(cfg, name))
        if value is None: continue
        changed = json.loads(json.dumps(cfg))
        set_key(changed, name, value)
        unread = schema.unread_keys(changed, engine).get(name)
        without = json.loads(json.dumps(changed))
        if unread: pop_key(without, name)
        try: after, removed = config_hash(changed), config_hash(without)
        except UserError: continue  # a batch that does not divide
        outside = key.site or any(name == i or name.startswith(f"{i}.") for i in ignored)
        if unread: assert after == removed, (name, value, "nobody reads it, and it moves the run")
        elif outside: assert after == before, (name, value, "where and how, and it moves the run")
        else: assert after != before, (name, value, "read, and the run stays where it is")
        if unread: check_refused_or_noticed(name, value, unread, changed)


def check_refused_or_noticed(name, value, unread, cfg):
    "A typed key is refused or noticed; one from a preset is noticed, unless it says where and how or is the only value there is"
    try: schema.refuse_unread({name: unread}, cfg, {name: f"{name}={value}"})
    except UserError as e: assert name in str(e) and len(str(e).splitlines()) == 1
    else: assert unread.fixed or name in schema.unread_notices({name: unread}, cfg, {name: "override"})[0], name
    noticed = schema.unread_notices({name: unread}, cfg, {name: "preset model=mine"}, ["model"])
    assert noticed and name in noticed[0] or unread.fixed or schema.stage_keys(cfg["stage"])[name].site, name
    assert not schema.unread_notices({name: unread}, cfg, {name: "default"}), name


def test_conditions_look_at_what_identity_holds():
    "A key that is unread for a reason outside of the identity is outside of it too: another machine is the same folder"
    outside = {"loader_processes", "ddp", "several", "on_cluster"}
    for stage in schema.STAGES:
        for name, key in schema.stage_keys(stage).items():
            assert {*key.when.split()} <= {*schema.CONDITIONS}, name
            assert key.site or not outside & {*key.when.split()}, name


# -- what counts as read is named somewhere

PACKAGE = ROOT / "post_training"
LIBRARIES = {"transformers": ["trainer*.py", "training_args.py", "integrations/*.py", "optimization.py", "modelcard.py"], "trl": ["trainer/*.py"]}
PASSED_WHOLE = {  # sections that are passed on as a whole, and the modules whose functions take their keys
    "cluster": ["launch/slurm.py"], "dataset_args": ["stages/tokenized_data.py"], "model_merging": ["merging/document.py", "merging/sources.py", "merging/merge.py"],
    "near_duplicates": ["data/duplicates.py"], "options": ["merging/merge.py"], "reward_args": ["preferences/rewards.py"],
    "tokenization": ["tokens/dataset.py"], "tokenizer_args": ["tokens/tokenizer.py"], "training_args": ["training/preference.py", "tokens/pairs.py"]}
WITHOUT_A_NAME = set()  # keys that count as read and that no reader names: none, so far


def used_names(tree):
    "Texts, attributes, parameters, keywords and fields in a piece of code"
    for x in ast.walk(tree):
        if isinstance(x, ast.Constant) and isinstance(x.value, str): yield x.value
        if isinstance(x, ast.Attribute): yield x.attr
        if isinstance(x, (ast.arg, ast.keyword)) and x.arg: yield x.arg
        if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name): yield x.target.id


@functools.cache
def readers():
    "The names in each function of the package outside of config, and in each cell of the recipes"
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name not in ("config", "bench") and p.name != "_modidx.py"]
    pieces = [n for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)]
    for p in sorted((ROOT / "nbs/recipes").glob("*.ipynb")):
        sources = ["".join(c["source"]) for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code"]
        pieces += [ast.parse(source) for source in sources if not source.startswith(("%", "!"))]
    return [{*used_names(piece)} for piece in pieces]


@functools.cache
def module_names(name): return {*used_names(ast.parse((PACKAGE / name).read_text()))}


@functools.cache
def library_text():
    found = []
    for name, patterns in LIBRARIES.items():
        folder = Path(importlib.util.find_spec(name).origin).parent
        found += [p.read_text() for pattern in patterns for p in sorted(folder.glob(pattern))]
    return "\n".join(found)


def is_named(name):
    "A function names the key and its section, a library reads it from its arguments, or its section is passed whole to a module that names it"
    *section, last = name.split(".")
    if any(last in names and (not section or section[-1] in names) for names in readers()): return True
    if not section: return False
    if section[0] in ("training_args", "model_args") and re.search(rf"\b(args|self|model_args)\.{last}\b", library_text()): return True
    return any(last in module_names(m) for m in PASSED_WHOLE.get(section[0], []))


def test_what_counts_as_read_is_named_by_a_reader():
    names = {name for stage in schema.STAGES for name, key in schema.stage_keys(stage).items() if key.read and name != "stage"}
    assert {n for n in names if not is_named(n)} == WITHOUT_A_NAME


# -- through `compose`, as a user meets it

REFUSED = [
    ("train_sft", ["trainer=sft", "plw_args.prompt_loss_weight=0.5"], "plw_args.prompt_loss_weight=0.5 is not read: trainer=sft weighs all tokens alike. Choose trainer=plw"),
    ("train_sft", ["irl_args.gamma=0.5"], "irl_args.gamma=0.5 is not read: only trainer=irl has a temporal-difference term, and this is trainer=plw. Leave it out."),
    ("train_sft", ["trainer=irl", "irl_args.lambda_td=0", "irl_args.gamma=0.5"], "irl_args.lambda_td=0 leaves the temporal-difference term out"),
    ("train_sft", ["training_args.truncation_mode=keep_end"], "set tokenization.overlength"),
    ("train_sft", ["training_args.resume_from_checkpoint=/a"], "set resume_from"), ("train_sft", ["training_args.packing_strategy=wrapped"], "best fit"),
    ("train_sft", ["training_args.eval_packing=true"], "packed if training rows are"), ("train_sft", ["training_args.shuffle_dataset=true"], "train_sampling_strategy"),
    ("train_sft", ["training_args.dataset_text_field=body"], "tokenized before TRL"),
    ("train_sft", ["training_args.output_dir=/a"], "artifacts_dir"), ("train_sft", ["training_args.run_name=a"], "wandb.run_name"),
    ("train_sft", ["training_args.router_aux_loss_coef=0.1"], "no auxiliary term"), ("train_sft", ["resuming_dir=/a"], "no checkpoint of this program"), ("tokenize", ["resuming_hash=a"], "filled when the run is opened"),
    ("train_sft", ["training_args.deepspeed=zero3.json"], "accelerate_config"), ("train_sft", ["training_args.fsdp=full_shard"], "accelerate_config"),
    ("train_sft", ["training_args.fsdp_config={a: 1}"], "accelerate_config"), ("train_sft", ["training_args.use_cpu=true"], "cluster.device"),
    ("train_sft", ["training_args.accelerator_config={split_batches: true}"], "accelerate_config"), ("train_sft", ["training_args.parallelism_config=a"], "accelerate_config"),
    ("train_sft", ["training_args.save_on_each_node=true"], "artifacts_dir"), ("train_sft", ["training_args.use_liger_kernel=true"], "the head is fused already"),
    ("train_sft", ["training_args.report_to=tensorboard"], "wandb group"), ("train_sft", ["training_args.loss_type=dft"], "choose the loss with trainer="),
    ("train_sft", ["model_args.load_in_4bit=true"], "load it in bfloat16"), ("train_sft", ["model_args.lora_r=4"], "Set model_args.use_peft=true, or leave it out"),
    ("train_sft", ["training_args.adam_beta1=1.0"], "at least 0 and below 1"), ("train_sft", ["training_args.learning_rate=-1"], "between 0 and 100"),
    ("train_sft", ["training_args.ddp_timeout=9"], "one process waits for no other"), ("train_sft", ["accelerate_config=ds-zero2", "num_processes=2", "training_args.ddp_bucket_cap_mb=9"],
     "plain data parallelism"), ("train_sft", ["training_args.optim_args='a=1'"], "training_args.optim=adamw_torch takes no arguments"),
    ("train_preference", ["training_args.transform=log", "training_args.loss_type=sigmoid"], "belongs to loss_type=qrpo"),
    ("train_preference", ["training_args.precompute_ref_batch_size=4"], "per_device_eval_batch_size"), ("train_preference", ["training_args.label_smoothing=0.1"], "exo_pair, robust"),
    ("filter", ["model=tiny", "model_args.dtype=float32"], "loads no model"), ("pairs", ["resume_from=/a"], "only train_sft, train_preference and train_reward read it, and this is pairs"),
    ("ref_completions", ["model=tiny", "server.url='http://a'"], "asks no server"), ("ref_rewards", ["reward_model=verifier", "reward_args.max_length=9"], "asks no model"),
    ("evaluate", ["evaluation.samples=4"], "takes the likeliest token"), ("evaluate", ["lm_eval.limit=4"], "no task is named"), ("export", ["private=false"], "nothing is pushed"),
    ("dataset_mixture", ["message_format=pairs", "role_checks=[alternation]"], "takes the rows as they are")]


@pytest.mark.parametrize("stage, overrides, says", REFUSED, ids=["-".join(o) for _, o, _ in REFUSED])
def test_a_typed_key_that_nobody_reads_is_refused(stage, overrides, says):
    with pytest.raises(UserError) as e: compose(stage, overrides)
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1, str(e.value)


@pytest.mark.parametrize("stage, overrides, says", [
    ("train_sft", ["training_args.max_steps=4", "training_args.num_train_epochs=2"], "training_args.num_train_epochs=2 is not read: training_args.max_steps=4 says how long"),
    ("tokenize", ["training_args.learning_rate=1e-3", "trainer=sft"], "the stage tokenize does not read it"),
    ("generation_ratio", ["plw_args.prompt_loss_weight=0.5"], "the stage generation_ratio does not read it"),
    ("filter", ["model=tiny", "wandb.run_name=a", "num_nodes=2"], "only train_sft, train_preference and train_reward read it"),
    ("train_sft", ["cluster.partition=normal"], "cluster.partition=normal is not read: cluster.launcher=local starts on this machine"),
    ("train_sft", ["tokenization.max_length=64", "training_args.max_length=128"], "training_args.max_length=128 is not read: tokenization.max_length=64 says how long rows are")])
def test_a_key_that_is_overruled_or_given_to_many_stages_is_noticed(stage, overrides, says):
    c = compose(stage, overrides)
    assert any(says in n for n in c.notices), c.notices
    key = says.split("=")[0]
    if "." in key and " " not in key: assert key in c.unread


PRESET = "# @package _global_\n{}\n"


def test_a_preset_is_noticed_and_leaves_the_folder_alone(tmp_path, tmp_root):
    (tmp_path / "dataset").mkdir()
    for name, weight in (("one", 0.1), ("two", 0.7)):
        text = f"dataset_name: demo\ndataset_args:\n  dataset_name: /a\ntrainer: sft\nplw_args:\n  prompt_loss_weight: {weight}\ntraining_args:\n  run_name: {name}\n  use_liger_kernel: false"
        (tmp_path / "dataset" / f"{name}.yaml").write_text(PRESET.format(text))
    one, two = (compose("train_sft", [f"dataset={name}"], config_dir=tmp_path) for name in ("one", "two"))
    assert config_hash(one.cfg) == config_hash(two.cfg)
    assert sorted(n for n in two.notices if "not read" in n) == [
        "plw_args.prompt_loss_weight=0.7 (dataset=two) is not read: trainer=sft weighs all tokens alike.", "training_args.run_name=two (dataset=two) is not read: set wandb.run_name."]
    assert load_frozen(save_frozen(two.cfg, tmp_path / "config.yaml")) == two.cfg
    (tmp_path / "dataset" / "three.yaml").write_text(PRESET.format("dataset_name: demo\ndataset_args:\n  dataset_name: /a\ntraining_args:\n  use_cpu: true"))
    with pytest.raises(UserError, match=r"training_args.use_cpu=true: the device is chosen by cluster.device=cpu.*dataset=three"):
        compose("train_sft", ["dataset=three"], config_dir=tmp_path)


def test_presets_of_a_model_say_in_one_line_what_a_stage_does_not_read():
    c = compose("filter", ["model=apertus-8b"])
    line, = c.notices
    assert line == ("model=apertus-8b: the stage filter does not read global_batch_size, training_args.learning_rate, training_args.per_device_train_batch_size.")
    assert not compose("tokenize").notices and not compose("train_preference").notices and not compose("generation_ratio").notices


def test_the_old_name_of_activation_checkpointing_is_translated():
    c = compose("train_sft", ["training_args.gradient_checkpointing=true"])
    assert c.cfg["training_args"]["activation_checkpointing"] is True and "gradient_checkpointing" not in c.cfg["training_args"]
    assert "is called training_args.activation_checkpointing now" in c.notices[0]


def test_lists_take_texts_and_mappings():
    assert compose("train_sft", ["wandb.tags=[1,prod,true]"]).cfg["wandb"]["tags"] == ["1", "prod", "True"]
    with pytest.raises(UserError, match="a list of texts"): compose("train_sft", ["wandb.tags=[[a]]"])
    with pytest.raises(UserError, match="a list of accuracy and perplexity"): compose("evaluate", ["measure=[{a: 1}]"])
    with pytest.raises(UserError, match="a list of mappings"): compose("dataset_mixture", ["dataset_name=m", "sources=[a]"])


@pytest.mark.parametrize("stage, extra", CASES[::3], ids=["-".join([s, *e]) for s, e in CASES[::3]])
def test_each_line_of_a_dry_run_says_where_its_value_comes_from(stage, extra):
    c = compose(stage, [*START.get(stage, []), *extra])
    text = with_origins(c)
    assert yaml.safe_load(text) == c.cfg
    values = [line for line in text.splitlines() if not line.endswith(":")]
    assert all(re.search(r"  # (default|typed|derived|not read: |\w+=)", line) for line in values)
    for name in c.unread: assert f"{name.split('.')[-1]}: " in text


def test_the_example_of_a_dry_run():
    c = compose("train_sft", ["trainer=sft", "training_args.learning_rate=1e-5"])
    lines = [line.strip() for line in with_origins(c).splitlines()]
    assert "prompt_loss_weight: 0.1  # dataset=demo; not read: trainer=sft" in lines and "learning_rate: 1.0e-05  # typed" in lines
    assert "lambda_td: 0.5  # not read: trainer=sft" in lines and "gradient_accumulation_steps: 2  # derived" in lines
    assert "prompt_loss_weight: 0.1  # dataset=demo" in [line.strip() for line in with_origins(compose("train_sft")).splitlines()]
