"""A page for trying models on clips, images and sounds of one's own.

    make web
    python -m web.app --port 7860

It listens to this computer alone unless --host says otherwise, keeps files in a temporary folder that it removes when
it ends, and asks nothing of any other computer.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read with torch: threads that wait soon leave drawing the processor

import signal
import tempfile
from pathlib import Path

from utils import ArgumentParser, UserError, add_boolean, number, run_cli

QUIET = {  # no statistics, no question for a newer version, no download
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
LARGEST_FILE = "200mb"


def parse_args():
    parser = ArgumentParser(description="A page for trying models on clips, images and sounds of one's own.")
    parser.add_argument(
        "--model_dir", type=Path, default=Path("checkpoints"), help="folder of the checkpoints to offer"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; another one opens it to the network")
    parser.add_argument("--port", type=number(int, low=0, high=65535), default=7860, help="port; 0: any that is free")
    add_boolean(parser, "--share", "open it to the internet through a server of Gradio's: everybody with the link")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):  # either ends it in order: its files are removed
        signal.signal(ending, signal.default_int_handler)
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="sound_source_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError("the page needs Gradio: pip install -r requirements-web.txt") from error
        serve(args, Path(folder))


def serve(args, folder: Path) -> None:
    from web.examples import make_examples
    from web.models import Models
    from web.page import CSS, HEAD, THEME, build_page

    models, work = Models(args.model_dir), folder / "made"
    work.mkdir()
    if args.share or args.host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: others can reach this page, and send it files")
    page = build_page(models, work, make_examples(folder))
    try:
        page.launch(
            server_name=args.host, server_port=args.port or None, share=args.share, max_file_size=LARGEST_FILE,
            theme=THEME, css=CSS, head=HEAD, ssr_mode=False, show_error=False, enable_monitoring=False,
            pwa=False, mcp_server=False, quiet=False,
        )  # fmt: skip
    finally:
        page.close()


if __name__ == "__main__":
    run_cli(main)
