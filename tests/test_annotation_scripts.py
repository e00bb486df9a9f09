"What annotation stages hand to a cluster, looked at without one: shipped plans, memory, the container of a server, and the scripts, carried out with a stand-in for srun"
import os
import stat
import subprocess
import sys

import pytest

from post_training import cli
from post_training import config
from post_training.core.files import UserError
from post_training.launch import plan
from post_training.launch import slurm

CLARIDEN = ["cluster=clariden", "cluster.account=a", "cluster.environment=e"]
LARGE = ["model=apertus-70b", "dataset_args.dataset_name=rows", *CLARIDEN]
SRUN = """#!/bin/bash
echo "srun $*" >> {told}
while [[ $1 == --* ]]; do
  [[ $1 != --output=* ]] || exec >"${1#*=}" 2>&1
  shift
done
exec "$@"
"""
PYTHON = """#!/bin/bash
echo "python $*" >> {told}
case "$*" in *--ask) exit {asked} ;; *--array) exit 0 ;; *) echo {told}.model ;; esac
"""
SERVER = """
import socketserver, sys
class Answer(socketserver.BaseRequestHandler):
    def handle(self): self.request.recv(999); self.request.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
socketserver.ThreadingTCPServer.allow_reuse_address = True
with socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[1])), Answer) as s: s.serve_forever() # a client that says nothing holds up no other
"""


@pytest.mark.parametrize("name", ["annotate", "pipeline", "three-stages", "preference-apertus-8b"])
@pytest.mark.parametrize("where", [["cluster=slurm"], CLARIDEN], ids=["slurm", "clariden"])
def test_shipped_plans_compose_for_gpus(name, where, tmp_root, capsys):
    assert cli.main(["plan", name, "--dry-run", *where]) == 0, capsys.readouterr().err
    assert os.listdir(tmp_root) == []


def test_plan_with_a_server(tmp_root):
    "The server has its own environment, four copies of the model, and words that arrive as they are"
    made = plan.load_plan("preference-apertus-8b", CLARIDEN)
    assert [s.stage for s in made.stages] == [s for s in config.SHARD_STAGES if s != "rejection_sample"]
    cfg = made.runs["completions"][0].composed.cfg
    text = slurm.shards_script(cfg, "submit.yaml", "run", "n")
    [step] = [line for line in text.splitlines() if "vllm serve" in line]
    assert "--environment=vllm " in step and "--container-workdir" not in step and '--port "$port" --tensor-parallel-size 1 --data-parallel-size 4 ' in step
    assert text.count("--environment=vllm") == 1 and "step() { srun --export=ALL --cpus-per-task=288 --environment=e " in text
    assert slurm.tasks_of(cfg) == 8 and slurm.config_warnings(cfg) == []


def test_container_of_a_server_is_no_part_of_a_run():
    words = ["ref_completions", *LARGE, "tensor_parallel_size=2", "backend=server", "server.command=[serve]"]
    cfgs = [config.compose(words[0], [*words[1:], *more]).cfg for more in ([], ["server.container_image=/i.sqsh", "server.container_mounts=[/m]", "server.environment=v"])]
    assert len({slurm.run_folder(c) for c in cfgs}) == 1


@pytest.mark.parametrize("stage, more, says", [
    ("ref_logprobs", [], "131.5 GiB, and a worker has 1 gh200 of 95.6 GiB. Set tensor_parallel_size=2."),
    ("ref_completions", ["backend=server", "server.command=[vllm,'{tensor_parallel_size}']"], "Set tensor_parallel_size=2."),
    ("ref_logprobs", ["cluster.gpu=a100-40gb", "tensor_parallel_size=3", "cluster.gpus_per_node=4"], "a worker has 3 a100-40gb of 40 GiB. Set tensor_parallel_size=4."),
    ("ref_completions", ["cluster.gpu=a100-40gb", "cluster.gpus_per_node=2"], "a node has 2: use a server on several nodes")])
def test_a_model_that_cannot_fit(stage, more, says, tmp_root, capsys):
    "Refused by the dry run, by a submission, and in a plan"
    words = [*LARGE, *more]
    assert cli.main([stage, *words, "--dry-run"]) == 2 and says in capsys.readouterr().err
    with pytest.raises(UserError) as e: slurm.emit(config.compose(stage, words))
    assert says in str(e.value)
    (tmp_root / "p.yaml").write_text(f"name: p\nstages: [{{name: big, stage: {stage}}}]\n")
    assert cli.main(["plan", str(tmp_root / "p.yaml"), *words, "--dry-run"]) == 2
    assert says in (err := capsys.readouterr().err) and "stage big: " in err and os.listdir(tmp_root) == ["p.yaml"]


def test_models_that_fit_or_are_not_known(tmp_root, capsys):
    for more in (["tensor_parallel_size=2"], ["model=apertus-8b"], ["model=apertus-8b-sft"], ["cluster.gpu=null"]):
        assert cli.main(["ref_logprobs", *LARGE, *more, "--dry-run"]) == 0, more
        assert ("weights of a worker's model" in capsys.readouterr().out) == (more != ["model=apertus-8b-sft"])
    cfg = config.compose("ref_logprobs", [*LARGE, "tensor_parallel_size=2", "shards.number=8"]).cfg
    assert (slurm.shard_workers_of(cfg), slurm.tasks_of(cfg)) == (2, 4)
    quantized = config.compose("ref_completions", [*LARGE, "backend=server", "server.command=[vllm,'{tensor_parallel_size}',--quantization,fp8]"]).cfg
    assert slurm.shard_worker_weights(quantized) is None


