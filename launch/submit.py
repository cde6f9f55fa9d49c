"""Submit a pretraining or an evaluation to SLURM.

    python launch/submit.py --arch xcit_small_12_p8 --data train.beton --nodes 8 --partition gpu
    python launch/submit.py ... --dry-run             print the script and settings, submit nothing
    python launch/submit.py ... --eval knn,linear     evaluate when the training has ended
    python launch/submit.py ... --sweep optim.lr=2.5e-4,5e-4 seed=0,1    a job for each combination
    python launch/submit.py ... --cluster local       on this machine, without SLURM
    python launch/submit.py eval knn --checkpoint runs/a --train train.beton --test val.beton

It takes every option of main_dino.py or eval/NAME.py, and the job's (see --help). The facts of your
cluster go into configs/slurm.yaml. The run folder must be on a disk that all machines share; its
slurm/ holds the job's logs and the copy of the program that it runs. A job that is preempted or
reaches its time limit saves, is requeued and continues. The code is in ssl_xcit/slurm/submit.py and
job.py.
"""

from ssl_xcit.slurm.command import main

if __name__ == "__main__":
    main()
