"""Models that others trained, made smaller at equal size, and what is judged of them: tiny ones of every kind, end to end."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import a_record, files_read, run_here, tokens, with_large_weights
from made_records import a_mode
from tokenizers import Tokenizer, decoders

from reproduce.data.text import read_documents
from reproduce.experiments import compress_models, samples, spectra
from reproduce.models.sizes import count_parameters
from reproduce.report import pages, results, room, unfoldings
from reproduce.report.words import ranges
from reproduce.store import records, schema
from reproduce.train.options import Options
from reproduce.train.public_models import open_model
from reproduce.trust import opening
from tucker_ref import GroupedQueryAttention, MultiHeadAttention, compress, second_moment, to_gqa, to_mla

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
BY_NAME = {(a.name, a.which): a for a in opening.ARCHITECTURES}
GEMMA3 = BY_NAME["Gemma 3", ""]
KINDS = {
    "bert": BY_NAME["BERT", "without a head"],
    "gpt2": BY_NAME["GPT-2", ""],
    "gemma3": dataclasses.replace(GEMMA3, options=GEMMA3.options | {"num_key_value_heads": 1}),
}
SENTENCES = "Some words stand here to be read by it. Other words follow them in this text too. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models by kind, and texts."""
    folder = tmp_path_factory.mktemp("models")
    for kind, architecture in KINDS.items():
        opening.save(architecture, folder / kind)
    for name, more in (("read", ""), ("test", "And one more. ")):
        (folder / f"{name}.txt").write_text(
            "\n".join(f"{more}{SENTENCES}Line {n} of it ends in this place here now." for n in range(60)),
            encoding="utf-8",
        )
    return folder


