"A worker whose results depend on the whole batch that they were computed in, as floating point does: `shards_worker.py NAME FOLDER --shard N`"
import hashlib
import json
import os
import sys
import time

from post_training.core.files import UserError
from post_training.core.shards import run_shard_worker, pack_floats, seed_of


def note(folder, batch):
    "One line for each batch that was begun"
    fd = os.open(folder / "calls.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (json.dumps(batch) + "\n").encode())
    os.close(fd)


def toy(folder, plan):
    "Waits for as long as the plan says"
    def make(batch):
        note(folder, batch)
        time.sleep(plan.params.get("wait", 0))
        together = hashlib.sha256(json.dumps(batch).encode()).digest()
        return [dict(dropped=f"reason {i % 3}") if i % 7 == 3 else
                dict(id=plan.keys[i], score=together[0] / 3 + i, seed=seed_of(plan.keys[i], 0), text="é\ud800 \u2028", logps=pack_floats([b / 256 for b in together[:4]])) for i in batch]
    return make


def fault(folder, plan):
    "Falls over the row that the plan names"
    def make(batch):
        if plan.params["row"] in batch: raise MemoryError("no more memory")
        return toy(folder, plan)(batch)
    return make


def mistake(folder, plan):
    "The worker that comes first makes it, once the other is at work"
    try: (folder / "first").touch(exist_ok=False)
    except FileExistsError: return toy(folder, plan)
    while not (folder / "calls.txt").exists() or len((folder / "calls.txt").read_text().splitlines()) < 3: time.sleep(0.01)
    raise UserError("There is no model 'tini'.")


if __name__ == "__main__": sys.exit(run_shard_worker(dict(toy=toy, fault=fault, mistake=mistake)))
