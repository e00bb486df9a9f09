"""Reads a folder with transformers, of any version from 4.57 on.

A question comes as JSON on the standard input, and the answer goes to the standard output.
"""
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch
import transformers


def dialogue(tokenizer, asked):
    "The text that the folder's template renders, and the ids of the certified text"
    out = {}
    try:
        out["text"] = tokenizer.apply_chat_template(asked["messages"], tools=asked["tools"], tokenize=False,
                                                    **asked["kwargs"])
    except Exception as e: out["why"] = f"{type(e).__name__}: {e}"[:300]
    out["ids"] = tokenizer(asked["text"], add_special_tokens=False)["input_ids"]
    return out


def logps(model, ids):
    "The log-probability of each token after the first"
    with torch.no_grad(): logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:], device=model.device)[:, None])[:, 0].tolist()


def write(model, ids, n, **more):
    "Greedy ids after a prompt"
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1,
                         repetition_penalty=1.0, temperature=None, top_p=None, top_k=None, max_new_tokens=n, **more)
    return out[0, len(ids):].tolist()


def main():
    "Answer the question on the standard input"
    asked = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print do not disturb the answer
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["folder"])
    dtype = getattr(torch, asked["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype).eval()
    rows = [dialogue(tokenizer, d) | dict(logps=logps(model, d["ids"]),
                                          written=write(model, d["prompt"], asked["max_new_tokens"]))
            for d in asked["dialogues"]]
    first = asked["dialogues"][0]["prompt"]
    stopped = {str(i): write(model, first, 3, sequence_bias={(i,): 1e4}) == [i] for i in asked["stops"]}
    versions = {m.__name__: m.__version__ for m in (transformers, torch)}
    json.dump(dict(versions=versions, dtype=str(model.dtype).removeprefix("torch."), dialogues=rows, stopped=stopped),
              answers)


if __name__ == "__main__": main()
