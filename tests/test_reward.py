"Reward models: the loss against TRL's trainer, rows that have no label, and a run that is killed, ends the same and is read by ref_rewards"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_resume import COMMANDS, CONFIG, LAUNCH, Place, after_lines, assert_same, during_a_save

from post_training import run
from post_training.core.files import UserError


def toy_pairs(n=6):
    g = torch.Generator().manual_seed(0)
    def ids(low, k): return torch.randint(low, low + 10, (k,), generator=g).tolist()
    rows = [(ids(3, 2 + i % 3), ids(13, 1 + i % 4) + [2], ids(20, 4 - i % 4) + [2]) for i in range(n)]
    return [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r, chosen_scored=[True] * len(c), rejected_scored=[True] * len(r), row_index=i,
                 chosen_reward=2. + i, rejected_reward=1.) for i, (p, c, r) in enumerate(rows)]


def toy_model():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
                                                      pad_token_id=0, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradient_are_those_of_trl(tmp_path, layout):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    from post_training.losses.sft import reduce_terms
    from post_training.models.classifier import add_reward_head
    from post_training.tokens.collate import PackCollator, PadCollator, PairCollator
    from post_training.training.reward import RewardObjective
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 32)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    pairs, model = toy_pairs(), toy_model()
    rows = [dict(chosen_ids=p["prompt_ids"] + p["chosen_ids"], rejected_ids=p["prompt_ids"] + p["rejected_ids"], margin=p["chosen_reward"] - p["rejected_reward"]) for p in pairs]
    args = RewardConfig(output_dir=str(tmp_path), per_device_train_batch_size=6, center_rewards_coefficient=0.1, max_length=None, bf16=False, use_cpu=True, report_to=[],
                        activation_checkpointing=False, disable_tqdm=True)
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator(rows)
    assert "margin" in batch
    theirs = trainer.compute_loss(trainer.model, batch)
    expected = torch.autograd.grad(theirs, [*trainer.model.parameters()])
    ours = add_reward_head(model)
    batch = PairCollator(PadCollator(0) if layout == "padded" else PackCollator())(pairs)
    o = RewardObjective(center=0.1, margin="rewards")
    loss = reduce_terms(o.loss_terms(o.score(ours, batch), batch), o.step_counts(batch)[:2])
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, [*ours.parameters()]), expected, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


GOOD = dict(prompt="1+1?", chosen="2", rejected="3")
BAD = {  # rows, overrides, what the error says
    "no difference of answers": ([GOOD | dict(rejected="2")] * 4, [], "chosen equals rejected"),
    "no difference of rewards": ([GOOD | dict(chosen_reward=1., rejected_reward=1.)] * 4, [], "no difference"),
    "the wrong way round": ([GOOD | dict(chosen_reward=0., rejected_reward=1.)] * 4, [], "the chosen answer has the lower one"),
    "NaN": ([GOOD | dict(chosen_reward=float("nan"), rejected_reward=1.)] * 4, [], "not finite"),
    "no rewards": ([GOOD] * 4, ["reward_loss.margin=rewards"], "reward: missing"),
    "one side": ([dict(prompt="1+1?", chosen="2")] * 4, [], "no column rejected"),
    "a thought": ([GOOD | dict(chosen="<think>two</think>2")] * 4, [], "ref_rewards")}


@pytest.mark.parametrize("rows, overrides, says", BAD.values(), ids=BAD)
def test_rows_without_a_label_are_refused(tmp_path, demo, monkeypatch, rows, overrides, says):
    from post_training import config
    from post_training.stages.training import RankContext
    from post_training.train_reward import drop_unordered, load_reward_pairs
    monkeypatch.setenv("POST_TRAINING_ARTIFACTS_DIR", str(demo))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = config.compose("train_reward", [f"dataset_args.dataset_name={file}", "dataset_args.train_split.name=null", "dataset_args.eval_split.name=null",
                                          "training_args.eval_strategy=no", "cluster.device=cpu", *overrides]).cfg
    with pytest.raises(UserError, match=says):
        data = load_reward_pairs(cfg)
        drop_unordered(RankContext(cfg, Path("."), Path("."), 1, Path(".")), data, {})


@pytest.mark.slow
def test_killed_runs_end_the_same_and_ref_rewards_reads_them(tmp_path, demo):
    COMMANDS["reward"] = [sys.executable, "-m", "post_training.train_reward", *CONFIG]
    whole, cut = Place(tmp_path / "whole", demo), Place(tmp_path / "cut", demo)
    whole.finish("reward")
    assert cut.kill_when("reward", after_lines(cut, 1))
    assert cut.kill_when("reward", during_a_save(cut, 6))
    cut.finish("reward")
    assert_same(whole, cut)
    record = run.read_record(cut.run_dir)
    assert record["reward_audit"] == run.read_record(whole.run_dir)["reward_audit"] and record["reward_audit"]["accuracy"]["n"] == 12
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(dict(id=str(i), prompt=f"{i}+1?", completions=[dict(content=str(i + 1)), dict(content=str(i))])) + "\n" for i in range(4)))
    subprocess.run([sys.executable, "-m", "post_training", "ref_rewards", f"dataset_args.dataset_name={rows}", "reward_args.kind=model", "reward_args.name=mine",
                    f"reward_args.model_name_or_path={cut.checkpoints / record['final']['checkpoint']}", f"save_data_dir={out}", "cluster.device=cpu"], env=cut.env, check=True)
    from post_training.data.io import load_rows
    scored = load_rows(str(out))
    assert len(scored) == 4 and all(isinstance(c["reward"], float) for r in scored for c in r["completions"])


@pytest.mark.slow
def test_zero_gives_the_numbers_of_one_process(tmp_path, demo):
    few, found = [*CONFIG, "training_args.max_steps=3", "training_args.logging_steps=1", "training_args.optim=ademamix"], {}
    for engine in ("single", "ds-zero2", "ds-zero3"):
        COMMANDS["reward"] = [sys.executable, "-c", LAUNCH.replace("train_sft", "train_reward"), *few, f"accelerate_config={engine}", f"num_processes={1 + (engine != 'single')}"]
        place = Place(tmp_path / engine, demo)
        place.finish("reward")
        found[engine] = torch.tensor([[line[k] for k in ("loss", "grad_norm", "accuracy", "score_margin")] for line in place.lines() if "loss" in line])
        assert run.read_record(place.run_dir)["reward_audit"]["position"]["largest_change"] < 1e-4
    assert len(found["single"]) == 3
    for engine in ("ds-zero2", "ds-zero3"): torch.testing.assert_close(found[engine], found["single"], atol=1e-5, rtol=1e-5)
