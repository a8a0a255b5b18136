"""What stands for `hcsdl` in `tests.forked.on_call`: asks the process at a socket to run the words it is given; ends with their output and exit code."""

import sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as server:
    server.send(sys.argv[2:])
    code, out, err = server.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
