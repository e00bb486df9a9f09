"Measuring at scale: the search for the largest batch, what does not fit, communication, and the projection's arithmetic. Nothing here asserts a time."
import math

import pytest

from post_training.core.files import UserError
from post_training.bench.scale import zero_communication, expected_memory, training_fits, bisect_largest, project_training, project_table, apertus_config, ProjectionAssumptions
from post_training.launch.model_sizes import flops_per_token, parameter_counts

EIGHT, SEVENTY = "swiss-ai/Apertus-8B-2509", "swiss-ai/Apertus-70B-2509"


@pytest.mark.parametrize("bound", [0, 1, 2, 3, 7, 8, 9, 31, 100, 1000])
def test_the_largest_batch_is_found_in_few_tries(bound):
    tried = []
    assert bisect_largest(lambda n: tried.append(n) or n <= bound, 100) == min(bound, 100)
    assert len(tried) == len(set(tried)) <= 2*math.log2(bound + 2) + 2 and max(tried) <= 100


def test_only_a_lack_of_memory_is_no_fit():
    for text in ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "RuntimeError: [enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory", "MemoryError: "):
        assert not training_fits(dict(failed=text))
    with pytest.raises(RuntimeError, match="no such loss"): training_fits(dict(failed="UserError: no such loss"))


def test_expected_memory_grows():
    total = lambda **kw: expected_memory(apertus_config(), **kw)["total"]
    assert total(rows=4) > total(rows=2) and total(tokens=2048) > total() and total(loss="qrpo") > total() == total(loss="irl")
    assert total(rows=8, checkpointing=True) < total(rows=8) and total(dtype="bfloat16") < total()


def test_bytes_of_zero():
    "Of S bytes that are gathered or scattered each GPU sends S (W-1)/W; ZeRO-3 moves weights twice and gradients once, per micro-batch"
    n = 10**9
    assert zero_communication(n, 1, 8, 16)[0] == zero_communication(n, 1, 8)[0] == pytest.approx(2*2*n*7/8)
    assert zero_communication(n, 2, 8, 16)[0] == pytest.approx(17*2*n*7/8)
    assert zero_communication(n, 3, 8, 16)[0] == pytest.approx(48*2*n*7/8)
    assert zero_communication(n, 3, 4)[1] == pytest.approx(6*n*3/4/300e9) # within a node
    assert zero_communication(n, 3, 512)[1] == pytest.approx(6*n*127/128/80e9) # between 128 nodes, four ports each


def test_projection_is_the_estimate_where_nothing_is_sent():
    free = project_training(EIGHT, 64, assumed=ProjectionAssumptions(network=1e18, nvlink=1e18, utilization=0.4))
    assert free["mfu"] == pytest.approx(0.4*flops_per_token(EIGHT)/flops_per_token(EIGHT, recompute=True))
    peak = project_training(EIGHT, 1, device="h200", recompute=False, assumed=ProjectionAssumptions(utilization=1, overlap=1))
    assert peak["tokens_per_s_per_gpu"] == pytest.approx(20_470, rel=0.001) and flops_per_token(EIGHT)/1e9 == pytest.approx(48.3, abs=0.05)


def test_overlap_hides_no_more_than_there_is():
    none, all_of_it = (project_training(SEVENTY, 512, 3, assumed=ProjectionAssumptions(network=1e8, overlap=o)) for o in (0, 1))
    assert all_of_it["tokens_per_s_per_gpu"] > none["tokens_per_s_per_gpu"]
    assert 4096/all_of_it["tokens_per_s_per_gpu"] == pytest.approx(all_of_it["communication_s"], rel=1e-6) # then the network alone decides


def test_projected_days_and_memory():
    table = project_table({"8B": (EIGHT, 2), "70B": (SEVENTY, 3)})
    assert len(table) == 16 and table[table.model == "8B"].fits.all() and not table[(table.model == "70B") & (table.gpus <= 8)].fits.any()
    assert (table.days_per_1e9*table.tokens_per_s_per_gpu*table.gpus*86400/1e9).to_numpy() == pytest.approx(1)
    with pytest.raises(UserError, match="Did you mean"): project_training(EIGHT, 4, device="gh20")


def test_sizes_are_those_of_the_model():
    from post_training.bench.scale import ScaleModel, build_bench_model
    model = ScaleModel(512, 64, 1, 96)
    assert sum(p.numel() for p in build_bench_model(model).parameters()) == parameter_counts(model.config)["total"]
