"The image and `make env` install by the same script; it says what is missing; the example names no folder of anybody's"
import re
import shutil
import subprocess
import tomllib

import pytest
from conftest import ROOT

FOLDER = ROOT / "container"


def install(tmp_path, python, **env):
    "install.sh with no program on the path but a few, and one interpreter named"
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("bash", "dirname", "grep", "tail"): (bin / name).symlink_to(shutil.which(name))
    return subprocess.run([shutil.which("bash"), FOLDER / "install.sh", "env of mine"], cwd=tmp_path, env={"PATH": str(bin), "PYTHON": str(python), **env},
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_both_install_by_the_same_script():
    rule = re.search(r"^\$\(LOCKED\):\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert "container/install.sh $(VENV)" in rule and "pip" not in rule
    image = (FOLDER / "Containerfile").read_text()
    assert "/container/install.sh /opt/post-training" in image and "pip install" not in image
    assert re.search(r"^ARG BASE=.*\nFROM \$\{BASE\}$", image, re.M)


@pytest.mark.parametrize("caller, how", [({}, "PYTHON=/path/to/python3 container/install.sh"), ({"MAKELEVEL": "1"}, "make PYTHON=/path/to/python3")])
def test_a_missing_or_old_python_is_told(caller, how, tmp_path):
    old = tmp_path / "python of old"
    old.write_text("#!/bin/sh\necho\n")  # as one that is too old answers
    old.chmod(0o755)
    done = install(tmp_path, old, **caller)
    assert done.returncode == 2 and f"(tried: {old} python3.11 " in done.stderr and how in done.stderr
    assert not (tmp_path / "env of mine").exists()


def test_a_failed_installation_shows_the_end_of_its_log(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("""#!/bin/sh
case $* in
  *base_executable*) echo "$0" ;;
  *ensurepip*) ;;
  --version) echo Python 3.11.9 ;;
  "-m venv --clear "*) /bin/mkdir -p "$4/bin"; /bin/cp "$0" "$4/bin/python" ;;
  *) echo "no matching distribution of ${*##* }"; exit 1 ;;
esac
""")
    fake.chmod(0o755)
    done = install(tmp_path, fake)
    assert done.returncode == 1 and "environment: Python 3.11.9 in env of mine" in done.stdout
    assert "the last lines of env of mine/install.log:\nno matching distribution of" in done.stderr


def test_example_of_an_environment():
    text = (FOLDER / "post-training.toml.example").read_text()
    told = tomllib.loads(text)
    assert {"image", "mounts", "workdir"} <= told.keys()
    assert all(path.startswith("${POST_TRAINING_") for mount in [told["image"], told["workdir"], *told["mounts"]] for path in mount.split(":"))


def test_readme_names_files_and_keys_that_exist():
    from post_training import config
    text = (FOLDER / "README.md").read_text()
    assert all((FOLDER / link).exists() for link in re.findall(r"\]\(([\w./-]+)\)", text))
    assert set(re.findall(r"\b(cluster\.\w+)=", text)) <= config.known_keys("train_sft").keys()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(re.findall(r"^ARG (\w+)", (FOLDER / "Containerfile").read_text(), re.M))
