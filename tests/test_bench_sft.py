"What a training step computes, counted and not timed: no logits, no padding where rows are packed, and as many multiplications as the arithmetic says."
import pytest
import torch
from largest_tensor import Largest
from torch.utils.flop_counter import FlopCounterMode

from post_training.bench.sft import (
    BATCH_LAYOUTS, BENCH_SFT_LOSSES, bench_sft_rows, model_numbers, our_sft_trainer, real_masks, step_flops, step_shape, trl_sft_trainer)
from post_training.bench.step import bench_batch, bench_model, full_logits_loss

SIZES = dict(hidden=64, layers=2)
LINE = 128


@pytest.fixture(scope="module")
def rows(): return bench_sft_rows(10, longest=96, vocab=5000, median=40)


def quiet(trainer):
    "Packing is probed with forwards of its own before the first step: they are no part of a step"
    trainer.probe_packing = lambda model: None
    return trainer


# -- no [tokens, vocabulary]

VOCAB = 60_000


@pytest.fixture(scope="module")
def many(): return bench_sft_rows(6, longest=300, vocab=VOCAB, median=200)


def largest_in(trainer):
    with Largest() as seen: quiet(trainer).train()
    return seen.numel


@pytest.mark.parametrize("layout", ["sorted", "packed"])
@pytest.mark.parametrize("loss", list(BENCH_SFT_LOSSES))
def test_no_tokens_by_vocabulary(many, tmp_path, loss, layout):
    "In a whole optimizer step nothing is half as large as a micro-batch's logits, not even as those of its scored positions"
    model = bench_model(vocab=VOCAB, hidden=32, layers=1)
    per_device = 3
    scored = step_shape(many, loss, layout, per_device=per_device, pack_length=600)["scored"] / 2  # two micro-batches; the larger has at least half
    assert 0 < largest_in(our_sft_trainer(model, many, tmp_path, layout, 1, per_device, 600, "cpu", loss)) < scored * VOCAB / 2


def test_the_watch_sees_logits():
    "The same watcher does see full logits"
    model, batch = bench_model(vocab=VOCAB, hidden=32, layers=1), bench_batch(VOCAB, 2, 64)
    with Largest() as seen: full_logits_loss(model, batch, 0.).backward()
    assert seen.numel >= 2 * 63 * VOCAB


@pytest.mark.parametrize("kind", ["qrpo", "sigmoid"])
def test_no_tokens_by_vocabulary_with_pairs(tmp_path, kind):
    "Preference training makes no logits either"
    from datasets import Dataset

    from post_training.bench.preference import bench_pairs
    from post_training.bench.sft import plain_tokenizer, sft_step_args
    from post_training.tokens.collate import PadCollator, PairCollator
    from post_training.training.preference import preference_config, objective_from_args
    from post_training.training.trainer import SFTTrainer

    pairs, asked = bench_pairs(VOCAB, 2, 200), dict(sft_step_args(2, 1, 1), loss_type=kind, beta=0.1)
    data = Dataset.from_list(pairs)
    trainer = SFTTrainer(bench_model(vocab=VOCAB, hidden=32, layers=1), preference_config(asked, tmp_path, cpu=True), data, plain_tokenizer(), PairCollator(PadCollator(0)),
                         objective_from_args(asked))
    trainer.save_nothing = True
    answers = sum(len(p[f"{s}_ids"]) for p in pairs for s in ("chosen", "rejected"))
    assert 0 < largest_in(trainer) < answers * VOCAB / 2


# -- what goes through

def rows_through(trainer):
    "How many positions each linear layer of the backbone sees in a step"
    seen, backbone = {}, trainer.model.base_model
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: seen.get(name, 0) + args[0].numel() // m.in_features}))
    quiet(trainer).train()
    return set(seen.values())


@pytest.mark.parametrize("layout", BATCH_LAYOUTS)
def test_positions_through_the_backbone(rows, tmp_path, layout):
    "As many as the arithmetic says; packed, that is the real tokens and no padding"
    shape = step_shape(rows, "plw 0", layout, pack_length=LINE)
    trainer = our_sft_trainer(bench_model(vocab=5000, **SIZES), rows, tmp_path, layout, pack_length=LINE)
    assert rows_through(trainer) == {shape["positions"]}
    assert (shape["positions"] == shape["real"]) is (layout == "packed")


