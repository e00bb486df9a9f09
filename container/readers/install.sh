#!/usr/bin/env bash
# Makes the environments of readers from their locks; `make readers` calls this. One that is whole and whose lock has not changed is left as it is.
#   container/readers/install.sh FOLDER [READER ...]
# A reader is a file NAME.yaml here; NAME.lock holds its packages, and NAME.sh, where there is one, is run with the folder of the new environment.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${1:?usage: container/readers/install.sh FOLDER [READER ...]}; shift
if [ $# = 0 ]; then for lock in "$here"/*.lock; do set -- "$@" "$(basename "$lock" .lock)"; done; fi
python=${PYTHON:-$("$here/../../.venv/bin/python" -c 'import sys; print(sys._base_executable)')}

for name in "$@"; do
  if [ ! -f "$here/$name.yaml" ]; then echo "readers: there is no reader $name; known: $(cd "$here" && ls ./*.yaml | sed 's#./##; s#.yaml##' | paste -sd' ')" >&2; exit 2; fi
  if [ ! -f "$here/$name.lock" ]; then echo "$name uses an environment that exists"; continue; fi
  venv=$root/$name
  after=$here/$name.sh; [ -f "$after" ] || after=/dev/null
  key=$(cat "$here/$name.lock" "$here/install.sh" "$after" | cksum | cut -d' ' -f1)
  mkdir -p "$root"
  exec 9> "$root/.$name.lock"; flock 9 # two calls at a time make it once
  if [ -f "$venv/.locked-$key" ]; then echo "$name: $venv"; continue; fi
  printf '\n== %s\n' "reader $name: $(grep -c == "$here/$name.lock") packages"
  start=$SECONDS; log=$root/$name.log; rm -rf "$venv"
  fail() { echo "readers: the installation of $name failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2; exit 1; }
  "$python" -m venv "$venv" > "$log" 2>&1 || fail
  pip() { "$venv/bin/python" -m pip install --no-input --progress-bar off --no-deps "$@" < /dev/null >> "$log" 2>&1 || fail; }
  # of llama.cpp only the library is built, without its programs
  export CMAKE_ARGS=${CMAKE_ARGS:--DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF}
  if torch=$(grep -E '^torch==' "$here/$name.lock"); then pip ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"; fi
  pip -r "$here/$name.lock"
  bash "$after" "$venv" >> "$log" 2>&1 || fail
  touch "$venv/.locked-$key"
  echo "$name: $venv, $((SECONDS - start)) s, $(du -sh "$venv" | cut -f1)"
done
