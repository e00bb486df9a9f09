"The site: every link of the kept notebooks leads somewhere, and a real browser reads the pages without an error"
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import open_browser
from conftest import ROOT

SITE = Path(os.environ.get("POST_TRAINING_SITE_ENV") or ROOT / ".venv-site")
# One page of each kind is built: the start page, the gallery with its records, a chapter, a recipe, a module.
LEFT_OUT = ["nbs/[1-9]*/**", "nbs/00_core/**", "nbs/benchmarks/**", "nbs/experiments/**", "runs/examples/bench/**", "api/post_training.[a-km-z]*"]


@pytest.fixture
def browser(tmp_path): yield from open_browser(tmp_path)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def served(tmp_path):
    "The folder of the site, and its address on this machine"
    out = tmp_path / "html"
    out.mkdir()
    handler = functools.partial(QuietHandler, directory=str(out))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def write_pages(out):
    return subprocess.run([sys.executable, ROOT / "nbs/site/pages.py", out], capture_output=True, text=True, cwd=ROOT)


def test_a_link_that_leads_nowhere_is_named(monkeypatch):
    "Links to pages stay, links to other files lead to the repository, and links to nothing are collected"
    monkeypatch.syspath_prepend(str(ROOT / "nbs/site"))
    import pages
    page, missing = ROOT / "nbs/05_losses/2_sft.ipynb", []
    text = "[a](3_irl.ipynb#IRL) [b](../../Makefile) [c](../no/such.ipynb) [d](https://example.org/x) [e](#here) [f](../../README.md)"
    links = pages.site_links(text, page, "https://example.org/r", missing)
    assert links == ("[a](3_irl.ipynb#IRL) [b](https://example.org/r/blob/main/Makefile) [c](../no/such.ipynb) "
                     "[d](https://example.org/x) [e](#here) [f](../../index.md)")
    assert missing == ["nbs/05_losses/2_sft.ipynb: ../no/such.ipynb"]


@pytest.mark.slow
def test_in_a_browser(tmp_path, browser, served):
    "Formulas, outputs, cards and tables on a screen and on a phone, light and dark; nothing is asked of the network"
    if not (SITE / "bin/sphinx-build").is_file(): pytest.skip(f"{SITE} does not exist: `make site-env` makes it")
    written = write_pages(tmp_path / "src")
    assert written.returncode == 0, written.stderr
    out, address = served
    built = subprocess.run([SITE / "bin/sphinx-build", "-q", "-b", "html", "-D", "exclude_patterns=" + ",".join(["conf.py", *LEFT_OUT]), tmp_path / "src", out],
                           capture_output=True, text=True)
    assert built.returncode == 0 and "ERROR" not in built.stderr, built.stderr[-3000:]
    shown = "document.querySelector('article').innerText"
    for width, dark in ((1280, False), (390, True)):
        browser.open(f"{address}/gallery.html", width=width, height=900, dark=dark, ready="article")
        records = [p for p in (ROOT / "runs/examples").glob("*/*.ipynb") if p.parent.name != "bench"]
        assert browser.js("document.querySelectorAll('.sd-card').length") >= len(records)
        headline = json.loads((ROOT / "runs/examples/demo/record.json").read_text())["evaluation"]["after"]["accuracy"]
        assert f"{100 * headline:.1f} %" in browser.js(shown)
        assert browser.js("[...document.querySelectorAll('.sd-card img')].every(i => i.complete && i.naturalWidth > 0)")
        for name in ("index", "gallery", "nbs/05_losses/2_sft", "nbs/recipes/train_sft", "runs/examples/demo/train_sft", "api/post_training.losses.sft"):
            browser.open(f"{address}/{name}.html", width=width, height=900, dark=dark, ready="article")
            assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is wider than {width} pixels"
            assert browser.js("performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))"), name
        ground = browser.js("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert ground < 64 if dark else ground > 192
    browser.open(f"{address}/nbs/05_losses/2_sft.html", ready="article")
    assert browser.js("document.querySelectorAll('math').length") > 20 and "$" not in browser.js("document.querySelector('article p').innerText")
    browser.open(f"{address}/search.html", ready="article")
    browser.js("location.search = '?q=normalised'")
    browser.until("document.querySelectorAll('#search-results li').length > 0")
    assert browser.complaints() == []
    browser.shot(tmp_path / "search.png")
