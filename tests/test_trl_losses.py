"DFT and the losses without a reference against TRL's own trainers on the same rows: loss and gradient"
import pytest
import torch
from preference_worker import make_pairs
from trainer_worker import make_model, make_rows

from post_training.losses.sft import reduce_terms
from post_training.models.score import add_score_head
from post_training.tokens.collate import PadCollator, PairCollator
from post_training.training.objective import SFTObjective
from post_training.training.preference import objective_from_args

ARGS = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None)


def word_tokenizer():
    "Ids as words: <5> is 5"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(48)}, unk_token="<0>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<0>", bos_token="<1>", eos_token="<2>")


def words(ids): return " ".join(f"<{i}>" for i in ids)


def compare(model, loss, theirs, their_model, tol=1e-5):
    "The losses and their gradients agree"
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < tol * max(1, abs(theirs.item())), (loss.item(), theirs.item())
    for (name, p), q in zip(model.named_parameters(), their_model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=tol * max(1, q.grad.abs().max().item()), msg=lambda m: f"{name}: {m}")


def test_dft_is_that_of_trl(tmp_path):
    "SFTTrainer with loss_type=dft on rows of prompt and completion"
    import trl
    from datasets import Dataset

    rows = [r for r in make_rows() if sum(r["completion_mask"][1:])][:5]
    data = Dataset.from_list([dict(input_ids=r["input_ids"], labels=[i if m else -100 for i, m in zip(r["input_ids"], r["completion_mask"])]) for r in rows])
    config = trl.SFTConfig(output_dir=str(tmp_path), loss_type="dft", per_device_train_batch_size=len(rows), dataset_kwargs=dict(skip_prepare_dataset=True), **ARGS)
    trainer = trl.SFTTrainer(make_model(), args=config, train_dataset=data, processing_class=word_tokenizer())
    batch = trainer.data_collator([dict(r) for r in data])
    ours, model = PadCollator(0)([{**r, "row_index": i} for i, r in enumerate(rows)]), add_score_head(make_model())
    objective = SFTObjective("dft")
    compare(model, reduce_terms(objective.loss_terms(objective.score(model, ours), ours)), trainer.compute_loss(trainer.model, batch), trainer.model)


@pytest.mark.parametrize("name, more", [("simpo", dict(simpo_gamma=0.4, label_smoothing=0.1)), ("cpo", dict(cpo_alpha=0.6)), ("orpo", {})])
def test_losses_without_a_reference_are_those_of_trl(name, more, tmp_path):
    "CPOTrainer and ORPOTrainer on pairs; rows without reference columns. TRL's ORPO takes the likelihood over the prompt too, which is replaced"
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [{k: v for k, v in r.items() if "ref" not in k} for r in make_pairs()[:4]]
    for r in rows:
        r["prompt_ids"] = [1, *r["prompt_ids"]]
        for s in ("chosen", "rejected"): r |= {f"{s}_ids": [*r[f"{s}_ids"], 2], f"{s}_scored": [True] * (len(r[f"{s}_ids"]) + 1)}
    data = Dataset.from_list([dict(prompt=words(r["prompt_ids"][1:]), chosen=" " + words(r["chosen_ids"]), rejected=" " + words(r["rejected_ids"])) for r in rows])
    kind = dict(loss_type="simpo", cpo_alpha=0.0) if name == "simpo" else dict(loss_type="sigmoid") if name == "cpo" else {}
    trainer_class, config_class = (ORPOTrainer, ORPOConfig) if name == "orpo" else (CPOTrainer, CPOConfig)
    config = config_class(output_dir=str(tmp_path), beta=0.7, per_device_train_batch_size=4, max_completion_length=None, remove_unused_columns=False, **(ARGS | dict(max_length=64)), **kind, **more)
    trainer = trainer_class(make_model(), args=config, train_dataset=data, processing_class=word_tokenizer())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch, "train")
    if name == "orpo":
        logits = trainer.model(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits[:, :-1].transpose(1, 2)
        whole = torch.where(batch["chosen_attention_mask"] == 1, batch["chosen_input_ids"], -100)
        theirs = theirs - sum(w * torch.nn.functional.cross_entropy(logits, labels[:, 1:]) for w, labels in ((1, whole), (-1, batch["chosen_labels"])))
    objective, model = objective_from_args(dict(loss_type=name, beta=0.7, **more)), add_score_head(make_model())
    ours = PairCollator(PadCollator(0))([{**r, "row_index": i} for i, r in enumerate(rows)])
    compare(model, reduce_terms(objective.loss_terms(objective.score(model, ours), ours)), theirs, trainer.model)
