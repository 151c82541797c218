"""Writes requirements with hashes from a report of pip: `python -m tools.lock REPORT.json requirements.lock`.

`make lock` asks pip what it would install with constraints.txt on this system, with this Python.
"""

import json
import sys
from pathlib import Path

HEAD = """\
# What `make lock` writes: constraints.txt with hashes, for the Python and the system below. `make audit` reads it.
# pip install --require-hashes --requirement requirements.lock
"""


def main() -> None:
    report, lock = map(Path, sys.argv[1:])
    content = json.loads(report.read_text())
    of = content["environment"]
    lines = [f"# Python {of['python_version']}, {of['sys_platform']}, {of['platform_machine']}\n"]
    for entry in sorted(content["install"], key=lambda entry: entry["metadata"]["name"].lower()):
        hashes = entry["download_info"].get("archive_info", {}).get("hashes")
        if hashes:  # the project itself has none
            metadata = entry["metadata"]
            lines.append(f"{metadata['name']}=={metadata['version']} --hash=sha256:{hashes['sha256']}\n")
    lock.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
