#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2, on this machine, for tests. As root: one_machine.sh up|down|n1 DIR
# `up` installs Debian's packages where they are missing and keeps everything else in DIR; export
# SLURM_CONF=DIR/slurm.conf to use it. `n1 DIR` starts the daemon of that node again.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 up|down|n1|n2 DIR" >&2; exit 2; }
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf

install_packages() {
  local program missing=""
  for program in slurmctld slurmd srun munged; do
    command -v $program >/dev/null || missing="$missing $program"
  done
  [ -n "$missing" ] || return 0
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >"$dir/apt.log" 2>&1 || true
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >>"$dir/apt.log" 2>&1 || {
    echo "missing:$missing; $(cat "$dir/apt.log")" >&2
    exit 1
  }
}

write_configuration() {
  local host
  host=$(hostname -s)
  mkdir -p "$dir/controller" "$dir/n1" "$dir/n2"
  cat >"$SLURM_CONF" <<CONF
ClusterName=one_machine
SlurmctldHost=$host
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
KillWait=30
StateSaveLocation=$dir/controller
SlurmctldPidFile=$dir/controller.pid
SlurmctldLogFile=$dir/controller.log
SlurmdSpoolDir=$dir/%n
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  # jax reaches the first process by the name of its node
  getent hosts n1 n2 >/dev/null || echo "127.0.0.1 n1 n2" >>/etc/hosts
}

case $action in
up)
  install_packages
  write_configuration
  mkdir -p /run/munge
  chown munge:munge /run/munge
  munge -n >/dev/null 2>&1 || runuser -u munge -- munged
  [ -e "$dir/munged.pid" ] || ln -s /run/munge/munged.pid "$dir/munged.pid"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 60); do
    if [ "$(sinfo -h -o '%D %t' 2>/dev/null)" = "2 idle" ]; then exit 0; fi
    sleep 0.5
  done
  echo "the two nodes do not become idle; see $dir/*.log" >&2
  exit 1
  ;;
n1 | n2)
  slurmd -N "$action"
  ;;
down)
  for name in n1 n2 controller munged; do
    if [ -f "$dir/$name.pid" ]; then kill "$(cat "$dir/$name.pid")" || true; fi
  done
  ;;
*)
  echo "usage: $0 up|down|n1|n2 DIR" >&2
  exit 2
  ;;
esac
