"""k-NN accuracy of frozen features: DINO's weighted vote, no training.

    python eval/knn.py --checkpoint runs/a --train train.beton --test val.beton
    python eval/knn.py --arch xcit_small_12_p16 --random-init ...    the untrained network
    python eval/knn.py --pixels ...                                        the pixels themselves

Published for DINO's XCiT on ImageNet (cls token): small_12_p16 76.0, small_12_p8 77.1,
medium_24_p16 76.4, medium_24_p8 77.9. The code: ssl_xcit/evaluation/knn.py and features.py.
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["knn"](sys.argv[1:])
