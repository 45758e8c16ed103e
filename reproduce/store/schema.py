"""What a record of each experiment must hold to be shown: one class per experiment, its `config` and its `metrics`.

`records.load_some` asks this of every record before a table, a claim or a figure reads it, so that none of them meets what it cannot
read. Runs that only look for their own record (`records.load`) ask for the fields that all records have.
"""

import math
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from .checked import Above, Amount, Count, Line, Part, Real, Seed, Share, Size, check


class Data(Part):
    """What a run was trained or measured on."""

    name: Line
    sha256: Line
    byte_pairs: Line = "known"


class Entry(Part):
    """The fields of every record."""

    id: Line
    experiment: Line
    preset: Line
    method: str
    config: dict[str, Any]
    seed: Seed | None
    data: dict[str, Any] | None
    metrics: dict[str, Any]
    command: str
    commit: str
    versions: dict[str, str]
    device: str
    wall_seconds: Amount
    finished: str


# What several experiments have.


def _three_or_none(ranks: list[int]) -> list[int]:
    if len(ranks) not in (0, 3):
        raise ValueError("three ranks or none")
    return ranks


Label = Annotated[str, Field(pattern=r"^(MHA|MQA|GQA|MLA|Tucker)(,? .*)?$")]  # of a row, with what was changed in its training
Ranks = Annotated[list[Size], AfterValidator(_three_or_none)]
Curve = list[Annotated[list[Real], Field(min_length=3, max_length=3)]]  # [step, loss, gradient norm] each


class Row(Part):
    """One attention configuration, as `models.rows.Row.config` writes it."""

    model_config = ConfigDict(extra="forbid")

    mechanism: Literal["MHA", "GQA", "MLA", "Tucker"]
    n_kv_heads: Count = 0
    latent: Count = 0
    ranks: Ranks = []
    shared_kv: bool = False
    qk_norm: Literal["head", "all"] | None = None
    latent_norm: bool = False
    post_ranks: Ranks = []
    rope_dim: Count = 0


class Train(Part):
    """How a run was trained, as `train.settings.TrainConfig.config` writes it."""

    steps: Size
    batch_size: Size
    learning_rate: Amount
    warmup_steps: Count
    log_every: Size
    precision: Line
    optimizer: Literal["adamw", "muon"] = "adamw"
    qk_clip: Amount | None = None


class Shape(Part):
    """Of a model: no larger than the largest that there are, since a figure builds one."""

    d_model: Annotated[int, Field(ge=1, le=2**16)]
    n_heads: Annotated[int, Field(ge=1, le=2**10)]
    n_layers: Annotated[int, Field(ge=1, le=2**10)]


class Text(Data):
    """Tokens to train on."""

    vocab_size: Size
    train_tokens: Size
    validation_tokens: Size


class Images(Data):
    """Images to train on."""

    train_images: Size
    test_images: Size
    classes: Size


# Language models: tables 2 and 3, and the ablations.


class LanguageConfig(Shape):
    """What defines a run, and its model."""

    model: Literal["gpt2", "llama"] = "gpt2"  # which the first records do not say
    context: Size
    vocab_size: Size
    row: Row
    attention: Row
    train: Train
    recipe: dict[str, Any] = {}
    passes: Size = 1


class Workers(Part):
    """Who trained together."""

    workers: Size


class Observation(Part):
    """Norms and logits at one step."""

    step: Count
    largest_logit: Real
    gradients: dict[str, Real]
    weights: dict[str, Real]
    activations: dict[str, Real]


class Unseen(Part):
    """What a finished model made of a text of --test."""

    sha256: Line
    loss: Amount
    bits_per_byte: Amount
    tokens: Size
    articles: list[Annotated[list[Amount], Field(min_length=2, max_length=2)]]  # [nats, tokens] each


