"Reference log-probabilities: reading a prompt once changes nothing, in every attention and precision, and a probe finds the models where it would"
import math
import random

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import Largest
from post_training.core import shards
from post_training.preferences.reference_logprobs import (
    ScoringPiece, score_plain_checked, decide_sharing, logprobs_batch_fn, plan_tokens, probe_sharing, score_plain, score_shared,
    scoring_lengths)
from post_training.preferences.rows import make_completion
from post_training.core.files import UserError
from post_training.models.generate import left_pad
from post_training.models.load import quiet_activation, tiny_config
from post_training.models.score import add_score_head
from post_training.tokens.tokenizer import toy_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=.3)
V = 300
MODELS = {
    "apertus": lambda: tiny_config(V, **SIZES),
    "llama": lambda: tf.LlamaConfig(vocab_size=V, tie_word_embeddings=True, **SIZES),
    "window": lambda: tf.MistralConfig(vocab_size=V, sliding_window=8, **SIZES),
    "windows in turn, softcaps": lambda: tf.Gemma2Config(vocab_size=V, head_dim=8, sliding_window=8, final_logit_softcapping=5., **SIZES),
    "windows above": lambda: tf.Qwen2Config(vocab_size=V, use_sliding_window=True, sliding_window=8, max_window_layers=1, **SIZES)}


def build(config, attention="sdpa"):
    torch.manual_seed(0)
    with quiet_activation(): return add_score_head(tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval())


def made_pieces(lengths, seed=0):
    "Pieces of rows [(prompt, [completion, ...]), ...] of the given lengths, some tokens of which are not scored"
    r = random.Random(seed)
    ids = lambda n: [r.randrange(V) for _ in range(n)]
    prompts = [ids(n) for n, _ in lengths]
    return [ScoringPiece(i, k, prompts[i], ids(n), [True] + [r.random() < .9 for _ in range(n - 1)]) for i, (_, ns) in enumerate(lengths) for k, n in enumerate(ns)]


PIECES = made_pieces([(40, [3, 30, 17]), (12, [25, 1]), (2, [9, 9]), (25, [40])])


@torch.no_grad()
def alone(model, piece):
    "What anyone would write for one sequence"
    ids = torch.tensor([piece.prompt + piece.ids])
    logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logps[len(piece.prompt) - 1:][torch.tensor(piece.scored)].float().numpy()


def apart(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name,attention", [(n, a) for n in MODELS for a in ("eager", "sdpa") if (n, a) != ("windows in turn, softcaps", "sdpa")]) # sdpa has no softcap
def test_both_ways_are_exact(name, attention):
    model = build(MODELS[name](), attention)
    want = [alone(model, p) for p in PIECES]
    for tokens in (1, 60, 4000): # alone, in small batches, all at once: batch and padding do not matter
        assert apart(score_plain(model, PIECES, tokens), want) < 1e-5
        assert apart(score_shared(model, PIECES, tokens), want) < 1e-5
    assert decide_sharing(model, PIECES, 60, True)


def test_flex_attention_is_exact():
    "Not compiled, which takes minutes on a CPU"
    with torch.compiler.set_stance("force_eager"):
        model = build(MODELS["window"](), "flex_attention")
        want = [alone(model, p) for p in PIECES]
        assert apart(score_plain(model, PIECES, 60), want) < 1e-5
        assert apart(score_shared(model, PIECES, 60), want) < 1e-5


def test_left_padding_is_exact():
    model = build(MODELS["apertus"]())
    ids, mask = left_pad([p.prompt + p.ids for p in PIECES], 0)
    labels = torch.where(mask.bool(), ids, -100)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=labels, score=True).log_probs
    found = [row[-len(p.ids):][torch.tensor(p.scored)].numpy() for row, p in zip(out, PIECES)]
    assert apart(found, score_plain(model, PIECES, 100)) < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 30), st.lists(st.integers(1, 30), min_size=1, max_size=4)), min_size=1, max_size=5), st.integers(1, 300))
def test_any_lengths(lengths, tokens):
    pieces = made_pieces(lengths)
    assert apart(score_shared(LLAMA, pieces, tokens), score_plain(LLAMA, pieces, 10_000)) < 1e-5


