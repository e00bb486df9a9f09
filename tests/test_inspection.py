"Inspection and generation ratios against what training does, on demo, broken and real rows; the command and the explore notebooks as a user has them."
import json
import os
import re
import subprocess
import sys

import datasets
import nbformat
import pytest
from conftest import ROOT

from post_training import config
from post_training.view import dataset as inspection
from post_training.stages import tokenized_data
from post_training.core.files import UserError
from post_training.view.dataset import inspect_dataset
from post_training.tokens.dataset import check_sample, tokenize_dataset
from post_training.tokens.ratios import measure_ratios, summarise_ratios
from post_training.tokens.templates import CHAT_TEMPLATES, template_text
from post_training.tokens.tokenizer import toy_tokenizer

SMALL = ["dataset_args.debug_subsample.train=80"]


def chat(*texts, **more):
    return dict(messages=[dict(role=role, content=text) for role, text in zip(["user", "assistant"] * 9, texts, strict=False)], **more)


BROKEN = [  # (row, what it is dropped for; empty where it is kept)
    (chat("hi", "hello", id="fine", source="a"), ""),
    (chat("hi", None, id="none", source="a"), "malformed"),
    (chat("hi", " ", id="blank", source="a"), "malformed"),
    (chat("hi", id="open", source="a"), "malformed"),
    (dict(messages=[], id="empty", source="b"), "malformed"),
    (dict(messages=None, id="null", source="b"), "malformed"),
    (dict(messages=[dict(role="narrator", content="x"), dict(role="assistant", content="y")], id="role", source="b"), "malformed"),
    (chat("<SPECIAL_68></s>", "\x1b[2J <SPECIAL_67> <script>alert(1)</script>", id="typed", source="b"), ""),
    (chat("word " * 3000, "short", id="long", source="b"), "no completion after truncation"),
    (chat("q", "a", id="\x1b[31mred", source="\x1b[2J"), ""),
    (dict(messages=[dict(role="system", content="Be brief."), *chat("q", "a")["messages"]], id="system", source="c"), "unsupported_roles"),
    (chat("q", "a", id=None, source=None), ""),
]


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(json.dumps(row) for row, _ in BROKEN))
    return str(path)


@pytest.fixture(scope="module")
def rows(demo):
    "Demo rows and their tokenizer"
    cfg = config.compose("train_sft", SMALL).cfg
    return inspection.find_rows(cfg), tokenized_data.tokenizer_of(cfg)


def tokenized(dataset, tokenizer, **parameters):
    "Ids, lengths and counts as training gets them; counts alone where nothing is kept"
    from post_training.tokens.dataset import tokenize_rows
    data, _ = tokenize_rows(dataset, tokenizer, **parameters)
    keep = [i for i, reason in enumerate(data["reason"][:]) if not reason]
    return data, data.select(keep)


@pytest.mark.parametrize("max_length", [None, 40, 33])
@pytest.mark.parametrize("overlength", ["truncate", "drop"])
def test_numbers_are_those_of_training(rows, max_length, overlength):
    dataset, tokenizer = rows
    seen = inspection.inspect_dataset(dataset, tokenizer, max_length=max_length, overlength=overlength)
    data, kept = tokenized(dataset, tokenizer, max_length=max_length, overlength=overlength)
    assert seen.numbers.reason.tolist() == data["reason"][:] and seen.numbers.row_id.tolist() == data["row_id"][:]
    assert seen.numbers.kept.tolist() == data["length"][:]
    assert seen.numbers.trained.tolist() == [sum(m) for m in data["completion_mask"][:]]
    for k in range(0, 80, 7):  # a row that is looked at is the row that is trained on
        view = inspection.view_row(seen, k)
        assert view.ids[: len(data[k]["input_ids"])].tolist() == data[k]["input_ids"]
        assert view.completion.sum() == sum(data[k]["completion_mask"]) and (view.completion | view.prompt).sum() == data[k]["length"]
    table = inspection.source_table(seen).set_index("source")
    assert table.loc["all", "tokens"] == sum(kept["length"][:]) and table.drop("all").tokens.sum() == table.loc["all", "tokens"]
    assert inspection.drop_table(seen).rows.sum() == len(data) - len(kept)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_every_template_can_be_inspected(rows, template):
    "Whatever a template refuses is a row with a reason, also where that is every row; and ratios count the same tokens"
    import datasets
    tokenizer, before = rows[1], rows[1].chat_template
    dataset = datasets.Dataset.from_list([row for row, _ in BROKEN])
    try:
        tokenizer.chat_template = template_text(template)
        seen = inspection.inspect_dataset(dataset, tokenizer, max_length=256)
        for (_, why), reason in zip(BROKEN, seen.numbers.reason, strict=True):
            assert reason.startswith("malformed") == (why == "malformed"), reason
        assert inspection.training_notices(seen) is not None
        for k in range(len(dataset)):
            text = inspection.view_text(seen, inspection.view_row(seen, k))
            assert "\x1b[2J" not in text and "<script>alert" not in inspection.view_html(seen, inspection.view_row(seen, k))
        df, counts = measure_ratios(dataset, tokenizer, max_length=256, unsupported_roles="drop")
        kept = inspection.inspect_dataset(dataset, tokenizer, max_length=256, unsupported_roles="drop", on_missing_stop="warn").numbers
        kept = kept[kept.reason == ""]
        assert (df.prompt_tokens + df.completion_tokens).tolist() == kept.kept.tolist() and df.completion_tokens.tolist() == kept.trained.tolist()
        assert counts["in"] == len(BROKEN) == counts["out"] + sum(counts["dropped"].values())
    finally: tokenizer.chat_template = before