class LanguageMetrics(Part):
    """Of a run that ended, or broke off."""

    attention_parameters: Size
    cache_per_token: Size
    curve: Curve
    observations: list[Observation] = []
    workers: Workers = Workers(workers=1)
    machines: list[str] = []


class Ended(LanguageMetrics):
    """Of a run that ended."""

    validation_loss: Amount
    bits_per_byte: Amount
    validation_tokens: Size
    tokens_seen: Size
    tokens_per_second: Amount | None
    test: dict[str, Unseen] = {}


class Diverged(Part):
    """Of a run that broke off."""

    diverged_at: Size


class LanguageDiverged(LanguageMetrics, Diverged):
    """Of a language model's run that broke off."""


# Sizes, which no training changes.


class SizesRow(Part):
    """One line of a table of sizes."""

    label: Label
    parameters: Size
    counted_parameters: Size
    cache_per_token: Size
    counted_cache_per_token: Size


class SizesConfig(Part):
    """The paper's shape."""

    d_model: Size
    n_heads: Size


class ShapedSizesConfig(Shape):
    """The paper's shape, with the length of a cache."""

    context: Size


class Megabytes(Part):
    """What the paper's Table 2 says of a row."""

    attention_mb: Above
    cache_mb: Above


class OneSize(Part):
    """What the paper's Table 3 says of a row."""

    size: Above


class SizesRow2(SizesRow):
    """One line of Table 2's sizes."""

    paper: Megabytes


class SizesRow3(SizesRow):
    """One line of Table 3's sizes."""

    paper: OneSize


SomeRow = TypeVar("SomeRow", bound=SizesRow)


class Sizes(Part, Generic[SomeRow]):
    """Of all rows."""

    rows: Annotated[list[SomeRow], Field(min_length=1)]


# Vision transformers.


class VisionConfig(Shape):
    """What defines a fine-tuning, and the model that it begins with."""

    row: Row
    train: Train
    pretrain: Train
    epochs: Amount


class ChosenVisionConfig(VisionConfig):
    """What defines a fine-tuning at a rate that held-out images chose."""

    start: Literal["hosvd", "hooi", "moment"] = "hosvd"


class PaperVisionConfig(Part):
    """What defines a fine-tuning of a model that others pretrained."""

    model: Line
    row: Row
    train: Train
    epochs: Amount


class PretrainedConfig(Shape):
    """What defines a model to start from."""

    pretrain: Train


class Hits(Part):
    """Which images were right, as `bits.packed` writes it."""

    top1: Line
    top5: Line


class Accuracy(Part):
    """Shares of images."""

    top1: Share
    top5: Share
    hits: Hits = None  # type: ignore[assignment]  # left out where it is not kept, and never null


class VisionMetrics(Part):
    """Of any run."""

    attention_parameters: Size
    curve: Curve


class PretrainedEnded(VisionMetrics, Accuracy):
    """Of a model to start from that ended."""


class VisionEnded(PretrainedEnded):
    """Of a fine-tuning that ended."""

    converted: Accuracy


class PaperVisionEnded(VisionEnded):
    """Of a run on many GPUs that ended."""

    workers: Workers


class ChosenVisionEnded(VisionEnded):
    """Of a run at a rate that held-out images chose, or was not."""

    start: Line
    validation_loss: Amount
    validation_top5: Share


class VisionDiverged(VisionMetrics, Diverged):
    """Of a run that broke off."""


class ChosenVisionDiverged(VisionDiverged):
    """Of such a run that broke off."""

    converted: Accuracy
    start: Line


# Spectra and compression.


class Unfolding(Part):
    """The singular values of one unfolding, the largest of which is 1."""

    size: Size
    rank: Count
    entropy_rank: Amount
    energy_rank_99: Count
    floor: Amount
    square_rank: Amount = 0.0
    values: Annotated[list[Amount], Field(min_length=1)] = [1.0]

    @model_validator(mode="after")
    def _all_of_them(self):
        if "values" in self.model_fields_set and len(self.values) != self.size:
            raise ValueError("an unfolding with as many values as its size says")
        return self


