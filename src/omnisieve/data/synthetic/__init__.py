"""A synthetic audio-visual world as real media files (see `world.py`)."""

from omnisieve.data.synthetic.files import manifest_line, manifest_text, world_hash, write_clip, write_mp4
from omnisieve.data.synthetic.picture import draw_frames
from omnisieve.data.synthetic.questions import Question, all_questions, draw_questions
from omnisieve.data.synthetic.sound import make_waveform
from omnisieve.data.synthetic.world import DOMAINS, SPLITS, Clip, make_clip

__all__ = [
    "DOMAINS",
    "SPLITS",
    "Clip",
    "Question",
    "all_questions",
    "draw_frames",
    "draw_questions",
    "make_clip",
    "make_waveform",
    "manifest_line",
    "manifest_text",
    "world_hash",
    "write_clip",
    "write_mp4",
]
