"The losses through the scoring forward of a real architecture against the oracle: micro-batches, padding, packing, ranks, engines."
import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle
from post_training.core.fork_server import forked_command
from post_training.losses.dft import SFT_LOSSES
from post_training.losses.irl import scored_tokens
from post_training.losses.logps import masked_labels
from post_training.losses.sft import loss_denominators, reduce_terms
from post_training.models import score
from post_training.models.score import add_score_head
from transformers import ApertusConfig, ApertusForCausalLM

HERE = Path(__file__).parent
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
IRL = dict(lambda_td=0.5, gamma=0.9)
SETTINGS = [(name, w, level) for name in SFT_LOSSES for w in ((0.1,) if name in ("dft", "eaft") else (0.0, 0.1, 1.0)) for level in (False, True)]


def make_model(seed=0, **more):
    torch.manual_seed(seed)
    model = ApertusForCausalLM(ApertusConfig(**SIZES, **more, attn_implementation="sdpa"))
    with torch.no_grad(): model.lm_head.weight.mul_(20)  # logits that are not all alike
    return add_score_head(model)


def make_rows(n=6, seed=0):
    "Conversations of several turns and lengths: one without a prompt, one without a completion, one of a single token"
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        length = int(torch.randint(4, 15, (1,), generator=g))
        flags = (torch.arange(length) // 3 % 2 == 1).long()
        if i == 1: flags[:] = 1
        if i == 2: flags[:] = 0
        if i == 3: length, flags = 1, flags[:1]
        rows.append((torch.randint(3, 61, (length,), generator=g).tolist(), flags.tolist()))
    return rows


def sequence_masks(ids, flags, number):
    "Columns of one sequence: ids, position, prompt, completion, number; the first token is in neither mask"
    real = [0] + [1] * (len(ids) - 1)
    return torch.tensor([ids, range(len(ids)), [r * (1 - f) for r, f in zip(real, flags)], [r * f for r, f in zip(real, flags)], [number] * len(ids)])


def collate(rows, layout):
    "A micro-batch as the model and the losses take it; layout: right, left or packed"
    columns = [sequence_masks(ids, flags, i) for i, (ids, flags) in enumerate(rows)]
    if layout == "packed": x = torch.cat(columns, 1)[:, None]
    else:
        T = max(c.shape[1] for c in columns)
        pad = torch.tensor([0, 0, 0, 0, -1])[:, None]
        joined = [[c, pad.expand(5, T - c.shape[1])] for c in columns]
        x = torch.stack([torch.cat(j if layout == "right" else j[::-1], 1) for j in joined], 1)
    ids, positions, prompt, completion, sequence = x
    attention = {} if layout == "packed" else dict(attention_mask=(sequence >= 0).long())
    return dict(input_ids=ids, position_ids=positions, **attention), prompt, completion, sequence


def micro_loss(model, name, batch, w, level, total=None):
    "One micro-batch's share of the step's loss; `total` holds the step's denominators"
    inputs, *masks = batch
    labels = masked_labels(inputs["input_ids"], scored_tokens(name, *masks, w, IRL["lambda_td"]))
    out = model(**inputs, labels=labels, score=True, with_values=name == "irl", with_entropy=name == "eaft")
    shifted = [m[:, 1:] for m in masks]
    extra = dict(irl=dict(IRL, values_BT=out.state_values), eaft=dict(entropy_BT=out.entropy)).get(name, {})
    return reduce_terms(SFT_LOSSES[name](out.log_probs, *shifted, w, level, **extra), total)


def count(name, batch, w, level):
    return loss_denominators(name, *[m[:, 1:] for m in batch[1:]], w, level)


def grads(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.fixture(scope="module")
def model(): return make_model()


@pytest.fixture(scope="module")
def expected(model):
    "Loss and gradient of each setting from the oracle, on an fp64 copy of the model"
    exact, found = copy.deepcopy(model).double(), {}
    for name, w, level in SETTINGS:
        exact.zero_grad()
        loss = oracle(name, exact, make_rows(), w, level, **IRL)
        loss.backward()
        found[name, w, level] = loss.item(), grads(exact)
    return found


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("cuts,kernel", [((6,), "tiles"), ((1, 5), "tiles"), ((2, 1, 3), "trl"), ((1,) * 6, "tiles")], ids=str)
def test_any_layout_and_any_micro_batches(model, expected, layout, cuts, kernel, monkeypatch):
    "Same loss and gradient however the step is cut, padded or packed (the cuts of one row include rows with nothing to train on)"
    monkeypatch.setattr(score, "head_kernel", lambda device: kernel)
    rows = iter(make_rows())
    batches = [collate([next(rows) for _ in range(n)], layout) for n in cuts]
    for name, w, level in SETTINGS:
        model.zero_grad()
        total = sum(count(name, b, w, level) for b in batches)
        loss = 0.0
        for b in batches:
            part = micro_loss(model, name, b, w, level, total)
            part.backward()
            loss += part.item()
        want, want_grad = expected[name, w, level]
        assert abs(loss - want) < 1e-5 * max(1, abs(want)), (name, w, level)
        assert (grads(model) - want_grad).norm() < 1e-4 * want_grad.norm(), (name, w, level)


def test_lambda_zero_is_ln_plw_through_the_model(model):
    batch = collate(make_rows(), "right")
    inputs, *masks = batch
    found = []
    for name, extra in (("ln-plw", {}), ("irl", dict(lambda_td=0.0))):
        model.zero_grad()
        labels = masked_labels(inputs["input_ids"], scored_tokens(name, *masks, 0.1, 0.0))
        out = model(**inputs, labels=labels, score=True)
        loss = reduce_terms(SFT_LOSSES[name](out.log_probs, *[m[:, 1:] for m in masks], 0.1, **extra))
        loss.backward()
        found.append((loss, grads(model)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_no_tensor_of_tokens_by_vocabulary(model):
    "Forward and backward make nothing of the size of the labelled positions times the vocabulary, but the kernel's one tile"
    from torch.utils._python_dispatch import TorchDispatchMode

    big = add_score_head(ApertusForCausalLM(ApertusConfig(**{**SIZES, "vocab_size": 70_000})))
    rows, sizes = [(list(range(3, 43)), [0] * 30 + [1] * 10)], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.shape for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    for name in ("plw", "irl", "dft", "eaft"):
        with Watch(): micro_loss(big, name, collate(rows, "right"), 0.0, False).backward()
        big.zero_grad()
    assert not [s for s in sizes if len(s) > 1 and s[-1] == 70_000]  # no logits
    tiles = {s[0] for s in sizes if len(s) == 2 and s[1] == score.tile_columns(10)}
    assert tiles == {10, SIZES["hidden_size"]}  # the ten completion tokens against a tile of the head, and that tile transposed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(mode, tmp_path, timeout=400):
    "Two processes of losses_worker.py; returns what rank 0 saved"
    env = os.environ | dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    command = forked_command([sys.executable, "-m", "losses_worker", mode, str(tmp_path / "out.pt")])
    logs = [open(tmp_path / f"rank{r}.log", "w+") for r in range(2)]
    ranks = [subprocess.Popen(command, env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), cwd=HERE, stdout=f, stderr=f) for r, f in enumerate(logs)]
    try: codes = [p.wait(timeout) for p in ranks]
    finally:
        for p in ranks:
            if p.poll() is None: p.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"rank{r}.log").read_text()[-2000:] for r in range(2))
    return torch.load(tmp_path / "out.pt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "zero3-tied", "zero3-trl"])
def test_two_processes(mode, tmp_path):
    "Two ranks with uneven rows, two micro-batches each, one of them with nothing to train on: the step equals the oracle's"
    exact = make_model(tie_word_embeddings="tied" in mode).double()
    for (name, w, level), (loss, change) in run_two(mode, tmp_path).items():
        exact.zero_grad()
        want = oracle(name, exact, make_rows(), w, level, **IRL)
        want.backward()
        want_grad = grads(exact)
        assert abs(loss - want.item()) < 1e-5 * max(1, abs(want.item())), (name, w, level)
        assert (change - want_grad).norm() < 1e-3 * want_grad.norm(), (name, w, level)
