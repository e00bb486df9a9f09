"""A real Slurm of several nodes on one machine, for tests: munged, slurmctld and one slurmd per node, all as the present user."""

import contextlib, os, pwd, re, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
SEARCHED = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"  # the daemons are in sbin, which not every user's PATH has
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def missing():
    "Why no Slurm can be started here, as a sentence; '' where it can"
    absent = [n for n in NEEDED if not shutil.which(n, path=SEARCHED)]
    return f"no {', '.join(absent)} here: apt-get install --no-install-recommends slurm-wlm munge" if absent else ""


def free_ports(n):
    "Ports nothing listens on now"
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in socks: s.bind(("", 0))
        return [s.getsockname()[1] for s in socks]


def marked(mark):
    "Processes whose environment at their start had MARK (NAME=VALUE), and all their descendants; this process and its ancestors never"
    env, parent = {}, {}
    for p in Path("/proc").iterdir():
        if not p.name.isdigit(): continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = (p/"stat").read_text().rpartition(")")[2].split()
            if stat[0] == "Z": continue
            parent[int(p.name)] = int(stat[1])
            env[int(p.name)] = (p/"environ").read_bytes().split(b"\0")
    mine, pid = set(), os.getpid()
    while pid: mine.add(pid); pid = parent.get(pid, 0)
    found = {pid for pid, e in env.items() if mark.encode() in e}
    while more := {c for c, p in parent.items() if p in found} - found: found |= more
    return found - mine


def kill_marked(mark, timeout=20.):
    "kill -9 whatever carries a mark until nothing does"
    until = time.monotonic() + timeout
    while left := marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError): os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until: raise RuntimeError(f"still alive: {left}")
        time.sleep(0.05)


