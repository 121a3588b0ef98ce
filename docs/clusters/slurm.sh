#!/bin/bash
# Trains on the hosts of a Slurm job:  sbatch slurm.sh RUN PRESET [flags of jaxlm train]
# The same command goes on with a run that has ended before its last step.
#SBATCH --job-name=jaxlm
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
# On GPUs also, for example:  #SBATCH --gpus-per-node=8

run=$1
shift
if [ -e "$run/config.json" ]; then
  srun --kill-on-bad-exit=1 jaxlm resume "$run"
else
  srun --kill-on-bad-exit=1 jaxlm train "$@" --run "$run"
fi
status=$?
# 130: USR1 asked it to stop, 300 seconds before the time limit, and it has saved. scancel and the
# limit itself end this script before it comes here, so that they are the end of the job.
if [ "$status" = 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
