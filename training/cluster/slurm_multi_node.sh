#!/usr/bin/env bash
# sbatch training/cluster/slurm_multi_node.sh training/recipes/msrvtt_9k.yaml runs/msrvtt_9k
#
# Four nodes of eight GPUs, one launcher per node. Submit from the root of the checkout, in an environment that has
# `pip install -e '.[train]'`. The checkout, the data and the output folder must be on a file system that all nodes see.
# Two minutes before the time limit SLURM sends SIGTERM, which is passed on to every process: the run saves a checkpoint
# and ends (the launcher allows it 30 s), and the job requeues itself and continues from there. A recipe's batch_size is
# that of all 32 GPUs together. Not run: no cluster. Tested with `bash -n`, with stand-ins for SLURM's commands
# (tests/training/test_cluster.py) and, on one machine, with two processes that were ended by SIGTERM and resumed.
#SBATCH --job-name=camoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=camoe_%j.log
set -uo pipefail

recipe=${1:?"usage: sbatch slurm_multi_node.sh RECIPE.yaml OUTPUT_DIR [--option value ...]"}
output_dir=${2:?"usage: sbatch slurm_multi_node.sh RECIPE.yaml OUTPUT_DIR [--option value ...]"}
shift 2
gpus=${SLURM_GPUS_ON_NODE:-8}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SLURM_NODEID differs between nodes and must be expanded there: hence the single quotes around the command.
export RECIPE=$recipe OUTPUT_DIR=$output_dir HEAD_NODE=$head_node GPUS=$gpus OMP_NUM_THREADS=1
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file training/cluster/multi_gpu_ddp.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD_NODE" --main_process_port 29500 --rdzv_backend c10d \
    training/run_retrieval.py --config "$RECIPE" --output_dir "$OUTPUT_DIR" \
    --resume_from_checkpoint latest --checkpointing_steps 500 --num_workers 10 "$@"' bash "$@" &
srun_pid=$!

time_is_up=""
trap 'time_is_up=1; kill -TERM "$srun_pid"' TERM
wait "$srun_pid"
code=$?
if [ -n "$time_is_up" ]; then
    wait "$srun_pid"  # the signal ended the first wait, not the run
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
