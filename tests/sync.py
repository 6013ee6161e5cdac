"""Carry an edit of grpo.py into the other four scripts, and an edit of any of the five into its forks in examples/; renumber the tags.

    python tests/sync.py           the edit is what a script differs in from the last commit
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

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from source import FORKS, ROOT, SIBLINGS, VARIANTS, path_of

PARENTS = dict.fromkeys(VARIANTS, "grpo") | FORKS | SIBLINGS  # in this order: a fork of repo.py gets what repo.py has got
TAG = re.compile(r"\b(\w+)\(\d+/\d+\)")


def split(text):
    """A script as (module docstring, body)."""
    lines = text.splitlines(keepends=True)
    end = ast.parse(text).body[0].end_lineno
    return "".join(lines[:end]), "".join(lines[end:])


def merge(old, new, variant, *options):
    """The variant with the edit from `old` to `new` of its parent, or None where the edit meets a change of the variant's own.

    options: of `git merge-file`, such as --ours, which lets the variant win there.
    """
    docstring, body = split(variant)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("variant", "old", "new")]
        for file, text in zip(files, (body, split(old)[1], split(new)[1])):
            file.write_text(text)
        merged = subprocess.run(["git", "merge-file", "-p", *options, *files], capture_output=True, text=True)
    return renumber(docstring + merged.stdout, new) if merged.returncode == 0 else None


def renumber(text, parent=""):
    """Numbered tags such as RePO(2/7) count from 1 to their number, in the order of the lines; the parent's stay as they are."""
    others = set(TAG.findall(parent))
    num = sum(name not in others for name in TAG.findall(text))
    numbers = iter(range(1, num + 1))
    return TAG.sub(lambda tag: tag[0] if tag[1] in others else f"{tag[1]}({next(numbers)}/{num})", text)


def main():
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    failed = []
    for name, parent in PARENTS.items():
        path = path_of(name)
        old = subprocess.run(["git", "show", f"{revision}:{parent}.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        merged = merge(old, path_of(parent).read_text(), path.read_text(), *["--ours"] * (name == "sft"))
        if merged is None:
            failed.append(path.name)
        else:
            path.write_text(merged)
    if failed:
        sys.exit(f"merge by hand: the edit meets changes of {', '.join(failed)}")


if __name__ == "__main__":
    main()
