#!/usr/bin/env bash
# A two-node Slurm on the hosts of up.sh: munged and slurmctld on the bridge's address, a slurmd in each namespace.
# Usage (root, after up.sh DIR): slurm.sh up DIR | slurm.sh down DIR
set -euo pipefail
what="${1:?up or down}" dir="$(realpath "${2:?DIR}")/slurm"
if [ "$what" = down ]; then
  for name in slurmd1 slurmd2 slurmctld munged; do
    [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null
  done
  exit 0
fi
mkdir -p "$dir/state" "$dir/spool1" "$dir/spool2"
chmod 755 "$dir"
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 600 "$dir/munge.key"
mkdir -p "$dir/munge"
chmod 755 "$dir/munge"
munged --force --key-file "$dir/munge.key" --socket "$dir/munge/socket" --pid-file "$dir/munged.pid" \
  --log-file "$dir/munged.log" --seed-file "$dir/munge.seed"
name="$(hostname)"
cpus=$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1)) # of each node, both on the same cores
cat >"$dir/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$name(10.77.0.254)
SlurmctldPort=6917
SlurmdPort=6918
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=60
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=h1 NodeHostname=$name NodeAddr=10.77.0.1 CPUs=$cpus
NodeName=h2 NodeHostname=$name NodeAddr=10.77.0.2 CPUs=$cpus
PartitionName=main Nodes=h1,h2 Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF="$dir/slurm.conf"
mkdir -p "$dir/spoolh1" "$dir/spoolh2"
slurmctld -f "$SLURM_CONF"
for n in 1 2; do
  "$dir/../bin/on" "$n" slurmd -N "h$n" -f "$SLURM_CONF"
  ln -sf "slurmd-h$n.pid" "$dir/slurmd$n.pid"
done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -t idle -o %N | wc -l)" = 2 ] && exit 0
  sleep 0.2
done
sinfo -N -l >&2
tail -n 5 "$dir"/slurm*.log >&2
exit 1
