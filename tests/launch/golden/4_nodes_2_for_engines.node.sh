#!/bin/bash
# my-run: 32 ranks on 4 nodes, 8 engines on 2 nodes more.
# Written by `owpo launch --with nemo-run` (owpo_megatron VERSION); every node executes it once, by NeMo-Run's srun.
# Exit code 0: the run is finished. 75: it was saved because its time is over. 2: a mistake that will be found again.
# Every code but 0 makes NeMo-Run's script requeue the job, a bounded number of times.
set -uo pipefail
cd /data/project || exit 2

export SLURM_NODEID=${SLURM_NODEID:-0} # absent: this machine alone, without Slurm
export RUN=runs/my-run
JOB=${SLURM_JOB_ID:-local-$$}
ATTEMPT=$JOB.${SLURM_RESTART_COUNT:-0}
export LOGS=$RUN/logs/$ATTEMPT
export STOP=$RUN/launch/stop.$ATTEMPT # once it exists, the ranks finish their step, save and end
export RENDEZVOUS=$RUN/rendezvous/$ATTEMPT
ENDED=$RENDEZVOUS/ended # exists once the first node's ranks have ended
export PYTHON=/opt/owpo/.venv/bin/python
export MASTER_ADDR=${SLURM_LAUNCH_NODE_IPADDR:-127.0.0.1} # srun runs on the first node
export MASTER_PORT=$((12000 + (${SLURM_JOB_ID:-$$} + ${SLURM_RESTART_COUNT:-0}) % 8000))
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_SOCKET_IFNAME=ib0

mkdir -p "$LOGS" "$RENDEZVOUS" "$RUN/launch"
if [[ -e $RUN/launch/$JOB.mistake ]]; then
    exit 2
fi
if ((SLURM_NODEID == 0)); then # where `owpo launch attach` and `logs` look, requeues in one file
    echo "what this node says is in $RUN/logs/job-$JOB.out"
    exec >>"$RUN/logs/job-$JOB.out" 2>&1
fi
cat >"$RUN/config.yaml.$SLURM_NODEID" <<'CONFIG'
(the configuration)
CONFIG
mv "$RUN/config.yaml.$SLURM_NODEID" "$RUN/config.yaml"

# Slurm's warning reaches every process of the step: torchrun would end by it.
trap 'echo time >"$STOP"' USR1

ENGINES=()
for ((local = 0; SLURM_NODEID >= 4 && local < 4; local++)); do
    INDEX=$(((SLURM_NODEID - 4) * 4 + local))
    (
        trap '' USR1
        exec "$PYTHON" -m owpo_megatron.cli.main serve -c "$RUN/config.yaml" --host 0.0.0.0 --port 0 \
            --rendezvous "$RENDEZVOUS" --index "$INDEX" --restarts 3 --log "$LOGS/engine_$INDEX.log" \
            load_format=dummy base_gpu_id="$((INDEX % 4 * 2))"
    ) &
    ENGINES+=($!)
done

if ((SLURM_NODEID >= 4)); then # engines alone: they end with the ranks
    while [[ ! -e $ENDED ]]; do
        sleep 1
    done
    kill "${ENGINES[@]}"
    wait
    exit 0
fi

(
    trap '' USR1
    exec "$PYTHON" -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --node-rank="$SLURM_NODEID" \
        --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --shutdown-timeout=20 \
        -m owpo_megatron.launch.rank "$LOGS" owpo_megatron.trainer.main --config "$RUN/config.yaml" \
        --error-dir "$LOGS" --stop-file "$STOP" engine.rendezvous="$RENDEZVOUS" engine.announced=8 \
        2> "$LOGS/torchrun_$SLURM_NODEID.log"
) &
TRAINER=$!
CODE=138 # 128 + USR1: the trap interrupted the waiting, and the ranks go on
while ((CODE == 138)); do
    wait "$TRAINER"
    CODE=$?
done

if ((SLURM_NODEID == 0)); then
    trap 'touch "$ENDED"' EXIT
else # the first node speaks for all: a node that ends with a code of its own makes Slurm end the others
    for ((second = 0; second < 30; second++)); do
        [[ ! -e $ENDED ]] || break
        sleep 1
    done
fi
if ((CODE == 0)) && [[ ! -e $STOP ]]; then
    exit 0
elif ((CODE == 0)); then
    echo "[owpo $(date +%T) $ATTEMPT] stopped and saved"
    exit 75
elif grep -hs '^error: ' "$LOGS"/error_rank_*.txt; then
    touch "$RUN/launch/$JOB.mistake"
    exit 2
fi
echo "[owpo $(date +%T) $ATTEMPT] failed with exit code $CODE: see $LOGS"
tail -qn 1 "$LOGS"/error_rank_*.txt 2>/dev/null
exit 1
