"""Writes down what a launched process finds: its environment, arguments, import path and parent.

process-<rank>.json in the folder behind --run_dir.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
    folder.mkdir(exist_ok=True)
    found = {
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "import path": [path for path in sys.path if not path.endswith("_vendor")],  # setuptools adds its own
        "working directory": os.getcwd(),
        "its own session": os.getsid(0) == os.getpid(),
        "parent is python": "python" in Path(f"/proc/{os.getppid()}/cmdline").read_text(),
        "siblings": len(Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()),
        "flags": list(sys.flags),
        "main": [__name__, __file__],
    }
    (folder / f"process-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
