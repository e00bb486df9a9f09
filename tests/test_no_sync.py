"A training micro-batch never asks the device for a number: what decides shapes is counted on the host, and the number of waits per step does not grow with accumulation"
import copy
import traceback
from collections import Counter
from functools import partial

import pytest
import torch
from datasets import Dataset
from preference_worker import make_pairs
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_worker import make_model, make_rows, make_tokenizer
from transformers import ApertusForCausalLM

from post_training.losses.sft import reduce_terms
from post_training.models.score import add_score_head, packed_seqlens, find_scored_positions
from post_training.tokens.collate import PackCollator, PadCollator, PairCollator, empty_pair, empty_row
from post_training.training.data_order import PackingPlan, RowDataset, StepBatchSampler, make_loader
from post_training.training.preference import objective_from_args, with_quantiles
from post_training.training.arguments import sft_config
from post_training.training.objective import SFTObjective
from post_training.training.trainer import SFTTrainer

ASKS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "masked_scatter", "_unique2", "unique_dim", "unique_consecutive", "equal", "repeat_interleave",
        "lift_fresh"}  # operations that read a number back, have a shape that the numbers decide, or make a tensor of Python's numbers
OBJECTIVES = {
    "sft": SFTObjective("sft"), "plw0": SFTObjective("plw"), "plw": SFTObjective("plw", 0.1), "plw-seq": SFTObjective("plw", 0.1, sequence_level=True),
    "ln-plw": SFTObjective("ln-plw", 0.3), "irl": SFTObjective("irl", 0.1),
    "qrpo": objective_from_args(dict(loss_type="qrpo")), "qrpo-finite": objective_from_args(dict(loss_type="qrpo", partition="finite", transform="log", normalize_beta_by_length=True)),
    "dpo": objective_from_args(dict(loss_type="sigmoid")), "aot-sft-ld": objective_from_args(dict(loss_type=["aot", "sft"], loss_weights=[1.0, 0.2], ld_alpha=0.5)),
}
LAYOUTS = {"padded": partial(PadCollator, 0), "left": partial(PadCollator, 0, "left"), "packed": PackCollator}


class Waits(TorchDispatchMode):
    "Remembers where a device would be asked for a number"
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        by_mask = name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name.removesuffix("_") in ASKS or by_mask:
            stack = [f for f in traceback.extract_stack() if "/post_training/" in f.filename or "/transformers/" in f.filename]
            self.seen[tuple(f"{f.filename.rsplit('/', 1)[-1]} {f.name}" for f in stack)] += 1
        return func(*args, **(kwargs or {}))

    def split(self):
        "Waits that are ours, and transformers' own, by their innermost place; what the loader does on the host is no wait"
        host = ("host_inputs", "step_counts", "collate_rows", "__getitems__")
        seen = {k: n for k, n in self.seen.items() if not any(f.split()[-1] in host for f in k)}
        kinds = Counter(), Counter()
        for k, n in seen.items():
            mask = k and k[-1].startswith("masking_utils.py")
            kinds[bool(mask)][k[-1] if k else "backward"] += n
        return kinds


def micro_batch(name, layout, rows=(0, 1, 2)):
    "One micro-batch of toy rows, on the host"
    objective, collator = OBJECTIVES[name], LAYOUTS[layout]()
    if isinstance(objective, SFTObjective):
        data = make_rows()
        return collator([{**data[i], "row_index": i} for i in rows] or [empty_row()])
    pairs = [{**r, **{f"ref_{s}_logprobs": [r[f"ref_{s}_logprob"] / r[f"{s}_length"]] * r[f"{s}_length"] for s in ("chosen", "rejected")}} for r in make_pairs()]
    data = with_quantiles(Dataset.from_list(pairs), objective)
    return PairCollator(collator, objective.ld_alpha)([*({**data[i], "row_index": i} for i in rows), empty_pair()])


def run(objective, batch, model):
    "Forward, loss, metrics and backward, as the trainer does them"
    scored = objective.score(model, batch)
    loss = reduce_terms(objective.loss_terms(scored, batch))
    sums = objective.metric_sums(scored, batch)
    loss.backward()
    return loss, sums


cases = pytest.mark.parametrize("name,layout", [(n, lay) for n in OBJECTIVES for lay in LAYOUTS if lay != "left" or n in ("plw", "dpo")])