class Drawn(Unfolding):
    """One whose singular values are kept, to be drawn."""

    values: Annotated[list[Amount], Field(min_length=1)]


Mode = TypeVar("Mode", bound=Unfolding)


class Pre(Part, Generic[Mode]):
    """Unfoldings of W."""

    head: Mode
    query: Mode
    key: Mode


class Post(Part, Generic[Mode]):
    """Unfoldings of W~."""

    head: Mode
    output: Mode
    value: Mode


class Layer(Part, Generic[Mode]):
    """Both tensors of a layer."""

    pre: Pre[Mode]
    post: Post[Mode]

    def sizes(self) -> tuple[int, ...]:
        """Of all six unfoldings."""
        pre, post = self.pre, self.post
        return tuple(mode.size for mode in (pre.head, pre.query, pre.key, post.head, post.output, post.value))


class SpectraMetrics(Part, Generic[Mode]):
    """Of a model's layers: their weights, as trained and as they began, and their weights on inputs; of ours the loss they reached."""

    trained: Annotated[list[Layer[Mode]], Field(min_length=1)]
    initial: Annotated[list[Layer[Unfolding]], Field(min_length=1)] = []
    inputs: list[Layer[Mode]] = []
    initial_inputs: list[Layer[Unfolding]] = []
    centred: list[Layer[Mode]] = []
    read: Data = None  # type: ignore[assignment]  # left out where nothing was read, and never null
    validation_loss: Amount = 0.0

    @model_validator(mode="after")
    def _of_one_model(self):
        ways = [way for way in (self.trained, self.initial, self.inputs, self.initial_inputs, self.centred) if way]
        if len({len(way) for way in ways}) > 1 or len({layer.sizes() for way in ways for layer in way}) > 1:
            raise ValueError("in every way of as many layers, all of the same sizes")
        return self


class OpenedConfig(Shape):
    """A model that was opened, here or elsewhere."""

    model: Line
    rotary: bool
    run: str = ""
    weights: str = ""


class Samples(Data):
    """What a compressed model was judged on."""

    unit: Line
    calibration: Count
    test: Size


SCORES = ("loss", "top1", "agreement", "similarity")
OF_ITSELF = {"loss", "top1"}  # the scores that the model before has too; the others compare with it


class Scored(Part):
    """What a model reaches, by some of the scores."""

    def scores(self) -> set[str]:
        """Which are given."""
        return self.model_fields_set & {*SCORES}


class Way(Scored):
    """One way to compress: errors of both tensors by weights and by inputs, and what the model then reaches."""

    weights: Annotated[list[Amount], Field(min_length=2, max_length=2)]
    inputs: Annotated[list[Amount], Field(min_length=2, max_length=2)]
    loss: Amount = 0.0
    top1: Share = 0.0
    agreement: Share = 0.0
    similarity: Real = 0.0


class Ways(Part):
    """Truncated for the weights alone, and knowing the inputs; mean pooling where there are heads to pool."""

    plain: Way
    aware: Way
    mean: Way = None  # type: ignore[assignment]  # left out where there is none, and never null


class Before(Scored):
    """The model as it came."""

    attention_parameters: Size
    loss: Amount = 0.0
    top1: Share = 0.0


class CompressMetrics(Part):
    """Of a model with one row in place of its layers."""

    attention_parameters: Size
    cache_per_token: Size
    ways: Ways
    before: Before

    @model_validator(mode="after")
    def _alike(self):
        scores = [way.scores() for way in (self.ways.plain, self.ways.aware, self.ways.mean) if way]
        if not scores[0] or scores != [scores[0]] * len(scores) or self.before.scores() != scores[0] & OF_ITSELF:
            raise ValueError("judged by one or more of " + ", ".join(SCORES) + ", every way and the model before by the same")
        return self


