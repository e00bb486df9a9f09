"""Python reads this file at its start where the tests put its folder on PYTHONPATH: `python -m MODULE`, and some commands of `post-training`, become forks
of the session's fork server.

Only for modules that load the large libraries, which takes 2 to 5 seconds of a processor. Without a server, with another interpreter or other settings
of the libraries the module runs as ever (core/fork_server).
"""
import os
import sys

HEAVY = {"accelerate.commands.launch", "post_training.train_sft", "post_training.train_preference", "post_training.stages.preference_data",
         "post_training.launch.preflight", "post_training.evaluation.answers", "post_training.view.dataset"}
COMMANDS = {"inspect", "chat", "certify"}  # of `post-training`, in its own process


def fork_instead(argv):
    "Replace this process by the one that starts a fork and waits for it"
    unbuffered = argv[1:2] == ["-u"]
    words = argv[1 + unbuffered:]
    if os.path.basename(words[0] if words else "") == "post-training" and words[1:2] and words[1] in COMMANDS: words[:1] = ["-m", "post_training"]
    server = os.environ.get("POST_TRAINING_FORK_SERVER", "off")
    heavy = words[1:2] and words[1] in HEAVY or words[1:2] == ["post_training"] and words[2:3] and words[2] in COMMANDS
    if words[:1] != ["-m"] or not heavy or server == "off": return
    if unbuffered: os.environ["PYTHONUNBUFFERED"] = "1"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    program = os.path.join(root, "post_training", "core", "fork_server.py")
    os.execv(sys.executable, [sys.executable, "-I", "-S", program, "run", str(os.getppid()), *words[1:]])


fork_instead(sys.orig_argv)
