"""Get ready what training and testing read: public lists, pairs made of downloaded clips, the built-in data.

    python prepare_data.py metadata                              fetch the lists and annotations into metadata/
    python prepare_data.py metadata --from /path/to/copies       take them from a folder instead
    python prepare_data.py clips /path/to/videos --out pairs     videos -> pairs/frames/<id>.jpg, pairs/audio/<id>.wav
    python prepare_data.py shards --train_data_path pairs --out packed       pairs -> a few large files and an index
    python prepare_data.py check --testset vggss                 is it complete and whole? One table
    python prepare_data.py synthetic                             make the built-in data in data/synthetic
    python prepare_data.py synthetic --video                     make the built-in films in data/synthetic_video

`--help` after a sub-command lists its flags.
"""

from collections.abc import Sequence

import prepare.check as prepare_check
import prepare.clips as prepare_clips
import prepare.metadata as prepare_metadata
import prepare.shards as prepare_shards
import synthetic.command as synthetic_command
from utils import ArgumentParser, run_cli

COMMANDS = {
    "metadata": (prepare_metadata, "fetch the public lists and annotations, each checked against its checksum"),
    "clips": (prepare_clips, "turn a folder of downloaded clips into pairs of image and audio"),
    "shards": (prepare_shards, "pack the pairs of a training set into WebDataset shards, with an index"),
    "check": (
        prepare_check,
        "decode every pair of a set and say what is missing, broken, silent, repeated, overlapping",
    ),
    "synthetic": (synthetic_command, "make the built-in data: drawn objects of ten kinds, each with its sound"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Fetch public lists, turn clips into pairs, check data, make data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + "."))
    args = parser.parse_args(arguments)
    COMMANDS[args.command][0].run(args)


if __name__ == "__main__":
    run_cli(main)
