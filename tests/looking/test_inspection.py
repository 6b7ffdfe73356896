"""Looking: tables and graphs."""

import copy
import io
import json
import pickle
import re

import networkx
import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat, times_listed
from models.small import ConvNet, Reused, mlp

GOLDEN = """\
node         calls                 arguments            weight    slot               pass
-----------  --------------------  -------------------  --------  -----------------  --------------------
weight_gain  weight_synapses.gain                       weight    gradient hook      fuzzy-learning-rates
scale_grad   biofx.scale_grad      weight, weight_gain  weight    gradient hook      fuzzy-learning-rates
share_grad   biofx.share_grad      scale_grad, 0.5      weight    sum over synapses  split-synapses
sum_1        sum                   share_grad, 0        weight    sum over synapses  split-synapses"""


@pytest.fixture
def bio():
    return biofx.transform(nn.Linear(4, 2), [passes.SplitSynapses(2), passes.FuzzyLearningRates()])


def test_the_inserted_nodes_of_a_linear_layer(bio):
    assert biofx.table(bio) == GOLDEN


def test_all_nodes(bio):
    rows = biofx.table(bio, only="all").splitlines()[2:]
    assert [row.split()[0] for row in rows] == [node.name for node in bio.graph.nodes]


def test_table_refuses_other_selections(bio):
    with pytest.raises(biofx.ArgumentError, match='only must be "inserted" or "all", got \'new\''):
        biofx.table(bio, only="new")


def test_the_summary_lists_every_parameter_exactly_once(zoo):
    model, _ = zoo
    summary = biofx.summary(biofx.transform(model, [passes.SplitSynapses(2)]))
    assert {times_listed(summary, name) for name, _ in model.named_parameters()} == {1}


def test_a_summary_is_its_table_as_data():
    bio = biofx.transform(mlp(6, 8, 4), [passes.SplitSynapses(2), passes.DalesPrinciple(excitatory=0.5)])
    summary = biofx.summary(bio)
    first, second = summary.rows
    assert (first["weight"], first["shape"], first["synapses"], first["excitatory"]) == ("0.weight", (8, 6), 2, None)
    assert (second["weight"], second["shape"], second["excitatory"], second["free"]) == ("2.weight", (4, 8), 0.5, 0.0)
    assert first["left_alone"] == {"dales-principle": "it reads the model's inputs, which are free"}
    told = summary.to_dict()
    assert told["rows"] == summary.rows
    assert told["passes"] == [str(run.pass_) for run in bio.biofx.passes]
    assert told["not_attached"] == ["2.weight"]
    json.dumps(told)


def test_a_summary_shows_itself(bio):
    summary = biofx.summary(bio)
    assert repr(summary) == str(summary) == f"{summary}"
    assert "<td>weight  </td>" in summary._repr_html_()
    assert copy.deepcopy(summary).to_dict() == pickle.loads(pickle.dumps(summary)).to_dict() == summary.to_dict()


def test_columns_that_say_nothing_are_omitted():
    model = mlp(6, 8, 4)
    for pipeline, columns in [
        ([passes.FuzzyLearningRates(distribution="baseline")], "weight operator shape"),
        ([passes.FuzzyLearningRates()], "weight operator shape gain"),
        ([passes.SplitSynapses(2)], "weight operator shape Γ"),
    ]:
        (header,) = re.findall("^weight.*$", biofx.summary(biofx.transform(model, pipeline)), re.MULTILINE)
        assert header.split() == columns.split()


def test_the_memory_of_synapses_is_told():
    bio = biofx.transform(nn.Linear(100, 10), [passes.SplitSynapses(3), passes.FuzzyLearningRates()])
    plain, state = 4 * 1010, sum(x.numel() * x.element_size() for x in bio.buffers())
    told = biofx.summary(bio).to_dict()
    assert (told["bytes_added"], told["bytes_of_model"]) == (2 * 4000 + state, plain)
    assert f"memory: {(8000 + state) / 1000:.1f} kB more than the model's 4.0 kB" in flat(biofx.summary(bio))


def test_gains_of_every_hook_count():
    bio = biofx.transform(nn.Linear(4, 2), [passes.FuzzyLearningRates(), passes.SynapticScaling()])
    gain = biofx.weight_sites(bio)["weight"].gain
    synapses = bio.weight_synapses
    synapses.homeostasis.fill_(3.0)
    (row,) = biofx.summary(bio).rows
    assert row["gain_mean"] == pytest.approx(3 * float(gain.mean()))
    biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1))
    assert biofx.summary(bio).rows[0]["gain_mean"] == row["gain_mean"]


