"""Pictures: what each format shows, for small, deep, huge and hostile models."""

import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn

import biofx
from biofx import passes
from biofx.looking.drawing import write
from biofx.looking.layout import Gap, entrance, exit_of, rows_of
from biofx.looking.view import AT_MOST, view_of
from models.architectures import ARCHITECTURES
from models.small import mlp

PIPELINE = [
    passes.SplitSynapses(2),
    passes.DalesPrinciple(excitatory=0.5),
    passes.FuzzyLearningRates(),
    passes.SynapticScaling(),
]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def gpt():
    make, inputs = ARCHITECTURES["gpt"]
    return biofx.transform(make(), PIPELINE, example_inputs=inputs()), inputs()


def boxes(root):
    return {box.name: box for box in root.walk()}


def labels(root):
    return [box.label for box in root.walk()]


def test_nodes_stand_in_the_boxes_of_their_modules(gpt):
    found = boxes(view_of(gpt[0]).root)
    fc1 = found["module transformer.h.0.mlp.fc1"]
    assert fc1.label == "fc1 (Linear)"
    assert {child.role.value for child in fc1.children} == {
        "original",
        "stored weight",
        "sum over synapses",
        "sign constraint",
        "gradient hook",
        "observer",
    }
    weights = {child.facts.get("weight", "transformer.h.0.mlp.fc1.weight") for child in fc1.children}
    assert weights == {"transformer.h.0.mlp.fc1.weight"}


def test_a_box_counts_what_was_inserted_into_equal_neighbours():
    chain = nn.Sequential(nn.Linear(4, 3), *[nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(5)])
    root = view_of(biofx.transform(chain, [passes.FuzzyLearningRates()])).root
    assert any(box.count == 5 for box in root.walk())
    assert {role.value: number for role, number in root.inserted_roles().items()} == {"gradient hook": 12}


def test_every_node_is_in_one_box(gpt):
    leaves = [node for box in view_of(gpt[0]).root.walk() if not box.children for node in box.nodes]
    assert sorted(leaves) == sorted(node.name for node in gpt[0].graph.nodes)


def test_equal_modules_in_a_row_are_drawn_once(gpt):
    found = boxes(view_of(gpt[0]).root)
    assert found["module transformer.h.0"].label == "0 … 1 (DecoderBlock) × 2"
    assert "module transformer.h.1" not in found
    other = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
    bio = biofx.transform(other, "fuzzy-learning-rates")
    assert {"0 (Sequential)", "1 (Sequential)"} <= set(labels(view_of(bio).root))


def test_edges_of_what_is_drawn_once_end_in_what_is_drawn(gpt):
    view = view_of(gpt[0])
    (last_norm,) = [name for name, box in boxes(view.root).items() if box.label == "ln_f (LayerNorm)"]
    (source,) = [a for a, b in view.edges if b == last_norm]
    assert source in {box.name for box in boxes(view.root)["module transformer.h.0"].walk()}


def test_edges_show_the_shapes_of_a_run(gpt):
    bio, inputs = gpt
    assert set(view_of(bio).edges.values()) == {""}
    state = {name: value.clone() for name, value in bio.state_dict().items()}
    assert "2 × 12 × 48" in view_of(bio, inputs).edges.values()
    assert all(torch.equal(value, state[name]) for name, value in bio.state_dict().items())


def test_edges_show_shapes_behind_keyword_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, **options):
            return self.fc(x) * options["scale"]

    arguments = {"x": torch.ones(5, 3), "scale": torch.ones(5, 1)}
    bio = biofx.transform(Scaled(), [passes.SplitSynapses(2)], example_inputs=arguments)
    assert set(view_of(bio, arguments).edges.values()) >= {"5 × 3", "5 × 2"}


