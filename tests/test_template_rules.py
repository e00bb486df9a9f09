"BOS, end of turn, named templates and arguments of templates: for the 21 names and for tokenizers of other model families."
import itertools
from pathlib import Path

import pytest
import yaml
from transformers import GenerationConfig

from post_training import config
from post_training.core.files import UserError
from post_training.stages.tokenized_data import expected_stop_ids
from post_training.tokens.templates import CHAT_TEMPLATES, TEMPLATE_RULES, template_text, wants_blocks
from post_training.tokens.tokenizer import (
    check_bos, config_ids, load_tokenizer, render_sample, template_fingerprint, template_of, tokenizer_fingerprint, toy_tokenizer)

FOREIGN = Path(__file__).parent / "golden/foreign/tokenizers"
PLAIN = [n for n in CHAT_TEMPLATES if not wants_blocks(template_text(n))]
OWN_TOKENS = {"apertus": "<SPECIAL_68>", "apertus_mistral_special_tokens_s62_only": "<SPECIAL_62>"}  # ends of a turn that only Apertus' vocabulary has
ONCE = ("simple_concat_with_space", "simple_concat_with_new_line", "simple_chat")  # these end the conversation, not the turn
TALK = [dict(role="user", content="2+2?"), dict(role="assistant", content="4"), dict(role="user", content="And 1+1?"), dict(role="assistant", content="2")]
TOOLS = [dict(type="function", function=dict(name="clock", description="The time.", parameters=dict(type="object", properties={})))]
# tokenizer: BOS, eos, first and last token of a conversation under its own template
FAMILIES = dict(
    chatml_rstrip=(None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    gemma2=("<bos>", "<eos>", "<bos>", "<end_of_turn>"),
    gemma3=("<bos>", "<end_of_turn>", "<bos>", "<end_of_turn>"),
    llama2=("<s>", "</s>", "<s>", "</s>"),
    llama2_first=("<s>", "</s>", "<s>", "</s>"),
    llama31=("<|begin_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>"),
    llama31_nopad=("<|begin_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>"),
    mistral7=("<s>", "</s>", "<s>", "</s>"),
    olmo2=("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    padeqeos=(None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    phi4=("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    qwen25=(None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    qwen3=(None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    r1=("<|begin|>", "<|end|>", "<|begin|>", "<|end|>"),
    smollm3=(None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    zephyr_eos=("<s>", "</s>", "▁", "</s>"))
PADS = dict(llama31_nopad=(6, "<|reserved_0|>"), padeqeos=(0, "<|endoftext|>"))  # suggested where pad is missing or is eos


def load(family, name=None, **typed):
    pad = {"model_pad_token_id": PADS[family][0]} if family in PADS else {}
    return load_tokenizer(str(FOREIGN / family), name, **pad | typed)


@pytest.fixture(scope="session")
def apertus_like(tmp_path_factory):
    "A tokenizer with the control tokens of Apertus at their ids, `<s>` and `</s>` as BOS and eos, and no template: as the base models"
    folder = tmp_path_factory.mktemp("apertus_like")
    toy_tokenizer("bpe").save_pretrained(folder)
    return str(folder)


def ids_of(tokenizer, talk=TALK, **kwargs):
    from post_training.data.swissai import to_structured
    talk = to_structured(talk) if wants_blocks(template_of(tokenizer)) else talk
    return tokenizer(tokenizer.apply_chat_template(talk, tokenize=False, **kwargs).rstrip(), add_special_tokens=False).input_ids


def ends(tokenizer, talk=TALK):
    tokens = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, talk))
    return tokens[0], tokens[-1]


# -- the 21 names with Apertus' tokenizer

@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_names_with_apertus(name, apertus_like):
    "One BOS first, the token of the rule last, after each answer, and generation stops at it"
    t = load_tokenizer(apertus_like, name)
    end = OWN_TOKENS.get(name, "</s>")
    ids, end_id = ids_of(t), {"<SPECIAL_68>": 68, "<SPECIAL_62>": 62, "</s>": 2}[end]
    assert t.notices == [] and t.eos_token_id == end_id and config_ids(t) == dict(bos_token_id=1, eos_token_id=end_id, pad_token_id=10)
    assert ids[0] == 1 and ids.count(1) == 1
    if name == "assistant_message_only": assert end_id not in ids
    else: assert ids[-1] == end_id
    questions = name == "zephyr"  # closes questions as well
    assert ids.count(end_id) == (0 if name == "assistant_message_only" else 1 if name in ONCE else 4 if questions else 2)
    rule = TEMPLATE_RULES[name]
    assert (rule.bos == "template") == (name == "apertus") and rule.every_turn == (name not in ONCE)


@pytest.mark.parametrize("name", PLAIN)
def test_the_rule_renders_as_the_published_runs_did(name, apertus_like):
    "They typed add_bos_to_chat_template=true and kept the tokenizer's eos: BOS, then the template as it is"
    bare = toy_tokenizer("bpe", name)
    raw = bare(bare.apply_chat_template(TALK, tokenize=False).rstrip(), add_special_tokens=False).input_ids
    assert ids_of(load_tokenizer(apertus_like, name)) == [1, *raw]
    typed = load_tokenizer(apertus_like, name, add_bos_to_chat_template=True)
    assert ids_of(typed) == [1, *raw] and not typed.notices


def test_tulu_on_an_apertus_preset(apertus_like):
    "The preset names apertus; the template that is typed brings its own BOS and end"
    for model, typed, first, last in (("apertus-8b", [], 1, 68), ("apertus-70b", ["tokenizer_args.chat_template_name=tulu"], 1, 2),
                                      ("apertus-8b", ["tokenizer_args.chat_template_name=apertus_mistral_special_tokens_s62_only"], 1, 62)):
        cfg = config.compose("train_sft", [f"model={model}", "dataset=demo", *typed]).cfg
        t = load_tokenizer(**{**cfg["tokenizer_args"], "tokenizer_name_or_path": apertus_like})
        ids = ids_of(t)
        assert (ids[0], ids[-1], t.notices) == (first, last, [])


def test_presets_carry_no_bos_and_no_end():
    "They belong to the template"
    for path in sorted((config.CONFIGS / "model").glob("*.yaml")) + sorted((config.CONFIGS / "mixture").glob("*.yaml")):
        args = yaml.safe_load(path.read_text()).get("tokenizer_args") or {}
        own = {"add_bos_to_chat_template"} if path.stem == "tulu-3-8b-sft" else set()  # its published model was trained without a BOS
        assert not {"add_bos_to_chat_template", "model_eos_token_id"} & set(args) - own, path.name
    for stage in ("train_sft", "train_preference", "filter", "ref_completions", "ref_logprobs", "evaluate", "export", "dataset_mixture"):
        args = yaml.safe_load((config.CONFIGS / f"{stage}.yaml").read_text())["tokenizer_args"]
        assert args["add_bos_to_chat_template"] is None and args["model_eos_token_id"] is None and args["chat_template_kwargs"] == {}


def test_stop_ids_are_those_of_the_rule_and_of_the_base(tmp_path, apertus_like):
    GenerationConfig(eos_token_id=[2, 72]).save_pretrained(tmp_path)
    assert expected_stop_ids(str(tmp_path), load_tokenizer(apertus_like, "apertus")) == {2, 68, 72}
    assert expected_stop_ids(str(tmp_path), load_tokenizer(apertus_like, "tulu")) == {2, 72}
    assert expected_stop_ids(str(tmp_path / "none"), load_tokenizer(apertus_like, "apertus")) == {68}


# -- values that are typed

@pytest.mark.parametrize("name, typed, first, last, eos, notice", [
    ("tulu", dict(model_eos_token_id=68), "<s>", "<SPECIAL_68>", 68, "the template tulu ends turns with the tokenizer's own end token, here '</s>' (id 2)"),
    ("tulu", dict(model_eos_token_id=2), "<s>", "</s>", 2, None),
    ("tulu", dict(add_bos_to_chat_template=False), "<", "</s>", 2, "the published runs with the template tulu begin with the BOS, here '<s>'"),
    ("tulu", dict(add_bos_to_chat_template=True), "<s>", "</s>", 2, None),
    ("apertus", dict(model_eos_token_id=68), "<s>", "<SPECIAL_68>", 68, None),
    ("apertus", dict(model_eos_token_id=2), "<s>", "<SPECIAL_68>", 2, "ends turns with '<SPECIAL_68>' (id 68) and never writes '</s>'"),
    ("apertus", dict(add_bos_to_chat_template=True), "<s>", "<SPECIAL_68>", 68, "the template apertus writes the BOS '<s>' itself, exactly one"),
    ("apertus", dict(add_bos_to_chat_template=False), "<s>", "<SPECIAL_68>", 68, "the template apertus writes the BOS '<s>' itself, exactly one"),
    ("apertus_mistral_special_tokens_s62_only", dict(model_eos_token_id=2), "<s>", "<SPECIAL_62>", 2, "ends turns with '<SPECIAL_62>' (id 62)"),
    ("assistant_message_only", dict(model_eos_token_id=68), "<s>", "2", 68, None)])
def test_typed_values_win(name, typed, first, last, eos, notice, apertus_like):
    "With a notice that names the key, the value and the template where they do not fit"
    t = load_tokenizer(apertus_like, name, **typed)
    got = ends(t)
    assert got[0].startswith(first) and (got[1], t.eos_token_id) == (last, eos)
    if notice is None: assert t.notices == []
    else:
        (key, value), = typed.items()
        assert len(t.notices) == 1 and notice in t.notices[0] and f"tokenizer_args.{key}={str(value).lower()}" in t.notices[0]


# -- tokenizers of other families

@pytest.mark.parametrize("family", FAMILIES)
def test_own_templates(family):
    "Their BOS and eos are kept, whatever the template needs: alternation, the date, lists of parts"
    bos, eos, first, last = FAMILIES[family]
    t = load(family)
    assert (t.bos_token, t.eos_token, t.notices) == (bos, eos, [])
    assert ends(t, TALK[:2]) == (first, last)
    assert check_bos(t) == (first == bos)
    if first == bos and bos != eos:
        with pytest.raises(UserError, match="2 BOS tokens"): load(family, add_bos_to_chat_template=True)


@pytest.mark.parametrize("family, name", itertools.product(FAMILIES, CHAT_TEMPLATES))
def test_names_with_other_families(family, name):
    "The BOS of the tokenizer first, its eos last; what the tokenizer lacks is said"
    bos, eos, *_ = FAMILIES[family]
    if name in OWN_TOKENS or bos is None:
        with pytest.raises(UserError) as e: load(family, name)
        text = str(e.value)
        assert f"The chat template {name} needs" in text and "tokenizer_args.chat_template_name" in text
        assert ("a BOS token" in text) == (bos is None) and (OWN_TOKENS.get(name, "\0") in text) == (name in OWN_TOKENS)
        if name in OWN_TOKENS: return
        assert "add_bos_to_chat_template=false" in text
        t = load(family, name, add_bos_to_chat_template=False)
        assert check_bos(t) == 0
    else:
        t = load(family, name)
        assert ends(t)[0] == bos and check_bos(t) == 1
    assert t.eos_token == eos
    assert (ends(t)[1] == eos) == (name != "assistant_message_only")
    marks = [m for m in ("[INST]", "<SPECIAL_61>") if m in template_text(name) and m not in t.get_vocab()]
    assert len(t.notices) == bool(marks) and all(m in t.notices[0] for m in marks)


@pytest.mark.parametrize("family", PADS)
def test_a_pad_token_is_suggested(family):
    "A control token that nothing writes, with its id"
    with pytest.raises(UserError) as e: load_tokenizer(str(FOREIGN / family))
    i, token = PADS[family]
    assert f"tokenizer_args.model_pad_token_id to an unused id, such as {i} ({token!r})" in str(e.value)
    assert load_tokenizer(str(FOREIGN / family), model_pad_token_id=i).pad_token == token


def test_a_template_that_needs_what_the_tokenizer_lacks(tmp_path):
    "Also a template of the tokenizer's own: an error for the user, no traceback of Jinja"
    t = toy_tokenizer("bpe")
    for role in ("bos", "eos"):
        t.bos_token, t.eos_token = (None, "</s>") if role == "bos" else ("<s>", None)
        t.chat_template = "{% for m in messages %}{{ " + role + "_token + m.content }}{% endfor %}"
        t.save_pretrained(tmp_path / role)
    with pytest.raises(UserError, match="writes bos_token, and the tokenizer has no BOS token"): load_tokenizer(str(tmp_path / "bos"))
    with pytest.raises(UserError, match="no eos token.*tokenizer_args.model_eos_token_id"): load_tokenizer(str(tmp_path / "eos"))
    assert ends(load_tokenizer(str(tmp_path / "eos"), model_eos_token_id=2), TALK[:2])[0] == "</s>"


@pytest.mark.parametrize("template", [
    "{{ bos_token }}{% for m in messages %}{% for p in m.content %}{{ p['text'] + '' }}{% endfor %}{{ eos_token }}{% endfor %}",  # lists of parts only
    "{{ bos_token }}{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}{{ messages[1].content + eos_token }}",
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ raise_exception('a system message') }}{% endif %}{{ messages[2].content + eos_token }}",
    "{{ bos_token + strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "{{ bos_token }}{% if not tools %}{{ raise_exception('tools') }}{% endif %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"])
def test_templates_with_wishes_are_checked(template, tmp_path):
    t = toy_tokenizer("bpe")
    t.chat_template = template
    t.save_pretrained(tmp_path / "one")
    assert check_bos(load_tokenizer(str(tmp_path / "one"))) == 1
    t.chat_template = "{{ bos_token }}" + template
    t.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="2 BOS tokens"): load_tokenizer(str(tmp_path / "two"))


# -- several templates by name

NAMED = dict(default="{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}",
             tool_use="{{ bos_token }}{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
             rag="{{ documents }}{{ messages[-1].content }}")


@pytest.mark.parametrize("form", ["dict", "list"])
def test_named_templates_are_kept_and_used(form, tmp_path):
    "All names are read and written again; tool_use serves conversations with tools"
    t = toy_tokenizer("bpe")
    t.chat_template = NAMED
    t.save_pretrained(tmp_path / "a", save_jinja_files=form == "dict")
    assert (tmp_path / "a" / "chat_template.jinja").exists() == (form == "dict")  # else a list in tokenizer_config.json
    a = load_tokenizer(str(tmp_path / "a"))
    assert a.chat_template == NAMED
    assert "<user>2+2?" in a.apply_chat_template(TALK, tokenize=False)
    assert "[user]2+2?" in a.apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert [template_of(a), template_of(a, tools=True)] == [NAMED["default"], NAMED["tool_use"]]
    a.save_pretrained(tmp_path / "b")
    b = load_tokenizer(str(tmp_path / "b"))
    assert b.chat_template == NAMED and template_fingerprint(b) == template_fingerprint(a) and tokenizer_fingerprint(b) == tokenizer_fingerprint(a)
    b.chat_template = NAMED | dict(tool_use=NAMED["tool_use"] + "\n")
    assert template_fingerprint(b) != template_fingerprint(a)
    b.chat_template = NAMED["default"]
    assert template_fingerprint(b) != template_fingerprint(a)
    named = load_tokenizer(str(tmp_path / "a"), "tulu")  # a name replaces them all
    assert isinstance(named.chat_template, str) and ends(named) == ("<s>", "</s>")


def test_named_templates_without_a_default(tmp_path):
    t = toy_tokenizer("bpe")
    t.chat_template = {k: v for k, v in NAMED.items() if k != "default"}
    t.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the templates rag, tool_use and none called default"): load_tokenizer(str(tmp_path))


# -- arguments of a template

def test_arguments_reach_the_template(tmp_path):
    "They are part of the template from then on: of its fingerprint, and of what is saved; a call still wins"
    plain, quick = load("qwen3"), load("qwen3", chat_template_kwargs=dict(enable_thinking=False))
    ask = dict(tokenize=False, add_generation_prompt=True)
    assert plain.apply_chat_template(TALK[:1], **ask).endswith("<|im_start|>assistant\n")
    assert quick.apply_chat_template(TALK[:1], **ask).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert quick.apply_chat_template(TALK[:1], enable_thinking=True, **ask) == plain.apply_chat_template(TALK[:1], **ask)
    assert quick.apply_chat_template(TALK, tokenize=False) == plain.apply_chat_template(TALK, tokenize=False, enable_thinking=False)
    assert (plain.chat_template_kwargs, quick.chat_template_kwargs) == ({}, dict(enable_thinking=False))
    assert template_fingerprint(plain) != template_fingerprint(quick) and tokenizer_fingerprint(plain) == tokenizer_fingerprint(quick)
    quick.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert template_fingerprint(again) == template_fingerprint(quick)
    assert again.apply_chat_template(TALK[:1], **ask) == quick.apply_chat_template(TALK[:1], **ask)


def test_arguments_make_a_date_fixed():
    t = load("llama31", chat_template_kwargs=dict(date_string="26 Jul 2024"))
    assert "Today: 26 Jul 2024" in render_sample(t)[1]


def test_arguments_that_nothing_reads_are_refused():
    for values, words in ((dict(enable_thinkin=False), "Did you mean 'enable_thinking'"), (dict(tools=[]), "no free variable"), ({"a b": 1}, "no free variable")):
        with pytest.raises(UserError, match=words): load("qwen3", chat_template_kwargs=values)


def test_arguments_in_a_config():
    "A mapping, typed as a whole or key by key; it makes another run"
    words = ["model=tiny", "dataset=demo"]
    one, other = (config.compose("train_sft", [*words, w]).cfg for w in (
        "tokenizer_args.chat_template_kwargs.enable_thinking=false", "tokenizer_args.chat_template_kwargs={enable_thinking: false}"))
    assert one["tokenizer_args"] == other["tokenizer_args"] and one["tokenizer_args"]["chat_template_kwargs"] == dict(enable_thinking=False)
    from post_training.run.identity import config_hash
    assert len({config_hash(c) for c in (one, other, config.compose("train_sft", words).cfg)}) == 2
    with pytest.raises(UserError, match="takes a mapping"): config.compose("train_sft", [*words, "tokenizer_args.chat_template_kwargs=3"])
