"""Rollouts from SGLang servers: client, supervision, a fleet of servers used as one engine, recordings."""

from owpo_megatron.engine.client import EngineClient, EngineGone
from owpo_megatron.engine.fleet import Fleet
from owpo_megatron.engine.members import Engine, UrlEngine
from owpo_megatron.engine.recorded import RecordedEngine, load_rollouts, rollouts_path, save_rollouts
from owpo_megatron.engine.rendezvous import AnnouncedEngine, Announcement, announce, announce_failure, withdraw
from owpo_megatron.engine.scorer import Scorer
from owpo_megatron.engine.server import Server
from owpo_megatron.engine.start import start_fleet
from owpo_megatron.engine.turns import EngineTurns

__all__ = [
    "AnnouncedEngine",
    "Announcement",
    "Engine",
    "EngineClient",
    "EngineGone",
    "EngineTurns",
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
