"Weights of rows, messages and parts of messages against an fp64 oracle: every loss, layout and cut of a step; zero gradient at weight 0, linear in a weight, and weights of 1 change no bit"
import copy
import json
from functools import lru_cache

import pytest
import test_lora as lora
import test_no_sync as no_sync
import test_preference as pairs
import torch
from datasets import Dataset
from oracle import weighted_oracle
from safetensors.torch import load_file
from test_losses import IRL, SIZES, grads, make_model
from test_losses import make_rows as conversations
from test_trainer_equivalence import OBJECTIVES, start_ranks, steps
from trainer_worker import make_rows, rate
from trainer_worker import make_model as trainer_model
from transformers import ApertusConfig, ApertusForCausalLM

from post_training.core.files import UserError
from post_training.losses.dft import SFT_LOSSES
from post_training.losses.sft import reduce_terms
from post_training.models.score import add_score_head
from post_training.tokens.collate import PackCollator, PadCollator
from post_training.tokens.dataset import tokenize_dataset
from post_training.tokens.tokenizer import toy_tokenizer
from post_training.training.objective import SFTObjective, data_weights

LAYOUTS = {"right": PadCollator(0), "left": PadCollator(0, "left"), "packed": PackCollator(0, pad_to_multiple_of=5)}
SETTINGS = [(name, w, level) for name in SFT_LOSSES for w in (0.0, 0.3) for level in (False, True)]
KEYS = ("weights", "row_weight")


def objective_of(name, w, level):
    return SFTObjective(name, w, level, **IRL)


def weighted_rows(seed=0):
    "The conversations of test_losses with weights: random ones, 0 in parts and in whole messages, a row of weight 0, a row whose tokens all have weight 0"
    g, rows = torch.Generator().manual_seed(seed), []
    for i, (ids, flags) in enumerate([*conversations(), *conversations(8)[6:]]):
        drawn = torch.rand(len(ids), generator=g) * 2 * (torch.rand(len(ids), generator=g) > 0.3)
        turn = torch.arange(len(ids)) // 3
        weights = [torch.tensor([1.0, 0.0, 0.5, 2.0, 0.25])[turn % 5], drawn][i % 2] * (i != 7)
        rows.append(dict(input_ids=ids, completion_mask=flags, weights=weights.tolist(), row_weight=[1.0, 0.5, 2.0, 1.0, 0.25, 0.0, 3.0, 1.0][i], row_index=i))
    return rows


def make_model_of(vocab_size):
    torch.manual_seed(0)
    return add_score_head(ApertusForCausalLM(ApertusConfig(**SIZES | dict(vocab_size=vocab_size))))


def filler_batch(collator, objective):
    return collator([objective.filler()])


def step(model, objective, batches, total=None):
    "Loss and gradient of one optimizer step: denominators first, then each micro-batch, as the trainer does it"
    n = len(objective.COUNTS)
    total = sum(objective.step_counts(b) for b in batches)[:-n] if total is None else total
    model.zero_grad()
    loss = 0.0
    for b in batches:
        b = {**b, **objective.host_inputs(b)}
        part = reduce_terms(objective.loss_terms(objective.score(model, b), b), total)
        part.backward()
        loss += part.item()
    return loss, grads(model)


@pytest.fixture(scope="module")
def model(): return make_model()


@pytest.fixture(scope="module")
def expected(model):
    "Loss and gradient of each setting from the oracle, on an fp64 copy of the model"
    exact, found = copy.deepcopy(model).double(), {}
    rows = [(r["input_ids"], r["completion_mask"], r["weights"], r["row_weight"]) for r in weighted_rows()]
    for name, w, level in SETTINGS:
        exact.zero_grad()
        loss = weighted_oracle(name, exact, rows, w, level, **IRL)
        loss.backward()
        found[name, w, level] = loss.item(), grads(exact)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cuts", [(8,), (1, 5, 2), (1,) * 8], ids=str)
