"""Linear classification of frozen features: DINO's protocol, and a fast one beside it.

    python eval/linear.py --checkpoint runs/a --train train.beton --test val.beton --out runs/a_lin
    python eval/linear.py --mode fast ...                     minutes: no training on random views
    python eval/linear.py --checkpoint runs/a --test val.beton --evaluate runs/a_lin/official

Published for DINO's XCiT on ImageNet (--features cls, chosen on the test images): small_12_p16
77.8, small_12_p8 79.2, medium_24_p16 78.8, medium_24_p8 80.3. The code: ssl_xcit/evaluation/,
linear.py, linear_protocols.py and linear_classifiers.py.
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["linear"](sys.argv[1:])
