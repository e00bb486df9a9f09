"The table of stages: which stages get a GPU on Slurm, which keys follow from a stage's properties, and what a range error says"
import dataclasses

import pytest

from post_training.config import schema
from post_training.config.compose import compose
from post_training.core.files import UserError
from post_training.launch import slurm

CLUSTER = ["cluster=slurm", "cluster.device=cuda", "cluster.gpus_per_node=4", "cluster.time=2:00:00"]
EVALUATE = [*CLUSTER, "checkpoints=[tiny]", "dataset_name=rows", "dataset_args.dataset_name=rows"]


def directives(stage, overrides):
    cfg = compose(stage, overrides).cfg
    return slurm.gpus_of(cfg), slurm.sbatch_directives(cfg, "name", dict(output="log"))


@pytest.mark.parametrize("extra, gpus", [([], 1), (["tensor_parallel_size=2"], 2), (["cluster.device=cpu"], 0)])
def test_an_evaluation_on_slurm_asks_for_the_gpus_of_one_model(extra, gpus):
    count, options = directives("evaluate", [*EVALUATE, *extra])
    assert count == gpus and options.get("gpus-per-node", 0) == gpus
    assert "signal" not in options  # an evaluation is not saved before the time limit


def test_an_evaluation_with_too_few_gpus_is_refused():
    with pytest.raises(UserError, match="tensor_parallel_size=8 needs 8 GPUs of one node, and cluster.gpus_per_node is 4"):
        directives("evaluate", [*EVALUATE, "tensor_parallel_size=8"])


@pytest.mark.parametrize("gpu, count", [("true", 1), ("false", 0)])
def test_a_merge_asks_for_one_gpu_if_its_options_say_so(gpu, count):
    words = [*CLUSTER, "cluster.device=auto", "sources=[a,b]", f"options.gpu={gpu}"]
    found, options = directives("model_merging", words)
    assert found == count and options.get("gpus-per-node", 0) == count


def test_the_record_of_an_array_asks_for_no_gpu():
    words = [*CLUSTER, "dataset_args.dataset_name=rows", "model_args.model_name_or_path=tiny"]
    count, options = directives("ref_logprobs", words)
    assert count == 4 and "gpus-per-node" not in options


def test_a_new_stage_takes_its_keys_from_its_properties(monkeypatch):
    "One entry is enough: the keys of training and of a GPU are read by a stage that trains and uses a GPU"
    entry = dataclasses.replace(schema.STAGES["export"], trains=True, uses_gpu=True)
    monkeypatch.setitem(schema.STAGES, "distil", entry)
    schema.stage_keys.cache_clear()
    try:
        keys = schema.stage_keys("distil")
        for name in ("num_nodes", "wandb.project", "cluster.device", "cluster.gpu"): assert "distil" in keys[name].stages, name
        assert "distil" not in keys["max_drop_fraction"].stages
        assert schema.stages_with("trains")[-1] == "distil"
    finally: schema.stage_keys.cache_clear()


@pytest.mark.parametrize("override, text", [
    ("training_args.adam_beta2=1.0", "it must be at least 0 and below 1."),
    ("training_args.learning_rate=-1", "it must be between 0 and 100."),
    ("plw_args.prompt_loss_weight=2", "it must be between 0 and 1."),
    ("training_args.num_train_epochs=0", "it must be above 0 and at most 1000000.")])
def test_a_range_error_states_the_range_as_a_requirement(override, text):
    with pytest.raises(UserError) as e: compose("train_sft", [override])
    assert text in str(e.value)
