#!/usr/bin/env bash
# Start one run on all workers of a Cloud TPU VM pod. See tpu_vm.md.
#
#   PROJECT=... ZONE=... TPU=... FOLDER=/mnt/shared/xpo_jax tools/launch/tpu_vm.sh \
#       --config=configs/paraphrase.py --config.run_dir=/mnt/shared/runs/first
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?the zone of the TPU}" "${TPU:?the name of the TPU}"
: "${FOLDER:?the checkout on the disk that all workers share}"
PYTHON="${PYTHON:-$FOLDER/.venv/bin/python}"

# `on`, not `auto`: a worker that did not see the others would start a run of its own.
printf -v command '%q ' "$PYTHON" -m xpo_jax.main "$@" --config.distributed.mode=on
printf -v folder '%q' "$FOLDER"

exec gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" --worker=all \
    --command="cd $folder && exec $command"