class SlurmCluster:
    "Daemons of a test Slurm under a folder; made by `slurm_cluster`"
    def __init__(self, root, nodes=2, cpus=4, memory=64000, gpus=0, cred_expire=5, slurmd_timeout=6, kill_wait=5, settings=None, partitions=None):
        self.root = Path(root).resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.names = [f"n{i}" for i in range(nodes)]
        self.conf, self.mark = self.root/"slurm.conf", f"POST_TRAINING_TEST_SLURM={self.root}"
        self.short = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has at most 107 characters
        self.short.chmod(0o755)                               # and munged wants it reachable for all
        self.ports = dict(zip(["slurmctld", *self.names], free_ports(nodes + 1)))
        self.procs, self.watch = {}, None
        self.settings = dict(cpus=cpus, memory=memory, gpus=gpus, cred_expire=cred_expire, slurmd_timeout=slurmd_timeout, kill_wait=kill_wait,
                             more=settings or {}, partitions=partitions)
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE", "SINFO"))}
        self.env = outer | dict(SLURM_CONF=str(self.conf), PATH=SEARCHED, POST_TRAINING_TEST_SLURM=str(self.root))

    def write_conf(self):
        s, user, host = self.settings, pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0]
        for d in ("state", "log", "spool"):
            if self.conf.exists(): shutil.rmtree(self.root/d, ignore_errors=True)  # an earlier cluster's jobs would be recovered
            (self.root/d).mkdir(exist_ok=True)
        keys = dict(
            ClusterName="test", SlurmctldHost=f"{host}(127.0.0.1)", SlurmUser=user, SlurmdUser=user, SlurmctldPort=self.ports["slurmctld"],
            AuthType="auth/munge", CredType="cred/munge", AuthInfo=f"socket={self.short}/munge.socket,cred_expire={s['cred_expire']}",
            StateSaveLocation=self.root/"state", SlurmdSpoolDir=f"{self.root}/spool/%n",
            SlurmctldPidFile=self.root/"slurmctld.pid", SlurmdPidFile=f"{self.root}/slurmd-%n.pid",
            SlurmctldLogFile=self.root/"log/slurmctld.log", SlurmdLogFile=f"{self.root}/log/%n.log",
            ProctrackType="proctrack/linuxproc", TaskPlugin="task/none", SwitchType="switch/none", MpiDefault="none",
            JobAcctGatherType="jobacct_gather/none", AccountingStorageType="accounting_storage/none",
            JobCompType="jobcomp/filetxt", JobCompLoc=self.root/"log/jobcomp.log",
            SelectType="select/cons_tres", SelectTypeParameters="CR_CPU", SlurmdParameters="config_overrides",
            SchedulerType="sched/backfill", SchedulerParameters="sched_interval=1,bf_interval=1,batch_sched_delay=0",
            SlurmctldTimeout=30, SlurmdTimeout=s["slurmd_timeout"], MessageTimeout=5, InactiveLimit=0, KillWait=s["kill_wait"], MinJobAge=3600, WaitTime=0,
            ReturnToService=2, JobRequeue=1, MailProg="/bin/true", PropagateResourceLimits="NONE") | (dict(GresTypes="gpu") if s["gpus"] else {}) | s["more"]
        lines = [f"{k}={v}" for k, v in keys.items()]
        gres = f" Gres=gpu:{s['gpus']}" * bool(s["gpus"])
        lines += [f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[n]} CPUs={s['cpus']} RealMemory={s['memory']}{gres} State=UNKNOWN" for n in self.names]
        if s["gpus"]: # counted like real ones; any file stands for a device
            for i in range(s["gpus"]): (self.root/f"gpu{i}").touch()
            (self.root/"gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.root}/gpu[0-{s['gpus'] - 1}]\n")
        lines += s["partitions"] or [f"PartitionName=test Nodes={','.join(self.names)} Default=YES MaxTime=60 DefaultTime=10 State=UP"]
        self.conf.write_text("\n".join(lines) + "\n")

    def spawn(self, name, *argv, **env):
        "Start a daemon in the foreground of a session of its own"
        with open(self.root/f"log/{name}.out", "ab") as out:
            self.procs[name] = subprocess.Popen([shutil.which(argv[0], path=SEARCHED), *map(str, argv[1:])], env=self.env | env, stdin=subprocess.DEVNULL,
                                                stdout=out, stderr=out, cwd=self.root, start_new_session=True)

    def start(self, timeout=60):
        self.write_conf()
        # whatever becomes of this process, kill -9 included: when its end of the pipe closes, all is ended
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.stdin.read(); from {Path(__file__).stem} import *; kill_marked({self.mark!r}); shutil.rmtree({str(self.short)!r}, True)"
        self.watch = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
        key = self.root/"munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.spawn("munged", "munged", "--foreground", "--force", f"--socket={self.short}/munge.socket", f"--key-file={key}", f"--pid-file={self.root}/munged.pid",
                   f"--seed-file={self.root}/munged.seed", "--num-threads=2")
        self.until(lambda: (self.short/"munge.socket").exists(), timeout, "munged did not open its socket")
        self.spawn("slurmctld", "slurmctld", "-D", "-f", self.conf)
        for n in self.names: self.start_node(n)
        self.until(self.idle, timeout, "the nodes did not become idle")

    def until(self, done, timeout, what, tick=0.1):
        "Wait for a condition; say what did not happen, with the logs, when it does not or when a daemon ended"
        end = time.monotonic() + timeout
        while not done():
            dead = [n for n, p in self.procs.items() if p.poll() is not None]
            if dead or time.monotonic() > end: raise RuntimeError(f"{what}{f'; ended: {dead}' if dead else ''}\n{self.logs(only=dead)}")
            time.sleep(tick)

    def idle(self):
        if any(s.startswith(("drain", "inval")) for s in self.nodes().values()): raise RuntimeError(f"Slurm refuses a node: {self.run('sinfo', '-R', check=False).stdout}")
        return self.nodes() == dict.fromkeys(self.names, "idle")

    def nodes(self):
        "State by node, as sinfo says it; {} while there is no answer"
        r = self.run("sinfo", "-N", "-h", "-o", "%N %t", check=False)
        return dict(line.split() for line in r.stdout.splitlines()) if r.returncode == 0 else {}

    def run(self, *argv, check=True, timeout=60, env=None, cwd=None):
        "A Slurm command to its end"
        r = subprocess.run(list(map(str, argv)), env=self.env | (env or {}), cwd=cwd or self.root, capture_output=True, text=True, timeout=timeout)
        if check and r.returncode: raise RuntimeError(f"{argv} gave {r.returncode}: {r.stdout}{r.stderr}")
        return r

    def submit(self, script, *args, env=None, cwd=None):
        "sbatch a script (a path, or its text) with options before it; the job's id"
        if isinstance(script, str) and script.startswith("#!"):
            path = self.root/f"job-{time.time_ns()}.sbatch"
            path.write_text(script)
            script = path
        return int(self.run("sbatch", "--parsable", *args, script, env=env, cwd=cwd).stdout.split(";")[0])

    def jobs(self, job):
        "What scontrol tells of a job, one dict for each task of an array; [] once it is forgotten (MinJobAge)"
        r = self.run("scontrol", "-o", "show", "job", job, check=False)
        return [dict(re.split("=", f, maxsplit=1) for f in re.split(r" (?=[A-Z][\w/:]*=)", line.strip())) for line in r.stdout.splitlines() if line.startswith("JobId")]

    def job(self, job):
        found = self.jobs(job)
        return found[0] if found else {}

    def state(self, job): return self.job(job).get("JobState", "")

    def wait(self, job, timeout=60, states=FINISHED):
        "Wait until a job, or each task of an array, has one of these states; its (or the first task's) state"
        states, seen = (states,) if isinstance(states, str) else states, []
        end = time.monotonic() + timeout
        while True:
            seen = [j["JobState"] for j in self.jobs(job)]
            if seen and all(s in states for s in seen): return seen[0]
            if time.monotonic() > end: raise TimeoutError(f"job {job} is {seen} after {timeout} s, not {states}\n{self.job(job)}\n{self.logs()}")
            time.sleep(0.2)

    def start_node(self, n):
        n = self.names[n] if isinstance(n, int) else n
        (self.root/"spool"/n).mkdir(exist_ok=True)
        self.spawn(n, "slurmd", "-D", "-N", n, "-f", self.conf, POST_TRAINING_TEST_NODE=f"{self.root}:{n}")

    def kill_node(self, n, jobs=True):
        "kill -9 a slurmd and, as when a machine dies, everything it started; jobs=False: slurmd alone"
        n = self.names[n] if isinstance(n, int) else n
        p = self.procs.pop(n)
        p.kill(); p.wait()
        if jobs: kill_marked(f"POST_TRAINING_TEST_NODE={self.root}:{n}")

    def restart_node(self, n, timeout=60):
        n = self.names[n] if isinstance(n, int) else n
        if n in self.procs: self.kill_node(n, jobs=False)
        self.start_node(n)
        self.until(lambda: self.nodes().get(n) in ("idle", "mix", "alloc"), timeout, f"{n} did not come back")

    def logs(self, lines=30, only=()):
        "The end of each daemon's log"
        paths = [p for p in sorted((self.root/"log").glob("*")) if p.stat().st_size and not (p.suffix == ".out" and p.with_suffix(".log").exists()) and (not only or p.stem in only)]
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-lines:]) for p in paths)

    def stop(self):
        "End the jobs, the daemons and whatever they started"
        kill_marked(self.mark)
        for p in self.procs.values(): p.wait()
        if self.watch: self.watch.stdin.close(); self.watch.wait()
        shutil.rmtree(self.short, ignore_errors=True)


@contextlib.contextmanager
def slurm_cluster(root, nodes=2, **kwargs):
    "A running Slurm whose files are under `root`; everything it started is gone afterwards"
    cluster = SlurmCluster(root, nodes, **kwargs)
    try:
        cluster.start()
        yield cluster
    finally: cluster.stop()
