#!/usr/bin/env bash
# Check an H100, an H200 or a TPU in ten minutes: right numbers, speed against its limits, memory against the plan.
#
#   tools/device_check.sh                        # installs into build/device_check, then measures
#   tools/device_check.sh --json=device.json --minutes=10
#   EXTRA=cuda13 tools/device_check.sh           # another extra than the one chosen: tpu, cuda12 or cuda13
#   PYTHON=.venv/bin/python tools/device_check.sh    # installs nothing: an environment that has everything
#   JAX_PLATFORMS=cpu PYTHON=.venv/bin/python tools/device_check.sh --tiny    # tries the script itself
#
# The installation takes a few minutes more, once (5.5 GB for a GPU, 1.2 GB for a TPU). The arguments are those of
# `python -m tools.bench.device_check`, whose --help explains what is measured. It prints two tables and one JSON object.
# Exit status: 0 every check passed; 1 a check failed, or a part did not end; 2 invalid input; 3 nothing to install
# for, or no Python 3.11 to 3.13.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
    if [[ -z "${EXTRA:-}" ]]; then
        if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
            EXTRA=tpu
        elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
            EXTRA=cuda12
        else
            echo 'device_check: this machine shows neither a TPU nor an NVIDIA GPU; set EXTRA=tpu, cuda12 or cuda13' >&2
            exit 3
        fi
    fi
    venv=build/device_check-$EXTRA
    PYTHON=$venv/bin/python
    if [[ ! -e $venv/installed ]]; then
        fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
        for candidate in python3.13 python3.12 python3.11 python3; do
            if "$candidate" -c "$fits" 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        if [[ -z "${base:-}" ]]; then
            echo 'device_check: no Python 3.11 to 3.13 with venv and ensurepip (Debian: install python3-venv)' >&2
            exit 3
        fi
        echo "device_check: installing xpo_jax[$EXTRA] into $venv ..." >&2
        rm -rf "$venv"
        "$base" -m venv "$venv"
        version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        "$PYTHON" -m pip install --quiet --editable ".[$EXTRA]" --constraint "constraints-$version.txt"
        touch "$venv/installed" # last, so that an interrupted installation is repeated
    fi
fi

exec "$PYTHON" -m tools.bench.device_check "$@"