def test_reward_model_on_one_gpu(tmp_root):
    words = ["reward_model=skywork-v2-llama3-8b", "dataset_args.dataset_name=rows", *CLARIDEN]
    cfg = config.compose("ref_rewards", [*words, "reward_args.model_name_or_path=meta-llama/Llama-3.1-70B"]).cfg
    with pytest.raises(UserError, match="A reward model must fit on one GPU"): slurm.check_weights_fit_gpus(cfg)
    small = config.compose("ref_rewards", [*words, "reward_args.model_name_or_path=meta-llama/Llama-3.1-8B"]).cfg
    assert slurm.shard_worker_weights(small)["gib"] == pytest.approx((8_030_261_248 - 128256 * 4096) * 2 / 2**30, rel=1e-4)


def test_nothing_of_training_where_nothing_is_trained():
    "The record's job of an annotation stage, and data stages: the recipe alone, and no GPU"
    for stage, more in (("ref_logprobs", LARGE[1:] + ["model=apertus-8b"]), ("dataset_mixture", CLARIDEN)):
        text = slurm.job_script(config.compose(stage, more).cfg, ["/r/submit.yaml"], "/r", "n", "/r/submit.sbatch")
        assert "launch.job run" in text and "launch.job settle" in text
        assert not [w for w in ("accelerate", "preflight", f"post_training.{stage}", "MAIN_PORT", "/ready", "gpus", "gres") if w in text]
    for requeue in ("true", "false"):
        text = slurm.job_script(config.compose("train_sft", ["cluster=slurm", "cluster.gpus_per_node=1", f"cluster.requeue={requeue}"]).cfg, ["/r/submit.yaml"], "/r", "n", "/r/submit.sbatch")
        assert all(w in text for w in ("accelerate.commands.launch", "post_training.launch.preflight", "MAIN_PORT", "-m post_training.train_sft", "/ready"))


@pytest.fixture
def task(tmp_path):
    "Carries out the script of a task, with stand-ins for srun, scontrol and python"
    def go(asked, model, job=4242):
        told, bins = tmp_path / "told", tmp_path / "bin"
        bins.mkdir()
        programs = dict(srun=SRUN, python=PYTHON, scontrol="#!/bin/bash\n")
        for name, text in programs.items():
            (bins / name).write_text(text.replace("{told}", str(told)).replace("{asked}", str(asked)))
            (bins / name).chmod(0o755)
        (tmp_path / "server.py").write_text(SERVER)
        words = ["cluster=slurm", "cluster.device=cuda", f"cluster.python={bins}/python", "dataset_args.dataset_name=rows", f"model_args.model_name_or_path={model}", "backend=server",
                 f"server.command=[{sys.executable},{tmp_path}/server.py,'{{port}}','{{model}}']", "cluster.max_retries=0", "server.start_seconds=100"]
        script = tmp_path / "shards.sbatch"
        script.write_text(slurm.shards_script(config.compose("ref_completions", words).cfg, "submit.yaml", tmp_path, "n"))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        env = os.environ | dict(PATH=f"{bins}{os.pathsep}{os.environ['PATH']}", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_JOB_ID="7", SLURM_JOB_ID=str(job), SLURM_JOB_NODELIST="n")
        log = tmp_path / "slurm-7_0.out"
        with open(log, "w") as out: done = subprocess.run(["bash", script], env=env, stdout=out, stderr=out, text=True, timeout=180)
        assert stat.S_IMODE(log.stat().st_mode) == 0o600  # whatever the programs printed
        steps = [line for line in told.read_text().splitlines() if line.startswith("srun")]
        return done.returncode, (tmp_path / "array/7/0.end").read_text().strip(), steps, log.read_text()
    return go


@pytest.mark.parametrize("asked, code, end", [(3, 0, "0 no work is left for this task"), (2, 2, "2 a mistake that would come again"), (1, 1, "1 ended with 1, try 1 (cluster.max_retries=0)")])
def test_a_task_without_work_starts_no_server(task, asked, code, end):
    returned, why, steps, said = task(asked, "swiss-ai/Apertus-8B-2509")
    assert (returned, why) == (code, end), said
    assert len(steps) == 1 and steps[0].endswith("submit.yaml --array --ask"), steps


@pytest.mark.parametrize("model", ["swiss-ai/Apertus-8B-2509", "run:x"])
def test_a_task_with_work(task, model, tmp_path):
    "Asked, served, worked, in this order; a run's checkpoint is looked up only then"
    returned, why, steps, said = task(0, model, job=os.getpid())
    assert (returned, why) == (0, "0 done"), said
    of = [s for s in steps if "server.py" in s]
    assert "--ask" in steps[0] and len(of) == 1 and "bash -c" in steps[-1] and len(steps) == 3 + (model == "run:x")
    assert of[0].endswith(f"{tmp_path}/told.model" if model == "run:x" else model)