class WholeConfig(OpenedConfig):
    """A model that was compressed as a whole."""

    n_kv_heads: Size


class Predicted(Part):
    """How well a language model predicts one text."""

    tokens: Size
    loss: Amount
    bits_per_byte: Amount
    windows: Annotated[list[Amount], Field(min_length=1)] = None  # type: ignore[assignment]  # left out by older records

    def read(self) -> tuple[int, int]:
        """How many tokens, in how many windows; none where a record does not say."""
        return self.tokens, len(self.windows or ())


class Sentences(Part):
    """Of one text, whose embeddings are those that others are compared with."""

    sentences: Size


class Moved(Sentences):
    """How far embeddings are from those of the model as it came."""

    cosine: Annotated[float, Field(ge=-1.001, le=1.001)]
    rank_correlation: Annotated[float, Field(ge=-1.001, le=1.001)]


class ModelBefore(Part):
    """A whole model as it came."""

    attention_parameters: Size
    cache: Size
    tests: Annotated[dict[str, Predicted] | dict[str, Sentences], Field(min_length=1)]


class CompressModelMetrics(Part):
    """Of a whole model with other layers in place of its own."""

    share: Share
    attention_parameters: Size
    cache: Size
    tests: dict[str, Predicted] | dict[str, Moved]
    before: ModelBefore

    @model_validator(mode="after")
    def _same_texts(self):
        kinds = {isinstance(text, Predicted) for text in (*self.tests.values(), *self.before.tests.values())}
        if len(kinds) > 1 or self.tests.keys() != self.before.tests.keys():
            raise ValueError("judged as the model before was, on the same texts")
        now, before = (
            {name: text.read() for name, text in tests.items() if isinstance(text, Predicted)}
            for tests in (self.tests, self.before.tests)
        )
        if now != before:
            raise ValueError("judged on the same windows of the same texts as the model before")
        return self


class Healing(Part):
    """How attention alone was trained, but for its rate."""

    steps: Size
    batch_size: Size
    window: Size
    rates: Annotated[list[Above], Field(min_length=1)]


class HealConfig(OpenedConfig):
    """A model whose attention was converted and trained."""

    healing: Healing


class PredictedEach(Predicted):
    """How well a language model predicts one text, and each window of it, in nats."""

    windows: Annotated[list[Amount], Field(min_length=1)]


class Judged(Part):
    """A model in one state, on the text that chooses and on those that judge."""

    validation_loss: Amount
    tests: Annotated[dict[str, PredictedEach], Field(min_length=1)]


class JudgedBefore(Judged):
    """The model as it came."""

    attention_parameters: Size
    cache: Size


class RateEnded(Part):
    """What held-out text says of one rate."""

    learning_rate: Above
    validation_loss: Amount


class RateDiverged(Diverged):
    """A rate at which the training broke off."""

    learning_rate: Above


class HealMetrics(Part):
    """Of a model whose attention was converted and trained; `healed` and `chosen` where a rate ended."""

    share: Share
    attention_parameters: Size
    cache: Size
    tokens_seen: Size
    before: JudgedBefore
    converted: Judged
    rates: Annotated[list[RateEnded | RateDiverged], Field(min_length=1)]
    healed: Judged = None  # type: ignore[assignment]  # left out where there is none, and never null
    chosen: Above = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _same_windows(self):
        states = [state for state in (self.before, self.converted, self.healed) if state]
        windows = [{name: test.read() for name, test in state.tests.items()} for state in states]
        if windows != [windows[0]] * len(windows):
            raise ValueError("judged on the same windows of the same texts in every state")
        if (self.healed is None) != (self.chosen is None):
            raise ValueError("healed at the rate that was chosen, or neither of the two")
        return self


class Cost(Part):
    """Of one way to compute the truncated HOSVD."""

    seconds: Above
    megabytes: Above


