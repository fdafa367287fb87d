"""Wordings beyond the captions of the clips: some to train the demo's text encoders on, others only to test them.

Here an attribute may be missing from a text (None), so that an encoder also learns what "not said" looks like.
"""

from typing import NamedTuple

import numpy as np

from tools.demo.world import BACKGROUNDS, BOUNCES, COLORS, MOTIONS, SHAPES, Combination

Choices = tuple[str, ...]


class Attributes(NamedTuple):
    """What a text says of a clip; None for what it leaves out."""

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None


VALUES: dict[str, tuple[str | None, ...]] = {
    "color": (*COLORS, None),
    "shape": (*SHAPES, None),
    "motion": (*MOTIONS, None),
    "background": (*BACKGROUNDS, None),
}

ARTICLES: Choices = ("a", "a", "the", "one", "this", "")
SIZES: Choices = ("", "", "", "", "small", "tiny", "little", "large", "big", "huge", "medium")
UNNAMED_SHAPES: Choices = ("object", "shape", "thing", "figure")
ACTS: Choices = (
    *("moving {}", "going {}", "gliding {}", "sliding {}", "floating {}", "drifting {}", "travelling {}", "heading {}"),
    *("moves {}", "goes {}", "glides {}", "slides {}", "floats {}", "drifts {}", "travels {}", "heads {}", "shifts {}"),
    *("is moving {}", "is going {}", "is sliding {}", "is drifting {}", "that moves {}", "moving slowly {}", "{}"),
    *("moving quickly {}", "moves steadily {}", "on its way {}", "walking {}", "runs {}", "in motion {}"),
)
TOWARDS: dict[str, Choices] = {
    "left": ("left", "to the left", "leftwards", "leftward", "towards the left", "to the left side"),
    "right": ("right", "to the right", "rightwards", "rightward", "towards the right", "to the right side"),
    "up": ("up", "upwards", "upward", "up towards the top", "to the top"),
    "down": ("down", "downwards", "downward", "down towards the bottom", "to the bottom"),
    "left and right": ("left and right", "right and left", "from side to side", "to the left and to the right"),
    "up and down": ("up and down", "down and up", "upwards and downwards"),
}
BOUNCING: Choices = ("bouncing {}", "bounces {}", "is bouncing {}", "jumping {}", "swinging {}", "keeps bouncing {}")
STILL: Choices = (
    *("standing still", "stands still", "is standing still", "stays still", "staying in place", "is not moving"),
    *("resting motionless", "not moving", "at rest", "that does not move", "stationary", "motionless", "is still"),
    *("stays in place", "keeps still", "sits still", "still", "without moving", "holding still", "is resting"),
    *("does not move at all", "never going anywhere", "not moving, fully still", "that moves nowhere", "quite still"),
)
BEHIND: Choices = (
    *("on a {} background", "over a {} background", "against a {} background", "in front of a {} background"),
    *("with a {} background", "on {} background", "before a {} background", "on a {} backdrop", "on a {} ground"),
)
FORMS: Choices = (
    *("{subject} {act} {behind}", "{subject} {act} {behind}", "{subject} {behind} {act}", "{behind}, {subject} {act}"),
    *("{behind}: {subject} {act}", "{subject}, {act}, {behind}", "a video of {subject} {act} {behind}"),
    *("{subject} {act}. {behind}", "there is {subject} {behind} {act}"),
)
SUFFIXES: Choices = (" 8 FPS.", " 8 FPS.", " 8 FPS.", "", " {} FPS.", " 8 FPS, {} motion score.", " {} motion score.")

# For testing only: none of these forms is trained on, and their verbs and asides are not either.
UNSEEN_MOVING: Choices = (
    "{article} {color} {shape} creeps {towards}, the background is {background}",
    "{article} {color} {shape} wandering {towards} across a {background} background",
    "{background} background with {article} {color} {shape} which crosses the picture {towards}",
    "look: {article} {color} {shape} keeps rolling {towards} on a {background} background!",
    "{color} {shape}, {towards}, {background} background",
    "see {article} {color} {shape} dash {towards} over a {background} background",
)
UNSEEN_STILL: Choices = (
    "{article} {color} {shape} which remains still, the background is {background}",
    "{background} background with {article} {color} {shape} that never moves, completely still",
    "look: {article} {color} {shape} standing perfectly still on a {background} background!",
    "{color} {shape}, still, {background} background",
)

