"Rows of completions, what is made of them and what they are made of: round trips, pairs for any number of workers, real solutions, bad input"
import json
import math

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from post_training.core import shards
from post_training.preferences.filter import filter_batch_fn
from post_training.preferences.pairs import PAIR_MODES, mix_pairs, pair_diagnostics, pair_features, pairs_batch_fn, pool_columns
from post_training.preferences.rows import make_completion, row_features, to_preference, to_rows, to_swissai
from post_training.core.files import UserError
from post_training.data.io import load_rows, save_rows
from post_training.models.verifiers import row_verifier, run_verifier

disable_progress_bars()
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)
messages = lambda *turns: [dict(role=r, content=c) for r, c in turns]


# -- rows and back

@st.composite
def branching(draw):
    "A Swiss-AI row: perhaps a system prompt, tools, earlier turns; branches that think, call, display answers, respond"
    def turn():
        parts = [dict(type="thought", content=draw(text))] if draw(st.booleans()) else []
        if tools and draw(st.booleans()): parts += [dict(type="function-call", name="add", args=json.dumps(dict(a=draw(text)))), dict(type="function-output", content=draw(text))]
        if draw(st.booleans()): parts.append(dict(type="verifiable-responses", answers=draw(st.lists(text, min_size=1, max_size=2))))
        return dict(role="assistant", parts=[*parts, dict(type="response", content=draw(text))])
    tools = [dict(name="add", description="Add", parameters=json.dumps(dict(type="object", properties=dict(a=dict(type="string")))))] if draw(st.booleans()) else []
    context = [turn(), dict(role="user", parts=[dict(type="response", content=draw(text))])] if draw(st.booleans()) else []
    branches = [dict(messages=[*context, turn()], policy=draw(st.none() | st.sampled_from(["small", "large"])), reward=draw(st.none() | st.floats(-5, 5)))
                for _ in range(draw(st.integers(1, 3)))]
    system = dict(content=draw(text)) if draw(st.booleans()) else None
    return dict(conversation_id="c", system_prompt=system, available_functions=tools, initial_prompt=dict(role="user", content=draw(text)), conversation_branches=branches)


def swissai(row):
    "A dataset of one row, its parts with all fields so that Arrow has one type"
    blank = dict(type=None, content=None, name=None, args=None, answers=None)
    for b in row["conversation_branches"]:
        b["messages"] = [dict(m, parts=[{**blank, **p} for p in m["parts"]]) for m in b["messages"]]
    return Dataset.from_list([row])


@few
@given(branching())
def test_branches_become_rows_and_come_back(row):
    rows, counts = to_rows(swissai(row))
    assert counts["completions"] == len(row["conversation_branches"]) and not counts["lost"] and not counts["dropped"]
    back, _ = to_rows(to_swissai(rows))
    assert back[:] == rows[:]


@few
@given(st.lists(text, min_size=1, max_size=3), st.lists(st.tuples(text, st.none() | st.floats(-5, 5), st.booleans()), max_size=3), st.booleans())
def test_plain_rows_become_branches_and_come_back(asked, answers, system):
    prompt = messages(*([("system", "Be brief.")] if system else []), *(p for t in asked for p in (("user", t), ("assistant", t))))[:-1]
    known = dict(policy="small", token_ids=[1, 2], ref_logprobs=[-.5, -.25], ref_logprob=-.75, seed=2**40)
    found = [make_completion(t, reward=r, is_reference_completion=ref, **known) for t, r, ref in answers]
    rows = Dataset.from_list([dict(id="a", source="s", prompt=prompt, answer="4", verifier=None, completions=found)], features=row_features(False))
    assert to_rows(to_swissai(rows), "plain")[0].select_columns(rows.column_names)[:] == rows[:]


@few
@given(text, text, text, st.booleans())
def test_pairs_become_rows_and_come_back(asked, chosen, rejected, whole):
    talk = messages(("user", asked))
    row = dict(id="a", prompt=asked, chosen=chosen, rejected=rejected)
    if whole: row = dict(id="a", chosen=[*talk, *messages(("assistant", chosen))], rejected=[*talk, *messages(("assistant", rejected))])
    rows, _ = to_rows(Dataset.from_list([row]))
    plain = to_preference(rows)
    assert to_rows(plain)[0][:] == rows[:]
    one = to_preference(rows, texts=True)[0]
    assert (one["prompt"], one["chosen"], one["rejected"]) == (asked, chosen, rejected)
    assert to_preference(to_rows(to_swissai(rows))[0])[:] == plain[:]


