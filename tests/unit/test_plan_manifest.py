"""The manifest says what is wrong with it, and only settings can be changed after building."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from homespun import zoo
from homespun.errors import NumericFailure, PlanError, ShapeMismatch, UnsupportedPlan
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import Manifest, ParameterSpec, Zipf

MANIFEST = zoo.load("digits").manifest
KEYBOARD = zoo.load("keyboard").manifest


def changed(manifest: Manifest, **fields) -> bytes:
    document = json.loads(manifest.to_bytes())
    return json.dumps(document | fields).encode()


def test_canonical_bytes_survive_a_round_trip():
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert Manifest.from_bytes(MANIFEST.to_bytes()).to_bytes() == MANIFEST.to_bytes()


def test_the_order_of_parameters_is_the_models():
    names = [name for name, _ in MANIFEST.shapes]
    assert names[:3] == ["first.weight", "first.bias", "second.weight"]
    assert MANIFEST.num_parameters == sum(spec.size for spec in MANIFEST.parameters) == 52_180


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../digits"}, "plain name"),
        ({"parameters": []}, "no parameters"),
        ({"metrics": []}, "no metrics"),
        ({"metrics": ["loss"]}, "loss is always reported"),
        ({"metrics": ["top1", "top1"]}, "repeat a name"),
        ({"batch_size": 21}, "batch size is 21"),
        ({"local_epochs": 0}, "local_epochs is 0"),
        ({"max_rows": -1}, "max_rows is -1"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"max_weight": 0}, "max_weight"),
        ({"optimizer": {"learning_rate": 0}}, "learning_rate"),
        ({"optimizer": {"learning_rate": 0.1, "momentum": 1.0}}, "momentum"),
        ({"optimizer": {"learning_rate": 0.1, "weight_decay": 0.1}}, "without ['weight_decay']"),
        ({"optimizer_terms": ["nesterov"]}, "nesterov"),
        ({"graphs": {"train": "0"}}, "graphs are"),
        ({"features": []}, "no features"),
        ({"surprise": 1}, "surprise"),
        ({"max_rows": "many"}, "max_rows"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(fields, message):
    with pytest.raises(PlanError) as caught:
        Manifest.from_bytes(changed(MANIFEST, **fields))
    assert message in caught.value.message
    assert caught.value.hint


def test_features_must_make_exactly_the_inputs():
    document = json.loads(MANIFEST.to_bytes())
    pixels, label = document["features"]
    for features, message in (
        ([pixels], "no feature makes ['y']"),
        ([pixels, label | {"input": "x"}], "rows of shape"),
        ([pixels, label | {"input": "z"}], "not an input"),
        ([pixels, label, label], "repeat a name"),
    ):
        with pytest.raises(PlanError) as caught:
            Manifest.from_bytes(changed(MANIFEST, features=features))
        assert message in caught.value.message


def test_a_text_feature_stands_alone():
    document = json.loads(KEYBOARD.to_bytes())
    label = json.loads(MANIFEST.to_bytes())["features"][1]
    with pytest.raises(PlanError, match="only feature"):
        Manifest.from_bytes(changed(KEYBOARD, features=[*document["features"], label]))


def test_another_format_is_unsupported_whatever_else_it_says():
    with pytest.raises(UnsupportedPlan) as caught:
        Manifest.from_bytes(b'{"format": 2, "shape": "unheard of"}')
    assert caught.value.details == {"expected": 1, "got": 2}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": "one"}', b"\xff\xfe"])
def test_bytes_that_are_no_manifest(data):
    with pytest.raises(PlanError, match=r"manifest\.json cannot be read"):
        Manifest.from_bytes(data)


def test_settings_change_and_nothing_else_does():
    faster = MANIFEST.with_settings(learning_rate=0.5, momentum=0.9, max_rows=7, clip_norm=2.0)
    assert (faster.optimizer.learning_rate, faster.optimizer.momentum) == (0.5, 0.9)
    assert (faster.max_rows, faster.clip_norm) == (7, 2.0)
    assert faster.graphs == MANIFEST.graphs
    assert MANIFEST.optimizer.momentum == 0.0


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 3}, {"graphs": {}}, {"weight_decay": 0.1}, {"max_rows": 1.5}, {"x": 1}],
)
def test_what_is_not_a_setting_needs_a_new_build(changes):
    with pytest.raises(PlanError):
        MANIFEST.with_settings(**changes)


def test_needed_assets_are_named_by_the_features():
    assert KEYBOARD.needed_assets == ("vocabulary",)
    assert MANIFEST.needed_assets == ()


def test_the_initial_checkpoint_follows_the_initializers():
    first, again = initial_checkpoint(MANIFEST, 1), initial_checkpoint(MANIFEST, 1)
    other = initial_checkpoint(MANIFEST, 2)
    assert list(first) == [spec.name for spec in MANIFEST.parameters]
    MANIFEST.check_checkpoint(first)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["hidden.weight"] != other["hidden.weight"]).any()
    bound = 1 / np.sqrt(32 * 7 * 7)
    assert bound * 0.99 < np.abs(first["hidden.weight"]).max() <= np.float32(bound)
    keyboard = initial_checkpoint(KEYBOARD, 1)
    assert abs(keyboard["embedding.weight"].std() - 0.2) < 0.002
    assert not keyboard["gates"].any()


def test_zipf_starts_with_how_common_words_are():
    spec = ParameterSpec(name="bias", shape=(2016,), initial=Zipf(first=16))
    bias = initial_checkpoint(msgspec.structs.replace(MANIFEST, parameters=(spec,)), 0)["bias"]
    assert bias.dtype == np.float32
    assert abs(bias.mean()) < 1e-5
    words = bias[16:]
    assert (np.diff(words) < 0).all()
    # log((rank + 1 + shift) / (1 + shift)): the first word against the hundredth
    assert words[0] - words[99] == pytest.approx(np.log(102.7 / 3.7), rel=1e-5)
    assert (bias[:16] == words[-1]).all()  # what is no word is as rare as the last one


@pytest.mark.parametrize("zipf", [Zipf(first=2016), Zipf(first=-1), Zipf(first=0, shift=-1.0)])
def test_zipf_without_words_or_with_an_infinite_first_one_is_refused(zipf):
    spec = ParameterSpec(name="bias", shape=(2016,), initial=zipf)
    with pytest.raises(PlanError, match="parameter bias cannot start"):
        msgspec.structs.replace(MANIFEST, parameters=(spec,)).validate()


def test_a_checkpoint_of_another_model_is_refused():
    good = initial_checkpoint(MANIFEST, 0)
    for wrong in (
        {k: v for k, v in good.items() if k != "first.bias"},
        good | {"extra": good["first.bias"]},
        good | {"first.bias": good["first.bias"][1:]},
        good | {"first.bias": good["first.bias"].astype(np.float64)},
    ):
        with pytest.raises(ShapeMismatch):
            MANIFEST.check_checkpoint(wrong)
    with pytest.raises(NumericFailure):
        MANIFEST.check_checkpoint(good | {"first.bias": good["first.bias"] * np.nan})


def test_every_record_is_strict_and_immutable():
    with pytest.raises(AttributeError):
        MANIFEST.name = "other"  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "normal", "std": 1, "mean": 2}, type=type(KEYBOARD.parameters[0]))
