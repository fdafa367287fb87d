"""What the page says, in its languages."""

from collections.abc import Mapping
from types import MappingProxyType

LANGUAGES: Mapping[str, str] = MappingProxyType({"en": "English", "zh": "中文"})

WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "tagline": ("Videos from words and pictures", "用文字和图片生成视频"),
        "language": ("Language", "语言"),
        "prompt": ("Prompt", "提示词"),
        "prompt_hint": ("What is seen, how it moves, the light, the camera", "画面内容、动作、光线、镜头"),
        "examples": ("Examples", "示例"),
        "pictures": ("Start from a picture", "从图片开始"),
        "first": ("First frame", "首帧"),
        "drop": ("Drop a picture here, or click", "拖放图片到此处，或点击选择"),
        "last": ("Last frame", "末帧"),
        "given": ("Frames anywhere, clips, parts of a picture", "任意位置的帧、视频片段、画面区域"),
        "references": ("Pictures and clips", "图片和视频"),
        "places": ("Their frames in the video", "它们在视频中的帧"),
        "places_hint": ("a place each, such as 0;-1 or 0-32;96-128", "每个一个位置，例如 0;-1 或 0-32;96-128"),
        "mask": ("Mask: what is white is kept", "遮罩：白色部分保留"),
        "fixes": ("What they fix", "它们固定的内容"),
        "fixes_hint": ("empty: places or the mask say it", "留空则由位置或遮罩决定"),
        "next_prompts": ("Prompts of the further windows", "后续窗口的提示词"),
        "next_prompts_hint": ("a line each; the last one stays", "每行一个；最后一个沿用到结尾"),
        "size": ("Size", "尺寸"),
        "ratio": ("Aspect ratio", "宽高比"),
        "length": ("Frames ({fps}/s)", "帧数（{fps}/秒）"),
        "steps": ("Steps", "步数"),
        "seed": ("Seed", "随机种子"),
        "seed_hint": ("empty: a new one each time", "留空则每次随机"),
        "guidance": ("Guidance", "引导强度"),
        "motion": ("Motion score", "运动幅度"),
        "motion_hint": ("1 is still, 15 is violent", "1 静止，15 剧烈"),
        "unsaid": ("not said", "不指定"),
        "refine": ("Expand the prompt with a language model", "用语言模型润色提示词"),
        "negative": ("Negative prompt", "负面提示词"),
        "negative_hint": ("What the video shall not be", "不希望出现的内容"),
        "lora": ("LoRA", "LoRA"),
        "none": ("none", "无"),
        "strength": ("Strength", "强度"),
        "more": ("More settings", "更多设置"),
        "make": ("Make the video", "生成视频"),
        "cancel": ("Stop", "停止"),
        "empty": ("Your video appears here", "视频将显示在这里"),
        "queued": ("In the queue", "排队中"),
        "before": ("{count} before it", "前面还有 {count} 个"),
        "next": ("next", "下一个"),
        "starting": ("The model is being loaded", "正在加载模型"),
        "in_progress": ("Being made", "生成中"),
        "step": ("step {step} of {steps}", "第 {step} / {steps} 步"),
        "decoding": ("turning latents into pixels", "正在解码画面"),
        "seconds": ("{count} s", "{count} 秒"),
        "completed": ("Ready", "完成"),
        "failed": ("It could not be made", "生成失败"),
        "cancelled": ("Stopped", "已停止"),
        "mine": ("Your videos", "我的视频"),
        "mine_empty": ("What you make is kept here until it expires.", "你生成的视频会保存在这里，直到过期。"),
        "again": ("Again with these", "用这些设置再来一次"),
        "delete": ("Delete", "删除"),
        "video": ("video", "视频"),
        "json": ("settings", "参数"),
        "frames": ("{count} frames", "{count} 帧"),
    }
)


def say(key: str, language: str, **values: object) -> str:
    """A text in a language, English where the language is not known."""
    english, chinese = WORDS[key]
    return (chinese if language == "zh" else english).format(**values)


def preferred(accepted: str | None) -> str:
    """The language of a browser, by its ``Accept-Language``."""
    return "zh" if (accepted or "").strip().lower().startswith("zh") else "en"
