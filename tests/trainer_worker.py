"Runs the trainer on a fixed toy problem, in one process or as one rank of several: `trainer_worker.py CASES.json OUT`"
import json
import os
import random
import sys
from pathlib import Path

import torch

ROWS, GLOBAL_BATCH = 11, 4


def rate(objective):
    "Learning rate: the squared term of irl has far larger gradients"
    return 0.002 if objective["name"] == "irl" else 0.05


def add_weights(rows):
    "The same rows with weights of tokens (one weight to a message, or several to its parts) and of rows, some of them 0"
    rng = random.Random(3)
    for i, row in enumerate(rows):
        starts = [t for t, (a, b) in enumerate(zip([None, *row["completion_mask"]], row["completion_mask"])) if a != b]
        row["weights"] = []
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])]):
            weight, cut = rng.choice([1.0, 1.0, 0.5, 0.0, 2.5]), rng.randrange(start, end + 1) if i % 3 == 0 else end
            row["weights"] += [weight] * (cut - start) + [weight * rng.choice([0.0, 0.25])] * (end - cut)
        row["row_weight"] = [1.0, 0.5, 3.0, 0.0][i % 4]
    return rows


def make_rows(weighted=False):
    "Conversations of several lengths and turns over 48 tokens; the last has no prompt that is predicted"
    rng, rows = random.Random(5), []
    for i in range(ROWS):
        ids, mask = [], []
        for _ in range(1 + i % 2):
            for length, flag in ((1 + (3 * i) % 6, 0), (1 + i % 4, 1)):
                ids += [rng.randrange(3, 48) for _ in range(length)]
                mask += [flag] * length
        if i == ROWS - 1: mask = [0] + [1] * (len(mask) - 1)
        rows.append(dict(input_ids=ids, completion_mask=mask, row_id=f"r{i}", source="ab"[i % 2], length=len(ids)))
    return add_weights(rows) if weighted else rows


def make_model():
    "A small Apertus with fixed weights"
    from transformers import ApertusConfig, ApertusForCausalLM

    config = ApertusConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(1)
    model = ApertusForCausalLM(config).float()
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=0.15)
    return model


def adapted(model, case):
    "With adapters where the case asks for them"
    if not case.get("lora"): return model
    from post_training.training.lora import add_adapters, lora_config

    return add_adapters(model, lora_config(dict(use_peft=True, **case["lora"])), seed=4, base="toy", upcast=False)


def make_tokenizer():
    "A tokenizer that only has to be saved"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(48)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), pad_token="t0", bos_token="t1", eos_token="t2")


def watched(trainer):
    "A trainer class that remembers the rows of every optimizer step"

    class Watched(trainer):
        "Remembers the rows of every optimizer step"

        def get_batch_samples(self, *args):
            batches, ds = super().get_batch_samples(*args)
            self.seen = [*getattr(self, "seen", []), [i for b in batches for i in b["row_index"].tolist() if i >= 0]]
            return batches, ds

    return Watched


def run_case(case, folder):
    "Train one case; losses, rows of every step, evaluation and the saved weights are left in `folder`"
    from datasets import Dataset

    from post_training.tokens.collate import PackCollator, PadCollator
    from post_training.training.arguments import sft_config
    from post_training.training.objective import SFTObjective
    from post_training.training.data_order import PackingPlan
    from post_training.training.trainer import SFTTrainer, TrainerHooks

    Watched = watched(SFTTrainer)
    data, lines = Dataset.from_list(make_rows(case.get("weighted", False))), []
    packs = [[int(i)] for i in range(ROWS)] if case.get("packed") else None
    collator = PackCollator() if packs else PadCollator(pad_token_id=0, padding_side=case.get("side", "right"))
    args = dict(per_device_train_batch_size=case["per_device"], gradient_accumulation_steps=case["accumulation"], optim="sgd", learning_rate=rate(case["objective"]), bf16=False,
                lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9, num_train_epochs=2, logging_steps=1, seed=9, weight_decay=0.0, dataloader_drop_last=case.get("drop_last", False),
                activation_checkpointing=False, eval_strategy="epoch", per_device_eval_batch_size=case["per_device"], save_strategy="no")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    trainer = Watched(adapted(make_model(), case), sft_config(args | case.get("args", {}), folder, cpu=True, deepspeed=deepspeed), data, make_tokenizer(), collator,
                      SFTObjective(**case["objective"]), eval_dataset=data, packing=PackingPlan(packs, packs), hooks=TrainerHooks(lines.append))
    trainer.train(case.get("resume"))
    rank = trainer.accelerator.process_index
    (folder / f"seen-{rank}.json").write_text(json.dumps(trainer.seen))
    if rank == 0: (folder / "lines.json").write_text(json.dumps(lines))


def main(cases, out):
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true": PartialState(cpu=True)
    torch.set_num_threads(1)
    for case in json.loads(Path(cases).read_text()):
        folder = Path(out) / case["name"]
        folder.mkdir(parents=True, exist_ok=True)
        run_case(case, folder)


if __name__ == "__main__": main(*sys.argv[1:])
