#!/bin/bash
# Trains on slices of a GKE cluster that xpk made. xpk writes a JobSet like jobset.yaml: usage
#   xpk.sh CLUSTER IMAGE RUN PRESET [flags of jaxlm train]
# RUN is a folder on a file system that all hosts mount (`xpk storage attach`).
set -eu
cluster=$1 image=$2 run=$3
shift 3

# 130, which says that a run was asked to stop and has saved, is among the exit statuses after which
# xpk starts the workload again.
xpk workload create \
  --cluster "$cluster" \
  --workload jaxlm \
  --tpu-type v5litepod-16 \
  --num-slices 2 \
  --docker-image "$image" \
  --max-restarts 10 \
  --termination-grace-period-seconds 120 \
  --command "if [ -e $run/config.json ]; then jaxlm resume $run; else jaxlm train $* --run $run; fi"
