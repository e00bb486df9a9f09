"""Writes the sources of the site into a folder; `make docs` calls this before Sphinx.

The site shows the notebooks as they are kept: nothing is executed. This script makes the other pages: the start page
from README.md, a page for each folder of notebooks, the interface of each module, and the gallery of kept records.
"""

import base64
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "nbs"))
import notebook_map  # noqa: E402

TITLES = {
    "00_core": "Files and processes",
    "05_losses": "Losses",
    "10_config": "Configuration",
    "15_run": "Records of runs",
    "20_data": "Conversation data",
    "25_tokens": "Tokens and masks",
    "30_models": "Models, generation, verifiers",
    "35_preferences": "Preference data",
    "40_training": "Training",
    "45_demo": "Demo data and models",
    "50_merging": "Merging",
    "55_export": "Export and certificates",
    "60_evaluation": "Evaluation",
    "65_stages": "Stages",
    "70_launch": "Launching",
    "75_view": "Reports and the board",
    "80_entry": "Commands",
    "90_bench": "Benchmark library",
    "recipes": "Recipes",
    "benchmarks": "Benchmarks",
    "experiments": "Experiments",
    "explore": "Guide and exploration",
}
# A link in Markdown whose target is a path: no address, no anchor of the same page.
LINK = re.compile(r"(\]\()(?![a-z]+:|#|\s)([^)\s#]+)(#[^)\s]*)?(\))")


def write(path, text):
    "Write a page, with its folders"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def repository(path=ROOT / "settings.ini"):
    "The repository's address, from settings.ini"
    import configparser

    settings = configparser.ConfigParser()
    settings.read(path)
    return settings["DEFAULT"]["git_url"]


def is_page(path):
    "Whether the site has a page for this file of the repository"
    inside = path.is_relative_to(ROOT / "nbs") or path.is_relative_to(ROOT / "runs" / "examples")
    return path.suffix == ".ipynb" and inside or path in (ROOT / "nbs/LOG.md", ROOT / "nbs/README.md")


def link_target(page, link):
    "The file that a link means; an executed notebook has the links of the notebook that was executed"
    target = (page.parent / link).resolve()
    if target.exists() or page.is_relative_to(ROOT / "nbs"):
        return target
    origins = (ROOT / "nbs").glob(f"*/{page.name}")
    return next((p for p in ((o.parent / link).resolve() for o in origins) if p.exists()), target)


def site_links(text, page, address, missing):
    "Markdown whose links to files without a page lead to the repository; links that lead nowhere are collected"

    def replace(match):
        target = link_target(page, match[2])
        if not target.exists():
            missing.append(f"{page.relative_to(ROOT)}: {match[2]}")
        if is_page(target) or target.suffix in (".png", ".svg"):
            return f"{match[1]}{os.path.relpath(target, page.parent)}{match[3] or ''}{match[4]}"
        if not target.is_relative_to(ROOT):
            return match[0]
        if target == ROOT / "README.md":
            home = "../" * (len(page.relative_to(ROOT).parts) - 1) + "index.md"
            return f"{match[1]}{home}{match[4]}"
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{address}/{kind}/main/{target.relative_to(ROOT)}{match[3] or ''}{match[4]}"

    return LINK.sub(replace, text)


def copy_notebook(path, out, address, missing):
    "A notebook as it is kept, with the links of its Markdown cells"
    nb = json.loads(path.read_text())
    nb["metadata"].setdefault("language_info", dict(name="python"))
    nb["metadata"].setdefault("kernelspec", dict(name="python3", display_name="Python 3", language="python"))
    nb["cells"] = [c for c in nb["cells"] if "".join(c["source"]).strip()]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = site_links("".join(cell["source"]), path, address, missing)
        elif "".join(cell["source"]).lstrip().startswith("#| hide"):
            cell.setdefault("metadata", {}).setdefault("tags", []).append("remove-cell")
    write(out / path.relative_to(ROOT), json.dumps(nb))


