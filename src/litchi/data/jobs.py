"""The jobs that one model learns, by the name of their source."""

from litchi.data.describe import describe
from litchi.data.draw import draw
from litchi.data.foresee import act, foresee, play
from litchi.data.talk import talk
from litchi.data.ticket import Job
from litchi.data.watch import watch

JOBS: dict[str, Job] = {
    "talk": talk,
    "describe": describe,
    "draw": draw,
    "foresee": foresee,
    "play": play,
    "watch": watch,
    "act": act,
}
