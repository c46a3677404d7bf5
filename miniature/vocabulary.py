"""The things and factors of the miniature world, with the words that name each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Subject:
    """A thing that a picture is about: its icon, its words."""

    icon: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Companion:
    """A thing beside the subject: where it hangs or stands, its default side, its words."""

    icon: str
    sky: bool
    side: Side
    words: tuple[str, ...]


def _subjects() -> dict[str, Subject]:
    table = """
    dog dog-face dog puppy hound|cat cat-face cat kitten|lion lion lion|fox fox fox|bear bear bear
    panda panda panda|koala koala koala|rabbit rabbit-face rabbit bunny hare|cow cow-face cow calf
    pig pig-face pig piglet|frog frog frog toad|monkey monkey-face monkey ape|horse horse-face horse pony
    unicorn unicorn unicorn|wolf wolf wolf|hedgehog hedgehog hedgehog|penguin penguin penguin|owl owl owl
    duck duck duck mallard|eagle eagle eagle hawk|parrot parrot parrot|chicken chicken chicken hen
    turtle turtle turtle tortoise|snake snake snake serpent|fish fish fish|octopus octopus octopus
    shark shark shark|whale spouting-whale whale|dolphin dolphin dolphin|crab crab crab|snail snail snail
    butterfly butterfly butterfly moth|elephant elephant elephant|giraffe giraffe giraffe|camel camel camel
    kangaroo kangaroo kangaroo|goat goat goat|dinosaur t-rex dinosaur|dragon dragon-face dragon
    tiger tiger-face tiger|mouse mouse-face mouse|clown clown-face clown jester|robot robot robot android
    teddy teddy-bear teddy|snowman snowman snowman|car automobile car automobile|bus bus bus
    tractor tractor tractor|train locomotive train locomotive|bicycle bicycle bicycle bike
    boat sailboat boat sailboat|plane airplane plane airplane|rocket rocket rocket spaceship
    house house house home cottage|castle castle castle palace|tent tent tent|chair chair chair seat
    guitar guitar guitar|violin violin violin fiddle|drum drum drum|trumpet trumpet trumpet horn
    clock alarm-clock clock|books books books|television television television|tree deciduous-tree tree oak
    cactus cactus cactus|mushroom mushroom mushroom toadstool|teapot teapot teapot kettle|lobster lobster lobster
    """
    entries = [entry.split() for entry in table.replace("\n", "|").split("|") if entry.strip()]
    return {name: Subject(icon, tuple(words)) for name, icon, *words in entries}


def _companions() -> dict[str, Companion]:
    table = """
    sun sun sky left sun sunshine|cloud cloud sky right cloud|moon crescent-moon sky right moon crescent
    rainbow rainbow sky left rainbow|star star sky right star|balloon balloon sky left balloon
    kite kite sky right kite|dove dove sky left dove pigeon|bat bat sky right bat|ghost ghost sky left ghost phantom
    fireworks fireworks sky right fireworks|lightning high-voltage sky left lightning thunderbolt
    tornado tornado sky right tornado whirlwind|comet comet sky right comet meteor
    snowflake snowflake sky left snowflake|saucer flying-saucer sky right saucer ufo
    bubbles bubbles sky left bubbles|notes musical-notes sky right notes melody|heart red-heart sky left heart
    heartbreak broken-heart sky right heartbreak|rage anger-symbol sky left rage fury
    leaf fallen-leaf sky right leaf
    fire fire ground left fire flames|skull skull ground right skull|spider spider ground left spider tarantula
    bomb bomb ground right bomb explosive|gift wrapped-gift ground left gift present
    cake birthday-cake ground right cake|sunflower sunflower ground left sunflower|rose rose ground right rose
    wilted wilted-flower ground left wilted withered|candle candle ground right candle
    coffin coffin ground left coffin casket|tombstone headstone ground right tombstone gravestone
    trophy trophy ground right trophy|candy lollipop ground left candy lollipop
    popper party-popper ground left popper confetti|clover four-leaf-clover ground right clover
    sword dagger ground right sword dagger|poop pile-of-poo ground left poop dung
    coffee hot-beverage ground right coffee cocoa|rat rat ground left rat|roach cockroach ground right roach cockroach
    icecream soft-ice-cream ground left icecream sundae|pumpkin jack-o-lantern ground right pumpkin
    trash wastebasket ground left trash garbage
    """
    entries = [entry.split() for entry in table.replace("\n", "|").split("|") if entry.strip()]
    return {
        name: Companion(icon, sky == "sky", "left" if side == "left" else "right", tuple(words))
        for name, icon, sky, side, *words in entries
    }


SUBJECTS = _subjects()
COMPANIONS = _companions()

#: Values of each background factor with its prior, and the phrases that name it.
PLACES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on the grass", "in a field", "on a lawn"),
    "sea": ("by the sea", "on the beach", "at the shore", "by the ocean"),
    "snow": ("in the snow", "in a winter landscape", "on the snow"),
    "desert": ("in the desert", "among dunes", "on the sand"),
    "city": ("in the city", "in town", "on a street"),
    "graveyard": ("in a graveyard", "in a cemetery", "among headstones"),
}
WEATHER: dict[str, tuple[float, tuple[str, ...]]] = {
    "clear": (0.55, ("in clear weather", "under fair skies")),
    "rain": (0.15, ("in the rain", "while raining", "in a downpour")),
    "snowfall": (0.15, ("while snowing", "in a blizzard", "in snowfall")),
    "fog": (0.15, ("in the fog", "in mist", "in haze")),
}
BRIGHTNESS: dict[str, tuple[float, tuple[str, ...]]] = {
    "dark": (0.18, ("dark", "gloomy", "black")),
    "dim": (0.20, ("dim", "dusky", "shadowy")),
    "plain": (0.37, ("plain", "ordinary")),
    "bright": (0.25, ("bright", "radiant", "luminous")),
}
SATURATION: dict[str, tuple[float, tuple[str, ...]]] = {
    "gray": (0.15, ("gray", "colorless", "ashen")),
    "muted": (0.20, ("muted", "faded", "pale")),
    "natural": (0.40, ("natural", "normal")),
    "vivid": (0.25, ("vivid", "colorful", "rich")),
}
TINT: dict[str, tuple[float, tuple[str, ...]]] = {
    "none": (0.52, ("untinted", "neutral")),
    "warm": (0.12, ("warm", "golden", "amber")),
    "cold": (0.12, ("cold", "cool", "bluish")),
    "pink": (0.12, ("pink", "rosy")),
    "green": (0.12, ("green", "greenish")),
}
FAR_WORDS = ("far", "distant", "small")
NEAR_WORDS = ("near", "close", "big")
NOTHING_ELSE = ("nothing else", "alone", "only that")
