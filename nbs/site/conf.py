"Sphinx settings of the site; `make docs` copies this file beside the sources that pages.py writes"

import html
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that settings can name functions of this file
project = "post-training"
copyright = "2026 onwards, the post-training authors"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
html_theme = "furo"
html_title = "post-training"
html_favicon = "icon.svg"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_show_sphinx = False
exclude_patterns = ["conf.py"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/markdown", 5)]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
myst_heading_slug_func = "conf.heading_anchor"
copybutton_exclude = ".linenos, .gp, .go"
html_math_renderer = "mathml"
# Cells without a language of their own, and outputs of terminals, are highlighted where they can be.
suppress_warnings = ["misc.highlighting_failure", "mystnb.unknown_mime_type"]


def heading_anchor(title):
    "The anchor of a heading as JupyterLab makes it, so that links between notebooks work in both"
    return re.sub(r"\s+", "-", title.strip())


def mathml(source, display):
    "A formula as MathML, which browsers draw without a script"
    from latex2mathml.converter import convert

    return convert(re.sub(r"\\label\{[^}]*\}", "", source), display=display)


def inline_math(translator, node):
    "Draw a formula within a line"
    from docutils import nodes

    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block_math(translator, node):
    "Draw a formula of its own line, with its source for those who copy it"
    from docutils import nodes

    source = node.astext()
    translator.body.append(f'<div class="formula" title="{html.escape(source)}">{mathml(source, "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    "Make formulas MathML; Sphinx calls this"
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
