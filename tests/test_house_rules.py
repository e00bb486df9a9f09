"What the notebooks, recipes, presets and records promise to look like. Style is ruff's, spelling codespell's, imports import-linter's."
import ast
import base64
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from conftest import BIN, ROOT

NBS = ROOT / "nbs"
EXAMPLES = ROOT / "runs" / "examples"
EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)
DIRECTIVE = re.compile(r"^#\|.*$", re.M)
# A folder of somebody's machine, at the start of a path
MACHINE = re.compile(r"(?<![\w./~-])/(?:home|root|work|tmp|Users)/\w")
BAR = re.compile(r"\d+%\|[█▏▎▍▌▋▊▉# ]|\d(?:it|s)/(?:s|it)\b")


def names(paths, root=ROOT):
    return dict(argvalues=sorted(paths), ids=lambda p: str(p.relative_to(root)))


def below(folder, pattern):
    return [p for p in folder.rglob(pattern) if ".ipynb_checkpoints" not in p.parts]


NOTEBOOKS = below(NBS, "*.ipynb")
LIBRARY = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.parent.name)]
RECIPES = sorted((NBS / "recipes").glob("*.ipynb"))
BENCHMARKS = sorted((NBS / "benchmarks").glob("bench_*.ipynb"))
EXPERIMENTS = sorted((NBS / "experiments").glob("*.ipynb"))
MODULES = [p for p in below(ROOT / "post_training", "*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py")]
PRESETS = sorted(p for p in (ROOT / "post_training" / "configs").glob("*/*.yaml") if p.parent.name != "plan")  # plans are composed in test_plan
STAGES = sorted(p.stem for p in (ROOT / "post_training" / "configs").glob("*.yaml") if p.stem != "setup")


@cache
def cells(path, kind="code"):
    "(number, source, cell) of each cell of a kind"
    nb = json.loads(path.read_text())
    return [(i, "".join(c["source"]), c) for i, c in enumerate(nb["cells"]) if c["cell_type"] == kind]


def exported(path):
    return [(i, DIRECTIVE.sub("", src).strip("\n")) for i, src, _ in cells(path) if EXPORT.search(src)]


def module_of(nb):
    "The module of a chapter: NN_wing/N_name.ipynb exports wing.name, and the entry points lie at the root"
    wing, name = nb.parent.name.partition("_")[2], nb.stem.partition("_")[2]
    return name if wing == "entry" else f"{wing}.{name}"


def tags(cell):
    return cell["metadata"].get("tags", [])


# -- library notebooks

@pytest.mark.parametrize("nb", **names(LIBRARY))
def test_name_title_and_module(nb):
    "NN_wing/N_name.ipynb exports wing.name, and begins with a title and a one-line subtitle"
    assert re.fullmatch(r"\d\d?_\w+", nb.stem), "chapters are called NN_wing/N_name.ipynb"
    default_exp = [m[1] for _, src, _ in cells(nb) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", src, re.M)]
    assert default_exp == [module_of(nb)]
    assert (ROOT / "post_training" / f"{module_of(nb).replace('.', '/')}.py").is_file()
    first = cells(nb, "markdown")[0][1].splitlines()
    assert first[0].startswith("# ") and any(line.startswith("> ") for line in first[:4]), "title `# X`, then `> one line`"
    assert not any(line.startswith("- ") for line in first), "nbdev reads a list in the title's cell as front matter: give it a cell of its own"


@pytest.mark.parametrize("nb", **names(LIBRARY))
def test_exported_cells_are_small(nb):
    "One function or class, or constants, or imports; at most 40 lines"
    for i, src in exported(nb):
        lines = [line for line in src.splitlines() if line.strip()]
        assert len(lines) <= 40, f"cell {i} has {len(lines)} lines"
        body = [n for n in ast.parse(src).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        kinds = {"import" if isinstance(n, (ast.Import, ast.ImportFrom)) else
                 "definition" if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else "statement" for n in body}
        assert len(kinds) <= 1, f"cell {i} mixes {', '.join(sorted(kinds))}"
        assert kinds != {"definition"} or len(body) == 1, f"cell {i} defines {', '.join(n.name for n in body)}: one is the limit"


@pytest.mark.parametrize("nb", **names(LIBRARY))
def test_what_is_exported_is_shown(nb):
    "Each public function and class is used in a cell that is not exported, or by a definition of the notebook that is"
    defined = {n.name: ast.unparse(n) for _, src in exported(nb) for n in ast.parse(src).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
               and not any("patch" in ast.unparse(d) for d in n.decorator_list)}
    text = "\n".join(src for _, src, _ in cells(nb) if not EXPORT.search(src))
    shown, grew = set(), True
    while grew:
        new = {name for name in defined.keys() - shown if re.search(rf"\b{name}\b", text)}
        text, shown, grew = "\n".join([text, *(defined[n] for n in new)]), shown | new, bool(new)
    assert not [name for name in sorted(defined.keys() - shown) if not name.startswith("_")], "without an example or a check"


@pytest.mark.parametrize("nb", **names(LIBRARY))
def test_slow_cells_come_last_and_limits_are_told(nb):
    "In each section nothing quick follows a slow cell; the notebook ends with its known limits"
    slow = False
    for i, (kind, src) in enumerate((c["cell_type"], "".join(c["source"])) for c in json.loads(nb.read_text())["cells"]):
        if kind == "markdown" and re.search(r"^#", src, re.M): slow = False
        elif kind == "code":
            here = bool(re.search(r"^#\|\s*(slow|cuda|eval:\s*false)", src, re.M))
            assert here or not slow, f"cell {i} follows a slow one of its section"
            slow = slow or bool(re.search(r"^#\|\s*slow", src, re.M))
    assert "known limits" in " ".join(src for _, src, _ in cells(nb, "markdown")[-3:]).lower(), "the last section says the known limits"


def test_no_module_without_notebook():
    "Every module is exported by a notebook that is there (nbdev never deletes)"
    exported = {ROOT / "post_training" / f"{module_of(nb).replace('.', '/')}.py" for nb in LIBRARY}
    assert not set(MODULES) - exported


@pytest.mark.parametrize("module", **names([*MODULES, *(ROOT / "tests").glob("*.py")]))
def test_functions_are_short(module):
    "At most 60 lines"
    tree = ast.parse(module.read_text())
    sizes = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert not {name: size for name, size in sizes.items() if size > 60}


@pytest.mark.parametrize("module", **names(MODULES))
def test_arguments_are_explained(module):
    "Public functions of three arguments or more: each argument has a type or a comment on its line"
    text = module.read_text()
    lines = text.splitlines()
    for n in ast.parse(text).body:
        if not isinstance(n, ast.FunctionDef) or n.name.startswith("_") or any("patch" in ast.unparse(d) for d in n.decorator_list): continue
        args = [a for a in [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs] if a.arg not in ("self", "cls")]
        bare = [a.arg for a in args if a.annotation is None and "# " not in lines[a.lineno - 1]]
        assert len(args) < 3 or not bare, f"{n.name}: {', '.join(bare)}"


def test_export_and_clean_change_nothing(tmp_path):
    "nbdev_export and nbdev_clean, run in a copy, leave notebooks and package as they are"
    for folder in ("nbs", "post_training"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)

    def content(root):
        files = [p for folder in ("nbs", "post_training") for p in below(root / folder, "*") if p.suffix in (".py", ".ipynb")]
        return {str(p.relative_to(root)): p.read_bytes() for p in files}

    here, there = content(ROOT), content(tmp_path)
    assert not sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k)), "run `make hooks` and commit"


