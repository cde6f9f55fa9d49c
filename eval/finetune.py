"""Supervised fine-tuning of a whole network, from any checkpoint or from scratch.

    python eval/finetune.py --init runs/a --data train.beton --test val.beton --out runs/ft
    python eval/finetune.py --from_scratch --arch xcit_small_12_p16 ...         from random weights
    python eval/finetune.py --config configs/finetune/xcit_384.yaml ...         a recipe
    torchrun --nproc-per-node 8 eval/finetune.py ...                            on several GPUs

The same command again continues the run in its folder. Published for XCiT on ImageNet at 224 pixels
(from scratch, 400 epochs): nano_12_p16 69.98, tiny_12_p16 77.12, small_12_p16 81.98,
medium_24_p16 82.63. The code: ssl_xcit/finetune/train.py, with the engine of pretraining.
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["finetune"](sys.argv[1:])
