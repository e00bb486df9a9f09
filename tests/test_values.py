"Every value that a key may be given is accepted with a meaning or refused by name; what the worker's libraries refuse is refused when it is composed"
import functools
import inspect
import json
import math
import os
import signal
from contextlib import contextmanager

import pytest
import yaml

from post_training.config import schema
from post_training.config.batch import ACCELERATE_KEYS, DEEPSPEED_KEYS
from post_training.config.compose import check_names, compose, load_frozen
from post_training.config.preference_losses import check_preference_args
from post_training.config.refusals import ATTENTIONS, SCHEDULE_ARGS, RunFacts, check_combinations, optimizer_library
from post_training.config.schema import check_config, check_allowed, check_ranges, get_key, set_key, stage_keys
from post_training.core.files import UserError
from post_training.core.yaml_files import read_yaml

HOSTILE = [0, -1, -5, 0.5, 1.5, 1e30, -1e30, 99999999999999999999, math.nan, math.inf, "abc", "", True, [1], {"a": 1}]
MEANT = {  # numbers at the end of their range that have a meaning: key -> what is not refused
    0: {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha",
        "eval_delay", "label_smoothing_factor", "ld_alpha", "label_smoothing", "lora_dropout", "f_alpha_divergence_coef", "temperature", "tasks"},
    -1: {"max_steps"}}