def toctree(entries, caption=None, hidden=True):
    "A Sphinx table of contents"
    options = [":maxdepth: 1"] + [":hidden:"] * hidden + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def folder_page(folder, out):
    "The page of a folder of notebooks: what each one is about"
    lines = [f"# {TITLES.get(folder.name, folder.name)}", ""]
    if folder.name in notebook_map.SUBJECTS:
        lines += [notebook_map.SUBJECTS[folder.name], ""]
    lines += ["| notebook | subject |", "|---|---|"]
    paths = sorted(folder.glob("*.ipynb"), key=notebook_map.number)
    for path in paths:
        title, subtitle = notebook_map.heading(path)
        lines.append(f"| [{title}]({path.name}) | {subtitle} |")
    write(out / folder.relative_to(ROOT) / "index.md", "\n".join([*lines, "", toctree([p.stem for p in paths])]))


def signature_text(function, name):
    "The signature over several lines where one is too long; defaults as they are printed"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    shown = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    shown = [re.sub(r" at 0x[0-9a-f]+", "", s) for s in shown]
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= 88 else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def definition_text(module, name):
    "Signature, docstring, and the table of parameters of a public name; nothing for a constant"
    from nbdev.showdoc import DocmentTbl

    value = getattr(module, name)
    if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__ != module.__name__:
        return None
    lines = [f"## `{name}`", ""]
    if (signature := signature_text(value, name)) is not None:
        lines += ["```python", signature, "```", ""]
    texts = [inspect.cleandoc(value.__doc__ or "")]
    if inspect.isfunction(value):
        texts.append(DocmentTbl(value)._repr_markdown_() or "")
    # a bracket and a circumflex would begin a footnote
    return "\n".join([*lines, *(line for text in texts for line in (text.replace("[^", "\\[^"), ""))])


def api_page(chapter, out):
    "The public functions and classes of the module that a chapter exports"
    text = chapter.read_text()
    found = re.search(r"#\| *default_exp ([\w.]+)", text)
    if not found:
        return None
    name = f"post_training.{found[1]}"
    module = importlib.import_module(name)
    title, subtitle = notebook_map.heading(chapter)
    texts = [definition_text(module, n) for n in module.__all__]
    link = f"../{chapter.relative_to(ROOT)}"
    head = [f"# {name}", "", f"{title}: {subtitle}", "", f"Chapter: [{chapter.stem}]({link})", ""]
    write(out / "api" / f"{name}.md", "\n".join([*head, *filter(None, texts)]))
    return name


def first_output(nb):
    "The first line that an executed notebook shows as a headline, without its Markdown"
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                line = next((s for s in "".join(data["text/markdown"]).splitlines() if s.strip()), "")
                return line.strip("* ") if line.startswith("**") else None
    return None


def largest_picture(nb, path):
    "Write the largest picture of an executed notebook as a file; whether there is one"
    outputs = [o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])]
    pictures = [base64.b64decode("".join(data["image/png"])) for data in outputs if "image/png" in data]
    if pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(max(pictures, key=len))
    return bool(pictures)


def record_numbers(notebook):
    "Numbers of a kept record as pairs of name and text: a benchmark's targets, or a run's results"
    from post_training.bench.records import TARGETS

    paths = (notebook.with_suffix(".json"), notebook.with_name("record.json"))
    record_path = next((p for p in paths if p.is_file()), None)
    if record_path is None:
        return []
    record = json.loads(record_path.read_text())
    if "found" in record:
        known = [(k, v) for k, v in record["found"].items() if k in TARGETS]
        return [(TARGETS[k][0], f"{v:.3g} (target {TARGETS[k][1]} {TARGETS[k][2]})") for k, v in known]
    attempts = record.get("attempts") or [{}]
    numbers = [("status", record.get("status")), ("steps", record.get("total_steps"))]
    numbers.append(("commit", str((attempts[-1].get("git") or {}).get("commit") or "")[:8] or None))
    numbers.append(("peak memory (GiB)", record.get("peak_memory_gib")))
    return [(k, f"{v:.3g}" if isinstance(v, float) else str(v)) for k, v in numbers if v not in (None, "")]


