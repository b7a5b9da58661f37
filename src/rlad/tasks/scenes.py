"""Questions with exact answers about drawn scenes of up to four coloured shapes in four places.

Only the picture contains the answer, and perception can be checked: a completion may begin with
`<perception>large red circle, small blue square</perception>`, the shapes in reading order.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from rlad.config.task import ScenesConfig
from rlad.models.pictures import Picture
from rlad.tasks.answers import decided_answer, normalised
from rlad.tasks.base import Judgement, Problem, Split, Task, Verdict, split_of, with_feedback

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 230),
    "yellow": (250, 220, 40),
    "purple": (148, 60, 190),
    "orange": (255, 127, 14),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
_BACKGROUND = (205, 205, 205)
INSTRUCTIONS = (
    "Name the shapes between <perception> and </perception> as in '<perception>large red circle, "
    "small blue square</perception>', row by row. Then think between <reasoning> and </reasoning>, "
    "and give the answer, a word or a number, between <answer> and </answer>.\n"
)


class Thing(NamedTuple):
    """A shape at one of the four places."""

    place: int
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


Scene = tuple[Thing, ...]
"""shapes in reading order"""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the thoughts that lead to it."""

    kind: str
    text: str
    answer: str
    thoughts: str


def random_scene(draw: random.Random) -> Scene:
    """Draw one to four shapes at different places."""
    places = sorted(draw.sample(range(4), draw.randint(1, 4)))
    return tuple(
        Thing(place, draw.choice(SIZES), draw.choice(list(COLOURS)), draw.choice(SHAPES))
        for place in places
    )


def perception(scene: Scene) -> str:
    """List the shapes of a scene as text."""
    return ", ".join(map(str, scene))


def scene_key(scene: Scene) -> str:
    """Return a scene's key: its shapes and their places."""
    return "; ".join(f"{PLACES[one.place]}: {one}" for one in scene)


