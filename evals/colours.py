"""The colours of scores, the same in pictures and in the terminal."""

from matplotlib.colors import LinearSegmentedColormap

RED_TO_GREEN = LinearSegmentedColormap.from_list(
    "needle", ["#c8323c", "#e8714a", "#f7b267", "#fbe28b", "#c5dd7d", "#78bd6b", "#2f9256"]
)
INK, FAINT, MISSING = "#22272e", "#6b7480", "#e6e8eb"


def colour_of(score: float) -> str:
    red, green, blue, _ = RED_TO_GREEN(min(max(score, 0.0), 1.0), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


def ink_on(score: float) -> str:
    """Dark or white, whichever is read more easily on the score's colour."""
    red, green, blue, _ = RED_TO_GREEN(min(max(score, 0.0), 1.0))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.52 else "#ffffff"
