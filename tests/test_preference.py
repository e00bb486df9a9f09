"Preference training against an fp64 oracle and against TRL's own trainer: any cut of the global batch trains the same model; what is wrong with pairs is told"
import copy
import json
import math
from functools import lru_cache

import pytest
import torch
from preference_worker import GLOBAL_BATCH, RATE, ROWS, make_pairs, other_model
from test_trainer_equivalence import start_ranks
from trainer_worker import make_model

from post_training.training.data_order import row_order

OBJECTIVES = {
    "qrpo": dict(loss_type="qrpo", beta=0.2),
    "qrpo-long": dict(loss_type="qrpo", beta=0.5, normalize_beta_by_length=True, normalize_loss_by_length=True),
    "qrpo-finite": dict(loss_type="qrpo", beta=0.3, partition="finite"),
    "sigmoid": dict(loss_type="sigmoid", beta=0.3),
    "sigmoid-long": dict(loss_type="sigmoid", beta=0.8, normalize_beta_by_length=True, normalize_loss_by_length=True),
    "free": dict(loss_type=["simpo", "orpo", "cpo"], loss_weights=[1.0, 0.5, 0.7], beta=1.5, simpo_gamma=0.4, cpo_alpha=0.6),
    "mixed": dict(loss_type=["sigmoid", "qrpo", "sft"], loss_weights=[0.7, 0.5, 0.1], beta=0.3),
}
ONE = {"whole": (4, 1, {}), "left": (1, 4, dict(side="left")), "packed": (2, 2, dict(packed=True))}
TWO = {"two": (1, 2, {}), "two.packed": (2, 1, dict(packed=True))}


def steps():
    "The rows of each optimizer step of two epochs, the last step of each smaller"
    orders = [row_order(ROWS, 9, epoch) for epoch in range(2)]
    return [o[i : i + GLOBAL_BATCH].tolist() for o in orders for i in range(0, ROWS, GLOBAL_BATCH)]


def logprob(model, row, side):
    "Log-probability of an answer from full logits in fp64, and its number of tokens"
    ids, n = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
    logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    picked = [logps[n + t - 1, ids[n + t]] for t, scored in enumerate(row[f"{side}_scored"]) if scored]
    return sum(picked), len(picked)


def share_below(row, side, finite):
    "The quantile of an answer and the number of references behind it, written out"
    refs, reward = list(row["ref_rewards"]), row[f"{side}_reward"]
    if finite and row[f"{side}_is_reference"]: refs.remove(reward)
    return sum(r <= reward for r in refs) / len(refs), len(refs)


def qrpo_of(logp, ref, n, quantile, refs, o):
    "QRPO of one answer, from the paper's formula"
    beta = o["beta"] / n if o.get("normalize_beta_by_length") else o["beta"]
    if o.get("partition") == "finite": z = sum(math.exp(k / refs / beta) for k in range(refs + 1)) / (refs + 1)
    else: z = beta * (math.exp(1 / beta) - 1)
    return (quantile - beta * math.log(z) - beta * (logp - ref)) ** 2 / (n if o.get("normalize_loss_by_length") else 1)


def reference_free(name, c, nc, r, nr, o):
    "SimPO, CPO or ORPO of one pair without the likelihood of the chosen answer, from the papers' formulas"
    if name == "simpo": return torch.log1p(torch.exp(-(o["beta"] * c / nc - o["beta"] * r / nr - o["simpo_gamma"])))
    if name == "cpo": return torch.log1p(torch.exp(-o["beta"] * (c - r)))
    odds = [p / (1 - p) for p in (torch.exp(c / nc), torch.exp(r / nr))]
    return -o["beta"] * torch.log(1 / (1 + odds[1] / odds[0]))


