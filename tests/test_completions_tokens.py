"A prompt and its answers as tokens: the same ids as the whole conversation, whatever is written in it, for each template"
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from post_training.tokens.completions import EncodedRow, chat_for, encode_completions
from post_training.tokens.masks import Refused, tokenize_chats
from post_training.tokens.gates import prompt_ids
from post_training.tokens.masks import encoder_for
from post_training.tokens.templates import CHAT_TEMPLATES
from post_training.tokens.tokenizer import toy_tokenizer

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
pieces = st.sampled_from(["a", " ", "\n", "é", "日本", "<|assistant|>", "</s>", "[/INST]", "<|end_of_text|>", "4", "<SPECIAL_68>", "🙂"])
written = st.lists(pieces, min_size=1, max_size=6).map("".join)
answers = st.lists(written, max_size=3)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: toy_tokenizer("bpe", name) for name in CHAT_TEMPLATES}


@few
@given(st.lists(st.tuples(st.lists(written.filter(str.strip), min_size=1, max_size=3), answers), min_size=1, max_size=3))
def test_prompt_and_answer_are_the_whole_conversation(tokenizers, given):
    prompts = [[dict(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(asked[:len(asked) - (len(asked) + 1) % 2])] for asked, _ in given]
    contents = [found for _, found in given]
    for tokenizer in tokenizers.values():
        rows = encode_completions(tokenizer, prompts, contents)
        for prompt, found, row in zip(prompts, contents, rows):
            if isinstance(row, Refused): continue
            assert isinstance(row, EncodedRow) and len(row.completions) == len(found)
            assert row.prompt_ids == prompt_ids(tokenizer, chat_for(tokenizer, prompt)).tolist()
            for text, c in zip(found, row.completions):
                if not text.strip(): assert c.reason == "empty completion"
                if isinstance(c, Refused): continue
                whole = tokenize_chats(tokenizer, [chat_for(tokenizer, [*prompt, dict(role="assistant", content=text)])])[0]
                n, m = len(row.prompt_ids), len(row.prompt_ids) + len(c.ids)
                assert whole.input_ids[:m].tolist() == row.prompt_ids + c.ids and whole.completion_mask[n:m].tolist() == c.scored
                assert not whole.completion_mask[m:].any() and c.scored[0] and c.scored[-1] and c.length == sum(c.scored)
        assert rows == [encode_completions(tokenizer, [p], [c])[0] for p, c in zip(prompts, contents)]  # alone as in a batch


def test_templates_that_are_refused_are_those_of_the_gate(tokenizers):
    "An answer is refused where the gate before training warns of the same"
    talk = [dict(role="user", content="2+2?"), dict(role="assistant", content="It is 4.")]
    for name, tokenizer in tokenizers.items():
        got = encode_completions(tokenizer, [talk[:1]], [["It is 4."]])[0].completions[0]
        chat = chat_for(tokenizer, talk)
        fault = encoder_for(tokenizer).prompt_fault(tokenize_chats(tokenizer, [chat])[0], 0, chat, rendered=True)
        assert isinstance(got, Refused) == bool(fault), name