def test_broken_rows_have_their_reasons(broken, demo):
    seen = inspection.open_inspection(broken, ["tokenizer_args.chat_template_name=apertus_mistral_special_tokens"])
    for (row, why), n in zip(BROKEN, seen.numbers.itertuples(), strict=True):
        assert bool(why) == bool(n.reason) and n.reason.startswith(why), (row["id"], n.reason)
    assert inspection.find_row(seen, "11") == 11 and seen.numbers.row_id[11] == "11"  # a row without an id goes by its index
    text = "\n".join(inspection.training_notices(seen))
    assert "Training stops at row system" in text and "max_drop_fraction=0.05" in text
    assert "\x1b" not in inspection.as_text(inspection.source_table(seen)) + inspection.as_text(inspection.drop_table(seen))


def inspect(*argv, cwd=ROOT, **env):
    return subprocess.run([sys.executable, "-m", "post_training.view.dataset", *argv], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_command_on_the_demo(demo):
    done = inspect("demo", *SMALL, "--rows", "2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^demo \(train\): 80 rows", done.stdout) and done.stdout.count("\nrow ") == 2 and "\x1b[1;32m" in done.stdout
    plain = inspect("demo", *SMALL, "--rows", "1", NO_COLOR="1").stdout
    assert "\x1b" not in plain and "⟦" in plain
    one = inspect("demo", *SMALL, "--row", "3")
    assert one.returncode == 0 and one.stdout.count("\nrow ") == 1


def test_command_writes_to_any_terminal(broken, demo):
    "Characters that a terminal's encoding lacks, and a reader that leaves early; training would stop at these rows"
    done = inspect(broken, "--rows", "9", PYTHONIOENCODING="ascii")
    assert done.returncode == 1, done.stderr
    piped = subprocess.run(f"{sys.executable} -m post_training.view.dataset {broken} --rows 9 | head -1; exit ${{PIPESTATUS[0]}}", shell=True, cwd=ROOT,
                           executable="/bin/bash", capture_output=True, text=True, timeout=120)
    assert piped.returncode in (0, 1) and not piped.stderr.strip(), piped.stderr  # 1: all was written before the reader left


@pytest.mark.parametrize("argv, says", [
    (["dmeo"], "Did you mean 'demo'"),
    (["demo", "--split", "evla"], "Did you mean 'eval'"),
    (["demo", "--raw", "3"], "Did you mean '--ro"),
    (["demo", "--rows", "many"], "whole number"),
    (["demo", "--row", "sum-x"], "has no row sum-x"),
    (["demo", "demo"], "One dataset at a time"),
    (["demo", "training_args.max_lenght=9"], "Did you mean 'training_args.max_length'"),
    (["demo", "tokenizer_args.chat_template_name=zepyhr"], "'zephyr'"),
    (["demo", "training_args.max_length=many"], "takes a whole number"),
    (["./nothing.jsonl"], "There is no dataset at"),
    (["local"], "dataset_args.dataset_name"),
    (["model=tiny"], "Name a dataset: a preset"),
])
def test_mistakes_are_named(argv, says, demo, capsys):
    assert inspection.inspect_main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err, err


@pytest.mark.parametrize("text, says", [("", "empty"), ('{"messages": [\n', ""), ('{"text": "a"}\n', "the dataset has text")])
def test_files_that_are_no_dataset(text, says, tmp_path, demo, capsys):
    (tmp_path / "rows.jsonl").write_text(text)
    assert inspection.inspect_main([str(tmp_path / "rows.jsonl")]) == 2
    assert says in capsys.readouterr().err


def test_a_name_with_an_equals_sign_or_quotes(tmp_path, demo, capsys):
    path = tmp_path / "it's a=b (1).jsonl"
    path.write_text(json.dumps(chat("hi", "hello")))
    assert inspection.inspect_main([str(path), "--rows", "1"]) == 0
    assert "1 rows, messages" in capsys.readouterr().out


@pytest.mark.parametrize("name, rows", [("sharegpt_conversations.json", 500), ("gsm8k_test.jsonl", 1319)])
def test_real_rows(name, rows, data_dir, demo):
    "Every row is accounted for, and the ratios are those of the masks"
    seen = inspection.open_inspection(str(data_dir / name), ["training_args.max_length=4096"])
    assert len(seen.numbers) == rows and not inspection.training_notices(seen) and len(inspection.drop_table(seen)) == 0
    df, counts = measure_ratios(seen.rows, seen.tokenizer)
    assert counts == {"in": rows, "out": rows, "dropped": {}, "first": {}}
    assert (df.prompt_tokens + df.completion_tokens).tolist() == seen.numbers.tokens.tolist()
    assert df.completion_tokens.tolist() == seen.numbers.trained.tolist()
    contents = [sum(len(m["content"]) for m in chat) for chat in (conversation(r) for r in seen.rows)]
    assert (df.first_chars + df.rest_chars).tolist() == contents
    table = summarise_ratios(df)
    assert table.source.tolist() == ["all"] and 0 < table.tokens_q05[0] < table.tokens_median[0] < table.tokens_q95[0]


def conversation(row):
    from post_training.data.messages import to_messages
    return to_messages(row)


@pytest.mark.parametrize("name", ["inspect_data", "templates"])
def test_explore_notebooks_take_other_data(name, broken, demo, tmp_path):
    "Run with parameters other than the defaults, as a user would"
    nb = nbformat.read(ROOT / "nbs" / "explore" / f"{name}.ipynb", 4)
    given = dict(inspect_data=f"dataset = {broken!r}; row = 'typed'", templates="conversation = [['system', 'Be brief.'], ['user', '<b>2+2?</b>'], ['assistant', '4']]")[name]
    code = [given if "parameters" in c.metadata.get("tags", []) else c.source for c in nb.cells if c.cell_type == "code"]
    defaults = next(c.source for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    shell = InteractiveShell()
    with capture_output() as captured:
        for source in [defaults, *code]: shell.run_cell(source).raise_error()
    pages = [o.data.get("text/html", "") for o in captured.outputs]
    assert "<script>alert" not in "".join(pages) and "<b>2+2" not in "".join(pages)
    assert captured.stdout or pages


TOOLED = ("{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
OFFERED = json.dumps([dict(type="function", function=dict(name="weather", description="Of a city", parameters=dict(type="object", properties=dict(city=dict(type="string")))))])


def tooled_rows(n=12):
    talk = lambda i: [dict(role="user", content=f"What is {i}?"), dict(role="assistant", content=str(i))]
    return datasets.Dataset.from_list([dict(id=f"t{i}", messages=talk(i), tools=OFFERED if i % 3 else None) for i in range(n)])


@pytest.mark.parametrize("template", [None, "tulu", "apertus"])
def test_tools_beside_the_messages_are_seen_by_all(template):
    "Training, inspection and ratios agree on rows with a tools column: where a template writes them, and where it has no place for them"
    tokenizer = toy_tokenizer("bpe", template)
    if template is None: tokenizer.chat_template = TOOLED
    rows = tooled_rows()
    stops = [tokenizer.eos_token_id, 68]
    data, counts = tokenize_dataset(rows, tokenizer, unsupported_roles="drop", stop_ids=stops)
    seen = inspect_dataset(rows, tokenizer, unsupported_roles="drop", stop_ids=stops).numbers
    ratios, measured = measure_ratios(rows, tokenizer, unsupported_roles="drop")
    kept = seen[seen.reason == ""]
    assert kept.kept.tolist() == data["length"][:] and kept.trained.sum() == counts["completion_tokens"]
    assert (ratios.prompt_tokens + ratios.completion_tokens).tolist() == data["length"][:]
    assert seen.reason[seen.reason != ""].value_counts().to_dict() == counts["dropped"] == measured["dropped"]
    assert counts["out"] == (4 if template == "tulu" else 12)
    if template is None: assert max(data["length"]) > 5 * min(data["length"])  # the tools are among the tokens


def test_gates_look_at_rows_with_tools():
    tokenizer = toy_tokenizer("bpe", None)
    tokenizer.chat_template = TOOLED
    rows = tooled_rows().filter(lambda r: r["tools"])
    assert check_sample(rows, tokenizer) == []
    tokenizer.chat_template = TOOLED.replace("{{ eos_token }}", "")
    with pytest.raises(UserError, match="an answer ends with"): check_sample(rows, tokenizer)
    tokenizer.chat_template = TOOLED.replace("<|assistant|>{% endif %}", "<|bot|>{% endif %}")
    with pytest.raises(UserError, match="asked for an answer, the template writes"): check_sample(rows, tokenizer)