def test_a_weight_shows_the_signs_of_the_units_that_it_reads():
    bio = biofx.transform(mlp(6, 8, 4), PIPELINE)
    signs = {box.facts["shape"]: box.signs for box in view_of(bio).root.walk() if box.role.value == "stored weight"}
    expected = biofx.weight_sites(bio)["2.weight"].sign.flatten().sign().int().tolist()
    assert signs == {"2 × 8 × 6": (), "2 × 4 × 8": tuple(expected)}


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png", ".dot", ".mmd"])
def test_every_format_is_written(gpt, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    biofx.draw(gpt[0], path, example_inputs=gpt[1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        ElementTree.parse(path)
    elif suffix == ".png":
        assert path.read_bytes()[:4] == b"\x89PNG"
    else:
        text = path.read_text()
        assert "DecoderBlock" in text
        assert text.count("subgraph") >= (1 if suffix != ".html" else 0)


def test_a_depth_opens_more_modules(gpt, tmp_path):
    counts = []
    for depth in (1, 2, 9):
        biofx.draw(gpt[0], tmp_path / "model.mmd", depth=depth)
        counts.append((tmp_path / "model.mmd").read_text().count("subgraph"))
    assert counts == sorted(set(counts))
    assert counts[0] == 1


def test_of_a_huge_module_the_middle_is_left_out(tmp_path):
    model = fx.symbolic_trace(nn.Sequential(*[layer for _ in range(500) for layer in (nn.Linear(4, 4), nn.ReLU())]))
    view = view_of(model)
    assert len(view.root.children) == 2 * AT_MOST + 1
    assert view.root.children[AT_MOST].label == f"… {1002 - 2 * AT_MOST} boxes left out …"
    write(view, tmp_path / "model.html", None)
    assert "602 boxes left out" in (tmp_path / "model.html").read_text()


def test_a_picture_that_would_be_too_large_is_refused(tmp_path):
    model = nn.Sequential(*[nn.Linear(size, size) for size in range(1, 390)])
    view = view_of(biofx.diff(model, model).after)
    with pytest.raises(biofx.ArgumentError, match="give a smaller depth, or write .html"):
        write(view, tmp_path / "model.png", 5)
    assert not any(tmp_path.iterdir())


class Hostile(nn.Module):
    """A model whose module and class names are markup."""

    def __init__(self):
        super().__init__()
        self.add_module("</script><script>alert(1)</script> & '$ü", nn.Sequential(nn.Linear(3, 3), nn.ReLU()))

    def forward(self, x):
        return next(self.children())(x)


Hostile.__name__ = "<img src=x onerror=alert(2)>"


@pytest.mark.parametrize("suffix", [".html", ".svg", ".mmd"])
def test_names_are_no_markup(tmp_path, suffix):
    bio, path = biofx.transform(Hostile(), PIPELINE), tmp_path / f"model{suffix}"
    biofx.draw(bio, path, depth=3)
    text = path.read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    if suffix == ".svg":
        ElementTree.parse(path)


def test_a_page_needs_no_network(gpt, tmp_path):
    biofx.draw(gpt[0], tmp_path / "model.html")
    text = (tmp_path / "model.html").read_text()
    assert not re.findall(r"(?:src|href)=|https?://|@import|url\((?!#)", text)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_page_opens_modules_finds_names_and_tells_facts(gpt, tmp_path):
    biofx.draw(gpt[0], tmp_path / "model.html", example_inputs=gpt[1])
    script = """
    const edges = () => document.querySelectorAll("#edges path[marker-end]").length;
    const seen = [edges()];
    document.querySelectorAll("main > details > .row > details")[2].querySelector("summary").click();
    setTimeout(() => {
      seen.push(edges());
      const search = document.getElementById("search");
      search.value = "fc2 gain";
      search.dispatchEvent(new Event("change"));
      const match = document.querySelector(".match");
      match.click();
      document.getElementById("units").click();
      seen.push(document.getElementById("facts").textContent, match.offsetParent !== null,
                getComputedStyle(document.querySelector(".units")).display);
      document.title = JSON.stringify(seen);
    }, 200);
    """
    page = (tmp_path / "model.html").read_text().replace("</body>", f"<script>{{ {script} }}</script></body>")
    (tmp_path / "clicked.html").write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    run = [CHROMIUM, *options, f"--user-data-dir={tmp_path}/user", "--virtual-time-budget=2000", "--dump-dom"]
    result = subprocess.run([*run, str(tmp_path / "clicked.html")], capture_output=True, text=True, timeout=120)
    closed, opened, facts, is_visible, units = json.loads(
        re.search("<title>(.*?)</title>", result.stdout).group(1).replace("&quot;", '"').replace("&amp;", "&")
    )
    assert 5 < closed < opened
    assert is_visible
    assert "reads: transformer.h.0.mlp.fc2.weight_synapses.gain" in facts
    assert "inserted by: fuzzy-learning-rates" in facts
    assert units == "block"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("model.gif", {}, "unknown suffix '.gif' of model.gif; known are .html, .svg, .png, .dot, .mmd"),
        ("model", {}, "unknown suffix '' of model"),
        ("nowhere/model.svg", {}, "there is no folder"),
        ("folder.svg", {}, "is a folder"),
        ("model.svg", {"depth": 0}, "depth must be an integer ≥ 1, got 0"),
        ("model.svg", {"depth": True}, "depth must be an integer ≥ 1, got True"),
        ("model.svg", {"example_inputs": (1, 2)}, "example_inputs do not fit"),
    ],
)
def test_invalid_arguments(tmp_path, path, options, message):
    bio = biofx.transform(nn.Linear(3, 2), "fuzzy-learning-rates")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(biofx.ArgumentError, match=re.escape(message)):
        biofx.draw(bio, tmp_path / path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.svg"]


@pytest.mark.parametrize(("package", "suffix"), [("matplotlib.figure", ".svg"), ("igraph", ".html")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, package, suffix):
    monkeypatch.setitem(sys.modules, package, None)
    bio = biofx.transform(mlp(6, 8, 4), PIPELINE)
    with pytest.raises(biofx.ExportError, match=re.escape("pip install 'biofx[draw]'")):
        biofx.draw(bio, tmp_path / f"model{suffix}")
    assert not any(tmp_path.iterdir())


def test_edges_from_outside_pass_what_a_module_contains():
    inside = [("weight", "hook"), ("gain", "hook"), ("hook", "linear"), ("linear", "observer")]
    outside = [(entrance("fc"), "linear"), ("linear", exit_of("fc"))]
    rows = rows_of("fc", ["weight", "gain", "hook", "linear", "observer"], [*inside, *outside])
    assert [{item for item in row if isinstance(item, str)} for row in rows] == [
        {"weight", "gain"},
        {"hook"},
        {"linear"},
        {"observer"},
    ]
    entering, leaving = Gap(entrance("fc"), "linear"), Gap("linear", exit_of("fc"))
    assert [[item for item in row if isinstance(item, Gap)] for row in rows] == [[entering], [entering], [], [leaving]]
