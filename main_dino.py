"""Pretrain an XCiT with DINO.

    python main_dino.py --arch xcit_small_12_p16 --data train.beton --out runs/a
    torchrun --nproc-per-node 8 main_dino.py ...      the same, on several GPUs (or CPU processes)

Run the same command again to continue the run in its folder; --help lists all options. The code in
ssl_xcit/, in the order in which a run uses it:

    dino/config.py            settings and defaults; configs/pretrain/<arch>.yaml overrides them
    runtime/options.py        reads settings from files and flags
    dino/train.py             train(config): builds networks, loss, optimiser and loader
    dino/algorithm.py         Algorithm 1: teacher_step and student_step
    training/engine.py        the training loop and the optimiser step (task.py: their interface)
    training/run_folder.py    claims the run folder and records what ran there
    training/saving.py        saves and resumes
    data/beton.py             the images: one memory-mapped file
    data/views.py             which crops, and how they are augmented
    data/loader.py            decodes each image once and cuts all its views (kernels/)
    models/xcit.py            the backbone
    dino/head.py              the projection head
    dino/loss.py              the loss and its centre
    dino/teacher.py           the EMA update of the teacher
    training/schedules.py     learning rate, weight decay, momentum and temperature per step
    training/optim.py         parameter groups, optimisers, clipping, last-layer freezing
    runtime/distributed.py    ranks
    training/metrics.py       metrics.jsonl and the progress lines
    dino/probe.py             k-NN of the teacher during training (evaluation/features.py, knn.py)
    checkpoints/folder.py     checkpoints: safetensors and JSON
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["pretrain"](sys.argv[1:])