def test_any_layout_and_any_micro_batches(model, expected, layout, cuts):
    "Same loss and gradient however the step is cut, padded or packed, with a filler as the last micro-batch"
    for name, w, level in SETTINGS:
        objective, rows = objective_of(name, w, level), iter(weighted_rows())
        batches = [LAYOUTS[layout]([next(rows) for _ in range(n)]) for n in cuts] + [filler_batch(LAYOUTS[layout], objective_of(name, w, level))]
        loss, grad = step(model, objective, batches)
        want, want_grad = expected[name, w, level]
        assert abs(loss - want) < 1e-5 * max(1, abs(want)), (name, w, level)
        assert (grad - want_grad).norm() < 1e-4 * want_grad.norm(), (name, w, level)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_one_change_no_bit(model, layout):
    "Loss, gradient, denominators and metrics, in training and in evaluation"
    plain = [{k: v for k, v in r.items() if k not in KEYS} for r in weighted_rows()]
    ones = [r | dict(weights=[1.0] * len(r["input_ids"]), row_weight=1.0) for r in plain]
    for name, w, level in SETTINGS:
        o = objective_of(name, w, level)
        a, b = ([LAYOUTS[layout](rows[:3]), LAYOUTS[layout](rows[3:])] for rows in (plain, ones))
        assert data_weights(a[0]) is None and data_weights(b[0]) is not None
        for x, y in zip(a, b): assert torch.equal(o.step_counts(x), o.step_counts(y)), (name, w, level)
        (loss, grad), (loss_ones, grad_ones) = step(model, o, a), step(model, o, b)
        assert loss == loss_ones and torch.equal(grad, grad_ones), (name, w, level)
        with torch.no_grad():
            for score_all in (False, True):
                sums = [o.metric_sums(o.score(model, x[0], score_all), x[0]) for x in (a, b)]
                assert torch.equal(*sums), (name, w, level, score_all)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_at_weight_zero(model, layout):
    "Other tokens in the place of a last message of weight 0, and in a row of weight 0, change neither loss nor gradient by a bit"
    rows = [r for r in weighted_rows() if len(r["input_ids"]) > 4]
    for r in rows: r["weights"] = [1.0] * (len(r["input_ids"]) - 3) + [0.0] * 3
    rows[2]["row_weight"] = 0.0
    others = [r | dict(input_ids=r["input_ids"][: 0 if r["row_weight"] == 0 else -3] + [3 + (7 * t + n) % 50 for t, n in enumerate(r["input_ids"][0 if r["row_weight"] == 0 else -3 :])]) for r in rows]
    for name, w, level in SETTINGS:
        o = objective_of(name, w, level)
        (loss, grad), (loss_others, grad_others) = (step(model, o, [LAYOUTS[layout](x)]) for x in (rows, others))
        assert grad.norm() > 0 and loss == loss_others and torch.equal(grad, grad_others), (name, w, level)


def test_tokens_of_weight_zero_are_not_scored(model):
    "Labels, positions for the head and counts leave them out; irl scores the successor of a weighted token too"
    rows = weighted_rows()
    for layout, collator in LAYOUTS.items():
        batch = collator(rows)
        used = (data_weights(batch, shifted=False).products(batch["sequence"]) > 0) & batch["completion_mask"]
        for o in (SFTObjective("plw"), SFTObjective("irl")):
            labels = o.labels(batch)
            labelled = labels != -100
            assert (labelled & used).sum() == used.sum() and len(o.host_inputs(batch)["scored_positions"]) == labelled.sum(), layout
            assert labelled.sum() > used.sum() if o.name == "irl" else torch.equal(labelled, used), layout
            assert dict(zip(o.COUNTS, o.step_counts(batch)[-len(o.COUNTS) :].tolist()))["trained_tokens"] == used.sum(), layout
        irl = SFTObjective("irl").labels(batch) != -100
        after_used = torch.nn.functional.pad(used[:, :-1], (1, 0))
        assert not (irl & ~used & ~after_used).any(), layout


@pytest.mark.parametrize("name,level", [(n, v) for n in SFT_LOSSES for v in (False, True)])
def test_gradient_is_linear_in_a_weight(model, name, level):
    "For given denominators: in the weight of one message at the token level, in the weight of one row at both levels"
    o, rows = objective_of(name, 0.3, level), weighted_rows()
    total = o.step_counts(PadCollator(0)(rows))[: -len(o.COUNTS)]
    def of(weight, what):
        changed = copy.deepcopy(rows)
        if what == "row": changed[4]["row_weight"] = weight
        else: changed[4]["weights"][3:6] = [weight] * 3
        return step(model, o, [PadCollator(0)(changed)], total)
    for what in ("row",) if level else ("row", "message"):
        (l0, g0), (l1, g1), (l3, g3) = (of(weight, what) for weight in (0.0, 1.0, 3.0))
        assert (g1 - g0).norm() > 1e-3 * g0.norm(), what
        assert abs((l3 - l0) - 3 * (l1 - l0)) < 1e-5 * abs(l1 - l0) + 1e-5 and (g3 - g0 - 3 * (g1 - g0)).norm() < 1e-4 * g3.norm(), what


