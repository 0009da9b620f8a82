#!/usr/bin/env bash
# The fast tests with the oldest versions that the requirements accept, in a virtual environment of
# their own. What stands behind its folder goes to pytest.
#
#     bash tests/oldest.sh /tmp/oldest
#     TORCH=2.13.0 bash tests/oldest.sh /tmp/oldest tests/test_data.py   # another PyTorch: PyPI has
#                                              # the old ones with CUDA only, 3 GB to download
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?which folder is the environment to lie in?}")

# NAME>=VERSION,… # why   becomes   NAME==VERSION; ruff and mypy look at the code only.
sed -nE '/^(ruff|mypy)/d; s/^([a-z-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt requirements-dev.txt |
  sed -E "s/^torch==(.*)/torch==${TORCH:-\1}/" >"$folder.txt"
cat "$folder.txt"
python3.11 -m venv --clear "$folder"
"$folder/bin/pip" install --quiet -r "$folder.txt"
"$folder/bin/pytest" -m "not slow and not thorough" "${@:2}"