def draw_scene(scene: Scene, size: int, draw: random.Random) -> Picture:
    """Draw a scene on a square of `size` pixels. Each shape is slightly off the centre of its
    place."""
    image = Image.new("RGB", (size, size), _BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        radius = size * (0.2 if thing.size == "large" else 0.1)
        room = size / 4 - radius
        x = size * (0.25 + 0.5 * (thing.place % 2)) + draw.uniform(-0.3, 0.3) * room
        y = size * (0.25 + 0.5 * (thing.place // 2)) + draw.uniform(-0.3, 0.3) * room
        box = (x - radius, y - radius, x + radius, y + radius)
        fill = COLOURS[thing.colour]
        if thing.shape == "circle":
            canvas.ellipse(box, fill)
        elif thing.shape == "square":
            canvas.rectangle(box, fill)
        else:
            corners = [(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)]
            canvas.polygon(corners, fill)
    return Picture.from_pil(image, scene_key(scene))


# --- questions ------------------------------------------------------------------------------------


def _counted(things: list[Thing]) -> str:
    """Write thoughts that count shapes."""
    return f"{perception(tuple(things))}: {len(things)}" if things else "none: 0"


def _count(scene: Scene, draw: random.Random) -> Question:
    shape = draw.choice(SHAPES)
    found = [one for one in scene if one.shape == shape]
    return Question("count", f"How many {shape}s are there?", str(len(found)), _counted(found))


def _colour_of_large(scene: Scene, draw: random.Random) -> Question | None:
    size = draw.choice(SIZES)
    found = [one for one in scene if one.size == size]
    if len(found) != 1:
        return None
    text = f"What colour is the only {size} shape?"
    return Question("colour", text, found[0].colour, str(found[0]))


def _difference(scene: Scene, draw: random.Random) -> Question | None:
    first, second = draw.sample(list(COLOURS), 2)
    more = [one for one in scene if one.colour == first]
    less = [one for one in scene if one.colour == second]
    if len(more) < len(less) or not more:
        return None
    text = f"How many more {first} than {second} shapes are there?"
    thoughts = f"{first} {len(more)}, {second} {len(less)}"
    return Question("difference", text, str(len(more) - len(less)), thoughts)


def _two_steps(scene: Scene, draw: random.Random) -> Question | None:
    size = draw.choice(SIZES)
    named = [one for one in scene if one.size == size]
    if len(named) != 1:
        return None
    text = f"How many shapes have the colour of the only {size} shape, itself included?"
    found = [one for one in scene if one.colour == named[0].colour]
    return Question("two steps", text, str(len(found)), f"{named[0].colour}, {_counted(found)}")


_KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": _count,
    "colour": _colour_of_large,
    "difference": _difference,
    "two steps": _two_steps,
}

_ANSWERS = {
    "count": ("0", "1", "2", "3"),
    "colour": tuple(COLOURS),
    "difference": ("0", "1", "2"),
    "two steps": ("1", "2", "3"),
}


# --- the task -------------------------------------------------------------------------------------

_PERCEPTION = re.compile(r"<perception>(.*?)</perception>", re.DOTALL)


def seen_in(completion: str) -> str | None:
    """Return the perception in a completion; None unless it has exactly one."""
    found = _PERCEPTION.findall(completion)
    return normalised(found[0]) if len(found) == 1 else None


def sees_rightly(problem: Problem, completion: str) -> bool:
    """Return whether a completion names all shapes of its picture, in reading order."""
    return _listed(seen_in(completion) or "") == _listed(problem.metadata["perception"])


def _listed(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(",")]


class Scenes(Task):
    """The task of questions about drawn scenes, split by scene."""

    name = "scenes"

    def __init__(self, **settings: Any):
        self.settings = ScenesConfig(**settings)

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        kinds = self.settings.kinds
        kind = kinds[index % len(kinds)]
        draw = random.Random(f"{seed}/{split}/{index}")
        # All answers are equally likely, so that guessing without the picture gains nothing.
        answer = draw.choice(_ANSWERS[kind])
        while True:
            scene = random_scene(draw)
            question = _KINDS[kind](scene, draw)
            if question is None or question.answer != answer:
                continue
            if split_of(scene_key(scene)) == split:
                return self._problem(scene, question, draw)

    def _problem(self, scene: Scene, question: Question, draw: random.Random) -> Problem:
        start = INSTRUCTIONS if self.settings.instructions else ""
        size = self.settings.picture_size
        if self.settings.shown:
            picture = draw_scene(scene, size, draw)
        else:
            picture = Picture.from_pil(Image.new("RGB", (size, size)), "a black picture")
        return Problem(
            f"<image>{start}{question.text}\n",
            question.answer,
            scene_key(scene),
            difficulty=question.kind,
            metadata={"perception": perception(scene), "thoughts": question.thoughts},
            images=(picture,),
        )

    def judge(self, problem: Problem, completion: str) -> Judgement:
        answer, _ = decided_answer(completion)
        is_right = normalised(answer).strip(" .") == problem.answer
        saw = sees_rightly(problem, completion)
        reward = float(is_right)
        if self.settings.reward == "perception_and_answer":
            reward = (saw + is_right) / 2
        if is_right:
            return Judgement(Verdict.CORRECT, reward)
        feedback = "" if saw else "The shapes are not named as they are in the picture."
        return with_feedback(Judgement(Verdict.WRONG, reward), feedback)


def model_answer(problem: Problem) -> str:
    """Write a completion with correct perception, thoughts and answer, for the student's
    warm-up."""
    seen, thoughts = (problem.metadata[name] for name in ("perception", "thoughts"))
    return (
        f"<perception>{seen}</perception><reasoning>{thoughts}</reasoning>"
        f"<answer>{problem.answer}</answer>"
    )


def blind_accuracy(task: Task, split: Split = "test", num_problems: int = 1000) -> float:
    """Measure the accuracy without pictures on problems of a split, if each question is answered
    with its most frequent answer among training problems."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for problem in _problems(task, "train", num_problems):
        answers[problem.prompt][problem.answer] += 1
    best = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    right = [best.get(one.prompt) == one.answer for one in _problems(task, split, num_problems)]
    return sum(right) / len(right)


def _problems(task: Task, split: Split, number: int) -> Iterator[Problem]:
    available = task.num_problems(split)
    for index in range(number if available is None else min(number, available)):
        yield task.problem(split, index)