def test_a_summary_is_not_wider_than_a_screen():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_blocks = nn.ModuleList([mlp(3, 4, 3) for _ in range(4)])

        def forward(self, x):
            for layer in self.encoder_blocks:
                x = x + layer(x)
            return x

    model = Encoder()
    pipeline = [passes.SynapticScaling(), passes.DalesPrinciple(), passes.FuzzyLearningRates()]
    summary = biofx.summary(biofx.transform(model, pipeline, frontend="module"))
    text = str(summary)
    assert max(map(len, text.splitlines())) <= 100
    text = text.replace("\n    ", " ")
    note = "synaptic-scaling: it is in the model, which is untraced, so what its operator returns is out of reach"
    assert text.count(note) == 1
    found = re.search(rf"^\[(\d)\] {re.escape(note)};", text, re.MULTILINE)
    assert found is not None
    assert len(re.findall(rf"^encoder_blocks.*\[{found[1]}\]", text, re.MULTILINE)) == 8
    assert all(times_listed(summary, name) == 1 for name, _ in model.named_parameters())


def test_the_table_lists_what_sleeps_while_attached():
    bio = biofx.transform(nn.Linear(4, 2), [passes.SplitSynapses(2), passes.FuzzyLearningRates()])
    before = biofx.table(bio).rows
    attachment = biofx.attach(bio, torch.optim.AdamW(bio.parameters()))
    attached = biofx.table(bio).rows
    assert {row["calls"] for row in attached} >= {"biofx.scale_grad", "sum", "biofx.share_grad"}
    (hook,) = [row for row in attached if row["calls"] == "biofx.scale_grad"]
    assert (hook["node"], hook["weight"], hook["pass"]) == ("", "weight", "fuzzy-learning-rates")
    attachment.detach()
    assert biofx.table(bio).rows == before


def test_the_summary_counts_uses():
    assert "linear × 3" in flat(biofx.summary(biofx.transform(Reused(), [passes.SplitSynapses(2)])))


def test_provenance_survives_pickling_and_deepcopy(bio):
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert biofx.table(loaded, only="all") == biofx.table(bio, only="all")
    assert biofx.summary(loaded) == biofx.summary(bio)
    assert loaded.meta == bio.meta
    biofx.verify(loaded)


def test_the_networkx_graph_is_the_graph(bio):
    graph = biofx.to_networkx(bio)
    assert list(graph) == [node.name for node in bio.graph.nodes]
    for node in bio.graph.nodes:
        assert set(graph.predecessors(node.name)) == {source.name for source in node.all_input_nodes}
    assert graph.nodes["scale_grad"] == {
        "op": "call_function",
        "calls": "biofx.scale_grad",
        "module": "",
        "role": "gradient hook",
        "weight": "weight",
        "pass": "fuzzy-learning-rates",
    }
    roles = networkx.get_node_attributes(graph, "role")
    assert [roles[n] for n in ("weight", "sum_1", "linear", "input_1")] == [
        "stored weight",
        "sum over synapses",
        "original",
        "original",
    ]


def test_a_node_that_uses_another_twice_has_two_edges():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            y = self.fc(x)
            return y * y

    graph = biofx.to_networkx(biofx.transform(Square(), [passes.SplitSynapses(2)]))
    assert sorted(key for _, _, key in graph.in_edges("mul", keys=True)) == [0, 1]


def test_graphml_gexf_and_json_round_trip():
    class Squared(ConvNet):
        def forward(self, x):
            logits = super().forward(x)
            return logits * logits  # two edges between the same nodes

    graph = biofx.to_networkx(biofx.transform(Squared(), [passes.SplitSynapses(2)]))
    graphml, gexf = io.BytesIO(), io.BytesIO()
    networkx.write_graphml(graph, graphml)
    networkx.write_gexf(graph, gexf)
    graphml.seek(0)
    gexf.seek(0)
    from_gexf = networkx.read_gexf(gexf)
    for _, attributes in from_gexf.nodes(data=True):
        assert attributes.pop("label")  # GEXF repeats the node's name
    from_graphml = networkx.read_graphml(graphml, force_multigraph=True, edge_key_type=int)
    from_json = networkx.node_link_graph(json.loads(json.dumps(networkx.node_link_data(graph))))
    for other in (from_graphml, from_json, from_gexf):
        assert dict(other.nodes(data=True)) == dict(graph.nodes(data=True))
        assert sorted(other.edges(data="position")) == sorted(graph.edges(data="position"))
    for other in (from_graphml, from_json):  # networkx gives the edges of GEXF keys of its own
        assert set(other.edges(keys=True)) == set(graph.edges(keys=True))


def test_modules_of_nodes():
    graph = biofx.to_networkx(biofx.transform(nn.Sequential(mlp(2, 2, 2), nn.ReLU()), [passes.SplitSynapses(2)]))
    assert graph.nodes["linear"]["module"] == "0.0"
