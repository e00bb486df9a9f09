"The benchmark of whole runs: both sides start from the same files, train the same answers and keep their phases; no time is asserted"
import json
from pathlib import Path

import pytest

from post_training.bench.training import PHASES, TRAINING_VARIANTS, mixed_length_chats, measure_run, our_overrides, write_inputs
from post_training.config.compose import compose

HOW = dict(max_length=128, per_device=2, accumulation=2, steps=2, learning_rate=1e-3, device="cpu", dtype="float32")


def test_the_same_rows_every_time(tmp_path):
    assert mixed_length_chats(5, median=6) == mixed_length_chats(5, median=6) != mixed_length_chats(5, median=6, seed=1)
    written = write_inputs(tmp_path, rows=6, held_out=2, hidden=32, layers=1, median=6)
    lines = {n: (tmp_path / f"{n}.jsonl").read_text().splitlines() for n in ("rows", "held_out")}
    assert written["rows"] == 6 and [len(v) for v in lines.values()] == [6, 2]
    assert not set(lines["rows"]) & set(lines["held_out"])
    assert "{%- generation -%}" in json.dumps(json.loads((tmp_path / "model/tokenizer_config.json").read_text()) | dict(
        template="".join(p.read_text() for p in Path(tmp_path, "model").glob("*.jinja"))))


@pytest.mark.parametrize("variant", TRAINING_VARIANTS)
def test_both_sides_get_the_same_arguments(variant):
    cfg = compose("train_sft", our_overrides("/in", dict(HOW, packing=TRAINING_VARIANTS[variant][1]))).cfg
    t = cfg["training_args"]
    assert (t["max_steps"], t["per_device_train_batch_size"], cfg["global_batch_size"], t["packing"]) == (2, 2, 4, TRAINING_VARIANTS[variant][1])
    assert (t["max_grad_norm"], t["weight_decay"], t["optim"], t["lr_scheduler_type"]) == (1, 0, "adamw_torch", "constant")
    assert cfg["plw_args"]["prompt_loss_weight"] == 0 and cfg["trainer"] == "plw"


@pytest.mark.slow
def test_every_way_learns():
    table = measure_run(1, tuple(TRAINING_VARIANTS), dict(rows=16, held_out=4, hidden=32, layers=1, median=8), **HOW)
    assert list(table.index) == list(TRAINING_VARIANTS) and (table[list(PHASES)] >= 0).all(None)
    assert (table.loss_after < table.loss_before).all()
    assert table.loss_after.max() - table.loss_after.min() < 0.2 * table.loss_before.max()
