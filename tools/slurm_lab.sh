#!/usr/bin/env bash
# A real Slurm on one Debian machine acting as several nodes, to try `owpo launch` without a cluster:
#     sudo tools/slurm_lab.sh up       installs Slurm where it is missing, starts it, and prints how to use it
#     sudo tools/slurm_lab.sh fail n1  node n1 dies with everything on it;   back n1: it returns
#     sudo tools/slurm_lab.sh down     cancels all jobs, stops Slurm, removes its state
#     sudo tools/slurm_lab.sh install  only installs (Debian's slurmctld, slurmd, slurm-client)
# LAB: folder of its state; NODES: how many. No systemd, cgroups, munge or accounting; for tests, never for users.
set -euo pipefail
LAB=${LAB:-/tmp/owpo-slurm-lab}
NODES=${NODES:-3}
CTLD_PORT=${CTLD_PORT:-26817}
export SLURM_CONF=$LAB/slurm.conf

die() { echo "slurm_lab: $*" >&2; exit 1; }

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && return
    [ "$(id -u)" = 0 ] || die "Slurm is not installed, and only root can do that"
    command -v apt-get >/dev/null || die "Slurm is not installed, and this is no Debian"
    export DEBIAN_FRONTEND=noninteractive
    # Slurm's services are not started: this lab has daemons of its own.
    local apt=(env RUNLEVEL=1 apt-get install -y -qq -o DPkg::Lock::Timeout=120 --no-install-recommends)
    "${apt[@]}" slurmctld slurmd slurm-client >/dev/null 2>&1 ||
        { apt-get update -qq && "${apt[@]}" slurmctld slurmd slurm-client >/dev/null; } ||
        die "apt-get could not install Slurm"
}

configure() {
    local last=$((NODES - 1)) host
    host=$(hostname -s)
    mkdir -p "$LAB"/{state,log,run}
    cat >"$SLURM_CONF" <<END
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CTLD_PORT
FirstJobId=$((1 + CTLD_PORT % 7000))
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
AuthInfo=cred_expire=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
MessageTimeout=30
TmpFS=/tmp
NodeName=n[0-$last] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((CTLD_PORT + 1))-$((CTLD_PORT + NODES)) CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES OverSubscribe=EXCLUSIVE MaxTime=INFINITE State=UP
END
    for node in $(seq 0 "$last"); do mkdir -p "$LAB/spool/n$node"; done
}

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

up() {
    [ "$(id -u)" = 0 ] || die "only root can start slurmd"
    install
    configure
    alive "$LAB/run/slurmctld.pid" || slurmctld -i
    for node in $(seq 0 $((NODES - 1))); do alive "$LAB/run/slurmd.n$node.pid" || slurmd -N "n$node"; done
    for _ in $(seq 150); do
        if [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c -E '^(idle|mix|alloc)$')" = "$NODES" ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    tail -n 20 "$LAB"/log/*.log >&2
    die "Slurm did not come up"
}

stop() { # stop PIDFILE
    [ -s "$1" ] || return 0
    local pid
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$1"
}

down() {
    [ -e "$SLURM_CONF" ] || return 0
    if alive "$LAB/run/slurmctld.pid"; then
        squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
        for _ in $(seq 100); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
    fi
    for file in "$LAB"/run/slurmd.*.pid "$LAB/run/slurmctld.pid"; do stop "$file"; done
    rm -rf "$LAB"
}

descendants() {
    local child
    for child in $(pgrep -P "$1"); do echo "$child"; descendants "$child"; done
}

fail() { # The node's step daemons die before their tasks: a living one would report a task that failed, not a node.
    local node=$1 step steps=() tasks=()
    kill -9 "$(cat "$LAB/run/slurmd.$node.pid")"
    rm -f "$LAB/run/slurmd.$node.pid"
    for step in $(pgrep -x slurmstepd); do
        find "/proc/$step/fd" -lname "$LAB/log/slurmd.$node.log" 2>/dev/null | grep -q . || continue
        steps+=("$step")
        mapfile -t -O ${#tasks[@]} tasks < <(descendants "$step")
    done
    kill -9 "${steps[@]}" "${tasks[@]}" 2>/dev/null || true
}

back() { # What a dead node left in its spool would hold back the next job there.
    rm -rf "${LAB:?}/spool/$1"
    mkdir -p "$LAB/spool/$1"
    slurmd -N "$1"
}

case ${1:-} in
    install | up | down) "$1" ;;
    fail | back) [ $# = 2 ] || die "$1 NODE"; "$@" ;;
    *) sed -n '2,8s/^# //p' "$0"; exit 2 ;;
esac
