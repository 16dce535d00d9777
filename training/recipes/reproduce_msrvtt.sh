#!/usr/bin/env bash
# training/recipes/reproduce_msrvtt.sh ANNOTATIONS VIDEOS [options of run_ablations.py]
#
# MSR-VTT 1k-A from its public files to one table, docs/msrvtt.md: zero-shot, meanP, seqTransf, motion, four texts and
# CAMoE, each with the plain and the dual softmax loss, three seeds (reproduce_msrvtt.yaml): 31 runs. ANNOTATIONS has
# MSRVTT_data.json and CLIP4Clip's lists, VIDEOS the 10,000 clips. Each GPU trains one run at a time; frames are decoded
# once, into 18 GB. `--dry_run` prepares the tables and says what would run; the same command continues after a kill.
# Quickly: `--seeds '[0]' --only '[meanP, CAMoE]'`. Tested on a miniature tree; nobody has run it on the real videos yet.
#
# PYTHON is the interpreter, DATA the folder of the prepared tables.
set -euo pipefail

usage="usage: reproduce_msrvtt.sh ANNOTATIONS VIDEOS [options of run_ablations.py]"
annotations=$(realpath "${1:?$usage}")
videos=$(realpath "${2:?$usage}")
shift 2
python=${PYTHON:-python}
data=${DATA:-data/msrvtt}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

"$python" training/prepare_benchmark.py msrvtt --annotations "$annotations" --videos "$videos" --output "$data" \
    --splits '[train_7k, validation_7k, test_1k]'
exec "$python" training/run_ablations.py --table training/recipes/reproduce_msrvtt.yaml \
    --train.dataset_name "$data" --evaluate.dataset_name "$data" \
    --page docs/msrvtt.md --chart docs/images/msrvtt.png "$@"
