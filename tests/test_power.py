"`post-training power` on the answers of evaluations, typed as a user would"
import json

import numpy as np
import pytest

from post_training import cli
from post_training.core.files import write_json


@pytest.fixture
def pilot(tmp_root, monkeypatch):
    "A finished run of evaluate with six checkpoints, of which three are seeds of a better one"
    rng, run = np.random.default_rng(0), tmp_root / "runs/e1"
    hard = rng.random(120)
    output = tmp_root / "out"
    output.mkdir()
    with open(output / "answers.jsonl", "w") as f:
        for name in ("a1", "a2", "a3", "b1", "b2", "b3"):
            for i, h in enumerate(hard):
                for j in range(4):
                    right = None if i == 7 else bool(rng.random() > h - .1 * (name[0] == "b"))
                    f.write(json.dumps(dict(checkpoint=name, row=i, sample=j, right=right)) + "\n")
    write_json(run / "record.json", dict(stage="evaluate", status="finished", final=dict(output=str(output))))
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(tmp_root / "runs"))
    return "e1"


@pytest.mark.parametrize("words, says", [
    (["--before", "a1", "--after", "b1"], ["before a1; after b1; 119 prompts, 4 samples each", "90 % range", "one training seed"]),
    (["--before", "a1,a2,a3", "--after", "b1,b2,b3", "--difference", "0.1"], ["before a1, a2, a3; after b1, b2, b3", "seeds"]),
    (["--after", "b2", "--power", ".9"], ["before a1; after b2", "power 0.9"])])
def test_what_the_next_evaluation_needs(pilot, words, says, capsys):
    assert cli.main(["power", pilot, *words]) == 0
    out = capsys.readouterr().out
    assert all(s in out for s in says), out


@pytest.mark.parametrize("words, says", [
    ([], "RUN"), (["e2"], "no run 'e2'"), (["e1", "--before", "a4"], "--before a4: the run has a1, a2"), (["e1", "--difference", "2"], "--difference 2.0: give a number between 0 and 1"),
    (["e1", "--difference", "two"], "two"), (["e1", "--before", "a1,a2", "--after", "b1"], "at least two checkpoints on each side")])
def test_mistakes(pilot, words, says, capsys):
    assert cli.main(["power", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
