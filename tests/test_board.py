"The board of runs: what it shows equals the records, what data says cannot run in it, and a real browser can use it"
import base64
import fcntl
import hashlib
import json
import re
import shutil
import threading
import time
from html.parser import HTMLParser

import pytest
from browser import open_browser
from conftest import ROOT

from post_training.view import board as b

DEMO = ROOT / "runs" / "examples" / "demo"
HOSTILE = "</script><script>window.bad=1</script><img src=x onerror=window.bad=2><!--\x1b[2J\u202egnp"


def put_run(root, name, **changes):
    "A copy of the kept record with other values"
    run_dir = root / "train_sft" / "demo" / name
    shutil.copytree(DEMO, run_dir)
    run_dir.chmod(0o755)
    record = json.loads((run_dir / "record.json").read_text())
    record["checkpoints_dir"] = str(root.parent / "artifacts" / name)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = record
        for p in path: place = place[int(p) if p.isdigit() else p]
        place[last] = value
    (run_dir / "record.json").write_text(json.dumps(record))
    return run_dir


@pytest.fixture
def runs(tmp_path):
    "Four runs: two that differ in their learning rate, one with hostile texts everywhere, one with a damaged record"
    root = tmp_path / "runs"
    put_run(root, "demo-0000000a", config__training_args__learning_rate=1e-4, evaluation__after__accuracy=.25)
    put_run(root, "demo-0000000b", config__training_args__learning_rate=1e-3, evaluation__after__accuracy=.75)
    evil = put_run(root, "x<img src=x onerror=window.bad=3>-0000000c", summary=HOSTILE, overrides=[HOSTILE], evaluation__after__accuracy=.5, notices=[HOSTILE],
                   counts__train__dropped={HOSTILE: 3}, config__job_subdir=HOSTILE, attempts__0__error=HOSTILE)
    (evil / "examples.json").write_text(json.dumps([dict(row_id=HOSTILE, source=HOSTILE, runs=[["prompt", False, HOSTILE], [HOSTILE, True, HOSTILE]])]))
    with open(evil / "metrics.jsonl", "a") as f: f.write(json.dumps({"step": 2000, HOSTILE: 1.0, "loss": "NaN"}) + "\n")
    for name, right in (("demo-0000000a", False), ("demo-0000000b", True), (evil.name, None)):
        kept = tmp_path / "artifacts" / name
        kept.mkdir(parents=True)
        answers = [dict(prompt="1 + 1", expected="2", got="2", right=True), dict(prompt="2 + 3", expected="5", got="5" if right else "6", right=right),
                   dict(prompt=HOSTILE, expected=HOSTILE, got=HOSTILE, right=None, finish_reason="length")]
        (kept / "evaluation-after.json").write_text(json.dumps(dict(samples=answers)))
    broken = root / "train_sft" / "demo" / "demo-0000000d"
    broken.mkdir()
    (broken / "record.json").write_text('{"stage": "train_sft", "sta')
    return root


class Page(HTMLParser):
    "Elements, their attributes, and the texts of scripts and styles"
    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] in ("script", "style") and data.strip(): self.texts.append((*self.found[-1], data))


def test_numbers_are_the_records(runs):
    "Each recorded number stands in the page and in the DataFrame as it is in the record; a damaged record is a row that names the damage"
    board = b.open_board(root=runs)
    b.write_board(board)
    data, = [json.loads(t) for _, a, t in Page((board.out / "index.html").read_text()).texts if a.get("id") == "board"]
    rows = [{k: c["v"][c["i"][n]] for k, c in data["columns"].items() if c["i"][n] >= 0} for n in range(data["count"])]
    rows = {r["name"]: r for r in rows}
    for name, accuracy in (("demo-0000000a", .25), ("demo-0000000b", .75)):
        record = json.loads((runs / "train_sft/demo" / name / "record.json").read_text())
        row = rows[name]
        assert (row["accuracy"], row["loss"], row["step"]) == (accuracy, record["final"]["train_loss"], record["final"]["step"])
        for key, value in record["final"]["metrics"].items(): assert row[f"final.metrics.{key}"] == value == row[f"last.{key}"]
        assert row["config.training_args.learning_rate"] == record["config"]["training_args"]["learning_rate"]
    assert rows["demo-0000000d"]["status"] == "damaged" and "runs repair demo-0000000d" in rows["demo-0000000d"]["damage"]
    frame = b.board_table(runs).set_index("name")
    assert frame.loc["demo-0000000b", "evaluation.after.skills.sum.accuracy"] == rows["demo-0000000b"]["evaluation.after.skills.sum.accuracy"]
    assert frame.loc["demo-0000000d", "status"] == "damaged"
    assert "<img" not in b.board_table(runs)._repr_html_()