def card(notebook, out):
    "A kept record as a card: headline, picture, numbers, and a link to the executed notebook"
    nb = json.loads(notebook.read_text())
    title, subtitle = notebook_map.heading(notebook)
    picture = Path("_pictures") / f"{notebook.parent.name}-{notebook.stem}.png"
    link = notebook.relative_to(ROOT).with_suffix("")
    lines = [f":::{{grid-item-card}} {title}", f":link: {link}", ":link-type: doc"]
    if largest_picture(nb, out / picture):
        lines.append(f":img-top: {picture}")
    headline = first_output(nb)
    lines += ["", f"**{escape(headline, quote=False)}**" if headline else escape(subtitle, quote=False), ""]
    lines += [f"- {escape(f'{name}: {value}', quote=False)}" for name, value in record_numbers(notebook)]
    return "\n".join([*lines, ":::", ""])


def gallery(out):
    "The page of all kept records"
    found = (ROOT / "runs/examples").glob("*/*.ipynb")
    notebooks = sorted(found, key=lambda p: (p.parent.name == "bench", p))
    lines = ["# Gallery", "", "Each card is a kept record and leads to its executed notebook.", ""]
    lines += ["::::{grid} 1 1 2 2", ":gutter: 3", "", *(card(p, out) for p in notebooks), "::::", ""]
    lines.append(toctree([str(p.relative_to(ROOT).with_suffix("")) for p in notebooks]))
    write(out / "gallery.md", "\n".join(lines))


def start_page(out, folders, modules, address, missing):
    "README.md, and the contents of the site"
    text = site_links((ROOT / "README.md").read_text(), ROOT / "README.md", address, missing)
    chapters = [f for f in folders if f.name[:2].isdigit()]
    others = [f for f in folders if not f.name[:2].isdigit()]
    trees = [toctree(["gallery", *(f"nbs/{f.name}/index" for f in others), "nbs/README", "nbs/LOG"], "Use")]
    trees.append(toctree([f"nbs/{f.name}/index" for f in chapters], "Chapters"))
    trees.append(toctree(["api/index"], "Reference"))
    write(out / "index.md", "\n".join([text, "", *trees]))
    lines = ["# Interface", "", "The public functions and classes of each module, from their signatures.", ""]
    write(out / "api/index.md", "\n".join([*lines, toctree(modules, hidden=False)]))


def main(out):
    "Write all sources; exit with 1 where a link leads nowhere"
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    address, missing = repository(), []
    folders = notebook_map.folders()
    notebooks = [p for f in folders for p in sorted(f.glob("*.ipynb"))]
    notebooks += sorted((ROOT / "runs/examples").glob("*/*.ipynb"))
    for path in notebooks:
        copy_notebook(path, out, address, missing)
    for path in (ROOT / "nbs/LOG.md", ROOT / "nbs/README.md"):
        write(out / path.relative_to(ROOT), site_links(path.read_text(), path, address, missing))
    shutil.copytree(ROOT / "nbs/images", out / "nbs/images")
    for name in ("conf.py", "style.css", "icon.svg"):
        shutil.copy(Path(__file__).with_name(name), out / name)
    for folder in folders:
        folder_page(folder, out)
    chapters = [p for f in folders if f.name[:2].isdigit() for p in sorted(f.glob("*.ipynb"), key=notebook_map.number)]
    modules = [name for name in (api_page(p, out) for p in chapters) if name]
    gallery(out)
    start_page(out, folders, modules, address, missing)
    print(f"{len(notebooks)} notebooks, {len(modules)} modules", flush=True)
    if missing:
        sys.exit("docs: these links lead nowhere:\n" + "\n".join(sorted(set(missing))))


if __name__ == "__main__":
    main(*sys.argv[1:])
