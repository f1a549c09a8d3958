"""Every field of every method has a type that is checked and a text that helps."""

from __future__ import annotations

from typing import Any

import pytest

from omnisieve.compressors import CompressorError, build_compressor, compressor_type, list_compressors
from omnisieve.compressors.fields import fields_of
from omnisieve.evaluation.bounds import build_bound


@pytest.mark.parametrize("method", list_compressors())
def test_every_field_has_a_text(method: str) -> None:
    fields = fields_of(compressor_type(method).settings_type)
    assert [field.name for field in fields if not field.help] == []


def test_a_text_goes_over_lines_and_belongs_to_each_name_before_it() -> None:
    texts = {field.name: field.help for field in fields_of(compressor_type("omnidrop").settings_type)}
    assert texts["beta"] == texts["t_mid"] == "slope and midpoint of the sigmoid (20, 0.5; t_mid 0.55 for 3B at 20 %)."
    assert texts["p_final"].endswith("p_final can be given under official rounding only.")


@pytest.mark.parametrize(
    ("method", "field", "value", "expected"),
    [
        ("random", "retained_ratio", "0.25", "'0.25', of type str; expected float or null"),
        ("random", "seed", 1.5, "expected int"),
        ("random", "seed", True, "of type bool; expected int"),
        ("random", "rounding", 3, "expected one of exact, official"),
        ("windivprune", "attention_weighted", 1, "expected bool"),
        ("omnisift", "base_settings", "audio_novelty=1", "expected mapping or null"),
        ("seats", "transition_layers", ["a", "b", "c", "d"], "expected list of 4 int or null"),
    ],
)
def test_a_value_of_another_type_is_refused(method: str, field: str, value: Any, expected: str) -> None:
    with pytest.raises(CompressorError) as error:
        build_compressor(method, hidden_size=8, **{"retained_ratio": 0.5, field: value})
    assert str(error.value).startswith(f"{method}: {field} is ")
    assert expected in str(error.value)


def test_a_bound_is_as_strict() -> None:
    with pytest.raises(CompressorError, match=r"oracle: retained_ratio is '0\.25', of type str"):
        build_bound("oracle", retained_ratio="0.25")
    with pytest.raises(CompressorError, match="oracle has no setting 'retained'; did you mean 'retained_ratio'"):
        build_bound("oracle", retained=0.25)


def test_whole_numbers_are_ratios_too() -> None:
    assert build_compressor("random", retained_ratio=1).settings.retained_ratio == 1
