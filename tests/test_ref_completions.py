"Reference completions: sharing and sharding change nothing, thoughts and tools of a structured turn, and what a server may do wrong"
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import BIN, ROOT
from post_training.preferences import completions as ac
from post_training.preferences.rows import make_completion
from post_training.core.files import UserError
from post_training.core.shards import make_shard_plan, merge_shards, save_shard_plan, run_shard
from recorded_endpoint import Endpoint, error, made_up

STOP = range(300, 420)  # of the untrained model below: completions end after some ten tokens


@pytest.fixture(scope="module")
def tokenizer():
    from post_training.tokens.tokenizer import toy_tokenizer
    return toy_tokenizer("bpe", "tulu")


def tiny(tokenizer, **changes):
    import torch
    from post_training.models.load import quiet_activation, tiny_config
    from transformers import ApertusForCausalLM
    with quiet_activation(), torch.random.fork_rng():
        torch.manual_seed(0)
        return ApertusForCausalLM(tiny_config(len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=.2, **changes)).float()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def rows():
    from datasets import Dataset
    return Dataset.from_list([dict(id=f"row-{i}", prompt=[dict(role="user", content="word "*(1 + i*7 % 19) + str(i))], completions=[]) for i in range(23)])


# -- in this process

def family(name, tokenizer):
    "A small random model of a family, with full or sliding attention"
    import torch
    from transformers import AutoModelForCausalLM, CONFIG_MAPPING
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                 pad_token_id=0, initializer_range=.3)
    extra = dict(mistral=dict(sliding_window=6), gemma2=dict(sliding_window=6, head_dim=16), llama={}, olmo2={})[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes, **extra)).float().eval()