class CostSize(Part):
    """One layer that was compressed."""

    d_model: Size
    n_heads: Size
    ranks: Ranks
    factors: Cost
    tensors: Cost


class CompressSpeedConfig(Part):
    """What the layers have in common."""

    head_dim: Size
    repeats: Size


class CompressSpeedMetrics(Part):
    """From small layers to large ones."""

    sizes: Annotated[list[CostSize], Field(min_length=1)]

    @model_validator(mode="after")
    def _grows(self):
        widths = [size.d_model for size in self.sizes]
        if sorted(set(widths)) != widths:
            raise ValueError("from the narrowest layer to the widest")
        return self


# Proofs in numbers.


class Cell(Part):
    """One special case: which layer, and how it was compared."""

    mechanism: Line
    rotary: Annotated[str, Field(pattern=r"^(none|head-width.*|decoupled|coupled)$")]
    bias: Line
    norm: bool
    absorb: bool
    qk_norm: str | None = None


class Compared(Part):
    """Errors of a cell by way, and of its controls."""

    cell: Cell
    name: Line
    errors: Annotated[dict[str, Amount], Field(min_length=1)]
    controls: Annotated[dict[str, Amount], Field(min_length=1)]


class ExactnessMetrics(Part):
    """Of all cells."""

    cells: Annotated[list[Compared], Field(min_length=1)]


class RankEntry(Part):
    """Multilinear ranks of both tensors of a layer: by the theorem, as found, and of a control."""

    layer: Line
    theorem: list[Size]
    found: list[Size]
    control: list[Size]


class ErrorEntry(Part):
    """The error of a layer, and of a control."""

    layer: Line
    error: Amount
    control: Amount


class GrowthEntry(Part):
    """Parameters of a layer of width d and, where it is a Tucker layer, of ranks r and r1."""

    layer: Line
    d: Size
    r: Size = 1
    r1: Size = 1
    parameters: Size

    @model_validator(mode="after")
    def _ranks(self):
        if self.layer == "Tucker" and not {"r", "r1"} <= self.model_fields_set:
            raise ValueError("a Tucker layer with r and r1")
        return self


class TheoremsMetrics(Part):
    """What four theorems say, in numbers."""

    ranks: list[RankEntry]
    positions: list[ErrorEntry]
    flash: list[ErrorEntry]
    growth: list[GrowthEntry]


# Times.


class DecodeConfig(Part):
    """One layer that decodes."""

    d_model: Size
    n_heads: Size
    row: Row
    batch: Size
    repeats: Size
    precision: Line


class DecodeMetrics(Part):
    """Milliseconds by how many tokens are in the cache."""

    cache_bytes_per_token: Size
    milliseconds: Annotated[dict[Annotated[str, Field(pattern=r"^[1-9]\d{0,14}$")], Above], Field(min_length=1)]


class GenerationConfig(Shape):
    """A whole model that writes."""

    model: Line
    row: Row
    way: Line
    context: Size
    batch: Size
    steps: Size
    repeats: Size
    precision: Line


class Generating(Part):
    """Its speed and memory."""

    milliseconds: Above
    tokens_per_second: Above
    parameters: Size
    cache_megabytes: Above
    error: Amount = 0.0
    error_float64: Amount = 0.0


class Copied(Part):
    """What the device itself reaches, of copies."""

    what: Literal["copy"]
    gigabytes_per_second: Above


class Multiplied(Part):
    """Of matrix products."""

    what: Literal["matmul"]
    teraflops: Above


class Limits(Part):
    """All rows of that section."""

    rows: list[Annotated[Copied | Multiplied, Field(discriminator="what")]]

    @model_validator(mode="after")
    def _both(self):
        if sorted(row.what for row in self.rows) != ["copy", "matmul"]:
            raise ValueError("one row of copies and one of matrix products")
        return self


class LayerCase(Part):
    """One layer of a model's shape."""

    shape: Line
    row: Line
    backend: Line