def addmm_inplace(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs):
    "FLOPs of the product that adds into its own result, which torch's counter does not know"
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def counted(trainer):
    "FLOPs of a step, forward and backward"
    trainer.model.set_attn_implementation("eager")  # a CPU's fused attention is not counted
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_inplace}) as counter: quiet(trainer).train()
    return counter.get_total_flops()


@pytest.mark.parametrize("loss, layout", [*[("plw 0", layout) for layout in BATCH_LAYOUTS], *[(loss, "packed") for loss in BENCH_SFT_LOSSES if loss != "plw 0"]])
def test_arithmetic_is_what_torch_counts(rows, tmp_path, loss, layout):
    "The formula of the notebook, to a thousandth: what is left out are the angles of the positions"
    model = bench_model(vocab=5000, **SIZES)
    expected = step_flops(step_shape(rows, loss, layout, pack_length=LINE), model_numbers(model))
    found = counted(our_sft_trainer(model, rows, tmp_path, layout, pack_length=LINE, loss=loss))
    assert found == pytest.approx(sum(expected.values()), rel=1e-3)


def test_scored_positions_are_the_weighted_ones(rows):
    "Counted by hand: answers alone at weight 0, everything but first tokens elsewhere, for irl what follows an answer too"
    answers, targets, followed = 0, 0, 0
    for row in rows:
        mask = row["completion_mask"]
        weighted = [t > 0 and bool(m) for t, m in enumerate(mask)]
        answers += sum(weighted)
        targets += len(mask) - 1
        followed += sum(w or weighted[t - 1] for t, w in enumerate(weighted) if t > 0)
    found = {loss: step_shape(rows, loss, "packed", pack_length=LINE)["scored"] for loss in BENCH_SFT_LOSSES}
    assert found == {"sft": targets, "plw 0": answers, "plw 0.1": targets, "ln-plw 0.1": targets, "irl": followed}
    assert answers <= followed <= targets and answers < targets


def test_head_follows_the_weighted_positions(rows, tmp_path):
    "Between two losses in one layout the difference is that of their scored positions, exactly"
    totals, shapes = {}, {}
    for loss in ("plw 0", "irl", "sft"):
        model = bench_model(vocab=5000, **SIZES)
        totals[loss], shapes[loss] = counted(our_sft_trainer(model, rows, tmp_path / loss, "packed", pack_length=LINE, loss=loss)), step_shape(rows, loss, "packed", pack_length=LINE)["scored"]
    per_position = 8 * SIZES["hidden"] * 5000
    for loss in ("irl", "sft"): assert totals[loss] - totals["plw 0"] == per_position * (shapes[loss] - shapes["plw 0"])


# -- the same training

def first_loss(trainer):
    from post_training.bench.measure import step_meter

    trainer.add_callback(meter := step_meter())
    trainer.train()
    return meter.losses[0]


def test_all_ways_train_the_same(rows, tmp_path):
    "The first step's loss does not depend on layout or library: rows that share a line stay apart, in TRL's packing on a CPU too"
    from datasets import disable_progress_bars

    disable_progress_bars()
    made = lambda make, layout, **kw: first_loss(make(bench_model(vocab=5000, **SIZES), rows, tmp_path / layout, layout, pack_length=LINE, **kw))
    for loss in ("plw 0", "sft"):
        ours = [made(our_sft_trainer, layout, loss=loss) for layout in BATCH_LAYOUTS]
        trl = [made(trl_sft_trainer, layout, loss=loss) for layout in ("random", "group_by_length", "batch_rebalance", "packed")]
        assert [*ours, *trl] == pytest.approx([ours[0]] * 8, abs=1e-3)


def test_real_conversations(data_dir):
    "Masks of real conversations: both sources, something to learn in each row"
    masks = real_masks(str(data_dir), 12)
    assert len(masks) == 12 and all(m.any() for m in masks)
    assert max(r["length"] for r in bench_sft_rows(12, 256, folder=str(data_dir))) <= 256