@contextmanager
def seconds(n):
    def stop(*_): raise TimeoutError(f"more than {n} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(n)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(key, name, value):
    "Types, ranges and patterns of one key; the message names it"
    cfg = {}
    set_key(cfg, name, value)
    keys = {name: key}
    try:
        cfg = check_config(cfg, {name: key.types})
        check_ranges(cfg, keys)
        check_allowed(cfg, keys)
    except UserError as e:
        assert name in str(e), (name, value, str(e))
        assert len(str(e)) < 700
        return True
    return False


@pytest.mark.parametrize("stage", schema.STAGES)
def test_every_number_has_bounds(stage):
    "No number is without a lower and an upper bound, and outside of them it is refused by name"
    for name, key in stage_keys(stage).items():
        kinds = {*key.types.split("|")} & {"int", "float"}
        if not kinds or not key.read and not key.allowed: continue
        assert math.isfinite(key.high) and (math.isfinite(key.low) or key.allowed), f"{name} has no bound"
        for value in HOSTILE:
            if not refused(key, name, value) and isinstance(value, (int, float)) and not isinstance(value, bool):
                assert key.low <= value <= key.high or value in key.also or value in key.allowed, (name, value)
        if not key.allowed and key.low >= 0: assert refused(key, name, -1) or -1 in key.also, name
        assert refused(key, name, math.nan) and refused(key, name, 1e30) and refused(key, name, {"a": 1}), name


TYPED = [  # overrides that were tracebacks of the worker, hangs, or trained on with a meaning that nobody said
    ("train_sft", f"training_args.{k}") for k in (
        "learning_rate=-1", "num_train_epochs=0", "warmup_steps=-1", "warmup_steps=1.5", "logging_steps=0", "logging_steps=2.5", "seed=-1", "max_steps=0",
        "max_steps=-5", "weight_decay=-1", "max_grad_norm=-1", "save_steps=-1", "eval_steps=0", "max_length=-1", "max_length=0", "save_total_limit=0",
        "learning_rate=nan", "learning_rate=1e30", "pad_to_multiple_of=abc", "debug=abc", "torch_compile_backend=abc", "torch_compile_mode=fast",
        "lr_scheduler_kwargs=abc", "gradient_accumulation_steps=0", "dataloader_num_workers=-1")] + [
    ("train_sft", "global_batch_size=99999999999999999999"), ("train_sft", "num_nodes=99999999999999999999"), ("train_sft", "num_processes=99999999999999999999"),
    ("train_sft", "resuming.ignore_keys=[1]"), ("train_sft", "resuming.ignore_keys=[{a: 1}]"), ("train_sft", "wandb.tags=[[1]]"),
    ("train_sft", "runs_dir=/dev/null"), ("train_sft", "runs_dir=/proc/mine"), ("train_sft", "artifacts_dir=/dev/null/a"), ("train_sft", f"job_subdir={'x' * 300}"),
    ("train_sft", f"dataset_name={'x' * 300}"), ("train_sft", f"dataset_args.dataset_name=/a/{'y' * 300}"), ("train_sft", "artifacts_dir=/" + "a/" * 3000),
    ("train_sft", f"model_args.model_name_or_path={'x' * 300}"), ("train_sft", 'dataset_args.dataset_name="a\x00b"'), ("train_sft", "wandb.project=a/b"),
    ("train_sft", "wandb.run_id=a/b"), ("train_sft", f"wandb.tags=[{'t' * 65}]"), ("train_sft", "model_args.lora_target_modules=[[1]]"),
    ("train_preference", "training_args.loss_weights=[x]"), ("train_preference", "training_args.beta=-1"), ("train_preference", "training_args.discopop_tau=0"),
    ("evaluate", "measure=[accurcy]"), ("evaluate", "checkpoints=[1,1]"), ("export", "max_shard_size=5"), ("export", "push_to_hub=a"),
    ("ref_completions", "generation.n=0"), ("ref_completions", "generation.top_p=0"), ("model_merging", "weights=[a]"), ("model_merging", "options.out_shard_size=abc")]
STARTS = {"ref_completions": ["model=tiny"]}


@pytest.mark.parametrize("stage, typed", TYPED, ids=[t[:60].replace("\x00", "0") for _, t in TYPED])
def test_a_hostile_value_is_refused_by_name(stage, typed):
    with seconds(20), pytest.raises(UserError) as e: compose(stage, [*STARTS.get(stage, []), typed])
    assert typed.partition("=")[0] in str(e.value) or "grammar cannot read" in str(e.value), str(e.value)


def test_lists_of_the_data_stages_have_typed_elements():
    for name, key in stage_keys("dataset_mixture").items():
        if key.types.startswith("list[str]"): assert refused(key, name, [1]) and refused(key, name, [[]]), name


def test_a_file_in_the_way_and_a_link_to_nowhere(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    cfg = compose("train_sft").cfg
    for path in (tmp_path / "file", tmp_path / "file/a/b", tmp_path / "gone"):
        with pytest.raises(UserError, match="runs_dir=.* is not a folder|runs_dir=.*Not a directory"): check_names(cfg | dict(runs_dir=str(path)))
    check_names(cfg | dict(runs_dir=str(tmp_path / "new/a")))


# -- what the libraries of the worker refuse

@functools.cache
def evaluating(): return json.dumps(compose("train_sft", ["training_args.eval_strategy=epoch"]).cfg)


def training_config(**args):
    base = json.loads(evaluating())
    return base | dict(training_args={**base["training_args"], **args})


def composes(cfg):
    "Whether values and combinations are accepted, for a run here"
    try:
        check_ranges(cfg, stage_keys("train_sft"))
        check_allowed(cfg, stage_keys("train_sft"))
        check_combinations(cfg, RunFacts("single", "cpu", None, True))
    except UserError: return False
    return True


def test_each_optimizer_that_composes_can_be_built(tmp_path):
    "transformers builds every optimizer that is accepted; those it cannot build are refused, and so are unknown optim_args"
    import torch
    from transformers import Trainer
    from post_training.training.arguments import sft_config
    from post_training.training.optim import optimizer_for
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    names = [c[1:] for c in stage_keys("train_sft")["training_args.optim"].types.split("|") if c[0] == "="]
    accepted = []
    for name in names:
        for args in (None, "momentum=0.9", "momentun=0.9", "x"):
            cfg = training_config(optim=name, optim_args=args, optim_target_modules=["all-linear"] if "galore" in name or "apollo" in name else None)
            if not composes(cfg): continue
            t = dict(cfg["training_args"], gradient_accumulation_steps=1)
            if optimizer_for(name, 10, learning_rate=0.1) is None:
                kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(sft_config(t, tmp_path, cpu=True), layer)
                kwargs.setdefault("params", layer.parameters())
                kind(**kwargs)
            accepted.append(name)
    assert {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "ademamix", "adagrad", "rmsprop"} <= {*accepted}
    assert not {n for n in accepted if optimizer_library(n)[0]}  # none of these libraries is a requirement of this project


def test_each_schedule_that_composes_can_be_built():
    "Each schedule with each argument of any schedule: what is accepted runs, and the table of arguments is that of the functions"
    import torch
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
    kinds = {k.value: f for k, f in TYPE_TO_SCHEDULER_FUNCTION.items()}
    fixed = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    for name, function in kinds.items():
        if name in SCHEDULE_ARGS and "kwargs" not in inspect.signature(function).parameters:
            assert {*inspect.signature(function).parameters} - fixed == {*SCHEDULE_ARGS[name]}, name
    values = [{}, *({a: v} for args in SCHEDULE_ARGS.values() for a in args for v in (0.1, "linear")), dict(num_decay_steps=2), dict(min_lr=0.1, min_lr_rate=0.1)]
    built = set()
    for name in kinds:
        for args in values:
            if not composes(training_config(lr_scheduler_type=name, lr_scheduler_kwargs=args)): continue
            optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.5)
            if name in ("constant", "constant_with_warmup") and args: continue  # arguments of these two are not read
            get_scheduler(name, optimizer, 2, 10, args or None)
            built.add(name)
    assert built == {*kinds}


def test_tables_are_those_of_the_libraries():
    from accelerate.commands.config.config_args import ClusterConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    assert {*ClusterConfig.__dataclass_fields__} <= {*ACCELERATE_KEYS}
    assert {a for a in ALL_ATTENTION_FUNCTIONS if "|" not in a} | {"auto", "eager"} == {*ATTENTIONS}
    assert {"zero_stage", "offload_optimizer_device", "zero3_save_16bit_model"} <= {*DEEPSPEED_KEYS}


def test_the_workers_own_checks_accept_what_composes(tmp_path):
    "The functions of the worker that look at the config alone, on every choice of every key that composes"
    from post_training.stages.evaluate import check_evaluation_config
    from post_training.training.arguments import sft_config
    from post_training.training.lora import lora_config
    base = training_config()
    for name, key in stage_keys("train_sft").items():
        if not name.startswith(("training_args.", "model_args.")) or {"several", "ddp", "peft"} & {*key.when.split()}: continue
        choices = [k[1:] for k in key.types.split("|") if k[0] == "="] + [True, False] * ("bool" in key.types)
        for value in choices:
            cfg = json.loads(json.dumps(base))
            set_key(cfg, name, value)
            if not composes(cfg): continue
            sft_config(dict(cfg["training_args"], gradient_accumulation_steps=1), tmp_path, cpu=True)
            lora_config(cfg["model_args"])
    for extra in ([], ["measure=[perplexity]"], ["checkpoints=[a,b]"], ["evaluation.temperature=1", "evaluation.samples=3"]):
        check_evaluation_config(compose("evaluate", extra).cfg)
    check_preference_args(compose("train_preference", ["dataset=demo-pairs"]).cfg["training_args"])


# -- YAML from outside

BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
FILES = {  # content, what is said
    "bomb": (BOMB, "nodes"), "depth": ("a: " + "[" * 3000, "levels"), "self": ("a: &x {b: *x}\n", "refers to itself"), "twice": ("a: 1\nb: 2\na: 3\n", "line 3"),
    "latin": ("a: ä\n".encode("latin-1"), "UTF-8"), "utf16": ("a: 1\n".encode("utf-16"), "UTF-8"), "binary": (bytes(range(256)), "line"), "number": ("7\n", "contains no keys"),
    "text": ("hello\n", "contains no keys"), "list": ("- 1\n", "contains no keys"), "python": ("a: !!python/object/apply:os.system [ls]\n", "line 1"), "tab": ("a:\n\tb: 1\n", "line 2"),
    "open": ("a: [1, 2\nb: 3\n", "line 2"), "null": ("a: \x00\n", "line 1"), "documents": ("a: 1\n---\nb: 1\n", "documents"), "large": (b"#" * (2**22 + 1), "bytes")}


@pytest.mark.parametrize("name", FILES)
def test_yaml_from_outside_is_refused_with_its_line(name, tmp_path):
    "As a preset, a mixture, an accelerate file, a layer of a stage, an experiment and a frozen config: one line that names the file, in a second"
    content, says = FILES[name]
    data = content if isinstance(content, bytes) else content.encode()
    for sub in ("model", "accelerate", "experiment"): (tmp_path / sub).mkdir()
    for path in ("model/mine.yaml", "accelerate/mine.yaml", "experiment/mine.yaml", "mixture.yaml", "config.yaml"): (tmp_path / path).write_bytes(data)
    calls = [lambda: compose("train_sft", ["model=mine"], config_dir=tmp_path), lambda: compose("train_sft", [f"accelerate_config={tmp_path}/accelerate/mine.yaml"]),
             lambda: compose("train_sft", ["experiment=mine"], config_dir=tmp_path), lambda: compose("dataset_mixture", [f"mixture={tmp_path}/mixture.yaml"]),
             lambda: load_frozen(tmp_path / "config.yaml"), lambda: compose("train_sft", [str(tmp_path / "config.yaml")])]
    for call in calls:
        with seconds(20), pytest.raises(UserError) as e: call()
        assert says in str(e.value) and "mi" in str(e.value) or "config.yaml" in str(e.value), str(e.value)
        assert len(str(e.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    for call in (lambda: compose("train_sft", [str(tmp_path / "config.yaml")]), lambda: compose("train_sft", [f"accelerate_config={tmp_path}/config.yaml"])):
        with seconds(20), pytest.raises(UserError): call()


@pytest.mark.parametrize("content, says", [
    ("a: 1\n", "a is not a key of accelerate's format"), ("distributed_type: DEEPSPED\n", "distributed_type=DEEPSPED is not supported"), ("num_processes: 2\n", "names no distributed_type"),
    ("distributed_type: DEEPSPEED\n", "needs deepspeed_config"), ("distributed_type: DEEPSPEED\ndeepspeed_config: 3\n", "a mapping of keys"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 7}\n", "zero_stage=7"), ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n", "zero3_save_16bit_model"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stge: 2}\n", "Did you mean 'zero_stage'"), ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: a.json}\n", "deepspeed_config_file"),
    ("distributed_type: 'NO'\nnum_processes: many\n", "num_processes=many"), ("distributed_type: 'NO'\nfsdp_config: {a: 1}\n", "fsdp_config"), ("distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 2}\n", "is not read")])
def test_a_file_of_accelerate_is_checked(content, says, tmp_path):
    (tmp_path / "acc.yaml").write_text(content)
    with pytest.raises(UserError) as e: compose("train_sft", [f"accelerate_config={tmp_path}/acc.yaml"])
    assert says in str(e.value) and "accelerate_config=" in str(e.value), str(e.value)


def test_shipped_files_are_read_by_the_reader():
    for path in schema.CONFIGS.rglob("*.yaml"):
        assert read_yaml(path) == yaml.safe_load(path.read_text()), path
    assert get_key(read_yaml(schema.CONFIGS / "setup.yaml"), "wandb.system_metrics") is True


def worker_checks():
    "stage -> (the worker's check of its config, overrides that compose, values that it refuses)"
    from post_training.preferences.completions import check_sampling
    from post_training.stages.evaluate import check_evaluation_config
    from post_training.stages.output import check_output
    from post_training.training.lora import lora_config
    from post_training.training.optim import ademamix_optimizer
    def sampling(cfg): check_sampling(**{k: cfg["generation"][k] for k in ("n", "max_new_tokens", "temperature", "top_p")})
    def adapters(cfg): lora_config(cfg["model_args"])
    def ademamix(cfg): ademamix_optimizer(10, 0.1, optim_args=cfg["training_args"].get("optim_args"))
    def objective(cfg): check_preference_args(cfg["training_args"], cfg["ref_model_args"]["model_name_or_path"])
    return [
        ("evaluate", check_evaluation_config, [], ["measure=[]", "checkpoints=[a,a]", "checkpoints=[a,'']", "evaluation.samples=3 evaluation.temperature=0",
                                                   "measure=[speed]", "lm_eval.tasks=[x] checkpoints=['https://h']"]),
        ("ref_completions", sampling, ["model=tiny"], ["generation.n=0", "generation.temperature=-1", "generation.top_p=0", "generation.top_p=1.5",
                                                       "generation.n=2 generation.temperature=0", "generation.max_new_tokens=0"]),
        ("pairs", check_output, [], ["save_data_dir=rows.jsonl", "save_data_dir=a/rows.parquet"]),
        ("train_sft", adapters, ["model_args.use_peft=true"], ["model_args.lora_r=0", "model_args.lora_alpha=0", "model_args.lora_dropout=1", "model_args.load_in_4bit=true",
                                                               "model_args.load_in_8bit=true", "model_args.lora_task_type=SEQ_CLS", "model_args.lora_target_parameters=[x]"]),
        ("train_sft", ademamix, ["training_args.optim=ademamix"], ["training_args.optim_args='alpah=1'", "training_args.optim_args='alpha=x'", "training_args.optim_args='t_alpha=3'"]),
        ("train_preference", objective, ["dataset=demo-pairs"], [
            "training_args.use_weighting=true", "training_args.sync_ref_model=true", "training_args.truncation_mode=keep_end", "training_args.beta=0", "training_args.num_ref_rewards=0",
            "training_args.loss_type=[sigmoid,sigmoid]", "training_args.loss_type=[]", "training_args.loss_type=[sigmoid] training_args.loss_weights=[0]",
            "training_args.loss_type=ipo training_args.normalize_beta_by_length=true", "training_args.loss_type=aot training_args.f_divergence_type=js_divergence",
            "training_args.loss_type=robust training_args.label_smoothing=0.5", "training_args.loss_type=qrpo training_args.ld_alpha=0.5", "ref_model_args.model_name_or_path=a training_args.ref_logprobs_from_dataset=true"])]


def test_nothing_that_a_worker_refuses_from_its_config_composes(tmp_path, monkeypatch):
    "Each value is refused by the worker's own check, and when it is typed"
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(tmp_path))  # no dataset of another test is in the way
    from post_training.config.overrides import parse_override
    for stage, check, base, refused_values in worker_checks():
        cfg = json.dumps(compose(stage, base).cfg)
        check(json.loads(cfg))
        for values in refused_values:
            odd = json.loads(cfg)
            for o in map(parse_override, values.split()): set_key(odd, o.key, o.value)
            with pytest.raises(UserError): check(odd)
            with pytest.raises(UserError): compose(stage, [*base, *values.split()])


def test_values_that_no_worker_has_are_refused_for_the_machine_of_the_cluster(monkeypatch):
    "The device that a cluster preset has decides; here the launcher looks at this machine before anything is written"
    from post_training.launch import accelerate
    for values in (["training_args.fp16=true"], ["training_args.tf32=true"], ["model_args.attn_implementation=flex_attention"], ["model_args.attn_implementation=flash_attention_2"]):
        start = ["cluster=slurm", "accelerate_config=ddp", "cluster.device=cpu", "cluster.gpus_per_node=1"]
        with pytest.raises(UserError, match="The device is a CPU"): compose("train_sft", [*start, *values])
        c = compose("train_sft", values)
        monkeypatch.setattr(accelerate, "device_of", lambda cfg: "cpu")
        with pytest.raises(UserError, match="The device is a CPU"): accelerate.check_launch(c.cfg)
    for optim in ("lomo", "adamw_8bit", "galore_adamw", "schedule_free_adamw"):
        with pytest.raises(UserError, match="training_args.optim="): compose("train_sft", [f"training_args.optim={optim}"])
