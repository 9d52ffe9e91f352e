"""Starts runs at once: a process that has imported what a script needs, and forks for each start. Its children are real
processes with the script's command line, environment and exit status; what they save is the seconds of the imports.

    python nursery.py      one request a line on stdin, one answer a line on stdout
    {"argv": [script, ...], "env": {...}, "log": path}  -> process id
    {"wait": process id, "seconds": at most}            -> exit status (-9: killed), null: it still runs
"""

import importlib
import json
import os
import pkgutil
import runpy
import sys
import time


def imports():
    """Everything that a start would import sooner or later."""
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.utils.flop_counter  # noqa: F401

    import vit_hf

    for module in pkgutil.walk_packages(vit_hf.__path__, "vit_hf."):
        importlib.import_module(module.name)


def child(request):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    status = 1
    try:
        runpy.run_path(request["argv"][0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exc_info()[0] is not None:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process, seconds):
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def main():
    imports()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
