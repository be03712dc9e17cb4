"""Slurm on this one machine: several nodes, all daemons as children of this command, all sockets on loopback.

    python scripts/slurm_here.py [--nodes 2] COMMAND...     runs the command there and ends all of it afterwards

Needs root and Debian's slurm-wlm and munge; neither systemd nor cgroups. The command finds Slurm through SLURM_CONF.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
START_TIMEOUT_S = 30.0
CPUS, CHIPS, MEMORY_MB = 2, 64, 4000

# Sources: slurm.conf(5). linuxproc, task/none and no accounting: nothing here needs cgroups or a database. One machine
# is several nodes by their names and ports.
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} State=UNKNOWN
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def slurm(nodes: int = 2) -> Iterator[dict[str, str]]:
    """Slurm's daemons for as long as this lasts; yields what a command's environment needs besides."""
    host = socket.gethostname().partition(".")[0]
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as name,
        ExitStack() as up,
    ):
        folder = Path(name)
        folder.chmod(0o755)  # munged refuses a socket that others can't reach
        ports = free_ports(nodes + 1)
        lines = [CONF.format(host=host, folder=folder, port=ports[0], cpus=CPUS, memory=MEMORY_MB)]
        lines += [f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n + 1]}\n" for n in range(nodes)]
        lines += [f"PartitionName=here Nodes=n[0-{nodes - 1}] Default=YES MaxTime=INFINITE State=UP\n"]
        (folder / "slurm.conf").write_text("".join(lines))
        for made in ("state", *(f"spool-n{n}" for n in range(nodes))):
            (folder / made).mkdir()
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}

        def start(*command: str) -> None:
            log = up.enter_context((folder / "daemons.log").open("a"))
            ours = os.environ | environment
            up.callback(end, subprocess.Popen(command, env=ours, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

        munge = folder / "munge"
        munge.mkdir()
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        start(
            "munged",
            "--foreground",
            f"--socket={folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        until((folder / "munge.socket").exists, "munged", folder)
        start("slurmctld", "-D", "-c")
        for n in range(nodes):
            start("slurmd", "-D", "-N", f"n{n}")

        def idle() -> bool:
            asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
            done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True)
            return done.stdout.split() == ["idle"] * nodes

        until(idle, f"{nodes} idle nodes", folder)
        try:
            yield environment
        finally:  # a job that still runs would outlive its daemons
            ours = {"env": os.environ | environment, "capture_output": True, "text": True}
            subprocess.run(["scancel", "--user=root"], **ours)
            until(lambda: not subprocess.run(["squeue", "--noheader"], **ours).stdout.strip(), "end of jobs", folder)


def free_ports(count: int) -> list[int]:
    """Given by the system, so above 19999; Ray keeps 10002 to 19999 for its workers."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def until(holds, what: str, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            logs = "".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"no {what} within {START_TIMEOUT_S:.0f} s:\n{logs}")
        time.sleep(0.1)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if missing():
        print(f"slurm_here: {', '.join(missing())} not found: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    begun = time.monotonic()
    with slurm(given.nodes) as environment:
        print(f"slurm_here: {given.nodes} nodes up after {time.monotonic() - begun:.1f} s", file=sys.stderr)
        return subprocess.run(given.command or ["sinfo"], env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
