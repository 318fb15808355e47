#!/usr/bin/env bash
# Makes the locks anew: every package that the images get, with its hashes. Needs `pip install uv`.
# TORCH_CPU says where uv finds torch's CPU builds.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TORCH_CPU:=--extra-index-url=https://download.pytorch.org/whl/cpu}"
compile() {
    uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --custom-compile-command k8s/requirements/lock.sh \
        --output-file "k8s/requirements/$1.txt" "k8s/requirements/$1.in" "${@:2}"
}
compile cpu pyproject.toml --extra k8s "$TORCH_CPU"
compile gpu pyproject.toml --extra k8s
compile mlflow