@pytest.mark.parametrize("name, attention", [(m, a) for m in ("llama", "olmo2", "mistral") for a in ("eager", "sdpa")] + [("gemma2", "eager")])
def test_sharing_the_reading_of_a_prompt_changes_nothing(name, attention, tokenizer):
    "Samples of a batch are those of prompts that stand in it n times, and of prompts alone without a cache: sliding windows included"
    import torch
    from post_training.models.generate import complete_batch, pick_token, row_noise
    m = family(name, tokenizer)
    m.set_attn_implementation(attention)
    prompts, n = [[5, 6, 7], list(range(100, 117)), [9, 8]], 3
    u_BN = row_noise(range(9), 14)
    shared = complete_batch(m, prompts, u_BN, list(STOP), 0, 1., samples=n)
    assert shared == complete_batch(m, [p for p in prompts for _ in range(n)], u_BN, list(STOP), 0, 1.)
    for row, ids in list(enumerate(shared))[::4]:
        slow = []
        while len(slow) < len(ids):
            with torch.no_grad(): logits = m(input_ids=torch.tensor([prompts[row//n] + slow]), use_cache=False).logits[0, -1:]
            slow.append(pick_token(logits, u_BN[row:row + 1, len(slow)], 1.).item())
        assert slow == ids


@pytest.mark.parametrize("top_p", [1., .8])
def test_any_sharding_and_any_interruption_give_the_same_bytes(tmp_path, rows, tokenizer, model, top_p):
    backend = ac.transformers_backend(model, tokenizer, 16, top_p=top_p, extra_stop=STOP)
    make = ac.completions_batch_fn(rows, tokenizer, backend, "tiny", 3, 0, 80, 16)
    lengths = ac.plan_lengths(ac.prompt_lengths(rows, tokenizer), 3, 16, 80)
    merged = {}
    def maker(folder, plan):
        def once(batch):
            if folder.name == "cut" and batch[0] in failing:
                failing.clear()
                raise KeyboardInterrupt
            return make(batch)
        return once
    failing = {make_shard_plan(rows["id"], lengths, {}, budget=300).batches[2][0]}
    for name, shards in dict(one=1, seven=7, cut=1).items():
        plan = save_shard_plan(tmp_path / name, make_shard_plan(rows["id"], lengths, dict(n=3), budget=300, shards=shards))
        assert len(plan.batches) > 7
        for k in range(plan.shards):
            try: run_shard(tmp_path / name, k, maker)
            except KeyboardInterrupt: run_shard(tmp_path / name, k, maker)
        merge_shards(tmp_path / name, tmp_path / f"{name}.jsonl")
        merged[name] = (tmp_path / f"{name}.jsonl").read_bytes()
    assert merged["one"] == merged["seven"] == merged["cut"] and not failing
    assert merged["one"].count(b'"is_reference_completion"') > 8


def test_a_trained_turn_comes_back_as_the_tokens_it_was(demo):
    "Structured rows: what the demo's assistants say, given as if it were sampled, is kept as content that is encoded to the same ids; calls are lost"
    from post_training.preferences.rows import to_rows
    from post_training.data.io import load_rows
    from post_training.tokens.completions import EncodedCompletion, encode_completions
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(demo / "models/tiny")
    source, _ = to_rows(load_rows(str(demo / "datasets/demo"), "eval"))
    source = source.select(range(120))
    encoded = encode_completions(tokenizer, source["prompt"], [[c["content"] for c in cs] for cs in source["completions"]])
    answers = [dict(ids=e.completions[0].ids, text="", finish_reason="stop") for e in encoded]
    by_prompt = {tuple(e.prompt_ids): a for e, a in zip(encoded, answers)}
    make = ac.completions_batch_fn(source, tokenizer, lambda prompts, n, seeds: [[by_prompt[tuple(p)]]*n for p in prompts], "demo", 1, 0, None, 64, keep_existing=False)
    made, same, calls = make(list(range(len(source)))), 0, 0
    for row, m in zip(source, made):
        if "dropped" in m: calls += m["lost"] == {"calls a tool": 1}; continue
        [c] = m["completions"]
        back = encode_completions(tokenizer, [row["prompt"]], [[c["content"]]])[0].completions[0]
        assert isinstance(back, EncodedCompletion) and back.ids == c["token_ids"], row["id"]
        same += 1
    assert same + calls == len(source) and same > 60 and calls


@pytest.mark.parametrize("template", ["tulu", "apertus"])
def test_a_server_may_leave_the_stop_token_out(template):
    "No token of an answer is lost, whichever control token it stopped at"
    from post_training.preferences.completions import answer_content, call_stop_ids
    from post_training.tokens.tokenizer import toy_tokenizer
    tokenizer = toy_tokenizer("bpe", template)
    ids = tokenizer.encode("The answer is 60", add_special_tokens=False)
    ends = [[], [tokenizer.eos_token_id], *([i] for i in call_stop_ids(tokenizer)), [tokenizer.convert_tokens_to_ids("<SPECIAL_68>")]] if template == "apertus" else [[], [tokenizer.eos_token_id]]
    for end in ends:
        for text in ("The answer is 60", ""): # some servers give the ids alone
            assert answer_content(tokenizer, dict(ids=ids + end, text=text, finish_reason="stop"), False) == ("The answer is 60", None)
        assert answer_content(tokenizer, dict(ids=end, text="", finish_reason="stop"), False) == (None, "empty")


def test_a_prompt_that_leaves_no_room_costs_nothing(rows, tokenizer):
    asked = []
    def complete(prompts, n, seeds):
        asked.extend(prompts)
        return [[dict(ids=[200, 2], text="a", finish_reason="stop")]*n for _ in prompts]
    lengths = ac.prompt_lengths(rows, tokenizer)
    limit = sorted(lengths)[11] + 8
    made = ac.completions_batch_fn(rows, tokenizer, complete, "m", 2, 0, limit, 8)(list(range(len(rows))))
    assert [m.get("dropped") for m in made] == ["prompt too long" if n + 8 > limit else None for n in lengths]
    assert len(asked) == sum(n + 8 <= limit for n in lengths)
    assert [k for k, n in enumerate(ac.plan_lengths(lengths, 2, 8, limit)) if not n] == [k for k, m in enumerate(made) if "dropped" in m]


# -- a server

PROMPTS = [[10 + i]*(3 + i % 5) for i in range(12)]
SEEDS = [ac.sample_seeds(0, f"r{i}", 4) for i in range(12)]
WANTED = [[made_up(p, s, 8) for s in mine] for p, mine in zip(PROMPTS, SEEDS)]


def server(endpoint, *args, **kwargs):
    return ac.server_backend(endpoint.url, endpoint.model, *args, **{"pause": .01, **kwargs})


def ids_of(answers):
    return [[a["ids"] for a in of_prompt] for of_prompt in answers]


def test_order_and_concurrency():
    "The slowest first: answers arrive in another order, and never more requests at a time than allowed"
    with Endpoint(delay=lambda number: .03*(3 - number % 4)) as e:
        answers = server(e, 8, concurrency=5)(PROMPTS, 4, SEEDS)
    assert ids_of(answers) == WANTED and 1 < e.highest <= 5 and len(e.asked) == 48
    assert [a["finish_reason"] for a in answers[0]] == ["stop" if ids[-1] == 2 else "length" for ids in WANTED[0]]
    body = next(b for b in e.asked if b["seed"] == SEEDS[3][2])
    assert body == dict(model="tiny", prompt=PROMPTS[3], n=1, seed=SEEDS[3][2], max_tokens=8, temperature=1., top_p=1., top_k=0, min_p=0., repetition_penalty=1.,
                        skip_special_tokens=True, return_token_ids=True)


def test_several_samples_in_one_request():
    with Endpoint() as e:
        answers = server(e, 8, samples_per_request=3, stop=[7])(PROMPTS, 4, SEEDS)
    assert len(e.asked) == 24 and {b["n"] for b in e.asked} == {3, 1} and e.asked[0]["stop_token_ids"] == [7]
    assert ids_of(answers)[1] == [made_up(PROMPTS[1], s, 8) for s in (SEEDS[1][0], SEEDS[1][0] + 1, SEEDS[1][0] + 2, SEEDS[1][3])]


@pytest.mark.parametrize("fault", [(503, "busy"), (500, dict(error="no memory")), (429, "slow down"), (200, "no JSON object"), "cut"], ids=str)
def test_faults_are_asked_again(fault):
    with Endpoint(faults=[fault]*5) as e:
        assert ids_of(server(e, 8)(PROMPTS, 4, SEEDS)) == WANTED
    assert len(e.asked) == 53


def test_a_server_that_hangs_is_asked_again():
    with Endpoint(faults=["hang"]) as e:
        assert ids_of(server(e, 8, timeout=.5)(PROMPTS[:2], 1, [s[:1] for s in SEEDS[:2]])) == [w[:1] for w in WANTED[:2]]


def test_a_server_that_stays_broken_ends_the_worker_with_a_fault():
    with Endpoint(faults=[(500, "no memory")]*99) as e, pytest.raises(ac.ServerFailed, match=r"in 3 tries: it says \(500\) no memory"):
        server(e, 8, retries=2)(PROMPTS[:1], 1, SEEDS[:1])
    assert len(e.asked) == 3


@pytest.mark.parametrize("options, asked, says", [
    (dict(model="other"), {}, "does not serve 'tiny'. Set server.model"), (dict(max_model_len=10), {}, r"no room for a prompt of \d+ tokens and 8 new ones"),
    (dict(ids=False), {}, "does not accept token ids as a prompt"), (dict(most=1), dict(samples_per_request=4), "gave 1 completions and 4 were requested"),
    (dict(key="right"), {}, "needs another key: set POST_TRAINING_SERVER_KEY"), (dict(faults=[error(400, "top_k is too odd")]), {}, "refuses a request. It says")])
def test_refusals_say_what_to_do_and_are_not_repeated(options, asked, says):
    with Endpoint(**options) as e, pytest.raises(UserError, match=says):
        ac.server_backend(e.url, "tiny", 8, **asked)(PROMPTS[:1], 4, SEEDS[:1])
    assert len(e.asked) <= 4


def test_the_wrong_address():
    with Endpoint() as e:
        with pytest.raises(UserError, match="has no /v1/completions: server.url is the address before /v1"):
            ac.server_backend(e.url + "/api", "tiny", 8)(PROMPTS[:1], 1, SEEDS[:1])
        assert ac.served_model(ac.base_url(e.url + "/v1")) == "tiny"
    with pytest.raises(UserError, match="No server answers at"):
        ac.served_model(e.url, retries=1, pause=.01)


def test_the_key_is_sent_and_never_shown(monkeypatch):
    "Not even where the server repeats it, in a refusal or a fault"
    monkeypatch.setenv(ac.KEY_VARIABLE, "a-key-of-no-known-form")
    with Endpoint(key="a-key-of-no-known-form", faults=[(400, "bad a-key-of-no-known-form"), (500, "a-key-of-no-known-form again")]) as e:
        assert ac.served_model(e.url) == "tiny"
        for kind in (UserError, ac.ServerFailed):
            with pytest.raises(kind) as said: server(e, 8, retries=0)(PROMPTS[:1], 1, SEEDS[:1])
            assert "[redacted]" in str(said.value) and "no-known-form" not in str(said.value)
        assert ids_of(server(e, 8)(PROMPTS, 4, SEEDS)) == WANTED
    assert "no-known-form" not in json.dumps(e.asked)


def test_a_server_that_reads_other_tokens_is_found_out():
    with Endpoint() as e:
        whole = e.complete
        e.complete = lambda body: whole(body | dict(prompt=[1, *body["prompt"]]))  # a BOS of its own
        with pytest.raises(UserError, match="read 4 tokens, and the prompt has 3 ids"):
            server(e, 8)(PROMPTS[:1], 1, SEEDS[:1])


def test_both_backends_write_the_same_rows(rows, tokenizer, model):
    "Where the server holds the same model: the same completions, losses, seeds and reasons"
    here = ac.transformers_backend(model, tokenizer, 16, extra_stop=STOP)
    def write(prompt, seed, room): return here([prompt], 1, [[seed]])[0][0]["ids"]
    wanted = ac.completions_batch_fn(rows, tokenizer, here, "tiny", 3, 0, 80, 16)(list(range(8)))
    with Endpoint(write=write, decode=tokenizer.decode, stop=[*STOP, model.generation_config.eos_token_id]) as e:
        got = ac.completions_batch_fn(rows, tokenizer, server(e, 16), "tiny", 3, 0, 80, 16)(list(range(8)))
    assert got == wanted and any(m.get("completions") for m in got)


def test_completions_that_were_there_stay_in_front(rows, tokenizer):
    old = [dict(r, completions=[make_completion("mine", policy="chosen")]) for r in rows.select(range(2))]
    with Endpoint() as e:
        made = ac.completions_batch_fn(old, tokenizer, server(e, 16), "tiny", 2, 0, None, 16)([0, 1])
    assert all(m["completions"][0] == old[0]["completions"][0] and all(c["is_reference_completion"] for c in m["completions"][1:]) for m in made)


WAITS = """
import sys, signal
from post_training.preferences.completions import server_backend
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("asking", flush=True)
server_backend(sys.argv[1], "tiny", 8)([[1, 2, 3]], 4, [[1, 2, 3, 4]])
"""


def test_a_worker_that_is_stopped_does_not_wait_for_the_server():
    with Endpoint(delay=lambda number: 30.) as e:
        worker = subprocess.Popen([sys.executable, "-c", WAITS, e.url], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert worker.stdout.readline() == "asking\n"
        while len(e.asked) < 4: time.sleep(.02)
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 143 and time.monotonic() - began < 5


@pytest.mark.slow
def test_transformers_serve_is_refused_with_the_reason(demo, tmp_path):
    "The pinned version takes texts only, gives one completion whatever n says, and refuses fields that it does not know"
    from transformers.utils.import_utils import is_serve_available
    if not is_serve_available(): pytest.skip("transformers serve needs fastapi and uvicorn, which are not installed")
    (tmp_path / "hub").mkdir()
    port, name = 8000 + os.getpid() % 20000, str(demo / "models/tiny")
    with open(tmp_path / "log", "w") as log:
        serve = subprocess.Popen([str(BIN / "transformers"), "serve", name, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log, env=os.environ | dict(HF_HOME=str(tmp_path)))
    try:
        url, until = f"http://localhost:{port}", time.monotonic() + 120
        while serve.poll() is None and time.monotonic() < until:
            try: ac.http_json(url + "/health"); break
            except OSError: time.sleep(.5)
        for fields, says in ((ac.VLLM_FIELDS, "does not take vLLM's fields"), ({}, "does not accept token ids as a prompt")):
            with pytest.raises(UserError, match=says): ac.server_backend(url, name, 4, fields=fields)([[1, 2, 3]], 1, [[0]])
        with pytest.raises(UserError, match="does not serve 'other'"): ac.request_with_retries(url, "/v1/completions", dict(model="other", prompt="hello"), requested_model="other")
        text = ac.request_with_retries(url, "/v1/completions", dict(model=name, prompt="hello", n=3, max_tokens=4, seed=1, temperature=1., top_p=1.))
        assert len(text["choices"]) == 1 and "token_ids" not in text["choices"][0]
    finally:
        serve.terminate()
        serve.wait(30)
