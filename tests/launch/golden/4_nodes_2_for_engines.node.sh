#!/bin/bash
# my-run: 32 ranks on 4 nodes, 8 engines on 2 more nodes.
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
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export TORCH_NCCL_ENABLE_MONITORING=1
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export NCCL_SOCKET_IFNAME=ib0

mkdir -p "$LOGS" "$RENDEZVOUS" "$RUN/launch"
free_port() { # a port of this machine that nobody listens on, below the range of outgoing connections
    local port
    while port=$((12000 + RANDOM % 16000)) && (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; do :; done
    echo "$port"
}
if ((SLURM_NODEID == 0)); then # the first node chooses the port, and the others read it
    free_port "$MASTER_ADDR" >"$RENDEZVOUS/.port"
    mv "$RENDEZVOUS/.port" "$RENDEZVOUS/port"
fi
until [[ -s $RENDEZVOUS/port ]]; do sleep 0.2; done
MASTER_PORT=$(cat "$RENDEZVOUS/port")
export MASTER_PORT
if [[ -e $RUN/launch/$JOB.mistake ]]; then
    exit 2
fi
if ((SLURM_NODEID == 0)); then # where `owpo launch attach` and `logs` look; all attempts in one file
    echo "this node's output is in $RUN/logs/job-$JOB.out"
    exec >>"$RUN/logs/job-$JOB.out" 2>&1
fi
cat >"$RUN/config.yaml.$SLURM_NODEID" <<'CONFIG'
(the configuration)
CONFIG
mv "$RUN/config.yaml.$SLURM_NODEID" "$RUN/config.yaml"

if ! (
    bad() {
        echo "[owpo] node $(hostname) is not fit for the job: $*"
        exit 1
    }
    [[ -r $RUN/config.yaml ]] || bad "it does not see $RUN/config.yaml; is the file system mounted?"
    timeout 600 "$PYTHON" -c "import owpo_megatron" || bad "$PYTHON cannot import owpo_megatron"
    (($(df --output=avail -k /dev/shm | tail -n 1) > 1048576)) || bad "less than 1 GiB is free in /dev/shm"
    GPUS=$(timeout --signal=KILL 60 nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits) || bad "nvidia-smi fails or hangs: $GPUS"
    (($(wc -l <<<"$GPUS") >= 8)) || bad "it has $(wc -l <<<"$GPUS") of 8 GPUs"
    ! grep -q "[1-9]" <<<"$GPUS" || bad "uncorrected memory errors of its GPUs: $(tr "\n" " " <<<"$GPUS")"
); then
    exit 1
fi
# Slurm's warnings reach every process of the step: torchrun would end by them.
trap 'echo time >"$STOP"' USR1
trap 'echo preempted >"$STOP"' TERM

ENGINES=()
for ((local = 0; SLURM_NODEID >= 4 && local < 4; local++)); do
    INDEX=$(((SLURM_NODEID - 4) * 4 + local))
    (
        trap '' USR1
        # shellcheck disable=SC2329
        hold() { :; }
        trap hold TERM # a warning of preemption: the trainer finishes its step first, and needs its engines
        "$PYTHON" -m owpo_megatron.cli.main serve -c "$RUN/config.yaml" --host 0.0.0.0 --port 0 \
            --rendezvous "$RENDEZVOUS" --index "$INDEX" --restarts 3 --log "$LOGS/engine_$INDEX.log" \
            load_format=dummy base_gpu_id="$((INDEX % 4 * 2))" &
        ENGINE=$!
        while kill -0 "$ENGINE" 2>/dev/null; do
            [[ ! -e $RENDEZVOUS/ended ]] || kill "$ENGINE"
            sleep 1
        done
        wait "$ENGINE"
    ) &
    ENGINES+=($!)
done

if ((SLURM_NODEID >= 4)); then # engines alone: they end with the ranks
    while [[ ! -e $ENDED ]]; do
        sleep 1
    done
    wait "${ENGINES[@]}"
    exit 0
fi

(
    trap '' USR1
    # shellcheck disable=SC2329
    save() {
        trap "" TERM
        echo preempted >"$STOP"
    }
    trap save TERM # torchrun would end its ranks after a timeout; the file lets them finish the step
    "$PYTHON" -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --node-rank="$SLURM_NODEID" \
        --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --shutdown-timeout=20 \
        -m owpo_megatron.launch.rank "$LOGS" owpo_megatron.trainer.main --config "$RUN/config.yaml" \
        --error-dir "$LOGS" --stop-file "$STOP" engine.rendezvous="$RENDEZVOUS" engine.announced=8 \
        2> "$LOGS/torchrun_$SLURM_NODEID.log" &
    RANKS=$!
    await() { # the exit code of a process, even where a trap interrupts the waiting (which then ends with 128 + signal)
        local code before=-1
        while wait "$1"; code=$?; ((code > 128 && code != before)); do before=$code; done
        return "$code"
    }
    await "$RANKS"
    exit
) &
TRAINER=$!
await() { # the exit code of a process, even where a trap interrupts the waiting (which then ends with 128 + signal)
    local code before=-1
    while wait "$1"; code=$?; ((code > 128 && code != before)); do before=$code; done
    return "$code"
}
await "$TRAINER"
CODE=$?

if ((SLURM_NODEID == 0)); then
    touch "$ENDED"
else # the first node's exit code counts: one that ends earlier with another makes Slurm end the others
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
