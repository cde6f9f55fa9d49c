"""Accuracy of a supervised checkpoint with its own classifier, beside the published one.

    python eval/supervised.py --checkpoint xcit_small_12_p8_384_dist.pth --data val.beton
    python eval/supervised.py --model xcit-small-12-p8_3rdparty-dist_in1k-384px --checkpoint F ...
    python eval/supervised.py --all FOLDER --data val.beton --out zoo.json
    python eval/supervised.py --list

--list shows the published accuracies of the 42 models, such as 85.12 for the one above. The code:
ssl_xcit/evaluation/supervised.py.
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["supervised"](sys.argv[1:])