class ContextCase(Part):
    """One layer at one context."""

    tokens: Size
    batch: Size
    row: Line
    backend: Line


class DecodeCase(Part):
    """One new token against its cache."""

    context: Size
    batch: Size
    side: Line
    backend: Line


class ModelCase(Part):
    """One step of a whole model."""

    model: Line
    row: Line


class Refused(Part):
    """Why it was not timed."""

    refused: Line


class Timed(Part):
    """Forward and backward."""

    milliseconds: Above
    megabytes: Above | None
    error: Amount = 0.0


class LayerTime(Timed):
    """With what was computed and moved, for a roofline."""

    flops: Size
    bytes: Size


class MemoryCase(Part):
    """A stack of layers, and how much of it is kept between the passes."""

    row: Line
    backend: Line
    way: Line
    layers: Size


class MemoryTime(Timed):
    """The stack's time, and what it keeps."""

    kept_megabytes: Above | None


class CurveCase(Part):
    """One layer, counted, where one of its sizes has some value."""

    along: Literal["d", "n_H", "N"]
    value: Size
    row: Line
    parameters: Size
    cache_bytes: Size


class CurveTime(Timed):
    """Its training, and one token against its cache."""

    microseconds: Above


class StepCase(ModelCase):
    """One step of a whole model at its largest batch."""

    way: Line
    tokens: Size


class DecodeTime(Part):
    """A kernel's time, and the share of the device's bandwidth that it has."""

    microseconds: Above
    microseconds_in_a_row: Above | None = None
    copy_microseconds: Above | None = None
    cache_megabytes: Above
    share_of_copy: Amount
    flops: Size
    bytes: Size
    error: Amount


class ModelTime(Timed):
    """A step's time, and the share of the device's matrix products that it has."""

    parameters: Size
    tokens_per_second: Above
    share_of_matmul: Amount


class StepTime(ModelTime):
    """The largest batch that fits, and its step."""

    batch: Size


class SpeedConfig(Part):
    """How all sections were timed."""

    dtype: Line
    repeats: Size


class SpeedMetrics(Part):
    """Of one section: what its `speed_rows` are."""

    rows: list[dict[str, Any]]


SECTIONS: dict[str, tuple[type[Part], type[Part]]] = {  # what every row of a section says, and those that were timed
    "layers": (LayerCase, LayerTime),
    "contexts": (ContextCase, Timed),
    "memory": (MemoryCase, MemoryTime),
    "decode": (DecodeCase, DecodeTime),
    "models": (ModelCase, ModelTime),
    "step": (StepCase, StepTime),
    "curves": (CurveCase, CurveTime),
}


class RowEntry(Entry):
    """The fields of a record that stands for a row of a table."""

    method: Label


class TrainedEntry(Entry):
    """The fields of a record of a training, which begins with a seed."""

    seed: Seed


def check_section(method: str, rows: list[dict], where: str) -> None:
    """Rows of one section of `speed`, each timed or refused.

    Args:
        method: the section's name.
        rows: its rows.
        where: what messages begin with.

    Raises:
        ValueError: as `check` does.
    """
    if method == "limits":
        check(Limits, {"rows": rows}, where, "metrics")
    case, timed = SECTIONS.get(method, (Part, Part))
    for number, row in enumerate(rows):
        for part in (case, Refused if "refused" in row else timed):
            check(part, row, where, f"metrics.rows[{number}]")


class TwoGpusConfig(Part):
    """What one and two workers trained."""

    row: Line
    sharding: Line
    steps: Size
    global_batch: Size
    context: Size
    paper_tokens: Size
    device: Line


class TwoGpusMetrics(Part):
    """How far apart their losses are, in nats, and how fast each was."""

    noise: Amount
    two_apart: Amount
    resumed_apart: Amount
    next_batch: Amount
    within_noise: bool
    tokens_per_second: Annotated[list[Above], Field(min_length=2, max_length=2)]
    resumed_after: Annotated[list[Size], Field(min_length=2, max_length=2)]