def test_hostile_texts_stay_texts(runs):
    "The page has one script, which its policy allows by hash; no text of a record is markup, and no control character is left"
    board = b.open_board(root=runs)
    b.write_board(board)
    text = (board.out / "index.html").read_text()
    page = Page(text)
    assert [a.get("type") for tag, a in page.found if tag == "script"] == ["application/json", "application/json", None]
    assert not [(tag, a) for tag, a in page.found if tag in ("img", "iframe", "form") or any(k.startswith("on") for k in a)]
    policy, = [a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy"]
    code = {(tag, a.get("type")): t for tag, a, t in page.texts}
    for kind, text_of in (("script", code["script", None]), ("style", code["style", None])):
        allowed = re.search(rf"{kind}-src ([^;]*)", policy)[1]
        assert base64.b64encode(hashlib.sha256(text_of.encode()).digest()).decode() in allowed and "unsafe" not in allowed
    assert policy.startswith("default-src 'none'") and "*" not in policy
    for path in (board.out / "index.html", *(board.out / "data").iterdir()):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]|\\u202e|\\u001b", path.read_text()), path.name
        assert path.suffix == ".html" or "<" not in path.read_text()
    source = (ROOT / "post_training/view/board.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)


@pytest.mark.parametrize("name, content", [
    ("examples.json", '[{"runs": [["prompt"]]}]'), ("examples.json", '["row"]'), ("examples.json", "[" * 5000 + "]" * 5000),
    ("metrics.jsonl", '{"step": [1], "loss": 2}\n{"step": 1, "loss": 1' + "0" * 400 + '}\n[]\n\x00'), ("metrics.jsonl", None), ("config.yaml", "stage: ["),
    ("record.json", '{"stage": "train_sft", "config": {}, "attempts": [{"started": 7}]}'), ("record.json", '{"stage": 5, "status": [1], "config": {"job_subdir": {}}}'),
    ("record.json", '{"stage": "train_sft", "counts": {"train": {"in": 1, "columns": ["a"]}}, "sources": [null], "final": {"output": 3}}'), ("record.json", None)])
def test_any_damage_is_one_run_s_own(runs, name, content):
    "A file that holds something else costs its own part of its own run: the board is written, and its other rows are whole"
    path = runs / "train_sft/demo/demo-0000000a" / name
    path.unlink(missing_ok=True)
    path.write_text(content) if content is not None else path.mkdir()
    board = b.open_board(root=runs)
    b.write_board(board)
    rows = {p.name: row for p, (_, row) in board.known.items()}
    assert rows["demo-0000000b"]["accuracy"] == .75
    details = json.loads((board.out / f"data/{b.run_key('train_sft/demo/demo-0000000a')}.js").read_text().partition(",")[2].rstrip()[:-1])
    told = "demo-0000000a" not in rows or rows["demo-0000000a"]["status"] == "damaged" or details["problems"]
    assert told or name in ("config.yaml", "metrics.jsonl"), "the record holds the config; lines of metrics that are none are left out"


def test_command_and_follow(runs, monkeypatch, capsys):
    "The command names the page and the damaged runs and refuses a folder of somebody else; `follow` ends with the run"
    from post_training.cli import main
    from post_training.run.record import append_metrics, edit_record
    monkeypatch.setenv("POST_TRAINING_RUNS_DIR", str(runs))
    assert main(["board"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(runs / "board/index.html"), "4 runs, 1 of them damaged"]
    assert main(["board", "--out", str(runs / "train_sft")]) == 0, "a folder without a page is used"
    (runs.parent / "index.html").write_text("mine")
    assert main(["board", "--out", str(runs.parent)]) == 2 and "is no board" in capsys.readouterr().err
    run_dir = runs / "train_sft/demo/demo-0000000a"
    edit_record(run_dir, lambda r: r["attempts"][-1].pop("exit"))
    total = json.loads((run_dir / "record.json").read_text())["total_steps"]
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end():
            append_metrics(run_dir, dict(step=total + 32, loss=.5))
            time.sleep(.3)
            edit_record(run_dir, lambda r: r["attempts"][-1].update(exit=0))
        timer = threading.Timer(.3, end)
        timer.start()
        assert b.follow(run_dir, every=.05) == "finished"
        timer.join()
    lines = capsys.readouterr().out.splitlines()
    assert "running" in lines[0] and any(f"step {total + 32} of {total}, loss 0.5" in line for line in lines) and "finished" in lines[-1]


@pytest.fixture
def browser(tmp_path): yield from open_browser(tmp_path)


def names(browser):
    return browser.js("[...document.querySelectorAll('td.name')].map(e => e.textContent)")


def type_filter(browser, text):
    browser.js(f"{{const q = document.querySelector('#q'); q.value = {json.dumps(text)}; q.dispatchEvent(new Event('input'))}}")
    browser.until(f"new URLSearchParams(location.hash.slice(1)).get('q') === {json.dumps(text)}")


@pytest.mark.slow
def test_in_a_browser(runs, tmp_path, browser, monkeypatch):
    "Filter, sort, choose and compare; hostile texts do nothing; details from files; a phone; dark; 2,000 runs within two seconds"
    monkeypatch.setattr(b, "INLINE_BYTES", 0)  # so that each run's details come from its file
    board = b.open_board(root=runs)
    b.write_board(board)
    page = board.out / "index.html"
    browser.open(page)
    assert len(names(browser)) == 4
    browser.js("document.querySelector('[data-key=accuracy]').click()")
    assert names(browser)[:2] == ["demo-0000000b", f"{sorted(p.name for p in (runs / 'train_sft/demo').iterdir())[-1]}"]
    for text, found in (("accuracy>0.7", ["demo-0000000b"]), ("training_args.learning_rate=0.0001", ["demo-0000000a"]), ("status=damaged", ["demo-0000000d"])):
        type_filter(browser, text)
        assert names(browser) == found
    type_filter(browser, "no_such_key>1")
    assert browser.js("document.querySelector('.error').textContent") == "No run records no_such_key."
    type_filter(browser, "name~demo-0000000 status=finished")
    browser.js("document.querySelectorAll('tbody input').forEach(e => e.click())")
    browser.until("document.querySelectorAll('figure').length === 4")
    shown = browser.js("document.querySelector('#compare').textContent")
    assert "training_args.learning_rate0.0010.0001" in shown and "accuracy0.75 ★0.25" in shown and "2 + 3" in shown and "1 + 1" not in shown
    before = browser.js("document.querySelector('figure path.curve').getAttribute('d')")
    browser.js("{const s = document.querySelector('#smooth'); s.value = 0.9; s.dispatchEvent(new Event('input'))}")
    assert browser.js("document.querySelector('figure path.curve').getAttribute('d')") != before
    ends = browser.js("document.querySelector('figure[data-curve=grad_norm] svg').getAttribute('aria-label')")
    assert "demo-0000000a ends at" in ends
    browser.js("document.querySelector('#compare').scrollIntoView()")
    browser.shot(tmp_path / "compared.png")
    evil = next(i for i, r in enumerate(b.read_runs(board)) if r["name"].startswith("x<"))
    browser.js(f"location.hash = '#' + new URLSearchParams({{run: value('path', {evil}), runs: value('path', {evil})}})")
    browser.until("document.querySelectorAll('.row-text').length >= 2")
    assert browser.js("[window.bad === undefined, document.querySelectorAll('img, iframe, script[src^=http]').length, document.title.includes('<img')]") == [True, 0, True]
    assert browser.js("new URLSearchParams(location.hash.slice(1)).get('run')"), "a run's page has an address"
    browser.js("document.querySelector('main a').click()")
    browser.until("document.querySelectorAll('td.name').length > 0")
    browser.open(page, width=390, height=800, dark=True)
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), "nothing but tables is wider than a phone"
    assert browser.js("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])") < 64, "dark where the reader prefers it"
    browser.shot(tmp_path / "phone.png")
    rows = [r | dict(name=f"r-{k}", path=f"s/r-{k}", accuracy=k / 2000) for k in range(2000) for r in [board.known[runs / "train_sft/demo/demo-0000000a"][1]]]
    data = b.as_page_json(dict(count=len(rows), columns=b.as_columns(rows), ids=[r["path"] for r in rows], shown=b.SHOWN, states=b.STATES, root="runs", written="", notice=""))
    (tmp_path / "many.html").write_text(b.page_html(data, "{}"))
    browser.open(tmp_path / "many.html")
    browser.js("document.querySelector('[data-key=accuracy]').click()")
    assert names(browser)[0] == "r-1999" and browser.js("performance.getEntriesByType('navigation')[0].domComplete") < 2000
    assert browser.complaints() == []
    browser.js("{const s = document.createElement('script'); s.textContent = 'window.bad = 4'; document.body.append(s); "
               "const d = document.createElement('div'); d.innerHTML = '<img src=x onerror=window.bad=5>'; document.body.append(d)}")
    time.sleep(.2)
    assert browser.js("window.bad === undefined") and browser.complaints(), "even markup that got into the page cannot run"
