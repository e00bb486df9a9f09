"The chat command as a person has it: in a pipe, in a terminal with Ctrl-C, with base models and wrong names; the explore notebook on a checkpoint of one's own"
import os
import pty
import select
import shutil
import signal
import subprocess
import time

import pytest
from conftest import BIN, ROOT

from post_training.view import chat
from post_training.core.files import UserError


@pytest.fixture(scope="module")
def tiny(demo):
    return demo / "models" / "tiny"


@pytest.fixture(scope="module")
def opened(tiny):
    return chat.load_chat_model(str(tiny), device="cpu")


def spoken(opened, lines, capsys, **options):
    talk = chat.Chat(*opened, **dict(dict(max_new_tokens=4), **options))
    chat.chat_loop(talk, lines)
    return talk, *capsys.readouterr()


def test_pipe(tiny):
    "Without a terminal: answers alone on the standard output, the rest beside it; the end of the input ends"
    done = subprocess.run([BIN / "post-training", "chat", tiny, "--max-new-tokens", "4"], input="hi\n/nope\n/quit\nnever\n", capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and "> " not in done.stdout and "\x1b" not in done.stdout
    assert "There is no /nope" in done.stderr and "Traceback" not in done.stderr


def read_until(fd, text, seconds=240):
    "What a terminal shows until a text appears"
    out, end = "", time.monotonic() + seconds
    while text not in out:
        assert time.monotonic() < end, f"{text!r} did not appear in {out[-500:]!r}"
        if select.select([fd], [], [], 0.2)[0]: out += os.read(fd, 4096).decode(errors="replace")
    return out


@pytest.mark.slow
def test_terminal_and_ctrl_c(tiny):
    "Ctrl-C stops an answer and clears a prompt, and the program goes on; Ctrl-D ends it"
    master, slave = pty.openpty()
    words = [BIN / "post-training", "chat", tiny, "--max-new-tokens", "1900"]  # greedy, the untrained model repeats itself
    p = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True)
    os.close(slave)
    try:
        read_until(master, "\n> ")
        time.sleep(0.5)
        os.kill(p.pid, signal.SIGINT)
        read_until(master, "/quit ends")
        os.write(master, b"Hello\n")
        read_until(master, "Hello")
        time.sleep(0.5)
        os.kill(p.pid, signal.SIGINT)
        read_until(master, "(stopped)")
        os.write(master, b"/help\n")
        read_until(master, "as Ctrl-D does\r\n> ")
        time.sleep(0.5)
        os.write(master, b"\x04")
        assert p.wait(30) == 0
    finally:
        p.kill()
        os.close(master)


def test_history_is_messages_and_reset_forgets(opened, capsys):
    talk, out, err = spoken(opened, ["Hello", "again", "/reset", "once more", "/system Be brief.", "hi"], capsys, name="tiny")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[0]["content"] == "hi" and talk.system == "Be brief."
    assert err.count("a new conversation") == 2


def test_the_seed_decides_and_greedy_is_generate(opened):
    from post_training.models.generate import generate_completions
    model, tokenizer = opened
    draw = lambda seed, t: chat.send_message(chat.Chat(model, tokenizer, temperature=t, seed=seed, max_new_tokens=12), "Hello")["ids"]
    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    prompt = chat.chat_prompt_ids(chat.Chat(model, tokenizer), "Hello")
    assert draw(0, 0.0) == generate_completions(model, tokenizer, [prompt], 12)[0]["ids"]


def test_a_full_context_is_told(opened, capsys):
    talk, out, err = spoken(opened, ["x " * 3000, "x " * 960, "Hello"], capsys, max_new_tokens=400)
    assert "/reset begins anew" in err and "! The conversation has" in err
    assert all("x x x" * 400 not in m["content"] for m in talk.messages[2:])


def test_ctrl_c_keeps_what_was_said(opened):
    def stop(kind, text):
        seen.append(text)
        if len(seen) >= 2: raise KeyboardInterrupt
    seen, talk = [], chat.Chat(*opened, temperature=1.0, seed=5, max_new_tokens=50)
    out = chat.send_message(talk, "Hello", stop)
    assert out["finish_reason"] == "interrupted" and len(out["ids"]) < 50


def test_base_models_and_wrong_names(tiny, tmp_path, monkeypatch):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="--template NAME"): chat.load_chat_model(str(base))
    model, tokenizer = chat.load_chat_model(str(base), "tulu")
    assert chat.send_message(chat.Chat(model, tokenizer, max_new_tokens=3), "Hi")["finish_reason"] in ("length", "stop")
    with pytest.raises(UserError, match="no config.json"): chat.load_chat_model(str(tmp_path))
    with pytest.raises(UserError, match="There is no run"): chat.load_chat_model("no-such-run")
    with pytest.raises(UserError, match="There is no run"): chat.load_chat_model("run:no-such-run")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="Cannot load the model"): chat.load_chat_model(str(base), "apertus")


def test_explore_notebook_on_a_checkpoint(tiny):
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    nb = nbformat.read(ROOT / "nbs" / "explore" / "chat.ipynb", 4)
    shell = InteractiveShell()
    with capture_output() as captured:
        for c in nb.cells:
            if c.cell_type != "code": continue
            source = c.source + f"\ncheckpoint, system, messages = {str(tiny)!r}, 'Be brief.', ['<script>alert(1)</script>']" if "parameters" in c.metadata.get("tags", []) else c.source
            shell.run_cell(source).raise_error()
    first = shell.user_ns["answers"][0]
    assert "<script>alert(1)</script>" in captured.stdout and first["ids"]
    page = shell.user_ns["colour_html"](shell.user_ns["tokenizer"], first["prompt"], [False] * len(first["prompt"]))._repr_html_()
    assert "Be brief" in page and "<script>" not in page