def test_weights_are_relative(model):
    "All weights of a step times a number is the same step; a row of weight 2 is the row twice"
    rows = weighted_rows()
    for name, w, level in SETTINGS:
        o = objective_of(name, w, level)
        loss, grad = step(model, o, [PadCollator(0)(rows)])
        scaled = [r | dict(row_weight=r["row_weight"] * 0.125) for r in rows]
        if not level: scaled = [r | dict(weights=[4 * d for d in r["weights"]]) for r in scaled]
        for other in (scaled, [r | dict(row_weight=1.0) for r in rows for _ in range(int(4 * r["row_weight"]))]):
            same, same_grad = step(model, o, [PadCollator(0)(other)])
            assert abs(loss - same) < 1e-5 and (grad - same_grad).norm() < 1e-4 * grad.norm(), (name, w, level)


@pytest.mark.parametrize("bad", [dict(row_weight=-1.0), dict(row_weight=float("nan")), dict(weights=[1.0, float("inf"), 1.0]), dict(weights=[1.0])], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_without_a_meaning_are_refused(bad, layout):
    with pytest.raises(UserError, match="Row r5"): LAYOUTS[layout]([dict(input_ids=[3, 4, 5], completion_mask=[0, 1, 1], row_id="r5") | bad])


@pytest.mark.parametrize("name,layout", [("plw", "padded"), ("plw-seq", "packed"), ("ln-plw", "padded"), ("irl", "packed"), ("qrpo-finite", "padded"), ("dpo", "packed")])
def test_nothing_asks_the_device(name, layout):
    "As without weights: a micro-batch never waits for the device"
    objective, batch = no_sync.OBJECTIVES[name], no_sync.micro_batch(name, layout)
    n = len(batch["row_index"])
    batch |= dict(row_weights=torch.tensor([0.5, 0.0, 2.0, 1.0][:n]))
    if isinstance(objective, SFTObjective): batch |= dict(weights=torch.arange(batch["input_ids"].numel()).view(batch["input_ids"].shape) % 3 / 2)
    batch |= objective.host_inputs(batch)
    model = add_score_head(trainer_model())
    with no_sync.Waits() as waits: no_sync.run(objective, batch, model)
    assert not waits.split()[0], waits.split()[0]


def test_from_raw_rows_to_the_loss():
    "Weights of a row, of messages and of spans (train_detail) as people write them, through tokenization and collation: the tokens that are trained, their weights, and the loss"
    tokenizer = toy_tokenizer("bpe", "apertus_mistral_special_tokens")
    def talk(answers, **row):
        return dict(messages=[m for n, extra in enumerate(answers) for m in (dict(role="user", content=f"question {n}?"), dict(role="assistant", content=f"answer {n}", **extra))], **row)
    half = dict(train_detail=[dict(begin_offset=0, end_offset=6, train=False), dict(begin_offset=7, end_offset=7, train=True)])
    rows = [talk([dict(weight=0), dict(weight=0.5)], weight=3.0), talk([half], weight=1.0), talk([{}], weight=0.25)]
    data, counts = tokenize_dataset(Dataset.from_list(rows), tokenizer)
    model, o = make_model_of(len(tokenizer)), SFTObjective("plw")
    batch = PadCollator(0)([{**r, "row_index": i} for i, r in enumerate(data)])
    used = (data_weights(batch, shifted=False).products(batch["sequence"]) > 0) & batch["completion_mask"]
    texts = [tokenizer.decode(ids[u], skip_special_tokens=True).strip() for ids, u in zip(batch["input_ids"], used)]
    assert texts == ["answer 1", "0", "answer 0"] and counts["trained_tokens"] == used.sum()
    loss, grad = step(model, o, [batch])
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    want = weighted_oracle("plw", exact, [(r["input_ids"], r["completion_mask"], r["weights"], r["row_weight"]) for r in data])
    want.backward()
    assert abs(loss - want.item()) < 1e-5 and (grad - grads(exact)).norm() < 1e-4 * grads(exact).norm()


# -- the trainer

TRAINED = {o: OBJECTIVES[o] for o in ("sft", "plw0", "plw-seq", "ln-plw", "ln-plw-seq", "irl")}
ONE = {"left": (1, 4, dict(side="left")), "packed": (2, 2, dict(packed=True))}


def loss_of(model, rows, name, **o):
    return weighted_oracle(name, model, [(r["input_ids"], r["completion_mask"], r["weights"], r["row_weight"]) for r in rows], **o)


def sgd(todo, loss_of_rows, parameters, lr, rows):
    "Losses, gradient norms and evaluation losses of plain SGD"
    losses, norms, evals = [], [], []
    for n, step in enumerate(todo, 1):
        loss = loss_of_rows([rows[i] for i in step])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(loss.item())
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm().item())
        with torch.no_grad():
            for p, g in zip(parameters, found):
                if g is not None: p -= lr * g
            if n % 3 == 0: evals.append(loss_of_rows(rows).item())
    return dict(loss=losses, grad_norm=norms, eval_loss=evals)


