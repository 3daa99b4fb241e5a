"""Overrides as people type them: ``prompt=a cat, sitting``, ``seeds=0-3``, ``steps=20``."""

from __future__ import annotations

import pytest

from sdtune.cli.as_typed import for_hydra
from sdtune.errors import UserError


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("train", "data.prompt=a photo of sks otter", 'data.prompt="a photo of sks otter"'),
        ("train", "data.prompt=otter", "data.prompt=otter"),
        ("train", r"data.prompt=fox \(animal\), wet", r'data.prompt="fox \(animal\), wet"'),
        ("train", r"data.prompt=fox \(animal\)", r'data.prompt="fox \(animal\)"'),
        ("train", "data.prompt=[V] dog", 'data.prompt="[V] dog"'),
        ("train", 'data.prompt="a" and "b"', r'data.prompt="\"a\" and \"b\""'),
        ("train", "data.prompt=costs ${5}", r'data.prompt="costs \${5}"'),
        ("train", "data.prompt=a photo, 4k", 'data.prompt="a photo, 4k"'),
        ("train", "data.class_prompt=an otter (animal)", 'data.class_prompt="an otter (animal)"'),
        ("train", "data.class_prompt=[an otter, a dog]", "data.class_prompt=[an otter, a dog]"),
        ("train", "data.trigger=2077", 'data.trigger="2077"'),
        ("train", "data.trigger=null", "data.trigger=null"),
        ("train", "data.trigger=choice(a, b)", 'data.trigger="choice(a, b)"'),
        ("train", 'data.prompt="a, b"', 'data.prompt="a, b"'),
        ("train", "data.prompt='90s anime, vhs", 'data.prompt="\'90s anime, vhs"'),
        ("train", "data.prompt=", "data.prompt="),
        ("train", "data.prompt=costs ${5}, cheap", r'data.prompt="costs \${5}, cheap"'),
        ("train", "method.targets=[a,b]", "method.targets=[a,b]"),
        ("train", "steps=20", "steps=20"),
        ("sample", "prompt=a=b, c", 'prompt="a=b, c"'),
        ("sample", "negative_prompt=blurry, grey", 'sampling.negative_prompt="blurry, grey"'),
        ("sample", "negative_prompt=", "sampling.negative_prompt="),
        ("sample", "steps=20", "sampling.steps=20"),
        ("sample", "sampling.steps=20", "sampling.steps=20"),
        ("sample", "seeds=1", "seeds=[1]"),
        ("sample", "seeds=0-3", "seeds=[0,1,2,3]"),
        ("sample", "seeds=7,0-2", "seeds=[7,0,1,2]"),
        ("sample", "seeds=1,", "seeds=1,"),
        ("sample", "seeds=[1,2]", "seeds=[1,2]"),
        ("sample", "strengths=0,0.5,1", "strengths=[0,0.5,1]"),
        ("sample", "strengths=null", "strengths=null"),
        ("plan", "methods=lora,full", "methods=[lora,full]"),
        ("plan", "methods=all", "methods=all"),
        ("mask", "words=cat,dog", "words=[cat,dog]"),
        ("mask", "words=a red car", "words=a red car"),
        ("caption", "undesired_tags=solo,1girl", "undesired_tags=[solo,1girl]"),
        ("caption", "prefix=sks, my", 'prefix="sks, my"'),
    ],
)
def test_override_in_grammar_of_hydra(command: str, given: str, expected: str) -> None:
    assert for_hydra(command, [given]) == [expected]


def test_commas_of_a_sweep_are_kept() -> None:
    for text in ("data.prompt=cat,dog", "data.prompt=choice(cat,dog)", 'data.prompt="a, b",c'):
        assert for_hydra("train", [text, "-m"]) == [text, "-m"]
    assert for_hydra("sample", ["--multirun", "seeds=1,2-3"]) == ["--multirun", "seeds=[1],[2,3]"]


def test_comma_and_space_could_be_a_text_or_a_sweep() -> None:
    with pytest.raises(UserError) as refused:
        for_hydra("train", ["-m", "data.prompt=a cat, sitting"])
    assert str(refused.value) == (
        "data.prompt: with -m, a comma separates the values of a sweep; for one text write"
        """ 'data.prompt="a cat, sitting"', for several 'data.prompt="a cat","sitting"'"""
    )


def test_long_range_of_seeds_is_refused() -> None:
    with pytest.raises(UserError, match="^seeds: 1-20240101 has 20,240,101 numbers; set at most 10,000$"):
        for_hydra("sample", ["seeds=1-20240101"])


def test_empty_range_of_seeds_is_refused() -> None:
    with pytest.raises(UserError, match="^seeds: 3-0 is empty; write seeds=0-3$"):
        for_hydra("sample", ["seeds=3-0"])
