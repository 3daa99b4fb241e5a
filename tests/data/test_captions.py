"""Captions as prompts: the outcomes that kohya's sd-scripts allow, and draws that depend on seed, step and position."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from image_data import batches, encoders, noise, opened
from sdtune.commands.index import index, parse
from sdtune.data import Table
from sdtune.data.captions import MAX_VARIANTS, CaptionRules, Captions, CaptionTexts
from sdtune.errors import UserError


def outcomes(caption: str | tuple[str, ...], count: int = 600, trigger: str | None = None, **settings: Any) -> set[str]:
    texts = CaptionTexts((caption,) if isinstance(caption, str) else caption)
    rules = CaptionRules(Captions(**{"kind": "tags", **settings}), trigger=trigger)
    return {rules.draw(texts, lambda number=number: np.random.default_rng(number)) for number in range(count)}


def shuffled(*tags: str, first: str = "", last: str = "") -> set[str]:
    return {", ".join(filter(None, [first, *order, last])) for order in itertools.permutations(tags)}


# What process_caption of sd-scripts can return, from its documentation (config_README: keep_tokens,
# keep_tokens_separator, secondary_separator, caption_separator, enable_wildcard) and its code: fixed tags, then
# the shuffled ones, then fixed tags at the end, joined by ", "; groups are split after the shuffle.
KOHYA = [
    ("a, b, c", {"shuffle": True}, shuffled("a", "b", "c")),
    ("a, b, c", {"shuffle": True, "keep_tokens": 1}, shuffled("b", "c", first="a")),
    ("a, b, c", {"shuffle": True, "keep_tokens": 2}, {"a, b, c"}),
    ("a, b, c", {"shuffle": True, "keep_tokens": 9}, {"a, b, c"}),
    ("a, b", {"shuffle": False}, {"a, b"}),
    ("a,b ,  c", {"shuffle": True, "keep_tokens": 1}, shuffled("b", "c", first="a")),
    ("a b c", {"shuffle": True, "separator": " "}, shuffled("a", "b", "c")),
    ("a, b; c", {"shuffle": True, "separator": ";"}, shuffled("a, b", "c")),
    ("a, b ||| c, d", {"shuffle": True, "keep_tokens": 1}, shuffled("c", "d", first="a, b")),
    ("a ||| b, c ||| d, e", {"shuffle": True}, shuffled("b", "c", first="a", last="d, e")),
    ("||| a, b ||| c", {"shuffle": True}, shuffled("a", "b", last="c")),
    ("a ### b, c", {"shuffle": True, "keep_tokens_separator": "###"}, shuffled("b", "c", first="a")),
    ("a;;;b, c", {"shuffle": True}, {"a,b, c", "c, a,b"}),
    ("a;;;b, c, d;;;e", {"shuffle": True}, {x.replace("+", ",") for x in shuffled("a+b", "c", "d+e")}),
    ("a;;;b ||| c, d", {"shuffle": True}, {x.replace("+", ",") for x in shuffled("c", "d", first="a+b")}),
    ("a, b", {"caption_tag_dropout_rate": 0.5}, {"a, b", "a", "b", ""}),
    ("a, b, c", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}, {"a, b, c", "a, b", "a, c", "a"}),
    ("a;;;b, c", {"caption_tag_dropout_rate": 0.5}, {"a,b, c", "a,b", "c", ""}),
    ("a ||| b ||| c", {"caption_tag_dropout_rate": 0.5}, {"a, b, c", "a, c"}),
    ("{a|b} x, c", {"wildcards": True}, {"a x, c", "b x, c"}),
    ("{a|b}, {c|d}", {"wildcards": True, "shuffle": True}, {z for x in "ab" for y in "cd" for z in shuffled(x, y)}),
    ("{{a|b}}, c", {"wildcards": True}, {"{a|b}, c"}),
    ("{a|b}, c", {}, {"{a|b}, c"}),
    ("{a}", {"wildcards": True}, {"a"}),
    ("{a|{{b}}}, c", {"wildcards": True}, {"a, c", "{b}, c"}),
    ("{a|}b", {"wildcards": True}, {"ab", "b"}),
    ("a, b", {"prefix": "p,", "shuffle": True, "keep_tokens": 1}, shuffled("a", "b", first="p")),
    ("a, b", {"prefix": "p", "suffix": "s"}, {"p a, b s"}),
    ("a, b", {"prefix": "p,", "suffix": ", s", "shuffle": True}, shuffled("p", "a", "b", "s")),
]


@pytest.mark.parametrize(("caption", "settings", "expected"), KOHYA, ids=range(len(KOHYA)))
def test_possible_captions_are_those_of_kohya(caption: str, settings: dict[str, Any], expected: set[str]) -> None:
    assert outcomes(caption, **settings) == expected


def test_orders_of_tags_are_equally_frequent() -> None:
    rules = CaptionRules(Captions(kind="tags", shuffle=True))
    drawn = (rules.draw(CaptionTexts(("a, b, c",)), lambda n=n: np.random.default_rng(n)) for n in range(3000))
    counts = Counter(drawn)
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


def test_tags_are_dropped_at_the_rate_except_those_that_never_are() -> None:
    rules = CaptionRules(Captions(kind="tags", caption_tag_dropout_rate=0.3, never_dropped=["b"]))
    drawn = [rules.draw(CaptionTexts(("a, b, c",)), lambda n=n: np.random.default_rng(n)) for n in range(2000)]
    counts = Counter(tag for caption in drawn for tag in caption.split(", "))
    assert counts["b"] == 2000
    assert all(1340 < counts[tag] < 1460 for tag in "ac")


def test_trigger_stays_first_and_is_never_dropped() -> None:
    assert outcomes("a, b", trigger="sks", shuffle=True) == shuffled("a", "b", first="sks")
    assert outcomes("a", trigger="sks", caption_tag_dropout_rate=1.0) == {"sks"}
    assert outcomes("sks dog, a, b", trigger="sks", shuffle=True) == shuffled("a", "b", first="sks dog")
    assert outcomes("a, b", trigger="sks, 1girl", shuffle=True) == shuffled("a", "b", first="sks, 1girl")
    assert outcomes("a; b", trigger="sks", shuffle=True, separator=";") == shuffled("a", "b", first="sks")
    assert outcomes("sks, a, b", trigger="sks", prefix="best,", shuffle=True) == shuffled("a", "b", first="best, sks")


def test_text_captions_are_not_changed() -> None:
    assert outcomes("a, b;;;c ||| {d|e}", kind="text", trigger="sks") == {"sks, a, b;;;c ||| {d|e}"}
    assert outcomes("a cat,\n on grass", kind="text") == {"a cat, on grass"}


def test_one_of_several_captions_is_drawn_by_its_weight() -> None:
    assert outcomes(("a", "b"), kind="text") == {"a", "b"}
    assert outcomes("a\n\nb , c\n", kind="text", lines=True) == {"a", "b , c"}
    rules = CaptionRules()
    texts = CaptionTexts(("a", "b"), (1.0, 3.0))
    counts = Counter(rules.draw(texts, lambda n=n: np.random.default_rng(n)) for n in range(2000))
    assert 430 < counts["a"] < 570


def test_sentences_have_their_share_of_the_uses() -> None:
    rules = CaptionRules(Captions(kind="tags", shuffle=True, sentences=0.25), trigger="sks")
    texts = CaptionTexts(("a, b",), sentences=("A dog,\nwith b.",))
    counts = Counter(rules.draw(texts, lambda n=n: np.random.default_rng(n)) for n in range(2000))
    assert set(counts) == {"sks, a, b", "sks, b, a", "sks, A dog, with b."}
    assert 430 < counts["sks, A dog, with b."] < 570


def test_validation_uses_the_first_caption_with_its_tags_in_order() -> None:
    rules = CaptionRules(Captions(kind="tags", shuffle=True, caption_tag_dropout_rate=0.9, wildcards=True, lines=True))
    assert rules.fixed(CaptionTexts(("{x|y}, b;;;c ||| d\nother",))) == "x, b,c, d"


def test_variants_are_all_captions_that_can_be_drawn() -> None:
    for settings in ({"wildcards": True}, {"lines": True}, {"kind": "tags"}, {"kind": "tags", "sentences": 0.5}):
        rules = CaptionRules(Captions(**settings), trigger="sks")  # type: ignore[arg-type]
        texts = CaptionTexts(("{a|b}, c\nd", "e"), sentences=("S.",))
        variants = rules.variants(texts)
        assert variants is not None
        assert set(variants) == {rules.draw(texts, lambda n=n: np.random.default_rng(n)) for n in range(500)}
    wild = CaptionTexts(("{a|b|c|d|e|f|g|h} {1|2|3|4|5|6|7|8} {x|y}",))
    assert MAX_VARIANTS < 8 * 8 * 2
    assert CaptionRules(Captions(wildcards=True)).variants(wild) is None
    assert CaptionRules(Captions(kind="tags", shuffle=True)).variants(texts) is None


@pytest.mark.parametrize(
    "setting", [{"shuffle": True}, {"keep_tokens": 1}, {"caption_tag_dropout_rate": 0.1}, {"never_dropped": ["a"]}]
)
def test_settings_of_tags_are_refused_for_text(setting: dict[str, Any]) -> None:
    message = rf"^data\.captions\.{next(iter(setting))}: has no effect on captions of kind text; set data\.captions"
    with pytest.raises(UserError, match=message):
        Captions(**setting)


# --- in a data module


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    for number in range(6):
        noise(tmp_path / "images" / f"{number}.png", 64, 64, seed=number, caption=f"sks, a{number}, b, c, d, e")
    return tmp_path / "images"


def prompts(folder: Path, **settings: Any) -> list[str]:
    data = opened(folder, captions=Captions(kind="tags", shuffle=True, keep_tokens=1), steps=8, **settings)
    return [prompt for batch in batches(data) for prompt in batch["prompts"]]


def test_shuffles_depend_on_seed_step_and_position_alone(tagged: Path) -> None:
    whole = prompts(tagged)
    assert len(set(whole)) > 12
    assert all(prompt.startswith("sks, ") for prompt in whole)
    assert prompts(tagged) == whole
    assert prompts(tagged, start=3) == whole[6:]
    assert prompts(tagged, seed=1) != whole
    one_by_one = prompts(tagged, accumulation=2)
    assert one_by_one == whole
    shares = []
    for rank in range(2):
        data = opened(tagged, captions=Captions(kind="tags", shuffle=True, keep_tokens=1), steps=8)
        data.trainer.global_rank, data.trainer.world_size = rank, 2  # type: ignore[union-attr]
        shares.append([prompt for batch in batches(data) for prompt in batch["prompts"]])
    assert [prompt for pair in zip(*shares, strict=True) for prompt in pair] == whole


def test_drawn_captions_are_encoded_in_the_step_and_others_are_cached(tagged: Path, tmp_path: Path) -> None:
    drawn = opened(tagged, captions=Captions(kind="tags", shuffle=True), cache_text=True)
    drawn.prepare(encoders(tmp_path / "cache"))
    assert drawn.caches.text is None
    assert "text" not in batches(drawn)[0]
    wild = opened(tagged, captions=Captions(wildcards=True, prefix="{x|y}"), cache_text=True, steps=12)
    wild.prepare(encoders(tmp_path / "cache"))
    assert wild.caches.text is not None
    assert {prompt[0] for batch in batches(wild) for prompt in batch["prompts"]} == {"x", "y"}


def test_sidecars_of_tags_and_sentences_are_both_used(tagged: Path) -> None:
    for number in range(6):
        (tagged / f"{number}.caption").write_text(f"A dog number {number}.", encoding="utf-8")
    data = opened(tagged, captions=Captions(kind="tags", sentences=0.5), steps=20)
    found = Counter(prompt.startswith("A dog") for batch in batches(data) for prompt in batch["prompts"])
    assert found[True] >= 8
    assert found[False] >= 8
    with pytest.raises(UserError, match=r"0\.png has two captions, a \.txt and a \.caption file; remove one, or set"):
        opened(tagged)


def test_lists_of_captions_in_a_table_are_drawn(tmp_path: Path) -> None:
    image = noise(tmp_path / "a.png", 64, 64).read_bytes()
    pq.write_table(pa.Table.from_pylist([{"image": image, "captions": ["one", "two"]}]), tmp_path / "a.parquet")
    index(parse([str(tmp_path / "a.parquet"), f"out={tmp_path / 'a.arrow'}"]))
    data = Table(path=str(tmp_path / "a.arrow"), cache_latents=False, cache_text=False, batch_size=2)
    data.open(64, 4)
    data.trainer = opened(tmp_path, steps=8).trainer
    assert {prompt for batch in batches(data) for prompt in batch["prompts"]} == {"one", "two"}
    assert list(data.all_prompts()) == ["one"]
