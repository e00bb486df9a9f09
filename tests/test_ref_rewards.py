"Rewards: the same bytes for any number of shards, one BOS in templates as models ship them, models that bring code, verifiers on rows with thoughts and tools, presets"
from pathlib import Path

import json
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification

from post_training import config
from post_training.core import shards
from post_training.preferences.rewards import (
    ModelScorer, ScoringOptions, conversation_ids, load_reward_model, model_scorer, own_bos, reward_lengths, rewards_batch_fn,
    verifier_scorer)
from post_training.core.files import UserError
from post_training.demo.data import demo_rows
from post_training.tokens.tokenizer import SAMPLE_TEXT, toy_tokenizer

WORDS = SAMPLE_TEXT.split()


def little(vocab, **changes):
    torch.manual_seed(0)
    options = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, num_labels=1, pad_token_id=10)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=vocab, **{**options, **changes})).eval()


def rows(n=24, **more):
    "Rows of one to four completions of many lengths; some are empty and some are too long"
    def text(k): return " ".join(WORDS[(k * 7 + j) % len(WORDS)] for j in range(k * 5 % 31))
    return [dict(id=f"r{i}", prompt=[dict(role="user", content=f"Question {i}: " + text(i + 1))], answer=str(i),
                 completions=[dict(content=text(i * 4 + c) * (20 if (i, c) == (3, 0) else 1), reward=None, ref_logprobs=[0.5, -1.25]) for c in range(1 + i % 4)], **more) for i in range(n)]


def made(folder, scorer, count):
    "Merged results of so many shards"
    data = rows()
    plan = shards.make_shard_plan([r["id"] for r in data], reward_lengths(data, scorer), dict(stage="rewards"), budget=400, shards=count)
    shards.save_shard_plan(folder, plan)
    for k in range(plan.shards):
        shards.run_shard(folder, k, lambda *_: rewards_batch_fn(data, scorer))
    told = shards.merge_shards(folder, folder / "out.jsonl")
    return (folder / "out.jsonl").read_bytes(), told, plan.shards


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_same_bytes_for_any_number_of_shards(tmp_path, side):
    tokenizer = toy_tokenizer("bpe", "tulu")
    scorer = ModelScorer(little(len(tokenizer)), tokenizer, ScoringOptions(batch_tokens=300, padding_side=side))
    one, told, _ = made(tmp_path / "one", scorer, 1)
    seven, _, n = made(tmp_path / "seven", scorer, 7)
    assert n == 7 and one == seven and told["dropped"].get("empty completion")  # the row whose only completion is empty


def test_any_batch_gives_the_same_scores():
    "Alone, all together, padded on either side: to the last bits"
    tokenizer = toy_tokenizer("bpe", "zephyr")
    model, data = little(len(tokenizer)), rows()
    found = [[v for row in ModelScorer(model, tokenizer, ScoringOptions(batch_tokens=b, padding_side=side)).score(data) for v in row] for b, side in ((1, "right"), (10**6, "right"), (300, "left"))]
    for other in found[1:]:
        assert [getattr(v, "reason", None) for v in other] == [getattr(v, "reason", None) for v in found[0]]
        assert max(abs(a - b) for a, b in zip(found[0], other) if isinstance(a, float)) < 1e-5
    assert {"empty completion", "too long"} <= {getattr(v, "reason", None) for v in found[0]}


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = toy_tokenizer("bpe", "tulu")
    with pytest.raises(UserError, match=f"has {len(tokenizer)} ids and the model {len(tokenizer) - 1}"): ModelScorer(little(len(tokenizer) - 1), tokenizer)


def shipped(name, *special):
    "A toy tokenizer with the chat template of a model family, as TRL ships it, and its control tokens; like the family's own it puts a BOS before a text where it has one"
    import trl

    tokenizer = toy_tokenizer("bpe")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(special[1:])))
    if special[0]:
        tokenizer.add_special_tokens(dict(bos_token=special[0]))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A".replace("<bos>", special[0]), special_tokens=[(special[0], tokenizer.bos_token_id)])
    else:
        tokenizer.bos_token = None
    return tokenizer


