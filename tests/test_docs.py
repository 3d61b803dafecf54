"""README.md and docs/*.md are true where a test can say so: links, names, paths, pictures, and the README's
loop.
"""

import importlib
import importlib.util
import re
import socket
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from doc_links import CODE_BLOCK, LINE, PAGES, ROOT, anchors, correct, line_of, links, name_in
from PIL import Image, ImageFont
from test_imports import LAYERS

import fastunlearn
from fastunlearn import ImageStore, Unlearner, assets, methods
from fastunlearn.methods import Method, registry
from fastunlearn.methods.registry import Record
from fastunlearn.metrics.reconstruction import reconstruct
from fastunlearn.models import load_checkpoint
from fastunlearn.recipes.mnist_tshirt import FREQUENCY_THRESHOLD
from fastunlearn.testing.factories import linear_schedule

README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
MOST_WORDS = 700  # of the README: headings, text, links' texts and tables, but no blocks of code
MOST_LINES_OF_LOOP = 15
MOST_LINES_OF_ARCHITECTURE = 95  # one page
WIDTH = 110

# Where the docs begin a path.
BASES = (ROOT, ROOT / "fastunlearn", ROOT / "docs", ROOT / "bench/results")
SUFFIXES = "py|sh|md|cpp|cuh|cu|h|svg|png|json"
MENTIONED = re.compile(rf"`(?P<path>[\w.-]+(?:/[\w.-]+)+\.(?:{SUFFIXES}))`")
FILE_NAME = re.compile(r"`(?P<name>\w+\.py)`")
DOTTED_NAME = re.compile(r"`(?P<name>fastunlearn(?:\.\w+)+)(?:\([^`]*\))?`")
WRITTEN_BY_A_SCRIPT = re.compile(r"<!-- \w+: begin -->.*?<!-- \w+: end -->", re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

# What a run or a user writes has a path in the docs, too, but not in the repository.
WRITTEN_LATER = {"out/demo/report.html"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_links_lead_somewhere(page):
    """Files and headings."""
    broken = []
    for link in links(page):
        if not link.path.exists():
            broken.append(f"no file {link.path}")
        elif link.path.suffix == ".md" and link.anchor and link.anchor not in anchors(link.path):
            broken.append(f"no heading #{link.anchor} in {link.path.name}, but {sorted(anchors(link.path))}")
        elif link.path.suffix != ".md" and link.anchor and not LINE.fullmatch(link.anchor):
            broken.append(f"#{link.anchor} is no line of {link.path.name}")
    assert not broken, f"{page.name}: {broken}"


@pages
def test_links_to_lines_lead_to_the_name_that_they_show(page):
    """`python tests/doc_links.py` writes the right lines."""
    wrong = []
    for link in links(page):
        if link.path.suffix != ".py" or not link.anchor:
            continue
        name, given = name_in(link.text), int(LINE.fullmatch(link.anchor)["line"])
        line = line_of(link.path, name)
        if line is None:
            wrong.append(f"{link.path.name} has no {name}")
        elif line != given:
            wrong.append(f"{name} begins in line {line} of {link.path.name}, not {given}")
    assert not wrong, f"{page.name}: {wrong}; python tests/doc_links.py corrects the numbers"


def test_wrong_lines_are_corrected(tmp_path):
    (tmp_path / "rooms.py").write_text(
        "class House:\n    door = 1\n\n    def open(self):\n        pass\n\n\nhome = House()\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "[`House.open`](rooms.py#L3), [`House`](rooms.py#L1), [`home`](rooms.py#L9), [a window](rooms.py#L2)"
    )
    assert correct(page) == 2
    right = (
        "[`House.open`](rooms.py#L4), [`House`](rooms.py#L1), [`home`](rooms.py#L8), [a window](rooms.py#L2)"
    )
    assert page.read_text() == right


@pages
def test_paths_that_are_mentioned_exist(page):
    content = page.read_text(encoding="utf-8")
    paths = {match["path"] for match in MENTIONED.finditer(content)} - WRITTEN_LATER
    missing = {path for path in paths if not any((base / path).exists() for base in BASES)}
    assert not missing, f"{page.name} mentions {sorted(missing)}"


@pages
def test_files_that_are_mentioned_by_name_exist(page):
    names = {match["name"] for match in FILE_NAME.finditer(page.read_text(encoding="utf-8"))}
    folders = ("fastunlearn", "kernels", "scripts", "bench", "tests", "examples")
    there = {"setup.py", *(file.name for folder in folders for file in (ROOT / folder).rglob("*.py"))}
    assert names <= there, f"{page.name} mentions {sorted(names - there)}"


@pages
def test_names_that_are_mentioned_exist(page):
    content = page.read_text(encoding="utf-8")
    for match in DOTTED_NAME.finditer(content):
        assert exists(match["name"]), f"{page.name}: there is no {match['name']}"
    for block in PYTHON_BLOCK.finditer(content):
        for line in re.findall(r"^from (fastunlearn[\w.]*) import ([\w, ]+)$", block["code"], re.MULTILINE):
            for name in line[1].split(","):
                name = name.split(" as ")[0].strip()
                assert exists(f"{line[0]}.{name}"), f"{page.name}: {line[0]} has no {name}"


def exists(dotted: str) -> bool:
    """Whether a module or something in one has this name."""
    module, rest = "fastunlearn", dotted.split(".")[1:]
    while rest and importlib.util.find_spec(f"{module}.{rest[0]}") is not None:
        module = f"{module}.{rest.pop(0)}"
        if not hasattr(importlib.import_module(module), "__path__"):
            break
    value = importlib.import_module(module)
    for name in rest:
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


@pages
def test_lines_are_short(page):
    """But rows of tables, which cannot be broken, and what scripts write between their marks."""
    content = WRITTEN_BY_A_SCRIPT.sub("", page.read_text(encoding="utf-8"))
    long = [line for line in content.splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert not long, f"{page.name}: more than {WIDTH} characters in {long}"


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += {link.path for link in links(page) if link.path in PAGES} - reached
    assert reached == set(PAGES), f"no link leads to {sorted(page.name for page in set(PAGES) - reached)}"


def test_the_readme_is_short():
    words = CODE_BLOCK.sub("", README.read_text(encoding="utf-8")).split()
    assert len(words) <= MOST_WORDS, f"{len(words)} words outside of blocks of code"


def test_the_readme_has_its_commands_near_the_top():
    start = README.read_text(encoding="utf-8").splitlines()[:20]
    assert any(line.startswith("make demo") for line in start)
    assert any(line.startswith("make test") for line in start)


def test_the_readme_has_every_method():
    """Under its public name."""
    table = README.read_text(encoding="utf-8").partition("## Methods")[2].partition("##")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(record.method.__name__ for record in of_the_package())
    assert set(named) <= set(methods.__all__) & set(fastunlearn.__all__)


def of_the_package() -> list[Record]:
    """What is known of its own methods; tests may have registered others."""
    package = methods.__name__ + "."
    return [record for record in registry.methods().values() if record.method.__module__.startswith(package)]


METHODS = ROOT / "docs/methods.md"
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")
SECTION = re.compile(r"^## (?P<heading>[^\n]*)$(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
# Of the table of all methods: name, what it reads, and the rows that it sends through a network, in batches.
ROW = re.compile(
    r"^\| \[`(?P<name>\w+)`\]\(#(?P=name)\) \| [^|]+ \| (?P<reads>[\w, ]+) \| "
    r"(?P<forward>\d) \| (?P<backward>\d)(?: to (?P<most>\d))? \| (?P<reference>\d) \|$",
    re.MULTILINE,
)
ROWS = list(ROW.finditer(METHODS.read_text(encoding="utf-8")))


def sections() -> dict[str, str]:
    """What docs/methods.md says under each heading, in lines without breaks."""
    found = SECTION.finditer(METHODS.read_text(encoding="utf-8"))
    return {match["heading"]: " ".join(match["text"].split()) for match in found}


def sources(text: str) -> set[str]:
    """The papers that a section is from, by their numbers on arXiv."""
    return set(PAPER.findall(text.partition("**Source.**")[2].partition("**Cost.**")[0]))


@pytest.mark.parametrize("record", of_the_package(), ids=lambda record: record.name)
def test_every_method_has_its_section(record):
    """With formula, source, cost, trouble, and all of its hyperparameters."""
    text = sections().get(record.name, "")
    assert "```math" in text, f"docs/methods.md: expected a section ## {record.name} with a formula"
    for part in ("**Source.**", "**Cost.**", "**Known trouble.**"):
        assert text.count(part) == 1, f"## {record.name}: {part}"
    papers = set(PAPER.findall(record.source))
    assert papers
    assert papers <= sources(text)
    missing = [
        each.name
        for each in record.hyperparameters()
        if not re.search(rf"[`{{]{each.name.replace('_', chr(92) * 2 + '?_')}\b", text)
    ]
    assert not missing, f"## {record.name} does not mention {missing}"


def test_the_sections_are_those_of_the_table():
    names = [record.name for record in of_the_package()]
    assert sorted(match["name"] for match in ROWS) == sorted(names)
    assert set(sections()) == {*names, "Which one should I take", "Anchors", "Masks"}


def test_the_readme_cites_what_the_sections_are_from():
    cited = README.read_text(encoding="utf-8").partition("## Citation")[2]
    numbers = set.union(*map(sources, sections().values()))
    assert len(numbers) > 9
    assert [number for number in sorted(numbers) if f"(https://arxiv.org/abs/{number})" not in cited] == []


def test_every_anchor_is_named_and_said_not_to_be_the_published_method():
    anchors = sections()["Anchors"]
    names = [name for name in fastunlearn.__all__ if name.startswith("vdu")]
    assert len(names) == 4
    assert [name for name in names if f"`{name}`" not in anchors] == []
    assert "not VDU as published" in anchors
    assert "2510.04058" in anchors
    assert "2310.12508" in sections()["Masks"]


@pytest.mark.parametrize("match", ROWS, ids=itemgetter("name"))
def test_the_table_of_methods_is_what_they_read_and_run(match):
    """One step of each, counted."""
    method = registry.get(match["name"]).example
    assert match["reads"] == ", ".join(sorted(method.needs))

    batch_size, network, reference = 8, Counting(), Counting()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (40, 1, 4, 4), generator=generator, dtype=torch.uint8)
    compared = {"reference_model": reference} if "reference" in method.needs else {}
    optimizer = torch.optim.AdamW(network.parameters())
    run = Unlearner(
        network,
        optimizer,
        linear_schedule(),
        method,
        forget=ImageStore(rows[:8]),
        retain=ImageStore(rows[8:]),
        batch_size=batch_size,
        **compared,
    )
    network.rows.clear()
    reference.rows.clear()
    run.step()

    taken = {name: count / batch_size for name, count in network.rows.items()}
    assert taken.keys() == {"forward", "backward"}
    assert taken["forward"] == int(match["forward"])
    assert int(match["backward"]) <= taken["backward"] <= int(match["most"] or match["backward"])
    assert reference.rows["without a graph"] / batch_size == int(match["reference"])
    assert reference.rows.keys() <= {"without a graph"}


class Counting(torch.nn.Module):
    """Counts the rows that go through it, and back."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rows = Counter()

    def forward(self, x_t, timesteps):
        prediction = self.scale * x_t
        if not torch.is_grad_enabled():
            self.rows["without a graph"] += len(x_t)
            return prediction
        self.rows["forward"] += len(x_t)
        prediction.register_hook(lambda gradient: self.rows.update(backward=len(gradient)))
        return prediction


def test_the_loop_of_the_readme_makes_the_model_forget(tmp_path, monkeypatch):
    """It is run as it stands, in an empty folder, without network."""
    (code,) = (match["code"] for match in PYTHON_BLOCK.finditer(README.read_text(encoding="utf-8")))
    assert len(code.splitlines()) <= MOST_LINES_OF_LOOP

    def refuse(*arguments):
        raise AssertionError("the loop asks the network for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, str(README), "exec"), names)

    assert torch.isfinite(names["out"].loss)
    image = names["forget"].rows(torch.tensor([0]))
    before = restored(*load_checkpoint(assets.path("mnist-tshirt-small")), image)
    after = restored(*load_checkpoint(tmp_path / "forgotten"), image)
    assert (before, after) == (8, 0)


def restored(model, scheduler, image) -> int:
    """How many of eight chains that start from the noised T-shirt lead back to it."""
    chains = {"chains": 8, "num_inference_steps": 20, "seed": 0, "show_progress": False}
    result, _ = reconstruct(model, scheduler, image, 500, threshold=FREQUENCY_THRESHOLD, **chains)
    return result.returned.count


def test_the_architecture_fits_on_a_page():
    assert len(ARCHITECTURE.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_ARCHITECTURE


def test_the_drawing_of_rooms_is_that_of_the_imports():
    """From the top down; tests/test_imports.py has the rooms from the bottom up."""
    rooms = ARCHITECTURE.read_text(encoding="utf-8").partition("## Rooms")[2]
    lines = CODE_BLOCK.search(rooms)[0].splitlines()[1:-1]
    drawn = [set(re.split(r" {2,}", line)[0].split(", ")) for line in lines]
    assert drawn == LAYERS[::-1]


def test_the_pictures_are_those_of_the_results():
    """The letters depend on Pillow's version; the tiles do not."""
    drawn, kept = script("draw_before_after"), Image.open(ROOT / "docs/before_after.png").convert("RGB")
    picture = drawn.draw()
    assert picture.size == kept.size
    for part in drawn.parts():
        box = (0, part.top, picture.width, part.top + part.rows * drawn.STEP)
        assert np.array_equal(picture.crop(box), kept.crop(box))


def test_the_chart_is_that_of_the_results():
    """`python scripts/draw_times.py` draws it anew."""
    assert script("draw_times").chart() == (ROOT / "docs/times.svg").read_text(encoding="utf-8")


def test_the_picture_of_methods_is_drawn_by_its_script():
    """`python scripts/draw_which_method.py` draws it anew."""
    assert script("draw_which_method").picture() == (ROOT / "docs/which_method.svg").read_text("utf-8")


def test_what_the_picture_of_methods_proposes_can_be_run():
    """Its flags parse, and its Python has names that there are."""
    pytest.importorskip("tyro")
    from fastunlearn.cli import _parse

    leaves = [row.leaf for row in script("draw_which_method").ROWS]
    for flags in (flags for leaf in leaves for flags in leaf.flags):
        command = _parse(["unlearn", "--model", "m", "--output", "o", "--retain", "r", *flags.split()])
        command.hyperparameter.build(command.method)
        command.rules.check((), command.retain)
    for code in (code for leaf in leaves for code in leaf.python):
        names = {name: getattr(fastunlearn, name) for name in re.findall(r"(\w+)\(", code)}
        method, _, _ = code.partition(", ")
        assert isinstance(eval(method, names), Method), code


def test_the_letters_of_the_picture_of_methods_stay_in_their_boxes():
    """In DejaVu, which is wider than what browsers take."""
    drawn, folder = script("draw_which_method"), Path(matplotlib.get_data_path()) / "fonts/ttf"
    sizes = {"DejaVuSans": drawn.SIZE, "DejaVuSans-Bold": drawn.SIZE, "DejaVuSansMono": drawn.CODE_SIZE}
    sans, bold, mono = (ImageFont.truetype(folder / f"{name}.ttf", size) for name, size in sizes.items())
    for row in drawn.ROWS:
        for text in row.question:
            assert bold.getlength(text) <= drawn.LEFT_WIDTH - 2 * drawn.PADDING, text
        for text, code in row.leaf.lines:
            font = mono if code else sans
            assert font.getlength(text) <= drawn.RIGHT_WIDTH - 2 * drawn.PADDING, text


def script(name: str):
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