@pytest.fixture
def small(monkeypatch):
    for module, name, value in (
        (compress_models, "SHARES", (1 / 2,)), (compress_models, "TEST_WINDOWS", 2), (compress_models, "PAIRS", 5),
        (compress_models, "WINDOWS", 6), (spectra, "WINDOWS", 6),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def options(made, kind, tmp_path, **more) -> Options:
    given = dict(text=str(made / "read.txt"), test=(str(made / "test.txt"),)) | more
    given = {"model": str(made / kind)} | given
    return Options("smoke", tmp_path, tmp_path / "records", **given)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_smaller_and_what_it_keeps_is_on_record(kind, made, small, tmp_path, capsys, monkeypatch):
    read = files_read(monkeypatch)
    compress_models.run(options(made, kind, tmp_path))
    assert sorted(read) == ["read.txt", "test.txt"]  # once, for all that is made of them
    rows = records.load(tmp_path / "records", "compress_models")
    labels = [r.method for r in rows]
    assert sum(label.startswith("Tucker by layer") for label in labels) == 2 and any(
        label.startswith("MLA sep") for label in labels
    )
    assert any(label.startswith("GQA") for label in labels) == (kind != "gemma3")
    for r in rows:
        m, own = r.metrics, r.metrics["before"]
        assert len(r.config["weights"]) == 16 and m["cache"] < own["cache"]
        if "with the parameters" in r.method or not r.method.startswith("Tucker by layer"):
            assert m["attention_parameters"] <= own["attention_parameters"]
        (test,) = m["tests"].values()
        if kind == "bert":
            assert 0 < test["least_cosine"] <= test["cosine"] <= 1 and -1 <= test["rank_correlation"] <= 1
        else:
            assert test["loss"] != own["tests"]["test.txt"]["loss"] and test["tokens"] == 2 * 63
            for judged in (test, own["tests"]["test.txt"]):
                assert len(judged["windows"]) == 2 and sum(judged["windows"]) / (2 * 63) == pytest.approx(
                    judged["loss"], abs=1e-4
                )
    (table,) = room.compressed_tables(rows)
    assert table.body.count("\n| ") == len(rows) + 1 and table.name == "Models compressed"
    assert ("minus MLA's" in table.body) == (kind != "bert") and room.UNPAIRED not in table.title
    said = room.commands(rows)
    assert f"{len(rows)} rows, 1 minute" in said and "--test test.txt" in said
    with pytest.raises(ValueError, match="no row is called MHA; there are: "):
        compress_models.run(options(made, kind, tmp_path, rows=("MHA",)))


def test_rows_are_paired_with_mla_by_window_where_windows_are_on_record():
    """16 windows of 4 tokens: of a row that loses more in each, of one that loses as much on the whole, and of the next group's."""

    def a_row(method: str, share: float, nats: list[float] | None) -> records.Record:
        loss = sum(nats or 16 * [1.0]) / 64
        test = {"sha256": "0", "tokens": 64, "loss": loss, "bits_per_byte": loss / 2} | ({"windows": nats} if nats else {})
        m = {"share": share, "attention_parameters": 50, "cache": 5, "tests": {"a.txt": test}}
        m["before"] = {"attention_parameters": 100, "cache": 10, "tests": {"a.txt": test}}
        config = {"model": "m", "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
        return a_record(experiment="compress_models", preset="models", method=method, config=config, metrics=m)

    base, waves = [8.0 + n for n in range(16)], [(-1) ** n for n in range(16)]
    found = [
        a_row("MLA separated d_c=2", 1 / 2, base),
        a_row("Tucker [2,4,2]", 1 / 2, [x + 0.4 + 0.1 * w for x, w in zip(base, waves)]),
    ]
    found += [
        a_row("Tucker by layer", 1 / 2, [x + w for x, w in zip(base, waves)]),
        a_row("MLA separated d_c=1", 1 / 4, base[::-1]),
    ]
    (table,) = room.compressed_tables(found)
    ends = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[-1] for line in table.body.splitlines()[2:]}
    assert ends["Tucker [2,4,2]"] == "+0.050 [+0.043, +0.057]"  # 0.4 nats in 4 tokens, half a bit per byte for a nat per token
    assert ends["Tucker by layer"] == "+0.000 [−0.069, +0.069]"
    assert [line for line in table.body.splitlines() if line.startswith("| MLA")][0].endswith(
        "|  |"
    ) and room.PAIRED in table.title
    (few,) = room.compressed_tables([a_row(r.method, 1 / 2, r.metrics["tests"]["a.txt"]["windows"][:9]) for r in found[:2]])
    (older,) = room.compressed_tables([a_row(r.method, 1 / 2, None) for r in found[:2]])
    for table in (few, older):
        assert "minus" not in table.body and table.title.endswith(room.UNPAIRED)


@pytest.mark.parametrize("change", [{"windows": [1.0]}, {"windows": [1.0, 2.0, 3.0]}, {"tokens": 7}])
def test_windows_that_differ_from_the_model_s_own_are_refused(change):
    test = {"sha256": "0", "tokens": 8, "loss": 1.0, "bits_per_byte": 0.5, "windows": [4.0, 4.0]}
    sizes = {"attention_parameters": 100, "cache": 10}
    before = sizes | {"tests": {"a.txt": test}}
    older = {name: value for name, value in test.items() if name != "windows"}
    for same in (before, sizes | {"tests": {"a.txt": older}}):  # controls
        schema.check(schema.CompressModelMetrics, {"share": 0.5, **same, "before": same}, "f")
    with pytest.raises(ValueError, match="judged on the same windows of the same texts as the model before"):
        schema.check(
            schema.CompressModelMetrics, {"share": 0.5, **sizes, "tests": {"a.txt": test | change}, "before": before}, "f"
        )


def test_rows_are_chosen_by_label():
    ways = [SimpleNamespace(label=label) for label in "abc"]
    assert compress_models.chosen(ways, ("b",)) == ways[1:2] and compress_models.chosen(ways, ()) == ways


def test_mla_as_the_tucker_attention_that_it_is():
    """Latents of MLA and a Tucker Attention of all heads and outputs are one function; control: one output fewer."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(24, 3).double(), torch.randn(1, 5, 24).double()
    for shared in (False, True):
        ranks = {"ranks": (3, 18, 6), "shared_kv": shared}
        convert = compress_models.as_tucker_of({"a": layer}, {"a": None}, post=(3, 18, 6), method="sthosvd", **ranks)
        mla = to_mla(layer, 24, 6, shared_kv=shared)
        assert (convert("a")(x) - mla(x)).abs().max() < 1e-12
        fewer = compress_models.as_tucker_of({"a": layer}, {"a": None}, post=(3, 15, 6), method="sthosvd", **ranks)
        assert (fewer("a")(x) - mla(x)).abs().max() > 1e-4


@pytest.mark.parametrize("width", [None, 2, 4, 16])
@pytest.mark.parametrize("sizes", [(48, 6, 2), (24, 12, 12), (60, 5, 5), (48, 24, 3), (80, 16, 4)])
def test_every_row_can_be_made_however_small_the_layer(sizes, width):
    """Of keys so narrow that fewer heads could be told apart than there are, no row of that head rank is offered."""
    layers = {"a": with_large_weights(GroupedQueryAttention(*sizes, head_dim=width))}
    known = {"a": second_moment(layers["a"], tokens(2, 40, sizes[0]))}
    found = compress_models.ways(layers, layers, known)
    if width is None:
        assert any(way.label.startswith("Tucker [") for way in found) and any(way.label.startswith("MLA") for way in found)
    for way in found:
        assert way.convert("a")(tokens(1, 3, sizes[0])).isfinite().all()
    if (sizes, width) == ((80, 16, 4), 4):  # controls: these would have been offered
        assert {way.label for way in found if way.label.startswith("GQA")} == {"GQA n_KV=2"}
        assert "MLA separated d_c=12" in [way.label for way in found]
        with pytest.raises(ValueError, match="n_kv_heads is 3; it must divide n_heads = 16"):
            to_gqa(layers["a"], 3)
        with pytest.raises(ValueError, match=r"post_ranks\[1\] is 80; .* it may be at most 64"):
            compress(layers["a"], (12, 12, 12), (16, 80, 12))
    if (sizes, width) == ((48, 6, 2), None):  # control: this is what would have been offered
        assert "Tucker [6,2,2]" not in [way.label for way in found]
        with pytest.raises(ValueError, match=r"ranks\[0\] is 6; with ranks = \(6, 2, 2\) it may be at most 4"):
            compress(layers["a"], (6, 2, 2))


def test_tucker_rows_have_the_parameters_of_mla(made):
    opened = open_model(str(made / "bert"))
    known = {place: None for place in opened.layers}
    found = compress_models.ways(opened.layers, opened.layers, known)
    budget = {way.share: way.parameters for way in found if way.label.startswith("MLA separated")}
    for way in found:
        if way.label.startswith("Tucker [") or "with the parameters" in way.label:
            size = count_parameters(way.convert(place) for place in opened.layers)
            assert size <= budget[way.share]
            assert way.label.startswith("Tucker by") or size > 0.8 * budget[way.share]


def test_embeddings_that_turn_keep_their_order():
    before = torch.nn.functional.normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    turned = before.roll(1, 1)
    assert compress_models.moved(before, before) == {"cosine": 1.0, "least_cosine": 1.0, "rank_correlation": 1.0}
    found = compress_models.moved(turned, before)
    assert found["rank_correlation"] == 1.0 and found["cosine"] < 0.9
    assert compress_models.moved(before.flip(0), before)["rank_correlation"] < 0.9  # control


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_stand_beside_the_start_and_on_inputs(kind, made, small, tmp_path):
    spectra.run(options(made, kind, tmp_path, test=()))
    (record,) = records.load(tmp_path / "records", "spectra")
    states = {"trained", "initial", "inputs", "initial_inputs"} | ({"centred"} if kind in ("bert", "gpt2") else set())
    assert states == set(record.metrics) - {"opening"} and record.data["tokens"] == 6 * 64
    heads = {state: record.metrics[state][0]["pre"]["head"] for state in states}
    assert heads["initial"]["entropy_rank"] > heads["inputs"]["entropy_rank"]
    errors = unfoldings.errors_without(heads["trained"])
    assert len(errors) == heads["trained"]["size"] and errors[-1] == 0 and errors == sorted(errors, reverse=True)
    tables = {table.name: table for table in results.tables([record])["spectra"]}
    assert set(tables) == {"Room by mode", "Room by layer", "Room by the rule", "Room in the head mode"}
    assert tables["Room by layer"].body.count(f"\n| {kind}, ") == 2 * (len(states) - 2)
    body = tables["Room in the head mode"].body
    assert f"{kind}, on inputs, before the softmax" in body and f"{kind}, on inputs, after the softmax" in body
    assert ("keys about their mean, before" in body) == ("centred" in states) and "keys about their mean, after" not in body
    assert tables["Room by mode"].title.endswith(" On inputs: as they act on what the layer reads in read.")
    assert "as it starts" in tables["Room by the rule"].body
    assert f"--model models/{kind} --text read.txt" in room.commands([record])
    assert pages.texts_of(["Room by mode"], [record])["Room by mode"]
    spectra.run(options(made, kind, tmp_path, text=None, test=()))
    assert "inputs" not in records.load(tmp_path / "records", "spectra")[1].metrics
    assert f"--model models/{kind}\n" in room.commands(records.load(tmp_path / "records"))
    assert room.room_tables(records.load(tmp_path / "records")[1:])[0].title.endswith("W~ after it.")


def with_steep_layers(steepness: list[dict[str, float]], **more) -> records.Record:
    """A model named m, of which every layer has modes so steep, all others hardly so."""

    def layer(its):
        return {
            side: {mode: a_mode(its.get(f"{side} {mode}", 0.001), 0) for mode in modes}
            for side, modes in unfoldings.MODES.items()
        }

    config = {"model": "m", "d_model": 48, "n_heads": 12, "n_layers": len(steepness)}
    metrics = {"trained": [layer(its) for its in steepness]}
    return a_record(experiment="spectra", preset="models", method="m", config=config, metrics=metrics | more)


def test_the_layers_that_decay_are_named():
    record = with_steep_layers(
        [{"post value": 0.3}, {"pre head": 0.3}, {}, {"post value": 0.3}, {"post value": 0.4}, {"post value": 0.5}]
    )
    tables = {table.name: table for table in room.room_tables([record])}
    (line,) = [line for line in tables["Room by the rule"].body.splitlines() if line.startswith("| m |")]
    assert line.split(" | ")[1:4] == ["depends on the measure (2)", "does not decay (none)", "does not decay (none)"]
    assert line.endswith("decays (1, 4 to 6) |")
    by_values, by_squares = (tables["Room by layer"].body.splitlines()[n].strip("| ").split(" | ") for n in (2, 3))
    assert by_values[0] == "m, weights, by values" and by_squares[0] == "m, weights, by squares"
    assert by_values[1] == f"{100 * unfoldings.share(record.metrics['trained'][1]['pre']['head'], 1):.0f} (2) / 100 / 100 (1)"
    assert by_values[6].endswith(" / 100 (2)") and "(6) / " in by_values[6]
    rank = unfoldings.effective_rank(record.metrics["trained"][1]["pre"]["head"]["values"], 2)
    said = f"least in layer 2, {rank:.1f} of 12. In the others it has 12.0 to 12.0."
    assert tables["Room by layer"].note == f"- m: by squares the head mode before the softmax has {said}"
    alone = with_steep_layers([{mode: 0.8 for mode in ("pre head", "pre query")}])
    tables = {table.name: table for table in room.room_tables([alone])}
    assert (
        tables["Room by layer"].note.endswith(" of 12.")
        and "decays (all) | decays (all) | does not" in tables["Room by the rule"].body
    )


def test_a_model_whose_record_has_no_second_measure_has_no_line_of_it():
    record = with_steep_layers([{}, {}])
    for layer in record.metrics["trained"]:
        for mode in (mode for side in layer.values() for mode in side.values()):
            del mode["square_rank"], mode["values"]
    tables = [room._by_layer({"m": [record]}), room._judged({"m": [record]})]
    assert [table.body.count("\n| m") for table in tables] == [1, 0] and tables[0].note == ""


def test_ranges_are_said_shortly():
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([1, 2]) == "1, 2"
    assert ranges([1, 2, 3, 5, 7, 8, 9, 10]) == "1 to 3, 5, 7 to 10"


def test_a_record_without_squares_and_values_has_no_second_measure():
    assert unfoldings.share({"entropy_rank": 6, "size": 12}, 2) is None
    assert unfoldings.shares([], "pre", "head") == [None, None] and room.commands([]) == ""


def test_windows_lie_far_apart_and_bytes_are_counted(made):
    opened = open_model(str(made / "gpt2"))
    learned = Tokenizer.from_str(opened.tokenizer)
    learned.decoder = decoders.ByteLevel()
    opened.tokenizer = learned.to_str()
    text = "".join(f"{n:05d} " for n in range(2000))
    read = ("t.txt", [text])
    found = samples.spread(opened, read, 3, 20)
    texts = [learned.decode(row.tolist()[1:]) for row in found.tokens]
    places = [text.index(part) for part in texts]
    assert places[0] == 0 and places[1] - places[0] > 4000 < places[2] - places[1]
    assert found.n_bytes == sum(map(len, texts)) and found.tokens.shape == (3, 20)
    assert samples.spread(opened, read, 10**6, 20).tokens.shape[0] > 100
    learned.post_processor = None  # a first token with nothing before it is not predicted
    opened.tokenizer = learned.to_str()
    bare = samples.spread(opened, read, 3, 20)
    assert bare.n_bytes == sum(len(learned.decode(row.tolist()[1:])) for row in bare.tokens)
    with pytest.raises(ValueError, match="fewer than one window of 20 tokens"):
        samples.spread(opened, ("few.txt", ["a"]), 3, 20)
    opened.vocabulary = 3
    with pytest.raises(ValueError, match="beyond the 3 of its embedding"):
        samples.spread(opened, read, 3, 20)
    opened.tokenizer = None
    with pytest.raises(ValueError, match="text needs its tokenizer"):
        samples.spread(opened, read, 3, 20)


def test_sentences_come_in_pairs_that_follow_each_other(made):
    opened = open_model(str(made / "bert"))
    name, _, sentences = samples.sentence_pairs(opened, read_documents(str(made / "test.txt")), 4)
    assert name == "test.txt" and len(sentences) == 8
    assert sentences[0].startswith("Some words") and sentences[1].startswith("Other words")
    with pytest.raises(ValueError, match="holds no two sentences of 6 to 40 words"):
        samples.sentence_pairs(opened, ("none.txt", ["too short. It is.\n" * 30]), 4)


def test_a_layer_without_key_heads_is_refused(made, tmp_path, monkeypatch):
    opened = open_model(str(made / "bert"))
    opened.layers = {place: compress(layer, (3, 9, 9)) for place, layer in opened.layers.items()}
    monkeypatch.setattr(compress_models, "open_model", lambda *_, **__: opened)
    with pytest.raises(ValueError, match="bert: only multi-head and grouped-query attention is compressed here"):
        compress_models.run(options(made, "bert", tmp_path))


def test_what_is_refused(made, tmp_path, capsys):
    with pytest.raises(ValueError, match="needs --model, and --test texts"):
        compress_models.run(options(made, "bert", tmp_path, test=()))
    (tmp_path / "test.txt").write_text((made / "test.txt").read_text(encoding="utf-8")[9:], encoding="utf-8")
    (tmp_path / "part.txt").write_text((made / "read.txt").read_text(encoding="utf-8")[999:4999], encoding="utf-8")
    for kind in ("bert", "gpt2"):
        with pytest.raises(ValueError, match="--test: two test texts are called test.txt"):
            compress_models.run(options(made, kind, tmp_path, test=(str(made / "test.txt"), str(tmp_path / "test.txt"))))
        with pytest.raises(ValueError, match="--test read.txt is a text that models are made with, trained or chosen on"):
            compress_models.run(options(made, kind, tmp_path, test=(str(made / "test.txt"), str(made / "read.txt"))))
        with pytest.raises(ValueError, match="--test part.txt is a text that models are made with, .* or stands in one"):
            compress_models.run(options(made, kind, tmp_path, test=(str(tmp_path / "part.txt"),)))
    opening.save(BY_NAME["ViT", ""], tmp_path / "vit")
    with pytest.raises(ValueError, match="vit takes images"):
        compress_models.run(options(made, "bert", tmp_path, model=str(tmp_path / "vit")))
    for kind in ("Qwen3", "OLMo 2"):  # beside Gemma 3 with one key head, which is not refused
        opening.save(BY_NAME[kind, ""], tmp_path / "normed")
        with pytest.raises(
            ValueError, match="normed: model.layers.0.self_attn normalises its queries and keys; such layers are"
        ):
            compress_models.run(options(made, "bert", tmp_path, model=str(tmp_path / "normed")))
    opening.save(BY_NAME["DeepSeek-V2", "yarn"], tmp_path / "mla")
    with pytest.raises(ValueError, match="normalises its latents"):
        compress_models.run(options(made, "bert", tmp_path, model=str(tmp_path / "mla")))
    assert run_here("spectra", "--text", made / "read.txt", "--out", tmp_path) == 1
    assert "holds no model of table2" in capsys.readouterr().err
