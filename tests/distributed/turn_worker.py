"""A worker for `test_workers`: answers with what it was told, or dies."""

import json
import os
import signal
import sys

task = json.loads(sys.argv[1])
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "die":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV if command.get("signal") else 0)
        os._exit(3)
    answer = {
        "task": task,
        "command": command,
        "rank": os.environ["RANK"],
        "environment": dict(os.environ),
        "cpus": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(answer), flush=True)
