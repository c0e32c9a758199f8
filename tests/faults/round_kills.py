"""Rounds that end themselves with SIGKILL in the middle of a stage; run in processes of their own by `test_round_kills`."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emt_world import round_settings, settings_in

from flows import filtering, learning, stages
from flows.loop import resume_campaign, run_campaign
from flows.settings import CampaignSettings
from flows.workspace import open_workspace
from gnome.database.ledger import Ledger
from gnome.database.store import Store

TINY = round_settings(n_screened=12, budget=5, n_scales=1, smallest_scale=1.0, largest_scale=1.0)
QUICK = replace(learning.FINE_TUNING, epochs=2, learning_rate=1e-3)  # large steps: EMT is far from PBE, its crystals are few

# Where to die: the stage, what is patched, and how many of its calls go well while that stage runs.
KILLS: dict[str, tuple[str, Any, str, int]] = {
    "propose": ("propose", Store, "add_candidates", 1),
    "propose, before it is entered": ("propose", Ledger, "complete", 0),
    "calibrate": ("calibrate", filtering, "fit_offset", 0),
    "look": ("look", filtering, "screen", 1),
    "look_again": ("look_again", filtering, "screen", 0),
    "screen": ("screen", Store, "add_predictions", 0),
    "select": ("select", filtering, "select", 0),
    "evaluate": ("evaluate", Store, "add_evaluations", 2),
    "assess, between crystals and what they mean": ("assess", Store, "assess_evaluations", 0),
    "assess, before the hull": ("assess", Store, "update_hull_columns", 0),
    "retrain": ("retrain", learning, "train_member", 2),
    "retrain, before it is promoted": ("retrain", Store, "promote_model", 0),
    "retrain, before it is entered": ("retrain", Ledger, "complete", 0),
    "finish": ("finish", Store, "finish_round", 0),
}


def play(folder: Path, data: Path, kill: str | None = None) -> None:
    """Run one round and learn from it; die where `kill` says."""
    torch.set_num_threads(1)
    learning.shipped_data = lambda: data
    stages.retrain = partial(learning.retrain, settings=QUICK)
    running: list[str] = []
    if kill is not None:
        stage, owner, name, good = KILLS[kill]
        setattr(owner, name, _dying(getattr(owner, name), good, lambda: stage == "finish" or running[-1:] == [stage]))

    def run(workspace: Any, number: int, stage: str, shard: int) -> dict[str, Any]:
        running.append(stage)
        return stages.run_shard(workspace, number, stage, shard)

    limits = CampaignSettings(rounds=1, retrain_after=1)
    with open_workspace(settings_in(folder), resume=True) as workspace:
        if workspace.store.rounds():
            resume_campaign(workspace, run=run)
        else:
            run_campaign(workspace, TINY, limits, run=run)


def _dying(function: Callable[..., Any], good: int, there: Callable[[], bool]) -> Callable[..., Any]:
    left = [good]

    def dying(*args: Any, **kwargs: Any) -> Any:
        if there():
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return function(*args, **kwargs)

    return dying
