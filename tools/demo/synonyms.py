"""Other words for what the demo world shows: everyday English ones, and Chinese."""

from collections.abc import Mapping

import numpy as np

from tools.demo.world import BOUNCES, Combination

Choices = tuple[str, ...]
Words = Mapping[str, Choices]

COLORS: Words = {
    "red": ("scarlet", "crimson", "bright red", "dark red"),
    "green": ("emerald", "lime", "bright green", "dark green"),
    "blue": ("navy", "navy blue", "dark blue", "royal blue"),
    "yellow": ("golden", "gold", "orange", "bright yellow"),
    "purple": ("violet", "magenta", "lilac", "pink"),
    "cyan": ("turquoise", "teal", "aqua", "light blue", "sky blue"),
}
SHAPES: Words = {
    "circle": ("ball", "ball", "disc", "disk", "dot", "sphere", "round shape", "round ball"),
    "square": ("box", "box", "block", "cube", "tile", "square box"),
    "triangle": ("pyramid", "triangular shape", "cone", "wedge"),
}
BACKGROUNDS: Words = {
    "dark": ("black", "black", "dark grey", "dark gray"),
    "light": ("white", "white", "bright", "pale"),
}
MANNERS: Choices = ("slowly", "slowly", "quickly", "fast", "smoothly", "gently", "steadily")
MOVING: Choices = ("moving", "moves", "is moving", "rolling", "rolls", "flying", "flies", "going", "goes", "floating")

BOUNCING: Choices = ("bouncing", "bounces", "is bouncing", "jumping", "moving", "swinging", "going")

CHINESE_COLORS: Words = {
    "red": ("红色", "红色的", "红", "大红色的"),
    "green": ("绿色", "绿色的", "绿"),
    "blue": ("蓝色", "蓝色的", "蓝", "深蓝色的"),
    "yellow": ("黄色", "黄色的", "黄", "金色的"),
    "purple": ("紫色", "紫色的", "紫", "粉色的"),
    "cyan": ("青色", "青色的", "天蓝色的", "浅蓝色的"),
}
CHINESE_SHAPES: Words = {
    "circle": ("圆形", "圆", "圆球", "球", "小球", "圆圈"),
    "square": ("正方形", "方块", "方形", "盒子", "箱子"),
    "triangle": ("三角形", "三角"),
}
CHINESE_TOWARDS: Words = {
    "left": ("向左", "往左", "向左边", "朝左"),
    "right": ("向右", "往右", "向右边", "朝右"),
    "up": ("向上", "往上", "向上方", "朝上"),
    "down": ("向下", "往下", "向下方", "朝下"),
    "left and right": ("左右", "左右来回"),
    "up and down": ("上下", "上下来回"),
}
CHINESE_MOVING: Choices = ("移动", "移动", "运动", "滑动", "飞", "走", "滚动", "缓慢移动", "慢慢移动", "快速移动")
CHINESE_BOUNCING: Choices = ("弹跳", "移动", "运动", "跳动", "反弹")
CHINESE_STILL: Choices = ("静止不动", "静止", "不动", "停在原地", "保持不动", "一动不动")
CHINESE_BACKGROUNDS: Words = {
    "dark": ("深色背景", "黑色背景", "暗色背景", "黑背景"),
    "light": ("浅色背景", "白色背景", "亮色背景", "白背景"),
}
CHINESE_COUNTS: Choices = ("一个", "一个", "这个", "", "一只")


def english(combination: Combination, background: str | None, rng: np.random.Generator) -> str:
    """The words of a plain caption, about half of them replaced by everyday ones; "slowly" and the like say nothing.

    Args:
        combination: what to say.
        background: "dark", "light" or None, which leaves it out.
        rng: chooses the words.
    """
    color, shape, motion = combination
    act = "standing still"
    if motion != "still":
        manner = str(rng.choice(MANNERS)) if rng.random() < 0.4 else ""
        act = str(rng.choice(BOUNCING if motion in BOUNCES else MOVING))
        act += f" {motion} {manner}" if manner and rng.random() < 0.5 else f" {manner} {motion}"
    subject = f"{rng.choice(['a', 'a', 'the', ''])} {_other(COLORS, color, rng)} {_other(SHAPES, shape, rng)}"
    behind = f" on a {_other(BACKGROUNDS, background, rng)} background" if background else ""
    text = " ".join(f"{subject} {act}{behind}".split())
    return text.upper() if rng.random() < 0.1 else text


def chinese(combination: Combination, background: str | None, rng: np.random.Generator) -> str:
    """The same in Chinese; now and then with an English word for the shape."""
    color, shape, motion = combination
    named = str(rng.choice(CHINESE_SHAPES[shape])) if rng.random() < 0.9 else f" {shape} "
    subject = f"{rng.choice(CHINESE_COUNTS)}{rng.choice(CHINESE_COLORS[color])}{named}"
    act = str(rng.choice(CHINESE_STILL))
    if motion != "still":
        moving = CHINESE_BOUNCING if motion in BOUNCES else CHINESE_MOVING
        act = f"{rng.choice(CHINESE_TOWARDS[motion])}{rng.choice(moving)}"
    if background is None:
        return f"{subject}{act}".strip()
    behind = str(rng.choice(CHINESE_BACKGROUNDS[background]))
    forms = (
        f"{behind}，{subject}{act}",
        f"{subject}在{behind}上{act}",
        f"{subject}{act}，{behind}",
        f"{behind}上{subject}{act}",
    )
    return str(rng.choice(forms)).strip()


def _other(words: Words, word: str, rng: np.random.Generator) -> str:
    """The word itself, or as often another one for it."""
    return str(rng.choice(words[word])) if rng.random() < 0.5 else word