@lru_cache
def trained(name):
    "What a training run on weighted rows has to give, and the final model"
    model, o = trainer_model().double(), TRAINED[name]
    found = sgd(steps(), lambda rows: loss_of(model, rows, **o), list(model.parameters()), rate(o), make_rows(weighted=True))
    with torch.no_grad(): found["eval_completion_loss"] = loss_of(model, make_rows(weighted=True), "plw").item()
    return found, model.state_dict()


def compare(lines, found, label, tol=3e-5):
    "Losses, norms and evaluation losses of a run are those of the oracle"
    for key in ("loss", "grad_norm", "eval_loss"):
        have = torch.tensor([line[key] for line in lines if key in line])
        torch.testing.assert_close(have, torch.tensor(found[key]), rtol=10 * tol, atol=tol, msg=lambda m: f"{label}: {key}: {m}")


def check(case, folder, world=1, tol=3e-5):
    "Rows, losses, norms, weights, metrics and counts of a case are those of the oracle"
    found, weights = trained(case["objective_name"])
    seen = [json.loads((folder / f"seen-{r}.json").read_text()) for r in range(world)]
    assert [sorted(i for r in seen for i in r[s]) for s in range(len(seen[0]))] == [sorted(s) for s in steps()]
    lines = json.loads((folder / "lines.json").read_text())
    compare(lines, found, case["name"], tol)
    assert abs(lines[-1]["eval_completion_loss"] - found["eval_completion_loss"]) < 1e-3
    saved = load_file(folder / f"checkpoint-{len(found['loss'])}" / "model.safetensors")
    for name, w in weights.items(): torch.testing.assert_close(saved[name].double(), w, rtol=0, atol=tol, msg=lambda m: f"{case['name']}: {name}: {m}")
    rows, prompts = make_rows(weighted=True), case["objective"].get("prompt_loss_weight", 0) > 0 or case["objective"]["name"] == "sft"
    def each(i): return [d * rows[i]["row_weight"] for d, flag in zip(rows[i]["weights"][1:], rows[i]["completion_mask"][1:]) if flag or prompts]
    for line, step in zip([line for line in lines if "loss" in line], steps()):
        assert line["trained_weight"] == pytest.approx(sum(sum(each(i)) for i in step))
        assert line["trained_tokens"] == sum(sum(x > 0 for x in each(i)) for i in step)


def sft_case(name, cut, per_device, accumulation, **more):
    return dict(name=f"{name}-{cut}", objective_name=name, objective=TRAINED[name], per_device=per_device, accumulation=accumulation, weighted=True, **more)


def run_all(tmp_path, todo, world=1, script="trainer_worker.py"):
    (tmp_path / "cases.json").write_text(json.dumps(todo))
    start_ranks(world, [tmp_path / "cases.json", tmp_path], script=script)


def test_trainer(tmp_path):
    todo = [sft_case(name, cut, b, a, **kw) for name in TRAINED for cut, (b, a, kw) in ONE.items()]
    run_all(tmp_path, todo)
    for case in todo: check(case, tmp_path / case["name"])


@pytest.mark.slow
def test_trainer_on_two_ranks(tmp_path):
    todo = [sft_case("plw0", "two", 1, 2), sft_case("irl", "two-packed", 2, 1, packed=True), sft_case("ln-plw-seq", "two-left", 2, 1, side="left")]
    run_all(tmp_path, todo, world=2)
    for case in todo: check(case, tmp_path / case["name"], world=2)