@few
@given(branching())
def test_structured_pairs_are_rows_again(row):
    for i, b in enumerate(row["conversation_branches"]): b["reward"] = float(i)
    rows, _ = to_rows(swissai(row))
    made = pairs_batch_fn(rows, "best-worst", references="all", min_num_ref_rewards=1)([0])[0].get("rows", [])
    for pair in Dataset.from_list(made, features=pair_features(True)) if made else []:
        again, _ = to_rows(Dataset.from_list([pair], features=pair_features(True)))
        found = {c["reward"]: c["content"] for c in rows[0]["completions"]}
        assert again[0]["prompt"] == rows[0]["prompt"] and {c["reward"]: c["content"] for c in again[0]["completions"]}.items() <= found.items()


def test_pairs_of_the_pipeline_are_rows_again():
    known = lambda n: dict(reward=float(n), num_tokens=n, prompt_tokens=5, ref_logprob=-n, ref_logprobs=[-1.]*n, is_reference_completion=True)
    found = [make_completion("a", policy="x", **known(1)), make_completion("b", policy="y", **known(2))]
    rows = Dataset.from_list([dict(id="a", source=None, prompt=messages(("user", "q")), answer="4", verifier=None, completions=found)], features=row_features(False))
    pairs = Dataset.from_list(pairs_batch_fn(rows)([0])[0]["rows"], features=pair_features(False))
    again, _ = to_rows(pairs)
    want = {c["content"]: c for c in found}
    for c in again[0]["completions"]:
        assert {k: c[k] for k in c if k != "policy"} == {k: want[c["content"]][k] for k in c if k != "policy"}
    assert [c["policy"] for c in again[0]["completions"]] == ["chosen", "rejected"]


@pytest.mark.parametrize("prompt, chosen, rejected, why", [
    (None, "a", "b", "chosen is a text and there is no prompt"),
    ("q", " ", "", "empty assistant message"),
    ("q", "a\0", "b\0", "text with a NUL character"),
    (None, messages(("user", "x"), ("assistant", "a")), messages(("user", "y"), ("assistant", "b")), "the completions answer different prompts"),
    (None, messages(("assistant", "a")), messages(("assistant", "b")), "the prompt does not end with a user turn")])
def test_what_is_no_row_is_dropped_and_counted(prompt, chosen, rejected, why):
    row = dict(id="bad", prompt=prompt, chosen=chosen, rejected=rejected)
    fine = dict(id="good", prompt="q", chosen="a", rejected="b") if isinstance(chosen, str) else dict(
        id="good", prompt=None, chosen=messages(("user", "q"), ("assistant", "a")), rejected=messages(("user", "q"), ("assistant", "b")))
    rows, counts = to_rows(Dataset.from_list([fine, row]))
    assert (rows["id"][:], counts["dropped"], counts["examples"]) == (["good"], {why: 1}, {why: "bad"})
    with pytest.raises(UserError, match="Row bad: "): to_rows(Dataset.from_list([fine, row]), on_malformed="error")


@pytest.mark.parametrize("field, bad", [("reward", math.nan), ("reward", -math.inf), ("ref_logprob", math.inf), ("ref_logprobs", [-1., math.nan])])
def test_numbers_that_are_none_become_null_and_are_counted(field, bad, tmp_path):
    "In rows that have the form already, and in branches; every stage can keep what comes out"
    whole = dict(reward=1., ref_logprob=-2., ref_logprobs=[-1., -1.], num_tokens=2)
    made = [dict(id=str(i), source=None, prompt=messages(("user", "q")), answer=None, verifier=None, completions=[make_completion("a", **whole), make_completion("b", **{**whole, field: bad})]) for i in range(3)]
    rows = Dataset.from_list(made, features=row_features(False))
    for source in (rows, to_swissai(rows)):
        out, counts = to_rows(source, structure="plain")
        assert [(a[field], b[field]) for a, b in out["completions"][:]] == [(whole[field], None)] * 3
        assert counts["lost"] == {f"{field} is not finite: left out": 3} and (counts["completions"], counts["out"]) == (6, 3)
        json.dumps(out.to_list(), allow_nan=False)
        with pytest.raises(UserError, match=f"Row 0: {field} is not finite"): to_rows(source, structure="plain", on_malformed="error")


