"The page for people who come from swiss-ai/posttraining says what the tables of translations say, and a command of the seed document shows its tokens"
import json
import re

from conftest import ROOT

from post_training.config.overrides import LEFT_OUT, OLD_NAMES, OLD_SECTIONS, OLD_VALUES
from post_training.config.presets import OTHER_NAMES

PAGE = ROOT / "nbs/explore/from_posttraining.ipynb"


def printed():
    cells = json.loads(PAGE.read_text())["cells"]
    return "\n".join("".join(o.get("text", [])) for c in cells for o in c.get("outputs", []))


def test_the_stored_page_holds_each_translation():
    "Each row of each table is printed as it is now; run the notebook again if this fails"
    text = printed()
    rows = [*OLD_NAMES.items(), *((old, str(new)) for names in OLD_VALUES.values() for old, (new, _) in names.items()),
            *((key, why) for key, (_, why) in LEFT_OUT.items()), *(pair for names in OTHER_NAMES.values() for pair in names.items())]
    for old, new in rows:
        assert re.search(rf"(?m)^.*{re.escape(str(old))} +.*{re.escape(new)}", text), f"{old} -> {new} is not on the page"
    assert ", ".join(OLD_SECTIONS) in text


def test_every_config_of_a_script_has_a_row():
    "The configs of scripts at commit b19a318"
    source = "\n".join("".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"])
    for name in ("train-sft", "train-preference", "dataset-mixture", "dataset-split", "model-merging", "filter-dataset-for-ref-model-swissaiformat",
                 "filter-model-sequences", "generate-ref-completions", "generate-ref-completions-swissaiformat", "compute-ref-logprobs-swissaiformat",
                 "compute-ref-rewards-swissaiformat", "compute-rewards-for-completions", "compute-rewards-for-chosen-and-rejected", "prepare-train-dataset-swissaiformat",
                 "prepare-offpolicy-dataset", "mix-datasets-with-ref-rewards", "merge-partitions", "merge-partitions-swissaiformat"):
        assert f'"{name}"' in source, name


def test_inspect_shows_the_tokens_of_the_documents_tokenizer_settings(capsys, tmp_path):
    "The template tulu with a BOS in front: the row begins with <s> and ends with </s>, which are shown by their meaning"
    from post_training.cli import main
    from post_training.tokens.tokenizer import toy_tokenizer
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    rows = tmp_path / "rows.jsonl"
    row = dict(messages=[dict(role="user", content="What is 2 + 2?"), dict(role="assistant", content="It is 4.")])
    rows.write_text(json.dumps(row) + "\n")
    assert main(["inspect", str(rows), "tokenizer_args.chat_template_name=tulu", "tokenizer_args.add_bos_to_chat_template=true",
                 f"tokenizer_args.tokenizer_name_or_path={tmp_path}/toy"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.search(r"⟨beginning⟩<\|user\|>\s+What is 2 \+ 2\?\s+<\|assistant\|>\s+It is 4.⟨end of assistant⟩\s*$", text), text[-300:]
