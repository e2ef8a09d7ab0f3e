#!/usr/bin/env bash
# A throwaway Slurm of two nodes on this machine, from Debian's packages, to try and test the pool with; needs root.
#
#   infra/slurm/local-cluster.sh up        starts it and prints the SLURM_CONF to export
#   infra/slurm/local-cluster.sh down      ends it and everything that it runs
#   infra/slurm/local-cluster.sh kill N    kills node N's slurmd, as if the node had died
#   infra/slurm/local-cluster.sh start N   brings it back
#
# Its files lie in $SLURM_FOLDER (default /run/proving-ground-slurm). Never on a machine that is part of a real cluster.
set -euo pipefail

folder=${SLURM_FOLDER:-/run/proving-ground-slurm}
export SLURM_CONF=$folder/slurm.conf
host=$(hostname)

install_packages() {
    if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge
    fi
}

write_settings() {
    local cpus memory
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    mkdir -p "$folder"/{state,spool-node0,spool-node1}
    cat > "$SLURM_CONF" <<CONF
ClusterName=proving-ground
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its former credentials have expired, 120 s by default.
AuthInfo=cred_expire=15
SlurmctldPort=17100
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
# Both nodes are this machine: neither cgroups nor binding can be theirs alone.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=10
KillWait=5
MinJobAge=300
ReturnToService=2
NodeName=node[0-1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=node[0-1] Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=node[0-1] MaxTime=1 State=UP
CONF
}

start_munge() {
    if ! munge -n > /dev/null 2>&1; then
        [ -s /etc/munge/munge.key ] || mungekey --create
        chown munge: /etc/munge/munge.key
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged
    fi
}

start_node() {
    slurmd -N "node$1" -f "$SLURM_CONF"
}

kill_node() {
    # With everything that it runs, as when the power goes: its daemon, the daemons of its steps, and their processes.
    local tasks="" process
    for process in /proc/[0-9]*; do
        if tr '\0' '\n' < "$process/environ" 2> /dev/null | grep -qx "SLURMD_NODENAME=node$1"; then
            tasks+=" ${process#/proc/}"
        fi
    done
    pkill -KILL -f "slurmd -N node$1 -f $SLURM_CONF" || true
    for process in $tasks; do
        if [ "$(ps -o comm= -p "$(ps -o ppid= -p "$process" | tr -d ' ')" 2> /dev/null)" = slurmstepd ]; then
            kill -KILL "$(ps -o ppid= -p "$process" | tr -d ' ')" 2> /dev/null || true
        fi
    done
    for process in $tasks; do
        kill -KILL "$process" 2> /dev/null || true
    done
}

wait_until_idle() {
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --partition=main --states=idle --format=%D 2> /dev/null)" = 2 ]; then
            return
        fi
        sleep 0.5
    done
    sinfo || true
    tail -n 20 "$folder"/*.log >&2
    echo "the two nodes did not become idle in 30 s; their logs are in $folder" >&2
    exit 1
}

case "${1:-}" in
    up)
        install_packages
        write_settings
        start_munge
        slurmctld -f "$SLURM_CONF"
        start_node 0
        start_node 1
        wait_until_idle
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    down)
        if [ -f "$SLURM_CONF" ]; then
            scancel --user=root 2> /dev/null || true
            sleep 1
            pkill -KILL -f "slurmd -N node[01] -f $SLURM_CONF" || true
            pkill -KILL -f "slurmctld -f $SLURM_CONF" || true
            rm -rf "$folder"
        fi
        ;;
    kill) kill_node "$2" ;;
    start) start_node "$2" && wait_until_idle ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
        exit 2
        ;;
esac