def pair_oracle(model, rows, o):
    "The loss of one optimizer step, an fp64 scalar with gradient"
    names = o["loss_type"] if isinstance(o["loss_type"], list) else [o["loss_type"]]
    weights, sums, counts = o.get("loss_weights", [1.0] * len(names)), [0.0] * len(names), [0] * len(names)
    likelihood, tokens = 0.0, 0
    for row in rows:
        (c, nc), (r, nr) = (logprob(model, row, s) for s in ("chosen", "rejected"))
        rc, rr = row["ref_chosen_logprob"], row["ref_rejected_logprob"]
        bc, br = (o["beta"] / n if o.get("normalize_beta_by_length") else o["beta"] for n in (nc, nr))
        for k, name in enumerate(names):
            if name == "qrpo":
                both = [(c, rc, nc, *share_below(row, "chosen", "partition" in o)), (r, rr, nr, *share_below(row, "rejected", "partition" in o))]
                sums[k], counts[k] = sums[k] + sum(qrpo_of(*x, o) for x in both), counts[k] + 2
            elif name in ("simpo", "cpo", "orpo"): sums[k], counts[k] = sums[k] + reference_free(name, c, nc, r, nr, o), counts[k] + 1
            elif name == "sft": sums[k], counts[k] = sums[k] - c, counts[k] + nc
            else:
                loss = torch.log1p(torch.exp(-(bc * (c - rc) - br * (r - rr))))
                sums[k], counts[k] = sums[k] + loss / ((nc + nr) / 2 if o.get("normalize_loss_by_length") else 1), counts[k] + 1
        likelihood, tokens = likelihood - c, tokens + nc
    parts = [s / n + dict(orpo=1, cpo=o.get("cpo_alpha", 1)).get(name, 0) * likelihood / tokens for s, n, name in zip(sums, counts, names)]
    return sum(w * x for w, x in zip(weights, parts))


@lru_cache
def expected(objective, computed=False):
    "Losses, gradient norms, evaluation losses and final weights of plain SGD in fp64, one answer after the other"
    model, rows, o = make_model().double(), make_pairs(), OBJECTIVES[objective]
    if computed:
        with torch.no_grad():
            for row in rows: row |= {f"ref_{s}_logprob": logprob(other_model().double(), row, s)[0].item() for s in ("chosen", "rejected")}
    losses, norms, evals = [], [], []
    for n, step in enumerate(steps(), 1):
        model.zero_grad()
        loss = pair_oracle(model, [rows[i] for i in step], o)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None: p -= RATE * p.grad
            if n % 3 == 0: evals.append(pair_oracle(model, rows, o).item())
    return losses, norms, evals, copy.deepcopy(model.state_dict())


def cases(cuts, objectives=OBJECTIVES, **more):
    "Every objective under every cut"
    return [dict(name=f"{o}_{cut}", objective=o, args=OBJECTIVES[o], per_device=b, accumulation=a, **kw, **more) for o in objectives for cut, (b, a, kw) in cuts.items()]


def check(case, folder, world=1, tol=3e-5):
    "Rows, losses, norms and weights of a case are those of the oracle"
    from safetensors.torch import load_file

    losses, norms, evals, weights = expected(case["objective"], case.get("computed", False))
    ranks = [json.loads((folder / f"seen-{r}.json").read_text()) for r in range(world)]
    assert [sorted(i for r in ranks for i in r[s]) for s in range(len(ranks[0]))] == [sorted(s) for s in steps()], "no row twice, none left out"
    lines = json.loads((folder / "lines.json").read_text())
    train = [line for line in lines if "loss" in line]
    for key, want in (("loss", losses), ("grad_norm", norms)):
        torch.testing.assert_close(torch.tensor([line[key] for line in train]), torch.tensor(want), rtol=10 * tol, atol=tol, msg=lambda m: f"{case['name']}: {key}: {m}")
    torch.testing.assert_close(torch.tensor([line["eval_loss"] for line in lines if "eval_loss" in line]), torch.tensor(evals), rtol=10 * tol, atol=tol)
    saved = load_file(folder / f"checkpoint-{len(losses)}" / "model.safetensors")
    assert set(saved) == set(weights)
    for name, w in weights.items(): torch.testing.assert_close(saved[name].double(), w, rtol=0, atol=tol, msg=lambda m: f"{case['name']}: {name}: {m}")


