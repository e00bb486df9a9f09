"Prints nbs/README.md: a table of the notebooks of each folder, made from their titles and subtitles. `make readme` calls it."

import json
from pathlib import Path

NBS = Path(__file__).parent
SUBJECTS = dict(
    recipes="One notebook per stage. `post-training STAGE` executes it; the executed copy is the record.",
    benchmarks="Measurements against common alternatives. `make bench` runs them with the functions of `90_bench`.",
    experiments="Questions with a grid of runs. Copy one, edit the grid, run the scripts that it writes.",
    explore="The user guide, notebooks to explore data and checkpoints, and reports.",
)


def heading(path):
    "Title and subtitle of a notebook"
    first = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
    title = next(line[2:].strip() for line in first if line.startswith("# "))
    return title, " ".join(line[1:].strip() for line in first if line.startswith(">"))


def number(path):
    "The number in front of a chapter's name; other notebooks go by name"
    head = path.stem.partition("_")[0]
    return (int(head), "") if head.isdigit() else (0, path.stem)


def folders():
    "The folders that hold notebooks: chapters in their order, then the others"
    found = {p.parent for p in NBS.glob("*/*.ipynb") if not p.parent.name.startswith(".")}
    return sorted(
        found,
        key=lambda f: (not f.name[:2].isdigit(), list(SUBJECTS).index(f.name) if f.name in SUBJECTS else 0, f.name),
    )


def notebook_map():
    "The page"
    out = [
        "# Map of the notebooks",
        "",
        "Chapters export the package: `NN_folder/N_name.ipynb` exports `post_training/folder/name.py`. The chapters of `80_entry`",
        "export modules at the top of the package: `post_training/cli.py`, `train_sft.py`, `train_preference.py` and `train_reward.py`. A folder never",
        "imports a folder with a higher number, and a chapter never imports a chapter of its folder with a higher number.",
        "",
        "Training is in three places. `40_training` is the trainer. `65_stages/5_training` is what one process does around it.",
        "`recipes/train_sft` and `recipes/train_preference` are the notebooks that a command executes.",
        "",
        "This page is generated from titles and subtitles by `make readme`.",
        "",
    ]
    for folder in folders():
        out += [f"## {folder.name}", ""]
        if folder.name in SUBJECTS:
            out += [SUBJECTS[folder.name], ""]
        out += ["| notebook | title | subject |", "|---|---|---|"]
        for path in sorted(folder.glob("*.ipynb"), key=number):
            title, subtitle = heading(path)
            out.append(f"| [{path.stem}]({path.relative_to(NBS)}) | {title} | {subtitle} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    print(notebook_map(), end="")
