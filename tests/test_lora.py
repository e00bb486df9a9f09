"Adapters: the trainer against an fp64 oracle that multiplies the matrices out, what a checkpoint holds and who can load it, resuming, and what a user gets wrong"
import copy
import json
import sys
from functools import lru_cache

import pytest
import test_preference as pairs
import test_resume
import torch
from oracle import oracle
from safetensors.torch import load_file
from test_trainer_equivalence import start_ranks, steps
from trainer_worker import ROWS, adapted, make_model, make_rows, rate

from post_training import run
from post_training.core.files import verify_manifest

LORA = dict(lora_r=4, lora_alpha=16, lora_dropout=0.0)
SFT = {"plw": dict(name="plw", prompt_loss_weight=0.1), "irl": dict(name="irl", prompt_loss_weight=0.1, lambda_td=0.3, gamma=0.9)}
PAIRS = {"qrpo": dict(loss_type="qrpo", beta=0.2), "sigmoid": dict(loss_type="sigmoid", beta=0.3), "free": pairs.OBJECTIVES["free"]}
CHECKPOINTING = dict(activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=False))
DEEPSPEED = dict(ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
                 ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")


def start(whole):
    "Names, values and scale: the base in fp64, A and B by layer, matrices that are trained whole"
    model = adapted(make_model(), dict(lora=LORA | (dict(lora_modules_to_save=["lm_head"]) if whole else {})))
    ab = {n.removeprefix("base_model.model.").replace(".default", ""): p.detach().double().requires_grad_() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    base = make_model().double().requires_grad_(False)
    return base, ab, {"lm_head.weight": base.lm_head.weight.detach().clone().requires_grad_()} if whole else {}


def multiplied(base, ab, whole):
    "Weights of the plain model that the adapters make"
    out = dict(base.named_parameters()) | whole
    for name in [n for n in ab if ".lora_A." in n]:
        target = name.replace(".lora_A.", ".")
        out[target] = out[target] + LORA["lora_alpha"] / LORA["lora_r"] * ab[name.replace("lora_A", "lora_B")] @ ab[name]
    return out


@lru_cache
def expected(name, whole=False):
    "Losses, gradient norms, evaluation losses, plain weights and adapters of plain SGD in fp64"
    base, ab, full = start(whole)
    sft, rows = name in SFT, make_rows() if name in SFT else pairs.make_pairs()
    lr = rate(SFT[name]) if sft else pairs.RATE
    def loss_of(step):
        weights = multiplied(base, ab, full)
        def model(**kw): return torch.func.functional_call(base, weights, kwargs=kw)
        if not sft: return pairs.pair_oracle(model, [rows[i] for i in step], PAIRS[name])
        o = dict(SFT[name])
        return oracle(o.pop("name"), model, [(rows[i]["input_ids"], rows[i]["completion_mask"]) for i in step], **o)
    losses, norms, evals, trained = [], [], [], [*ab.values(), *full.values()]
    for n, step in enumerate(steps() if sft else pairs.steps(), 1):
        loss = loss_of(step)
        grads = torch.autograd.grad(loss, trained)
        losses.append(loss.item())
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        with torch.no_grad():
            for p, g in zip(trained, grads): p -= lr * g
            if n % 3 == 0: evals.append(loss_of(range(ROWS)).item())
    return losses, norms, evals, {k: v.detach() for k, v in multiplied(base, ab, full).items()}, {k: v.detach() for k, v in (ab | full).items()}


def check(case, folder, tol=3e-5):
    "Losses, norms, the merged model and the adapter of a case are those of the oracle; what is frozen has not moved"
    losses, norms, evals, weights, adapters = expected(case["objective_name"], bool(case["lora"].get("lora_modules_to_save")))
    lines = json.loads((folder / "lines.json").read_text())
    train = [line for line in lines if "loss" in line]
    for key, want, have in (("loss", losses, train), ("grad_norm", norms, train), ("eval_loss", evals, [line for line in lines if "eval_loss" in line])):
        torch.testing.assert_close(torch.tensor([line[key] for line in have]), torch.tensor(want), rtol=10 * tol, atol=tol, msg=lambda m: f"{case['name']}: {key}: {m}")
    last, base = folder / f"checkpoint-{len(losses)}", make_model().state_dict()
    saved, adapter = load_file(last / "model.safetensors"), load_file(last / "adapter/adapter_model.safetensors")
    assert set(saved) == set(base) and {n.removeprefix("base_model.model.") for n in adapter} == set(adapters)
    assert json.loads((last / "manifest.json").read_text())["merged"]["largest_difference"] < 1e-4, "compared with the adapters' model before it was written, under each engine"
    moved = {n for n in saved if not torch.equal(saved[n], base[n])}
    assert moved == {n.replace(".lora_A", "") for n in adapters if ".lora_B" not in n}, "trained: the layers with adapters, and what is trained whole"
    for n, w in weights.items(): torch.testing.assert_close(saved[n].double(), w, rtol=0, atol=tol, msg=lambda m: f"{case['name']}: {n}: {m}")
    for n, w in adapters.items(): torch.testing.assert_close(adapter[f"base_model.model.{n}"].double(), w, rtol=0, atol=tol, msg=lambda m: f"{case['name']}: {n}: {m}")


def sft(name, cut, per_device, accumulation, **more):
    return dict(name=f"{name}-{cut}", objective_name=name, objective=SFT[name], per_device=per_device, accumulation=accumulation, lora=LORA, **more)


def pref(name, cut, per_device, accumulation, **more):
    return dict(name=f"{name}-{cut}", objective_name=name, args=PAIRS[name] | more.pop("args", {}), per_device=per_device, accumulation=accumulation, lora=LORA, **more)


def run_all(tmp_path, cases, world=1, env=None):
    "Run cases of both stages and compare each"
    for script, todo in (("trainer_worker.py", [c for c in cases if c["objective_name"] in SFT]), ("preference_worker.py", [c for c in cases if c["objective_name"] in PAIRS])):
        if not todo: continue
        (tmp_path / "cases.json").write_text(json.dumps(todo))
        start_ranks(world, [tmp_path / "cases.json", tmp_path], env, script=script)
        for case in todo: check(case, tmp_path / case["name"])


def test_one_process(tmp_path):
    run_all(tmp_path, [sft("plw", "whole", 4, 1), sft("plw", "packed", 2, 2, packed=True, args=CHECKPOINTING), sft("irl", "left", 1, 4, side="left"),
                       sft("plw", "head", 4, 1) | dict(lora=LORA | dict(lora_modules_to_save=["lm_head"])),
                       pref("qrpo", "left", 1, 4, side="left"), pref("sigmoid", "checkpointing", 4, 1, args=CHECKPOINTING), pref("free", "packed", 2, 2, packed=True)])


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_all(tmp_path, [sft("plw", "two", 1, 2), pref("qrpo", "two", 2, 1, packed=True, args=CHECKPOINTING)], world=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])  # two is what the killed run below is under
def test_deepspeed(tmp_path, stage):
    whole = LORA | dict(lora_modules_to_save=["lm_head"])
    run_all(tmp_path, [sft("irl", "two", 1, 2), sft("plw", "head", 1, 2) | dict(lora=whole), sft("plw", "checkpointing", 1, 2, args=CHECKPOINTING), pref("qrpo", "two", 1, 2)],
            world=2, env=DEEPSPEED | dict(ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_resuming_under_deepspeed(tmp_path, stage):
    "From the checkpoint in the middle to the same numbers"
    env, case = DEEPSPEED | dict(ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage)), sft("plw", "whole", 1, 2, args=dict(save_strategy="steps", save_steps=4, optim="adamw_torch"))
    case["lora"] = LORA | dict(lora_dropout=0.1, use_dora=stage == 2)
    for more in ({}, dict(name="plw-again", resume=str(tmp_path / "plw-whole/checkpoint-4"))):
        (tmp_path / "cases.json").write_text(json.dumps([case | more]))
        start_ranks(2, [tmp_path / "cases.json", tmp_path], env)
    last = [tmp_path / name / "checkpoint-6" for name in ("plw-whole", "plw-again")]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"): assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file


# -- whole runs

QUICK = ["dataset_args.debug_subsample.train=40", "dataset_args.debug_subsample.eval=8", "cluster.device=cpu", "global_batch_size=8", "training_args.max_length=96",
         "training_args.per_device_train_batch_size=4", "training_args.max_steps=3", "wandb.mode=disabled", "training_args.learning_rate=1e-2",
         "model_args.use_peft=true", "model_args.lora_r=4"]


def finished(stage, *overrides):
    "Run a stage here; its folder, its record and its last checkpoint"
    import importlib

    from post_training import config
    assert getattr(importlib.import_module(f"post_training.{stage}"), f"{stage}_main")([*QUICK, *overrides]) == 0
    folder = run.run_folder(config.compose(stage, [*QUICK, *overrides]).cfg)
    record = run.read_record(folder)
    return folder, record, run.newest_verified(record["checkpoints_dir"])[0]


def test_the_road(demo, tmp_path, monkeypatch, capfd):
    "SFT with adapters; its checkpoint is a plain model, which preference training with adapters begins with; the reference is the policy with its adapters off"
    from peft import PeftModel

    from post_training.models.load import load_model
    from post_training.models.score import add_score_head
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    folder, record, path = finished("train_sft", f"artifacts_subdir={tmp_path.name}")
    facts = record["adapters"]
    assert facts["modules"] == ["down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"] and facts["trained_parameters"] == 4 * 2 * (8 * 128 + 2 * (128 + 512))
    merged, base, ids = load_model(path).eval(), load_model(demo / "models/tiny").eval(), torch.arange(20, 60).view(2, 20)
    def score(m): return add_score_head(m)(input_ids=ids, labels=ids, score=True).log_probs
    alone = score(base)
    beside = score(PeftModel.from_pretrained(copy.deepcopy(base), str(path / "adapter")).eval())
    assert (score(merged) - beside).abs().max() < 1e-5 and (alone - beside).abs().max() > 0.01
    name = json.loads((path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == "tiny", "no folder of this machine"
    then, told, second = finished("train_preference", f"artifacts_subdir={tmp_path.name}", f"model_args.model_name_or_path=run:{folder.name}", "training_args.ref_logprobs_from_dataset=false",
                            "training_args.loss_type=sigmoid")
    assert told["reference"].endswith("its adapters off") and abs(told["reference_check"]) < 1e-5
    first = run.read_metrics(then)[0]
    assert abs(first["chosen_log_ratio"]) < 1e-5 and first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert not verify_manifest(second) and (score(load_model(second).eval()) - score(merged)).abs().max() > 1e-3


WRONG = {  # overrides, words of the message
    "no such module": (["model_args.lora_target_modules=[q_proj,up_prj]"], ["no module 'up_prj'", "Did you mean 'up_proj'", "down_proj, k_proj, o_proj, q_proj, up_proj, v_proj"]),
    "the head": (["model_args.lora_target_modules=[q_proj,lm_head]"], ["names the head (lm_head)"]),
    "rank 0": (["model_args.lora_r=0"], ["model_args.lora_r=0", "at least 1"]),
    "dropout 1": (["model_args.lora_dropout=1.0"], ["at least 0 and below 1"]),
    "four bits": (["model_args.load_in_4bit=true"], ["load it in bfloat16"]),
    "adapters not asked for": (["model_args.use_peft=false"], ["model_args.lora_r=4 is not read", "use_peft=true"]),
    "misspelt": (["model_args.lora_rank=8"], ["lora_rank"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told(case, demo, tmp_path, monkeypatch, capfd):
    from post_training import train_sft
    overrides, words = WRONG[case]
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    assert train_sft.train_sft_main([*QUICK, f"artifacts_subdir={tmp_path.name}", *overrides]) == 2
    err = capfd.readouterr().err
    for word in words: assert word in err, (word, err)
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ds-zero2"])
def test_killed_and_resumed(tmp_path, demo, monkeypatch, how):
    "kill -9 in a save and between steps: the same lines, and the same bytes of weights, adapter and optimizer"
    more = ["model_args.use_peft=true", "model_args.lora_r=4", "model_args.lora_dropout=0.1", "training_args.learning_rate=1e-3"]
    monkeypatch.setattr(test_resume, "COMMANDS", {k: [*c[:3], *more, *c[3:]] for k, c in test_resume.COMMANDS.items()})
    whole, cut = test_resume.Place(tmp_path / "whole", demo), test_resume.Place(tmp_path / "cut", demo)
    whole.finish(how)
    assert cut.kill_when(how, test_resume.during_a_save(cut, 6))
    assert cut.kill_when(how, test_resume.after_lines(cut, 2))
    cut.finish(how)
    test_resume.assert_same(whole, cut)
    assert sys.getsizeof(cut.lines()) and (cut.checkpoints / f"checkpoint-{test_resume.STEPS}/adapter/adapter_model.safetensors").is_file()
