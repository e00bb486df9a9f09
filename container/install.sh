#!/usr/bin/env bash
# Installs requirements.lock into a new virtual environment; `make env` and the container image both call this.
#   container/install.sh FOLDER
# PYTHON names the interpreter; TORCH_INDEX names a package index for torch alone, where the default one has no build for the machine's GPUs.
set -euo pipefail
venv=${1:?usage: container/install.sh FOLDER}
lock=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/requirements.lock
log=$venv/install.log
if [ -n "${MAKELEVEL:-}" ]; then me=make again="make PYTHON=/path/to/python3"; else me=install.sh again="PYTHON=/path/to/python3 container/install.sh $venv"; fi
stop() { echo "$me: $1" >&2; exit 2; }

tried=(${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python) py=
for p in "${tried[@]}"; do
  base=$("$p" -c 'import sys; print(sys._base_executable if sys.version_info >= (3, 11) else "")' 2>/dev/null </dev/null) || continue
  if [ -n "$base" ]; then py=$base; break; fi
done
[ -n "$py" ] || stop "no Python 3.11 or later found (tried: ${tried[*]}). Install one, or name it: $again"
"$py" -c 'import venv, ensurepip' 2>/dev/null || stop "$py cannot make environments. Install its venv package (Debian: python3-venv), or name another: $again"

printf '\n== %s\n' "environment: $("$py" --version) in $venv"
"$py" -m venv --clear "$venv"
: > "$log"
n=$(grep -c == "$lock")
fail() { echo "$me: the installation failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2; exit 1; }
tick() { while sleep 2 && kill -0 $$ 2>/dev/null; do printf '\r   %s of %s packages found' "$(grep -c ^Collecting "$log")" "$n"; done; }
if [ -t 1 ]; then tick & trap "kill $! 2>/dev/null || true" EXIT; fi
step() { echo "   $1"; shift; "$venv/bin/python" -m pip install --no-input --progress-bar off "$@" < /dev/null >> "$log" 2>&1 || fail; }
mapfile -t pip < <(grep -E '^(pip|setuptools|wheel)==' "$lock")
step "1/3 pip and setuptools" "${pip[@]}"
step "2/3 torch (the large one)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep -E '^torch==' "$lock")"
step "3/3 $n packages of requirements.lock" --build-constraint "$lock" -r "$lock"
