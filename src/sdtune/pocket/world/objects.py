"""Objects, backgrounds, sizes, places and styles of pocket's world, as plain data.

An object is a drawing with a name ("poodle") and a class word ("dog"). A held-out subject belongs to a known class:
pocket was trained on the class word and on other objects of the class, but not on this drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("fluent", "noto")
"""Fluent 3D emoji are pocket's training style; Noto Color Emoji show the same objects in a style new to pocket."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 224, 92),
    "green": (76, 175, 80),
    "teal": (0, 140, 149),
    "blue": (52, 96, 214),
    "purple": (128, 62, 176),
    "pink": (248, 165, 194),
    "brown": (121, 76, 44),
    "gray": (140, 145, 150),
    "white": (245, 245, 245),
    "black": (28, 28, 32),
}

SIZES: dict[str, int] = {"big": 46, "small": 28}
"""Side of the object's box in pixels of a 64x64 image, before jitter of up to two pixels."""

PLACES: dict[str, tuple[float, float]] = {
    "on the left": (-0.7, 0.0),
    "on the right": (0.7, 0.0),
    "at the top": (0.0, -0.7),
    "at the bottom": (0.0, 0.7),
    "in the middle": (0.0, 0.0),
}
"""Offset of the object's center, as a fraction of the free space between its box and the image's edge."""


@dataclass(frozen=True)
class Recolour:
    """Color change of a drawing: ``hue`` is added (1.0 is a full turn), saturation is multiplied by ``saturation``."""

    hue: float = 0.0
    saturation: float = 1.0


@dataclass(frozen=True)
class Thing:
    """Object: its name, its class word, its emoji's code points, and whether it is held out from training."""

    name: str
    word: str
    code: str
    recolour: Recolour | None = None
    held_out: bool = False

    @property
    def art(self) -> str:
        """File name of the drawing in the art folder, without suffix."""
        return self.code


def _members(word: str, members: dict[str, str | tuple[str, Recolour]], held_out: dict[str, str]) -> list[Thing]:
    things = []
    for name, drawing in members.items():
        code, recolour = drawing if isinstance(drawing, tuple) else (drawing, None)
        things.append(Thing(name, word, code, recolour))
    return things + [Thing(name, word, code, held_out=True) for name, code in held_out.items()]


_GRAY = Recolour(saturation=0.08)

_CLASSES = [
    *_members(
        "dog",
        {"spaniel": "1f436", "guide dog": "1f9ae", "rescue dog": "1f415-200d-1f9ba", "gray spaniel": ("1f436", _GRAY)},
        {"poodle": "1f429"},
    ),
    *_members(
        "cat",
        {
            "kitten": "1f431",
            "tabby": "1f408",
            "gray kitten": ("1f431", _GRAY),
            "pink kitten": ("1f431", Recolour(-0.16)),
        },
        {"black cat": "1f408-200d-2b1b"},
    ),
    *_members(
        "bird",
        {
            "songbird": "1f426",
            "penguin": "1f427",
            "owl": "1f989",
            "duck": "1f986",
            "flamingo": "1f9a9",
            "rooster": "1f413",
            "swan": "1f9a2",
            "chick": "1f424",
        },
        {"parrot": "1f99c"},
    ),
    *_members(
        "fish",
        {"bluefish": "1f41f", "angelfish": "1f420", "shark": "1f988", "goldfish": ("1f41f", Recolour(-0.5))},
        {"blowfish": "1f421"},
    ),
    *_members(
        "car", {"sedan": "1f697", "taxi": "1f695", "police car": "1f693", "jeep": "1f699"}, {"race car": "1f3ce-fe0f"}
    ),
    *_members(
        "flower",
        {"tulip": "1f337", "rose": "1f339", "hibiscus": "1f33a", "cherry blossom": "1f338", "daisy": "1f33c"},
        {"sunflower": "1f33b"},
    ),
    *_members(
        "boat", {"sailboat": "26f5", "liner": "1f6a2", "canoe": "1f6f6", "ferry": "26f4-fe0f"}, {"speedboat": "1f6a4"}
    ),
    *_members(
        "ball",
        {
            "soccer ball": "26bd",
            "baseball": "26be",
            "basketball": "1f3c0",
            "softball": "1f94e",
            "volleyball": "1f3d0",
        },
        {"eight ball": "1f3b1"},
    ),
    *_members("house", {"cottage": "1f3e0", "hut": "1f6d6", "church": "26ea", "school": "1f3eb"}, {"castle": "1f3f0"}),
    *_members(
        "fruit",
        {
            "apple": "1f34e",
            "pear": "1f350",
            "peach": "1f351",
            "lemon": "1f34b",
            "banana": "1f34c",
            "strawberry": "1f353",
            "watermelon": "1f349",
            "cherries": "1f352",
            "grapes": "1f347",
            "tangerine": "1f34a",
        },
        {"pineapple": "1f34d"},
    ),
    *_members(
        "hat", {"top hat": "1f3a9", "sun hat": "1f452", "cap": "1f9e2", "crown": "1f451"}, {"graduation cap": "1f393"}
    ),
    *_members(
        "shoe", {"boot": "1f462", "high heel": "1f460", "sneaker": "1f45f", "loafer": "1f45e"}, {"hiking boot": "1f97e"}
    ),
    *_members(
        "tree",
        {
            "pine": "1f332",
            "oak": "1f333",
            "christmas tree": "1f384",
            "autumn oak": ("1f333", Recolour(-0.24, 1.2)),
        },
        {"palm tree": "1f334"},
    ),
    *_members(
        "bear",
        {"brown bear": "1f43b", "panda": "1f43c", "polar bear": "1f43b-200d-2744-fe0f", "teddy": "1f9f8"},
        {"koala": "1f428"},
    ),
    *_members(
        "bug",
        {"ladybug": "1f41e", "bee": "1f41d", "beetle": "1fab2", "butterfly": "1f98b", "ant": "1f41c"},
        {"caterpillar": "1f41b"},
    ),
]

_SINGLES = {
    "fox": "1f98a",
    "frog": "1f438",
    "lion": "1f981",
    "pig": "1f437",
    "rabbit": "1f430",
    "cow": "1f42e",
    "elephant": "1f418",
    "turtle": "1f422",
    "octopus": "1f419",
    "crab": "1f980",
    "snail": "1f40c",
    "bell": "1f514",
    "light bulb": "1f4a1",
    "clock": "23f0",
    "umbrella": "2614",
    "balloon": "1f388",
    "guitar": "1f3b8",
    "rocket": "1f680",
    "train": "1f682",
    "mushroom": "1f344",
    "carrot": "1f955",
    "pizza": "1f355",
    "robot": "1f916",
    "pumpkin": "1f383",
    "star": "2b50",
}

THINGS: tuple[Thing, ...] = (*_CLASSES, *(Thing(name, name, code) for name, code in _SINGLES.items()))
TRAINED: tuple[Thing, ...] = tuple(thing for thing in THINGS if not thing.held_out)
HELD_OUT: tuple[Thing, ...] = tuple(thing for thing in THINGS if thing.held_out)
BY_NAME: dict[str, Thing] = {thing.name: thing for thing in THINGS}