# Checks on the code itself.


class Tally(Part):
    """Of one kind of process that was killed."""

    kills: Count
    ends: Count
    files: Count
    full_disks: Count = 0
    interrupts: Count = 0


class ChangedRecords(Part):
    """Records with one leaf changed, and those of them of which everything was drawn."""

    tried: Count
    drawn: Count


class HostileMetrics(Part):
    """Inputs that met their end, by kind."""

    records: ChangedRecords = ChangedRecords(tried=0, drawn=0)
    kinds: Annotated[dict[Line, Count], Field(min_length=1)]
    skipped: Count


class Package(Part):
    """What tests run of a package."""

    lines: Size
    covered_lines: Count
    branches: Size
    covered_branches: Count
    left_out: Count


class Lot(Part):
    """Mutants that types rejected, drawn by lot and tried on the tests."""

    drawn: Count
    noticed: Count


class MutationMetrics(Part):
    """Faults put into one module."""

    mutants: Count
    mypy: Count
    equivalent: Count
    survived: Count
    lot: Lot = Lot(drawn=0, noticed=0)
    source: str = ""


class FuzzMetrics(Part):
    """Random inputs by contract, and contracts by public name."""

    tried: dict[str, Count]
    inputs: Count
    public_names: dict[str, Count]
    failed: list[str]


class VersionsMetrics(Part):
    """Of tests on one combination of versions."""

    passed: Count
    failed: Count


class Generated(Part):
    """Tokens that were generated, and how many are the model's own."""

    tokens: Count
    same: Count


