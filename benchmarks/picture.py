"""Takes the picture of a report that README shows: `python -m benchmarks.picture runs/…`

It draws the report of the run and has Chromium, without a window, take a picture of its first screen.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from eval.report import write_run_report
from loop.guard.process import RunError, exit_codes
from loop.recipe import ROOT

IMAGE = ROOT / "docs" / "images" / "report.png"
SIZE = "1180,960"  # width and height in pixels
MOST_BYTES = 300_000
TIMEOUT = 60.0  # seconds that the browser may take


def take_picture(run: Path, image: Path) -> None:
    """Writes the first screen of the run's page as PNG. Raises RunError when the browser fails."""
    with tempfile.TemporaryDirectory() as folder:
        write_run_report([run], Path(folder))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}"]
        picture = Path(folder) / "report.png"
        page = (Path(folder) / "report.html").as_uri()
        command = [_browser(), *options, f"--user-data-dir={folder}/profile", f"--screenshot={picture}", page]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if not picture.is_file():
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise RunError(f"{command[0]} took no picture; it said: {said[0]}")
        size = picture.stat().st_size
        if size > MOST_BYTES:
            raise RunError(f"the picture has {size:,} bytes, and README's may have {MOST_BYTES:,}.")
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, image)
    print(f"{image}: {size:,} bytes")


def _browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        raise UserError("no browser is installed that could take the picture. Install Debian's package chromium.")
    return found


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with an evaluation")
    parser.add_argument("--image", type=Path, default=IMAGE, help="file to write (default docs/images/report.png)")
    args = parser.parse_args(argv)
    if not (args.run / "eval.json").is_file():
        raise UserError(f"{args.run}: has no eval.json, so the picture would show no accuracy. Evaluate the run first.")
    take_picture(args.run, args.image)


if __name__ == "__main__":
    main(sys.argv[1:])
