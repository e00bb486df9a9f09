"What comes from outside never commands a terminal, a browser or the interpreter: texts of rows, models and errors, and chat templates."
import json
import re
import shutil
import subprocess

import pytest

from post_training.core.files import UserError, visible_text

HOSTILE = {
    "script": "<script>document.title='ran'</script>", "image": "<img src=x onerror=\"document.title='ran'\">", "attribute": "\" onmouseover=\"document.title='ran'\" x=\"",
    "closing": "</span></pre></td><script>document.title='ran'</script>", "link": "[a](javascript:document.title='ran')",
    "clear": "\x1b[2J\x1b[31mred", "osc8": "\x1b]8;;http://a.test\x1b\\click\x1b]8;;\x1b\\", "title": "\x1b]0;owned\x07", "open": "\x1b]0;never closed", "bell": "\x07\x07", "return": "good\rbad ",
    "bidi": "\u202eevil\u2066x\u2069\u200f", "c1": "\x9b2J\x9d0;t\x9c", "lines": "a\u2028b\u2029c", "null": "a\x00b", "back": "safe\b\b\b\bevil"}
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
OURS = re.compile(r"\x1b\[[0-9;]*m")  # colours that the views write themselves


def rows():
    "A row for each text: in a content, a source, an id, a role, the name of a tool and its arguments"
    out = []
    for name, text in HOSTILE.items():
        talk = [dict(role="user", content=f"say {text}"), dict(role="assistant", content=f"{text} said")]
        out.append(dict(id=f"{name}{text}", source=f"s-{text}", messages=talk))
    bad = HOSTILE["image"] + HOSTILE["clear"]
    out.append(dict(id="role", source="s", messages=[dict(role=bad, content="a"), dict(role="assistant", content="b")]))
    return out


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "The hostile rows as `inspect` reads them, with a template that carries every content"
    from datasets import load_dataset

    from post_training.tokens.tokenizer import toy_tokenizer
    from post_training.view.dataset import inspect_dataset

    path = tmp_path_factory.mktemp("hostile") / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows()))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent))
    return inspect_dataset(data, toy_tokenizer(template="zephyr"), name="rows\x1b[2J\u202e", num_proc=1)


@pytest.mark.parametrize("name", HOSTILE)
def test_text_is_visible(name):
    shown = visible_text(HOSTILE[name])
    assert not FORBIDDEN.search(shown) and (name != "open" or "never closed" in shown)


@pytest.mark.parametrize("colour", [True, False])
def test_inspect_in_a_terminal(seen, capsys, colour):
    from post_training.view.dataset import print_inspection, training_notices

    print_inspection(seen, rows=len(HOSTILE) + 1, colour=colour, notices=training_notices(seen))
    out = capsys.readouterr().out
    assert "said" in out and "never closed" in out and not FORBIDDEN.search(OURS.sub("", out))


def test_answers_of_a_model(capsys, monkeypatch):
    "A chat shows an answer without its commands, in pieces too, and keeps it as the model wrote it"
    from post_training.view import chat

    answer = "".join(HOSTILE.values())
    def send(talk, text, write):
        for k in range(0, len(answer), 3): write("answer", answer[k:k + 3])
        return dict(text=answer, finish_reason="stop")
    monkeypatch.setattr(chat, "send_message", send)
    chat.chat_loop(chat.Chat(None, None), ["hello", "/nope\x1b[2J\u202e"])
    out, err = capsys.readouterr()
    assert "never closed" in out and "There is no /nope" in err and not FORBIDDEN.search(out + err)


def test_errors_logs_and_jobs(tmp_path, capsys):
    "A message that quotes data, the last line of a log, the reason of a stop"
    from post_training.core.arguments import exit_code_of
    from post_training.launch.accelerate import last_lines
    from post_training.launch.runs import job_history, log_tail

    def call(): raise UserError("row " + "\n".join(HOSTILE.values()))
    assert exit_code_of(call) == 2
    log = tmp_path / "stderr.log"
    log.write_text("\n".join(HOSTILE.values()))
    (tmp_path / "record.json").write_text(json.dumps(dict(stage="train_sft", jobs=[dict(id="1\x1b[2J")], stopped=HOSTILE["bidi"])))
    shown = [capsys.readouterr().err, *log_tail(log), last_lines(log), *job_history(tmp_path)]
    assert "never closed" in shown[0] and "bad" in "".join(shown[1:]) and not [s for s in shown if FORBIDDEN.search(s)]


