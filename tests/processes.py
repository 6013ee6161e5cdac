"""Processes of the tests, forked from one that has imported torch, transformers and the scripts: a start costs no import.

A forked process has its own arguments, folder, environment and streams, and its script is `__main__`. Ranks get the variables of torchrun.
Runs end without report.html.
"torchrun" in place of a script is torchrun itself, whose ranks are forked as well.
What depends on the start itself is tested with real processes: imports, and variables that torch reads at its import.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = (  # what a run imports, at its start or later
    "grpo", "repo", "luffy", "prefixrl", "sft", "eval", "torch._dynamo", "torch.distributed.fsdp", "transformers.conversion_mapping",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.run", "transformers.generation",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.tokenization_utils_tokenizers",
    "huggingface_hub.hf_file_system", "engine.report", "peft")


def become(words, folder, variables, streams):
    """Turn this forked process into `python *words`, up to the end of its script. To take down what was imported would cost a second."""
    os.chdir(folder)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    importlib.import_module("engine.report").write_report = lambda folders: None  # it takes longer than a step
    code = 0
    try:
        if words[0] == "torchrun":
            torchrun(words[1:])
        elif words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else stop.code is not None
    except BaseException:
        traceback.print_exc()
        code = 1
    if "TAKE_DOWN" in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def torchrun(words):
    """torchrun's own main, whose ranks become what they should start in place of an exec."""
    def forked(args, env, **options):
        def rank():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)  # not torchrun's handlers
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as an exec does, for which subprocess waits
            become([*args[2:]], os.getcwd(), env, [os.devnull, "/dev/fd/1", "/dev/fd/2"])

        return subprocess.Popen(args, env=env, preexec_fn=rank, **options)

    importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler").Popen = forked
    sys.modules["torch.distributed.run"].main(words)


def import_all():
    """Import what children need, and let their garbage collection leave the shared pages alone."""
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # an optional package
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()


def serve(listener):
    """The process that forks, until its standard input ends. A connection asks one question, ["start", [words, folder, variables, streams]
    of each rank] or ["poll", process], and is told the processes, or null while a process runs and then its status."""
    import_all()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        with listener.accept()[0] as connection, connection.makefile("rw") as stream:
            command, what = json.loads(stream.readline())
            if command == "start":
                answer = []
                for start in what:
                    answer.append(os.fork())
                    if answer[-1] == 0:
                        become(*start)
            else:
                pid, status = os.waitpid(what, os.WNOHANG)
                answer = status if pid else None
            print(json.dumps(answer), file=stream)
    os._exit(0)


class Processes:
    """The processes that one of pytest's has asked for, and the forking process, if it is this one's."""

    def __init__(self):
        self.server, self.started, self.folder = None, 0, tempfile.TemporaryDirectory()
        atexit.register(self.close)

    def start_server(self):
        """Start the forking process, which this process's own children, as pytest-xdist's workers, share."""
        path, address = os.pathsep.join([str(ROOT), str(ROOT / "bench")]), f"{self.folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:  # connections wait in it until the process has imported all
            listener.bind(address)
            listener.listen()
            self.server = subprocess.Popen([sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()],
                                           stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                           env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        os.environ["FORKING_PROCESS"] = address

    def ask(self, *question):
        if "FORKING_PROCESS" not in os.environ:
            self.start_server()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ["FORKING_PROCESS"])
            with connection.makefile("rw") as stream:
                print(json.dumps(question), file=stream, flush=True)
                return json.loads(stream.readline())

    def start(self, *words, cwd=ROOT, ranks=0, **variables):
        """Start `python *words`, alone or as that many ranks of torchrun; returns a Forked. The first word: a script's path, or -c."""
        self.started += 1
        first, *words = map(str, words)
        words = [str(ROOT / first) if (ROOT / first).is_file() else first, *words]
        streams = [os.devnull, *(f"{self.folder.name}/{self.started}.{name}" for name in ("out", "err"))]
        for path in streams[1:]:
            Path(path).touch()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        if ranks:
            variables |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()),
                          "TORCHELASTIC_RUN_ID": "test"}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]
        return Forked(self, self.ask("start", [[words, str(cwd), variables | each, streams] for each in own]), *streams[1:])

    def run(self, *words, **options):
        """`start`, and wait for its end."""
        started = self.start(*words, **options)
        started.wait()
        return started

    def close(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server = None
        self.folder.cleanup()


class Forked:
    """One process, or one a rank; like subprocess.Popen."""

    def __init__(self, processes, pids, out, err):
        self.processes, self.pids, self.out, self.err = processes, pids, out, err
        self.codes = [None] * len(pids)

    def poll(self):
        """None while a rank runs; then 0, minus the signal that ended one, or the code of a rank that failed."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                status = self.processes.ask("poll", pid)
                self.codes[rank] = None if status is None else os.waitstatus_to_exitcode(status)
        return None if None in self.codes else min(self.codes, key=lambda code: (code >= 0, code == 0))

    def wait(self, timeout=300):
        """Wait for the end of all ranks; returns what `poll` does."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s: {self.stderr}")
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        """Send a signal to all ranks that run."""
        for code, pid in zip(self.codes, self.pids):
            if code is None:
                os.kill(pid, number)

    @property
    def returncode(self):
        return self.poll()

    @property
    def stdout(self):
        return Path(self.out).read_text()

    @property
    def stderr(self):
        return Path(self.err).read_text()


def free_port():
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


processes = Processes()
start, run = processes.start, processes.run

if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
