"""The manifest: everything a device must know about a plan, as data.

It names the tensors that travel (`parameters`, whose order is the flattening order of every
update), the tensors of one batch (`inputs`), how stored examples become them (`features`), the
client optimizer and its settings, and the SHA-256 of every graph and asset. Its canonical bytes are
what the publisher signs, so a signature covers the whole plan.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, TypeAlias

import msgspec

from homespun.errors import PlanError, UnsupportedPlan
from homespun.tensors.tree import Shapes, check_finite, check_shapes
from homespun.types import Hash, Tree

FORMAT = 1
GRAPHS = ("train", "evaluate", "predict")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
OPTIMIZER_TERMS = ("momentum", "weight_decay", "proximal", "max_grad_norm")
RESERVED_INPUTS = frozenset({"weight", "learning_rate", *OPTIMIZER_TERMS})
SETTINGS = frozenset(
    {"name", "local_epochs", "max_rows", "clip_norm", "max_weight", "min_examples"}
)


class Constant(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="constant",
):
    """Every element starts at `value`."""

    value: float = 0.0


class Normal(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="normal",
):
    """Elements drawn from N(0, std^2)."""

    std: float


class Uniform(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="uniform",
):
    """Elements drawn from U(-bound, bound)."""

    bound: float


class Zipf(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="zipf",
):
    """For the output bias of a vocabulary whose words stand in order of frequency: -log(rank + `shift`),
    from the entry `first` on, minus the mean; the entries before are as rare as the last word.

    The model then begins by knowing how common words are (Zipf's law; Mandelbrot's shift), which no
    count of anybody's text had to tell it.
    """

    first: int
    shift: float = 2.7


Initializer: TypeAlias = Constant | Normal | Uniform | Zipf


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of a batch; its first dimension is the batch."""

    name: str
    dtype: Literal["float32", "int32"]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class ParameterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A float32 tensor of the model, and how it starts when there is no checkpoint yet."""

    name: str
    shape: tuple[int, ...]
    initial: Initializer

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class TextFeature(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="text",
):
    """Texts become windows of token ids: `input[t]` is a token, `target[t]` the one after it.

    The texts of all examples, in order, are tokenised with the vocabulary asset and joined to one
    stream; windows of `length` + 1 tokens overlap by one. The tail of the last window is padding.
    """

    field: str
    length: int
    vocabulary_size: int
    asset: str = "vocabulary"
    input: str = "x"
    target: str = "y"


class TensorFeature(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="tensor",
):
    """One field of an example becomes one row of one input, times `scale`.

    The stored value is a number, a nested list, or bytes (or their base64) of little-endian
    `dtype`. `shape` is the shape of one row, without the batch.
    """

    field: str
    input: str
    dtype: Literal["uint8", "int32", "float32"]
    shape: tuple[int, ...] = ()
    scale: float = 1.0


Feature: TypeAlias = TextFeature | TensorFeature


class ClientOptimizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SGD on the device. Order of terms: gradient, proximal term, gradient clipping, weight decay,
    momentum.

    `proximal` is mu of FedProx (Li et al. 2020): mu (p - checkpoint) is added to the gradient.
    `max_grad_norm` bounds the global L2 norm of one step's gradient.
    """

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    max_grad_norm: float | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms in use; the train graph must have been built with each of them."""
        return tuple(name for name in OPTIMIZER_TERMS if getattr(self, name))


class Runtime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the graphs need: ONNX operator-set and IR version."""

    opset: int = 18
    ir: int = 8


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module docstring. A row is one window of text, or one example."""

    format: int = FORMAT
    name: str
    parameters: tuple[ParameterSpec, ...]
    inputs: tuple[TensorSpec, ...]
    predict_inputs: tuple[TensorSpec, ...]
    features: tuple[Feature, ...]

    optimizer: ClientOptimizer
    optimizer_terms: tuple[str, ...] = ()
    """The optional terms that the train graph was built with; the others must stay neutral."""
    batch_size: int
    local_epochs: int = 1
    max_rows: int
    """Most rows one participation may use in an epoch; more are sampled down to it."""
    min_examples: int = 1
    """Stored examples a device needs to be relevant, unless the task says otherwise."""

    clip_norm: float
    """L2 bound of the whole update."""
    max_weight: int
    """A contribution's weight is min(rows, max_weight) / max_weight, in (0, 1]."""
    metrics: tuple[str, ...]
    """Author's metrics, higher is better, the first is primary; `loss` is always reported too."""

    graphs: dict[str, Hash]
    assets: dict[str, Hash] = msgspec.field(default_factory=dict)
    runtime: Runtime = msgspec.field(default_factory=Runtime)
    built_with: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(spec.size for spec in self.parameters)

    @property
    def needed_assets(self) -> tuple[str, ...]:
        """Assets that the features name; a plan is publishable once it carries them all."""
        return tuple(sorted({f.asset for f in self.features if isinstance(f, TextFeature)}))

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is hashed and signed."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Decode and validate. Raises UnsupportedPlan for another format, else PlanError."""
        try:
            found = msgspec.json.decode(data, type=_Format).format
            if found != FORMAT:
                raise UnsupportedPlan(
                    f"plan format {found} is not known here",
                    hint=f"this runtime reads format {FORMAT}; update it or publish for it",
                    expected=FORMAT,
                    got=found,
                )
            manifest = msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise PlanError(f"manifest.json cannot be read: {error}", hint=_REBUILD) from error
        manifest.validate()
        return manifest

    def with_settings(self, **changes: Any) -> Manifest:
        """The same plan with other values: those of ClientOptimizer, or of SETTINGS.

        Raises PlanError for a name that is not a setting, a value out of range, or an optimizer
        term that the train graph was not built with.
        """
        unknown = set(changes) - SETTINGS - set(ClientOptimizer.__struct_fields__)
        if unknown:
            raise PlanError(
                f"{sorted(unknown)} cannot be changed without building the plan again",
                hint=f"settings are {sorted(SETTINGS | set(ClientOptimizer.__struct_fields__))}",
            )
        optimizer = {k: v for k, v in changes.items() if k not in SETTINGS}
        settings = {k: v for k, v in changes.items() if k in SETTINGS}
        changed = msgspec.structs.replace(
            self, optimizer=msgspec.structs.replace(self.optimizer, **optimizer), **settings
        )
        return Manifest.from_bytes(changed.to_bytes())  # decodes again: types are checked too

    def validate(self) -> None:
        """Raises PlanError with the first rule that does not hold."""
        _require(bool(NAME.fullmatch(self.name)), f"name {self.name!r} is not a plain name")
        _require(bool(self.parameters), "there are no parameters")
        _unique("parameters", [p.name for p in self.parameters])
        _unique("inputs", [i.name for i in self.inputs])
        _unique("metrics", list(self.metrics))
        tensors = [(spec.name, spec.shape) for spec in (*self.inputs, *self.predict_inputs)]
        for name, shape in (*self.shapes, *tensors):
            _require(bool(NAME.fullmatch(name)), f"tensor name {name!r} is not a plain name")
            _require(all(d > 0 for d in shape), f"tensor {name} has an empty shape {shape}")
        for parameter in self.parameters:
            start = parameter.initial
            if isinstance(start, Zipf):
                _require(
                    0 <= start.first < parameter.size and start.shift > -1,
                    f"parameter {parameter.name} cannot start at {start}",
                )
        for name, _ in tensors:
            _require("." not in name, f"input name {name!r} has a dot")
        for spec in self.inputs:
            _require(spec.name not in RESERVED_INPUTS, f"input name {spec.name!r} is reserved")
            _require(
                spec.shape[:1] == (self.batch_size,),
                f"input {spec.name} has shape {spec.shape}, the batch size is {self.batch_size}",
            )
        _require(bool(self.metrics), "there are no metrics; the first one is the primary metric")
        _require("loss" not in self.metrics, "loss is always reported and is not a metric's name")
        _require(set(self.graphs) == set(GRAPHS), f"graphs are {sorted(self.graphs)}, not {GRAPHS}")
        for name in self.assets:
            _require(bool(NAME.fullmatch(name)), f"asset name {name!r} is not a plain name")
        self._validate_settings()
        self._validate_features()

    def _validate_settings(self) -> None:
        for name in ("batch_size", "local_epochs", "max_rows", "min_examples", "max_weight"):
            _require(
                getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be at least 1"
            )
        _require(_positive(self.clip_norm), f"clip_norm is {self.clip_norm}, must be above 0")
        o = self.optimizer
        _require(_positive(o.learning_rate), f"learning_rate is {o.learning_rate}, must be above 0")
        _require(0 <= o.momentum < 1, f"momentum is {o.momentum}, must be in [0, 1)")
        _require(
            o.weight_decay >= 0 and o.proximal >= 0, "weight_decay and proximal are not negative"
        )
        _require(
            o.max_grad_norm is None or _positive(o.max_grad_norm),
            "max_grad_norm is above 0, or null",
        )
        known = set(self.optimizer_terms) <= set(OPTIMIZER_TERMS)
        _require(known, f"optimizer_terms {self.optimizer_terms} are not all of {OPTIMIZER_TERMS}")
        missing = set(o.terms) - set(self.optimizer_terms)
        _require(
            not missing,
            f"the train graph was built without {sorted(missing)}",
            hint="leave them at 0 (or null), or build the plan with them",
        )

    def _validate_features(self) -> None:
        _require(bool(self.features), "there are no features")
        texts = [f for f in self.features if isinstance(f, TextFeature)]
        _require(
            not texts or len(self.features) == 1,
            "a text feature must be the only feature: its rows are windows, not examples",
        )
        specs = {spec.name: spec for spec in self.inputs}
        made: list[str] = []
        for feature in self.features:
            names = (
                (feature.input, feature.target)
                if isinstance(feature, TextFeature)
                else (feature.input,)
            )
            row = (feature.length,) if isinstance(feature, TextFeature) else feature.shape
            for name in names:
                _require(name in specs, f"feature {feature.field!r} makes {name!r}, not an input")
                _require(
                    specs[name].shape[1:] == row,
                    f"feature {feature.field!r} makes rows of shape {row}, "
                    f"input {name!r} has {specs[name].shape[1:]}",
                )
            made += names
        _unique("inputs made by features", made)
        _require(set(made) == set(specs), f"no feature makes {sorted(set(specs) - set(made))}")

    @property
    def shapes(self) -> Shapes:
        """Parameter names and shapes in flattening order."""
        return tuple((spec.name, spec.shape) for spec in self.parameters)

    def check_checkpoint(self, checkpoint: Tree) -> None:
        """Raises ShapeMismatch unless `checkpoint` has exactly the plan's parameters,
        NumericFailure if a number in it is not finite."""
        check_shapes(checkpoint, self.shapes)
        check_finite(checkpoint)


class _Format(msgspec.Struct):
    format: int


_REBUILD = "the plan is damaged or was made by other software; build and publish it again"


def _require(holds: bool, message: str, *, hint: str = _REBUILD) -> None:
    if not holds:
        raise PlanError(f"the plan's manifest is not valid: {message}", hint=hint)


def _unique(what: str, names: list[str]) -> None:
    _require(len(set(names)) == len(names), f"{what} repeat a name: {names}")


def _positive(value: float) -> bool:
    return 0 < value < math.inf