LLAMA = build(MODELS["llama"]())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_is_within_its_rounding(attention):
    model = build(MODELS["apertus"](), attention).to(torch.bfloat16)
    gap, why = probe_sharing(model, PIECES, score_plain_checked(model, PIECES, 60), 60)
    assert not why and gap < .02
    assert decide_sharing(model, PIECES, 60, True)


def long_rope():
    rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32, factor=8., short_factor=[1.]*4, long_factor=[4.]*4)
    return build(tf.LlamaConfig(vocab_size=V, rope_parameters=rope, **SIZES))


def deaf_to_the_cache():
    model = build(MODELS["llama"]())
    inner = model.base_model.forward
    model.base_model.forward = lambda *a, past_key_values=None, attention_mask=None, **k: inner(*a, **k)
    return model


def without_a_cache():
    model = build(MODELS["llama"]())
    inner = model.base_model.forward
    model.base_model.forward = lambda input_ids=None, attention_mask=None, use_cache=None: inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return model


def recurrent():
    config = tf.MambaConfig(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2, max_position_embeddings=256)
    return build(config, None)


@pytest.mark.parametrize("broken", [long_rope, deaf_to_the_cache, without_a_cache, recurrent])
def test_the_probe_finds_where_sharing_is_wrong(broken):
    "The plain way is taken, and says why; who asked for the other one is told"
    model, said = broken(), []
    assert decide_sharing(model, PIECES, 60, "auto", said.append) is False
    assert len(said) == 1 and "cannot be read once" in said[0] and "\n" not in said[0]
    with pytest.raises(UserError, match="share_prompts"): decide_sharing(model, PIECES, 60, True)
    assert decide_sharing(model, PIECES, 60, False, said.append) is False and len(said) == 1


def test_no_tokens_times_vocabulary():
    model = build(tf.LlamaConfig(vocab_size=40_000, **SIZES))
    pieces = made_pieces([(200, [50]*4)])
    for way in (score_plain, score_shared):
        with Largest() as seen: way(model, pieces, 1000)
        assert 0 < seen.numel < 200*40_000/4


# -- the stage

TOKENIZER = toy_tokenizer("bpe", "tulu")
WORDS = "Bern Zurich Geneva Lugano lake river city result two four is the of and".split()


def text(r, n): return " ".join(r.choice(WORDS) for _ in range(n))


def made_rows(n=30, seed=0):
    r = random.Random(seed)
    return Dataset.from_list([dict(id=f"r{i}", prompt=[dict(role="user", content=text(r, r.randint(3, 30)))],
                                   completions=[make_completion(text(r, r.randint(1, 20)), policy="toy", is_reference_completion=k > 1, ref_logprob=1.) for k in range(4)])
                              for i in range(n)])


@pytest.fixture(scope="module")
def reference_model():
    return build(tf.LlamaConfig(**SIZES, vocab_size=len(TOKENIZER)))


def test_any_sharding_gives_the_same_bytes(reference_model, tmp_path):
    rows, merged = made_rows(), []
    for n in (1, 7):
        folder = tmp_path/str(n)
        plan = shards.make_shard_plan(rows["id"], scoring_lengths(rows), dict(stage="ref_logprobs"), plan_tokens(30), shards=n)
        shards.save_shard_plan(folder, plan)
        for k in range(plan.shards): # each worker with a probe of its own
            shards.run_shard(folder, k, lambda folder, plan: logprobs_batch_fn(rows, TOKENIZER, reference_model, 100, probe_rows=plan.batches[0]))
        shards.merge_shards(folder, folder/"out.jsonl")
        merged.append((folder/"out.jsonl").read_bytes())
    assert plan.shards == 7 and merged[0] == merged[1] and merged[0].count(b"\n") == 30


