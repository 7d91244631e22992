"""Where the sound comes from, in images and films of one's own, without a box.

python localize.py film.mp4 --checkpoint checkpoints/demo.pth --out maps
python localize.py photo.jpg --sound dog.wav --checkpoint checkpoints/demo.pth --out maps
python localize.py /path/to/folder --checkpoint checkpoints/demo.pth --out maps
"""

from film.localizer import Box, Localizer, Peak, Step

__all__ = ["Box", "Localizer", "Peak", "Step"]
