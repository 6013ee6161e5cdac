"""Is each thing in its place: what may stand where, what imports what, how long a file is, which flags a script declares?"""

import ast
import graphlib
import importlib.util
import re
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parents[1]
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

SCRIPTS = ("grpo", "repo", "luffy", "prefixrl", "sft")
TOP_LEVEL = {f"{name}.py" for name in (*SCRIPTS, "eval", "common")}
METHODS = re.compile(r"failure_threshold|num_off_policy|prefix_len|rephrase")
CHANGED_LINES = {"repo": 80, "prefixrl": 65, "luffy": 50}  # at most, against grpo.py, docstring aside


def sources():
    """{path relative to the repository: text} of scripts, common.py and engine/."""
    return {str(path.relative_to(ROOT)): path.read_text() for pattern in ("*.py", "engine/*.py") for path in sorted(ROOT.glob(pattern))}


def imports(path, text):
    """The modules of this project that a file imports, as "common", "engine", "engine.data" or the name of a script."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:  # inside engine/
            found |= {f"engine.{node.module}"} if node.module else {f"engine.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" if node.module == "engine" else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] in {"engine", "common", "eval", *SCRIPTS}}


def misplaced(files):
    """Python files at the top level that do not belong there."""
    return [f"{path} does not belong at the top level" for path in files if "/" not in path and path not in TOP_LEVEL]


def wrong_imports(files):
    """A script imports common and engine only; common imports engine; engine imports neither, and no circle."""
    wrong, graph = [], {}
    for path, text in files.items():
        names = imports(path, text)
        allowed = {"engine"} | ({"common"} if path != "common.py" else set()) if "/" not in path else {"engine"}
        wrong += [f"{path} imports {name}" for name in names if name.split(".")[0] not in allowed]
        if path.startswith("engine/") and not path.endswith("__init__.py"):
            module = path.removesuffix(".py").replace("/", ".")
            graph[module] = {name if f"{name.replace('.', '/')}.py" in files else "engine" for name in names} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"circle: {' -> '.join(error.args[1])}")
    return wrong


def too_long(files):
    """Files that a reader would not read to the end."""
    limits = {"grpo.py": 200, "sft.py": 140, "common.py": 400}
    lengths = {path: len(text.splitlines()) for path, text in files.items()}
    wrong = [f"{path} has {length} lines" for path, length in lengths.items() if length > limits.get(path, 300)]
    for name, most in CHANGED_LINES.items():
        changed = sum(len(hunk.changed(sign)) for hunk in build.hunks(files["grpo.py"], files[f"{name}.py"]) for sign in "+-")
        wrong += [f"{name}.py changes {changed} lines of grpo.py"] if changed > most else []
    return wrong


def named_methods(files):
    """Words of a method in the machine; the built-in tasks have an instruction to rephrase."""
    return [f"{path} says {METHODS.search(text)[0]}" for path, text in files.items()
            if path.startswith("engine/") and path != "engine/tasks.py" and METHODS.search(text)]


def unread_flags(files):
    """Flags that a script declares and neither reads in its own text nor takes over from the engine with another default."""
    wrong, inherited = [], set(re.findall(r"^    (\w+): ", files["engine/flags.py"], re.MULTILINE))
    for name in SCRIPTS:
        text = files[f"{name}.py"]
        declared = re.search(r"^class Args.*?(?=^\w)", text, re.MULTILINE | re.DOTALL)[0]
        wrong += [f"{name}.py declares --{flag} and does not read it" for flag in re.findall(r"^    (\w+): ", declared, re.MULTILINE)
                  if flag not in inherited and not re.search(rf"\bargs\.{flag}\b", text)]
    return wrong


RULES = (misplaced, wrong_imports, too_long, named_methods, unread_flags)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    assert rule(sources()) == []


@pytest.mark.parametrize("rule, path, old, new, complaint", [
    (misplaced, "helpers.py", "", "", "helpers.py does not belong at the top level"),
    (wrong_imports, "repo.py", "import common\n", "import common\nimport grpo\n", "repo.py imports grpo"),
    (wrong_imports, "common.py", "from engine import", "import eval\nfrom engine import", "common.py imports eval"),
    (wrong_imports, "engine/files.py", "import json\n", "import json\nimport common\n", "engine/files.py imports common"),
    (wrong_imports, "engine/files.py", "import json\n", "import json\nfrom grpo import Args\n", "engine/files.py imports grpo"),
    (wrong_imports, "engine/errors.py", "class BadArgument", "from .files import lock\nclass BadArgument", "circle: "),
    (wrong_imports, "engine/data.py", "import json\n", "import json\nfrom . import run\n", "circle: "),
    (too_long, "engine/data.py", "import json\n", "import json\n" + "\n" * 200, "engine/data.py has"),
    (too_long, "common.py", "import math\n", "import math\n" + "\n" * 100, "common.py has"),
    (too_long, "grpo.py", "import torch\n", "import torch\n" + "\n" * 50, "grpo.py has"),
    (too_long, "sft.py", "import torch\n", "import torch\n" + "\n" * 100, "sft.py has"),
    (too_long, "luffy.py", "import torch\n", "import torch\n" + "\n" * 20, "luffy.py changes"),
    (named_methods, "engine/run.py", "import torch\n", "import torch  # rephrase\n", "engine/run.py says rephrase"),
    (named_methods, "engine/dry_run.py", "import torch\n", "import torch  # num_off_policy\n", "engine/dry_run.py says num_off_policy"),
    (unread_flags, "luffy.py", "    # loss\n", "    # loss\n    unused: int = 0\n", "luffy.py declares --unused and does not read it"),
    (unread_flags, "repo.py", "args.raw_trace", "False", "repo.py declares --raw_trace and does not read it"),
])
def test_each_rule_sees_when_it_is_broken(rule, path, old, new, complaint):
    files = sources()
    assert old in files.get(path, ""), "the test itself is out of date"
    files[path] = files.get(path, "").replace(old, new)
    assert any(wrong.startswith(complaint) for wrong in rule(files)), rule(files)


def test_the_readme_is_two_screens():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140 and len(text.split()) <= 1500
