"On a terminal each stage shows what it does: a command in a pseudo-terminal, with its defaults where they are short"
import os
import pty
import re
import select
import subprocess
import time

import pytest
from conftest import BIN, ROOT

from post_training.launch.recipe import recipe_parameters

RECIPES = sorted((ROOT / "nbs/recipes").glob("*.ipynb"))


def in_terminal(argv, seconds=300):
    "The exit code of a command, and what it wrote to a terminal of 80 columns"
    master, slave = pty.openpty()
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=os.environ | dict(COLUMNS="80", NO_COLOR="1"))
    os.close(slave)
    out, end = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if not select.select([master], [], [], 0.2)[0]:
                if process.poll() is not None: break
                continue
            try: out += os.read(master, 65536)
            except OSError: break  # the terminal has no other end any more
        return process.wait(timeout=60), out.decode(errors="replace")
    finally:
        process.kill()
        os.close(master)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_each_stage_runs_with_its_defaults_and_shows_what_it_does(recipe, shared_root):
    "The recipe's own parameters, by the command: the cell, the steps or rows, and the time on one line; then the record"
    words = recipe_parameters(recipe)["overrides"]
    code, text = in_terminal([str(BIN / "post-training"), recipe.stem, *words])
    assert code == 0, text[-3000:]
    lines = [line for line in re.split(r"\r\x1b\[2K|\r?\n", text) if line]
    shown = [line for line in lines if re.match(r"\[\d+ of \d+\] .*; \d+ s$|starting the notebook; ", line)]
    assert shown and max(map(len, shown)) < 80, lines
    if recipe.stem.startswith("train_"): assert any(re.search(r"Training; step \d+ of \d+", line) for line in shown), shown
    assert any(line.startswith("record ") for line in lines[-4:]) and lines[-1].startswith(f"{recipe.stem}: ")
