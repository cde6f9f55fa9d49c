#!/usr/bin/env bash
# Run all tests with the oldest versions of what the package depends on, as pyproject.toml declares
# them, and with the newest Python where this machine has it, in a second virtual environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTHON=${PYTHON:-python3.12 python3 python3.11}
oldest=.venv-oldest.txt
# The requirements, their pins replaced by the oldest version of each range. tomllib is in every
# Python that suits.
python3 - <<'EOF' >$oldest
import re, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
ranges = [*project["dependencies"], *project["optional-dependencies"]["slurm"]]
least = dict(re.match(r"([\w-]+)>=([\d.]+)", text).groups() for text in ranges)
for name in ("requirements.txt", "requirements-dev.txt"):
    for line in Path(name).read_text().splitlines():
        name = line.partition("==")[0]
        if not line.startswith("-r "):
            print(f"{name}=={least[name]}.*" if name in least else line)
EOF
VENV=.venv-oldest REQUIREMENTS=$oldest scripts/setup.sh
.venv-oldest/bin/python -c 'import sys, torch, torchvision
print("Python", sys.version.split()[0], "torch", torch.__version__, "torchvision", torchvision.__version__)'
exec .venv-oldest/bin/python -m pytest -m "" -n "${WORKERS:-1}" --dist loadfile "$@"