@cases
def test_nothing_asks_the_device(name, layout):
    objective, batch, model = OBJECTIVES[name], micro_batch(name, layout), add_score_head(make_model())
    batch |= objective.host_inputs(batch)
    with Waits() as waits: run(objective, batch, model)
    ours, theirs = waits.split()
    assert not ours, f"{name} {layout}: the host waits for the device at {dict(ours)}"
    # transformers looks whether there is any padding (twice where there is), or whether positions restart
    assert sum(theirs.values()) == (1 if layout == "packed" else 2), theirs


@pytest.mark.parametrize("name", ["plw", "irl", "qrpo", "qrpo-finite", "aot-sft-ld"])
def test_detector_sees_a_wait(name):
    objective, batch, model = OBJECTIVES[name], micro_batch(name, "padded"), add_score_head(make_model())
    with Waits() as waits: run(objective, batch, model)
    assert waits.split()[0]["score.py find_scored_positions"] == 1
    if name.startswith("qrpo"): assert waits.split()[0]["qrpo.py check_quantiles"]


@pytest.mark.parametrize("name", ["plw", "irl", "qrpo-finite", "aot-sft-ld"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_runs_on_shapes_alone(name, layout):
    "Tensors without numbers stand for the device; transformers leaves out its own questions where it sees them"
    objective, batch, config = OBJECTIVES[name], micro_batch(name, layout), make_model().config
    known = batch | objective.host_inputs(batch)
    for given, fails in ((known, False), (batch, True)):
        with FakeTensorMode() as fake:
            model = add_score_head(ApertusForCausalLM(config))
            ghost = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            if not fails: run(objective, ghost, model)
            else:
                with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)): run(objective, ghost, model)


@cases
@pytest.mark.parametrize("rows", [(0, 1, 2), (3,), ()])
def test_same_bits(name, layout, rows):
    "With and without the positions: losses, metrics and gradients; a micro-batch without a label has the gradients too"
    objective, batch, model = OBJECTIVES[name], micro_batch(name, layout, rows), add_score_head(make_model())
    found = []
    for given in (batch, batch | objective.host_inputs(batch)):
        model.zero_grad()
        loss, sums = run(objective, given, model)
        found.append([loss.detach(), sums, *[p.grad for p in model.parameters()]])
    assert all(g is not None for g in found[1])
    for a, b in zip(*found): assert torch.equal(a, b) and a.isfinite().all()


def trainer_of(accumulation, folder, packed=False, workers=0, steps=3):
    "A small trainer whose micro-batches hold one row or line"
    data = Dataset.from_list(make_rows())
    args = dict(per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1e-3, bf16=False, max_steps=steps, logging_steps=1, seed=9,
                activation_checkpointing=False, save_strategy="no", dataloader_num_workers=workers)
    trainer = SFTTrainer(make_model(), sft_config(args, folder, cpu=True), data, make_tokenizer(), PackCollator() if packed else PadCollator(0), SFTObjective("plw", 0.1),
                         packing=PackingPlan([[int(i)] for i in range(len(data))] if packed else None))
    trainer.save_nothing = True
    return trainer


def waits_of(trainer, monkeypatch):
    "Waits while it trains: operations, and tensors that are read as a whole"
    read = Counter()
    with monkeypatch.context() as m, Waits() as waits:
        for name in ("tolist", "cpu", "numpy"):
            plain = getattr(torch.Tensor, name)
            def spy(self, *args, plain=plain, **kwargs):
                frames = [f for f in traceback.extract_stack() if "/post_training/" in f.filename]
                if frames and not any(f.name in ("host_inputs", "step_counts", "collate_rows", "__getitems__", "__call__", "read") for f in frames): read[frames[-1].name] += 1
                return plain(self, *args, **kwargs)
            m.setattr(torch.Tensor, name, spy)
        trainer.train()
    ours, theirs = waits.split()
    return ours, theirs, read


@pytest.mark.parametrize("packed", [False, True])
def test_waits_do_not_grow_with_accumulation(tmp_path, monkeypatch, packed):
    found = {a: waits_of(trainer_of(a, tmp_path / str(a), packed), monkeypatch) for a in (1, 3)}
    (ours1, theirs1, read1), (ours3, theirs3, read3) = found[1], found[3]
    assert ours1 == ours3 and read1 == read3, f"{ours1} {ours3} {read1} {read3}"
    assert read1["train_line"] <= 2 * 3  # the sums of a line in one piece, and its counts, which are on the host
    assert sum(theirs3.values()) > sum(theirs1.values())  # what grows is transformers' own