# -- pairs

reward = st.none() | st.sampled_from([0., 1., math.nan, math.inf]) | st.floats(-3, 3)
pool = st.lists(st.tuples(reward, st.booleans(), st.sampled_from(["stop", "length", None]), st.sampled_from("abcdefgh ")), max_size=8)


def rows_of(pools):
    made = []
    for i, found in enumerate(pools):
        names = ["chosen", "rejected", *["model"]*8]
        cs = [make_completion(t, reward=r, is_reference_completion=ref, finish_reason=f, policy=p) for (r, ref, f, t), p in zip(found, names)]
        made.append(dict(id=f"p{i}", source=None, prompt=messages(("user", f"q{i}")), answer=None, verifier=None, completions=cs))
    return Dataset.from_list(made, features=row_features(False))


@few
@given(st.lists(pool, min_size=1, max_size=5), st.sampled_from(list(PAIR_MODES)), st.integers(1, 4), st.sampled_from(["all", "reference", "data"]), st.sampled_from(["sampled", "all"]))
def test_pairs_are_what_they_say(pools, mode, n, candidates, references):
    import torch

    from post_training.losses.qrpo import quantile
    rows = rows_of(pools)
    asked = dict(mode=mode, num_pairs=1 if mode == "offline" else n, candidates=candidates, references=references, min_num_ref_rewards=1)
    for row, out in zip(rows, pairs_batch_fn(rows, **asked)(range(len(rows)))):
        json.dumps(out, allow_nan=False)
        assert ("dropped" in out) != ("rows" in out) and len(out.get("rows", [])) <= asked["num_pairs"]
        seen = [(p["chosen"][0]["content"], p["rejected"][0]["content"], p["chosen_reward"], p["rejected_reward"]) for p in out.get("rows", [])]
        for p, (a, b, high, low) in zip(out.get("rows", []), seen):
            assert a != b and (mode == "offline" or high > low) and a.strip() and b.strip()
            assert all(math.isfinite(r) for r in p["ref_rewards"]) and len(p["ref_rewards"]) >= 1
            for side in ("chosen", "rejected"):
                if p[f"{side}_reward"] is None: continue
                want = quantile(torch.tensor([p[f"{side}_reward"]], dtype=torch.float64), torch.tensor([p["ref_rewards"]], dtype=torch.float64))
                assert want.item() == pytest.approx(p[f"{side}_quantile_reward"])
                if p[f"{side}_is_reference"]: assert p[f"{side}_reward"] in p["ref_rewards"]
        if mode == "heuristic" and seen:
            assert out["rows"][0]["chosen_quantile_reward"] >= out["rows"][0]["rejected_quantile_reward"]


def merged(rows, folder, n, mode):
    "What the driver makes of rows with so many shards"
    batches = [list(range(i, min(i + 7, len(rows)))) for i in range(0, len(rows), 7)]
    shards.save_shard_plan(folder, shards.make_shard_plan(rows["id"][:], [1]*len(rows), dict(mode=mode), shards=n, batches=batches))
    for k in range(shards.load_shard_plan(folder).shards): shards.run_shard(folder, k, lambda *_: pairs_batch_fn(rows, mode, num_pairs=1 if mode == "offline" else 3))
    counts = shards.merge_shards(folder, folder / "merged.jsonl")
    return (folder / "merged.jsonl").read_bytes(), counts


@pytest.mark.parametrize("mode", PAIR_MODES)
def test_any_number_of_shards_gives_the_same_pairs(mode, tmp_path):
    import random
    rng = random.Random(0)
    rows = rows_of([[(rng.choice([None, 0., 1., rng.random()]), True, "stop", rng.choice("abcdefgh")) for _ in range(8)] for _ in range(60)])
    (one, counts), (seven, _) = (merged(rows, tmp_path / str(n), n, mode) for n in (1, 7))
    assert one == seven and one and sum(counts["dropped"].values()) + counts["rows"] == 60


@pytest.mark.parametrize("mode", [m for m in PAIR_MODES if m not in ("heuristic", "offline")])
def test_rows_without_references_say_which_key_keeps_them(mode, tmp_path):
    from post_training.data.messages import check_dropped
    rows = rows_of([[(1., False, "stop", "a"), (0., False, "stop", "b")]] * 4)
    _, counts = merged(rows, tmp_path / "none", 1, mode)
    with pytest.raises(UserError, match="All 4 rows were dropped .*first row p0; set min_num_ref_rewards=0 to keep them"): check_dropped({"in": 4, "out": counts["rows"], **counts})
    assert len(pairs_batch_fn(rows, mode, min_num_ref_rewards=0)([0])[0]["rows"]) == 1


