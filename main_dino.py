"""Pretrain an XCiT with DINO.

    python main_dino.py --arch xcit_small_12_p16 --data train.beton --out runs/a
    torchrun --nproc-per-node 8 main_dino.py ...      the same, on several GPUs (or CPU processes)

The same command again continues the run in its folder; --help lists every option. The code, in the
order in which a run meets it (all in ssl_xcit/):

    config.py       the settings, their defaults and bounds; configs/pretrain/<arch>.yaml over them
    options.py      how files and flags fill them
    train.py        train(config): builds networks, loss, optimiser and loader; Algorithm 1
    engine.py       the loop and the step of every training (task.py: what it asks of one)
    run_folder.py   claims the run folder: whose it is, and what ran there
    saving.py       saves and resumes
    beton.py        the images: one memory-mapped file
    loader.py       decodes each image once and cuts all its views (kernels.py, augment.py)
    xcit.py         the backbone
    dino.py         the head, multi-crop, the loss with its centre, the teacher's update
    schedules.py    learning rate, weight decay, momentum and temperature as functions of the step
    optim.py        parameter groups, optimisers, clipping, the frozen last layer
    distributed.py  ranks
    metrics.py      metrics.jsonl and the progress line
    probe.py        k-NN on the teacher while it learns (features.py, knn.py)
    checkpoint.py   checkpoints: safetensors and JSON
"""

from ssl_xcit.config import TrainConfig, run_command

if __name__ == "__main__":
    run_command(TrainConfig, "ssl_xcit.train:train", files=("pretrain/{arch}.yaml",))
