"""Where a run's progress and numbers go: always to metrics.jsonl, on demand to tracking libraries. screen/live.py is one more.

base.py        what a stage reports (`Tracker`), and the trackers that need no library
libraries.py   the libraries, a class each, and TRACKERS: a new one is a class and a line there
guarded.py     opening them by name; a failing library never ends a training that runs
"""

from minicache.trackers.base import JsonLines, Silent, Tracker, TrackerGroup
from minicache.trackers.guarded import open_trackers
from minicache.trackers.libraries import TRACKERS, RunName

__all__ = ["TRACKERS", "JsonLines", "RunName", "Silent", "Tracker", "TrackerGroup", "open_trackers"]
