#!/usr/bin/env bash
# Run all tests in a second virtual environment with the oldest PyTorch that the README promises, and
# with the newest supported Python that this machine has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

oldest=.venv-oldest.txt
# Leave torchvision unpinned: each of its releases requires one specific release of torch.
cat requirements.txt requirements-dev.txt | sed \
    -e 's/^torch==.*/torch==2.11.*/' -e 's/^torchvision==.*/torchvision/' -e '/^-r /d' >$oldest

export PYTHON=${PYTHON:-python3.12 python3 python3.11}
VENV=.venv-oldest REQUIREMENTS=$oldest scripts/setup.sh
.venv-oldest/bin/python -c 'import sys, torch, torchvision
print("Python", sys.version.split()[0], "torch", torch.__version__, "torchvision", torchvision.__version__)'
exec .venv-oldest/bin/python -m pytest -m "" -n "${WORKERS:-1}" --dist loadfile "$@"