def run_all(tmp_path, todo, world=1, env=None):
    "Run cases in one or several processes and compare each"
    (tmp_path / "cases.json").write_text(json.dumps(todo))
    start_ranks(world, [tmp_path / "cases.json", tmp_path], env, script="preference_worker.py")
    for case in todo: check(case, tmp_path / case["name"], world)


def test_one_process(tmp_path):
    run_all(tmp_path, cases(ONE, ["qrpo"]) + cases({k: ONE[k] for k in ("left", "packed")}, [o for o in OBJECTIVES if o != "qrpo"]) + cases({"whole": ONE["whole"]}, ["sigmoid"], computed=True))


def test_two_processes(tmp_path):
    run_all(tmp_path, cases(TWO, ["qrpo-long", "mixed"]) + cases({"two": TWO["two"]}, ["sigmoid"], computed=True), world=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(tmp_path, stage):
    env = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage), DS_ACCELERATOR="cpu", ACCELERATE_MIXED_PRECISION="no",
               ACCELERATE_DEEPSPEED_ZERO3_INIT="false", ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")
    run_all(tmp_path, cases({"two": TWO["two"]}, ["qrpo", "mixed", "free"]) + cases({"computed": (1, 2, {})}, ["sigmoid"], computed=True), world=2, env=env)


# -- TRL's own trainer on the same batch

TRL_LOSSES = {"sigmoid": {}, "hinge": {}, "ipo": {}, "exo_pair": dict(label_smoothing=0.1), "nca_pair": {}, "robust": dict(label_smoothing=0.1), "bco_pair": {}, "sppo_hard": {},
              "aot": {}, "aot_unpaired": {}, "apo_zero": {}, "apo_down": {}, "discopop": {}, "sft": {}, "sigmoid_norm": {}}


def trl_step(rows, reference, args, folder):
    "Loss and gradients of TRL's DPOTrainer on these pairs in one batch"
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(48)}, unk_token="<0>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<0>", bos_token="<1>", eos_token="<2>")
    def words(ids): return " ".join(f"<{i}>" for i in ids)
    data = Dataset.from_list([dict(prompt=words(r["prompt_ids"]), chosen=" " + words(r["chosen_ids"]), rejected=" " + words(r["rejected_ids"])) for r in rows])
    config = trl.DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=len(rows), gradient_checkpointing=False, max_length=None, **args)
    trainer = trl.DPOTrainer(make_model(), ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}


def test_the_same_as_trl(tmp_path):
    "Loss and gradient of each loss of DPO, LD-DPO and a divergence"
    from datasets import Dataset

    from post_training.losses.sft import reduce_terms
    from post_training.models.score import add_score_head
    from post_training.tokens.collate import PadCollator, PairCollator
    from post_training.training.preference import objective_from_args

    rows = [r | dict(chosen_ids=[*r["chosen_ids"], 2], rejected_ids=[*r["rejected_ids"], 2], chosen_scored=[True] * (len(r["chosen_ids"]) + 1),
                     rejected_scored=[True] * (len(r["rejected_ids"]) + 1)) for r in make_pairs()[:4]]
    todo = [(name, dict(loss_type=[name], beta=0.3, **more)) for name, more in TRL_LOSSES.items()]
    todo += [("ld", dict(loss_type=["sigmoid"], beta=0.3, ld_alpha=0.4)), ("js", dict(loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2], f_divergence_type="js_divergence"))]
    reference, batch = add_score_head(other_model()), PairCollator(PadCollator(0))([{**r, "row_index": i} for i, r in enumerate(Dataset.from_list(rows))])
    for name, args in todo:
        objective, model = objective_from_args(args), add_score_head(make_model())
        with torch.no_grad(): batch["ref_logps"] = objective.logps(objective.score(reference, batch), batch)[0].double()
        loss = reduce_terms(objective.loss_terms(objective.score(model, batch), batch))
        loss.backward()
        theirs, grads = trl_step(rows, other_model(), args, tmp_path)
        assert abs(loss.item() - theirs) < 2e-5 * max(1, abs(theirs)), (name, loss.item(), theirs)
        for n, p in model.named_parameters():
            scale = max(1.0, grads[n].abs().max().item())
            torch.testing.assert_close(p.grad, grads[n], rtol=0, atol=3e-5 * scale, msg=lambda m: f"{name}: {n}: {m}")


