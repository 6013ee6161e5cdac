"""Carry an edit of grpo.py into the other four scripts, and renumber the tags of their hunks.

    python tests/sync.py           the edit is what grpo.py differs in from the last commit
    python tests/sync.py REV       ... from another commit

Each script is merged like a branch (`git merge-file`); docstrings are left alone. A script in which the edit meets a change of its own
is not touched, and its name is printed: exit code 1. sft.py, which lacks half of grpo.py, keeps its own lines there.
"""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("repo", "luffy", "prefixrl", "sft")
TAG = re.compile(r"\b(\w+)\(\d+/\d+\)")


def split(text):
    """A script as (module docstring, body)."""
    lines = text.splitlines(keepends=True)
    end = ast.parse(text).body[0].end_lineno
    return "".join(lines[:end]), "".join(lines[end:])


def merge(old, new, variant, *options):
    """The variant with the edit from `old` to `new` grpo.py, or None where the edit meets a change of the variant's own.

    options: of `git merge-file`, such as --ours, which lets the variant win there.
    """
    docstring, body = split(variant)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("variant", "old", "new")]
        for file, text in zip(files, (body, split(old)[1], split(new)[1])):
            file.write_text(text)
        merged = subprocess.run(["git", "merge-file", "-p", *options, *files], capture_output=True, text=True)
    return renumber(docstring + merged.stdout) if merged.returncode == 0 else None


def renumber(text):
    """Numbered tags such as RePO(2/7) count from 1 to their number, in the order of the lines."""
    tags = TAG.findall(text)
    numbers = iter(range(1, len(tags) + 1))
    return TAG.sub(lambda tag: f"{tag[1]}({next(numbers)}/{len(tags)})", text)


def main():
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    old = subprocess.run(["git", "show", f"{revision}:grpo.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    failed = []
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        merged = merge(old, (ROOT / "grpo.py").read_text(), path.read_text(), *["--ours"] * (name == "sft"))
        if merged is None:
            failed.append(path.name)
        else:
            path.write_text(merged)
    if failed:
        sys.exit(f"merge by hand: the edit meets changes of {', '.join(failed)}")


if __name__ == "__main__":
    main()
