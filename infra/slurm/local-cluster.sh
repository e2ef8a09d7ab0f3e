#!/usr/bin/env bash
# A throwaway Slurm of two nodes on this machine, from Debian's packages, to try and test the pool with; needs root.
#
#   infra/slurm/local-cluster.sh up        starts it and prints the SLURM_CONF to export
#   ACCOUNTING=1 ... up                    with slurmdbd and a MariaDB of its own, so that sacct answers
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
    local commands=(slurmctld slurmd munged sbatch pkill ps) packages=(slurmctld slurmd slurm-client munge procps)
    if [ -n "${ACCOUNTING:-}" ]; then
        commands+=(slurmdbd mariadbd mariadb-install-db)
        packages+=(slurmdbd mariadb-server)
    fi
    if [ "$(command -v "${commands[@]}" | wc -l)" -lt "${#commands[@]}" ]; then
        apt-get update -q
        # At runlevel 1 Debian does not start the packages' own services, which would run beside this cluster.
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
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
    if [ -n "${ACCOUNTING:-}" ]; then
        # The controller forgets a job after MinJobAge, and then sacct alone knows what became of it.
        sed -i 's/^MinJobAge=.*/MinJobAge=5/' "$SLURM_CONF"
        cat >> "$SLURM_CONF" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=17200
CONF
    fi
}

start_accounting() {
    local socket=$folder/mariadb/socket
    install -d -o mysql -g mysql "$folder/mariadb"
    mariadb-install-db --user=mysql --datadir="$folder/mariadb/data" --auth-root-authentication-method=socket \
        --skip-test-db > "$folder/mariadb-install.log" 2>&1
    # No port: only who may open the socket in this root's folder reaches it.
    setsid mariadbd --no-defaults --user=mysql --datadir="$folder/mariadb/data" --socket="$socket" --skip-networking \
        --pid-file="$folder/mariadb/pid" > "$folder/mariadb.log" 2>&1 &
    for _ in $(seq 60); do
        if mariadb --no-defaults --socket="$socket" -e 'CREATE DATABASE IF NOT EXISTS slurm_acct_db' 2> /dev/null; then
            break
        fi
        sleep 0.5
    done
    (umask 077 && cat > "$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdPort=17200
SlurmUser=root
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CONF
    )
    # slurmdbd reads both files beside the one that SLURM_CONF names; the client library takes the socket from here.
    MYSQL_UNIX_PORT=$socket slurmdbd
    for _ in $(seq 60); do
        if sacctmgr --noheader --parsable2 show cluster > /dev/null 2>&1; then
            sacctmgr --immediate --quiet add cluster proving-ground > /dev/null 2>&1 || true
            return
        fi
        sleep 0.5
    done
    tail -n 20 "$folder/slurmdbd.log" "$folder/mariadb.log" >&2
    echo "slurmdbd did not answer in 30 s; its log is in $folder" >&2
    exit 1
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
        [ -z "${ACCOUNTING:-}" ] || start_accounting
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
            for daemon in slurmdbd.pid mariadb/pid; do
                [ ! -f "$folder/$daemon" ] || kill -KILL "$(cat "$folder/$daemon")" 2> /dev/null || true
            done
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
