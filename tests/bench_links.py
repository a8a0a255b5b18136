"""By hand, as root: is a step between two hosts as long as `hcsdl bench scale` predicts? Over links of several speeds.

    python -m tests.bench_links <folder> [Gbit/s,Gbit/s,…] [settings of `hcsdl bench scale`]

Two hosts in network namespaces with one rank × one thread each, the link between them shaped by `tc tbf`; prediction and real steps interleaved. For
every speed the folder gets one of its own with the benchmark's results. Latency is that of a veth pair: it cannot be shaped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.namespaces import two_hosts
from tests.runs import environment

PORT = "29517"
SETTINGS = [
    "bench.verify=true", "bench.bandwidth_gbit_s=null", "bench.latency_us=null", "bench.ranks_per_node=null", "bench.cores_per_rank=null",
    "bench.mini_batch=null", "bench.core_speed=[1]", "bench.network_efficiency=[1]", "bench.nodes=[2]", "bench.mini_batches=[2]",
    "machine.threads_per_rank=1", "machine.pin=false",
]  # fmt: skip


def measure(gbit_per_s: float, output: Path, words: list[str]) -> int:
    """Run the benchmark over one rank on each of two hosts; return the worse exit code."""
    with two_hosts() as hosts:
        for rank, host in enumerate(hosts):
            host.shape(f"{round(gbit_per_s * 1000)}mbit")
            who = {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            host.start([sys.executable, "-m", "hcsdl", "bench", "scale", *SETTINGS, f"bench.output={output}", *words], environment() | who)
        return max(host.processes[0].wait() for host in hosts)


def main() -> int:
    """Measure and print every speed."""
    folder, rest = Path(sys.argv[1]), sys.argv[2:]
    speeds = rest.pop(0) if rest and "=" not in rest[0] else "2,0.5,0.1"
    worst = 0
    for speed in map(float, speeds.split(",")):
        print(f"link of {speed:g} Gbit/s", flush=True)
        worst = max(worst, measure(speed, folder / f"{speed:g}_gbit_s", rest))
    return worst


if __name__ == "__main__":
    sys.exit(main())