def test_one_copy_of_each_tensor(tmp_path, monkeypatch):
    "Each tensor of a micro-batch goes to the device once, without a wait, in its own precision"
    trainer, sent, plain = trainer_of(2, tmp_path), [], torch.Tensor.to
    batch = PairCollator(PadCollator(0))([{**r, "row_index": i} for i, r in enumerate(make_pairs()[:2])])
    def spy(self, *args, **kwargs):
        sent.append((args, kwargs))
        return plain(self, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "to", spy)
        there = trainer._prepare_inputs({**batch, "max_refs": 3})
    assert len(sent) == len(batch) and all(k == dict(non_blocking=True) for _, k in sent)
    assert there["ref_logps"].dtype == torch.float64 and there["max_refs"] == 3
    trainer.is_deepspeed_enabled = True  # there transformers rounds fractions to the model's precision
    assert trainer._prepare_inputs(batch)["ref_logps"].dtype == torch.float64


def test_flash_attention_gets_the_documents(monkeypatch):
    "An attention that is called flash, on a CPU: it is handed what transformers would ask the device for in each layer"
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []
    def attention(*args, **kwargs):
        seen.append({k: kwargs.pop(k, None) for k in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")})
        return sdpa_attention_forward(*args, **kwargs)
    for table, function in ((ALL_ATTENTION_FUNCTIONS, attention), (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask)):
        monkeypatch.setattr(type(table), "_global_mapping", dict(type(table)._global_mapping, flash_toy=function))
    batch, objective = micro_batch("plw", "packed"), OBJECTIVES["plw"]
    batch |= objective.host_inputs(batch)
    cu_seqlens, max_seqlen = packed_seqlens(batch["position_ids"])
    plain = objective.score(add_score_head(make_model()), batch)[0].log_probs
    model = add_score_head(make_model())
    model.config._attn_implementation = "flash_toy"
    assert torch.equal(objective.score(model, batch)[0].log_probs, plain)
    assert len(seen) == 2 and all(torch.equal(s["cu_seq_lens_q"], cu_seqlens) and s["max_length_k"] == max_seqlen for s in seen)
    assert cu_seqlens.tolist() == [0, *torch.tensor([len(r["input_ids"]) for r in make_rows()[:3]]).cumsum(0).tolist()]


def batches_of(workers, skip=0, plain=False, packed=False):
    "The micro-batches of an epoch; `plain` reads rows as Python lists"
    from accelerate import skip_first_batches

    data = Dataset.from_list(make_rows())
    packs = [[2, 0], [1], [4, 3, 5], [6]] if packed else None
    rows = RowDataset([*data] if plain else data, packs)
    sampler = StepBatchSampler(len(rows), 2, accumulation=2, seed=3)
    loader = make_loader(rows, sampler, PackCollator() if packed else PadCollator(0), empty_row, num_workers=workers, host_inputs=SFTObjective("plw", 0.1).host_inputs)
    return list(skip_first_batches(loader, skip) if skip else loader)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_do_not_depend_on_workers(packed):
    "Arrow arrays or Python lists, loaded here or by workers, from the start or resumed: the same batches"
    def same(a, b):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert set(x) == set(y)
            for k in x: assert torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype if isinstance(x[k], torch.Tensor) else x[k] == y[k]
    want = batches_of(0, plain=True, packed=packed)
    for workers in (0, 1, 2): same(batches_of(workers, packed=packed), want)
    same(batches_of(2, skip=1, packed=packed), want[1:])


def test_other_callers_need_no_positions():
    "A copied model, a label on its own, and no label at all"
    model = copy.deepcopy(add_score_head(make_model()))
    ids = torch.tensor([[5, 6, 7]])
    for labels in (ids, torch.full_like(ids, -100)):
        a, b = (model(input_ids=ids, labels=labels, score=True, scored_positions=p).log_probs for p in (None, find_scored_positions(labels)))
        assert torch.equal(a, b) and a.requires_grad
