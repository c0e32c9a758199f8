"""A campaign as plain Python: rounds, and after those with enough new answers a retraining."""

from flows.learning import new_answers
from flows.rounds import round_method, round_settings
from flows.settings import CampaignSettings, RoundSettings
from flows.stages import ShardRunner, run_round, run_shard
from flows.workspace import Workspace
from gnome.database.leases import hold_round, round_holder
from gnome.database.records import RoundRecord
from gnome.errors import InvalidInput


def run_campaign(
    workspace: Workspace, settings: RoundSettings, campaign: CampaignSettings, *, run: ShardRunner = run_shard
) -> list[RoundRecord]:
    """Run rounds and retrainings; a round that was interrupted is finished first and counts as one of them.

    Raises InvalidInput when that one works with another evaluator.
    """
    unfinished = workspace.store.open_round()
    running = round_holder(workspace.store) is not None  # then the round below says so
    if (
        unfinished is not None
        and not running
        and (begun := round_settings(workspace, unfinished.number).evaluator) != settings.evaluator
    ):
        raise InvalidInput(
            f"round {unfinished.number} is unfinished and works with {begun}, the campaign would with {settings.evaluator}; finish it with "
            "`gnome discover`, or give it up with `gnome campaign abandon`"
        )
    finished = [record.number for record in workspace.store.rounds() if record.state != "running"]
    last = max(finished, default=0) + campaign.rounds
    return _until(workspace, settings, campaign, last, run)


def resume_campaign(workspace: Workspace, *, run: ShardRunner = run_shard) -> list[RoundRecord]:
    """Go on with the campaign that the last round belongs to, with the settings it began with.

    Raises InvalidInput when there is nothing to go on with.
    """
    latest = latest_round(workspace)
    return _until(workspace, round_settings(workspace, latest.number), campaign_of(latest), campaign_end(latest), run)


def campaign_of(record: RoundRecord) -> CampaignSettings:
    """What is left of the campaign that a round belongs to; a round of its own is one of a single round."""
    kept = record.settings.get("campaign") or {}
    finished = record.state != "running"
    left = campaign_end(record) - record.number + (0 if finished else 1)
    usual = CampaignSettings()
    return CampaignSettings(
        rounds=max(1, left),
        retrain_after=kept.get("retrain_after", usual.retrain_after),
        precision=kept.get("precision", usual.precision),
    )


def campaign_end(record: RoundRecord) -> int:
    """Number of the last round of the campaign that a round belongs to."""
    return int((record.settings.get("campaign") or {}).get("campaign_until", record.number))


def latest_round(workspace: Workspace) -> RoundRecord:
    """Find the last round that was begun; raises InvalidInput when there is none."""
    rounds = workspace.store.rounds()
    if not rounds:
        raise InvalidInput(f"{workspace.store.location} has no round; start with `gnome campaign run`")
    return rounds[-1]


def _until(
    workspace: Workspace, settings: RoundSettings, campaign: CampaignSettings, last: int, run: ShardRunner
) -> list[RoundRecord]:
    done: list[RoundRecord] = []
    kept = {"campaign_until": last, "retrain_after": campaign.retrain_after, "precision": campaign.precision}
    rounds = workspace.store.rounds()
    if rounds and rounds[-1].state == "finished":
        _learn(workspace, rounds[-1].number, campaign, run)
    while not rounds or rounds[-1].number < last or rounds[-1].state == "running":
        record = run_round(workspace, settings, run=run, campaign=kept)
        done.append(record)
        _learn(workspace, record.number, campaign, run)
        rounds = workspace.store.rounds()
    return done


def _learn(workspace: Workspace, number: int, campaign: CampaignSettings, run: ShardRunner) -> None:
    """Retrain after a round if there is enough to learn and this was not done."""
    begun = workspace.ledger.find(number, "retrain", 0)
    if begun is not None and begun.state == "done":
        return
    if begun is None and new_answers(workspace, round_method(workspace, number)) < campaign.retrain_after:
        return
    with hold_round(workspace.store):
        run(workspace, number, "retrain", 0)
