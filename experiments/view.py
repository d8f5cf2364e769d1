"""Shows the trees of a run: one page for a browser, in one file.

    python -m experiments.view --workdir=runs/mine
    python -m experiments.view --workdir=runs/mine --compare=runs/other --serve

Pick a training step and a problem: its responses with their branches, every step coloured by how
much later steps look back at it (FCI), values and advantages, right and wrong ends, and the text of
any path. The file needs no network and nothing beside it. A run under way may be looked at.
"""

from __future__ import annotations

import argparse
import http.server
from pathlib import Path

import jax
from absl import logging

from experiments import commands
from experiments.terminal import make_console, working
from experiments.viewer.attention import Attention, attention_of
from experiments.viewer.page import Page, build_page, write_page
from experiments.viewer.recorded import ViewError, open_run

MIB = 2**20


def view(
    workdir: str | Path,
    out: str | Path,
    *,
    compare: str | Path | None = None,
    max_bytes: int = 20 * MIB,
    attention: int = 0,
) -> Page:
    """Writes the page of a run.

    Args:
      workdir: run folder.
      out: file to write.
      compare: another run folder, whose trees of the same problems stand below.
      max_bytes: of the file.
      attention: of so many of the newest steps attention is computed from the newest checkpoint,
        and shown as maps.

    Raises:
      ViewError: a folder that is no run, has no trees, or none that can be shown.
      ValueError: `max_bytes` has no room for a step.
    """
    runs = [open_run(folder) for folder in (workdir, compare) if folder is not None]
    attentions: dict[tuple[int, int, int], Attention] = {}
    if attention:
        attentions = dict(attention_of(runs[0], attention))
    page = build_page(runs, max_bytes, attentions)
    write_page(page, Path(out))
    return page


def serve(path: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of one file, for this machine alone: no other file, no other address.

    Args:
      path: of the page.
      port: 0 takes a free one.

    Returns:
      the server, bound and not yet serving.

    Raises:
      ViewError: the port is taken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ViewError(f"port {port} cannot be had ({error.strerror}); give another") from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on; got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a number from 0 to 65535; got {text!r}")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0; got {text!r}")
    return size


def main(arguments: argparse.Namespace) -> None:
    console = make_console(arguments.quiet)
    out = arguments.out or arguments.workdir / "view.html"
    with working(console, "reading trees"):
        page = view(
            arguments.workdir, out, compare=arguments.compare,
            max_bytes=round(arguments.max_mb * MIB), attention=arguments.attention,
        )  # fmt: skip
    size = out.stat().st_size / MIB
    print(f"{out}: {page.shown} training steps, {size:.1f} MiB")
    if page.shown < page.recorded:
        print(
            f"{page.recorded - page.shown} of {page.recorded} steps are left out, evenly: --max-mb "
            f"is {arguments.max_mb:g}"
        )
    if arguments.serve:
        with serve(out, arguments.port) as server:
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            print(f"{address} shows it until Ctrl-C", flush=True)
            server.serve_forever()


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = commands.parser(__doc__, "view")
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN", help="another run, to compare the same problems"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: RUN/view.html)"
    )
    parser.add_argument(
        "--attention",
        type=_count,
        default=0,
        metavar="N",
        help="compute attention between steps for the newest N training steps, by the parameters "
        "of the newest checkpoint (default: 0)",
    )
    parser.add_argument(
        "--max-mb", type=_size, default=20.0, metavar="MB", help="size of the file, at most, MiB "
        "(default: 20); where more was recorded, an even subset of the steps is shown",
    )  # fmt: skip
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine")
    parser.add_argument("--port", type=_port, default=0, help="of --serve (default: a free one)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    # The accelerator may be at work for the run.
    jax.config.update("jax_platforms", "cpu")
    commands.guarded(main, arguments, "give the same command again")


if __name__ == "__main__":
    command()