@pytest.mark.parametrize("name, special", [("llama3_1", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")), ("qwen3", ("", "<|im_start|>", "<|im_end|>"))])
def test_ids_are_those_of_the_models_card(name, special):
    "Rendered, the BOS taken off, encoded with special tokens: what the cards of reward models do by hand"
    tokenizer = shipped(name, *special)
    chats = [[dict(role="user", content="Name a city."), dict(role="assistant", content="Bern. It is in Switzerland.")],
             [dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), dict(role="user", content="2+2?"), dict(role="assistant", content="4\n\nYes.")]]
    for chat, ids in zip(chats, conversation_ids(tokenizer, chats)):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert ids == tokenizer(text.removeprefix(tokenizer.bos_token or "\0")).input_ids
        assert tokenizer.bos_token is None or ids.count(tokenizer.bos_token_id) == 1
    assert own_bos(tokenizer) == tokenizer.bos_token_id


GATED = '''
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput
{more}

@dataclass
class Out(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None

class Gated(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.regression_layer = LlamaModel(config), torch.nn.Linear(config.hidden_size, 5, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        at = (torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1) % input_ids.shape[-1]
        rewards = self.regression_layer(hidden[torch.arange(len(input_ids)), at])
        return Out(rewards=rewards, score=rewards.mean(-1), logits=rewards.mean(-1))
'''


def gated(folder, more=""):
    "A model that brings its own code, five objectives and one gated score, like ArmoRM"
    from safetensors.torch import save_file

    tokenizer = toy_tokenizer("bpe", "zephyr")
    model = little(len(tokenizer), auto_map={"AutoModelForSequenceClassification": "modeling_custom.Gated"})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "score.weight"} | {"regression_layer.weight": torch.randn(5, 32)}
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    (folder / "modeling_custom.py").write_text(GATED.format(more=more))
    return folder


def test_a_model_that_brings_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    scorer = model_scorer(gated(tmp_path / "rm"), trust_remote_code=True, device="cpu")
    assert scorer.start(rows()) < 1e-4 and len(scorer.score(rows()[1:2])[0]) == 2
    with pytest.raises(UserError, match="Cannot load the reward model.*GONE"):  # code for another version of transformers says so
        load_reward_model(gated(tmp_path / "old", "from transformers.models.llama.modeling_llama import GONE"), trust_remote_code=True)
    with pytest.raises(UserError, match="is not a reward model: it has no weights for score.weight"):  # without its code it would be another model
        load_reward_model(tmp_path / "rm")
    with pytest.raises(UserError, match="to the commit that you have read"):
        load_reward_model("organisation/model", trust_remote_code=True)


def test_answers_of_the_demo_are_right():
    "Thoughts, tools, several turns: the verifiers find the answers of rows that are right by construction"
    from datasets import Dataset

    from post_training.preferences.rows import to_rows

    data, counts = to_rows(Dataset.from_list(demo_rows(n_train=200, n_eval=20)["train"]))
    found = verifier_scorer().score([data[i] for i in range(len(data))])
    assert len(found) == len(data) >= 190 and all(v == [1.] for v in found)
    results = rewards_batch_fn(data, verifier_scorer())(range(len(data)))
    assert all(c["reward"] == 1 for r in results for c in r["completions"])


@pytest.mark.parametrize("name", sorted(p.stem for p in (Path(config.__file__).parent.parent / "configs" / "reward_model").glob("*.yaml")))
def test_presets_compose(name):
    cfg = config.compose("ref_rewards", [f"reward_model={name}", "dataset_args.dataset_name=x"]).cfg
    a = cfg["reward_args"]
    assert a["name"] and a["kind"] in ("model", "verifier")
    assert not a["trust_remote_code"] or len(a["model_revision"]) == 40
    assert (a["kind"] == "model") == (a["model_name_or_path"] is not None)


@pytest.mark.slow
def test_the_tiny_reward_model_is_trained(tmp_path):
    from post_training.demo.reward_model import build_tiny_reward, demo_pairs, pair_accuracy

    build_tiny_reward(tmp_path / "rm")
    folder = tmp_path / "rm"
    scorer = model_scorer(folder, device="cpu")
    table = pair_accuracy(scorer, demo_pairs(demo_rows()["eval"], per_row=2, seed=1))
    assert table["all"]["accuracy"] > .7, table
    written = json.loads((folder / "manifest.json").read_text())["accuracy"]
    assert written["all"]["accuracy"] > .7 and written["other"]["accuracy"] > written["near"]["accuracy"] - .05, written