def test_equal_texts_are_counted():
    rows = rows_of([[(1., True, "stop", "a"), (0., True, "stop", "a"), (.5, True, "stop", "b")]])
    pairs = Dataset.from_list(pairs_batch_fn(rows)([0])[0]["rows"], features=pair_features(False))
    assert pair_diagnostics(pairs, rows)["ties"] == [dict(prompts=1, all_tied=0, equal_rewards=0., equal_texts=pytest.approx(1 / 3))]


def test_mixed_sets_have_one_reference(tmp_path):
    for name, reference in (("a", "ab12"), ("b", "ab12"), ("c", None)):
        row = dict(prompt=messages(("user", "q")), chosen=messages(("assistant", "1")), rejected=messages(("assistant", "2")), reference=reference)
        save_rows(Dataset.from_list([dict(row, id=f"{name}{i}") for i in range(10)]), f"{tmp_path}/{name}.jsonl")
    source = lambda name, **more: dict(dataset_name=name, dataset_path=f"{tmp_path}/{name}.jsonl", **more)
    both = mix_pairs([source("a", subsample_factor=.3), source("b", duplication_factor=2)])
    assert [(r["source"], r["rows"]) for r in both.table] == [("a", 3), ("b", 20), ("total", 23)]
    with pytest.raises(UserError, match="a: ab12; c: none"): mix_pairs([source("a"), source("c")])
    assert len(mix_pairs([source("a"), source("c")], allow_other_references=True).train) == 20
    assert len(mix_pairs([source("a"), source("c", subsample_factor=0)]).train) == 10  # a set that gives nothing does not count


# -- real solutions

@pytest.fixture
def solutions(data_dir):
    return to_rows(load_rows(str(data_dir / "gsm8k_model_solutions.jsonl")))


def test_real_solutions_become_branches_rewards_and_pairs(solutions):
    "Four models' solutions of 1,319 questions; the verifier gives each the label that it came with"
    rows, counts = solutions
    assert (counts["in"], counts["out"], counts["completions"]) == (1319, 1319, 5276)
    branches = to_swissai(rows)
    assert all(len(b) == 4 for b in branches["conversation_branches"])
    back, _ = to_rows(branches, "plain")
    assert back[:] == rows[:]
    scores = [[run_verifier(row_verifier(r), c["content"], r["answer"]) for c in r["completions"]] for r in back]
    assert scores == [[c["reward"] for c in r["completions"]] for r in back] and sum(map(len, scores)) == 5276
    done = pairs_batch_fn(back, "best-worst", references="all")(range(len(back)))
    pairs = [p for out in done for p in out.get("rows", [])]
    differ = sum(0 < sum(s) < 4 for s in scores)
    assert len(pairs) == differ > 500 and {out.get("dropped") for out in done} == {None, "all rewards are the same"}
    assert all(p["chosen_quantile_reward"] == 1 and p["rejected_quantile_reward"] == p["ref_rewards"].count(0.) / 4 for p in pairs)
    tables = pair_diagnostics(Dataset.from_list(pairs, features=pair_features(False)), back)
    rate = {r["policy"]: r["win_rate"] for r in tables["policies"]}
    assert max(rate, key=rate.get) == "175b_verification" and tables["ties"][0]["all_tied"] == 1319 - differ
    assert len(pool_columns(back)["reward"]) == 5276


@pytest.mark.slow
def test_real_solutions_are_filtered_by_tokens(solutions, demo):
    from post_training.tokens.tokenizer import load_tokenizer
    rows, tokenizer = solutions[0].select(range(200)), load_tokenizer(str(demo / "models" / "tiny"))
    out = filter_batch_fn(rows, tokenizer, 400, 2)(range(200))
    kept = [c for o in out for c in o.get("completions", [])]
    assert kept and all(c["num_tokens"] + c["prompt_tokens"] <= 400 for c in kept)
    assert sum(sum(o["lost"].values()) for o in out) + len(kept) + sum(4 - sum(o["lost"].values()) for o in out if "dropped" in o) == 800
