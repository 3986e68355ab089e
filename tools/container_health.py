"""Health of a container: when its first process is `owpo serve`, SGLang must answer; whatever else it runs is healthy.

    python tools/container_health.py [--pid 1]

Exit code 0: healthy, 1: not. The Dockerfile's HEALTHCHECK calls it; standard library only, so that it costs little.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path

DEFAULT_PORT = "30000"  # of owpo serve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int, default=1, help="the process that the container is for")
    words = Path(f"/proc/{parser.parse_args().pid}/cmdline").read_text().split("\0")
    if "serve" not in words:
        return 0
    host = _option(words, "--host", "127.0.0.1")
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{_option(words, '--port', DEFAULT_PORT)}/health"
    try:
        with urllib.request.urlopen(url, timeout=8) as answer:
            print(f"{url}: {answer.status}")
            return 0
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}")
        return 1


def _option(words: list[str], name: str, default: str) -> str:
    """Value of `--name value` or `--name=value`; the last one counts, as typer has it."""
    value = default
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


if __name__ == "__main__":
    sys.exit(main())
