"""Get ready what training and testing read: the field's public lists, and pairs made of downloaded clips.

    python prepare_data.py metadata                              fetch the lists and annotations into metadata/
    python prepare_data.py metadata --from /path/to/copies       take them from a folder instead
    python prepare_data.py clips /path/to/videos --out pairs     videos -> pairs/frames/<id>.jpg, pairs/audio/<id>.wav
    python prepare_data.py check --testset vggss                 is it complete and whole? One table

`--help` after a sub-command lists its flags.
"""

from collections.abc import Sequence

import prepare.check as prepare_check
import prepare.clips as prepare_clips
import prepare.metadata as prepare_metadata
from utils import ArgumentParser, run_cli

COMMANDS = {
    "metadata": (prepare_metadata, "fetch the public lists and annotations, each checked against its checksum"),
    "clips": (prepare_clips, "turn a folder of downloaded clips into pairs of picture and sound"),
    "check": (
        prepare_check,
        "decode every pair of a set and say what is missing, broken, silent, repeated, overlapping",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Fetch the public lists, turn downloaded clips into pairs, check data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + "."))
    args = parser.parse_args(arguments)
    COMMANDS[args.command][0].run(args)


if __name__ == "__main__":
    run_cli(main)
