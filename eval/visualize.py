"""What a network sees: class attention of each head, and the PCA of the patch tokens as colours.

    python eval/visualize.py runs/a photo.jpg --out pictures         a PNG for each image
    python eval/visualize.py runs/a photos/ val.beton --limit 16 --out sheet.png       one for all
    python eval/visualize.py xcit_small_12_p8_dino.pth photo.jpg --size 960 --out pictures

Beside each image: its patch tokens' first three principal components as red, green and blue, then
where each head of the last class-attention layer looks. The code: ssl_xcit/report/visualize.py.
"""

import sys

from ssl_xcit.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["visualize"](sys.argv[1:])
