"""Settings of all tests: no test may reach a hub. The fixtures are in shared_fixtures.py."""

import os

import processes

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, here and in child processes, whatever else the machine does
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, but for tests/test_gpu.py


# What an edit of a script breaks first, within a minute: python -m pytest -n 2 -m fast
FAST = {f"test_{name}.py" for name in ("layout", "diff", "equations", "masks", "reward", "repo", "luffy", "prefixrl", "sft", "reduction",
                                     "exercise")}


def pytest_configure(config):
    """The process that starts pytest-xdist's workers runs no test: it needs no torch, and starts what they share."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")
    else:
        processes.processes.start_server()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in FAST:
            item.add_marker("fast")
