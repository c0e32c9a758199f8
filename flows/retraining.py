"""Retraining as a Prefect flow: after a round with enough new answers, by hand or in a campaign."""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.prefect_round import run_as_task
from flows.settings import Settings
from flows.workspace import open_workspace
from gnome.database.leases import hold_round


@flow(name="retraining", persist_result=True, result_serializer="json")
def retraining_flow(settings: dict[str, Any], evaluator: str, number: int) -> dict[str, Any]:
    """Fine-tune the structural ensemble on all answers up to a round; promote it if it is not worse."""
    with open_workspace(Settings(**settings), evaluator=evaluator) as workspace, hold_round(workspace.store):
        result = run_as_task(workspace, number, "retrain", 0)
    if "skipped" in result:
        create_markdown_artifact(key="retraining", markdown=f"After round {number}: {result['skipped']}.")
        return result
    verdict = "promoted" if result["promoted"] else "not promoted: it was worse"
    create_markdown_artifact(
        key="retraining",
        markdown=f"After round {number}: validation error {result['error_before']:.4f} -> {result['error_after']:.4f} eV/atom, {verdict}.",
    )
    return result