@pytest.mark.slow
def test_adapters(tmp_path):
    "LoRA on weighted rows: losses, norms and the merged weights are those of multiplied matrices"
    objective = dict(name="plw", prompt_loss_weight=0.1)
    todo = [dict(name="lora", objective=objective, per_device=2, accumulation=2, lora=lora.LORA, weighted=True)]
    run_all(tmp_path, todo)
    base, ab, full = lora.start(False)
    def model(**kw): return torch.func.functional_call(base, lora.multiplied(base, ab, full), kwargs=kw)
    found = sgd(steps(), lambda rows: loss_of(model, rows, **objective), [*ab.values()], rate(objective), make_rows(weighted=True))
    compare(json.loads((tmp_path / "lora" / "lines.json").read_text()), found, "lora")
    saved = load_file(tmp_path / "lora" / f"checkpoint-{len(found['loss'])}" / "model.safetensors")
    for name, w in lora.multiplied(base, ab, full).items(): torch.testing.assert_close(saved[name].double(), w.detach(), rtol=0, atol=3e-5)


# -- pairs

PAIRS = {o: pairs.OBJECTIVES[o] for o in ("qrpo", "qrpo-finite", "sigmoid-long", "mixed")}


def weighted_pair_loss(model, rows, o):
    "Each loss by itself: the pairs' losses times their weights, over the sum of weights (for sft over the weighted number of chosen tokens)"
    names = o["loss_type"] if isinstance(o["loss_type"], list) else [o["loss_type"]]
    total = 0.0
    for name, factor in zip(names, o.get("loss_weights", [1.0] * len(names))):
        one = o | dict(loss_type=name, loss_weights=[1.0])
        losses = [(row["row_weight"], pairs.pair_oracle(model, [row], one), sum(row["chosen_scored"]) if name == "sft" else 1) for row in rows if row["row_weight"]]
        total = total + factor * sum(r * n * loss for r, loss, n in losses) / sum(r * n for r, _, n in losses)
    return total


@lru_cache
def trained_pairs(name):
    model = trainer_model().double()
    found = sgd(pairs.steps(), lambda rows: weighted_pair_loss(model, rows, PAIRS[name]), list(model.parameters()), pairs.RATE, pairs.make_pairs(weighted=True))
    return found, model.state_dict()


def run_pairs(tmp_path, names, cuts, world=1):
    todo = [dict(name=f"{o}_{cut}", objective=o, args=PAIRS[o], per_device=b, accumulation=a, weighted=True, **kw) for o in names for cut, (b, a, kw) in cuts.items()]
    run_all(tmp_path, todo, world, "preference_worker.py")
    for case in todo:
        found, weights = trained_pairs(case["objective"])
        lines = json.loads((tmp_path / case["name"] / "lines.json").read_text())
        compare(lines, found, case["name"])
        saved = load_file(tmp_path / case["name"] / f"checkpoint-{len(found['loss'])}" / "model.safetensors")
        for name, w in weights.items(): torch.testing.assert_close(saved[name].double(), w, rtol=0, atol=3e-5, msg=lambda m: f"{case['name']}: {name}: {m}")
        each = [row["row_weight"] for row in pairs.make_pairs(weighted=True)]
        for line, step in zip([line for line in lines if "loss" in line], pairs.steps()): assert line["trained_weight"] == sum(each[i] for i in step)


def test_pairs(tmp_path):
    run_pairs(tmp_path, PAIRS, {k: pairs.ONE[k] for k in ("left", "packed")})


@pytest.mark.slow
def test_pairs_on_two_ranks(tmp_path):
    run_pairs(tmp_path, ["mixed"], {"two": pairs.TWO["two"]}, world=2)


@pytest.mark.slow
def test_reference_of_weighted_pairs(tmp_path):
    "A reference that is computed before training scores the pairs of weight 0 too"
    todo = [dict(name=f"computed-{w}", objective="sigmoid", args=pairs.OBJECTIVES["sigmoid"], per_device=2, accumulation=2, computed=True, weighted=w) for w in (False, True)]
    run_all(tmp_path, todo, script="preference_worker.py")
    plain, weighted = (json.loads((tmp_path / case["name"] / "reference.json").read_text()) for case in todo)
    assert plain == weighted and 0.0 not in plain[0]
