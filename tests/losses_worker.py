"One rank of test_two_processes: `losses_worker.py MODE OUT` with torch's rendezvous variables set; MODE is ddp, zero2, zero3, zero3-tied or zero3-trl"
import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from post_training.models import score
from test_losses import count, collate, grads, make_model, make_rows, micro_loss

SETTINGS = [("plw", 0.1, False), ("ln-plw", 0.1, True), ("irl", 0.0, False), ("irl", 0.1, True)]


def micro_batches(rank):
    "Rank 0 has two rows, rank 1 four (one is all prompt, one a single token); both end with a filler row, as a smaller last step does"
    rows = make_rows()
    batches = [[rows[:1], rows[1:2]], [rows[2:5], rows[5:]]][rank]
    batches = [collate(b, "right") for b in batches]
    inputs, *masks, sequence = collate([([3, 4, 5], [0, 0, 0])], "right")
    return [*batches, (inputs, *[m * 0 for m in masks], sequence * 0 - 1)]


def total_of(name, batches, w, level):
    "Denominators of the step: over this rank's micro-batches, then over ranks"
    total = sum(count(name, b, w, level) for b in batches)
    dist.all_reduce(total)
    return total


def engine_of(mode, model, n_micro):
    "The model under DDP or a DeepSpeed engine, and a function that returns the step's gradient from it"
    if mode == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        return wrapped, None
    import deepspeed

    config = dict(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=n_micro, zero_allow_untested_optimizer=True,
                  zero_force_ds_cpu_optimizer=False, gradient_clipping=1e9, zero_optimization=dict(stage=int(mode[4])))
    if mode.startswith("zero3"):
        from transformers.integrations import HfDeepSpeedConfig

        model.ds_config = HfDeepSpeedConfig(config)  # kept alive: transformers then knows of ZeRO-3
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    return engine, deepspeed


def weights_of(model, deepspeed, mode):
    "All weights as one vector, gathered where they are sharded"
    context = deepspeed.zero.GatheredParameters(list(model.parameters())) if mode.startswith("zero3") else nullcontext()
    with context: return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def step(mode, setting, rank):
    "One optimizer step: the loss over all ranks and the gradient (with SGD at rate 1, what the weights lost)"
    model = make_model(tie_word_embeddings="tied" in mode)
    batches = micro_batches(rank)
    total = total_of(*setting[:1], batches, *setting[1:])
    engine, deepspeed = engine_of(mode, model, len(batches))
    before = None if deepspeed is None else weights_of(model, deepspeed, mode)
    loss = torch.zeros((), dtype=torch.float64)
    for i, b in enumerate(batches):
        last = i == len(batches) - 1
        with engine.no_sync() if deepspeed is None and not last else nullcontext():
            share = micro_loss(engine, setting[0], b, *setting[1:], total)
            loss += share.detach()
            scaled = share * dist.get_world_size()  # the engines average over ranks
            if deepspeed is None: scaled.backward()
            else: engine.backward(scaled * len(batches)); engine.step()  # and over micro-batches
    dist.all_reduce(loss)
    return loss.item(), grads(model) if deepspeed is None else before - weights_of(model, deepspeed, mode)


def main(mode, out):
    "All settings, one after the other; rank 0 saves"
    rank = int(os.environ["RANK"])
    if mode.endswith("trl"): score.head_kernel = lambda device: "trl"  # what a GPU would take
    if mode == "ddp": dist.init_process_group("gloo")
    else:
        import deepspeed

        deepspeed.init_distributed("gloo")
    found = {s: step(mode, s, rank) for s in SETTINGS}
    if rank == 0: torch.save(found, out)
    dist.barrier()


if __name__ == "__main__": main(*sys.argv[1:])
