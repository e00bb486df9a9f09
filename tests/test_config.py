"Config, where a notebook cell is not enough: arbitrary text, other processes and threads, presets from elsewhere, the key table of the libraries"
import functools
import json
import math
import re
import shlex
import subprocess
import sys
import threading

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training import config
from post_training.core.files import UserError
from post_training.config.overrides import parse_override, quote_value, quote_override
from post_training.config.presets import evaluate_arithmetic, resolve_interpolations
from post_training.config.compose import compose, diff_from_presets, save_frozen, load_frozen

ACCUMULATION = "training_args.gradient_accumulation_steps"


# -- the expression parser

numbers = st.integers(0, 1000) | st.integers(1, 10**6).map(lambda n: n / 1000)
expressions = st.recursive(numbers.map(repr), lambda e: st.one_of(
    st.tuples(e, st.sampled_from("+ - * / // %".split()), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    e.map(lambda x: f"-({x})"), st.tuples(st.sampled_from(["min", "max"]), e, e).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")), max_leaves=5)


@given(expressions)
@settings(deadline=None)
def test_arithmetic_is_pythons(text):
    "What is accepted has the value that Python gives it; what is refused has none"
    try: want = eval(text)
    except ArithmeticError: want = None
    if want is None or len(text) > 200: pytest.raises(UserError, evaluate_arithmetic, text)
    else: assert evaluate_arithmetic(text) == want


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(st.text(max_size=60) | st.text(alphabet="()[]{}.,'\"*/+-%_abcdefx0123456789 =:~<>!@^&|\\\n", max_size=60))
def test_any_text_is_a_number_or_refused(text):
    try: assert math.isfinite(evaluate_arithmetic(text))
    except UserError as e: assert len(str(e).splitlines()) == 1


@pytest.mark.parametrize("text", ["__import__('os').system('touch x')", "open('x','w')", "(lambda: 1)()", "[x for x in (1,)]", "exec('1')",
    "min.__class__", "().__class__.__bases__", "9**9**9", "2**65", "(10**17)*100", "True", "1j", "'1'", "f'{1}'", "max", "x:=1", "min()", "9" * 300,
    "(" * 150 + ")" * 150, "-" * 199 + "1" * 1, "1 if 1 else 2", "0x10**64**2", "round(1,ndigits=1)", "max(*[1])", "int('1')", "1_0 and 2"])
def test_expressions_that_are_refused(text):
    if text.startswith("-"): assert evaluate_arithmetic(text) == -1  # odd, and arithmetic
    else: pytest.raises(UserError, evaluate_arithmetic, text)


# -- overrides arrive as typed

pieces = st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from(["\\", "\\\\", "'", '"', "${", "${x}", "}", "$", *"=;,()[]{} \t\n~:!`a"])
text_values = st.lists(pieces, max_size=12).map("".join)
HARD = ["a b", " both ", "it's", '"', "a;b", "$(touch x)", "`touch x`", "a=b", "[x", "{", "}", "back\\slash", "end\\", "\\\\'", "", "ü🏔", "${x}", "\\${x}",
        "\\\\${x}", "${", "a\nb", "null", "true", "1,2", "007", "1e3", "choice(1,2)", "~", "#", "%s", "!!python/object:os.system"]


def check_arrives(value):
    if value == "???": return  # no value, by OmegaConf's convention
    raw = {"wandb": {"run_name": parse_override(f"wandb.run_name={quote_value(value)}").value}}
    assert resolve_interpolations(raw)["wandb"]["run_name"] == value


@given(text_values)
@settings(max_examples=400, deadline=None)
def test_quoted_text_arrives(value): check_arrives(value)


@pytest.mark.parametrize("value", HARD)
def test_hard_text_arrives_through_a_shell_and_a_frozen_file(value, tmp_path):
    "Typed as the error message says, split by the shell, composed, frozen and read back"
    (argument,) = shlex.split(quote_override(f"wandb.run_name={value}"))
    if "$" not in value and "`" not in value and "\\" not in value:  # what the shell itself would do with the double quotes
        shell = subprocess.run(["bash", "-c", f"printf %s {quote_override(f'wandb.run_name={value}')}"], capture_output=True, text=True, cwd=tmp_path)
        assert shell.stdout == argument
    cfg = compose("train_sft", [argument, *(["wandb.tags=[" + quote_value(value) + "]"] if value else [])]).cfg
    assert cfg["wandb"]["run_name"] == value and cfg["wandb"]["tags"] == [value] * bool(value)
    assert load_frozen(save_frozen(cfg, tmp_path / "config.yaml")) == cfg
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]  # nothing ran


@pytest.mark.parametrize("text", ["x=a=b", "wandb.run_name=$(touch x)", "wandb.run_name=a;b", "wandb.run_name=[x", "wandb.run_name=ü", "wandb.run_name={a"])
def test_unreadable_override_says_what_to_type(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e: compose("train_sft", [text])
    lines = str(e.value).splitlines()
    assert len(lines) == 2
    (argument,) = shlex.split(lines[1].removeprefix("Quote the value: "))
    assert parse_override(argument).value == text.partition("=")[2]
    assert not list(tmp_path.iterdir())


@given(st.text(alphabet="abmodeltrainer_.=+~[]{},'\"$@/:1 -", max_size=25))
@settings(max_examples=10, deadline=None)
def test_any_override_composes_or_is_refused(text):
    "No exception of Hydra's or OmegaConf's own comes out"
    for prefix in ("", "model=", "wandb.run_name=", "training_args.", "~", "wandb="):
        try: compose("train_sft", [prefix + text])
        except UserError as e: assert len(str(e).splitlines()) <= 2


# -- refusals: one or two lines that name the nearest

@pytest.mark.parametrize("overrides, says", [
    (["models=tiny"], "Did you mean 'model'"), (["model=apertus-80b"], "Did you mean 'apertus-8b'"), (["model=../model/tiny"], "no preset"),
    (["dataset=null"], "no preset"), (["model=[tiny]"], "no preset"), (["~model"], "no preset"), (["trainer=PLW"], "Choices: sft, plw, ln-plw, irl"),
    (["learning_rate=1e-5"], "Did you mean 'training_args.learning_rate'"), (["+training_args.lerning_rate=1"], "Did you mean 'training_args.learning_rate'"),
    (["training_args.optim=adam_torch"], "Did you mean 'adamw_torch'"), (["a=1,2"], "sweep"), (["training_args.seed=range(1,5)"], "sweep"),
    (["training_args.max_steps=1.5"], "a whole number"), (["training_args.max_steps=abc"], "a whole number"), (["wandb.tags=prod"], "a list"),
    (["wandb=off"], "section"), (["training_args.learning_rate.x=1"], "training_args.learning_rate"), (["submit=maybe"], "true or false"),
    (["dataset=local"], "must be given: dataset_args.dataset_name=VALUE (preset dataset=local)"), (["wandb.run_name=${nowhere.at.all}"], "not found"),
    (["stage=x"], "Choices: train_sft"),
    (["job_subdir=${job_subdir}"], "ecursive"),
    (["wandb.run_name=${oc.env:NOT_SET_ANYWHERE}"], "NOT_SET_ANYWHERE is not set"), (["wandb.run_name=${hydra:runtime.cwd}"], "resolved"),
    (["wandb.run_name=${oc.env:WANDB_API_KEY,x}"], "named like a secret"), (["training_args.lr_scheduler_kwargs={_target_: os.system}"], "must not refer to Python code"),
    (["accelerate_config=ds-zero4"], "Did you mean 'ds-zero3'"), (["accelerate=ds-zero4"], "ds-zero3"), (["num_nodes=2"], "one node"), (["num_processes=-1"], "between 1 and"),
    (["global_batch_size=0"], "between 1 and"), (["training_args.per_device_train_batch_size=0"], "at least 1"), (["job_subdir=/etc"], "below the outputs"),
    (["job_subdir=null"], "takes text"), (["training_args.max_seq_length=8", "training_args.max_length=9"], "same key"), (["training_args.warmup_ratio=10"], "warmup_steps"),
    (["~training_args.nothing"], "no key"), (["~trainer"], "is missing"), (["+hydra.run.dir=x"], "Unknown key"), (["hydra/launcher=x"], "Unknown key"),
    (["model@x=tiny"], "package"), ([3], "text like key=value"), (["="], "names no key"), ([""], "not an override"), (["training_args.bf16=yes"], "true or false")])
def test_refused(overrides, says):
    with pytest.raises(UserError) as e: compose("train_sft", overrides)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 2, str(e.value)


@functools.cache
def composed_once(stage): return json.dumps(compose(stage).cfg)


def plain_preference(): return json.loads(composed_once("train_preference"))


@pytest.mark.parametrize("overrides, says", [
    (["training_args.loss_type=exo_pair"], "takes more than 0"), (["training_args.loss_type=[qrpo,sft]", "training_args.loss_weights=[1.0]"], "1 values for 2 losses"),
    (["training_args.loss_type=[qrpo,sigmiod]"], "Did you mean 'sigmoid'"), (["training_args.loss_type=[]"], "is empty"), (["training_args.max_effective_beta=0"], "above 0"),
    (["training_args.sync_ref_model=true"], "the reference stays what it is"), (["tokenization.overlength=truncate"], "Choices: drop, error"),
    (["training_args.loss_weights=[0]"], "nothing would be trained"), (["training_args.loss_type=[qrpo,sft]", "training_args.loss_weights=[1,-1]"], "at least 0"),
    (["training_args.loss_weights=[much]"], "a list of numbers"), (["training_args.beta=0"], "training_args.beta=0: it must be above 0"), (["training_args.num_ref_rewards=0"], "at least 1"),
    (["training_args.loss_type=ipo", "training_args.normalize_beta_by_length=true"], "twice"), (["training_args.ld_alpha=0.5"], "QRPO, which scores each alone"),
    (["training_args.loss_type=aot", "training_args.f_divergence_type=forward_kl"], "not defined"), (["training_args.precompute_ref_log_probs=true", "training_args.ref_logprobs_from_dataset=true"], "not both"),
    (["ref_model_args.model_name_or_path=A/B", "training_args.ref_logprobs_from_dataset=true"], "training_args.ref_logprobs_from_dataset=true takes the reference's log-probabilities from the data")])
def test_objectives_that_are_refused_before_anything_is_submitted(overrides, says, tmp_path):
    with pytest.raises(UserError) as e: compose("train_preference", overrides)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 2, str(e.value)
    fine = plain_preference()
    for key, value in (parse_override(o).text.split("=", 1) for o in overrides): config.set_key(fine, key, yaml.safe_load(value))
    with pytest.raises(UserError): load_frozen(save_frozen(fine, tmp_path / "config.yaml"))


def test_unknown_stage():
    with pytest.raises(UserError, match="Did you mean 'train_sft'"): compose("train_stf")
    with pytest.raises(UserError, match="a list of texts"): compose("train_sft", "model=tiny")


# -- presets from elsewhere

def preset(folder, group, name, text):
    (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / group / f"{name}.yaml").write_text(text)


EARLIER_DATASET = """# @package _global_

dataset_name: mixture-8

dataset_args:
  dataset_name: /data/mixtures/mixture-8
  train_split: # Only required for DatasetDict objects
    name: train
  eval_split:
    name: null

training_args:
  eval_strategy: "no"
  eval_steps: null
"""
EARLIER_MODEL = """# @package _global_

model_args:
  torch_dtype: bfloat16
  model_name_or_path: ${artifacts_dir}/shared/models/some-8b
  attn_implementation: flash_attention_2
  trust_remote_code: true
  use_peft: false

tokenizer_args:
  tokenizer_name_or_path: ${artifacts_dir}/shared/models/some-8b
  chat_template_name: tulu
  trust_remote_code: true
  padding_side: right
  add_bos_to_chat_template: true
  model_pad_token_id: 128004
  model_eos_token_id: null

model_vllm_config:
  tensor_parallel_size: 4
training_args:
  warmup_ratio: 0.1
  max_seq_length: 2048
"""


def test_presets_of_an_earlier_code_base_compose(tmp_path, tmp_root):
    preset(tmp_path, "dataset", "mixture-8", EARLIER_DATASET)
    preset(tmp_path, "model", "some-8b", EARLIER_MODEL)
    c = compose("train-sft", ["dataset=mixture-8", "model=some-8b"], config_dir=tmp_path)
    assert c.cfg["dataset_args"]["dataset_name"] == "/data/mixtures/mixture-8" and c.cfg["training_args"]["eval_strategy"] == "no"
    assert c.origins["dataset_args.train_split.name"] == "preset dataset=mixture-8"
    assert c.cfg["model_args"]["dtype"] == "bfloat16" and c.cfg["training_args"]["warmup_steps"] == 0.1
    assert c.cfg["training_args"]["max_length"] == 2048 and c.origins["training_args.max_length"] == "preset model=some-8b"
    assert c.cfg["model_args"]["model_name_or_path"] == str(tmp_root / "artifacts/shared/models/some-8b")
    assert c.cfg["model_args"]["trust_remote_code"] is False
    assert len([n for n in c.notices if not n.startswith("This machine has no GPU")]) == 4, c.notices  # a section, three names, twice remote code
    typed = compose("train_sft", ["model=some-8b", "training_args.max_length=64"], config_dir=tmp_path)
    assert typed.cfg["training_args"]["max_length"] == 64 and set(diff_from_presets(typed).items()) == {(k, (2048, 64)) for k in ("training_args.max_length", "tokenization.max_length")}
    commit = "0123456789abcdef" * 2 + "01234567"
    assert compose("train_sft", ["model=some-8b", f"model_args.model_revision='{commit}'"], config_dir=tmp_path).cfg["model_args"]["trust_remote_code"] is True


@pytest.mark.parametrize("text, says", [
    ("trainer: plw\n", "@package _global_"), ("# @package _global_\ntrainer: PLW\n", r"Choices: sft, plw.*\(preset dataset=mine, line \d"),
    ("# @package _global_\ntraining_args:\n  lerning_rate: 1\n", r"learning_rate'\? \(preset dataset=mine, line \d"),
    ("# @package _global_\ntrainer: [\n", "mine.yaml, line"), ("# @package _global_\na: 1\na: 2\n", "line 3: the key a stands in line 2"), ("- 1\n", "contains no keys"),
    ("# @package _global_\ndefaults:\n  - nowhere\n", "nowhere"), ("# @package _global_\nwandb:\n  run_name: ${eval:'__import__(1)'}\n", "only arithmetic"),
    ("# @package _global_\ntraining_args:\n  lr_scheduler_kwargs:\n    a:\n      - _target_: os.system\n", "must not refer to Python code"),
    ("# @package _global_\n_target_: os.system\n", "Unknown key _target_"),
    ("# @package _global_\nhydra:\n  run:\n    dir: /x\n", "sets keys of Hydra"), ("", "@package _global_")])
def test_faulty_presets_are_named(text, says, tmp_path):
    preset(tmp_path, "dataset", "mine", text)
    with pytest.raises(UserError, match=says) as e: compose("train_sft", ["dataset=mine"], config_dir=tmp_path)
    assert len(str(e.value).splitlines()) <= 2


def test_preset_arithmetic_and_inheritance(tmp_path):
    preset(tmp_path, "model", "half", "# @package _global_\ndefaults:\n  - tiny\n  - _self_\ntraining_args:\n  max_length: ${calc:'${training_args.save_steps} // 2'}\n")
    c = compose("train_sft", ["model=half", "training_args.save_steps=100"], config_dir=tmp_path)
    assert c.cfg["training_args"]["max_length"] == 50
    assert c.origins["training_args.max_length"] == "preset model=half" and c.origins["model_args.model_name_or_path"] == "preset model=tiny"


def test_model_presets_name_no_user_and_trust_no_code():
    for name in config.preset_names("model"):
        cfg = compose("train_sft", [f"model={name}"]).cfg
        path = cfg["model_args"]["model_name_or_path"]
        assert path.startswith(cfg["artifacts_dir"] + "/") or re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        assert not any(v for k, v in config.flatten(cfg).items() if k.endswith("trust_remote_code"))


# -- batch arithmetic through overrides

def test_typed_batch_beats_presets():
    big = ["model=apertus-70b", "cluster=clariden"]
    assert config.batch_arithmetic(compose("train_sft", big).cfg) == dict(world_size=256, per_device=2, accumulation=1, global_batch=512)
    c = compose("train_sft", [*big, f"{ACCUMULATION}=2"])
    assert c.cfg["global_batch_size"] == 1024 and c.origins["global_batch_size"] == "derived" and "512" in c.notices[0]
    c = compose("train_sft", [*big, "num_nodes=128", "global_batch_size=1024"])
    assert c.cfg["training_args"]["gradient_accumulation_steps"] == 1
    for bad, says in ([f"{ACCUMULATION}=2", "global_batch_size=512"], "disagree"), (["num_nodes=100"], "global_batch_size=800|is not divisible"):
        with pytest.raises(UserError, match=says): compose("train_sft", [*big, *bad])
    assert compose("train_sft", [*big, f"{ACCUMULATION}=2", "global_batch_size=1024"]).cfg["global_batch_size"] == 1024


@given(total=st.integers(1, 4096), rows=st.integers(1, 64), nodes=st.integers(1, 16))
def test_suggested_batches_divide(total, rows, nodes):
    def cfg(total, rows):
        return dict(cluster=dict(launcher="slurm", gpus_per_node=4, processes_per_node=None), num_nodes=nodes, num_processes=None, accelerate_config="ddp",
                    global_batch_size=total, training_args=dict(per_device_train_batch_size=rows))
    try: got = config.batch_arithmetic(cfg(total, rows))
    except UserError as e:
        text = str(e).splitlines()[1]
        for n in re.search(r"global_batch_size=([\d or]+)", text)[1].split(" or "): config.batch_arithmetic(cfg(int(n), rows))
        if m := re.search(r"per_device_train_batch_size=([\d or]+)", text):
            for n in m[1].split(" or "): config.batch_arithmetic(cfg(total, int(n)))
    else: assert got["world_size"] * got["per_device"] * got["accumulation"] == total


# -- nothing global, nothing heavy

def test_import_is_light_and_compose_imports_no_torch():
    code = """import sys; import post_training.config as c
heavy = {'hydra', 'omegaconf', 'antlr4', 'torch', 'transformers', 'trl', 'numpy'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
c.compose('train_sft')
assert not {'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_global_is_left_and_calls_nest(tmp_path):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf
    (tmp_path / "other.yaml").write_text("a: ${calc:1}\n")
    OmegaConf.register_new_resolver("calc", lambda x: f"mine {x}", replace=True)
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            compose("train_sft", ["training_args.max_steps=1"])
            assert hydra_compose("other").a == "mine 1"  # the outer Hydra and its resolvers are as they were
        assert not GlobalHydra().is_initialized()
        with pytest.raises(UserError): compose("train_sft", ["trainer=PLW"])
        assert not GlobalHydra().is_initialized() and OmegaConf.create({"a": "${calc:1}"}).a == "mine 1"
    finally: OmegaConf.clear_resolver("calc")


def test_threads_compose_at_the_same_time():
    got, faults = {}, []

    def work(i):
        try: got[i] = compose("train_sft", [f"training_args.seed={i}", "dataset=gsm8k" if i % 2 else "dataset=demo"]).cfg
        except BaseException as e: faults.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not faults
    assert {i: (c["training_args"]["seed"], c["dataset_name"]) for i, c in got.items()} == {i: (i, "gsm8k" if i % 2 else "demo") for i in range(6)}


# -- the table and the frozen file

def test_key_table_is_that_of_the_installed_libraries():
    "Regenerate: python -c 'from post_training.training.arguments import write_keys; write_keys()'"
    from post_training.training.arguments import trl_keys
    assert json.loads((config.CONFIGS / "keys.json").read_text()) == trl_keys()


def test_every_composed_training_argument_is_accepted_by_trl(tmp_path):
    from trl import SFTConfig
    args = dict(compose("train_sft").cfg["training_args"], output_dir=str(tmp_path), bf16=False, use_cpu=True)
    made = SFTConfig(**args)
    assert made.activation_checkpointing is False and made.gradient_checkpointing is False and made.warmup_steps == 0.03
    assert made.get_warmup_steps(200) == 6  # a share of the steps


@pytest.mark.parametrize("change, says", [(lambda c: c.pop("trainer"), "is missing"), (lambda c: c.update(trainerr=1), "Did you mean 'trainer'"),
    (lambda c: c.update(stage="train"), "no stage"), (lambda c: c["plw_args"].update(prompt_loss_weight=2), "between"), (lambda c: c.clear(), "names no stage")])
def test_frozen_file_is_checked(change, says, tmp_path):
    cfg = compose("train_sft").cfg
    change(cfg)
    with pytest.raises(UserError, match=says): load_frozen(save_frozen(cfg, tmp_path / "c.yaml"))


def test_frozen_file_that_is_no_yaml(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe: [")
    with pytest.raises(UserError): load_frozen(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['touch x']")
    with pytest.raises(UserError): load_frozen(tmp_path / "c.yaml")
    with pytest.raises(UserError): load_frozen(tmp_path)
    assert yaml.safe_load(save_frozen(compose("train_sft").cfg, tmp_path / "c.yaml").read_text())["stage"] == "train_sft"
