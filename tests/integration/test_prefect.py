"""Rounds, retraining and campaigns as Prefect flows, on a server that the tests start for themselves."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from emt_world import copy_world, round_settings, tables

from flows import learning
from flows.loop import run_campaign
from flows.settings import CampaignSettings
from flows.stages import STAGES, run_round, run_shard
from flows.workspace import open_workspace
from gnome.errors import RoundBusy

pytestmark = pytest.mark.usefixtures("own_folder")
TINY = round_settings(n_candidates=40, n_screened=10, budget=4, n_scales=1, smallest_scale=1.0, largest_scale=1.0)
LIMITS = CampaignSettings(rounds=2, retrain_after=6)


@pytest.fixture(scope="module", autouse=True)
def server(own_places: Path) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def quick(emt_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "shipped_data", lambda: emt_data)
    settings = learning.replace(learning.FINE_TUNING, epochs=2)
    monkeypatch.setattr("flows.stages.retrain", partial(learning.retrain, settings=settings))


def asked(kind: str, state: Any) -> list[dict[str, Any]]:
    """What the server knows of a flow run's tasks or artifacts."""
    from prefect.client.orchestration import get_client

    of_run = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}, "limit": 200}
    with get_client(sync_client=True) as client:
        return list(client.request("POST", f"/{kind}/filter", json=of_run).json())


def artifacts_of(state: Any) -> dict[str, Any]:
    return {artifact["key"]: artifact["data"] for artifact in asked("artifacts", state)}


def test_a_round_as_a_flow_gives_the_tables_of_plain_python_with_a_task_a_shard(emt_world: Path, tmp_path: Path) -> None:
    from flows.prefect_round import round_flow

    with open_workspace(copy_world(emt_world, tmp_path / "plain")) as workspace:
        expected = run_round(workspace, TINY)
    settings = copy_world(emt_world, tmp_path / "flow").model_dump(mode="json")
    state = round_flow(settings, TINY.to_dict(), return_state=True)
    summary: dict[str, Any] = state.result()  # type: ignore[assignment]
    assert expected.summary is not None
    assert summary["round"] == 1
    assert summary["hit_rate"] == expected.summary["hit_rate"]
    assert tables(tmp_path / "flow") == tables(tmp_path / "plain")
    tasks = asked("task_runs", state)
    assert sorted(task["name"] for task in tasks) == sorted(f"round 1: {stage} 0" for stage in STAGES)
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    artifacts = artifacts_of(state)
    assert {"discoveries", "round-summary"} <= set(artifacts)
    assert "Hit rate" in artifacts["round-summary"]


def test_a_campaign_as_a_flow_learns_and_gives_the_tables_of_plain_python(emt_world: Path, tmp_path: Path) -> None:
    from flows.campaign import campaign_flow

    with open_workspace(copy_world(emt_world, tmp_path / "plain")) as workspace:
        run_campaign(workspace, TINY, LIMITS)
    settings = copy_world(emt_world, tmp_path / "flow").model_dump(mode="json")
    state = campaign_flow(settings, TINY.to_dict(), dict(vars(LIMITS)), return_state=True)
    rows: list[dict[str, Any]] = state.result()  # type: ignore[assignment]
    assert [row["retrained"] is not None for row in rows] == [False, True]
    assert tables(tmp_path / "flow") == tables(tmp_path / "plain")
    names = sorted(task["name"] for task in asked("task_runs", state))
    assert names == sorted([*(f"round {n}: {stage} 0" for n in (1, 2) for stage in STAGES), "round 2: retrain 0"])
    artifacts = artifacts_of(state)
    assert {"campaign", "campaign-progress", "discoveries", "round-summary"} <= set(artifacts)
    assert artifacts["campaign-progress"] == 100.0


def test_the_progress_of_a_round_is_what_its_shards_have_done() -> None:
    from flows.campaign import share_done

    n_of = {"propose": 1, "look": 5, "evaluate": 2}
    shares = [share_done(stage, shard, n_of.get(stage, 1)) for stage in STAGES for shard in range(n_of.get(stage, 1))]
    assert shares == sorted(set(shares)), "no stage is done with its first shard"
    assert shares[-1] == len(STAGES) / (len(STAGES) + 1), "learning is left"


def test_retraining_as_a_flow_gives_the_model_of_plain_python(after_round: Path, tmp_path: Path) -> None:
    from flows.retraining import retraining_flow

    with open_workspace(copy_world(after_round, tmp_path / "plain")) as workspace:
        expected = run_shard(workspace, 1, "retrain", 0)
    settings = copy_world(after_round, tmp_path / "flow").model_dump(mode="json")
    state = retraining_flow(settings, "emt", 1, return_state=True)
    result: dict[str, Any] = state.result()  # type: ignore[assignment]
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert tables(tmp_path / "flow") == tables(tmp_path / "plain")
    verdict = artifacts_of(state)["retraining"]
    assert f"{expected['error_after']:.4f} eV/atom" in verdict


def test_a_flow_that_was_interrupted_is_gone_on_with(emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.prefect_round import round_flow

    with open_workspace(copy_world(emt_world, tmp_path / "plain")) as workspace:
        run_round(workspace, TINY)
    settings = copy_world(emt_world, tmp_path / "flow").model_dump(mode="json")
    with monkeypatch.context() as patch:
        patch.setattr("flows.filtering.select", lambda *_: 1 / 0)
        failed = round_flow(settings, TINY.to_dict(), return_state=True)
    assert failed.is_failed()
    assert round_flow(settings, TINY.to_dict())["round"] == 1
    assert tables(tmp_path / "flow") == tables(tmp_path / "plain")


def test_a_flow_waits_for_no_other_round_on_the_same_database(emt_world: Path, tmp_path: Path) -> None:
    from flows.prefect_round import round_flow
    from gnome.database.leases import hold_round

    settings = copy_world(emt_world, tmp_path)
    with open_workspace(settings) as workspace, hold_round(workspace.store, owner="1@elsewhere#0.0"):
        state = round_flow(settings.model_dump(mode="json"), TINY.to_dict(), return_state=True)
    assert state.is_failed()
    with pytest.raises(RoundBusy, match="1@elsewhere"):
        state.result()
