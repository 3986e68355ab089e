"""Rollouts from SGLang servers: client, supervision, the fleet behind one face, and recordings of them."""

from owpo_megatron.rollout.client import EngineClient, EngineGone
from owpo_megatron.rollout.fleet import Engine, Fleet, UrlEngine
from owpo_megatron.rollout.recorded import RecordedEngine, load_rollouts, rollouts_path, save_rollouts
from owpo_megatron.rollout.rendezvous import AnnouncedEngine, Announcement, announce, announce_failure, withdraw
from owpo_megatron.rollout.scorer import Scorer
from owpo_megatron.rollout.server import Server
from owpo_megatron.rollout.start import start_fleet

__all__ = [
    "AnnouncedEngine",
    "Announcement",
    "Engine",
    "EngineClient",
    "EngineGone",
    "Fleet",
    "RecordedEngine",
    "Scorer",
    "Server",
    "UrlEngine",
    "announce",
    "announce_failure",
    "load_rollouts",
    "rollouts_path",
    "save_rollouts",
    "start_fleet",
    "withdraw",
]
