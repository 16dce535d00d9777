#!/usr/bin/env bash
# training/cluster/two_cpu_processes.sh --config RECIPE.yaml [--option value ...]
#
# Distributed training without a GPU, over gloo, to try it out. It uses torchrun because `accelerate launch` needs MPI to
# start several processes on CPUs. Tested; SIGTERM to torchrun reaches both processes, which save and end.
set -euo pipefail
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
exec torchrun --standalone --nproc_per_node 2 "$(dirname "$0")/../run_retrieval.py" "$@"
