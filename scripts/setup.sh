#!/usr/bin/env bash
# Everything that `make demo` or `make test` needs: system packages, a virtual environment, the
# requirements. Does only what is missing, and may be interrupted at any point and run again.
#
#   PYTHON        the interpreter to build with (else the first 3.11 or 3.12 found)
#   VENV          where the virtual environment is (.venv)
#   REQUIREMENTS  what is installed into it (requirements-dev.txt, which has requirements.txt in it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
requirements=${REQUIREMENTS:-requirements-dev.txt}

# ffcv is built from source against OpenCV and libturbojpeg.
needed=(python3-venv python3-dev g++ make pkg-config libopencv-dev libturbojpeg0-dev)
dataset=dataset-fashion-mnist
no_dataset=$venv/.no-debian-dataset

fail() {
    echo "error: $*" >&2
    exit 2
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

apt_get() {
    if [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@"
    else
        sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@"
    fi
}

have() {
    command -v "$1" >/dev/null
}

can_build() {
    have g++ && have make && have pkg-config && pkg-config --exists opencv4 libturbojpeg
}

system_packages() {
    local missing=() package
    if ! have dpkg-query || ! have apt-get; then
        can_build || fail "this is not Debian: install by hand a C++ compiler, make, pkg-config and" \
            "the development files of Python, OpenCV 4 and libturbojpeg"
        return
    fi
    for package in "${needed[@]}"; do
        installed "$package" || missing+=("$package")
    done
    installed $dataset || [ -e "$no_dataset" ] || missing+=($dataset)
    [ ${#missing[@]} = 0 ] && return
    if [ "$(id -u)" != 0 ] && ! have sudo; then
        can_build && return # by other means than Debian's packages
        fail "neither root nor sudo here: have somebody run 'apt-get install ${missing[*]}'"
    fi
    echo "installing ${missing[*]}"
    apt_get update || true # an old list may still do
    if [ "${missing[-1]}" = $dataset ]; then
        unset 'missing[-1]'
        if ! apt_get install -y --no-install-recommends $dataset; then
            echo "warning: no $dataset here; torchvision will download Fashion-MNIST" >&2
            mkdir -p "$venv" && touch "$no_dataset"
        fi
    fi
    [ ${#missing[@]} = 0 ] || apt_get install -y --no-install-recommends "${missing[@]}" ||
        fail "apt-get could not install ${missing[*]}; its reasons are above"
}

# Can this interpreter run the project and build extensions and virtual environments?
suits() {
    "$1" - >/dev/null 2>&1 <<'EOF'
import ensurepip, os, sys, sysconfig, venv
assert (3, 11) <= sys.version_info[:2] <= (3, 12)
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
EOF
}

choose_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 /usr/bin/python3}; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "need Python 3.11 or 3.12 with its venv module and Python.h, tried" \
        "${PYTHON:-python3 python3.12 python3.11 /usr/bin/python3}: install one, or name it:" \
        "PYTHON=/path/to/python3.11"
}

# One line that stands for what a file of requirements asks for in this checkout.
checksum() {
    cat "$1" requirements.txt pyproject.toml <(echo "$1" "$PWD" "${PYTHON:-}") | sha256sum
}

# The stamp says which files of requirements are installed. It is removed first and written last: an
# interrupted set-up is done again.
environment() {
    local stamp=$venv/.requirements.sha256 wanted python version clear=
    wanted=$(checksum "$requirements")
    if [[ "$(cat "$stamp" 2>/dev/null)" == *"$wanted"* ]] && "$venv/bin/python" -c '' 2>/dev/null
    then
        return
    fi
    python=$(choose_python)
    version=$("$python" --version)
    rm -f "$stamp"
    if [ "$("$venv/bin/python" --version 2>/dev/null || echo "$version")" != "$version" ]; then
        clear=--clear
    fi
    echo "setting up $venv with $version (torch is large: minutes the first time)"
    "$python" -m venv "$venv" $clear
    # Without a GPU, too, torch is the build for CUDA with its libraries (5 GB): PyPI has no CPU build
    # of the pinned version, the CUDA build needs the libraries, and PyPI's torchvision needs the
    # CUDA build. pip by itself prefers CPU builds (2.15.0+cpu, 0.2 GB) where an index has them, as
    # PyTorch's own has of both:
    #     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
    # Not compiled: Python compiles each module when it is first imported, most never
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        -r "$requirements"
    [ "$requirements" = requirements-dev.txt ] && wanted+=$'\n'$(checksum requirements.txt)
    echo "$wanted" >"$stamp"
}

system_packages
environment