# -- recipes and stages

@pytest.mark.parametrize("nb", **names(RECIPES + BENCHMARKS + EXPERIMENTS))
def test_recipe_is_short_and_defines_nothing(nb):
    "At most 12 cells, no def, no class, no lambda"
    assert len(json.loads(nb.read_text())["cells"]) <= 12
    for i, src, _ in cells(nb):
        if src.startswith("%%"): continue
        found = [n for n in ast.walk(ast.parse(src)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))]
        assert not found, f"cell {i}: what is longer than a call belongs in the library"


@pytest.mark.parametrize("nb", **names(RECIPES + BENCHMARKS + EXPERIMENTS))
def test_recipe_parameters(nb):
    "One tagged cell: at most ten flat typed literals, each with a comment that holds no equals sign"
    (_, src, _), = [c for c in cells(nb) if "parameters" in tags(c[2])]
    nodes = [n for n in ast.parse(src).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    assert 0 < len(nodes) <= 10
    for node in nodes:
        assert isinstance(node, ast.AnnAssign), f"{ast.unparse(node)}: write `name: type = value  # comment`"
        assert ast.unparse(node.annotation) in ("str", "int", "float", "bool", "list", "dict"), ast.unparse(node)
        ast.literal_eval(node.value)
        _, hash_, comment = src.splitlines()[node.end_lineno - 1][node.end_col_offset:].partition("#")
        assert hash_ and comment.strip() and "=" not in comment, f"{node.target.id}: a comment without an equals sign"


@pytest.mark.parametrize("nb", **names(EXPERIMENTS))
def test_experiment_asks_and_answers(nb):
    "It carries its file's name, begins with its question, and as it is kept it ends with a computed sentence of answer; nothing is submitted"
    from post_training.launch.recipe import recipe_parameters
    told = recipe_parameters(nb)
    assert told["experiment"] == nb.stem and told["submit"] is False
    assert "?" in cells(nb, "markdown")[0][1], "the first cell asks the question"
    answers = [text_of(o) for _, src, c in cells(nb) if re.search(r"\b(sweep|claims|merging)_conclusion\(", src) for o in c["outputs"]]
    assert answers and answers[-1].strip().endswith("."), "run it: the kept copy shows its answer"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_has_one_name_in_four_places(stage, tmp_root):
    "configs/STAGE.yaml, recipes/STAGE.ipynb, a function or module STAGE, runs/STAGE"
    from post_training import config, run
    assert (NBS / "recipes" / f"{stage}.ipynb").is_file()
    entry = rf"^def {stage}\b"
    assert any(m.stem == stage or re.search(entry, m.read_text(), re.M) for m in MODULES)
    assert stage in Path(run.locate_run(config.compose(stage).cfg).run_dir).parts
    assert stage in config.stage_names()


def test_recipes_are_stages():
    "recipes/ holds one notebook per stage, benchmarks/ the bench_* ones"
    assert not [nb.name for nb in RECIPES if nb.stem not in STAGES]
    assert not [nb.name for nb in (NBS / "benchmarks").glob("*.ipynb") if nb not in BENCHMARKS]


@pytest.mark.parametrize("preset", **names(PRESETS, ROOT / "post_training" / "configs"))
def test_preset_composes(preset, tmp_root):
    "Every preset composes with its stage's defaults, and every key in it is known"
    from post_training import config
    group = preset.parent.name
    choice = f"accelerate_config={preset.stem}" if group == "accelerate" else f"{group}={preset.stem}"
    users = [s for s in STAGES if re.search(rf"^\s*- (override )?/?{group}:", (preset.parent.parent / f"{s}.yaml").read_text(), re.M)]
    engine = ["accelerate_config=ds-zero2"] if group == "cluster" else []
    asked = ["dataset_args.dataset_name=rows.jsonl"] if "  dataset_name: ???" in preset.read_text() else []
    if "sources: ???" in preset.read_text(): asked = ["dataset_name=mine", "sources=[{dataset_name: a, dataset_path: a.jsonl}]"]
    if group == "cluster": users = ["train_sft", "ref_completions", "export"]  # all stages have one, with the same keys
    for stage in users or ["train_sft"]:
        cfg = config.compose(stage, [choice, *engine, *asked]).cfg
        assert cfg["stage"] == stage


# -- outputs and records

def images(output):
    "Sizes in bytes of the pictures of one output"
    data = output.get("data", {})
    for kind, value in data.items():
        text = "".join(value) if isinstance(value, list) else str(value)
        if kind in ("image/png", "image/jpeg"): yield len(base64.b64decode(text))
        elif kind in ("image/svg+xml", "text/html"): yield len(text)


def text_of(output):
    "What one output prints"
    parts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "".join("".join(p) if isinstance(p, list) else p for p in parts)


@pytest.mark.parametrize("nb", **names(NOTEBOOKS))
def test_outputs_are_small_and_stable(nb):
    "At most 20 lines a cell and 50 kB a picture; no errors, standard error, progress bars or folders of a machine"
    for i, _, cell in cells(nb):
        outputs = cell["outputs"]
        text = "".join(text_of(o) for o in outputs)
        rich = json.dumps([o.get("data", {}).get("text/html", "") for o in outputs])
        assert text.count("\n") <= 20, f"cell {i} prints {text.count(chr(10))} lines"
        assert all(size <= 50_000 for o in outputs for size in images(o)), f"cell {i}: a picture or table above 50 kB"
        assert not any(o.get("name") == "stderr" for o in outputs), f"cell {i} keeps standard error"
        assert "raises-exception" in tags(cell) or not any(o["output_type"] == "error" for o in outputs), f"cell {i} keeps an error"
        assert not BAR.search(text), f"cell {i} keeps a progress bar: {BAR.search(text)[0]}"
        assert not MACHINE.search(text + rich), f"cell {i} keeps a path of this machine: {MACHINE.search(text + rich)[0]}"


RECORDS = [p.parent for p in EXAMPLES.rglob("record.json") if "attempts" not in p.parts]


@pytest.mark.parametrize("record", **names(RECORDS))
def test_record_in_git_is_small_and_redacted(record):
    "At most 300 kB together; no secret, no host, no folder of a machine, no error output"
    from post_training.core.files import redact
    files = [p for p in record.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 300_000
    for path in files:
        if path.suffix in (".png", ".svg"): continue
        text = path.read_text()
        assert not MACHINE.search(text), f"{path.name}: {MACHINE.search(text)[0]}"
        assert redact(text) == text, f"{path.name} holds what looks like a secret"
        if path.suffix == ".ipynb":
            assert not [o for _, _, c in cells(path) for o in c["outputs"] if o["output_type"] == "error"], f"{path.name} keeps an error"
    assert json.loads((record / "record.json").read_text())


def test_a_kept_record_shows_a_run():
    "A reader sees a record without running anything"
    assert RECORDS, "keep one: .venv/bin/post-training runs keep RUN"


def test_tracked_files_name_no_machine_and_no_registry():
    "No folder of somebody's machine and no package host in what git holds"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    host = re.compile(r"\b(?:py(?:pi|thonhosted)|npm(?:js)?|debian)\.(?:org|com)\b")
    folder = re.compile(r"(?<![\w./~$}-])/(?:root|work)/")
    found = []
    for path in (ROOT / name for name in tracked if name and not name.endswith((".lock", "LICENSE"))):
        if not path.is_file(): continue
        text = path.read_text(errors="ignore")
        found += [f"{path.name}: {m[0]}" for pattern in (host, folder) if (m := pattern.search(text))]
    assert not found
