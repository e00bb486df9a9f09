"A tiny Apertus with the Tekken vocabulary as a GGUF file: written by llama.cpp's converter, read by llama.cpp, refused where it differs"
import shutil

import pytest
import torch
from tokenizers import processors
from transformers import ApertusForCausalLM, GenerationConfig

from post_training.core.files import UserError
from post_training.export.certificate import certify, write_certificate
from post_training.export.gguf import check_gguf, write_gguf
from post_training.export.parity import own_dialogues
from post_training.export.readers import reader_python
from post_training.models.load import quiet_activation, tiny_config
from post_training.stages.export import write_folder
from post_training.tokens.tokenizer import tekken_tokenizer


@pytest.mark.slow
def test_llama_cpp_reads_what_was_trained(tmp_path):
    "Ids, log-probabilities, continuations and stops agree; without a BOS the same vocabulary is taken for another and refused; a changed file is named"
    try: reader_python("llama.cpp")
    except UserError as e: pytest.skip(str(e))
    tokenizer = tekken_tokenizer("apertus")
    tokenizer.eos_token, tokenizer.pad_token = "<SPECIAL_68>", "<pad>"
    config = tiny_config(len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         rope_parameters=dict(rope_type="llama3", rope_theta=12e6, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32))
    torch.manual_seed(0)
    with quiet_activation(): model = ApertusForCausalLM(config).float()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2)
    with pytest.raises(UserError, match="with other ids"): check_gguf(model, tokenizer, own_dialogues())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert check_gguf(model, tokenizer, own_dialogues()) > 6
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[68], pad_token_id=10)
    folder = tmp_path / "x"
    folder.mkdir()
    write_folder(folder, model, tokenizer, "5GB")
    file = write_gguf(folder, "x", "float32")
    told = write_certificate(folder, own_dialogues()[:2], ["llama.cpp"])["readers"][1]
    assert told["reader"] == "llama.cpp" and told["max"] < 1e-4, told
    data = bytearray(file.read_bytes())
    data[-40000:] = bytes(40000)  # of the last tensor
    file.write_bytes(data)
    assert "log-probabilities" in {i["item"] for i in certify(folder, "llama.cpp") if not i["ok"]}
    shutil.rmtree(folder)
