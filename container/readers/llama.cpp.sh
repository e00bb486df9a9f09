#!/usr/bin/env bash
# The converter from a folder of transformers to GGUF is in the source package of llama-cpp-python, not in what it installs.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"$1/bin/python" -m pip download --no-input --no-deps --no-binary llama-cpp-python --dest "$tmp" llama-cpp-python==0.3.36
tar xzf "$tmp"/llama_cpp_python-*.tar.gz -C "$tmp"
mkdir -p "$1/llama.cpp"
cp -r "$tmp"/llama_cpp_python-*/vendor/llama.cpp/{convert_hf_to_gguf.py,conversion,gguf-py} "$1/llama.cpp/"
