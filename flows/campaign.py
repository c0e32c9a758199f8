"""A campaign as a Prefect flow: the shards of its rounds and retrainings are tasks."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, Final, cast
from uuid import UUID

from httpx import HTTPError
from prefect import flow
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import TerminationSignal

from flows.loop import campaign_of, latest_round, resume_campaign, run_campaign
from flows.prefect_round import leave_artifacts, listener, run_as_task, settings_parameters
from flows.prefect_server import use_server
from flows.reports import campaign_rows
from flows.rounds import Result
from flows.settings import CampaignSettings, RoundSettings, Settings
from flows.stages import STAGES, n_shards
from flows.workspace import Workspace, open_workspace
from gnome.errors import GnomeError

_INTERRUPTION: Final = "Execution was aborted by a"
"""What Prefect says, four times, of a run that Ctrl-C or a batch system ended."""


@flow(name="campaign", persist_result=True, result_serializer="json")
def campaign_flow(
    settings: dict[str, Any], round_settings: dict[str, Any], campaign: dict[str, Any], resume: bool = False, folder: str = ""
) -> list[dict[str, Any]]:
    """Run a campaign; its shards are tasks, its progress and its table are artifacts.  Returns one row a round.

    `folder`: where relative names are counted from and `gnome.toml` is looked for, where that is not where this process stands.
    """
    if folder:
        os.chdir(folder)
    wanted = RoundSettings.from_dict(round_settings)
    progress = cast(
        UUID, create_progress_artifact(progress=0.0, key="campaign-progress", description="Share of the stages that are done")
    )  # a flow that is not async gets the id itself
    first = 0

    def run(workspace: Workspace, number: int, stage: str, shard: int) -> Result:
        nonlocal first
        first = first or number
        result = run_as_task(workspace, number, stage, shard)
        share = share_done(stage, shard, n_shards(workspace, number, stage)) if stage in STAGES else 1.0
        update_progress_artifact(progress, progress=min(100.0, 100.0 * (number - first + share) / limits.rounds))
        return result

    asked = None if resume else wanted.evaluator
    with open_workspace(Settings(**settings), evaluator=asked, listener=listener(), resume=True) as workspace:
        limits = campaign_of(latest_round(workspace)) if resume else CampaignSettings(**campaign)
        rounds = resume_campaign(workspace, run=run) if resume else run_campaign(workspace, wanted, limits, run=run)
        for record in rounds:
            leave_artifacts(workspace, record)
        update_progress_artifact(progress, progress=100.0)
        rows = campaign_rows(workspace.store)
    create_table_artifact(key="campaign", table=rows, description="Hit rate and model error by round")
    return rows


def share_done(stage: str, shard: int, n_shards: int) -> float:
    """Share of a round that is done with a shard of a stage; learning from it is left."""
    return (STAGES.index(stage) + (shard + 1) / n_shards) / (len(STAGES) + 1)


def _short(record: logging.LogRecord) -> bool:
    """Take the traceback from a log record of what the command line says in one line, and pass over those of an interruption."""
    if record.exc_info and isinstance(record.exc_info[1], GnomeError | KeyboardInterrupt | HTTPError):
        record.exc_info = None
    return _INTERRUPTION not in record.getMessage()


def run_here(settings: Settings, wanted: RoundSettings, campaign: CampaignSettings, *, resume: bool) -> None:
    """Run the campaign flow in this process, on the Prefect server that is named or one of our own; raises GnomeError without one."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_short)
    with use_server(), _interruptible():
        campaign_flow(settings_parameters(settings), wanted.to_dict(), vars(campaign), resume=resume)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the end that a batch system asks for be an interruption, as it is elsewhere; Prefect has a signal of its own for it."""
    try:
        yield
    except TerminationSignal:
        raise KeyboardInterrupt from None
