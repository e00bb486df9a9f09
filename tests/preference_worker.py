"Runs preference training on a fixed toy problem, in one process or as one rank of several: `preference_worker.py CASES.json OUT`"
import json
import os
import random
import sys
from pathlib import Path

import torch
from trainer_worker import adapted, make_model, make_tokenizer, watched

ROWS, GLOBAL_BATCH, RATE = 11, 4, 0.02


def make_pairs(weighted=False):
    "Pairs of several lengths over 48 tokens, with made-up references and rewards; one answer holds the output of a tool"
    rng, rows = random.Random(7), []
    for i in range(ROWS):
        ids = {k: [rng.randrange(3, 48) for _ in range(n)] for k, n in (("prompt", 1 + i % 4), ("chosen", 2 + (3 * i) % 5), ("rejected", 2 + i % 3))}
        scored = {s: [True] * len(ids[s]) for s in ("chosen", "rejected")}
        if i == 3: scored["chosen"][1] = False
        refs = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(3 + i % 3)]
        row = dict(row_id=f"r{i}", source="ab"[i % 2], length=2 * len(ids["prompt"]) + len(ids["chosen"]) + len(ids["rejected"]), prompt_ids=ids["prompt"], ref_rewards=refs)
        for s, reward in (("chosen", refs[0]), ("rejected", 0.3)):
            n = sum(scored[s])
            row |= {f"{s}_ids": ids[s], f"{s}_scored": scored[s], f"{s}_length": n, f"ref_{s}_logprob": -n * rng.uniform(3, 4.5), f"ref_{s}_logprobs": [],
                    f"{s}_reward": reward, f"{s}_quantile_reward": sum(r <= reward for r in refs) / len(refs), f"{s}_is_reference": s == "chosen"}
        if weighted: row["row_weight"] = [1.0, 0.5, 3.0, 0.0][i % 4]
        rows.append(row)
    return rows


def make_trainer(case, folder, data, lines, model=None):
    "The trainer of a case"
    from post_training.tokens.collate import PackCollator, PadCollator, PairCollator
    from post_training.training.data_order import PackingPlan
    from post_training.training.preference import preference_config, objective_from_args
    from post_training.training.trainer import SFTTrainer, TrainerHooks

    Watched = watched(SFTTrainer)
    packs = [[int(i)] for i in range(ROWS)] if case.get("packed") else None
    collator = PairCollator(PackCollator() if packs else PadCollator(pad_token_id=0, padding_side=case.get("side", "right")))
    args = dict(per_device_train_batch_size=case["per_device"], gradient_accumulation_steps=case["accumulation"], optim="sgd", learning_rate=RATE, bf16=False,
                lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9, num_train_epochs=2, logging_steps=1, seed=9, weight_decay=0.0,
                activation_checkpointing=False, eval_strategy="epoch", per_device_eval_batch_size=case["per_device"], save_strategy="no")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    objective = objective_from_args(case["args"])
    return Watched(model or adapted(make_model(), case), preference_config(args | case["args"], folder, cpu=True, deepspeed=deepspeed), data, make_tokenizer(), collator, objective,
                   eval_dataset=data, packing=PackingPlan(packs, packs), hooks=TrainerHooks(lines.append))


def other_model():
    "A reference that is not the policy"
    model = make_model()
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters(): p += 0.05 * torch.randn_like(p)
    return model


def run_case(case, folder):
    "Train one case; losses, rows of every step, the reference and the saved weights are left in `folder`"
    from datasets import Dataset

    from post_training.training.preference import objective_from_args, reference_logps, with_quantiles, with_reference

    data, lines = Dataset.from_list(make_pairs(case.get("weighted", False))), []
    if case.get("computed"):
        around = make_trainer(case, folder, data, [], other_model())
        first, again = (reference_logps(around, data) for _ in range(2))
        assert (first == again).all()
        data = with_reference(data, first)
        around.accelerator.free_memory()
    trainer = make_trainer(case, folder, with_quantiles(data, objective_from_args(case["args"]), case.get("num_ref_rewards")), lines)
    trainer.train()
    rank = trainer.accelerator.process_index
    (folder / f"seen-{rank}.json").write_text(json.dumps(trainer.seen))
    if rank == 0: (folder / "lines.json").write_text(json.dumps(lines))
    if rank == 0: (folder / "reference.json").write_text(json.dumps([data["ref_chosen_logprob"][:], data["ref_rejected_logprob"][:]]))


def main(cases, out):
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true": PartialState(cpu=True)
    torch.set_num_threads(1)
    for case in json.loads(Path(cases).read_text()):
        folder = Path(out) / case["name"]
        folder.mkdir(parents=True, exist_ok=True)
        run_case(case, folder)


if __name__ == "__main__": main(*sys.argv[1:])