def test_rows_hold_what_the_model_says(reference_model):
    rows = made_rows(5)
    found = logprobs_batch_fn(rows, TOKENIZER, reference_model, 100)(range(5))
    for row, result in zip(rows, found):
        assert set(result) <= {"completions", "lost", "existing"} and result["lost"] == {}
        for c, before in zip(result["completions"], row["completions"], strict=True):
            logps = shards.unpack_floats(c["ref_logprobs"])
            assert {k for k in c if c[k] != before[k]} == {"ref_logprob", "ref_logprobs", "num_tokens", "prompt_tokens"}
            assert c["ref_logprob"] == math.fsum(logps.tolist()) and c["num_tokens"] == len(logps) > 0
            chat = TOKENIZER.apply_chat_template([*row["prompt"], dict(role="assistant", content=c["content"])], tokenize=False)
            ids = TOKENIZER(chat, add_special_tokens=False).input_ids
            n = c["prompt_tokens"]
            piece = ScoringPiece(0, 0, ids[:n], ids[n:n + len(logps)], [True]*len(logps))
            assert piece.ids[-1] == TOKENIZER.eos_token_id
            np.testing.assert_allclose(logps, alone(reference_model, piece), atol=1e-5)


def test_bad_rows_are_dropped_with_reasons(reference_model):
    ask, r = [dict(role="user", content="Name a city.")], random.Random(0)
    rows = Dataset.from_list([
        dict(id="good", prompt=ask, completions=[make_completion("Bern"), make_completion(""), make_completion(text(r, 400))]),
        dict(id="empty", prompt=ask, completions=[make_completion(" ")]), dict(id="none", prompt=ask, completions=[]),
        dict(id="long", prompt=[dict(role="user", content=text(r, 400))], completions=[make_completion("Bern")])])
    good, *bad = logprobs_batch_fn(rows, TOKENIZER, reference_model)(range(4))
    assert good["lost"] == {"empty completion": 1, "longer than the model's 256 positions": 1} and [c["content"] for c in good["completions"]] == ["Bern"]
    assert [b["dropped"] for b in bad] == ["no completion can be scored", "no completions", "the prompt fills the model's 256 positions"]


def test_numbers_that_are_not_finite(reference_model):
    "From the first rows on: the model is refused; in one row: the row is dropped"
    rows = made_rows(3)
    broken = build(reference_model.config)
    with torch.no_grad(): broken.lm_head.weight[:] = torch.nan
    with pytest.raises(UserError, match="not finite"): logprobs_batch_fn(rows, TOKENIZER, broken)
    word = rows[1]["completions"][0]["content"].split()[-1]
    odd = Dataset.from_list([rows[0], dict(rows[1], completions=[make_completion(f"{word} ~")]), rows[2]])
    make = logprobs_batch_fn(odd, TOKENIZER, reference_model)
    tilde = TOKENIZER(" ~", add_special_tokens=False).input_ids[-1]
    keep = reference_model.get_input_embeddings().weight[tilde].clone()
    try:
        with torch.no_grad(): reference_model.get_input_embeddings().weight[tilde] = torch.nan
        found = make(range(3))
    finally:
        with torch.no_grad(): reference_model.get_input_embeddings().weight[tilde] = keep
    assert [f.get("dropped") for f in found] == [None, "log-probabilities that are not finite", None]


def test_the_training_forward_agrees(demo):
    "The numbers are those of a batch as training makes it, for the demo's model, tokenizer and template"
    from post_training.data.swissai import to_structured
    from post_training.models.load import load_model
    from post_training.tokens.collate import PadCollator
    from post_training.tokens.masks import tokenize_chats
    from post_training.tokens.tokenizer import load_tokenizer
    folder = str(demo/"models"/"tiny")
    tokenizer, model = load_tokenizer(folder, model_eos_token_id=68), load_model(folder)
    rows = made_rows(4)
    found = logprobs_batch_fn(rows, tokenizer, model, 200, True)(range(4))
    chats = tokenize_chats(tokenizer, [to_structured([*r["prompt"], dict(role="assistant", content=c["content"])]) for r in rows for c in r["completions"]])
    batch = PadCollator(tokenizer.pad_token_id, "right")([
        dict(input_ids=c.input_ids.tolist(), completion_mask=c.completion_mask.tolist(), length=len(c.input_ids), row_id=str(i), source="") for i, c in enumerate(chats)])
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    with torch.no_grad(): out = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=torch.where(mask, ids, -100), score=True).log_probs
    want = [row[m].numpy() for row, m in zip(out, mask[:, 1:])]
    assert apart([shards.unpack_floats(c["ref_logprobs"]) for f in found for c in f["completions"]], want) < 1e-5
