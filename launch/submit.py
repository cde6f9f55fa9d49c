"""Submit a pretraining to SLURM: main_dino.py's options and the job's.

    python launch/submit.py --arch xcit_small_12_p8 --data train.beton --out runs/a \
        --slurm.partition gpu --slurm.nodes 8
    python launch/submit.py ... --dry-run                print the resolved settings, submit nothing
    python launch/submit.py ... --slurm.cluster local    without SLURM, on this machine

The folder must be on a disk that all machines share; job logs are in its slurm/. The facts of your
cluster go into configs/slurm.yaml. A preempted job is queued again and goes on from its folder.
"""

from ssl_xcit.config import SubmitConfig, run_command

if __name__ == "__main__":
    run_command(SubmitConfig, "ssl_xcit.slurm:submit", files=("slurm.yaml", "pretrain/{arch}.yaml"))
