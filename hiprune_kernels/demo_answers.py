"""The demonstration's first part: a small trained LLaVA answers questions about scenes from fewer and fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .methods import HiPrune, Random
from .quality import Answers, ask, load, scenes_of
from .quality.scenes import Scene
from .visualize import draw_selection, optional_import

if TYPE_CHECKING:
    from PIL.Image import Image

TOKENS, GRID = 144, (12, 12)
WAYS = {  # title -> method
    f"all {TOKENS} tokens": None,
    "a third: HiPrune, 48": HiPrune(budget=48),
    "a ninth: HiPrune, 16": HiPrune(budget=16),
    "as many at random": Random(budget=16),
}
SHOWN = 3  # scenes in the picture
_RIGHT, _WRONG = "#2e8b57", "#d43d3d"


def answer_scenes(out: Path, *, count: int) -> dict[str, Any]:
    """Ask about `count` scenes in all ways, draw the first ones to out/answers.png, and return what was found.

    Raises:
        ImportError: without scikit-learn, pillow or matplotlib.
    """
    scenes = scenes_of(count)
    model, processor = load()
    found = {title: ask(model, processor, scenes, method) for title, method in WAYS.items()}
    picture = out / "answers.png"
    _figure(scenes[:SHOWN], found).savefig(picture, dpi=100)
    questions = len(scenes) * found[f"all {TOKENS} tokens"].right.shape[1]
    ways = []
    for title, answers in found.items():
        accuracy, error = answers.accuracy
        ways.append({"way": title, "accuracy": accuracy, "standard_error": error})
    return {"picture": picture.name, "questions": questions, "scenes": len(scenes), "ways": ways}


def _figure(scenes: Sequence[Scene], found: dict[str, Answers]) -> Any:
    """Scenes below one another, ways side by side: the kept tokens, and each question with its answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * len(found), 4.7 * len(scenes)), layout="constrained")
    axes = figure.subplots(len(scenes), len(found), squeeze=False)
    for row, scene in enumerate(scenes):
        questions = scene.questions(np.random.default_rng(row))
        for column, (title, answers) in enumerate(found.items()):
            cell = axes[row, column]
            cell.imshow(np.asarray(_kept(scene, answers, row)))
            cell.set_axis_off()
            cell.set_title(title if row == 0 else "", fontsize=13)
            for line, (question, _) in enumerate(questions):
                y = -0.05 - 0.062 * line
                right = bool(answers.right[row, line])
                cell.text(0, y, f"{question}?", transform=cell.transAxes, fontsize=9, va="center")
                cell.text(
                    1,
                    y,
                    f"{answers.words[row][line]} {'✓' if right else '✗'}",
                    transform=cell.transAxes,
                    fontsize=9,
                    ha="right",
                    va="center",
                    color=_RIGHT if right else _WRONG,
                    weight="normal" if right else "bold",
                )
    return figure


def _kept(scene: Scene, answers: Answers, place: int) -> Image:
    """The scene, with the tokens that were dropped dark."""
    image = optional_import("PIL.Image").fromarray(scene.pixels)
    roles = np.ones(TOKENS, dtype=np.int64)
    if answers.kept is not None:
        roles[:] = 0
        roles[answers.kept[place].numpy()] = 1
        return draw_selection(image, roles.tolist(), GRID, role_names=("kept",), legend=False)
    return image.resize((28 * GRID[1], 28 * GRID[0]))


def answer_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of `answer_scenes`: a way, and its right answers in percent with their standard error."""
    rows = [("tokens", "right answers, %")]
    rows += [(way["way"], f"{100 * way['accuracy']:.1f} +- {100 * way['standard_error']:.1f}") for way in found["ways"]]
    return rows


def answers_markdown(found: dict[str, Any]) -> list[str]:
    """The part of the report that tells of them."""
    return [
        "## A small trained LLaVA answers from fewer tokens",
        "",
        *markdown_table(answer_rows(found)),
        "",
        f"{found['questions']} questions about {found['scenes']} generated scenes of digits that the model has never "
        "seen, through stock generate(); +- is one standard error. `hiprune quality` compares all methods.",
        "",
        f"![questions, answers and kept tokens]({found['picture']})",
        "",
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]