# General English for the tokenizers' vocabularies and as harmless additions during training.
_WORD_LIST = """
    about above across after again air all along always an and animal another any are around as away back be
    beautiful because become been before begin behind being below beside best better between bird boat body book
    both brown but by camera can car cat center centre child city clear close cloud cold color colour come
    corner could country cut day deep do does dog door draw during each early earth edge end enough even every
    eye face far few field film find fire first fish five flower fly follow food for forest four from full game
    garden get girl give glass go good grass gray great grey ground group grow hand happy hard has have he head
    hear heart heavy height help her here hill his hold home horse hot house how if in into is island it its
    jump keep kind know lake land last late leaf leave length lens life like line live long look lot make man
    many map middle mirror moment moon more morning most mountain mouth much music my near never new next nice
    night no noise north not nothing now number ocean of off often old once only open or other our out outside
    over page paint paper park part people person photo picture piece place plain plane plant play point pretty
    quick quiet rain reach road robot rock roll room rose round run sand say scene school screen sea second see
    she ship short show side sign silver simple sing sit six sky sleep smooth snow so soft some something song
    soon sound south space speed spin star start stay steady step stone stop storm story street strong summer
    sun surface sweet swim table take tall ten than that their them then there these they thick thin think this
    three through time to today together town train tree turn two under until us very video view voice wait walk
    wall want warm was watch water wave way we weather well were west wet what wheel when where which while who
    why wide wild will wind window winter wish with woman wonder wood word work world would write year yet you
    young your advance advances advancing animated appear appears appearing approach approaches balanced bounce
    bounces bouncing briefly calm calmly careful carefully change changes changing circling clearly clip clips
    continue continues continuing cross crossing dance dances dancing distance drag drawing drive drives driving
    easily empty entire enters entering escape exactly exit fade fades fading fill filled final finally flies
    flying form forms frame frames gradually happen hover hovers hovering hurry image images jumps jumping lean
    leaves leaving lines lying march marches marching mere minimal movement movie nearly neat ordinary pass
    passes passing pause perfect pictures position press pulls pulled pulling push pushes pushing quietly
    rapidly reaches reaching render rendered return returns ride rolls rotate rush rushes rushing sails seems
    seen shows showing shown simply single slightly solid somewhat spread steps straight strictly sudden
    suddenly surely swims swimming swings tells thing tiny toward towards travel traveling turning turns uniform
    usual usually vertical vertically horizontal horizontally videos visible walks watching wholly wonderful
"""
WORDS: Choices = tuple(_WORD_LIST.split())


def sample_attributes(
    rng: np.random.Generator, choices: list[Combination], missing: float = 0.1, no_background: float = 0.25
) -> Attributes:
    """One of ``choices`` on either or no background; each of its parts is left out with probability ``missing``."""
    parts = [None if rng.random() < missing else part for part in choices[int(rng.integers(len(choices)))]]
    background = None if rng.random() < no_background else str(rng.choice(list(BACKGROUNDS)))
    return Attributes(parts[0], parts[1], parts[2], background)


def wide_caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """A text that says just these attributes, in one of many wordings."""
    shape = attributes.shape or str(rng.choice(UNNAMED_SHAPES))
    subject = f"{rng.choice(ARTICLES)} {rng.choice(SIZES)} {attributes.color or ''} {shape}"
    act = ""
    if attributes.motion == "still":
        act = str(rng.choice(STILL))
    elif attributes.motion:
        acts = BOUNCING if attributes.motion in BOUNCES and rng.random() < 0.7 else ACTS
        act = str(rng.choice(acts)).format(rng.choice(TOWARDS[attributes.motion]))
    behind = str(rng.choice(BEHIND)).format(attributes.background) if attributes.background else ""
    return tidy(str(rng.choice(FORMS)).format(subject=subject, act=act, behind=behind))


def unseen_caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """A text in a wording kept for testing.

    Args:
        attributes: all of them named.
        rng: chooses the wording.
    """
    color, shape, motion, background = attributes
    towards = ""
    forms = UNSEEN_STILL
    if motion and motion != "still":
        towards, forms = str(rng.choice(TOWARDS[motion])), UNSEEN_MOVING
    article = rng.choice(ARTICLES)
    return tidy(
        str(rng.choice(forms)).format(article=article, color=color, shape=shape, towards=towards, background=background)
    )


def tidy(text: str) -> str:
    """Without the double spaces and stray punctuation that left-out parts leave."""
    text = " ".join(text.split())
    for mark in (",", ".", ":"):
        text = text.replace(f" {mark}", mark)
    return text.strip(" ,.:").replace(",,", ",")


def roughen(text: str, rng: np.random.Generator) -> str:
    """Random capital, final period, added everyday word and frame-rate suffix: what a text may carry along."""
    words = text.split()
    if rng.random() < 0.25:
        for _ in range(int(rng.integers(1, 4))):
            words.insert(int(rng.integers(len(words) + 1)), _stray_word(rng))
    text = " ".join(words)
    if text and rng.random() < 0.4:
        text = text.upper() if rng.random() < 0.1 else text[0].upper() + text[1:]
    if rng.random() < 0.4:
        text += "."
    return text + str(rng.choice(SUFFIXES)).format(int(rng.integers(1, 61)))


def _stray_word(rng: np.random.Generator) -> str:
    """An everyday word, or one that no vocabulary holds."""
    if rng.random() < 0.7:
        return str(rng.choice(WORDS))
    return "".join(rng.choice(list("abcdefghijklmnoprstuvwy"), size=int(rng.integers(2, 9))))
