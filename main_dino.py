"""Pretrain an XCiT with DINO.

    python main_dino.py --arch xcit_small_12_p16 --data train.beton --out runs/a
    torchrun --nproc-per-node 8 main_dino.py ...      the same, on several GPUs (or CPU processes)

The same command again continues the run in its folder; --help lists every option. The code, in the
order in which a run meets it (all in ssl_xcit/):

    dino/config.py            the settings, their defaults; configs/pretrain/<arch>.yaml over them
    runtime/options.py        how files and flags fill them
    dino/train.py             train(config): networks, loss, optimiser and loader; Algorithm 1
    training/engine.py        the loop and the step of every training (task.py: what it asks of one)
    training/run_folder.py    claims the run folder: whose it is, and what ran there
    training/saving.py        saves and resumes
    data/beton.py             the images: one memory-mapped file
    data/loader.py            decodes each image once and cuts all its views (kernels.py, views.py)
    models/xcit.py            the backbone
    dino/head.py              the projection head
    dino/loss.py              the loss with its centre
    dino/teacher.py           the teacher's update
    training/schedules.py     learning rate, weight decay, momentum and temperature by the step
    training/optim.py         parameter groups, optimisers, clipping, the frozen last layer
    runtime/distributed.py    ranks
    training/metrics.py       metrics.jsonl and the progress line
    dino/probe.py             k-NN on the teacher while it learns (evaluation/features.py, knn.py)
    checkpoints/folder.py     checkpoints: safetensors and JSON
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["pretrain"](sys.argv[1:])
