#!/usr/bin/env bash
# The software of the machine that lends a GPU, without its GPU: what works here is collected, imported and
# compiled there.
#
#   scripts/device_environment.sh [FOLDER]
#       makes a virtual environment in FOLDER (default .venv-device; 6 GB), once
#   PYTHON=.venv-device/bin/python DRY=1 scripts/gpu_check.sh out/dry
#       the check of GPUs, rehearsed in it
#
# That machine has Python 3.12 and numpy 2.5; here it is the python3 at hand, and the newest numpy with which
# the interpreter of triton 3.6 takes loops of a length that is known at run time only. Neither diffusers,
# nvtx, tyro, datasets nor faiss is there: scripts/gpu_wheels.sh fetches what has to be carried. Versions as
# read on that machine.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=${1:-.venv-device}
python=${PYTHON:-python3}

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

# The CUDA builds, first and alone: later installs must not move them.
pip torch==2.11.0 triton==3.6.0
pip torch==2.11.0 torchvision==0.26.0 accelerate==1.15.0 cupy-cuda13x==14.2.0 huggingface-hub==1.33.0 \
  safetensors==0.8.0 torchdiffeq==0.2.5 torchmetrics==1.9.0 transformers==5.17.0
pip torch==2.11.0 cmake hypothesis matplotlib ninja numpy==2.3.5 pillow psutil pyarrow pytest \
  pytest-benchmark pytest-timeout pytest-xdist rich scikit-learn scipy 'setuptools>=77,<82' tensorboard \
  threadpoolctl wheel

"$folder/bin/python" -c '
import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'