# -- what a user gets wrong

def pair(i, **more):
    "A row as the stage pairs writes it"
    said = {s: [dict(role="assistant", content=text)] for s, text in (("chosen", str(i + 1)), ("rejected", str(i + 3)))}
    numbers = dict(ref_chosen_logprob=-9.0, ref_rejected_logprob=-9.0, chosen_reward=1.0, rejected_reward=0.0, ref_rewards=[0.0, 1.0, 0.5], chosen_quantile_reward=1.0,
                   rejected_quantile_reward=1 / 3)
    return dict(id=f"p{i}", prompt=[dict(role="user", content=f"What is {i} + 1?")], **said) | numbers | more


GOOD = [pair(i) for i in range(20)]
SHORT = ["cluster.device=cpu", "training_args.max_steps=1", "wandb.mode=disabled", "dataset=local", "max_drop_fraction=0.05"]
WRONG = {  # name: rows, overrides, words of the message
    "no reference": ([{k: v for k, v in r.items() if not k.startswith("ref_chosen")} for r in GOOD], [], ["no column ref_chosen_logprob", "ref_logprobs_from_dataset=false"]),
    "misnamed reference": ([{k.replace("logprob", "logps"): v for k, v in r.items()} for r in GOOD], [], ["no column ref_chosen_logprob", "'ref_chosen_logps'"]),
    "no rewards": ([{k: v for k, v in r.items() if "reward" not in k} for r in GOOD], [], ["no column chosen_reward", "ref_rewards"]),
    "quantiles and references but no rewards": ([{k: v for k, v in r.items() if k not in ("chosen_reward", "rejected_reward")} for r in GOOD], [],
                                                ["no column chosen_reward and no column rejected_reward"]),
    "pictures": (GOOD + [pair(i, rejected=[dict(role="assistant", content=[dict(type="image")])]) for i in range(4)], [], ["unsupported_roles: a content holds parts", "image"]),
    "another reference's reward": (GOOD + [pair(i, chosen_is_reference=True, chosen_reference=0) for i in range(4)], [], ["reward: not that of the reference that it is"]),
    "rewards that are none": (GOOD + [pair(i, chosen_reward=None) for i in range(4)], [], ["4 of 24 rows of pairs were dropped", "reward: missing or not finite"]),
    "infinite references": (GOOD + [pair(i, ref_rewards=[0.0, 1e999]) for i in range(4)], [], ["a reference reward is missing or not finite"]),
    "quantiles above 1": (GOOD + [pair(i, chosen_quantile_reward=1.5) for i in range(4)], [], ["a quantile is not between 0 and 1"]),
    "nothing to prefer": (GOOD + [pair(i, rejected=[dict(role="assistant", content=str(i + 1))]) for i in range(4)], [], ["4 chosen equals rejected"]),
    "empty answers": (GOOD + [pair(i, rejected=[dict(role="assistant", content="")]) for i in range(4)], [], ["4 empty completion"]),
    "too long": (GOOD + [pair(i, rejected=[dict(role="assistant", content="1 2 3 " * 90)]) for i in range(4)], [], ["4 overlength", "max_length is too short"]),
    "another tokenization": (GOOD + [pair(i, chosen_length=77) for i in range(4)], [], ["reference: scored for another number of tokens"]),
    "another reference": (GOOD, ["global_batch_size=8"], ["The policy at step 0 is not the reference", "per token on average"]),
    "unknown loss": (GOOD, ["training_args.loss_type=sigmiod"], ["sigmiod", "sigmoid"]),
    "unknown loss in a list": (GOOD, ["training_args.loss_type=[qrpo,sigmiod]"], ["unknown loss 'sigmiod'"]),
    "beta 0": (GOOD, ["training_args.beta=0"], ["training_args.beta"]),
    "beta below 0": (GOOD, ["training_args.beta=-0.1"], ["training_args.beta"]),
    "moving reference": (GOOD, ["training_args.sync_ref_model=true"], ["the reference stays what it is"]),
    "a reference twice": (GOOD, ["training_args.precompute_ref_log_probs=true"], ["not both"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told(case, demo, tmp_path, monkeypatch, capfd):
    from post_training import run
    from post_training import train_preference
    rows, overrides, words = WRONG[case]
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_path / "runs"))
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code = train_preference.train_preference_main([*SHORT, f"dataset_args.dataset_name={data}", f"artifacts_subdir={tmp_path.name}", *overrides])
    err = capfd.readouterr().err
    assert code == 2, err
    for word in words: assert word in err, (word, err)
    assert "Traceback" not in err
    for folder in run.all_runs(tmp_path / "runs"):
        record = run.read_record(folder)
        assert record["status"] == "failed" and run.newest_verified(record["checkpoints_dir"])[0] is None


def test_contents_may_be_parts(demo, tmp_path, capfd):
    "Text parts are text, beside prompts of one text; tools in a column of their own are part of the prompt"
    from post_training import config
    from post_training import train_preference
    made = {}
    for name, content in (("texts", lambda text: text), ("parts", lambda text: [dict(type="text", text=text[:1]), dict(type="text", text=text[1:])])):
        rows = [dict(pair(i), prompt=f"What is {i} + 1?", tools=[dict(name="add")]) for i in range(20)]
        for r in rows: r |= {s: [dict(role="assistant", content=content(r[s][0]["content"] + " !"))] for s in ("chosen", "rejected")}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        made[name] = train_preference.load_tokenized_pairs(config.compose("train_preference", [*SHORT, f"dataset_args.dataset_name={tmp_path / name}.jsonl", f"artifacts_subdir={tmp_path.name}"]).cfg)
    texts, parts = made["texts"].train, made["parts"].train
    assert len(parts) == 20 and parts["chosen_ids"][:] == texts["chosen_ids"][:] and parts["rejected_ids"][:] == texts["rejected_ids"][:]
    assert made["parts"].notices == [] and "add" in made["parts"].tokenizer.decode(parts[0]["prompt_ids"])


@pytest.mark.parametrize("n", [2, 3, 5, None])
def test_quantiles_among_the_first_references(n):
    "Against counting by hand: which reference an answer is decides whether it is left out, not that another has its reward"
    import random

    from datasets import Dataset

    from post_training.preferences.pairs import pair_row
    from post_training.preferences.rows import make_completion
    from post_training.training.preference import PreferenceObjective, with_quantiles
    rng, rows, want = random.Random(n or 0), [], []
    for _ in range(60):
        rewards = [float(rng.randrange(2)) for _ in range(5)]
        row = dict(id="r", prompt=[], completions=[make_completion(str(i), reward=r, is_reference_completion=True) for i, r in enumerate(rewards)])
        sides = rng.sample(range(5), 2)
        others = [[r for j, r in enumerate(rewards[:n]) if j != i] for i in sides]
        made = pair_row(row, *sides, list(range(5)))
        rows.append(dict(made, ref_rewards=made["ref_rewards"]))
        want.append([(sum(r <= rewards[i] for r in o) / len(o), len(o)) for i, o in zip(sides, others)])
    keep = [f"{s}_{k}" for s in ("chosen", "rejected") for k in ("reward", "is_reference", "reference")] + ["ref_rewards"]
    data = with_quantiles(Dataset.from_list([{k: r[k] for k in keep} for r in rows]), PreferenceObjective(partition="finite"), n)
    found = [[(r[f"{s}_quantile"], r[f"{s}_n_refs"]) for s in ("chosen", "rejected")] for r in data]
    assert [[(pytest.approx(q), k) for q, k in w] for w in want] == found
