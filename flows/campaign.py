"""A campaign as a Prefect flow: the shards of its rounds and retrainings are tasks."""

import logging
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.loop import campaign_of, latest_round, resume_campaign, run_campaign
from flows.prefect_round import leave_artifacts, run_as_task, settings_parameters
from flows.reports import campaign_rows
from flows.rounds import Result
from flows.settings import CampaignSettings, RoundSettings, Settings
from flows.stages import STAGES
from flows.workspace import Workspace, open_workspace
from gnome.errors import GnomeError


@flow(name="campaign", persist_result=True, result_serializer="json")
def campaign_flow(
    settings: dict[str, Any], round_settings: dict[str, Any], campaign: dict[str, Any], resume: bool = False
) -> list[dict[str, Any]]:
    """Run a campaign; its shards are tasks, its progress and its table are artifacts.  Returns one row a round."""
    wanted = RoundSettings.from_dict(round_settings)
    progress = cast(
        UUID, create_progress_artifact(progress=0.0, key="campaign-progress", description="Share of the stages that are done")
    )  # a flow that is not async gets the id itself
    done = 0

    def run(workspace: Workspace, number: int, stage: str, shard: int) -> Result:
        nonlocal done
        result = run_as_task(workspace, number, stage, shard)
        if stage in STAGES and shard == 0:
            done += 1
            update_progress_artifact(progress, progress=min(100.0, 100.0 * done / (limits.rounds * len(STAGES))))
        return result

    with open_workspace(Settings(**settings), evaluator=None if resume else wanted.evaluator, resume=True) as workspace:
        limits = campaign_of(latest_round(workspace)) if resume else CampaignSettings(**campaign)
        rounds = resume_campaign(workspace, run=run) if resume else run_campaign(workspace, wanted, limits, run=run)
        for record in rounds:
            leave_artifacts(workspace, record)
        rows = campaign_rows(workspace.store)
    create_table_artifact(key="campaign", table=rows, description="Hit rate and model error by round")
    return rows


def _deliberate_errors_in_one_line(record: logging.LogRecord) -> bool:
    """Take the traceback from a log record of an error of this project; the command line says it in one line."""
    if record.exc_info and isinstance(record.exc_info[1], GnomeError):
        record.exc_info = None
    return True


def run_here(settings: Settings, wanted: RoundSettings, campaign: CampaignSettings, *, resume: bool) -> None:
    """Run the campaign flow in this process; Prefect's own database in memory or file serves, no server is needed."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_deliberate_errors_in_one_line)
    campaign_flow(settings_parameters(settings), wanted.to_dict(), vars(campaign), resume=resume)
