"""Where a run's progress and numbers go: metrics.jsonl always, a tracking library when asked. The screen (screen.py) is one more.

base.py        what a stage tells (`Tracker`), and the listeners that need no library
libraries.py   wandb, swanlab, tensorboard, trackio: one class each, TRACKERS
guarded.py     opening them by name; a failing library never ends a training that runs
"""

from minicache.trackers.base import Both, JsonLines, Silent, Tracker
from minicache.trackers.guarded import check_trackers, open_trackers
from minicache.trackers.libraries import TRACKERS, RunName

__all__ = ["TRACKERS", "Both", "JsonLines", "RunName", "Silent", "Tracker", "check_trackers", "open_trackers"]
