"""Wrong calls from Python, see :mod:`tests.attack.calls`."""

from tests.attack import calls
from tests.attack.runner import Case


def cases() -> list[Case]:
    """Every call of every kind."""
    found = []
    for kind in ("load_config", "build_module", "save_video", "read", "pipeline"):
        for name in getattr(calls, kind)(""):
            word = name.split()[0].split(".")[-1]
            culprit = (
                "gone"
                if name == "ref missing"
                else {"picture": "image|picture", "clip": "video|clip|path"}.get(word, word.rstrip("s"))
            )
            if kind == "save_video" and word != "fps":
                culprit = "pixels|frame|fps|n{30}|clips.csv|a.xyz|finite|no name|a.png"
            if word == "ref":
                culprit = "ref|image not found|gone"
            found.append(Case(f"{kind}-{name}", kind, ("{good}", name), f"(?i){culprit}", late=kind == "pipeline"))
    return found
