"The trainer against an fp64 oracle: any cut of the global batch into micro-batches, accumulation, ranks, padding and packing trains the same model"
import copy
import json
import os
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from oracle import oracle
from trainer_worker import GLOBAL_BATCH, ROWS, make_model, make_rows, rate

from post_training.core.fork_server import forked_command
from post_training.training.data_order import row_order

HERE = Path(__file__).parent
OBJECTIVES = {
    "sft": dict(name="sft"),
    "plw0": dict(name="plw", prompt_loss_weight=0.0),
    "plw": dict(name="plw", prompt_loss_weight=0.1),
    "plw-seq": dict(name="plw", prompt_loss_weight=0.1, sequence_level=True),
    "ln-plw": dict(name="ln-plw", prompt_loss_weight=0.3),
    "ln-plw-seq": dict(name="ln-plw", prompt_loss_weight=0.3, sequence_level=True),
    "irl0": dict(name="irl", prompt_loss_weight=0.0),
    "irl": dict(name="irl", prompt_loss_weight=0.1, lambda_td=0.3, gamma=0.9),
    "dft": dict(name="dft", prompt_loss_weight=0.1),
    "eaft-seq": dict(name="eaft", prompt_loss_weight=0.1, sequence_level=True),
}
ONE = {  # name: (rows of a micro-batch, accumulation, how they are laid out) in one process
    "whole": (4, 1, {}),
    "left": (1, 4, dict(side="left")),
    "packed": (2, 2, dict(packed=True)),
}
TWO = {"two": (1, 2, {}), "two-left": (2, 1, dict(side="left")), "two-packed": (2, 1, dict(packed=True))}


def steps():
    "The rows of each optimizer step of two epochs, the last step of each smaller"
    orders = [row_order(ROWS, 9, epoch) for epoch in range(2)]
    return [o[i : i + GLOBAL_BATCH].tolist() for o in orders for i in range(0, ROWS, GLOBAL_BATCH)]


@lru_cache
def expected(objective):
    "Losses, gradient norms, evaluation losses and final weights of plain SGD in fp64, one sequence after the other"
    model, rows, o = make_model().double(), make_rows(), dict(OBJECTIVES[objective])
    name = o.pop("name")
    def loss_of(step): return oracle(name, model, [(rows[i]["input_ids"], rows[i]["completion_mask"]) for i in step], **o)
    losses, norms, evals = [], [], []
    for n, step in enumerate(steps(), 1):
        model.zero_grad()
        loss = loss_of(step)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None: p -= rate(OBJECTIVES[objective]) * p.grad
            if n % 3 == 0: evals.append(loss_of(range(ROWS)).item())
    return losses, norms, evals, copy.deepcopy(model.state_dict())


def cases(cuts, objectives=OBJECTIVES):
    "Every objective under every cut"
    return [dict(name=f"{o}-{cut}", objective=OBJECTIVES[o], per_device=b, accumulation=a, **kw) for o in objectives for cut, (b, a, kw) in cuts.items()]


def start_ranks(world, args, env=None, script="trainer_worker.py"):
    "Start one process per rank on this machine's CPU and wait for all; a rank that fails fails the test with its errors"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | dict(
        WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    base |= env or dict(ACCELERATE_USE_CPU="true")
    command = forked_command([sys.executable, "-m", script.removesuffix(".py"), *map(str, args)])
    ranks = [subprocess.Popen(command, env=base | dict(RANK=str(r), LOCAL_RANK=str(r)), cwd=HERE,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(world)]
    try:
        for r, p in enumerate(ranks):
            text, _ = p.communicate(timeout=600)
            assert p.returncode == 0, f"rank {r} ended with {p.returncode}:\n{text[-4000:]}"
    finally:
        for p in ranks: p.kill()


def check(case, folder, world=1, tol=2e-5):
    "Rows, losses, norms and weights of a case are those of the oracle"
    from safetensors.torch import load_file

    losses, norms, evals, weights = expected(case["name"].rsplit("-", 2 if case["name"].endswith(("two-left", "two-packed")) else 1)[0])
    ranks = [json.loads((folder / f"seen-{r}.json").read_text()) for r in range(world)]
    seen = [sorted(i for r in ranks for i in r[s]) for s in range(len(ranks[0]))]
    assert seen == [sorted(s) for s in steps()], "no row twice, none left out"
    lines = json.loads((folder / "lines.json").read_text())
    train = [line for line in lines if "loss" in line]
    torch.testing.assert_close(torch.tensor([line["loss"] for line in train]), torch.tensor(losses), rtol=tol, atol=tol)
    torch.testing.assert_close(torch.tensor([line["grad_norm"] for line in train]), torch.tensor(norms), rtol=10 * tol, atol=tol)
    torch.testing.assert_close(torch.tensor([line["eval_loss"] for line in lines if "eval_loss" in line]), torch.tensor(evals), rtol=tol, atol=tol)
    saved = load_file(folder / f"checkpoint-{len(losses)}" / "model.safetensors")
    assert set(saved) == set(weights)
    for name, w in weights.items(): torch.testing.assert_close(saved[name].double(), w, rtol=0, atol=tol, msg=lambda m: f"{case['name']}: {name}: {m}")


def test_one_process(tmp_path):
    todo = cases(ONE, ["plw"]) + cases({k: ONE[k] for k in ("left", "packed")}, [o for o in OBJECTIVES if o != "plw"])
    dropping = [dict(c, name=f"drop-{c['name']}", drop_last=True) for c in cases({k: ONE[k] for k in ("whole", "left")}, ["plw"])]
    (tmp_path / "cases.json").write_text(json.dumps(todo + dropping))
    start_ranks(1, [tmp_path / "cases.json", tmp_path])
    for case in todo: check(case, tmp_path / case["name"])
    for case in dropping:  # the rows that do not fill a global batch are the same under any cut
        seen = json.loads((tmp_path / case["name"] / "seen-0.json").read_text())
        assert [sorted(s) for s in seen] == [sorted(s) for s in steps() if len(s) == GLOBAL_BATCH]


def test_two_processes(tmp_path):
    todo = cases(TWO, ["plw0", "irl"]) + cases({"two": TWO["two"]}, ["ln-plw-seq"])
    (tmp_path / "cases.json").write_text(json.dumps(todo))
    start_ranks(2, [tmp_path / "cases.json", tmp_path])
    for case in todo: check(case, tmp_path / case["name"], world=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(tmp_path, stage):
    todo = cases({"two": (1, 2, {})}, ["plw0", "irl0", "irl"] if stage > 1 else ["irl"])
    (tmp_path / "cases.json").write_text(json.dumps(todo))
    env = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage), DS_ACCELERATOR="cpu", ACCELERATE_MIXED_PRECISION="no",
               ACCELERATE_DEEPSPEED_ZERO3_INIT="false", ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")
    start_ranks(2, [tmp_path / "cases.json", tmp_path], env)
    for case in todo: check(case, tmp_path / case["name"], world=2)
