"The layout: few rooms, numbered chapters, arrows that only point down, one meaning for a name, small cells, links that lead somewhere."
import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache

import pytest
from conftest import BIN, ROOT

NBS = ROOT / "nbs"
PACKAGE = ROOT / "post_training"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*/*.ipynb"))
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py"))
EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@cache
def cells(path):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]


@cache
def tree(path):
    return ast.parse(path.read_text())


def of(paths, root):
    return dict(argvalues=paths, ids=lambda p: str(p.relative_to(root)))


def place(chapter):
    "(number of the folder, number of the chapter)"
    return int(chapter.parent.name[:2]), int(chapter.stem.partition("_")[0])


def module_of(chapter):
    "The module that a chapter exports: the entry points lie at the root of the package"
    wing, name = chapter.parent.name[3:], chapter.stem.partition("_")[2]
    return name if wing == "entry" else f"{wing}.{name}"


def test_few_rooms():
    "At most 22 modules and folders of modules at the top of the package"
    rooms = [p.name for p in PACKAGE.iterdir() if p.suffix == ".py" and p.name not in ("__init__.py", "_modidx.py") or (p / "__init__.py").is_file()]
    assert len(rooms) <= 22, sorted(rooms)


def test_chapters_are_numbered():
    "At most 11 chapters in a folder; each number once"
    folders = defaultdict(list)
    for c in CHAPTERS: folders[c.parent.name].append(place(c)[1])
    assert all(sorted(numbers) == [*range(1, len(numbers) + 1)] and len(numbers) <= 11 for numbers in folders.values()), dict(folders)
    assert len({name[:2] for name in folders}) == len(folders)


def test_contracts_are_the_numbers():
    "import-linter's layers are the folders and chapters, in their order, for every wing"
    layers = {c["containers"][0]: c["layers"] for c in CONTRACTS if c["type"] == "layers"}
    wings = sorted({c.parent.name for c in CHAPTERS})
    top = [name[3:] for name in reversed(wings) if name[3:] != "entry"]
    assert [x for x in layers["post_training"] if (PACKAGE / x).is_dir()] == top
    for wing in wings:
        if wing[3:] == "entry": continue
        chapters = sorted((c for c in CHAPTERS if c.parent.name == wing), key=place, reverse=True)
        assert layers[f"post_training.{wing[3:]}"] == [module_of(c).rpartition(".")[2] for c in chapters], wing
    assert all(c.get("exhaustive") for c in CONTRACTS if c["type"] == "layers")
    assert not any("ignore_imports" in c for c in CONTRACTS if c["type"] == "layers")


def imported_by_string(node):
    "What a call of import_module or __import__ names"
    if not isinstance(node, ast.Call): return None
    name = ast.unparse(node.func).rpartition(".")[2]
    if name not in ("import_module", "__import__"): return None
    first = node.args[0] if node.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"


@pytest.mark.parametrize("module", **of(MODULES, PACKAGE))
def test_no_import_by_string(module):
    "A module of ours, or a library that a contract names, is imported by a statement that import-linter sees"
    forbidden = {name for c in CONTRACTS for name in c.get("forbidden_modules", [])}
    found = [name for n in ast.walk(tree(module)) if (name := imported_by_string(n))]
    if module.name == "tracking.py": found = [n for n in found if n.split(".")[0] != "wandb"]  # the one place that imports it
    if module.name == "fork_server.py": found = [n for n in found if n != "?"]  # it imports the libraries of a constant list
    if module.parent.name == "bench": found = [n for n in found if n != "?"]  # a child process of a benchmark imports what it is asked to measure
    assert not [n for n in found if n == "?" or n.startswith("post_training.") or n.split(".")[0] in forbidden]


def public(module):
    "Names that a module defines at its top, with the line"
    for n in tree(module).body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not any("patch" in ast.unparse(d) for d in n.decorator_list): yield n.name
        if isinstance(n, (ast.Assign, ast.AnnAssign)):
            for t in n.targets if isinstance(n, ast.Assign) else [n.target]:
                yield from (x.id for x in ast.walk(t) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))


def test_a_name_means_one_thing():
    "No public name is defined in two modules"
    where = defaultdict(set)
    for m in MODULES:
        for name in public(m):
            if not name.startswith("_"): where[name].add(str(m.relative_to(PACKAGE)))
    assert not {name: sorted(places) for name, places in where.items() if len(places) > 1}


@pytest.mark.parametrize("module", **of(MODULES, PACKAGE))
def test_private_names_stay_at_home(module):
    "No name with an underscore is imported from another module of ours"
    taken = [a.name for n in ast.walk(tree(module)) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("post_training"))
             for a in n.names if a.name.startswith("_") and not a.name.startswith("__")]
    assert not taken


@pytest.mark.parametrize("module", **of(MODULES, PACKAGE))
def test_functions_take_few_parameters(module):
    "At most 10, `self` not counted"
    found = {}
    for n in ast.walk(tree(module)):
        if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        a = [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs]
        found[n.name] = len(a) - bool(a and a[0].arg in ("self", "cls"))
    assert not {name: k for name, k in found.items() if k > 10}


@pytest.mark.parametrize("nb", **of(NOTEBOOKS, NBS))
def test_cells_are_narrow_and_small(nb):
    "Lines of code of at most 120 characters; an exported cell of at most 2,400"
    for i, (kind, src) in enumerate(cells(nb)):
        if kind != "code": continue
        wide = [line for line in src.splitlines() if len(line) > 120]
        assert not wide, f"cell {i}: {wide[0][:60]}..."
        assert not EXPORT.search(src) or len(src) <= 2400, f"cell {i} has {len(src)} characters"


@pytest.mark.parametrize("nb", **of(CHAPTERS, NBS))
def test_tuples_do_not_stand_for_lines(nb):
    "In exported cells one assignment to a line where a tuple packs three or more"
    packed = [ast.unparse(n)[:80] for kind, src in cells(nb) if kind == "code" and EXPORT.search(src) for n in ast.walk(ast.parse(src))
              if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple) and len(n.value.elts) >= 3
              and not {x.id for x in ast.walk(n.value) if isinstance(x, ast.Name)} & {x.id for x in ast.walk(n.targets[0]) if isinstance(x, ast.Name)}]
    assert not packed


def anchors(text):
    "Headings of a page as the anchors that JupyterLab and GitHub make of them"
    for line in re.findall(r"^#+ (.*)$", text, re.M):
        yield line.strip().replace(" ", "-")
        yield re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-")


def page(path):
    return "\n".join(src for kind, src in cells(path) if kind == "markdown") if path.suffix == ".ipynb" else path.read_text()


PAGES = [*NOTEBOOKS, *(p for p in (ROOT / "README.md", NBS / "README.md", NBS / "LOG.md", ROOT / "container" / "README.md") if p.is_file())]


@pytest.mark.parametrize("path", **of(PAGES, ROOT))
def test_links_lead_somewhere(path):
    "Links and pictures of notebooks and pages are files of this repository, and their anchors headings"
    text = re.sub(r"^```.*?^```", "", page(path), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target): continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} leads nowhere"
        if anchor and file.suffix in (".ipynb", ".md"): assert anchor in set(anchors(page(file))), f"{target}: no such heading"


def test_chapters_that_prose_names_are_there():
    "`25_tokens/4_masks` and the like, in notebooks, are chapters"
    there = {f"{c.parent.name}/{c.stem}" for c in CHAPTERS}
    named = {(m, str(p.relative_to(ROOT))) for p in NOTEBOOKS for m in re.findall(r"\b\d\d_[a-z]+/\d+_\w+", page(p))}
    assert not {x for x in named if x[0] not in there}


def test_map_of_the_notebooks():
    "nbs/README.md is what the titles say"
    out = subprocess.run([sys.executable, str(NBS / "notebook_map.py")], capture_output=True, text=True, check=True).stdout
    assert (NBS / "README.md").read_text() == out, "run `make readme`"
    assert all(f"]({p.relative_to(NBS)})" in out for p in NOTEBOOKS if p.parent != NBS)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


FIRST = ["core", "config", "run", "losses", "launch", "view", "cli"]


@pytest.mark.parametrize("name", [n for n in FIRST if n not in ("losses",)])
def test_what_starts_fast_loads_no_torch(name):
    "Foundations, launching, reports and the command line load no library of models when they are imported"
    names = [f"post_training.{name}"] if name == "cli" else [f"post_training.{name}.{p.stem}" for p in (PACKAGE / name).glob("*.py") if p.name != "__init__.py"]
    names = [n for n in names if n not in ("post_training.view.dataset", "post_training.view.chat")]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_import_contracts():
    out = subprocess.run([BIN / "lint-imports", "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:]


def test_the_kept_demo_is_of_this_code(tmp_root):
    "The record in runs/examples/demo has the configuration that `make demo` composes now"
    from post_training import config, run
    kept = json.loads((ROOT / "runs" / "examples" / "demo" / "record.json").read_text())
    composed = config.compose("train_sft", ["job_subdir=demo"]).cfg
    changed, _ = run.config_changes(kept["config"], composed)
    assert kept["hash"] == run.config_hash(composed), f"run `make demo` and keep its record again: {changed}"
