"""The round as a Prefect flow: a task is one shard of one stage, and takes and returns ids, numbers and paths.

The ledger in the database is the truth; Prefect shows what happens, retries what is transient, and keeps results as JSON.
"""

from functools import cache
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from flows.cli import make_console
from flows.finds import finds
from flows.progress import Bars
from flows.reports import products, round_lines
from flows.rounds import Result
from flows.settings import RoundSettings, Settings
from flows.stages import run_round, run_shard
from flows.workspace import Workspace, open_workspace
from gnome.database.engine import has_password
from gnome.database.leases import join_round
from gnome.database.records import RoundRecord
from gnome.errors import DatabaseUnavailable
from gnome.quantities import Quantity


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Retry only what may pass: a database that was locked or away."""
    return isinstance(state.result(raise_on_failure=False), DatabaseUnavailable)


@task(
    name="shard",
    task_run_name="round {number}: {stage} {shard}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=_is_transient,
    persist_result=True,
    result_serializer="json",
    cache_policy=NO_CACHE,
)
def shard_task(settings: dict[str, Any], evaluator: str, number: int, stage: str, shard: int, token: int | None) -> Result:
    """Run one shard of a stage; see `flows.stages.run_shard`."""
    with open_workspace(Settings(**settings), evaluator=evaluator, listener=listener()) as workspace:
        if token is not None:
            join_round(workspace.store, token)
        return run_shard(workspace, number, stage, shard)


@cache
def listener() -> Bars:
    """Whom the stages of this process tell how far they are: one for all shards, so that a stage of many has one clock and one bar."""
    return Bars(make_console(stderr=True))


def settings_parameters(settings: Settings) -> dict[str, Any]:
    """Settings as parameters of a run; a database URL with a password stays in the environment, where each run reads it again."""
    plain = settings.model_dump(mode="json")
    if settings.database_url and has_password(settings.database_url):
        del plain["database_url"]
    return plain


def run_as_task(workspace: Workspace, number: int, stage: str, shard: int) -> Result:
    """Run a shard as a task of the flow that is running; what `run_round` is given in place of `run_shard`."""
    fence = workspace.store.fence
    settings = settings_parameters(workspace.settings)
    result = shard_task(settings, workspace.evaluator_name, number, stage, shard, None if fence is None else fence.token)
    get_run_logger().info("round %d: %s %d took %.1f s", number, stage, shard, result.get("seconds", 0.0))
    return result


@flow(name="round", persist_result=True, result_serializer="json")
def round_flow(settings: dict[str, Any], round_settings: dict[str, Any]) -> dict[str, Any]:
    """Run one round and leave its table behind as artifacts; returns the round's summary."""
    wanted = RoundSettings.from_dict(round_settings)
    with open_workspace(Settings(**settings), evaluator=wanted.evaluator, listener=listener(), resume=True) as workspace:
        record = run_round(workspace, wanted, run=run_as_task)
        leave_artifacts(workspace, record)
        return {"round": record.number, **(record.summary or {})}


def leave_artifacts(workspace: Workspace, record: RoundRecord) -> None:
    """Show the round's discoveries and its figures on the flow run's page."""
    rows = [
        {
            "formula": row[Quantity.REDUCED_FORMULA],
            "prototype": str(row[Quantity.PROTOSTRUCTURE] or "").split(":", 1)[0],
            str(Quantity.E_FORM_PER_ATOM): row[Quantity.E_FORM_PER_ATOM],
            str(Quantity.E_ABOVE_HULL): row[Quantity.E_ABOVE_HULL],
            "parent": row["parent_formula"],
            "competes with": products(row),
            "speaks against it": "; ".join(row["doubts"]),
            "id": row[Quantity.ID],
        }
        for row in finds(workspace.store, record)[:100]
    ]
    create_table_artifact(key="discoveries", table=rows, description=f"New crystals of round {record.number}")
    create_markdown_artifact(key="round-summary", markdown="\n".join(f"- {line}" for line in round_lines(record)))