class OpeningErrors(Part):
    """Relative differences of the logits; other forms of the layers by their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Amount]

    opened: Amount
    own_layers: Annotated[Amount, Field(alias="own layers")]
    Tucker: Amount
    saved: Amount


class Architecture(Part):
    """One that opens."""

    name: str
    which: str
    type: Line
    errors: OpeningErrors
    generated: dict[str, Generated | None]
    option: str
    refused: Amount
    refuses: list[str]


class OpeningMetrics(Part):
    """All that open."""

    architectures: list[Architecture]


# Which of them a record is asked for.

Kind = tuple[type[Part], type[Part], type[Data] | None]  # of its config, its metrics and its data; None where it may have none
TRAINED_LANGUAGE = ("table2", "table3", "ablations")
REST: dict[str, Kind] = {
    "table1": (SizesConfig, Sizes[SizesRow], None),
    "compress": (OpenedConfig, CompressMetrics, Samples),
    "compress_models": (WholeConfig, CompressModelMetrics, Data),
    "heal": (HealConfig, HealMetrics, Data),
    "compress_speed": (CompressSpeedConfig, CompressSpeedMetrics, None),
    "exactness": (Part, ExactnessMetrics, None),
    "theorems": (Part, TheoremsMetrics, None),
    "decode": (DecodeConfig, DecodeMetrics, None),
    "speed": (SpeedConfig, SpeedMetrics, None),
    "two_gpus": (TwoGpusConfig, TwoGpusMetrics, Data),
    "hostile": (Part, HostileMetrics, None),
    "mutation": (Part, MutationMetrics, None),
    "fuzz": (Part, FuzzMetrics, None),
    "versions": (Part, VersionsMetrics, None),
    "opening": (Part, OpeningMetrics, None),
}


def kind_of(entry: Entry) -> Kind:
    """What this record must hold, by its experiment, its preset and what came of it."""
    ended = "diverged_at" not in entry.metrics
    if entry.experiment in TRAINED_LANGUAGE:
        if entry.preset == "sizes":
            of_table2 = entry.experiment == "table2"
            return (ShapedSizesConfig, Sizes[SizesRow2], None) if of_table2 else (SizesConfig, Sizes[SizesRow3], None)
        return LanguageConfig, Ended if ended else LanguageDiverged, Text
    if entry.experiment == "figure3":
        if entry.preset == "paper":
            return PaperVisionConfig, PaperVisionEnded if ended else VisionDiverged, Images
        if entry.preset == "gpu-tiny-imagenet" and "train" in entry.config:
            return ChosenVisionConfig, ChosenVisionEnded if ended else ChosenVisionDiverged, Images
        if "train" in entry.config:
            return VisionConfig, VisionEnded if ended else VisionDiverged, Images
        return PretrainedConfig, PretrainedEnded if ended else VisionDiverged, Images
    if entry.experiment == "spectra":
        of = SpectraMetrics[Unfolding] if entry.preset == "gpu-fresh-optimizers" else SpectraMetrics[Drawn]
        return OpenedConfig if entry.preset == "models" else LanguageConfig, of, None
    if entry.experiment == "generation_speed":
        return GenerationConfig, Refused if "refused" in entry.metrics else Generating, None
    return REST.get(entry.experiment, (Part, Part, None))


def check_curve(value: dict, where: str) -> None:
    """Refuse the curve of a run that ended unless it has an entry after every `log_every` steps, and one after the last.

    Args:
        value: a record whose fields are known to be right, each by itself.
        where: what messages begin with.

    Raises:
        ValueError: for other steps than these.
    """
    curve, settings = value["metrics"]["curve"], value["config"].get("train") or value["config"]["pretrain"]
    steps, every = settings["steps"], settings["log_every"]
    if len(curve) != math.ceil(steps / every) or any(step != min((n + 1) * every, steps) for n, (step, *_) in enumerate(curve)):
        raise ValueError(
            f"{where} has a metrics.curve that does not tell of its {steps:,} steps, one entry after every {every}"
        )


def check_layers(value: dict, where: str) -> None:
    """Refuse spectra of another number of layers than their model has: models of one shape are compared layer by layer.

    Args:
        value: a record whose fields are known to be right, each by itself.
        where: what messages begin with.

    Raises:
        ValueError: naming both numbers.
    """
    layers, told = value["config"]["n_layers"], len(value["metrics"]["trained"])
    if told != layers:
        raise ValueError(f"{where} has a metrics.trained of {told} layers; its config says {layers}")


def check_record(value: dict, where: str, named: tuple[str, ...]) -> None:
    """Refuse a record that some table, claim or figure could not read.

    Args:
        value: as its file has it.
        where: what messages begin with: the file, and which record of it.
        named: experiment and preset in the file's name.

    Raises:
        ValueError: in one line, naming the field and what is allowed there.
    """
    entry = check(Entry, value, where)
    if (entry.experiment, entry.preset) != named:
        raise ValueError(f"{where} is of {entry.experiment}.{entry.preset}; it must be of {'.'.join(named)}, as its file is")
    config, metrics, data = kind_of(entry)
    row = config.model_fields.get("row")
    if (row and row.annotation is Row) or entry.experiment == "compress":  # others tell a row's name beside what they measured
        check(RowEntry, value, where)
    if {"train", "pretrain", "healing"} & config.model_fields.keys():
        check(TrainedEntry, value, where)
    for name, part in (("config", config), ("metrics", metrics), ("data", data or Data)):
        if name == "data" and data is None and entry.data is None:
            continue
        check(part, value[name], where, name)
    for group, tally in (value["metrics"] if entry.experiment in TALLIES else {}).items():
        check(TALLIES[entry.experiment], tally, where, f"metrics.{group}")
    if entry.experiment == "speed":
        check_section(entry.method, value["metrics"]["rows"], where)
    if issubclass(metrics, (Ended, VisionEnded)):
        check_curve(value, where)
    if issubclass(metrics, SpectraMetrics):
        check_layers(value, where)


TALLIES: dict[str, type[Part]] = {"survival": Tally, "coverage": Package}  # metrics that are a group of these, by name