@pytest.mark.slow
def test_nothing_runs_in_a_browser(seen, tmp_path):
    "Every HTML view of the hostile rows, in a real browser: no script changes the page's title, which a script of ours does"
    from post_training.view import report
    from post_training.view.dataset import account_table, as_html, drop_table, length_table, source_table, view_html, view_row

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser: pytest.skip("there is no Chromium on this machine")
    parts = [view_html(seen, view_row(seen, k)) for k in range(len(seen.numbers))]
    parts += [as_html(t(seen)) for t in (account_table, drop_table, source_table, length_table)]
    tables = [report.show_rows([{k: v} for k, v in HOSTILE.items()]), report.show_counts(dict.fromkeys(HOSTILE.values(), 3)), report.show_rows([{v: k for k, v in HOSTILE.items()}]),
              report.show_evaluation(dict(accuracy=.5, skills=dict.fromkeys(HOSTILE.values(), .5), notice=HOSTILE["script"]), None)]
    from markdown_it import MarkdownIt
    parts += [MarkdownIt("commonmark", dict(html=True)).enable("table").render(t.data) for t in tables]

    def title(*extra):
        page = tmp_path / "page.html"
        page.write_text("<!doctype html><meta charset=utf-8><title>quiet</title><body>" + "\n".join([*parts, *extra]), errors="replace")
        done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
                              capture_output=True, text=True, timeout=120)
        assert "said" in done.stdout, done.stderr[-500:]
        return re.search("<title>(.*?)</title>", done.stdout)[1]
    assert title() == "quiet"
    assert title(HOSTILE["image"]) == "ran"  # the same text as markup: the browser does run scripts here


# -- chat templates

LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
BOMBS = {"loop": LOOPS, "range": "{% for i in range(10**9) %}{% endfor %}", "text": "{{ 'a'*10**10 }}", "raises": "{{ raise_exception('never') }}", "attributes": "{{ ''.__class__.__mro__ }}"}


@pytest.fixture(scope="module")
def hostile_models(demo, tmp_path_factory):
    "The tiny model with each template"
    root = tmp_path_factory.mktemp("templates")
    for name, bomb in {**BOMBS, "late": "{% if 'boom' in messages[0].content %}" + LOOPS + "{% endif %}"}.items():
        shutil.copytree(demo / "models/tiny", root / name)
        (root / name / "chat_template.jinja").write_text(bomb + TEXT)
    return root


def test_a_template_without_end_in_a_thread(monkeypatch):
    "A thread gets no signals: its processor time is watched, and the thread goes on to render others"
    from concurrent.futures import ThreadPoolExecutor

    from post_training.tokens import templates
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(templates.TemplateLimit, match="did not end within"): pool.submit(templates.render_template, LOOPS + "in a thread", []).result(60)
        assert pool.submit(templates.render_template, "{{ messages | length }}", [dict(role="user", content="a")]).result(60) == "1"


@pytest.mark.parametrize("name", BOMBS)
def test_template_of_a_tokenizer(hostile_models, name):
    "Loaded for any stage, or for a chat: an error that names the folder, within seconds"
    from post_training.tokens.tokenizer import load_tokenizer
    from post_training.view.chat import Chat, chat_prompt_ids, load_chat_model

    folder = str(hostile_models / name)
    with pytest.raises(UserError, match=f"{name}.* choose another one with tokenizer_args.chat_template_name"): load_tokenizer(folder)
    with pytest.raises(UserError, match="chat template"): chat_prompt_ids(Chat(*load_chat_model(folder, device="cpu")), "hello")


def test_template_that_stops_at_one_row(hostile_models):
    "A template that ends on other rows: the run stops at the row with the template's name, and no later row waits again"
    from post_training.tokens.masks import tokenize_chats
    from post_training.tokens.templates import TemplateLimit
    from post_training.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(hostile_models / "late"))
    talk = lambda text: [dict(role="user", content=text), dict(role="assistant", content="b")]
    assert len(tokenize_chats(tokenizer, [talk("a")])) == 1
    for _ in range(9):
        with pytest.raises(TemplateLimit, match="late cannot be used .it did not end"): tokenize_chats(tokenizer, [talk("a"), talk("boom")])
