"""Campaigns on a schedule: a Prefect deployment served by this process."""

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Cron

from flows.campaign import campaign_flow
from flows.prefect_round import settings_parameters
from flows.settings import CampaignSettings, RoundSettings, Settings
from gnome.errors import InvalidInput


def serve_campaign(settings: Settings, wanted: RoundSettings, campaign: CampaignSettings, *, cron: str, name: str) -> None:
    """Serve the deployment until interrupted; a run that would overlap the one before is not started.

    Raises InvalidInput for a schedule that cannot be read.
    """
    try:
        schedule = Cron(cron)
    except ValueError as error:
        raise InvalidInput(f"--cron {cron!r} cannot be read ({error}); five fields are expected, as in '0 3 * * *'") from None
    campaign_flow.serve(
        name=name,
        schedule=schedule,
        parameters={
            "settings": settings_parameters(settings),
            "round_settings": wanted.to_dict(),
            "campaign": dict(vars(campaign)),
        },
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        pause_on_shutdown=False,
        description="Rounds of discovery: propose, filter, relax, learn.",
    )
